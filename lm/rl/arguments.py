"""trl's arguments from a recipe: one place that knows both vocabularies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from farspan.lm.rl.spec import RLRecipe, RLShares


def trl_arguments(recipe: RLRecipe, shares: RLShares, scratch: Path) -> Any:
    """A GRPOConfig. `scratch`: the folder that trl believes to write into; checkpoints and logs are farspan's."""
    from trl import GRPOConfig

    cuda = torch.cuda.is_available()
    optimizer, update = recipe.optimizer, recipe.update
    precision = recipe.parallel.precision
    bf16 = precision == "bf16" or (precision == "auto" and cuda)
    return GRPOConfig(
        output_dir=str(scratch),
        per_device_train_batch_size=shares.micro_rows,
        gradient_accumulation_steps=shares.accumulation,
        generation_batch_size=shares.rows,
        num_generations=recipe.rollout.group,
        num_iterations=update.passes,
        max_completion_length=recipe.rollout.tokens,
        temperature=recipe.rollout.temperature,
        epsilon=update.epsilon,
        epsilon_high=update.epsilon_high,
        beta=update.kl,
        loss_type=update.loss,
        scale_rewards=update.scale,
        mask_truncated_completions=update.mask_truncated,
        learning_rate=optimizer.lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        adam_epsilon=optimizer.eps,
        max_grad_norm=optimizer.clip,
        max_steps=recipe.train.steps * recipe.updates_per_step,
        seed=recipe.seed,
        bf16=bf16,
        use_cpu=not cuda,
        gradient_checkpointing=recipe.parallel.checkpointing,
        logging_strategy="no",  # the callback of lm/rl/loop.py asks for logs, checkpoints and validation
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=cuda,
        ddp_find_unused_parameters=False,  # a decoder uses all of them; looking costs a walk through the graph per step
        deepspeed=_deepspeed(recipe, shares, bf16) if recipe.parallel.zero else None,
    )


def _deepspeed(recipe: RLRecipe, shares: RLShares, bf16: bool) -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    return {
        "train_micro_batch_size_per_gpu": shares.micro_rows,
        "gradient_accumulation_steps": shares.accumulation,
        "gradient_clipping": recipe.optimizer.clip,
        "bf16": {"enabled": bf16},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": recipe.parallel.zero,
            "overlap_comm": cuda,
            "reduce_bucket_size": int(2e8) if cuda else int(1e7),
            "allgather_bucket_size": int(2e8) if cuda else int(1e7),
            "stage3_gather_16bit_weights_on_model_save": True,
        },
    }


def lora_configuration(recipe: RLRecipe) -> Any:
    """peft's configuration, or None. ValueError where peft is not installed."""
    if recipe.lora is None:
        return None
    try:
        from peft import LoraConfig
    except ImportError:
        raise ValueError("lora needs the package peft; install it with: pip install peft") from None
    lora = recipe.lora
    targets = "all-linear" if lora.targets is None else list(lora.targets)
    return LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, task_type="CAUSAL_LM"
    )
