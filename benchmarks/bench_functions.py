"""The token half, the channel half, and the block that they make."""

from __future__ import annotations

LEVELS = {"test_token_mixing": "token", "test_channel_mixing": "channel", "test_block": "block"}


def test_token_mixing(workload, provider, throughput):
    throughput(workload, provider)


def test_channel_mixing(workload, provider, throughput):
    throughput(workload, provider)


def test_block(workload, provider, throughput):
    throughput(workload, provider)
