"""Whoever writes to the weights, and however, the next call computes with what is there; and keeps nothing of it."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accuracy import GRADIENT_FACTOR, assert_accurate, reference
from torch import nn
from written_weights import BLOCKS, DTYPES, WRITERS, Mixer, PatchTSMixerLayer, alive_bytes, images, on_torch

import mixer_kernels


def blocks():
    """``backend`` and ``kind``: each backend with each block that it computes."""
    cases = [
        pytest.param(backend, kind, id=f"{backend} {kind.__name__}")
        for backend, kinds in BLOCKS.items()
        for kind in kinds
    ]
    return pytest.mark.parametrize(("backend", "kind"), cases)


@pytest.fixture(autouse=True)
def _kernels(request) -> None:
    if "backend" in request.fixturenames and request.getfixturevalue("backend") == "cuda":
        request.getfixturevalue("cuda_kernels")


def evaluate(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


def assert_as_unfused(model: nn.Module, x: torch.Tensor, got: torch.Tensor) -> None:
    eager = on_torch(model)
    expected, wide = evaluate(eager, x), copy.deepcopy(eager).double()
    assert_accurate(got, expected, reference(lambda: evaluate(wide, x.double()), x.dtype))


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
@blocks()
def test_a_write_is_seen(backend, kind, write, device):
    dtype = DTYPES[backend]
    model, x = kind(backend).to(device, dtype), images(kind, dtype, device)
    before = evaluate(model, x)
    for _ in range(2):
        write(model)
        after = evaluate(model, x)
        assert not torch.equal(after, before)
        assert_as_unfused(model, x, after)
        before = after


def with_gradient(model: nn.Module, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """y, and one vector of the gradients of all parameters."""
    y_wide = y.to(torch.promote_types(y.dtype, torch.float32))
    gradients = torch.autograd.grad(y_wide.square().mean(), list(model.parameters()))
    return y, torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("memory", ("fast", "min"))
@blocks()
def test_flat_master_weights(backend, kind, memory, device):
    """DeepSpeed's and apex's way: parameters are views of one flat buffer that float32 masters are copied to."""
    dtype = DTYPES[backend]
    model, x = kind(backend, memory).to(device, dtype), images(kind, dtype, device)
    parameters = list(model.parameters())
    flat = torch.cat([p.detach().flatten() for p in parameters])
    for p, view in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.data = view.view(p.shape)
    master = nn.Parameter(flat.float())
    optimizer = torch.optim.SGD([master], lr=0.3)
    outputs = []
    for _ in range(2):
        y = model(x)
        unfused = on_torch(model)
        wide = copy.deepcopy(unfused).double()
        eager = unfused(x)
        exact, exact_gradient = reference(lambda wide=wide: with_gradient(wide, wide(x.double())), dtype)
        gradient = with_gradient(model, y)[1]
        assert_accurate(y.detach(), eager.detach(), exact)
        assert_accurate(gradient, with_gradient(unfused, eager)[1], exact_gradient, GRADIENT_FACTOR, "gradients")
        master.grad = gradient.float()
        optimizer.step()
        model.zero_grad()
        flat.data.copy_(master.data)
        outputs.append(y.detach())
    assert not torch.equal(*outputs)


@blocks()
def test_a_write_between_forward_and_backward_is_seen(backend, kind, device):
    """As autograd itself would see it, if it did not refuse what it counts: nothing packed waits for the backward."""
    dtype = DTYPES[backend]
    model, x = kind(backend).to(device, dtype), images(kind, dtype, device)

    def gradient(m, write):
        m.zero_grad()
        y = m(x)
        if write:
            for p in m.parameters():
                if p.dim() == 2:
                    p.data.neg_()
        y.float().square().mean().backward()
        if write:
            for p in m.parameters():
                if p.dim() == 2:
                    p.data.neg_()
        return torch.cat([p.grad.flatten() for p in m.parameters()])

    assert not torch.equal(gradient(model, write=False), gradient(model, write=True))


@blocks()
def test_nothing_outlives_a_call(backend, kind, device):
    dtype = DTYPES[backend]
    model, x = kind(backend).to(device, dtype), images(kind, dtype, device)
    evaluate(model, x)
    model(x).float().square().mean().backward()  # gradients stay from here on
    before = alive_bytes()
    evaluate(model, x)
    assert alive_bytes() == before
    model(x).float().square().mean().backward()
    assert alive_bytes() == before
    y = evaluate(model, x)
    assert alive_bytes() == before + y.nbytes


@pytest.mark.parametrize("world_size", (1, 2))
@pytest.mark.parametrize("backend", BLOCKS)
def test_fsdp2(backend, world_size, tmp_path, request):
    """Each rank: float32 and a bfloat16 policy, losses as unfused, no memory more than unfused; fsdp2_worker.py."""
    if backend == "cuda":
        request.getfixturevalue("cuda_kernels")  # builds them once, before two processes would
    worker = Path(__file__).with_name("fsdp2_worker.py")
    store = tmp_path / "store"
    ranks = [
        subprocess.Popen(
            [sys.executable, worker, backend, str(rank), str(world_size), store], stdout=subprocess.PIPE, text=True
        )
        for rank in range(world_size)
    ]
    outputs = [rank.communicate(timeout=600)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * world_size, "\n".join(outputs)
    cases = 2 * len(BLOCKS[backend]) if backend != "cuda" else len(BLOCKS[backend])
    assert all(output.count("PASS") == cases and "FAIL" not in output for output in outputs), "\n".join(outputs)


def test_a_fused_model_trains_under_a_writer_through_data(device):
    """The same by fuse_: a model of timm's, whose weights an average replaces for each evaluation and gives back."""
    from small_mixer import images as pictures
    from small_mixer import make_model

    model = make_model(num_blocks=2).to(device)
    twin = copy.deepcopy(model)
    mixer_kernels.fuse_(model, backend="triton")
    x = pictures().to(device)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin)]
    for _ in range(3):
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            m(x).square().mean().backward()
            optimizer.step()
        kept = [[p.data.clone() for p in m.parameters()] for m in (model, twin)]
        for m in (model, twin):
            for p in m.parameters():
                p.data.mul_(0.5)
        torch.testing.assert_close(evaluate(model, x), evaluate(twin, x))
        for m, values in zip((model, twin), kept, strict=True):
            for p, value in zip(m.parameters(), values, strict=True):
                p.data.copy_(value)
        torch.testing.assert_close(model(x), twin(x))


@pytest.mark.parametrize("kind", (Mixer, PatchTSMixerLayer))
def test_one_parameter_in_two_dtypes(kind, device):
    model, x = kind("triton").to(device), images(kind, torch.float32, device)

    def run_in(dtype):
        with torch.autocast(device, dtype, enabled=dtype is not torch.float32):
            return evaluate(model, x)

    full, half = run_in(torch.float32), run_in(torch.bfloat16)
    assert not torch.equal(full, half)
    assert torch.equal(run_in(torch.float32), full)
