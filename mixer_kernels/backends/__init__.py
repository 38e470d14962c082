"""The backends, one module each with the same functions, and the registry that chooses one."""

from .registry import (
    BACKENDS,
    CHOICES,
    FASTER_ON_CPU,
    LEAST_OF_A_MIXER,
    NEVER,
    auto_on_cpu,
    choose,
    least_on_cpu,
    load,
    requested_backend,
    use_backend,
    why_not,
)
