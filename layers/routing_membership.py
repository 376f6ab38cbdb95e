"""Which tokens a cluster holds, and when: the rules that look at a document's scores for a cluster.

Everything here is without gradient; scores are [heads, clusters, tokens] of one document.

    streaming   the w best tokens among those so far: a token enters while fewer than w tokens before it score at least
                as much, and leaves when w tokens are better: those before it with at least its score, those after it
                with a higher one
    balanced    the w best tokens of the whole document, of the future too

Nearest centroid needs no rule of this kind: a token is in its cluster from its own position on
(`layers.routing_lists`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# Tokens whose scores are compared with each other, and with the w best before them, at a time.
CHUNK = 32


class Held(NamedTuple):
    """What a cluster holds at the end of a row: scores [H, C, w], and entered [H, C, w], the positions, in any order.

    Free places have a score of -inf.
    """

    scores: torch.Tensor
    entered: torch.Tensor


class Membership(NamedTuple):
    """enters: bool [H, C, T]. leaves: int64 [H, C, T], the token of the row at which it is out, T if it stays.

    leaves_held: int64 [H, C, w], the same for what was held before the row; None where nothing was.
    """

    enters: torch.Tensor
    leaves: torch.Tensor
    leaves_held: torch.Tensor | None = None


@torch.no_grad()
def balanced(scores: torch.Tensor, window: int) -> Membership:
    """The `window` tokens with the largest scores of each cluster; of equal ones the first. They never leave."""
    tokens = scores.shape[-1]
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :window]
    enters = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device).scatter_(-1, best, True)
    return Membership(enters, torch.full_like(enters, tokens, dtype=torch.int64))


@torch.no_grad()
def streaming(scores: torch.Tensor, window: int, held: Held | None = None) -> Membership:
    """The `window` largest scores among the tokens so far; a newcomer must score more than what it drives out, and of
    equal ones the last goes first.
    """
    tokens = scores.shape[-1]
    if held is None and tokens <= window:
        everyone = torch.ones(scores.shape, dtype=torch.bool, device=scores.device)
        return Membership(everyone, torch.full_like(everyone, tokens, dtype=torch.int64))
    shape = *scores.shape[:2], window
    if held is None:
        best = scores.new_full(shape, float("-inf"))
        order = torch.arange(window, device=scores.device).expand(shape)
    else:
        order = _by_rank(held)
        best = held.scores.gather(-1, order)
    # where each of the best came from: a place of `held`, or a token after them
    source = order
    enters = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    leaves = scores.new_full((*scores.shape[:2], window + tokens), tokens, dtype=torch.int64)
    rank = torch.arange(window, device=scores.device).expand(shape)
    narrow = torch.int16 if window + CHUNK < 2**15 else torch.int32
    for start in range(0, tokens, CHUNK):
        part = scores[..., start : start + CHUNK]
        count = part.shape[-1]
        time = torch.arange(count, device=scores.device)
        # [s, t]: token t of the chunk comes after s and drives it one place back
        beats_best = part[..., None, :] > best[..., :, None]
        beats_own = (part[..., None, :] > part[..., :, None]) & (time > time[:, None])
        before = (part[..., None, :] >= part[..., :, None]) & (time < time[:, None])
        own_rank = (best[..., None, :] >= part[..., :, None]).sum(-1) + before.sum(-1)
        beaten = torch.cat([beats_best, beats_own], dim=-2)
        places = torch.cat([rank, own_rank], dim=-1)
        inside = beaten.cumsum(-1, dtype=narrow) + places[..., None].to(narrow) < window
        alive = inside[..., -1]
        own = own_rank < window
        enters[..., start : start + count] = own
        # a token is inside from its own time on: the times before it do not count against it
        out = inside.sum(-1) + start
        sources = torch.cat([source, (window + start + time).expand(own.shape)], dim=-1)
        leaves.scatter_(-1, sources, torch.where(alive, tokens, out))
        everyone = torch.cat([best, part], dim=-1).masked_fill(~alive, float("-inf"))
        # those that stay keep their order: equal scores stay in order of position
        best, kept = (x[..., :window] for x in everyone.sort(dim=-1, descending=True, stable=True))
        source = sources.gather(-1, kept)
    return Membership(enters, leaves[..., window:], None if held is None else leaves[..., :window])


def _by_rank(held: Held) -> torch.Tensor:
    """Places from the largest score to the smallest, equal ones by position."""
    by_position = held.entered.argsort(dim=-1, stable=True)
    by_score = held.scores.gather(-1, by_position).argsort(dim=-1, descending=True, stable=True)
    return by_position.gather(-1, by_score)


@torch.no_grad()
def hold(scores: torch.Tensor, membership: Membership, window: int, held: Held | None = None):
    """What is held after the row. Returns int64 [H, C, w], for each place where it came from (a place of `held`, then
    tokens, counted through; without `held` tokens alone), and bool [H, C, w], whether it is taken.
    """
    tokens = scores.shape[-1]
    stays = membership.enters & (membership.leaves == tokens)
    if held is not None:
        kept = (membership.leaves_held == tokens) & held.scores.isfinite()
        stays = torch.cat([kept, stays], dim=-1)
    missing = window - stays.shape[-1]
    if missing > 0:
        stays = torch.nn.functional.pad(stays, (0, missing))
    source = (~stays).to(torch.uint8).argsort(dim=-1, stable=True)[..., :window]
    taken = stays.gather(-1, source)
    return source.where(taken, 0), taken
