"""Runs the lessons of ``docs/lessons/`` and compares the figures that they state with their bands.

python -m benchmarks.lessons
"""
