"""Documents: they fit, are full, have their needles at the depth, and depend on nothing but their seed."""

import random
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest

from farspan.eval.needle import words
from farspan.eval.needle.document import needle_pairs
from farspan.eval.needle.generate import document, documents
from farspan.eval.needle.haystack import LengthTooSmall, encode
from farspan.eval.needle.tasks import GROUPS, TaskSpec, task, task_names, tasks
from farspan.eval.needle.tokens import TokenVocabulary

TEXT = [name for name in task_names() if name.count("_") == 1 and name != "needle_tok"]
NEEDLES = [name for name in TEXT if task(name).family == "needle"]
LENGTHS = (512, 1024, 2048, 4096)


def make(name, questions, **changes):
    return task(name, **({"file": questions} if name.startswith("needle_qa") else {}), **changes)


def middle(spec):
    return 50.0 if spec.has_depth else None


@pytest.mark.parametrize("kind", ["byte", "bpe", "unigram"])
@pytest.mark.parametrize("name", TEXT)
def test_prompts_are_as_long_as_the_budget_allows(name, kind, tokenizers, questions):
    spec, tokenizer = make(name, questions), tokenizers[kind]
    fits = []
    for length in LENGTHS:
        began = time.perf_counter()
        try:
            made = document(spec, tokenizer, length, middle(spec), 0)
        except LengthTooSmall as error:
            assert time.perf_counter() - began < 1
            assert (error.task, error.length) == (name, length) and error.needed > length
            assert length not in fits
            continue
        fits.append(length)
        budget = length - made["gen_tokens"]
        ids = encode(tokenizer, made["input"] + made["gen_prefix"]).ids
        assert made["prompt_tokens"] == len(ids) <= budget
        assert made["fill"] == len(ids) / budget
        if _unit_tokens(spec, tokenizer, made) <= 0.02 * budget:
            assert made["fill"] >= 0.97
    assert 4096 in fits or name == "needle_cwe"  # it repeats ten words thirty times from 4,096 tokens on


def _unit_tokens(spec, tokenizer, made):
    """Tokens of a large unit of the task's haystack."""
    if spec.family == "qa":
        lines = made["input"].split("\n")[1:-3]
    elif spec.family == "cwe":
        lines = ["1000. tambourine" * 3 + "lighthouse"]
    elif spec.family == "fwe":
        lines = ["qxzjvk " * 4]
    elif spec.haystack == "noise":
        lines = words.NOISE
    elif spec.haystack == "needle":
        lines = made["input"].split("\n")[1:-3]
    else:
        lines = made["input"].split(". ")[1:]
    return max(len(tokenizer(line)["input_ids"]) for line in lines)


@pytest.mark.parametrize("name", NEEDLES)
def test_a_prompt_with_one_more_unit_would_not_fit(name, tokenizers):
    made = document(task(name), tokenizers["bpe"], 1024, 30.0, 1)
    room = 1024 - made["gen_tokens"] - made["prompt_tokens"]
    assert 0 <= room < _unit_tokens(task(name), tokenizers["bpe"], made) + 3


@pytest.mark.parametrize("name", [n for n in TEXT if task(n).has_depth])
def test_the_smallest_length_is_what_the_error_says(name, tokenizers, questions):
    spec, tokenizer = make(name, questions), tokenizers["bpe"]
    with pytest.raises(LengthTooSmall, match=f"{name} does not fit into length=64 tokens; use at least") as caught:
        document(spec, tokenizer, 64, 50.0, 0)
    # Another length draws other words, so that a few tokens more may be needed.
    assert document(spec, tokenizer, caught.value.needed + 48, 50.0, 0)["prompt_tokens"] > 0


@pytest.mark.parametrize("kind", ["byte", "bpe", "unigram"])
@pytest.mark.parametrize("name", [n for n in TEXT if task(n).has_depth])
def test_depth_is_counted_in_tokens(name, kind, tokenizers, questions):
    spec, tokenizer, length = make(name, questions), tokenizers[kind], 2048
    actual = {}
    for depth in (0.0, 30.0, 70.0, 100.0) if spec.family != "vt" else (0.0, 30.0, 70.0):
        made = document(spec, tokenizer, length, depth, 0)
        actual[depth] = made["depth_actual"]
        # Half a unit at most, which is more than 1.5 points where a sentence is 60 of 1,900 tokens (of a byte each).
        half = 50 * _unit_tokens(spec, tokenizer, made) / made["prompt_tokens"]
        assert abs(made["depth_actual"] - depth) <= max(1.5, 1.3 * half)
    assert list(actual.values()) == sorted(actual.values()) and len(set(actual.values())) == len(actual)
    assert actual[0.0] == 0
    assert actual.get(100.0, 100.0) == 100


@pytest.mark.parametrize("name", NEEDLES)
def test_depth_within_a_point_and_a_half_at_4096(name, tokenizers):
    for depth in (10.0, 50.0, 90.0):
        made = document(task(name), tokenizers["bpe"], 4096, depth, 0)
        assert abs(made["depth_actual"] - depth) <= 1.5


@pytest.mark.parametrize("name", NEEDLES)
def test_needle_tokens_are_where_the_needles_begin(name, tokenizers):
    made = document(task(name), tokenizers["bpe"], 1024, 60.0, 2)
    ids = encode(tokenizers["bpe"], made["input"]).ids
    assert len(made["needle_tokens"]) == max(task(name).n_keys, task(name).n_values)
    assert made["needle_tokens"] == sorted(set(made["needle_tokens"]))
    after = [tokenizers["bpe"].decode(ids[at:]).lstrip() for at in made["needle_tokens"]]
    assert all(text.startswith("The secret ") for text in after)
    assert [needle_pairs(text)[0][1] for text in after if needle_pairs(text)[0][1] in made["outputs"]] == made[
        "outputs"
    ]


@pytest.mark.parametrize("name", NEEDLES)
def test_asked_values_occur_once_and_distractors_differ(name, tokenizers):
    spec = task(name)
    for made in documents(task(name, samples=3), tokenizers["bpe"], 2048, 20.0):
        pairs = needle_pairs(made["input"])
        values, keys = [value for _, value in pairs], [key for key, _ in pairs]
        assert len(made["outputs"]) == spec.n_asked * spec.n_values
        assert len(set(values)) == len(values)
        assert len(set(keys)) == len(keys) - (spec.n_values - 1)
        for value in made["outputs"]:
            assert made["input"].count(value) == 1 and value in values
        asked = {key for key, value in pairs if value in made["outputs"]}
        question = made["input"].split("\n")[-2]
        assert len(asked) == spec.n_asked and all(key in question for key in asked)
        assert made["gen_prefix"].endswith(" are" if len(made["outputs"]) > 1 else " is")


def test_keys_and_values_never_contain_one_another():
    assert len(words.ADJECTIVES) >= 200 and len(words.NOUNS) >= 300
    for group, at in ((words.ADJECTIVES, str.endswith), (words.NOUNS, str.startswith)):
        assert len(set(group)) == len(group)
        assert not [(a, b) for a in group for b in group if a != b and at(b, a)]
    assert np.prod([len(set(part)) for part in words.PROSE_PARTS]) >= 10**6


def test_a_kind_runs_out_with_an_error(monkeypatch):
    monkeypatch.setattr(words, "ADJECTIVES", ["red", "blue"])
    monkeypatch.setattr(words, "NOUNS", ["door", "gate", "mill", "pump", "oven"])
    with pytest.raises(ValueError, match="the 9 values of kind 'word' are used up; use the kind 'uuid'"):
        list(words.distinct("word", np.random.default_rng(0)))


@pytest.mark.parametrize("name", ["needle_s1_mc", "needle_s3_mc", "needle_mk2_mc", "needle_tok_mc"])
def test_choices_occur_in_the_context(name, tokenizers):
    spec = task(name)
    golds = set()
    for index in range(12):
        made = document(spec, tokenizers["bpe"], 1024, 40.0, index)
        right = made["answer"] if name == "needle_tok_mc" else made["outputs"][0]
        context = made["ids"] if name == "needle_tok_mc" else made["input"]
        assert len(set(made["choices"])) == 4 and made["choices"][made["gold"]] == right
        assert all(choice in context for choice in made["choices"])
        golds.add(made["gold"])
    assert len(golds) > 1


def test_wrong_choices_need_room(tokenizers):
    with pytest.raises(LengthTooSmall) as caught:
        document(task("needle_mk3_mc"), tokenizers["bpe"], 512, 50.0, 0)
    assert 512 < caught.value.needed < 1024
    assert document(task("needle_mk3_mc"), tokenizers["bpe"], caught.value.needed + 48, 50.0, 0)["choices"]


def test_teacher_forcing_reads_what_generation_reads(tokenizers):
    made, forced = (document(task(n), tokenizers["bpe"], 512, 50.0, 0) for n in ("needle_mv", "needle_mv_tf"))
    assert forced | {"task": "needle_mv", "protocol": "gen"} == made


def test_a_sample_depends_on_its_seed_alone(tokenizers):
    tokenizer = tokenizers["bpe"]
    alone = document(task("needle_mq"), tokenizer, 1024, 50.0, 3)
    state, legacy = random.getstate(), np.random.get_state()[1].copy()
    for name in ("needle_fwe", "needle_s2", "needle_mk2"):
        document(task(name), tokenizer, 1024, middle(task(name)), 0)
    in_order = list(documents(task("needle_mq", samples=5), tokenizer, 1024, 50.0))
    assert random.getstate() == state and (np.random.get_state()[1] == legacy).all()
    random.seed(1)
    np.random.seed(1)
    assert in_order[3] == alone == document(task("needle_mq"), tokenizer, 1024, 50.0, 3)
    assert len({made["input"] for made in in_order}) == 5
    assert document(task("needle_mq", seed=1), tokenizer, 1024, 50.0, 3)["outputs"] != alone["outputs"]


def test_a_sample_is_the_same_in_another_process(tokenizers, tmp_path):
    tokenizers["bpe"].save_pretrained(tmp_path)
    program = f"""
from transformers import PreTrainedTokenizerFast
from farspan.eval.needle.generate import document
from farspan.eval.needle.tasks import task
print(repr(document(task("needle_mk3"), PreTrainedTokenizerFast.from_pretrained({str(tmp_path)!r}), 1024, 70.0, 1)))
"""
    run = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip().endswith(repr(document(task("needle_mk3"), tokenizers["bpe"], 1024, 70.0, 1)))


def test_importing_needs_numpy_only():
    program = """
import sys, importlib
for name in ("generate", "cells", "heatmap"):
    importlib.import_module("farspan.eval.needle." + name)
assert not {"torch", "transformers", "matplotlib", "lm_eval", "datasets"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-P", "-c", program], check=True)


def test_wording(tokenizers):
    made = document(task("needle_s1"), tokenizers["bpe"], 512, 0.0, 0)
    lines = made["input"].split("\n")
    key, value = needle_pairs(made["input"])[0]
    assert lines[0] == "Read the text below and remember every secret number in it. A question follows at the end."
    assert lines[1] == f"The secret number of {key} is {value}."
    assert lines[2] == " ".join(words.NOISE)
    assert lines[-2:] == [f"Question: which secret number belongs to {key}?", ""]
    assert made["gen_prefix"] == f"Answer: the secret number of {key} is"
    assert made["uid"] == "needle/v1|0|needle_s1|512|0|0"


def test_room_for_the_answer(tokenizers):
    value = document(task("needle_s3"), tokenizers["byte"], 1024, 0.0, 0)
    assert value["gen_tokens"] == 48  # a space and 36 characters, 8 more, rounded up to 16
    assert document(task("needle_s3", gen_tokens=128), tokenizers["byte"], 1024, 0.0, 0)["gen_tokens"] == 128


def test_coded_words_have_the_ranks_asked_for(tokenizers):
    for length in LENGTHS[1:]:
        made = document(task("needle_fwe"), tokenizers["bpe"], length, None, 0)
        ranks = [word for word, _ in Counter(made["input"].split("\n")[1].split()).most_common(5)]
        assert ranks[0] == "......" and ranks[1:4] == made["outputs"]
        assert made["depth"] is made["depth_actual"] is None and made["needle_tokens"] == []


def test_common_words_are_the_commonest(tokenizers):
    made = document(task("needle_cwe"), tokenizers["bpe"], 2048, None, 0)
    counts = Counter(made["input"].split("List: ")[2].split("\n")[0].split()[1::2])
    assert {word for word, count in counts.items() if count == 6} == set(made["outputs"])
    assert set(counts.values()) == {1, 6}


def test_token_documents():
    spec, words_of = task("needle_tok", n_keys=4), TokenVocabulary()
    for depth in (0.0, 50.0, 100.0):
        made = document(spec, None, 128, depth, 0)
        ids = made["ids"]
        assert len(ids) == 127 == made["prompt_tokens"] and max(ids) < words_of.size
        places = [i for i, token in enumerate(ids[:-2]) if token == 0]
        assert places == made["needle_tokens"] and len(places) == 4
        table = {ids[i + 1]: ids[i + 2] for i in places}
        assert len(table) == 4 and table[ids[-1]] == made["answer"] and ids[-2] == 0
        assert abs(made["depth_actual"] - depth) < 0.5
    with pytest.raises(LengthTooSmall, match="use at least 15"):
        document(spec, None, 14, 0.0, 0)
    assert document(spec, None, 15, 0.0, 0)["answer"]
    with pytest.raises(ValueError, match="n_keys=16 needs as many keys and values"):
        document(task("needle_tok", n_keys=16), None, 128, 0.0, 0)


def test_names():
    assert [spec.name for spec in tasks(["needle_core"])] == list(GROUPS["needle_core"])
    assert [spec.protocol for spec in tasks(["needle_core_mc", "needle_s1_mc"])] == ["mc"] * 3
    assert len(tasks(["needle_all"])) == 13
    with pytest.raises(ValueError, match="unknown needle task 'needle_mk9'; the nearest names are needle_mk"):
        task("needle_mk9")
    with pytest.raises(ValueError, match="unknown needle task 'needle_mv_mc'"):
        task("needle_mv_mc")
    with pytest.raises(ValueError, match="a task has no field 'sample'"):
        task("needle_s1", sample=3)
    with pytest.raises(ValueError, match="n_asked=2 keys cannot be asked for when n_keys=1"):
        TaskSpec("mine", n_asked=2)
    with pytest.raises(ValueError, match="depth 101 is not between 0 and 100 percent"):
        TaskSpec("mine", depths=(101,))
    with pytest.raises(ValueError, match="haystack='hay' is not one of noise, prose, needle, file"):
        TaskSpec("mine", haystack="hay")
    with pytest.raises(ValueError, match="protocol mc needs n_keys=4 or more, not 1"):
        TaskSpec("mine", protocol="mc")
    with pytest.raises(ValueError, match="haystack='file' does not suit vt; use noise or prose"):
        task("needle_vt", haystack="file")
    assert task("needle_cwe", depths=(0.0, 100.0)).depths == (None,)
