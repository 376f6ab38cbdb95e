"""Statistics of a policy: farspan's softmax and a Llama of transformers against their whole maps in float64."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig

from farspan.kernels.attention_statistics.reference import statistics_of_map
from farspan.lm.config import DecoderConfig
from farspan.lm.decoder import DecoderForCausalLM
from farspan.lm.rl.statistics import Options, attention_statistics, collect, head_groups, sampled_layers

LAYERS = 6
SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def llama(kind=LlamaConfig, implementation="sdpa", **options):
    torch.manual_seed(0)
    config = kind(**SIZES, **HEADS, max_position_embeddings=512, initializer_range=0.4, **options)
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()


def decoder(pattern=("softmax",), **options):
    torch.manual_seed(0)
    config = DecoderConfig(**{**SIZES, **HEADS, **options}, mixer_pattern=list(pattern), initializer_range=0.4)
    return DecoderForCausalLM(config).eval()


def batch(side="left", rows=3, time=70, prompt=12):
    """Rows of other lengths, padded on a side or both; responses with a hole of a tool's tokens."""
    torch.manual_seed(1)
    ids = torch.randint(0, 50, (rows, time))
    mask, response = (torch.zeros(rows, time, dtype=torch.int64) for _ in range(2))
    for row in range(rows):
        length = time - 9 * row
        start = {"left": time - length, "right": 0, "both": (time - length) // 2}[side]
        mask[row, start : start + length] = 1
        response[row, start + prompt : start + length] = 1
        response[row, start + 30 : start + 33] = 0
    return ids, mask, response


def expected_from_maps(maps, mask, response, layers, window=10, horizon=(10, 100), fraction=0.3):
    """From attention maps by layer [B, H, T, T] over padded columns: per row, group maps first, then statistics."""
    out = []
    for row in range(len(mask)):
        real = mask[row].bool()
        a = torch.cat([maps[layer][row][:, real][:, :, real] for layer in layers]).double()
        rows = response[row][real].bool()
        at = torch.arange(len(rows))
        distance = ((a * (at[:, None] - at)).sum(-1) * rows).sum(-1) / rows.sum()
        groups = head_groups(distance, fraction)
        maps_of = [a[g].mean(0, keepdim=True) for g in (groups.local_heads, groups.global_heads)]
        local, far = (statistics_of_map(m, rows, (len(rows),), window, horizon) for m in maps_of)
        full = torch.zeros(3, len(real), dtype=torch.float64)
        full[:, real] = torch.stack([local[1][:, 0], far[2][:, 0], far[3].double()])
        out.append((*full, distance, groups))
    return out


def check(found, expected):
    for row, (waad, fai, count, distance, groups) in enumerate(expected):
        assert (found.waad[row] - waad).abs().max() < 5e-5
        assert (found.fai[row] - fai).abs().max() < 1e-6
        assert torch.equal(found.fai_count[row].double(), count)
        assert (found.head_distance[row] - distance).abs().max() < 1e-4
        assert torch.equal(found.local_heads[row], groups.local_heads)
        assert torch.equal(found.global_heads[row], groups.global_heads)


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_llama_against_its_own_maps(side, implementation):
    ids, mask, response = batch(side)
    model = llama(implementation=implementation)
    found = attention_statistics(model, ids, mask, response)
    assert model.config._attn_implementation == implementation
    eager = llama(implementation="eager")
    with torch.no_grad():
        maps = eager(ids, attention_mask=mask, output_attentions=True).attentions
    layers = sampled_layers(model)
    assert layers == (2, 3, 4)
    assert found.pool == [(layer, head) for layer in layers for head in range(4)]
    check(found, expected_from_maps(maps, mask, response, layers))
    assert found.waad.dtype == found.fai.dtype == torch.float32 and found.fai_count.dtype == torch.int32
    assert not any(x.requires_grad for x in vars(found).values() if isinstance(x, torch.Tensor))
    assert not found.waad[response == 0].any() and not found.fai[response == 0].any()


def test_a_sliding_window_of_transformers():
    ids, mask, response = batch()
    model = llama(MistralConfig, sliding_window=13)
    found = attention_statistics(model, ids, mask, response, window=5, horizon=(3, 9))
    with torch.no_grad():
        eager = llama(MistralConfig, "eager", sliding_window=13)
        maps = eager(ids, attention_mask=mask, output_attentions=True).attentions
    check(found, expected_from_maps(maps, mask, response, (2, 3, 4), 5, (3, 9)))


def test_another_layout_of_projections():
    """GPT-2: its own names, learned positions, no grouped heads."""
    ids, mask, response = batch("right")
    config = GPT2Config(vocab_size=50, n_embd=32, n_layer=3, n_head=4, n_positions=128, initializer_range=0.4)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    found = attention_statistics(model, ids, mask, response)
    with torch.no_grad():
        maps = model(ids, attention_mask=mask, output_attentions=True).attentions
    check(found, expected_from_maps(maps, mask, response, (1, 2)))


@pytest.mark.parametrize("pattern", [("softmax",), ("softmax", {"mixer": "window", "window": 8})])
def test_the_decoder_against_maps_of_its_queries_and_keys(pattern):
    ids, mask, response = batch("left")
    model = decoder(pattern)
    found = attention_statistics(model, ids, mask, response, horizon=(4, 30))
    check(found, expected_from_maps(decoder_maps(model, ids, mask), mask, response, (2, 3, 4), horizon=(4, 30)))


def decoder_maps(model, ids, mask):
    """Maps of every layer over padded columns, one row at a time, from the projections' outputs in float64."""
    kept = []

    def keep(module, inputs, output):
        kept.append([x.detach()[0].double() for x in output[:2]])

    hooks = [layer.mixer.projections.register_forward_hook(keep) for layer in model.model.layers]
    maps = [torch.zeros(len(ids), 4, *[ids.shape[1]] * 2, dtype=torch.float64) for _ in hooks]
    for row in range(len(ids)):
        kept.clear()
        real = mask[row].bool()
        with torch.no_grad():
            model(ids[row : row + 1, real])
        for a, (q, k), layer in zip(maps, kept, model.model.layers, strict=True):
            back = torch.arange(len(q))[:, None] - torch.arange(len(q))
            hidden = (back < 0) | (back >= getattr(layer.mixer.options, "window", len(q)))
            scores = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(2, 1)) * q.shape[-1] ** -0.5
            place = real.nonzero()[:, 0]
            own = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            a[row][:, place[:, None], place] = own
    for hook in hooks:
        hook.remove()
    return maps


@pytest.mark.parametrize("make", [llama, decoder])
def test_padding_batch_mates_and_later_tokens_change_nothing(make):
    ids, mask, response = batch("left")
    model = make()
    found = attention_statistics(model, ids, mask, response)
    other = torch.where(mask.bool(), ids, torch.randint(0, 50, ids.shape))
    assert_same(found, attention_statistics(model, other, mask, response), 0)
    turned = attention_statistics(model, ids.flip(0), mask.flip(0), response.flip(0))
    for name in ("waad", "fai", "head_distance"):
        torch.testing.assert_close(getattr(turned, name).flip(0), getattr(found, name), atol=2e-5, rtol=0)
    row = mask[1].bool()
    alone = attention_statistics(model, ids[1:2, row], mask[1:2, row], response[1:2, row])
    torch.testing.assert_close(alone.waad[0], found.waad[1, row], atol=2e-5, rtol=0)
    torch.testing.assert_close(alone.fai[0], found.fai[1, row], atol=2e-6, rtol=0)


def assert_same(found, expected, tolerance=1e-6):
    for name in ("waad", "fai", "fai_count", "head_distance", "local_heads", "global_heads"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=tolerance, rtol=0)


@pytest.mark.parametrize("make", [llama, decoder])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_collecting_from_a_pass_that_runs_anyway(make, size):
    ids, mask, response = batch("both")
    model = make()
    expected = attention_statistics(model, ids, mask, response)
    with torch.no_grad():
        plain = model(ids, attention_mask=mask).logits
    with collect(model, mask, response, Options()) as collector:
        logits = [
            model(ids[rows], attention_mask=mask[rows], use_cache=False).logits for rows in torch.arange(3).split(size)
        ]
    assert logits[0].requires_grad  # a pass for training is as good
    torch.testing.assert_close(torch.cat(logits)[mask.bool()], plain[mask.bool()], atol=1e-5, rtol=1e-4)
    assert_same(collector.statistics(), expected, 2e-5)


@pytest.mark.parametrize("make", [llama, decoder])
def test_not_in_a_recomputation(make):
    ids, mask, response = batch("left")
    model = make()
    expected = attention_statistics(model, ids, mask, response)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with collect(model, mask, response) as collector:
        model(ids, attention_mask=mask, use_cache=False).logits.sum().backward()
    assert_same(collector.statistics(), expected, 2e-5)
    assert model.get_input_embeddings().weight.grad is not None


def test_scopes_of_the_ranking():
    ids, mask, response = batch("left")
    model = llama()
    own = attention_statistics(model, ids, mask, response)
    together = attention_statistics(model, ids, mask, response, head_scope="batch")
    counts = response.sum(1, keepdim=True).float()
    average = (own.head_distance * counts).sum(0) / counts.sum()
    groups = head_groups(average, 0.3)
    assert torch.equal(together.local_heads, groups.local_heads.expand(3, -1))
    frozen = attention_statistics(model, ids, mask, response, head_scope="frozen", frozen=groups)
    assert_same(frozen, together)
    assert own.local_heads.shape == (3, 4) and not set(own.local_heads[0].tolist()) & set(own.global_heads[0].tolist())


def test_the_model_is_left_as_it_was():
    ids, mask, response = batch("left")
    for model in (llama(attention_dropout=0.5), decoder()):
        model.train()
        model.base_model.norm.eval()
        before = [module.training for module in model.modules()]
        first = attention_statistics(model, ids, mask, response)
        assert_same(attention_statistics(model, ids, mask, response), first, 0)  # no dropout
        assert [module.training for module in model.modules()] == before
        assert torch.is_grad_enabled()
    with pytest.raises(IndexError):
        attention_statistics(llama(), ids + 100, mask, response)
    assert_same(attention_statistics(llama(), ids, mask, response), attention_statistics(llama(), ids, mask, response))


def test_only_layers_up_to_the_last_sampled_one_run():
    ids, mask, response = batch("left")
    for model in (llama(), decoder()):
        ran = []
        for index, layer in enumerate(model.base_model.layers):
            layer.register_forward_pre_hook(lambda *_, ran=ran, index=index: ran.append(index))
        attention_statistics(model, ids, mask, response)
        assert ran == [0, 1, 2, 3, 4]


def test_responses_without_tokens():
    ids, mask, response = batch("left")
    response[1] = 0
    mask[2], response[2] = 0, 0
    mask[2, -1] = 1
    for model in (llama(), decoder()):
        found = attention_statistics(model, ids, mask, response)
        assert not found.waad[1:].any() and not found.fai[1:].any() and found.waad[0].any()


@pytest.mark.parametrize(
    ("total", "layers", "expected"),
    [(36, 5, (12, 15, 18, 21, 24)), (24, 5, (8, 10, 12, 14, 16)), (3, 5, (1, 2)), (2, 5, (0, 1)), (1, 5, (0,)),
     (8, 5, (2, 3, 4, 5)), (36, 1, (18,)), (28, 3, (9, 14, 18))],
)  # fmt: skip
def test_layers_of_the_middle_third(total, layers, expected):
    assert sampled_layers(decoder(num_hidden_layers=total), layers) == expected


def test_what_has_no_statistics_says_so_in_one_line():
    ids, mask, response = batch("left")
    with pytest.raises(ValueError, match="titans \\(memory\\) layers has no attention statistics") as error:
        attention_statistics(
            decoder([{"mixer": "titans", "variant": "memory"}], num_key_value_heads=4), ids, mask, response
        )
    assert "\n" not in str(error.value)
    from transformers import MambaConfig

    mamba = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2))
    with pytest.raises(ValueError, match="MambaForCausalLM cannot be tapped"):
        attention_statistics(mamba, ids, mask, response)
    with pytest.raises(ValueError, match="no model of transformers"):
        attention_statistics(torch.nn.Linear(2, 2), ids, mask, response)
    model = llama()
    with pytest.raises(ValueError, match="padding"):
        attention_statistics(model, ids, mask, torch.ones_like(mask))
    with pytest.raises(ValueError, match="head_fraction"):
        attention_statistics(model, ids, mask, response, head_fraction=0.7)
    with pytest.raises(ValueError, match="head_scope"):
        attention_statistics(model, ids, mask, response, head_scope="layer")
    with pytest.raises(ValueError, match="both be"):
        attention_statistics(model, ids, mask[:, 1:], response)
    with pytest.raises(RuntimeError, match="forward passes brought"), collect(model, mask, response) as collector:
        model(ids[:2], attention_mask=mask[:2])
        collector.statistics()
