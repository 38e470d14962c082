// Memory of a thread, cut into pieces.
#pragma once

#include "vectors.h"

namespace {

// Without memory it counts them.
class Arena {
  public:
    explicit Arena(float* memory) : memory_(memory) {}

    float* take(int64_t floats) {
        const int64_t first = used_;
        used_ += round_up(floats, 16);
        most_ = largest(most_, used_);
        return memory_ ? memory_ + first : nullptr;
    }

    int64_t used() const { return used_; }
    int64_t most() const { return most_; }
    void back_to(int64_t used) { used_ = used; }

  private:
    float* memory_;
    int64_t used_ = 0, most_ = 0;
};

}  // namespace
