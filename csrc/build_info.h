// What the module was built with, as attributes of it: on_host, runtime_version, architectures, ptx, sm90_sources,
// sources, bounded_waits; driver_version().
#pragma once

#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

#ifndef MIXER_KERNELS_ON_HOST
#include <cuda_runtime_api.h>
#endif

// From CMake: "80,90a,100,120", and those of them that are there as PTX too.
#ifndef MIXER_KERNELS_ARCHITECTURES
#define MIXER_KERNELS_ARCHITECTURES ""
#define MIXER_KERNELS_PTX ""
#endif
// A digest of the sources of the kernels for sm_90a; empty where there are none in the build.
#ifndef MIXER_KERNELS_SM90_SOURCES
#define MIXER_KERNELS_SM90_SOURCES ""
#endif

// A digest of all CUDA sources, for a module that is carried to another machine.
#ifndef MIXER_KERNELS_SOURCES
#define MIXER_KERNELS_SOURCES ""
#endif

namespace mixer_kernels {

inline pybind11::tuple comma_separated(const char* text) {
    pybind11::list names;
    std::istringstream stream(text);
    for (std::string name; std::getline(stream, name, ',');) names.append(name);
    return pybind11::tuple(names);
}

// The newest CUDA that the driver runs, 12080 for 12.8; 0 without a driver. Initialises nothing.
inline int driver_version() {
    int version = 0;
#ifndef MIXER_KERNELS_ON_HOST
    cudaDriverGetVersion(&version);
#endif
    return version;
}

inline void describe_build(pybind11::module_& module) {
#ifdef MIXER_KERNELS_ON_HOST
    module.attr("on_host") = true;  // by a C++ compiler, for the CPU
    module.attr("runtime_version") = 0;
#else
    module.attr("on_host") = false;
    module.attr("runtime_version") = CUDART_VERSION;  // 13000 for CUDA 13.0
#endif
    module.def("driver_version", &driver_version);
    module.attr("architectures") = comma_separated(MIXER_KERNELS_ARCHITECTURES);
    module.attr("ptx") = comma_separated(MIXER_KERNELS_PTX);
    module.attr("sm90_sources") = MIXER_KERNELS_SM90_SOURCES;
    module.attr("sources") = MIXER_KERNELS_SOURCES;
#ifdef MK_BOUNDED_WAITS
    module.attr("bounded_waits") = true;
#else
    module.attr("bounded_waits") = false;
#endif
}

}  // namespace mixer_kernels
