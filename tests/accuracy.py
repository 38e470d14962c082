"""The accuracy rule, the only one: a kernel may be off by at most twice what eager PyTorch is off.

Errors are measured against the same computation in float64, as the largest and as the root mean square. Eager runs in
the kernel's dtype. The floor is half a unit in the last place of the output's largest (or RMS) value: a result that
is only rounded once may be that far off, even where eager happens to be exact.
"""

from __future__ import annotations

import torch

FORWARD_FACTOR = 2.0
GRADIENT_FACTOR = 3.0


def assert_accurate(
    actual: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, factor: float = FORWARD_FACTOR, what: str = "output"
) -> None:
    """Fail unless ``actual`` is within the rule. All three are the same computation; ``exact`` is in float64."""
    assert exact.dtype is torch.float64, f"the reference must be float64, got {exact.dtype}"
    assert actual.shape == exact.shape == eager.shape
    assert actual.dtype is eager.dtype, f"{what} is {actual.dtype}, eager's is {eager.dtype}"
    finite = exact.isfinite()
    assert torch.equal(actual.isfinite(), eager.isfinite()), f"{what} is not finite where eager's is, or the reverse"
    if not finite.any():
        return
    finite &= eager.isfinite()
    reference = exact[finite]
    ours = actual.double()[finite] - reference
    theirs = eager.double()[finite] - reference
    ulp = torch.finfo(actual.dtype).eps
    for name, norm in (("max", lambda t: t.abs().max()), ("rms", lambda t: t.square().mean().sqrt())):
        error, allowed = norm(ours).item(), factor * norm(theirs).item() + 0.5 * ulp * norm(reference).item()
        assert error <= allowed, (
            f"{name} error of {what} is {error:.3g}, allowed {allowed:.3g} (eager's {norm(theirs):.3g})"
        )
