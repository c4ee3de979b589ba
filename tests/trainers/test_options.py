"""Options: every one has a flag, a YAML key, a line of help, and a range if it is a number."""

import contextlib
import math
import re
from dataclasses import fields
from types import SimpleNamespace
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import torch

from fastpo.cli import COMMANDS, main
from fastpo.trainers import config as configs
from fastpo.trainers import run
from fastpo.trainers.config import LORA, SAMPLING, remarks
from fastpo.trainers.diffusion_config import DiffusionDPOConfig
from fastpo.trainers.diffusion_setup import loss_of
from fastpo.trainers.lora import lora_targets
from fastpo.trainers.options import (
    ConfigError,
    build,
    flag,
    in_range,
    parse_flags,
    read_yaml,
    typed,
    value_hints,
)

CONFIGS = {name: command.options for name, command in COMMANDS.items()}
REQUIRED = {"model": "m", "data": "d.jsonl", "output": "o"}


def kinds(cls, name):
    hint = get_type_hints(cls)[name]
    return get_args(hint) or (hint,)


def required(cls):
    return {name: value for name, value in REQUIRED.items() if name in get_type_hints(cls)}


NUMBERS = [
    pytest.param(cls, each, id=f"{command}-{each.name}")
    for command, cls in CONFIGS.items()
    for each in fields(cls)
    if {int, float} & {*kinds(cls, each.name)} and str not in kinds(cls, each.name)
]


@pytest.mark.parametrize(("cls", "each"), NUMBERS)
def test_every_number_has_a_range_that_is_kept(cls, each):
    """What is outside is refused by name, before anything is loaded; a default is inside."""
    within = each.metadata["within"]
    assert within, "a number without a range"
    assert each.default is None or in_range(each.default, within)
    for value in (-math.inf, -2, -1, -1e-9, 0, 0.5, 1, 1e300, math.inf, math.nan):
        is_whole = int not in kinds(cls, each.name) or isinstance(value, int)
        fits = is_whole and in_range(value, within)
        refused = pytest.raises(ConfigError, match=rf"^{each.name}: expected")
        with contextlib.nullcontext() if fits else refused:
            try:
                build(cls, required(cls) | {each.name: value})
            except ConfigError as error:
                # Some options ask for another one beside them.
                if not fits or f"{each.name}: expected" in str(error):
                    raise


@pytest.mark.parametrize("command", CONFIGS)
def test_help_shows_every_option_with_its_default(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    entries = re.split(r"\n  (?=\S)", capsys.readouterr().out)
    for each in fields(CONFIGS[command]):
        shown = each.name if each.metadata["positional"] else flag(each.name)
        (entry,) = (e for e in entries if re.split(r"[ ,\n]", e)[0] == shown)
        assert each.metadata["help"].split()[0] in entry
        assert "default: " in entry


def value_or_refused(read, *arguments):
    try:
        return read(*arguments)
    except ConfigError:
        return "refused"


@pytest.mark.parametrize("command", [name for name in CONFIGS if name.startswith("train")])
def test_flags_and_yaml_give_the_same(command, tmp_path):
    """By every option: the text of a flag is read as the value of a YAML key is."""
    cls = CONFIGS[command]
    for each in fields(cls):
        for text in ("1e-1", "true", "[a, b]", "{a: 1e-1}", "-3"):
            path = tmp_path / "a.yaml"
            path.write_text(f"{each.name}: {text}\n")
            by_flag = value_or_refused(parse_flags, cls, [flag(each.name), text], "", "")
            by_key = value_or_refused(typed, read_yaml(path), get_type_hints(cls))
            # A flag's words are text where a name in YAML would be a number or a list.
            is_text = str in kinds(cls, each.name) and by_flag == {each.name: text}
            assert is_text or by_flag == by_key, (each.name, text)


def test_numbers_with_exponents_in_every_mapping(tmp_path):
    for command, cls in CONFIGS.items():
        for name in (n for n, h in get_type_hints(cls).items() if h == dict[str, Any]):
            words = ["k=1e-1", "small=1e-4", "n=3", "t=true", "s=cosine", "l=[1, 2e-1]"]
            flags = [word for pair in words for word in (flag(name), pair)]
            right = {"k": 0.1, "small": 1e-4, "n": 3, "t": True, "s": "cosine", "l": [1, 0.2]}
            assert parse_flags(cls, flags, command, "") == {name: right}
            whole = "{k: 1e-1, small: 1e-4, n: 3, t: true, s: cosine, l: [1, 2e-1]}"
            assert parse_flags(cls, [flag(name), whole], command, "") == {name: right}
            (tmp_path / "a.yaml").write_text(f"{name}: {whole}\n")
            assert read_yaml(tmp_path / "a.yaml") == {name: right}
            more = parse_flags(cls, [flag(name), "n=4", f"{flag(name)}={{m: 1}}"], command, "")
            merged = build(cls, required(cls), {name: right}, more)
            assert getattr(merged, name) == right | {"n": 4, "m": 1}


def test_unknown_names_are_refused_with_the_nearest(tmp_path):
    for command, cls in CONFIGS.items():
        for each in fields(cls):
            if each.metadata["positional"] or len(each.name) < 4:
                continue
            wrong = each.name[:-1]
            with pytest.raises(ConfigError, match=rf"{flag(wrong)}: no such option; did you mean"):
                parse_flags(cls, [flag(wrong), "1"], command, "")
            with pytest.raises(ConfigError, match=rf"^{wrong}: no such option; did you mean"):
                build(cls, {wrong: 1})


def test_values_are_typed_as_a_function_asks():
    def loss(x: torch.Tensor, beta: float = 0.1, kind: str = "a", low: float | torch.Tensor = 0.2):
        """Weigh."""

    hints = value_hints(loss)
    assert typed({"beta": 1, "low": "1e-1"}, hints) == {"beta": 1.0, "low": 0.1}
    assert isinstance(typed({"beta": 1}, hints)["beta"], float)
    with pytest.raises(ConfigError, match="beta: expected float, got high"):
        typed({"beta": "high"}, hints)


@pytest.mark.parametrize("empty", ["resume", "lora_r", "trainer", "model", "eval_share"])
def test_an_empty_yaml_key_is_refused(empty):
    with pytest.raises(ConfigError, match=rf"^{empty}: expected .* got None"):
        build(CONFIGS["train dpo"], REQUIRED | {empty: None})


def another(cls, name):
    """A value that is not the default, of an option."""
    each, kind = cls.__dataclass_fields__[name], kinds(cls, name)
    if each.metadata["choices"]:
        return next(word for word in each.metadata["choices"] if word != each.default)
    if float in kind and str not in kind:
        return (each.default or 1.0) / 2
    return (each.default or 0) + 1 if int in kind else "1"


@pytest.mark.parametrize("command", [name for name in CONFIGS if name.startswith("train")])
def test_options_of_a_lora_need_one(command):
    cls = CONFIGS[command]
    of_lora = {each.name for each in fields(cls) if each.name.startswith("lora_")}
    assert of_lora == {"lora_r", *LORA}
    for name in LORA:
        given = required(cls) | {name: another(cls, name)}
        with pytest.raises(ConfigError, match=f"^{name}: a LoRA needs lora_r above 0"):
            build(cls, given)
        assert getattr(build(cls, given, {"lora_r": 2}), name) == given[name]


def test_options_of_sampling_need_a_reward():
    """Of all options of groups, those that only sampling reads are refused without it."""
    cls, refused = CONFIGS["train grpo"], set()
    for name in (each.name for each in fields(cls) if each.name not in ("reward", "trainer")):
        hint = get_type_hints(cls)[name]
        if get_origin(hint) is dict or name in REQUIRED:
            continue
        given = REQUIRED | {name: another(cls, name)}
        problem = value_or_refused(build, cls, given, {"reward": "m:f"}) == "refused"
        if not problem and value_or_refused(build, cls, given) == "refused":
            with pytest.raises(ConfigError, match=f"^{name}: given completions are not scored"):
                build(cls, given)
            refused.add(name)
    assert refused == {*SAMPLING}


def test_a_key_that_is_given_twice_is_named(tmp_path):
    for text, name in (
        ("seed: 1\nbeta: 2\nseed: 1\n", "seed"),
        ("trainer:\n  optim: sgd\n  optim: adamw_torch\n", "optim"),
        ("columns: [{a: 1, a: 2}]\n", "a"),
    ):
        (tmp_path / "a.yaml").write_text(text)
        with pytest.raises(ConfigError, match=rf"a\.yaml: {name} is given twice"):
            read_yaml(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("a: &one {x: 1}\nb: *one\nc: {x: 2}\n")
    assert read_yaml(tmp_path / "a.yaml") == {"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 2}}


def test_options_that_ask_for_what_is_not_done_are_remarked():
    cls = CONFIGS["train dpo"]
    given = REQUIRED | {"eval_data": "e.jsonl", "eval_share": 0.2}
    assert remarks(build(cls, given)) == ["eval_share: 0.2 is not used, as there is eval_data"]
    steps = {"max_steps": 5, "warmup_steps": 5}
    (line,) = remarks(build(cls, REQUIRED, steps))
    assert line == "warmup_steps: 5 steps of warm-up in 5, the learning rate never reaches its peak"
    assert remarks(build(cls, REQUIRED, steps | {"warmup_steps": 4})) == []
    assert remarks(build(cls, REQUIRED, {"warmup_steps": 100})) == []
    with pytest.raises(ConfigError, match="warmup_steps: the schedule constant has no warm-up"):
        build(cls, REQUIRED, steps | {"schedule": "constant"})


def test_arguments_of_the_trainer_that_nothing_reads_are_refused():
    run = pytest.importorskip("fastpo.trainers.run")
    given = {name: REQUIRED | {"trainer": {name: 1}} for name in run._REFUSED_BY_GROUPS}
    given |= {name: REQUIRED | {"trainer": {name: 1}} for name in run._REFUSED}
    assert given.keys() <= {each.name for each in fields(run.TrainingArguments)}
    for name, options in given.items():
        message = f"trainer: {name} has no use here, as .* Leave it out"
        with pytest.raises(ConfigError, match=message):
            run.training_arguments(build(CONFIGS["train grpo"], options))
    lengths = REQUIRED | {"trainer": {"train_sampling_strategy": "group_by_length"}}
    with pytest.raises(ConfigError, match="train_sampling_strategy: expected random or seq"):
        run.training_arguments(build(CONFIGS["train sft"], lengths))


def test_a_run_without_a_step_does_not_start():
    base = pytest.importorskip("fastpo.trainers.base")
    args = SimpleNamespace(train_batch_size=4, world_size=1, dataloader_drop_last=True)
    trainer = SimpleNamespace(train_dataset=range(3), args=args)
    with pytest.raises(ConfigError, match=r"dataloader_drop_last: .* takes 4 rows and there are 3"):
        base.StatisticTrainer.train(trainer)


@pytest.fixture
def layers():
    return torch.nn.ModuleDict(
        {
            "first": torch.nn.ModuleDict(
                {name: torch.nn.Linear(2, 2) for name in ("q_proj", "v_proj", "o_proj")}
            ),
            "lm_head": torch.nn.Linear(2, 2),
        }
    )


@pytest.mark.parametrize(
    ("targets", "adapted"),
    [
        ("q_proj, v_proj", {"first.q_proj", "first.v_proj"}),
        (" q_proj ,v_proj,", {"first.q_proj", "first.v_proj"}),
        (["q_proj", "lm_head"], {"first.q_proj", "lm_head"}),
        ("first.o_proj", {"first.o_proj"}),
        (r".*\.(q|v)_proj", {"first.q_proj", "first.v_proj"}),
        ("all-linear", {f"first.{name}_proj" for name in "qvo"} | {"lm_head"}),
    ],
)
def test_lora_is_on_every_target(layers, targets, adapted):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=1, target_modules=lora_targets(layers, targets))
    model = peft.get_peft_model(layers, config)
    found = {n.partition(".lora_A")[0] for n, _ in model.named_parameters() if ".lora_A" in n}
    assert {name.removeprefix("base_model.model.") for name in found} == adapted


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("q_proj, k_porj", "no module is named 'k_porj'; did you mean"),
        (["q_proj", "gate"], "no module is named 'gate'; there are"),
        (r".*\.gate", "matches no module"),
        ("(q", "is no regex"),
        (" , ", "there is none"),
    ],
)
def test_lora_target_that_matches_nothing_is_named(layers, targets, message):
    with pytest.raises(ConfigError, match=message):
        lora_targets(layers, targets)


@pytest.mark.parametrize(
    ("train", "name", "config"),
    [
        (run.train_dpo, "beta", configs.DPOConfig(model="m", data="d", output="o")),
        (run.train_grpo, "beta", configs.GRPOConfig(model="m", data="d", output="o")),
        (run.train_grpo, "entropy_coef", configs.GRPOConfig(model="m", data="d", output="o")),
        (loss_of, "beta", DiffusionDPOConfig(model="m", data="d", output="o")),
    ],
)
def test_an_option_of_the_loss_is_given_once(train, name, config):
    setattr(config, name, 0.5)
    config.loss_options = {name: 0.3}
    with pytest.raises(ConfigError, match=rf"^{name}: expected one value, got 0.5 and in loss_op"):
        train(config)


def test_a_checkpoint_of_another_folder_brings_its_options(tmp_path):
    """They are those of the run that wrote it, wherever it is continued."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    config = configs.DPOConfig(model="m", data="d", output=str(first))
    configs.keep_for_resume(config, first, None)
    config.output = str(second)
    configs.keep_for_resume(config, second, first / "checkpoint-3")
    config.learning_rate, config.beta = 1e-3, 5.0
    with pytest.raises(ConfigError, match=r"learning_rate 1e-06 -> 0.001; beta None -> 5.0"):
        configs.keep_for_resume(config, second, first / "checkpoint-3")
