"""What DeepSpeed divides gradients by, measured as a run measures it."""

import json
from functools import partial

import pytest
import torch

from farspan.lm.train.gradients import probe_divisor
from farspan.parallel.pool import Pool


def measured(stages, accumulations):
    """The divisor under every ZeRO stage, way of reducing and accumulation."""
    from farspan.lm.train.engine import init_distributed

    init = partial(init_distributed, torch.device("cpu"), 60.0)
    torch.distributed.destroy_process_group()  # the pool's own
    init()
    found = {}
    for zero in stages:
        for reduce_scatter in (True, False):
            for accumulation in accumulations:
                configuration = {
                    "train_micro_batch_size_per_gpu": 1,
                    "gradient_accumulation_steps": accumulation,
                    "zero_optimization": {"stage": zero, "reduce_scatter": reduce_scatter},
                }
                key = json.dumps([zero, reduce_scatter, accumulation])
                found[key] = probe_divisor(configuration, torch.device("cpu"))
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_deepspeed_divides_by_ranks_times_micro_batches(ranks):
    """As it does without sequence parallelism of its own; with it, ZeRO-3 differs from the other stages."""
    pool = Pool(ranks)
    try:
        for found in pool.run(measured, (1, 2, 3), (1, 4)):
            assert len(found) == 12
            for key, divisor in found.items():
                assert divisor == ranks * json.loads(key)[2], key
    finally:
        pool.close()
