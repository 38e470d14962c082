"""The phases of ``tools/gpu_day.py``; README.md beside this file says how to run it.

Read on in cli (the order of the phases), plan (their tasks), supervise and worker (processes, deadlines, who sits out),
results (the file, and what several of them say together), tables, record; then in what runs on the GPU: truth, speed,
models, breadth; and in programs: the build, pytest, compute-sanitizer. The first seven need no torch: a broken GPU
cannot take them along.
"""
