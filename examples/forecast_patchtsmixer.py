"""Forecast carbon dioxide in the air with a PatchTSMixer, its layers computed by the fused kernels.

    python examples/forecast_patchtsmixer.py

The data are the weekly means of the Mauna Loa observatory, 1958 to 2001, that come with statsmodels: nothing is
downloaded. The model, of the size of a TinyTimeMixer, sees two years and forecasts half a year; the last tenth of the
weeks is held out. It takes about a minute on a CPU. Last come the forecasts a second of the fused and of the unfused
model on this machine. Needs: pip install transformers statsmodels
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time

import numpy as np
import torch
from statsmodels.datasets import co2
from torch import Tensor
from torch.utils.benchmark import Timer
from transformers import PatchTSMixerConfig, PatchTSMixerForPrediction

from mixer_kernels import fuse_, unfuse_
from mixer_kernels.backends import CHOICES

CONTEXT, HORIZON, YEAR = 104, 26, 52  # in weeks
BATCH_SIZE = 64
TIMED_BATCH_SIZE = 32
LEARNING_RATE = 3e-3


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)  # the products are small: more threads would wait for each other more than they compute
    torch.manual_seed(0)
    training, test = (windows(part).to(args.device) for part in split(load_series()))

    config = PatchTSMixerConfig(
        context_length=CONTEXT, prediction_length=HORIZON, patch_length=8, patch_stride=8, d_model=192, num_layers=3,
        num_input_channels=1, dropout=0.0, head_dropout=0.0,
    )  # fmt: skip
    model = PatchTSMixerForPrediction(config).to(args.device)
    print(fuse_(model, backend=args.backend))
    train(model, training, args.epochs)

    forecast, fused = predict(model, test), copy.deepcopy(model)
    unfuse_(model)
    difference = (predict(model, test) - forecast).abs().max().item()
    past, future = test[:, :CONTEXT], test[:, CONTEXT:]
    last_year = past[:, -YEAR : HORIZON - YEAR] + past[:, -1:] - past[:, -YEAR - 1 : -YEAR]
    print(f"\nmean absolute error over {len(test)} windows of {HORIZON} weeks, in parts per million:")
    print(f"  PatchTSMixer                        {error(forecast, future):.3f}")
    print(f"  last year's weeks plus its growth   {error(last_year, future):.3f}")
    print(f"forecasts differ from the unfused model's by at most {difference:.1g} parts per million")

    unfused_rate, fused_rate = rates([model, fused], test[:TIMED_BATCH_SIZE])
    where = "of one thread" if args.device == "cpu" else f"on {args.device}"
    print(f"\nforecasts a second {where}, batches of {TIMED_BATCH_SIZE}:")
    print(f"  unfused   {unfused_rate:9,.0f}")
    print(f"  fused     {fused_rate:9,.0f}   {fused_rate / unfused_rate:.2f} times")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", choices=CHOICES, default=None, help="of the fused layers")
    return parser.parse_args()


def load_series() -> np.ndarray:
    """Parts per million, one for each week; a few weeks without a measurement are interpolated."""
    return co2.load_pandas().data["co2"].interpolate().to_numpy(np.float32)


def split(series: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The weeks to train on, and the last tenth with the context of its first forecast."""
    first = len(series) - len(series) // 10
    return series[:first], series[first - CONTEXT :]


def windows(series: np.ndarray) -> Tensor:
    """``[windows, CONTEXT + HORIZON, 1]``, one starting in each week."""
    return torch.from_numpy(series).unfold(0, CONTEXT + HORIZON, 1)[..., None]


def train(model: PatchTSMixerForPrediction, data: Tensor, epochs: int) -> None:
    batches = -(-len(data) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, epochs=epochs, steps_per_epoch=batches)
    start = time.perf_counter()
    model.train()
    for epoch in range(1, epochs + 1):
        for batch in torch.randperm(len(data), device=data.device).split(BATCH_SIZE):
            past, future = data[batch].split((CONTEXT, HORIZON), dim=1)
            # Relative to each window's spread, as the model scales its input: early and late years count alike.
            error = (model(past).prediction_outputs - future) / past.std(1, keepdim=True)
            loss = error.abs().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        show_progress(epoch, epochs, f"loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s")


@torch.inference_mode()
def predict(model: PatchTSMixerForPrediction, data: Tensor) -> Tensor:
    return model.eval()(data[:, :CONTEXT]).prediction_outputs


def rates(models: list[PatchTSMixerForPrediction], data: Tensor) -> list[float]:
    """Forecasts a second of each, timed in turns."""
    timers = [Timer("predict(model, data)", globals={"predict": predict, "model": m, "data": data}) for m in models]
    rounds = [[timer.blocked_autorange(min_run_time=0.3).median for timer in timers] for _ in range(5)]
    return [len(data) / statistics.median(times) for times in zip(*rounds, strict=True)]


def error(forecast: Tensor, future: Tensor) -> float:
    return (forecast - future).abs().mean().item()


def show_progress(epoch: int, epochs: int, text: str) -> None:
    """One line that is rewritten on a terminal, and a line now and then in a log."""
    terminal = sys.stderr.isatty()
    if terminal or epoch == epochs or epoch % max(epochs // 5, 1) == 0:
        start, end = ("\r", "" if epoch < epochs else "\n") if terminal else ("", "\n")
        print(f"{start}epoch {epoch:{len(str(epochs))}}/{epochs}: {text}  ", end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
