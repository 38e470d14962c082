// Swizzling: PTX ISA, "Swizzling modes". A bit pattern of the address in shared memory, the same to TMA and to wgmma.
#pragma once

#include "cuda_on_host.h"

namespace cuda_on_host {

// bytes: 0, 32, 64 or 128. The number of the 16 bytes within the pattern's row, xor the number of the 128 bytes within
// the 8 rows that the pattern has.
inline shared_address swizzled(shared_address address, int bytes) {
    const shared_address chunks = bytes == 0 ? 0 : static_cast<shared_address>(bytes / 16 - 1);
    return address ^ ((address >> 3) & (chunks << 4));
}

}  // namespace cuda_on_host
