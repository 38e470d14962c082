"""CUDA on the CPU: the kernels of csrc/ compiled by g++ and run by a model of a GPU that tells of what a GPU leaves
undefined. ``build.load()`` is the extension module; cuda_on_host.h says what is modelled."""
