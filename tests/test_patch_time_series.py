"""fuse_ on the models that mix patches of time series: PatchTSMixer, TinyTimeMixer, TSPulse."""

from __future__ import annotations

import copy

import pytest
import torch
import tsfm_stub
from parity import check_fused, run
from sktime.libs import granite_ttm as sktime_ttm
from torch import Tensor, nn
from transformers import PatchTSMixerConfig, PatchTSMixerForPrediction
from transformers.models.patchtsmixer import modeling_patchtsmixer

from mixer_kernels import freeze_, functional, fuse_, unfreeze_, unfuse_

tsfm_stub.define_packages()
from tsfm_public.models.tinytimemixer import TinyTimeMixerConfig, TinyTimeMixerForPrediction  # noqa: E402
from tsfm_public.models.tinytimemixer.modeling_tinytimemixer import TinyTimeMixerLayer  # noqa: E402
from tsfm_public.models.tspulse import TSPulseConfig  # noqa: E402
from tsfm_public.models.tspulse.modeling_tspulse import TSPulseLayer  # noqa: E402

pytestmark = pytest.mark.usefixtures("through_functional")

SMALL = {
    "context_length": 32, "patch_length": 8, "patch_stride": 8, "num_input_channels": 3, "prediction_length": 6,
    "d_model": 12, "num_layers": 2,
}  # fmt: skip


def patchtsmixer(**config) -> PatchTSMixerForPrediction:
    return with_trained_looks(PatchTSMixerForPrediction(PatchTSMixerConfig(**SMALL | config)))


def tinytimemixer(config_class=TinyTimeMixerConfig, cls=TinyTimeMixerForPrediction, **config) -> nn.Module:
    """Adaptive patching as published: each level has twice the patches of half the features."""
    levels = {"adaptive_patching_levels": 2, "decoder_num_layers": 1, "decoder_d_model": 10}
    return with_trained_looks(cls(config_class(**SMALL | levels | config)))


def with_trained_looks(model: nn.Module) -> nn.Module:
    """Norms and biases that are not 1 and 0, gates that are not all alike, statistics of series."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5) * torch.randn_like(parameter)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
    return model


def series(device: str = "cpu") -> Tensor:
    return torch.randn(2, 32, 3, device=device).cumsum(1)


def forecasts(outputs) -> Tensor:
    return outputs.prediction_outputs


def check(model: nn.Module, x: Tensor, **options) -> int:
    """Forecasts and gradients before, while and after; how many blocks were fused, which must be all."""
    report = check_fused(model, x, forecasts, **options)
    assert not report.left
    for entry in report.fused:
        kind = "mixer_layer" if entry.block.endswith("Layer") else "mixing"
        assert entry.detail == f"functional.gated_{kind}"
    return len(report)


# A model, and how many layers and blocks in them it has.
MODELS = {
    "PatchTSMixer": (lambda: patchtsmixer(), 2 * (1 + 2)),
    "PatchTSMixer, mixing channels": (lambda: patchtsmixer(mode="mix_channel"), 2 * (1 + 3)),
    "PatchTSMixer without gates": (lambda: patchtsmixer(gated_attn=False, mode="mix_channel"), 2 * (1 + 3)),
    "PatchTSMixer, BatchNorm": (lambda: patchtsmixer(norm_mlp="BatchNorm", mode="mix_channel"), 2 * (1 + 3)),
    "TinyTimeMixer, BatchNorm": (lambda: tinytimemixer(norm_mlp="BatchNorm"), 5 * (1 + 2)),
    "TinyTimeMixer": (lambda: tinytimemixer(), 5 * (1 + 2)),
    "TinyTimeMixer, sktime's": (
        lambda: tinytimemixer(sktime_ttm.TinyTimeMixerConfig, sktime_ttm.TinyTimeMixerForPrediction),
        5 * (1 + 2),
    ),
    "TinyTimeMixer, sigmoid": (lambda: tinytimemixer(gate_mode="sigmoid"), 5 * (1 + 2)),
    "TinyTimeMixer, groups": (lambda: tinytimemixer(gate_mode="group_sigmoid", gate_groups=3), 5 * (1 + 2)),
    "TinyTimeMixer, mixing channels": (lambda: tinytimemixer(decoder_mode="mix_channel"), 4 * (1 + 2) + (1 + 3)),
}


@pytest.mark.parametrize(("make", "number"), MODELS.values(), ids=MODELS)
def test_models(make, number) -> None:
    assert check(make(), series()) == number


# What those gates are on the CPU's kernels, and on Triton's, in both dtypes.
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("mode", ["sigmoid", "group_sigmoid"])
@pytest.mark.parametrize(
    ("backend", "dtype"), [("cpu", torch.float32), ("triton", torch.float32), ("triton", torch.bfloat16)]
)
def test_gates_of_tinytimemixer_on_the_kernels(mode, backend, dtype, device) -> None:
    config = TinyTimeMixerConfig(**SMALL, gate_mode=mode, gate_groups=2, mode="mix_channel")
    config.num_patches = 4
    layer = with_trained_looks(TinyTimeMixerLayer(config))
    x = torch.randn(2, 3, 4, 12, device="cpu" if backend == "cpu" else device, dtype=dtype)
    report = check_fused(layer, x, backend=backend)
    assert len(report) == 4 and not report.left


@pytest.mark.parametrize("mode", ["sigmoid", "group_sigmoid"])
def test_gates_of_frozen_layers_follow_when_thawed(mode) -> None:
    config = TinyTimeMixerConfig(**SMALL, gate_mode=mode, gate_groups=2)
    config.num_patches = 4
    layer = with_trained_looks(TinyTimeMixerLayer(config)).eval()
    x = torch.randn(2, 3, 4, 12)
    with torch.inference_mode():
        expected = layer(x)
        fuse_(layer, backend="cpu")
        for change in (freeze_, unfreeze_, freeze_):
            change(layer)
            for _ in range(3):
                torch.testing.assert_close(layer(x), expected)
        unfreeze_(layer)
        for _ in range(3):
            layer.patch_mixer.gating_block.attn_layer.weight.mul_(1.5)
            y = layer(x)
            unfuse_(layer)
            torch.testing.assert_close(y, layer(x))
            fuse_(layer, backend="cpu")


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_a_layer_on_the_kernels(gated, device) -> None:
    model = patchtsmixer(mode="mix_channel", num_layers=1, gated_attn=gated)
    assert check(model, series(device), backend="triton") == 4


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The names of the functions of ``functional`` that ran."""
    names = []
    for name in ("gated_mixing", "gated_mixer_layer"):
        original = getattr(functional, name)
        monkeypatch.setattr(functional, name, lambda *a, f=original, **k: names.append(f.__name__) or f(*a, **k))
    return names


def test_a_layer_is_one_call(calls) -> None:
    fused = patchtsmixer(mode="mix_channel", num_layers=1).eval()
    fuse_(fused)
    fused(series())
    assert calls == ["gated_mixing", "gated_mixer_layer"]


def test_a_layer_has_the_options_of_fuse(monkeypatch) -> None:
    model = patchtsmixer(num_layers=1).eval()
    fuse_(model, memory="min", backend="torch")
    got = {}
    original = functional.gated_mixer_layer
    monkeypatch.setattr(functional, "gated_mixer_layer", lambda *a, **k: got.update(k) or original(*a, **k))
    model(series())
    assert (got["memory"], got["backend"]) == ("min", "torch")


def test_a_layer_compiles_in_one_graph() -> None:
    layer = patchtsmixer(mode="mix_channel", num_layers=1).eval().model.encoder.mlp_mixer_encoder.mixers[0]
    fuse_(layer)
    x = torch.randn(2, 3, 4, 12)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(run(compiled, x), run(layer, x), strict=True):
        torch.testing.assert_close(ours, theirs)


def hook_a_block(layer: nn.Module) -> None:
    layer.patch_mixer.register_forward_hook(lambda block, _, y: block.seen.append(y))
    layer.patch_mixer.seen = []


def drop_differently(layer: nn.Module) -> None:
    for block, p in ((layer.patch_mixer, 0.2), (layer.feature_mixer, 0.4)):
        block.mlp.dropout1.p = block.mlp.dropout2.p = p
    layer.train()


# What keeps a fused layer from being one call, and which of its blocks then run by the kernels.
BLOCK_BY_BLOCK = {
    "a hook on a block": (hook_a_block, 2),
    "a block unfused": (lambda layer: unfuse_(layer.feature_mixer), 1),
    "a block with another backend": (lambda layer: fuse_(layer.feature_mixer, backend="torch"), 2),
    "another block in its place": (lambda layer: setattr(layer, "patch_mixer", nn.Identity()), 1),
    "a hook on a part": (lambda layer: layer.patch_mixer.mlp.fc1.register_forward_hook(lambda *_: None), 1),
    "other dropout": (drop_differently, 2),
}


@pytest.mark.parametrize(("change", "blocks"), BLOCK_BY_BLOCK.values(), ids=BLOCK_BY_BLOCK)
def test_a_layer_runs_block_by_block_where_it_must(change, blocks, calls) -> None:
    model = patchtsmixer(num_layers=1).eval()
    layer = model.model.encoder.mlp_mixer_encoder.mixers[0]
    x = torch.randn(2, 3, 4, 12)
    fuse_(layer)
    change(layer)
    torch.manual_seed(3)
    y = layer(x)
    assert calls == ["gated_mixing"] * blocks
    if hasattr(layer.patch_mixer, "seen"):
        assert len(layer.patch_mixer.seen) == 1
    unfuse_(layer)
    torch.manual_seed(3)
    torch.testing.assert_close(y, layer(x))


def test_a_layer_of_one_patch_mixes_features() -> None:
    config = TinyTimeMixerConfig(**SMALL, adaptive_patching_levels=0)
    config.num_patches = 1
    report = fuse_(TinyTimeMixerLayer(config))
    assert [(entry.block, entry.detail) for entry in report] == [
        ("TinyTimeMixerLayer", "it has no patch_mixer"),
        ("FeatureMixerBlock", "functional.gated_mixing"),
    ]


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_tspulse_layers(activation) -> None:
    config = TSPulseConfig(
        d_model=12, num_input_channels=3, mode="mix_channel", dropout=0.0, gated_attention_activation=activation
    )
    config.num_patches = 4
    layer = with_trained_looks(TSPulseLayer(config)).eval()
    x = torch.randn(2, 3, 4, 12)
    expected = layer(x)
    assert len(fuse_(layer)) == 4
    torch.testing.assert_close(layer(x), expected)
    unfuse_(layer)
    assert torch.equal(layer(x), expected)


def test_what_is_left() -> None:
    model = patchtsmixer(num_layers=5, self_attn=False)
    layers = model.model.encoder.mlp_mixer_encoder.mixers
    layers[0].patch_mixer = modeling_patchtsmixer.PatchMixerBlock(
        PatchTSMixerConfig(**SMALL, self_attn=True, self_attn_heads=2)
    )
    layers[1].patch_mixer.mlp.fc1.register_forward_hook(lambda *_: None)
    layers[2].feature_mixer.norm.norm = nn.RMSNorm(12)
    layers[3].feature_mixer.gating_block.attn_softmax = nn.Tanh()
    layers[4].feature_mixer.mlp = nn.Identity()
    report = fuse_(model.eval())
    left = {entry.name.split("mixers.")[1]: entry.detail for entry in report.left}
    of_blocks = {
        "0.patch_mixer": "it has self-attention",
        "1.patch_mixer": "mlp has hooks or a replaced forward on a Linear",
        "2.feature_mixer": "its norm is RMSNorm, not LayerNorm or BatchNorm",
        "3.feature_mixer": "its gate has Tanh, not a plain Softmax or Sigmoid",
        "4.feature_mixer": "it has Identity, not PatchTSMixerMLP",
    }
    of_layers = {name.split(".")[0]: f"of its {name.split('.')[1]}: {reason}" for name, reason in of_blocks.items()}
    assert left == of_blocks | of_layers
    assert len(report.fused) == 5
    for options, reason in (
        ({"gate_mode": "glu"}, "its gate is glu, not softmax, sigmoid or group_sigmoid"),
        ({"use_register_context_gating": True}, "its gate depends on register tokens too"),
    ):
        left = fuse_(tinytimemixer(**options)).left
        assert {entry.detail for entry in left} == {reason, f"of its patch_mixer: {reason}"}
    layer = patchtsmixer(num_layers=1).model.encoder.mlp_mixer_encoder.mixers[0]
    layer.patch_mixer.gating_block.attn_softmax = nn.Sigmoid()
    report = fuse_(layer)
    assert [entry.detail for entry in report.left] == ["its blocks have different gates"] and len(report) == 2


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_batch_norm_on_the_kernels(backend, device) -> None:
    model = patchtsmixer(norm_mlp="BatchNorm", mode="mix_channel", num_layers=1)
    assert check(model, series("cpu" if backend == "cpu" else device), backend=backend) == 4


def test_batch_norm_in_training_takes_its_batch(calls, said) -> None:
    model, x = patchtsmixer(norm_mlp="BatchNorm", num_layers=1, dropout=0.0, head_dropout=0.0).train(), series()
    twin = copy.deepcopy(model)
    report = fuse_(model)
    assert {entry.detail.partition(": ")[2] for entry in report} == {
        "its BatchNorm takes its statistics from the batch"
    }
    for _ in range(2):
        assert torch.equal(forecasts(model(x)), forecasts(twin(x)))
    assert not calls and all("statistics from the batch" in message for message in said)
    for ours, theirs in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    with torch.no_grad():  # and then what training has left, written to in place
        for _ in range(3):
            torch.testing.assert_close(forecasts(model.eval()(x)), forecasts(twin.eval()(x)))
            for m in (model, twin):
                next(b for name, b in m.named_buffers() if name.endswith("running_mean")).add_(1.0)
    assert calls == ["gated_mixer_layer"] * 3
    fuse_(model, backend="cpu")
    assert freeze_(model).frozen
    with torch.no_grad():
        for m in (model, twin):
            next(b for name, b in m.named_buffers() if name.endswith("running_var")).mul_(3.0)
        torch.testing.assert_close(forecasts(model(x)), forecasts(twin(x)))


def test_a_frozen_batch_norm_takes_its_map_anew() -> None:
    """What is made of its statistics lives for a call: another call's lies elsewhere."""
    for model in (patchtsmixer(norm_mlp="BatchNorm"), tinytimemixer(norm_mlp="BatchNorm")):
        twin, x = copy.deepcopy(model.eval()), series()
        fuse_(model, backend="cpu")
        assert freeze_(model).frozen
        held = []
        with torch.no_grad():
            for _ in range(6):
                torch.testing.assert_close(forecasts(model(x)), forecasts(twin(x)))
                held.append(torch.full((12,), torch.nan))  # where the last call's map was


@pytest.mark.parametrize(("owner", "name", "value"), [("", "gated_attn", False), ("gating_block.", "mode", "sigmoid")])
def test_a_frozen_block_sees_another_gate(owner, name, value) -> None:
    """Its packs were made for the gate that it had."""
    model, x = tinytimemixer(gate_mode="group_sigmoid", gate_groups=3).eval(), series()
    fuse_(model, backend="cpu")
    assert freeze_(model).frozen
    mixer = next(m for m in model.modules() if getattr(m, "gated_attn", False))
    with torch.no_grad():
        for _ in range(2):
            model(x)
        setattr(mixer.get_submodule(owner.rstrip(".")), name, value)
        with pytest.raises(RuntimeError, match=f"is frozen, but its .*{name} was written to, replaced or converted"):
            model(x)


def test_batch_norm_in_sixteen_bits_is_eagers(calls, said) -> None:
    model, x = patchtsmixer(norm_mlp="BatchNorm", num_layers=1).eval().bfloat16(), series().bfloat16()
    expected = forecasts(model(x))
    fuse_(model)
    assert torch.equal(forecasts(model(x)), expected) and not calls
    assert said and all("would round more" in message for message in said)


def test_layers_with_two_kinds_of_norm_run_block_by_block(calls) -> None:
    layer = patchtsmixer(num_layers=1).eval().model.encoder.mlp_mixer_encoder.mixers[0]
    other = patchtsmixer(num_layers=1, norm_mlp="BatchNorm").eval().model.encoder.mlp_mixer_encoder.mixers[0]
    layer.patch_mixer = other.patch_mixer
    x = torch.randn(2, 3, 4, 12)
    expected = layer(x)
    report = fuse_(layer)
    assert [entry.detail for entry in report.left] == ["its blocks have different norms"]
    torch.testing.assert_close(layer(x), expected)
    assert calls == ["gated_mixing"] * 2


def test_active_dropout_goes_through_the_kernels(monkeypatch) -> None:
    model = patchtsmixer(dropout=0.3, mode="mix_channel")
    fuse_(model.train())
    drawn = []
    for name in ("gated_mixing", "gated_mixer_layer"):
        original = getattr(functional, name)
        monkeypatch.setattr(
            functional, name, lambda *a, f=original, **k: drawn.append((f.__name__, k["dropout_p"])) or f(*a, **k)
        )
    model(series())
    model.eval()(series())
    expected = [(name, p) for p in (0.3, 0.0) for _ in range(2) for name in ("gated_mixing", "gated_mixer_layer")]
    assert drawn == expected


def test_dropouts_that_differ_are_computed_as_before() -> None:
    model = patchtsmixer(dropout=0.3)
    for layer in model.model.encoder.mlp_mixer_encoder.mixers:
        layer.patch_mixer.mlp.dropout2.p = layer.feature_mixer.mlp.dropout1.p = 0.1
    x = series()
    torch.manual_seed(3)
    expected = run(model.train(), x, forecasts)
    report = fuse_(model)
    reason = "but not in this mode: the dropouts have different probabilities"
    assert all(reason in entry.detail for entry in report.fused)
    torch.manual_seed(3)
    assert all(torch.equal(a, b) for a, b in zip(expected, run(model, x, forecasts), strict=True))
