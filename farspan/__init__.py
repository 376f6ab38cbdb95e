"""farspan: train, evaluate and fine-tune long-context language models.

After importing it, `AutoModelForCausalLM.from_pretrained` of transformers loads what farspan trained. The decoder
registers itself where it is defined, and is imported when transformers' Auto classes are: `import farspan` alone costs
nothing, so that layers, kernels and `farspan --help` start without the seconds that transformers takes.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

_HOMES = {
    "DecoderConfig": "farspan.lm.config",
    "Decoder": "farspan.lm.decoder",
    "DecoderForCausalLM": "farspan.lm.decoder",
}
__all__ = ["Decoder", "DecoderConfig", "DecoderForCausalLM"]

# What transformers imports first -> what is then to be registered there.
_AFTER = {
    "transformers.models.auto.configuration_auto": "farspan.lm.config",
    "transformers.models.auto.modeling_auto": "farspan.lm.decoder",
    "transformers.modeling_utils": "farspan.lm.attention_interface",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'farspan' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


class _Follower(MetaPathFinder):
    """Imports the module of farspan that belongs to one of transformers as soon as that has run."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in _AFTER or (spec := PathFinder.find_spec(name, path)) is None:
            return None
        run = spec.loader.exec_module

        def run_and_follow(module: Any) -> None:
            run(module)
            import_module(_AFTER[name])

        spec.loader.exec_module = run_and_follow
        return spec


sys.meta_path.insert(0, _Follower())
for _before, _ours in _AFTER.items():
    if _before in sys.modules:
        import_module(_ours)
