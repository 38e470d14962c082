// A tile's values as a plane: the mixed axis down, whatever is mixed alike across, and a row's end in whole vectors.
//
// Memory has rows of F features. Where patches or channels are mixed, K rows of an image lie below each other in the
// plane, images side by side: columns are (image, feature). Where features are mixed a row becomes a column.
#pragma once

#include "norm.h"

namespace {

// Between rows of a plane: whole cache lines, an odd number of them, so that a column of lines is spread over the
// cache; and room for a vector that starts in the last column.
inline int64_t plane_stride(int64_t columns) {
    constexpr int64_t kLine = 16;
    return (divided_up(columns + kLanes, kLine) | 1) * kLine;
}

struct Shape {
    int64_t K;      // along the mixed axis
    int64_t F;      // features
    bool features;  // that those are mixed
};

// Rows in memory that make up `count` images, or `count` rows.
inline int64_t rows_of(Shape shape, int64_t count) { return shape.features ? count : count * shape.K; }
inline int64_t columns_of(Shape shape, int64_t count) { return shape.features ? count : count * shape.F; }

// Up to kLanes rows as columns: `row(i)` gives the address of a row in whole vectors.
template <class ROW>
inline void rows_to_columns(int64_t rows, int64_t F, ROW row, float* plane, int64_t stride) {
    for (int64_t f = 0; f < F; f += kLanes) {
        Vector tile[kLanes];
        for (int i = 0; i < kLanes; ++i) tile[i] = i < rows ? load(row(i) + f) : Vector{};
        transpose(tile);
        for (int i = 0; i < kLanes && f + i < F; ++i) store(plane + (f + i) * stride, tile[i]);
    }
}

// kLanes columns as rows of whole vectors.
inline void columns_to_rows(const float* plane, int64_t stride, int64_t F, float* rows, int64_t row_stride) {
    for (int64_t f = 0; f < F; f += kLanes) {
        Vector tile[kLanes];
        for (int i = 0; i < kLanes; ++i) tile[i] = f + i < F ? load(plane + (f + i) * stride) : Vector{};
        transpose(tile);
        for (int i = 0; i < kLanes; ++i) store(rows + i * row_stride + f, tile[i]);
    }
}

// Each row in memory goes through `change(row, out)`, which writes whole vectors, into the plane.
// `rows` has room for kLanes rows of whole vectors.
template <class CHANGE>
inline void fill_plane(Shape shape, int64_t count, CHANGE change, float* plane, int64_t stride, float* rows) {
    if (shape.features) {
        const int64_t row_stride = round_up(shape.F, kLanes);
        for (int64_t r = 0; r < count; r += kLanes) {
            const int64_t left = least(count - r, kLanes);
            for (int64_t i = 0; i < left; ++i) change(r + i, rows + i * row_stride);
            rows_to_columns(left, shape.F, [&](int64_t i) { return rows + i * row_stride; }, plane + r, stride);
        }
        return;
    }
    // An image's vectors end in the columns of the next image, which come later.
    for (int64_t k = 0; k < shape.K; ++k) store(plane + k * stride + count * shape.F, Vector{});
    for (int64_t image = 0; image < count; ++image)
        for (int64_t k = 0; k < shape.K; ++k) change(image * shape.K + k, plane + k * stride + image * shape.F);
}

// `use(row, values)` for each row in memory, with the values of the plane as a row of whole vectors.
template <class USE>
inline void read_plane(Shape shape, int64_t count, const float* plane, int64_t stride, float* rows, USE use) {
    if (shape.features) {
        const int64_t row_stride = round_up(shape.F, kLanes);
        for (int64_t r = 0; r < count; r += kLanes) {
            columns_to_rows(plane + r, stride, shape.F, rows, row_stride);
            for (int64_t i = 0; i < least(count - r, kLanes); ++i) use(r + i, rows + i * row_stride);
        }
        return;
    }
    for (int64_t image = 0; image < count; ++image)
        for (int64_t k = 0; k < shape.K; ++k) use(image * shape.K + k, plane + k * stride + image * shape.F);
}

}  // namespace
