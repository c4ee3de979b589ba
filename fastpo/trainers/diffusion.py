"""Training of denoisers on pairs, by any loss over pairs of ``fastpo.diffusion.losses``."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object, set_seed
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from fastpo.diffusion.reference_errors import digest
from fastpo.integrations.diffusers import Adapter, Schedule
from fastpo.trainers.checkpoints import (
    check_inputs,
    checkpoints,
    load_plain,
    locked,
    resume_point,
    seal,
    weights_digest,
)
from fastpo.trainers.config import keep_for_resume
from fastpo.trainers.diffusion_config import DiffusionDPOConfig
from fastpo.trainers.diffusion_data import PairOrder, PairRows, conditions
from fastpo.trainers.diffusion_errors import Batch, PairErrors, check_finite, pair_metrics
from fastpo.trainers.diffusion_log import RunLog
from fastpo.trainers.diffusion_setup import (
    add_lora,
    loss_of,
    make_accelerator,
    make_optimizer,
    make_reference,
    set_mode,
)
from fastpo.trainers.stops import Signals, Stopped

# What changes beside weights and optimiser: the schedule, averages, a reference that is updated.
_CHANGING = "changing.pt"


class Result(NamedTuple):
    """What a run gives.

    Attributes:
        denoiser: the trained module, without wrappers, with the averaged weights if there are any.
        before: metrics of the held-out pairs before training; empty without such pairs.
        after: the same afterwards.
        history: the lines of ``log.jsonl``.
        steps: optimiser steps, those before a continuation included.
        train_seconds: of this program.
    """

    denoiser: torch.nn.Module
    before: dict[str, float]
    after: dict[str, float]
    history: list[dict[str, float]]
    steps: int
    train_seconds: float


class DiffusionDPOTrainer:
    """The loop of :func:`train`, which see.

    The order, the noise and the timesteps depend on the seed, the pair and the pass over the data
    alone: a run on several devices, or continued from a checkpoint, meets those of any other.
    Dropout of the denoiser is off, as it is in its reference; that of a LoRA is on.
    """

    def __init__(
        self,
        denoiser: torch.nn.Module,
        scheduler: Any,
        pairs: Dataset,
        config: DiffusionDPOConfig,
        eval_pairs: Dataset | None = None,
    ):
        self.config, self.output = config, Path(config.output)
        self.loss = loss_of(config)
        adapter = Adapter(denoiser)
        schedule = Schedule(scheduler, config.timestep_density, config.logit_mean, config.logit_std)
        self.pairs = PairRows(pairs)
        self.eval_pairs = None if eval_pairs is None else PairRows(eval_pairs)
        for rows in filter(None, (self.pairs, self.eval_pairs)):
            self.loss.check(rows[0].keys(), config.reference)
            adapter.check(conditions(rows[0], self.loss.inputs).keys())
            for shape in dict.fromkeys(rows.shapes):
                adapter.check_sample(shape)
        self.checkpoint = resume_point(self.output, config.resume, config.resume_from)
        self.output.mkdir(parents=True, exist_ok=True)
        self.accelerator = make_accelerator(config)
        self.inputs = {"world_size": str(self.accelerator.num_processes)}
        self.inputs |= {"model": weights_digest(denoiser), "data": digest(self.pairs.values())}
        if self.eval_pairs is not None:
            self.inputs["eval_data"] = digest(self.eval_pairs.values())
        check_inputs(self.checkpoint, self.inputs)
        if self.accelerator.is_main_process:
            keep_for_resume(config, self.output, self.checkpoint)
        set_seed(config.seed)
        if config.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
        self.denoiser = add_lora(denoiser, config).to(self.accelerator.device)
        set_mode(self.denoiser)
        self.trainable = [p for p in self.denoiser.parameters() if p.requires_grad]
        self.ema = EMAModel(self.trainable, config.ema_decay) if config.ema_decay else None
        self.reference = make_reference(self.denoiser, config, self.loss, self.ema)
        ranks = self.accelerator.process_index, self.accelerator.num_processes
        self.order = PairOrder(self.pairs.shapes, config.batch_size, config.seed, *ranks)
        if self.order.left_out:
            line = f"pairs: each pass leaves out {self.order.left_out} of {len(self.pairs)}"
            never = f", {self.order.never} always: no batch is of their shape"
            self.accelerator.print(
                f"{line}, which fill no batch{never if self.order.never else ''}"
            )
        self.steps = config.max_steps
        if self.steps <= 0:
            self.steps = math.ceil(config.epochs * self.order.batches / config.accumulation)
        optimizer, self.lr_scheduler = make_optimizer(self.trainable, config, self.steps)
        self.model, self.optimizer = self.accelerator.prepare(self.denoiser, optimizer)
        changing = [self.lr_scheduler, self.ema, config.reference_steps and self.reference]
        self.changing = list(filter(None, changing))
        if config.lora_r:
            self.accelerator.register_save_state_pre_hook(self._keep_trainable)
        self.errors = PairErrors(
            self.model, adapter, schedule, self.loss, self.reference, config, self.accelerator
        )
        self.step = 0

    def _train_step(self, batches: Iterator[Batch]) -> list[dict[str, Tensor]]:
        """One step of the optimiser; the metrics of its batches."""
        config, found = self.config, []
        for micro in range(self.step * config.accumulation, (self.step + 1) * config.accumulation):
            run, batch = micro // self.order.batches, next(batches)
            draw = run % config.reference_draws if config.reference == "cached" else run
            # Of a LoRA's dropout, all that draws from the global state; a new loader does so too.
            rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
            torch.manual_seed(config.seed + micro * ranks + rank)
            with self.accelerator.accumulate(self.model):
                metrics, errors = self.errors.backward(self.pairs, batch, draw)
                found.append(metrics)
                check_finite(metrics["loss"], errors, batch["index"], self.step)
                if self.accelerator.sync_gradients:
                    most = config.max_grad_norm or math.inf
                    norm = self.accelerator.clip_grad_norm_(self.trainable, most).detach()
                    found[-1]["grad_norm"] = norm
                    if self.accelerator.scaler is None:  # that one leaves such a step out itself
                        check_finite(norm, errors, batch["index"], self.step)
                self.optimizer.step()
                self.optimizer.zero_grad()
        if not self.accelerator.optimizer_step_was_skipped:
            self.lr_scheduler.step()
        self.step += 1
        if self.ema:
            self.ema.step(self.trainable)
        if config.reference_steps and self.step % config.reference_steps == 0:
            self.reference.refresh()
        return found

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Metrics of the held-out pairs, with noise that is the same at every call."""
        if self.eval_pairs is None:
            return {}
        self.denoiser.eval()
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        own = list(range(rank, len(self.eval_pairs), ranks))
        found = []
        parts = self.eval_pairs.of_one_shape(own, self.config.batch_size)
        for batch in self.errors.batches(self.eval_pairs, parts):
            given = self.errors.given(self.eval_pairs, batch, 0)
            # Unwrapped: ranks may have other numbers of batches, and a wrapper sends buffers.
            errors = self.errors.errors(self.denoiser, self.errors.inputs(batch, 0))
            check_finite(sum(errors.values()).sum(), errors, batch["index"], self.step, "held-out ")
            given |= errors
            columns = [values.tolist() for values in given.values()]
            found += [dict(zip(given, row, strict=True)) for row in zip(*columns, strict=True)]
        set_mode(self.denoiser)
        found = gather_object(found)
        given = {name: torch.tensor([row[name] for row in found]) for name in found[0]}
        return {name: value.item() for name, value in pair_metrics(given, self.loss(given)).items()}

    def _log_evaluation(self) -> dict[str, float]:
        values = self.evaluate()
        if values:
            self.log.write(self.step, {f"eval/{name}": value for name, value in values.items()})
        return values

    @torch.no_grad()
    def _draw(self, sample_grid: Callable[[torch.nn.Module], Any] | None, name: str) -> None:
        """Write and log a picture of samples."""
        if sample_grid is None:
            return
        if self.accelerator.is_main_process:
            self.denoiser.eval()
            with self.accelerator.autocast():
                self.log.picture(self.step, name, sample_grid(self.denoiser))
            set_mode(self.denoiser)
        self.accelerator.wait_for_everyone()

    def _keep_trainable(self, models: list, weights: list, folder: str) -> None:
        """Checkpoints of a LoRA hold its weights; the others come with the model."""
        names = {name for name, p in models[0].named_parameters() if p.requires_grad}
        weights[0] = {name: tensor for name, tensor in weights[0].items() if name in names}

    def _save(self) -> None:
        """A checkpoint, whole or not there at all."""
        accelerator, unfinished = self.accelerator, self.output / "unfinished-checkpoint"
        if accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(unfinished))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            # Not by accelerate, which unpickles such states whatever they hold.
            torch.save([each.state_dict() for each in self.changing], unfinished / _CHANGING)
            seal(unfinished, self.inputs)
            path = self.output / f"checkpoint-{self.step}"
            shutil.rmtree(path, ignore_errors=True)
            unfinished.rename(path)
            for old in checkpoints(self.output)[: -self.config.save_total_limit]:
                shutil.rmtree(old)
        accelerator.wait_for_everyone()

    def _restore(self, checkpoint: Path) -> None:
        # The weights of a LoRA alone are in its checkpoints.
        self.accelerator.load_state(str(checkpoint), strict=not self.config.lora_r)
        states = load_plain(checkpoint / _CHANGING)
        for each, state in zip(self.changing, states, strict=True):
            each.load_state_dict(state)
        self.step = int(checkpoint.name.removeprefix("checkpoint-"))
        if self.ema:
            self.ema.to(self.accelerator.device)

    def save_denoiser(self, folder: Path) -> None:
        """Write the weights, those of a LoRA alone, as the denoiser's library does."""
        if self.accelerator.is_main_process:
            chosen = {"selected_adapters": ["default"]} if self.config.lora_r else {}
            self.denoiser.save_pretrained(folder, **chosen)
        self.accelerator.wait_for_everyone()

    def _take_step(
        self, batches: Iterator[Batch], found: list[dict[str, Tensor]], signals: Signals
    ) -> list[dict[str, Tensor]]:
        """One step and what is logged and saved after it; the metrics that are still to log."""
        config = self.config
        found = found + self._train_step(batches)
        is_last = signals.on_any_rank(self.accelerator) or self.step == self.steps
        if self.step % config.logging_steps == 0 or is_last:
            rate = self.lr_scheduler.get_last_lr()[0]
            self.log.write_means(self.step, found, learning_rate=rate)
            found = []
        if config.eval_steps and self.step % config.eval_steps == 0:
            self._log_evaluation()
        if self.step % config.save_steps == 0 or is_last:
            self._save()
        return found

    def train(self, sample_grid: Callable[[torch.nn.Module], Any] | None = None) -> Result:
        """The run from its start, or from its checkpoint, to its end."""
        config, found = self.config, []
        if config.reference == "cached":
            tables = ("train", self.pairs, config.reference_draws), ("eval", self.eval_pairs, 1)
            for name, rows, draws in tables:
                if rows is not None:
                    path = self.output / f"{name}_reference_errors.pt"
                    self.errors.keep_reference_errors(rows, path, draws)
        if self.checkpoint:
            self._restore(self.checkpoint)
        self.log = RunLog(self.accelerator, self.output, self.step)
        if not self.checkpoint:
            self._log_evaluation()
            self._draw(sample_grid, "before")
        self.order.start = self.step * config.accumulation
        batches = self.errors.batches(self.pairs, self.order)
        self.optimizer.zero_grad()  # what a caller left there would enter the first step
        started = time.perf_counter()
        shown = config.progress and self.accelerator.is_main_process
        with Signals() as signals:
            for _ in tqdm(range(self.step, self.steps), disable=not shown):
                found = self._take_step(batches, found, signals)
                if signals.received:
                    self.log.close()
                    raise Stopped(signals.received, self.step)
        seconds = time.perf_counter() - started
        if self.ema:
            self.ema.copy_to(self.trainable)
        after = self._log_evaluation()
        self._draw(sample_grid, "after")
        self.log.close()
        denoiser = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        return Result(denoiser, self.log.evaluation(), after, self.log.lines, self.step, seconds)


def train(
    denoiser: torch.nn.Module,
    scheduler: Any,
    pairs: Dataset,
    config: DiffusionDPOConfig,
    *,
    eval_pairs: Dataset | None = None,
    sample_grid: Callable[[torch.nn.Module], Any] | None = None,
) -> Result:
    """Train a denoiser of diffusers on pairs; all it writes goes to the output folder.

    Args:
        denoiser: UNet2DModel, UNet2DConditionModel, or the transformer of DiT, SD3 or Flux; it is
            trained in place.
        scheduler: of diffusers, see :class:`fastpo.integrations.diffusers.Schedule`.
        pairs: rows with ``chosen`` and ``rejected`` [C, H, W], images in [-1, 1] or latents as the
            denoiser sees them; conditions by the names of the denoiser's arguments, or, where the
            two samples have one each, by these names with ``chosen_`` and ``rejected_`` before
            them; and numbers that the loss takes, such as ``weights``.
        config: of the run; ``model`` and ``data`` have no meaning here.
        eval_pairs: held-out rows.
        sample_grid: from the denoiser to a PIL image, before and after training.

    Returns:
        Result.

    Raises:
        ConfigError: an option does not fit.
        IntegrationError: there is no adapter for the denoiser or the scheduler, or the conditions
            are not those it takes.
    """
    with locked(config.output):
        trainer = DiffusionDPOTrainer(denoiser, scheduler, pairs, config, eval_pairs)
        result = trainer.train(sample_grid)
        trainer.save_denoiser(trainer.output / "model")
    return result
