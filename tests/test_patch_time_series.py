"""fuse_ on the models that mix patches of time series: PatchTSMixer, TinyTimeMixer, TSPulse."""

from __future__ import annotations

import pytest
import torch
import tsfm_stub
from parity import check_fused, run
from torch import Tensor, nn
from transformers import PatchTSMixerConfig, PatchTSMixerForPrediction
from transformers.models.patchtsmixer import modeling_patchtsmixer

from mixer_kernels import functional, fuse_, unfuse_

tsfm_stub.define_packages()
from tsfm_public.models.tinytimemixer import TinyTimeMixerConfig, TinyTimeMixerForPrediction  # noqa: E402
from tsfm_public.models.tspulse import TSPulseConfig  # noqa: E402
from tsfm_public.models.tspulse.modeling_tspulse import TSPulseLayer  # noqa: E402

SMALL = {
    "context_length": 32, "patch_length": 8, "patch_stride": 8, "num_input_channels": 3, "prediction_length": 6,
    "d_model": 12, "num_layers": 2,
}  # fmt: skip


def patchtsmixer(**config) -> PatchTSMixerForPrediction:
    return with_trained_looks(PatchTSMixerForPrediction(PatchTSMixerConfig(**SMALL | config)))


def tinytimemixer(**config) -> TinyTimeMixerForPrediction:
    """Adaptive patching as published: each level has twice the patches of half the features."""
    levels = {"adaptive_patching_levels": 2, "decoder_num_layers": 1, "decoder_d_model": 10}
    return with_trained_looks(TinyTimeMixerForPrediction(TinyTimeMixerConfig(**SMALL | levels | config)))


def with_trained_looks(model: nn.Module) -> nn.Module:
    """Norms and biases that are not 1 and 0, gates that are not all alike."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5) * torch.randn_like(parameter)
    return model


def series(device: str = "cpu") -> Tensor:
    return torch.randn(2, 32, 3, device=device).cumsum(1)


def forecasts(outputs) -> Tensor:
    return outputs.prediction_outputs


def check(model: nn.Module, x: Tensor, **options) -> int:
    """Forecasts and gradients before, while and after; how many blocks were fused, which must be all."""
    report = check_fused(model, x, forecasts, **options)
    assert not report.left and {entry.detail for entry in report.fused} == {"functional.gated_mixing"}
    return len(report)


# A model, and how many blocks it has.
MODELS = {
    "PatchTSMixer": (lambda: patchtsmixer(), 2 * 2),
    "PatchTSMixer, mixing channels": (lambda: patchtsmixer(mode="mix_channel"), 2 * 3),
    "PatchTSMixer without gates": (lambda: patchtsmixer(gated_attn=False, mode="mix_channel"), 2 * 3),
    "TinyTimeMixer": (lambda: tinytimemixer(), 2 * 2 * 2 + 2),
    "TinyTimeMixer, mixing channels": (lambda: tinytimemixer(decoder_mode="mix_channel"), 2 * 2 * 2 + 3),
}


@pytest.mark.parametrize(("make", "blocks"), MODELS.values(), ids=MODELS)
def test_models(make, blocks) -> None:
    assert check(make(), series()) == blocks


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_a_layer_on_the_kernels(gated, device) -> None:
    model = patchtsmixer(mode="mix_channel", num_layers=1, gated_attn=gated)
    assert check(model, series(device), backend="triton") == 3


def test_tspulse_layers() -> None:
    config = TSPulseConfig(d_model=12, num_input_channels=3, mode="mix_channel", dropout=0.0)
    config.num_patches = 4
    layer = with_trained_looks(TSPulseLayer(config)).eval()
    x = torch.randn(2, 3, 4, 12)
    expected = layer(x)
    assert len(fuse_(layer)) == 3
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
    layers[2].feature_mixer.norm = modeling_patchtsmixer.PatchTSMixerNormLayer(
        PatchTSMixerConfig(**SMALL, norm_mlp="BatchNorm")
    )
    layers[3].feature_mixer.gating_block.attn_softmax = nn.Sigmoid()
    layers[4].feature_mixer.mlp = nn.Identity()
    report = fuse_(model.eval())
    left = {entry.name.split("mixers.")[1]: entry.detail for entry in report.left}
    assert left == {
        "0.patch_mixer": "it has self-attention",
        "1.patch_mixer": "mlp has hooks or a replaced forward on a Linear",
        "2.feature_mixer": "its norm is PatchTSMixerBatchNorm, not LayerNorm",
        "3.feature_mixer": "its gate has Sigmoid, not a plain Softmax",
        "4.feature_mixer": "it has Identity, not PatchTSMixerMLP",
    }
    assert len(report.fused) == 5
    for mode in ("sigmoid", "glu", "group_sigmoid"):
        assert {entry.detail for entry in fuse_(tinytimemixer(gate_mode=mode)).left} == {
            f"its gate is {mode}, not softmax"
        }


def test_active_dropout_goes_through_the_kernels(monkeypatch) -> None:
    model = patchtsmixer(dropout=0.3, mode="mix_channel")
    fuse_(model.train())
    drawn = []
    original = functional.gated_mixing
    monkeypatch.setattr(functional, "gated_mixing", lambda *a, **k: drawn.append(k["dropout_p"]) or original(*a, **k))
    model(series())
    model.eval()(series())
    assert drawn == [0.3] * 6 + [0.0] * 6


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
