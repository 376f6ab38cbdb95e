"""What every mixer must do, over the registry: a mixer that lacks an ability fails here by its name.

`SMALL` gives each mixer options small enough to test. `EXEMPT` is the one table of what a mixer cannot do by nature,
with the reason; the refusal itself is tested too.
"""

import copy
import itertools

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from farspan import DecoderConfig, DecoderForCausalLM
from farspan.eval.memory import peak_bytes
from farspan.layers import MIXERS, Sequence, build
from farspan.layers.mixer import Mixer
from farspan.parallel import ContextParallel

WIDTH, HEADS = 16, 4
# Options for tests, and a length at which the reference computes no more than the full convention counts.
SMALL = {
    "cca": {"kv_heads": 2, "group": 4, "window": 5},
    # an output norm divides by small outputs, and makes more of a rounding error
    "local_linear": {"kv_heads": 2, "output_norm": False, "tolerance": 1e-7, "iterations": 32},
    "rat": {"chunk": 4, "groups": 2},
    "rcmha": {"kv_heads": 2},
    # the norm over head_dim channels needs more than four of them
    "routing": {"head_dim": 8, "clusters": 3, "window": 5, "local_heads": 2},
    "softmax": {"kv_heads": 2},
    "softplus": {"kv_heads": 2, "power": 15.0},
    # a norm over four channels, and long steps, would lose more digits than the tests in fp32 allow
    "titans": {
        "head_dim": 8,
        "depth": 2,
        "refresh": 4,
        "expansion": 1,
        "persistent": 3,
        "kappa": 0.25,
        "decay_to": "zero",
    },
    "window": {"kv_heads": 2, "window": 5},
}
REACH = {
    "cca": 8,
    "local_linear": 12,
    "rat": 13,
    "rcmha": 12,
    "routing": 5,
    "softmax": 12,
    "softplus": 12,
    "titans": 13,
    "window": 5,
}

# How much more than other mixers one makes of a rounding error, where that is its nature. The power of softplus takes
# 15 times the relative error of a score's excess over its mean: on one rank fp32 is 1.3e-5 from float64 here, and
# inputs that differ by 1e-7 move float64 by 2.6e-5.
AMPLIFIES = {"softplus": 20}

TORCH_KERNELS = "its fused form is torch's CUDA flash attention, which has no interpreter"
EXEMPT = {
    ("fused", "softmax"): TORCH_KERNELS,
    ("fused", "window"): TORCH_KERNELS,
}

mixers = pytest.mark.parametrize("name", sorted(MIXERS))
PATTERNS = {name: (name,) for name in sorted(MIXERS)}
# With its neighbour in the alphabet, so that the number of tests grows with the mixers and not with their square.
PATTERNS |= {f"{a}-{b}": (a, b) for a, b in itertools.pairwise([*sorted(MIXERS), min(MIXERS)])}
patterns = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())

RAGGED = (1, 2, 9, 16, 17, 1, 30)


def make(name: str, dtype=torch.float64, **options) -> Mixer:
    torch.manual_seed(1)
    return build(name, width=WIDTH, heads=HEADS, **{**SMALL[name], **options}).to(dtype)


def rows(batch: int, time: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(batch, time, WIDTH, dtype=dtype)


def decoder(pattern: tuple[str, ...], **fields) -> DecoderForCausalLM:
    torch.manual_seed(2)
    config = DecoderConfig(
        vocab_size=61,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        mixer_pattern=[{"mixer": name, **SMALL[name]} for name in pattern],
        initializer_range=0.3,  # large, so that differences show
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
        **fields,
    )
    return DecoderForCausalLM(config).double().eval()


def gradients(mixer: Mixer, output: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    seed = torch.Generator().manual_seed(3)
    weight = torch.randn(output.shape, generator=seed, dtype=output.dtype)
    return list(torch.autograd.grad(output, [*inputs, *mixer.parameters()], weight))


def assert_same(left: list[torch.Tensor], right: list[torch.Tensor], tolerance: float = 1e-12) -> None:
    """Equal to `tolerance` relative to the largest value of each tensor (float64 rounding unless said)."""
    for a, b in zip(left, right, strict=True):
        a, b = a.detach(), b.detach()
        assert (a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max()))


@mixers
def test_has_options_for_the_tests(name):
    assert name in SMALL and name in REACH, f"add {name} to SMALL and REACH in this file"


# Backends


@mixers
@pytest.mark.parametrize("backend", ["chunked", "fused"])
def test_backends_agree(name, backend):
    # fp32: the Triton interpreter multiplies it exactly, and fused kernels take no float64
    dtype, tolerance = (torch.float64, 1e-12) if backend == "chunked" else (torch.float32, 2e-6)
    mixer, reference = make(name, dtype, backend=backend), make(name, dtype, backend="reference")
    sequence = Sequence.packed(RAGGED)
    x = rows(1, sequence.tokens, dtype).requires_grad_()
    if (backend, name) in EXEMPT:
        with pytest.raises(ValueError, match="needs CUDA"):
            mixer(x, sequence)
        return
    output, expected = mixer(x, sequence).output, reference(x, sequence).output
    assert_same([output], [expected], tolerance)
    assert_same(gradients(mixer, output, x), gradients(reference, expected, x), 10 * tolerance)


# Causality, packing, batches


@mixers
def test_the_future_changes_nothing(name):
    mixer, x = make(name), rows(1, 33)
    before = mixer(x).output
    for time in (0, 1, 7, 8, 16, 31):
        changed = x.clone()
        changed[:, time:] += torch.randn_like(changed[:, time:])
        after = mixer(changed).output
        assert torch.equal(after[:, :time], before[:, :time])
        assert not torch.allclose(after[:, time], before[:, time])


@mixers
def test_packed_documents_are_separate(name):
    mixer, sequence = make(name), Sequence.packed(RAGGED)
    x = rows(1, sequence.tokens).requires_grad_()
    packed = mixer(x, sequence).output
    separate = torch.cat([mixer(document).output for document in x.split(RAGGED, dim=1)], dim=1)
    assert_same([packed], [separate])
    assert_same(gradients(mixer, packed, x), gradients(mixer, separate, x))


@mixers
def test_rows_of_a_batch_are_separate(name):
    mixer, x = make(name), rows(3, 13)
    order = torch.tensor([2, 0, 1])
    assert_same([mixer(x[order]).output], [mixer(x).output[order]])
    assert_same([mixer(x).output], [torch.cat([mixer(row[None]).output for row in x])])


# States


@mixers
def test_steps_equal_forward(name):
    mixer, x = make(name), rows(2, 21)
    state = mixer.new_state(2)
    with torch.no_grad():
        steps = [mixer(token, state=state).output for token in x.split(1, dim=1)]
    assert_same([torch.cat(steps, dim=1)], [mixer(x).output])
    assert state["position"].tolist() == [21, 21]


@mixers
@pytest.mark.parametrize("cuts", [(20, 1), (1, 20), (4, 1, 5, 11), (7, 7, 7)])
def test_pieces_equal_forward_with_gradients(name, cuts):
    """Prefill in pieces, and truncated back-propagation not truncated: gradients flow through the state."""
    mixer, x = make(name), rows(2, 21).requires_grad_()
    state = mixer.new_state(2)
    pieces = torch.cat([mixer(piece, state=state).output for piece in x.split(cuts, dim=1)], dim=1)
    whole = mixer(x).output
    assert_same([pieces], [whole])
    assert_same(gradients(mixer, pieces, x), gradients(mixer, whole, x))


@mixers
def test_ragged_pieces_equal_forward(name):
    """Rows that stand at different positions go on together, in one packed row."""
    mixer, x = make(name), rows(3, 24)
    whole, state, seen = mixer(x).output, mixer.new_state(3), [0, 0, 0]
    with torch.no_grad():
        for lengths in [(4, 9, 1), (1, 1, 1), (2, 13, 7), (17, 1, 15)]:
            parts = [x[i, seen[i] : seen[i] + n] for i, n in enumerate(lengths)]
            expected = [whole[i, seen[i] : seen[i] + n] for i, n in enumerate(lengths)]
            sequence = Sequence.packed(lengths, offsets=seen)
            assert_same([mixer(torch.cat(parts)[None], sequence, state).output[0]], [torch.cat(expected)])
            seen = [start + n for start, n in zip(seen, lengths, strict=True)]


@mixers
def test_states_are_saved_and_reordered(name, tmp_path):
    mixer, x = make(name), rows(3, 15)
    state = mixer.new_state(3)
    with torch.no_grad():
        mixer(x[:, :9], state=state)
        save_file(state, tmp_path / "state.safetensors")
        loaded = load_file(tmp_path / "state.safetensors")
        order = torch.tensor([1, 1, 0, 2])
        loaded = {key: value[order] for key, value in loaded.items()}
        output = mixer(x[order, 9:], state=loaded).output
    assert_same([output], [mixer(x).output[order, 9:]])


@mixers
@pytest.mark.parametrize("length", [1, 40, 300])
def test_state_bytes_are_as_stated(name, length):
    mixer = make(name, torch.float32)
    state = mixer.new_state(2)
    with torch.no_grad():
        mixer(rows(2, length, torch.float32), state=state)
    assert all(value.shape[0] == 2 for value in state.values())
    assert sum(value.nbytes for value in state.values()) == 2 * mixer.state_bytes(length)


@mixers
def test_a_preallocated_state_never_grows(name):
    mixer, x = make(name), rows(2, 140)
    state = mixer.new_state(2, capacity=300)
    places = {key: value.data_ptr() for key, value in state.items() if value.ndim > 3}
    with torch.no_grad():
        first = mixer(x[:, :9], state=state).output
        steps = [mixer(token, state=state).output for token in x[:, 9:].split(1, dim=1)]
    assert_same([torch.cat([first, *steps], dim=1)], [mixer(x).output])
    assert places == {key: value.data_ptr() for key, value in state.items() if value.ndim > 3}


@mixers
def test_a_state_refuses_another_position(name):
    mixer, x = make(name), rows(1, 4)
    state = mixer.new_state(1)
    with pytest.raises(ValueError, match="state stands at"):
        mixer(x, Sequence.packed((4,), offsets=(3,)), state)


# Cost


@mixers
def test_flops_are_as_stated(name):
    """The full convention against what the reference is counted to compute, at a length that its reach covers."""
    mixer, length = make(name, torch.float32, backend="reference"), REACH[name]
    with FlopCounterMode(display=False) as counter:
        mixer(rows(1, length, torch.float32))
    assert counter.get_total_flops() == length * mixer.flops(length, causal=False)
    assert mixer.flops(length) < mixer.flops(length, causal=False)


@mixers
def test_memory_is_linear_in_length(name):
    mixer = make(name, torch.float32)

    def train(length: int) -> int:
        x = rows(1, length, torch.float32).requires_grad_()
        return peak_bytes(lambda: mixer(x).output.sum().backward())

    train(256)  # gradients of the parameters exist from here on
    short, long = train(1024), train(4096)
    assert long <= 4.4 * short


# The decoder around it


@patterns
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padded_rows_equal_unpadded(pattern, side):
    model = decoder(pattern)
    lengths, time = (7, 12, 1), 14
    ids, mask = torch.zeros(3, time, dtype=torch.int64), torch.zeros(3, time, dtype=torch.int64)
    documents = [torch.randint(2, 61, (n,)) for n in lengths]
    for row, document in enumerate(documents):
        start = {"left": time - len(document), "right": 0, "both": 1}[side]
        ids[row, start : start + len(document)] = document
        mask[row, start : start + len(document)] = 1
    labels = ids.masked_fill(mask == 0, -100)
    padded = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=5)
    logits = [model(document[None]).logits[0] for document in documents]
    for row, expected in enumerate(logits):
        assert_same([padded.logits[row][mask[row].bool()]], [expected])
    loss = sum(model(d[None], labels=d[None], num_items_in_batch=5).loss for d in documents)
    assert_same([padded.loss], [loss], 1e-6)  # the loss is computed in fp32
    assert_same(
        torch.autograd.grad(padded.loss, list(model.parameters())),
        torch.autograd.grad(loss, list(model.parameters())),
        1e-6,
    )


@patterns
def test_generation_of_left_padded_rows_equals_unpadded(pattern):
    model = decoder(pattern)
    documents = [torch.randint(2, 61, (n,)) for n in (7, 12, 1)]
    ids, mask = torch.zeros(3, 12, dtype=torch.int64), torch.zeros(3, 12, dtype=torch.int64)
    for row, document in enumerate(documents):
        ids[row, 12 - len(document) :] = document
        mask[row, 12 - len(document) :] = 1
    arguments = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    expected = [model.generate(d[None], use_cache=False, **arguments)[0, len(d) :] for d in documents]
    for options in ({}, {"prefill_chunk_size": 5}, {"prefill_chunk_size": 1}):
        generated = model.generate(ids, attention_mask=mask, **arguments, **options)
        assert torch.equal(generated[:, 12:], torch.stack(expected))


@patterns
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_captured_steps_equal_ordinary_ones(pattern, device):
    model = decoder(pattern).to(device, torch.float64 if device == "cpu" else torch.float32)
    ids, mask = torch.zeros(3, 12, dtype=torch.int64), torch.zeros(3, 12, dtype=torch.int64)
    for row, length in enumerate((7, 12, 1)):
        ids[row, 12 - length :] = torch.randint(2, 61, (length,))
        mask[row, 12 - length :] = 1
    ids, mask = ids.to(device), mask.to(device)
    arguments = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **arguments)
    cache = model.model.new_cache(3, capacity=40, captured=True)
    first = model.generate(ids, past_key_values=cache, return_dict_in_generate=True, **arguments)
    assert torch.equal(first.sequences, expected)
    assert cache.step is not None and cache.offsets == (26, 31, 20)
    turn = torch.cat([expected, ids[:, :1] * 0 + 5], dim=1)
    arguments["attention_mask"] = torch.cat([mask, torch.ones_like(turn[:, 12:])], dim=1)
    arguments["max_new_tokens"] = 5
    continued = model.generate(turn, past_key_values=cache, **arguments)
    assert torch.equal(continued, model.generate(turn, **arguments))
    with pytest.raises(ValueError, match="room for 40 tokens"):
        model.generate(continued, past_key_values=cache, max_new_tokens=20, pad_token_id=0)


@patterns
def test_activation_checkpointing_changes_no_bit(pattern):
    model = decoder(pattern).float().train()
    ids = torch.randint(2, 61, (2, 19))
    results = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss = model(ids, labels=ids).loss
        loss.backward()
        results.append([loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@patterns
def test_compiled_equals_eager(pattern):
    model = decoder(pattern).float()
    ids = torch.randint(2, 61, (1, 23))
    arguments = {"cu_seqlens": torch.tensor([0, 5, 6, 23], dtype=torch.int32), "shift_labels": ids.roll(-1, 1)}
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
    results = []
    for run in (model, compiled):
        loss = run(ids, **arguments).loss
        results.append([loss, *torch.autograd.grad(loss, list(run.parameters()))])
    assert_same(*results, tolerance=1e-6)


@mixers
def test_autocast_reaches_projections_and_no_operator(name):
    """Parameters stay fp32, no operator mixes dtypes, and gradients are off about as in bf16 throughout."""
    torch.manual_seed(7)
    ids, gradients = torch.randint(2, 61, (2, 40)), []
    for dtype, autocast in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False)):
        model = decoder((name,)).to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(ids, labels=ids).loss
        found = torch.autograd.grad(loss, list(model.parameters()))
        assert all(gradient.dtype == dtype for gradient in found)
        gradients.append(torch.cat([g.flatten().float() for g in (loss.detach(), *found)]))
    exact, rounded, narrow = gradients
    assert (rounded - exact).norm() <= 2 * (narrow - exact).norm()


@patterns
def test_export_and_reload_give_the_same_logits(pattern, tmp_path):
    from transformers import AutoModelForCausalLM

    model, ids = decoder(pattern).float(), torch.randint(2, 61, (2, 11))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is DecoderForCausalLM and loaded.config.mixer_pattern == model.config.mixer_pattern
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-5)  # products vary with addresses


# Context parallelism: functions that run on every rank, and compare with the whole row there

MESHES = [(2, 1), (1, 2), (4, 1), (1, 4), (2, 2)]
ROWS = {"one document": (53,), "ragged": RAGGED, "single tokens": (1,) * 7, "one token": (1,)}
meshes = pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: f"ring{sizes[0]}-ulysses{sizes[1]}")


def contexts(mesh, pattern):
    for layout in ("contiguous", "zigzag") if mesh.ring.size > 1 else ("contiguous",):
        for attention in ("gather", "ring") if mesh.ring.size > 1 and "softmax" in pattern else ("gather",):
            yield ContextParallel(mesh, layout, attention)


def summed(tensors, axis):
    """The sums over the ranks: of shares of a loss, and of gradients."""
    tensors = [tensor.clone() for tensor in tensors]
    for tensor in tensors:
        torch.distributed.all_reduce(tensor, group=axis.group)
    return tensors


def largest_error(found, expected):
    """As `assert_same` measures it; NaN if there is any, which Python's max would lose."""
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(found, expected, strict=True)]
    return float(torch.stack([(a - b).abs().max() / b.abs().max().clamp(min=1) for a, b in pairs]).max())


def sharded_errors(mesh, pattern, dtype, rows):
    """The largest error of loss, logits, input and parameter gradients in every layout, packing and way to attend."""
    model, found = decoder(pattern).to(dtype), {}
    for row in rows:
        lengths, tokens = ROWS[row], sum(ROWS[row])
        torch.manual_seed(4)
        x = torch.randn(1, tokens, WIDTH, dtype=dtype).requires_grad_()
        labels = torch.randint(0, 61, (1, tokens))
        labels[:, ::5] = -100
        labels[:, -1] = 3  # never all ignored
        boundaries = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        arguments = {"inputs_embeds": x, "cu_seqlens": boundaries}
        inputs = [x, *model.parameters()]

        def results(context, arguments=arguments, labels=labels, inputs=inputs):
            loss = model(**arguments, shift_labels=labels, context=context).loss
            return [loss.detach(), *torch.autograd.grad(loss, inputs)]

        expected, logits = results(None), model(**arguments).logits
        for context in contexts(mesh, pattern):
            actual = [*summed(results(context), mesh.context), model(**arguments, context=context).logits]
            found[row, context.layout, context.attention] = largest_error(actual, [*expected, logits])
    return found


@patterns
@meshes
def test_context_parallel_equals_one(run_distributed, pattern, sizes):
    for found in run_distributed(sharded_errors, sizes, pattern, torch.float64, tuple(ROWS)):
        assert all(error <= 1e-12 for error in found.values()), found


@patterns
def test_context_parallel_error_does_not_grow_with_the_ranks(run_distributed, pattern):
    tolerance = 2e-6 * max(AMPLIFIES.get(name, 1) for name in pattern)
    for sizes in MESHES:
        for found in run_distributed(sharded_errors, sizes, pattern, torch.float32, ("ragged",)):
            assert all(error <= tolerance for error in found.values()), found


def sharded_batch_errors(mesh, pattern):
    """The largest errors with a padded batch of ids: of gradients through logits, which are whole on every rank and
    weighed differently by each, and of the loss of `labels` and its gradients (an fp32 loss).
    """
    model, size = decoder(pattern), mesh.context.size
    torch.manual_seed(7)
    ids, mask = torch.randint(2, 61, (3, 13)), torch.ones(3, 13, dtype=torch.int64)
    mask[0, :5] = mask[2, 4:] = 0
    weights = torch.randn(size, 3, 13, 61, dtype=torch.float64)
    labels, parameters, found = ids.masked_fill(mask == 0, -100), list(model.parameters()), {}

    def results(context, weight):
        logits = model(ids, attention_mask=mask, context=context).logits
        loss = model(ids, attention_mask=mask, labels=labels, context=context).loss
        through_logits = torch.autograd.grad((logits * weight).sum(), parameters)
        return [through_logits, [loss.detach(), *torch.autograd.grad(loss, parameters)]]

    expected = results(None, weights.sum(0))
    for context in contexts(mesh, pattern):
        actual = [summed(tensors, mesh.context) for tensors in results(context, weights[mesh.context.rank])]
        pairs = zip(actual, expected, strict=True)
        found[context.layout, context.attention] = [largest_error(*pair) for pair in pairs]
    return found


@patterns
@pytest.mark.parametrize("sizes", [(2, 1), (2, 2)])
def test_context_parallel_batches_equal_one(run_distributed, pattern, sizes):
    for found in run_distributed(sharded_batch_errors, sizes, pattern):
        assert all(logits <= 1e-12 and loss <= 1e-6 for logits, loss in found.values()), found


def sharded_generation(mesh, pattern):
    """For every context whether a left-padded batch generates the same tokens, and the error of the states that its
    prefill fills. The first row ends with a finished chunk of RAT, the others do not.
    """
    model = decoder(pattern)
    ids, mask = torch.zeros(3, 13, dtype=torch.int64), torch.zeros(3, 13, dtype=torch.int64)
    torch.manual_seed(5)
    for row, length in enumerate((8, 13, 1)):
        ids[row, 13 - length :] = torch.randint(2, 61, (length,))
        mask[row, 13 - length :] = 1
    found = []
    for context in [None, *contexts(mesh, pattern)]:
        options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "context": context}
        tokens = model.generate(ids, attention_mask=mask, **options)
        with torch.no_grad():
            cache = model(ids, attention_mask=mask, use_cache=True, context=context).past_key_values
        found.append((tokens, cache.states))
    (tokens, states), *others = found

    def flat(states):
        return [state[name] for state in states for name in sorted(state)]

    return [(torch.equal(tokens, other), largest_error(flat(filled), flat(states))) for other, filled in others]


@patterns
@pytest.mark.parametrize("sizes", [(2, 1), (2, 2)])
def test_context_parallel_prefill_equals_one(run_distributed, pattern, sizes):
    for found in run_distributed(sharded_generation, sizes, pattern):
        assert all(same and error <= 1e-12 for same, error in found), found


def checkpointed(mesh, pattern):
    model = decoder(pattern).train()
    torch.manual_seed(6)
    ids, results = torch.randint(2, 61, (1, 41)), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        for context in contexts(mesh, pattern):
            model.zero_grad()
            loss = model(ids, shift_labels=ids.roll(-1, 1), context=context).loss
            loss.backward()
            results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    half = len(results) // 2
    pairs = zip(results[:half], results[half:], strict=True)
    return all(torch.equal(a, b) for pair in pairs for a, b in zip(*pair, strict=True))


@mixers
def test_context_parallel_checkpointing_changes_no_bit(run_distributed, name):
    assert all(run_distributed(checkpointed, (2, 2), (name,)))


@mixers
def test_a_mixer_says_for_which_layouts_it_has_a_rule(name, monkeypatch):
    mixer = MIXERS[name]
    for layout in ("contiguous", "zigzag"):
        mixer.check_sharding(make(name).options, layout, 2, 2)
    monkeypatch.setattr(mixer, "layouts", ("contiguous",))
    with pytest.raises(ValueError, match=f"mixer {name} has no rule .* zigzag layout; it has rules for contiguous"):
        mixer.check_sharding(make(name).options, "zigzag", 2, 1)
    monkeypatch.setattr(mixer, "layouts", ())
    with pytest.raises(ValueError, match="it has none for any layout"):
        mixer.check_sharding(make(name).options, "contiguous", 2, 1)


def refused(mesh, name):
    mixer, layouts = MIXERS[name], MIXERS[name].layouts
    mixer.layouts = ("contiguous",)
    try:
        decoder((name,))(torch.ones(1, 20, dtype=torch.int64), context=ContextParallel(mesh, "zigzag"))
        return ""
    except ValueError as error:
        return str(error)
    finally:
        mixer.layouts = layouts


@mixers
def test_a_mixer_without_a_rule_refuses_on_every_rank(run_distributed, name):
    for message in run_distributed(refused, (2, 1), name):
        assert f"mixer {name} has no rule" in message
