"""A measurement on disk: JSON that says where it comes from."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any


def write_json(path: Path, result: dict[str, Any]) -> None:
    """`result` with the command, commit, device and versions of this process, in one rename; makes the folder."""
    from farspan.lm.train.run import environment

    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.new")
    aside.write_text(json.dumps({"command": command, **environment(ranks=1), **result}, indent=1) + "\n")
    aside.replace(path)
