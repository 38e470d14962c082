"""fuse_ on the TSMixers of darts and neuralforecast: their own layers, and training by their own ``fit``."""

from __future__ import annotations

import copy
import logging
import pickle

import neuralforecast_stub
import pandas as pd
import pytest
import statsmodels.datasets
import torch
from parity import check_fused
from torch import Tensor, nn

from mixer_kernels import freeze_, functional, fuse_, unfuse_

neuralforecast_stub.define_packages()
from darts import TimeSeries  # noqa: E402
from darts.models import TSMixerModel  # noqa: E402
from darts.models.components import layer_norm_variants  # noqa: E402
from darts.models.forecasting import tsmixer_model as darts  # noqa: E402
from neuralforecast.models import tsmixer, tsmixerx  # noqa: E402
from neuralforecast.tsdataset import TimeSeriesDataset  # noqa: E402

S, C = 10, 21


class ConditionalLayer(nn.Module):
    """darts' layer on its input alone, with static covariates of its own, and what is in front of it."""

    def __init__(self, static: int = 0, norm: type = layer_norm_variants.LayerNorm, **of_layer) -> None:
        super().__init__()
        of_both = {"activation": nn.ReLU(), "dropout": 0.0, "normalize_before": False, "norm_type": norm} | of_layer
        self.hist = darts._FeatureMixing(sequence_length=S, input_dim=5, output_dim=C, ff_size=13, **of_both)
        self.layer = darts._ConditionalMixerLayer(S, C, C, static, 13, **of_both)
        self.register_buffer("x_static", torch.randn(1, S, static))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.hist(x), self.x_static.expand(len(x), -1, -1))


class WithStaticExogenous(nn.Module):
    """neuralforecast's layer with them, after the model's first mixing of features."""

    def __init__(self) -> None:
        super().__init__()
        self.hist = tsmixerx.FeatureMixing(5, C, S, 0.0, C)
        self.layer = tsmixerx.MixingLayerWithStaticExogenous(S, 0.0, C, 3)
        self.register_buffer("x_static", torch.randn(1, S, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer((self.hist(x), self.x_static.expand(len(x), -1, -1)))[0]


def exogenous() -> nn.Module:
    return nn.Sequential(tsmixerx.FeatureMixing(5, C, S, 0.0, C), tsmixerx.MixingLayer(C, C, S, 0.0, C))


def multivariate() -> nn.Module:
    return nn.Sequential(*[tsmixer.MixingLayer(5, S, 0.9, 16) for _ in range(2)])


MODELS = {  # and how many blocks they have
    "darts": (lambda: ConditionalLayer(), 1 + 3),
    "darts, static": (lambda: ConditionalLayer(static=4, norm=layer_norm_variants.LayerNormNoBias), 4),
    "darts, norm first, GELU": (lambda: ConditionalLayer(normalize_before=True, activation=nn.GELU()), 1 + 3),
    "darts, BatchNorm": (lambda: ConditionalLayer(norm=darts.TimeBatchNorm2d), 1 + 3),
    "TSMixerx": (exogenous, 1 + 3),
    "TSMixerx, static": (WithStaticExogenous, 4),
    "TSMixer": (multivariate, 2 * 3),
}


def with_trained_looks(model: nn.Module) -> nn.Module:
    """Norms and biases that are not 1 and 0, statistics of series."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5) * torch.randn_like(parameter)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_layers_on_the_kernels(name) -> None:
    make, number = MODELS[name]
    report = check_fused(with_trained_looks(make()), torch.randn(3, S, 5), backend="cpu")
    assert len(report.fused) == number
    functions = {entry.detail.removeprefix("functional.") for entry in report.fused}
    assert functions >= {"time_mixing", "feature_mixing"} and ("tsmixer_layer" in functions) == ("static" not in name)
    assert [entry.detail for entry in report.left] in ([], ["it has static covariates"])


@pytest.mark.parametrize("name", ("darts, static", "TSMixerx"))
def test_layers_in_16_bits_and_under_autocast(name) -> None:
    model, x = with_trained_looks(MODELS[name][0]()), torch.randn(3, S, 5)
    check_fused(copy.deepcopy(model), x.bfloat16(), backend="cpu")
    exact = model.eval()(x)
    with torch.autocast("cpu", torch.bfloat16):
        fuse_(model, backend="cpu")
        torch.testing.assert_close(model(x), exact, rtol=0.05, atol=0.05)


def test_a_model_compiles_in_one_graph() -> None:
    model, x = ConditionalLayer(dropout=0.2), torch.randn(3, S, 5)
    fuse_(model, backend="cpu")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for mode in (False, True):
        results = []
        for run in (compiled, model.train(mode)):
            torch.manual_seed(3)
            y = run(x)
            results.append((y, *torch.autograd.grad(y.square().sum(), [*model.parameters()])))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.fixture
def drawn(monkeypatch) -> list[float]:
    """With what probability of dropout the functions ran."""
    seen = []
    for name in ("time_mixing", "feature_mixing", "tsmixer_layer"):
        original = getattr(functional, name)
        monkeypatch.setattr(functional, name, lambda *a, f=original, **k: seen.append(k["dropout_p"]) or f(*a, **k))
    return seen


def test_monte_carlo_dropout_of_darts(drawn) -> None:
    """Its switch draws in evaluation mode, also between calls that repeat one another."""
    model, x = ConditionalLayer(dropout=0.3).eval(), torch.randn(3, S, 5)
    fuse_(model, backend="cpu")
    drops = [module for module in model.modules() if isinstance(module, darts.MonteCarloDropout)]
    with torch.no_grad():
        results = []
        for switched_on in (False, False, True, True, False):
            for drop in drops:
                drop._mc_dropout_enabled = switched_on
            results.append(model(x))
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[4])
        assert not torch.equal(results[2], results[3])
    model.train()(x)
    assert set(drawn) == {0.0, 0.3} and drawn.count(0.3) == 6


def test_batch_norm_in_training_and_in_16_bits_is_the_models_own(drawn, said) -> None:
    for model in (ConditionalLayer(norm=darts.TimeBatchNorm2d), multivariate()):
        x, twin = torch.randn(3, S, 5), copy.deepcopy(model)
        fuse_(model, backend="cpu")
        torch.manual_seed(3)
        y = model.train()(x)
        torch.manual_seed(3)
        assert torch.equal(y, twin.train()(x))
        assert torch.equal(model.eval().bfloat16()(x.bfloat16()), twin.eval().bfloat16()(x.bfloat16()))
    assert not drawn and any("from the batch" in m for m in said) and any("would round more" in m for m in said)


def test_weights_that_change_are_seen_frozen_or_not() -> None:
    for make in (exogenous, multivariate):
        model, x = with_trained_looks(make()).eval(), torch.randn(3, S, 5)
        twin = copy.deepcopy(model)
        fuse_(model, backend="cpu")
        assert not freeze_(model).frozen  # nothing is kept of these
        with torch.no_grad():
            for _ in range(3):
                torch.testing.assert_close(model(x), twin(x), rtol=1e-4, atol=1e-4)
                for m in (model, twin):
                    for parameter in m.parameters():
                        parameter.mul_(1.1)
        again = pickle.loads(pickle.dumps(model))
        assert torch.equal(again(x), model(x)) and type(again[0]) is type(model[0])
        assert len(unfuse_(again)) and torch.equal(again(x), twin(x))


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The names of the functions of ``functional`` that ran."""
    names = []
    for name in ("time_mixing", "feature_mixing", "tsmixer_layer"):
        original = getattr(functional, name)
        monkeypatch.setattr(functional, name, lambda *a, f=original, **k: names.append(f.__name__) or f(*a, **k))
    return names


# What keeps a fused layer from being one call, and which of its blocks then run by the kernels.
BLOCK_BY_BLOCK = {
    "nothing": (lambda layer: None, ["tsmixer_layer"]),
    "a hook on a block": (
        lambda layer: layer.time_mixing.register_forward_hook(lambda *_: None), ["time_mixing", "feature_mixing"],
    ),
    "a block unfused": (lambda layer: unfuse_(layer.feature_mixing), ["time_mixing"]),
    "a hook on a part": (
        lambda layer: layer.feature_mixing.fc1.register_forward_hook(lambda *_: None), ["time_mixing"],
    ),
    "another block in its place": (lambda layer: setattr(layer, "time_mixing", nn.Identity()), ["feature_mixing"]),
    "another activation": (lambda layer: setattr(layer.time_mixing, "activation", nn.Tanh()), ["feature_mixing"]),
    "static covariates": (lambda layer: setattr(layer, "feature_mixing_static", Nothing()),
                          ["time_mixing", "feature_mixing"]),
}  # fmt: skip


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[..., :0]


@pytest.mark.parametrize(("change", "expected"), BLOCK_BY_BLOCK.values(), ids=BLOCK_BY_BLOCK)
def test_a_layer_runs_block_by_block_where_it_must(change, expected, calls) -> None:
    layer, x = ConditionalLayer().layer.eval(), torch.randn(3, S, C)
    fuse_(layer, backend="cpu")
    change(layer)
    with torch.no_grad():
        y = layer(x, x)
        assert calls == expected
        fuse_(layer)
        torch.testing.assert_close(layer(x, x), y)
        unfuse_(layer)
        torch.testing.assert_close(y, layer(x, x))


def test_what_is_left() -> None:
    model = ConditionalLayer(activation=nn.Tanh())
    model.hist = ConditionalLayer(norm=nn.RMSNorm).hist
    model.other = exogenous()
    model.other[0].feature_drop_1 = nn.Identity()
    model.other[1].temporal_mixer.temporal_norm = nn.LayerNorm(C)
    model.other[1].feature_mixer.feature_lin_1.register_forward_hook(lambda *_: None)
    left = {entry.name: entry.detail for entry in fuse_(model).left}
    activation = "its activation is not a plain ReLU, GELU or SiLU"
    assert left == {
        "layer": f"of its time_mixing: {activation}",
        "other.1": f"of its temporal_mixer: its norm normalises ({C},), not ({S}, {C})",
        "hist": "its norm is RMSNorm, not LayerNorm or BatchNorm",
        "layer.time_mixing": activation,
        "layer.feature_mixing": activation,
        "other.0": "it has Identity, not a plain Dropout",
        "other.1.temporal_mixer": f"its norm normalises ({C},), not ({S}, {C})",
        "other.1.feature_mixer": "it has hooks or a replaced forward on a Linear",
    }


def test_an_activation_that_is_no_module_is_left() -> None:
    report = fuse_(ConditionalLayer(activation=torch.relu))
    assert len(report.left) == 4 and not report.fused


def weekly_series() -> pd.Series:
    """Carbon dioxide at Mauna Loa, as statsmodels brings it along; standardised."""
    series = statsmodels.datasets.co2.load_pandas().data["co2"].interpolate()[-300:]
    return (series - series.mean()) / series.std()


LIGHTNING = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False,
}  # fmt: skip


def losses_of_darts(fuse: bool) -> list[float]:
    series = TimeSeries.from_values(weekly_series().to_numpy("float32")[:, None])
    model = TSMixerModel(24, 12, hidden_size=16, ff_size=16, dropout=0.0, n_epochs=1, random_state=1,
                         pl_trainer_kwargs=LIGHTNING)  # fmt: skip
    model.fit(series[:60], epochs=0)
    return fitted(model.model, fuse, lambda: model.fit(series, epochs=2), lambda h: model.predict(h).values())


def losses_of_neuralforecast(fuse: bool) -> list[float]:
    series = weekly_series()
    frame = pd.DataFrame({"unique_id": "co2", "ds": range(len(series)), "y": series.to_numpy("float32")})
    dataset, *_ = TimeSeriesDataset.from_df(frame)
    model = tsmixerx.TSMixerx(h=12, input_size=24, n_series=1, ff_dim=16, max_steps=6, val_check_steps=6, **LIGHTNING)
    return fitted(model, fuse, lambda: model.fit(dataset), lambda h: model.predict(dataset))


def fitted(module: nn.Module, fuse: bool, fit, predict) -> list[float]:
    losses = []
    if fuse:
        assert len(fuse_(module, backend="cpu").fused) >= 5
    original = module.training_step

    def noted(*arguments, **named):
        losses.append(original(*arguments, **named))
        return losses[-1]

    module.training_step = noted
    fit()
    return [float(loss.detach()) for loss in losses] + [float(torch.as_tensor(predict(12)).mean())]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # the libraries' own, in training
@pytest.mark.parametrize("losses", (losses_of_darts, losses_of_neuralforecast))
def test_their_own_fit(losses, monkeypatch) -> None:
    """Step for step the losses of the model as it is."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    eager, fused = losses(fuse=False), losses(fuse=True)
    assert len(fused) >= 7
    torch.testing.assert_close(torch.tensor(fused), torch.tensor(eager), rtol=1e-3, atol=1e-3)
