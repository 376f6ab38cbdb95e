"""The decision not to apply a step, made on the device."""

import torch

from farspan.lm.recipe import SpikeSpec

SMALLEST_DEVIATION = 0.01  # of the mean: in a run that hardly moves, six deviations of nothing are no spike


class SpikeGuard:
    """Judges each step by its loss and gradient norm against those of the last steps that were applied.

    All state lives on the device and nothing is read back: the verdict is a factor for the gradient, 1 or NaN, and the
    optimizer's own finite check drops the step (see `Engine.train_step`). Every rank judges the same numbers, so all
    agree.
    """

    def __init__(self, spec: SpikeSpec, device: torch.device):
        self._spec = spec
        self._values = torch.zeros(2, spec.window, device=device)  # loss, gradient norm: a ring
        self._count = torch.zeros((), dtype=torch.int64, device=device)  # of applied steps

    def judge(self, loss: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        """fp32 scalar: 1 where the step is good, NaN where it is not finite or a spike; good steps join the statistics.

        loss, norm: fp32 scalars on the device, the same on all ranks.
        """
        window = self._values.shape[1]
        value = torch.stack([loss, norm])
        known = self._count.clamp(max=window)
        filled = torch.arange(window, device=value.device) < known
        mean = (self._values * filled).sum(1) / known.clamp(min=1)
        variance = ((self._values - mean[:, None]) * filled).square().sum(1) / known.clamp(min=1)
        deviation = torch.maximum(variance.sqrt(), SMALLEST_DEVIATION * mean.abs())
        spike = (value > mean + self._spec.sigma * deviation) & (known >= self._spec.history)
        good = (value.isfinite() & ~spike).all()
        here = (torch.arange(window, device=value.device) == self._count % window) & good
        self._values = torch.where(here, value[:, None], self._values)
        self._count = self._count + good
        return torch.where(good, 1.0, float("nan"))

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"values": self._values.cpu(), "count": self._count.cpu()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self._values, self._count = state["values"].to(self._values), state["count"].to(self._count)
