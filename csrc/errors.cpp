// What a launcher's return value means.
#include "mixer_kernels.h"
#ifdef MIXER_KERNELS_ON_HOST
#include "cuda_on_host.h"
#else
#include <cuda_runtime_api.h>
#endif

extern "C" const char* mk_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
