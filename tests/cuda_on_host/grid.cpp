// Launches: limits of the device, shared memory, the order of blocks, and what errors say.
#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <numeric>

#include "machine.h"
#include "sanitizers.h"

namespace cuda_on_host {

Thread* current = nullptr;
SharedMemory shared;

namespace {

std::mutex one_launch;  // at a time, whichever threads launch
std::string last_error;
uint64_t launches = 0;  // in this process

std::string triple(unsigned x, unsigned y, unsigned z) {
    return "(" + std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) + ")";
}

std::string kernel_name(const void* function) {
    Dl_info symbol;
    if (dladdr(function, &symbol) == 0 || symbol.dli_sname == nullptr) return "kernel";
    int status = 0;
    char* text = abi::__cxa_demangle(symbol.dli_sname, nullptr, nullptr, &status);
    const std::string name = status == 0 ? text : symbol.dli_sname;
    std::free(text);
    int depth = 0;
    for (size_t i = name.size(); i-- > 0;) {  // up to the list of parameters
        if (name[i] == ')') ++depth;
        if (name[i] == '(' && --depth == 0) return name.substr(0, i);
    }
    return name;
}

uint64_t number_from_environment(const char* name, uint64_t otherwise) {
    const char* text = std::getenv(name);
    return text == nullptr ? otherwise : std::strtoull(text, nullptr, 10);
}

Settings from_environment() {
    Settings result;
    result.seed = number_from_environment("CUDA_ON_HOST_SEED", result.seed);
    result.shared_limit = number_from_environment("CUDA_ON_HOST_SHARED_LIMIT", result.shared_limit);
    const char* landing = std::getenv("CUDA_ON_HOST_LANDING");
    if (landing != nullptr) {
        const std::string name = landing;
        if (name == "early") {
            result.landing = Landing::early;
        } else if (name == "random") {
            result.landing = Landing::random;
        } else if (name != "late") {
            throw std::invalid_argument("CUDA_ON_HOST_LANDING=" + name + ": expected late, early or random");
        }
    }
    return result;
}

void check_limits(dim3 grid, dim3 block, size_t shared_bytes) {
    const auto check = [](const char* what, uint64_t value, uint64_t limit) {
        if (value == 0 || value > limit) {
            throw Fault(std::string(what) + " is " + std::to_string(value) + ", not 1 to " + std::to_string(limit));
        }
    };
    check("gridDim.x", grid.x, 0x7fffffff);
    check("gridDim.y", grid.y, 65535);
    check("gridDim.z", grid.z, 65535);
    check("blockDim.x", block.x, 1024);
    check("blockDim.y", block.y, 1024);
    check("blockDim.z", block.z, 64);
    check("the number of threads in a block", static_cast<uint64_t>(block.x) * block.y * block.z, 1024);
    if (shared_bytes > settings().shared_limit) {
        throw Fault("dynamic shared memory of " + std::to_string(shared_bytes) + " bytes is over the limit of " +
                    std::to_string(settings().shared_limit));
    }
}

// Room for the largest block between two zones that nobody may touch: 0xFF like fresh shared memory.
class SharedMemoryOwner {
  public:
    explicit SharedMemoryOwner(size_t bytes) : bytes_(bytes), memory_(2 * ZONE + bytes) {
        const size_t lead = -reinterpret_cast<uintptr_t>(memory_.data()) % ALIGNMENT;
        begin_ = memory_.data() + lead + ZONE - ALIGNMENT;
        shared = {begin_, bytes};
    }
    ~SharedMemoryOwner() {
        protect(false);
        shared = {};
    }
    SharedMemoryOwner(const SharedMemoryOwner&) = delete;
    SharedMemoryOwner& operator=(const SharedMemoryOwner&) = delete;

    void fresh() {
        protect(false);
        std::memset(memory_.data(), 0xff, memory_.size());
        protect(true);
    }
    void check() {
        protect(false);
        const auto outside = [&](const char* from, const char* to) {
            for (const char* at = from; at < to; ++at) {
                if (*at != static_cast<char>(0xff)) {
                    throw Fault("block " + triple(blockIdx.x, blockIdx.y, blockIdx.z) +
                                ": a write outside of shared memory, at byte " + std::to_string(at - begin_) + " of " +
                                std::to_string(bytes_));
                }
            }
        };
        outside(memory_.data(), begin_);
        outside(begin_ + bytes_, memory_.data() + memory_.size());
    }

  private:
    static constexpr size_t ZONE = 4096, ALIGNMENT = 128;

    void protect(bool on) {
        unpoison(memory_.data(), memory_.size());
        if (!on) return;
        poison(memory_.data(), begin_ - memory_.data());
        poison(begin_ + bytes_, memory_.data() + memory_.size() - begin_ - bytes_);
    }

    size_t bytes_;
    std::vector<char> memory_;
    char* begin_;
};

// All blocks in an order of the seed's: an affine map of their numbers.
void run_blocks(void (*thread)(void*), void* closure, dim3 grid, dim3 block, SharedMemoryOwner& memory) {
    const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z, seed = settings().seed;
    Random random(seed);
    uint64_t step = 1 + random.below(static_cast<uint32_t>(std::min<uint64_t>(blocks, 1u << 31)));
    while (std::gcd(step, blocks) != 1) ++step;
    uint64_t number = random.next() % blocks;
    gridDim = grid;
    blockDim = block;
    for (uint64_t i = 0; i < blocks; ++i, number = (number + step) % blocks) {
        blockIdx = {static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
                    static_cast<unsigned>(number / grid.x / grid.y)};
        memory.fresh();
        run_block(thread, closure, static_cast<int>(block.x * block.y * block.z), seed * blocks + number);
        memory.check();
    }
}

}  // namespace

Settings& settings() {
    static Settings value = from_environment();
    return value;
}

cudaError_t run_grid(const void* function, void (*thread)(void*), void* closure, dim3 grid, dim3 block,
                     size_t shared_bytes) {
    const std::lock_guard<std::mutex> lock(one_launch);
    const Unseen unseen;
    ++launches;
    try {
        check_limits(grid, block, shared_bytes);
    } catch (const Fault& error) {
        last_error = kernel_name(function) + ": " + error.what();
        return cudaErrorInvalidConfiguration;
    }
    try {
        SharedMemoryOwner memory(shared_bytes);
        run_blocks(thread, closure, grid, block, memory);
    } catch (const Fault& error) {
        last_error = kernel_name(function) + ": " + error.what();
        return cudaErrorLaunchFailure;
    }
    return cudaSuccess;
}

void* shared_memory() { return shared.begin; }

std::string place(Where where) {
    const std::string file = where.file_name();
    return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line());
}

void fault(const std::string& what, Where where) {
    throw Fault("block " + triple(blockIdx.x, blockIdx.y, blockIdx.z) + ", thread " +
                triple(threadIdx.x, threadIdx.y, threadIdx.z) + ": " + what + ", in " + place(where));
}

std::string deadlock_report(const std::vector<const Thread*>& threads) {
    std::map<std::string, std::vector<int>> places;
    for (const Thread* thread : threads) {
        const std::string at = thread->done ? "returned"
                               : thread->waits_in
                                   ? "wait in " + std::string(thread->waits_in) + ", " + place(thread->where)
                                   : "run";
        places[at].push_back(thread->linear);
    }
    std::string text = "block " + triple(blockIdx.x, blockIdx.y, blockIdx.z) + ": deadlock";
    for (const auto& [at, members] : places) {
        text += "; " + std::to_string(members.size()) + (members.size() == 1 ? " thread " : " threads ") + at + ":";
        int shown = 0;
        for (size_t i = 0; i < members.size(); ++shown) {
            size_t last = i;
            while (last + 1 < members.size() && members[last + 1] == members[last] + 1) ++last;
            if (shown < 8) {
                text += " " + std::to_string(members[i]) + (last > i ? "-" + std::to_string(members[last]) : "");
            }
            i = last + 1;
        }
        if (shown > 8) text += " ...";
    }
    return text;
}

}  // namespace cuda_on_host

const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess:
            return "no error";
        case cudaErrorInvalidValue:
            return "invalid argument";
        case cudaErrorInvalidConfiguration:
        case cudaErrorLaunchFailure:
            return cuda_on_host::last_error.c_str();
    }
    return "unrecognized error code";
}

void cuda_on_host_configure(uint64_t seed, int landing, uint64_t shared_limit) {
    cuda_on_host::settings() = {seed, static_cast<cuda_on_host::Landing>(landing), shared_limit};
}

uint64_t cuda_on_host_launches() { return cuda_on_host::launches; }

uint64_t cuda_on_host_matrix_products() { return cuda_on_host::matrix_products; }
