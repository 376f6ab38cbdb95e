"""The gates of the Titans memory: how fast each head forgets, how long its surprise lasts, how far a step goes."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from farspan.kernels.titans.state import LOG_FLOOR, Gates
from farspan.layers.titans_options import TitansOptions

# Half-lives of the weights at the start, in tokens, of the first and the last head.
HALF_LIVES = (64.0, 4096.0)


class MemoryGates(nn.Module):
    """Per token and head, with a = x w + b in fp32 or wider:

    log decay = logsigmoid(-a_alpha), log momentum = logsigmoid(a_eta), rate = kappa (1 - momentum) sigmoid(a_theta).
    The rate can thus never leave the stable range, whatever the weights. With theta_mode "raw" the rate is kappa
    sigmoid(a_theta) and the momentum at most `largest_momentum` (section 3.1 of arXiv 2501.00663 leaves the form open).
    """

    def __init__(self, options: TitansOptions) -> None:
        super().__init__()
        self.options = options
        self.logits = nn.Linear(options.width, 3 * options.heads, bias=False)
        self.bias = nn.Parameter(torch.empty(3 * options.heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Heads start with half-lives from 64 to 4096 tokens, evenly in logarithm; momentum and rate in the middle."""
        heads = self.options.heads
        half_lives = torch.linspace(*map(math.log, HALF_LIVES), heads, dtype=torch.float64).exp()
        forgotten = -torch.expm1(-math.log(2) / half_lives)
        self.bias.zero_()
        self.bias[:heads] = torch.logit(forgotten)

    def forward(self, x: torch.Tensor) -> Gates:
        """x: [1, T, width]. Returns gates [1, T, H], fp32 or wider."""
        options, wide = self.options, torch.promote_types(x.dtype, torch.float32)
        logits = self.logits(x).to(wide) + self.bias.to(wide)  # the bias at full precision: it sets half-lives
        forget, last, step = logits.split(options.heads, dim=-1)
        log_decay = F.logsigmoid(-forget).clamp(min=LOG_FLOOR)
        log_momentum = F.logsigmoid(last).clamp(min=LOG_FLOOR)
        rate = options.kappa * torch.sigmoid(step)
        if options.theta_mode == "raw":
            log_momentum = (log_momentum + math.log(options.largest_momentum)).clamp(min=LOG_FLOOR)
        elif options.momentum:
            rate = rate * torch.sigmoid(-last)
        if not (options.momentum and options.write):
            log_momentum = log_momentum * 0 + LOG_FLOOR
        if not (options.decay and options.write):
            log_decay = log_decay * 0
        return Gates(log_decay, log_momentum, rate if options.write else rate * 0)
