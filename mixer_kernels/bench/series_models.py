"""Models of time series that the report knows, with random weights: PatchTSMixer, and TinyTimeMixer as TTM-r2."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

CONTEXT, CHANNELS, PREDICTION = 512, 7, 96


def series_model(name: str) -> nn.Module:
    """One of ``SERIES_MODELS``, with the same weights in every process.

    Raises:
        RuntimeError: its library is not installed, or does not import; the message says which, and what to install.
    """
    torch.manual_seed(0)
    try:
        return SERIES_MODELS[name]()
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"--model {name} needs transformers, and ttm granite-tsfm too: pip install 'mixer_kernels[bench-cpu]' "
            f"({error})"
        ) from error
    except ImportError as error:
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        raise RuntimeError(f"--model {name}: its library is installed, but does not import: {root}") from error


def _patchtsmixer() -> nn.Module:
    from transformers import PatchTSMixerConfig, PatchTSMixerForPrediction

    return PatchTSMixerForPrediction(
        PatchTSMixerConfig(
            context_length=CONTEXT, prediction_length=PREDICTION, num_input_channels=CHANNELS, patch_length=8,
            patch_stride=8, d_model=16, num_layers=8, expansion_factor=2, gated_attn=True, scaling="std",
        )
    )  # fmt: skip


def _tinytimemixer() -> nn.Module:
    _allow_models_alone("tsfm_public")
    from tsfm_public.models.tinytimemixer import TinyTimeMixerConfig, TinyTimeMixerForPrediction

    return TinyTimeMixerForPrediction(
        TinyTimeMixerConfig(
            context_length=CONTEXT, prediction_length=PREDICTION, num_input_channels=CHANNELS, patch_length=64,
            patch_stride=64, d_model=192, num_layers=2, adaptive_patching_levels=3, expansion_factor=2,
            gated_attn=True, dropout=0.2, use_decoder=True, decoder_num_layers=2, decoder_d_model=128,
            decoder_mode="common_channel", scaling="std",
        )
    )  # fmt: skip


SERIES_MODELS: dict[str, Callable[[], nn.Module]] = {"ptsm": _patchtsmixer, "ttm": _tinytimemixer}


def _allow_models_alone(package: str) -> None:
    """granite-tsfm imports all of its toolkit first, with data sets and pipelines; its models need transformers alone:
    where the toolkit cannot be imported, they are imported without it."""
    try:
        importlib.import_module(package)
    except ImportError:
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:
            raise
        folder = Path(found.origin).parent
        for name, path in ((package, folder), (f"{package}.models", folder / "models")):
            module = ModuleType(name)
            module.__path__ = [str(path)]
            sys.modules[name] = module


class Forecast(nn.Module):
    """``past_values [B, CONTEXT, CHANNELS]`` to the forecast alone, as exporters want it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, past_values: Tensor) -> Tensor:
        return self.model(past_values=past_values).prediction_outputs
