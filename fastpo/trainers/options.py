"""Options of a command, from one dataclass: flags, YAML keys, help, types and ranges."""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import json
import re
import types
from argparse import ArgumentError
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from jsonargparse import ActionYesNo, ArgumentParser, get_loader

# A text with commas, or a list in YAML.
Names = str | list[str]
# The types of what YAML gives.
_PLAIN = (str, bool, int, float, list, dict, types.NoneType)
Config = TypeVar("Config")


class ConfigError(ValueError):
    """An option is unknown, missing or of the wrong kind; the message names it."""


def one_line(error: BaseException) -> str:
    """What an error says, its first paragraph, without the breaks of lines."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'input or output'}: {error.strerror}"
    return " ".join(str(error).strip().partition("\n\n")[0].split()) or type(error).__name__


@contextlib.contextmanager
def loading(option: str, name: str) -> Iterator[None]:
    """Errors of a library that loads what an option names, in one line that names both.

    Raises:
        ConfigError: from the error, whichever it was.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{option}: {name} cannot be loaded ({one_line(error)}).") from error


def option(
    default: Any,
    text: str,
    within: str = "",
    choices: Sequence[str] = (),
    positional: bool = False,
) -> Any:
    """A field of a dataclass of options.

    Args:
        default: its value if it is not given; a function makes a new one for each config.
        text: its help.
        within: the interval of a number, such as ``[0, 1)``.
        choices: the words it may be.
        positional: given without its name, once.
    """
    metadata = {
        "help": text, "within": within, "choices": tuple(choices), "positional": positional,
    }  # fmt: skip
    kind = "default_factory" if callable(default) else "default"
    return field(**{kind: default}, metadata=metadata)


def mapping(text: str) -> Any:
    """A field of further options, given as key=value."""
    return option(dict, f"{text}, as key=value; repeatable.")


def near(name: str, known: Iterable[str]) -> str:
    """``did you mean`` this one, or the list of all.

    >>> near("bata", ["beta", "gamma"]), near("x", ["beta", "gamma"])
    ('did you mean beta?', 'there are beta, gamma.')
    """
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(known) or 'none'}."


def items(value: str | float | list[Any]) -> list[str]:
    """The parts of a text with commas, without blanks around them, or those of a list.

    >>> items("q_proj, v_proj,"), items(["q_proj", " v_proj"]), items(""), items([1, 0.5])
    (['q_proj', 'v_proj'], ['q_proj', 'v_proj'], [], ['1', '0.5'])
    """
    parts = value if isinstance(value, list) else str(value).split(",")
    return [text for part in parts if (text := str(part).strip())]


def in_range(value: Real, within: str) -> bool:
    """Whether a number is in an interval.

    >>> in_range(0, "[0, 1)"), in_range(1, "[0, 1)"), in_range(float("inf"), "(0, inf)")
    (True, False, False)
    """
    least, most = (float(bound) for bound in within.strip("[]()").split(","))
    above = value >= least if within[0] == "[" else value > least
    return above and (value <= most if within[-1] == "]" else value < most)


def _words(within: str) -> str:
    """An interval in words."""
    least = within.strip("[]()").partition(",")[0]
    if not within.endswith("inf)"):
        return f"a number in {within}"
    if least == "-inf":
        return "a finite number"
    return f"{least} or more" if within[0] == "[" else f"a number above {least}"


def check(config: Any) -> None:
    """Whether each number is in its range, and each word among its choices.

    Raises:
        ConfigError: one is not.
    """
    hints = get_type_hints(type(config))
    for each in fields(config):
        name, value, hint = each.name, getattr(config, each.name), hints[each.name]
        kinds = get_args(hint) or (hint,)
        if value is None and types.NoneType in kinds:
            continue
        within, choices = each.metadata["within"], each.metadata["choices"]
        if within:
            number = Integral if int in kinds else Real
            fits = isinstance(value, number) and not isinstance(value, bool)
            if not fits or not in_range(value, within):
                raise ConfigError(f"{name}: expected {_words(within)}, got {value!r}.")
        elif choices and value not in choices:
            expected = ", ".join(choices)
            raise ConfigError(f"{name}: expected one of {expected}, got {value!r}.")


def refuse_given(config: Any, names: Iterable[str], problem: str) -> None:
    """Options that nothing would read have their defaults.

    Args:
        config: a dataclass of options.
        names: of those that nothing reads, as the others are.
        problem: why not, and what to do.

    Raises:
        ConfigError: one has another value.
    """
    for name in names:
        if getattr(config, name) != config.__dataclass_fields__[name].default:
            raise ConfigError(f"{name}: {problem}, or leave it out.")


def flag(name: str) -> str:
    """The flag of an option."""
    return f"--{name.replace('_', '-')}"


@functools.cache
def parser_of(cls: type, prog: str = "fastpo", text: str = "") -> ArgumentParser:
    """A parser with a flag per field of a dataclass of options."""
    parser = ArgumentParser(
        prog=prog, description=text, exit_on_error=False, allow_abbrev=False,
        print_config=None, default_meta=False,
    )  # fmt: skip
    hints = get_type_hints(cls)
    for each in fields(cls):
        default = each.default_factory() if each.default is MISSING else each.default
        known: dict[str, Any] = {"default": default, "help": each.metadata["help"]}
        if hints[each.name] is bool:
            known |= {"action": ActionYesNo(no_prefix="no-"), "nargs": "?"}
        else:
            known |= {"type": hints[each.name]}
        if each.metadata["positional"]:
            parser.add_argument(each.name, nargs="?", **known)
        elif bool in get_args(hints[each.name]):
            parser.add_argument(flag(each.name), nargs="?", const=True, **known)
        else:
            parser.add_argument(flag(each.name), **known)
    parser.add_argument("--config", type=str, help="YAML file of these; flags override it.")
    return parser


def _kind(hint: Any) -> str:
    """A type in words."""
    parts = [part for part in get_args(hint) if part is not types.NoneType]
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, parts))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(map(_kind, parts))
    if get_origin(hint) is None:
        return getattr(hint, "__name__", str(hint))
    return "key: value pairs" if get_origin(hint) is dict else "a list"


def _refusal(error: Exception, hints: Mapping[str, Any], show: Callable[[str], str]) -> ConfigError:
    """The library's several lines on a value or a name, as one of ours."""
    text = str(error)
    if found := re.match(r'Parser key "(\w+)', text):
        name, got = found[1], re.findall(r"(?:Got|Given) value: (.*)", text)
        return ConfigError(f"{show(name)}: expected {_kind(hints[name])}, got {got[-1]}.")
    if found := re.match(r"(?:unrecognized arguments: |Option ')([^ '=]+)", text):
        return ConfigError(f"{found[1]}: no such option; {near(found[1], map(show, hints))}")
    return ConfigError(" ".join(text.split()))


def _yaml(text: str, where: str) -> Any:
    """What a text in YAML says; of two values for one key none would be the right one."""
    import yaml

    found, seen, left = get_loader("yaml")(text), set(), [yaml.compose(text, yaml.SafeLoader)]
    while left:
        node = left.pop()
        if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            for name in names:
                if names.count(name) > 1:
                    raise ConfigError(f"{where}: {name} is given twice. Take one of them out.")
            left += [value for _, value in node.value]
        else:
            left += node.value
    return found


def _pairs(name: str, text: str) -> list[str]:
    """``--trainer key=value``, or a mapping in YAML, as the library's ``--trainer.key=value``."""
    if re.match(r"\w+=", text):
        return [f"{name}.{text}"]
    found = _yaml(text, name)
    if not isinstance(found, dict):
        raise ConfigError(f"{name}: expected key=value, got {text!r}.")
    text_of = lambda value: value if isinstance(value, str) else json.dumps(value)
    return [f"{name}.{key}={text_of(value)}" for key, value in found.items()]


def parse_flags(cls: type, arguments: Sequence[str], prog: str, text: str) -> dict[str, Any]:
    """The options that are given on a command line, and no others; ``config`` is the YAML file.

    Raises:
        ConfigError: a flag is unknown, or its value of the wrong kind.
    """
    hints = get_type_hints(cls)
    mappings = {flag(name) for name, hint in hints.items() if get_origin(hint) is dict}
    parser = parser_of(cls, prog, text)
    given, left = [], list(arguments)
    while left:
        argument = left.pop(0)
        name, equals, rest = argument.partition("=")
        if name in mappings and (equals or left):
            given += _pairs(name, rest if equals else left.pop(0))
        else:
            given.append(argument)
    try:
        return parser.parse_args(given, defaults=False).as_dict()
    except (ArgumentError, TypeError) as error:
        raise _refusal(error, hints | {"config": str}, flag) from error


def build(cls: type[Config], *sources: Mapping[str, Any]) -> Config:
    """A config from mappings, later ones over earlier ones; mappings are merged key by key.

    Raises:
        ConfigError: a key is unknown, required and missing, or its value of the wrong kind.

    Example:
        >>> from fastpo.trainers.config import SFTConfig
        >>> paths = {"model": "m", "data": "d.jsonl", "output": "out"}
        >>> build(SFTConfig, paths | {"learning_rate": "1e-4"}, {"batch_size": 2}).learning_rate
        0.0001
    """
    values: dict[str, Any] = {}
    for source in sources:
        for name, value in source.items():
            is_mapping = isinstance(value, Mapping) and isinstance(values.get(name, {}), Mapping)
            values[name] = {**values.get(name, {}), **value} if is_mapping else value
    return cls(**typed(values, get_type_hints(cls)))


def typed(values: Mapping[str, Any], hints: Mapping[str, Any], of: str = "") -> dict[str, Any]:
    """Values as the types of their names ask for; ``1e-4`` and ``"1e-4"`` are numbers.

    Objects that no text or YAML file can give, such as functions and tensors, stay as they are.

    Args:
        values: by name.
        hints: types by name, all names that there are.
        of: whose options they are, for the message.

    Raises:
        ConfigError: a name is unknown, or its value of the wrong kind.
    """
    parser = ArgumentParser(exit_on_error=False, default_meta=False)
    objects = {n: v for n, v in values.items() if not isinstance(v, _PLAIN)}
    for name in values:
        if name not in hints:
            problem = f"{of} has no such option" if of else "no such option"
            raise ConfigError(f"{name}: {problem}; {near(name, hints)}")
        if name in objects:
            continue
        parser.add_argument(f"--{name}", type=hints[name], default=None)
        if values[name] is None and not _takes_none(hints[name]):
            raise ConfigError(f"{name}: expected {_kind(hints[name])}, got None.")
    try:
        plain = {name: value for name, value in values.items() if name not in objects}
        return parser.parse_object(plain).as_dict() | objects
    except (ArgumentError, TypeError) as error:
        raise _refusal(error, hints, str) from error


def value_hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Types of a function's arguments by name, as far as text or YAML can give them.

    >>> def weigh(values: Iterable, share: float | None = None, *, name: str = "a"): ...
    >>> hints = value_hints(weigh)
    >>> hints["values"], hints["name"]
    (typing.Any, <class 'str'>)
    """
    try:
        hints = get_type_hints(function)
    except NameError:  # of a type that is there for type checkers only
        hints = {}
    plain = (bool, int, float, str, types.NoneType)
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not parameter.VAR_KEYWORD:
            hint = hints.get(name, Any)
            is_union = get_origin(hint) in (Union, types.UnionType)
            members = get_args(hint) if is_union else (hint,)
            parts = [part for part in members if part in plain]
            # Lists and mappings of numbers are as YAML gives them.
            has_more = any(get_origin(part) not in (None, Literal) for part in members)
            literal = get_origin(hint) is Literal
            known = parts and not has_more
            found[name] = hint if literal else Union[tuple(parts)] if known else Any  # noqa: UP007
    return found


def _takes_none(hint: Any) -> bool:
    return hint is Any or types.NoneType in get_args(hint)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; 1e-4 is a number, as in YAML 1.2.

    Raises:
        ConfigError: the file is missing, not YAML, holds no mapping, or a key twice.
    """
    import yaml

    try:
        found = _yaml(Path(path).read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(found or {}, dict):
        raise ConfigError(f"{path}: expected key: value lines, got {type(found).__name__}.")
    return found or {}


def given_once(own: Mapping[str, Any], more: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Options that have flags of their own (None: not given) with those of a mapping.

    Args:
        own: by the names of their flags.
        more: of the mapping.
        name: of the mapping.

    Raises:
        ConfigError: one is given in both.

    Example:
        >>> given_once({"beta": None, "gamma": 0.5}, {"beta": 0.1}, "loss_options")
        {'beta': 0.1, 'gamma': 0.5}
    """
    for option in own.keys() & more.keys():
        if own[option] is not None:
            got = f"{own[option]!r} and in {name} {more[option]!r}"
            raise ConfigError(f"{option}: expected one value, got {got}. Leave one out.")
    return {**own, **more}
