// How many registers a block's warps ask for: PTX ISA, "setmaxnreg".

#include "machine.h"
#include "sanitizers.h"

namespace cuda_on_host {

void set_registers(int count, Where where) {
    const Unseen unseen;
    Block& block = *current->block;
    if (block.threads % 128 != 0) {
        fault("setmaxnreg in a block of " + std::to_string(block.threads) + " threads, not whole warpgroups", where);
    }
    meet("setmaxnreg", count, Memory::unordered, nullptr, nullptr, where);
    block.registers.resize(block.threads / warpSize);
    block.registers[current->warp] = count;
}

void check_registers(const Block& block) {
    constexpr int all = 64 << 10;
    const int each = all / block.threads / 8 * 8;  // at first
    int sum = 0;
    for (const int count : block.registers) sum += warpSize * (count == 0 ? each : count);
    if (sum > all) {
        throw Fault(name_of(block) + ": its warps ask for " + std::to_string(sum) + " registers, of " +
                    std::to_string(all) + ": increase_registers would wait forever");
    }
    for (size_t warp = 0; warp < block.registers.size(); ++warp) {
        if (block.registers[warp] != block.registers[warp / 4 * 4]) {
            throw Fault(name_of(block) + ": the warps of a warpgroup ask for different numbers of registers");
        }
    }
}

}  // namespace cuda_on_host
