// mbarriers: PTX ISA, "Parallel Synchronization and Communication Instructions: mbarrier".

#include "mbarriers.h"

#include "asynchronous.h"
#include "sanitizers.h"

namespace cuda_on_host {
namespace {

constexpr uint64_t MADE = 0x6d62617272696572;  // an mbarrier's bits are its own: these tell that nobody wrote over them
constexpr int64_t MOST_BYTES = (1 << 20) - 1;  // of an mbarrier's count of transactions, either way

void end_phase_if_complete(Mbarrier& barrier) {
    if (barrier.pending > 0 || barrier.bytes != 0) return;
    ++barrier.phase;
    barrier.pending = barrier.arrivals;
    wake(barrier.waiting);
}

void count_bytes(const Block& block, Mbarrier& barrier, int64_t bytes, const Thread& thread, Where where) {
    barrier.bytes += bytes;
    if (std::abs(barrier.bytes) > MOST_BYTES) {
        fault(thread,
              "the mbarrier at " + place_in(block, barrier.address) + " waits for " + std::to_string(barrier.bytes) +
                  " bytes; it can count to " + std::to_string(MOST_BYTES),
              where);
    }
}

void arrive(Block& block, const char* what, shared_address address, int64_t bytes, Where where) {
    Mbarrier& barrier = mbarrier_at(block, what, address, where);
    if (barrier.pending == 0) {
        fault(std::string(what) + ": one arrival more than the " + std::to_string(barrier.arrivals) +
                  " of a phase at the mbarrier at " + place_in(block, address) + ", which still waits for " +
                  std::to_string(barrier.bytes) + " bytes",
              where);
    }
    count_bytes(block, barrier, bytes, *current, where);
    --barrier.pending;
    release(&barrier.order[barrier.phase % 2]);
    end_phase_if_complete(barrier);
}

}  // namespace

Mbarrier& mbarrier_at(Block& block, const char* what, shared_address address, Where where) {
    const char* bits = shared_bytes(block, what, address, sizeof(MADE), sizeof(MADE), where);
    for (Mbarrier& barrier : block.mbarriers) {
        if (barrier.address != address) continue;
        if (std::memcmp(bits, &MADE, sizeof(MADE)) != 0) {
            fault(std::string(what) + ": somebody wrote over the mbarrier at " + place_in(block, address), where);
        }
        return barrier;
    }
    fault(std::string(what) + ": no mbarrier has been made at " + place_in(block, address), where);
}

void complete_bytes(Block& block, Mbarrier& barrier, int64_t bytes, const Thread& issuer, Where where) {
    count_bytes(block, barrier, -bytes, issuer, where);
    release(&barrier.order[barrier.phase % 2]);
    end_phase_if_complete(barrier);
}

void barrier_init(shared_address address, int arrivals, Where where) {
    const Unseen unseen;
    Block& block = *current->block;
    char* bits = shared_bytes(block, "barrier_init", address, sizeof(MADE), sizeof(MADE), where);
    if (arrivals < 1 || arrivals > MOST_BYTES) {
        fault("barrier_init of " + std::to_string(arrivals) + " arrivals, not 1 to " + std::to_string(MOST_BYTES),
              where);
    }
    for (const Mbarrier& barrier : block.mbarriers) {
        if (barrier.address == address) fault("barrier_init again at " + place_in(block, address), where);
    }
    kernel_writes(bits, sizeof(MADE));
    std::memcpy(bits, &MADE, sizeof(MADE));
    Mbarrier& barrier = block.mbarriers.emplace_back();
    barrier.address = address;
    barrier.arrivals = barrier.pending = arrivals;
    barrier.maker = current;
}

void barrier_init_fence() {
    const Unseen unseen;
    for (Mbarrier& barrier : current->block->mbarriers) {
        if (barrier.maker == current) barrier.fenced = true;
    }
}

void barrier_arrive(shared_address barrier, Where where) {
    const Unseen unseen;
    let_operations_happen();
    give_way();
    kernel_reads(shared_bytes(*current->block, "barrier_arrive", barrier, 8, 8, where), 8);
    arrive(*current->block, "barrier_arrive", barrier, 0, where);
    give_way();
}

void barrier_arrive_in(shared_address barrier, int rank, Where where) {
    const Unseen unseen;
    let_operations_happen();
    give_way();
    Block& block = block_of_cluster(rank, where);
    const Mbarrier& there = mbarrier_at(block, "barrier_arrive_in", barrier, where);
    if (&block != current->block && !there.fenced) {
        fault("barrier_arrive_in: no barrier_init_fence followed the barrier_init of block " + std::to_string(rank) +
                  " of the cluster",
              where);
    }
    arrive(block, "barrier_arrive_in", barrier, 0, where);
    give_way();
}

void barrier_expect(shared_address barrier, int bytes, Where where) {
    const Unseen unseen;
    let_operations_happen();
    if (bytes < 0) fault("barrier_expect of " + std::to_string(bytes) + " bytes", where);
    kernel_reads(shared_bytes(*current->block, "barrier_expect", barrier, 8, 8, where), 8);
    arrive(*current->block, "barrier_expect", barrier, bytes, where);
    give_way();
}

void barrier_wait(shared_address address, int parity, Where where) {
    const Unseen unseen;
    let_operations_happen();
    Thread& self = *current;
    if (parity != 0 && parity != 1) {
        fault("barrier_wait for parity " + std::to_string(parity) + ", not 0 or 1", where);
    }
    kernel_reads(shared_bytes(*self.block, "barrier_wait", address, 8, 8, where), 8);
    Mbarrier& barrier = mbarrier_at(*self.block, "barrier_wait", address, where);
    const uint64_t phase = barrier.phase;
    if (phase % 2 == static_cast<uint64_t>(parity)) {
        barrier.waiting.push_back(&self);
        self.waits_at = &barrier;
        sleep("barrier_wait", where);
        self.waits_at = nullptr;
        if (barrier.phase > phase + 1) {
            fault("waits for the end of phase " + std::to_string(phase) + " of the mbarrier at " +
                      place_in(*self.block, address) + ", but phase " + std::to_string(phase + 1) +
                      " ended too before this thread looked: it would take the parity for that of phase " +
                      std::to_string(phase + 2) +
                      " and wait on. All threads have to be past a wait before its slot "
                      "is given back",
                  where);
        }
    }
    acquire(&barrier.order[parity]);
}

}  // namespace cuda_on_host
