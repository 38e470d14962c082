"""The phases of ``tools/gpu_day.py``.

Read on in cli (options, exit status), results (rows, JSON, closing table), supervise (processes and deadlines), worker
(one such process), sample and memory (inputs, accuracy, red zones), and the phases: probe, correctness, gradients,
repeats, streams, large, compiled, benchmarks. cli, results and supervise need no torch: a broken GPU cannot take them
along.
"""
