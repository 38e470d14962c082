"""Throughput measurements: what ``python -m mixer_kernels bench`` and ``pytest benchmarks --benchmark`` run.

``compare_model`` measures a model at hand against its eager twin. Read on in cases (what is measured), providers and
whole_model (by whom), run (one group of rows), timing (how), check (who may have a speed), roofline and report.
"""

from __future__ import annotations

from .report import Report, Row
from .whole_model import compare_model

__all__ = ["Report", "Row", "compare_model"]
