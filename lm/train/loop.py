"""The training loop: from a recipe to a run folder.

Order: check everything, build, one dry batch (a whole step at full shape whose update is dropped, so that memory and
shape errors come before the data), then steps. `run/length.json` fixes the number of steps before the first one.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from farspan.lm import initial
from farspan.lm.console import console
from farspan.lm.data.loader import Batch, Loader
from farspan.lm.parallelism import Parallelism
from farspan.lm.recipe import Recipe, Shares
from farspan.lm.train import checkpoint, faults, schedule
from farspan.lm.train.engine import Engine, device_of_rank, init_distributed, leave_distributed, runs_bf16
from farspan.lm.train.evaluate import bigram_loss, sample, validation_loss
from farspan.lm.train.inputs import Inputs
from farspan.lm.train.launch import local_processes
from farspan.lm.train.metrics import MetricsWriter
from farspan.lm.train.plots import plot_loss
from farspan.lm.train.report import Meter, Reporter, count, duration, log_line, print_summary
from farspan.lm.train.run import RunFolder, TrainingFailed, random_state, seed_everything, set_random_state
from farspan.lm.train.stop import Stop, StopRequested
from farspan.parallel import ContextParallel, Mesh, watch

# An evaluator: called on all ranks with the model and the step; what it returns is recorded beside the validation loss.
Evaluator = Callable[[Any, int], dict[str, float]]
_TIMED_STEPS = 8


def train(recipe: Recipe, inputs: Inputs, folder: RunFolder, stop: Stop, evaluators: Sequence[Evaluator] = ()) -> None:
    """Trains to the end, or to a request to stop; continues from the newest whole checkpoint where there is one.

    Every rank calls it, with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set. Raises ValueError and
    OSError for what the user can change, TrainingFailed where too many steps in a row had to be skipped, StopRequested
    after a stop was asked for and everything saved.
    """
    device = device_of_rank()
    init_distributed(device, recipe.parallel.timeout)
    if dist.get_world_size() > 1:
        watch.start()
    try:
        _Run(recipe, inputs, folder, stop, device).go(evaluators)
    finally:
        watch.stop()
        leave_distributed()


class _Run:
    """The parts of one run, and what changes from step to step: `step` (steps done) and the counts of skipped ones."""

    def __init__(self, recipe: Recipe, inputs: Inputs, folder: RunFolder, stop: Stop, device: torch.device):
        self.ranks, self.rank = dist.get_world_size(), dist.get_rank()
        self.is_main = self.rank == 0
        self.recipe, self.inputs, self.folder, self.stop, self.device = recipe, inputs, folder, stop, device
        self.shares = recipe.resolve(self.ranks)
        self.parallelism = recipe.parallelism(self.ranks, local_processes())
        if self.is_main:
            folder.create(recipe, inputs, self.ranks)
        dist.barrier()
        # The others wait as long as it takes for what the main rank does alone: hashing checkpoints, counting bigrams.
        self.patient = dist.new_group(backend="gloo", timeout=timedelta(days=1))
        self.step = self.skipped = self.skipped_in_row = 0
        self.loader: Loader = inputs.loader(recipe)
        self.validation = inputs.validation_batches(recipe, self.shares.micro_rows)
        found = self._newest()
        seed_everything(recipe.seed)  # the same weights on every rank
        model, started = self._model(resuming=found is not None)
        context = make_context(self.parallelism, recipe.parallel.timeout)
        self.engine = Engine(model, recipe, self.shares, device, context)
        seed_everything(recipe.seed + self.rank)
        if found is not None:
            self._resume(found)
        self.total = self._decide_length()
        self.out = Reporter(folder.path, self.rank, self.total, self.step)
        self.metrics = (
            MetricsWriter(folder.path, recipe.train.tensorboard, recipe.train.wandb) if self.is_main else None
        )
        if self.metrics is not None:
            self.metrics.rewind(self.step)
        for line in decisions(recipe, self.shares, self.parallelism, self.engine.model, device, self.total):
            self.out.say(line)
        if started is not None:
            self.out.say(started)
        if found is not None:
            self.out.say(f"resuming {found}: step {self.step} of {self.total}")
        tokens = self.shares.rows_per_replica * recipe.batch.sequence_length // self.shares.context
        self.meter = Meter(self.engine.model, recipe.batch.sequence_length, tokens, device)

    def go(self, evaluators: Sequence[Evaluator]) -> None:
        try:
            with self.stop.held():
                self._steps(evaluators)
                self._finish(evaluators)
        finally:
            self.out.close()
            if self.metrics is not None:
                self.metrics.close()

    def _steps(self, evaluators: Sequence[Evaluator]) -> None:
        train = self.recipe.train
        with closing(self._batches()) as batches:
            while self.step < self.total:
                number = self.step + 1
                faults.reach("data", number)
                try:
                    with self.stop.interruptible():
                        _, own, waited = next(batches)
                except StopRequested:
                    pass  # the others are told below
                if self.stop.agreed():
                    self._leave()
                faults.reach("step", number)
                rate = schedule.factor(self.recipe.schedule, self.step, self.total)
                result = self.engine.train_step(own, self.loader.valid_tokens(self.step), rate, number)
                self.step = number
                self._count(result.applied)
                logged = self._due(train.log_every) or number in (1, self.total)
                if self.metrics is not None:
                    lr = rate * self.recipe.optimizer.lr
                    record = self.meter.record(number, self.total, lr, result, waited, self.skipped)
                    record["batch"] = self._identifier(own, logged)
                    self.metrics.write(record | result.metrics)
                    self.out.advance(record)
                    if logged or not result.applied:
                        self.out.say(log_line(record, self.total) + ("" if result.applied else "  NOT APPLIED"))
                if self.skipped_in_row >= train.spike.max_skipped:
                    raise TrainingFailed(
                        f"{self.skipped_in_row} steps in a row were not finite or spikes, the last with loss "
                        f"{result.loss:.4g} and gradient norm {result.grad_norm:.4g}; lower optimizer.lr, or look "
                        f"at the data of batch {self.loader.identifier(number - 1)}; the last checkpoint is older"
                    )
                if number < self.total:
                    self._intervals(evaluators)

    def _intervals(self, evaluators: Sequence[Evaluator]) -> None:
        """What happens between steps; none of it counts as training time."""
        train = self.recipe.train
        if self._due(train.checkpoint_every):
            self._save()
        if self._due(train.validate_every):
            self._validate(evaluators)
        if self._due(train.sample_every):
            self._sample()
        if any(map(self._due, (train.checkpoint_every, train.validate_every, train.sample_every))):
            self.meter.restart()

    def _finish(self, evaluators: Sequence[Evaluator]) -> None:
        """Checkpoint, validation, export, sample and baseline; the summary last, which marks the run as finished."""
        self._save()
        loss = self._validate(evaluators)
        self._export()
        texts = self._sample()
        baseline = None
        if self.is_main and loss is not None:
            stopped = lambda: self.stop.requested  # noqa: E731
            baseline = bigram_loss(self.loader, self.step, self.validation, self.inputs.vocab_size, stopped)
        self._wait()
        if self.stop.agreed():
            raise StopRequested
        if self.is_main:
            self.metrics.write({"kind": "baseline", "step": self.step, "name": "bigram", "loss": baseline})
            plot_loss(self.folder.path)
            summary = {
                "steps": self.step,
                "tokens": self.step * self.recipe.batch.tokens,
                "skipped": self.skipped,
                "validation_loss": loss,
                "bigram_loss": baseline,
                "sample": texts[0] if texts else None,
            }
            self.folder.finish(summary)
            print_summary(self.folder.path, summary)

    def _batches(self) -> Iterator[tuple[int, list[Batch], float]]:
        replica, replicas = self.engine.replica, self.engine.replicas
        return self.loader.prefetch(self.step, self.total, replica, replicas, self.shares.accumulation)

    def _identifier(self, own: list[Batch], logged: bool) -> str | None:
        """The global batch's: this replica's one micro-batch if that is all of it, else re-read, for the lines that are
        logged.
        """
        if self.engine.replicas == 1 and len(own) == 1:
            return own[0].identifier
        return self.loader.identifier(self.step - 1) if logged else None

    def _count(self, applied: bool) -> None:
        self.skipped += not applied
        self.skipped_in_row = 0 if applied else self.skipped_in_row + 1

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _leave(self) -> None:
        self._save()
        self.out.say(f"stopped at step {self.step} of {self.total}, saved; continue with --resume")
        raise StopRequested

    def _validate(self, evaluators: Sequence[Evaluator]) -> float | None:
        faults.reach("validation", self.step)
        loss = validation_loss(self.engine, self.validation, self.stop)
        if loss is None:
            return None
        extra = {
            name: value for evaluate in evaluators for name, value in evaluate(self.engine.model, self.step).items()
        }
        if self.metrics is not None:
            self.metrics.write({"kind": "validation", "step": self.step, "loss": loss, **extra})
            plot_loss(self.folder.path)
        told = [f"{name} {value:.4f}" for name, value in {"loss": loss, **extra}.items()]
        self.out.say(f"validation at step {self.step}: {', '.join(told)}")
        return loss

    def _sample(self) -> list[str]:
        if self.inputs.tokenizer is None:
            return []
        evaluation = self.recipe.evaluation
        seed = self.recipe.seed + self.step
        texts = sample(self.engine, self.inputs.tokenizer, evaluation.prompts, evaluation.sample_tokens, seed)
        if self.is_main:
            with open(self.folder.path / "samples.txt", "a") as file:
                file.writelines(f"--- step {self.step}\n{text}\n" for text in texts)
        return texts

    def _export(self) -> None:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        weights = self.engine.whole_weights()
        if self.is_main:
            self.engine.model.save_pretrained(self.folder.exported, state_dict=weights)
            if self.inputs.tokenizer is not None:
                self.inputs.tokenizer.save_pretrained(self.folder.exported)
        self._wait()

    def _save(self) -> None:
        state = {
            "step": self.step,
            "total_steps": self.total,
            "skipped": self.skipped,
            "skipped_in_row": self.skipped_in_row,
        }

        def write(path: Path) -> None:
            torch.save(random_state(), path / f"random-{self.rank}.pt")
            self.engine.save(path, state)

        checkpoint.save(
            self.folder.checkpoints,
            self.step,
            write,
            barrier=self._wait,
            is_main=self.is_main,
            keep=self.recipe.train.keep_checkpoints,
        )

    def _wait(self) -> None:
        """For all ranks, however long one of them takes; a rank that died is noticed at once."""
        with watch.during("waiting for the main rank"):
            dist.barrier(group=self.patient)

    def _model(self, resuming: bool) -> tuple[Any, str | None]:
        """The model to train, and a line on the weights it starts from, if any. They are there on the main rank; a
        checkpoint wins over them.
        """
        recipe = self.recipe
        if recipe.start is None:
            return build_model(recipe, self.inputs), None
        dtype = torch.bfloat16 if runs_bf16(recipe.parallel, self.device) else torch.float32
        model = initial.unwritten(recipe.decoder_config(self.inputs.tokenizer, self.inputs.vocab_size), dtype)
        initial.freeze(model, recipe.start.trainable)
        if resuming:
            return model, None
        outcome: list[Any] = [None, None, {}]
        if self.is_main:
            try:
                outcome[0] = initial.fill(model, recipe.start)
                outcome[2] = dict(model.named_buffers())  # DeepSpeed gives the parameters alone to the other ranks
            except (ValueError, OSError) as error:
                outcome[1] = str(error)
        with watch.during("waiting for the main rank"):
            dist.broadcast_object_list(outcome, group=self.patient)
        line, wrong, buffers = outcome
        if wrong is not None:
            raise ValueError(wrong)
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        return model, line

    def _newest(self) -> Path | None:
        """The newest whole checkpoint, if there is one."""
        found: list[Path | None] = [None]
        if self.is_main:
            found[0] = checkpoint.latest(self.folder.checkpoints, lambda line: console.print(line, style="yellow"))
        self._wait()
        dist.broadcast_object_list(found)
        return found[0]

    def _resume(self, path: Path) -> None:
        saved_ranks = len(list(path.glob("random-*.pt")))
        if saved_ranks != self.ranks:
            raise ValueError(
                f"{path} was saved by {saved_ranks} processes, this is {self.ranks}; use --nproc {saved_ranks}"
            )
        state = self.engine.load(path)
        self.step, self.skipped = state["step"], state["skipped"]
        self.skipped_in_row = state["skipped_in_row"]
        set_random_state(torch.load(path / f"random-{self.rank}.pt", weights_only=True))

    def _decide_length(self) -> int:
        """The number of steps: of the recipe, of this run's first start, or measured now. One dry step at least is
        taken.
        """
        began = random_state()
        batches = self.loader.batch(self.step, self.engine.replica, self.engine.replicas, self.shares.accumulation)
        valid = self.loader.valid_tokens(self.step)
        self.engine.train_step(batches, valid, 1.0, self.step, dry=True)
        known = self.folder.length()
        decided: list[Any] = [known and known["total_steps"]]
        if self.is_main and known is None:
            decided[0] = self.recipe.steps()
        dist.broadcast_object_list(decided)
        if decided[0] is None:
            durations = []
            for _ in range(_TIMED_STEPS):
                start = time.perf_counter()
                self.engine.train_step(batches, valid, 1.0, self.step, dry=True)
                durations.append(time.perf_counter() - start)
            seconds = min(durations)  # the others were slowed by what a process does once, or by its neighbours
            decided[0] = schedule.steps_in_budget(self.recipe.train.minutes, seconds)
            dist.broadcast_object_list(decided)
            if self.is_main:
                self.folder.decide_length(decided[0], seconds)
        elif self.is_main and known is None:
            self.folder.decide_length(decided[0], None)
        set_random_state(began)
        return decided[0]


def build_model(recipe: Recipe, inputs: Inputs) -> Any:
    """The recipe's decoder with random weights, its vocabulary and special tokens from the corpus and tokenizer."""
    from farspan.lm.decoder import DecoderForCausalLM

    return DecoderForCausalLM(recipe.decoder_config(inputs.tokenizer, inputs.vocab_size))


def make_context(parallelism: Parallelism, timeout: float) -> ContextParallel | None:
    """The mesh of the job's processes; None where no rows are shared out. Every rank calls it."""
    if parallelism.context == 1:
        return None
    mesh = Mesh.create(parallelism.data, parallelism.ring, parallelism.ulysses, timeout)
    return ContextParallel(mesh, parallelism.layout, parallelism.attention)


def decisions(
    recipe: Recipe, shares: Shares, parallelism: Parallelism, model: Any, device: torch.device, total: int
) -> list[str]:
    """What was decided and why, for a person."""
    sizes = {p: getattr(p, "ds_numel", p.numel()) for p in model.parameters()}  # ds_numel: the whole, under ZeRO-3
    trained = sum(size for p, size in sizes.items() if p.requires_grad)
    precision = "bf16 with fp32 master weights" if runs_bf16(recipe.parallel, device) else "fp32"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    ranks, parameters = shares.replicas * shares.context, count(sum(sizes.values()))
    lines = [
        f"{recipe.name}: {parameters} parameters, {precision}, ZeRO {recipe.parallel.zero} on {ranks} x {where}",
        *([parallelism.reason] if shares.context > 1 else []),
        shares.reason,
        *([f"{count(trained)} of them are trained (start.trainable={recipe.start.trainable})"] if recipe.start else []),
        f"{total} steps of {recipe.batch.tokens} tokens, {count(total * recipe.batch.tokens)} tokens in all",
    ]
    if recipe.train.minutes is not None:
        lines.append(
            f"the number of steps was measured to fill {duration(recipe.train.minutes * 60)}, and is fixed now"
        )
    return lines
