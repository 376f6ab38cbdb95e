"""Evaluations: needles, recall, extrapolation, harness, benchmarks."""
