"""What the trainers share: metrics without extra synchronisation, a stop at a non-finite loss."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from fastpo.diffusion._adapters import (
    active_adapters,
    adapters_switched,
    kept_adapters,
    merged_adapters,
    outside_adapters,
)
from fastpo.trainers.checkpoints import say, seal
from fastpo.trainers.config import ConfigError
from fastpo.trainers.head import add_logprob_head, probing, router_loss_weight


class NonFiniteLossError(RuntimeError):
    """The loss or its gradient became NaN or infinite; the message names the step and the rows."""


def statistic(model: torch.nn.Module, inputs: dict[str, Tensor], name: str, **more: Any) -> Any:
    """A statistic of :mod:`fastpo.trainers.head`, through the (wrapped) model's forward."""
    names = ("input_ids", "attention_mask", "labels")
    return model(**{n: inputs[n] for n in names}, statistic=name, **more)


def accuracy(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
    """Per pair 1 where chosen is above rejected, 1/2 where they are equal, else 0; float32 [P].

    A policy that is its own reference has the accuracy of a coin; TRL counts ties as 0.
    """
    above_P, not_below_P = chosen_P > rejected_P, chosen_P >= rejected_P
    return (above_P.float() + not_below_P.float()) / 2


class _LogBeforeSave(TrainerCallback):
    """A checkpoint is never written before the losses up to it were looked at."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= control.should_save

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_log |= control.should_save


class LogAtEnd(TrainerCallback):
    """The last losses are logged, and with that looked at, before the model is used."""

    def on_step_end(self, args, state, control, **kwargs):
        """The count is already that of the next step."""
        control.should_log |= state.global_step >= state.max_steps


@contextlib.contextmanager
def own_forward(model: torch.nn.Module) -> Iterator[None]:
    """Give the model its forward back, in whose place mixed precision puts one of its own.

    Not by accelerate's ``unwrap_model``, which would follow ``__wrapped__`` past the fused head.
    """
    before = vars(model).get("forward")
    try:
        yield
    finally:
        vars(model).pop("_original_forward", None)
        vars(model).pop("forward", None)
        if before is not None:
            model.forward = before


class StatisticTrainer(Trainer):
    """A Trainer whose model returns statistics; subclasses give ``compute_loss``.

    Losses and metrics stay on the device until the Trainer logs and synchronises anyway.

    Args:
        model: a causal LM; :func:`fastpo.trainers.head.add_logprob_head` is applied unless it was.
        args: training arguments. ``remove_unused_columns`` and ``logging_nan_inf_filter`` are
            switched off: the batch carries row numbers, and a NaN must be seen.
        **kwargs: of ``transformers.Trainer``.

    Attributes:
        router_weight: of the router loss of a mixture of experts, 0 without one.

    Raises:
        ValueError: several GPUs in one process (``nn.DataParallel``), whose replicas lose the head.
        ConfigError: an adapter trains that cannot: it is merged, or a learned prompt.
        HeadError: the output layer, or a part of the model's own loss, is of an unknown kind.
    """

    def __init__(self, model: torch.nn.Module, args: TrainingArguments, **kwargs: Any):
        if args.n_gpu > 1:
            remedy = "Start one process per GPU by `accelerate launch -m fastpo ...`."
            raise ValueError(f"nn.DataParallel over {args.n_gpu} GPUs is not supported. {remedy}")
        args.remove_unused_columns = False
        args.logging_nan_inf_filter = False
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        _check_adapters(model)
        add_logprob_head(base)
        self.router_weight = router_loss_weight(base)
        super().__init__(model=model, args=args, **kwargs)
        self.current_gradient_accumulation_steps = 1  # Until train() counts them.
        self._say_rounded_weights()
        self.add_callback(_LogBeforeSave())
        self._recent: list[tuple[int, Tensor, Tensor]] = []
        # Per metric the sum and the number of its values.
        self._sums: dict[str, Tensor] = {}
        # Digests of what the run is made of, kept in its checkpoints.
        self.inputs: dict[str, str] = {}

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.train``.

        Raises:
            ConfigError: not one step could be taken, as no batch is full and such are dropped.
            RuntimeError: it was evaluated before, on several ranks: accelerate would then train
                it without DistributedDataParallel, each rank by itself.
        """
        rows, batch = self.train_dataset, self.args.train_batch_size * self.args.world_size
        if self.args.dataloader_drop_last and hasattr(rows, "__len__") and len(rows) < batch:
            problem = f"it drops all batches, as one takes {batch} rows and there are {len(rows)}"
            raise ConfigError(
                f"dataloader_drop_last: {problem}. Leave it out, or lower batch_size."
            )
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        is_prepared = getattr(self.model, "_is_accelerate_prepared", False)
        if self.args.world_size > 1 and is_prepared and not is_sharded:
            remedy = "Set eval_on_start in the training arguments instead."
            raise RuntimeError(f"evaluate() was called before train() on several ranks. {remedy}")
        return super().train(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        # A pickle of objects, which nothing here reads.
        (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(missing_ok=True)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Sealed when all ranks have written their files; older ones go after that."""
        output = Path(self._get_output_dir(trial=trial))
        checkpoint = output / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(checkpoint, ignore_errors=True)  # of a save that was cut short
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            seal(checkpoint, self.inputs)
            rotate_checkpoints(
                output_dir=str(output),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()

    def _say_rounded_weights(self) -> None:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        half = [p for p in trained if p.dtype in (torch.bfloat16, torch.float16)]
        if half:
            kind = str(half[0].dtype).removeprefix("torch.")
            say(
                f"weights: {len(half)} of {len(trained)} trained tensors and their optimiser "
                f"states are {kind}, in which small updates are lost; float32 weights under bf16 "
                "mixed precision keep them"
            )

    def policy_statistic(
        self, model: torch.nn.Module, inputs: dict[str, Tensor], name: str, **more: Any
    ) -> tuple[Any, Tensor | float]:
        """A statistic of the policy, and the part of the loss that its routers add, 0.0 if none."""
        if not self.router_weight:
            return statistic(model, inputs, name, **more), 0.0
        found, router_loss = statistic(model, inputs, name, with_router_loss=True, **more)
        return found, self.router_weight * router_loss

    def choose_reference(self, reference: str | None) -> str:
        """``adapter`` or ``copy`` for None, so that the reference is the model as it is now.

        Args:
            reference: ``adapter``, the model without the adapter that trains (active ones that do
                not train stay); ``copy``, a frozen copy; another kind; or None.

        Returns:
            The kind. Without an adapter, or where the model without it would be another one, now or
            after some training, None becomes ``copy``, with a line that says why.

        Raises:
            ConfigError: ``adapter`` without an adapter, or where parameters outside it train.
        """
        if not hasattr(self.model, "disable_adapter"):
            if reference == "adapter":
                remedy = "set lora_r, or use copy or cached."
                raise ConfigError(f"reference: 'adapter' needs a LoRA; {remedy}")
            return reference or "copy"
        if reference not in (None, "adapter"):
            return reference
        drifting = self._drifting()
        if drifting and reference:
            raise ConfigError(f"reference: 'adapter' would drift: {drifting}. Use copy or cached.")
        differs = not drifting and self.differs_without_adapter()
        if differs:
            what = "the model without its adapter differs from the model as it is now"
            say(f"reference: {what}; the reference is {'the former' if reference else 'a copy'}")
        elif drifting:
            say(f"reference: a frozen copy, as the adapter switched off would drift: {drifting}")
        return reference or ("copy" if drifting or differs else "adapter")

    def _drifting(self) -> str:
        """What trains and stays in use with the adapter off, in words; empty if nothing does."""
        model = self.accelerator.unwrap_model(self.model)
        names = [name for name, p in outside_adapters(model).items() if p.requires_grad]
        return f"{len(names)} parameters outside it train, such as {names[0]}" if names else ""

    def differs_without_adapter(self) -> bool:
        """Whether the adapter that trains does anything: changes the log-probs of a few tokens.

        By more than two runs of the same model differ. Without an adapter it does not.
        """
        if not hasattr(self.model, "disable_adapter"):
            return False
        with probing(self.model) as ids_BT:
            values = lambda: self.model(input_ids=ids_BT, labels=ids_BT, statistic="logprobs")
            on_BT = values()
            with adapters_switched(self.model, kept_adapters(self.model)):
                off_BT, again_BT = values(), values()
        noise = (off_BT - again_BT).abs().max()
        return not bool((on_BT - off_BT).abs().max() <= 2 * noise)

    @contextlib.contextmanager
    def initial_model(self, model):
        """The model without the adapter that trains, and without dropout.

        Raises:
            ConfigError: parameters outside the adapter were made trainable since.
        """
        drifting = self._drifting()
        if drifting:
            raise ConfigError(f"reference: 'adapter' would drift: {drifting}. Use copy or cached.")
        unwrapped, was_training = self.accelerator.unwrap_model(model), model.training
        model.eval()
        try:
            with adapters_switched(unwrapped, kept_adapters(unwrapped)):
                yield model
        finally:
            model.train(was_training)

    def record(self, inputs: dict[str, Tensor], loss: Tensor, metrics: dict[str, Tensor]) -> None:
        """Note a training batch: its rows, its loss and its mean metrics (0-d each)."""
        self._recent.append((self.state.global_step + 1, inputs["row"], loss.detach()))
        for name, value in metrics.items():
            self.record_metric(name, value)

    def record_metric(self, name: str, value: Tensor) -> None:
        """Note a metric of a training batch, 0-d."""
        pair = torch.stack([value.detach().float(), torch.ones_like(value, dtype=torch.float32)])
        self._sums[name] = self._sums.get(name, 0) + pair

    def sum_over_ranks(self, *numbers: float | Tensor) -> Tensor:
        """[n] sums over the ranks.

        Every collective of the trainers goes through here: what a rank has, such as an empty list's
        sum, decides neither the type nor the shape that it sends.
        """
        device = self.args.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        vector = torch.stack([torch.as_tensor(x).detach().to(device, dtype) for x in numbers])
        return self.accelerator.reduce(vector, reduction="sum")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean of the metrics since the last log, over batches and ranks.

        Raises:
            NonFiniteLossError: the loss or the norm of the gradient is not finite.
        """
        if "loss" in logs:
            self._check_finite(logs)
            # Ranks may have other metrics, or no batch at all.
            names = sorted(set(gather_object(list(self._sums))))
            pairs = (self._sums.get(name, (0.0, 0.0)) for name in names)
            if names:
                totals = self.sum_over_ranks(*(x for pair in pairs for x in pair)).tolist()
                means = (total / count for total, count in zip(*[iter(totals)] * 2, strict=True))
                logs |= dict(zip(names, means, strict=True))
            self._recent, self._sums = [], {}
        super().log(logs, start_time)

    def _check_finite(self, logs: dict[str, float]) -> None:
        if math.isfinite(logs["loss"]):
            norm = logs.get("grad_norm", 0.0)
            # In float16 the loss scaler skips such steps by itself.
            if math.isfinite(norm) or self.args.fp16:
                return
            where = f"step {self.state.global_step}: the norm of the gradient is {norm}"
        else:
            where = f"step {self.state.global_step}: the loss is {logs['loss']}"
            for step, rows, loss in self._recent:
                if not bool(loss.isfinite()):
                    where = f"step {step}: the loss is {loss.item()}, on rows {rows.tolist()}"
                    break
            else:
                where += ", on another rank"
        raise NonFiniteLossError(
            f"{where} of the training data. Training stopped; nothing was saved since. Look at "
            "these rows, lower learning_rate, or train in bfloat16 or float32 rather than float16."
        )


def _check_adapters(model: torch.nn.Module) -> None:
    """Refuse adapters that would train by nothing, or whose prompts the statistics do not know."""
    merged = [name for name in merged_adapters(model) if name in active_adapters(model)]
    if merged:
        remedy = "Call unmerge_adapter(), or merge_and_unload() and train the whole model."
        raise ConfigError(f"model: the adapter {merged[0]} is merged and would not train. {remedy}")
    config = getattr(model, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        kind = type(config).__name__
        remedy = "Use an adapter of layers, such as LoRA."
        raise ConfigError(f"model: learned prompts ({kind}) are not supported. {remedy}")
