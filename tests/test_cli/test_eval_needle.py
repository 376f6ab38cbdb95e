"""`farspan eval needle`: files and table, plans, exit statuses, and what cannot be asked in one line."""

import pytest
import torch

from farspan import DecoderConfig, DecoderForCausalLM


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An exported model of token ids, without a tokenizer."""
    torch.manual_seed(0)
    config = DecoderConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    path = tmp_path_factory.mktemp("model") / "ids"
    DecoderForCausalLM(config).save_pretrained(path)
    return path


def test_a_model_of_ids_gets_its_heat_map(farspan, folder, tmp_path):
    options = ("--lengths", "64,128", "--depths", "0,50,100", "--samples", 2, "--protocol", "gen,mc")
    status, out, err = farspan("eval", "needle", folder, *options, "--output", tmp_path)
    assert status == 0, err
    assert "needle_tok gen" in out and "needle_tok_mc mc" in out
    written = {path.name for path in (tmp_path / "needle-ids").iterdir()}
    assert {"cells.csv", "samples.jsonl", "summary.json", "heatmap_needle_tok.png", "heatmap_needle_tok.svg"} <= written


def test_a_length_that_is_too_short_is_told_by_the_exit_status(farspan, folder, tmp_path):
    options = ("--lengths", "4,64", "--depths", "50", "--samples", 1)
    status, out, _ = farspan("eval", "needle", folder, *options, "--output", tmp_path)
    assert status == 3 and "needle_tok" in out


def test_a_plan_needs_no_model(farspan):
    status, out, err = farspan("eval", "needle", "nothing", "--dry-run", "--lengths", "1k,2k", "--depths", "0:100:50")
    assert status == 0, err
    assert "needle_s1" in out and "1,024, 2,048" in out and "46,080" in out  # 3,072 x 3 depths x 5 samples


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tasks", "neddle_s1"), "the nearest names are needle_s1"),
        (("--lengths", "4q"), "is no length"),
        (("--depths", "a:b"), "are not percents"),
        (("--depths", "50,120"), "not between 0 and 100"),
        (("--protocol", "greedy"), "--protocol greedy is not one of gen, tf, mc"),
        (("--tasks", "needle_mq", "--protocol", "mc"), "has no multiple choice"),
        (("--tasks", "needle_s1"), "has no tokenizer, so it can only take needle_tok"),
        (("--tasks", "needle_qa"), "no tokenizer"),
    ],
)
def test_what_cannot_be_asked_is_one_line(farspan, folder, tmp_path, options, message):
    status, _, err = farspan("eval", "needle", folder, *options, "--output", tmp_path)
    assert status == 2 and message in err and len(err.strip().splitlines()) == 1


def test_no_model_is_one_line(farspan):
    status, _, err = farspan("eval", "needle", "runs/none")
    assert status == 2 and "there is no folder runs/none" in err
