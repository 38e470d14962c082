// Barriers of a block's threads by number, and of a cluster's: PTX ISA, "bar, barrier" and "barrier.cluster".

#include "asynchronous.h"
#include "machine.h"
#include "mbarriers.h"
#include "sanitizers.h"

namespace cuda_on_host {
namespace {

// Arrives, and sleeps until all have if it is to `stay`.
void come(const char* what, int id, int threads, bool stay, Where where) {
    let_operations_happen();
    give_way();
    Thread& self = *current;
    if (id < 1 || id > 15 || threads < warpSize || threads % warpSize != 0) {
        fault(std::string(what) + ": barrier " + std::to_string(id) + " of " + std::to_string(threads) +
                  " threads; there are 1 to 15, of whole warps",
              where);
    }
    NamedBarrier& barrier = self.block->named_barriers[id];
    const std::string name = "named barrier " + std::to_string(id);
    if (barrier.arrived == 0) barrier.expected = threads;
    if (barrier.expected != threads) {
        fault(name + " of " + std::to_string(threads) + " threads, while others have come to it as one of " +
                  std::to_string(barrier.expected),
              where);
    }
    if (self.named_barriers[id] == barrier.generation + 1) {
        fault("comes to " + name + " again before " + std::to_string(threads) + " threads have", where);
    }
    self.named_barriers[id] = barrier.generation + 1;
    barrier.lanes.resize((self.block->threads + warpSize - 1) / warpSize);
    ++barrier.lanes[self.warp];
    char* order = &barrier.order[barrier.generation % 2];
    release(order);
    if (++barrier.arrived < barrier.expected) {
        if (!stay) return;
        barrier.waiting.push_back(&self);
        sleep("named_barrier_sync", where);
    } else {
        for (size_t warp = 0; warp < barrier.lanes.size(); ++warp) {
            if (barrier.lanes[warp] % warpSize != 0) {
                fault(name + ": only " + std::to_string(barrier.lanes[warp]) + " lanes of warp " +
                          std::to_string(warp) + " have come",
                      where);
            }
        }
        barrier.arrived = 0;
        barrier.lanes.clear();
        ++barrier.generation;
        wake(barrier.waiting);
    }
    if (stay) acquire(order);
}

}  // namespace

void named_barrier_sync(int id, int threads, Where where) {
    const Unseen unseen;
    come("named_barrier_sync", id, threads, true, where);
}

void named_barrier_arrive(int id, int threads, Where where) {
    const Unseen unseen;
    come("named_barrier_arrive", id, threads, false, where);
}

// ---------------------------------------------------------------------------------------------------------- clusters

namespace {

struct ClusterBarrier {  // of the cluster that runs
    int arrived = 0;
    std::vector<Thread*> waiting;
    char order[2] = {};
    int generation = 0;
} cluster_barrier;

}  // namespace

Block& block_of_cluster(int rank, Where where) {
    const Cluster& cluster = current->block->cluster;
    if (rank < 0 || rank >= static_cast<int>(cluster.size())) {
        fault("block " + std::to_string(rank) + " of a cluster of " + std::to_string(cluster.size()), where);
    }
    Block& block = *cluster[rank];
    if (block.finished == block.threads) {
        fault("block " + std::to_string(rank) +
                  " of the cluster has returned, and its shared memory is gone: a "
                  "cluster_sync has to keep it",
              where);
    }
    return block;
}

int cluster_rank() { return current->block->rank; }

void check_cluster_barrier() {
    ClusterBarrier& barrier = cluster_barrier;
    if (barrier.arrived == 0 || barrier.arrived < threads_of_cluster() - threads_that_returned()) return;
    barrier.arrived = 0;
    ++barrier.generation;
    wake(barrier.waiting);
}

void cluster_sync(Where where) {
    const Unseen unseen;
    let_operations_happen();
    ClusterBarrier& barrier = cluster_barrier;
    char* order = &barrier.order[barrier.generation % 2];
    release(order);
    ++barrier.arrived;
    if (barrier.arrived < threads_of_cluster() - threads_that_returned()) {
        barrier.waiting.push_back(current);
        sleep("cluster_sync", where);
    } else {
        check_cluster_barrier();
    }
    acquire(order);
}

void forget_cluster_barrier() { cluster_barrier = {}; }

}  // namespace cuda_on_host
