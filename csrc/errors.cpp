// What a launcher's return value means.
#include <string>

#include "mixer_kernels.h"
#ifdef MIXER_KERNELS_ON_HOST
#include "cuda_on_host.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace {
thread_local std::string note, last;
}

extern "C" void mk_note_error(const char* text) { note = text; }

extern "C" const char* mk_error_string(int error) {
    last = cudaGetErrorString(static_cast<cudaError_t>(error));
    if (!note.empty()) last += "; " + note;
    note.clear();
    return last.c_str();
}
