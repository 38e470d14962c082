"""Triton kernels of a known speed, compiled without a GPU: prints the model's bound of each that is named.

python machine_model_samples.py "product sm_80" "attention sm_90"
"""

from __future__ import annotations

import sys

import torch
import triton
import triton.language as tl

from mixer_kernels.compile_check import analysis_of, compile_for
from mixer_kernels.machine_model import read
from mixer_kernels.tuning.target import KNOWN_TARGETS


@triton.jit
def product(a_ptr, b_ptr, c_ptr, K, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """c = a . b, a tile a program; a [M, K], b [K, N]."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    left = a_ptr + offs_m[:, None] * K + offs_k[None, :]
    right = b_ptr + offs_k[:, None] * N + offs_n[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, K, BLOCK_K):
        acc = tl.dot(tl.load(left), tl.load(right), acc)
        left += BLOCK_K
        right += BLOCK_K * N
    tl.store(c_ptr + offs_m[:, None] * N + offs_n[None, :], acc.to(tl.bfloat16))


@triton.jit
def attention(q_ptr, k_ptr, v_ptr, o_ptr, tokens, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr):
    """softmax(q . k') . v of one head, online; all [tokens, D]."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, D)
    q = tl.load(q_ptr + offs_m[:, None] * D + offs_d[None, :])
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    for start in range(0, tokens, BLOCK_N):
        k = tl.load(k_ptr + (start + offs_n)[None, :] * D + offs_d[:, None])
        score = tl.dot(q, k)
        new = tl.maximum(highest, tl.max(score, 1) * 0.1275)
        weight = tl.math.exp2(score * 0.1275 - new[:, None])
        scale = tl.math.exp2(highest - new)
        total = total * scale + tl.sum(weight, 1)
        v = tl.load(v_ptr + (start + offs_n)[:, None] * D + offs_d[None, :])
        acc = tl.dot(weight.to(tl.bfloat16), v, acc * scale[:, None])
        highest = new
    tl.store(o_ptr + offs_m[:, None] * D + offs_d[None, :], (acc / total[:, None]).to(tl.bfloat16))


def compiled(name: str, target: str):
    """As Triton gives it."""
    compile_for(KNOWN_TARGETS[target])
    matrix = torch.empty(4096, 128 if name == "attention" else 4096, dtype=torch.bfloat16, device="meta")
    if name == "product":
        options = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
        return product.warmup(matrix, matrix, matrix, 4096, 4096, grid=(1, 1), **options)
    options = {"BLOCK_M": 128, "BLOCK_N": 128, "D": 128, "num_warps": 8, "num_stages": 3}
    return attention.warmup(*[matrix] * 4, 4096, grid=(1,), **options)


def bound(name: str, target: str) -> float:
    """Of its hot loop."""
    found = compiled(name, target)
    [kernel] = read(found.asm["cubin"]).values()
    return analysis_of(found, kernel).hottest().shares.bound


if __name__ == "__main__":
    print(*(bound(*word.split()) for word in sys.argv[1:]))
