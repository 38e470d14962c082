// The threads of a block as fibers: one runs at a time, in an order drawn from the seed.

#include <sys/mman.h>
#include <ucontext.h>

#include <csetjmp>
#include <exception>
#include <memory>
#include <new>

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

std::vector<std::unique_ptr<Fiber>> pool;
Fiber launcher;  // the caller of run_block
Fiber* running = nullptr;

std::vector<Warp> warps;
std::vector<int> warps_ready;
Random order_of_threads{0};
uint32_t patience = 1;  // turns that a warp takes on average before another has one

int threads = 0, finished = 0;
int at_barrier = 0, barriers = 0;
Where barrier_where;
char barrier_order[2], block_begins, block_ends;  // addresses for the thread sanitizer

void (*kernel)(void*);
void* closure;
bool cancelling = false;
std::string failure;

// ---------------------------------------------------------------------------------------------------- switching

// _setjmp and _longjmp make no system call, where swapcontext makes two; but the sanitizers take it for an exit from
// many functions.
[[gnu::noinline]] void switch_to(Fiber& to) {
    Fiber& from = *running;
    running = &to;
    current = &to.thread;
    threadIdx = to.thread.index;
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

void wait(const char* what, Where where) {
    Thread& self = *current;
    self.waits_in = what;
    self.where = where;
    run_next();
    if (cancelling) throw Cancelled{};
    self.waits_in = nullptr;
}

void run_kernel() {
    acquire(&block_begins);
    try {
        const Seen seen;
        kernel(closure);
    } catch (const Cancelled&) {
    } catch (const std::exception& error) {
        failure = error.what();
        cancelling = true;
    }
    release(&block_ends);
}

void fiber_main() {
    after_switch(running->sanitized);
    Unseen::begin();
    for (;;) {  // once for each block
        if (!cancelling) run_kernel();
        current->done = true;
        ++finished;
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

void start(Thread& thread, int linear, uint64_t seed) {
    thread.linear = linear;
    thread.lane = linear % warpSize;
    thread.warp = linear / warpSize;
    thread.index = {linear % blockDim.x, linear / blockDim.x % blockDim.y, linear / blockDim.x / blockDim.y};
    thread.groups.clear();
    thread.random = Random(seed * 1024 + static_cast<uint64_t>(linear));
    thread.waits_in = nullptr;
    thread.done = false;
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

// ------------------------------------------------------------------------------------------------ meeting points

void meet(const char* what, int variant, Memory memory, void* argument, void (*work)(void**), Where where) {
    Thread& self = *current;
    Warp& warp = warps[self.warp];
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
        wait(what, where);
    } else {
        if (work) work(warp.arguments);
        warp.met = 0;
        ++warp.meetings;
        make_warp_ready(self.warp, self.lane);
    }
    if (memory == Memory::ordered) acquire(order);
}

void sync_block(Where where) {
    const Unseen unseen;
    if (at_barrier > 0 && !same_place(where, barrier_where)) {
        fault("in a __syncthreads while others are in that of " + place(barrier_where), where);
    }
    barrier_where = where;
    void* order = &barrier_order[barriers % 2];
    release(order);
    if (++at_barrier < threads) {
        wait("__syncthreads", where);
    } else {
        at_barrier = 0;
        ++barriers;
        for (int warp = 0; warp < static_cast<int>(warps.size()); ++warp) {
            make_warp_ready(warp, warp == current->warp ? current->lane : -1);
        }
        for (size_t i = warps_ready.size(); i > 1; --i) {
            std::swap(warps_ready[i - 1], warps_ready[order_of_threads.below(static_cast<uint32_t>(i))]);
        }
    }
    acquire(order);
}

// -------------------------------------------------------------------------------------------------------- blocks

void run_block(void (*kernel_)(void*), void* closure_, int count, uint64_t seed) {
    kernel = kernel_;
    closure = closure_;
    threads = count;
    finished = at_barrier = 0;
    cancelling = false;
    failure.clear();
    order_of_threads = Random(seed);
    patience = 16u << 5 * order_of_threads.below(3);  // from side by side to one after the other
    while (static_cast<int>(pool.size()) < count) add_fiber();
    for (int i = 0; i < count; ++i) start(pool[i]->thread, i, seed);
    warps.assign((count + 31) / 32, Warp{});
    warps_ready.clear();
    for (int i = 0; i < static_cast<int>(warps.size()); ++i) {
        warps[i].lanes = std::min(32, count - i * 32);
        make_warp_ready(i, -1);
    }

    describe_caller(launcher.sanitized, launcher.stack, launcher.stack_bytes);
    launcher.started = true;
    running = &launcher;
    release(&block_begins);
    run_next();
    if (finished < count) {
        if (!cancelling) failure = deadlock_report(all_threads());
        cancelling = true;
        for (int i = 0; i < count; ++i) {  // those that wait leave by Cancelled: their destructors run
            if (!pool[i]->thread.done) switch_to(*pool[i]);
        }
    }
    acquire(&block_ends);
    if (cancelling) throw Fault(failure);
}

}  // namespace cuda_on_host
