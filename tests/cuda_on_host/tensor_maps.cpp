// TMA. PTX ISA, "Tensors", "cp.async.bulk.tensor", "Swizzling modes"; CUDA driver API, cuTensorMapEncodeTiled.

#include <array>

#include "asynchronous.h"
#include "machine.h"
#include "mbarriers.h"
#include "sanitizers.h"
#include "swizzle.h"

namespace cuda_on_host {
namespace {

constexpr uint32_t MADE = 0x7e5042a9;
constexpr uint64_t CHUNK = 16;  // bytes that swizzling keeps together

struct Box {
    TensorMap map;
    shared_address shared;
    int at[3];

    size_t bytes() const {
        size_t product = map.element_bytes;
        for (int i = 0; i < map.rank; ++i) product *= map.box[i];
        return product;
    }

    // For each 16 bytes of the box in shared memory: their address, and of the tensor's elements there the first one's
    // address and which bytes [begin, end) of the 16 are inside of the tensor.
    template <class F>
    void for_each_chunk(F f) const {
        const uint64_t row_bytes = uint64_t{map.box[0]} * map.element_bytes;
        const uint64_t rows = bytes() / row_bytes;
        const int64_t width = static_cast<int64_t>(map.sizes[0]) * map.element_bytes;
        shared_address to = shared;
        for (uint64_t row = 0; row < rows; ++row) {
            char* global = map.base;
            bool inside = true;
            uint64_t rest = row;
            for (int axis = 1; axis < map.rank; ++axis) {
                const int64_t i = at[axis] + static_cast<int64_t>(rest % map.box[axis]);
                rest /= map.box[axis];
                inside = inside && i >= 0 && i < static_cast<int64_t>(map.sizes[axis]);
                global += i * static_cast<int64_t>(map.strides[axis]);
            }
            for (uint64_t byte = 0; byte < row_bytes; byte += CHUNK, to += CHUNK) {
                const int64_t from = int64_t{at[0]} * map.element_bytes + static_cast<int64_t>(byte);
                const int64_t begin = std::clamp<int64_t>(-from, 0, CHUNK);
                const int64_t end = inside ? std::clamp<int64_t>(width - from, begin, CHUNK) : begin;
                f(swizzled(to, map.swizzle), global + from, begin, end);
            }
        }
    }
};

// In shared memory, at an address that each check has covered already.
char* chunk_of(const Block& block, shared_address address) { return block.shared.begin + (address - window_of(block)); }

Box check_box(const char* what, const TensorMap& map, shared_address shared, int rank, const int* at, Where where) {
    if (map.made != MADE) fault(std::string(what) + " with a tensor map that make_tensor_map has not made", where);
    if (map.rank != rank) {
        fault(std::string(what) + " at " + std::to_string(rank) + " coordinates in a tensor of " +
                  std::to_string(map.rank) + " axes",
              where);
    }
    Box box{map, shared, {}};
    std::copy(at, at + rank, box.at);
    shared_bytes(*current->block, what, shared, box.bytes(), 128, where);
    return box;
}

// -------------------------------------------------------------------------------------------------------------- load

class Load : public Operation {
  public:
    Load(Block& block, const Box& box, shared_address barrier, Where where)
        : block_(block), box_(box), barrier_(barrier), issuer_(*current), where_(where) {}

    bool ready() const override { return true; }
    bool awaited() const override { return !barrier().waiting.empty(); }
    std::string when_left() const override {
        return name_of(block_) + ": all threads have returned before the box of the load_tile of " + place(where_) +
               " has landed";
    }

    void happen() override {
        if (block_.finished == block_.threads) throw Fault(when_left());
        box_.for_each_chunk([&](shared_address address, const char* global, int64_t begin, int64_t end) {
            char* to = chunk_of(block_, address);
            if (end > begin) kernel_reads(global + begin, end - begin);
            kernel_writes(to, CHUNK);
            std::memset(to, 0, CHUNK);
            if (end > begin) std::memcpy(to + begin, global + begin, end - begin);
            note_write(block_, to, nullptr);
        });
        complete_bytes(block_, barrier(), static_cast<int64_t>(box_.bytes()), issuer_, where_);
    }

    // Until it has landed nobody knows what is there.
    void spoil() const {
        box_.for_each_chunk([&](shared_address address, const char*, int64_t, int64_t) {
            char* to = chunk_of(block_, address);
            kernel_writes(to, CHUNK);
            std::memset(to, 0xff, CHUNK);
            note_write(block_, to, nullptr);
        });
    }

  private:
    Mbarrier& barrier() const { return mbarrier_at(block_, "load_tile", barrier_, where_); }

    Block& block_;
    Box box_;
    shared_address barrier_;
    const Thread& issuer_;
    Where where_;
};

void load(Block& block, const Box& box, shared_address barrier, Where where) {
    const Mbarrier& to_tell = mbarrier_at(block, "load_tile", barrier, where);
    if (!to_tell.fenced) {
        fault(
            "load_tile: no barrier_init_fence followed the barrier_init of the mbarrier at " + place_in(block, barrier),
            where);
    }
    const auto operation = std::make_shared<Load>(block, box, barrier, where);
    operation->spoil();
    begin(operation);
}

void load(shared_address to, const TensorMap& map, shared_address barrier, int rank, const int* at, Where where) {
    const Unseen unseen;
    let_operations_happen();
    load(*current->block, check_box("load_tile", map, to, rank, at, where), barrier, where);
    let_operations_happen();
    give_way();
}

void load_multicast(shared_address to, const TensorMap& map, shared_address barrier, uint16_t blocks, int rank,
                    const int* at, Where where) {
    const Unseen unseen;
    let_operations_happen();
    const Box box = check_box("load_tile_multicast", map, to, rank, at, where);
    if (blocks == 0) fault("load_tile_multicast to no block", where);
    for (int block = 0; block < 16; ++block) {
        if ((blocks >> block & 1) != 0) load(block_of_cluster(block, where), box, barrier, where);
    }
    let_operations_happen();
    give_way();
}

}  // namespace

// ------------------------------------------------------------------------------------------------------------- store

class Store {
  public:
    Store(const Box& box, Where where) : block(*current->block), owner(*current), box_(box), where_(where) {}

    void read() {
        data_.reserve(box_.bytes());
        box_.for_each_chunk([&](shared_address address, const char*, int64_t, int64_t) {
            const char* from = chunk_of(block, address);
            check_async_read(block, "store_tile", from, owner, where_);
            kernel_reads(from, CHUNK);
            data_.insert(data_.end(), from, from + CHUNK);
        });
        is_read = true;
        tell(read_awaited);
    }

    void write() {
        const char* from = data_.data();
        box_.for_each_chunk([&](shared_address, char* global, int64_t begin, int64_t end) {
            if (end > begin) {
                kernel_writes(global + begin, end - begin);
                std::memcpy(global + begin, from + begin, end - begin);
            }
            from += CHUNK;
        });
        data_ = {};
        is_written = true;
        tell(write_awaited);
    }

    Where where() const { return where_; }

    Block& block;
    Thread& owner;
    bool is_read = false, is_written = false;
    bool read_awaited = false, write_awaited = false;  // the owner sleeps until then
    char order = 0;                                    // an address for the thread sanitizer

  private:
    void tell(bool awaited) {
        release(&order);
        if (awaited) wake(owner);
    }

    Box box_;
    Where where_;
    std::vector<char> data_;
};

namespace {

class StoreRead : public Operation {
  public:
    explicit StoreRead(std::shared_ptr<Store> store) : store_(std::move(store)) {}
    bool ready() const override { return true; }
    bool awaited() const override { return store_->read_awaited || store_->write_awaited; }
    void happen() override { store_->read(); }
    std::string when_left() const override { return ""; }  // check_stores sees to it

  private:
    std::shared_ptr<Store> store_;
};

class StoreWrite : public Operation {
  public:
    explicit StoreWrite(std::shared_ptr<Store> store) : store_(std::move(store)) {}
    bool ready() const override { return store_->is_read; }
    bool awaited() const override { return store_->write_awaited; }
    void happen() override {
        acquire(&store_->order);
        store_->write();
    }
    std::string when_left() const override { return ""; }

  private:
    std::shared_ptr<Store> store_;
};

void store(const TensorMap& map, shared_address from, int rank, const int* at, Where where) {
    const Unseen unseen;
    let_operations_happen();
    const Box box = check_box("store_tile", map, from, rank, at, where);
    const auto one = std::make_shared<Store>(box, where);
    if (current->stores.empty()) current->stores.emplace_back();
    current->stores.back().push_back(one);
    begin(std::make_shared<StoreRead>(one));
    begin(std::make_shared<StoreWrite>(one));
    let_operations_happen();
    give_way();
}

}  // namespace

void store_commit() {
    const Unseen unseen;
    if (current->stores.empty()) current->stores.emplace_back();
    current->stores.emplace_back();
}

void wait_for_stores(int groups, bool written, Where where) {
    const Unseen unseen;
    let_operations_happen();
    give_way();
    auto& queue = current->stores;
    const int closed = static_cast<int>(queue.size()) - 1;
    for (int i = 0; i < closed - groups; ++i) {
        for (const auto& store : queue[i]) {
            while (!(written ? store->is_written : store->is_read)) {
                (written ? store->write_awaited : store->read_awaited) = true;
                sleep(written ? "store_wait" : "store_wait_read", where);
            }
            acquire(&store->order);
        }
    }
    const auto is_over = [](const auto& group) {
        return std::all_of(group.begin(), group.end(), [](const auto& store) { return store->is_written; });
    };
    while (queue.size() > 1 && is_over(queue.front())) queue.pop_front();
}

void check_stores(const Thread& thread) {
    for (const auto& group : thread.stores) {
        for (const auto& store : group) {
            if (&group == &thread.stores.back()) {
                fault("returns without a store_commit after a store_tile", store->where());
            }
            if (!store->is_read) fault("returns while a store_tile still reads shared memory", store->where());
        }
    }
}

// -------------------------------------------------------------------------------------------------------------- maps

cudaError_t make_tensor_map(TensorMap* map, const void* base, int element_bytes, int rank, const int64_t* sizes,
                            const int64_t* strides, const int* box, int swizzle) {
    const auto refuse = [](const std::string& what) {
        refuse_tensor_map(what);
        return cudaErrorInvalidValue;
    };
    const auto axis = [](int i, const char* what, int64_t value) {
        return what + (" of axis " + std::to_string(i)) + " is " + std::to_string(value);
    };
    if (rank < 1 || rank > 5) return refuse(std::to_string(rank) + " axes, not 1 to 5");
    if (reinterpret_cast<uintptr_t>(base) % 16 != 0) return refuse("its address is not a multiple of 16");
    TensorMap made{};
    made.base = static_cast<char*>(const_cast<void*>(base));
    made.rank = static_cast<uint8_t>(rank);
    made.element_bytes = static_cast<uint8_t>(element_bytes);
    made.swizzle = static_cast<uint8_t>(swizzle);
    made.made = MADE;
    for (int i = 0; i < rank; ++i) {
        if (sizes[i] < 1 || sizes[i] > int64_t{1} << 32) {
            return refuse(axis(i, "the size", sizes[i]) + ", not 1 to 2^32");
        }
        if (box[i] < 1 || box[i] > 256) return refuse(axis(i, "the box", box[i]) + ", not 1 to 256");
        const int64_t stride = i == 0 ? element_bytes : strides[i - 1] * element_bytes;
        if (i > 0 && (stride < 0 || stride % 16 != 0 || stride >= int64_t{1} << 40)) {
            return refuse(axis(i, "the stride", stride) + " bytes, not a multiple of 16 below 2^40");
        }
        made.sizes[i] = static_cast<uint64_t>(sizes[i]);
        made.strides[i] = static_cast<uint64_t>(stride);
        made.box[i] = static_cast<uint16_t>(box[i]);
    }
    const int row = box[0] * element_bytes;
    if (row % 16 != 0) return refuse("a row of the box is " + std::to_string(row) + " bytes, not a multiple of 16");
    // CUDA allows rows shorter than the swizzle, but does not say where they lie.
    if (swizzle != 0 && row != swizzle) {
        return refuse("a row of the box is " + std::to_string(row) + " bytes, and the swizzle's is " +
                      std::to_string(swizzle));
    }
    *map = made;
    return cudaSuccess;
}

void prefetch(const TensorMap& map, Where where) {
    const Unseen unseen;
    if (map.made != MADE) fault("prefetch of a tensor map that make_tensor_map has not made", where);
}

void load_tile(shared_address to, const TensorMap& map, shared_address barrier, int i0, int i1, Where where) {
    load(to, map, barrier, 2, std::array{i0, i1}.data(), where);
}

void load_tile(shared_address to, const TensorMap& map, shared_address barrier, int i0, int i1, int i2, Where where) {
    load(to, map, barrier, 3, std::array{i0, i1, i2}.data(), where);
}

void load_tile_multicast(shared_address to, const TensorMap& map, shared_address barrier, uint16_t blocks, int i0,
                         int i1, Where where) {
    load_multicast(to, map, barrier, blocks, 2, std::array{i0, i1}.data(), where);
}

void load_tile_multicast(shared_address to, const TensorMap& map, shared_address barrier, uint16_t blocks, int i0,
                         int i1, int i2, Where where) {
    load_multicast(to, map, barrier, blocks, 3, std::array{i0, i1, i2}.data(), where);
}

void store_tile(const TensorMap& map, shared_address from, int i0, int i1, Where where) {
    store(map, from, 2, std::array{i0, i1}.data(), where);
}

void store_tile(const TensorMap& map, shared_address from, int i0, int i1, int i2, Where where) {
    store(map, from, 3, std::array{i0, i1, i2}.data(), where);
}

}  // namespace cuda_on_host
