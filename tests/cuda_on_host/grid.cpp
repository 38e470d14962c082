// Launches: limits of the device, shared memory, the order of blocks, and what errors say.
#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdlib>
#include <deque>
#include <map>
#include <mutex>
#include <numeric>

#include "machine.h"
#include "sanitizers.h"

namespace cuda_on_host {

Thread* current = nullptr;

namespace {

std::mutex one_launch;  // at a time, whichever threads launch
std::string last_error, last_refusal;
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

void check_limits(dim3 grid, dim3 block, int cluster, size_t shared_bytes) {
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
    check("the number of blocks in a cluster", static_cast<uint64_t>(std::max(cluster, 0)), 8);
    if (grid.x % static_cast<unsigned>(cluster) != 0) {
        throw Fault("gridDim.x is " + std::to_string(grid.x) + ", not a multiple of the " + std::to_string(cluster) +
                    " blocks in a cluster");
    }
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
    }
    ~SharedMemoryOwner() { protect(false); }
    SharedMemoryOwner(const SharedMemoryOwner&) = delete;
    SharedMemoryOwner& operator=(const SharedMemoryOwner&) = delete;

    SharedMemory memory() const { return {begin_, bytes_}; }

    void fresh() {
        protect(false);
        std::memset(memory_.data(), 0xff, memory_.size());
        protect(true);
    }
    void check(const Block& block) {
        protect(false);
        const auto outside = [&](const char* from, const char* to) {
            for (const char* at = from; at < to; ++at) {
                if (*at != static_cast<char>(0xff)) {
                    throw Fault(name_of(block) + ": a write outside of shared memory, at byte " +
                                std::to_string(at - begin_) + " of " + std::to_string(bytes_));
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

// All clusters in an order of the seed's: an affine map of their numbers.
void run_clusters(void (*thread)(void*), void* closure, dim3 grid, dim3 block, int cluster, size_t shared_bytes) {
    const uint64_t clusters = static_cast<uint64_t>(grid.x) * grid.y * grid.z / cluster, seed = settings().seed;
    const int threads = static_cast<int>(block.x * block.y * block.z);
    std::deque<SharedMemoryOwner> memories;
    for (int rank = 0; rank < cluster; ++rank) memories.emplace_back(shared_bytes);
    Random random(seed);
    uint64_t step = 1 + random.below(static_cast<uint32_t>(std::min<uint64_t>(clusters, 1u << 31)));
    while (std::gcd(step, clusters) != 1) ++step;
    uint64_t number = random.next() % clusters;
    gridDim = grid;
    blockDim = block;
    for (uint64_t i = 0; i < clusters; ++i, number = (number + step) % clusters) {
        Cluster blocks;
        for (int rank = 0; rank < cluster; ++rank) {
            const uint64_t linear = number * cluster + rank;
            const uint3 index{static_cast<unsigned>(linear % grid.x), static_cast<unsigned>(linear / grid.x % grid.y),
                              static_cast<unsigned>(linear / grid.x / grid.y)};
            memories[rank].fresh();
            blocks.push_back(std::make_unique<Block>(index, rank, threads, memories[rank].memory(), blocks));
        }
        run_cluster(thread, closure, blocks, seed * clusters + number);
        for (int rank = 0; rank < cluster; ++rank) {
            memories[rank].check(*blocks[rank]);
            check_registers(*blocks[rank]);
        }
    }
}

}  // namespace

Settings& settings() {
    static Settings value = from_environment();
    return value;
}

cudaError_t run_grid(const void* function, void (*thread)(void*), void* closure, dim3 grid, dim3 block, int cluster,
                     size_t shared_bytes) {
    const std::lock_guard<std::mutex> lock(one_launch);
    const Unseen unseen;
    ++launches;
    try {
        check_limits(grid, block, cluster, shared_bytes);
    } catch (const Fault& error) {
        last_error = kernel_name(function) + ": " + error.what();
        return cudaErrorInvalidConfiguration;
    }
    try {
        run_clusters(thread, closure, grid, block, cluster, shared_bytes);
    } catch (const Fault& error) {
        last_error = kernel_name(function) + ": " + error.what();
        return cudaErrorLaunchFailure;
    }
    return cudaSuccess;
}

std::string place(Where where) {
    const std::string file = where.file_name();
    return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line());
}

std::string name_of(const Block& block) { return "block " + triple(block.index.x, block.index.y, block.index.z); }

void fault(const Thread& thread, const std::string& what, Where where) {
    throw Fault(name_of(*thread.block) + ", thread " + triple(thread.index.x, thread.index.y, thread.index.z) + ": " +
                what + ", in " + place(where));
}

void fault(const std::string& what, Where where) { fault(*current, what, where); }

void refuse_tensor_map(const std::string& what) {
    const std::lock_guard<std::mutex> lock(one_launch);
    last_refusal = "invalid argument; the latest tensor map that was refused: " + what;
}

// "0-31 33 ...", at most 8 runs
std::string runs_of(const std::vector<int>& numbers) {
    std::string text;
    int shown = 0;
    for (size_t i = 0; i < numbers.size(); ++shown) {
        size_t last = i;
        while (last + 1 < numbers.size() && numbers[last + 1] == numbers[last] + 1) ++last;
        if (shown < 8) {
            text += " " + std::to_string(numbers[i]) + (last > i ? "-" + std::to_string(numbers[last]) : "");
        }
        i = last + 1;
    }
    return text + (shown > 8 ? " ..." : "");
}

// "wait in __syncthreads, file:line"
std::string what_it_does(const Thread& thread) {
    if (thread.done) return "returned";
    if (thread.waits_in == nullptr) return "run";
    std::string text = "wait in " + std::string(thread.waits_in);
    if (thread.waits_at != nullptr) {
        text += " for parity " + std::to_string(thread.waits_at->phase % 2) + " of the mbarrier at " +
                place_in(*thread.block, thread.waits_at->address);
    }
    return text + ", " + place(thread.where);
}

std::string deadlock_report(const std::vector<const Thread*>& threads) {
    std::string text;
    const Block* block = nullptr;
    std::map<std::string, std::vector<int>> places;
    const auto tell_block = [&] {
        if (block == nullptr || block->finished == block->threads) return;
        text += (text.empty() ? "" : ". ") + name_of(*block) + ": deadlock";
        for (const auto& [at, members] : places) {
            const bool one = members.size() == 1;
            text += "; " + std::to_string(members.size()) + (one ? " thread " : " threads ") +
                    (one && at.starts_with("wait") ? "waits" + at.substr(4) : at) + ":" + runs_of(members);
        }
        for (const Mbarrier& barrier : block->mbarriers) {
            if (barrier.waiting.empty()) continue;
            text += "; the mbarrier at " + place_in(*block, barrier.address) + " is in phase " +
                    std::to_string(barrier.phase) + ", and waits for " + std::to_string(barrier.pending) + " of " +
                    std::to_string(barrier.arrivals) + " arrivals and " + std::to_string(barrier.bytes) + " bytes";
        }
        for (int id = 1; id < 16; ++id) {
            const NamedBarrier& barrier = block->named_barriers[id];
            if (barrier.waiting.empty()) continue;
            text += "; " + std::to_string(barrier.arrived) + " of " + std::to_string(barrier.expected) +
                    " threads have come to named barrier " + std::to_string(id);
        }
    };
    for (const Thread* thread : threads) {
        if (thread->block != block) {
            tell_block();
            block = thread->block;
            places.clear();
        }
        places[what_it_does(*thread)].push_back(thread->linear);
    }
    tell_block();
    return text;
}

}  // namespace cuda_on_host

const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess:
            return "no error";
        case cudaErrorInvalidValue:
            return cuda_on_host::last_refusal.empty() ? "invalid argument" : cuda_on_host::last_refusal.c_str();
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

uint64_t cuda_on_host_warpgroup_products() { return cuda_on_host::warpgroup_products; }
