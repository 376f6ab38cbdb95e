"""`farspan generate`: text from a model, as it comes."""

import time
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="Run folder, checkpoint folder, exported folder, or name on the hub.")]
Temperature = Annotated[float, typer.Option(min=0, help="0 is greedy; higher is more varied.")]
TopP = Annotated[float, typer.Option("--top-p", min=0, max=1, help="Sample from the likeliest so much.")]
Seed = Annotated[int | None, typer.Option(help="Repeatable sampling.")]


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens to write.")] = 200,
    temperature: Temperature = 0.8,
    top_p: TopP = 0.95,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the likeliest token.")] = False,
    beams: Annotated[int, typer.Option(min=1, help="Beam search of this width, without sampling.")] = 1,
    seed: Seed = None,
) -> None:
    """Continue a prompt.

    Example: `farspan generate runs/quickstart "def " --tokens 100`
    """
    import torch
    from transformers import TextStreamer

    from farspan.lm.data.tokenizer import encode_prompt
    from farspan.lm.load import load

    if greedy and beams > 1:
        raise ValueError(f"--greedy and --beams {beams} exclude each other; leave one out")
    decoder, tokenizer = load(model)
    inputs = encode_prompt(tokenizer, prompt).to(decoder.device)
    if inputs["input_ids"].shape[1] == 0:
        raise ValueError("the prompt has no tokens; give at least one character to start from")
    if seed is not None:
        torch.manual_seed(seed)
    streamer = TextStreamer(tokenizer, skip_special_tokens=True) if beams == 1 else None
    start = time.perf_counter()
    output = decoder.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=tokens,
        num_beams=beams,
        streamer=streamer,
        **sampling(0.0 if greedy or beams > 1 else temperature, top_p),
    )
    seconds = time.perf_counter() - start
    if streamer is None:
        typer.echo(tokenizer.decode(output[0], skip_special_tokens=True))
    count = output.shape[1] - inputs["input_ids"].shape[1]
    typer.secho(f"{count} tokens, {count / seconds:.3g} tokens/s", err=True, dim=True)


def sampling(temperature: float, top_p: float) -> dict:
    """The options of transformers' `generate` for a temperature; 0 is greedy."""
    if temperature == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
