"""Streamed and windowed likelihoods against one forward pass; lengths, bins and memory; the command."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch

from farspan.cli.lengths import parse_lengths
from farspan.eval.extrapolation import Protocol, extrapolate, position_bins, position_rows
from farspan.eval.held_out import Text, corpus_text, plain_text
from farspan.eval.memory import peak_bytes
from farspan.eval.streaming import state_bytes, stream_nll, windowed_nll
from farspan.lm.config import DecoderConfig
from farspan.lm.decoder import DecoderForCausalLM

WINDOW, RAT = {"mixer": "window", "window": 17}, {"mixer": "rat", "chunk": 8}
PATTERNS = {"softmax": ["softmax"], "window": [WINDOW], "rat": [RAT], "hybrid": [RAT, WINDOW, "softmax"]}


def decoder(pattern, vocabulary=50, trained=64):
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        num_hidden_layers=len(pattern),
        num_attention_heads=2,
        initializer_range=0.2,
        max_position_embeddings=trained,
        mixer_pattern=pattern,
        eos_token_id=1,
        pad_token_id=0,
    )
    return DecoderForCausalLM(config).eval()


def tokens(count, vocabulary=50):
    return np.random.default_rng(0).integers(0, vocabulary, count)


@torch.no_grad()
def one_forward(model, ids):
    """-log p of every token but the first, [T - 1]."""
    log_p = torch.log_softmax(model(torch.from_numpy(ids)[None]).logits[0, :-1], dim=-1)
    return -log_p.gather(1, torch.from_numpy(ids[1:])[:, None])[:, 0].numpy()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_chunks_of_any_size_give_what_one_forward_pass_gives(pattern):
    model, ids = decoder(PATTERNS[pattern]).double(), tokens(103)
    expected = one_forward(model, ids)
    for chunk in (1, 7, 8, 31, 101, 1000):
        found = stream_nll(model, ids, chunk)
        assert found.dtype == np.float64 and np.abs(found - expected).max() < 1e-10, chunk
    assert np.abs(windowed_nll(model, ids, window=102, stride=10) - expected).max() < 1e-10


def test_a_document_goes_on_where_its_cache_stands():
    model, ids = decoder(PATTERNS["hybrid"]).double(), tokens(60)
    cache, out, told = model.model.new_cache(1), np.full(59, np.nan), []
    stream_nll(model, ids[:24], 10, cache=cache, out=out[:23], progress=told.append)
    stream_nll(model, ids[23:], 10, cache=cache, out=out[23:])
    assert told == [10, 20, 23] and cache.offsets == (59,)
    assert np.abs(out - one_forward(model, ids)).max() < 1e-10


def test_logits_exist_for_a_piece_of_a_chunk_only(monkeypatch):
    monkeypatch.setattr("farspan.eval.streaming.TOKENS_AT_ONCE", 16)
    model, ids = decoder(PATTERNS["window"]), tokens(90)
    sizes, head = [], model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda x: sizes.append(len(x)) or head(x))
    found = stream_nll(model, ids, 40)
    assert sizes == [16, 16, 8, 16, 16, 8, 9] and found.dtype == np.float32
    assert np.abs(found - one_forward(model, ids)).max() < 1e-4


def test_ids_may_be_a_read_only_file(tmp_path):
    model, ids = decoder(PATTERNS["window"]), tokens(40)
    ids.astype(np.uint16).tofile(tmp_path / "ids.bin")
    mapped = np.memmap(tmp_path / "ids.bin", dtype=np.uint16, mode="r")
    assert np.array_equal(stream_nll(model, mapped, 16), stream_nll(model, ids, 16))


@pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 5), (16, 1), (7, 3)])
def test_a_window_sees_nothing_before_it_and_every_token_counts_once(window, stride):
    model, ids = decoder(PATTERNS["softmax"]).double(), tokens(43)
    found = windowed_nll(model, ids, window, stride)
    for t in range(42):
        start = max(0, -(-(t + 1 - window) // stride)) * stride  # the first window that holds token t
        assert abs(found[t] - one_forward(model, ids[start : t + 2])[-1]) < 1e-10, t


def test_what_does_not_fit_is_refused():
    model, ids = decoder(PATTERNS["window"]), tokens(10)
    for wrong, call in {
        "at least 2 tokens": lambda: stream_nll(model, ids[:1]),
        "chunk=0": lambda: stream_nll(model, ids, 0),
        "2 rows": lambda: stream_nll(model, ids, cache=model.model.new_cache(2)),
        "gives 9 values": lambda: stream_nll(model, ids, out=np.empty(10)),
        "stride=5": lambda: windowed_nll(model, ids, 4, 5),
        "Linear is not a farspan decoder": lambda: stream_nll(torch.nn.Linear(1, 1), ids),
        "mode 'x'": lambda: Protocol((4,), mode="x"),
    }.items():
        with pytest.raises(ValueError, match=wrong):
            call()


def test_memory_of_a_window_model_is_constant_and_that_of_softmax_grows():
    ids = tokens(16385)

    def peak(model, count):
        out = np.empty(count, dtype=np.float32)
        return peak_bytes(lambda: stream_nll(model, ids[: count + 1], 1024, out=out))

    window, softmax = decoder(PATTERNS["window"]), decoder(PATTERNS["softmax"])
    assert abs(peak(window, 16384) / peak(window, 4096) - 1) < 0.01
    # 3072 tokens x 16 channels x (key, value) x 4 bytes more
    assert peak(softmax, 4096) - peak(softmax, 1024) > 3072 * 16 * 2 * 4


def test_bins_of_position():
    assert position_bins(10) == [0, 10] and position_bins(16) == [0, 16]
    assert position_bins(100) == [0, 16, 23, 32, 45, 64, 91, 100]
    nll = np.arange(40, dtype=np.float32) + np.array([[0], [2]], dtype=np.float32)
    rows = position_rows(nll)
    assert [(row["first"], row["stop"]) for row in rows] == [(0, 16), (16, 23), (23, 32), (32, 40)]
    assert rows[0]["nats_per_token"] == 8.5 and rows[0]["stderr"] == pytest.approx(1.0)
    assert position_rows(nll[:1])[0]["stderr"] is None


@pytest.mark.parametrize("mode", ["carried", "window"])
def test_rows_of_lengths_are_means_over_the_beginnings_of_the_same_segments(mode):
    model, ids = decoder(PATTERNS["hybrid"], trained=32), tokens(3 * 97)
    text = Text("somewhere", "by hand", tuple(ids.reshape(3, 97)), bytes_per_token=2.0)
    done = []
    found = extrapolate(model, "m", text, Protocol((10, 40, 96), mode=mode, chunk=16), done.append)
    whole = stream_nll if mode == "carried" else lambda model, ids: windowed_nll(model, ids, 32, 16)
    nll = np.stack([whole(model, segment) for segment in text.segments])
    assert sum(done) == 3 * 96 and found["training_length"] == 32
    for row, length in zip(found["rows"], (10, 40, 96), strict=True):
        means = nll[:, :length].mean(axis=1)
        assert row["length"] == length and row["tokens"] == 3 * length and row["times_trained"] == length / 32
        assert row["nats_per_token"] == pytest.approx(means.mean(), rel=1e-5)
        assert row["stderr"] == pytest.approx(means.std(ddof=1) / 3**0.5, rel=1e-3)
        assert row["last_half_nats_per_token"] == pytest.approx(nll[:, length // 2 : length].mean(), rel=1e-5)
        assert row["bits_per_byte"] == pytest.approx(row["nats_per_token"] / np.log(2) / 2)
        assert row["peak_tensor_bytes"] > row["state_bytes"] and row["tokens_per_second"] > 0
    if mode == "carried":
        cache = model.model.new_cache(1)
        stream_nll(model, text.segments[0], 16, cache=cache)
        assert found["rows"][-1]["state_bytes"] == state_bytes(cache)
        cache = model.model.new_cache(1)
        stream_nll(model, text.segments[0][:81], 16, cache=cache)
        peak = state_bytes(cache) + peak_bytes(lambda: stream_nll(model, text.segments[0][80:], 16, cache=cache))
        assert found["rows"][-1]["peak_tensor_bytes"] == pytest.approx(peak, rel=0.01)


class Documents:
    """As much of a corpus as the choice of segments reads."""

    split, directory, bytes_per_token = "validation", "corpora/x", 3.0

    def __init__(self, *lengths):
        self.lengths = np.array(lengths)
        self.documents, self.tokens = len(lengths), np.arange(sum(lengths))

    def document(self, index):
        start = self.lengths[:index].sum()
        return self.tokens[start : start + self.lengths[index]]


def test_long_documents_are_segments_and_short_ones_are_joined():
    long = corpus_text(Documents(5, 12, 3, 11, 30), 10, 8)
    assert [segment[0] for segment in long.segments] == [5, 20, 31] and {len(s) for s in long.segments} == {11}
    assert long.rule == "beginnings of 3 of the 3 documents that are long enough"
    assert [s[0] for s in corpus_text(Documents(5, 12, 3, 11, 30), 10, 2).segments] == [5, 20]
    joined = corpus_text(Documents(5, 12, 3, 5), 10, 8)
    assert [list(s[[0, -1]]) for s in joined.segments] == [[0, 10], [11, 21]]
    assert joined.rule == "4 documents joined with their end-of-text tokens, read as one document"
    with pytest.raises(ValueError, match=r"corpora/x has 8 tokens, a segment of length 10 needs 11"):
        corpus_text(Documents(5, 3), 10, 8)
    assert plain_text(np.arange(30), 90, "file", 9, 8).bytes_per_token == 3.0


def test_lengths_as_they_are_written():
    assert parse_lengths("16K, 1k,2m,100,1k") == (100, 1024, 16384, 2 * 1024**2)


@pytest.fixture
def command(farspan):
    """`command(...)` -> (exit status, standard output, standard error) of `farspan eval extrapolation ...`."""
    return partial(farspan, "eval", "extrapolation")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with a corpus of long documents, its tokenizer, a model `runs/a/hf` and the recipe of its run."""
    from farspan.lm.data.prepare import prepare
    from farspan.lm.data.spec import DataSpec, Source, TokenizerSpec
    from farspan.lm.data.tokenizer import load_tokenizer

    folder = tmp_path_factory.mktemp("work")
    words = np.random.default_rng(0).choice(["alpha ", "beta ", "gamma\n", "delta "], (12, 300))
    for number, chosen in enumerate(words):
        (folder / f"{number}.txt").write_text("".join(chosen))
    data = {"path": str(folder / "corpora"), "validation": 0.5}
    source = {"text": str(folder / "*.txt")}
    tokenizer = {"path": str(folder / "tokenizer")}
    save_byte_tokenizer(folder / "tokenizer")
    prepare(DataSpec(**data, sources=[Source(**source)]), TokenizerSpec(**tokenizer), progress=False)
    loaded = load_tokenizer(folder / "tokenizer")
    run = folder / "runs" / "a"
    decoder(PATTERNS["hybrid"], vocabulary=len(loaded)).save_pretrained(run / "hf")
    loaded.save_pretrained(run / "hf")
    recipe = {"tokenizer": tokenizer, "data": {**data, "sources": [source]}}
    recipe |= {"batch": {"tokens": 64, "sequence_length": 64}, "train": {"steps": 1}}
    (run / "recipe.yaml").write_text(json.dumps(recipe))
    return folder


def save_byte_tokenizer(folder):
    """One token per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(["<pad>", "</s>", *alphabet])}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="<pad>").save_pretrained(folder)


def test_the_command_reads_the_corpus_of_the_run_and_writes_its_files(command, prepared, tmp_path):
    run = prepared / "runs" / "a"
    status, out, _ = command(run, "--lengths", "64,128,1k", "--segments", 2, "--output", tmp_path)
    assert status == 0 and "written to" in out and "documents that are long enough" in " ".join(out.split())
    assert {path.name for path in tmp_path.iterdir()} == {f"extrapolation.{end}" for end in ("json", "txt", "png")}
    result = json.loads((tmp_path / "extrapolation.json").read_text())
    (model,) = result["models"]
    assert [row["length"] for row in model["rows"]] == [64, 128, 1024] and model["training_length"] == 64
    assert result["protocol"]["mode"] == "carried" and model["positions"][-1]["stop"] == 1024
    assert model["rows"][0]["bits_per_byte"] > 0


def test_the_command_compares_models_on_a_file_in_windows(command, prepared, tmp_path):
    hf, text = prepared / "runs" / "a" / "hf", prepared / "0.txt"
    options = ("--text", text, "--mode", "window", "--name", "two", "--output", tmp_path)
    assert command(hf, hf, *options)[0] == 0
    result = json.loads((tmp_path / "two.json").read_text())
    first, second = result["models"]
    assert [row["length"] for row in first["rows"]] == [16, 32, 64, 128, 256, 512]
    assert first["positions"] == second["positions"] and first["text"]["rule"] == "one document"


def test_errors_are_one_line_that_says_what_to_change(command, prepared, tiny_model_alone):
    run, text = prepared / "runs" / "a", prepared / "0.txt"
    cases = {
        (run, "--lengths", "1k,x"): "--lengths 1k,x: 'x' is no length; write numbers such as 4096,16k,1m",
        (run, "--lengths", "0"): "'0' is no length",
        (run, "--lengths", "1m"): "tokens, a segment of length 1,048,576 needs 1,048,577 (one follows)",
        (run, "--text", text, "--lengths", "1m"): f"{text} has ",
        (run, "--text", text, "--corpus", text): "exclude each other",
        (run, "--mode", "x"): "mode 'x' is not one of carried, window",
        (run, "--corpus", prepared / "none"): "no prepared corpus at",
        (tiny_model_alone, "--lengths", "64"): "is no run, whose corpus is known; name text: --corpus FOLDER",
    }
    for arguments, expected in cases.items():
        status, _, err = command(*arguments)
        assert status == 2 and expected in err and err.startswith("error: ") and err.count("\n") == 1, err


@pytest.fixture
def tiny_model_alone(prepared, tmp_path):
    """The model of the run, where no recipe is near."""
    return shutil.copytree(prepared / "runs" / "a" / "hf", tmp_path / "deep" / "alone")
