"""The adapter for lm-eval: exact scores, nothing padded, nothing cut in silence, and batches that change nothing."""

from functools import wraps
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

from farspan import DecoderConfig, DecoderForCausalLM
from farspan.eval.adapter import decoder_lm
from farspan.eval.inference import fork

PAD, EOS = 0, 1
CHARACTERS = ["Ġ", *map(chr, range(33, 127))]  # ASCII: a token each, and whatever a model writes can be read back
VOCABULARY = len(CHARACTERS) + 2
RAT, SOFTMAX = {"mixer": "rat", "chunk": 4, "groups": 2}, {"mixer": "softmax", "kv_heads": 1}
WINDOW = {"mixer": "window", "kv_heads": 1, "window": 5}
PATTERNS = {"softmax": [SOFTMAX], "rat": [RAT], "window-rat": [WINDOW, RAT], "window-softmax": [WINDOW, SOFTMAX]}
WORDS = ["the red house", "a tree", "the rad house", "a dog by it"]
CHOICES = [" is", " was her", " is blue", " x"]


def tiny(name):
    torch.manual_seed(3)
    small = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "initializer_range": 0.3}
    ends = {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD}
    heads = {"num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 512}
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(num_key_value_heads=1, **small, **ends, **heads)).eval()
    if name == "mamba":
        return MambaForCausalLM(MambaConfig(state_size=4, **small, **ends)).eval()
    if name == "recurrent_gemma":
        small["num_hidden_layers"] = 3
        config = RecurrentGemmaConfig(attention_window_size=8, num_key_value_heads=1, **small, **ends, **heads)
        return RecurrentGemmaForCausalLM(config).eval()
    if name == "qwen3_next":
        linear = {"linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 8}
        experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
        kinds = {"layer_types": ["linear_attention", "full_attention"], "linear_value_head_dim": 8, "head_dim": 8}
        more = {"num_key_value_heads": 1, "shared_expert_intermediate_size": 8}
        return Qwen3NextForCausalLM(
            Qwen3NextConfig(**linear, **experts, **kinds, **more, **small, **ends, **heads)
        ).eval()
    return DecoderForCausalLM(DecoderConfig(mixer_pattern=PATTERNS[name], **small, **ends, **heads)).eval()


OWN = sorted(PATTERNS)
EVERY = [*OWN, "llama", "mamba", "qwen3_next", "recurrent_gemma"]  # the last hides its state in itself


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def make_tokenizer():
    vocabulary = {token: index for index, token in enumerate(["<pad>", "</s>", *CHARACTERS])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="<pad>")


def ask(*arguments):
    return SimpleNamespace(args=arguments)


def forced(model, context, continuation):
    """Teacher forcing by hand, one forward pass."""
    with torch.no_grad():
        logits = model(torch.tensor([[*context, *continuation]])).logits[0, len(context) - 1 : -1].double()
    targets = torch.tensor(continuation)
    scores = logits.log_softmax(-1).gather(1, targets[:, None])
    return scores.sum().item(), torch.equal(logits.argmax(-1), targets)


def same(results, expected):
    assert [greedy for _, greedy in results] == [greedy for _, greedy in expected]
    assert [score for score, _ in results] == pytest.approx([score for score, _ in expected], abs=1e-5, rel=1e-5)


def multiple_choice():
    return [ask(context, choice) for context in WORDS for choice in CHOICES]


@pytest.mark.parametrize("name", EVERY)
def test_loglikelihoods_are_those_of_teacher_forcing(tokenizer, name):
    """Contexts that stand alone, those that share, and those that take several pieces; the greedy flag both ways."""
    model = tiny(name)
    encode = tokenizer.encode
    prompts = [encode(word) for word in WORDS]
    greedy = [
        model.generate(torch.tensor([ids]), max_new_tokens=6, min_new_tokens=6, do_sample=False) for ids in prompts
    ]
    pairs = [(ids, encode(choice)) for ids in prompts for choice in CHOICES]
    pairs += [(ids, whole[0, len(ids) :].tolist()) for ids, whole in zip(prompts, greedy, strict=True)]
    pairs += [(encode("alone"), encode(" but long")), ([EOS], encode("without a context")), (encode("x" * 23), [9])]
    expected = [forced(model, *pair) for pair in pairs]
    assert {flag for _, flag in expected} == {True, False}
    requests = [(("", ""), context, continuation) for context, continuation in pairs]
    for chunk in (8192, 3):
        adapter = decoder_lm(model, tokenizer, prefill_chunk=chunk)
        same(adapter._loglikelihood_tokens(requests, disable_tqdm=True), expected)


@pytest.mark.parametrize("name", [*OWN, "llama"])
def test_a_shared_context_runs_once(tokenizer, name):
    model = tiny(name)
    adapter = decoder_lm(model, tokenizer)
    with Spy(model) as spy:
        results = adapter.loglikelihood(multiple_choice(), disable_tqdm=True)
    apart = [
        decoder_lm(model, tokenizer).loglikelihood([request], disable_tqdm=True)[0] for request in multiple_choice()
    ]
    same(results, apart)
    contexts, choices = sum(map(len, WORDS)), len(WORDS) * sum(len(choice) - 1 for choice in CHOICES)
    assert spy.tokens == contexts + choices  # characters are tokens


@pytest.mark.parametrize("name", [*OWN, "llama"])
@torch.no_grad()
def test_a_fork_leaves_its_cache_alone(name):
    model = tiny(name)
    ids = torch.randint(2, VOCABULARY, (2, 9))
    following = torch.randint(2, VOCABULARY, (3, 6))
    cache = model(ids, use_cache=True).past_key_values
    forked = fork(cache, torch.tensor([1, 0, 1]))
    assert forked.get_seq_length() == cache.get_seq_length() == 9
    logits = model(following, past_key_values=forked).logits
    assert forked.get_seq_length() == 15 and cache.get_seq_length() == 9
    whole = model(torch.cat([ids[[1, 0, 1]], following], dim=1)).logits[:, 9:]
    torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-5)
    again = model(following[:2], past_key_values=cache).logits
    torch.testing.assert_close(again, model(torch.cat([ids, following[:2]], dim=1)).logits[:, 9:], rtol=1e-4, atol=1e-5)


class Spy:
    """Watches every call of a model: the ids that reach it, how many, and the logits that it was asked for."""

    def __init__(self, model):
        self.model, self.batches, self.logits = model, [], 0

    def __enter__(self):
        forward = self.model.forward
        self.undo = lambda: setattr(self.model, "forward", forward)

        @wraps(forward)  # whose signature says what it can do
        def watched(input_ids, **options):
            assert PAD not in input_ids and options.get("attention_mask") is None
            output = forward(input_ids=input_ids, **options)
            self.batches.append(tuple(input_ids.shape))
            self.logits = max(self.logits, output.logits.shape[0] * output.logits.shape[1])
            return output

        self.model.forward = watched
        return self

    def __exit__(self, *_):
        self.undo()

    @property
    def tokens(self):
        return sum(rows * time for rows, time in self.batches)


def generations(**options):
    return [ask(word, {"max_gen_toks": 8, **options}) for word in [*WORDS, "b tree"]]


@pytest.mark.parametrize("name", EVERY)
def test_generations_are_those_of_one_prompt_after_the_other(tokenizer, name):
    """Against transformers' own `generate`, with the stop strings applied to what it wrote."""
    model = tiny(name)
    plain = []
    for request in generations():
        ids = tokenizer(request.args[0], return_tensors="pt").input_ids
        written = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        plain.append(tokenizer.decode(written, skip_special_tokens=True))
    assert len(set(plain)) > 1
    until = [plain[0][3:5], plain[1][-1], "nowhere in it"]
    stopped = [min((text.split(stop)[0] for stop in until), key=len) for text in plain]
    assert stopped != plain and any(stopped)
    for options in ({}, {"prefill_chunk": 3}, {"batch_tokens": 1}):
        adapter = decoder_lm(model, tokenizer, **options)
        assert adapter.generate_until(generations(), disable_tqdm=True) == plain
    assert adapter.generate_until(generations(until=until), disable_tqdm=True) == stopped
    assert decoder_lm(model, tokenizer).generate_until(generations(until=until), disable_tqdm=True) == stopped


def test_a_generation_ends_at_any_end_of_text_token(tokenizer):
    model = tiny("rat")
    free = decoder_lm(model, tokenizer).generate_until(generations(), disable_tqdm=True)
    end = free[0][3]
    model.generation_config.eos_token_id = [EOS, *tokenizer.encode(end)]
    ended = decoder_lm(model, tokenizer).generate_until(generations(), disable_tqdm=True)
    assert ended == [text.split(end)[0] for text in free] and ended != free


@pytest.mark.parametrize("name", [*OWN, "llama"])
def test_no_padding_equal_lengths_and_few_logits(tokenizer, name):
    """The spy refuses pads and masks (a batch is a tensor: its rows are equal in length); budgets hold."""
    model = tiny(name)
    with Spy(model) as spy:
        adapter = decoder_lm(model, tokenizer, batch_tokens=64, prefill_chunk=8)
        adapter.generate_until(generations(), disable_tqdm=True)
        assert max(rows for rows, _ in spy.batches) > 1, "nothing was batched"
        assert max(time for _, time in spy.batches) == 8
        assert spy.logits <= 4, "prefill needs the logits of last positions alone"
        adapter.loglikelihood(multiple_choice(), disable_tqdm=True)
    assert all(rows * time <= 64 for rows, time in spy.batches)


@pytest.mark.parametrize("name", ["window-rat", "llama"])
def test_order_and_batch_size_change_nothing(tokenizer, name):
    model = tiny(name)
    choices, texts = multiple_choice(), generations(until=["q"])
    adapter = decoder_lm(model, tokenizer)
    scores, written = adapter.loglikelihood(choices, True), adapter.generate_until(texts, True)
    order = torch.randperm(len(choices)).tolist()
    for options in ({"batch_tokens": 1}, {"batch_tokens": 50, "prefill_chunk": 5}):
        adapter = decoder_lm(model, tokenizer, **options)
        same(adapter.loglikelihood([choices[i] for i in order], True), [scores[i] for i in order])
        assert adapter.generate_until(texts[::-1], True) == written[::-1]


def test_requests_with_other_options_do_not_mix(tokenizer):
    adapter = decoder_lm(tiny("rat"), tokenizer)
    requests = [ask(word, {"max_gen_toks": count}) for word in WORDS for count in (1, 5)]
    lengths = [len(tokenizer.encode(text)) for text in adapter.generate_until(requests, True)]
    assert max(lengths[::2]) <= 1 and max(lengths[1::2]) == 5


def test_sampling_follows_the_task(tokenizer):
    adapter = decoder_lm(tiny("rat"), tokenizer)

    def draw(**options):
        torch.manual_seed(5)
        return adapter.generate_until(generations(**options), True)

    greedy = draw()
    assert draw(do_sample=False, temperature=3.0) == draw(temperature=0.0) == greedy
    assert draw(do_sample=True, temperature=3.0) == draw(temperature=3.0) != greedy
    assert draw(do_sample=True, top_k=1) == draw(do_sample=True, temperature=2.0, top_p=1e-6) == greedy
    with pytest.raises(ValueError, match="generation_kwargs penalty_alpha of a task cannot be followed"):
        draw(penalty_alpha=0.6)
    with pytest.raises(ValueError, match="num_beams"):
        draw(num_beams=2)


def test_what_is_too_long_is_an_error_or_is_counted(tokenizer):
    model = tiny("rat")
    adapter = decoder_lm(model, tokenizer, max_length=20)
    fits = ask("a" * 16, " done")  # the last token is only predicted
    assert adapter.loglikelihood([fits], True) == decoder_lm(model, tokenizer).loglikelihood([fits], True)
    with pytest.raises(ValueError, match=r"takes 21 tokens, max_length is 20"):
        adapter.loglikelihood([ask("a" * 17, " done")], True)
    with pytest.raises(ValueError, match=r"max_gen_toks=12 takes 21 tokens, max_length is 20"):
        adapter.generate_until([ask("b" * 9, {"max_gen_toks": 12})], True)
    assert adapter.truncated == 0
    cutting = decoder_lm(model, tokenizer, max_length=20, allow_truncation=True)
    same(cutting.loglikelihood([ask("xyz" + "a" * 16, " done"), fits], True), adapter.loglikelihood([fits, fits], True))
    short = adapter.generate_until([ask("b" * 8, {"max_gen_toks": 12})], True)
    assert cutting.generate_until([ask("xyz" + "b" * 8, {"max_gen_toks": 12})], True) == short
    assert cutting.truncated == 2
    with pytest.raises(ValueError, match="no room for a context"):
        cutting.loglikelihood([ask("a", "b" * 40)], True)
    with pytest.raises(ValueError, match="no room for a prompt"):
        cutting.generate_until([ask("a", {"max_gen_toks": 20})], True)


@pytest.mark.parametrize("name", ["window-rat", "llama", "mamba"])
def test_rolling_is_one_forward_or_windows(tokenizer, name):
    model = tiny(name)
    text = "a text of some length, which no window of ten tokens holds"
    tokens = tokenizer.encode(text)
    (score,) = decoder_lm(model, tokenizer, prefill_chunk=16).loglikelihood_rolling([ask(text)], True)
    assert score == pytest.approx(forced(model, [EOS], tokens)[0], rel=1e-5)
    windowed = decoder_lm(model, tokenizer, max_length=10)
    scores = windowed.loglikelihood_rolling([ask(text), ask(""), ask(text[:10])], True)
    expected = forced(model, [EOS], tokens[:10])[0]
    for start in range(10, len(tokens), 10):
        following = tokens[start : start + 10]
        context = tokens[start + len(following) - 11 : start]  # the last window sees what it has room for
        expected += forced(model, context, following)[0]
    assert scores == pytest.approx([expected, 0.0, forced(model, [EOS], tokens[:10])[0]], rel=1e-5)
    assert windowed.truncated == 0


def test_empty_contexts_and_continuations(tokenizer):
    model = tiny("rat")
    adapter = decoder_lm(model, tokenizer)
    results = adapter.loglikelihood([ask("", "abc"), ask(" ", "abc"), ask("abc", "")], True)
    a, b = tokenizer.encode("abc"), tokenizer.encode(" abc")
    same(results, [forced(model, [EOS], a), forced(model, [EOS], b), (0.0, True)])


def test_special_tokens_that_the_tokenizer_adds_are_added_once(tokenizer):
    from tokenizers.processors import TemplateProcessing

    adding = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, bos_token="</s>", eos_token="<pad>")
    adding._tokenizer.post_processor = TemplateProcessing(single="</s> $A", special_tokens=[("</s>", EOS)])
    adapter = decoder_lm(tiny("rat"), adding)
    assert adapter.prefix_token_id == EOS and adapter.eot_token_id == PAD
    plain = adapter.tok_encode("ab", add_special_tokens=False)
    assert adapter.tok_encode("ab") == adapter.tok_encode("</s>ab") == [EOS, *plain]


def test_nonsense_is_refused(tokenizer):
    with pytest.raises(ValueError, match="batch_tokens=0 must be at least 1"):
        decoder_lm(tiny("rat"), tokenizer, batch_tokens=0)
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer)
    with pytest.raises(ValueError, match="no end-of-text token"):
        decoder_lm(tiny("rat"), endless)


def evaluate(replicated):
    """A multiple-choice task of seven documents, by this process or by it and its replicas."""
    import datasets
    import lm_eval
    from lm_eval.tasks import TaskManager

    docs = datasets.Dataset.from_list([{"text": "a tree " * (i % 3 + 1), "answer": i % 2} for i in range(7)])
    task = {
        "task": "trees",
        "dataset_path": "",
        "custom_dataset": lambda **_: {"test": docs},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": ["is", "was her"],
        "doc_to_target": "answer",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
    }
    group = torch.distributed.group.WORLD if replicated else None
    adapter = decoder_lm(tiny("rat"), make_tokenizer(), group=group)
    manager = TaskManager(include_defaults=False)
    results = lm_eval.simple_evaluate(adapter, tasks=[task], task_manager=manager, bootstrap_iters=0)
    if results is None:
        return None
    samples = sorted(results["samples"]["trees"], key=lambda sample: sample["doc_id"])
    return results["results"]["trees"]["acc,none"], [sample["filtered_resps"] for sample in samples]


def test_replicas_share_the_documents_out(run_distributed):
    accuracy, responses = evaluate(False)
    (first, gathered), second = run_distributed(evaluate, 2, True)
    assert second is None and first == accuracy and len(gathered) == len(responses) == 7
    for some, others in zip(gathered, responses, strict=True):
        same(some, others)
