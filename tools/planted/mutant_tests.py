"""Which sources have mutants, the tests of each, narrow ones first, and mutants that compute the same."""

from __future__ import annotations

from fnmatch import fnmatch

from .copies import Check

AREAS = {
    "triton": ("mixer_kernels/backends/triton/*.py",),
    # Not noise.h: the driver draws no noise; that masks are Triton's is tested of an installed build.
    "cpu": ("csrc/cpu/[!n]*.h", "csrc/cpu/norm.h", "csrc/cpu/kernels.cpp", "csrc/cpu/run.cpp"),
    "cuda": ("csrc/*.cu", "csrc/*.cuh", "csrc/device/*.cuh"),
}

_FORWARD = (
    Check("test_kernels", "test_matches_eager and below and not cuda"),
    Check("test_kernels", "(test_matches_eager or test_layouts or test_options) and not cuda and not 448"),
)
_EDGES = Check("test_kernels", "not cuda and not test_matches_eager and not every_target and not bit")
_BACKWARD = (
    Check("test_backward", "test_matches_eager and below and not cuda"),
    Check("test_backward", "(test_matches_eager or test_layouts or test_options or only_what) and not cuda"),
)
_LARGE_BACKWARD = Check("test_backward", "(large or descriptors) and not cuda")
_NOISE = Check("test_noise", "not cuda")
_OFFSETS = Check("test_launches", "offsets or rows_than")
_RELATIVES = (Check("test_relatives", "test_matches_eager and below"), Check("test_relatives", "not compiled"))
_MIXERS = (
    Check("test_relatives_patchtsmixer", "test_matches_eager and small"),
    Check("test_relatives_patchtsmixer", "not compiled"),
    Check("test_relatives_patchtsmixer_dropout", ""),
)
_LAYERS = (
    Check("test_relatives_patchtsmixer_layer", "test_matches_eager and small"),
    Check("test_relatives_patchtsmixer_layer", "not compiled"),
)
_CPU = (
    Check("test_cpu_kernels", "test_right and 4 and plain"),
    Check("test_cpu_kernels", "test_right and 8 and address"),
)
_DRIVER = Check("test_cuda_on_host", "test_launchers and None")
_NUMBERS = Check("test_kernels", "cuda and not 448")
_CUDA = (_DRIVER, _NUMBERS, Check("test_backward", "cuda"), Check("test_noise", "cuda"))

_TESTS: dict[str, tuple[Check, ...]] = {
    "*/triton/activation.py": (Check("test_activations", "triton or relu or silu"), *_RELATIVES),
    "*/triton/branch_gradient.py": (_NOISE,),
    "*/triton/channel_backward.py": (*_BACKWARD, _LARGE_BACKWARD, _NOISE, *_RELATIVES),
    "*/triton/channel_descriptors.py": (Check("test_kernels", "descriptors"), _LARGE_BACKWARD, _NOISE, *_RELATIVES),
    "*/triton/channel_*.py": (*_FORWARD, _EDGES, _NOISE, *_RELATIVES, _OFFSETS),
    "*/triton/gated_mixer_layer.py": (*_LAYERS, _OFFSETS),
    "*/triton/gated_mixing*.py": (*_MIXERS, *_LAYERS, _OFFSETS),
    "*/triton/gelu.py": (Check("test_gelu", ""), *_FORWARD, *_BACKWARD),
    "*/triton/hidden_units.py": (*_RELATIVES,),
    "*/triton/noise.py": (_NOISE, *_LAYERS),
    "*/triton/norm_backward.py": (*_BACKWARD, *_RELATIVES),
    "*/triton/pack.py": (*_FORWARD, _EDGES, Check("test_backward", "test_matches_eager and not cuda"), *_RELATIVES),
    "*/triton/row_statistics.py": (*_FORWARD, _EDGES, _OFFSETS, *_MIXERS),
    "*/triton/token_linear.py": (*_RELATIVES, _OFFSETS),
    "*/triton/token_mixing.py": (*_FORWARD, _EDGES, _NOISE, *_RELATIVES, _OFFSETS),
    "*/triton/token_products.py": (
        Check("test_kernels", "test_matches_eager and beyond and not cuda"), *_FORWARD, _EDGES, _NOISE, *_RELATIVES,
        _LARGE_BACKWARD, _OFFSETS,
    ),
    "*/triton/*.py": (*_BACKWARD, _LARGE_BACKWARD, _NOISE, *_RELATIVES, _OFFSETS),
    "csrc/cpu/*": _CPU,
    "csrc/*": _CUDA,
}  # fmt: skip

_TILES = "how x is cut into tiles, panels and tasks: what is computed is the same"
EQUIVALENT: tuple[tuple[str, str, str], ...] = (
    ("csrc/cpu/kernels.cpp", "constexpr int64_t k", _TILES),
    ("csrc/cpu/kernels.cpp", "256;  // to a set of sums", _TILES),
    ("csrc/cpu/mixing.h", "constexpr int64_t kPanel", _TILES),
    ("csrc/cpu/mixing.h", "constexpr int64_t kLeast", _TILES),
    ("csrc/cpu/plane.h", "kLine = 16", _TILES),
    ("csrc/cpu/kernels.cpp", "while (slices < most", _TILES),
    ("csrc/cpu/kernels.cpp", "Shape shape = Tile::shape_of(call, 0);", "of one mixer: both numbers give its shape"),
    ("csrc/cpu/mixing.h", "c < count; c += kLanes | < -> <=", "a vector more, in the room that a plane has behind it"),
    ("csrc/cpu/functions.h", "constexpr float kLeastExponent", "of numbers below 1e-37 no result has a digit"),
    (
        "csrc/cpu/functions.h",
        "x > kMostExponent ? all(__builtin_inff())",
        "of 88 exactly: 1.7e38 or infinity, divided by which 0 is left",
    ),
    ("csrc/cpu/run.cpp", "avx2", "of a CPU that has all of them"),
    ("csrc/cpu/norm.h", "for (int64_t f = 0; f < F; f += kLanes) { | < -> <=", "a turn more, which stores no element"),
    ("triton/token_data_gradient.py", "tl.multiple_of(turns - steps, 16)", "a hint to the compiler; 0 is any multiple"),
    ("triton/token_products.py", "mask=mask, other=0.0) | 0.0 -> 1.0", "of lanes that are not stored"),
    ("triton/pack.py", "- 126, 126) | 126 -> 127", "of weights above 2^126, which have no float16"),
)
"""Part of the file's name, part of the line and what replaces what, and why no test can tell the mutant."""


def checks_of(file: str) -> tuple[Check, ...]:
    """The tests of ``file``, named from the root of the tree, one after the other until one sees the mutant."""
    return next(checks for pattern, checks in _TESTS.items() if fnmatch(file, pattern))
