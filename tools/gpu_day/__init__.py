"""The phases of ``tools/gpu_day.py``; README.md beside this file says how to run it.

cli has their order, plan their tasks. Only worker, truth and speed need torch: a broken GPU takes no table along.
"""
