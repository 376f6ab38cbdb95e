"""States through the row: scan and relay against one recurrence over all tokens, forward and backward."""

import pytest
import torch

from farspan.parallel.layout import Layout, Segment, make_layout
from farspan.parallel.mesh import Axis
from farspan.parallel.scan import affine_scan, relay

TOKENS = 24
MESHES = [(2, 1), (4, 1), (1, 4), (2, 2)]
# One rank holds a segment more than the others, as ring 2 x ulysses 3 gives it in a zigzag layout of six ranks.
UNEVEN = Layout(((Segment(0, 12),), (Segment(12, 4), Segment(20, 4), Segment(16, 4))))

layouts = pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
meshes = pytest.mark.parametrize("mesh", MESHES, ids=str)


def row(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def recur(gains: torch.Tensor, inputs: torch.Tensor, state: torch.Tensor, matrix: bool) -> torch.Tensor:
    """h_t = a_t h_{t-1} + b_t for all t, h_{-1} = state."""
    states = []
    for gain, new in zip(gains, inputs, strict=True):
        state = (gain @ state if matrix else gain * state) + new
        states.append(state)
    return torch.stack(states)


def scanned(gains, inputs, layout, axis, matrix) -> torch.Tensor:
    """As `recur` over the row, on the tokens of one rank: every segment from nothing, then again from what enters."""
    sizes = [segment.length for segment in layout.segments[axis.rank]]
    segments = list(zip(gains.split(sizes), inputs.split(sizes), strict=True))
    nothing = torch.zeros_like(inputs[0])
    left = torch.stack([recur(a, b, nothing, matrix)[-1] for a, b in segments])
    products = []
    for a, _ in segments:
        product = a[0]
        for gain in a[1:]:
            product = gain @ product if matrix else gain * product
        products.append(product)
    entering = affine_scan(torch.stack(products), left, layout, axis, matrix)
    return torch.cat([recur(a, b, state, matrix) for (a, b), state in zip(segments, entering, strict=True)])


# S, the shape of the gains, and whether they are multiplied as matrices.
FORMS = {
    "elementwise": ((3, 2), (3, 2), False),
    "decay of a head": ((3, 2), (3, 1), False),
    "scalar": ((3, 2), (1, 1), False),
    "matrix": ((2, 3, 4), (2, 3, 3), True),
    "square state": ((2, 3, 3), (2, 3, 3), True),
}


def scans(mesh, layout, form, starts):
    """Errors of the states, and of the gradients of gains and inputs, on this rank's tokens.

    starts: first tokens of documents: there the gain is zero, and nothing of what came before is left.
    """
    layout = make_layout(layout, TOKENS, mesh.ring.size, mesh.ulysses.size) if isinstance(layout, str) else layout
    shape, gain_shape, matrix = FORMS[form]
    gains, inputs, weight = 0.6 * row(TOKENS, *gain_shape), row(TOKENS, *shape, seed=1), row(TOKENS, *shape, seed=2)
    gains[list(starts)] = 0
    whole = [x.clone().requires_grad_() for x in (gains, inputs)]
    states = recur(*whole, torch.zeros_like(inputs[0]), matrix)
    expected = [states, *torch.autograd.grad((states * weight).sum(), whole)]
    own = layout.own(mesh.context.rank)
    local = [x[own].clone().requires_grad_() for x in (gains, inputs)]
    states = scanned(*local, layout, mesh.context, matrix)
    found = [states, *torch.autograd.grad((states * weight[own]).sum(), local)]
    return [float((a - b[own]).abs().max()) for a, b in zip(found, expected, strict=True)]


@meshes
@layouts
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("starts", [(0,), (0, 1, 6, 11, 13, 23)], ids=["one document", "documents"])
def test_a_scan_equals_the_recurrence_over_the_row(run_distributed, mesh, layout, form, starts):
    """Documents start at an edge of a shard, one before it, one after it, and twice in one segment."""
    for errors in run_distributed(scans, mesh, layout, form, starts):
        assert all(error <= 1e-12 for error in errors)


@pytest.mark.parametrize("form", FORMS)
def test_ranks_may_hold_different_numbers_of_segments(run_distributed, form):
    for errors in run_distributed(scans, (2, 1), UNEVEN, form, (0, 14)):
        assert all(error <= 1e-12 for error in errors)


def scans_in_fp32(mesh, layout):
    layout = make_layout(layout, TOKENS, mesh.ring.size, mesh.ulysses.size)
    gains, inputs = 0.6 * row(TOKENS, 2), row(TOKENS, 2, seed=1)
    expected, own = recur(gains, inputs, torch.zeros_like(inputs[0]), False), layout.own(mesh.context.rank)
    found = scanned(gains[own].float(), inputs[own].float(), layout, mesh.context, False)
    return found.dtype, float((found.double() - expected[own]).abs().max())


@layouts
def test_a_scan_in_fp32(run_distributed, layout):
    for dtype, error in run_distributed(scans_in_fp32, (4, 1), layout):
        assert dtype == torch.float32 and error <= 2e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", [0, 1], ids=["gain", "state"])
def test_a_scan_in_half_precision_is_refused(dtype, which):
    tensors = [torch.ones(1, 2), torch.ones(1, 2)]
    tensors[which] = tensors[which].to(dtype)
    with pytest.raises(ValueError, match=rf"state in fp32 or wider, not .*{dtype}"):
        affine_scan(*tensors, make_layout("contiguous", 4), Axis("context", (0,), 0))


# relay


def remember(weight: torch.Tensor, x: torch.Tensor, state: tuple[torch.Tensor, ...]):
    """A recurrence that is affine in nothing: outputs of a segment, and the states after it, of two shapes."""
    outputs, (memory, count) = [], state
    for new in x:
        memory = torch.tanh(weight @ memory + new)
        count = count + memory.square().mean()
        outputs.append(memory * count)
    return torch.stack(outputs), (memory, count)


def relays(mesh, layout):
    """Errors of the outputs and of the gradient of the inputs on this rank; this rank's gradients of the weight and of
    the first states, and those that they should add up to.
    """
    layout = make_layout(layout, TOKENS, mesh.ring.size, mesh.ulysses.size) if isinstance(layout, str) else layout
    tensors = [row(3, 3), row(3, seed=1), row(1, seed=2), row(TOKENS, 3, seed=3)]
    seed = row(TOKENS, 3, seed=4)
    whole = [x.clone().requires_grad_() for x in tensors]
    weight, memory, count, x = whole
    output, _ = remember(weight, x, (memory, count))
    expected = torch.autograd.grad((output * seed).sum(), whole)
    own, axis = layout.own(mesh.context.rank), mesh.context
    leaves = [x.clone().requires_grad_() for x in (*tensors[:3], tensors[3][own])]
    weight, memory, count, x = leaves
    segments = x.split([segment.length for segment in layout.segments[axis.rank]])
    found = relay(lambda i, state: remember(weight, segments[i], state), x, (memory, count), layout, axis)
    found = torch.cat(found)
    (found * seed[own]).sum().backward(retain_graph=True)
    # The same where only one gradient is asked for, on which every state still has to travel back.
    (alone,) = torch.autograd.grad((found * seed[own]).sum(), x)
    assert torch.equal(alone, x.grad)
    shares = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
    errors = [float((found - output[own]).abs().max()), float((shares[3] - expected[3][own]).abs().max())]
    return errors, shares[:3], expected[:3]


@pytest.mark.parametrize(
    ("mesh", "layout"),
    [(mesh, layout) for mesh in MESHES for layout in ("contiguous", "zigzag")] + [((2, 1), UNEVEN)],
    ids=str,
)
def test_a_relay_equals_the_recurrence_over_the_row(run_distributed, mesh, layout):
    results = run_distributed(relays, mesh, layout)
    assert all(error <= 1e-12 for errors, _, _ in results for error in errors)
    shares = [sum(parts) for parts in zip(*(shares for _, shares, _ in results), strict=True)]
    for share, expected in zip(shares, results[0][2], strict=True):
        assert (share - expected).abs().max() <= 1e-12


@pytest.mark.parametrize(
    "change", [lambda state: torch.cat([state, state]), lambda state: state.float()], ids=["shape", "dtype"]
)
def test_a_state_that_changes_is_refused(change):
    first = (torch.zeros(2, dtype=torch.float64),)
    with pytest.raises(ValueError, match=r"must keep its shape and dtype: \[2\] torch\.float64 entered"):
        layout, axis = make_layout("contiguous", 4), Axis("ring", (0,), 0)
        relay(lambda i, state: (state[0], (change(state[0]),)), first[0], first, layout, axis)
