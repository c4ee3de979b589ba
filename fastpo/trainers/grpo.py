"""Training on groups of scored completions: any group advantage with any policy loss."""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from fastpo import advantages, surrogates
from fastpo.data.tokens import IGNORED
from fastpo.inputs import inputs_of
from fastpo.sequences import sequence_sums
from fastpo.trainers.base import StatisticTrainer, statistic
from fastpo.trainers.config import ConfigError
from fastpo.trainers.grpo_batches import Batch, GenerationOrder, GroupCollator, WholeGenerations
from fastpo.trainers.grpo_rewards import RewardError
from fastpo.trainers.grpo_rollouts import Group, Rollout
from fastpo.trainers.head import shift_labels
from fastpo.trainers.sampling import seed_of

BEHAVIOURS = ("policy", "initial")
# Totals of a batch, which say nothing when averaged with those of other batches.
_TOTALS = ("loss", "policy_loss", "tokens", "entropy_tokens")
# What is known of every completion, by the names of the advantages' inputs.
_KNOWN = {"lengths", "difficulty_rewards", "kl"}
# Metrics of the ratio of policy to old policy, which is 1 where these are the same.
_OF_RATIO = ("ratio/", "clip_ratio/", "approx_kl")


class GRPOTrainer(StatisticTrainer):
    """``transformers.Trainer`` on groups of completions, with the fused log-probs of fastpo.

    A generation is ``steps_per_generation`` optimiser steps worth of prompts, whose completions
    are made (or read) at its first step, with their advantages and the log-probs that stay as they
    are. Every prompt's completions stay on one rank and in one batch. Means over tokens and over
    sequences are over all batches and ranks of an optimiser step; the entropy bonus takes the mean
    of the batches' means, weighted by their completions.

    Beside the loss it logs ``rewards/mean``, ``rewards/std`` (inside groups), ``rewards/missing``
    (share of completions without a score), ``groups/equal`` (share of groups in which no completion
    is better than another), ``completions/length``, ``completions/truncated``, and the metrics of
    the loss.

    Args:
        model: a causal LM, or a ``PeftModel`` around one.
        args: training arguments; the batch size counts prompts.
        rollout: gives groups; its length is the number of prompts. Such as
            :class:`fastpo.trainers.grpo_rollouts.SampledGroups`.
        pad_id: padding token.
        loss: a method of ``fastpo.surrogates.policy_loss``.
        loss_options: further arguments of it, such as ``beta`` and ``clip_high``.
        advantage: a method of ``fastpo.group_advantages``. It is given what is known of every
            completion, by its arguments' names: ``lengths`` (tokens that the loss counts),
            ``difficulty_rewards`` (of the first reward function), ``kl`` (summed log-ratio of the
            policy to the reference), ``reward_weights``.
        advantage_options: further arguments of it. ``beta`` of a method that takes ``kl``, such as
            rloo, weighs the KL in the reward; 0 leaves it out, and the reference with it.
        reference: ``adapter`` (the model with the adapter that trains disabled) or ``copy`` (a
            frozen copy of the model as it is now), made only if needed. None is ``adapter`` for a
            PeftModel which is the model as it is now without that adapter and of which nothing
            else trains, else ``copy``.
        behaviour: who wrote the completions, whose log-probs are the old ones: ``policy``, the
            model as it is at the generation, or ``initial``, the reference.
        steps_per_generation: optimiser steps that share the prompts of a generation out.
        num_iterations: times that each generation is trained on.
        temperature: of sampling; divides the logits.
        mask_truncated: leave completions that were cut before their end out of the loss.
        filter_groups: leave out groups of equal rewards, whose tokens then count nowhere.
        forward_rows: completions per forward at most; 0 for all of a batch at once.
        eval_rollout: gives groups of held-out prompts, whose mean reward ``evaluate`` reports.
        **kwargs: of ``transformers.Trainer``.

    Raises:
        ConfigError: an option is unknown or out of range, or needs what is not computed here.
    """

    # Losses are divided by what the whole step has, below.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: torch.nn.Module,
        args: TrainingArguments,
        *,
        rollout: Rollout,
        pad_id: int,
        loss: str = "dapo",
        loss_options: dict[str, Any] | None = None,
        advantage: str = "grpo",
        advantage_options: dict[str, Any] | None = None,
        reference: str | None = None,
        behaviour: str = "policy",
        steps_per_generation: int = 1,
        num_iterations: int = 1,
        temperature: float = 1.0,
        mask_truncated: bool = False,
        filter_groups: bool = False,
        forward_rows: int = 0,
        eval_rollout: Rollout | None = None,
        **kwargs: Any,
    ):
        self.rollout, self.eval_rollout, self.behaviour = rollout, eval_rollout, behaviour
        self.loss_options = {"method": loss, **(loss_options or {})}
        self.advantage_options = {"method": advantage, **(advantage_options or {})}
        self.steps_per_generation, self.num_iterations = steps_per_generation, num_iterations
        self.forward_rows, self.temperature = forward_rows, temperature
        self.has_kl = bool(self.loss_options.get("beta"))
        self.has_entropy = bool(self.loss_options.get("entropy_coef"))
        self.collate = GroupCollator(pad_id, mask_truncated, filter_groups)
        self.advantage_inputs = self._advantage_inputs()
        self._check_options()
        args.average_tokens_across_devices = True
        kwargs |= {"train_dataset": range(len(rollout)), "data_collator": torch.tensor}
        if eval_rollout is not None:
            kwargs["eval_dataset"] = range(len(eval_rollout))
        super().__init__(model, args, **kwargs)
        self.model_accepts_loss_kwargs = True
        self.add_callback(WholeGenerations(self.period))
        self.ref_model = self._reference(reference)
        self._generation: list[Batch] = []

    @property
    def period(self) -> int:
        """Optimiser steps from one generation to the next."""
        return self.steps_per_generation * self.num_iterations

    def _check_options(self) -> None:
        names = ("steps_per_generation", "num_iterations")
        for name, least in (*((name, 1) for name in names), ("forward_rows", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: expected {least} or more, got {getattr(self, name)}.")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"temperature: expected a number above 0, got {self.temperature}.")
        if self.behaviour not in BEHAVIOURS:
            expected = ", ".join(BEHAVIOURS)
            raise ConfigError(f"behaviour: expected one of {expected}, got {self.behaviour!r}.")
        known = _KNOWN & self.advantage_options.keys()
        if known:
            name = min(known)
            raise ConfigError(
                f"advantage_options: {name} is known of each completion; leave it out."
            )
        # Tried on two tokens: unknown names and what is missing show here, not after sampling.
        tokens_BT = torch.zeros(2, 1)
        entropy = tokens_BT if self.has_entropy else None
        given = {"ref_logprobs": tokens_BT} if self.has_kl else {}
        try:
            size = max(getattr(self.rollout, "samples", 64), 2)
            ends = self.advantage_options.get("reward_range", (0.0, 1.0))
            rewards = [float(ends[k % 2]) for k in range(size)]
            weights = self.advantage_options.get("reward_weights") or [1.0]
            parts = [[reward] * len(weights) for reward in rewards]
            group = Group(0, [0], [[0]] * size, rewards, parts, [False] * size)
            advantages_N = torch.cat(self._advantages([group], [0.0] * size, None))[:2]
            surrogates.policy_loss(
                tokens_BT, advantages_N, old_logprobs=tokens_BT, sampler_logprobs=tokens_BT,
                entropy=entropy, **given, **self.loss_options,
            )  # fmt: skip
        except (TypeError, ValueError) as error:
            remedy = "Look at loss, loss_options, advantage and advantage_options."
            raise ConfigError(f"loss or advantage: {error} {remedy}") from error

    def _reference(self, reference: str | None) -> torch.nn.Module | None:
        if reference not in (None, "adapter", "copy"):
            raise ConfigError(f"reference: expected adapter or copy, got {reference!r}.")
        is_used = self.has_kl or self.behaviour == "initial" or "kl" in self.advantage_inputs
        if not is_used or self.choose_reference(reference) == "adapter":
            return None
        frozen = copy.deepcopy(self.model).requires_grad_(False).eval()
        return self.accelerator.prepare_model(frozen, evaluation_mode=True)

    def _get_train_sampler(self, train_dataset=None) -> GenerationOrder:
        prompts, steps = len(self.rollout), self.steps_per_generation
        step_size = self.get_total_train_batch_size(self.args)
        if prompts < step_size * steps:
            problem = f"a generation takes {step_size * steps} prompts, there are {prompts}"
            remedy = "Lower batch_size, accumulation or steps_per_generation, or give more."
            raise ConfigError(f"training: {problem}. {remedy}")
        per_epoch = prompts // (step_size * steps) * self.period
        epoch = lambda: self.state.global_step // per_epoch
        size = step_size * steps
        return GenerationOrder(prompts, size, self.num_iterations, self.args.seed, epoch)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of an optimiser step; at the first one of a generation all are made."""
        place = self.state.global_step % self.period
        if place == 0:
            # The later iterations have the same places again.
            indices = [next(epoch_iterator).tolist() for _ in range(num_batches * self.period)]
            self._generation = self._generate(indices[: num_batches * self.steps_per_generation])
        start = place % self.steps_per_generation * num_batches
        batches = [dict(b) for b in self._generation[start : start + num_batches]]
        rows = sum(b["kept"] for b in batches)
        # Means over sequences skip those without tokens only if the aggregation says so.
        filled = sum((b["labels"] != IGNORED).any(1).sum() for b in batches)
        all_rows, all_filled = self.sum_over_ranks(rows, filled).long()
        for batch in batches:
            batch |= {"rows": rows, "all_rows": all_rows, "all_filled": all_filled}
        return batches, self._get_num_items_in_batch(batches, device)

    def _generate(self, indices: list[list[int]]) -> list[Batch]:
        """Batches of a generation on this rank, one per list of places."""
        every = [i for index in indices for i in index]
        seed = seed_of(self.args.seed, "generation", self.state.global_step)
        groups = iter(self._roll_out(self.rollout, every, seed))
        parts = [[next(groups) for _ in index] for index in indices]
        ranks = torch.distributed.group.WORLD if self.args.world_size > 1 else None
        flat = [group for part in parts for group in part]
        kl = self._kl(flat) if "kl" in self.advantage_inputs else []
        per_group = iter(self._advantages(flat, kl, ranks))
        batches = []
        for part in parts:
            batch = self.collate(part, [next(per_group) for _ in part])
            batches.append(self._with_constants(self._prepare_inputs(batch)))
        return batches

    def _roll_out(self, rollout: Rollout, index: list[int], seed: int) -> list[Group]:
        """Groups of a rollout, which fails on all ranks if it does on one: none is left waiting."""
        groups, failure = [], None
        if hasattr(rollout, "trainer_state"):
            rollout.trainer_state = self.state
        try:
            groups = rollout(self.model, index, seed) if index else groups
        except Exception as error:
            failure = error
        failures = self.sum_over_ranks(failure is not None)
        if failure is not None:
            raise failure
        if failures > 0:
            raise RewardError("rollout: failed on another rank, whose message says why.")
        return groups

    def _advantage_inputs(self) -> set[str]:
        """Names of the advantage's inputs that are known here and that it reads."""
        method = advantages.METHODS.get(self.advantage_options["method"])
        if method is None:
            return set()  # It is refused by that name.
        options, inputs = self.advantage_options, inputs_of(method)
        if "reward_weights" in inputs and hasattr(self.rollout, "rewards"):
            options.setdefault("reward_weights", self.rollout.rewards.weights)
        read = {name for name in _KNOWN & inputs.keys() if inputs[name].is_read(options)}
        if "kl" in read:
            # What the reference wrote has none.
            beta = options.get("beta", inspect.signature(method).parameters["beta"].default)
            read -= {"kl"} if self.behaviour == "initial" or not beta else set()
        return read

    def _advantages(self, groups: list[Group], kl: list[float], ranks: Any) -> list[Tensor]:
        """Advantages [K] of each group; methods that look at the whole batch see all ranks'.

        ``kl`` is of each completion, of :meth:`_kl`.
        """
        device = self.args.device if ranks else None
        tensor = lambda values: torch.tensor(values, dtype=torch.float32, device=device)
        known = {
            "lengths": lambda: [n for group in groups for n in self.collate.lengths(group)],
            "difficulty_rewards": lambda: [parts[0] for g in groups for parts in g.components],
            "kl": lambda: kl,
        }
        options = self.advantage_options | {n: tensor(known[n]()) for n in self.advantage_inputs}
        method = advantages.METHODS.get(options["method"])
        takes_parts = method is not None and "reward_weights" in inputs_of(method)
        rewards = [group.components if takes_parts else group.rewards for group in groups]
        sizes = [len(group.ids) for group in groups]
        first = self.args.process_index * len(self.rollout) if ranks else 0
        ids_N = torch.repeat_interleave(
            torch.arange(first, first + len(groups)), torch.tensor(sizes)
        )
        advantages_N = advantages.group_advantages(
            tensor([reward for part in rewards for reward in part]),
            ids_N.to(device),
            process_group=ranks,
            **options,
        )
        return advantages_N.cpu().split(sizes)

    @torch.no_grad()
    def _kl(self, groups: list[Group]) -> list[float]:
        """Summed log-ratio of the policy to the reference, of each completion that it wrote."""
        collate, sums = GroupCollator(self.collate.pad_id), []
        for group in groups:
            batch = self._prepare_inputs(collate([group], [torch.zeros(len(group.ids))]))
            log_ratio_BT = self._policy_logprobs(batch) - self._reference_logprobs(batch)
            mask_BT = shift_labels(batch["labels"]) != IGNORED
            sums += sequence_sums(log_ratio_BT, mask=mask_BT).tolist()
        return sums

    def _policy_logprobs(self, batch: Batch) -> Tensor:
        was_training = self.model_wrapped.training
        self.model_wrapped.eval()
        logprobs_BT = self._logprobs(self.model_wrapped, batch)
        self.model_wrapped.train(was_training)
        return logprobs_BT

    def _reference_logprobs(self, batch: Batch) -> Tensor:
        if self.ref_model is not None:
            return self._logprobs(self.ref_model, batch)
        with self.initial_model(self.model_wrapped):
            return self._logprobs(self.model_wrapped, batch)

    @torch.no_grad()
    def _with_constants(self, batch: Batch) -> Batch:
        """The batch with log-probs of the old policy and of the reference, where needed."""
        is_initial = self.behaviour == "initial"
        if self.has_kl or is_initial:
            logprobs_BT = self._reference_logprobs(batch)
            batch |= {"ref_logprobs": logprobs_BT} if self.has_kl else {}
            batch |= {"old_logprobs": logprobs_BT} if is_initial else {}
        # In the only step on a generation the policy is the old one.
        if not is_initial and self.period > 1:
            batch["old_logprobs"] = self._policy_logprobs(batch)
        return batch

    def _logprobs(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        with self.compute_loss_context_manager():
            options = {"temperature": self.temperature}
            parts = [statistic(model, b, "logprobs", **options) for b in self._forwards(batch)]
        return torch.cat(parts).float()

    def _forwards(self, batch: Batch) -> list[Batch]:
        """The batch in pieces of ``forward_rows`` completions; what is not per row is in each.

        Beside it ``share``, how much of the batch's completions a piece holds.
        """
        rows = len(batch["labels"])
        size = self.forward_rows or rows
        is_row = lambda value: isinstance(value, Tensor) and value.ndim > 0
        pieces = (
            {name: v[i : i + size] if is_row(v) else v for name, v in batch.items()}
            for i in range(0, rows, size)
        )
        return [piece | {"share": len(piece["labels"]) / rows} for piece in pieces]

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forwards and backwards of a batch; gradients are reduced with the last one."""
        *first, last = self._forwards(inputs)
        loss = 0.0
        for part in first:
            with self.accelerator.no_sync(model):
                loss = loss + super().training_step(model, part, num_items_in_batch)
        return loss + super().training_step(model, last, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """This batch's share of the loss of an optimiser step."""
        entropy_BT, name = None, "logprobs_and_entropy" if self.has_entropy else "logprobs"
        logprobs_BT, router_loss = self.policy_statistic(
            model, inputs, name, temperature=self.temperature
        )
        if self.has_entropy:
            logprobs_BT, entropy_BT = logprobs_BT
        constants = ("old_logprobs", "ref_logprobs", "sampler_logprobs")
        method = surrogates.PRESETS[self.loss_options["method"]]
        aggregation = self.loss_options.get("aggregation") or method.aggregation
        skips_empty = aggregation.endswith("nonempty")
        out = surrogates.policy_loss(
            logprobs_BT,
            inputs["advantages"],
            shift_labels(inputs["labels"]) != IGNORED,
            **{key: inputs.get(key) for key in constants},
            entropy=entropy_BT,
            num_tokens=num_items_in_batch,
            num_sequences=inputs["all_filled" if skips_empty else "all_rows"],
            accumulation_steps=max(inputs["rows"] / len(inputs["labels"]), 1),
            world_size=self.accelerator.num_processes,
            **self.loss_options,
        )
        left_out = _TOTALS if "old_logprobs" in inputs else (*_TOTALS, *_OF_RATIO)
        metrics = {n: v.float() for n, v in out.metrics.items() if not n.startswith(left_out)}
        metrics |= {"router_loss": router_loss} if self.router_weight else {}
        # A mean over the batches of the step and their pieces, as the Trainer divides nothing.
        share = inputs.get("share", 1.0) / self.current_gradient_accumulation_steps
        loss = out.loss + share * router_loss
        self.record(inputs, loss, inputs["metrics"] | metrics)
        return (loss, out) if return_outputs else loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Mean reward of completions of the held-out prompts; the same seed each time.

        Beside ``rewards/mean`` the share of completions without a score, ``rewards/missing``.

        Raises:
            ConfigError: there is no ``eval_rollout``.
        """
        if self.eval_rollout is None:
            raise ConfigError("evaluate: there is no eval_rollout; give one to the trainer.")
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        index = list(range(rank, len(self.eval_rollout), ranks))
        groups = self._roll_out(self.eval_rollout, index, self.args.seed)
        rewards = [r for g in groups for r in g.rewards if not math.isnan(r)]
        missing = sum(g.missing_rewards for g in groups)
        sums = self.sum_over_ranks(sum(rewards), len(rewards), missing)
        total, count, missing = sums.tolist()
        metrics = {
            f"{metric_key_prefix}_rewards/mean": total / max(count, 1),
            f"{metric_key_prefix}_rewards/missing": missing / max(count + missing, 1),
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics
