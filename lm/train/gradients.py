"""Where DeepSpeed keeps the reduced gradient, and what it has divided the sum over ranks by.

The divisor depends on the ZeRO stage, on `reduce_scatter`, on sequence parallelism and on DeepSpeed's version, and a
wrong one hides behind Adam, whose update has the same size for any gradient. So it is measured.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def is_whole(optimizer: Any) -> bool:
    """Whether a DeepSpeed optimizer holds all of the reduced gradient on every rank: in bf16 at ZeRO 1 it is another
    one, with the gradient in fp32.
    """
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    return isinstance(optimizer, BF16_Optimizer)


def gradient_shards(optimizer: Any) -> list[torch.Tensor]:
    """The reduced gradient, where the optimizer will read it: this rank's shards, or all of it (`is_whole`)."""
    if is_whole(optimizer):
        return optimizer.fp32_groups_gradients_flat
    return [shard for shards in optimizer.averaged_gradients.values() for shard in shards]


def probe_divisor(configuration: dict[str, Any], device: torch.device) -> int:
    """What DeepSpeed, so configured, divides the sum of the gradients over ranks and micro-batches by; 1 for a plain
    sum. Every rank calls it.

    A parameter whose gradient is 1 on every rank in every micro-batch goes through backward and reduction, and the
    reduced value is read back. Raises RuntimeError if that is no whole divisor.
    """
    import deepspeed

    probe = nn.Linear(8, 8, bias=False).to(device)
    adam = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
    engine, *_ = deepspeed.initialize(
        model=probe,
        model_parameters=list(probe.parameters()),
        config={**configuration, "optimizer": adam, "gradient_clipping": 0.0},
        dist_init_required=False,
    )
    steps = configuration["gradient_accumulation_steps"]
    x = torch.ones(1, 8, device=device, dtype=next(probe.parameters()).dtype)
    for step in range(steps):
        engine.backward(engine(x).sum())
        if step + 1 < steps:
            engine.step()
    found = [shard.abs().max().float() for shard in gradient_shards(engine.optimizer) if shard.numel()]
    reduced = torch.stack([*found, torch.zeros((), device=device)]).max()
    dist.all_reduce(reduced, op=dist.ReduceOp.MAX)
    engine.destroy()
    divisor = steps * dist.get_world_size() / float(reduced)
    if not abs(divisor - round(divisor)) < 1e-3 * divisor:
        raise RuntimeError(f"DeepSpeed divides the sum of the gradients by {divisor:.6g}, which is no whole number")
    return round(divisor)
