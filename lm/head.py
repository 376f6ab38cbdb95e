"""The language-model head: logits, or a loss that never holds the logits of a long row."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

IGNORED = -100
# Tokens whose logits exist at a time: 1024 x 128k classes in fp32 are 0.5 GB.
TOKENS_AT_ONCE = 1024


class Head(nn.Linear):
    """hidden -> logits; with labels, hidden -> the sum of their negative log-likelihoods."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__(width, vocabulary, bias=False)

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """hidden: [..., width]; labels: int64 [...], -100 where there is none.

        Returns logits [..., vocabulary] in the dtype of hidden, or with labels an fp32 scalar in nats (float64 for
        float64). The loss is a method of the head and not a function beside it because ZeRO-3 gathers a module's weight
        only around the module's own forward.
        """
        if labels is None:
            return F.linear(hidden, self.weight)
        return linear_cross_entropy(hidden.flatten(0, -2), self.weight, labels.flatten())


def linear_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of -log softmax(hidden weight')[label], in linear memory.

    hidden: [N, D]; weight: [V, D]; labels: int64 [N], -100 ignored. Logits and log-sum-exp in fp32 (float64 for float64
    inputs), the weight gradient accumulated in the same. Torch has this function from 2.13 on, where its accumulation
    follows the input's dtype; this one also serves 2.11, and sums half-precision rows in fp32.
    """
    if not torch.is_grad_enabled():
        return sum(_nll(part, weight, wanted)[0] for part, wanted in _pieces(hidden, labels))
    return _LinearCrossEntropy.apply(hidden, weight, labels)


class _LinearCrossEntropy(torch.autograd.Function):
    """Forward computes the gradients too, piece by piece, so that backward only scales them: d nll = (p - onehot)."""

    @staticmethod
    def forward(ctx, hidden, weight, labels):
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.zeros((), dtype=dtype, device=hidden.device)
        dhidden = torch.empty_like(hidden)
        dweight = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
        pieces = zip(dhidden.split(TOKENS_AT_ONCE), _pieces(hidden, labels), strict=True)
        for gradient, (part, wanted) in pieces:
            nll, log_p = _nll(part, weight, wanted)
            loss += nll
            valid = wanted != IGNORED
            p = log_p.exp_()
            p.scatter_add_(1, wanted.clamp(min=0)[:, None], torch.full_like(p[:, :1], -1.0))
            p = p.masked_fill_(~valid[:, None], 0.0).to(part.dtype)
            torch.mm(p, weight, out=gradient)
            if dtype == part.dtype:
                dweight.addmm_(p.t(), part)
            else:
                dweight += p.t() @ part
        ctx.save_for_backward(dhidden, dweight.to(weight.dtype))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale):
        dhidden, dweight = ctx.saved_tensors
        return dhidden * scale, dweight * scale, None


def _pieces(hidden: torch.Tensor, labels: torch.Tensor):
    return zip(hidden.split(TOKENS_AT_ONCE), labels.split(TOKENS_AT_ONCE), strict=True)


def _nll(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of nll, and log-probabilities [N, V]."""
    logits = F.linear(hidden, weight)
    log_p = torch.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    picked = log_p.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return -picked.masked_fill(labels == IGNORED, 0.0).sum(), log_p
