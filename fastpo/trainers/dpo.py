"""Training on pairs by any loss over pairs of ``fastpo.losses``, with one Trainer."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from fastpo import losses
from fastpo.inputs import Input, inputs_of, plain
from fastpo.losses import LossOutput
from fastpo.sequences import sequence_counts, sequence_sums
from fastpo.trainers.base import StatisticTrainer, accuracy, statistic
from fastpo.trainers.head import Reference, shift_labels
from fastpo.trainers.options import ConfigError, typed, value_hints

Loss = str | Callable[..., LossOutput]

# What losses call the statistics of the responses of a row: chosen, rejected, and a further one.
POLICY = ("policy_chosen", "policy_rejected", "extra")
REFERENCE = ("ref_chosen", "ref_rejected", "ref_extra")
COUNTS = ("chosen_counts", "rejected_counts", "extra_counts")
# Sums over tokens of KL(reference || policy) over the whole vocabulary.
KLS = ("kl_chosen", "kl_rejected", "kl_extra")
# Those that rows of a prompt, a chosen and a rejected completion give.
SUMS = tuple(names[i] for names in (POLICY, REFERENCE, COUNTS, KLS) for i in range(2))
# What is computed here from the model, whatever columns of that name say.
COMPUTED = {*POLICY, *COUNTS, *KLS}
REFERENCES = ("adapter", "copy", "cached")
_SUBCLASS = "call the loss in pair_loss of a subclass of fastpo.trainers.dpo.DPOTrainer"


def loss_function(loss: Loss) -> Callable[..., LossOutput]:
    """The loss of that name, or the function itself; its arguments are named as those of fastpo.

    Raises:
        ConfigError: ``fastpo.losses`` has no such loss over pairs.
    """
    if callable(loss):
        return loss
    if loss not in pair_losses():
        more = [name for name in pair_losses() if name not in LOSSES and columns_of(name)]
        expected = f"one of {', '.join(LOSSES)}, or with further columns {', '.join(more)}"
        raise ConfigError(f"loss: expected {expected}; got {loss!r}.")
    return getattr(losses, loss)


@cache
def pair_losses() -> tuple[str, ...]:
    """Names of the losses over pairs in ``fastpo.losses``, those that need a subclass included."""
    return tuple(
        name
        for name in losses.__all__
        if {"policy_chosen", "policy_rejected"} <= inputs_of(getattr(losses, name)).keys()
    )


def columns_of(loss: Loss) -> set[str]:
    """Names of the columns that rows may bring for a loss; none where columns cannot do.

    ``extra_ids``, token ids of a further response, is one of them where the loss takes ``extra``.

    Example:
        >>> sorted(columns_of("inpo"))
        ['history_chosen', 'history_rejected', 'ref_chosen', 'ref_rejected']
        >>> columns_of("ofs_dpo")
        set()
    """
    inputs = inputs_of(loss_function(loss))
    columns = _constants(inputs)
    if _refusal(inputs, columns | COMPUTED):
        return set()
    return columns | ({"extra_ids"} if "extra" in inputs else set())


def _constants(inputs: Mapping[str, Input]) -> set[str]:
    """Inputs that are constants of a row; counts of tokens belong to the sums over them."""
    constants = {name for name, x in inputs.items() if not x.is_trained} - COMPUTED
    return {name for name in constants if not name.endswith("_counts")}


def columns_given(loss: Loss, batch: dict[str, Tensor]) -> dict[str, Any]:
    """The columns of a batch that a loss takes: numbers [P], or for lists a tuple of [P].

    Raises:
        ConfigError: one stands where the method has something that is trained, or has another form.
    """
    inputs, given = inputs_of(loss_function(loss)), {}
    constants = _constants(inputs)
    for name in inputs.keys() & batch.keys() - COMPUTED:
        is_sequence, values = inputs[name].is_sequence, batch[name]
        if name not in constants:
            problem = f"{name} is trained in {_name(loss)}, a column of numbers is not"
            raise ConfigError(f"{name}: {problem}. Leave it out: {_SUBCLASS}.")
        if values.ndim > 1 and not is_sequence:
            shape = list(values.shape)
            raise ConfigError(f"{name}: expected a column of a number per pair, got {shape}.")
        given[name] = values
        if is_sequence:
            given[name] = values.unbind(1) if values.ndim > 1 else (values,)
    return given


def _refusal(inputs: Mapping[str, Input], available: set[str]) -> str:
    """What a loss needs and does not have, and how to give it; empty if nothing is missing."""
    for name, x in inputs.items():
        if x.over:
            problem = f"{name} over {x.over}, here it is over the whole response to its prompt"
            return f"{problem}. To train with it {_SUBCLASS}"
        if name in available or not (x.is_required or x.is_essential):
            continue
        makes = f"{name}, which makes the method" if x.is_essential else name
        if x.is_trained and name not in POLICY:
            return f"{makes}. It is trained and not computed here: {_SUBCLASS}"
        if name in ("extra", "extra_counts", "ref_extra"):
            return f"{makes}. Give the rows a column extra, a further response to each prompt"
        if name in REFERENCE:
            return f"{makes}. Set reference, or give the rows a column {name} of log-probs"
        kind = "a list" if x.is_sequence else "a number"
        return f"{makes}. Give the rows a column {name}, {kind} per pair"
    return ""


def require_inputs(loss: Loss, available: Iterable[str]) -> None:
    """Whether ``available`` holds every tensor that a loss cannot do without.

    Raises:
        ConfigError: it does not; the message says how to give the one that is missing. Also where
            the method takes something else than the log-probs of whole responses.

    Example:
        >>> require_inputs("simpo", SUMS)
    """
    problem = _refusal(inputs_of(loss_function(loss)), set(available))
    if problem:
        raise ConfigError(f"loss: {_name(loss)} needs {problem}.")


def _name(loss: Loss) -> str:
    return loss if isinstance(loss, str) else getattr(loss, "__name__", str(loss))


# Names of the losses that pairs alone are enough for.
LOSSES = tuple(
    name for name in pair_losses() if not _refusal(inputs_of(getattr(losses, name)), {*SUMS})
)


def loss_arguments(loss: Loss, /, **options: Any) -> dict[str, Any]:
    """The options that are set, for ``fastpo.losses``' function of that name.

    Raises:
        ConfigError: there is no such loss, it does not know an option, or needs one more.

    Example:
        >>> loss_arguments("dpo", beta=0.2, gamma=None)
        {'beta': 0.2}
    """
    function = loss_function(loss)
    known = inspect.signature(function).parameters
    given = {name: value for name, value in options.items() if value is not None}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in known.values())
    hints = (dict.fromkeys(given, Any) if takes_any else {}) | value_hints(function)
    given = typed(given, hints, of=f"the loss {loss}")
    for name in known.keys() - inputs_of(function).keys() - given.keys():
        parameter = known[name]
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
            remedy = f"Give it in loss_options (--loss-options {name}=...)."
            raise ConfigError(f"{name}: the loss {loss} needs it and has no default. {remedy}")
    return given


class DPOTrainer(StatisticTrainer):
    """``transformers.Trainer`` on preference pairs, with the fused log-probs of fastpo.

    Chosen and rejected sequences go through the model in one forward. Beside the loss it logs, per
    pair: ``rewards/chosen``, ``rewards/rejected``, ``rewards/margins``, ``rewards/accuracies`` (the
    loss's implicit rewards), and ``logps/margins`` (nats) and ``logps/accuracies`` (share of pairs
    whose chosen completion has the higher summed log-prob under the policy alone), and the metrics
    of the loss. In an accuracy a tie counts half, where TRL counts it as 0.

    The loss gets, by its arguments' names: summed log-probs and token counts of the responses, and
    every column of the rows that is named as one of its arguments (:func:`columns_of`): ``label``,
    ``chosen_scores``, ``ref_chosen``, ``history_chosen`` (a list per pair), and so on. ``extra``
    and ``ref_extra`` are log-probs of ``extra_ids``, a further response; ``kl_chosen`` and
    ``kl_rejected`` are sums over tokens of KL(reference || policy) over the vocabulary, computed
    for the losses that take them. Other arguments that are marked as trained, or as of something
    else than whole responses (:mod:`fastpo.inputs`), are for subclasses to compute.

    Args:
        model: a causal LM, or a ``PeftModel`` around one.
        args: training arguments; the batch size counts pairs.
        loss: name of a loss over pairs in ``fastpo.losses``, or a function with such arguments.
        loss_options: of this function, such as ``beta``.
        reference: ``adapter`` (the model with the adapter that trains disabled), ``copy`` (a frozen
            copy of the model as it is now), or ``cached`` (columns ``ref_chosen`` and
            ``ref_rejected`` of the datasets). None is ``adapter`` for a PeftModel which is the
            model as it is now without that adapter and of which nothing else trains, else
            ``copy``. Losses without a reference ignore it.
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
        loss: Loss = "dpo",
        loss_options: dict[str, Any] | None = None,
        reference: str | None = None,
        **kwargs: Any,
    ):
        self.loss = loss
        self.loss_options = loss_arguments(loss, **(loss_options or {}))
        self.loss_inputs = inputs_of(loss_function(loss)).keys()
        if reference not in (None, *REFERENCES):
            expected = ", ".join(REFERENCES)
            raise ConfigError(f"reference: expected one of {expected}, got {reference!r}.")
        super().__init__(model, args, compute_metrics=_evaluation_metrics, **kwargs)
        self.model_accepts_loss_kwargs = False
        plainer = plain(loss_function(loss), self.loss_options)
        if plainer and self.is_world_process_zero():
            print(f"loss: {_name(loss)} with these options is {plainer}", flush=True)
        needs_reference = bool(self.loss_inputs & {*REFERENCE, *KLS})
        self.reference = self.choose_reference(reference) if needs_reference else None
        self.needs_kl = bool(self.loss_inputs & set(KLS))
        if self.needs_kl and reference == "cached":
            remedy = "Use adapter or copy: stored log-probs are of single tokens."
            raise ConfigError(f"reference: the loss {loss} needs the whole vocabulary's. {remedy}")
        self.ref_model = None
        if self.reference == "copy":
            frozen = copy.deepcopy(self.model).requires_grad_(False).eval()
            self.ref_model = self.accelerator.prepare_model(frozen, evaluation_mode=True)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Loss of a :class:`fastpo.data.tokens.PairCollator` batch; outputs are [P, 4] values."""
        mask = shift_labels(inputs["labels"]) >= 0
        responses = len(mask) // len(inputs["index"])
        given = columns_given(self.loss, inputs)
        given |= zip(COUNTS, sequence_counts(mask).chunk(responses), strict=False)
        reference = None
        if self.reference in ("adapter", "copy"):
            ref_sums, reference = self.reference_statistics(model, inputs, mask)
            given |= zip(REFERENCE, ref_sums.chunk(responses), strict=False)
        if self.needs_kl:
            both, router_loss = self.policy_statistic(
                model, inputs, "logprobs_and_kl", reference=reference
            )
            sums, kls = (sequence_sums(x_BT, mask=mask).chunk(responses) for x_BT in both)
            given |= zip(KLS, kls, strict=False)
        else:
            logprobs_BT, router_loss = self.policy_statistic(model, inputs, "logprobs")
            sums = sequence_sums(logprobs_BT, mask=mask).chunk(responses)
        given |= zip(POLICY, sums, strict=False)
        out = self.pair_loss(given, inputs)
        loss = out.loss + router_loss
        values_P4 = torch.stack([*sums[:2], out.chosen_rewards, out.rejected_rewards], 1).detach()
        if model.training:
            own = {name: value.float().mean() for name, value in out.metrics.items()}
            own |= {"router_loss": router_loss} if self.router_weight else {}
            self.record(inputs, loss, pair_metrics(values_P4) | own)
        return (loss, values_P4) if return_outputs else loss

    def pair_loss(self, given: dict[str, Any], inputs: dict[str, Tensor]) -> LossOutput:
        """The loss of a batch; where a subclass adds inputs that depend on it, such as its state.

        Args:
            given: tensors by the names of the loss's arguments, and some that it has no use for.
            inputs: the batch.
        """
        # An empty list of histories is none.
        require_inputs(self.loss, (name for name, value in given.items() if value != ()))
        tensors = {name: given[name] for name in self.loss_inputs & given.keys()}
        return loss_function(self.loss)(**tensors, **self.loss_options)

    @torch.no_grad()
    def reference_statistics(self, model, inputs, mask: Tensor) -> tuple[Tensor, Reference | None]:
        """Summed log-probs [R P] under the reference, in nats, and what a KL to it needs."""
        is_copy = self.reference == "copy"
        with (
            contextlib.nullcontext(self.ref_model) if is_copy else self.initial_model(model) as ref
        ):
            if not self.needs_kl:
                return sum_logprobs(ref, inputs, mask), None
            logprobs_BT, reference = statistic(ref, inputs, "reference")
            return sequence_sums(logprobs_BT, mask=mask), reference

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Loss [], values [P, 4] and row indices [P] of an evaluation batch."""
        inputs = self._prepare_inputs(inputs)
        loss, values_P4 = self.compute_loss(model, inputs, return_outputs=True)
        return loss, values_P4, inputs["index"]


def sum_logprobs(model: torch.nn.Module, inputs: dict[str, Tensor], mask: Tensor) -> Tensor:
    """Log-probs of the completions [R P], in nats."""
    return sequence_sums(statistic(model, inputs, "logprobs"), mask=mask)


def pair_metrics(values_P4: Tensor) -> dict[str, Tensor]:
    """Means over pairs, from log-probs and rewards (chosen, rejected of each); 0-d each."""
    chosen_P, rejected_P, chosen_reward_P, rejected_reward_P = values_P4.unbind(1)
    return {
        "logps/margins": (chosen_P - rejected_P).mean(),
        "logps/accuracies": accuracy(chosen_P, rejected_P).mean(),
        "rewards/chosen": chosen_reward_P.mean(),
        "rewards/rejected": rejected_reward_P.mean(),
        "rewards/margins": (chosen_reward_P - rejected_reward_P).mean(),
        "rewards/accuracies": accuracy(chosen_reward_P, rejected_reward_P).mean(),
    }


def _evaluation_metrics(prediction: Any) -> dict[str, float]:
    metrics = pair_metrics(torch.as_tensor(prediction.predictions))
    return {name: value.item() for name, value in metrics.items()}
