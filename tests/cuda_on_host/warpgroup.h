// What a warp has under way in wgmma.
#pragma once

#include <deque>
#include <list>
#include <memory>

#include "machine.h"

namespace cuda_on_host {

class Product;

// Registers of a warp that products under way accumulate into: rows of 16, columns of N.
struct Accumulator {
    int N = 0;
    int products = 0;           // that are to come
    float* registers[32] = {};  // of each lane; NaN until the products are over
    alignas(64) float values[16][256];
};

class Products {
  public:
    std::deque<std::shared_ptr<Product>> under_way;
    uint64_t begun = 0, over = 0;
    std::list<Accumulator> accumulators;
    std::vector<Thread*> waiting;
    char order = 0;  // an address for the thread sanitizer
};

}  // namespace cuda_on_host
