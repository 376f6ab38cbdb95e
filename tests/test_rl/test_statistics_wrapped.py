"""Statistics of a policy that something else has wrapped: DDP, DeepSpeed's ZeRO stages, torch.compile, LoRA."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from farspan.lm.config import DecoderConfig
from farspan.lm.decoder import DecoderForCausalLM
from farspan.lm.rl.statistics import attention_statistics, collect
from farspan.parallel.pool import Pool

SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}


def make(kind):
    torch.manual_seed(0)
    if kind == "llama":
        return AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, initializer_range=0.4)).eval()
    pattern = ["softmax", {"mixer": "rat", "chunk": 8}]
    return DecoderForCausalLM(DecoderConfig(**SIZES, mixer_pattern=pattern, initializer_range=0.4)).eval()


def batch(rank=0):
    """Ids, attention mask and response mask; ranks have rows of other lengths."""
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(0, 50, (2, 40 + 7 * rank), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, : 5 + rank] = 0
    response = mask.clone()
    response[:, :14] = 0
    return ids, mask, response


def same(found, expected):
    """The largest difference, or inf where heads differ."""
    if not torch.equal(found.local_heads, expected.local_heads):
        return float("inf")
    pairs = [(getattr(found, name), getattr(expected, name)) for name in ("waad", "fai", "head_distance")]
    return max((one - other).abs().max().item() for one, other in pairs)


def both_ways(model, rank):
    """Differences from the bare model: of a pass of its own, and of one that is collected and trained with."""
    ids, mask, response = batch(rank)
    results = []
    for kind, wrapped, backward in model:
        expected = attention_statistics(make(kind), ids, mask, response)
        results.append(same(attention_statistics(wrapped, ids, mask, response), expected))
        with collect(wrapped, mask, response) as collector:
            loss = wrapped(input_ids=ids, attention_mask=mask, use_cache=False).logits.sum()
        results.append(same(collector.statistics(), expected))
        backward(loss)
    return results


def in_a_job():
    """By wrapper: the differences, and how many parameters a rank has."""
    import deepspeed
    from torch.nn.parallel import DistributedDataParallel

    from farspan.lm.train.engine import init_distributed

    torch.distributed.destroy_process_group()  # the pool's own
    init_distributed(torch.device("cpu"), 60.0)
    rank, found = torch.distributed.get_rank(), {}
    for stage in (2, 3):
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
        configuration = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero}
        configuration["zero_force_ds_cpu_optimizer"] = False
        models = []
        for kind in ("llama", "decoder"):
            model = make(kind)
            optimizer = torch.optim.AdamW(model.parameters())
            engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=configuration)
            engine.eval()
            models.append((kind, engine, engine.backward))
        own = sum(p.numel() for p in models[0][1].module.parameters())
        found[f"zero {stage}"] = both_ways(models, rank), own
    models = [(kind, DistributedDataParallel(make(kind)), torch.Tensor.backward) for kind in ("llama", "decoder")]
    found["ddp"] = both_ways(models, rank), None
    return found


def test_ddp_and_deepspeed():
    """In one job of its own: DeepSpeed makes its own process group."""
    pool = Pool(2)
    try:
        for found in pool.run(in_a_job):
            for wrapper, (differences, own) in found.items():
                assert len(differences) == 4 and max(differences) < 2e-5, wrapper
                assert own is None or (own == 0) == (wrapper == "zero 3")  # really shared out
    finally:
        pool.close()


def test_torch_compile():
    ids, mask, response = batch()
    for kind in ("llama", "decoder"):
        model = make(kind)
        expected = attention_statistics(model, ids, mask, response)
        compiled = torch.compile(model, backend="eager")
        with torch.no_grad():
            plain = compiled(input_ids=ids, attention_mask=mask, use_cache=False).logits
        assert same(attention_statistics(compiled, ids, mask, response), expected) < 2e-5
        with torch.no_grad(), collect(compiled, mask, response) as collector:
            compiled(input_ids=ids, attention_mask=mask, use_cache=False)
        assert same(collector.statistics(), expected) < 2e-5
        with torch.no_grad():
            again = compiled(input_ids=ids, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(again, plain)


def test_lora():
    from peft import LoraConfig, get_peft_model

    ids, mask, response = batch()
    model = get_peft_model(make("llama"), LoraConfig(target_modules=["q_proj"]))
    assert (
        same(attention_statistics(model, ids, mask, response), attention_statistics(make("llama"), ids, mask, response))
        == 0
    )
