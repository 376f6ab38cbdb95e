"""Which parameter is updated how: the groups handed to DeepSpeed, and its optimizer section."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from farspan.lm.recipe import OptimizerSpec


@dataclass(frozen=True)
class Roles:
    """The trainable parameters by role, each once, in the model's order."""

    matrices: list[nn.Parameter]
    embeddings: list[nn.Parameter]  # of the input and the output
    vectors: list[nn.Parameter]  # norms, biases, gates: everything of one dimension


def roles(model: nn.Module) -> Roles:
    """Sorts the trainable parameters of `model` (a transformers model) into matrices, embeddings and vectors."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()
    if head is not None:
        tables.add(id(head.weight))
    found = Roles([], [], [])
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in tables:
            found.embeddings.append(parameter)
        elif parameter.ndim < 2:
            found.vectors.append(parameter)
        else:
            found.matrices.append(parameter)
    return found


def parameter_groups(model: nn.Module, spec: OptimizerSpec) -> list[dict[str, Any]]:
    """Parameter groups with their own `lr` and `weight_decay`; empty ones are left out.

    Norms, biases and gates are never decayed, embeddings only with `decay_embeddings`. With Muon the matrices are its
    own and the rest is AdamW's. DeepSpeed itself decides by name and shape which parameters Muon takes;
    `assert_muon_split` holds that both agree.
    """
    found = roles(model)
    rest_lr = spec.lr if spec.name == "adamw" else (spec.adam_lr or spec.lr / 4)
    groups = [
        {"name": "matrices", "params": found.matrices, "lr": spec.lr, "weight_decay": spec.weight_decay},
        {
            "name": "embeddings",
            "params": found.embeddings,
            "lr": rest_lr,
            "weight_decay": spec.weight_decay if spec.decay_embeddings else 0.0,
        },
        {"name": "vectors", "params": found.vectors, "lr": rest_lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def deepspeed_section(spec: OptimizerSpec) -> dict[str, Any]:
    """The `optimizer` section of DeepSpeed's configuration. torch's own Adam: DeepSpeed's needs a CUDA toolkit to
    build.
    """
    adam = {
        "lr": spec.lr,
        "betas": list(spec.betas),
        "eps": spec.eps,
        "weight_decay": spec.weight_decay,
        "torch_adam": True,
    }
    if spec.name == "adamw":
        return {"type": "AdamW", "params": adam}
    return {"type": "Muon", "params": {**adam, "momentum": 0.95 if spec.momentum is None else spec.momentum}}


def clip_norm(spec: OptimizerSpec) -> float:
    """The gradient norm that DeepSpeed clips at; 0 for never. Muon's update has the same size for any gradient."""
    if spec.name == "muon":
        return 0.0
    return 1.0 if spec.clip is None else spec.clip


def assert_muon_split(found: Roles) -> None:
    """After `deepspeed.initialize` with Muon: it tagged exactly our matrices for Muon, else rates and decays would be
    mixed up.
    """
    wrong = [p for p in found.matrices if not p.use_muon] + [p for p in found.embeddings + found.vectors if p.use_muon]
    assert not wrong, f"DeepSpeed's Muon and lm/train/optimizer.py disagree about {len(wrong)} parameters"
