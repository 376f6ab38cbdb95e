"""Operators: pure functions on tensors, one folder each; torch and triton only."""

import os

# Triton may fuse a multiplication with an addition into one rounding: said here, so that no change of its default
# changes a result.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
