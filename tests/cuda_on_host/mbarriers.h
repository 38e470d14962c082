// mbarriers, to what else uses them; and the blocks of a cluster.
#pragma once

#include "machine.h"

namespace cuda_on_host {

Mbarrier& mbarrier_at(Block& block, const char* what, shared_address address, Where where);
void complete_bytes(Block& block, Mbarrier& barrier, int64_t bytes, const Thread& issuer, Where where);
Block& block_of_cluster(int rank, Where where);  // a fault if it has returned

}  // namespace cuda_on_host
