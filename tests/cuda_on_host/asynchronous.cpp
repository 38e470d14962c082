// What is under way beside the threads, and when it happens.

#include "asynchronous.h"

#include "sanitizers.h"

namespace cuda_on_host {
namespace {

std::vector<std::shared_ptr<Operation>> under_way;  // in the order of their beginnings
char finished;                                      // an address for the thread sanitizer

// As a thread of its own to the thread sanitizer: only what the operation acquires comes before it.
CUDA_ON_HOST_UNINSTRUMENTED void happen(size_t which) {
    const std::shared_ptr<Operation> operation = under_way[which];
    under_way.erase(under_way.begin() + static_cast<std::ptrdiff_t>(which));
    const Apart apart;
    acquire(operation.get());
    operation->happen();
    release(&finished);
}

template <class F>
bool happen_to_one(F may) {
    std::vector<size_t> candidates;
    for (size_t i = 0; i < under_way.size(); ++i) {
        if (may(*under_way[i])) candidates.push_back(i);
    }
    if (candidates.empty()) return false;
    happen(candidates[scheduling().below(static_cast<uint32_t>(candidates.size()))]);
    return true;
}

bool is_ready(const Operation& operation) { return operation.ready(); }

}  // namespace

void begin(std::shared_ptr<Operation> operation) {
    release(operation.get());
    under_way.push_back(std::move(operation));
}

void let_operations_happen() {
    if (under_way.empty()) return;
    switch (settings().landing) {
        case Landing::early:
            while (happen_to_one(is_ready)) continue;
            break;
        case Landing::random:
            while (scheduling().below(8) == 0 && happen_to_one(is_ready)) continue;
            break;
        case Landing::late:
            break;
    }
}

bool make_operation_happen() {
    return happen_to_one([](const Operation& operation) { return operation.ready() && operation.awaited(); });
}

void finish_operations() {
    for (const auto& operation : under_way) {
        const std::string wrong = operation->when_left();
        if (!wrong.empty()) throw Fault(wrong);
    }
    while (happen_to_one(is_ready)) continue;
}

void forget_operations() {
    acquire(&finished);
    under_way.clear();
}

}  // namespace cuda_on_host
