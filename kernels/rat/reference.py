"""RAT by its equations: one token after another, then the whole score matrix over chunk summaries."""

from __future__ import annotations

import torch

from farspan.kernels.rat.exchange import Exchange, exchanged_by_autograd

Tensors = tuple[torch.Tensor, ...]


def rat_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate: torch.Tensor,
    gate_bias: torch.Tensor,
    z: torch.Tensor,
    rope: tuple[torch.Tensor, torch.Tensor] | None,
    running: tuple[torch.Tensor, torch.Tensor],
    before: tuple[torch.Tensor, torch.Tensor],
    lengths: tuple[int, ...],
    offsets: tuple[int, ...],
    chunk: int,
    scale: float,
    exchange: Exchange | None = None,
) -> tuple[torch.Tensor, Tensors, Tensors]:
    """Arguments as `kernels.rat.chunked.rat_chunked`; computed in fp32, or float64 for float64 inputs."""
    if exchange is not None:  # by its definition: the new summaries, which no other summary enters, go first
        inputs = (q, k, v, gate, gate_bias, z, rope, running)
        nothing = (v.new_zeros(sum(offset // chunk for offset in offsets), *v.shape[2:]),) * 2
        _, new, _ = rat_reference(*inputs, nothing, lengths, offsets, chunk, scale)
        # The zeros: the backward pass of every rank must come by the exchange, also where there is nothing to exchange.
        before = exchanged_by_autograd(exchange, *(side + 0 * v.sum() for side in new))
        y, new, final = rat_reference(*inputs, before, lengths, offsets, chunk, scale)
        return y + 0 * sum(side.sum() for side in before), new, final
    dtype = torch.promote_types(v.dtype, torch.float32)
    heads = v.shape[2]
    tile = heads // q.shape[2]
    outputs, summaries, finals, start, first = [], [], [], 0, 0
    for document, (length, offset) in enumerate(zip(lengths, offsets, strict=True)):
        tokens = slice(start, start + length)
        queries, keys = (x[0, tokens].to(dtype).repeat(1, tile, 1) for x in (q, k))  # head h reads group h mod groups
        values = v[0, tokens].to(dtype)
        a = gate[0, tokens].to(dtype) + gate_bias.to(dtype)
        g, closed = torch.sigmoid(a), torch.sigmoid(-a)  # closed is 1 - g without cancellation
        known = slice(first, first + offset // chunk)
        summary_keys = list(before[0][known].to(dtype))
        summary_values = list(before[1][known].to(dtype))

        # k~_t = g_t k~_{t-1} + (1 - g_t) k_t, starting from nothing at every chunk; v~ likewise
        key, value = running[0][document].to(dtype), running[1][document].to(dtype)
        running_keys, running_values = [], []
        # unbound once: the backward pass of g[t] writes a whole zero tensor for every token
        gates, inverse, new_keys, new_values = (x.unbind() for x in (g, closed, keys, values))
        for t in range(length):
            if (offset + t) % chunk == 0:
                key, value = torch.zeros_like(key), torch.zeros_like(value)
            key = gates[t] * key + inverse[t] * new_keys[t]
            value = gates[t] * value + inverse[t] * new_values[t]
            running_keys.append(key)
            running_values.append(value)
            if (offset + t) % chunk == chunk - 1:
                summary_keys.append(_turn(key, rope, (offset + t) // chunk))
                summary_values.append(value)
        running_keys, running_values = torch.stack(running_keys), torch.stack(running_values)

        # one softmax over the finished chunks and the token's own running state
        index = torch.arange(offset, offset + length, device=q.device) // chunk
        own = scale * (queries * running_keys).sum(-1, keepdim=True)
        if summary_keys:
            all_keys, all_values = torch.stack(summary_keys), torch.stack(summary_values)
            scores = scale * torch.einsum("thd,jhd->thj", _turn(queries, rope, index), all_keys)
            hidden = torch.arange(len(summary_keys), device=q.device) >= index[:, None]
            p = torch.cat([scores.masked_fill(hidden[:, None], float("-inf")), own], dim=-1).softmax(dim=-1)
            o = torch.einsum("thj,jhd->thd", p[..., :-1], all_values) + p[..., -1:] * running_values
        else:
            o = running_values
        outputs.append(torch.sigmoid(z[0, tokens].to(dtype)) * o)
        new = slice(offset // chunk, None)
        summaries.append((_stack(summary_keys[new], key), _stack(summary_values[new], value)))
        finals.append((key, value))
        start, first = start + length, first + offset // chunk
    return (
        torch.cat(outputs)[None].to(v.dtype),
        tuple(torch.cat(side).to(v.dtype) for side in zip(*summaries, strict=True)),
        tuple(torch.stack(side) for side in zip(*finals, strict=True)),
    )


def _turn(x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor] | None, index: torch.Tensor | int) -> torch.Tensor:
    """x [..., heads, D] rotated by the angles of chunk `index`, channel i with channel i + D/2."""
    if rope is None:
        return x
    cos, sin = (table[index].to(x.dtype).unsqueeze(-2) for table in rope)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _stack(parts: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    return torch.stack(parts) if parts else like.new_zeros(0, *like.shape)
