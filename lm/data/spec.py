"""What a recipe says about its tokenizer and its data."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

KINDS = ("python", "text", "jsonl", "parquet", "hub")


class Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TokenizerSpec(Spec):
    """Where the tokenizer is, and how to train it where there is none.

    path: a folder, or a name on the hub
    vocab_size: entries including special tokens and bytes; given, a tokenizer is trained where `path` does not exist;
        absent, `path` must be a folder that exists or a hub name
    model: the sentencepiece algorithm, for training
    """

    path: str
    vocab_size: int | None = Field(default=None, ge=264, le=1_000_000)
    model: Literal["bpe", "unigram"] = "bpe"


class Source(Spec):
    """Where documents come from: exactly one of `python`, `text`, `jsonl`, `parquet`, `hub`.

    python: `stdlib` (the source of the running interpreter's standard library), or the name of an installed package
    text: glob of UTF-8 files; one file is one document
    jsonl, parquet: glob of files; one record is one document, its text in `field`
    hub: name of a data set on the hub, streamed, with `subset` and `split`
    prompt: of records: the field with the question to which `field` is the answer; the answers alone are learned, and
        rows hold whole demonstrations (`lm/data/demonstrations.py`)
    chat: question and answer become a conversation in the tokenizer's chat template; without `prompt`, `field` holds a
        list of messages, of which the assistant's are learned
    limit_documents: take the first so many, or all
    weight: share of the training rows relative to the other sources; absent, sources mix by their size
    """

    python: str | None = None
    text: str | None = None
    jsonl: str | None = None
    parquet: str | None = None
    hub: str | None = None
    field: str = "text"
    prompt: str | None = None
    chat: bool = False
    subset: str | None = None
    split: str = "train"
    limit_documents: int | None = Field(default=None, ge=1)
    weight: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _one_kind(self) -> "Source":
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"a source needs exactly one of {', '.join(KINDS)}; this one has {found}")
        records = ("jsonl", "parquet", "hub")
        uses = {"field": records, "prompt": records, "chat": records, "subset": ("hub",), "split": ("hub",)}
        for option, kinds in uses.items():
            if option in self.model_fields_set and given[0] not in kinds:
                raise ValueError(f"{option} means nothing for a {given[0]} source; it belongs to {', '.join(kinds)}")
        return self

    @property
    def is_demonstrations(self) -> bool:
        return self.prompt is not None or self.chat

    @property
    def kind(self) -> str:
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def location(self) -> str:
        return getattr(self, self.kind)

    def __str__(self) -> str:
        return f"{self.kind} {self.location}"


class TaskSpec(Spec):
    """A synthetic task (`lm/data/tasks.py`), whose rows are made when they are needed.

    vocab_size: tokens. items: pairs to recall, tokens to copy selectively, needles, objects to swap. noise: random
    tokens between the queries of `recall` (else zeros). power: of the law that the distances of its queries follow
    """

    name: Literal["recall", "copy", "selective", "permutations", "swaps", "regression", "needle"]
    vocab_size: int = Field(default=256, ge=3, le=1_000_000)
    items: int = Field(default=8, ge=1)
    noise: bool = False
    power: float = Field(default=0.01, gt=0)


class DataSpec(Spec):
    """A corpus: where it is prepared, what it is made from, and the share of documents held out. Or a task.

    path: the prepared folder; with weights on several sources it holds one corpus per source
    validation: share of documents, chosen by the hash of their content
    """

    path: str | None = None
    sources: tuple[Source, ...] = ()
    validation: float = Field(default=0.02, ge=0, lt=1)
    task: TaskSpec | None = None

    @model_validator(mode="after")
    def _corpus_or_task(self) -> "DataSpec":
        if self.task is not None and (self.path is not None or self.sources):
            raise ValueError("data.task is made, not read; leave data.path and data.sources out")
        if self.task is None and (self.path is None or not self.sources):
            raise ValueError("data needs a path and at least one source, or a task")
        return self

    @model_validator(mode="after")
    def _all_or_no_weights(self) -> "DataSpec":
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            raise ValueError("some sources have a weight and some do not; give a weight to each, or to none")
        kinds = {source.is_demonstrations for source in self.sources}
        if len(kinds) > 1 and not self.is_mixture:
            raise ValueError(
                "demonstrations (a source with prompt or chat) and other texts are packed differently; give every "
                "source a weight, so that each is a corpus of its own"
            )
        return self

    @property
    def is_mixture(self) -> bool:
        """Whether every source is a corpus of its own, which the loader mixes by weight."""
        return len(self.sources) > 1 and self.sources[0].weight is not None


def validated(spec: type[Spec], /, **values) -> Spec:
    """A spec of these values; ValueError in one line where they are not valid."""
    try:
        return spec(**values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}: {first['msg']}" if where else first["msg"]) from None
