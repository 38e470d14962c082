"""What ``auto`` takes on the CPU: the kernels where they were measured to be faster, else PyTorch's operators."""

from __future__ import annotations

import pytest
import torch
from test_freeze import example
from test_relatives_patchtsmixer import make
from test_relatives_patchtsmixer_layer import evaluate, make_layer

import mixer_kernels.functional as F
from mixer_kernels import backends, fuse_
from mixer_kernels.backends import registry
from mixer_kernels.backends.cpu import library

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def needs_kernels() -> None:
    try:
        isa = library.instruction_set()
    except ModuleNotFoundError as error:
        pytest.skip(f"waits for a build with the CPU kernels: {library.why_not_loaded(error)}")
    if isa == "baseline":
        pytest.skip("waits for a CPU with AVX2 or AVX-512")


def layers(*names: str) -> list:
    x, parameters = make_layer((3, 7, 13, 20), torch.float32, CPU)
    dy = torch.randn(x.shape)
    return [evaluate(x, parameters, name, dy) for name in names]


def same(one, other) -> bool:
    return all(torch.equal(one[key], other[key]) for key in one)


def test_a_layer_runs_on_the_kernels_forward_and_backward():
    auto, cpu, eager = layers("auto", "cpu", "torch")
    assert same(auto, cpu) and not same(auto, eager)


def test_a_fused_model_runs_on_the_kernels():
    model, x = example("patchtsmixer")
    with torch.no_grad():
        eager = model.eval()(x).last_hidden_state
        auto = fuse_(model) and model(x).last_hidden_state
        with backends.use_backend("cpu"):
            asked_for = model(x).last_hidden_state
    assert torch.equal(auto, asked_for) and not torch.equal(auto, eager)


@pytest.mark.parametrize("batch_size", [3, 40])
def test_a_single_mixer_is_trained_by_the_kernels_where_it_is_large(batch_size):
    x, mixer = make("patches", (batch_size, 7, 13, 20), torch.float32, CPU)
    x.requires_grad_()

    def run(name):
        return F.gated_mixing(x, **mixer, axis=-2, backend=name)

    chosen, other = (
        ("torch", "cpu") if x.numel() < registry.FASTER_ON_CPU[x.dtype]["gated_mixing"][1] else ("cpu", "torch")
    )
    assert torch.equal(run("auto"), run(chosen)) and not torch.equal(run("auto"), run(other))
    with torch.no_grad():
        assert torch.equal(run("auto"), run("cpu")) and not torch.equal(run("auto"), run("torch"))


@pytest.mark.parametrize("isa", ["baseline", "sse9"])
def test_vectors_that_were_not_measured_are_not_taken(isa, monkeypatch):
    monkeypatch.setenv(library.ISA_VARIABLE, isa)
    auto, eager = layers("auto", "torch")
    assert same(auto, eager)


def test_an_exporter_gets_pytorchs_operators(monkeypatch):
    assert backends.auto_on_cpu(("gated_mixer_layer",), torch.float32, pays=True) == "cpu"
    monkeypatch.setattr(registry.sys.modules.setdefault("torch.onnx", torch.onnx), "is_in_onnx_export", lambda: True)
    assert backends.auto_on_cpu(("gated_mixer_layer",), torch.float32, pays=True) == "torch"


def test_other_dtypes_and_operators_run_on_torch():
    for dtype, operator in ((torch.float64, "gated_mixer_layer"), (torch.float32, "channel_mixing")):
        assert backends.choose("auto", "cpu", None, dtype, (operator,), pays=True) == "torch"


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("kept", (torch.float32, None), ids=("autocast", "all"))
def test_16_bits_run_on_the_kernels(dtype, kept):
    """A model in them, and one under autocast."""
    x, parameters = make_layer((3, 7, 13, 20), kept or dtype, CPU)
    dy = torch.randn_like(x)
    with torch.autocast("cpu", dtype, enabled=kept is not None):
        auto, cpu, eager = (evaluate(x, parameters, name, dy) for name in ("auto", "cpu", "torch"))
    assert same(auto, cpu) and not same(auto, eager)


def test_a_cpu_emulates_what_pytorch_says_it_lacks():
    cpu, mkldnn = backends.load("cpu"), torch.ops.mkldnn
    assert cpu.emulates(torch.bfloat16) is not mkldnn._is_mkldnn_bf16_supported()
    assert cpu.emulates(torch.float16) is not mkldnn._is_mkldnn_fp16_supported()
    assert not cpu.emulates(torch.float32)


def test_the_table_lists_what_the_backend_has():
    cpu = backends.load("cpu")
    for dtype, operators in registry.FASTER_ON_CPU.items():
        assert cpu.why_not(CPU, dtype) is None and all(map(cpu.has, operators))


class Module:
    """In place of the compiled module, on a CPU that multiplies bfloat16 and may have tiles."""

    built = ("avx512_bf16", "baseline", "avx512_amx")

    def __init__(self, has_tiles: bool) -> None:
        self.has_tiles = has_tiles

    def runs_here(self, isa: str) -> bool:
        return isa != "avx512_amx" or self.has_tiles


def test_tiles_have_to_be_asked_for_and_without_them_pytorch_has_the_better_products(monkeypatch) -> None:
    with library.replaced_by(Module(has_tiles=False)):
        assert library.multiplies(torch.bfloat16) and not library.multiplies(torch.float16)
    with library.replaced_by(Module(has_tiles=True)):
        assert library.instruction_set() == "avx512_bf16" and not library.multiplies(torch.bfloat16)
        monkeypatch.setenv(library.ISA_VARIABLE, "avx512_amx")
        assert library.multiplies(torch.bfloat16)
