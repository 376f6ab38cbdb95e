"""Lengths in tokens as options take them."""

import re

UNITS = {"": 1, "k": 1024, "m": 1024**2}


def parse_lengths(given: str) -> tuple[int, ...]:
    """`1k,4096,1m` -> (1024, 4096, 1048576), ascending, each once. ValueError that names what is no length."""
    lengths = set()
    for part in given.lower().split(","):
        match = re.fullmatch(r"([1-9]\d*)([km]?)", part.strip())
        if match is None:
            raise ValueError(f"--lengths {given}: {part.strip()!r} is no length; write numbers such as 4096,16k,1m")
        lengths.add(int(match[1]) * UNITS[match[2]])
    return tuple(sorted(lengths))
