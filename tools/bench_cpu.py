"""`make bench-cpu`: models on this CPU into benchmarks/results/cpu, and from there into the README.

Runs ``python -m mixer_kernels bench --device cpu``: for each model of time series inference and training, and at one
batch size its variants; for MLP-Mixers inference. Writes benchmarks/results/cpu/<model>.json with all rows, and draws
their tables in README.md and the plot, light and dark.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/cpu"
MODELS = {"ptsm": "PatchTSMixer", "ttm": "TinyTimeMixer (TTM-r2)"}
MIXERS = {"mixer-s32": "S/32", "mixer-b16": "B/16"}
MIXER_BATCH_SIZES = ("1", "8")
MODES = {"infer": "inference", "train": "training step"}
BASELINES = ("compile", "ort", "openvino")
# Beside eager alone: what is added to the command, and to the environment, where every library is told.
VARIANTS = {
    "AVX2": (
        (),
        {
            "MIXER_KERNELS_CPU_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
            "ONEDNN_MAX_CPU_ISA": "AVX2",
        },
    ),
    "two threads": (("--threads", "2"), {}),
    "bfloat16": (("--dtype", "bf16"), {}),
}  # fmt: skip
VARIANTS_BATCH_SIZE = "32"
BEGIN, END = "<!-- bench-cpu {}: written by `make bench-cpu` -->", "<!-- bench-cpu {}: end -->"
LABELS = {"compile": "torch.compile", "ort": "ONNX Runtime", "openvino": "OpenVINO", "mixer_kernels": "mixer_kernels"}
# Okabe and Ito's palette: told apart with any colour vision, on white and on black.
COLORS = {"compile": "#56B4E9", "ort": "#E69F00", "openvino": "#CC79A7", "mixer_kernels": "#009E73"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="*", choices=[*MODELS, *MIXERS], default=[*MODELS, *MIXERS])
    parser.add_argument("--batch-size", nargs="+", default=["1", "32", "256"], metavar="N", help="of time series")
    parser.add_argument("--baseline", nargs="*", choices=BASELINES, default=list(BASELINES))
    parser.add_argument("--seconds", default="10", help="to time each provider of a row (default: %(default)s)")
    parser.add_argument("--draw", action="store_true", help="measure nothing: tables and plot from what is there")
    arguments = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in () if arguments.draw else arguments.model:
        report = of_mixer(name, arguments) if name in MIXERS else of_series(name, arguments)
        path_of(name).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    series, mixers = ([json.loads(path_of(name).read_text("utf-8")) for name in names] for names in (MODELS, MIXERS))
    rows = rows_of(series)
    for name, text in (("light", "#1f2328"), ("dark", "#e6edf3")):
        plot(rows, text, RESULTS / f"speed-{name}.svg")
    write_readme({"series": series_section(series), "mixers": mixers_table(mixers)})
    return 0


def path_of(name: str) -> Path:
    return RESULTS / f"{name}.json"


def rows_of(reports: list[dict]) -> list[dict]:
    return [row for report in reports for row in report["rows"]]


def of_series(model: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Inference and training; of the variants' runs the rows alone."""
    runs = []
    for mode in MODES:  # in training there is nothing to measure of providers that do not train
        baselines = [name for name in arguments.baseline if mode == "infer" or name == "compile"]
        sizes = ("--batch-size", *arguments.batch_size)
        runs.append(measured(arguments, model, "--mode", mode, "--threads", "1", *sizes, "--baseline", *baselines))
    report = runs[0] | {"rows": rows_of(runs), "variants": {}}
    for variant, (options, environment) in VARIANTS.items():
        threads = () if "--threads" in options else ("--threads", "1")
        common = (*options, *threads, "--batch-size", VARIANTS_BATCH_SIZE, "--baseline")
        runs = [measured(arguments, model, "--mode", mode, *common, **environment) for mode in MODES]
        report["variants"][variant] = rows_of(runs)
    return report


def of_mixer(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    sizes = ("--batch-size", *MIXER_BATCH_SIZES)
    return measured(arguments, MIXERS[name], "--threads", "1", "--backend", "cpu", "--baseline", "bare", *sizes)


def measured(arguments: argparse.Namespace, model: str, *options: str, **environment: str) -> dict[str, Any]:
    """The report of one run."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        command = [
            # The stub: this environment's torchvision, which transformers imports, is of another build of torch.
            sys.executable, "tests/timm_stub.py", "-m", "mixer_kernels", "bench", "--model", model, "--device", "cpu",
            "--seconds", arguments.seconds, "--json", str(path), *options,
        ]  # fmt: skip
        subprocess.run(command, check=True, cwd=ROOT, env=os.environ | environment)
        return json.loads(path.read_text(encoding="utf-8"))


def groups(rows: list[dict]) -> dict[tuple, dict[str, dict]]:
    """Rows by provider, of each model, mode and batch size."""
    found: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        found.setdefault((row["model"], row["mode"], row["batch_size"]), {})[row["provider"]] = row
    return found


def series_section(reports: list[dict]) -> str:
    """Both tables."""
    report = reports[0]
    packages = ("torch", "transformers", "granite-tsfm", "onnxruntime", "openvino")
    versions = ", ".join(f"{name} {report['versions'][name]}" for name in packages if report["versions"][name])
    caption = (
        "Times eager's speed, median of the rounds of one run (20th to 80th percentile); float32, 7 series of 512 "
        f"steps; one thread of {report['device']['name']} ({report['device']['instruction_set']}); {versions}."
    )
    between = (
        f"Batch {VARIANTS_BATCH_SIZE} on the same machine, each beside eager PyTorch in the same dtype, with the same "
        "instructions and threads:"
    )
    return "\n\n".join([series_table(rows_of(reports)), caption, between, variants_table(reports)])


def series_table(rows: list[dict]) -> str:
    """Ratios to eager, and ours to the better of the two runtimes."""
    measured = [name for name in BASELINES if any(row["provider"] == name for row in rows)]
    lines = header("", "batch", "eager, ms", *map(LABELS.get, measured), "mixer_kernels", "over the better runtime")
    for (model, mode, batch_size), of in groups(rows).items():
        cells = [f"{MODELS[model]}, {MODES[mode]}", str(batch_size), f"{of['eager']['ms']:.1f}"]
        cells += [ratio(of.get(name)) for name in measured]
        ours, runtimes = of["mixer_kernels"], [of[name]["ms"] for name in ("ort", "openvino") if ms_of(of, name)]
        cells.append(f"**{ours['speedup']:.2f}** ({ours['speedup_p20']:.2f} to {ours['speedup_p80']:.2f})")
        cells.append(f"{min(runtimes) / ours['ms']:.2f}" if runtimes else "")
        lines.append(line_of(cells))
    return "\n".join(lines)


def variants_table(reports: list[dict]) -> str:
    """Ratios to eager, and ours on two threads to ours on one."""
    lines = header("", *VARIANTS, "two threads over one")
    for report in reports:
        one_thread = groups(report["rows"])
        variants = {name: groups(report["variants"][name]) for name in VARIANTS}
        for key in variants["AVX2"]:
            ours = {name: found[key]["mixer_kernels"] for name, found in variants.items()}
            cells = [f"{MODELS[key[0]]}, {MODES[key[1]]}", *(f"{row['speedup']:.2f}" for row in ours.values())]
            alone = one_thread.get(key)
            scale = f"{alone['mixer_kernels']['ms'] / ours['two threads']['ms']:.2f}" if alone else ""
            lines.append(line_of([*cells, scale]))
    return "\n".join(lines)


def mixers_table(reports: list[dict]) -> str:
    """Ratios to eager."""
    lines = header("", "batch", "eager, ms", "mixer_kernels", "the bare products")
    for report in reports:
        found: dict[int, dict[str, dict]] = {}
        for row in report["throughput"]:
            found.setdefault(row["batch_size"], {})[row["provider"]] = row
        for size, of in found.items():
            speeds = (f"{of[name]['speedup_vs_eager']:.2f}" for name in ("cpu", "bare"))
            lines.append(line_of([of["eager"]["name"], str(size), f"{of['eager']['ms']:.1f}", *speeds]))
    return "\n".join(lines)


def header(*names: str) -> list[str]:
    return [line_of(names), "|---" * len(names) + "|"]


def line_of(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def ms_of(rows: dict[str, dict], name: str) -> float | None:
    return rows[name]["ms"] if name in rows else None


def ratio(row: dict | None) -> str:
    if row is None:
        return ""
    return row["reason"].split(":")[0] if row["speedup"] is None else f"{row['speedup']:.2f}"


def write_readme(sections: dict[str, str]) -> None:
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    for name, section in sections.items():
        before, rest = text.split(BEGIN.format(name))
        text = f"{before}{BEGIN.format(name)}\n{section}\n{END.format(name)}{rest.split(END.format(name))[1]}"
    path.write_text(text, encoding="utf-8")


def plot(rows: list[dict], text: str, path: Path) -> None:
    """A panel for each model and mode: bars are medians, lines the 20th to the 80th percentile."""
    import matplotlib
    from matplotlib.figure import Figure

    found = groups(rows)
    panels = sorted({key[:2] for key in found}, key=lambda key: (list(MODES).index(key[1]), key[0]))
    matplotlib.rcParams["svg.hashsalt"] = "mixer_kernels"  # the same figures, the same file
    figure = Figure(figsize=(9.0, 6.0), layout="constrained", facecolor="none")
    for axes, (model, mode) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        sizes = [key[2] for key in found if key[:2] == (model, mode)]
        names = [name for name in COLORS if any(ms_of(found[model, mode, size], name) for size in sizes)]
        width = 0.2
        for place, name in enumerate(names):
            for index, size in enumerate(sizes):
                row = found[model, mode, size].get(name)
                if row is None or row["speedup"] is None:
                    continue
                x, y = index + (place - (len(names) - 1) / 2) * width, row["speedup"]
                spread = [[y - row["speedup_p20"]], [row["speedup_p80"] - y]]
                axes.bar(x, y, width * 0.9, color=COLORS[name], label=LABELS[name] if index == 0 else None)
                axes.errorbar(x, y, yerr=spread, color=text, linewidth=1)
                axes.text(x, row["speedup_p80"] + 0.05, f"{y:.1f}", ha="center", fontsize=8, color=text)
        axes.axhline(1, color=text, linewidth=0.8, linestyle=":")
        axes.set_xticks(range(len(sizes)), [f"batch {size}" for size in sizes])
        axes.set_title(f"{MODELS[model]}, {MODES[mode]}", loc="left", fontsize=10, color=text)
        axes.set_facecolor("none")
        axes.tick_params(colors=text, length=0)
        axes.spines[:].set_visible(False)
    figure.supylabel("times the speed of eager PyTorch", fontsize=10, color=text)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, labelcolor=text)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(main())
