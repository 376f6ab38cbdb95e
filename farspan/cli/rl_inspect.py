"""`farspan rl inspect`: a response, its tokens coloured by what attention says of them."""

from pathlib import Path
from typing import Annotated

import typer

from farspan.cli.generate import Model, Seed, TopP


def inspect(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="What the model answers.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Values of a recipe's credit section: `strategy=anchor waad_window=4`.")
    ] = None,
    response: Annotated[
        str | None, typer.Option(help="Look at this response instead of one that the model writes.", show_default=False)
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Most tokens to write.")] = 200,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy; higher is more varied.")] = 1.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    html: Annotated[Path | None, typer.Option("--html", "-o", help="Also write a page for a browser here.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a turn of a conversation.")] = False,
) -> None:
    """Write a response, and colour its tokens by WAAD, FAI and credit.

    Example: `farspan rl inspect runs/arithmetic "7 * (3 + 5) =" strategy=anchor --html rhythm.html`
    """
    import torch

    from farspan.cli.generate import sampling
    from farspan.lm.console import console
    from farspan.lm.data.tokenizer import encode_prompt
    from farspan.lm.load import load
    from farspan.lm.rl.inspect import inspect as look
    from farspan.lm.rl.inspect_views import page, terminal
    from farspan.lm.rl.statistics import sampled_layers

    credit = credit_of(overrides or [])
    policy, tokenizer = load(model)
    sampled_layers(policy, credit.layers)  # a model without attention statistics is refused before it writes anything
    if chat:
        turn = [{"role": "user", "content": prompt}]
        prompt_ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    else:
        prompt_ids = encode_prompt(tokenizer, prompt)["input_ids"][0].tolist()
    if not prompt_ids:
        raise ValueError("the prompt has no tokens; give at least one character to start from")
    if response is not None:
        response_ids = tokenizer(response, add_special_tokens=False)["input_ids"]
    else:
        if seed is not None:
            torch.manual_seed(seed)
        given = torch.tensor([prompt_ids], device=policy.device)
        options = {"max_new_tokens": tokens, **sampling(temperature, top_p)}
        output = policy.generate(input_ids=given, attention_mask=torch.ones_like(given), **options)
        response_ids = output[0, len(prompt_ids) :].tolist()
    inspection = look(policy, tokenizer, prompt_ids, response_ids, credit)
    console.print(terminal(inspection), highlight=False)
    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        aside = html.with_name(f".{html.name}.new")
        aside.write_text(page(inspection, f"{model}: {credit.strategy}"), encoding="utf-8")
        aside.replace(html)
        console.print(f"\n{html}: open it in a browser", markup=False, highlight=False)


def credit_of(overrides: list[str]):
    """The credit section of a recipe from KEY=VALUE, the rest at its defaults. Raises ValueError in one line."""
    import yaml
    from pydantic import ValidationError

    from farspan.layers.mixer import nearest
    from farspan.lm.recipe_file import one_line
    from farspan.lm.rl.spec import CreditSpec

    values = {}
    for override in overrides:
        key, equals, text = override.removeprefix("credit.").partition("=")
        if not equals or key not in CreditSpec.model_fields:
            raise ValueError(
                f"{override!r} is no KEY=VALUE of a credit section; {nearest(key, CreditSpec.model_fields)}"
            )
        try:
            values[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ValueError(f"{override!r}: the value is not YAML") from None
    try:
        return CreditSpec.model_validate(values)
    except ValidationError as error:
        raise ValueError(one_line(error)) from None
