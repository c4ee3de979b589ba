"""From a config to a finished run: load, tokenise, evaluate, train, evaluate, save."""

from __future__ import annotations

import gc
import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    SchedulerType,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import is_torch_bf16_gpu_available

from fastpo.data.formats import COMPLETION_FIELDS, TEMPLATE_COLUMNS
from fastpo.data.records import split_by_prompt
from fastpo.data.tokens import CompletionCollator, PairCollator
from fastpo.trainers import reference
from fastpo.trainers.base import say
from fastpo.trainers.checkpoints import (
    check_inputs,
    digest_of,
    locked,
    resume_point,
    weights_digest,
)
from fastpo.trainers.config import (
    ConfigError,
    DPOConfig,
    GRPOConfig,
    RunConfig,
    SFTConfig,
    keep_for_resume,
    remarks,
)
from fastpo.trainers.dpo import REFERENCE, DPOTrainer, loss_arguments
from fastpo.trainers.grpo import GRPOTrainer
from fastpo.trainers.grpo_rewards import GIVEN, Rewards, load_rewards
from fastpo.trainers.grpo_rollouts import (
    GivenGroups,
    Rollout,
    SampledGroups,
    TransformersSampler,
    read_rows,
)
from fastpo.trainers.head import add_logprob_head
from fastpo.trainers.lora import lora_config
from fastpo.trainers.options import given_once, items, loading, near, typed, value_hints
from fastpo.trainers.rows import load_data, pair_columns, say_unused, source_of
from fastpo.trainers.sft import SFTTrainer
from fastpo.trainers.stops import SaveAndStop, Signals, Stopped

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Set by this module from options of its own.
_OWN = ("output_dir", "learning_rate", "seed", "max_steps", "remove_unused_columns")


# TrainingArguments that nothing reads here, or that would break a run, and what to do instead.
_REFUSED = {
    "label_smoothing_factor": "losses are fastpo's: take label_smoothing of train dpo",
    "use_liger_kernel": "the losses of fastpo are fused already",
    "liger_kernel_config": "the losses of fastpo are fused already",
    "length_column_name": "rows are not grouped by length",
    "prediction_loss_only": "an evaluation is of the loss and all metrics",
    "include_for_metrics": "the metrics are fixed",
    "batch_eval_metrics": "the metrics are of all held-out rows at once",
    "eval_do_concat_batches": "the metrics are of all held-out rows at once",
    "eval_use_gather_object": "what is gathered are tensors",
    "label_names": "the collators name the labels",
    "logging_nan_inf_filter": "a loss that is not finite stops the run",
    "eval_on_start": "a run with held-out rows begins with an evaluation",
    "bf16_full_eval": "the weights would be saved as rounded for the evaluation",
    "fp16_full_eval": "the weights would be saved as rounded for the evaluation",
    "do_train": "the command says what is done",
    "do_eval": "give eval_data or eval_share",
    "do_predict": "the command says what is done",
    "resume_from_checkpoint": "give resume or resume_from",
}
_REFUSED_BY_GROUPS = {
    "train_sampling_strategy": "prompts are shuffled by generations",
    "data_seed": "the order is of seed",
    "average_tokens_across_devices": "tokens are counted over all devices",
    "per_device_eval_batch_size": "held-out prompts are sampled by sample_batch_size",
    "eval_accumulation_steps": "held-out prompts are sampled by sample_batch_size",
}


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub name, padding on the right.

    Raises:
        ConfigError: it cannot be loaded, or has no end-of-sequence token.
    """
    with loading("model", name):
        tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.eos_token_id is None:
        remedy = "Set eos_token in its tokenizer_config.json."
        raise ConfigError(f"model: the tokenizer of {name} has no end-of-sequence token. {remedy}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def _about(name: str) -> PretrainedConfig:
    with loading("model", name):
        return AutoConfig.from_pretrained(name).get_text_config()


def stored_half(config: RunConfig) -> str:
    """bfloat16 or float16 if a whole model that is stored so is to be trained; else empty.

    AdamW moves most weights by less than half a step of bfloat16, which is 1/256 of the weight:
    the weights that are trained are float32 then, and the forward runs in mixed precision.
    """
    if config.lora_r or config.dtype != "auto":
        return ""
    dtype = _about(config.model).dtype
    return str(dtype).removeprefix("torch.") if dtype in (torch.bfloat16, torch.float16) else ""


def _mixed_precision(config: RunConfig, given: dict[str, Any]) -> dict[str, bool]:
    """bfloat16 mixed precision for what is stored in half precision, where the device has it."""
    if not stored_half(config) or given.keys() & {"bf16", "fp16"}:
        return {}
    if given.get("use_cpu") or not torch.accelerator.is_available():
        return {"bf16": True, "use_cpu": True}  # TrainingArguments takes it on a CPU by name only.
    return {"bf16": is_torch_bf16_gpu_available()}


def load_model(config: RunConfig) -> torch.nn.Module:
    """The causal LM of a config with the fused head, in a ``PeftModel`` if it asks for a LoRA.

    The weights are as stored (``dtype``), float32 where :func:`stored_half` says so.
    """
    if (Path(config.model) / "adapter_config.json").exists():
        remedy = "Merge it into its base model first (peft: merge_and_unload, save_pretrained)."
        raise ConfigError(f"model: {config.model} holds an adapter only. {remedy}")
    positions = getattr(_about(config.model), "max_position_embeddings", None)
    if positions is not None and config.max_length > positions:
        got = f"{config.max_length}, and {config.model} has {positions} positions"
        raise ConfigError(f"max_length: got {got}. Set max_length {positions} or less.")
    dtype, stored = config.dtype, stored_half(config)
    if stored:
        dtype = "float32"
        say(f"weights: stored in {stored}, trained and saved in float32, so that no update is lost")
    with loading("model", config.model):
        model = AutoModelForCausalLM.from_pretrained(config.model, dtype=dtype)
    check_finite(model, config.model)
    model.config.use_cache = False
    add_logprob_head(model)
    if not config.lora_r:
        return model
    from peft import get_peft_model

    return get_peft_model(model, lora_config(model, config, task_type="CAUSAL_LM"))


def check_finite(model: torch.nn.Module, name: str) -> None:
    """Whether all weights are numbers.

    Raises:
        ConfigError: one is NaN or infinite.
    """
    for weight, parameter in model.named_parameters():
        if parameter.dtype in _FLOATS and not bool(parameter.detach().isfinite().all()):
            raise ConfigError(f"model: {weight} of {name} holds NaN or infinite numbers.")


def training_arguments(config: RunConfig) -> TrainingArguments:
    """The Trainer's arguments; ``config.trainer`` goes in as it is."""
    options: dict[str, Any] = {
        "output_dir": config.output,
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.schedule,
        "warmup_steps": config.warmup_steps,
        "weight_decay": config.weight_decay,
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.accumulation,
        "seed": config.seed,
        "logging_steps": config.logging_steps,
        "logging_first_step": True,
        "eval_strategy": "steps" if config.eval_steps else "no",
        "eval_steps": config.eval_steps or None,
        "save_strategy": "steps",
        "save_steps": config.save_steps,
        "save_total_limit": config.save_total_limit,
        "report_to": ["tensorboard"] if config.tensorboard else [],
        "dataloader_pin_memory": torch.cuda.is_available(),
        # Evaluation values are a few numbers per pair.
        "eval_do_concat_batches": True,
    }
    clash = [name for name in config.trainer if name in _OWN]
    if clash:
        raise ConfigError(f"trainer: {clash[0]} is set by an option of its own or fixed.")
    refused = _REFUSED | (_REFUSED_BY_GROUPS if isinstance(config, GRPOConfig) else {})
    for name in config.trainer.keys() & refused.keys():
        problem = f"trainer: {name} has no use here, as {refused[name]}"
        raise ConfigError(f"{problem}. Leave it out.")
    strategy = config.trainer.get("train_sampling_strategy", "random")
    if strategy not in ("random", "sequential"):
        expected = "expected random or sequential, as rows are not grouped by length"
        raise ConfigError(f"trainer: train_sampling_strategy: {expected}; got {strategy!r}.")
    schedules = [schedule.value for schedule in SchedulerType]
    if config.schedule not in schedules:
        hint = near(config.schedule, schedules)
        raise ConfigError(f"schedule: no such schedule as {config.schedule!r}; {hint}")
    more = typed(config.trainer, value_hints(TrainingArguments), of="trainer")
    try:
        return TrainingArguments(**(options | _mixed_precision(config, more) | more))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"trainer: {error}") from error


def leave_ranks() -> None:
    """Wait for the other ranks and end the process group, at the end of a program.

    A group that is only taken apart with the interpreter may abort it: threads of the group still
    let go of tensors then.
    """
    ranks = PartialState()
    ranks.wait_for_everyone()
    gc.collect()  # what a model wrapped for several ranks still holds of the group
    ranks.destroy_process_group()


def train_dpo(config: DPOConfig) -> dict[str, Any]:
    """Run ``fastpo train dpo``; returns what it writes to ``results.json``."""
    own = {name: getattr(config, name) for name in ("beta", "gamma", "label_smoothing")}
    options = given_once(own, config.loss_options, "loss_options")
    loss_options = loss_arguments(config.loss, **options)
    fields, numbers, known = pair_columns(config)

    def build(model, tokenizer, args, train, held):
        is_given = REFERENCE[0] in numbers  # then all of them are
        chosen = "cached" if is_given else config.reference
        trainer = DPOTrainer(
            model,
            args,
            loss=config.loss,
            loss_options=loss_options,
            reference=None if chosen == "auto" else chosen,
            data_collator=PairCollator(tokenizer.pad_token_id),
            train_dataset=train,
            eval_dataset=held,
            processing_class=tokenizer,
        )
        if trainer.reference == "cached" and not is_given:
            trainer.train_dataset = reference.add_cached(trainer, train, "train", config.output)
            if held is not None:
                trainer.eval_dataset = reference.add_cached(trainer, held, "eval", config.output)
        return trainer

    def load(tokenizer):
        return load_data(config, fields, tokenizer, numbers, known)

    return _run(config, load, build)


def train_sft(config: SFTConfig) -> dict[str, Any]:
    """Run ``fastpo train sft``; returns what it writes to ``results.json``."""

    def build(model, tokenizer, args, train, held):
        return SFTTrainer(
            model,
            args,
            data_collator=CompletionCollator(tokenizer.pad_token_id),
            train_dataset=train,
            eval_dataset=held,
            processing_class=tokenizer,
        )

    return _run(config, partial(load_data, config, COMPLETION_FIELDS), build)


def load_rollouts(
    config: GRPOConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[Rollout, Rollout | None]:
    """Groups to train on and, of held-out prompts, to evaluate on, with a line on each."""
    rows, held = read_rows(**source_of(config)), None
    functions = load_rewards(config.reward)
    columns = {name for row in rows for name in row}
    if not functions:
        groups = GivenGroups(rows, tokenizer, config.max_length)
        equal = sum(group.has_equal_rewards for group in groups.groups)
        counts = f"{sum(len(group.ids) for group in groups.groups)} completions"
        changes = groups.report.changes
        missing = sum(group.missing_rewards for group in groups.groups)
        changes = f"{missing} completions without a reward, {changes}" if missing else changes
        say(f"train: {len(rows)} groups, {counts}, {equal} groups of equal rewards, {changes}")
        used = {"prompt", "row", "completions", "rewards"}
        if isinstance(rows[0]["prompt"], list):
            used |= {*TEMPLATE_COLUMNS}
        say_unused(columns - used, groups.report.unused)
        return groups, None
    if config.eval_data:
        held = read_rows(**source_of(config, is_eval=True))
    elif config.eval_share:
        prompts = [json.dumps(row["prompt"]) for row in rows]
        places = Dataset.from_dict({"prompt": prompts, "i": range(len(rows))})
        parts = split_by_prompt(places, config.eval_share, config.seed)
        rows, held = ([rows[i] for i in part["i"]] for part in parts)
    weights = typed(
        {"reward_weights": items(config.reward_weights)}, {"reward_weights": list[float]}
    )
    rewards = Rewards(functions, weights["reward_weights"] or None, config.reward_seconds)
    options = {
        "max_new_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "top_p": config.top_p,
    }
    if config.sampler == "vllm":
        from fastpo.trainers.grpo_vllm import VLLMSampler

        sampler = VLLMSampler(config.model, max_length=config.max_length, **options)
    else:
        sampler = TransformersSampler(tokenizer, **options)

    def sampled(name: str, part: list[dict[str, Any]] | None) -> SampledGroups | None:
        if part is None:
            return None
        groups = SampledGroups(
            part, tokenizer, rewards, sampler, samples=config.samples,
            max_new_tokens=config.max_new_tokens,
            max_prompt_length=config.max_length - config.max_new_tokens,
            batch_size=config.sample_batch_size,
        )  # fmt: skip
        cut = f"prompts cut in {groups.report.cut_prompts}"
        say(f"{name}: {len(part)} prompts, {config.samples} completions each, {cut}")
        return groups

    train, held = sampled("train", rows), sampled("eval", held)
    # Rewards get the other columns.
    say_unused(columns & {"completion", *GIVEN}, train.report.unused)
    return train, held


def train_grpo(config: GRPOConfig) -> dict[str, Any]:
    """Run ``fastpo train grpo``; returns what it writes to ``results.json``."""
    is_given = not config.reward
    max_length = config.max_length if is_given else config.max_new_tokens
    own = {"beta": config.beta, "entropy_coef": config.entropy_coef}
    defaults = {"max_length": max_length}
    if config.sampler == "vllm":
        defaults |= {"correction": "truncate", "sampler_max": 2.0}
    given = given_once(own, config.loss_options, "loss_options")
    loss_options = defaults | {name: value for name, value in given.items() if value is not None}

    def build(model, tokenizer, args, train, held):
        return GRPOTrainer(
            model,
            args,
            rollout=train,
            eval_rollout=held,
            pad_id=tokenizer.pad_token_id,
            loss=config.loss,
            loss_options=loss_options,
            advantage=config.advantage,
            advantage_options=config.advantage_options,
            reference=None if config.reference == "auto" else config.reference,
            behaviour="initial" if is_given else "policy",
            steps_per_generation=config.steps_per_generation,
            num_iterations=config.num_iterations,
            temperature=config.temperature,
            mask_truncated=config.mask_truncated,
            filter_groups=config.filter_groups,
            forward_rows=config.forward_rows,
            processing_class=tokenizer,
        )

    return _run(config, partial(load_rollouts, config), build)


def _run(config: RunConfig, load, build) -> dict[str, Any]:
    with locked(config.output):
        return _run_alone(config, load, build)


def _run_alone(config: RunConfig, load, build) -> dict[str, Any]:
    output = Path(config.output)
    checkpoint = resume_point(output, config.resume, config.resume_from)
    args = training_arguments(config)
    for line in remarks(config):
        say(line)
    tokenizer = load_tokenizer(config.model)
    inputs = {
        "world_size": str(args.world_size),
        "tokenizer": digest_of(_words_of(tokenizer)),
    }
    check_inputs(checkpoint, inputs)
    if args.process_index == 0:
        keep_for_resume(config, output, checkpoint)
    set_seed(config.seed)
    train, held = load(tokenizer)
    if held is None and args.eval_strategy != "no":
        remedy = "Give eval_data or eval_share, or leave it out."
        raise ConfigError(f"trainer: eval_strategy: no rows are held out. {remedy}")
    for name, part in (("data", train), ("eval_data", held)):
        inputs[name] = digest_of(getattr(part, "rows", part) or ())
    check_inputs(checkpoint, inputs)
    # Evaluated inside train: an evaluation before it would mark the model as prepared, and
    # accelerate would then leave it without DistributedDataParallel.
    args.eval_on_start = held is not None and checkpoint is None
    model = load_model(config)
    inputs |= {"model": weights_digest(model), "model_config": digest_of([_meaning(model.config)])}
    check_inputs(checkpoint, inputs)
    trainer: Trainer = build(model, tokenizer, args, train, held)
    trainer.inputs = inputs
    # The order of the rows must not depend on what was computed for the reference.
    set_seed(config.seed)
    started = time.perf_counter()
    with Signals() as signals:
        trainer.add_callback(SaveAndStop(signals, trainer.accelerator))
        trainer.train(resume_from_checkpoint=os.fspath(checkpoint) if checkpoint else None)
    if signals.received:
        raise Stopped(signals.received, trainer.state.global_step)
    results: dict[str, Any] = {
        "train_seconds": time.perf_counter() - started,
        "steps": trainer.state.global_step,
    }
    if held is not None:
        evaluations = (
            log
            for log in trainer.state.log_history
            if "eval_loss" in log or "eval_rewards/mean" in log
        )
        results["before"] = next(evaluations, {})
        results["after"] = trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        path = output / "results.json"
        path.write_text(json.dumps(results, indent=2), encoding="utf-8")
    for line in _summary(results):
        say(line)
    return results


def _words_of(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """All that decides what ids a tokenizer gives, whatever its folder."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()
    return [[rules, tokenizer.chat_template, tokenizer.special_tokens_map]]


def _meaning(config: PretrainedConfig) -> dict[str, Any]:
    """What a model's config says of the model, whatever the folder and the library's version."""
    said = {"transformers_version", "_name_or_path"}
    return {name: value for name, value in config.to_dict().items() if name not in said}


def _summary(results: dict[str, Any]) -> list[str]:
    """Held-out metrics before and after, side by side."""
    before, after = results.get("before", {}), results.get("after", {})
    metrics = [name for name in after if "/" in name or name == "eval_loss"]
    lines = [f"{name:28} {before[name]:10.4f} -> {after[name]:10.4f}" for name in metrics]
    return [*lines, f"{results['steps']} steps, {results['train_seconds']:.1f} s of training"]
