#include "channel_schedule.h"

#include <algorithm>

namespace {

// A model of a multiprocessor of H100: clocks, and bytes a clock. What it leaves out is the same for all schedules.
constexpr double kFlops = 4096;       // of dense products of 16 bits
constexpr double kSharedBytes = 128;  // to or from shared memory, by TMA and wgmma together
constexpr double kL2Bytes = 32;       // a multiprocessor's share: not measured
constexpr double kAlone = 1.5;        // an epilogue takes so much longer with one warp to a scheduler than with two
constexpr double kOnce = 500;         // a first stage's load and a last chunk's store

struct Tile {
    int rows, columns;
};

Tile tile_of(mk_sm90_tile tile) {
    switch (tile) {
        case MK_SM90_WIDE:
            return {128, 256};
        case MK_SM90_WIDE_PING_PONG:
            return {128, 192};
        case MK_SM90_PING_PONG:
            return {128, 128};
        case MK_SM90_NARROW:
            return {128, 64};
    }
    return {128, 256};
}

// Clocks of an epilogue for an element: its instructions in the machine code over the 128 lanes of four schedulers.
// GELU's special functions, at 16 lanes a clock, take almost as many.
double epilogue_clocks(mk_sm90_channel_product product) {
    return product == MK_SM90_FC1 ? 17.0 / 128 : product == MK_SM90_FC2 ? 6.0 / 128 : 30.0 / 128;
}

double clocks(mk_sm90_channel_product product, mk_sm90_schedule schedule, int64_t rows, int columns, int depth,
              int multiprocessors) {
    const Tile tile = tile_of(schedule.tile);
    const double steps = (depth + 63) / 64, elements = static_cast<double>(tile.rows) * tile.columns;
    const double flops = elements * 64 * 2;
    // wgmma reads its 64 rows of the left operand and all columns of the right one for each 16 of K.
    const double read = 4.0 * (tile.rows / 64) * (64 + tile.columns) * 32;
    const double filled = 128.0 * (tile.rows + tile.columns);
    const double from_l2 = 128.0 * (tile.rows + static_cast<double>(tile.columns) / schedule.cluster);
    const double product_clocks =
        steps * std::max({flops / kFlops, (read + filled) / kSharedBytes, from_l2 / kL2Bytes});
    double finish = elements * epilogue_clocks(product);

    const int64_t height = int64_t{tile.rows} * schedule.cluster;
    const int64_t tiles = (rows + height - 1) / height * ((columns + tile.columns - 1) / tile.columns);
    const int64_t clusters = std::max(multiprocessors / schedule.cluster, 1);
    const double waves = static_cast<double>((tiles + clusters - 1) / clusters);
    const bool ping_pong = schedule.tile == MK_SM90_WIDE_PING_PONG || schedule.tile == MK_SM90_PING_PONG;
    if (!ping_pong) return kOnce + waves * (product_clocks + finish);
    finish *= kAlone;  // hidden behind the other consumer's product, but for the last
    return kOnce + std::max(waves * product_clocks + finish, (waves + 1) / 2 * (product_clocks + finish));
}

}  // namespace

extern "C" mk_sm90_schedule mk_sm90_channel_schedule(mk_sm90_channel_product product, int64_t rows, int columns,
                                                     int depth, mk_device device) {
    const int multiprocessors = device.multiprocessors > 0 ? device.multiprocessors : MK_SM90_FEWEST_MULTIPROCESSORS;
    mk_sm90_schedule best{MK_SM90_WIDE, 1};
    double least = 0.0;
    for (const mk_sm90_tile tile : {MK_SM90_WIDE, MK_SM90_WIDE_PING_PONG, MK_SM90_PING_PONG, MK_SM90_NARROW}) {
        for (const int cluster : {1, 2}) {
            const mk_sm90_schedule schedule{tile, cluster};
            const double taken = clocks(product, schedule, rows, columns, depth, multiprocessors);
            if (least == 0.0 || taken < least) {
                least = taken;
                best = schedule;
            }
        }
    }
    return best;
}
