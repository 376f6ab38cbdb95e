"""The decoder as transformers and trl see it: batch forms, losses, generation, configuration."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.cache_utils import StaticCache

from farspan import Decoder, DecoderConfig, DecoderForCausalLM
from farspan.lm.head import TOKENS_AT_ONCE, Head, linear_cross_entropy
from farspan.lm.packing import pack_batch

SMALL = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "mixer_pattern": [{"mixer": "window", "window": 5}, "softmax"],
    "initializer_range": 0.3,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GREEDY = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0}


def make(**fields):
    torch.manual_seed(1)
    return DecoderForCausalLM(DecoderConfig(**{**SMALL, **fields})).eval()


def tokens(*shape):
    return torch.randint(2, 61, shape)


def left_padded(*documents):
    time = max(map(len, documents))
    ids, mask = (
        torch.zeros(len(documents), time, dtype=torch.int64),
        torch.zeros(len(documents), time, dtype=torch.int64),
    )
    for row, document in enumerate(documents):
        ids[row, time - len(document) :] = document
        mask[row, time - len(document) :] = 1
    return ids, mask


# Batch forms


def test_every_form_of_documents_is_the_same():
    model, ids = make(), tokens(1, 12)
    cu = torch.tensor([0, 4, 5, 12], dtype=torch.int32)
    positions = torch.tensor([[0, 1, 2, 3, 0, 0, 1, 2, 3, 4, 5, 6]])
    expected = torch.cat([model(document).logits for document in ids.split((4, 1, 7), dim=1)], dim=1)
    for form in (
        {"cu_seqlens": cu},
        {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 7, "max_length_k": 7},
        {"position_ids": positions},
        {"position_ids": positions, "attention_mask": torch.ones(1, 12, dtype=torch.int64)},
    ):
        torch.testing.assert_close(model(ids, **form).logits, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(model(ids).logits[:, 5:], expected[:, 5:], atol=1e-2)


def test_position_ids_restart_inside_padded_rows():
    """trl's packing and padding at once: two documents in one row, padding around the other."""
    model = make()
    ids, mask = left_padded(tokens(9), tokens(4))
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5], [1, 1, 1, 1, 1, 0, 1, 2, 3]])
    logits = model(ids, attention_mask=mask, position_ids=positions).logits
    expected = [model(ids[:1, :3]).logits[0], model(ids[:1, 3:]).logits[0], model(ids[1:, 5:]).logits[0]]
    torch.testing.assert_close(logits[0], torch.cat(expected[:2]), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits[1, 5:], expected[2], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 5])}, "describes one packed row"),
        ({"attention_mask": torch.ones(2, 1, 6, 6)}, "attention_mask is"),
        ({"attention_mask": torch.ones(2, 9)}, "after 0 cached columns"),
        ({"attention_mask": torch.zeros(2, 6)}, "no token that is not padding"),
        ({"position_ids": torch.arange(3, 9)[None]}, "position_ids begin at"),
    ],
)
def test_contradicting_batches_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make()(tokens(2, 6), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 5])}, "runs from 0 to 5, the row has 6"),
        ({"cu_seqlens": torch.tensor([0, 6]), "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]])}, "with padding"),
        ({"cu_seq_lens_q": torch.tensor([0, 6]), "cu_seq_lens_k": torch.tensor([0, 3, 6])}, "differ"),
        ({"labels": torch.zeros(1, 6).long(), "shift_labels": torch.zeros(1, 6).long()}, "not both"),
        ({"labels": torch.zeros(1, 6).long(), "logits_to_keep": 2}, "every position"),
        ({"output_attentions": True}, "no attention map"),
        ({"return_dict": False}, "return_dict"),
    ],
)
def test_bad_calls_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make()(tokens(1, 6), **arguments)


def test_empty_documents_are_left_out():
    packing = pack_batch(1, 6, torch.device("cpu"), cu_seqlens=torch.tensor([0, 2, 2, 6, 6], dtype=torch.int32))
    assert packing.sequence.lengths == (2, 4)


def test_hidden_states_and_interfaces():
    model = make()
    ids, mask = left_padded(tokens(6), tokens(2))
    output = model.model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    assert len(output.hidden_states) == 3 and output.hidden_states[0].shape == (2, 6, 16)
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    assert output.last_hidden_state[1, :4].abs().sum() == 0
    assert getattr(model, model.base_model_prefix) is model.model
    assert model.get_output_embeddings() is model.lm_head and model.get_input_embeddings() is model.model.embed_tokens
    embeddings = model.model.embed_tokens(ids)
    torch.testing.assert_close(model(inputs_embeds=embeddings, attention_mask=mask).logits, model(ids, mask).logits)
    assert model(ids, logits_to_keep=1).logits.shape == (2, 1, 61)
    with pytest.raises(ValueError, match="exactly one"):
        model.model(input_ids=ids, inputs_embeds=embeddings)


# Losses


def test_labels_are_shifted_inside_documents():
    model, ids = make(), tokens(1, 12)
    cu = torch.tensor([0, 4, 5, 12], dtype=torch.int32)
    logits = model(ids, cu_seqlens=cu).logits[0]
    pairs = [t for t in range(11) if t + 1 not in (4, 5)]
    expected = F.cross_entropy(logits[pairs], ids[0, [t + 1 for t in pairs]])
    torch.testing.assert_close(model(ids, labels=ids, cu_seqlens=cu).loss, expected)
    shifted = torch.full_like(ids, -100)
    shifted[0, pairs] = ids[0, [t + 1 for t in pairs]]
    output = model(ids, shift_labels=shifted, cu_seqlens=cu)
    torch.testing.assert_close(output.loss, expected)
    assert output.logits is None
    summed = model(ids, shift_labels=shifted, cu_seqlens=cu, num_items_in_batch=torch.tensor(3)).loss
    torch.testing.assert_close(summed, expected * len(pairs) / 3)


def test_no_labels_at_all_give_zero_and_a_graph():
    model, ids = make(), tokens(1, 5)
    loss = model(ids, shift_labels=torch.full_like(ids, -100)).loss
    loss.backward()
    assert loss == 0 and all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_head_equals_plain_cross_entropy(dtype):
    count = TOKENS_AT_ONCE + 77  # a ragged second piece
    hidden = torch.randn(count, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(33, 8, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, 33, (count,)).masked_fill(torch.rand(count) < 0.3, -100)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    losses = (
        linear_cross_entropy(hidden, weight, labels),
        F.cross_entropy(F.linear(*exact), labels, reduction="sum"),
    )
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    got = [losses[0], *torch.autograd.grad(losses[0], (hidden, weight))]
    expected = [losses[1], *torch.autograd.grad(losses[1], exact)]
    for a, b in zip(got, expected, strict=True):
        assert (a.double() - b).norm() <= tolerance * b.norm()
    assert got[0].dtype == torch.promote_types(dtype, torch.float32)


def test_head_never_holds_all_logits():
    from farspan.eval.memory import peak_bytes

    head, hidden = Head(8, 2000), torch.randn(8 * TOKENS_AT_ONCE, 8)
    labels = torch.randint(0, 2000, (len(hidden),))
    assert peak_bytes(lambda: head(hidden, labels).backward()) < 0.5 * len(hidden) * 2000 * 4


# Generation


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.7},
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 2, "do_sample": True},
        {"do_sample": True, "num_return_sequences": 3},
    ],
    ids=str,
)
def test_generation_with_and_without_cache_agree(options):
    model = make()
    ids, mask = left_padded(tokens(9), tokens(4), tokens(1))
    results = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        results.append(model.generate(ids, attention_mask=mask, use_cache=use_cache, **{**GREEDY, **options}))
    assert torch.equal(*results)


def test_multi_turn_continues_the_cache():
    model = make()
    ids, mask = left_padded(tokens(9), tokens(4))
    first = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **GREEDY)
    cache = first.past_key_values
    assert cache.get_seq_length() == 9 + 7 - 1  # the last token was never fed back
    turn = torch.cat([first.sequences, tokens(2, 3)], dim=1)
    mask = torch.cat([mask, torch.ones(2, 10, dtype=torch.int64)], dim=1)
    continued = model.generate(turn, attention_mask=mask, past_key_values=cache, **GREEDY)
    assert torch.equal(continued, model.generate(turn, attention_mask=mask, **GREEDY))


def test_stop_strings_reach_generation():
    """transformers carries the tokenizer along for them, up to the model's own inputs."""

    letters = Tokenizer(BPE({chr(97 + i): i for i in range(61)}, []))  # a token a letter
    letters.decoder = Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters)
    model, ids = make(), tokens(1, 5)
    free = model.generate(ids, **GREEDY)[0, 5:].tolist()
    stopped = model.generate(ids, tokenizer=tokenizer, stop_strings=[chr(97 + free[2])], **GREEDY)[0, 5:].tolist()
    assert stopped == free[: free.index(free[2]) + 1]


def test_cache_repeats_selects_and_resets():
    model, ids = make(), tokens(2, 6)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        new = tokens(2, 1)
        expected = model(torch.cat([ids[[1, 0]], new], dim=1)).logits[:, -1]
        torch.testing.assert_close(model(new, past_key_values=cache).logits[:, -1], expected, rtol=0, atol=1e-5)
        cache.reset()
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, model(ids).logits)


def test_a_cache_is_made_only_for_inference():
    model, ids = make(), tokens(1, 4)
    assert model(ids).past_key_values is None  # gradients are recorded
    with torch.no_grad():
        assert model(ids).past_key_values.get_seq_length() == 4
        assert model(ids, use_cache=False).past_key_values is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"cache_implementation": "quantized"}, "cache_implementation='quantized'"),
        ({"prompt_lookup_num_tokens": 3}, "prompt-lookup"),
        ({"past_key_values": DynamicCache()}, "DynamicCache cannot hold"),
    ],
)
def test_foreign_caches_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make().generate(tokens(1, 4), **GREEDY, **options)


def test_foreign_cache_in_a_forward_is_refused():
    cache = StaticCache(config=LlamaConfig(num_hidden_layers=2), max_cache_len=8)
    with pytest.raises(ValueError, match="StaticCache cannot hold"):
        make()(tokens(1, 4), past_key_values=cache)


# Against transformers' Llama


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16},
}


def as_llama(model):
    """A Llama with the weights of a farspan decoder of softmax layers."""
    config = model.config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "rope_parameters", "attention_bias")
    llama = LlamaForCausalLM(LlamaConfig(**{name: getattr(config, name) for name in names}, tie_word_embeddings=True))
    renamed = {
        name.replace("mixer.projections.query.", "self_attn.q_proj.")
        .replace("mixer.projections.key.", "self_attn.k_proj.")
        .replace("mixer.projections.value.", "self_attn.v_proj.")
        .replace("mixer.projections.output.", "self_attn.o_proj.")
        .replace("mixer_norm", "input_layernorm")
        .replace("mlp_norm", "post_attention_layernorm")
        .replace("mlp.gate.", "mlp.gate_proj.")
        .replace("mlp.up.", "mlp.up_proj.")
        .replace("mlp.down.", "mlp.down_proj."): value
        for name, value in model.state_dict().items()
    }
    llama.load_state_dict(renamed)
    return llama.eval()


@pytest.mark.parametrize("kind", ROPES)
def test_softmax_decoder_is_llama(kind):
    model = make(
        mixer_pattern=["softmax"], rope_parameters=dict(ROPES[kind]), max_position_embeddings=64, attention_bias=True
    )
    ids = tokens(2, 40)
    torch.testing.assert_close(model(ids).logits, as_llama(model)(ids).logits, rtol=0, atol=2e-4)


def test_length_dependent_ropes_are_fixed_at_the_configured_length():
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from farspan.lm.rope import rope_from_parameters

    dynamic = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0}
    long = {
        "rope_type": "longrope",
        "rope_theta": 500.0,
        "short_factor": [1.0, 1.5],
        "long_factor": [2.0, 3.0],
        "original_max_position_embeddings": 16,
    }
    for parameters, length in ((dynamic, 256), (long, 64)):
        config = DecoderConfig(**{**SMALL, "rope_parameters": parameters, "max_position_embeddings": 64})
        rope = rope_from_parameters(config, config.rope_parameters)
        llama = LlamaConfig(
            hidden_size=16,
            num_attention_heads=4,
            rope_parameters=dict(parameters),
            max_position_embeddings=64,
        )
        embedding = LlamaRotaryEmbedding(llama)
        cos, _ = embedding(torch.zeros(1), torch.arange(length)[None])
        angles = torch.arange(length)[:, None] * torch.tensor(rope.frequencies)
        torch.testing.assert_close(cos[0, :, :2], angles.cos() * rope.scale, rtol=0, atol=1e-4)


# Configuration


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hiden_size": 3}, "did you mean 'hidden_size'"),
        ({"hidden_size": 18}, "hidden_size=18 is not divisible by num_attention_heads=4"),
        ({"vocab_size": "many"}, "vocab_size='many' is a str; it takes int"),
        ({"num_hidden_layers": 0}, "at least 1"),
        ({"hidden_act": "swosh"}, "unknown hidden_act"),
        ({"mixer_pattern": []}, "mixer_pattern is empty"),
        ({"mixer_pattern": ["sftmax"]}, "did you mean 'softmax'"),
        ({"mixer_pattern": [{"mixer": "window", "widow": 3}]}, "did you mean 'window'"),
        ({"mixer_pattern": [{"window": 3}]}, "has no `mixer`"),
        ({"mixer_pattern": [{"mixer": "softmax", "width": 3}]}, "leave it out"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "rope_type='spiral' is not known"),
        ({"num_key_value_heads": 3}, "kv_heads=3"),
    ],
)
def test_bad_configurations_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**{**SMALL, **fields})


def test_pattern_repeats_and_inherits():
    config = DecoderConfig(
        **{**SMALL, "num_hidden_layers": 3, "mixer_pattern": [{"mixer": "softmax", "rope": "none"}, "window"]}
    )
    (first, a), (second, b), (third, c) = config.mixers()
    assert (first, second, third) == ("softmax", "window", "softmax")
    assert a.rope is None and c.rope is None and b.rope is not None and a.kv_heads == 2 and b.window == 1025


def test_configuration_round_trips(tmp_path):
    config = DecoderConfig(**SMALL)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is DecoderConfig and loaded.to_diff_dict() == config.to_diff_dict()
    assert type(AutoModel.from_config(loaded)) is Decoder


def test_documents_beyond_the_trained_length_are_warned_of(monkeypatch):
    from farspan.lm import decoder

    said = []
    monkeypatch.setattr(decoder.logger, "warning_once", said.append)
    model = make(max_position_embeddings=6)
    model(tokens(2, 6))
    assert not said
    model(tokens(1, 7))
    assert len(said) == 1 and "longer than max_position_embeddings=" in said[0]


def test_metrics_and_flops():
    model = make()
    hidden = sum(p.numel() for n, p in model.named_parameters() if "norm" not in n and "embed" not in n)
    attention = 4 * 16 * (100 + 5)  # softmax sees 100 keys at the end, window 5
    assert model.flops_per_token(100, causal=False) == 3 * (2 * hidden + 2 * 61 * 16 + attention)
    assert model.flops_per_token(100) < model.flops_per_token(100, causal=False)
    assert model(tokens(1, 3)).metrics == {}
