"""Fitting a model to completions, the step before preference training."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainingArguments

from fastpo.data.tokens import IGNORED
from fastpo.trainers.base import StatisticTrainer


class SFTTrainer(StatisticTrainer):
    """``transformers.Trainer`` on completions: mean NLL per completion token, without logits.

    The mean is over all tokens of an optimiser step, across accumulated batches and ranks. Where a
    mixture of experts has a router loss, its weighted mean over these batches is added.

    Args:
        model: a causal LM, or a ``PeftModel`` around one.
        args: training arguments.
        **kwargs: of ``transformers.Trainer``; ``data_collator`` is a
            :class:`fastpo.data.tokens.CompletionCollator`.
    """

    # The loss is divided by the tokens of the whole step, below.
    loss_is_scaled_for_ga = True

    def __init__(self, model: torch.nn.Module, args: TrainingArguments, **kwargs: Any):
        super().__init__(model, args, **kwargs)
        self.model_accepts_loss_kwargs = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Summed NLL over ``num_items_in_batch`` tokens, nats."""
        nll_sum, router_loss = self.policy_statistic(model, inputs, "nll_sum")
        if num_items_in_batch is None:
            num_items_in_batch = (inputs["labels"][:, 1:] != IGNORED).sum().clamp(min=1)
        else:
            router_loss = router_loss / self.current_gradient_accumulation_steps
            if self.args.average_tokens_across_devices:
                # The count is over all ranks, and gradients are averaged over them.
                nll_sum = nll_sum * self.accelerator.num_processes
        loss = nll_sum / num_items_in_batch + router_loss
        if model.training:
            self.record(inputs, loss, {})
        return (loss, (loss,)) if return_outputs else loss

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Mean NLL [] of an evaluation batch."""
        inputs = self._prepare_inputs(inputs)
        return self.compute_loss(model, inputs), None, None
