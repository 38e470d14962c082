"""The accuracy rule, ``mixer_kernels.accuracy``, as assertions."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mixer_kernels.accuracy import FORWARD_FACTOR, GRADIENT_FACTOR, Reference, reference, why_inaccurate

__all__ = ["FORWARD_FACTOR", "GRADIENT_FACTOR", "Reference", "assert_accurate", "assert_all_accurate", "reference"]


def assert_accurate(
    actual: Tensor, eager: Tensor, exact: Reference, factor: float = FORWARD_FACTOR, what: str = "output"
) -> None:
    """Fail unless ``actual`` is within the rule. All three are the same computation."""
    reason = why_inaccurate(actual, eager, exact, factor)
    assert reason is None, f"{what}: {reason}"


def assert_all_accurate(
    actual: Mapping[str, Tensor], eager: Mapping[str, Tensor], exact: Mapping[str, Reference]
) -> None:
    """``assert_accurate`` of results by name: "output" is one, all others are gradients."""
    assert actual.keys() == exact.keys() == eager.keys()
    for name in actual:
        factor = FORWARD_FACTOR if name == "output" else GRADIENT_FACTOR
        assert_accurate(actual[name], eager[name], exact[name], factor, name)
