"""Every gradient of the kernels against float64, by the accuracy rule: at most three times eager's own error."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from accuracy import assert_all_accurate, reference
from blocks import LAYOUTS, Watched, finest, kernels_in, make_block, make_x
from test_kernels import on_target

import mixer_kernels.functional as F
from mixer_kernels.shapes import MixerShape
from mixer_kernels.tuning.target import KNOWN_TARGETS

pytestmark = pytest.mark.usefixtures("poisoned_memory", "few_packing_programs")

CSRC = Path(__file__).parent.parent / "csrc"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

SHAPES = {
    "one of everything": MixerShape(S=1, C=1, D_S=1, D_C=1),
    "below a tile": MixerShape(S=7, C=5, D_S=3, D_C=9),
    "S=16": MixerShape(S=16, C=40, D_S=24, D_C=48),
    "S/32": MixerShape(S=49, C=64, D_S=32, D_C=128),
    "tile - 1": MixerShape(S=63, C=127, D_S=31, D_C=63),
}
LARGE_SHAPES = {
    "S/16": MixerShape(S=196, C=72, D_S=40, D_C=136),
    "S/16 + 1": MixerShape(S=197, C=33, D_S=50, D_C=70),
    "H/14": MixerShape(S=256, C=40, D_S=32, D_C=64),
    "beyond the fused kernel": MixerShape(S=257, C=40, D_S=24, D_C=48),
    "448 px": MixerShape(S=784, C=32, D_S=72, D_C=32),
}


def gradients(block, x, dy, backend, wanted=None, run=F.mixer_block, **options):
    """Gradients of x and of every parameter (or of those ``wanted``) of the whole block, by name."""
    inputs = {"x": x, **block.parameters}
    leaves = {
        name: t.detach().requires_grad_(wanted is None or name in wanted) for name, t in inputs.items() if t is not None
    }
    if x.stride() != leaves["x"].stride():
        raise AssertionError("detach changed the layout")
    arguments = {name: leaves.get(name) for name in inputs}
    y = run(arguments.pop("x"), **arguments, backend=backend, **options)
    names = [name for name, leaf in leaves.items() if leaf.requires_grad]
    return dict(zip(names, torch.autograd.grad(y, [leaves[name] for name in names], dy), strict=True))


def exact_gradients(block, x, dy, products=None, **options):
    """``gradients`` in float64, to judge those in the dtype of the parameters."""
    wide = block.to(torch.float64)
    dtype = block.parameters["w1"].dtype
    return reference(lambda: gradients(wide, x.double(), dy.double(), "torch", **options), dtype, products)


def assert_gradients(block, x, backend, target="sm_80", device="cpu", dy=None, **options):
    dy = torch.randn_like(x, memory_format=torch.contiguous_format) if dy is None else dy
    with on_target(target, device):
        actual = gradients(block, x, dy, backend, **options)
    options.pop("memory", None)
    eager = gradients(block, x, dy, "torch", **options)
    assert_all_accurate(actual, eager, exact_gradients(block, x, dy, **options))


@pytest.mark.parametrize("memory", F.MEMORY_MODES)
@kernels_in(*DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_matches_eager(shape, backend, dtype, memory, device):
    block, x = make_block(shape, dtype, device), make_x(3, shape, dtype, device)
    assert_gradients(block, x, backend, memory=memory, device=device)


@kernels_in(torch.float32, torch.bfloat16)
@pytest.mark.parametrize("shape", LARGE_SHAPES.values(), ids=LARGE_SHAPES.keys())
def test_large_shapes_match_eager(shape, backend, dtype, device):
    block, x = make_block(shape, dtype, device), make_x(2, shape, dtype, device)
    assert_gradients(block, x, backend, memory="min" if dtype is torch.float32 else "fast", device=device)


@pytest.mark.parametrize(("memory", "dtype"), (("fast", torch.float16), ("min", torch.bfloat16)), ids=str)
@pytest.mark.parametrize("name", ("S/32", "S/16", "beyond the fused kernel"))
def test_tensor_descriptors_match_eager(name, dtype, memory, device):
    shape = {**SHAPES, **LARGE_SHAPES}[name]
    block, x = make_block(shape, dtype, device), make_x(2, shape, dtype, device)
    assert_gradients(block, x, "triton", memory=memory, target="sm_90", device=device)


@pytest.mark.parametrize(
    ("target", "dtype"), (("sm_80", torch.float32), ("sm_80", torch.bfloat16), ("sm_90", torch.bfloat16)), ids=str
)
def test_a_program_takes_many_turns(target, dtype, device, monkeypatch):
    """On one multiprocessor: the sums over images and channels are split among few programs."""
    monkeypatch.setitem(KNOWN_TARGETS, target, dataclasses.replace(KNOWN_TARGETS[target], multiprocessors=1))
    shape = MixerShape(S=20, C=200, D_S=16, D_C=32)
    block, x = make_block(shape, dtype, device), make_x(3, shape, dtype, device)
    assert_gradients(block, x, "triton", target=target, device=device)


@pytest.mark.parametrize("approximate", F.APPROXIMATIONS)
@pytest.mark.parametrize("affine", (True, False), ids=("affine", "no affine"))
@pytest.mark.parametrize("bias", (True, False), ids=("bias", "no bias"))
@kernels_in(torch.float32, torch.bfloat16)
def test_options(backend, dtype, bias, affine, approximate, device):
    shape = MixerShape(S=49, C=40, D_S=24, D_C=56)
    block, x = make_block(shape, dtype, device, affine=affine, bias=bias), make_x(2, shape, dtype, device)
    assert_gradients(block, x, backend, approximate=approximate, device=device)


@pytest.mark.parametrize("layout", LAYOUTS)
@kernels_in(torch.float32, torch.bfloat16)
def test_layouts(backend, dtype, layout, device):
    shape = MixerShape(S=49, C=40, D_S=24, D_C=48)
    block, x = make_block(shape, dtype, device), make_x(2, shape, dtype, device, layout)
    before = x.clone()
    assert_gradients(block, x, backend, device=device)
    assert torch.equal(x, before)


GRADIENT_LAYOUTS = {
    "expanded": lambda x: torch.full((1, 1, 1), 0.5, dtype=x.dtype, device=x.device).expand(x.shape),
    "transposed": lambda x: torch.randn_like(x.transpose(1, 2).contiguous()).transpose(1, 2),
    "slice": lambda x: torch.randn(*x.shape[:2], 2 * x.shape[2], device=x.device).to(x.dtype)[..., ::2],
}


@pytest.mark.parametrize("make", GRADIENT_LAYOUTS.values(), ids=GRADIENT_LAYOUTS.keys())
def test_incoming_gradients_of_any_layout(make, backend, device):
    shape = MixerShape(S=49, C=40, D_S=24, D_C=48)
    block, x = make_block(shape, finest(backend), device), make_x(2, shape, finest(backend), device)
    dy = make(x)
    before = dy.clone()
    assert_gradients(block, x, backend, dy=dy, device=device)
    assert torch.equal(dy, before)


NAMES = ("x", "gamma1", "beta1", "w1", "b1", "w2", "b2", "gamma2", "beta2", "w3", "b3", "w4", "b4")


@pytest.mark.parametrize("frozen", (False, True), ids=("alone", "all but"))
@pytest.mark.parametrize("name", NAMES)
def test_only_what_is_asked_for(name, frozen, backend, device):
    """Each input alone, and all but one: the same numbers as when all are wanted."""
    shape = MixerShape(S=20, C=24, D_S=16, D_C=32)
    block, x = make_block(shape, finest(backend), device), make_x(2, shape, finest(backend), device)
    dy = torch.randn_like(x)
    wanted = set(NAMES) - {name} if frozen else {name}
    whole = gradients(block, x, dy, backend)
    part = gradients(block, x, dy, backend, wanted=wanted)
    assert part.keys() == wanted
    for other in wanted:
        torch.testing.assert_close(part[other], whole[other], rtol=1e-5, atol=1e-6)


@contextlib.contextmanager
def kernels_run(backend):
    """The names of the kernels, or calls of _C, that run inside."""
    seen = []
    if backend == "triton":
        import strict_interpreter

        with strict_interpreter.record() as launches:
            yield seen
        seen += [one.kernel for one in launches]
    else:
        from mixer_kernels.backends.cuda import library

        kernels = library.loaded()
        watched = Watched(kernels)
        library.install(watched)
        try:
            yield seen
        finally:
            library.install(kernels)
        seen += watched.calls


NAMES_OF_KERNELS = {
    "triton": ("_token_weight_gradient_kernel", "_norm_bwd_kernel", "_token_mixing_bwd_kernel"),
    "cuda": ("token_weight_gradient", "norm_backward", "token_data_gradient"),
}


@pytest.mark.parametrize("half", ("token_mixing", "channel_mixing"))
def test_launches_are_only_what_is_asked_for(half, backend, device):
    """dx alone makes no weight gradient; a bias alone makes no LayerNorm backward."""
    if device == "cuda" and backend == "triton":
        pytest.skip("waits for a machine without a GPU: counts in the strict interpreter")
    shape = MixerShape(S=20, C=24, D_S=16, D_C=32)
    block, x = make_block(shape, finest(backend), device), make_x(2, shape, finest(backend), device)
    parameters = block.token() if half == "token_mixing" else block.channel()
    weight_gradient, norm_backward, data_gradient = NAMES_OF_KERNELS[backend]

    def kernels(*wanted):
        leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate((x, *parameters))]
        y = getattr(F, half)(*leaves, backend=backend)
        with kernels_run(backend) as names:
            y.sum().backward()
        return set(names) - {"pack_weights", "_pack_kernel", "_sum_parts_kernel"}

    assert weight_gradient not in kernels(0)
    assert norm_backward in kernels(0)
    assert norm_backward not in kernels(4)
    assert kernels(6) <= {data_gradient, weight_gradient}


@pytest.mark.parametrize("stream", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("products", (torch.float16, torch.bfloat16), ids=str)
def test_autocast(products, stream, backend, device):
    shape = MixerShape(S=49, C=40, D_S=24, D_C=48)
    block, x = make_block(shape, torch.float32, device), make_x(2, shape, stream, device)

    def run(*arguments, **options):
        with torch.autocast(device, products, enabled=arguments[0].dtype is not torch.float64):
            return F.mixer_block(*arguments, **options)

    dy = torch.randn(x.shape, dtype=torch.promote_types(stream, products), device=device)
    for target in ("sm_80", "sm_90"):
        with on_target(target, device):
            actual = gradients(block, x, dy, backend, run=run)
        eager = gradients(block, x, dy, "torch", run=run)
        assert_all_accurate(actual, eager, exact_gradients(block, x, dy, products, run=run))


def test_empty_batch(backend, device):
    shape = MixerShape(S=20, C=24, D_S=16, D_C=32)
    block, x = make_block(shape, finest(backend), device), make_x(0, shape, finest(backend), device)
    for name, gradient in gradients(block, x, torch.empty_like(x), backend).items():
        assert torch.equal(gradient, torch.zeros_like(gradient)), name


def test_backward_twice_is_bit_identical(backend, device):
    shape = MixerShape(S=49, C=40, D_S=24, D_C=48)
    block, x = make_block(shape, torch.bfloat16, device), make_x(3, shape, torch.bfloat16, device)
    leaves = [x.requires_grad_(), *(p.requires_grad_() for p in block.parameters.values())]
    y = F.mixer_block(x, **block.parameters, backend=backend)
    dy = torch.randn_like(y)
    first, second = (torch.autograd.grad(y, leaves, dy, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_second_derivative_raises(backend, device):
    shape = MixerShape(S=20, C=24, D_S=16, D_C=32)
    block, x = make_block(shape, finest(backend), device), make_x(2, shape, finest(backend), device).requires_grad_()
    for half, parameters in ((F.token_mixing, block.token()), (F.channel_mixing, block.channel())):
        y = half(x, *parameters, backend=backend)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivative.*backend='torch'"):
            dx.sum().backward()


@contextlib.contextmanager
def nothing_computed(backend):
    """Kernels are not run: for what is only counted."""
    if backend == "triton":
        from mixer_kernels.backends.triton.launch import intercept_launches

        with intercept_launches(lambda *_: None):
            yield
    else:
        from mixer_kernels.backends.cuda import library

        kernels = library.loaded()
        library.install(Watched(kernels, run=False))
        try:
            yield
        finally:
            library.install(kernels)


def test_saved_bytes(backend):
    """Per block of B/16, of what eager autograd keeps: fast at most 0.40, min at most 0.14."""
    shape = MixerShape(S=196, C=768, D_S=384, D_C=3072)
    block = make_block(shape, torch.bfloat16, "cpu")
    x = make_x(2, shape, torch.bfloat16, "cpu").requires_grad_()
    weights = {p.requires_grad_().untyped_storage().data_ptr() for p in block.parameters.values()}

    def saved(name, memory):
        seen = {}

        def pack(t):
            storage = t.untyped_storage()
            if storage.data_ptr() not in weights:
                seen[storage.data_ptr()] = t.numel() * t.itemsize if storage.nbytes() < t.numel() else storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            F.mixer_block(x, **block.parameters, backend=name, memory=memory)
        return sum(seen.values())

    eager = saved("torch", "fast")
    with nothing_computed(backend):
        assert saved(backend, "fast") <= 0.40 * eager
        assert saved(backend, "min") <= 0.14 * eager


def test_gradient_pairs_do_not_depend_on_memory_mode(backend, device):
    shape = MixerShape(S=20, C=24, D_S=16, D_C=32)
    block, x = make_block(shape, finest(backend), device), make_x(2, shape, finest(backend), device)
    dy = torch.randn_like(x)
    fast, small = (gradients(block, x, dy, backend, memory=memory) for memory in F.MEMORY_MODES)
    assert all(torch.equal(fast[name], small[name]) for name in fast)


def test_no_floats_are_added_atomically():
    """Reductions run in a fixed order: the kernels' sources use no atomic at all."""
    import mixer_kernels.backends.triton as backend

    triton = list(Path(backend.__file__).parent.glob("*.py"))
    cuda = [path for path in CSRC.rglob("*") if path.suffix in (".cu", ".cuh")]
    assert len(triton) > 10 and len(cuda) > 10
    words = ("atomic_add", "atomic_cas", "atomicAdd", "atomicCAS", '"red.', '"atom.')
    assert not [path.name for path, word in itertools.product(triton + cuda, words) if word in path.read_text()]
