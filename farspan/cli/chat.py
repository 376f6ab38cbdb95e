"""`farspan chat`: a conversation that keeps the model's state between turns."""

from typing import Any

import typer

from farspan.cli.generate import Model, Seed, Temperature, TopP, sampling
from farspan.lm.console import console

_STOP = "\nUser:"


def chat(
    model: Model,
    tokens: int = typer.Option(512, min=1, help="Most tokens of an answer."),
    temperature: Temperature = 0.8,
    top_p: TopP = 0.95,
    seed: Seed = None,
) -> None:
    """Talk to a model. `/reset` forgets the conversation, `/exit` or Ctrl-D leaves.

    Example: `farspan chat runs/quickstart`
    """
    import torch

    from farspan.lm.load import load

    decoder, tokenizer = load(model)
    if seed is not None:
        torch.manual_seed(seed)
    if tokenizer.chat_template is None:
        console.print("This tokenizer has no chat template: the conversation is plain text with User: and Assistant:")
    console.print("/reset forgets the conversation, /exit leaves", style="dim")
    conversation = Conversation(decoder, tokenizer)
    while True:
        try:
            text = console.input("[bold]you>[/bold] ").strip()
        except EOFError:
            return
        if text == "/exit":
            return
        if text == "/reset":
            conversation = Conversation(decoder, tokenizer)
        elif text.startswith("/"):
            console.print(f"{text.split()[0]} is not a command; there are /reset and /exit", markup=False)
        elif text:
            conversation.answer(text, max_new_tokens=tokens, **sampling(temperature, top_p))


class Conversation:
    """The turns so far, and the model's state after them, so that a turn costs only its own tokens."""

    def __init__(self, model: Any, tokenizer: Any):
        self._model, self._tokenizer = model, tokenizer
        self._messages: list[dict[str, str]] = []
        self._ids: list[int] = []  # all tokens so far; `_cache` has seen all but the last
        self._cache: Any = None

    def answer(self, text: str, **options: Any) -> str:
        """Prints the answer as it comes, and returns it. `options` go to transformers' `generate`."""
        import torch
        from transformers import StoppingCriteriaList, StopStringCriteria, TextStreamer

        self._messages.append({"role": "user", "content": text})
        ids = self._prompt(text)
        if self._ids != ids[: len(self._ids)]:  # a template may rewrite earlier turns; a state cannot be rewound
            self._cache = None
        if self._tokenizer.chat_template is None:
            options["stopping_criteria"] = StoppingCriteriaList([StopStringCriteria(self._tokenizer, [_STOP])])
        input_ids = torch.tensor([ids], device=self._model.device)
        output = self._model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            past_key_values=self._cache,
            streamer=TextStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True),
            return_dict_in_generate=True,
            **options,
        )
        self._ids, self._cache = output.sequences[0].tolist(), output.past_key_values
        reply = self._tokenizer.decode(self._ids[len(ids) :], skip_special_tokens=True).removesuffix(_STOP).strip()
        self._messages.append({"role": "assistant", "content": reply})
        return reply

    def _prompt(self, text: str) -> list[int]:
        """The tokens of the conversation up to where the answer starts."""
        if self._tokenizer.chat_template is not None:
            return self._tokenizer.apply_chat_template(
                self._messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        written = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        lead = "" if not self._ids or written.endswith(_STOP) else "\n"
        user = "" if written.endswith(_STOP) else "User:"
        turn = self._tokenizer(
            f"{lead}{user} {text}\nAssistant:", add_special_tokens=not self._ids, split_special_tokens=True
        )
        return self._ids + turn["input_ids"]
