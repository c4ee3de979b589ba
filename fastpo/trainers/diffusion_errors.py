"""Errors of pairs under a denoiser and its reference, and the gradient of a loss of them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from fastpo.diffusion import Target, noise_errors, noise_errors_with_reference
from fastpo.diffusion.accumulate import accumulate
from fastpo.diffusion.reference_errors import ReferenceErrors, fingerprints, fixed_draws
from fastpo.diffusion.references import AdapterOff, Reference
from fastpo.integrations.diffusers import Adapter, Schedule
from fastpo.losses import LossOutput
from fastpo.trainers.base import accuracy
from fastpo.trainers.diffusion_config import DiffusionDPOConfig
from fastpo.trainers.diffusion_data import SIDES, PairRows, conditions
from fastpo.trainers.diffusion_setup import POLICY, REFERENCE, PairLoss

Batch = dict[str, Any]


class Inputs(NamedTuple):
    """Of a denoiser, and what it is fitted to; [N, ...] each."""

    noisy: Tensor
    timesteps: Tensor
    target: Target
    condition: dict[str, Tensor]


def pair_metrics(given: dict[str, Tensor], out: LossOutput) -> dict[str, Tensor]:
    """Means over the pairs of a batch; 0-d each."""
    chosen_B, rejected_B = out.chosen_rewards, out.rejected_rewards
    errors = {f"errors/{name.removesuffix('_errors')}": given[name] for name in POLICY}
    errors |= {
        f"errors/{name.removesuffix('_errors')}": given[name] for name in REFERENCE if name in given
    }
    values = {
        "loss": out.loss,
        "rewards/chosen": chosen_B,
        "rewards/rejected": rejected_B,
        "rewards/margins": chosen_B - rejected_B,
        "rewards/accuracies": accuracy(chosen_B, rejected_B),
    }
    return {n: v.detach().float().mean() for n, v in (values | errors | out.metrics).items()}


class NonFiniteError(RuntimeError):
    """A number of a run is NaN or infinite; the message names the pairs."""


def check_finite(
    number: Tensor, errors: dict[str, Tensor], index: Tensor, step: int, kind: str = ""
) -> None:
    """Stop before a number that is not finite gets into the weights.

    Args:
        number: 0-d, the loss or the norm of the gradient.
        errors: [B] each, of the batch it is of.
        index: [B] of the rows of the batch.
        step: of the optimiser, for the message.
        kind: of the pairs, for the message.

    Raises:
        NonFiniteError: it is NaN or infinite.
    """
    if number.isfinite():
        return
    places = index.tolist()
    for name, values in errors.items():
        wrong = [
            i for i, value in zip(places, values.tolist(), strict=True) if abs(value) < math.inf
        ]
        wrong = [i for i in places if i not in wrong]
        if wrong:
            what = f"{name} of the {kind}pairs {', '.join(map(str, wrong))}"
            break
    else:
        what = f"the gradient of the loss of the {kind}pairs {', '.join(map(str, places))}"
    remedy = "The checkpoint before is the last good one. Try bf16 or float32, or a lower rate."
    raise NonFiniteError(f"step {step + 1}: {what}: expected finite, got NaN or infinity. {remedy}")


class PairErrors:
    """From pairs to errors, the loss and its gradient.

    Args:
        model: the denoiser as it is called for training, wrapped for several devices.
        adapter: of its family.
        schedule: of its scheduler.
        loss: over pairs.
        reference: None where there is none, or its errors are kept in tables.
        config: of the run.
        accelerator: of the run.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        adapter: Adapter,
        schedule: Schedule,
        loss: PairLoss,
        reference: Reference | None,
        config: DiffusionDPOConfig,
        accelerator: Accelerator,
    ):
        self.model, self.adapter, self.schedule, self.loss = model, adapter, schedule, loss
        self.reference, self.config, self.accelerator = reference, config, accelerator

    def _place(self, tensor: Tensor) -> Tensor:
        """On the device, without waiting for what it does at present."""
        if self.accelerator.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.accelerator.device, non_blocking=True)

    def batches(self, rows: PairRows, batch_sampler: Any) -> Iterator[Batch]:
        """On the device, but for the indices."""
        for batch in DataLoader(rows, batch_sampler=batch_sampler):
            index = batch.pop("index")
            yield {name: self._place(x) for name, x in batch.items()} | {"index": index}

    def inputs(self, batch: Batch, draw: int, sides: tuple[str, ...] = SIDES) -> Inputs:
        """Of one side of the pairs, or of both, the chosen ones first.

        Timestep and noise depend on the seed, the index of the pair and ``draw``.
        """
        draws = partial(fixed_draws, self.config.seed, batch["index"], batch["chosen"].shape[1:])
        first = draws(draw=2 * draw)
        noise = dict.fromkeys(SIDES, self._place(first.noise))
        if self.config.independent_noise:
            noise["rejected"] = self._place(draws(draw=2 * draw + 1).noise)
        corrupted = self.schedule.corrupt(
            torch.cat([batch[side] for side in sides]).to(first.noise.dtype),
            torch.cat([noise[side] for side in sides]),
            self._place(self.schedule.indices(first.uniforms)).repeat(len(sides)),
        )
        given = conditions(batch, self.loss.inputs)
        places = [SIDES.index(side) for side in sides]
        condition = {name: torch.cat([x[i] for i in places]) for name, x in given.items()}
        return Inputs(*corrupted, condition)

    def predict(self, model: Callable[..., Any], x: Inputs) -> Tensor:
        """The denoiser's prediction [N, ...]."""
        return self.adapter(model, x.noisy, x.timesteps, x.condition)

    def _reference_prediction(self, x: Inputs) -> Tensor:
        with self.reference.using() as model, self.accelerator.autocast():
            return self.predict(model, x)

    def errors(self, model: torch.nn.Module, x: Inputs) -> dict[str, Tensor]:
        """Errors [B] of both sides, by the names of the losses' arguments."""
        if self.reference is None:
            found = (noise_errors(self.predict(model, x), x.target),)
        else:
            reference = self._reference_prediction(x)
            found = noise_errors_with_reference(self.predict(model, x), reference, x.target)
        sides = [side for errors in found for side in errors.chunk(2)]
        return dict(zip((*POLICY, *REFERENCE), sides, strict=False))

    def given(self, rows: PairRows, batch: Batch, draw: int) -> dict[str, Tensor]:
        """What the loss takes of the pairs themselves, and of errors kept in a table."""
        given = {name: batch[name] for name in self.loss.inputs & batch.keys()}
        if rows.reference_errors is not None:
            errors = rows.reference_errors.read(batch["index"])[:, draw]
            given |= zip(REFERENCE, self._place(errors).unbind(1), strict=True)
        return given

    def backward(
        self, rows: PairRows, batch: Batch, draw: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Add the gradient of a batch; its metrics and its errors [B]."""
        given = self.given(rows, batch, draw)
        if self.config.one_at_a_time:
            return self._backward_in_turn(batch, draw, given)
        given |= self.errors(self.model, self.inputs(batch, draw))
        out = self.loss(given)
        self.accelerator.backward(out.loss)
        return pair_metrics(given, out), self._errors_of(given)

    @staticmethod
    def _errors_of(given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: given[name].detach() for name in (*POLICY, *REFERENCE) if name in given}

    def _backward_in_turn(
        self, batch: Batch, draw: int, given: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        sides = [self.inputs(batch, draw, (side,)) for side in SIDES]
        if self.reference is not None:
            found = [noise_errors(self._reference_prediction(x), x.target) for x in sides]
            given |= zip(REFERENCE, found, strict=True)

        def loss_of(errors: Tensor) -> LossOutput:
            out = self.loss(given | dict(zip(POLICY, errors.chunk(2), strict=True)))
            # What Accelerator.backward does to a loss.
            loss, scaler = out.loss / self.config.accumulation, self.accelerator.scaler
            out = out._replace(loss=loss if scaler is None else scaler.scale(loss))
            found.update(zip(POLICY, errors.detach().chunk(2), strict=True))
            return out

        found: dict[str, Tensor] = {}
        accumulate(
            lambda x: noise_errors(self.predict(self.model, x), x.target),
            sides,
            loss_of,
            no_sync=partial(self.accelerator.no_sync, self.model),
        )
        given |= found
        return pair_metrics(given, self.loss(given)), self._errors_of(given)

    def keep_reference_errors(self, rows: PairRows, path: Path, draws: int) -> None:
        """Errors of the denoiser as it is now, without its LoRA, kept in a file for its rows."""
        config, denoiser = self.config, self.accelerator.unwrap_model(self.model)
        initial = AdapterOff(denoiser) if config.lora_r else None

        @torch.no_grad()
        def compute(indices: Tensor) -> Tensor:
            parts = rows.of_one_shape(indices.tolist(), len(indices))
            found = {}
            for part, batch in zip(parts, self.batches(rows, parts), strict=True):
                with initial.using() if initial else contextlib.nullcontext(denoiser) as model:
                    inputs = [self.inputs(batch, draw) for draw in range(draws)]
                    errors = [noise_errors(self.predict(model, x), x.target) for x in inputs]
                both = torch.stack([torch.stack(one.chunk(2), 1) for one in errors], 1)
                found |= zip(part, both, strict=True)
            return torch.stack([found[index] for index in indices.tolist()])

        scheduler = self.schedule.scheduler
        options = {n: v for n, v in sorted(scheduler.config.items()) if not n.startswith("_")}
        prints = fingerprints(
            weights=initial.weights() if initial else denoiser.state_dict(),
            data=rows.values(),
            seed=config.seed,
            scheduler=f"{type(scheduler).__name__} {options}",
            timesteps=[config.timestep_density, config.logit_mean, config.logit_std],
            independent_noise=config.independent_noise,
            mixed_precision=config.mixed_precision,
        )
        with self.accelerator.main_process_first():
            table = ReferenceErrors.open(path, len(rows), (draws, 2), fingerprints=prints)
            if len(table.missing()):
                table.fill(compute, config.batch_size, path)
        rows.reference_errors = table
