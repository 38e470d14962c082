"""The functional API: what it refuses and how, and which backend it chooses."""

from __future__ import annotations

import inspect
import logging
import subprocess
import sys
import threading

import pytest
import torch
from blocks import make_block, make_x, run

import mixer_kernels
import mixer_kernels.functional as F
from mixer_kernels import backends, words
from mixer_kernels.shapes import MixerShape

SHAPE = MixerShape(S=196, C=24, D_S=16, D_C=32)


@pytest.fixture
def block():
    return make_block(SHAPE, torch.float32, "cpu")


@pytest.fixture
def x():
    return make_x(2, SHAPE, torch.float32, "cpu")


@pytest.fixture
def warnings(caplog):
    """The messages of this package's logger, from a state in which nothing has been said yet."""
    words._warn.cache_clear()
    caplog.set_level(logging.WARNING, "mixer_kernels")
    yield caplog
    words._warn.cache_clear()


BAD_X = {
    "2-D": (lambda x: x[0], ValueError, r"x must be \(batch, tokens, channels\), got shape \(196, 24\)"),
    "4-D": (lambda x: x[None], ValueError, r"\(batch, tokens, channels\), got shape \(1, 2, 196, 24\)"),
    "tokens": (
        lambda x: torch.cat((x, x[:, :1]), 1),
        ValueError,
        r"w1 has shape .16, 196.: .* 196 tokens, x has 197$",
    ),
    "channels": (lambda x: x[..., 1:], ValueError, r"gamma1 has shape \(24,\), expected \(23,\): x has 23 channels"),
    "integers": (lambda x: x.int(), TypeError, "torch.float16, torch.bfloat16, torch.float32, .* got torch.int32"),
    "complex": (lambda x: x.to(torch.complex64), TypeError, "got torch.complex64"),
    "float8": (lambda x: x.to(torch.float8_e5m2), TypeError, "got torch.float8_e5m2"),
    "mixed dtypes": (lambda x: x.bfloat16(), TypeError, "gamma1 is torch.float32, but x is torch.bfloat16.*autocast"),
    "mixed devices": (lambda x: x.to("meta"), ValueError, "gamma1 is on cpu, but x is on meta"),
    "sparse": (lambda x: x.to_sparse(), TypeError, "dense strided tensor, got layout torch.sparse_coo"),
}


@pytest.mark.parametrize("backend", ("torch", "triton"))
@pytest.mark.parametrize(("change", "error", "message"), BAD_X.values(), ids=BAD_X.keys())
def test_bad_x(block, x, backend, change, error, message):
    with pytest.raises(error, match=message):
        run(block, change(x), backend)


def test_nested_x(block):
    nested = torch.nested.nested_tensor([torch.zeros(3, 24), torch.zeros(4, 24)], layout=torch.jagged)
    with pytest.raises(TypeError, match="dense strided tensor, got layout nested"):
        run(block, nested, "torch")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    (
        ("gamma2", (25,), r"gamma2 has shape \(25,\), expected \(24,\): x has 24 channels"),
        ("w1", (16, 195), r"w1 has shape \(16, 195\): built for 195 tokens, x has 196$"),
        ("w1", (16,), r"w1 must be \(D_S, tokens\), got shape \(16,\)"),
        ("b1", (17,), r"b1 must have shape \(16,\), got \(17,\)"),
        ("w2", (16, 196), r"w2 must have shape \(196, 16\), got \(16, 196\)"),
        ("b2", (16,), r"b2 must have shape \(196,\), got \(16,\)"),
        ("w3", (32, 25), r"w3 has shape \(32, 25\): built for 25 channels, x has 24$"),
        ("w3", (32, 24, 1), r"w3 must be \(D_C, channels\), got shape \(32, 24, 1\)"),
        ("b3", (1,), r"b3 must have shape \(32,\), got \(1,\)"),
        ("w4", (24, 33), r"w4 must have shape \(24, 32\), got \(24, 33\)"),
        ("b4", (24, 1), r"b4 must have shape \(24,\), got \(24, 1\)"),
    ),
)
def test_bad_parameter(block, x, name, shape, message):
    block.parameters[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        run(block, x, "torch")


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (lambda p: p | {"w1": p["w1"].T}, r"w1 has shape \(196, 16\): .*expected \(D_S, 196\): is it transposed\?$"),
        (lambda p: p | {"w3": p["w3"].T}, r"w3 has shape \(24, 32\): .*expected \(D_C, 24\): is it transposed\?$"),
        (
            lambda p: p | {"w1": p["w2"], "w2": p["w1"]},
            r"w1 .* for 16 tokens, x has 196; .*transposed, or swapped",
        ),
        (lambda p: p | {"w3": p["w4"], "w4": p["w3"]}, r"w3 .*built for 32 channels, x has 24; .* or swapped with the"),
        (lambda p: p | {"w1": p["w3"], "w3": p["w1"]}, r"w1 has shape \(32, 24\): built for 24 tokens, x has 196$"),
        (
            lambda p: p | {"gamma1": p["gamma1"][None]},
            r"gamma1 has shape \(1, 24\), expected \(24,\): x has 24",
        ),
    ),
)
def test_weights_in_the_wrong_place(block, x, change, message):
    with pytest.raises(ValueError, match=message):
        F.mixer_block(x, **change(block.parameters))


def test_the_input_is_called_as_the_function_calls_it(block, x):
    tensors = [block.parameters[name] for name in ("gamma2", "beta2", "w3", "b3", "w4", "b4")]
    with pytest.raises(ValueError, match=r"w3 has shape \(32, 24\): built for 24 channels, u has 23$"):
        F.channel_mixing(x[..., 1:], *tensors)
    with pytest.raises(TypeError, match="^u must be a torch.Tensor, got builtins.int$"):
        F.channel_mixing(3, *tensors)


@pytest.mark.parametrize("name", ("x", "w1", "b2", "gamma2"))
def test_numpy_arrays_are_refused_by_name(block, x, name):
    arguments = {"x": x} | block.parameters
    arguments[name] = arguments[name].numpy()
    with pytest.raises(TypeError, match=f"^{name} must be a torch.Tensor, got numpy.ndarray$"):
        F.mixer_block(**arguments)


@pytest.mark.parametrize("name", [name for name in F.__all__ if name.islower()])
def test_numpy_arrays_are_refused_by_every_function(x, name):
    function, options = getattr(F, name), {"axis": -1} if name == "gated_mixing" else {}
    parameters = inspect.signature(function).parameters.values()
    tensors = [x for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    with pytest.raises(TypeError, match="^[xuh] must be a torch.Tensor, got numpy.ndarray$"):
        function(x.numpy(), *tensors[1:], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"eps": 0.0}, "eps must be > 0 and finite, got 0.0"),
        ({"eps": -1e-6}, "eps must be > 0"),
        ({"eps": float("nan")}, "eps must be > 0 and finite, got nan"),
        ({"eps": (1e-6, 0.0)}, "eps must be > 0 and finite, got 0.0"),
        ({"approximate": "erf"}, "approximate must be one of 'none', 'tanh', got 'erf'"),
        ({"memory": "none"}, "memory must be one of 'fast', 'min', got 'none'"),
        ({"dropout_p": 1.5}, "dropout_p must be a probability, from 0 to 1, got 1.5"),
        ({"drop_path_p": float("nan")}, "drop_path_p must be a probability, from 0 to 1, got nan"),
        ({"backend": "cudnn"}, "backend must be one of 'auto', .*'triton', 'cpu', 'torch', got 'cudnn'"),
    ),
)
def test_bad_option(block, x, options, message):
    with pytest.raises(ValueError, match=message):
        F.mixer_block(x, **block.parameters, **options)


def test_float64_is_for_the_torch_backend(block, x):
    block = block.to(torch.float64)
    assert run(block, x.double(), "torch").dtype is torch.float64
    with pytest.raises(RuntimeError, match="backend='triton' cannot run.*got torch.float64; use backend='torch'"):
        run(block, x.double(), "triton")


def test_triton_says_which_versions_it_needs(block, x, monkeypatch):
    import triton

    monkeypatch.setattr(triton, "__version__", "3.2.0+git1")
    with pytest.raises(RuntimeError, match="need Triton 3.3 .* got 3.2.0"):
        run(block, x, "triton")
    monkeypatch.setattr(triton, "__version__", "3.10.1")
    run(block, x, "triton")


def test_auto_says_once_why_it_falls_back(block, x, warnings):
    for _ in range(3):
        y = run(block, x, "auto")
    assert torch.equal(y, run(block, x, "torch"))
    assert len(warnings.messages) == 1
    assert "running on 'torch'" in warnings.messages[0] and "CPU" in warnings.messages[0]


def test_an_explicit_backend_says_nothing(block, x, warnings):
    run(block, x, "torch")
    assert warnings.messages == []


def test_use_backend_and_the_environment(block, x, monkeypatch):
    assert backends.requested_backend() == "auto"
    monkeypatch.setenv("MIXER_KERNELS_BACKEND", "torch")
    assert backends.requested_backend() == "torch"
    with mixer_kernels.use_backend("triton"):
        assert backends.requested_backend() == "triton"
        with mixer_kernels.use_backend("auto"):
            assert backends.requested_backend() == "auto"
        assert backends.requested_backend() == "triton"
        assert not torch.equal(run(block, x, None), run(block, x, "torch"))
        assert torch.equal(run(block, x, None), run(block, x, "triton"))
    assert torch.equal(run(block, x, None), run(block, x, "torch"))


def test_use_backend_ends_with_an_exception():
    with pytest.raises(KeyError), mixer_kernels.use_backend("torch"):
        raise KeyError
    assert backends.requested_backend() == "auto"


def test_use_backend_is_per_thread():
    seen = []
    with mixer_kernels.use_backend("triton"):
        thread = threading.Thread(target=lambda: seen.append(backends.requested_backend()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


@pytest.mark.parametrize("name", ("", "cudnn", "Triton"))
def test_unknown_names_of_backends(block, x, name, monkeypatch):
    if name:
        monkeypatch.setenv("MIXER_KERNELS_BACKEND", name)
        with pytest.raises(ValueError, match=f"MIXER_KERNELS_BACKEND must be one of .*, got '{name}'"):
            run(block, x, None)
    with (
        pytest.raises(ValueError, match=f"use_backend must be one of .*, got '{name}'"),
        mixer_kernels.use_backend(name),
    ):
        pass


def test_a_cpu_tensor_is_refused_by_the_compiled_kernels():
    """Outside the interpreter; in a process of its own, since this one interprets."""
    code = """
import torch, mixer_kernels.functional as F
p = torch.zeros(4, 4)
try:
    F.token_mixing(p[None], None, None, p, None, p, None, backend="triton")
except RuntimeError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment())
    assert "needs a CUDA tensor, got one on cpu; use backend='torch'" in result.stdout, result.stderr


def _environment():
    import os

    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def test_the_torch_backend_has_exact_gradients():
    """gradcheck in float64: x and every parameter, both forms of GELU."""
    shape = MixerShape(S=3, C=5, D_S=4, D_C=6)
    block, x = make_block(shape, torch.float64, "cpu"), make_x(2, shape, torch.float64, "cpu")
    names = list(block.parameters)
    tensors = [x, *(block.parameters[name] for name in names)]
    for t in tensors:
        t.requires_grad_()
    for approximate in F.APPROXIMATIONS:

        def f(x, *parameters, approximate=approximate):
            return F.mixer_block(
                x, **dict(zip(names, parameters, strict=True)), approximate=approximate, backend="torch"
            )

        assert torch.autograd.gradcheck(f, tensors)
