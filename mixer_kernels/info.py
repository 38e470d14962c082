"""``python -m mixer_kernels info``: versions, devices, what was built, which backends run here, and why not.

Works without a GPU, Triton or timm. CUDA is touched by the functions, never by the import.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import backends
from .backends.cpu import library as cpu_library
from .backends.cuda import library
from .backends.measured import measured_gpus, passed_on
from .backends.registry import ENVIRONMENT_VARIABLE, FASTER_ON_CPU, preferred

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# What a user may have set that changes what runs or how it is built.
ENVIRONMENT_VARIABLES = (
    ENVIRONMENT_VARIABLE,
    cpu_library.ISA_VARIABLE,
    "MIXER_KERNELS_BUILD_CPU",
    "MIXER_KERNELS_BUILD_CUDA",
    "MIXER_KERNELS_CUDA_ARCHS",
    "TRITON_INTERPRET",
    "TRITON_CACHE_DIR",
    "CUDA_VISIBLE_DEVICES",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "OMP_NUM_THREADS",
)
_SMI_FIELDS = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; ``--json`` for machines."""
    parser = argparse.ArgumentParser(
        prog="python -m mixer_kernels info",
        description="Versions, devices, which backends run here and why not, environment variables in force.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    collected = collect()
    print(json.dumps(collected, indent=2) if arguments.json else render(collected))
    return 0


def collect() -> dict[str, Any]:
    """Everything that ``info`` prints, as JSON's types."""
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return {
        "versions": versions(),
        "package": str(Path(__file__).parent),
        "cpu_kernels": cpu_kernels(),
        "cuda_kernels": cuda_kernels(),
        "devices": [
            {
                **device_info(device),
                "auto": auto_on(device),
                "backends": {name: backend_info(name, device) for name in backends.BACKENDS},
            }
            for device in devices
        ],
        "environment": {name: os.environ[name] for name in ENVIRONMENT_VARIABLES if name in os.environ},
    }


def render(collected: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"{name:<14} {version or 'not installed'}" for name, version in collected["versions"].items()]
    lines += [f"{'package':<14} {collected['package']}"]
    lines += [f"{'CPU kernels':<14} {_built_for_cpu(collected['cpu_kernels'])}"]
    lines += [f"{'CUDA kernels':<14} {_built(collected['cuda_kernels'])}"]
    if "sm90" in collected["cuda_kernels"]:
        lines += [f"{'Hopper kernels':<14} {_hopper(collected['cuda_kernels'])}"]
    for device in collected["devices"]:
        lines += ["", _device_title(device)]
        of = {
            name: [dtype for dtype, each in device["auto"].items() if each == name] for name in device["auto"].values()
        }
        lines += ["  auto      " + "; ".join(f"{name} for {', '.join(dtypes)}" for name, dtypes in of.items())]
        for name, entry in device["backends"].items():
            lines += [f"  {name:<9} {line}" if i == 0 else f"{'':<12}{line}" for i, line in enumerate(_verdict(entry))]
    environment = collected["environment"]
    lines += ["", "environment variables"]
    lines += [f"  {name}={value}" for name, value in environment.items()] or ["  none that matter here are set"]
    return "\n".join(lines)


def versions() -> dict[str, str | None]:
    """Of Python, this package, PyTorch, Triton, and the CUDA or ROCm that PyTorch was built with; None if absent."""
    from . import __version__  # here: the package imports its version last

    return {
        "python": platform.python_version(),
        "mixer_kernels": __version__,
        "torch": torch.__version__,
        "triton": _installed("triton"),
        "timm": _installed("timm"),
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
    }


def cpu_kernels() -> dict[str, Any]:
    """The instruction sets that the CPU kernels were built for and the one that runs; or why there are none."""
    try:
        module = cpu_library.loaded()
        return {
            "file": module.__file__,
            "built": list(module.built),
            "instruction_set": cpu_library.instruction_set(),
            "threads": module.has_pool(),
        }
    except (ImportError, RuntimeError) as error:
        return {"why_not": cpu_library.why_not_loaded(error)}


def cuda_kernels() -> dict[str, Any]:
    """What the compiled module was built with: CUDA's version and GPU architectures; or why there is none.

    "sm90": of the kernels for Hopper alone, a digest of their sources (None if they are not in the build) and the GPUs
    on which kernels of these sources have passed: where there is one, backend "cuda" uses them.
    """
    try:
        module = library.loaded()
    except ModuleNotFoundError as error:
        if error.name != library.MODULE:
            raise
        return {"why_not": "not in this installation"}
    except ImportError as error:
        return {"why_not": f"{library.MODULE} does not load: {error}"}
    runtime = module.runtime_version
    return {
        "file": module.__file__,
        "cuda": None if module.on_host else f"{runtime // 1000}.{runtime % 1000 // 10}",
        "architectures": list(module.architectures),
        "ptx": list(module.ptx),
        "sm90": {
            "sources": module.sm90_sources or None,
            "passed_on": passed_on(library.SM90, module.sm90_sources) if module.sm90_sources else [],
        },
    }


def device_name(device: torch.device) -> str:
    """As PyTorch calls the GPU; the processor's model name for the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpu_name()


def device_info(device: torch.device) -> dict[str, Any]:
    """Name, size, and for a GPU its capability, L2 cache, and what nvidia-smi says of driver, clocks and power."""
    if device.type != "cuda":
        return {"device": str(device), "name": device_name(device), "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": str(device),
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_cache_mib": round(properties.L2_cache_size / 2**20, 1),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        **nvidia_smi(properties),
    }


def nvidia_smi(properties: Any) -> dict[str, str]:
    """Driver, clocks and power right now; empty where there is no nvidia-smi, or it does not know the device."""
    identifier = getattr(properties, "uuid", None)
    if torch.version.hip or identifier is None:
        return {}
    command = ["nvidia-smi", f"--id=GPU-{identifier}", f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in output.strip().split(",")]
    return dict(zip(_SMI_FIELDS, values, strict=True)) if len(values) == len(_SMI_FIELDS) else {}


def auto_on(device: torch.device) -> dict[str, str]:
    """The backend that "auto" takes on ``device`` for products in each dtype; on the CPU it depends on the call."""
    if device.type == "cpu":
        fast = [dtype for dtype in FASTER_ON_CPU if cpu_library.why_not_auto(dtype) is None]
        return {_short(dtype): "cpu or torch" if dtype in fast else "torch" for dtype in DTYPES}
    names = preferred(device) if device.type == "cuda" else ()
    taken = {dtype: next((n for n in names if backends.why_not(n, device, dtype) is None), "torch") for dtype in DTYPES}
    return {_short(dtype): name for dtype, name in taken.items()}


def backend_info(name: str, device: torch.device) -> dict[str, Any]:
    """For which dtypes backend ``name`` runs a forward pass on ``device``; where not, why; whether it was measured."""
    reasons = {dtype: backends.why_not(name, device, dtype) for dtype in DTYPES}
    return {
        "runs": [_short(dtype) for dtype, reason in reasons.items() if reason is None],
        "why_not": {_short(dtype): reason for dtype, reason in reasons.items() if reason is not None},
        # The torch backend is plain PyTorch: there is no kernel of ours in it to measure.
        "measured": None if name == "torch" or device.type == "cpu" else device_name(device) in measured_gpus(name),
    }


def _built_for_cpu(kernels: dict[str, Any]) -> str:
    if "why_not" in kernels:
        return kernels["why_not"]
    threads = "PyTorch's threads" if kernels["threads"] else "one thread: no OpenMP runtime is loaded"
    return f"built for {', '.join(kernels['built'])}; runs {kernels['instruction_set']} on {threads}"


def _built(kernels: dict[str, Any]) -> str:
    if "why_not" in kernels:
        return kernels["why_not"]
    if kernels["cuda"] is None:
        return f"built for the CPU ({kernels['file']})"
    code = ", ".join(f"sm_{name}" for name in kernels["architectures"])
    ptx = ", ".join(f"compute_{name}" for name in kernels["ptx"]) or "no"
    return f"built with CUDA {kernels['cuda']} for {code}; {ptx} PTX for other GPUs"


def _hopper(kernels: dict[str, Any]) -> str:
    if kernels["cuda"] is None:
        return f"opt-in: backend={library.SM90!r}"
    if kernels["sm90"]["sources"] is None:
        return f"not built: {library.SM90_ARCHITECTURE} is not among the architectures"
    if kernels["sm90"]["passed_on"]:
        return f"used by backend 'cuda' on compute capability 9.0: passed on {', '.join(kernels['sm90']['passed_on'])}"
    return f"opt-in, backend={library.SM90!r}: no run of these sources on a GPU is recorded"


def _verdict(entry: dict[str, Any]) -> list[str]:
    lines = []
    if entry["runs"]:
        lines.append(f"runs: {', '.join(entry['runs'])}")
    for reason in dict.fromkeys(entry["why_not"].values()):
        dtypes = [dtype for dtype, other in entry["why_not"].items() if other == reason]
        lines.append(f"does not run{'' if not entry['runs'] else ' ' + ', '.join(dtypes)}: {reason}")
    if entry["measured"] is not None and entry["runs"]:
        known = "was measured" if entry["measured"] else "was never run by its authors"
        lines.append(f"{known} on this kind of GPU")
    return lines


def _device_title(device: dict[str, Any]) -> str:
    details = [
        f"{name} {value}" for name, value in device.items() if name not in ("device", "name", "auto", "backends")
    ]
    return f"{device['device']}: {device['name']} ({', '.join(details)})"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache  # a processor stays what it is
def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
