"""Training on pairs: DPO, IPO, hinge, SimPO and ORPO by one Trainer."""

from __future__ import annotations

import contextlib
import copy
import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from fastpo import losses
from fastpo.sequences import sequence_counts, sequence_sums
from fastpo.trainers.base import StatisticTrainer
from fastpo.trainers.config import ConfigError
from fastpo.trainers.head import shift_labels

LOSSES = ("dpo", "ipo", "hinge", "simpo", "orpo")
REFERENCE_FREE = ("simpo", "orpo")
REFERENCES = ("adapter", "copy", "cached")


def loss_arguments(loss: str, **options: float | None) -> dict[str, float]:
    """The options that are set, for ``fastpo.losses``' function of that name.

    Raises:
        ConfigError: there is no such loss, or it does not know an option.

    Example:
        >>> loss_arguments("dpo", beta=0.2, gamma=None)
        {'beta': 0.2}
    """
    if loss not in LOSSES:
        raise ConfigError(f"loss: expected one of {', '.join(LOSSES)}, got {loss!r}.")
    known = inspect.signature(getattr(losses, loss)).parameters
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in known:
            raise ConfigError(f"{name}: the loss {loss} has no such option; leave it out.")
    return given


class DPOTrainer(StatisticTrainer):
    """``transformers.Trainer`` on preference pairs, with the fused log-probs of fastpo.

    Chosen and rejected sequences go through the model in one forward. Beside the loss it logs, per
    pair: ``rewards/chosen``, ``rewards/rejected``, ``rewards/margins``, ``rewards/accuracies`` (the
    loss's implicit rewards), and ``logps/margins`` (nats) and ``logps/accuracies`` (share of pairs
    whose chosen completion has the higher summed log-prob under the policy alone).

    Args:
        model: a causal LM, or a ``PeftModel`` around one.
        args: training arguments; the batch size counts pairs.
        loss: one of ``dpo``, ``ipo``, ``hinge``, ``simpo``, ``orpo``.
        loss_options: of the function in ``fastpo.losses``, such as ``beta``.
        reference: ``adapter`` (the model with its adapter disabled), ``copy`` (a frozen copy of the
            model as it is now), or ``cached`` (column ``ref_logprobs`` of the datasets). None is
            ``adapter`` for a PeftModel, else ``copy``. Losses without a reference ignore it.
        **kwargs: of ``transformers.Trainer``; ``data_collator`` is a
            :class:`fastpo.data.tokens.PairCollator`.

    Raises:
        ConfigError: an option does not fit the loss or the model.
    """

    # A mean over pairs: the Trainer divides it by the accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: torch.nn.Module,
        args: TrainingArguments,
        *,
        loss: str = "dpo",
        loss_options: dict[str, float] | None = None,
        reference: str | None = None,
        **kwargs: Any,
    ):
        self.loss_options = loss_arguments(loss, **(loss_options or {}))
        self.loss_name = loss
        has_adapter = hasattr(model, "disable_adapter")
        reference = reference or ("adapter" if has_adapter else "copy")
        if reference not in REFERENCES:
            expected = ", ".join(REFERENCES)
            raise ConfigError(f"reference: expected one of {expected}, got {reference!r}.")
        if reference == "adapter" and not has_adapter:
            raise ConfigError(
                "reference: 'adapter' needs a LoRA; set lora_r, or use copy or cached."
            )
        super().__init__(model, args, compute_metrics=_evaluation_metrics, **kwargs)
        self.model_accepts_loss_kwargs = False
        self.reference = None if loss in REFERENCE_FREE else reference
        self.ref_model = None
        if self.reference == "copy":
            frozen = copy.deepcopy(self.model).requires_grad_(False).eval()
            self.ref_model = self.accelerator.prepare_model(frozen, evaluation_mode=True)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Loss of a :class:`fastpo.data.tokens.PairCollator` batch; outputs are [P, 4] values."""
        mask = shift_labels(inputs["labels"]) >= 0
        policy = sum_logprobs(model, inputs, mask).chunk(2)
        if self.reference is None:
            others = sequence_counts(mask).chunk(2)
        else:
            others = self.reference_logprobs(model, inputs, mask)
        loss_function = getattr(losses, self.loss_name)
        out = loss_function(*policy, *others, **self._length_options(mask), **self.loss_options)
        values_P4 = torch.stack([*policy, out.chosen_rewards, out.rejected_rewards], 1).detach()
        if model.training:
            self.record(inputs, out.loss, pair_metrics(values_P4))
        return (out.loss, values_P4) if return_outputs else out.loss

    def _length_options(self, mask: Tensor) -> dict[str, Tensor]:
        """IPO averages over the tokens of a completion."""
        if self.loss_name != "ipo":
            return {}
        chosen_counts_P, rejected_counts_P = sequence_counts(mask).chunk(2)
        return {"chosen_counts": chosen_counts_P, "rejected_counts": rejected_counts_P}

    @torch.no_grad()
    def reference_logprobs(self, model, inputs, mask: Tensor) -> tuple[Tensor, ...]:
        """Summed log-probs [P] of chosen and rejected under the reference, in nats."""
        if self.reference == "cached":
            return inputs["ref_logprobs"].unbind(1)
        if self.reference == "copy":
            return sum_logprobs(self.ref_model, inputs, mask).chunk(2)
        with self.initial_model(model):
            return sum_logprobs(model, inputs, mask).chunk(2)

    @contextlib.contextmanager
    def initial_model(self, model):
        """The model as a reference: without its adapter, if it has one, and without dropout."""
        unwrapped, was_training = self.accelerator.unwrap_model(model), model.training
        has_adapter = hasattr(unwrapped, "disable_adapter")
        model.eval()
        try:
            with unwrapped.disable_adapter() if has_adapter else contextlib.nullcontext():
                yield model
        finally:
            model.train(was_training)

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Loss [], values [P, 4] and row indices [P] of an evaluation batch."""
        inputs = self._prepare_inputs(inputs)
        loss, values_P4 = self.compute_loss(model, inputs, return_outputs=True)
        return loss, values_P4, inputs["index"]


def sum_logprobs(model: torch.nn.Module, inputs: dict[str, Tensor], mask: Tensor) -> Tensor:
    """Log-probs of the completions [2 P], in nats, through the (wrapped) model's forward."""
    names = ("input_ids", "attention_mask", "labels")
    logprobs_BT = model(**{name: inputs[name] for name in names}, statistic="logprobs")
    return sequence_sums(logprobs_BT, mask=mask)


def pair_metrics(values_P4: Tensor) -> dict[str, Tensor]:
    """Means over pairs, from log-probs and rewards (chosen, rejected of each); 0-d each."""
    chosen_P, rejected_P, chosen_reward_P, rejected_reward_P = values_P4.unbind(1)
    return {
        "logps/margins": (chosen_P - rejected_P).mean(),
        "logps/accuracies": (chosen_P > rejected_P).float().mean(),
        "rewards/chosen": chosen_reward_P.mean(),
        "rewards/rejected": rejected_reward_P.mean(),
        "rewards/margins": (chosen_reward_P - rejected_reward_P).mean(),
        "rewards/accuracies": (chosen_reward_P > rejected_reward_P).float().mean(),
    }


def _evaluation_metrics(prediction: Any) -> dict[str, float]:
    metrics = pair_metrics(torch.as_tensor(prediction.predictions))
    return {name: value.item() for name, value in metrics.items()}
