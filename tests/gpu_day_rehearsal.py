"""``tools/gpu_day.py`` without a GPU: tiny sizes, PyTorch's operators in the kernels' place, and what is planted.

    python tests/gpu_day_rehearsal.py --minutes 3 --plant hang:mixer_block+small+cuda build:

A plant is ``import:SECONDS`` of the first process, ``build:``, or ``hang``, ``crash`` or ``wrong`` (by 1 %) with the
words that name where: operator, size and backend, or benchmark and backend.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tools")]

from gpu_day import cli, plan, programs, supervise  # noqa: E402

PLANTS, COLD = "GPU_DAY_PLANTS", "GPU_DAY_COLD"
SPEED = (("token", "S/32", 1, "infer"), ("model", "ptsm", 2, "infer"))
WHOLE_DAY = plan.day


def main(argv: list[str]) -> int:
    at = argv.index("--plant") if "--plant" in argv else len(argv)
    os.environ |= {PLANTS: " ".join(argv[at + 1 :]), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    plan.SPEED = SPEED
    plan.day = lambda: {phase: tasks for phase, tasks in WHOLE_DAY().items() if phase in ("truth", "speed")}
    cli.DEVICE, cli.STEP_SECONDS = "cpu", 10.0
    cli.PROCESSES = dict.fromkeys(plan.BACKENDS, 1)
    supervise.WORKER[:] = [sys.executable, __file__, "worker"]
    programs.capability = lambda: "9.0"
    programs.why_unfit = _unfit
    programs.build = _build
    with tempfile.TemporaryDirectory() as folder:
        os.environ[COLD] = f"{folder}/is read"
        return cli.main(argv[:at])


async def _unfit(*arguments: object) -> str:
    return "this is a rehearsal"


async def _build(*arguments: object) -> str | None:
    """As the real one: a program that fails, and what it says."""
    if not planted("build"):
        return None
    code = "import sys; print('x.cu(1): error: as planted'); sys.exit(2)"
    return programs.why_failed(*await programs.run_program([sys.executable, "-c", code], 60, dict(os.environ)))


def planted(kind: str, *where: str) -> bool:
    texts = [plant.removeprefix(f"{kind}:") for plant in os.environ[PLANTS].split() if plant.startswith(f"{kind}:")]
    return any(set(filter(None, text.split("+"))) <= {word.replace(" ", "_") for word in where} for text in texts)


def go_wrong(*where: str) -> float:
    """What the result is multiplied by, if there is one."""
    if planted("hang", *where):
        time.sleep(10**6)
    if planted("crash", *where):
        os.abort()
    return 1.01 if planted("wrong", *where) else 1.0


def work() -> None:
    """One process of the program."""
    for plant in os.environ[PLANTS].split():
        if plant.startswith("import:") and not Path(os.environ[COLD]).exists():
            Path(os.environ[COLD]).touch()  # later processes find in memory what this one reads from a cold disk
            time.sleep(float(plant.partition(":")[2]))
    plan.SPEED = SPEED
    import operations
    from gpu_day import speed, truth, worker

    from mixer_kernels.bench import series_models

    truth.DIMENSIONS[plan.FULL], truth.BATCH[plan.FULL] = truth.DIMENSIONS[plan.SMALL], 4
    truth.backends = SimpleNamespace(why_not=lambda *arguments: None)
    speed.SECONDS = 0.005
    series_models.CONTEXT, series_models.CHANNELS = 64, 2
    make, results, prepare = truth.make, operations.Case.results, speed.prepare
    now: list[str] = []

    def remembered(name: str, size: str, device: str) -> operations.Case:
        now[:] = name, size
        return make(name, size, device)

    def stands_in(case: operations.Case, backend: str) -> dict:
        if backend == "torch":
            return results(case, backend)
        factor = go_wrong(*now, backend)
        found = results(case, "torch")
        return {**found, "output": factor * found["output"]}

    def prepared(task: plan.Task, settings: worker.Settings) -> tuple:
        made, goals = prepare(task, settings)
        plain = next(each for each in made.providers if each.name == "torch")

        def of(name: str):
            def build():
                factor, (function, detail) = go_wrong(task.name, name), plain.build()
                return lambda x: factor * function(x), detail

            return replace(plain, name=name, build=build)

        made.providers = [of(each.name) if each.name in plan.BACKENDS else each for each in made.providers]
        return made, goals

    truth.make, operations.Case.results, speed.prepare = remembered, stands_in, prepared
    worker.main()


if __name__ == "__main__":
    sys.exit(work() if sys.argv[1:2] == ["worker"] else main(sys.argv[1:]))
