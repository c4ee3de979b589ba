"""Rows of a run: read, converted, split, tokenised, with a line on what became of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from fastpo.data.errors import DataError
from fastpo.data.formats import PAIR_FIELDS, TEMPLATE_COLUMNS, near_name, renames
from fastpo.data.records import iterate_rows, load_rows, split_by_prompt
from fastpo.data.tokens import TokenReport, tokenize_rows
from fastpo.inputs import inputs_of
from fastpo.trainers.base import say
from fastpo.trainers.config import ConfigError, DPOConfig, RunConfig
from fastpo.trainers.dpo import (
    COUNTS,
    KLS,
    POLICY,
    REFERENCE,
    SUMS,
    columns_of,
    loss_function,
    require_inputs,
)


def source_of(config: RunConfig, is_eval: bool = False) -> dict[str, Any]:
    """Arguments of :func:`fastpo.data.records.iterate_rows` for the rows of a run.

    Raises:
        ConfigError: a stream has no end, as neither limit nor max_steps is given.
    """
    source = config.eval_data if is_eval else config.data
    split, limit = config.eval_split if is_eval else config.split, None if is_eval else config.limit
    is_file = Path(source).is_file()
    if is_eval and is_file and split == RunConfig.eval_split:
        split = None  # A file has no splits, and this name was not asked for.
    if config.streaming and not is_eval and limit is None:
        if config.max_steps < 1:
            raise ConfigError("streaming: give limit or max_steps: how many rows to read.")
        batch = config.batch_size * config.accumulation * PartialState().num_processes
        share = 0 if config.eval_data else config.eval_share
        limit = math.ceil(config.max_steps * batch / (1 - share)) + 1
    return {
        "source": source, "split": split, "limit": limit, "columns": config.columns,
        "subset": None if is_eval and is_file else config.subset, "streaming": config.streaming,
    }  # fmt: skip


def say_unused(
    unused: Iterable[str], in_template: Iterable[str] = (), missing: Iterable[str] = ()
) -> None:
    """Name the columns that nothing reads, once, and inputs that they may be meant for.

    Args:
        unused: names of columns.
        in_template: what rows give to a chat template that does not name it.
        missing: names of inputs that are not there, though they could be used.
    """
    unused = sorted(set(unused))
    names = unused + [f"{name} (the chat template has none)" for name in in_template]
    near = {name: near_name(name, unused) for name in sorted({*missing} - {*unused})}
    hints = "".join(
        f"; for {name} give --columns {name}={other}" for name, other in near.items() if other
    )
    if names:
        say(f"not used: {', '.join(names)}{hints}")


def load_data(
    config: RunConfig,
    fields: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    numbers: Mapping[str, bool] | None = None,
    known: Iterable[str] = (),
) -> tuple[Dataset, Dataset | None]:
    """Tokenised rows to train on and to evaluate on (None without any), with a line on each.

    Args:
        config: of the run.
        fields: what rows must have or be converted to.
        tokenizer: of the model.
        numbers: columns of numbers that rows must have, and whether they are lists.
        known: names of further columns that could be used.

    Raises:
        ConfigError: of :func:`source_of`.
        DataError: rows do not fit.
    """
    options = {"fields": fields, "numbers": numbers}
    # One rank of a machine works and fills the cache, the others read it.
    with PartialState().local_main_process_first():
        source = source_of(config)
        rows = load_rows(**source, **options)
        if config.eval_data:
            held = load_rows(**source_of(config, is_eval=True), **options)
        else:
            rows, held = split_by_prompt(rows, config.eval_share, config.seed)
        read = {"train": rows} | ({} if held is None else {"eval": held})
        parts = {
            name: tokenize_rows(
                part, fields, tokenizer, config.max_length, num_proc=config.num_proc
            )
            for name, part in read.items()
        }
    if config.streaming:
        say(f"streaming: at most the first {source['limit']} rows, as limit or max_steps say")
    for name, (part, report) in parts.items():
        say(f"{name}: {report}")
        _check_whole(part, report)
    unused = {name for part in read.values() for name in part.unique("unused")}
    say_unused(
        (name for names in unused for name in names.split(",") if name),
        sorted({name for _, report in parts.values() for name in report.unused}),
        {*TEMPLATE_COLUMNS, *known} - json.loads(rows[0]["template"] or "{}").keys(),
    )
    return parts["train"][0], parts["eval"][0] if "eval" in parts else None


def _check_whole(part: Dataset, report: TokenReport) -> None:
    given = [name for name in REFERENCE if name in part.column_names]
    cut = max(report.cut_prompts, report.cut_completions)
    if given and cut:
        problem = f"is of whole sequences, of which {cut} rows or more are cut"
        raise DataError(f"{given[0]}: {problem}. Raise max_length, or leave the column out.")


class PairColumns(NamedTuple):
    """What the rows of a run bring for a loss over pairs, beside the pairs.

    Attributes:
        fields: of the text: prompt, chosen, rejected, and ``extra``, a further response.
        numbers: columns of numbers, and whether they are lists.
        known: names of the columns that the loss could use and that are not there.
    """

    fields: tuple[str, ...]
    numbers: dict[str, bool]
    known: tuple[str, ...]


def pair_columns(config: DPOConfig) -> PairColumns:
    """The columns of the first row that the loss takes by name.

    Raises:
        ConfigError: one that the loss needs is not there.
        DataError: the rows cannot be read.
    """
    inputs = inputs_of(loss_function(config.loss))
    taken = columns_of(config.loss)
    if "extra_ids" in taken:
        taken = taken - {"extra_ids"} | {"extra"}
    if config.reference in ("adapter", "copy"):
        taken -= {*REFERENCE}  # They are computed; columns of that name are not used.
    where, first = "", {}
    if taken:
        rows = iterate_rows(**source_of(config) | {"limit": 1})
        where, _, first = next(rows, ("", 0, {}))
    found = sorted(name for name in taken if first.get(name) is not None)
    available = {*SUMS, *found}
    if "extra" in found:
        available |= {names[2] for names in (POLICY, REFERENCE, COUNTS, KLS)}
    try:
        require_inputs(config.loss, available)
    except ConfigError as error:
        nulls = sorted(taken & first.keys() - {*found})
        if nulls:
            raise DataError(f"{where}: {', '.join(nulls)} is null. {error}") from None
        others = [name for name in first if name not in PAIR_FIELDS]
        raise ConfigError(f"{error}{renames(sorted(taken - {*found}), others)}") from None
    _check_reference(found, [name for name in REFERENCE if name in inputs.keys() & available])
    return PairColumns(
        (*PAIR_FIELDS, *(name for name in found if name == "extra")),
        {name: inputs[name].is_sequence for name in found if name != "extra"},
        tuple(taken - {*found}),
    )


def _check_reference(found: Sequence[str], taken: Sequence[str]) -> None:
    """Whether rows that bring log-probs of the reference bring all that the loss takes."""
    missing = [name for name in taken if name not in found]
    if missing and len(missing) < len(taken):
        given = next(name for name in taken if name not in missing)
        raise ConfigError(f"reference: the rows have {given}, but not {missing[0]}; give both.")
    if taken and not missing:
        say(f"reference: the columns {', '.join(taken)}")
