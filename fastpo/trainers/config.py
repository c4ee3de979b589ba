"""Options of a run: one dataclass per command gives the flags, the YAML keys and their help."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

REFERENCE_CHOICES = ("auto", "adapter", "copy", "cached")
# May differ between a run and its continuation; all else would make it another run.
FREE_ON_RESUME = (
    "output", "resume", "resume_from", "epochs", "max_steps", "logging_steps", "eval_steps",
    "save_steps", "save_total_limit", "tensorboard", "progress", "reward_seconds",
)  # fmt: skip


class ConfigError(ValueError):
    """An option is unknown, missing or of the wrong kind; the message names it."""


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class RunConfig:
    """Options that all training commands share."""

    model: str = _option("", "Folder or hub name of a causal LM.")
    data: str = _option("", "JSONL(.gz) file, datasets folder or hub name.")
    output: str = _option("", "Folder of the run: checkpoints, logs, the trained model.")
    split: str = _option("train", "Split of a datasets folder or hub name.")
    eval_data: str | None = _option(None, "Held-out rows, in the form of data.")
    eval_split: str = _option("test", "Split of eval_data.")
    eval_share: float = _option(0.05, "Share of data held out by prompt, if there is no eval_data.")
    limit: int | None = _option(None, "Take the first so many rows only.")
    max_length: int = _option(1024, "Tokens of a sequence; prompts lose their start first.")
    epochs: float = _option(1.0, "Passes over the data.")
    max_steps: int = _option(-1, "Optimiser steps; overrides epochs if positive.")
    learning_rate: float = _option(1e-6, "Peak learning rate.")
    schedule: str = _option("linear", "Learning rate schedule of transformers.")
    warmup_steps: float = _option(0.1, "Warm-up in steps, or as a share of all steps below 1.")
    weight_decay: float = _option(0.0, "AdamW weight decay.")
    batch_size: int = _option(8, "Rows per device and forward.")
    accumulation: int = _option(1, "Forwards per optimiser step.")
    seed: int = _option(42, "Of shuffling, dropout, the held-out rows and new adapters.")
    dtype: str = _option("auto", "Type of the weights: auto (as stored), float32, bfloat16.")
    lora_r: int = _option(0, "Rank of a LoRA; 0 trains the whole model.")
    lora_alpha: float = _option(32.0, "Scale of the LoRA: alpha / r.")
    lora_dropout: float = _option(0.0, "Dropout of the LoRA.")
    lora_targets: str = _option(
        "all-linear", "Module names, comma separated; the lm_head may be one."
    )
    logging_steps: int = _option(10, "Steps between log lines.")
    eval_steps: int = _option(0, "Steps between evaluations; 0 for start and end only.")
    save_steps: int = _option(100, "Steps between checkpoints.")
    save_total_limit: int = _option(2, "Checkpoints kept.")
    tensorboard: bool = _option(True, "Write TensorBoard logs into the output folder.")
    resume: bool = _option(False, "Continue from the last checkpoint of the output folder.")
    resume_from: str | None = _option(None, "Continue from this checkpoint.")
    trainer: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Any other transformers.TrainingArguments, as key=value; repeatable."},
    )

    def __post_init__(self):
        for name in ("model", "data", "output"):
            if not getattr(self, name):
                raise ConfigError(f"{name}: missing; give --{name} or the key in the YAML file.")
        if not 0 <= self.eval_share < 1:
            raise ConfigError(f"eval_share: expected a share in [0, 1), got {self.eval_share}.")
        if self.resume and self.resume_from:
            raise ConfigError("resume, resume_from: give one of them.")


@dataclass
class DPOConfig(RunConfig):
    """Options of ``fastpo train dpo``."""

    loss: str = _option("dpo", "A loss over pairs of fastpo.losses, such as dpo, ipo, simpo.")
    beta: float | None = _option(None, "Of the loss; its own default if not given.")
    gamma: float | None = _option(None, "Target margin of simpo.")
    label_smoothing: float | None = _option(None, "Assumed share of flipped pairs (dpo, simpo).")
    loss_options: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Any other option of the loss, as key=value; repeatable."},
    )
    reference: str = _option(
        "auto", "adapter (disabled LoRA), copy (frozen), cached (computed once), or auto."
    )

    def __post_init__(self):
        super().__post_init__()
        if self.reference not in REFERENCE_CHOICES:
            expected = ", ".join(REFERENCE_CHOICES)
            raise ConfigError(f"reference: expected one of {expected}, got {self.reference!r}.")


@dataclass
class SFTConfig(RunConfig):
    """Options of ``fastpo train sft``."""

    learning_rate: float = _option(2e-5, "Peak learning rate.")


@dataclass
class GRPOConfig(RunConfig):
    """Options of ``fastpo train grpo``."""

    data: str = _option("", "JSONL(.gz) file of prompts, or of groups: completions and rewards.")
    eval_share: float = _option(0.0, "Share of the prompts held out; only with --reward.")
    batch_size: int = _option(4, "Prompts per device and batch, each with all its completions.")
    forward_rows: int = _option(0, "Completions per forward at most; 0 for a batch at once.")
    accumulation: int = _option(1, "Batches per optimiser step.")
    loss: str = _option("dapo", "A method of fastpo.surrogates.policy_loss: dapo, grpo, gspo, ...")
    advantage: str = _option("grpo", "A method of fastpo.group_advantages: grpo, rloo, ...")
    beta: float | None = _option(None, "Weight of the KL to the reference; none if not given.")
    entropy_coef: float | None = _option(None, "Weight of the entropy bonus; none if not given.")
    loss_options: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Any other option of the loss, as key=value; repeatable."},
    )
    advantage_options: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Any option of the advantage, as key=value; repeatable."},
    )
    reference: str = _option("auto", "adapter (disabled LoRA), copy (frozen), or auto.")
    reward: str = _option(
        "", "package.module:function(prompts, completions, **columns), comma separated."
    )
    reward_weights: str = _option("", "A weight per reward function, comma separated; 1 each.")
    reward_seconds: float = _option(600.0, "Time limit of a call of a reward; 0 for none.")
    samples: int = _option(8, "Completions per prompt.")
    max_new_tokens: int = _option(256, "Tokens of a completion.")
    temperature: float = _option(1.0, "Of sampling; the log-probs are those at this temperature.")
    top_p: float = _option(1.0, "Of sampling.")
    sampler: str = _option("transformers", "transformers, or vllm if it is installed.")
    sample_batch_size: int = _option(16, "Prompts per call of the sampler.")
    steps_per_generation: int = _option(1, "Optimiser steps that share a generation out.")
    num_iterations: int = _option(1, "Times that each generation is trained on.")
    mask_truncated: bool = _option(False, "Leave truncated completions out of the loss.")
    filter_groups: bool = _option(False, "Leave out groups of equal rewards.")

    def __post_init__(self):
        super().__post_init__()
        choices = {"reference": ("auto", "adapter", "copy"), "sampler": ("transformers", "vllm")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                expected = ", ".join(known)
                got = repr(getattr(self, name))
                raise ConfigError(f"{name}: expected one of {expected}, got {got}.")
        for name in ("split", "eval_split"):
            if getattr(self, name) != default_of(type(self).__dataclass_fields__[name]):
                remedy = "train grpo reads JSONL files, which have no splits."
                raise ConfigError(
                    f"{name}: expected the default, got {getattr(self, name)!r}. {remedy}"
                )
        for name in (
            "batch_size",
            "accumulation",
            "samples",
            "max_new_tokens",
            "sample_batch_size",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected 1 or more, got {getattr(self, name)}.")
        if not 0 < self.top_p <= 1:
            remedy = "1 samples from the whole distribution."
            raise ConfigError(f"top_p: expected a number in (0, 1], got {self.top_p}. {remedy}")


Config = TypeVar("Config", bound=RunConfig)


def field_types(cls: type) -> dict[str, tuple[Field, type, bool]]:
    """Per option: its field, its plain type, and whether it may be None."""
    hints = get_type_hints(cls)
    found = {}
    for option in fields(cls):
        hint, optional = hints[option.name], False
        if isinstance(hint, types.UnionType):
            hint, optional = get_args(hint)[0], True
        found[option.name] = option, hint, optional
    return found


def _convert(name: str, value: Any, kind: type, optional: bool) -> Any:
    if value is None and optional:
        return None
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-5 as text.
        except ValueError:
            pass
    elif isinstance(value, kind if kind in (str, bool, int, float) else Mapping):
        if kind is not int or not isinstance(value, bool):
            return value
    wanted = getattr(kind, "__name__", str(kind))
    raise ConfigError(f"{name}: expected {wanted}, got {value!r}.")


def build(cls: type[Config], *sources: Mapping[str, Any]) -> Config:
    """A config from mappings, later ones over earlier ones; mappings are merged key by key.

    Raises:
        ConfigError: a key is unknown, required and missing, or its value of the wrong kind.

    Example:
        >>> paths = {"model": "m", "data": "d.jsonl", "output": "out"}
        >>> build(SFTConfig, paths | {"learning_rate": "1e-4"}, {"batch_size": 2}).learning_rate
        0.0001
    """
    known, values = field_types(cls), {}
    for source in sources:
        for name, value in source.items():
            if name not in known:
                raise ConfigError(f"{name}: no such option; there are {', '.join(known)}.")
            _, kind, optional = known[name]
            value = _convert(name, value, kind, optional)
            is_mapping = isinstance(value, Mapping)
            values[name] = {**values.get(name, {}), **value} if is_mapping else value
    return cls(**values)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: the file is missing, not YAML, or holds no mapping.
    """
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(found or {}, dict):
        raise ConfigError(f"{path}: expected key: value lines, got {type(found).__name__}.")
    return found or {}


def keep_for_resume(config: RunConfig, path: Path, resuming: bool) -> None:
    """Write the options of a run, or compare those of a continuation with them.

    Raises:
        ConfigError: an option that changes the training differs.
    """
    import yaml

    options = asdict(config)
    if resuming and path.exists():
        before = read_yaml(path)
        changed = [
            f"{name} {before.get(name)!r} -> {value!r}"
            for name, value in options.items()
            if name not in FREE_ON_RESUME and before.get(name) != value
        ]
        if changed:
            listed = "; ".join(changed)
            raise ConfigError(
                f"{path}: the run to resume had other options ({listed}). Restore them."
            )
    path.write_text(yaml.safe_dump(options, sort_keys=False), encoding="utf-8")


def default_of(option: Field) -> Any:
    """The default of an option; None stands for an empty mapping."""
    return None if option.default is MISSING else option.default
