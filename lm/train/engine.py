"""DeepSpeed as the trainer uses it: one optimizer step, whole weights, checkpoint files.

The gradient that the optimizer sees is the plain sum over ranks and micro-batches, because the loss is already divided
by the valid tokens of the whole step. That holds for ranks that share a row as for ranks that have rows of their own,
so to DeepSpeed all ranks are alike, data-parallel: weights, gradients and optimizer states are shared out over all of
them. What it divides the sum by is found out at the start, by `probe_divisor`, and undone.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from farspan.lm.recipe import ParallelSpec, Recipe, Shares
from farspan.lm.train import faults
from farspan.lm.train.checkpoint import hold_errors
from farspan.lm.train.gradients import gradient_shards, is_whole, probe_divisor
from farspan.lm.train.optimizer import assert_muon_split, clip_norm, deepspeed_section, parameter_groups, roles
from farspan.lm.train.spikes import SpikeGuard
from farspan.parallel import ContextParallel, watch

_TAG = "deepspeed"  # the folder of DeepSpeed's files within a checkpoint


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, as the host reads it after the step; equal on all ranks except for `metrics`.

    loss: nats per valid token of the global batch. loss_max: the largest of the replicas' own means. grad_norm: of the
    summed gradient, before clipping. applied: False where the step was skipped. metrics: means over this rank's
    micro-batches of what the mixers report.
    """

    loss: float
    loss_max: float
    grad_norm: float
    applied: bool
    metrics: dict[str, float]


def runs_bf16(spec: ParallelSpec, device: torch.device) -> bool:
    return spec.precision == "bf16" or (spec.precision == "auto" and device.type == "cuda")


def init_distributed(device: torch.device, timeout: float) -> None:
    """Joins the process group named by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; gloo for CPU tensors on any
    device.

    timeout: seconds after which a rank that waits for another one gives up, in DeepSpeed's own group too.
    """
    import deepspeed
    from deepspeed.utils import groups

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it warns of every skipped step, in its own words
    # DeepSpeed's shared-memory all-reduce for CPU takes half a minute of g++ at first use, and spins forever when a
    # rank dies, where gloo reports it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    limit = timedelta(seconds=timeout)
    dist.init_process_group(backend, device_id=device if device.type == "cuda" else None, timeout=limit)
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False)
    # DeepSpeed reduces in a copy of the world group, for which it takes torch's default of half an hour.
    dist.distributed_c10d._set_pg_timeout(limit, groups._clone_world_group())


def leave_distributed() -> None:
    """Undoes `init_distributed`; DeepSpeed forgets its groups with it, so that a process may join again."""
    import deepspeed

    deepspeed.comm.destroy_process_group()


class Engine:
    """A model under DeepSpeed. Call every method on all ranks.

    context: how rows are shared out, None where every rank has its own. The ranks of a context get the same batches.
    """

    def __init__(
        self, model: Any, recipe: Recipe, shares: Shares, device: torch.device, context: ContextParallel | None = None
    ):
        import deepspeed

        self.device, self.context = device, context
        self.ranks, self.rank = dist.get_world_size(), dist.get_rank()
        self.replicas, self.replica = shares.replicas, self.rank // shares.context
        self._zero = recipe.parallel.zero
        self._guard = SpikeGuard(recipe.train.spike, device)
        if device.type == "cpu":
            # DeepSpeed wraps Muon's kernels in torch.compile; inductor needs half a minute for them and wins nothing
            # here.
            torch.compiler.set_stance("force_eager")
        configuration = _configuration(recipe, shares, device)
        self._divisor = probe_divisor(configuration, device)
        found = roles(model)
        model.universal_checkpoint_info = _universal_checkpoint_info()
        if recipe.parallel.checkpointing:
            model.gradient_checkpointing_enable()
        self._deepspeed, *_ = deepspeed.initialize(
            model=model,
            model_parameters=parameter_groups(model, recipe.optimizer),
            config=configuration,
            dist_init_required=False,
        )
        if recipe.optimizer.name == "muon":
            assert_muon_split(found)
        self._is_whole = is_whole(self._deepspeed.optimizer)
        self._rates = [group["lr"] for group in self._deepspeed.optimizer.param_groups]

    @property
    def model(self) -> Any:
        """The model itself; under ZeRO-3 its weights are whole only inside a forward pass."""
        return self._deepspeed.module

    def train_step(
        self, batches: Sequence[Any], valid_tokens: int, rate: float, step: int, dry: bool = False
    ) -> StepResult:
        """Forward and backward over this replica's micro-batches, then the optimizer at `rate` times its learning
        rates.

        valid_tokens: labels of the global batch that count. A step is not applied if its loss or gradient is not finite
        or a spike: the guard's verdict, 1 or NaN, multiplies the gradient, and DeepSpeed's own check for
        finite gradients drops the step with parameters, moments and Muon's momentum untouched. That check reads one
        scalar from the device in every step, whatever the trainer does; what is read here is read after it and waits
        for nothing more. `dry` drops the step in the same way, always, and leaves the statistics alone.
        """
        for group, base in zip(self._deepspeed.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = base * rate
        self._deepspeed.train()
        loss = torch.zeros((), device=self.device)
        metrics: dict[str, torch.Tensor] = {}
        for batch in batches:
            output = self._deepspeed(**self._inputs(batch), num_items_in_batch=valid_tokens, use_cache=False)
            micro = faults.poison(step, output.loss)
            loss += micro.detach()
            for name, value in output.metrics.items():
                metrics[name] = metrics.get(name, 0.0) + value / len(batches)
            with watch.during("gradient reduction"):
                self._deepspeed.backward(micro * self._divisor)
            if batch is not batches[-1]:
                self._deepspeed.step()  # only counts: DeepSpeed finds the end of the step itself
        if not dry:
            faults.reach("after_backward", step)

        own_tokens = max(1, sum(batch.valid_tokens for batch in batches))
        own_mean = loss * (valid_tokens / own_tokens)  # of a replica: its ranks' parts add up
        with watch.during("exchange of losses"):
            ranks = self._gather(torch.stack([loss, own_mean, self._norm_squared()]))
        replicas = ranks.unflatten(0, (self.replicas, -1)).sum(1)
        total, largest, norm = ranks[:, 0].sum(), replicas[:, 1].max(), ranks[:, 2].sum().sqrt()
        good = torch.full_like(total, float("nan")) if dry else self._guard.judge(total, norm)
        # All of it: at ZeRO 3 Muon moves a matrix's momentum before the check, unless its gradient is not finite.
        torch._foreach_mul_(self._gradient_shards(), good)
        with watch.during("optimizer step"):
            self._deepspeed.step()
        applied = not self._deepspeed.optimizer.overflow
        if applied:
            self.model.after_step(self._sum)
        total, largest, norm = torch.stack([total, largest, norm]).tolist()
        return StepResult(total, largest, norm, applied, {name: float(value) for name, value in metrics.items()})

    @torch.no_grad()
    def evaluate(self, batch: Any) -> torch.Tensor:
        """Sum of the negative log-likelihoods of a batch in nats, a scalar on the device, or this rank's share of it;
        the model in evaluation mode.
        """
        self._deepspeed.eval()
        return self._deepspeed(**self._inputs(batch), num_items_in_batch=1, use_cache=False).loss

    def whole_weights(self) -> dict[str, torch.Tensor]:
        """The model's weights by name, on the host of the main rank; empty elsewhere."""
        import deepspeed

        state = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            # A sharded parameter is gathered alone, so that no device ever holds the whole model.
            sharded = [tensor] if self._zero == 3 and isinstance(tensor, torch.nn.Parameter) else []
            with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
                if self.rank == 0:
                    state[name] = tensor.detach().cpu().clone()
        return state

    def save(self, path: Path, state: dict[str, Any]) -> None:
        """Writes DeepSpeed's files of this rank into `path`, with `state` (the loop's own, the same on all ranks)."""
        with hold_errors(self._deepspeed.checkpoint_engine):
            self._deepspeed.save_checkpoint(
                str(path), tag=_TAG, client_state={**state, "spikes": self._guard.state_dict()}, save_latest=False
            )

    def load(self, path: Path) -> dict[str, Any]:
        """Reads what `save` wrote, of this very run: DeepSpeed unpickles it. Returns `state`."""
        _, state = self._deepspeed.load_checkpoint(str(path), tag=_TAG)
        self._guard.load_state_dict(state["spikes"])
        return state

    def _inputs(self, batch: Any) -> dict[str, Any]:
        move = {"device": self.device, "non_blocking": True}
        return {
            "input_ids": batch.input_ids.to(**move),
            "shift_labels": batch.shift_labels.to(**move),
            "cu_seqlens": batch.cu_seqlens,
            "context": self.context,
        }

    def _gradient_shards(self) -> list[torch.Tensor]:
        """The reduced gradient, where the optimizer will read it: this rank's shards, or all of it (`_is_whole`)."""
        return gradient_shards(self._deepspeed.optimizer)

    def _norm_squared(self) -> torch.Tensor:
        """This rank's part of the squared norm of the summed gradient, fp32; the parts add up over the ranks."""
        shards = self._gradient_shards() if self._is_whole or self._zero == 3 else self._before_muon()
        norms = torch._foreach_norm([shard.float() for shard in shards if shard.numel()])
        if not norms:
            return torch.zeros((), device=self.device)
        return torch.stack(norms).square().sum() / (self.ranks if self._is_whole else 1)

    def _before_muon(self) -> list[torch.Tensor]:
        """This rank's shards of the gradient at ZeRO 1 and 2, where Muon's already hold the orthogonalised update.

        The gradient is what moved the momentum: m' = m + (1 - beta) (g - m), with m' staged until the step is known
        to be good.
        """
        optimizer, gradients = self._deepspeed.optimizer, []
        for index, shards in optimizer.averaged_gradients.items():
            if index not in optimizer._muon_pending_momentum:
                gradients += shards
                continue
            momentum, flat = optimizer._muon_pending_momentum[index]
            beta = optimizer.optimizer.param_groups[index]["momentum"]
            before = optimizer.optimizer.state[flat]["momentum_buffer"]
            start = optimizer.first_offset[index]
            own = slice(start, start + sum(shard.numel() for shard in shards if not _is_padding(shard)))
            gradients.append((momentum[own].float() - beta * before[own].float()) / (1 - beta))
        return gradients

    def _gather(self, values: torch.Tensor) -> torch.Tensor:
        """[ranks, *values.shape]: the same bits on every rank, which an all-reduce does not promise."""
        if self.ranks == 1:
            return values[None]
        parts = [torch.empty_like(values) for _ in range(self.ranks)]
        dist.all_gather(parts, values)
        return torch.stack(parts)

    def _sum(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.ranks > 1:
            dist.all_reduce(tensor)
        return tensor


def _is_padding(shard: torch.Tensor) -> bool:
    return getattr(shard, "_zero_padding", False)  # DeepSpeed's mark on the alignment between parameters


def _configuration(recipe: Recipe, shares: Shares, device: torch.device) -> dict[str, Any]:
    cuda, muon = device.type == "cuda", recipe.optimizer.name == "muon"
    return {
        "train_micro_batch_size_per_gpu": shares.micro_rows,
        "gradient_accumulation_steps": shares.accumulation,
        "optimizer": deepspeed_section(recipe.optimizer),
        "gradient_clipping": clip_norm(recipe.optimizer),
        "bf16": {"enabled": runs_bf16(recipe.parallel, device)},
        # Ranks that share a row hold parts of one gradient, which are added in fp32.
        **({"communication_data_type": "fp32"} if shares.context > 1 else {}),
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": recipe.parallel.zero,
            "overlap_comm": cuda,
            # Buckets are allocated whole at ZeRO 3 and for overlap: half a gigabyte each is too much for a laptop.
            "reduce_bucket_size": int(2e8) if cuda else int(1e7),
            "allgather_bucket_size": int(2e8) if cuda else int(1e7),
            "reduce_scatter": not (muon and recipe.parallel.zero == 3),  # Muon at ZeRO 3 reduces whole matrices
        },
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


def _universal_checkpoint_info() -> dict[str, Any]:
    """What DeepSpeed's universal checkpoints need in every save: nothing is tensor-parallel, so all shards are
    replicas.
    """
    from deepspeed.checkpoint import constants

    return {
        constants.UNIVERSAL_CHECKPOINT_VERSION_KEY: constants.UNIVERSAL_CHECKPOINT_VERSION_VALUE,
        constants.TP_REPLICATED_PARAMETER_PATTERNS: [".*"],
    }


def device_of_rank() -> torch.device:
    """This process's device: its CUDA device by LOCAL_RANK, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device
