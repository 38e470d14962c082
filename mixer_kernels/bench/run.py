"""One group of rows: build every provider, check its result against eager's, time those that are right."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..accuracy import reference as judged_by
from .cases import Case
from .check import why_wrong, why_wrong_in_training
from .memory import memory_of
from .providers import CannotRun, Provider
from .report import CANNOT_RUN, Row, group_rows
from .timing import Samples, measure

logger = logging.getLogger("mixer_kernels")

OUT_OF_MEMORY = "out of memory"
NOT_MEASURED = "not measured"
DRAWS = 2  # results are large here: the draws of a reference agree


@dataclass
class Prepared:
    """A case with its tensors: what ``run_group`` takes."""

    case: Case
    inputs: list[Tensor]
    providers: list[Provider]
    reference: Callable[[Tensor], Any]
    parameters: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Group:
    """The rows of one case, and the rounds behind those that have a time, by provider."""

    rows: list[Row]
    samples: dict[str, Samples]


def run_group(
    case: Case,
    inputs: list[Tensor],
    providers: Sequence[Provider],
    reference: Callable[[Tensor], Any],
    *,
    seconds: float,
    progress: Callable[[str], None],
    parameters: Sequence[Tensor] = (),
) -> Group:
    """Measure ``case`` by each of ``providers``, the first of which is eager; one row each, in their order.

    Args:
        inputs: a batch for each call to rotate over.
        reference: eager in float64: its result on a few images; in mode "train" all that is checked, on a whole batch.
        seconds: about how long to time each provider.
        progress: told what happens now.
        parameters: the weights, which are no memory that a call takes.
    """
    built, details, failures = prepare_providers(case, inputs, providers, reference, progress=progress)
    samples: dict[str, Samples] = {}
    if built:
        try:
            with torch.no_grad():
                samples = measure(built, inputs, seconds=seconds, progress=progress)
        except Exception as error:
            failures.update(dict.fromkeys(built, describe(error)))
    memory = {name: memory_of(built[name], inputs[0], case.mode, parameters) for name in samples}
    rows = group_rows(case, inputs[0].device, [p.name for p in providers], samples, failures, details, memory)
    return Group(rows, samples)


def prepare_providers(
    case: Case,
    inputs: list[Tensor],
    providers: Sequence[Provider],
    reference: Callable[[Tensor], Any],
    *,
    progress: Callable[[str], None],
) -> tuple[dict[str, Callable[[Tensor], Any]], dict[str, str], dict[str, str]]:
    """Build each provider and call it once.

    Returns:
        The functions whose results are right, details about them, and why the others have no speed; all by provider.
    """
    functions: dict[str, Callable[[Tensor], Any]] = {}
    details: dict[str, str] = {}
    failures: dict[str, str] = {}
    images = sorted({0, case.batch_size - 1})
    eager_result = expected = None
    training = case.mode == "train"
    with torch.no_grad():
        for provider in providers:
            progress(f"preparing {provider.name}")
            try:
                function, detail = provider.build()
                result = function(inputs[0])
                if provider.computes_case:
                    if eager_result is None:
                        eager_result = result
                        checked = inputs[0] if training else inputs[0][images].double()
                        expected = judged_by(lambda checked=checked: reference(checked), case.dtype, draws=DRAWS)
                    if training:
                        wrong = why_wrong_in_training(result, eager_result, expected)
                    else:
                        wrong = why_wrong(result, eager_result, expected, images)
                    if wrong is not None:
                        failures[provider.name] = f"wrong: {wrong}"
                        continue
            except CannotRun as reason:
                failures[provider.name] = f"{CANNOT_RUN}: {reason}"
            except Exception as error:  # a row says so and the run goes on
                failures[provider.name] = describe(error)
                logger.debug("%s failed", provider.name, exc_info=True)
            else:
                functions[provider.name] = function
                if detail is not None:
                    details[provider.name] = detail
            if provider.name in failures and eager_result is None:
                # Without eager there is nothing to check the others against.
                others = [other.name for other in providers if other.name not in failures]
                failures.update({name: f"{NOT_MEASURED}: eager has no result to compare with" for name in others})
                functions.clear()
                break
    release(inputs[0].device)
    return functions, details, failures


def release(device: torch.device) -> None:
    """Give cached memory back, so that what one provider or batch size used does not crowd out the next."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def is_defect(reason: str) -> bool:
    """Whether a row's reason tells of an error, rather than of a machine that lacks something."""
    return not reason.startswith((CANNOT_RUN, OUT_OF_MEMORY, NOT_MEASURED))


def is_out_of_memory(error: BaseException) -> bool:
    """On a CPU PyTorch raises a plain RuntimeError for it."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def describe(error: Exception) -> str:
    """Why there is no row with figures."""
    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    if "No working C++ compiler" in str(error):
        return f"{CANNOT_RUN}: torch.compile found no working C++ compiler"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # torch.compile names the error that it wraps in the second line.
    text = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return f"failed: {type(error).__name__}: {text}"
