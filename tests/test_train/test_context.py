"""Runs whose rows are shared out over ranks: the losses of one process, and ends of ranks that are told by name."""

import signal

import pytest

from farspan.lm.recipe import load_recipe

HYBRID = {
    "model": {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 32,
        "mixer_pattern": [{"mixer": "rat", "chunk": 4}, {"mixer": "window", "window": 9}, "softmax"],
    }
}
MESH = {"ring": 2, "ulysses": 2, "timeout": 2.0}


def losses(records):
    return [record["loss"] for record in records]


@pytest.fixture(scope="module")
def one():
    """Records of the single process by optimizer, trained once."""
    return {}


@pytest.mark.parametrize(("zero", "optimizer"), [(1, "adamw"), (2, "adamw"), (3, "adamw"), (1, "muon"), (3, "muon")])
def test_twenty_steps_on_2x2_equal_one_process(run, recipe_file, records, one, zero, optimizer):
    """The clip is active in every step of AdamW, which shows a wrong scale of the gradient that Adam would hide."""
    clip = {"clip": 0.1} if optimizer == "adamw" else {}
    sections = HYBRID | {"optimizer": {"name": optimizer, **clip}, "train": {"steps": 20, "checkpoint_every": None}}
    if optimizer not in one:
        assert run(recipe_file(sections), name="one") == [0]
        one[optimizer] = records("one"), records("one", "validation")
    recipe = recipe_file(sections, {"parallel": {"zero": zero, **MESH}, "batch": {"rows_per_device": 1}})
    assert run(recipe, ranks=4) == [0] * 4
    expected, validation = one[optimizer]
    assert len(losses(records())) == 20
    assert losses(records()) == pytest.approx(losses(expected), abs=1e-4 if optimizer == "muon" else 1e-5)
    norms = [[record["grad_norm"] for record in found] for found in (records(), expected)]
    assert norms[0] == pytest.approx(norms[1], rel=2e-3)
    assert [record["batch"] for record in records()] == [record["batch"] for record in expected]
    assert records(kind="validation")[-1]["loss"] == pytest.approx(validation[-1]["loss"], abs=1e-4)


@pytest.mark.parametrize(
    "mesh", [{"ring": 2}, {"ulysses": 2}, {"ring": 2, "layout": "contiguous", "attention": "ring"}]
)
def test_two_replicas_of_two_ranks_resume_and_equal_one(run, recipe_file, records, mesh):
    """2 data ranks x 2 context ranks, micro-batches, a row length that nothing divides; killed and resumed."""
    sections = HYBRID | {"batch": {"tokens": 244, "sequence_length": 61}}
    assert run(recipe_file(sections), name="one") == [0]
    sections |= {"batch": {"tokens": 244, "sequence_length": 61, "rows_per_device": 1}}
    recipe = recipe_file(sections, {"parallel": {"zero": 2, **MESH, "ulysses": None, "ring": None, **mesh}})
    killed = [{"point": "after_backward", "step": 4, "do": "kill"}]
    assert run(recipe, ranks=4, faults=killed) == [-signal.SIGKILL] * 4
    assert run(recipe, ranks=4, resume=True) == [0] * 4
    assert losses(records()) == pytest.approx(losses(records("one")), abs=1e-5)
    assert records()[-1]["loss_max"] >= records()[-1]["loss"]


@pytest.mark.parametrize(("do", "told"), [("kill", "rank 3 is dead or stopped"), ("hang", "rank 3 hangs")])
def test_a_lost_rank_ends_the_others_by_name(run, recipe_file, do, told):
    """Within the recipe's timeout and the seconds that it takes to see who is alive."""
    recipe = recipe_file(HYBRID, {"parallel": MESH})
    lost = [{"point": "step", "step": 3, "do": do, "rank": 3, "seconds": 12}]
    codes = run(recipe, ranks=4, faults=lost)
    assert codes[:3] == [1, 1, 1]
    assert len(run.errors) >= 3
    for error in run.errors[:3]:
        assert told in error and "failed in" in error and "over" in error
        assert "last seen in:" in error


@pytest.mark.parametrize(
    ("ranks", "parallel", "message"),
    [
        (1, {"ring": 2}, "use --nproc 2, or a multiple of it"),
        (3, {"ring": 2}, "2 ranks share each row, which do not divide 3 processes"),
        (8, {"context": 8, "ring": 2, "ulysses": 2}, "parallel.ulysses=2 does not give parallel.context=8"),
        (8, {"context": 8, "ring": 3}, "parallel.ring=3 does not give parallel.context=8; change one"),
        (8, {"ulysses": 8}, "4 heads are fewer than 8 Ulysses ranks; use parallel.ulysses=4"),
    ],
)
def test_impossible_meshes_are_one_line(recipe_file, ranks, parallel, message):
    with pytest.raises(ValueError, match=message):
        recipe = load_recipe(recipe_file(HYBRID, {"parallel": parallel, "batch": {"tokens": 512}}))
        recipe.resolve(ranks)
        recipe.parallelism(ranks, ranks)


@pytest.mark.parametrize(
    ("pattern", "heads", "world", "per_node", "context", "found"),
    [
        (["softmax"], 8, 8, 8, 8, (1, 8, "contiguous")),  # one node, heads for all: Ulysses
        (["softmax"], 8, 16, 8, 16, (2, 8, "zigzag")),  # two nodes: Ulysses inside, a ring between
        (["softmax", "rat"], 2, 8, 8, 8, (4, 2, "zigzag")),  # few heads
        (["softmax"], 9, 8, 8, 8, (2, 4, "zigzag")),  # 8 ranks for 9 heads would be 56 % busy, 4 are 75 %
        (["rat", "window"], 8, 8, 8, 8, (8, 1, "contiguous")),  # nothing exchanges heads
        (["softmax"], 8, 8, 8, 1, (1, 1, "contiguous")),
    ],
)
def test_the_mesh_that_is_chosen(recipe_file, pattern, heads, world, per_node, context, found):
    model = HYBRID["model"] | {"mixer_pattern": pattern, "num_attention_heads": heads, "num_key_value_heads": None}
    model["hidden_size"] = 8 * heads
    recipe = load_recipe(recipe_file({"model": model, "parallel": {"context": context}}))
    chosen = recipe.parallelism(world, per_node)
    assert (chosen.ring, chosen.ulysses, chosen.layout) == found
    assert chosen.data * chosen.context == world
