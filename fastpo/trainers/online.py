"""Training on responses that the model writes at every step, and the extragradient step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from fastpo.data.records import DataError
from fastpo.data.tokens import PairCollator
from fastpo.trainers.config import ConfigError
from fastpo.trainers.dpo import REFERENCE, DPOTrainer, sum_logprobs
from fastpo.trainers.head import shift_labels
from fastpo.trainers.sampling import seed_of
from fastpo.trainers.states import State, restore, snapshot, temporarily

# experience(indices of prompts, seed) gives rows of pairs, at least one.
Experience = Callable[[Sequence[int], int], list[dict[str, Any]]]


def _collate(examples: list[dict[str, int]]) -> dict[str, Tensor]:
    return {"index": torch.tensor([example["index"] for example in examples])}


class OnlineTrainer(DPOTrainer):
    """``DPOTrainer`` over prompts: each batch of them becomes pairs of the model's own responses.

    Args:
        model: a causal LM, or a ``PeftModel`` around one.
        args: training arguments; the batch size counts prompts.
        experience: called with the indices of a batch of prompts and a seed, which depends on the
            step and the batch alone, so that a resumed run samples what it would have.
        pad_id: padding token.
        initial: trainable parameters of the reference, written into the model for a while at every
            step, for an adapter; with ``reference="cached"``. None for the other references.
        **kwargs: of ``DPOTrainer``; ``train_dataset`` has the column ``index``.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        args: TrainingArguments,
        *,
        experience: Experience,
        pad_id: int,
        initial: State | None = None,
        **kwargs: Any,
    ):
        super().__init__(model, args, data_collator=_collate, **kwargs)
        self.initial = initial
        self.experience = experience
        self.pair_collator = PairCollator(pad_id)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Loss of the pairs made from a batch of prompts."""
        index = inputs["index"].tolist()
        step = self.state.global_step
        rows = self.experience(index, seed_of(self.args.seed, step, index))
        if not rows:
            remedy = "Look at the scores: NaN gives no pair. More prompts in a batch help."
            raise DataError(f"prompts {index}: no pairs to train on in step {step + 1}. {remedy}")
        rows = [row | {"index": i} for i, row in enumerate(rows)]
        batch = self._prepare_inputs(self.pair_collator(rows))
        if self.initial is not None and self.loss_inputs & set(REFERENCE):
            # Before the policy's forward, whose backward needs the parameters as they were.
            batch |= self._initial_logprobs(model, batch)
        loss = super().compute_loss(model, batch, return_outputs)
        if model.training and "chosen_scores" in batch:
            score = (batch["chosen_scores"] + batch["rejected_scores"]).mean() / 2
            self.record_metric("score", score)
        return loss

    @torch.no_grad()
    def _initial_logprobs(self, model, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Summed log-probs of the responses with the initial parameters, by loss argument."""
        was_training = model.training
        model.eval()
        with temporarily(self.accelerator.unwrap_model(model), self.initial):
            sums = sum_logprobs(model, batch, shift_labels(batch["labels"]) >= 0)
        model.train(was_training)
        responses = len(sums) // len(batch["index"])
        return dict(zip(REFERENCE, sums.chunk(responses), strict=False))


class Extragradient(TrainerCallback):
    """Every first step of two is undone; its outcome, the half step, serves to sample from.

    The second step is then taken from where the first was, with its optimiser state: theta_{t+1} =
    theta_t - s g(theta_t; opponents from the half step). The learning rate schedule counts both.

    Attributes:
        half: the parameters after the half step; None when a half step comes next.
    """

    def __init__(self):
        self.half: State | None = None
        self._start: State = {}
        self._moments: dict[int, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        """Checkpoints between the two steps of a pair would lose the half step."""
        if args.save_strategy == "steps" and args.save_steps % 2:
            raise ConfigError(f"save_steps: expected an even number, got {args.save_steps}.")
        if state.max_steps < 2:
            remedy = "Raise num_train_epochs or max_steps, or lower the batch size."
            raise ConfigError(
                f"training: expected 2 steps or more, as the first of two is undone, got "
                f"{state.max_steps}. {remedy}"
            )

    def on_epoch_end(self, args, state, control, **kwargs):
        """No checkpoint of an epoch that ends between the two."""
        control.should_save &= state.global_step % 2 == 0

    def on_step_begin(self, args, state, control, *, model, optimizer, **kwargs):
        """Before a half step: keep what it will change."""
        if state.global_step % 2 == 0:
            self.half, self._start = None, snapshot(model)
            self._moments = _to_cpu(optimizer.state_dict()["state"])

    def on_step_end(self, args, state, control, *, model, optimizer, **kwargs):
        """After a half step (the count is already that of the next one): undo it."""
        if state.global_step % 2 == 1:
            self.half = snapshot(model)
            restore(model, self._start)
            # The learning rate in the groups is already that of the next step.
            optimizer.load_state_dict(optimizer.state_dict() | {"state": self._moments})


def _to_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _to_cpu(entry) for key, entry in value.items()}
    return value
