// How the channel products of sm_90a go over a GPU: which tiles, in which order, shared by how many blocks.
//
// The launchers of launchers.h take what mk_sm90_channel_schedule says. Those below take it as an argument, for tests
// and for tuning.
#pragma once

#include "../mixer_kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
    MK_SM90_WIDE = 0,            // 128 x 256 to a block: two warpgroups of 64 x 256, then the epilogue of both
    MK_SM90_WIDE_PING_PONG = 1,  // 128 x 192 to each of two warpgroups: one multiplies during the other's epilogue
    MK_SM90_PING_PONG = 2,       // the same, 128 x 128
    MK_SM90_NARROW = 3           // 128 x 64 to a block, two warpgroups of 64 x 64: more tiles where there are few
} mk_sm90_tile;

typedef struct {
    mk_sm90_tile tile;
    int cluster;  // blocks that share their tiles of the weights by multicast: 1 or 2
} mk_sm90_schedule;

typedef enum { MK_SM90_FC1 = 0, MK_SM90_FC2 = 1, MK_SM90_GELU_BACKWARD = 2 } mk_sm90_channel_product;

enum { MK_SM90_FEWEST_MULTIPROCESSORS = 78 };  // of the GPUs of sm_90: an H20

// For a product [rows, columns] over `depth`. device.multiprocessors may be 0.
mk_sm90_schedule mk_sm90_channel_schedule(mk_sm90_channel_product product, int64_t rows, int columns, int depth,
                                          mk_device device);

int mk_sm90_channel_fc1_scheduled(const mk_channel_fc1_arguments* arguments, mk_sm90_schedule schedule,
                                  mk_device device, mk_stream stream);
int mk_sm90_channel_fc2_scheduled(const mk_channel_fc2_arguments* arguments, mk_sm90_schedule schedule,
                                  mk_device device, mk_stream stream);
int mk_sm90_channel_gelu_backward_scheduled(const mk_channel_gelu_backward_arguments* arguments,
                                            mk_sm90_schedule schedule, mk_device device, mk_stream stream);

#ifdef __cplusplus
}
#endif
