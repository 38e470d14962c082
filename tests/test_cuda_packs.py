"""Weights packed for the CUDA kernels: what is packed, by one launch a call, never stale and never kept."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from blocks import Watched, make_block, make_x, run
from test_backward import gradients
from torch.autograd import _unsafe_preserve_version_counter
from torch.multiprocessing.reductions import StorageWeakRef

import mixer_kernels.functional as F
from mixer_kernels import backends
from mixer_kernels.backends.arguments import Half, Options
from mixer_kernels.backends.cuda import library, prepack
from mixer_kernels.shapes import MixerShape

SHAPE = MixerShape(S=20, C=24, D_S=16, D_C=32)
LONG = MixerShape(S=257, C=24, D_S=16, D_C=32)
WHOLE = MixerShape(S=64, C=64, D_S=64, D_C=128)  # nothing to pad
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
BACKENDS = ("cuda", "cuda:sm90")
HALVES = {"token": F.token_mixing, "channel": F.channel_mixing}


@pytest.fixture(params=BACKENDS)
def backend(request):
    request.getfixturevalue("cuda_kernels" if request.param == "cuda" else "hopper_kernels")
    return request.param


class Jobs(Watched):
    """The module, with the arguments of each pack noted too."""

    def __init__(self, module) -> None:
        super().__init__(module)
        self.packs: list[tuple[list[tuple], tuple | None]] = []

    def pack_weights(self, packings, folding, stream):
        self.calls.append("pack_weights")
        self.packs.append((packings, folding))
        self.module.pack_weights(packings, folding, stream)


@pytest.fixture
def watched(cuda_kernels):
    module = Jobs(cuda_kernels)
    library.install(module)
    yield module
    library.install(cuda_kernels)


@contextmanager
def operators_called():
    """PyTorch's own operators that run, inside of ours too."""
    names: set[str] = set()
    with torch.autograd.profiler.profile() as profile:
        yield names
    names.update(event.name for event in profile.function_events if event.name.startswith("aten::"))


@pytest.fixture
def memory_of_packs(monkeypatch):
    """A weak reference to each piece of memory that was asked for in bytes, which packs alone are."""
    empty, pieces = torch.empty, []

    def noted(*size, **options):
        t = empty(*size, **options)
        if options.get("dtype") is torch.uint8:
            pieces.append(StorageWeakRef(t.untyped_storage()))
        return t

    monkeypatch.setattr(torch, "empty", noted)
    return pieces


# ------------------------------------------------------------------------------------------------- what is packed


def values(packed, wanted, address):
    return prepack._as_tensor(wanted, address, packed)


def misaligned(t):
    """The same numbers one element behind an aligned address."""
    flat = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:]
    return flat.copy_(t.flatten()).view(t.shape)


SOURCES = {
    "contiguous": lambda w: w,
    "transposed": lambda w: w.t().contiguous().t(),
    "every second": lambda w: torch.stack((w, torch.full_like(w, torch.nan)), -1).flatten(-2)[..., ::2],
    "columns of more": lambda w: torch.nn.functional.pad(w, (3, 5), value=torch.nan)[:, 3:-5],
    "one row repeated": lambda w: w[:1].expand(w.shape),
    "misaligned": misaligned,
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("transposed", (False, True), ids=("straight", "transpose"))
@pytest.mark.parametrize("size", ((1, 1), (7, 5), (33, 64), (64, 72), (100, 31), (130, 200)), ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_a_weight_equals_a_cast_and_a_copy_into_zeros(size, transposed, source, cuda_kernels, device):
    """From all dtypes to all dtypes; padded, and to its own size."""
    for given in (F32, F16, BF16, torch.float64):
        w = SOURCES[source](torch.randn(size, device=device).to(given))
        exact = w.t() if transposed else w
        rows, columns = exact.shape
        wanted = [
            prepack.Wanted(w, dtype, *padded, transposed)
            for dtype in (F16, BF16, F32)
            for padded in ((rows, columns), (rows + 9, columns + 33), (rows, -(-columns // 64) * 64))
        ]
        packed = prepack.pack(wanted, None, w)
        for each, address in zip(wanted, packed.addresses, strict=True):
            expected = torch.zeros(each.rows, each.columns, dtype=each.dtype, device=device)
            expected[:rows, :columns] = exact.float().to(each.dtype)
            assert torch.equal(values(packed, each, address), expected)


@pytest.mark.usefixtures("poisoned_memory")
def test_vectors(cuda_kernels, device):
    """In float32 and padded; zeros for none; as it is where that is what is wanted."""
    v = torch.randn(13, device=device)
    others = [v.half(), v.bfloat16(), torch.stack((v, v), 1)[:, 0], v[:1].expand(13), misaligned(v)]
    wanted = [prepack.Wanted(each, F32, 1, length) for each in (v, *others) for length in (13, 32)]
    wanted.append(prepack.Wanted(None, F32, 1, 32))
    packed = prepack.pack(wanted[:12], None, v)
    assert packed.addresses[0] == v.data_ptr()
    for each, address in zip(wanted[:12], packed.addresses, strict=True):
        expected = torch.zeros(each.columns, device=device)
        expected[:13] = each.w.float()
        assert torch.equal(values(packed, each, address), expected)
    packed = prepack.pack(wanted[12:], None, v)
    assert torch.equal(values(packed, wanted[12], packed.addresses[0]), torch.zeros(32, device=device))
    assert prepack.pack([prepack.NOTHING], None, v).addresses == [0]


def plain_fold(w3, b3, gamma, beta, dtype):
    """Equation (8) of docs/maths.md; sums in float64."""
    w = w3.float() if gamma is None else w3.float() * gamma.float()
    scale = None
    if dtype is F16:
        _, exponent = torch.frexp(w.abs().amax(1).clamp(min=2.0**-100))
        w = torch.ldexp(w, -exponent[:, None])
        scale = torch.ldexp(torch.ones_like(w[:, 0]), exponent)
    w = w.to(dtype)
    wb = torch.zeros(len(w), dtype=torch.float64, device=w.device) if b3 is None else b3.double()
    if beta is not None:
        wb = wb + (w3.double() * beta.double()).sum(1)
    return w, w.double().sum(1), wb, scale


def fold(w3, b3, gamma, beta, dtype):
    """W', wg, wb and scale by the kernel."""
    fold = prepack.Fold(w3, b3, gamma, beta, dtype)
    packed = prepack.pack([], fold, w3)
    return [values(packed, each, at) for each, at in zip(fold.results(), packed.folds, strict=True)]


def assert_folded(w3, b3, gamma, beta, dtype):
    folded, wg, wb, scale = fold(w3, b3, gamma, beta, dtype)
    expected, sums, biases, factors = plain_fold(w3, b3, gamma, beta, dtype)
    channels = w3.shape[1]
    assert folded.shape == (len(w3), -(-channels // 64) * 64)
    assert torch.equal(folded[:, :channels], expected)
    assert not folded[:, channels:].any()
    # A sum in float32 of any order: 2^-24 of each partial sum.
    error = 2.0**-24 * (channels.bit_length() + channels // 32 + 2)
    assert ((wg.double() - sums).abs() <= error * expected.double().abs().sum(1)).all()
    terms = torch.zeros_like(biases) if b3 is None else b3.double().abs()
    if beta is not None:
        terms = terms + (w3.double() * beta.double()).abs().sum(1)
    assert ((wb.double() - biases).abs() <= error * terms).all()
    assert (scale is None) == (factors is None)
    assert scale is None or torch.equal(scale, factors)


def make_fold(size, given, device):
    hidden, channels = size
    w3 = torch.randn(size, device=device) * channels**-0.5
    vectors = [torch.randn(n, device=device) for n in (hidden, channels, channels)]
    return [t.to(given) for t in (w3, *vectors)]


@pytest.mark.parametrize("dtype", (F16, BF16), ids=str)
@pytest.mark.parametrize("given", (F32, F16, BF16, torch.float64), ids=str)
@pytest.mark.parametrize("size", ((1, 1), (5, 3), (33, 24), (9, 64), (16, 768), (3, 1033), (2, 3000)), ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_the_fold_equals_plain_pytorch(size, given, dtype, cuda_kernels, device):
    """W' and the scale bit for bit; wg is the sum of the rounded W'."""
    w3, b3, gamma, beta = make_fold(size, given, device)
    assert_folded(w3, b3, gamma, beta, dtype)
    assert_folded(w3, None, None, None, dtype)
    assert_folded(w3, b3, gamma, None, dtype)
    assert_folded(w3, None, None, beta, dtype)


@pytest.mark.parametrize("dtype", (F16, BF16), ids=str)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.usefixtures("poisoned_memory")
def test_the_fold_of_weights_in_any_layout(source, dtype, cuda_kernels, device):
    w3, b3, gamma, beta = make_fold((19, 40), F32, device)
    assert_folded(SOURCES[source](w3), b3, gamma, beta, dtype)
    if source == "columns of more":
        return
    as_row = SOURCES["every second" if source == "transposed" else source]
    gamma, beta, b3 = (as_row(v[None]).squeeze(0) for v in (gamma, beta, b3))
    assert_folded(w3, b3, gamma, beta, dtype)


@pytest.mark.parametrize("dtype", (F16, BF16), ids=str)
@pytest.mark.parametrize("gain", (0.0, 1e-38, 1e-30, 1e-9, 2.0**-14, 1e4, 1e30))
def test_the_fold_of_any_gamma(gain, dtype, cuda_kernels, device):
    """No row falls among the subnormal numbers of float16, however small gamma is."""
    w3, b3, gamma, beta = make_fold((12, 40), F32, device)
    gamma *= gain
    gamma[3] = 0
    w3[5] = 0
    assert_folded(w3, b3, gamma, beta, dtype)
    if dtype is F16 and gain >= 1e-9:
        folded, *_ = fold(w3, b3, gamma, beta, dtype)
        assert (folded.abs().amax(1)[[0, 1, 2, 3, 4, 6]] >= 0.5).all()


@pytest.mark.parametrize("dtype", (F16, BF16), ids=str)
@pytest.mark.parametrize("value", (torch.nan, torch.inf))
def test_what_is_not_finite_stays_in_its_row(value, dtype, cuda_kernels, device):
    w3, b3, gamma, beta = make_fold((6, 40), F32, device)
    clean = fold(w3, b3, gamma, beta, dtype)
    w3[2, 7] = value
    folded, wg, wb, scale = fold(w3, b3, gamma, beta, dtype)
    others = [0, 1, 3, 4, 5]
    assert not folded[2, 7].isfinite() and not wg[2].isfinite() and not wb[2].isfinite()
    assert folded[2].isfinite().sum() == folded.shape[1] - 1
    for actual, expected in zip((folded, wg, wb, scale), clean, strict=True):
        assert actual is None or torch.equal(actual[others], expected[others])


def test_wrong_sizes_are_refused(cuda_kernels):
    """By the launcher: nothing is written outside of a result."""
    source, result = (1 << 12, 0, 4, 4, 4, 1), (1 << 12, 1)
    for jobs in ([(*source, *result, 3, 4)], [(*source, *result, 4, 3)], [(*source, *result, 4, 4)] * 13):
        with pytest.raises(RuntimeError, match="mk_pack_weights: .*error 1"):
            cuda_kernels.pack_weights(jobs, None, 0)


# --------------------------------------------------------------------------------------------- launches and bytes

KINDS = {  # dtype of parameters and of x, autocast
    "bfloat16": (BF16, BF16, None),
    "float16": (F16, F16, None),
    "autocast": (F32, F32, BF16),
    "autocast, 16-bit stream": (F32, F16, F16),
}


def in_kind(kind, device):
    parameters, x, autocast = KINDS[kind]
    return parameters, x, torch.autocast(device, autocast or BF16, enabled=autocast is not None)


COPIES = {f"aten::{name}" for name in ("copy_", "_to_copy", "zeros", "zero_", "fill_", "mul", "cat", "clone")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", (SHAPE, LONG), ids=("fused", "long"))
@pytest.mark.parametrize("memory", F.MEMORY_MODES)
def test_one_pack_a_half_and_pass(memory, shape, kind, watched, backend, device):
    """And PyTorch casts, pads and copies no weight beside it."""
    library.install(watched)
    parameters, x_dtype, autocast = in_kind(kind, device)
    block, x = make_block(shape, parameters, device), make_x(2, shape, x_dtype, device)
    for half, of_half in (("token", block.token()), ("channel", block.channel())):
        leaves = [t.detach().requires_grad_() for t in (x, *of_half)]
        options = {"memory": memory} if half == "channel" else {}
        with autocast, operators_called() as forward:
            y = HALVES[half](*leaves, backend=backend, **options)
        assert watched.calls == ["pack_weights", f"{half}_mixing_forward"]
        assert "aten::empty" in forward and not forward & COPIES
        watched.calls.clear()
        y.backward(torch.randn_like(y))
        assert watched.calls.count("pack_weights") == 1 and watched.calls[0] in ("pack_weights", "branch_gradient")
        watched.calls.clear()


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_is_packed_by_one_launch_of_few_bytes(kind, watched, backend, device):
    """What is read and written is at most 1.2 times the least: each weight read once and its pack written once."""
    library.install(watched)
    parameters, x_dtype, autocast = in_kind(kind, device)
    shape = MixerShape(S=196, C=96, D_S=48, D_C=384)
    block, x = make_block(shape, parameters, device), make_x(1, shape, x_dtype, device)
    with autocast:
        run(block, x, backend)
    assert watched.calls == ["pack_weights", "mixer_block_forward"]
    ((packings, folding),) = watched.packs
    sizes = (4, 2, 2)
    moved = 0
    sources = []
    for address, kind_, rows, columns, _, _, _, to, rows_padded, columns_padded in (
        *packings, *([folding[0]] if folding else []),
    ):  # fmt: skip
        moved += rows * columns * sizes[kind_] + rows_padded * columns_padded * sizes[to]
        sources += [address] if address else []
    if folding:
        _, gamma, beta, b3, wg, wb, scale = folding
        for (address, kind_, _), length in ((gamma, shape.C), (beta, shape.C), (b3, shape.D_C)):
            moved += length * sizes[kind_]
            sources.append(address)
        moved += 4 * shape.D_C * sum(map(bool, (wg, wb, scale)))
    assert len(set(sources)) == len(sources)  # nothing is read twice
    given = parameters.itemsize
    least = 0
    for name, p in block.parameters.items():
        packed = name in ("w1", "w2", "w3") or given == 4 and name == "w4"
        vector = p.dim() == 1 and (given != 4 or name in ("b1", "b2", "gamma2", "beta2", "b3"))
        least += p.numel() * (given + (2 if p.dim() == 2 else 4)) if packed or vector else 0
    assert moved <= 1.2 * least


def test_weights_that_need_nothing_are_passed_on(watched, backend, device):
    library.install(watched)
    block, x = make_block(WHOLE, BF16, device), make_x(1, WHOLE, BF16, device)
    for name, p in block.parameters.items():
        if p.dim() == 1:
            block.parameters[name] = p.float()
    run_with_packing(block, x, backend, None)
    ((packings, folding),) = watched.packs
    sources = {job[0] for job in packings}
    names = {name for name, p in block.parameters.items() if p.data_ptr() in sources}
    assert names == ({"w1"} if backend == "cuda:sm90" else set())  # it takes the transpose
    assert folding[0][0] == block.parameters["w3"].data_ptr()
    packing = prepack.Packing(BF16)
    run_with_packing(block, x, backend, packing)
    made = {name.rpartition(" ")[2] for name in packing.made}
    assert made == names | {"w3", "wg", "wb"}  # a parameter is no pack: its owner keeps it


@pytest.mark.parametrize("shape", (SHAPE, LONG), ids=("fused", "long"))
@pytest.mark.parametrize("memory", F.MEMORY_MODES)
def test_no_pack_outlives_its_pass(memory, shape, backend, memory_of_packs, device):
    """Also between forward and backward, where a sharded model has let go of its weights."""
    block, x = make_block(shape, F32, device), make_x(2, shape, BF16, device)
    leaves = [t.detach().requires_grad_() for t in (x, *block.parameters.values())]
    parameters = dict(zip(block.parameters, leaves[1:], strict=True))
    with torch.autocast(device, BF16):
        y = F.mixer_block(leaves[0], **parameters, backend=backend, memory=memory)
    assert len(memory_of_packs) == 2 and all(piece.expired() for piece in memory_of_packs)
    y.backward(torch.ones_like(y))
    assert len(memory_of_packs) == 4 and all(piece.expired() for piece in memory_of_packs)


# ------------------------------------------------------------------------------------------------- never stale


def write_data(p):
    p.data.mul_(-1.5)


def write_uncounted(p):
    """As FSDP2 fills its unsharded parameters again."""
    with torch.no_grad(), _unsafe_preserve_version_counter(p):
        p.mul_(-1.5)


def swap_data(p):
    """As an average of the weights is swapped in."""
    p.data = p.data * -1.5


WRITES = (write_data, write_uncounted, swap_data)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize(("shape", "dtype"), ((SHAPE, BF16), (WHOLE, F16), (LONG, BF16)), ids=("", "whole", "long"))
def test_every_write_is_seen(shape, dtype, write, backend, device):
    """By a block, by halves, and by the backward of both, after each parameter in turn."""
    block, x = make_block(shape, dtype, device), make_x(1, shape, dtype, device)
    dy = torch.randn_like(x)
    block.parameters.update({name: torch.nn.Parameter(p) for name, p in block.parameters.items()})
    versions = {name: p._version for name, p in block.parameters.items()}
    before, before_gradients = run(block, x, backend), gradients(block, x, dy, backend)
    for name, p in block.parameters.items():
        write(p)
        fresh = copy.deepcopy(block)
        after = run(block, x, backend)
        assert not torch.equal(after, before), name
        assert torch.equal(after, run(fresh, x, backend)), name
        actual, expected = gradients(block, x, dy, backend), gradients(fresh, x, dy, backend)
        assert all(torch.equal(actual[each], expected[each]) for each in expected), name
        if name != "b4":  # y alone depends on it
            assert not all(torch.equal(actual[each], before_gradients[each]) for each in expected), name
        before, before_gradients = after, actual
    assert {name: p._version for name, p in block.parameters.items()} == versions  # PyTorch counted none of them


@pytest.mark.parametrize("memory", F.MEMORY_MODES)
@pytest.mark.parametrize("write", (write_data, write_uncounted))
def test_backward_takes_the_weights_as_they_are(write, memory, backend, device):
    """Between forward and backward too, as PyTorch's own operators do."""
    block, x = make_block(SHAPE, BF16, device), make_x(2, SHAPE, BF16, device).requires_grad_()
    weights = {name: torch.nn.Parameter(p) for name, p in block.parameters.items()}
    y = F.mixer_block(x, **weights, backend=backend, memory=memory)
    (before,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    for name in ("w1", "w2", "w3", "w4", "gamma1", "gamma2"):
        write(weights[name])
        (after,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        assert not torch.equal(after, before), name
        before = after


# ---------------------------------------------------------------------------------------- weights that stay


def halves_of(block):
    return Half(*block.token()), Half(*block.channel())


def run_with_packing(block, x, backend, packing, dtype=None):
    with torch.no_grad():
        return backends.load(backend).mixer_block_forward(
            x, *halves_of(block), Options(dtype or x.dtype), eps2=1e-6, packing=packing
        )


def halves(block, x, backend, dtype, kept):
    """u and y by the two halves, as the block does it."""
    module, (tokens, channels), options = backends.load(backend), halves_of(block), Options(dtype)
    with torch.no_grad():
        u = module.token_mixing_forward(x, tokens, options, packing=module.Packing(dtype, kept))[0]
        return module.channel_mixing_forward(u, channels, options, packing=module.Packing(dtype, kept))[0]


@pytest.mark.parametrize("dtype", (BF16, F16), ids=str)
@pytest.mark.parametrize("stream", (F32, None), ids=("float32 stream", "16-bit stream"))
@pytest.mark.parametrize("shape", (SHAPE, WHOLE, LONG, MixerShape(1, 1, 1, 1)), ids=str)
@pytest.mark.parametrize("bias", (True, False), ids=("", "bare"))
def test_packs_that_are_kept_give_the_same(bias, shape, stream, dtype, watched, backend, device):
    library.install(watched)
    block = make_block(shape, F32, device, affine=bias, bias=bias)
    x = make_x(2, shape, stream or dtype, device)
    expected = run_with_packing(block, x, backend, None, dtype)
    packing = prepack.Packing(dtype)
    assert torch.equal(run_with_packing(block, x, backend, packing, dtype), expected)
    watched.calls.clear()
    for kept in (packing.made, copy.deepcopy(packing.made)):
        again = prepack.Packing(dtype, kept)
        assert torch.equal(run_with_packing(block, x, backend, again, dtype), expected)
        assert not again.made
    assert watched.calls == ["mixer_block_forward"] * 2
    # The halves serve themselves from the block's packs. The block's numbers are not theirs: csrc/sm90 makes the second
    # norm's statistics in the token kernel.
    by_halves = halves(block, x, backend, dtype, packing.made)
    assert "pack_weights" not in watched.calls
    assert torch.equal(by_halves, halves(block, x, backend, dtype, {}))


def test_packs_of_several_kinds_are_kept_side_by_side(watched, hopper_kernels, device):
    """Of another stream or dtype, or for a tensor that the kernels of csrc/sm90 do not take."""
    library.install(watched)
    block, x = make_block(SHAPE, BF16, device), make_x(2, SHAPE, BF16, device)
    kinds = ((x, BF16), (x.float(), BF16), (x.half(), F16), (make_x(2, SHAPE, BF16, device, "transposed"), BF16))
    kept = {}
    expected = []
    for x, dtype in kinds:
        packing = prepack.Packing(dtype, kept)
        expected.append(run_with_packing(block, x, "cuda:sm90", packing, dtype))
        assert not set(packing.made) & set(kept)
        kept = kept | packing.made
    assert not packing.made  # the token half's of the float32 stream, the channel half's of the first
    watched.calls.clear()
    for (x, dtype), y in zip(kinds, expected, strict=True):
        assert torch.equal(run_with_packing(block, x, "cuda:sm90", prepack.Packing(dtype, kept), dtype), y)
        assert torch.equal(run_with_packing(block, x, "cuda:sm90", None, dtype), y)
    assert watched.calls == ["mixer_block_forward", "pack_weights", "mixer_block_forward"] * len(kinds)
