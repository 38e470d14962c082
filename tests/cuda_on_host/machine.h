// The state of the modelled GPU while it runs a block, shared by the scheduler and the instructions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_on_host.h"

namespace cuda_on_host {

// A fault of the kernel. Thrown in the thread that has it; ends the launch.
struct Fault : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Copy {  // a cp.async under way
    char* shared;
    const char* global;
    int valid_bytes;
    bool landed;
};

// xorshift64*
class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15 + 0x632be59bd9b4e019) {
        if (state_ == 0) state_ = 1;
        for (int i = 0; i < 4; ++i) next();
    }
    uint32_t next() {
        state_ ^= state_ >> 12;
        state_ ^= state_ << 25;
        state_ ^= state_ >> 27;
        return static_cast<uint32_t>(state_ * 0x2545f4914f6cdd1d >> 32);
    }
    uint32_t below(uint32_t n) { return static_cast<uint32_t>(static_cast<uint64_t>(next()) * n >> 32); }

  private:
    uint64_t state_;
};

struct Thread {
    uint3 index{};
    int linear = 0, lane = 0, warp = 0;
    std::vector<std::vector<Copy>> groups;  // of cp.async, the last one open
    Random random{0};
    const char* waits_in = nullptr;
    Where where;
    bool done = false;
};

extern Thread* current;           // the one that runs
extern uint64_t matrix_products;  // in this process

struct SharedMemory {
    char* begin = nullptr;
    size_t bytes = 0;
};
extern SharedMemory shared;

// Whether an instruction of the warp also orders its lanes' accesses to memory.
enum class Memory { unordered, ordered };

// All lanes of the warp come here, each with its argument; the last to come runs work for all of them.
// what and variant say which instruction it is: lanes of a warp in different ones are a fault.
void meet(const char* what, int variant, Memory memory, void* argument, void (*work)(void** arguments), Where where);

// Runs one block of `count` threads; throws Fault. blockIdx, blockDim, gridDim and shared are set.
void run_block(void (*kernel)(void*), void* closure, int count, uint64_t seed);

// "block (0, 0, 0), thread (3, 0, 0): ..., in file:line"
[[noreturn]] void fault(const std::string& what, Where where);
std::string place(Where where);  // "file:line"
std::string deadlock_report(const std::vector<const Thread*>& threads);

}  // namespace cuda_on_host
