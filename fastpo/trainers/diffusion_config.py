"""Options of ``fastpo train diffusion-dpo``; those of every command keep their words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastpo.trainers.config import (
    ANY_NUMBER,
    COUNT,
    LORA,
    NOT_NEGATIVE,
    SEED,
    SHARE,
    Resume,
    RunConfig,
)
from fastpo.trainers.options import ConfigError, Names, check, mapping, option, refuse_given

REFERENCES = ("auto", "adapter", "copy", "second_adapter", "ema", "cached", "none")
DENSITIES = ("uniform", "logit_normal")
PRECISIONS = ("no", "bf16", "fp16")


def _shared(name: str) -> Any:
    """An option of :class:`RunConfig`: its default and its words."""
    option = RunConfig.__dataclass_fields__[name]
    return field(default=option.default, metadata=option.metadata)


@dataclass
class DiffusionDPOConfig:
    """Options of ``fastpo train diffusion-dpo`` and :func:`fastpo.trainers.diffusion.train`.

    Only the command line needs ``model`` and ``data``, and uses the options after ``output``.
    """

    model: str = option("", "Folder or hub name of a diffusers pipeline.")
    data: str = option(
        "",
        "JSONL(.gz) file: chosen, rejected (image files); prompt, class_label, time_ids, or "
        "chosen_prompt and rejected_prompt and so on; numbers that the loss takes.",
    )
    output: str = _shared("output")
    eval_data: str | None = _shared("eval_data")
    eval_share: float = option(0.05, "Share of data held out, if there is no eval_data.", SHARE)
    limit: int | None = _shared("limit")
    resolution: int | None = option(
        None, "Pixels of a side; that of the pipeline if not given.", COUNT
    )
    aspect_ratio_buckets: str | None = option(
        None,
        "Sizes as height,width;height,width in place of one square: each pair goes to that of the "
        "nearest shape, and a batch holds one.",
    )
    random_crop: bool = option(
        False, "Crop at a random place, drawn once for each pair; else the centre."
    )
    guidance: float | None = option(
        None, "Told to models distilled for guidance (Flux dev).", NOT_NEGATIVE
    )
    sample_count: int = option(
        16, "Images of the grids before and after; 0 for none.", NOT_NEGATIVE
    )
    sample_steps: int = option(50, "Denoising steps of these images.", COUNT)
    loss: str = option("dpo", "A loss over pairs of fastpo.diffusion.losses, such as dpo, mapo.")
    beta: float | None = option(None, "Of the loss; its own default if not given.", NOT_NEGATIVE)
    loss_options: dict[str, Any] = mapping("Any other option of the loss")
    reference: str = option(
        "auto",
        "adapter (disabled LoRA), copy (frozen), second_adapter (a frozen LoRA), ema (the average "
        "of ema_decay), cached (computed once), none, or auto: adapter with a LoRA, else copy.",
        choices=REFERENCES,
    )
    reference_steps: int = option(
        0,
        "Steps between updates of a copy or second adapter to the model; 0 for none.",
        NOT_NEGATIVE,
    )
    reference_draws: int = option(
        1, "Draws of noise per pair that a cached reference knows.", COUNT
    )
    timestep_density: str = option(
        "uniform", "Of the timesteps: uniform, or logit_normal.", choices=DENSITIES
    )
    logit_mean: float = option(0.0, "Of logit_normal; positive for more noise.", ANY_NUMBER)
    logit_std: float = option(1.0, "Of logit_normal.", "(0, inf)")
    independent_noise: bool = option(False, "Draw the noise of the rejected sample anew.")
    one_at_a_time: bool = option(False, "Differentiate chosen and rejected in turn: less memory.")
    epochs: float = _shared("epochs")
    max_steps: int = _shared("max_steps")
    learning_rate: float = _shared("learning_rate")
    schedule: str = option("constant_with_warmup", "Learning rate schedule of diffusers.")
    warmup_steps: float = _shared("warmup_steps")
    weight_decay: float = _shared("weight_decay")
    max_grad_norm: float = option(
        1.0, "Gradients are clipped to this norm; 0 for not at all.", NOT_NEGATIVE
    )
    batch_size: int = option(4, "Pairs per device and forward.", COUNT)
    accumulation: int = _shared("accumulation")
    seed: int = option(
        42, "Of the order, noise, timesteps, dropout, samples and new adapters.", SEED
    )
    mixed_precision: str = option("no", "no, bf16 or fp16.", choices=PRECISIONS)
    gradient_checkpointing: bool = option(False, "Compute activations again in backward.")
    cpu: bool = option(False, "Stay on the CPU.")
    ema_decay: float = option(
        0.0, "Decay of an average of the weights, which is saved; 0: none.", SHARE
    )
    lora_r: int = _shared("lora_r")
    lora_alpha: float = _shared("lora_alpha")
    lora_dropout: float = _shared("lora_dropout")
    lora_targets: Names = option(
        "to_q,to_k,to_v,to_out.0", "Module names, comma separated, or a regex."
    )
    logging_steps: int = _shared("logging_steps")
    eval_steps: int = _shared("eval_steps")
    save_steps: int = _shared("save_steps")
    save_total_limit: int = _shared("save_total_limit")
    tensorboard: bool = _shared("tensorboard")
    progress: bool = option(True, "Show a progress bar.")
    resume: Resume = _shared("resume")
    resume_from: str | None = _shared("resume_from")

    def __post_init__(self):
        check(self)
        if not self.output:
            raise ConfigError("output: missing; give --output or the key in the YAML file.")
        if self.resume and self.resume_from:
            raise ConfigError("resume, resume_from: give one of them.")
        if self.schedule == "constant" and self.warmup_steps:
            remedy = "Take constant_with_warmup, or warmup_steps 0."
            raise ConfigError(f"schedule: constant has no warm-up. {remedy}")
        if self.timestep_density == "uniform":
            problem = "it is of timestep_density logit_normal. Set that"
            refuse_given(self, ("logit_mean", "logit_std"), problem)
        if self.reference != "cached":
            refuse_given(self, ("reference_draws",), "it is of reference cached. Set that")
        if not self.lora_r:
            refuse_given(self, LORA, "a LoRA needs lora_r above 0. Set it")
        self._check_reference()

    def _check_reference(self) -> None:
        if self.reference in ("adapter", "second_adapter") and not self.lora_r:
            raise ConfigError(f"reference: {self.reference!r} needs a LoRA; set lora_r.")
        if self.reference == "ema" and not self.ema_decay:
            raise ConfigError("reference: 'ema' needs an average; set ema_decay.")
        kind = "adapter" if self.reference == "auto" and self.lora_r else self.reference
        if self.reference_steps and kind not in ("copy", "auto", "second_adapter"):
            remedy = "Only a copy and a second adapter are updated."
            raise ConfigError(f"reference_steps: {kind} stays as it is. {remedy}")
