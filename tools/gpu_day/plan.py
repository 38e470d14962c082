"""What a day consists of: the tasks of each phase, the most wanted first, and the goals."""

from __future__ import annotations

from dataclasses import dataclass

HOPPER = "cuda:sm90"
BACKENDS = ("triton", "cuda", HOPPER)  # with kernels, the riskiest last
COMPILED = ("cuda", HOPPER)  # by nvcc: they wait for the build

OK, CANNOT = "ok", "cannot run"
WRONG, FAULT, HANG, FAILED = BAD = ("wrong", "fault", "hang", "failed")
STRIKES = (FAULT, HANG)  # what costs a process; with two of them a backend sits out
MAX_STRIKES = 2

SMALL, FULL = SIZES = ("small", "B/16")
MIXER = ("token_mixing", "channel_mixing", "mixer_block")
RELATIVES = (
    "mixer_block swiglu", "token_linear", "channel_mixing affine", "spatial_gating", "gated_channel_mixing",
    "gated_mixing patches", "gated_mixing features", "gated_mixing channels", "gated_mixing sigmoid",
    "gated_mixer_layer", "gated_mixer_layer sigmoid",
)  # fmt: skip
OPERATORS = {"triton": (*MIXER, *RELATIVES), "cuda": MIXER, HOPPER: MIXER}

# Of mixer_kernels.bench: level, name, batch size, mode.
SPEED = (
    *((level, "B/16", 256, "infer") for level in ("token", "channel", "block")),
    ("block", "B/16", 256, "train"),
    *(("model", "B/16", batch_size, "infer") for batch_size in (256, 32, 1)),
    *(("model", name, 256, "infer") for name in ("gmixer_24", "resmlp_24", "gmlp_s16", "ptsm", "ttm")),
    *(("block", "B/16", batch_size, "infer") for batch_size in (32, 1)),
    ("model", "B/16", 64, "train"),
)

# eager / ours, torch.compile / ours (more is better), ours / bare products (less): at least, and hoped for.
GOALS = {  # of B/16 at batch 256
    ("token", "infer"): ((3.5, 2.0, 0.95), (5.0, 3.0, 0.80)),
    ("channel", "infer"): ((1.25, 1.15, 1.08), (1.35, 1.3, 1.03)),
    ("block", "infer"): ((1.55, 1.3, 1.07), (1.8, 1.5, 1.0)),
    ("block", "train"): ((1.5, 1.25, 1.11), (1.7, 1.45, 1.03)),
}

TEST_FILES = (
    "test_streams_and_graphs", "test_kernels", "test_backward", "test_cuda_backend", "test_cuda_sm90",
    "test_cuda_packs", "test_relatives", "test_relatives_patchtsmixer", "test_relatives_patchtsmixer_layer",
    "test_noise", "test_ops", "test_modules", "test_weights_are_never_stale", "test_freeze", "test_training",
    "test_functional", "test_transforms", "test_patch_models", "test_timm_models",
    "test_relatives_patchtsmixer_dropout", "test_cuda_sm90_dispatch", "test_sanitizers_on_a_gpu",
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """One thing to do in one go. ``without``: providers of a benchmark that have been dropped from it."""

    phase: str
    name: str
    backend: str = ""  # whose kernels it is about; "" for a benchmark, which has all
    without: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return f"{self.phase}: {self.name}" + (f" [{self.backend}]" if self.backend else "")


def workloads() -> dict[str, tuple[str, str, int, str]]:
    """The benchmarks by the names of their tasks."""
    return {f"{row[0]} {row[1]} batch {row[2]}{' training' if row[3] == 'train' else ''}": row for row in SPEED}


def day() -> dict[str, list[Task]]:
    """The tasks of all phases, by phase."""
    truth = [(size, backend, each) for size in SIZES for backend in BACKENDS for each in OPERATORS[backend]]
    return {
        "truth": [Task("truth", f"{operator}, {size}", backend) for size, backend, operator in truth],
        "speed": [Task("speed", name) for name in workloads()],
        "ladder": [Task("ladder", "tools/sm90_ladder.py", HOPPER)],
        "tests": [Task("tests", f"tests/{name}.py") for name in TEST_FILES],
    }
