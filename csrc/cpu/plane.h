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
    int64_t K;           // along the mixed axis
    int64_t F;           // features
    bool features;       // that those are mixed
    int64_t first, row;  // of a row's features, over which its statistics are, those F are from `first` on
};

// Rows in memory that make up `count` images, or `count` rows.
inline int64_t rows_of(Shape shape, int64_t count) { return shape.features ? count : count * shape.K; }
inline int64_t columns_of(Shape shape, int64_t count) { return shape.features ? count : count * shape.F; }

// kLanes rows of whole vectors become columns; of the features that there are.
inline void rows_to_columns(const float* rows, int64_t row_stride, int64_t F, float* plane, int64_t stride) {
    for (int64_t f = 0; f < F; f += kLanes) {
        Vector tile[kLanes];
        for (int i = 0; i < kLanes; ++i) tile[i] = load(rows + i * row_stride + f);
        transpose(tile);
        for (int i = 0; i < kLanes && f + i < F; ++i) store(plane + (f + i) * stride, tile[i]);
    }
}

inline void columns_to_rows(const float* plane, int64_t stride, int64_t F, float* rows, int64_t row_stride) {
    for (int64_t f = 0; f < F; f += kLanes) {
        Vector tile[kLanes];
        for (int i = 0; i < kLanes; ++i) tile[i] = f + i < F ? load(plane + (f + i) * stride) : Vector{};
        transpose(tile);
        for (int i = 0; i < kLanes; ++i) store(rows + i * row_stride + f, tile[i]);
    }
}

// The plane of `count` images or rows, and where the rows of memory are in it.
struct Plane {
    Shape shape;
    int64_t count, stride;
    float* data;
    float* rows;  // room for kLanes rows of whole vectors

    int64_t row_stride() const { return round_up(shape.F, kLanes); }

    // `fill(first, number, places)` writes up to kLanes rows at places of whole vectors.
    template <class FILL>
    void fill(FILL fill) const {
        const int64_t all = rows_of(shape, count);
        if (shape.features) {
            for (int64_t i = 0; i < kLanes * row_stride(); ++i) rows[i] = 0.0f;
        } else {
            // An image's vectors end in the columns of the next image, which come later.
            for (int64_t k = 0; k < shape.K; ++k) store(data + k * stride + count * shape.F, Vector{});
        }
        for (int64_t row = 0; row < all; row += kLanes) {
            float* places[kLanes];
            const int64_t number = least(all - row, kLanes);
            at(row, number, places);
            fill(row, number, places);
            if (shape.features) rows_to_columns(rows, row_stride(), shape.F, data + row, stride);
        }
    }

    // `use(first, number, places)` reads them.
    template <class USE>
    void read(USE use) const {
        const int64_t all = rows_of(shape, count);
        for (int64_t row = 0; row < all; row += kLanes) {
            float* places[kLanes];
            const int64_t number = least(all - row, kLanes);
            at(row, number, places);
            if (shape.features) columns_to_rows(data + row, stride, shape.F, rows, row_stride());
            use(row, number, places);
        }
    }

  private:
    void at(int64_t row, int64_t number, float** places) const {
        int64_t k = shape.features ? 0 : row % shape.K, column = shape.features ? 0 : row / shape.K * shape.F;
        for (int64_t i = 0; i < number; ++i) {
            places[i] = shape.features ? rows + i * row_stride() : data + k * stride + column;
            if (++k == shape.K) k = 0, column += shape.F;
        }
    }
};

// across = plane', K columns in rows of whole vectors.
inline void turn(const float* plane, int64_t stride, int64_t K, int64_t count, float* across) {
    const int64_t width = round_up(K, kLanes);
    for (int64_t c = 0; c < count; c += kLanes)
        for (int64_t k = 0; k < K; k += kLanes) {
            Vector tile[kLanes];
            for (int i = 0; i < kLanes; ++i) tile[i] = k + i < K ? load(plane + (k + i) * stride + c) : Vector{};
            transpose(tile);
            for (int i = 0; i < kLanes; ++i) store(across + (c + i) * width + k, tile[i]);
        }
}

// to [rows] += the sums of a plane's rows.
inline void add_rows(int64_t rows, int64_t count, const float* plane, int64_t stride, float* to) {
    for (int64_t r = 0; r < rows; ++r) {
        Vector total{};
        for (int64_t c = 0; c < count; c += kLanes) total += only(load(plane + r * stride + c), count - c);
        to[r] += sum(total);
    }
}

}  // namespace
