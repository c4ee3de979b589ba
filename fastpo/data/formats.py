"""Rows as people have them to rows of a prompt and completions: text, or messages of a chat.

The rules are those of TRL where it has any: a prompt that pairs share is their longest common
start, ``from``/``value`` messages are ``role``/``content`` ones, ``messages`` and ``text`` are
fitted whole.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastpo.data.errors import DataError

PAIR_FIELDS = ("prompt", "chosen", "rejected")
COMPLETION_FIELDS = ("prompt", "completion")
# What a chat template takes beside the messages.
TEMPLATE_COLUMNS = ("tools", "system", "chat_template_kwargs")

_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
# Names that people give to what is expected here; for hints only.
_ALIASES = {
    "prompt": ("question", "instruction", "query", "problem", "input"),
    "completion": ("answer", "response", "output", "solution", "chosen"),
    "chosen": ("accepted", "preferred", "winner", "chosen_response", "response_chosen"),
    "rejected": ("dispreferred", "loser", "rejected_response", "response_rejected"),
}


def is_chat(value: Any) -> bool:
    """Whether a value is a list of messages, each with a role; tool calls have no content."""
    return isinstance(value, list) and all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), (str, type(None)))
        for message in value
    )


def check_row(row: Mapping[str, Any], fields: Sequence[str], where: str) -> str:
    """Whether the fields of a row are ``text`` or ``chat``.

    Raises:
        DataError: a field is missing, of another type, or the two kinds are mixed.

    Example:
        >>> check_row({"prompt": "1 +", "completion": " 1"}, COMPLETION_FIELDS, "a.jsonl, line 1")
        'text'
    """
    kinds = {}
    missing = [field for field in fields if row.get(field) is None]
    if missing:
        found = ", ".join(map(repr, row)) or "none"
        problem = f"field {missing[0]!r} is missing; the fields found are {found}"
        others = [name for name in row if name not in fields]
        raise DataError(f"{where}: {problem}.{renames(missing, others)}")
    for field in fields:
        value = row[field]
        kinds[field] = "text" if isinstance(value, str) else "chat" if is_chat(value) else ""
        if not kinds[field]:
            expected = "a string or a list of {role, content} messages"
            raise DataError(f"{where}: field {field!r}: expected {expected}, got {value!r:.80}.")
    if len(set(kinds.values())) > 1:
        raise DataError(f"{where}: text and messages are mixed ({kinds}); use one for all fields.")
    return kinds[fields[0]]


def near_name(name: str, others: Iterable[str]) -> str | None:
    """That of some names which ``name`` may mean: its words in another order or among more; a typo.

    Example:
        >>> near_name("chosen_scores", ["prompt_id", "score_chosen"])
        'score_chosen'
    """
    words = lambda text: {word.rstrip("s") for word in text.lower().split("_")}
    others = sorted(others, key=lambda other: len(words(other)))
    for other in others:
        if words(name) <= words(other) or other in _ALIASES.get(name, ()):
            return other
    return next(iter(difflib.get_close_matches(name, others, 1, 0.85)), None)


def renames(missing: Iterable[str], found: Sequence[str]) -> str:
    """The options that give missing fields what was found under other names; '' for none."""
    near = {name: near_name(name, found) for name in missing}
    flags = " ".join(f"--columns {name}={other}" for name, other in near.items() if other)
    return f" To take it from another column: {flags}." if flags else ""


def messages_of(value: Any) -> Any:
    """Messages as ``{role, content}``, from ``{from, value}`` and single ones; else the value.

    Content in parts of text becomes one text, what is null is left out.

    Example:
        >>> messages_of({"from": "gpt", "value": "2"})
        [{'role': 'assistant', 'content': '2'}]
    """
    if isinstance(value, dict) and ({"from", "value"} <= value.keys() or "role" in value):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        return value
    return [_message(message) for message in value]


def _message(message: dict[str, Any]) -> dict[str, Any]:
    # Null is not there: templates would print it as a word.
    message = {name: value for name, value in message.items() if value is not None}
    for old, new in (("from", "role"), ("value", "content")):
        if old in message and new not in message:
            message = {new if name == old else name: value for name, value in message.items()}
    role, content = message.get("role"), message.get("content")
    if isinstance(role, str):
        message["role"] = _ROLES.get(role, role)
    if isinstance(content, list) and content:
        texts = [p.get("text") if isinstance(p, dict) and p.get("type") == "text" else None
                 for p in content]  # fmt: skip
        if all(isinstance(text, str) for text in texts):
            message["content"] = "".join(texts)
    return message


def shared_start(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """Characters or messages that two completions share as their prompt.

    A space before the first difference belongs to the completions. Of two completions of which one
    is the start of the other, the last character or message stays a completion.
    """
    count = min(len(chosen), len(rejected))
    place = next((i for i in range(count) if chosen[i] != rejected[i]), max(count - 1, 0))
    return place - 1 if place and chosen[place - 1] == " " else place


def convert(row: Mapping[str, Any], fields: Sequence[str], where: str) -> dict[str, Any]:
    """The prompt and the completions of a row, from any of the forms that people have.

    Args:
        row: columns of a data set; those that are null count as missing.
        fields: what is wanted: ``PAIR_FIELDS``, ``COMPLETION_FIELDS``, or the prompt alone; and
            further responses to the prompt.
        where: file and line, for messages.

    Returns:
        The fields, all text or all messages; ``tools`` and ``chat_template_kwargs`` of a chat; and
        ``used``, the names of the columns that these came from.

    Raises:
        DataError: what is wanted is not there; the message says how to convert the row.

    Example:
        >>> pair = {"chosen": "1+1= 2", "rejected": "1+1= 3"}
        >>> convert(pair, PAIR_FIELDS, "a.jsonl, line 1")
        {'prompt': '1+1=', 'chosen': ' 2', 'rejected': ' 3', 'used': ['chosen', 'rejected']}
    """
    given = {name: value for name, value in row.items() if value is not None}
    found: dict[str, Any] = {}
    origin: dict[str, tuple[str, ...]] = {}  # the columns that a field comes from

    def take(field: str, value: Any, *names: str) -> None:
        found[field], origin[field] = messages_of(value), names

    for field in fields:
        if field in given:
            take(field, given[field], field)
    if "conversations" in given and "prompt" not in found and "completion" not in fields:
        take("prompt", given["conversations"], "conversations")
    if isinstance(given.get("instruction"), str) and "prompt" not in found:
        more = given.get("input") or ""
        prompt = given["instruction"] + (f"\n{more}" if more else "")
        take("prompt", prompt, "instruction", *(["input"] if "input" in given else []))
        if "completion" in fields and "output" in given and "completion" not in found:
            take("completion", given["output"], "output")
    if "completion" in fields and "completion" not in found:
        _take_whole(given, take)
    if "chosen" in fields:
        _check_pairs(given, where)
        _share_prompt(found, origin, where)
    kind = check_row({**given, **found}, fields, where)
    if given.get("system") and found["prompt"] != "":  # a text that is fitted whole has no place
        kind = _add_system(found, given["system"], where)
        origin["system"] = ("system",)
    result = {field: found[field] for field in fields}
    if kind == "chat":
        for name, expected in (("tools", list), ("chat_template_kwargs", dict)):
            if given.get(name):
                result[name] = _from_json(given[name], expected, f"{where}: column {name!r}")
                origin[name] = (name,)
    return result | {"used": [name for names in origin.values() for name in names]}


def _take_whole(given: Mapping[str, Any], take) -> None:
    """A conversation or a text that is fitted whole, as a completion of no prompt."""
    for name, prompt in (("messages", []), ("conversations", []), ("text", "")):
        if name in given:
            take("prompt", prompt)
            return take("completion", given[name], name)


def _check_pairs(given: Mapping[str, Any], where: str) -> None:
    if "completion" in given and not {"chosen", "rejected"} & given.keys():
        problem = "a row of one completion, where pairs of chosen and rejected are wanted"
        remedy = (
            "Join a good and a bad completion of the same prompt, in Python: pairs = "
            "[{'prompt': a['prompt'], 'chosen': a['completion'], 'rejected': b['completion']} "
            "for a in rows for b in rows if a['prompt'] == b['prompt'] and a['label'] and not "
            "b['label']]. Or fit the good ones by `fastpo train sft`."
        )
        raise DataError(f"{where}: {problem}. {remedy}")


def _share_prompt(found: dict[str, Any], origin: dict[str, Any], where: str) -> None:
    """Give pairs the prompt that stands in both completions, where it does."""
    prompt, chosen, rejected = (found.get(field) for field in PAIR_FIELDS)
    if type(chosen) is not type(rejected) or not chosen or not rejected:
        return
    if isinstance(prompt, list) and is_chat(chosen):
        # Whole conversations beside their prompt.
        if chosen[: len(prompt)] == prompt == rejected[: len(prompt)]:
            place = len(prompt)
        else:
            return
    elif isinstance(prompt, str) and is_chat(chosen) and is_chat(rejected):
        place = 0
        if chosen[0]["role"] == "assistant" == rejected[0]["role"]:
            found["prompt"] = [{"role": "user", "content": prompt}]
            return
        place = shared_start(chosen, rejected)
        texts = [str(message["content"]).strip() for message in chosen[:place]]
        if prompt.strip() not in texts:
            problem = f"the prompt {prompt!r:.60} is in none of the messages that pairs share"
            remedy = "Make it messages, or rename the column that holds the prompt."
            raise DataError(f"{where}: {problem}. {remedy}")
    elif prompt is None and isinstance(chosen, (str, list)):
        place = shared_start(chosen, rejected)
        origin["prompt"] = ()
    else:
        return
    if prompt is None or isinstance(prompt, str):
        found["prompt"] = chosen[:place]
    found["chosen"], found["rejected"] = chosen[place:], rejected[place:]


def _add_system(found: dict[str, Any], system: Any, where: str) -> str:
    """Put a system message first; text becomes a conversation, which has a place for it."""
    if not isinstance(system, str):
        raise DataError(f"{where}: column 'system': expected a string, got {system!r:.80}.")
    first = {"role": "system", "content": system}
    if isinstance(found["prompt"], str):
        for field, text in found.items():
            role = "user" if field == "prompt" else "assistant"
            found[field] = [{"role": role, "content": text}]
    whole = found["prompt"] or found.get("completion", [])
    if whole and whole[0]["role"] == "system":
        remedy = "Leave one of them out."
        raise DataError(f"{where}: a column 'system', and a system message in the row. {remedy}")
    field = "prompt" if found["prompt"] else "completion"
    found[field] = [first, *found[field]]
    return "chat"


def _from_json(value: Any, expected: type, where: str) -> Any:
    """A list or mapping, which may be written as JSON text: columns of data sets have one type."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg}): {value!r:.80}.") from error
    if not isinstance(found, expected):
        raise DataError(f"{where}: expected a {expected.__name__}, got {value!r:.80}.")
    return found


def number_of(value: Any, where: str) -> float | int:
    """A finite number of a column, which a CSV file holds as text.

    Raises:
        DataError: it is none.

    Example:
        >>> number_of("8.5", "pairs.csv, row 1: column 'chosen_scores'")
        8.5
    """
    found = value
    if isinstance(value, str):
        try:
            found = float(value)
        except ValueError:
            found = math.nan
    if not isinstance(found, (int, float)) or not math.isfinite(found):
        raise DataError(f"{where}: expected a finite number, got {value!r:.80}.")
    return found
