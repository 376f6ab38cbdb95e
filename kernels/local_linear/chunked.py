"""Local linear attention in linear memory: blocks of queries against all the keys that they see.

forward   P = exp(scores - lse) for one block of queries, kept while its systems A x = kbar - q are solved by
          conjugate gradients (`solve`) or directly (`gram`); o = (P * U) V with U = 1 - (k_j - kbar) x.
saved     the inputs, x [1, T, H, D] and lse [1, T, H, 1] in fp32 or wider: nothing between queries and keys.
backward  implicit differentiation, one more solve per query with the same matrix. With Gamma = g V' and its mean,

              h = sum_j P (Gamma - mean) c_j     A y = h     D = Gamma - mean - c_j y     G = P (U D + ridge x.y)
              dQ = scale G K + y     dV = (P U)' g     dK = (scale G)' Q - (P D)' X - (P U)' Y     dridge = x y

          With an absolute ridge the last term of G is gone; an rbf kernel adds its own share to dK and dscale.

A block's keys less the mean of those that all its queries see enter everything but the scores: the result is the same,
and large common parts of keys cost no precision. Documents of the same length, and key heads, are done together as far
as a block stays within TILE numbers.
"""

from collections.abc import Iterator
from itertools import groupby

import torch

from farspan.kernels.local_linear.gram import solve_gram
from farspan.kernels.local_linear.reference import absolute_factor
from farspan.kernels.local_linear.solve import Tile, choose_solver, conjugate_gradients

ROWS = 128  # most queries of all the heads that read one key head, per block
LEAST_ROWS = 16
TILE = 2**20  # numbers in a block of queries x keys, unless the fewest rows have more


def local_linear_chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ridge: torch.Tensor,
    scale: torch.Tensor,
    lengths: tuple[int, ...],
    prefixes: tuple[int, ...],
    kernel: str,
    ridge_mode: str,
    window: int | None,
    solver: str,
    tolerance: float,
    iterations: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `kernels.local_linear.local_linear_attention`, with the keys of the prefixes already in k and v.

    q: [1, T, H, D]; k: [1, S, Hk, D]; v: [1, S, Hk, Dv]; any float dtype.
    ridge: [T or 1, H, D or 1]; scale: [H]; fp32, float64 for float64.
    Returns o [1, T, H, Dv], and what the log wants, [4] in the dtype of the ridge: mean and largest iterations, largest
    residual, largest sum of |weights|. Differentiable once in q, k, v, ridge and scale.
    """
    solver = choose_solver(solver, q.shape[-1], iterations, q.dtype)
    constants = (list(lengths), list(prefixes), kernel, ridge_mode, window, solver, tolerance, iterations)
    o, _, _, statistics = forward_pass(q, k, v, ridge, scale, *constants)
    return o, statistics


@torch.library.custom_op("farspan::local_linear_forward", mutates_args=())
def forward_pass(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ridge: torch.Tensor,
    scale: torch.Tensor,
    lengths: list[int],
    prefixes: list[int],
    kernel: str,
    ridge_mode: str,
    window: int | None,
    solver: str,
    tolerance: float,
    iterations: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns o [1, T, H, Dv], x [1, T, H, D], lse [1, T, H, 1] and the statistics [4]."""
    wide, solve = ridge.dtype, _SOLVE[solver]
    o = q.new_empty(*q.shape[:3], v.shape[3])
    x, lse = q.new_empty(q.shape, dtype=wide), q.new_empty(*q.shape[:3], 1, dtype=wide)
    total, largest = ridge.new_zeros(()), ridge.new_zeros(3)
    with torch.autocast(q.device.type, enabled=False):
        for part in _parts(q, k, ridge, lengths, prefixes, window, solver):
            keys, values = part.keys(k), part.keys(v)
            for block in part.blocks(window):
                scores = block.scores(q, keys, scale, kernel)
                own = scores.logsumexp(-1, keepdim=True)
                tile, delta = block.tile(q, keys, scores.sub_(own).exp_(), own, ridge, ridge_mode)
                solved = solve(tile, delta, tolerance, iterations)
                weights = tile.centred(solved.x).neg_().add_(1).mul_(tile.p)
                block.put(o, weights @ values[:, block.seen])
                block.put(x, solved.x)
                block.put(lse, own)
                total += solved.iterations.sum()
                spread = torch.linalg.vector_norm(weights, ord=1, dim=-1)
                found = (solved.iterations.amax(), solved.residual.amax(), spread.amax())
                largest = torch.maximum(largest, torch.stack(found))
    return o, x, lse, torch.cat([(total / (q.shape[1] * q.shape[2]))[None], largest])


@forward_pass.register_fake
def _(q, k, v, ridge, scale, lengths, prefixes, kernel, ridge_mode, window, solver, tolerance, iterations):
    x, lse = q.new_empty(q.shape, dtype=ridge.dtype), q.new_empty(*q.shape[:3], 1, dtype=ridge.dtype)
    return q.new_empty(*q.shape[:3], v.shape[3]), x, lse, ridge.new_empty(4)


@torch.library.custom_op("farspan::local_linear_backward", mutates_args=())
def backward_pass(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ridge: torch.Tensor,
    scale: torch.Tensor,
    x: torch.Tensor,
    lse: torch.Tensor,
    lengths: list[int],
    prefixes: list[int],
    kernel: str,
    ridge_mode: str,
    window: int | None,
    solver: str,
    tolerance: float,
    iterations: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    solve = _SOLVE[solver]
    dq, dk, dv = (torch.empty_like(y, memory_format=torch.contiguous_format) for y in (q, k, v))
    dridge, dscale = torch.zeros_like(ridge), torch.zeros_like(scale)
    with torch.autocast(q.device.type, enabled=False):
        for part in _parts(q, k, ridge, lengths, prefixes, window, solver):
            keys, values = part.keys(k), part.keys(v)
            dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
            for block in part.blocks(window):
                g, own_x, own_lse, own_q = (block.rows(y) for y in (do, x, lse, q))
                own_scale, seen = block.rows(scale[None, None, :, None]), block.seen
                p = block.scores(q, keys, scale, kernel).sub_(own_lse).exp_()
                tile, _ = block.tile(q, keys, p, own_lse, ridge, ridge_mode)

                gamma = g @ values[:, seen].transpose(1, 2)
                gamma -= torch.linalg.vecdot(p, gamma)[..., None]
                pull = p * gamma
                h = torch.bmm(pull, tile.keys) - pull.sum(-1, keepdim=True) * tile.mean
                del pull
                y = solve(tile, h, tolerance, iterations).x

                u = tile.centred(own_x).neg_().add_(1)
                d = gamma.sub_(tile.centred(y))
                pu = p * u
                dvalues[:, seen] += pu.transpose(1, 2) @ g
                dkeys[:, seen] -= pu.transpose(1, 2) @ y
                del pu
                pd = p * d
                dkeys[:, seen] -= pd.transpose(1, 2) @ own_x
                through = pd.mul_(u)  # G: the gradient of the scores
                if ridge_mode == "relative":  # then the rows of G sum to 0, and any keys less one vector will do
                    through.addcmul_(p, (tile.ridge * own_x * y).sum(-1, keepdim=True))
                pulled = through @ (tile.keys if ridge_mode == "relative" else keys[:, seen])
                block.put(dq, own_scale * pulled + y)
                dkeys[:, seen] += through.transpose(1, 2) @ (own_scale * own_q)
                of_scale = (pulled * own_q).sum(-1, keepdim=True)
                if kernel == "rbf":
                    half = keys[:, seen].square().sum(-1, keepdim=True) / 2
                    of_scale -= through @ half
                    dkeys[:, seen] -= (through.transpose(1, 2) @ own_scale) * keys[:, seen]
                block.add(dscale[None, :, None], of_scale)
                of_ridge = own_x * y
                if ridge_mode == "absolute":
                    of_ridge *= absolute_factor(own_lse)
                block.add(dridge, of_ridge)
            part.put_keys(dk, dkeys)
            part.put_keys(dv, dvalues)
    return dq, dk, dv, dridge, dscale


@backward_pass.register_fake
def _(
    do, q, k, v, ridge, scale, x, lse, lengths, prefixes, kernel, ridge_mode, window, solver, tolerance, iterations,
):  # fmt: skip
    return tuple(y.new_empty(y.shape) for y in (q, k, v, ridge, scale))


def _save(ctx, inputs, output):
    *tensors, ctx.constants = *inputs[:5], inputs[5:]
    ctx.save_for_backward(*tensors, output[1], output[2])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, do, *_):
    return *backward_pass(do, *ctx.saved_tensors, *ctx.constants), *(None,) * len(ctx.constants)


forward_pass.register_autograd(_backward, setup_context=_save)

_SOLVE = {"gram": solve_gram, "cg": conjugate_gradients}


def _parts(q, k, ridge, lengths, prefixes, window, solver) -> Iterator["_Part"]:
    """Runs of documents of one size, and in them as many documents and key heads as make one TILE."""
    heads, share = k.shape[2], q.shape[2] // k.shape[2]
    query = key = 0
    for (length, prefix), run in groupby(zip(lengths, prefixes, strict=True)):
        count, total = len(list(run)), prefix + length
        width = total if window is None else min(total, window + ROWS)
        if solver == "gram":
            width = max(width, q.shape[3] ** 2 // 4)  # a query's matrix
        rows = min(length, max(1, min(ROWS, max(LEAST_ROWS, TILE // width)) // share))
        room = max(1, TILE // (rows * share * width))
        few, documents = min(room, heads), max(1, room // heads)
        for first in range(0, count, documents):
            for head in range(0, heads, few):
                starts = (query + first * length, key + first * total)
                own = slice(head, min(head + few, heads))
                yield _Part(*starts, min(documents, count - first), length, prefix, own, heads, rows, ridge.dtype)
        query, key = query + count * length, key + count * total


class _Part:
    """`count` documents of one size and the key heads `heads` of them: a batch of n = count * heads."""

    def __init__(self, query, key, count, length, prefix, heads, of_heads, rows, wide) -> None:
        self.query, self.key, self.count, self.length, self.prefix = query, key, count, length, prefix
        self.heads, self.of_heads, self.block, self.wide = heads, of_heads, rows, wide

    def keys(self, x: torch.Tensor) -> torch.Tensor:
        """[1, S, Hk, C] -> [n, prefix + length, C], in the accumulation dtype."""
        return self._keys_of(x).flatten(0, 1).to(self.wide, memory_format=torch.contiguous_format)

    def put_keys(self, x: torch.Tensor, values: torch.Tensor) -> None:
        self._keys_of(x).copy_(values.unflatten(0, (self.count, -1)))

    def _keys_of(self, x: torch.Tensor) -> torch.Tensor:
        """View [count, heads, prefix + length, C]."""
        total = self.prefix + self.length
        own = x[0, self.key : self.key + self.count * total, self.heads]
        return own.unflatten(0, (self.count, total)).transpose(1, 2)

    def blocks(self, window: int | None) -> Iterator["_Block"]:
        # No block is longer than the window: all its queries see its first key, and have a common reference.
        step = self.block if window is None else min(self.block, window)
        for first in range(0, self.length, step):
            yield _Block(self, first, min(first + step, self.length), window)


class _Block:
    """Queries first .. last of every document of a part; `seen` are the keys that any of them sees."""

    def __init__(self, part: _Part, first: int, last: int, window: int | None) -> None:
        self.part, self.first, self.last, self.window = part, first, last, window
        start = 0 if window is None else max(0, part.prefix + first - window + 1)
        self.seen = slice(start, part.prefix + last)

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """[1, T or 1, H, C] -> [n, M, C] with M = the heads of a key head x queries; in the accumulation dtype."""
        if x.shape[1] == 1:
            x = x.expand(1, self.part.query + self.part.count * self.part.length, *x.shape[2:])
        return self._rows_of(x).to(self.part.wide).reshape(-1, self._share(x) * (self.last - self.first), x.shape[3])

    def put(self, x: torch.Tensor, values: torch.Tensor) -> None:
        into = self._rows_of(x)
        into.copy_(values.view(into.shape))

    def add(self, x: torch.Tensor, values: torch.Tensor) -> None:
        """Add values [n, M, C] to x [T or 1, H, C or 1], summed over what x has one of."""
        part = self.part
        values = values.view(part.count, -1, self._share(x[None]), self.last - self.first, values.shape[2])
        values = values if x.shape[2] > 1 else values.sum(-1, keepdim=True)
        if x.shape[0] > 1:
            self._rows_of(x[None]).add_(values)
        else:
            x[0].unflatten(0, (part.of_heads, -1))[part.heads].add_(values.sum((0, 3)))

    def scores(self, q: torch.Tensor, keys: torch.Tensor, scale: torch.Tensor, kernel: str) -> torch.Tensor:
        """[n, M, seen], -inf where a query does not see a key."""
        seen, own = keys[:, self.seen], self.rows(q)
        scores = own @ seen.transpose(1, 2)
        if kernel == "rbf":
            scores -= seen.square().sum(-1)[:, None] / 2
        scores *= self.rows(scale[None, None, :, None])
        query = torch.arange(self.first, self.last, device=q.device)[:, None] + self.part.prefix
        key = torch.arange(self.seen.start, self.seen.stop, device=q.device)
        hidden = key > query
        if self.window is not None:
            hidden |= key <= query - self.window
        return scores.masked_fill_(hidden.repeat(self._share(q), 1), float("-inf"))

    def tile(self, q, keys, p, lse, ridge, ridge_mode) -> tuple[Tile, torch.Tensor]:
        """The systems of the block, and kbar - q [n, M, D]."""
        prefix = self.part.prefix
        common = 0 if self.window is None else max(0, prefix + self.last - self.window)
        reference = keys[:, common : prefix + self.first + 1].mean(1, keepdim=True)
        moved = keys[:, self.seen] - reference
        mean = p @ moved
        own = self.rows(ridge[None])
        if ridge_mode == "absolute":
            own = own * absolute_factor(lse)
        return Tile(p, moved, mean, own), mean - (self.rows(q) - reference)

    def _share(self, x: torch.Tensor) -> int:
        return x.shape[2] // self.part.of_heads

    def _rows_of(self, x: torch.Tensor) -> torch.Tensor:
        """View [count, heads, H / Hk, queries, C] of x [1, T, H, C]."""
        part = self.part
        own = x[0, part.query : part.query + part.count * part.length].unflatten(0, (part.count, part.length))
        own = own[:, self.first : self.last].unflatten(2, (part.of_heads, -1))[:, :, part.heads]
        return own.permute(0, 2, 3, 1, 4)
