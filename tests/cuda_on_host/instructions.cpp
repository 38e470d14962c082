// The warp's instructions and asynchronous copies, from the text of the PTX ISA.

#include <array>

#include "machine.h"
#include "sanitizers.h"

namespace cuda_on_host {
namespace {

constexpr int LANES = 32;

void land(Copy& copy) {
    if (copy.landed) return;
    copy.landed = true;
    kernel_reads(copy.global, copy.valid_bytes);
    kernel_writes(copy.shared, 16);
    if (copy.valid_bytes > 0) std::memcpy(copy.shared, copy.global, copy.valid_bytes);
    std::memset(copy.shared + copy.valid_bytes, 0, 16 - copy.valid_bytes);
}

struct MmaLane {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
};

template <float (*decode)(uint16_t)>
void multiply(void** arguments) {
    // Fragments first to words in matrix order, then decoded in one loop, so that the compiler takes vectors.
    alignas(32) uint16_t words[16 * 16 + 16 * 8];
    alignas(32) float numbers[16 * 16 + 16 * 8];
    uint16_t (*a16)[16] = reinterpret_cast<uint16_t (*)[16]>(words);
    uint16_t (*b16)[8] = reinterpret_cast<uint16_t (*)[8]>(words + 16 * 16);
    for (int lane = 0; lane < LANES; ++lane) {
        const MmaLane& in = *static_cast<const MmaLane*>(arguments[lane]);
        const int group = lane / 4, pair = lane % 4 * 2;
        for (int i = 0; i < 4; ++i) {
            const int row = group + i % 2 * 8, column = pair + i / 2 * 8;
            std::memcpy(&a16[row][column], &in.a[i], 4);
        }
        for (int i = 0; i < 2; ++i) {
            b16[pair + i * 8][group] = static_cast<uint16_t>(in.b[i] & 0xffff);
            b16[pair + i * 8 + 1][group] = static_cast<uint16_t>(in.b[i] >> 16);
        }
    }
    for (int i = 0; i < 16 * 16 + 16 * 8; ++i) numbers[i] = decode(words[i]);
    const float (*a)[16] = reinterpret_cast<const float (*)[16]>(numbers);
    const float (*b)[8] = reinterpret_cast<const float (*)[8]>(numbers + 16 * 16);
    alignas(32) float d[16][8] = {};
    for (int row = 0; row < 16; ++row) {
        for (int k = 0; k < 16; ++k) {
            for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
        }
    }
    for (int lane = 0; lane < LANES; ++lane) {
        float* out = static_cast<const MmaLane*>(arguments[lane])->d;
        const int group = lane / 4, pair = lane % 4 * 2;
        for (int i = 0; i < 4; ++i) out[i] += d[group + i / 2 * 8][pair + i % 2];
    }
}

struct MatrixLane {
    std::array<uint16_t, 8> row;  // read by the lane that points at it
    uint32_t* r;
};

template <int MATRICES, bool TRANSPOSED>
void distribute(void** arguments) {
    for (int matrix = 0; matrix < MATRICES; ++matrix) {
        for (int lane = 0; lane < LANES; ++lane) {
            uint16_t halves[2];
            for (int i = 0; i < 2; ++i) {
                const int row = TRANSPOSED ? lane % 4 * 2 + i : lane / 4;
                const int column = TRANSPOSED ? lane / 4 : lane % 4 * 2 + i;
                halves[i] = static_cast<const MatrixLane*>(arguments[matrix * 8 + row])->row[column];
            }
            uint32_t* r = static_cast<const MatrixLane*>(arguments[lane])->r;
            r[matrix] = halves[0] | static_cast<uint32_t>(halves[1]) << 16;
        }
    }
}

struct StoredLane {
    std::array<uint16_t, 8> row;  // written by the lane that points at it
    const uint32_t* r;
};

template <int MATRICES, bool TRANSPOSED>
void collect(void** arguments) {
    for (int matrix = 0; matrix < MATRICES; ++matrix) {
        for (int lane = 0; lane < LANES; ++lane) {
            const uint32_t pair = static_cast<const StoredLane*>(arguments[lane])->r[matrix];
            for (int i = 0; i < 2; ++i) {
                const int row = TRANSPOSED ? lane % 4 * 2 + i : lane / 4;
                const int column = TRANSPOSED ? lane / 4 : lane % 4 * 2 + i;
                static_cast<StoredLane*>(arguments[matrix * 8 + row])->row[column] =
                    static_cast<uint16_t>(i == 0 ? pair : pair >> 16);
            }
        }
    }
}

struct ShuffleLane {
    uint32_t value, result;
    int source;
};

void exchange(void** arguments) {
    for (int lane = 0; lane < LANES; ++lane) {
        ShuffleLane* in = static_cast<ShuffleLane*>(arguments[lane]);
        if (in == nullptr) continue;
        const ShuffleLane* from = static_cast<ShuffleLane*>(arguments[in->source]);
        in->result = from == nullptr ? 0xffffffff : from->value;  // undefined on a GPU
    }
}

void check_full_warp(const char* what, Where where) {
    const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
    if (threads % LANES != 0) {
        fault(std::string(what) + " in a block of " + std::to_string(threads) + " threads, not a multiple of 32",
              where);
    }
}

void check_mask(const char* what, unsigned mask, Where where) {
    if (mask != 0xffffffff) fault(std::string(what) + " of part of the warp is not modelled", where);
}

}  // namespace

uint64_t matrix_products = 0, warpgroup_products = 0;

void mma_m16n8k16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, Operands type, Where where) {
    const Unseen unseen;
    check_full_warp("mma", where);
    if (current->lane == 0) ++matrix_products;
    MmaLane lane{d, a, {b0, b1}};
    meet("mma", static_cast<int>(type), Memory::unordered, &lane,
         type == Operands::bfloat16 ? multiply<from_bfloat16> : multiply<from_float16>, where);
}

void ldmatrix(uint32_t* r, int matrices, bool transposed, shared_address row, Where where) {
    const Unseen unseen;
    check_full_warp("ldmatrix", where);
    MatrixLane lane;
    lane.r = r;
    if (current->lane < matrices * 8) {  // the addresses of the other lanes are ignored
        const char* from = shared_bytes(*current->block, "ldmatrix", row, 16, 16, where);
        kernel_reads(from, 16);
        std::memcpy(lane.row.data(), from, 16);
    }
    const auto work = matrices == 4 ? (transposed ? distribute<4, true> : distribute<4, false>)
                                    : (transposed ? distribute<2, true> : distribute<2, false>);
    meet("ldmatrix", matrices * 2 + transposed, Memory::unordered, &lane, work, where);
}

void stmatrix(shared_address row, const uint32_t* r, int matrices, bool transposed, Where where) {
    const Unseen unseen;
    check_full_warp("stmatrix", where);
    StoredLane lane{{}, r};
    const bool writes = current->lane < matrices * 8;  // the addresses of the other lanes are ignored
    char* to = writes ? shared_bytes(*current->block, "stmatrix", row, 16, 16, where) : nullptr;
    const auto work = matrices == 4 ? (transposed ? collect<4, true> : collect<4, false>)
                                    : (transposed ? collect<2, true> : collect<2, false>);
    meet("stmatrix", matrices * 2 + transposed, Memory::unordered, &lane, work, where);
    if (!writes) return;
    kernel_writes(to, 16);
    std::memcpy(to, lane.row.data(), 16);
    note_write(*current->block, to, current);
}

uint32_t shuffle(unsigned mask, uint32_t value, int source, Where where) {
    const Unseen unseen;
    check_mask("shfl.sync", mask, where);
    ShuffleLane lane{value, 0, source};
    meet("shfl.sync", 0, Memory::unordered, &lane, exchange, where);
    return lane.result;
}

void sync_warp(unsigned mask, Where where) {
    const Unseen unseen;
    check_mask("__syncwarp", mask, where);
    meet("__syncwarp", 0, Memory::ordered, nullptr, nullptr, where);
}

void cp_async_16(void* to, const void* from, int valid_bytes, Where where) {
    const Unseen unseen;
    char* shared = shared_bytes(*current->block, "cp.async", address_of(to, where), 16, 16, where);
    if (reinterpret_cast<uintptr_t>(from) % 16 != 0) {
        fault("cp.async from an address that is not 16-byte aligned", where);
    }
    if (valid_bytes < 0 || valid_bytes > 16) {
        fault("cp.async of " + std::to_string(valid_bytes) + " bytes, not 0 to 16", where);
    }
    Copy copy{shared, static_cast<const char*>(from), valid_bytes, false};
    // The destination is undefined from now until the copy lands.
    kernel_writes(copy.shared, 16);
    std::memset(copy.shared, 0xff, 16);
    const Landing landing = settings().landing;
    if (landing == Landing::early || (landing == Landing::random && current->random.below(2) == 0)) land(copy);
    if (current->copies.empty()) current->copies.emplace_back();
    current->copies.back().push_back(copy);
}

void cp_async_commit() {
    const Unseen unseen;
    if (current->copies.empty()) current->copies.emplace_back();
    current->copies.emplace_back();
}

void cp_async_wait(int groups) {
    const Unseen unseen;
    auto& queue = current->copies;
    if (queue.empty()) return;
    const int closed = static_cast<int>(queue.size()) - 1, finished = closed - groups;
    if (finished > 0) {
        for (int i = 0; i < finished; ++i) {
            for (Copy& copy : queue[i]) land(copy);
        }
        queue.erase(queue.begin(), queue.begin() + finished);
    }
    if (settings().landing != Landing::random) return;
    for (auto& group : queue) {
        for (Copy& copy : group) {
            if (current->random.below(2) == 0) land(copy);
        }
    }
}

}  // namespace cuda_on_host
