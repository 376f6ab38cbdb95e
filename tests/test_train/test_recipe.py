"""Recipes: inheritance, overrides, the cut of a batch, and one line for each mistake."""

import pytest

from farspan.lm.recipe import load_recipe


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("optimizer.learning_rate=1", "unknown key optimizer.learning_rate; the nearest valid keys are"),
        ("optimiser.lr=1", "unknown key optimiser; the nearest valid key is optimizer"),
        ("lr=1", "unknown key lr; the nearest valid key is optimizer.lr"),
        ("train.spike.windw=9", "unknown key train.spike.windw; the nearest valid key is train.spike.window"),
        ("data.validatoin=0", "unknown key data.validatoin; the nearest valid key is data.validation"),
        ("optimizer.lr=fast", "optimizer.lr='fast': input should be a valid number"),
        ("optimizer.lr=-1", "optimizer.lr=-1: input should be greater than 0"),
        ("optimizer.momentum=0.9", "optimizer.momentum belongs to muon; remove it, or set optimizer.name=muon"),
        ("schedule.decay=0.2", "schedule.decay belongs to wsd; remove it, or set schedule.name=wsd"),
        ("schedule.warmup=1.5", "schedule.warmup=1.5 is neither a number of steps nor a fraction"),
        ("batch.tokens=100", "batch.tokens=100 is not a multiple of batch.sequence_length=64; use batch.tokens=128"),
        ("train.steps=null", "exactly one of train.steps, train.minutes, train.tokens says how long; found none"),
        ("train={steps: 3, tokens: 9}", "found train.steps=3 and train.tokens=9"),
        ("train.spike.history=200", "train.spike.history=200 is more than train.spike.window=128"),
        ("parallel.zero=4", "parallel.zero=4: input should be 1, 2 or 3"),
        ("model.hidden_size=15", "model: hidden_size=15 is not divisible by num_attention_heads=2"),
        ("model.mixer_pattern=[sofmax]", "softmax"),
        ("model.hiden_size=16", "hidden_size"),
        ("batch=null", "batch=None"),
        ("optimizer", "'optimizer' is not an override; write key.path=value"),
    ],
)
def test_one_line_says_what_to_change(recipe_file, override, line):
    with pytest.raises(ValueError) as caught:
        load_recipe(recipe_file(), [override])
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_recipes(tmp_path):
    with pytest.raises(FileNotFoundError, match="no recipe at"):
        load_recipe(tmp_path / "absent.yaml")
    for text, line in (("a: [", "is not YAML"), ("- 1", "holds a list, not a mapping"), ("{}", "is missing")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ValueError, match=line):
            load_recipe(tmp_path / "bad.yaml")
    (tmp_path / "code.yaml").write_text("name: !!python/object/apply:os.getcwd []")
    with pytest.raises(ValueError, match="is not YAML"):
        load_recipe(tmp_path / "code.yaml")


def test_extends_merges_and_the_last_length_wins(recipe_file, tmp_path):
    recipe_file(name="base")
    (tmp_path / "middle.yaml").write_text("extends: base.yaml\noptimizer: {weight_decay: 0.5}\ntrain: {minutes: 2}")
    (tmp_path / "leaf.yaml").write_text("extends: middle.yaml\nmodel: {num_hidden_layers: 3}")
    recipe = load_recipe(tmp_path / "leaf.yaml", ["optimizer.lr=1e-3", "schedule.name=wsd"])
    assert recipe.name == "leaf"
    assert (recipe.optimizer.lr, recipe.optimizer.weight_decay, recipe.schedule.name) == (1e-3, 0.5, "wsd")
    assert recipe.model["num_hidden_layers"] == 3 and recipe.model["hidden_size"] == 16
    assert (recipe.train.steps, recipe.train.minutes) == (None, 2)
    assert load_recipe(tmp_path / "leaf.yaml", ["train.tokens=1000"]).steps() == 4


def test_extends_in_a_circle(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml")
    (tmp_path / "b.yaml").write_text("extends: a.yaml")
    with pytest.raises(ValueError, match=r"a.yaml extends itself, through a.yaml -> b.yaml"):
        load_recipe(tmp_path / "a.yaml")


def test_resolved_recipe_reads_back(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file())
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize(
    ("rows_per_device", "ranks", "micro_rows", "accumulation"),
    [(None, 1, 12, 1), (None, 3, 4, 1), (4, 2, 3, 2), (1, 4, 1, 3)],
)
def test_shares_of_a_batch(recipe_file, rows_per_device, ranks, micro_rows, accumulation):
    recipe = load_recipe(recipe_file({"batch": {"tokens": 768, "rows_per_device": rows_per_device}}))
    shares = recipe.resolve(ranks)
    assert (shares.micro_rows, shares.accumulation) == (micro_rows, accumulation)
    assert shares.rows == 12 == ranks * micro_rows * accumulation
    assert f"gradient accumulation {accumulation}, because 768 tokens / {ranks} rank" in shares.reason


def test_batch_that_ranks_do_not_divide(recipe_file):
    recipe = load_recipe(recipe_file())
    with pytest.raises(ValueError) as caught:
        recipe.resolve(3)
    assert str(caught.value) == (
        "batch.tokens=256 is 4 rows of 64, which 3 processes do not divide; "
        "use batch.tokens=192 or 384, or --nproc 1, 2 or 4"
    )
