"""Learning rate schedules: pure functions of the progress of a run.

A run of `train.minutes` is a run of a fixed number of steps all the same. Its speed is measured before the first step,
the number of steps that fit the budget is decided once, written into the run folder, and from then on progress is
`(step + 1) / total`, as in any other run. Were progress the elapsed time, a resumed run would see other learning rates
than the uninterrupted one, and no two runs would be comparable step by step.
"""

import math

from farspan.lm.recipe import ScheduleSpec


def factor(spec: ScheduleSpec, step: int, total_steps: int) -> float:
    """The factor on the optimizer's rates at `step` (from 0) of `total_steps`: at most 1, `spec.final` at the last
    step.
    """
    progress = (step + 1) / total_steps
    warmup = spec.warmup / total_steps if spec.warmup >= 1 else spec.warmup
    if spec.name == "cosine":
        return cosine(progress, min(warmup, 1.0), spec.final)
    return warmup_stable_decay(progress, min(warmup, 1.0), 0.2 if spec.decay is None else spec.decay, spec.final)


def cosine(progress: float, warmup: float, final: float) -> float:
    """Linear from 0 to 1 over the fraction `warmup`, then half a cosine down to `final` at progress 1."""
    if progress < warmup:
        return progress / warmup
    done = (progress - warmup) / (1 - warmup) if warmup < 1 else 0.0
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))


def warmup_stable_decay(progress: float, warmup: float, decay: float, final: float) -> float:
    """Linear from 0 to 1 over the fraction `warmup`, constant, then linear to `final` over the last fraction
    `decay`.
    """
    if progress < warmup:
        return progress / warmup
    return min(1.0, final + (1 - final) * (1 - progress) / decay)


def steps_in_budget(minutes: float, seconds_per_step: float) -> int:
    """How many steps of the measured speed fit into the budget; at least one."""
    return max(1, int(minutes * 60 / seconds_per_step))
