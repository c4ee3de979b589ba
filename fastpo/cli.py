"""The command line: ``train`` and its methods, ``init-model``, ``demo``, ``info``, ``methods``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import fastpo

try:
    from fastpo.trainers.options import (
        ConfigError,
        build,
        near,
        one_line,
        option,
        parse_flags,
        read_yaml,
    )
except ImportError as error:
    raise SystemExit(f"fastpo: {error}. Remedy: pip install 'fastpo[train]'") from error

from fastpo.trainers.config import DPOConfig, GRPOConfig, InitConfig, SFTConfig
from fastpo.trainers.diffusion_config import DiffusionDPOConfig


@dataclass
class _Demo:
    output: str = option("demo_output", "Folder to write.")


@dataclass
class _Nothing:
    pass


@dataclass
class _Methods:
    key: str | None = option(None, "Show one method whole.", positional=True)
    block: str | None = option(None, "Only with such a block.")
    needs: str | None = option(None, "Only those that need it.")
    status: str | None = option(None, "confirmed, experimental, outside.")
    family: str | None = option(None, "pairwise, online, group, diffusion.")
    markdown: bool = option(False, "Print the README's table.")


class Command(NamedTuple):
    """A command: its options, what it runs, and one line on it."""

    options: type
    action: Callable[[Any], None]
    text: str


def _train(action: str, module: str = "run") -> Callable[[Any], None]:
    """Runs a function of ``fastpo.trainers.<module>``."""

    def run(config: Any) -> None:
        try:
            actions = import_module(f"fastpo.trainers.{module}")
        except ModuleNotFoundError as error:
            raise ConfigError(f"{error}; pip install 'fastpo[train,diffusion]'.") from error
        getattr(actions, action)(config)
        from fastpo.trainers.run import leave_ranks

        leave_ranks()

    return run


def _texts(value: Any) -> list[str]:
    """A text, or those of a list of messages."""
    messages = value if isinstance(value, list) else [value]
    contents = (m.get("content") if isinstance(m, dict) else m for m in messages)
    return [content for content in contents if isinstance(content, str)]


def _init_model(config: InitConfig) -> None:
    from fastpo.data.records import read_jsonl
    from fastpo.trainers import scratch

    rows = (row for _, row in read_jsonl(config.data))
    texts = [text for row in rows for value in row.values() for text in _texts(value)]
    if not texts:
        raise ConfigError(f"data: no text in {config.data}; the tokenizer is trained on texts.")
    model = scratch.init_model(
        config.output, texts, vocab_size=config.vocab_size, hidden_size=config.hidden_size,
        layers=config.layers, heads=config.heads, max_length=config.max_length, seed=config.seed,
    )  # fmt: skip
    sizes = f"{model.num_parameters():,} parameters, {model.config.vocab_size} tokens"
    print(f"{config.output}: {sizes}")


def _demo(config: _Demo) -> None:
    from fastpo import demo

    demo.main(config.output)


def _info(config: _Nothing) -> None:
    from fastpo import info

    info.main()


def _methods(config: _Methods) -> None:
    from fastpo import methods as catalogue

    if config.key is not None:
        try:
            row = catalogue.find(config.key)
        except ValueError as error:
            raise ConfigError(str(error).partition(": ")[2]) from None
        return print(catalogue.describe(row))
    chosen = config.block, config.needs, config.status, config.family
    found = list(catalogue.select(*chosen))
    if not found:
        remedy = "`fastpo methods` shows all, `fastpo methods KEY` the words of one."
        raise ConfigError(f"methods: none has all of this. {remedy}")
    if config.markdown:
        return print(catalogue.markdown(found), end="")
    for row in found:
        names = dict.fromkeys(entry.name for entry in row.entry_points)
        print(f"{row.key:24} {row.status:12} {', '.join(names) or row.note}")


COMMANDS = {
    "train dpo": Command(
        DPOConfig, _train("train_dpo"), "Train on pairs: prompt, chosen, rejected (text, messages)."
    ),
    "train sft": Command(
        SFTConfig, _train("train_sft"), "Fit a model to completions: prompt, completion."
    ),
    "train grpo": Command(
        GRPOConfig,
        _train("train_grpo"),
        "Train on groups of completions: given ones with rewards, or its own by --reward.",
    ),
    "train diffusion-dpo": Command(
        DiffusionDPOConfig,
        _train("train_diffusion_dpo", "diffusion_run"),
        "Train a pipeline of diffusers on pairs of images: chosen, rejected, prompt, class_label.",
    ),
    "init-model": Command(
        InitConfig, _init_model, "Write a small Llama with random weights and a tokenizer."
    ),
    "demo": Command(
        _Demo, _demo, "Fit a small model, train it on pairs, measure: no download, a few minutes."
    ),
    "info": Command(_Nothing, _info, "Versions, backends and why one is missing."),
    "methods": Command(
        _Methods, _methods, "The published methods, what they are made of and where they are."
    ),
}


def _overview(words: str) -> str:
    """Usage of all commands that begin with some words."""
    lines = [f"  {name:20} {c.text}" for name, c in COMMANDS.items() if name.startswith(words)]
    return "\n".join(
        [
            f"Usage: fastpo {words or 'COMMAND'} ... --option value", "",
            "The loss end of preference training. Commands:", *lines, "",
            "`fastpo COMMAND --help` shows the options of one, with their defaults.",
            "--version prints the version, --traceback shows where an error came from.",
            "Exit codes: 0 done; 1 failed, the line says why; 2 refused before it began;",
            "130 and 143 stopped by Ctrl-C and SIGTERM, after a checkpoint was written.",
        ]
    )  # fmt: skip


def run(arguments: Sequence[str]) -> None:
    """Run a command.

    Raises:
        ConfigError: there is no such command, or an option does not fit.
    """
    words = [word for word in arguments[:2] if not word.startswith("-")]
    name = next((n for n in (" ".join(words), *words[:1]) if n in COMMANDS), "")
    if name:
        command, prog = COMMANDS[name], f"fastpo {name}"
        given = parse_flags(command.options, arguments[len(name.split()) :], prog, command.text)
        file = given.pop("config", None)
        return command.action(build(command.options, read_yaml(file) if file else {}, given))
    if words and words != ["train"]:
        known = sorted({*COMMANDS, "train"})
        raise ConfigError(f"{' '.join(words)}: no such command; {near(' '.join(words), known)}")
    if "--version" in arguments:
        return print(f"fastpo {fastpo.__version__}")
    print(_overview(" ".join(words)))
    if not {"--help", "-h"} & {*arguments}:
        raise SystemExit(2)


def _stop(line: str, code: int) -> SystemExit:
    """An exit with a line on stderr, which the exception also shows as its text."""
    print(f"fastpo: {line}", file=sys.stderr)
    stop = SystemExit(f"fastpo: {line}")
    stop.code = code
    return stop


# How the system, torch and its archives say that a disk is full.
_FULL = ("No space left", "PytorchStreamWriter", "unexpected pos", "iostream error")


def _line(error: Exception) -> str:
    """The one line on a known error; empty for an unexpected one, whose traceback is wanted."""
    family, text = type(error).__module__.partition(".")[0], one_line(error)
    if any(words in text for words in _FULL):
        return f"No space left on device, or the file cannot be written ({text})."
    known = isinstance(error, (OSError, MemoryError)) or type(error).__name__ == "OutOfMemoryError"
    return text if known or family in ("fastpo", "huggingface_hub", "jinja2") else ""


def main(arguments: Iterable[str] | None = None) -> None:
    """Entry point: a known error is one line on stderr, not a traceback."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    wanted = [argument for argument in given if argument != "--traceback"]
    try:
        run(wanted)
    except KeyboardInterrupt:
        raise _stop("SIGINT: stopped outside of the training's steps.", 130) from None
    except Exception as error:
        line = _line(error)
        if wanted != given or not line:
            raise
        code = 2 if isinstance(error, ConfigError) else 1
        # A run that a signal stopped carries its number, see fastpo.trainers.stops.
        raise _stop(line, 128 + error.signal if hasattr(error, "signal") else code) from None


if __name__ == "__main__":
    main()
