"""FusedMixerBlock against timm's MixerBlock: equal to the last bit, because the torch backend runs the same operators.

On the CPU, where "auto" means the torch backend, unless a test asks for the kernels, which have tests of their own.
"""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import timm.layers
import torch
from timm.models.mlp_mixer import MixerBlock
from torch import Tensor, nn

from mixer_kernels import FusedMixerBlock, functional, use_backend
from mixer_kernels.coverage import why_not_fused
from mixer_kernels.layers import DropPath, Mlp

pytestmark = pytest.mark.usefixtures("through_functional")

DIM, SEQ_LEN, BATCH = 24, 10, 3
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


class PlainSubclass(nn.LayerNorm):
    """A LayerNorm that may compute anything in its forward, as far as its type tells."""


COVERED = {
    "default": {},
    "odd sizes": {"dim": 19, "seq_len": 7},
    "ones": {"dim": 1, "seq_len": 1},
    "ratios": {"mlp_ratio": (1.5, 0.3)},
    "one ratio": {"mlp_ratio": 2.0},
    "timm mlp": {"mlp_layer": timm.layers.Mlp},
    "no bias": {"mlp_layer": partial(timm.layers.Mlp, bias=False)},
    "second bias only": {"mlp_layer": partial(timm.layers.Mlp, bias=(False, True))},
    "own mlp, first bias only": {"mlp_layer": partial(Mlp, bias=(True, False))},
    "no affine": {"norm_layer": partial(nn.LayerNorm, elementwise_affine=False)},
    "no beta": {"norm_layer": partial(nn.LayerNorm, bias=False)},
    "eps 1e-5": {"norm_layer": nn.LayerNorm},
    "large eps": {"norm_layer": partial(nn.LayerNorm, eps=0.5)},
    "timm norm": {"norm_layer": timm.layers.LayerNorm},
    "tanh": {"act_layer": partial(nn.GELU, approximate="tanh")},
    "timm gelu": {"act_layer": timm.layers.GELU},
    "timm gelu tanh": {"act_layer": timm.layers.GELUTanh},
    "swiglu": {"mlp_layer": timm.layers.GluMlp, "act_layer": nn.SiLU, "mlp_ratio": (1.0, 4.0)},
    "no drop": {"drop": 0.0, "drop_path": 0.0},
}
# With a part of the reason that the warning must name.
UNCOVERED = {
    "rms norm": ({"norm_layer": nn.RMSNorm}, "norm1 is RMSNorm"),
    "group norm": ({"norm_layer": lambda dim, **factory: GroupNormOverTokens(dim, **factory)}, "norm1 is GroupNormOv"),
    "norm in float32": ({"norm_layer": timm.layers.LayerNormFp32}, "norm1 is LayerNormFp32"),
    "norm subclass": ({"norm_layer": PlainSubclass}, "norm1 is PlainSubclass"),
    "tanh": ({"act_layer": nn.Tanh}, "mlp_tokens has Tanh"),
    "quick gelu": ({"act_layer": timm.layers.QuickGELU}, "mlp_tokens has QuickGELU"),
    "glu": ({"mlp_layer": timm.layers.GluMlp, "act_layer": nn.Sigmoid}, "mlp_tokens is GluMlp with Sigmoid"),
    "glu, gate first": ({"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU}, "gate_last=False"),
    "inner norm": ({"mlp_layer": partial(timm.layers.Mlp, norm_layer=nn.LayerNorm)}, "mlp_tokens has LayerNorm"),
}


class GroupNormOverTokens(nn.GroupNorm):
    """GroupNorm of tokens ``[B, S, C]``: it wants the channels second."""

    def __init__(self, dim: int, **factory) -> None:
        super().__init__(4, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def twins(dtype: torch.dtype = torch.float32, **config) -> tuple[nn.Module, nn.Module]:
    """timm's block and ours with the same random weights, by way of timm's state_dict."""
    config = {"dim": DIM, "seq_len": SEQ_LEN, "dtype": dtype} | config
    theirs = MixerBlock(**config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    ours = FusedMixerBlock(**config)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def tokens_for(block: nn.Module, dtype: torch.dtype = torch.float32, patch_embedded: bool = False) -> Tensor:
    """Input for a block; ``patch_embedded``: with the strides that a patch embedding gives to contiguous images."""
    seq_len, dim = block.mlp_tokens.fc1.in_features, block.mlp_channels.fc1.in_features
    if patch_embedded:
        return torch.randn(BATCH, dim, seq_len).to(dtype).transpose(1, 2)
    return torch.randn(BATCH, seq_len, dim).to(dtype)


def run(block: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and all gradients, for the same upstream gradient on every call."""
    x = x.detach().requires_grad_()
    y = block(x)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, *block.parameters()], upstream)]


def assert_same(theirs: list[Tensor], ours: list[Tensor]) -> None:
    assert len(theirs) == len(ours)
    for expected, got in zip(theirs, ours, strict=True):
        assert torch.equal(expected, got)


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    calls: list[None] = []
    original = functional.mixer_block

    def counted(*args, **kwargs):
        calls.append(None)
        return original(*args, **kwargs)

    monkeypatch.setattr(functional, "mixer_block", counted)
    return calls


@pytest.mark.parametrize("patch_embedded", [False, True], ids=["contiguous", "patch_embedded"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", COVERED.values(), ids=COVERED)
def test_covered_block_is_timms(config, dtype, patch_embedded, said, monkeypatch) -> None:
    theirs, ours = twins(dtype, **config)
    theirs.norm2.eps = ours.norm2.eps = 1e-3
    x = tokens_for(ours, dtype, patch_embedded)
    calls = count_calls(monkeypatch)
    with torch.no_grad():
        assert torch.equal(ours.eval()(x), theirs.eval()(x))
    assert_same(run(theirs.train(), x), run(ours.train(), x))
    assert len(calls) == 2  # through the functional API, both times
    assert said == []


@pytest.mark.parametrize(("config", "reason"), UNCOVERED.values(), ids=UNCOVERED)
def test_uncovered_block_is_timms_and_says_so_once(config, reason, said, monkeypatch) -> None:
    theirs, ours = twins(**config)
    x = tokens_for(ours)
    calls = count_calls(monkeypatch)
    assert_same(run(theirs, x), run(ours, x))
    assert torch.equal(ours.eval()(x), theirs.eval()(x))
    assert not calls
    assert len(said) == 1 and reason in said[0]


def test_every_reason_is_said(said) -> None:
    for config, _ in UNCOVERED.values():
        _, block = twins(**config)
        for _ in range(2):
            block(tokens_for(block))
    assert len(said) == len(set(said)) == len(UNCOVERED)


NOISE = [{"drop": 0.3}, {"drop_path": 0.4}, {"drop": 0.2, "drop_path": 0.2}, {"drop": 1.0}, {"drop_path": 1.0}]


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("patch_embedded", [False, True], ids=["contiguous", "patch_embedded"])
@pytest.mark.parametrize("config", NOISE, ids=str)
def test_active_dropout_draws_timms_masks(config, patch_embedded, autocast, said, monkeypatch) -> None:
    theirs, ours = twins(**config)
    x = tokens_for(ours, patch_embedded=patch_embedded)
    calls = count_calls(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        torch.manual_seed(3)
        expected = run(theirs.train(), x)
        state = torch.get_rng_state()
        torch.manual_seed(3)
        assert_same(expected, run(ours.train(), x))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(expected[0], theirs.eval()(x))  # it was active
    assert len(calls) == 1 and said == []
    assert torch.equal(ours.eval()(x), theirs(x))


def other_dropouts(block: nn.Module) -> None:
    block.mlp_channels.drop2.p = 0.4


def one_mlp_in_eval(block: nn.Module) -> None:
    block.mlp_tokens.eval()


def one_dropout_gone(block: nn.Module) -> None:
    block.mlp_tokens.drop1 = nn.Identity()


def not_rescaled(block: nn.Module) -> None:
    block.drop_path.scale_by_keep = False


@pytest.mark.parametrize("change", [other_dropouts, one_mlp_in_eval, one_dropout_gone, not_rescaled])
def test_noise_that_the_kernels_do_not_have_is_timms(change, said, monkeypatch) -> None:
    pair = twins(drop=0.3, drop_path=0.3)
    results = []
    calls = count_calls(monkeypatch)
    for block in pair:
        change(block.train())
        torch.manual_seed(3)
        results.append(run(block, tokens_for(block)))
    assert_same(*results)
    pair[1](tokens_for(pair[1]))
    assert not calls
    assert len(said) == 1 and ("rescale" if change is not_rescaled else "different probabilities") in said[0]
    assert why_not_fused(pair[1].eval()) is None


def options_of_a_call(block: nn.Module, monkeypatch: pytest.MonkeyPatch) -> dict:
    """The keywords with which a block calls functional.mixer_block."""
    seen = {}
    monkeypatch.setattr(functional, "mixer_block", lambda x, *args, **kwargs: seen.update(kwargs) or x)
    FusedMixerBlock.forward(block, tokens_for(block))
    return seen


@pytest.mark.parametrize("cls", [MixerBlock, FusedMixerBlock])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_noise_follows_the_mode(cls, training, monkeypatch) -> None:
    seen = options_of_a_call(cls(DIM, SEQ_LEN, drop=0.1, drop_path=0.2).train(training), monkeypatch)
    assert (seen["dropout_p"], seen["drop_path_p"]) == ((0.1, 0.2) if training else (0.0, 0.0))


def test_memory_reaches_the_function(monkeypatch) -> None:
    assert options_of_a_call(FusedMixerBlock(DIM, SEQ_LEN, memory="min"), monkeypatch)["memory"] == "min"
    assert options_of_a_call(FusedMixerBlock(DIM, SEQ_LEN), monkeypatch)["memory"] == "fast"
    assert options_of_a_call(MixerBlock(DIM, SEQ_LEN), monkeypatch)["memory"] == "fast"
    with pytest.raises(ValueError, match="memory must be one of 'fast', 'min', got 'max'"):
        FusedMixerBlock(DIM, SEQ_LEN, memory="max")


@pytest.mark.parametrize(("memory", "kept"), [("fast", True), ("min", False)])
def test_memory_decides_whether_z_is_kept(memory, kept, device) -> None:
    """On the kernels; z is the one saved tensor of B * S rows and D_C columns."""
    block = FusedMixerBlock(DIM, SEQ_LEN, memory=memory, device=device)
    shapes = []
    with (
        use_backend("triton"),
        torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t),
    ):
        block(tokens_for(block).to(device))
    assert ((BATCH * SEQ_LEN, 4 * DIM) in shapes) is kept


@pytest.mark.parametrize(("probability", "scale"), [(0.0, True), (0.3, True), (0.3, False), (1.0, True)])
def test_drop_path_is_timms(probability: float, scale: bool) -> None:
    x = torch.randn(64, 3, 2)
    torch.manual_seed(5)
    expected = timm.layers.DropPath(probability, scale)(x)
    torch.manual_seed(5)
    assert torch.equal(DropPath(probability, scale)(x), expected)
    assert DropPath(probability, scale).eval()(x) is x


def test_mlp_is_timms() -> None:
    arguments = {"hidden_features": 7, "out_features": 3, "norm_layer": nn.LayerNorm, "bias": (True, False)}
    torch.manual_seed(2)
    theirs = timm.layers.Mlp(5, drop=(0.1, 0.2), **arguments)
    torch.manual_seed(2)
    ours = Mlp(5, drop=(0.1, 0.2), **arguments)
    assert [name for name, _ in ours.named_children()] == [name for name, _ in theirs.named_children()]
    assert (ours.drop1.p, ours.drop2.p) == (0.1, 0.2)
    x = torch.randn(4, 5)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


def test_forward_serves_a_stock_block(said, monkeypatch) -> None:
    theirs = MixerBlock(DIM, SEQ_LEN, drop=0.1, drop_path=0.1).eval()
    x = tokens_for(theirs)
    calls = count_calls(monkeypatch)
    assert torch.equal(FusedMixerBlock.forward(theirs, x), theirs(x))
    assert len(calls) == 1 and said == []


def test_state_dict_travels_both_ways() -> None:
    theirs, ours = twins()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    back = MixerBlock(DIM, SEQ_LEN)
    back.load_state_dict(ours.state_dict(), strict=True)
    x = tokens_for(ours)
    assert torch.equal(back(x), ours(x))


@pytest.mark.parametrize("mlp_layer", [Mlp, timm.layers.Mlp], ids=["own", "timm"])
def test_initial_weights_are_timms(mlp_layer) -> None:
    torch.manual_seed(4)
    theirs = MixerBlock(DIM, SEQ_LEN).state_dict()
    torch.manual_seed(4)
    ours = FusedMixerBlock(DIM, SEQ_LEN, mlp_layer=mlp_layer).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_layers_need_not_take_device_and_dtype() -> None:
    theirs, _ = twins()
    block = FusedMixerBlock(
        DIM,
        SEQ_LEN,
        mlp_layer=lambda dim, hidden, act_layer, drop: Mlp(dim, hidden, act_layer=act_layer, drop=drop),
        norm_layer=lambda dim: nn.LayerNorm(dim, eps=1e-6),
    )
    block.load_state_dict(theirs.state_dict(), strict=True)
    x = tokens_for(block)
    assert torch.equal(block(x), theirs(x))
    made = FusedMixerBlock(DIM, SEQ_LEN, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in made.parameters()} == {("meta", torch.bfloat16)}


def test_copies_compute_the_same() -> None:
    _, block = twins(act_layer=partial(nn.GELU, approximate="tanh"))
    x = tokens_for(block)
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(twin(x), block(x))
        with torch.no_grad():
            twin.mlp_tokens.fc1.weight.add_(1)
        assert not torch.equal(twin(x), block(x))  # a copy, not a view


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "config", [{}, {"drop_path": 0.3}, {"act_layer": nn.Tanh}], ids=["covered", "stochastic_depth", "uncovered"]
)
def test_compiles_in_one_graph(config, training: bool) -> None:
    _, block = twins(torch.float64, **config)
    block.train(training)
    x = tokens_for(block, torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    torch.manual_seed(6)
    expected = run(block, x)
    torch.manual_seed(6)
    torch.testing.assert_close(run(compiled, x), expected, rtol=1e-12, atol=1e-12)


def test_compiles_with_dropout_in_one_graph() -> None:
    # No gradients: the backward pass of dropout on a transposed view fails under aot_eager in PyTorch 2.13 (a view of
    # strides that do not allow it), in timm's block too.
    _, block = twins(torch.float64, drop=0.3)
    x = tokens_for(block, torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.manual_seed(6)
        expected = block(x)
        torch.manual_seed(6)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-12, atol=1e-12)


def test_a_compiled_block_follows_the_mode() -> None:
    _, block = twins(torch.float64, drop=0.5)
    x = tokens_for(block, torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        trained = compiled(x)
        block.eval()
        torch.testing.assert_close(compiled(x), block(x), rtol=1e-12, atol=1e-12)
        assert not torch.allclose(compiled(x), trained)


def test_functional_call_uses_the_weights_given() -> None:
    theirs, ours = twins()
    x = tokens_for(ours)
    weights = {name: 2 * weight.detach() for name, weight in ours.named_parameters()}
    assert torch.equal(torch.func.functional_call(ours, weights, x), torch.func.functional_call(theirs, weights, x))


def test_autocast_is_timms() -> None:
    theirs, ours = twins()
    x = tokens_for(ours)
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = run(theirs, x), run(ours, x)
    assert_same(expected, got)
    assert got[0].dtype is torch.float32 and not torch.equal(got[0], ours(x))  # only the products were in bfloat16


def test_wrong_input_is_named() -> None:
    _, block = twins()
    with pytest.raises(ValueError, match=r"w1 has shape \(12, 10\): built for 10 tokens, x has 11"):
        block(torch.randn(BATCH, SEQ_LEN + 1, DIM))
    with pytest.raises(ValueError, match=r"gamma1 has shape \(24,\), expected \(25,\)"):
        block(torch.randn(BATCH, SEQ_LEN, DIM + 1))
    with pytest.raises(ValueError, match=r"\(batch, tokens, channels\)"):
        block(torch.randn(SEQ_LEN, DIM))
    with pytest.raises(ValueError, match="one value or two"):
        FusedMixerBlock(DIM, SEQ_LEN, mlp_ratio=(1, 2, 3))
