"""Which parameter is decayed, and at which rate."""

import pytest

from farspan.lm.recipe import OptimizerSpec
from farspan.lm.train.optimizer import clip_norm, parameter_groups, roles


@pytest.fixture(scope="module")
def model():
    from farspan.lm.config import DecoderConfig
    from farspan.lm.decoder import DecoderForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return DecoderForCausalLM(DecoderConfig(**sizes, attention_bias=True, tie_word_embeddings=False))


def test_every_parameter_has_one_role(model):
    found = roles(model)
    everything = found.matrices + found.embeddings + found.vectors
    assert {id(p) for p in everything} == {id(p) for p in model.parameters()}
    assert len(everything) == len(list(model.parameters()))
    assert {id(p) for p in found.embeddings} == {id(model.model.embed_tokens.weight), id(model.lm_head.weight)}
    assert all(p.ndim == 1 for p in found.vectors) and all(p.ndim == 2 for p in found.matrices)


def test_adamw_decays_matrices_alone(model):
    groups = {group["name"]: group for group in parameter_groups(model, OptimizerSpec(lr=0.1, weight_decay=0.3))}
    assert {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()} == {
        "matrices": (0.1, 0.3),
        "embeddings": (0.1, 0.0),
        "vectors": (0.1, 0.0),
    }
    decayed = parameter_groups(model, OptimizerSpec(lr=0.1, weight_decay=0.3, decay_embeddings=True))
    assert [group["weight_decay"] for group in decayed] == [0.3, 0.3, 0.0]


def test_muon_has_a_rate_of_its_own(model):
    spec = OptimizerSpec(name="muon", lr=0.02, adam_lr=0.005)
    assert [group["lr"] for group in parameter_groups(model, spec)] == [0.02, 0.005, 0.005]
    assert clip_norm(spec) == 0.0
    assert clip_norm(OptimizerSpec()) == 1.0
