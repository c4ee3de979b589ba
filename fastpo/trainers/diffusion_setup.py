"""What a run on pairs of samples is put together from: the loss, the LoRA and the reference."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor

from fastpo.diffusion import losses, references
from fastpo.diffusion._adapters import adapter_tensors
from fastpo.losses import LossOutput
from fastpo.trainers.config import ConfigError
from fastpo.trainers.diffusion_config import DiffusionDPOConfig
from fastpo.trainers.lora import lora_config
from fastpo.trainers.options import given_once, near, typed, value_hints

POLICY = ("chosen_errors", "rejected_errors")
REFERENCE = ("ref_chosen_errors", "ref_rejected_errors")
# Over pairs of pairs, frames or steps: several errors per sample, where a run has one.
_SEVERAL = {"bide_dpo", "dense_dpo", "inversion_dpo"}


def pair_losses() -> dict[str, Callable[..., LossOutput]]:
    """The losses over pairs of ``fastpo.diffusion.losses`` of one error per sample, by name."""
    found = {name: getattr(losses, name) for name in losses.__all__ if name not in _SEVERAL}
    return {n: f for n, f in found.items() if {*POLICY} <= inspect.signature(f).parameters.keys()}


class PairLoss:
    """A loss over pairs with its options, which takes what it names of the tensors it is given.

    Args:
        name: of a loss of ``fastpo.diffusion.losses``.
        **options: of this loss; None stands for its default.

    Attributes:
        inputs: names of the tensors that it takes.

    Raises:
        ConfigError: there is no such loss, it does not know an option, or needs one more.

    Example:
        >>> loss = PairLoss("dpo", beta=2000.0)
        >>> errors = {name: torch.ones(2) for name in (*POLICY, *REFERENCE, "others")}
        >>> round(loss(errors).loss.item(), 4)
        0.6931
    """

    def __init__(self, name: str, **options: Any):
        known = pair_losses()
        if name not in known:
            raise ConfigError(f"loss: expected one of {', '.join(known)}, got {name!r}.")
        self.name, self.function = name, known[name]
        parameters = inspect.signature(self.function).parameters
        self.inputs = {n for n, p in parameters.items() if "Tensor" in str(p.annotation)}
        empty = inspect.Parameter.empty
        self.required = {n for n, p in parameters.items() if p.default is empty}
        self.options = {n: value for n, value in options.items() if value is not None}
        hints = value_hints(self.function)
        own = {n: hints[n] for n in parameters.keys() - self.inputs - {"reduction"}}
        self.options = typed(self.options, own, of=f"the loss {name}")
        for option in self.required - self.inputs - self.options.keys():
            remedy = f"Set it: loss_options {option}=..."
            raise ConfigError(f"{option}: the loss {name} needs it and has no default. {remedy}")

    def check(self, columns: Iterable[str], reference: str) -> None:
        """Whether it can do with the columns of the pairs and this kind of reference.

        Raises:
            ConfigError: it needs one more tensor, or has no use for the reference.
        """
        if not self.inputs & {*REFERENCE} and reference not in ("auto", "none"):
            raise ConfigError(f"reference: the loss {self.name} has none; leave it out.")
        there = {*columns, *POLICY} | (set() if reference == "none" else {*REFERENCE})
        for missing in sorted((self.required & self.inputs) - there):
            remedy = "Set reference" if missing in REFERENCE else f"Give each pair its {missing}"
            raise ConfigError(f"loss: {self.name} needs {missing}. {remedy}.")

    def __call__(self, tensors: dict[str, Tensor]) -> LossOutput:
        """The loss of tensors [B] by name."""
        given = {name: tensors[name] for name in self.inputs & tensors.keys()}
        return self.function(**given, **self.options)


def loss_of(config: DiffusionDPOConfig) -> PairLoss:
    """The loss of a run, whose schedule is looked at as well: both before any work."""
    require_schedule(config.schedule)
    options = given_once({"beta": config.beta}, config.loss_options, "loss_options")
    return PairLoss(config.loss, **options)


def add_lora(denoiser: torch.nn.Module, config: DiffusionDPOConfig) -> torch.nn.Module:
    """The denoiser in a ``PeftModel``, with a second adapter where that is the reference.

    Raises:
        ConfigError: it has adapters already.
    """
    if adapter_tensors(denoiser):
        remedy = "Merge it into the weights or take it out; lora_r adds a new one."
        raise ConfigError(f"denoiser: it has a LoRA already. {remedy}")
    if not config.lora_r:
        return denoiser.requires_grad_(True)
    from peft import get_peft_model

    lora = lora_config(denoiser, config)
    model = get_peft_model(denoiser, lora)
    if config.reference == "second_adapter":
        model.add_adapter("ref", lora)
    return model


def set_mode(model: torch.nn.Module) -> None:
    """Eval mode, as the reference is in, for all but the dropout of a LoRA."""
    model.eval()
    for name, module in model.named_modules():
        if ".lora_dropout." in name:
            module.train()


def make_reference(
    model: torch.nn.Module, config: DiffusionDPOConfig, loss: PairLoss, ema: EMAModel | None
) -> references.Reference | None:
    """The reference of a run, for a model without wrappers; None where no model is asked."""
    kind = config.reference
    if kind == "auto":
        kind = "adapter" if config.lora_r else "copy"
    if kind in ("none", "cached") or not loss.inputs & {*REFERENCE}:
        if config.reference_steps:
            raise ConfigError(f"reference_steps: the loss {loss.name} has no reference.")
        return None
    if kind == "second_adapter":
        reference = references.SecondAdapter(model)
        reference.refresh()
        return reference
    if kind == "ema":
        return references.Averaged(model, ema)
    return {"adapter": references.AdapterOff, "copy": references.FrozenCopy}[kind](model)


def make_accelerator(config: DiffusionDPOConfig) -> Accelerator:
    """The accelerator of a run; its steps end with the batches of a step, not with a pass."""
    plugin = GradientAccumulationPlugin(num_steps=config.accumulation, sync_with_dataloader=False)
    accelerator = Accelerator(
        cpu=config.cpu,
        mixed_precision=config.mixed_precision,
        gradient_accumulation_plugin=plugin,
        log_with="tensorboard" if config.tensorboard else None,
        project_dir=config.output,
    )
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigError("mixed_precision: fp16 needs a GPU. Take bf16, or no.")
    return accelerator


def require_schedule(name: str) -> None:
    """Whether there is such a schedule of the learning rate.

    Raises:
        ConfigError: there is none.
    """
    known = [each.value for each in SchedulerType]
    if name not in known:
        raise ConfigError(f"schedule: no such schedule as {name!r}; {near(name, known)}")


def make_optimizer(
    trainable: list[torch.nn.Parameter], config: DiffusionDPOConfig, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW and the schedule of its learning rate."""
    rate, warmup = config.learning_rate, config.warmup_steps
    optimizer = torch.optim.AdamW(trainable, lr=rate, weight_decay=config.weight_decay)
    warmup = math.ceil(warmup * steps if warmup < 1 else warmup)
    schedule = get_scheduler(
        config.schedule, optimizer, num_warmup_steps=warmup, num_training_steps=steps
    )
    return optimizer, schedule
