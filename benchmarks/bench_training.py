"""Training: the halves and the block forward and backward, the whole model for a step with AdamW."""

from __future__ import annotations

MODE = "train"
LEVELS = {
    "test_training_of_tokens": "token",
    "test_training_of_channels": "channel",
    "test_training_of_block": "block",
    "test_training_step": "model",
}


def test_training_of_tokens(workload, provider, throughput):
    throughput(workload, provider)


def test_training_of_channels(workload, provider, throughput):
    throughput(workload, provider)


def test_training_of_block(workload, provider, throughput):
    throughput(workload, provider)


def test_training_step(workload, provider, throughput):
    throughput(workload, provider)
