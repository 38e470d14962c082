"""The whole model: images in, logits out."""

from __future__ import annotations

LEVELS = {"test_model": "model"}


def test_model(workload, provider, throughput):
    throughput(workload, provider)
