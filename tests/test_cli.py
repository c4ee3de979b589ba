import json
import subprocess
import sys

import pytest

pytest.importorskip("transformers")

from fastpo.cli import main
from fastpo.trainers.config import ConfigError, DPOConfig, SFTConfig, build

REQUIRED = {"model": "m", "data": "d.jsonl", "output": "o"}


@pytest.fixture
def fastpo(capsys):
    """Run a command in this process; the text it prints."""

    def run(*arguments):
        main(map(str, arguments))
        return capsys.readouterr().out

    return run


def test_model_yaml_flags_and_tensorboard(tmp_path, fastpo):
    """init-model, then train dpo with YAML, of which flags override keys."""
    pytest.importorskip("tensorboard")
    pairs = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"What is {i} + 1?", "chosen": f" {i + 1}", "rejected": f" {i}"}
        for i in range(16)
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, output = tmp_path / "model", tmp_path / "run"
    sizes = ("--vocab-size", 300, "--hidden-size", 32, "--layers", 1, "--heads", 2)
    assert "parameters" in fastpo("init-model", model, "--data", pairs, *sizes)
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {model}\ndata: {pairs}\nmax_steps: 50\nlearning_rate: 1e-3\neval_share: 0.3\n"
        "trainer: {use_cpu: true}\n"
    )
    flags = ("train", "dpo", "--config", config, "--output", output, "--max-steps", 2)
    assert "eval_rewards/margins" in fastpo(*flags, "--trainer", "disable_tqdm=true")
    results = json.loads((output / "results.json").read_text())
    assert results["steps"] == 2
    assert results["before"]["eval_rewards/margins"] == 0
    assert list(output.glob("runs/*/events*"))

    with pytest.raises(SystemExit, match=r"^fastpo: .*holds checkpoints .* Pass --resume"):
        fastpo(*flags)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "m"}, "data: missing"),
        (
            REQUIRED | {"learning_rat": 1},
            "learning_rat: no such option; did you mean learning_rate",
        ),
        (REQUIRED | {"batch_size": "many"}, "batch_size: expected int"),
        (REQUIRED | {"max_steps": 1.5}, "max_steps: expected int"),
        (REQUIRED | {"resume": "perhaps"}, "resume: expected bool"),
        (REQUIRED | {"eval_share": 1.5}, "eval_share: expected a number in"),
        (REQUIRED | {"reference": "frozen"}, "reference: expected one of"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        build(DPOConfig, options)


def test_later_sources_win_and_yaml_floats_are_read():
    first = REQUIRED | {"learning_rate": "1e-4", "trainer": {"bf16": True, "optim": "adafactor"}}
    config = build(SFTConfig, first, {"trainer": {"bf16": False}})
    assert config.learning_rate == 1e-4
    assert config.trainer == {"bf16": False, "optim": "adafactor"}


def test_importing_fastpo_imports_no_trainer_library():
    heavy = ("transformers", "datasets", "jsonargparse", "yaml")
    code = f"import sys, fastpo; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
