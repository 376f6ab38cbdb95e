"""RAT chunk by chunk in PyTorch: linear memory, any device, hand-written backward.

forward   scan: all chunks in lockstep, one `lerp` per slot, k~_t = k~_{t-1} + (1 - g_t) (k_t - k~_{t-1}); the last
          slots of finished chunks are the summaries. Inter-chunk attention as ordinary causal attention: chunks are
          positions, each slot of a chunk is a query head, and the queries of chunk c see the summaries before c; the
          heads of a group are the batch, so their shared query is read and never copied. The self term joins by the
          log-sum-exp.
saved     the inputs, the summaries, o and lse; the running states are computed again.
backward  with the final o and lse the attention backward gives the exact gradients of the inter-chunk part, because
          p = exp(s - lse) and delta = sum(do o) already count the self term; then one reverse scan in lockstep.

What is elementwise goes over the row a block of chunks at a time, which stays in the cache of a CPU.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from farspan.kernels.blocks import attention_block, attention_block_backward, hidden_mask
from farspan.kernels.rat.exchange import run_exchanged
from farspan.kernels.rat.grid import TOKENS_AT_ONCE, Document, Grid, make_grid

# Queries that follow earlier chunks need a mask; it is built for this many chunks at a time: linear memory.
MASKED_CHUNKS = 512


def rat_chunked(q, k, v, gate, gate_bias, z, rope, running, before, lengths, offsets, chunk, scale, exchange=None):
    """Mix packed documents; see `kernels.rat.rat` for the meaning.

    q, k: [1, T, G, D]; v, gate, z: [1, T, H, D]; gate_bias: [H, D]; rope: cos and sin, fp32 [chunks, D / 2], or None.
    running: key and value, [documents, H, D], fp32. before: summary keys and values, [chunks, H, D], of all documents'
    earlier chunks one after the other; `exchange` brings them in its place.
    Returns y [1, T, H, D], the new summaries (keys, values) [chunks, H, D], the new running states [documents, H, D].
    """
    cos, sin = (None, None) if rope is None else rope
    inputs = (q, k, v, gate, gate_bias, z, cos, sin, *running)
    constants = (list(lengths), list(offsets), chunk, scale)
    if exchange is not None:
        y, keys, values, key, value = run_exchanged(forward_pass, backward_pass, exchange, constants, *inputs)
    else:
        y, keys, values, key, value, *_ = _rat_forward(*inputs, *before, *constants)
    return y, (keys, values), (key, value)


def forward_pass(
    q, k, v, gate, gate_bias, z, cos, sin, running_key, running_value, before_keys, before_values,
    lengths, offsets, chunk, scale, exchange=None,
):  # fmt: skip
    """y, summary keys and values, running key and value; and what `backward_pass` takes after the inputs.

    exchange: brings the earlier summaries, in place of before_keys and before_values.
    """
    grid = make_grid(tuple(lengths), tuple(offsets), chunk, q.device)
    dtype = torch.promote_types(v.dtype, torch.float32)
    inputs = _Inputs.spread(q, k, v, gate, gate_bias, (running_key, running_value), grid, dtype)
    o = v.new_empty(grid.rows, chunk, *v.shape[2:], dtype=dtype)  # first the running values, then the outputs
    own = o.new_empty(o.shape[:-1])
    ends = [o.new_empty(grid.rows, *v.shape[2:]) for _ in range(2)]
    for rows in grid.blocks():
        block = inputs.rows(rows)
        key, _ = block.scan(value=o[rows])
        own[rows] = scale * _times_group(key, block.q).sum(-1)
        ends[0][rows], ends[1][rows] = key[:, -1], o[rows][:, -1]
    index, finished = grid.chunk_index, grid.finished_rows
    keys = turn(ends[0][finished], cos, sin, index[finished]).to(v.dtype)
    values = ends[1][finished].to(v.dtype)

    if exchange is not None:
        before_keys, before_values = exchange.forward(keys, values)
    lse = own.clone()
    turned = turn(inputs.q.to(dtype), cos, sin, index)
    for part in _parts(grid, (before_keys, before_values), (keys, values), q.shape[2], dtype):
        inter, inter_lse = part.attend(turned, scale)
        weight = torch.sigmoid(part.heads(own) - inter_lse)
        output = part.heads(o)
        torch.lerp(inter, output, weight[..., None], out=output)
        part.heads(lse).copy_(torch.logaddexp(part.heads(own), inter_lse))
    o = grid.collect(o)[None]
    y = torch.empty_like(v, memory_format=torch.contiguous_format)
    for tokens in _token_blocks(y):
        torch.mul(torch.sigmoid(z[:, tokens].to(dtype)), o[:, tokens], out=y[:, tokens])
    final = [end[grid.last_rows] for end in ends]
    return (y, keys, values, *final), (before_keys, before_values, keys, values, o.to(v.dtype), lse)


@torch.library.custom_op("farspan::rat_forward", mutates_args=())
def _rat_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate: torch.Tensor,
    gate_bias: torch.Tensor,
    z: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    running_key: torch.Tensor,
    running_value: torch.Tensor,
    before_keys: torch.Tensor,
    before_values: torch.Tensor,
    lengths: list[int],
    offsets: list[int],
    chunk: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns y, summary keys, summary values, running key, running value, o [1, T, H, D] and lse [rows, chunk, H]."""
    inputs = (q, k, v, gate, gate_bias, z, cos, sin, running_key, running_value, before_keys, before_values)
    results, saved = forward_pass(*inputs, lengths, offsets, chunk, scale)
    return *results, *saved[-2:]


@_rat_forward.register_fake
def _(
    q, k, v, gate, gate_bias, z, cos, sin, running_key, running_value, before_keys, before_values,
    lengths, offsets, chunk, scale,
):  # fmt: skip
    grid = make_grid(tuple(lengths), tuple(offsets), chunk, q.device)
    finished = sum(document.finished for document in grid.documents)
    summaries = [v.new_empty(finished, *v.shape[2:]) for _ in range(2)]
    final = [torch.empty_like(running_key), torch.empty_like(running_value)]
    lse = v.new_empty(grid.rows, chunk, v.shape[2], dtype=torch.promote_types(v.dtype, torch.float32))
    return torch.empty_like(v), *summaries, *final, torch.empty_like(v), lse


def backward_pass(
    dy, dkeys, dvalues, drunning_key, drunning_value, q, k, v, gate, gate_bias, z, cos, sin, running_key, running_value,
    before_keys, before_values, keys, values, o, lse, lengths, offsets, chunk, scale, exchange=None,
):  # fmt: skip
    """Gradients of q, k, v, gate, gate_bias, z, the running states and the earlier summaries; `exchange` takes these
    home and brings what other ranks found for the new summaries.
    """
    grid = make_grid(tuple(lengths), tuple(offsets), chunk, q.device)
    dtype, groups = lse.dtype, q.shape[2]
    inputs = _Inputs.spread(q, k, v, gate, gate_bias, (running_key, running_value), grid, dtype)
    index, finished, last = grid.chunk_index, grid.finished_rows, grid.last_rows

    do = torch.empty(v.shape, dtype=dtype, device=v.device)
    dz = torch.empty_like(z, memory_format=torch.contiguous_format)
    for tokens in _token_blocks(do):
        open_gate = torch.sigmoid(z[:, tokens].to(dtype))
        torch.mul(dy[:, tokens].to(dtype), open_gate, out=do[:, tokens])
        torch.mul(do[:, tokens] * o[:, tokens], 1 - open_gate, out=dz[:, tokens])
    do, o = grid.spread(do[0]), grid.spread(o[0].to(dtype))

    # the inter-chunk part
    turned = turn(inputs.q.to(dtype), cos, sin, index)
    dturned = torch.zeros_like(turned)
    dkeys, dvalues = dkeys.to(dtype, copy=True), dvalues.to(dtype, copy=True)
    dbefore = [torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (before_keys, before_values)]
    for part in _parts(grid, (before_keys, before_values), (keys, values), groups, dtype):
        part.backward(do, turned, o, lse, scale, dturned, dbefore, (dkeys, dvalues))
    if exchange is not None:
        for gradient, home in zip((dkeys, dvalues), exchange.backward(*dbefore), strict=True):
            gradient += home
    dq = turn(dturned, cos, sin, index, back=True)
    ends = [do.new_zeros(grid.rows, *v.shape[2:]) for _ in range(2)]  # adjoints of the states at the ends of chunks
    ends[0][finished], ends[1][finished] = turn(dkeys, cos, sin, index[finished], back=True), dvalues
    ends[0][last] += drunning_key
    ends[1][last] += drunning_value

    # the self term and the recurrence, a block of chunks at a time
    dk, dv, dgate = torch.empty_like(dq), torch.empty_like(do), torch.empty_like(do)
    starts = [torch.zeros_like(end) for end in ends]
    for rows in grid.blocks():
        block = inputs.rows(rows)
        key, value = block.scan()
        p = torch.exp(scale * _times_group(key, block.q).sum(-1) - lse[rows])
        ds = scale * p * (do[rows] * (value - o[rows])).sum(-1)
        dq[rows] += (ds[..., None] * key).unflatten(2, (-1, groups)).sum(2)
        adjoint_key = (ds.unflatten(2, (-1, groups))[..., None] * block.q[:, :, None]).flatten(2, 3)
        adjoint_value = do[rows] * p[..., None]
        adjoint_key[:, -1] += ends[0][rows]
        adjoint_value[:, -1] += ends[1][rows]
        starts[0][rows], starts[1][rows] = block.scan_backward(adjoint_key, adjoint_value)
        closed = torch.sigmoid(-block.gate)
        adjoint_key *= closed
        torch.mul(adjoint_value, closed, out=dv[rows])
        grouped = adjoint_key.unflatten(2, (-1, groups))
        torch.sum(grouped, 2, out=dk[rows])
        torch.mul(value.sub_(block.v), dv[rows], out=dgate[rows])
        difference = key.unflatten(2, (-1, groups)).sub_(block.k[:, :, None])
        dgate[rows].unflatten(2, (-1, groups)).addcmul_(difference, grouped)
    goes_on = grid.goes_on[:, None, None]
    drunning = [torch.where(goes_on, start[grid.first_rows], 0.0) for start in starts]
    return (
        grid.collect(dq)[None].to(q.dtype),
        grid.collect(dk)[None].to(k.dtype),
        grid.collect(dv)[None].to(v.dtype),
        grid.collect(dgate)[None].to(gate.dtype),
        dgate.sum((0, 1)).to(gate_bias.dtype),
        dz,
        *(x.to(running_key.dtype) for x in drunning),
        *(x.to(before_keys.dtype) for x in dbefore),
    )


@torch.library.custom_op("farspan::rat_backward", mutates_args=())
def _rat_backward(
    dy: torch.Tensor,
    dkeys: torch.Tensor,
    dvalues: torch.Tensor,
    drunning_key: torch.Tensor,
    drunning_value: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate: torch.Tensor,
    gate_bias: torch.Tensor,
    z: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    running_key: torch.Tensor,
    running_value: torch.Tensor,
    before_keys: torch.Tensor,
    before_values: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    lengths: list[int],
    offsets: list[int],
    chunk: int,
    scale: float,
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor,
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor,
]:  # fmt: skip
    """Gradients of q, k, v, gate, gate_bias, z, the running states and the earlier summaries."""
    gradients = (dy, dkeys, dvalues, drunning_key, drunning_value)
    inputs = (q, k, v, gate, gate_bias, z, cos, sin, running_key, running_value)
    saved = (before_keys, before_values, keys, values, o, lse)
    return backward_pass(*gradients, *inputs, *saved, lengths, offsets, chunk, scale)


@_rat_backward.register_fake
def _(
    dy, dkeys, dvalues, drunning_key, drunning_value, q, k, v, gate, gate_bias, z, cos, sin, running_key, running_value,
    before_keys, before_values, keys, values, o, lse, lengths, offsets, chunk, scale,
):  # fmt: skip
    inputs = (q, k, v, gate, gate_bias, z, running_key, running_value, before_keys, before_values)
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)


def _save(ctx, inputs, output):
    *tensors, lengths, offsets, chunk, scale = inputs
    ctx.constants = (lengths, offsets, chunk, scale)
    ctx.save_for_backward(*tensors, *output[1:3], *output[5:])
    ctx.mark_non_differentiable(*output[5:])


def _backward(ctx, dy, dkeys, dvalues, drunning_key, drunning_value, *_):
    gradients = _rat_backward(dy, dkeys, dvalues, drunning_key, drunning_value, *ctx.saved_tensors, *ctx.constants)
    return *gradients[:6], None, None, *gradients[6:], None, None, None, None


_rat_forward.register_autograd(_backward, setup_context=_save)


@dataclass
class _Inputs:
    """The inputs of the recurrence on the grid, [rows, chunk, H or G, D], and the states its rows start from.

    starts: running key and value [rows, H, D], zeros but where a document goes on inside a chunk; None if none does.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    gate: torch.Tensor
    gate_bias: torch.Tensor
    starts: tuple[torch.Tensor, torch.Tensor] | None
    dtype: torch.dtype

    @classmethod
    def spread(cls, q, k, v, gate, gate_bias, running, grid: Grid, dtype: torch.dtype) -> "_Inputs":
        gate = grid.spread(gate[0], empty=float("inf"))  # sigmoid(-inf) = 0 hands the state on through empty slots
        starts = None
        if any(document.skipped for document in grid.documents):
            goes_on = grid.goes_on[:, None, None]
            starts = tuple(v.new_zeros(grid.rows, *v.shape[2:], dtype=dtype) for _ in range(2))
            for start, state in zip(starts, running, strict=True):
                start[grid.first_rows] = torch.where(goes_on, state.to(dtype), 0.0)
        return cls(*(grid.spread(x[0]) for x in (q, k, v)), gate, gate_bias.to(dtype), starts, dtype)

    def rows(self, rows: slice) -> "_Inputs":
        """A block of rows, in the accumulation dtype, the bias in the gate."""
        q, k, v, gate = (x[rows].to(self.dtype) for x in (self.q, self.k, self.v, self.gate))
        starts = None if self.starts is None else tuple(start[rows] for start in self.starts)
        return _Inputs(q, k, v, gate + self.gate_bias, torch.zeros_like(self.gate_bias), starts, self.dtype)

    def scan(self, value: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Running keys and values after every slot, [rows, chunk, H, D]; the values into `value` if given."""
        grouped = (-1, self.k.shape[2])
        closed = torch.sigmoid(-self.gate)  # 1 - g without cancellation
        key = torch.empty_like(closed)
        value = torch.empty_like(closed) if value is None else value
        key_heads, closed_heads = key.unflatten(2, grouped), closed.unflatten(2, grouped)
        before_key, before_value = self.starts or (torch.zeros_like(key[:, 0]), torch.zeros_like(key[:, 0]))
        before_key = before_key.unflatten(1, grouped)
        for slot in range(closed.shape[1]):
            torch.lerp(before_key, self.k[:, slot, None], closed_heads[:, slot], out=key_heads[:, slot])
            torch.lerp(before_value, self.v[:, slot], closed[:, slot], out=value[:, slot])
            before_key, before_value = key_heads[:, slot], value[:, slot]
        return key, value

    def scan_backward(
        self, adjoint_key: torch.Tensor, adjoint_value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """From direct to total adjoints of the running states, in place; returns those of the states before slot 0."""
        g = torch.sigmoid(self.gate)
        for slot in range(g.shape[1] - 2, -1, -1):
            adjoint_key[:, slot].addcmul_(g[:, slot + 1], adjoint_key[:, slot + 1])
            adjoint_value[:, slot].addcmul_(g[:, slot + 1], adjoint_value[:, slot + 1])
        return g[:, 0] * adjoint_key[:, 0], g[:, 0] * adjoint_value[:, 0]


@dataclass
class _Part:
    """The heads of one group of one document: its query rows, and the summaries that they see.

    Query row i sees the first `seen + i + 1` of keys, values [H / G, 1, S, D]; `prefix` of these were given, and
    `document.finished` are new.
    """

    document: Document
    group: int
    groups: int
    first: int
    rows: int
    seen: int
    keys: torch.Tensor
    values: torch.Tensor
    known: slice
    new: slice

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """View [H / G, chunk, rows, ...] of a grid tensor [rows, chunk, H, ...]."""
        own = x[self.first : self.first + self.rows].unflatten(2, (-1, self.groups))[:, :, :, self.group]
        return own.permute(2, 1, 0, *range(3, own.ndim))

    def query(self, turned: torch.Tensor) -> torch.Tensor:
        """View [H / G, chunk, rows, D] of the rotated queries [rows, chunk, G, D], the same for every head."""
        own = turned[self.first : self.first + self.rows, :, self.group].transpose(0, 1)
        return own.expand(self.keys.shape[0], -1, -1, -1)

    def pieces(self) -> Iterator[tuple[slice, int, torch.Tensor | None]]:
        """Query rows, keys that they see at most, and the mask (None: plain causal)."""
        device, dtype = self.keys.device, self.keys.dtype
        if self.seen == 0:
            yield slice(0, self.rows), self.rows, None
            return
        for start in range(0, self.rows, MASKED_CHUNKS):
            end = min(start + MASKED_CHUNKS, self.rows)
            key = torch.arange(self.seen + end, device=device)
            hidden = key > torch.arange(self.seen + start, self.seen + end, device=device)[:, None]
            yield slice(start, end), self.seen + end, hidden_mask(hidden, dtype)

    def attend(self, turned: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """o [H / G, chunk, rows, D] and lse [H / G, chunk, rows] of the inter-chunk part alone."""
        q, results = self.query(turned), []
        for rows, seen, mask in self.pieces():
            block = (q[:, :, rows], self.keys[:, :, :seen], self.values[:, :, :seen])
            results.append(attention_block(*block, scale, mask, causal=mask is None))
        return tuple(torch.cat(side, dim=2) for side in zip(*results, strict=True))

    def backward(self, do, turned, o, lse, scale, dturned, dbefore, dsummaries) -> None:
        """Add to dturned [rows, chunk, G, D], and to the gradients of the known and the new summaries."""
        q, do, o, lse = self.query(turned), self.heads(do), self.heads(o), self.heads(lse)
        dquery = dturned[self.first : self.first + self.rows, :, self.group]
        dkeys, dvalues = torch.zeros_like(self.keys), torch.zeros_like(self.values)
        for rows, seen, mask in self.pieces():
            block = (q[:, :, rows], self.keys[:, :, :seen], self.values[:, :, :seen], o[:, :, rows], lse[:, :, rows])
            dq, dk, dv = attention_block_backward(do[:, :, rows], *block, scale, mask, causal=mask is None)
            dquery[rows] += dq.sum(0).transpose(0, 1)
            dkeys[:, :, :seen] += dk
            dvalues[:, :, :seen] += dv
        count = self.known.stop - self.known.start
        for gradient, known, new in zip((dkeys, dvalues), dbefore, dsummaries, strict=True):
            gradient = gradient[:, 0].transpose(0, 1)  # [S, H / G, D]
            known[self.known].unflatten(1, (-1, self.groups))[:, :, self.group] += gradient[:count]
            new[self.new].unflatten(1, (-1, self.groups))[:, :, self.group] += gradient[count:]


def _parts(grid: Grid, before, summaries, groups: int, dtype: torch.dtype) -> Iterator[_Part]:
    """The documents and groups in which some token sees a finished chunk."""
    known = new = 0
    for document in grid.documents:
        skip = 0 if document.before else 1  # the first chunk of all sees nothing but itself
        rows = document.rows - skip
        visible = document.rows - 1  # the last row's own summary is for later calls
        own = slice(new, new + visible)
        given = slice(known, known + document.before)
        new, known = new + document.finished, known + document.before
        if not rows:
            continue
        sides = [torch.cat([b[given], s[own]]).to(dtype) for b, s in zip(before, summaries, strict=True)]
        for group in range(groups):
            keys, values = (x.unflatten(1, (-1, groups))[:, :, group].transpose(0, 1)[:, None] for x in sides)
            seen = document.before - 1 + skip
            yield _Part(document, group, groups, document.first + skip, rows, seen, keys, values, given, own)


def _token_blocks(x: torch.Tensor) -> Iterator[slice]:
    """The tokens of x [1, T, ...] in runs that fit a cache."""
    return (slice(start, start + TOKENS_AT_ONCE) for start in range(0, x.shape[1], TOKENS_AT_ONCE))


def _times_group(x: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """x [rows, chunk, H, D] times the group's tensor [rows, chunk, G, D] of each head."""
    return (x.unflatten(2, (-1, shared.shape[2])) * shared[:, :, None]).flatten(2, 3)


def turn(x, cos, sin, index, back: bool = False) -> torch.Tensor:
    """x [rows, ..., D] rotated by the angles of chunk index [rows], or turned back."""
    if cos is None:
        return x
    shape = (len(index), *(1,) * (x.ndim - 2), cos.shape[1])
    cos, sin = cos[index].to(x.dtype).reshape(shape), sin[index].to(x.dtype).reshape(shape)
    sin = -sin if back else sin
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
