"""The torch.library operators: schema, fake tensors, autograd, torch.compile, torch.export."""

from __future__ import annotations

import pytest
import torch
from blocks import make_block, make_x, run

import mixer_kernels.functional as F
from mixer_kernels import ops
from mixer_kernels.backends.arguments import Options
from mixer_kernels.shapes import MixerShape

SHAPE = MixerShape(S=20, C=24, D_S=16, D_C=32)
NAMES = ("token_mixing", "channel_mixing", "mixer_block", "token_mixing_backward", "channel_mixing_backward")


NO_NOISE = (0.0, 0.0, None)


def arguments(block, x, name, noise=NO_NOISE, keep_z=True, wanted=(True,) * 7, backend="triton"):
    """What functional or autograd pass to the operator ``name``."""
    hidden, tokens = block.parameters["w3"].shape[0], x.shape[1]
    half = block.token() if name.startswith("token") else block.channel()
    options = (*Options(x.dtype).inputs[:-3], *noise, backend)
    if name == "mixer_block":
        return (x, *block.token(), *block.channel(), *options, 1e-6)
    further = (keep_z,) if name.startswith("channel") else ()
    if not name.endswith("backward"):
        return (x, *half, *options, *further)
    mean, rstd = (torch.rand(x.shape[0] * tokens, device=x.device) for _ in range(2))
    kept = [mean, rstd]
    if name == "channel_mixing_backward":
        z = torch.randn(x.shape[0] * tokens, hidden, device=x.device).to(x.dtype)
        kept.append(z if keep_z else x.new_empty(0))
    present = [want and t is not None for want, t in zip(wanted, (x, *half), strict=True)]
    return (torch.randn_like(x), *kept, x, *half, *options, *further, present)


@pytest.mark.parametrize(
    ("dtype", "affine", "layout"),
    (
        pytest.param(torch.float32, True, "transposed", id="float32"),
        pytest.param(torch.bfloat16, True, "channel slice", id="bfloat16"),
        pytest.param(torch.float32, False, "contiguous", id="bare"),
    ),
)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, dtype, affine, layout, device):
    block = make_block(SHAPE, dtype, device, affine=affine, bias=affine)
    x = make_x(2, SHAPE, dtype, device, layout)
    torch.library.opcheck(getattr(ops, name), arguments(block, x, name))


@pytest.mark.parametrize(
    ("name", "keep_z", "dtype"),
    (
        ("token_mixing", False, torch.bfloat16),
        ("channel_mixing", True, torch.bfloat16),
        ("channel_mixing", False, torch.float32),
    ),
)
def test_opcheck_with_gradients(name, keep_z, dtype, device):
    """Autograd registered, the same under AOT with fixed and dynamic shapes; some inputs frozen."""
    block, x = make_block(SHAPE, dtype, device), make_x(2, SHAPE, dtype, device).requires_grad_()
    for parameter in ("gamma1", "w1", "b2", "w3", "b3", "w4"):
        block.parameters[parameter].requires_grad_()
    torch.library.opcheck(getattr(ops, name), arguments(block, x, name, keep_z=keep_z))


@pytest.mark.parametrize("name", ("token_mixing", "channel_mixing", "token_mixing_backward", "channel_mixing_backward"))
def test_opcheck_with_noise(name, device):
    block, x = make_block(SHAPE, torch.float32, device), make_x(2, SHAPE, torch.float32, device)
    noise = (0.3, 0.2, torch.tensor([1234], device=device))
    torch.library.opcheck(getattr(ops, name), arguments(block, x, name, noise, keep_z=False))


def test_backward_through_the_block_operator_raises(device):
    block, x = make_block(SHAPE, torch.float32, device), make_x(2, SHAPE, torch.float32, device)
    y = ops.mixer_block(*arguments(block, x.requires_grad_(), "mixer_block"))
    with pytest.raises(RuntimeError, match="no gradient here.*backend='torch'"):
        y.sum().backward()


@pytest.mark.parametrize("memory", F.MEMORY_MODES)
def test_compiled_training_equals_eager(memory, device):
    """Forward and backward in one graph each."""
    block = make_block(SHAPE, torch.float32, device)
    x = make_x(2, SHAPE, torch.float32, device)
    names = list(block.parameters)

    def f(x, *parameters):
        block_parameters = dict(zip(names, parameters, strict=True))
        return F.mixer_block(x * 2, **block_parameters, backend="triton", memory=memory).square().mean()

    def gradients(function):
        leaves = [t.detach().requires_grad_() for t in (x, *block.parameters.values())]
        return torch.autograd.grad(function(*leaves), leaves)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for expected, actual in zip(gradients(f), gradients(compiled), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ("torch", "triton"))
@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
def test_compile_without_graph_breaks(backend, dynamic, device):
    # The kernels are one operator, compiled or not; of PyTorch's operators the compiler may choose others.
    dtype, tolerance = (torch.float64, 1e-12) if backend == "torch" else (torch.float32, 0.0)
    block = make_block(SHAPE, dtype, device)

    def f(x):
        return F.mixer_block(x, **block.parameters, backend=backend) * 2

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch_size in (2, 3):
        x = make_x(batch_size, SHAPE, dtype, device, "transposed")
        torch.testing.assert_close(compiled(x), f(x), rtol=tolerance, atol=tolerance)


def test_compile_with_inductor(device):
    block, x = make_block(SHAPE, torch.float32, device), make_x(2, SHAPE, torch.float32, device)

    def f(x):
        return F.mixer_block(torch.sin(x), **block.parameters, backend="triton").relu()

    torch.testing.assert_close(torch.compile(f, fullgraph=True)(x), f(x), rtol=1e-5, atol=1e-5)


def test_compile_reads_the_autocast_dtype(device):
    block, x = make_block(SHAPE, torch.float32, device), make_x(2, SHAPE, torch.float32, device)

    def f(x):
        with torch.autocast(device, torch.bfloat16):
            return F.mixer_block(x, **block.parameters, backend="triton")

    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x))
    assert not torch.equal(f(x), run(block, x, "triton"))


def test_errors_are_the_same_while_compiling(device):
    block = make_block(SHAPE, torch.float32, device)
    compiled = torch.compile(lambda x: run(block, x, "triton"), backend="aot_eager")
    with pytest.raises(Exception, match="built for 20 tokens, x has 21"):
        compiled(torch.zeros(1, 21, 24, device=device))


class Half(torch.nn.Module):
    def __init__(self, block):
        super().__init__()
        self.names = list(block.parameters)
        self.parameters_ = torch.nn.ParameterList(block.parameters.values()).requires_grad_(False)

    def forward(self, x):
        return F.mixer_block(x, **dict(zip(self.names, self.parameters_, strict=True)), backend="triton")


def test_export(device):
    """One node in the exported program, for any batch; the program gives what the module gives."""
    block, x = make_block(SHAPE, torch.float32, device), make_x(4, SHAPE, torch.float32, device)
    module = Half(block)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: batch},))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets == ["mixer_kernels.mixer_block.default"]
    assert torch.equal(program.module()(x[:3]), module(x[:3]))


def test_vmap_and_functional_call_on_the_torch_backend():
    block, x = make_block(SHAPE, torch.float64, "cpu"), make_x(4, SHAPE, torch.float64, "cpu")

    def loss(w1):
        return F.token_mixing(x, *block.token()[:2], w1, *block.token()[3:], backend="torch").square().sum()

    w1 = block.parameters["w1"]
    expected = torch.autograd.functional.jacobian(loss, w1)
    torch.testing.assert_close(torch.func.grad(loss)(w1), expected)
