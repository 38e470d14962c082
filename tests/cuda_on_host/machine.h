// The state of the modelled GPU while it runs a cluster of blocks, shared by the scheduler and the instructions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_on_host.h"

namespace cuda_on_host {

// A fault of the kernel. Thrown in the thread that has it; ends the launch.
struct Fault : std::runtime_error {
    using std::runtime_error::runtime_error;
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

// ---------------------------------------------------------------------------------------------- threads and blocks

struct Block;
struct Mbarrier;
class Store;     // of TMA
class Products;  // of a warp in wgmma

struct Copy {  // a cp.async under way
    char* shared;
    const char* global;
    int valid_bytes;
    bool landed;
};

struct Thread {
    Block* block = nullptr;
    uint3 index{};
    int linear = 0, lane = 0, warp = 0;  // in the block
    Random random{0};
    bool done = false;

    const char* waits_in = nullptr;
    Where where;
    const Mbarrier* waits_at = nullptr;
    bool asleep = false;  // until wake()

    std::vector<std::vector<Copy>> copies;                   // groups of cp.async, the last one open
    std::deque<std::vector<std::shared_ptr<Store>>> stores;  // groups of TMA's, the last one open
    std::vector<uint32_t> unfenced;    // 16 bytes of shared memory each that it wrote, and the async proxy may not see
    uint32_t named_barriers[16] = {};  // how many it came to

    uint64_t products = 0, products_awaited = 0;  // wgmmas issued, and how many have to be over
    std::deque<uint64_t> product_groups;          // how many were at each commit
    bool registers_fenced = false;
};

extern Thread* current;              // the one that runs
extern uint64_t matrix_products;     // in this process
extern uint64_t warpgroup_products;  // those of them that were wgmma's

struct SharedMemory {
    char* begin = nullptr;
    size_t bytes = 0;
};

struct Mbarrier {
    shared_address address = 0;
    int arrivals = 0, pending = 0;  // of a phase, and what is missing of the current one
    int64_t bytes = 0;              // that are still to come in the current phase
    uint64_t phase = 0;             // how many have ended
    const Thread* maker = nullptr;
    bool fenced = false;  // for the async proxy and other blocks
    std::vector<Thread*> waiting;
    char order[2] = {};  // addresses for the thread sanitizer, by the phase's parity
};

struct NamedBarrier {
    int expected = 0, arrived = 0;
    uint32_t generation = 0;
    std::vector<int> lanes;  // of each warp that have come
    std::vector<Thread*> waiting;
    char order[2] = {};
};

// Shared memory as the async proxy may see it, by 16 bytes.
struct AsyncView {
    std::vector<uint16_t> writer;  // 1 + the thread whose stmatrix no fence of its own has followed, or 0
    std::vector<char> known;       // contents that instructions left there: others come from plain stores
    std::vector<uint32_t> fences;  // how many fences there had been in the block by then
    uint32_t all_fences = 0;
};

struct Block {
    Block(uint3 index_, int rank_, int threads_, SharedMemory shared_, std::vector<std::unique_ptr<Block>>& cluster_);
    ~Block();

    uint3 index;
    int rank;  // in the cluster
    int threads, finished = 0;
    int first_thread = 0, first_warp = 0;  // among the cluster's
    SharedMemory shared;
    std::vector<std::unique_ptr<Block>>& cluster;

    int at_barrier = 0, barriers = 0;
    Where barrier_where;
    char barrier_order[2] = {};

    std::deque<Mbarrier> mbarriers;
    NamedBarrier named_barriers[16];
    AsyncView async_view;
    std::vector<std::unique_ptr<Products>> products;  // of each warp
    std::vector<int> registers;                       // that each warp asked for, or 0
};
using Cluster = std::vector<std::unique_ptr<Block>>;

// ------------------------------------------------------------------------------------------------------- scheduling

// Whether an instruction of the warp also orders its lanes' accesses to memory.
enum class Memory { unordered, ordered };

// All lanes of the warp come here, each with its argument; the last to come runs work for all of them.
// what and variant say which instruction it is: lanes of a warp in different ones are a fault.
void meet(const char* what, int variant, Memory memory, void* argument, void (*work)(void** arguments), Where where);

void sleep(const char* what, Where where);  // until wake()
void wake(Thread& thread);
void wake(std::vector<Thread*>& threads);  // in a random order; empties the list
void give_way();                           // now and then, to any other thread that can run
Random& scheduling();                      // what draws the order of things

// Runs the blocks of a cluster, of `threads` threads each; throws Fault. blockDim and gridDim are set.
void run_cluster(void (*kernel)(void*), void* closure, Cluster& cluster, uint64_t seed);
int threads_of_cluster();
int threads_that_returned();
void check_cluster_barrier();  // whether it is complete, now that a thread has returned
void forget_cluster_barrier();

// -------------------------------------------------------------------------------------------------- shared memory

// Where `bytes` at a shared address lie, a fault if they are not all in the block's shared memory or if the address is
// not a multiple of `alignment`.
char* shared_bytes(const Block& block, const char* what, shared_address address, size_t bytes, uint32_t alignment,
                   Where where);
// "byte 16 of shared memory"
std::string place_in(const Block& block, shared_address address);
shared_address window_of(const Block& block);  // where it begins

// What the async proxy reads: a fault if it may not see what the generic proxy wrote.
void check_async_read(const Block& block, const char* what, const char* address, const Thread& issuer, Where where);
// An instruction wrote 16 bytes: of `thread`, through the generic proxy, or of the async proxy.
void note_write(Block& block, const char* address, Thread* thread);

// ------------------------------------------------------------------------------------------------------------ faults

// "block (0, 0, 0), thread (3, 0, 0): ..., in file:line", of the current thread or of another
[[noreturn]] void fault(const std::string& what, Where where);
[[noreturn]] void fault(const Thread& thread, const std::string& what, Where where);
std::string place(Where where);  // "file:line"
std::string name_of(const Block& block);
std::string deadlock_report(const std::vector<const Thread*>& threads);
void check_stores(const Thread& thread);    // a fault if it returns now
void check_products(const Thread& thread);  // likewise
void check_registers(const Block& block);
void refuse_tensor_map(const std::string& what);  // for cudaGetErrorString

}  // namespace cuda_on_host
