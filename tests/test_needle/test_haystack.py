"""Units, places between them, and filling."""

import numpy as np
import pytest

from farspan.eval.needle import haystack as module
from farspan.eval.needle import words
from farspan.eval.needle.document import generator, needle, needle_pairs, spread
from farspan.eval.needle.generate import document
from farspan.eval.needle.haystack import Haystack, Prompt, boundaries, encode, haystack, largest_fitting
from farspan.eval.needle.passages import read_questions
from farspan.eval.needle.tasks import TaskSpec, task


def test_units_are_the_same_however_many_are_taken():
    few, many = (haystack("prose", generator("key"), [], None) for _ in range(2))
    few.first(3)
    assert few.first(70) == many.first(200)[:70]
    assert len(set(many.first(5000))) == 5000


def test_a_unit_with_an_asked_value_is_left_out():
    needles = [needle("number", f"key-{i}", str(1_000_000 + i)) for i in range(4)]
    hay = haystack("needle", generator("key"), ["1000002", "KEY-0"], iter(needles))
    assert hay.first(10) == [needles[1] + "\n", needles[3] + "\n"]
    sentence = next(words.prose(generator("key")))
    assert sentence + " " not in haystack("prose", generator("key"), [sentence[:12].upper()], None).first(500)


def test_needles_are_on_lines_of_their_own_in_noise():
    hay = haystack("noise", generator("key"), [], None)
    text, spans = hay.with_needles(7, 0, ["First.", "Second.", "Third."], [0, 2, 7])
    assert text.split("\n") == [
        *("First.", "Rain falls on the roof. A dog barks twice.", "Second."),
        *("The kettle is warm. We wait a while. Nothing else happens.", "Rain falls on the roof. A dog barks twice."),
        "Third.",
    ]
    assert [text[a:b].strip() for a, b in spans] == ["First.", "Second.", "Third."]


def test_short_sentences_come_before_the_last_needle():
    hay = Haystack(iter(["One. ", "Two. "]), " ", ["Short."])
    assert hay.with_needles(2, 1, ["Needle."], [2])[0] == "One. Two. Short. Needle."
    assert hay.with_needles(2, 1, ["Needle."], [1])[0] == "One. Needle. Two. Short."


def test_the_nearest_boundary():
    cumulative = np.array([0, 10, 30, 40, 100])
    assert boundaries(cumulative, [0.0], 0) == [0]
    assert boundaries(cumulative, [1.0], 0) == [4]
    assert [boundaries(cumulative, [x], 0)[0] for x in (0.04, 0.06, 0.19, 0.21, 0.36, 0.69, 0.71)] == [
        *(0, 1, 1, 2, 3, 3, 4)
    ]
    assert boundaries(np.zeros(1, int), [0.5, 0.5], 0) == [0, 0]


def test_no_two_needles_share_a_boundary():
    rng = np.random.default_rng(0)
    for _ in range(300):
        n, others = int(rng.integers(8, 40)), int(rng.integers(0, 7))
        cumulative = np.cumsum([0, *rng.integers(1, 30, n)])
        depth = float(rng.choice([0, 10, 50, 90, 100]))
        fractions, which, first = spread(depth, others, rng)
        at = boundaries(cumulative, fractions, first)
        nearest = np.abs(cumulative - depth / 100 * cumulative[-1])
        assert nearest[at[first]] == nearest.min()
        assert at == sorted(at) and min(at) >= 0 and max(at) <= n
        assert sorted(which) == list(range(others + 1)) and which[first] == 0
        if depth in (0, 100) or n >= 20:
            assert len(set(at)) == len(at)


def test_the_search_is_exact_and_short(tokenizers, monkeypatch):
    calls = []
    monkeypatch.setattr(module, "encode", lambda *a: calls.append(a[1]) or encode(*a))
    for budget in (200, 1000, 3000):
        for guess in (1, 40, 10_000):
            calls.clear()
            units = [s + " " for s in _prose(600)]

            def build(n, units=units):
                return Prompt("Head.\n", "".join(units[:n]), "\nTail.\n", "Lead")

            n, prompt, encoded = largest_fitting(build, tokenizers["bpe"], budget, guess, most=600)
            assert len(encoded.ids) <= budget < len(encode(tokenizers["bpe"], build(n + 1).text).ids)
            assert prompt == build(n) and len(calls) <= 8


@pytest.mark.parametrize("name", ["needle_s1", "needle_s2", "needle_mk2", "needle_mk3", "needle_mq"])
def test_a_prompt_takes_few_tokenisations(name, tokenizers, monkeypatch):
    long = []
    monkeypatch.setattr(module, "encode", lambda *a: long.append(len(a[1])) or encode(*a))
    made = document(task(name), tokenizers["bpe"], 4096, 50.0, 0)
    assert sum(size > len(made["input"]) / 2 for size in long) <= 6


def _prose(count):
    prose = words.prose(generator("search"))
    return [next(prose) for _ in range(count)]


def test_special_tokens_are_counted_and_none_ends_a_prompt(tokenizers):
    bpe = tokenizers["bpe"]
    assert bpe("some text")["input_ids"][-1] == bpe.eos_token_id
    encoded = encode(bpe, "some text")
    assert encoded.ids[0] == bpe.bos_token_id and encoded.ids[-1] != bpe.eos_token_id
    assert encoded.before(0) == 1 and encoded.before(9) == len(encoded.ids)


FILE = "".join(f"{s}{' ' if i % 7 else chr(10) * 2}" for i, s in enumerate(_prose(400)))


def test_a_file_is_read_from_a_random_sentence_on(tokenizers, tmp_path):
    path = tmp_path / "held_out.txt"
    path.write_text(FILE)
    spec = TaskSpec("mine", haystack="file", file=path)
    starts = set()
    for index in range(3):
        made = document(spec, tokenizers["bpe"], 1024, 50.0, index)
        assert made["fill"] >= 0.96 and abs(made["depth_actual"] - 50) < 2
        context = made["input"].split("\n", 1)[1].split("\nQuestion")[0]
        before, after = context.split(needle("number", *needle_pairs(made["input"])[0]))
        assert before.strip() in FILE or after.strip() in FILE
        starts.add(context[:30])
    assert len(starts) == 3


def test_a_file_that_does_not_do(tokenizers, tmp_path):
    path = tmp_path / "held_out.txt"
    spec = TaskSpec("mine", haystack="file", file=path)

    def error():
        module._sentences.cache_clear()
        with pytest.raises(ValueError) as caught:
            document(spec, tokenizers["bpe"], 2048, 50.0, 0)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "cannot be read as UTF-8 text" in error()
    path.write_text(" \n")
    assert "is empty; use a text with sentences" in error()
    path.write_text(FILE[:1500])
    assert "use a longer one, or a length of at most" in error()
    path.write_text(FILE)
    module._sentences.cache_clear()
    value = document(spec, tokenizers["bpe"], 2048, 50.0, 0)["outputs"][0]
    path.write_text(f"{FILE} It was {value}.")
    assert f"contains '{value}', which is asked for; use another text or another seed" in error()
    with pytest.raises(ValueError, match="mine needs a text: give the path as the task's file"):
        document(TaskSpec("mine", haystack="file"), tokenizers["bpe"], 2048, 50.0, 0)


def test_a_text_of_exactly_the_size_is_long_enough(tokenizers, tmp_path):
    path = tmp_path / "held_out.txt"
    path.write_text(FILE[:3000])
    spec = TaskSpec("mine", haystack="file", file=path)
    with pytest.raises(ValueError) as caught:
        document(spec, tokenizers["bpe"], 4096, 50.0, 0)
    most = int(str(caught.value).rsplit(" ", 1)[1].replace(",", ""))
    assert document(spec, tokenizers["bpe"], most, 50.0, 0)["fill"] >= 0.95


def test_questions(tokenizers, questions, tmp_path):
    made = document(task("needle_qa", file=questions), tokenizers["bpe"], 1024, 0.0, 0)
    lines = made["input"].split("\n")
    assert made["outputs"][0] in lines[1] and made["metric"] == "part"
    assert sum(answer in made["input"] for answer in made["outputs"][:1]) == 1
    assert made["input"].count(made["outputs"][0]) == 1 and made["gen_prefix"] == "Answer:"
    with pytest.raises(ValueError, match="needle_qa needs JSON lines of questions: give the path as the task's file"):
        document(task("needle_qa"), tokenizers["bpe"], 1024, 0.0, 0)
    with pytest.raises(ValueError, match="use a longer one"):
        document(task("needle_qa", file=questions), tokenizers["bpe"], 65536, 0.0, 0)
    bad = tmp_path / "bad.jsonl"
    for text, message in (
        ('{"question": "a"}', "line 1: needs a JSON object with question, answers, gold, others"),
        ('\n{"question": "a", "answers": 3, "gold": "b", "others": []}', "line 2: answers must be a text or a list"),
        ('{"question": "a", "answers": [], "gold": "b", "others": []}', "answers and gold need at least one text"),
        ("", "are empty; use JSON lines with question"),
    ):
        bad.write_text(text)
        read_questions.cache_clear()
        with pytest.raises(ValueError, match=message):
            document(task("needle_qa", file=bad), tokenizers["bpe"], 1024, 0.0, 0)
