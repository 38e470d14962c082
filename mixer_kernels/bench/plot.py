"""The report as a picture: one panel a batch size, one bar a provider. Needs matplotlib."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .report import Row, model_name, significant

# Okabe and Ito's palette: told apart with any colour vision, and in print.
_COLORS = {"eager": "#999999", "compile": "#56B4E9", "bare": "#DDDDDD", "torch": "#009E73", "triton": "#D55E00"}
_COLORS |= {"triton fast": _COLORS["triton"], "triton min": "#E69F00"}
_COLORS |= {"cuda": "#0072B2", "cuda fast": "#0072B2", "cuda min": "#F0E442"}
_COLORS |= {"cuda:sm90": "#003E5C", "cuda:sm90 fast": "#003E5C", "cuda:sm90 min": "#9A8F1D"}
_COLORS |= {"cpu": "#D55E00"}  # beside no Triton
_OTHER_COLOR = "#CC79A7"
_LABELS = {
    "eager": "eager PyTorch",
    "compile": "torch.compile",
    "bare": "bare products",
    "torch": "torch backend",
    "cpu": "CPU kernels",
    "triton": "Triton kernels",
    "triton fast": 'Triton, memory="fast"',
    "triton min": 'Triton, memory="min"',
    "cuda": "CUDA kernels",
    "cuda fast": 'CUDA, memory="fast"',
    "cuda min": 'CUDA, memory="min"',
    "cuda:sm90": "Hopper kernels",
    "cuda:sm90 fast": 'Hopper, memory="fast"',
    "cuda:sm90 min": 'Hopper, memory="min"',
}


def check_plot(path: str | Path) -> None:
    """Raise before anything is measured: RuntimeError without matplotlib, ValueError for an unknown suffix."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise RuntimeError("--plot needs matplotlib: pip install 'mixer_kernels[bench]'") from None
    formats = sorted(FigureCanvasBase.get_supported_filetypes())
    if Path(path).suffix[1:].lower() not in formats:
        raise ValueError(f"--plot: the file name must end in one of .{', .'.join(formats)}, got {str(path)!r}")


def plot(rows: Sequence[Row], device_name: str, path: str | Path) -> None:
    """Write images per second by provider to ``path``; its suffix says the format.

    Args:
        rows: of one model at one dtype, grouped by batch size.
    """
    check_plot(path)
    from matplotlib.figure import Figure  # no pyplot: no window, no global state

    panels = [list(group) for _, group in itertools.groupby(rows, key=lambda row: row.group)]
    bars = max(len(panel) for panel in panels)
    height = 0.9 + len(panels) * (0.45 + 0.34 * bars)
    figure = Figure(figsize=(7.2, height), layout="constrained")
    what = "training step" if rows[0].mode == "train" else "inference"
    figure.suptitle(
        f"{'Mixer-' if rows[0].S else ''}{model_name(rows[0])}, {what}, {rows[0].dtype}, {device_name}",
        fontsize=12,
        fontweight="bold",
    )
    for axes, panel in zip(figure.subplots(len(panels), squeeze=False).flat, panels, strict=True):
        _draw_panel(axes, panel)
    figure.supxlabel("images per second", fontsize=10)
    figure.savefig(path, dpi=160)


def _draw_panel(axes: Any, rows: list[Row]) -> None:
    speeds = [row.images_per_s or 0.0 for row in rows]
    places = range(len(rows))
    colors = [_COLORS.get(row.provider, _OTHER_COLOR) for row in rows]
    axes.barh(places, speeds, color=colors, height=0.72)
    axes.set_yticks(places, [_LABELS.get(row.provider, row.provider) for row in rows])
    axes.invert_yaxis()
    axes.set_title(f"batch {rows[0].batch_size}", loc="left", fontsize=10)
    longest = max(speeds) or 1.0
    axes.set_xlim(0, longest * 1.28)  # room for the labels
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter("{x:,.0f}" if longest >= 10 else "{x:g}")
    for place, row in zip(places, rows, strict=True):
        axes.text((row.images_per_s or 0.0) + longest * 0.01, place, _bar_label(row), va="center", fontsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _bar_label(row: Row) -> str:
    if row.images_per_s is None:
        return (row.reason or "").split(":")[0]
    speed = significant(row.images_per_s)
    show_ratio = row.speedup_vs_eager is not None and row.provider not in ("eager", "bare")
    return f"{speed}  ({row.speedup_vs_eager:.2f}x eager)" if show_ratio else speed
