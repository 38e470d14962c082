// The threads of a cluster's blocks as fibers: one runs at a time, in an order drawn from the seed.

#include <sys/mman.h>
#include <ucontext.h>

#include <csetjmp>
#include <exception>
#include <memory>
#include <new>

#include "asynchronous.h"
#include "machine.h"
#include "sanitizers.h"

namespace cuda_on_host {
namespace {

constexpr size_t STACK_BYTES = 256 << 10, GUARD_BYTES = 4 << 10;

struct Fiber {
    Thread thread;
    jmp_buf jump;
    ucontext_t context;
    void* stack = nullptr;
    size_t stack_bytes = 0;
    SanitizedFiber sanitized;
    bool started = false;
};

struct Warp {
    int lanes = 0, met = 0, ready = 0;
    const char* what = nullptr;  // the lanes that met are in
    int variant = 0;
    void* arguments[32] = {};
    int queue[32] = {};  // lanes that can run: the first `ready`
    char order[2] = {};  // addresses for the thread sanitizer: of this meeting, and of the next
    int meetings = 0;
};

struct Cancelled {};  // thrown in threads that wait when another has a fault

std::vector<std::unique_ptr<Fiber>> pool;  // the blocks' threads, block by block
Fiber launcher;                            // the caller of run_cluster
Fiber* running = nullptr;

std::vector<Warp> warps;  // the blocks' warps, block by block
std::vector<int> warps_ready;
Random order_of_threads{0};
uint32_t patience = 1;  // turns that a warp takes on average before another has one

int threads = 0, finished = 0;
char cluster_begins, cluster_ends;  // addresses for the thread sanitizer

void (*kernel)(void*);
void* closure;
bool cancelling = false;
std::string failure;

// ---------------------------------------------------------------------------------------------------- switching

// _setjmp and _longjmp make no system call, where swapcontext makes two; but the sanitizers take it for an exit from
// many functions.
[[gnu::noinline]] void switch_to(Fiber& to) {
    Fiber& from = *running;
    if (&from == &to) return;
    running = &to;
    current = &to.thread;
    threadIdx = to.thread.index;
    if (current->block != nullptr) blockIdx = current->block->index;
#ifdef CUDA_ON_HOST_SANITIZED
    before_switch(from.sanitized, to.sanitized, to.stack, to.stack_bytes);
    swapcontext(&from.context, &to.context);
    after_switch(running->sanitized);
#else
    if (_setjmp(from.jump) == 0) {
        if (to.started) _longjmp(to.jump, 1);
        to.started = true;
        setcontext(&to.context);
    }
#endif
}

void make_ready(int warp, int lane) {
    Warp& w = warps[warp];
    if (w.ready == 0) warps_ready.push_back(warp);
    w.queue[w.ready++] = lane;
}

// The lanes of a warp, except one, in a random order: an affine map of the 32 lanes.
void make_warp_ready(int warp, int except) {
    const uint32_t bits = order_of_threads.next();
    const uint32_t factor = (bits & 31) | 1, offset = bits >> 5 & 31, mask = bits >> 10 & 31;
    for (uint32_t i = 0; i < 32; ++i) {
        const int lane = static_cast<int>(((i * factor + offset) & 31) ^ mask);
        if (lane < warps[warp].lanes && lane != except) make_ready(warp, lane);
    }
}

// Gives way to a thread that can run: of the same warp, or now and then of another.
void run_next() {
    if (cancelling || warps_ready.empty()) return switch_to(launcher);
    const size_t last = warps_ready.size() - 1;
    if (last > 0 && order_of_threads.below(patience) == 0) {
        std::swap(warps_ready[last], warps_ready[order_of_threads.below(static_cast<uint32_t>(last))]);
    }
    const int warp = warps_ready[last];
    const int lane = warps[warp].queue[--warps[warp].ready];
    if (warps[warp].ready == 0) warps_ready.pop_back();
    switch_to(*pool[warp * 32 + lane]);
}

void run_kernel() {
    acquire(&cluster_begins);
    try {
        {
            const Seen seen;
            kernel(closure);
        }
        check_stores(*current);
        check_products(*current);
    } catch (const Cancelled&) {
    } catch (const std::exception& error) {
        failure = error.what();
        cancelling = true;
    }
    release(&cluster_ends);
}

void fiber_main() {
    after_switch(running->sanitized);
    Unseen::begin();
    for (;;) {  // once for each block
        if (!cancelling) run_kernel();
        current->done = true;
        ++current->block->finished;
        ++finished;
        check_cluster_barrier();
        run_next();
    }
}

void add_fiber() {
    constexpr int protection = PROT_READ | PROT_WRITE, flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* memory = mmap(nullptr, GUARD_BYTES + STACK_BYTES, protection, flags, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, GUARD_BYTES, PROT_NONE);  // an overflow is a crash, not somebody else's data
    auto fiber = std::make_unique<Fiber>();
    fiber->stack = static_cast<char*>(memory) + GUARD_BYTES;
    // Stacks begin at different offsets within a page, or else their frames would compete for the same cache lines.
    fiber->stack_bytes = STACK_BYTES - pool.size() * 7 * 64 % 4096;
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack;
    fiber->context.uc_stack.ss_size = fiber->stack_bytes;
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, fiber_main, 0);
    fiber->context.uc_stack = {};  // or the address sanitizer would clear what it knows of it in each switch
    created(fiber->sanitized);
    pool.push_back(std::move(fiber));
}

void start(Thread& thread, Block& block, int linear, uint64_t seed) {
    thread = Thread{};
    thread.block = &block;
    thread.linear = linear;
    thread.lane = linear % warpSize;
    thread.warp = linear / warpSize;
    thread.index = {linear % blockDim.x, linear / blockDim.x % blockDim.y, linear / blockDim.x / blockDim.y};
    thread.random = Random(seed * 1024 + static_cast<uint64_t>(block.first_thread + linear));
}

bool same_place(Where one, Where other) {
    return one.line() == other.line() && one.column() == other.column() &&
           std::strcmp(one.file_name(), other.file_name()) == 0;
}

std::vector<const Thread*> all_threads() {
    std::vector<const Thread*> all;
    for (int i = 0; i < threads; ++i) all.push_back(&pool[i]->thread);
    return all;
}

}  // namespace

// -------------------------------------------------------------------------------------------------------- waiting

Random& scheduling() { return order_of_threads; }

void sleep(const char* what, Where where) {
    Thread& self = *current;
    self.waits_in = what;
    self.where = where;
    self.asleep = true;
    run_next();
    if (cancelling) throw Cancelled{};
    self.asleep = false;
    self.waits_in = nullptr;
}

void wake(Thread& thread) {
    if (!thread.asleep) return;
    thread.asleep = false;
    make_ready(thread.block->first_warp + thread.warp, thread.lane);
}

void wake(std::vector<Thread*>& sleeping) {
    for (size_t i = sleeping.size(); i > 0; --i) {
        std::swap(sleeping[i - 1], sleeping[order_of_threads.below(static_cast<uint32_t>(i))]);
        wake(*sleeping[i - 1]);
    }
    sleeping.clear();
}

void give_way() {
    if (warps_ready.empty() || order_of_threads.below(4) != 0) return;
    Thread& self = *current;
    const int own = self.block->first_warp + self.warp;
    make_ready(own, self.lane);
    Warp& warp = warps[own];
    std::swap(warp.queue[0], warp.queue[warp.ready - 1]);  // the last of its warp
    const uint32_t other = order_of_threads.below(static_cast<uint32_t>(warps_ready.size()));
    std::swap(warps_ready.back(), warps_ready[other]);
    run_next();
    if (cancelling) throw Cancelled{};
}

// ------------------------------------------------------------------------------------------------ meeting points

void meet(const char* what, int variant, Memory memory, void* argument, void (*work)(void**), Where where) {
    Thread& self = *current;
    const int number = self.block->first_warp + self.warp;
    Warp& warp = warps[number];
    if (warp.met == 0) {
        warp.what = what;
        warp.variant = variant;
    } else if (warp.what != what || warp.variant != variant) {
        fault(std::string("in ") + what + " while other lanes of the warp are in " + warp.what +
                  (warp.what == what ? " of another form" : ""),
              where);
    }
    void* order = &warp.order[warp.meetings % 2];
    if (memory == Memory::ordered) release(order);
    warp.arguments[self.lane] = argument;
    if (++warp.met < warp.lanes) {
        sleep(what, where);
    } else {
        if (work) work(warp.arguments);
        warp.met = 0;
        ++warp.meetings;
        make_warp_ready(number, self.lane);
    }
    if (memory == Memory::ordered) acquire(order);
}

void sync_block(Where where) {
    const Unseen unseen;
    let_operations_happen();
    Block& block = *current->block;
    if (block.at_barrier > 0 && !same_place(where, block.barrier_where)) {
        fault("in a __syncthreads while others are in that of " + place(block.barrier_where), where);
    }
    block.barrier_where = where;
    void* order = &block.barrier_order[block.barriers % 2];
    release(order);
    if (++block.at_barrier < block.threads) {
        sleep("__syncthreads", where);
    } else {
        block.at_barrier = 0;
        ++block.barriers;
        const int own = current->block->first_warp + current->warp;
        const int end = block.first_warp + (block.threads + warpSize - 1) / warpSize;
        for (int warp = block.first_warp; warp < end; ++warp) make_warp_ready(warp, warp == own ? current->lane : -1);
        for (size_t i = warps_ready.size(); i > 1; --i) {
            std::swap(warps_ready[i - 1], warps_ready[order_of_threads.below(static_cast<uint32_t>(i))]);
        }
    }
    acquire(order);
}

// ------------------------------------------------------------------------------------------------------ clusters

int threads_of_cluster() { return threads; }
int threads_that_returned() { return finished; }

void run_cluster(void (*kernel_)(void*), void* closure_, Cluster& cluster, uint64_t seed) {
    kernel = kernel_;
    closure = closure_;
    threads = finished = 0;
    cancelling = false;
    failure.clear();
    order_of_threads = Random(seed);
    patience = 16u << 5 * order_of_threads.below(3);  // from side by side to one after the other
    warps.clear();
    warps_ready.clear();
    forget_operations();
    forget_cluster_barrier();
    for (const auto& block : cluster) {
        block->first_thread = threads;
        block->first_warp = static_cast<int>(warps.size());
        threads += block->threads;
        while (static_cast<int>(pool.size()) < threads) add_fiber();
        for (int i = 0; i < block->threads; ++i) start(pool[block->first_thread + i]->thread, *block, i, seed);
        for (int first = 0; first < block->threads; first += warpSize) {
            warps.emplace_back();
            warps.back().lanes = std::min(warpSize, block->threads - first);
        }
    }
    for (int i = 0; i < static_cast<int>(warps.size()); ++i) make_warp_ready(i, -1);

    describe_caller(launcher.sanitized, launcher.stack, launcher.stack_bytes);
    launcher.started = true;
    running = &launcher;
    current = &launcher.thread;
    release(&cluster_begins);
    try {
        do {
            run_next();  // until none can run
        } while (!cancelling && finished < threads && make_operation_happen());
        if (!cancelling && finished == threads) finish_operations();
    } catch (const Fault& error) {  // of an operation
        failure = error.what();
        cancelling = true;
    }
    if (finished < threads) {
        if (!cancelling) failure = deadlock_report(all_threads());
        cancelling = true;
        for (int i = 0; i < threads; ++i) {  // those that wait leave by Cancelled: their destructors run
            if (!pool[i]->thread.done) switch_to(*pool[i]);
        }
    }
    acquire(&cluster_ends);
    forget_operations();
    if (cancelling) throw Fault(failure);
}

}  // namespace cuda_on_host
