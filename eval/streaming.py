"""Negative log-likelihood of every token of one long document: streamed through states, or window by window.

stream_nll     chunk after chunk through the model's cache: what one forward pass over the whole document gives,
               in the memory of one chunk and the states (a ring for windows; softmax caches every token, RAT
               a summary per chunk of its own)
windowed_nll   windows cut from the document, nothing carried over: a token sees at most one window
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from farspan.lm.cache import DecoderCache
from farspan.lm.decoder import DecoderForCausalLM
from farspan.lm.head import TOKENS_AT_ONCE

Progress = Callable[[int], None]


def _ignore(done: int) -> None:
    pass


@torch.no_grad()
def stream_nll(
    model: DecoderForCausalLM,
    ids: np.ndarray,
    chunk: int = TOKENS_AT_ONCE,
    *,
    cache: DecoderCache | None = None,
    out: np.ndarray | None = None,
    progress: Progress = _ignore,
) -> np.ndarray:
    """-log p(ids[t + 1] | everything up to ids[t]) in nats, for every t but the last.

    ids: [T] whole numbers on the host, T >= 2, may be memory-mapped: only a chunk of them is read at a time.
    chunk: tokens of one forward pass; changes speed and memory, not the result.
    cache: of one row; the document goes on where it stands, and it is left after ids[T - 2]. New when None.
    out: [T - 1] to write into, may be memory-mapped; a new fp32 array (float64 for a float64 model) when None.
    progress: called after every chunk with the number of values that are done.

    Returns out. Raises ValueError for ids, chunk, cache or out that do not fit, and for a model that is not farspan's.
    """
    count, out = _checked(model, ids, out)
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1 token")
    cache = model.model.new_cache(1) if cache is None else cache
    if cache.batch_size != 1:
        raise ValueError(f"the cache has {cache.batch_size} rows; a document is one row")
    for start in range(0, count, chunk):
        stop = min(start + chunk, count)
        hidden = model.model(_on(model, ids[start:stop]), past_key_values=cache).last_hidden_state[0]
        _write_nll(model, hidden, ids[start + 1 : stop + 1], out[start:stop])
        progress(stop)
    return out


@torch.no_grad()
def windowed_nll(
    model: DecoderForCausalLM,
    ids: np.ndarray,
    window: int,
    stride: int,
    *,
    out: np.ndarray | None = None,
    progress: Progress = _ignore,
) -> np.ndarray:
    """As `stream_nll`, but a token sees only its own window: the usual sliding evaluation of a model of fixed length.

    Windows of `window` tokens begin at every multiple of `stride`. A value comes from the first window that holds its
    token, so that all but the first `window` of them saw between window - stride + 1 and window tokens.
    Raises ValueError as `stream_nll`, and unless 1 <= stride <= window.
    """
    count, out = _checked(model, ids, out)
    if not 1 <= stride <= window:
        raise ValueError(f"stride={stride} must be between 1 and window={window}, or tokens are left out")
    done = 0
    for start in range(0, count, stride):
        stop = min(start + window, count)
        hidden = model.model(_on(model, ids[start:stop]), use_cache=False).last_hidden_state[0]
        _write_nll(model, hidden[done - start :], ids[done + 1 : stop + 1], out[done:stop])
        done = stop
        progress(done)
        if done == count:
            break
    return out


def state_bytes(cache: DecoderCache) -> int:
    """Bytes of all tensors of all states."""
    return sum(value.nbytes for state in cache.states for value in state.values())


def check_model(model: Any) -> None:
    """ValueError unless it is a farspan decoder, whose states can be carried."""
    if not isinstance(model, DecoderForCausalLM):
        raise ValueError(f"{type(model).__name__} is not a farspan decoder: its states cannot be carried or measured")


def _checked(model: Any, ids: np.ndarray, out: np.ndarray | None) -> tuple[int, np.ndarray]:
    """How many values there are, and where they go."""
    check_model(model)
    if ids.ndim != 1 or len(ids) < 2:
        raise ValueError(f"ids {list(ids.shape)} must be one document [T] of at least 2 tokens")
    count = len(ids) - 1
    if out is None:
        out = np.empty(count, dtype=np.float64 if model.dtype == torch.float64 else np.float32)
    if out.shape != (count,):
        raise ValueError(f"out is {list(out.shape)}, the document gives {count} values")
    return count, out


def _on(model: DecoderForCausalLM, ids: np.ndarray) -> torch.Tensor:
    """int64 [1, n] where the model is; a copy, since a memory-mapped file may be read-only."""
    return torch.from_numpy(np.array(ids, dtype=np.int64)).to(model.device)[None]


def _write_nll(model: DecoderForCausalLM, hidden: torch.Tensor, targets: np.ndarray, out: np.ndarray) -> None:
    """hidden: [n, width]; targets, out: [n]. Never holds the logits of more than TOKENS_AT_ONCE tokens."""
    targets = _on(model, targets)[0]
    start = 0
    for part, wanted in zip(hidden.split(TOKENS_AT_ONCE), targets.split(TOKENS_AT_ONCE), strict=True):
        logits = model.lm_head(part)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        nll = F.cross_entropy(logits, wanted, reduction="none")
        out[start : start + len(part)] = nll.cpu().numpy()
        start += len(part)
