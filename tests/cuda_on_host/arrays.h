// What drivers of launchers hold their inputs and results in.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_on_host.h"
#include "machine.h"
#include "mixer_kernels.h"
#include "sanitizers.h"

using cuda_on_host::Random;

inline int64_t padded(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
inline size_t bytes_of(mk_type type) { return type == MK_FLOAT32 ? 4 : 2; }

inline void check(const char* launcher, int error) {
    if (error != 0) throw std::runtime_error(std::string(launcher) + ": " + mk_error_string(error));
}

// Rows of numbers that start as NaN, between two zones that nobody may touch.
class Array {
  public:
    Array(std::string name, mk_type type, int64_t rows, int64_t columns, int64_t stride = 0)
        : name_(std::move(name)),
          type_(type),
          rows_(rows),
          columns_(columns),
          stride_(stride == 0 ? columns : stride),
          bytes_(rows * stride_ * bytes_of(type)),
          memory_(bytes_ + 3 * ZONE, static_cast<char>(0xff)) {
        begin_ = memory_.data() + ZONE + -reinterpret_cast<uintptr_t>(memory_.data()) % ZONE;
        cuda_on_host::poison(memory_.data(), begin_ - memory_.data());
        cuda_on_host::poison(begin_ + bytes_, memory_.data() + memory_.size() - begin_ - bytes_);
    }
    ~Array() { cuda_on_host::unpoison(memory_.data(), memory_.size()); }
    Array(const Array&) = delete;
    Array& operator=(const Array&) = delete;

    operator void*() { return begin_; }
    float* floats() { return reinterpret_cast<float*>(begin_); }

    Array& fill(Random& random, float low, float high) {
        for (int64_t i = 0; i < rows_ * stride_; ++i) {
            const float value = low + (high - low) * static_cast<float>(random.next()) * 0x1p-32f;
            if (type_ == MK_FLOAT32) {
                floats()[i] = value;
            } else {
                reinterpret_cast<uint16_t*>(begin_)[i] =
                    type_ == MK_FLOAT16 ? cuda_on_host::to_float16(value) : cuda_on_host::to_bfloat16(value);
            }
        }
        return *this;
    }

    float at(int64_t row, int64_t column) const {
        const int64_t i = row * stride_ + column;
        if (type_ == MK_FLOAT32) return reinterpret_cast<const float*>(begin_)[i];
        const uint16_t bits = reinterpret_cast<const uint16_t*>(begin_)[i];
        return type_ == MK_FLOAT16 ? cuda_on_host::from_float16(bits) : cuda_on_host::from_bfloat16(bits);
    }

    // Throws unless all numbers are finite and all that lies around them is as it was.
    void check() {
        cuda_on_host::unpoison(memory_.data(), memory_.size());
        for (const char& byte : memory_) {
            const bool inside = &byte >= begin_ && &byte < begin_ + bytes_;
            if (!inside && byte != static_cast<char>(0xff)) {
                throw std::runtime_error(name_ + ": a write at byte " + std::to_string(&byte - begin_) + " of " +
                                         std::to_string(bytes_));
            }
        }
        for (int64_t row = 0; row < rows_; ++row) {
            if (skips(row)) continue;
            for (int64_t column = 0; column < columns_; ++column) {
                if (!std::isfinite(at(row, column))) {
                    throw std::runtime_error(name_ + " [" + std::to_string(row) + ", " + std::to_string(column) +
                                             "] is " + std::to_string(at(row, column)));
                }
            }
        }
    }

    // Rows may stay as they were: those of images that stochastic depth drops.
    Array& skips_rows(bool may) {
        skips_rows_ = may;
        return *this;
    }

    bool skips(int64_t row) const { return skips_rows_ && is_untouched(row); }

    const std::string& name() const { return name_; }
    int64_t rows() const { return rows_; }
    int64_t columns() const { return columns_; }
    std::vector<char> contents() const { return {begin_, begin_ + bytes_}; }

  private:
    static constexpr size_t ZONE = 256;

    bool is_untouched(int64_t row) const {
        const size_t row_bytes = stride_ * bytes_of(type_);
        return std::all_of(begin_ + row * row_bytes, begin_ + (row + 1) * row_bytes,
                           [](char byte) { return byte == static_cast<char>(0xff); });
    }

    std::string name_;
    bool skips_rows_ = false;
    mk_type type_;
    int64_t rows_, columns_, stride_;
    size_t bytes_;
    std::vector<char> memory_;
    char* begin_;
};
