// A block's shared memory: its addresses, and what of it the async proxy (TMA, wgmma) may see.
//
// PTX ISA, "Proxies" and "Async proxy": what threads write through the generic proxy is seen by the async proxy only
// after their fence.proxy.async. stmatrix is watched by thread; a plain store shows when the async proxy finds contents
// that no instruction has left there, and is a fault if no thread of the block has come to a fence since.

#include "machine.h"
#include "sanitizers.h"

namespace cuda_on_host {
namespace {

constexpr size_t GRANULE = 16;

size_t granule_of(const Block& block, const char* address) { return (address - block.shared.begin) / GRANULE; }

}  // namespace

void* shared_memory() { return current->block->shared.begin; }

shared_address window_of(const Block&) {
    return 1024 + 128 * (1 + 2 * static_cast<shared_address>(settings().seed % 4));
}

shared_address address_of(const void* shared, Where where) {
    const Unseen unseen;
    const Block& block = *current->block;
    const intptr_t offset = static_cast<const char*>(shared) - block.shared.begin;
    constexpr intptr_t far_away = 1 << 24;
    if (offset < -far_away || offset > far_away) fault("the address of what is not in shared memory", where);
    return window_of(block) + static_cast<shared_address>(offset);
}

void* pointer_to(shared_address address, Where where) {
    const Unseen unseen;
    return shared_bytes(*current->block, "a pointer to shared memory", address, 0, 1, where);
}

std::string place_in(const Block& block, shared_address address) {
    return "byte " + std::to_string(static_cast<int32_t>(address - window_of(block))) + " of shared memory";
}

char* shared_bytes(const Block& block, const char* what, shared_address address, size_t bytes, uint32_t alignment,
                   Where where) {
    const int64_t offset = static_cast<int32_t>(address - window_of(block));
    if (offset < 0 || offset + bytes > block.shared.bytes) {
        fault(std::string(what) + " at byte " + std::to_string(offset) + " of " + std::to_string(block.shared.bytes) +
                  " bytes of shared memory",
              where);
    }
    if (address % alignment != 0) {
        fault(std::string(what) + " at byte " + std::to_string(offset) +
                  (alignment <= 128 ? "" : ", address " + std::to_string(address)) + ", not a multiple of " +
                  std::to_string(alignment),
              where);
    }
    return block.shared.begin + offset;
}

void note_write(Block& block, const char* address, Thread* thread) {
    AsyncView& view = block.async_view;
    if (view.writer.empty()) {
        const size_t granules = block.shared.bytes / GRANULE + 1;
        view.writer.assign(granules, 0);
        view.fences.assign(granules, 0);
        view.known.assign(granules * GRANULE, static_cast<char>(0xff));
    }
    const size_t granule = granule_of(block, address);
    std::memcpy(&view.known[granule * GRANULE], address, GRANULE);
    view.fences[granule] = view.all_fences;
    const uint16_t writer = thread == nullptr ? 0 : static_cast<uint16_t>(thread->linear + 1);
    if (thread != nullptr && view.writer[granule] != writer) thread->unfenced.push_back(static_cast<uint32_t>(granule));
    view.writer[granule] = writer;
}

void check_async_read(const Block& block, const char* what, const char* address, const Thread& issuer, Where where) {
    const AsyncView& view = block.async_view;
    const size_t granule = granule_of(block, address);
    const auto unfenced = [&](const std::string& writer) {
        fault(issuer,
              std::string(what) + " reads byte " + std::to_string(address - block.shared.begin) +
                  " of shared memory, which " + writer + " has written with no fence_async_shared after it",
              where);
    };
    if (!view.writer.empty() && view.writer[granule] != 0) {
        unfenced("thread " + std::to_string(view.writer[granule] - 1));
    }
    const uint32_t fences = view.writer.empty() ? 0 : view.fences[granule];
    if (fences != view.all_fences) return;
    static const std::string fresh(GRANULE, static_cast<char>(0xff));
    const char* known = view.writer.empty() ? fresh.data() : &view.known[granule * GRANULE];
    if (std::memcmp(known, address, GRANULE) != 0) unfenced("a thread");
}

void fence_async_shared() {
    const Unseen unseen;
    Thread& self = *current;
    AsyncView& view = self.block->async_view;
    for (const uint32_t granule : self.unfenced) {
        if (view.writer[granule] == self.linear + 1) view.writer[granule] = 0;
    }
    self.unfenced.clear();
    ++view.all_fences;
}

}  // namespace cuda_on_host
