"""One rank of test_weights_are_never_stale.py: blocks sharded by FSDP2 train as they do unfused.

    python fsdp2_worker.py BACKEND RANK WORLD_SIZE STORE

At each step the unfused model gets the weights of the sharded one, so that the accuracy rule compares like with like.
"""

from __future__ import annotations

import sys

import torch

if not torch.cuda.is_available():
    import strict_interpreter

    strict_interpreter.install()

import torch.distributed as dist
from accuracy import assert_accurate, reference
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from written_weights import BLOCKS, alive_bytes, images

STEPS = 2


def unfused(weights: dict[str, torch.Tensor], kind: type, dtype: torch.dtype) -> nn.Module:
    model = kind("torch").to(dtype)
    model.load_state_dict({name: value.to(dtype) for name, value in weights.items()})
    return model


def train(kind: type, backend: str, policy: MixedPrecisionPolicy | None, mesh) -> int:
    """Check each step; return the bytes that are alive after the last one."""
    torch.manual_seed(0)
    dtype = torch.float32 if policy is None else policy.param_dtype
    model, x = kind(backend), images(kind, torch.float32, "cpu")
    fully_shard(model, mesh=mesh, **({} if policy is None else {"mp_policy": policy}))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    outputs = []
    for _ in range(STEPS):
        model.train()
        weights = {
            name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
            for name, p in model.state_dict().items()
        }
        y = model(x)
        plain, exact = unfused(weights, kind, dtype), unfused(weights, kind, torch.float64)
        with torch.no_grad():
            expected = plain(x.to(dtype))
            assert_accurate(y.detach(), expected, reference(lambda exact=exact: exact(x.double()), y.dtype))
        outputs.append(y.detach())
        optimizer.zero_grad()
        y.float().square().mean().backward()
        optimizer.step()
        model.eval()
        with torch.no_grad():  # gathers and shards once more, between two steps
            model(x)
    assert not torch.equal(*outputs)
    del weights, y, plain, exact, outputs
    return alive_bytes()


def main(backend: str, rank: str, world_size: str, store: str) -> None:
    torch.set_num_threads(1)
    if backend == "cuda" and not torch.cuda.is_available():
        from cuda_on_host import build

        from mixer_kernels.backends.cuda import library

        library.install(build.load())
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(world_size))
    mesh = init_device_mesh("cpu", (int(world_size),))
    bfloat16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for kind in BLOCKS[backend]:
        for name, policy in (("float32", None), ("bfloat16 policy", bfloat16)):
            if backend == "cuda" and policy is None:
                continue  # its products are of 16 bits
            kept = [train(kind, one, policy, mesh) for one in ("torch", "torch", backend)]
            verdict = "PASS" if kept[2] <= kept[1] else f"FAIL: {kept[2] - kept[1]} bytes more than unfused are kept:"
            print(verdict, kind.__name__, name, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
