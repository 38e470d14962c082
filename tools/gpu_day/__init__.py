"""The phases of ``tools/gpu_day.py``.

Read on in cli (options, exit status), phases (their order and shares of the time), results (rows, JSON, who passed),
tables (what closes the output), supervise (processes and deadlines), worker (one such process), sample, launches and
memory (inputs, accuracy, what is launched, red zones), kernels (which backends run here), programs (compilers,
sanitizers, pytest), and the phases themselves: probe, build, hopper, correctness, gradients, sanitizers, repeats,
streams, large, compiled, ladder, benchmarks, tests. cli, phases, results, tables and supervise need no torch: a broken
GPU cannot take them along.
"""
