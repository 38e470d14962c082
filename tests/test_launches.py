"""What a block costs, counted: launches, bytes of memory traffic, executed products; and 64-bit offsets."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from accuracy import assert_accurate
from blocks import make_block, make_x, run, run_exact

import mixer_kernels.functional as F
from mixer_kernels.backends.arguments import Half, Options
from mixer_kernels.backends.triton.launch import MAX_GRID, intercept_launches, launch
from mixer_kernels.shapes import MixerShape
from mixer_kernels.tuning.configs import MAX_FUSED_TOKENS, token_segments
from mixer_kernels.tuning.target import KNOWN_TARGETS, assume_target

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="waits for a machine without a GPU: counts in the strict interpreter"
)

# B/16 with channels and widths cut down, so that weights do not outweigh activations.
B16 = MixerShape(S=196, C=128, D_S=64, D_C=256)


def record(block, x, **options):
    import strict_interpreter

    with strict_interpreter.record() as launches:
        run(block, x, "triton", **options)
    return launches


def without_packing(launches):
    return [one for one in launches if one.kernel != "_pack_kernel"]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("target", ("sm_80", "sm_90"))
def test_a_block_is_five_launches_beside_packing(dtype, target):
    with assume_target(KNOWN_TARGETS[target]):
        launches = record(make_block(B16, dtype, "cpu"), make_x(2, B16, dtype, "cpu"))
    names = [one.kernel for one in launches]
    assert names.count("_row_statistics_kernel") == 2 and names.count("_pack_kernel") == 1
    assert len(launches) == 6


def test_many_tokens_are_one_launch_more():
    shape = dataclasses.replace(B16, S=MAX_FUSED_TOKENS + 1)
    assert len(record(make_block(shape, torch.bfloat16, "cpu"), make_x(1, shape, torch.bfloat16, "cpu"))) == 7


def test_an_empty_batch_is_no_launch():
    assert record(make_block(B16, torch.bfloat16, "cpu"), make_x(0, B16, torch.bfloat16, "cpu")) == []


@pytest.mark.parametrize("layout", ("contiguous", "transposed"))
@pytest.mark.parametrize("target", ("sm_80", "sm_90"))
@pytest.mark.parametrize(
    ("stream", "products"),
    ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32), (torch.float32, torch.bfloat16)),
    ids=("bf16", "fp32", "bf16 on fp32"),
)
def test_bytes_are_near_the_least(stream, products, target, layout):
    """Unique bytes over all launches: at most 1.15 times what this split into launches has to move."""
    batch_size = 4
    block, x = make_block(B16, torch.float32, "cpu"), make_x(batch_size, B16, stream, "cpu", layout)
    with torch.autocast("cpu", products, enabled=stream is not products), assume_target(KNOWN_TARGETS[target]):
        launches = record(block if stream is not products else block.to(products), x)
    moved = sum(one.bytes_read + one.bytes_written for one in without_packing(launches))
    least = B16.block_bytes(batch_size, products.itemsize, stream.itemsize)
    assert least <= moved <= 1.15 * least, f"{moved / least:.3f} times the least"


@pytest.mark.parametrize(
    ("stream", "products"),
    (
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
    ),
    ids=("bf16", "fp16", "fp32", "bf16 on fp32"),
)
@pytest.mark.parametrize("shape", (B16, dataclasses.replace(B16, S=784, C=64, D_C=128)), ids=("196", "784"))
def test_packing_moves_the_least(stream, products, shape):
    """What the kernels cannot take as it is, read once and written once: at most 1.2 times that, padding included."""
    block, x = make_block(shape, torch.float32, "cpu"), make_x(1, shape, stream, "cpu")
    with torch.autocast("cpu", products, enabled=stream is not products):
        (packing,) = (
            one
            for one in record(block if stream is not products else block.to(products), x)
            if one.kernel == "_pack_kernel"
        )
    source = torch.float32 if stream is not products else products
    is_folded = stream is products and products.itemsize == 2
    least = 0
    for name, p in block.parameters.items():
        if name[0] == "w":
            needed = products is not source or (name in ("w1", "w2") and shape.S % 64) or (name == "w3" and is_folded)
            least += p.numel() * (source.itemsize + products.itemsize) if needed else 0
        elif name in ("b1", "b2") or (name == "b3" and is_folded):
            least += p.numel() * (source.itemsize + 4)
    least += is_folded * (2 * shape.C * source.itemsize + shape.D_C * 4 * (1 + (products is torch.float16)))
    moved = packing.bytes_read + packing.bytes_written
    assert least <= moved <= 1.2 * least, f"{moved / least:.3f} times the least"


def test_the_hidden_activation_of_token_mixing_stays_on_chip():
    block, x = make_block(B16, torch.bfloat16, "cpu"), make_x(2, B16, torch.bfloat16, "cpu")
    token = next(one for one in record(block, x) if one.kernel == "_token_mixing_fwd_kernel")
    assert token.bytes_written == x.nbytes
    packed_weights = 2 * 2 * 208 * 64
    vectors = 4 * (64 + 208) + 2 * 2 * 128
    assert token.bytes_read == x.nbytes + 2 * 4 * 2 * 196 + packed_weights + vectors


@pytest.mark.parametrize("target", KNOWN_TARGETS)
def test_padded_products_at_196_tokens(target):
    """At most 10 % over the useful products; powers of two would waste 31 %."""
    shape = MixerShape(S=196, C=768, D_S=384, D_C=3072)
    small = dataclasses.replace(shape, C=128, D_C=128)  # the token half pads S and D_S alone
    with assume_target(KNOWN_TARGETS[target]):
        launches = record(make_block(small, torch.bfloat16, "cpu"), make_x(1, small, torch.bfloat16, "cpu"))
    token = next(one for one in launches if one.kernel == "_token_mixing_fwd_kernel")
    assert token.dot_flops <= 1.10 * small.token_flops(1)


@pytest.mark.parametrize("longest", (64, 128))
def test_token_segments(longest):
    for tokens in range(1, MAX_FUSED_TOKENS + 1):
        segments = token_segments(tokens, longest)
        assert len(segments) == 4 and set(segments) <= {0, 16, 32, 64, longest}
        assert list(segments) == sorted(segments, reverse=True)
        assert 0 <= sum(segments) - tokens < (32 if tokens > 224 else 16)


@pytest.mark.parametrize("tokens", (3, 257))
@pytest.mark.parametrize("far", ("image", "token", "channel"))
def test_offsets_beyond_2_to_the_31(far, tokens):
    """x spread over more than 2^31 elements, of which few are ever touched; the strict interpreter watches int32."""
    shape = MixerShape(S=tokens, C=8, D_S=16, D_C=16)
    strides = {
        "image": (2**30 + 64, 8, 1),
        "token": (8, 2**31 // (tokens - 1) + 8, 1),
        "channel": (1, 3, 2**31 // 7 + 16),
    }[far]
    block, values = make_block(shape, torch.bfloat16, "cpu"), make_x(3, shape, torch.bfloat16, "cpu")
    extent = sum((n - 1) * stride for n, stride in zip(values.shape, strides, strict=True)) + 1
    assert extent > 2**31
    x = torch.empty(extent, dtype=torch.bfloat16).as_strided(values.shape, strides)
    x.copy_(values)
    for half, parameters in ((F.token_mixing, block.token()), (F.channel_mixing, block.channel())):
        with torch.no_grad():
            assert torch.equal(half(x, *parameters, backend="triton"), half(values, *parameters, backend="triton"))


def test_more_rows_than_int32_holds():
    """The launchers of 2^31 + 2 rows of one channel ask for 64-bit rows and a grid that exists."""
    seen = {}

    def note(kernel, grid, args, options):
        seen[kernel.__name__] = (grid[0], options.get("INT64"))

    shape = MixerShape(S=1, C=1, D_S=1, D_C=1)
    rows = 2**31 + 2
    half = Half(*(p.to("meta") for p in make_block(shape, torch.bfloat16, "cpu").channel()))
    from mixer_kernels.backends import triton as backend

    with intercept_launches(note):
        u = torch.empty(rows, 1, 1, dtype=torch.bfloat16, device="meta")
        backend.channel_mixing_forward(u, half, Options(torch.bfloat16))
    seen.pop("_pack_kernel", None)  # it is launched on weights alone
    assert seen and all(programs <= MAX_GRID and wide for programs, wide in seen.values()), seen


def test_a_grid_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=f"needs {MAX_GRID + 1} programs, the grid holds {MAX_GRID}"):
        launch(test_a_grid_that_does_not_exist_is_refused, MAX_GRID + 1)


def test_poisoned_memory_reaches_the_launchers():
    """Fresh memory is NaN in these tests: a result that is not written everywhere cannot pass."""
    import strict_interpreter

    with strict_interpreter.poisoned_memory(), intercept_launches(lambda *_: None):
        assert (
            run(make_block(B16, torch.bfloat16, "cpu"), make_x(1, B16, torch.bfloat16, "cpu"), "triton").isnan().all()
        )


def test_result_is_written_everywhere():
    import strict_interpreter

    block, x = make_block(B16, torch.bfloat16, "cpu"), make_x(3, B16, torch.bfloat16, "cpu")
    with strict_interpreter.poisoned_memory():
        assert_accurate(run(block, x, "triton"), run(block, x, "torch"), run_exact(block, x))
