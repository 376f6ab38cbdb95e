"""The local linear mixer: its options, windows, solvers and states, what it logs, memory, and its shards."""

import pytest
import torch

from farspan.eval.memory import peak_bytes
from farspan.kernels.local_linear import local_linear_attention
from farspan.layers import Sequence, build
from farspan.layers.rotary import Rope
from farspan.parallel import ContextParallel

WIDTH, HEADS = 16, 4
RAGGED = (1, 2, 9, 16, 17, 1, 30)
CG = {"solver": "cg", "tolerance": 1e-15, "iterations": 100}
# Everything that changes the path through the layer, beyond the options of the contract suite.
VARIANTS = {
    "window": {"window": 5},
    "descent": CG,
    "windowed descent": {"window": 6, **CG},
    "absolute": {"ridge_mode": "absolute", "ridge_init": 3.0},
    "rbf": {"kernel": "rbf", "qk_norm": "none"},
    "learned": {"bandwidth": "learned", "qk_norm": "shared", "gate": True, "output_norm": False, "rope": None},
}
variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())


def make(dtype=torch.float64, **options):
    torch.manual_seed(1)
    mixer = build("local_linear", width=WIDTH, heads=HEADS, **{"kv_heads": 2, **options}).to(dtype)
    with torch.no_grad():
        for parameter in (mixer.ridge_logit, mixer.log_scale):  # so that heads differ
            if parameter is not None:
                parameter += 0.3 * torch.randn_like(parameter)
    return mixer


def rows(batch, time, dtype=torch.float64):
    return torch.randn(batch, time, WIDTH, dtype=dtype)


def gradients(mixer, output, *inputs):
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=output.dtype)
    return list(torch.autograd.grad(output, [*inputs, *mixer.parameters()], weight))


def assert_same(left, right, tolerance=1e-12):
    for a, b in zip(left, right, strict=True):
        assert (a - b).detach().abs().max() <= tolerance * max(1.0, float(b.detach().abs().max()))


# Parameters


def test_the_ridge_starts_where_it_is_asked_to_and_never_falls_below_its_least():
    mixer = build("local_linear", width=WIDTH, heads=HEADS, ridge_init=1.7, ridge_min=0.3)
    torch.testing.assert_close(mixer.ridge(), torch.full((HEADS,), 1.7))
    with torch.no_grad():
        mixer.ridge_logit.fill_(-1e4)
    assert torch.equal(mixer.ridge(), torch.full((HEADS,), 0.3))
    mixer.reset_parameters()
    torch.testing.assert_close(mixer.ridge(), torch.full((HEADS,), 1.7))
    large = build("local_linear", width=WIDTH, heads=HEADS, ridge_init=100.0)
    torch.testing.assert_close(large.ridge(), torch.full((HEADS,), 100.0))
    assert large.bfloat16().ridge().dtype == torch.float32


def test_ridge_and_scale_are_not_decayed():
    from farspan import DecoderConfig, DecoderForCausalLM
    from farspan.lm.train.optimizer import roles

    pattern = [{"mixer": "local_linear", "bandwidth": "learned", "qk_norm": "shared"}]
    config = DecoderConfig(
        vocab_size=11, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4,
        mixer_pattern=pattern,
    )  # fmt: skip
    model = DecoderForCausalLM(config)
    (mixer,) = model.mixers()
    vectors = {id(parameter) for parameter in roles(model).vectors}
    own = (mixer.ridge_logit, mixer.log_scale, mixer.qk_norm.weight, mixer.output_norm.weight)
    assert all(id(parameter) in vectors for parameter in own)
    torch.testing.assert_close(mixer.ridge(), torch.ones(4))


def test_a_new_layer_has_the_scale_of_softmax_attention():
    assert build("local_linear", width=WIDTH, heads=HEADS).scale() == 0.5
    learned = build("local_linear", width=WIDTH, heads=HEADS, bandwidth="learned")
    torch.testing.assert_close(learned.scale(), torch.full((HEADS,), 0.5))


def test_rotated_and_normed_heads_are_the_features():
    """The layer by hand: norm without a gain, rotation, the operator, the norm of its heads, projection."""
    mixer, x = make(), rows(1, 12)
    linears = mixer.projections
    q, k, v = (f(x).unflatten(-1, (-1, 4)) for f in (linears.query, linears.key, linears.value))
    q, k = (y * (y.square().mean(-1, keepdim=True) + 1e-6).rsqrt() for y in (q, k))
    angles = torch.arange(12.0, dtype=x.dtype)[:, None, None] * torch.tensor([1.0, 0.01], dtype=x.dtype)

    def turn(y):
        a, b = y.chunk(2, dim=-1)
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)

    o, *_ = local_linear_attention(
        turn(q), turn(k), v, mixer.ridge(), (12,), torch.tensor([0, 12]), backend="reference"
    )
    o = o * (o.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * mixer.output_norm.weight
    torch.testing.assert_close(mixer(x).output, linears.output(o.flatten(2)), rtol=0, atol=1e-12)


@variants
def test_every_variant_has_gradients_of_all_parameters(options):
    mixer, x = make(**options), rows(2, 21).requires_grad_()
    reference = make(backend="reference", **options)
    output, expected = mixer(x).output, reference(x).output
    assert_same([output], [expected])
    found = gradients(mixer, output, x)
    assert_same(found, gradients(reference, expected, x), 1e-11)
    assert all(bool(gradient.any()) for gradient in found)


# States


@variants
@pytest.mark.parametrize("cuts", [(20, 1), (1, 20), (4, 1, 5, 11), (1,) * 21])
def test_pieces_equal_forward_with_gradients(options, cuts):
    mixer, x = make(**options), rows(2, 21).requires_grad_()
    state = mixer.new_state(2)
    pieces = torch.cat([mixer(piece, state=state).output for piece in x.split(cuts, dim=1)], dim=1)
    whole = mixer(x).output
    assert_same([pieces], [whole])
    assert_same(gradients(mixer, pieces, x), gradients(mixer, whole, x), 1e-11)


@variants
def test_ragged_pieces_equal_forward(options):
    mixer, x = make(**options), rows(3, 24)
    whole, state, seen = mixer(x).output, mixer.new_state(3), [0, 0, 0]
    with torch.no_grad():
        for lengths in [(4, 9, 1), (1, 1, 1), (2, 13, 7), (17, 1, 15)]:
            parts = [x[i, seen[i] : seen[i] + n] for i, n in enumerate(lengths)]
            expected = [whole[i, seen[i] : seen[i] + n] for i, n in enumerate(lengths)]
            sequence = Sequence.packed(lengths, offsets=seen)
            assert_same([mixer(torch.cat(parts)[None], sequence, state).output[0]], [torch.cat(expected)])
            seen = [start + n for start, n in zip(seen, lengths, strict=True)]


@pytest.mark.parametrize("length", [1, 4, 300])
def test_a_window_keeps_a_ring(length):
    mixer = make(torch.float32, window=5)
    state = mixer.new_state(2, capacity=1000)
    with torch.no_grad():
        mixer(rows(2, length, torch.float32), state=state)
    assert state["key"].shape == (2, 2, 5, 4)
    assert sum(value.nbytes for value in state.values()) == 2 * mixer.state_bytes(length)


def test_steps_of_a_truncated_solve_differ_by_its_tolerance():
    """Decoding solves exactly; a prefill by conjugate gradients is as far from it as its tolerance lets it be."""
    x = rows(2, 40)
    errors = []
    for tolerance in (1e-2, 1e-6):
        mixer = make(solver="cg", tolerance=tolerance, iterations=50)
        state = mixer.new_state(2)
        with torch.no_grad():
            steps = torch.cat([mixer(token, state=state).output for token in x.split(1, dim=1)], dim=1)
            errors.append(float((steps - mixer(x).output).abs().max()))
    assert errors[0] < 0.1 and errors[1] < 1e-4 and errors[1] < 1e-2 * errors[0]


# What is logged


def test_metrics_tell_how_the_solver_fares():
    x = rows(2, 50, torch.float32)
    short = make(torch.float32, solver="cg", iterations=1)(x).metrics
    long = make(torch.float32, solver="cg", iterations=50)(x).metrics
    direct = make(torch.float32)(x).metrics
    names = {"solver_iterations", "solver_iterations_max", "solver_residual", "local_linear_reach", "ridge"}
    for metrics in (short, long, direct):
        assert set(metrics) == names
        assert all(m.dtype == torch.float32 and m.ndim == 0 and not m.requires_grad for m in metrics.values())
    assert short["solver_iterations_max"] == 1 and short["solver_residual"] > 1e-2
    assert 1 < long["solver_iterations"] <= long["solver_iterations_max"] and long["solver_residual"] <= 1e-3
    assert direct["solver_iterations_max"] == 0 and direct["solver_residual"] < 1e-4
    assert direct["local_linear_reach"] > 1
    torch.testing.assert_close(direct["ridge"], make(torch.float32).ridge().detach().mean())


def test_metrics_reach_the_log_of_a_decoder():
    from farspan import DecoderConfig, DecoderForCausalLM

    config = DecoderConfig(
        vocab_size=11, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        mixer_pattern=["local_linear"],
    )  # fmt: skip
    ids = torch.randint(0, 11, (1, 9))
    metrics = DecoderForCausalLM(config)(ids, shift_labels=ids).metrics
    assert float(metrics["ridge"]) == pytest.approx(1.0)


# Memory


@pytest.mark.parametrize("solver", ["gram", "cg"])
def test_memory_is_below_three_times_that_of_softmax(solver):
    """Heads of 64, 4096 tokens (16,384 were measured, docs/local_linear.md): nothing grows with queries x keys."""
    peaks = {}
    for name, options in (("softmax", {}), ("local_linear", {"solver": solver, "iterations": 1})):
        mixer = build(name, width=256, heads=4, **options)
        x = torch.randn(1, 4096, 256)

        def train(mixer=mixer, x=x):
            mixer(x.clone().requires_grad_()).output.sum().backward()

        mixer(x[:, :8]).output.sum().backward()  # gradients of the parameters exist from here on
        peaks[name] = peak_bytes(train)
    assert peaks["local_linear"] < 3 * peaks["softmax"], peaks


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ridge_min": 0.0}, "ridge_min=0.0 must be above 0"),
        ({"ridge_min": -1.0}, "ridge_min=-1.0 must be above 0"),
        ({"ridge_init": 0.1}, "ridge_init=0.1 must be above ridge_min=0.1"),
        ({"ridge_init": float("inf")}, "ridge_init=inf"),
        ({"ridge_init": float("nan")}, "ridge_init=nan"),
        ({"iterations": 0}, "iterations=0 must be at least 1"),
        ({"tolerance": -1.0}, "tolerance=-1.0 must be above 0"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"solver": "lu"}, "solver='lu' is not known.* auto, gram, cg"),
        ({"qk_norm": "both"}, "qk_norm='both' is not known.* plain, shared, none"),
        ({"bandwidth": "wide"}, "bandwidth='wide' is not known.* fixed, learned"),
        ({"kernel": "cosine"}, "kernel='cosine' is not known.* dot, rbf"),
        ({"ridge_mode": "none"}, "ridge_mode='none' is not known.* relative, absolute"),
        ({"head_dim": 3}, "head_dim=3 must be even"),
        ({"ridge": 1.0}, "unknown option 'ridge'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        build("local_linear", width=WIDTH, heads=HEADS, **options)
    assert "\n" not in str(caught.value)


def test_another_layers_state_is_refused():
    for own, other in (({}, {"kv_heads": 1}), ({"window": 5}, {"window": 6}), ({"window": 5}, {})):
        state = make(**other).new_state(2)
        with pytest.raises(ValueError, match=r"state key is \[2, .*use its own new_state"):
            make(**own)(rows(2, 3), state=state)


def test_flops_of_a_window():
    mixer, unlimited = make(window=5), make()
    assert mixer.flops(1000) < mixer.flops(1000, causal=False) < unlimited.flops(1000)
    assert mixer.flops(5) == unlimited.flops(5)
    gated = make(gate=True)
    assert gated.flops(5) - unlimited.flops(5) == 2 * WIDTH * WIDTH


# Shards


def sharded_errors(mesh, variants):
    """The largest error of outputs and gradients on shards, for each variant and layout."""
    found = {}
    for name, options in variants.items():
        mixer = make(**options)
        torch.manual_seed(4)
        x, weight = (torch.randn(1, sum(RAGGED), WIDTH, dtype=torch.float64) for _ in range(2))
        whole = mixer(x.requires_grad_(), Sequence.packed(RAGGED)).output
        leaves = [x, *mixer.parameters()]
        expected = torch.autograd.grad((whole * weight).sum(), leaves)
        for layout in ("contiguous", "zigzag"):
            shard = ContextParallel(mesh, layout).shard(RAGGED)
            own = mixer(shard.take(x), Sequence.sharded(shard)).output
            actual = torch.autograd.grad((own * shard.take(weight)).sum(), leaves)
            for gradient in actual:
                torch.distributed.all_reduce(gradient, group=mesh.context.group)
            pairs = zip([own, *actual], [shard.take(whole), *expected], strict=True)
            errors = [float((a - b).detach().abs().max() / b.detach().abs().max().clamp(min=1)) for a, b in pairs]
            found[name, layout] = max(errors)
    return found


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2), (2, 2), (4, 1)], ids=lambda s: f"ring{s[0]}-ulysses{s[1]}")
def test_shards_equal_the_whole(run_distributed, sizes):
    for found in run_distributed(sharded_errors, sizes, VARIANTS):
        assert all(error <= 1e-11 for error in found.values()), found


def gathered_a_head_at_a_time(mesh, options):
    """The largest difference that this makes to the outputs and gradients of a rank, the gathers that either way takes,
    and the most rows of a tensor that is kept for the backward pass, of those of the shard.
    """
    from farspan.layers import local_linear_sharding as module

    mixer, results, calls, rows = make(**options), [], [], []
    torch.manual_seed(4)
    x = torch.randn(1, sum(RAGGED), WIDTH, dtype=torch.float64, requires_grad=True)
    shard = ContextParallel(mesh, "zigzag").shard(RAGGED)
    gather, usual = module.AsyncGather, module.gathered.GATHERED_BYTES

    def counted(*arguments):
        calls.append(module.gathered.GATHERED_BYTES)
        return gather(*arguments)

    def kept(tensor):
        rows.append(max(tensor.shape, default=0) / shard.layout.local)
        return tensor

    module.AsyncGather = counted
    try:
        for least in (usual, 1):
            module.gathered.GATHERED_BYTES = least
            own, sequence = shard.take(x), Sequence.sharded(shard)
            with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
                output = mixer(own, sequence).output
            results.append([output, *torch.autograd.grad(output.square().sum(), [x, *mixer.parameters()])])
    finally:
        module.gathered.GATHERED_BYTES, module.AsyncGather = usual, gather
    difference = max(float((a - b).detach().abs().max()) for a, b in zip(*results, strict=True))
    return difference, calls.count(usual), calls.count(1), max(rows)


def test_keys_are_gathered_a_few_heads_at_a_time_and_not_kept(run_distributed):
    for difference, at_once, one_by_one, rows in run_distributed(gathered_a_head_at_a_time, (4, 1), {"kv_heads": 4}):
        assert difference <= 1e-12
        assert (at_once, one_by_one) == (2, 8)  # forward and backward
        assert rows <= 1


def test_the_reference_is_sharded_too(run_distributed):
    for found in run_distributed(sharded_errors, (2, 2), {"reference": {"backend": "reference"}}):
        assert all(error <= 1e-11 for error in found.values()), found


def test_more_ulysses_ranks_than_heads_are_refused():
    mixer = make()
    with pytest.raises(ValueError, match="4 heads are fewer than 8 Ulysses ranks"):
        mixer.check_sharding(mixer.options, "zigzag", 1, 8)
    windowed = make(window=5)
    windowed.check_sharding(windowed.options, "zigzag", 1, 8)  # it fetches what its windows reach into, all heads


def test_rope_is_the_configurations():
    assert make().options.rope == Rope()
