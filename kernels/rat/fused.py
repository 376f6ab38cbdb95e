"""RAT in Triton kernels: the algorithm and its cost are in fused_forward.py and fused_backward.py.

Saved for the backward pass: the inputs, y (which the output projection keeps anyway), lse, the turned queries and the
summaries. The running states are computed again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from farspan.kernels.launch import architecture, packed, sum_first
from farspan.kernels.rat import fused_plan
from farspan.kernels.rat.exchange import run_exchanged
from farspan.kernels.rat.fused_backward import (
    gate_backward_kernel,
    keys_backward_kernel,
    queries_backward_kernel,
    states_backward_kernel,
)
from farspan.kernels.rat.fused_forward import attend_kernel, carry_kernel, piece_ends_kernel, states_kernel
from farspan.kernels.rat.fused_plan import PROGRAMS, Plan, make_plan
from farspan.kernels.rat.fused_tiles import BACKWARD, CARRIED, FORWARD, GATE_ROWS, Launch, compilations

__all__ = ["compilations", "rat_fused"]


def rat_fused(q, k, v, gate, gate_bias, z, rope, running, before, lengths, offsets, chunk, scale, exchange=None):
    """Arguments and results as `kernels.rat.chunked.rat_chunked`; CUDA tensors (any under TRITON_INTERPRET=1).

    fp32, bf16 or fp16; head dims are even and at most 256, else ValueError.
    """
    if v.shape[-1] % 2 or v.shape[-1] > 256 or v.dtype == torch.float64:
        raise ValueError(
            f"backend='fused' takes even head dims up to 256 in fp32, bf16 or fp16, not {v.shape[-1]} in {v.dtype}; "
            "use backend='chunked'"
        )
    cos, sin = (None, None) if rope is None else rope
    inputs = (q, k, v, gate, gate_bias, z, cos, sin, *running)
    constants = (list(lengths), list(offsets), chunk, scale)
    if exchange is not None:
        y, keys, values, key, value = run_exchanged(forward_pass, backward_pass, exchange, constants, *inputs)
    else:
        y, keys, values, key, value, *_ = _fused_forward(*inputs, *before, *constants)
    return y, (keys, values), (key, value)


def forward_pass(
    q, k, v, gate, gate_bias, z, cos, sin, running_key, running_value, before_keys, before_values,
    lengths, offsets, chunk, scale, exchange=None,
):  # fmt: skip
    """Results and arguments as `kernels.rat.chunked.forward_pass`."""
    call = _Call.of(q, k, v, gate, gate_bias, z, cos, sin, running_key, running_value, lengths, offsets, chunk, scale)
    plan, launch = call.plan, call.launch
    keys, values = (call.with_known(x) for x in (before_keys, before_values))
    y, final = v.new_empty(v.shape), [torch.empty_like(x) for x in call.running]
    lse = v.new_empty(launch.heads, call.tokens, dtype=torch.float32)
    turned = call.q if cos is None else q.new_empty(q.shape)
    initial, _ = call.row_states()
    parts = launch.parts(FORWARD)
    constants = launch.lockstep(FORWARD)
    states_kernel[(triton.cdiv(plan.rows, constants["N"]) * parts,)](
        *call.recurrence, *call.angles, *initial, plan.row_table, turned, lse, y, keys, values, *final,
        plan.rows, plan.slots, call.tokens, scale, call.q.stride(1), *call.strides,
        **constants, ROTATE=cos is not None, PIECES=plan.pieced,
    )  # fmt: skip
    new = [x if plan.new == plan.summaries else x[plan.new_index] for x in (keys, values)]
    if exchange is not None:
        before_keys, before_values = exchange.forward(*new)
        keys[plan.known_index], values[plan.known_index] = before_keys, before_values
    tile = launch.tiles[0]
    table = plan.query_table(tile.M)
    attend_kernel[(table.shape[1] * launch.heads,)](
        turned, keys, values, call.z, lse, y, table, table.shape[1], call.tokens, chunk, scale,
        turned.stride(1), call.z.stride(1), **launch.blocks(tile),
    )  # fmt: skip
    turned = q.new_empty(0) if cos is None else turned
    return (y, *new, *final), (before_keys, before_values, y, *new, turned, lse)


@torch.library.custom_op("farspan::rat_fused_forward", mutates_args=())
def _fused_forward(
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
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]:  # fmt: skip
    """Returns y, new summary keys and values, final running key and value, turned queries (empty without rope) and lse,
    fp32 [H, T].
    """
    inputs = (q, k, v, gate, gate_bias, z, cos, sin, running_key, running_value, before_keys, before_values)
    results, saved = forward_pass(*inputs, lengths, offsets, chunk, scale)
    return *results, *saved[-2:]


@_fused_forward.register_fake
def _(
    q, k, v, gate, gate_bias, z, cos, sin, running_key, running_value, before_keys, before_values,
    lengths, offsets, chunk, scale,
):  # fmt: skip
    pairs = zip(lengths, offsets, strict=True)
    finished = sum((offset + length) // chunk - offset // chunk for length, offset in pairs)
    summaries = [v.new_empty(finished, *v.shape[2:]) for _ in range(2)]
    final = [x.new_empty(x.shape) for x in (running_key, running_value)]
    turned = q.new_empty(0) if cos is None else q.new_empty(q.shape)
    return v.new_empty(v.shape), *summaries, *final, turned, v.new_empty(v.shape[2], v.shape[1], dtype=torch.float32)


def backward_pass(
    dy, dkeys, dvalues, dfinal_key, dfinal_value, q, k, v, gate, gate_bias, z, cos, sin, running_key, running_value,
    before_keys, before_values, y, new_keys, new_values, turned, lse, lengths, offsets, chunk, scale, exchange=None,
):  # fmt: skip
    """Arguments and gradients as `kernels.rat.chunked.backward_pass`, with y and the turned queries saved."""
    call = _Call.of(q, k, v, gate, gate_bias, z, cos, sin, running_key, running_value, lengths, offsets, chunk, scale)
    plan, launch, tokens = call.plan, call.launch, call.tokens
    turned = call.q if cos is None else turned
    keys, values = call.with_known(before_keys, new_keys), call.with_known(before_values, new_values)
    dy = packed(dy)

    do, dz, delta = v.new_empty(v.shape), z.new_empty(z.shape), torch.empty_like(lse)
    gate_backward_kernel[(triton.cdiv(tokens * launch.heads, GATE_ROWS),)](
        dy, y, call.z, do, dz, delta, tokens, dy.stride(1), call.z.stride(1), **launch.gate
    )

    tile = launch.tiles[1]
    table, splits = plan.key_table(tile.N, tile.M, launch.heads)
    dkeys_all, dvalues_all = (lse.new_empty(splits, *keys.shape) for _ in range(2))
    if plan.summaries:
        keys_backward_kernel[(table.shape[1] * launch.heads,)](
            turned, keys, values, do, lse, delta, dkeys_all, dvalues_all, table, table.shape[1], plan.summaries, tokens,
            chunk, scale, turned.stride(1), **launch.blocks(tile),
        )  # fmt: skip
    dkeys_all, dvalues_all = sum_first(dkeys_all), sum_first(dvalues_all)
    for total, new in ((dkeys_all, dkeys), (dvalues_all, dvalues)):
        if new is not None:
            total.index_add_(0, plan.new_index, new.float())
    if exchange is not None:
        home = exchange.backward(dkeys_all[plan.known_index], dvalues_all[plan.known_index])
        for total, new in zip((dkeys_all, dvalues_all), home, strict=True):
            total.index_add_(0, plan.new_index, new.float())

    tile = launch.tiles[2]
    table = plan.query_table(tile.M)
    programs = table.shape[1] * launch.groups
    share = triton.cdiv(launch.share, min(launch.share, triton.cdiv(PROGRAMS // 2, programs)))
    splits = triton.cdiv(launch.share, share)
    dturned = lse.new_empty(splits, *q.shape[1:])
    queries_backward_kernel[(programs * splits,)](
        turned, keys, values, do, lse, delta, dturned, table, table.shape[1], tokens, chunk, scale, turned.stride(1),
        share, **launch.blocks(tile),
    )  # fmt: skip

    final = dfinal_key.contiguous(), dfinal_value.contiguous()
    dq, dk, dv, dgate, dbias, *drunning = call.states_backward(
        do, lse, delta, sum_first(dturned), dkeys_all, dvalues_all, final
    )
    dbefore = (x[plan.known_index].to(before_keys.dtype) for x in (dkeys_all, dvalues_all))
    return dq, dk, dv, dgate, dbias, dz, *drunning, *dbefore


@torch.library.custom_op("farspan::rat_fused_backward", mutates_args=())
def _fused_backward(
    dy: torch.Tensor,
    dkeys: torch.Tensor | None,
    dvalues: torch.Tensor | None,
    dfinal_key: torch.Tensor,
    dfinal_value: torch.Tensor,
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
    y: torch.Tensor,
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    turned: torch.Tensor,
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
    gradients = (dy, dkeys, dvalues, dfinal_key, dfinal_value)
    inputs = (q, k, v, gate, gate_bias, z, cos, sin, running_key, running_value)
    saved = (before_keys, before_values, y, new_keys, new_values, turned, lse)
    return backward_pass(*gradients, *inputs, *saved, lengths, offsets, chunk, scale)


@_fused_backward.register_fake
def _(
    dy, dkeys, dvalues, dfinal_key, dfinal_value, q, k, v, gate, gate_bias, z, cos, sin, running_key, running_value,
    before_keys, before_values, y, new_keys, new_values, turned, lse, lengths, offsets, chunk, scale,
):  # fmt: skip
    inputs = (q, k, v, gate, gate_bias, z, running_key, running_value, before_keys, before_values)
    return tuple(x.new_empty(x.shape) for x in inputs)


def _save(ctx, inputs, output):
    *tensors, lengths, offsets, chunk, scale = inputs
    y, keys, values, _, _, turned, lse = output
    ctx.constants = (lengths, offsets, chunk, scale)
    ctx.save_for_backward(*tensors, y, keys, values, turned, lse)
    ctx.mark_non_differentiable(turned, lse)
    ctx.set_materialize_grads(False)  # training does not use the states: spare it their zeros


def _backward(ctx, dy, dkeys, dvalues, dfinal_key, dfinal_value, *_):
    running_key, running_value, _, _, y = ctx.saved_tensors[8:13]
    pairs = ((dy, y), (dfinal_key, running_key), (dfinal_value, running_value))
    dy, *dfinal = (torch.zeros_like(x) if gradient is None else gradient for gradient, x in pairs)
    gradients = _fused_backward(dy, dkeys, dvalues, *dfinal, *ctx.saved_tensors, *ctx.constants)
    return *gradients[:6], None, None, *gradients[6:], None, None, None, None


_fused_forward.register_autograd(_backward, setup_context=_save)


@dataclass
class _Call:
    """Inputs of one call, packed per token, with the plan and the launch constants that forward and backward share."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    gate: torch.Tensor
    bias: torch.Tensor
    z: torch.Tensor
    rope: tuple[torch.Tensor, torch.Tensor] | None
    running: tuple[torch.Tensor, torch.Tensor]
    plan: Plan
    launch: Launch
    scale: float

    @classmethod
    def of(cls, q, k, v, gate, bias, z, cos, sin, running_key, running_value, lengths, offsets, chunk, scale) -> _Call:
        plan = make_plan(tuple(lengths), tuple(offsets), chunk, fused_plan.PIECE, v.device)
        launch = Launch(v.shape[2], q.shape[2], v.shape[3], v.element_size(), architecture(v.device))
        q, k, v, gate, z = (packed(x) for x in (q, k, v, gate, z))
        rope = None if cos is None else (cos.contiguous(), sin.contiguous())
        running = running_key.contiguous(), running_value.contiguous()
        return cls(q, k, v, gate, bias.contiguous(), z, rope, running, plan, launch, scale)

    @property
    def tokens(self) -> int:
        return self.v.shape[1]

    @property
    def recurrence(self) -> tuple[torch.Tensor, ...]:
        return self.q, self.k, self.v, self.gate, self.bias

    @property
    def strides(self) -> tuple[int, ...]:
        return self.k.stride(1), self.v.stride(1), self.gate.stride(1)

    @property
    def angles(self) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin; without rotation any tensors, which are not read."""
        return self.rope or self.running

    def with_known(self, before: torch.Tensor, new: torch.Tensor | None = None) -> torch.Tensor:
        """All summaries [summaries, H, D]: `before` and `new` at their places (memory to be filled without new)."""
        if new is not None and not len(before):
            return new.contiguous()
        summaries = self.v.new_empty(self.plan.summaries, *self.v.shape[2:])
        if len(before):
            summaries[self.plan.known_index] = before.to(summaries.dtype)
        if new is not None:
            summaries[self.plan.new_index] = new
        return summaries

    def row_states(self) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor | None]:
        """The key and value states that rows start from (per document, or per row for pieces), and for pieces the
        product of the gates of each row, fp32 [rows, H, D].
        """
        plan, launch = self.plan, self.launch
        if not plan.pieced:
            return self.running, None
        product, *ends = (self._per_row() for _ in range(3))
        constants = launch.lockstep(FORWARD)
        piece_ends_kernel[(triton.cdiv(plan.rows, constants["N"]) * launch.parts(FORWARD),)](
            self.k, self.v, self.gate, self.bias, plan.row_table, product, *ends, plan.rows, plan.slots, *self.strides,
            **constants,
        )  # fmt: skip
        carried = (self._carry(product, *pair, reverse=False) for pair in zip(ends, self.running, strict=True))
        return tuple(carried), product

    def _carry(self, product: torch.Tensor, ends: torch.Tensor, start: torch.Tensor, reverse: bool) -> torch.Tensor:
        carried, table, width = torch.empty_like(ends), self.plan.chunk_table, ends[0].numel()
        carry_kernel[(table.shape[1] * triton.cdiv(width, CARRIED),)](
            product, ends, start, table, carried, table.shape[1], width, WIDE=CARRIED, REVERSE=reverse
        )
        return carried

    def _per_row(self) -> torch.Tensor:
        return self.v.new_empty(self.plan.rows, *self.v.shape[2:], dtype=torch.float32)

    def states_backward(self, do, lse, delta, dturned, dkeys, dvalues, dfinal) -> tuple[torch.Tensor, ...]:
        """dq, dk, dv, dgate, dbias and the adjoints of the running key and value, from those of all above them."""
        plan, launch = self.plan, self.launch
        initial, product = self.row_states()
        constants = launch.lockstep(BACKWARD)
        parts, n, share = launch.parts(BACKWARD), constants["N"], constants["SHARE"]
        workers = min(triton.cdiv(plan.rows, n), triton.cdiv(PROGRAMS, parts))
        scratch = self.v.new_empty(workers * parts, plan.slots, 2, n, share, launch.padded)
        scalars = lse.new_empty(workers * parts, plan.slots, 2, n, share)
        blocks = parts // launch.groups
        dq, dk = (
            x.new_empty(blocks, *x.shape[1:], dtype=x.dtype if blocks == 1 else torch.float32) for x in (self.q, self.k)
        )
        dv, dgate = self.v.new_empty(self.v.shape), self.gate.new_empty(self.gate.shape)
        dbias = lse.new_empty(workers, *self.bias.shape)

        def run(incoming, out, gradients: bool) -> None:
            states_backward_kernel[(workers * parts,)](
                *self.recurrence, *self.angles, *initial, *incoming, plan.row_table,
                do, lse, delta, dturned, dkeys, dvalues, *dfinal, scratch, scalars, dq, dk, dv, dgate, dbias, *out,
                plan.rows, plan.slots, self.tokens, self.scale, self.q.stride(1), *self.strides,
                **constants, ROTATE=self.rope is not None, PIECES=plan.pieced, GRADIENTS=gradients,
            )  # fmt: skip

        incoming = initial
        if plan.pieced:
            outgoing = self._per_row(), self._per_row()
            run(incoming, outgoing, gradients=False)
            incoming = tuple(self._carry(product, side, side, reverse=True) for side in outgoing)
        drunning = [torch.zeros_like(x) for x in self.running]
        run(incoming, drunning, gradients=True)
        dq, dk = (sum_first(x)[None].to(self.q.dtype) for x in (dq, dk))
        return dq, dk, dv, dgate, dbias.sum(0).to(self.bias.dtype), *drunning
