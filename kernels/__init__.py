"""Operators: pure functions on tensors, one folder each; torch and triton only."""
