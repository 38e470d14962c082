// What a launcher's return value means.
#include "device/platform.cuh"

extern "C" const char* mk_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
