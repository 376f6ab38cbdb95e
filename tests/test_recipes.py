"""Every shipped recipe is read, built and estimated; every mixer is there from kernel to page."""

from pathlib import Path

import pytest
import torch

from farspan import DecoderForCausalLM
from farspan.layers import MIXERS
from farspan.lm.recipe import load_recipe
from farspan.lm.recipe_file import read_recipe
from farspan.lm.rl.spec import RLRecipe

ROOT = Path(__file__).parents[1]
RL = sorted((ROOT / "recipes/rl").glob("*.yaml"))  # recipes of `farspan rl`, by another schema
RECIPES = [path for path in sorted((ROOT / "recipes").rglob("*.yaml")) if path not in RL]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.relative_to(ROOT / "recipes").as_posix())
def test_recipe_is_whole(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem and recipe.description
    assert "loss" in recipe.expected or recipe.expected in ("not yet measured", "see docs/results.md")
    assert recipe.resolve(1).reason
    with torch.device("meta"):
        model = DecoderForCausalLM(recipe.decoder_config())
    assert model.flops_per_token(recipe.batch.sequence_length) > 0


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("1b3_softmax", 1273.6),
        ("1b3_rat", 1298.8),
        ("1b3_rat_window", 1286.2),
        ("1b3_titans_memory", 1293.95),
        ("1b3_titans_mac", 1294.77),
        ("1b3_titans_mag", 1300.08),
        ("1b3_titans_mal", 1300.01),
        ("titans_170m_memory", 170.62),
        ("titans_170m_mac", 168.48),
        ("titans_170m_mag", 171.22),
        ("titans_170m_mal", 171.20),
        ("titans_340m_memory", 343.02),
        ("titans_340m_mac", 341.82),
        ("titans_340m_mag", 341.01),
        ("titans_340m_mal", 340.97),
        ("titans_400m_memory", 409.92),
        ("titans_400m_mac", 406.01),
        ("titans_400m_mag", 387.06),
        ("titans_400m_mal", 387.04),
        ("titans_760m_memory", 765.50),
        ("titans_760m_mac", 757.34),
        ("titans_760m_mag", 756.36),
        ("titans_760m_mal", 756.31),
    ],
)
def test_published_sizes(name, millions):
    recipe = load_recipe(ROOT / f"recipes/pretrain/{name}.yaml")
    with torch.device("meta"):
        model = DecoderForCausalLM(recipe.decoder_config())
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, rel=1e-4)


@pytest.mark.parametrize("path", RL, ids=lambda path: path.name)
def test_rl_recipe_is_whole(path, farspan):
    recipe = read_recipe(RLRecipe, path, ())
    assert recipe.name == path.stem and recipe.description and recipe.expected
    status, out, err = farspan("rl", path, "--dry-run", "--nproc", 1)
    assert status == 0 and recipe.resolve(1).reason.split(":")[0] in out, err


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_a_mixer_is_there_from_kernel_to_page(name):
    operator = {"window": "softmax", "rcmha": "relative", "routing": "interval"}.get(
        name, name
    )  # where a mixer's definition is
    assert (ROOT / f"kernels/{operator}/reference.py").is_file()
    assert (ROOT / f"layers/{name}.py").is_file()
    assert (ROOT / f"docs/{name}.md").read_text().startswith(f"# {name}\n")
    used = {mixer for path in RECIPES for mixer, _ in load_recipe(path).decoder_config().mixers()}
    assert name in used
