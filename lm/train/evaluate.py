"""What a run looks at beside its training loss: validation loss, samples, and the bigram model it has to beat."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from farspan.lm.data.loader import Batch, Loader
from farspan.lm.data.tokenizer import encode_prompt
from farspan.lm.train.bigram import Bigram
from farspan.lm.train.engine import Engine
from farspan.lm.train.stop import Stop


def validation_loss(engine: Engine, batches: Sequence[Batch], stop: Stop) -> float | None:
    """Nats per token over `batches`, dealt out over the replicas; the same on all ranks, and for any number of them to
    rounding.

    None if the run was asked to stop meanwhile. Every rank takes the same number of forward passes, which ZeRO-3 needs:
    where the batches do not go round, the last ones are taken again and not counted.
    """
    total = torch.zeros((), dtype=torch.float64)
    for first in range(0, len(batches), engine.replicas):
        if stop.agreed():
            return None
        index = first + engine.replica
        nll = engine.evaluate(batches[min(index, len(batches) - 1)])
        if index < len(batches):
            total += nll.double().cpu()
    if engine.ranks > 1:
        dist.all_reduce(total)
    return float(total) / sum(batch.valid_tokens for batch in batches)


@torch.no_grad()
def sample(engine: Engine, tokenizer: Any, prompts: Sequence[str], new_tokens: int, seed: int) -> list[str]:
    """Each prompt with `new_tokens` sampled tokens; drawn by all ranks alike, since ZeRO-3 gathers weights in each
    pass.

    The generators of the training are left as they were.
    """
    model = engine.model
    model.eval()
    devices = [engine.device] if engine.device.type == "cuda" else []
    texts = []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for prompt in prompts:
            inputs = encode_prompt(tokenizer, prompt).to(engine.device)
            output = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                do_sample=True,
                temperature=0.8,
                top_p=0.95,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,  # ranks that ended at different lengths would wait for each other
            )
            texts.append(tokenizer.decode(output[0], skip_special_tokens=True))
    return texts


def bigram_loss(
    loader: Loader, steps: int, validation: Sequence[Batch], vocab_size: int, is_stopped: Callable[[], bool]
) -> float | None:
    """Validation loss of a bigram model fitted to the very tokens of the first `steps` steps; None if stopped
    meanwhile.
    """
    bigram = Bigram(vocab_size)
    for step in range(steps):
        if is_stopped():
            return None
        for batch in loader.batch(step):
            bigram.update(batch.input_ids.numpy(), batch.shift_labels.numpy())
    return bigram.loss((batch.input_ids.numpy(), batch.shift_labels.numpy()) for batch in validation)
