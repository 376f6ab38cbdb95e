"""The package as a whole: import directions, start-up cost, the wheel, and living beside a package named `kernels`."""

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("kernels", "parallel", "layers", "lm", "eval", "farspan")
# What each part may import of farspan, and which third parties it must not.
MAY = {
    "kernels": {"kernels"},
    "parallel": {"parallel"},
    "layers": {"layers", "kernels", "parallel"},
    "lm": {"lm", "layers", "kernels", "parallel"},
    "eval": {"eval", "lm", "layers", "kernels", "parallel"},
}
ALLOWED = {"kernels": {"torch", "triton"}, "parallel": {"torch"}, "layers": {"torch"}}
LAZY = ("deepspeed", "lm_eval", "trl", "datasets", "matplotlib", "sentencepiece", "tensorboard", "wandb")


def sources(part):
    return sorted((ROOT / part).rglob("*.py"))


def imports(tree):
    """(module, at top level) of every import."""
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module, id(node) in top
            if node.module == "farspan":
                yield from ((f"farspan.{alias.name}", id(node) in top) for alias in node.names)


@pytest.mark.parametrize("part", PARTS)
def test_import_directions(part):
    for path in sources(part):
        for module, top in imports(ast.parse(path.read_text())):
            where = f"{path.relative_to(ROOT)} imports {module}"
            package = module.split(".")[0]
            if package == "farspan":
                inside = module.split(".")[1] if "." in module else ""
                assert part not in MAY or inside in MAY[part] or not inside, where
            elif part in ALLOWED and package not in sys.stdlib_module_names:
                assert package in ALLOWED[part], where
            assert not (top and package in LAZY), f"{where} at top level; import it where it is used"


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code], cwd="/", capture_output=True, text=True, timeout=120, check=False
    )


def test_import_is_light():
    """The design allows one second beyond transformers' PreTrainedModel; it takes a tenth of it. CPU time, which other
    work on the machine does not change.
    """
    code = (
        "import time; from transformers import PreTrainedModel; import sys; t = time.process_time()\n"
        "import farspan; farspan.DecoderForCausalLM\n"
        f"print(time.process_time() - t); print(*(m for m in {LAZY!r} if m in sys.modules))"
    )
    result = run(code)
    assert result.returncode == 0, result.stderr
    seconds, loaded = result.stdout.split("\n")[:2]
    assert loaded == ""
    assert float(seconds) < 1.0


def test_layers_and_kernels_start_without_transformers():
    code = "import sys, farspan.layers, farspan.kernels.softmax; assert 'transformers' not in sys.modules"
    result = run(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("first", ["farspan", "transformers"])
def test_auto_classes_know_the_decoder(first):
    second = {"farspan": "transformers", "transformers": "farspan"}[first]
    code = (
        f"import {first}, {second}\n"
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        "config = AutoConfig.for_model('farspan', num_hidden_layers=1, hidden_size=8, num_attention_heads=2)\n"
        "assert isinstance(AutoModelForCausalLM.from_config(config), farspan.DecoderForCausalLM)\n"
    )
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_a_foreign_kernels_package_does_no_harm(tmp_path):
    """transformers imports the distribution named `kernels` when it is installed; ours must not be in its way."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("FOREIGN = True\n")
    info = tmp_path / "kernels-0.99.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.99\n")
    (info / "RECORD").write_text("")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import kernels; assert kernels.FOREIGN\n"
        "import farspan.kernels.softmax, farspan.kernels.window\n"
        "assert sys.modules['kernels'] is kernels and farspan.kernels is not kernels\n"
        f"assert {str(ROOT)!r} not in sys.path\n"
    )
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_packages_are_listed():
    """Every folder with modules is in pyproject.toml (and nothing that is gone)."""
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = set()
    for part in PARTS:
        for path in sources(part):
            dotted = ".".join(path.parent.relative_to(ROOT).parts)
            found.add(dotted if dotted.startswith("farspan") else f"farspan.{dotted}")
    assert listed == found


def test_wheel_holds_farspan_alone(tmp_path):
    checkout = tmp_path / "checkout"  # a build leaves folders behind
    for part in PARTS:
        shutil.copytree(ROOT / part, checkout / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(checkout)]
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    roots = {name.split("/")[0] for name in names}
    assert {root for root in roots if not root.endswith(".dist-info")} == {"farspan"}
    modules = {name for name in names if name.endswith(".py")}
    for part in PARTS:
        for path in sources(part):
            inside = path.relative_to(ROOT).as_posix()
            assert (inside if part == "farspan" else f"farspan/{inside}") in modules
