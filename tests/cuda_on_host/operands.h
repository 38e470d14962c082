// An operand of wgmma in shared memory. PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory Layout" and "Matrix
// descriptor".
#pragma once

#include "machine.h"
#include "sanitizers.h"
#include "swizzle.h"

namespace cuda_on_host {

class SharedOperand {
  public:
    SharedOperand(uint64_t descriptor, bool mn_major, const Thread& issuer, Where where);

    // set(row, k, value) for `rows` rows of M or N from `first`, a multiple of 8, and the 16 of K.
    template <class F>
    void read(Operands type, int first, int rows, F set) const {
        const auto decode = type == Operands::bfloat16 ? from_bfloat16 : from_float16;
        uint16_t eight[8];
        if (mn_major_) {
            for (int row = first; row < first + rows; row += 8) {
                for (int k = 0; k < 16; ++k) {
                    fetch(mn_major(row / 8, k), eight);
                    for (int i = 0; i < 8; ++i) set(row + i, k, decode(eight[i]));
                }
            }
        } else {
            for (int row = first; row < first + rows; ++row) {
                for (int k = 0; k < 16; k += 8) {
                    fetch(k_major(row, k / 8), eight);
                    for (int i = 0; i < 8; ++i) set(row, k + i, decode(eight[i]));
                }
            }
        }
    }

  private:
    // Where the 16 bytes lie that hold 8 elements of a row, or of a k, before swizzling.
    shared_address k_major(int row, int eighth) const {
        const int pitch = width_ == 0 ? 16 : width_, next = width_ == 0 ? leading_ : 16;
        return start_ + row % 8 * pitch + row / 8 * stride_ + eighth * next;
    }
    shared_address mn_major(int eighth, int k) const {
        if (width_ == 0) return start_ + k % 8 * 16 + k / 8 * leading_ + eighth * stride_;
        const int in_row = width_ / 16;
        return start_ + k % 8 * width_ + k / 8 * stride_ + eighth % in_row * 16 + eighth / in_row * leading_;
    }
    void fetch(shared_address address, uint16_t (&eight)[8]) const;

    bool mn_major_;
    int width_;  // of the swizzle's pattern, in bytes
    shared_address start_;
    int leading_, stride_;
    const Thread& issuer_;
    Where where_;
};

}  // namespace cuda_on_host
