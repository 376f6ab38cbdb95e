"""Reading recipes of any schema: YAML, what it extends, overrides, and errors of one line that say what to change."""

import difflib
import types
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

LENGTHS = ("steps", "minutes", "tokens")  # of a run, of which a recipe names one
Kind = typing.TypeVar("Kind", bound=BaseModel)


def read_recipe(schema: type[Kind], path: str | Path, overrides: typing.Sequence[str]) -> Kind:
    """A recipe by any schema, with what it extends and the overrides applied; errors as `recipe.load_recipe`."""
    path = Path(path)
    values = _read(path, ())
    for override in overrides:
        values = _merge(values, _parse_override(override))
    values.setdefault("name", path.stem)
    _check_keys(schema, values, "", schema)
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise ValueError(one_line(error)) from None


def _read(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in chain:
        raise ValueError(f"{path} extends itself, through {' -> '.join(p.name for p in chain)}; remove one `extends`")
    if not path.is_file():
        raise FileNotFoundError(f"no recipe at {path}; the shipped ones are in recipes/")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} holds a {type(values).__name__}, not a mapping of sections such as `model:` and `train:`"
        )
    parent = values.pop("extends", None)
    if parent is None:
        return values
    values.setdefault("name", path.stem)
    return _merge(_read(path.parent / str(parent), (*chain, path.resolve())), values)


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise ValueError(f"{text!r} is not an override; write key.path=value, such as optimizer.lr=0.01")
    try:
        parsed: Any = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ValueError(f"the value of {text!r} is not YAML; quote it, such as {key}='\"...\"'") from None
    for part in reversed(key.split(".")):
        parsed = {part: parsed}
    return parsed


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` onto `base`: mappings merge, everything else replaces. Naming one length of the run drops the inherited
    one.
    """
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            if key == "train" and any(value.get(name) is not None for name in LENGTHS):
                old = {name: kept for name, kept in old.items() if name not in LENGTHS}
            value = _merge(old, value)
        merged[key] = value
    return merged


def _check_keys(schema: type[BaseModel], values: dict[str, Any], path: str, whole: type[BaseModel]) -> None:
    """Unknown keys, before pydantic sees them: its own message does not know what was meant."""
    for key, value in values.items():
        if key not in schema.model_fields:
            raise ValueError(_unknown_key(schema, str(key), path, whole))
        for section in _sections_of(schema.model_fields[key].annotation):
            if isinstance(value, dict):
                _check_keys(section, value, f"{path}{key}.", whole)


def _unknown_key(schema: type[BaseModel], key: str, path: str, whole: type[BaseModel]) -> str:
    siblings = [f"{path}{name}" for name in difflib.get_close_matches(key, schema.model_fields, n=3, cutoff=0.5)]
    elsewhere = [name for name in _all_keys(whole, "") if name.split(".")[-1] == key and name not in siblings]
    nearest = siblings + elsewhere or [f"{path}{name}" for name in schema.model_fields]
    verb = "key is" if len(nearest) == 1 else "keys are"
    return f"unknown key {path}{key}; the nearest valid {verb} {', '.join(nearest)}"


def _all_keys(schema: type[BaseModel], path: str) -> list[str]:
    keys = []
    for name, field in schema.model_fields.items():
        keys.append(f"{path}{name}")
        for section in _sections_of(field.annotation):
            keys += _all_keys(section, f"{path}{name}.")
    return keys


def _sections_of(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field may hold; the members of a list are left to pydantic."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return [section for member in typing.get_args(annotation) for section in _sections_of(member)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []


def one_line(error: ValidationError) -> str:
    """The first thing that is wrong, with its key."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "value_error":  # from a validator of a section, which names the keys itself
        return str(first["ctx"]["error"])
    if first["type"] == "missing":
        return f"{where} is missing; every recipe states it"
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{where}={first['input']!r}: {message}"
