"""`attn_implementation="farspan_softplus"` in a model class of transformers: a small Llama in float64."""

import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.cache_utils import StaticCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import farspan  # noqa: F401 (registers the name)
from farspan.kernels.softplus import softplus_attention
from farspan.lm.attention_interface import NAME, softplus_attention_forward

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "eos_token_id": None,
    "pad_token_id": 0,
    "attn_implementation": NAME,
}
GREEDY = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0}
OPTIONS = [{}, {"power": 0}, {"power": 2.5, "window": 4}]

options = pytest.mark.parametrize("softplus", OPTIONS, ids=str)


def make(softplus=None, kind=LlamaForCausalLM, **fields):
    torch.manual_seed(1)
    config = {LlamaForCausalLM: LlamaConfig, MistralForCausalLM: MistralConfig}[kind]
    return kind(config(**{**SMALL, "softplus_attention": softplus, **fields})).double().eval()


def tokens(*shape):
    return torch.randint(1, 61, shape, generator=torch.Generator().manual_seed(2))


def close(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@options
def test_a_layer_is_the_operator(softplus):
    """One attention layer beside its projections, rotation and `softplus_attention`, with gradients."""
    model = make(softplus)
    layer, x = model.model.layers[0].self_attn, torch.randn(2, 19, 32, dtype=torch.float64)
    angles = model.model.rotary_emb(x, torch.arange(19)[None])
    projections, results = (layer.q_proj, layer.k_proj, layer.v_proj), []
    for direct in (False, True):
        leaf = x.clone().requires_grad_()
        if direct:
            q, k, v = (f(leaf).unflatten(-1, (-1, 8)).transpose(1, 2) for f in projections)
            q, k = apply_rotary_pos_emb(q, k, *angles)
            q, k, v = (t.transpose(1, 2).flatten(0, 1)[None] for t in (q, k, v))
            boundaries = torch.tensor([0, 19, 38], dtype=torch.int32)
            o, _ = softplus_attention(q, k, v, (19, 19), boundaries, backend="reference", **softplus)
            out = layer.o_proj(o.view(2, 19, 32))
        else:
            out, _ = layer(leaf, position_embeddings=angles, attention_mask=None)
        weights = [projection.weight for projection in projections]
        results.append([out, *torch.autograd.grad(out.square().sum(), (leaf, *weights))])
    for one, other in zip(*results, strict=True):
        assert one.abs().max() > 0
        close(one, other)


@options
@pytest.mark.parametrize("form", ["position_ids", "cu_seq_lens"])
def test_packed_is_separate(softplus, form):
    model, lengths = make(softplus), (7, 1, 12)
    ids = tokens(1, sum(lengths))
    extra = {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}
    if form == "cu_seq_lens":
        cu = torch.tensor([0, 7, 8, 20], dtype=torch.int32)
        extra |= {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 12, "max_length_k": 12}
    separate = torch.cat([model(piece).logits for piece in ids.split(lengths, dim=1)], dim=1)
    close(model(ids, **extra).logits, separate)
    close(model(ids, use_cache=False, **extra).logits, separate)
    assert (model(ids).logits - separate).abs().max() > 1e-3


@options
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(softplus, side):
    """Nor does it get a gradient; a row may be all padding."""
    model, lengths = make(softplus), (9, 4, 13, 0)
    ids, mask = tokens(4, 13), torch.zeros(4, 13, dtype=torch.long)
    for row, n in enumerate(lengths):
        mask[row, slice(13 - n, 13) if side == "left" else slice(0, n)] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, attention_mask=mask, position_ids=positions).logits
    for row in range(3):
        close(logits[row][mask[row] == 1], model(ids[row][mask[row] == 1][None]).logits[0])
    (gradient,) = torch.autograd.grad(logits[mask == 1].square().sum(), embedded)
    assert gradient.isfinite().all()
    assert not gradient[mask == 0].any() and gradient[mask == 1].abs().amax(-1).min() > 0


@options
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_a_cache_is_the_full_forward(softplus, cache):
    model, ids = make(softplus), tokens(2, 6)
    arguments = {} if cache == "dynamic" else {"cache_implementation": "static", "disable_compile": True}
    found = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY, **arguments)
    expected = ids
    for _ in range(7):
        expected = torch.cat([expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, expected)


@options
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_pieces_with_a_cache_are_the_whole(softplus, cache):
    """Prefill, several tokens at once, single tokens; the second row has three tokens of padding on its left."""
    model, ids = make(softplus), tokens(2, 17)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    whole = model(ids, attention_mask=mask, position_ids=positions).logits
    past = StaticCache(config=model.config, max_cache_len=25) if cache == "static" else None
    pieces, seen = [], 0
    for n in (6, 5, 1, 4, 1):
        span = slice(seen, seen + n)
        out = model(
            ids[:, span], attention_mask=mask[:, : seen + n], position_ids=positions[:, span], past_key_values=past,
            use_cache=True,
        )  # fmt: skip
        past, seen = out.past_key_values, seen + n
        pieces.append(out.logits)
    close(torch.cat(pieces, dim=1)[mask == 1], whole[mask == 1])


def test_left_padded_generation_is_that_of_each_row():
    model, ids = make(), tokens(2, 8)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    found = model.generate(ids, attention_mask=mask, **GREEDY)[:, 8:]
    for row, start in ((0, 0), (1, 3)):
        alone = ids[row : row + 1, start:]
        expected = model.generate(alone, attention_mask=torch.ones_like(alone), **GREEDY)
        assert torch.equal(found[row], expected[0, 8 - start :])


def test_sliding_window_of_the_model():
    """The model's window is the operator's, with a cache that keeps no more than it too."""
    model, ids = make(kind=MistralForCausalLM, sliding_window=5), tokens(1, 20)
    plain = make({"window": 5}, kind=MistralForCausalLM, sliding_window=None)
    whole = model(ids).logits
    close(whole, plain(ids).logits)
    assert (whole - make(kind=MistralForCausalLM, sliding_window=None)(ids).logits)[:, 6:].abs().max() > 1e-3
    past, pieces = None, []
    for n, piece in zip((8, 3, 1, 8), ids.split((8, 3, 1, 8), dim=1), strict=True):
        out = model(piece, past_key_values=past, use_cache=True)
        past = out.past_key_values
        pieces.append(out.logits)
        assert out.logits.shape[1] == n
    close(torch.cat(pieces, dim=1), whole)


def test_options_come_from_the_config():
    ids = tokens(1, 12)
    assert torch.equal(make()(ids).logits, make({"power": 15, "backend": "chunked"})(ids).logits)
    assert not torch.allclose(make()(ids).logits, make({"power": 3})(ids).logits)
    with pytest.raises(ValueError, match=r"power=0.5 must be"):
        make({"power": 0.5})(ids)
    with pytest.raises(ValueError, match=r"softplus_attention=.*pwer"):
        make({"pwer": 3})(ids)


def test_training_lowers_the_loss():
    model, ids = make({"power": 3}).train(), tokens(2, 16)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(8):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.abs().max() > 0 for p in model.model.layers.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_what_is_not_defined_is_refused():
    ids = tokens(1, 6)
    with pytest.raises(ValueError, match=r"attention_dropout=0, not 0.1"):
        make(attention_dropout=0.1).train()(ids)
    make(attention_dropout=0.1)(ids)
    with pytest.raises(ValueError, match=r"takes a mask \[batch, tokens\]"):
        make()(ids, attention_mask=torch.zeros(1, 1, 6, 6))
    model = make()
    model.config.is_causal = False
    with pytest.raises(ValueError, match="shows tokens what comes after"):
        model(ids)
    layer = make().model.layers[0].self_attn
    q, k = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    for name in ("softcap", "s_aux"):
        with pytest.raises(ValueError, match=f"does not define {name}"):
            softplus_attention_forward(layer, q, k, k, None, **{name: torch.ones(4)})
    with pytest.raises(ValueError, match="is_causal=False"):
        softplus_attention_forward(layer, q, k, k, None, is_causal=False)
    with pytest.raises(ValueError, match="one head dim, not 8 and 4"):
        softplus_attention_forward(layer, q, k, k[..., :4], None)
    with pytest.raises(ValueError, match="pack one row"):
        softplus_attention_forward(layer, q, k, k, None, cu_seq_lens_q=torch.tensor([0, 5]))


@pytest.mark.parametrize("order", ["farspan, transformers", "transformers, farspan"])
def test_import_registers(order):
    """In either order; and farspan alone does not load transformers."""
    program = f"""
import {order.split(",")[0]}, sys
assert {order.startswith("transformers")} == ("transformers" in sys.modules)
import {order}
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
assert {NAME!r} in ALL_ATTENTION_FUNCTIONS
"""
    result = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
