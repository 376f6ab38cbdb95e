"""Published checkpoints, on synthetic weights in the published layout."""

import pytest
import torch
from torch.nn import functional as F

from farspan.kernels.rat import rat
from farspan.lm.published import load_rat

WIDTH, HEADS, GROUPS, LAYERS, VOCABULARY = 16, 4, 2, 2, 31


def synthetic(prefix=""):
    torch.manual_seed(0)
    shared = GROUPS * WIDTH // HEADS
    shapes = {"embedding.wte.weight": (VOCABULARY, WIDTH), "backbone.ln.weight": (WIDTH,)}
    for layer in range(LAYERS):
        start = f"backbone.layers.{layer}"
        shapes |= {
            f"{start}.seq_layer.in_proj.weight": (3 * WIDTH + 2 * shared, WIDTH),
            f"{start}.seq_layer.gate_bias": (WIDTH,),
            f"{start}.seq_layer.input_norm.weight": (WIDTH,),
            f"{start}.seq_layer.out_proj.weight": (WIDTH, WIDTH),
            f"{start}.hidden_layer.ln.weight": (WIDTH,),
            f"{start}.hidden_layer.fc1.weight": (64, WIDTH),
            f"{start}.hidden_layer.fc2.weight": (WIDTH, 64),
        }
    state = {prefix + name: torch.randn(shape) / 3 for name, shape in shapes.items()}
    return state | {f"{prefix}head.lm_head.weight": state[f"{prefix}embedding.wte.weight"]}


def published_forward(state, ids):
    """The published model, from its description: z, v, g, q, k in one projection, exact GELU, no biases."""
    norm = lambda x, name: F.rms_norm(x, (WIDTH,), state[name], 1e-6)  # noqa: E731
    head_dim = WIDTH // HEADS
    pairs = 10_000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.arange(16)[:, None] * pairs
    x = state["embedding.wte.weight"][ids]
    for layer in range(LAYERS):
        mixer, hidden = f"backbone.layers.{layer}.seq_layer", f"backbone.layers.{layer}.hidden_layer"
        parts = norm(x, f"{mixer}.input_norm.weight") @ state[f"{mixer}.in_proj.weight"].T
        sizes = (WIDTH, WIDTH, WIDTH, GROUPS * head_dim, GROUPS * head_dim)
        z, v, g, q, k = (part.unflatten(-1, (-1, head_dim)) for part in parts.split(sizes, dim=-1))
        bias = state[f"{mixer}.gate_bias"].unflatten(0, (HEADS, head_dim))
        y, _ = rat(q, k, v, g, bias, z, (ids.shape[1],), 4, rope=(angles.cos(), angles.sin()), backend="reference")
        x = x + y.flatten(2) @ state[f"{mixer}.out_proj.weight"].T
        inner = F.gelu(norm(x, f"{hidden}.ln.weight") @ state[f"{hidden}.fc1.weight"].T)
        x = x + inner @ state[f"{hidden}.fc2.weight"].T
    return norm(x, "backbone.ln.weight") @ state["embedding.wte.weight"].T


@pytest.mark.parametrize("form", ["plain", "compiled", "file"])
def test_rat_checkpoint(form, tmp_path):
    state = synthetic("_orig_mod." if form == "compiled" else "")
    checkpoint = {"task": state}
    if form == "file":
        torch.save(checkpoint, tmp_path / "model.pt")
        checkpoint = tmp_path / "model.pt"
    model = load_rat(checkpoint, heads=HEADS, chunk=4)
    ids = torch.randint(0, VOCABULARY, (1, 19))
    plain = {name.replace("_orig_mod.", ""): value for name, value in state.items()}
    torch.testing.assert_close(model(ids).logits, published_forward(plain, ids), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone.layers.0.seq_layer.wq.weight": torch.zeros(3)}, "wq.weight is no weight of a RAT"),
        ({"embedding.wte.weight": None}, "embed_tokens.weight has no counterpart"),
        ({"backbone.ln.weight": torch.zeros(3)}, "does not fit"),
        ({"backbone.layers.1.seq_layer.gate_bias": None}, "does not fit"),
    ],
)
def test_other_weights_are_refused(change, message):
    state = synthetic() | change
    with pytest.raises(ValueError, match=message):
        load_rat({name: value for name, value in state.items() if value is not None}, heads=HEADS)


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="heads=3 does not fit"):
        load_rat(synthetic(), heads=3)
