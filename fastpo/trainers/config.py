"""Options of a run: one dataclass per command gives the flags, the YAML keys and their help."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fastpo.trainers.options import (
    ConfigError,
    Names,
    build,
    check,
    mapping,
    option,
    read_yaml,
    refuse_given,
)

__all__ = [
    "ConfigError", "DPOConfig", "GRPOConfig", "InitConfig", "RunConfig", "SFTConfig", "build",
    "keep_for_resume", "read_yaml",
]  # fmt: skip

# May differ between a run and its continuation; all else would make it another run.
FREE_ON_RESUME = (
    "output", "resume", "resume_from", "epochs", "max_steps", "logging_steps", "eval_steps",
    "save_steps", "save_total_limit", "tensorboard", "progress", "reward_seconds", "num_proc",
)  # fmt: skip
Resume = bool | Literal["auto"]
DTYPES = ("auto", "float32", "bfloat16", "float16")
COUNT, NOT_NEGATIVE, SHARE = "[1, inf)", "[0, inf)", "[0, 1)"
SEED = "[0, 4294967296)"
ANY_NUMBER = "(-inf, inf)"
# What only these read: a LoRA, and sampled completions and their scores.
LORA = ("lora_alpha", "lora_dropout", "lora_targets")
SAMPLING = (
    "eval_data", "eval_share", "reward_weights", "reward_seconds", "samples", "max_new_tokens",
    "top_p", "sampler", "sample_batch_size",
)  # fmt: skip


@dataclass
class RunConfig:
    """Options that all training commands share."""

    model: str = option("", "Folder or hub name of a causal LM.")
    data: str = option("", "JSON(L), CSV or parquet file, datasets folder or hub name.")
    output: str = option("", "Folder of the run: checkpoints, logs, the trained model.")
    split: str = option("train", "Split of a datasets folder or hub name.")
    subset: str | None = option(None, "Subset of a hub name, of data and of eval_data.")
    columns: dict[str, Any] = mapping("Columns under other names, such as prompt=question")
    streaming: bool = option(False, "Read no more of a hub name than limit or max_steps need.")
    num_proc: int | None = option(None, "Processes that tokenise.", COUNT)
    eval_data: str | None = option(None, "Held-out rows, in the form of data.")
    eval_split: str = option("test", "Split of eval_data.")
    eval_share: float = option(
        0.05, "Share of data held out by prompt, if there is no eval_data; 0 for none.", SHARE
    )
    limit: int | None = option(None, "Take the first so many rows only.", COUNT)
    max_length: int = option(
        1024, "Tokens of a sequence; completions are cut before prompts.", "[2, inf)"
    )
    epochs: float = option(1.0, "Passes over the data.", "(0, inf)")
    max_steps: int = option(
        -1, "Optimiser steps in place of epochs; -1 and 0 leave it to epochs.", "[-1, inf)"
    )
    learning_rate: float = option(1e-6, "Peak learning rate.", NOT_NEGATIVE)
    schedule: str = option("linear", "Learning rate schedule of transformers.")
    warmup_steps: float = option(
        0.1, "Warm-up in steps, or as a share of all steps below 1.", NOT_NEGATIVE
    )
    weight_decay: float = option(0.0, "AdamW weight decay.", NOT_NEGATIVE)
    batch_size: int = option(8, "Rows per device and forward.", COUNT)
    accumulation: int = option(1, "Forwards per optimiser step.", COUNT)
    seed: int = option(42, "Of shuffling, dropout, the held-out rows and new adapters.", SEED)
    dtype: str = option(
        "auto",
        "Type of the weights: one of torch, or auto: as stored, and float32 with bf16 mixed "
        "precision to train a whole model.",
        choices=DTYPES,
    )
    lora_r: int = option(0, "Rank of a LoRA; 0 trains the whole model.", NOT_NEGATIVE)
    lora_alpha: float = option(32.0, "Scale of the LoRA: alpha / r.", "(0, inf)")
    lora_dropout: float = option(0.0, "Dropout of the LoRA.", SHARE)
    lora_targets: Names = option(
        "all-linear", "Module names, comma separated, or a regex; the lm_head may be one."
    )
    logging_steps: int = option(10, "Steps between log lines.", COUNT)
    eval_steps: int = option(
        0, "Steps between evaluations; 0 for start and end only.", NOT_NEGATIVE
    )
    save_steps: int = option(100, "Steps between checkpoints.", COUNT)
    save_total_limit: int = option(2, "Checkpoints kept.", COUNT)
    tensorboard: bool = option(True, "Write TensorBoard logs into the output folder.")
    resume: Resume = option(
        False,
        "Continue from the last checkpoint of the output folder; auto: from the last whole one, "
        "or anew where there is none.",
    )
    resume_from: str | None = option(None, "Continue from this checkpoint.")
    trainer: dict[str, Any] = mapping("Any other transformers.TrainingArguments")

    def __post_init__(self):
        check(self)
        for name in ("model", "data", "output"):
            if not getattr(self, name):
                raise ConfigError(f"{name}: missing; give --{name} or the key in the YAML file.")
        if self.resume and self.resume_from:
            raise ConfigError("resume, resume_from: give one of them.")
        if not self.lora_r:
            refuse_given(self, LORA, "a LoRA needs lora_r above 0. Set it")
        if self.schedule == "constant" and self.warmup_steps:
            problem = "the schedule constant has no warm-up. Take constant_with_warmup"
            refuse_given(self, ("warmup_steps",), problem)
        if not self.eval_data:
            refuse_given(self, ("eval_split",), "it is of eval_data. Give that")
            if not self.eval_share:
                problem = "no rows are held out. Give eval_data or eval_share"
                refuse_given(self, ("eval_steps",), problem)


@dataclass
class DPOConfig(RunConfig):
    """Options of ``fastpo train dpo``."""

    loss: str = option("dpo", "A loss over pairs of fastpo.losses, such as dpo, ipo, simpo.")
    beta: float | None = option(None, "Of the loss; its own default if not given.", NOT_NEGATIVE)
    gamma: float | None = option(None, "Target margin of simpo.", ANY_NUMBER)
    label_smoothing: float | None = option(
        None, "Assumed share of flipped pairs (dpo, simpo).", SHARE
    )
    loss_options: dict[str, Any] = mapping("Any other option of the loss")
    reference: str = option(
        "auto",
        "adapter (disabled LoRA), copy (frozen), cached (computed once), or auto.",
        choices=("auto", "adapter", "copy", "cached"),
    )


@dataclass
class SFTConfig(RunConfig):
    """Options of ``fastpo train sft``."""

    learning_rate: float = option(2e-5, "Peak learning rate.", NOT_NEGATIVE)


@dataclass
class GRPOConfig(RunConfig):
    """Options of ``fastpo train grpo``."""

    data: str = option("", "Prompts, or groups of completions and rewards, in such a source.")
    eval_share: float = option(0.0, "Share of the prompts held out; only with --reward.", SHARE)
    batch_size: int = option(
        4, "Prompts per device and batch, each with all its completions.", COUNT
    )
    forward_rows: int = option(
        0, "Completions per forward at most; 0 for a batch at once.", NOT_NEGATIVE
    )
    accumulation: int = option(1, "Batches per optimiser step.", COUNT)
    loss: str = option("dapo", "A method of fastpo.surrogates.policy_loss: dapo, grpo, gspo, ...")
    advantage: str = option("grpo", "A method of fastpo.group_advantages: grpo, rloo, ...")
    beta: float | None = option(
        None, "Weight of the KL to the reference; none if not given.", NOT_NEGATIVE
    )
    entropy_coef: float | None = option(
        None, "Weight of the entropy bonus; none if not given, negative against it.", ANY_NUMBER
    )
    loss_options: dict[str, Any] = mapping("Any other option of the loss")
    advantage_options: dict[str, Any] = mapping(
        "Any option of the advantage, such as rloo's beta of the KL in the reward"
    )
    reference: str = option(
        "auto", "adapter (disabled LoRA), copy (frozen), or auto.",
        choices=("auto", "adapter", "copy"),
    )  # fmt: skip
    reward: Names = option(
        "", "package.module:function(prompts, completions, **columns), comma separated."
    )
    reward_weights: str | float | list[float] = option(
        "", "A weight per reward function, comma separated; 1 each."
    )
    reward_seconds: float = option(
        600.0, "Time limit of a call of a reward; 0 for none.", NOT_NEGATIVE
    )
    samples: int = option(8, "Completions per prompt.", COUNT)
    max_new_tokens: int = option(256, "Tokens of a completion.", COUNT)
    temperature: float = option(
        1.0, "Of sampling; the log-probs are those at this temperature.", "(0, inf)"
    )
    top_p: float = option(1.0, "Of sampling; 1 for the whole distribution.", "(0, 1]")
    sampler: str = option(
        "transformers", "transformers, or vllm if it is installed.",
        choices=("transformers", "vllm"),
    )  # fmt: skip
    sample_batch_size: int = option(16, "Prompts per call of the sampler.", COUNT)
    steps_per_generation: int = option(1, "Optimiser steps that share a generation out.", COUNT)
    num_iterations: int = option(1, "Times that each generation is trained on.", COUNT)
    mask_truncated: bool = option(False, "Leave truncated completions out of the loss.")
    filter_groups: bool = option(False, "Leave out groups of equal rewards.")

    def __post_init__(self):
        if not self.reward:
            check(self)  # A value out of its range is named as that.
            problem = "given completions are not scored, and none are sampled. Give --reward"
            refuse_given(self, SAMPLING, problem)
        refuse_given(self, ("num_proc",), "one process tokenises here. Set it for other commands")
        super().__post_init__()


@dataclass
class InitConfig:
    """Options of ``fastpo init-model``."""

    output: str = option("", "Folder to write.", positional=True)
    data: str = option("", "JSONL(.gz) file whose texts train the tokenizer.")
    vocab_size: int = option(4096, "Entries of the tokenizer, at most.", "[259, inf)")
    hidden_size: int = option(256, "Width of the model.", COUNT)
    layers: int = option(4, "Decoder layers.", COUNT)
    heads: int = option(4, "Attention heads.", COUNT)
    max_length: int = option(1024, "Positions.", "[2, inf)")
    seed: int = option(0, "Of the random weights.", SEED)

    def __post_init__(self):
        check(self)
        for name in ("output", "data"):
            if not getattr(self, name):
                example = "fastpo init-model FOLDER --data FILE.jsonl"
                raise ConfigError(f"{name}: missing. Expected `{example}`.")
        if self.hidden_size % (2 * self.heads):
            got = f"{self.hidden_size} for {self.heads} heads"
            raise ConfigError(f"heads: each takes an even share of hidden_size, got {got}.")


def remarks(config: Any) -> list[str]:
    """A line on each option of a run that does not do what it seems to ask for."""
    lines, default = [], type(config).eval_share
    if config.eval_data and config.eval_share not in (0, default):
        lines.append(f"eval_share: {config.eval_share:g} is not used, as there is eval_data")
    if 0 < config.max_steps <= config.warmup_steps and config.schedule != "constant":
        counts = f"{config.warmup_steps:g} steps of warm-up in {config.max_steps}"
        lines.append(f"warmup_steps: {counts}, the learning rate never reaches its peak")
    return lines


def keep_for_resume(config: RunConfig, output: Path, checkpoint: Path | None) -> None:
    """Compare the options of a run with those of the run whose checkpoint it continues; write them.

    Args:
        config: of the run.
        output: folder of the run, into which they are written.
        checkpoint: to continue from, in the folder of its own run; None to begin anew.

    Raises:
        ConfigError: an option that changes the training differs.
    """
    import yaml

    options = asdict(config)
    if checkpoint is not None and (path := checkpoint.parent / "run.yaml").exists():
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
    written = yaml.safe_dump(options, sort_keys=False)
    (output / "run.yaml").write_text(written, encoding="utf-8")
