"""`make bench-cpu`: models of time series on this CPU into benchmarks/results/cpu, and from there into the README.

Runs ``python -m mixer_kernels bench --device cpu`` for each model, inference and training, writes
benchmarks/results/cpu/<model>.json with all rows, and draws its table in README.md and its plot, light and dark.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/cpu"
MODELS = {"ptsm": "PatchTSMixer", "ttm": "TinyTimeMixer (TTM-r2)"}
MODES = {"infer": "inference", "train": "training step"}
BASELINES = ("compile", "ort", "openvino")
BEGIN, END = "<!-- bench-cpu: written by `make bench-cpu` -->", "<!-- bench-cpu: end -->"
LABELS = {"compile": "torch.compile", "ort": "ONNX Runtime", "openvino": "OpenVINO", "mixer_kernels": "mixer_kernels"}
# Okabe and Ito's palette: told apart with any colour vision, on white and on black.
COLORS = {"compile": "#56B4E9", "ort": "#E69F00", "openvino": "#CC79A7", "mixer_kernels": "#009E73"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batch-size", nargs="+", default=["1", "32", "256"], metavar="N")
    parser.add_argument("--baseline", nargs="*", choices=BASELINES, default=list(BASELINES))
    parser.add_argument("--threads", default="1", metavar="N")
    parser.add_argument("--seconds", default="10", help="to time each provider of a row (default: %(default)s)")
    parser.add_argument("--draw", action="store_true", help="measure nothing: table and plot from what is there")
    arguments = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for model in () if arguments.draw else arguments.model:
        reports = [measured(model, mode, arguments) for mode in MODES]
        report = reports[0] | {"rows": [row for each in reports for row in each["rows"]]}
        (RESULTS / f"{model}.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    reports = [json.loads((RESULTS / f"{model}.json").read_text(encoding="utf-8")) for model in MODELS]
    rows = [row for report in reports for row in report["rows"]]
    for name, text in (("light", "#1f2328"), ("dark", "#e6edf3")):
        plot(rows, text, RESULTS / f"speed-{name}.svg")
    write_readme(table(rows, reports[0]))
    return 0


def measured(model: str, mode: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The report of one run. In training there is nothing to measure of providers that do not train."""
    baselines = [name for name in arguments.baseline if mode == "infer" or name == "compile"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        command = [
            # The stub: this environment's torchvision, which transformers imports, is of another build of torch.
            sys.executable, "tests/timm_stub.py", "-m", "mixer_kernels", "bench", "--model", model, "--device", "cpu",
            "--mode", mode,
            "--threads", arguments.threads, "--batch-size", *arguments.batch_size, "--seconds", arguments.seconds,
            "--json", str(path), "--baseline", *baselines,
        ]  # fmt: skip
        subprocess.run(command, check=True, cwd=ROOT)
        return json.loads(path.read_text(encoding="utf-8"))


def groups(rows: list[dict]) -> dict[tuple, dict[str, dict]]:
    """Rows by provider, of each model, mode and batch size."""
    found: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        found.setdefault((row["model"], row["mode"], row["batch_size"]), {})[row["provider"]] = row
    return found


def table(rows: list[dict], report: dict[str, Any]) -> str:
    """Ratios to eager, and ours to the better of the two runtimes."""
    measured = [name for name in BASELINES if any(row["provider"] == name for row in rows)]
    names = ["", "batch", "eager, ms", *map(LABELS.get, measured), LABELS["mixer_kernels"], "over the better runtime"]
    lines = [f"| {' | '.join(names)} |".replace("|  |", "| |"), "|---" * len(names) + "|"]
    for (model, mode, batch_size), of in groups(rows).items():
        cells = [f"{MODELS[model]}, {MODES[mode]}", str(batch_size), f"{of['eager']['ms']:.1f}"]
        cells += [ratio(of.get(name)) for name in measured]
        ours, runtimes = of["mixer_kernels"], [of[name]["ms"] for name in ("ort", "openvino") if ms_of(of, name)]
        cells.append(f"**{ours['speedup']:.2f}** ({ours['speedup_p20']:.2f} to {ours['speedup_p80']:.2f})")
        cells.append(f"{min(runtimes) / ours['ms']:.2f}" if runtimes else "")
        lines.append(f"| {' | '.join(cells)} |")
    device, versions = report["device"], report["versions"]
    packages = ("torch", "transformers", "granite-tsfm", "onnxruntime", "openvino")
    of_versions = ", ".join(f"{name} {versions[name]}" for name in packages if versions[name])
    threads = sorted({row["threads"] for row in rows})
    lines += [
        "",
        f"Times eager's speed, median of the rounds of one run (20th to 80th percentile); float32, 7 series of 512 "
        f"steps; {threads[0]} thread(s) of {device['name']} ({device['instruction_set']}); {of_versions}.",
    ]
    return "\n".join(lines)


def ms_of(rows: dict[str, dict], name: str) -> float | None:
    return rows[name]["ms"] if name in rows else None


def ratio(row: dict | None) -> str:
    if row is None:
        return ""
    return row["reason"].split(":")[0] if row["speedup"] is None else f"{row['speedup']:.2f}"


def write_readme(text: str) -> None:
    path = ROOT / "README.md"
    head, rest = path.read_text(encoding="utf-8").split(BEGIN)
    picture = (
        '<picture>\n  <source media="(prefers-color-scheme: dark)" srcset="benchmarks/results/cpu/speed-dark.svg">\n'
        '  <img alt="Speed over eager PyTorch on a CPU" src="benchmarks/results/cpu/speed-light.svg">\n</picture>'
    )
    path.write_text(f"{head}{BEGIN}\n{picture}\n\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")


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
