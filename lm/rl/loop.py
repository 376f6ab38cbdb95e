"""One RL run: from a recipe to a run folder, through trl's trainer.

A step is a rollout and all of its updates. Checkpoints hold the rollout in use, so that a run may stop between any two
updates and go on with the same bits.
"""

from __future__ import annotations

import json
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import TrainerCallback

from farspan.lm.console import console
from farspan.lm.rl.arguments import lora_configuration, trl_arguments
from farspan.lm.rl.inputs import RewardsFailed, RLInputs, Scorer
from farspan.lm.rl.plots import plot_rl
from farspan.lm.rl.rewards import Reward
from farspan.lm.rl.sampling import response_seed
from farspan.lm.rl.spec import RLRecipe
from farspan.lm.rl.trainer import credit_trainer
from farspan.lm.train import checkpoint, faults
from farspan.lm.train.engine import device_of_rank, init_distributed
from farspan.lm.train.metrics import MetricsWriter
from farspan.lm.train.report import Reporter, count, duration, peak_memory
from farspan.lm.train.run import RunFolder, TrainingFailed
from farspan.lm.train.stop import Stop, StopRequested

SAMPLES = "samples.jsonl"
_DRAW_EVERY = 20.0  # seconds
_TIMEOUT = 1800.0  # seconds that a rank may keep the others waiting, which write answers of other lengths


def train_rl(
    recipe: RLRecipe, inputs: RLInputs, folder: RunFolder, stop: Stop, ranks: int, reward: Reward | None = None
) -> None:
    """Trains to the end, or to a request to stop; continues from the newest whole checkpoint where there is one.

    Every rank calls it; with more than one, RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set. reward:
    instead of the task's own. Raises ValueError and OSError for what the user can change, TrainingFailed where no
    response could be scored for long, StopRequested after a stop was asked for and everything saved.
    """
    with tempfile.TemporaryDirectory(prefix="farspan-rl-") as scratch:
        _Run(recipe, inputs, folder, stop, ranks, reward, Path(scratch)).go()


class _Run:
    def __init__(self, recipe, inputs, folder, stop, ranks, reward, scratch) -> None:
        self.recipe, self.inputs, self.folder, self.stop, self.ranks = recipe, inputs, folder, stop, ranks
        self.shares = recipe.resolve(ranks)
        self.scorer = Scorer(recipe.task.name, self._warn, reward)
        self.trainer = self._build(scratch)
        self.accelerator = self.trainer.accelerator
        self.is_main = self.accelerator.is_main_process
        if self.is_main:
            folder.create(recipe, inputs, ranks)
        self.accelerator.wait_for_everyone()
        self.found = self._newest()
        self.updates = recipe.updates_per_step
        self.saved = checkpoint.step_of(self.found) if self.found else 0  # in updates, as trl counts
        self.out = Reporter(folder.path, self.accelerator.process_index, recipe.train.steps, self.saved // self.updates)
        self.metrics = None
        if self.is_main:
            self.metrics = MetricsWriter(folder.path, recipe.train.tensorboard, recipe.train.wandb)
            self.metrics.rewind(self.saved // self.updates)
        self.durations: deque[float] = deque(maxlen=50)
        self.began = time.perf_counter()
        self.drawn = self.began
        self.stopped = False

    def go(self) -> None:
        trainer = self.trainer
        for line in self._decisions():
            self.out.say(line)
        try:
            with self.stop.held():
                try:
                    if self.found is None:
                        self._validate(0)
                    self.began = time.perf_counter()
                    resumed = self.found and str(self.found / f"checkpoint-{self.saved}")
                    trainer.train(resume_from_checkpoint=resumed)
                    self.stopped = trainer.state.global_step < trainer.state.max_steps
                    if not self.stopped:
                        self._finish()
                except StopRequested:
                    self.stopped = True
                    if trainer.state.global_step > self.saved:
                        trainer._save_checkpoint(trainer.model, None)
                except RewardsFailed as error:
                    raise TrainingFailed(str(error)) from None
            if self.stopped:
                done, total = trainer.state.global_step / self.updates, self.recipe.train.steps
                self.out.say(f"stopped at step {done:.3g} of {total}, saved; continue with --resume")
                raise StopRequested
        finally:
            self.out.close()
            if self.metrics is not None:
                self.metrics.close()

    # What happens between updates; called by the callback below

    def before_update(self, update: int) -> None:
        faults.reach("step", update + 1)

    def after_update(self, update: int, control: Any) -> None:
        """update: updates done."""
        train, (step, left) = self.recipe.train, divmod(update, self.updates)
        if left == 0:
            seconds, self.began = time.perf_counter() - self.began, time.perf_counter()
            self.durations.append(seconds)
            control.should_log = step % train.log_every == 0 or step == train.steps
            control.should_save |= _due(step, train.checkpoint_every) or step == train.steps
            if _due(step, train.validate_every) and step < train.steps:
                self._validate(step)
                self.began = time.perf_counter()
        if self._stop_agreed():
            control.should_save = control.should_training_stop = True

    def log(self, logs: dict[str, Any], update: int) -> None:
        if not self.is_main or "learning_rate" not in logs:  # at the end, trl sums up what is said already
            return
        step = update // self.updates
        record = {"kind": "train", "step": step, "percent": 100 * step / self.recipe.train.steps, **logs}
        record["seconds"] = median(self.durations) if self.durations else None
        record["seconds_left"] = (self.recipe.train.steps - step) * median(self.durations or [0.0])
        record["memory_gib"] = peak_memory(self.accelerator.device) / 2**30
        self.metrics.write(record)
        self.out.say(_line(record, self.recipe.train.steps))
        self.out.progress(step, f"reward {_short(record['reward'])}  left {duration(record['seconds_left'])}")
        with open(self.folder.path / SAMPLES, "a", encoding="utf-8") as file:
            file.writelines(json.dumps({"step": step, **sample}) + "\n" for sample in self.trainer.samples)
        if time.perf_counter() - self.drawn > _DRAW_EVERY:
            plot_rl(self.folder.path)
            self.drawn = time.perf_counter()

    # The rest

    def _build(self, scratch: Path) -> Any:
        import logging

        from farspan.lm.load import load

        logging.getLogger("trl").setLevel(logging.ERROR)  # it prints every response that nothing could be said about
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # names that trl still uses
        recipe = self.recipe
        if recipe.parallel.zero:
            init_distributed(device_of_rank(), _TIMEOUT)
        arguments = trl_arguments(recipe, self.shares, scratch)  # before the model: ZeRO-3 wants to know
        model, tokenizer = load(recipe.start, device="cpu", dtype="float32")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if recipe.task.chat and tokenizer.chat_template is None:
            raise ValueError(f"{recipe.start} has no chat template; set task.chat=false, or start from another model")
        trainer = credit_trainer()(
            model=model.train(),
            reward_funcs=[self.scorer],
            args=arguments,
            train_dataset=self.inputs.dataset(),
            processing_class=tokenizer,
            callbacks=[_Callback(self)],
            optimizers=(None, None),
            peft_config=lora_configuration(recipe),
            recipe=recipe,
            save=self._save,
            waiting=self.stop.interruptible if self.ranks == 1 else nullcontext,
        )
        from transformers.trainer_callback import PrinterCallback

        trainer.remove_callback(PrinterCallback)
        return trainer

    def _decisions(self) -> list[str]:
        model, recipe = self.trainer.model, self.recipe
        sizes = {p: getattr(p, "ds_numel", p.numel()) for p in model.parameters()}
        total, trained = sum(sizes.values()), sum(size for p, size in sizes.items() if p.requires_grad)
        precision = "bf16" if self.trainer.args.bf16 else "fp32"
        lines = [
            f"{recipe.name}: {recipe.start}, {count(total)} parameters, {count(trained)} trained, {precision}, "
            f"ZeRO {recipe.parallel.zero} on {self.ranks} x {self.accelerator.device.type}",
            self.shares.reason,
            f"{recipe.train.steps} steps of {recipe.rollout.prompts} questions; credit: {recipe.credit.strategy}",
        ]
        if recipe.credit.looks_at_attention:
            from farspan.lm.rl.statistics import sampled_layers

            layers = ", ".join(map(str, sampled_layers(model, recipe.credit.layers)))
            lines.append(f"attention statistics of layers {layers}")
        if self.found is not None:
            lines.append(f"resuming {self.found}: step {self.saved / self.updates:.3g} of {recipe.train.steps}")
        return lines

    def _validate(self, step: int) -> float:
        """Held-out accuracy and mean reward; the questions are shared out over the ranks."""
        faults.reach("validation", step)
        evaluation, trainer = self.recipe.evaluation, self.trainer
        rank = self.accelerator.process_index
        numbered = [(i, one) for i, one in enumerate(self.inputs.held_out) for _ in range(evaluation.samples)]
        own = list(enumerate(numbered))[rank :: self.ranks]
        totals = torch.zeros(4, dtype=torch.float64, device=self.accelerator.device)
        with trainer.policy() as model:
            if own:
                prompts = trainer._tokenize_prompts([one.prompt for _, (_, one) in own])[0]
                seeds = [response_seed(self.recipe.seed, "validation", number) for number, _ in own]
                rows = self.recipe.rollout.rows_per_device or 256
                responses = trainer.sample(model, prompts, seeds, evaluation.temperature, rows)
                texts = trainer.processing_class.batch_decode(responses, skip_special_tokens=True)
                for text, response, (_, (_, one)) in zip(texts, responses, own, strict=True):
                    value = self.scorer.score(text, one.reference)
                    if value is not None:
                        totals += torch.tensor([1, value >= 1, value, len(response)], device=totals.device)
        counted, right, rewarded, length = self.accelerator.gather(totals[None]).sum(0).tolist()
        counted = max(counted, 1)
        if self.metrics is not None:
            record = {"accuracy": right / counted, "reward": rewarded / counted, "length": length / counted}
            self.metrics.write({"kind": "validation", "step": step, **record})
        self.out.say(
            f"validation at step {step}: accuracy {right / counted:.4f} on {len(self.inputs.held_out)} questions"
        )
        return right / counted

    def _finish(self) -> None:
        """Validation and export; the summary last, which marks the run as finished."""
        accuracy = self._validate(self.recipe.train.steps)
        self._export()
        self.accelerator.wait_for_everyone()
        if self.is_main:
            plot_rl(self.folder.path)
            summary = {"steps": self.recipe.train.steps, "accuracy": accuracy, "strategy": self.recipe.credit.strategy}
            self.folder.finish(summary)
            print_rl_summary(self.folder.path, summary)

    def _export(self) -> None:
        trainer = self.trainer
        if self.recipe.lora is not None:
            merged = self.accelerator.unwrap_model(trainer.model).merge_and_unload()
            if self.is_main:
                merged.save_pretrained(self.folder.exported)
        else:
            trainer.save_model(str(self.folder.exported))
        if self.is_main:
            trainer.processing_class.save_pretrained(self.folder.exported)
            (self.folder.exported / "training_args.bin").unlink(missing_ok=True)

    def _save(self, update: int, write: Callable[[Path], None]) -> None:
        checkpoint.save(
            self.folder.checkpoints,
            update,
            write,
            barrier=self.accelerator.wait_for_everyone,
            is_main=self.is_main,
            keep=self.recipe.train.keep_checkpoints,
        )
        self.saved = update

    def _newest(self) -> Path | None:
        from accelerate.utils import broadcast_object_list

        found: list[Path | None] = [None]
        if self.is_main:
            found[0] = checkpoint.latest(self.folder.checkpoints, lambda line: console.print(line, style="yellow"))
        return broadcast_object_list(found)[0]

    def _stop_agreed(self) -> bool:
        """Whether any rank was asked to stop; all ranks call it together."""
        if self.ranks == 1:
            return self.stop.requested
        flag = torch.tensor([int(self.stop.requested)], device=self.accelerator.device)
        return bool(self.accelerator.gather(flag).any())

    def _warn(self, line: str) -> None:
        self.out.say(f"warning: {line}")


class _Callback(TrainerCallback):
    def __init__(self, run: _Run) -> None:
        self._run = run

    def on_step_begin(self, args, state, control, **_):
        self._run.before_update(state.global_step)

    def on_step_end(self, args, state, control, **_):
        self._run.after_update(state.global_step, control)

    def on_log(self, args, state, control, logs=None, **_):
        self._run.log(logs, state.global_step)


def print_rl_summary(run: Path, summary: dict[str, Any]) -> None:
    """The end of a run, and what to try next."""
    for line in (
        f"trained {summary['steps']} steps with {summary['strategy']} credit",
        f"held-out accuracy {summary['accuracy']:.4f}",
        f"curves: {run / 'reward.png'}",
        "next:",
        f'  farspan generate {run} "..."',
        f"  farspan rl inspect {run}",
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _line(record: dict[str, Any], total: int) -> str:
    """One aligned line of a record."""
    credit = f"  gamma {_short(record['credit/gamma'])}" if "credit/gamma" in record else ""
    return (
        f"step {record['step']:>{len(str(total))}} {record['percent']:5.1f}%  reward {_short(record['reward'])} "
        f"(std {_short(record['reward_std'])}, alike {record['frac_reward_zero_std']:.0%})  "
        f"length {_short(record['completions/mean_length'])} (cut {record['completions/clipped_ratio']:.0%})  "
        f"entropy {_short(record['entropy'])}  clipped {record['clip_ratio/region_mean']:.1%}  "
        f"norm {_short(record.get('grad_norm'))}  lr {record['learning_rate']:.2e}{credit}  "
        f"mem {record['memory_gib']:.2f} GiB  {_short(record['seconds'])} s/step  "
        f"left {duration(record['seconds_left'])}"
    )


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
