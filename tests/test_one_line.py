"""What goes wrong before and in a run is one line and a code, not a traceback."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file

import fastpo
from fastpo import info
from fastpo.cli import main
from fastpo.trainers import run, scratch
from fastpo.trainers.base import accuracy

ROWS = [
    {"prompt": f"What is {i} + 1?", "chosen": f" {i + 1}", "rejected": f" {i}"} for i in range(8)
]
CHAT = [
    {
        "prompt": [{"role": "user", "content": f"hello {i}"}],
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    for i in range(8)
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    texts = [" ".join(row.values()) for row in ROWS]
    scratch.init_model(folder, texts, vocab_size=300, hidden_size=32, layers=1, heads=2)
    return folder


@pytest.fixture
def refused(tmp_path, model, capfd):
    """Runs a training that does not begin; the line and the code."""

    def train(*flags, **files):
        given = {"model": model, "data": write(tmp_path / "data.jsonl", ROWS)}
        given |= {"output": tmp_path / "run", "max-steps": 1, "eval-share": 0} | files
        words = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
        with pytest.raises(SystemExit) as stop:
            main(["train", "dpo", *words, "--no-tensorboard", "--trainer", "use_cpu=true", *flags])
        lines = [line for line in capfd.readouterr().err.splitlines() if "fastpo: " in line]
        assert len(lines) == 1
        assert "Traceback" not in lines[0]
        return lines[0], stop.value.code

    return train


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "a name/with blanks"], "model: a name/with blanks cannot be loaded"),
        (["--model", "/nowhere"], "model: /nowhere cannot be loaded"),
        (["--dtype", "float17"], "dtype: expected one of auto, float32"),
        (["--schedule", "linaer"], "schedule: .* did you mean linear?"),
        (["--lora-r", "2", "--lora-targets", "q_porj"], "no module is named 'q_porj'"),
        (["--batch-size", "0"], "batch_size: expected 1 or more, got 0"),
        (["--limit", "-3"], "limit: expected 1 or more, got -3"),
        (["--max-length", "4096"], "max_length: got 4096, and .* has 1024 positions"),
        (["--trainer", "optimm=sgd"], "optimm: trainer has no such option; did you mean optim?"),
        (["--trainer", "optim=nothing"], "trainer: nothing is not a valid"),
        (["--loss", "dpoo"], "loss: "),
        (["--lora-alpha", "8"], "lora_alpha: a LoRA needs lora_r above 0"),
        (["--eval-steps", "5"], "eval_steps: no rows are held out. Give eval_data or eval_share"),
        (["--eval-split", "held"], "eval_split: it is of eval_data"),
        (["--trainer", "label_smoothing_factor=0.1"], "label_smoothing_factor has no use here"),
        (["--trainer", "{max_grad_norm: 1, max_grad_norm: 2}"], "max_grad_norm is given twice"),
        (["--betta", "1"], "--betta: no such option; did you mean --beta?"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml: "),
    ],
)
def test_options_are_refused_with_code_2(refused, flags, message):
    line, code = refused(*flags)
    assert code == 2
    assert re.search(message.replace("?", r"\?"), line), line


def test_output_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").write_text("")
    line, code = refused(output=tmp_path / "file" / "run")
    assert (f"{tmp_path / 'file' / 'run'}: Not a directory" in line, code) == (True, 1)


def test_rows_that_are_no_text(refused, tmp_path):
    half = [row | {"chosen": "\ud83d x"} if i == 3 else row for i, row in enumerate(ROWS)]
    line, code = refused(data=write(tmp_path / "half.jsonl", half))
    assert ("half.jsonl, line 4: holds half a character, '\\ud83d'" in line, code) == (True, 1)
    line, code = refused(data=write(tmp_path / "chat.jsonl", CHAT))
    assert ("the tokenizer has no chat template" in line, code) == (True, 1)


def test_models_that_cannot_be_trained(refused, model, tmp_path):
    for name in ("eos", "nan", "broken"):
        shutil.copytree(model, tmp_path / name)
    settings = tmp_path / "eos" / "tokenizer_config.json"
    kept = {k: v for k, v in json.loads(settings.read_text()).items() if "_token" not in k}
    settings.write_text(json.dumps(kept))
    (tmp_path / "eos" / "special_tokens_map.json").unlink(missing_ok=True)
    weights = tmp_path / "nan" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"short")
    for name, message in (
        ("eos", "has no end-of-sequence token"),
        ("nan", "model.norm.weight of .* holds NaN or infinite numbers"),
        ("broken", "broken cannot be loaded"),
    ):
        line, code = refused(model=tmp_path / name)
        assert code == 2
        assert re.search(message, line), line


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize(
    "write_out",
    [
        lambda: torch.save(torch.ones(10_000), "/dev/full"),
        lambda: Path("/dev/full").write_text("a" * 100_000),
    ],
)
def test_a_full_disk_is_named(refused, monkeypatch, write_out):
    monkeypatch.setattr(run, "train_dpo", lambda config: write_out())
    line, code = refused()
    assert "No space left" in line
    assert code == 1


def test_an_unexpected_error_keeps_its_traceback(refused, monkeypatch):
    def fail(config):
        raise KeyError("a bug")

    monkeypatch.setattr(run, "train_dpo", fail)
    with pytest.raises(KeyError, match="a bug"):
        refused()


def test_traceback_is_shown_on_request(model):
    with pytest.raises(ValueError, match="limit: expected 1 or more"):
        main(["train", "sft", "--model", "m", "--data", "d", "--output", "o", "--limit", "-3",
              "--traceback"])  # fmt: skip


def test_init_model_on_messages_and_on_nothing(tmp_path, capsys):
    sizes = ["--vocab-size", "300", "--hidden-size", "32", "--layers", "1", "--heads", "2"]
    data = write(tmp_path / "chat.jsonl", CHAT)
    main(["init-model", str(tmp_path / "model"), "--data", str(data), *sizes])
    assert "hello" in run.load_tokenizer(str(tmp_path / "model")).get_vocab()
    for arguments, message in (
        ([str(tmp_path / "m")], "data: missing"),
        ([str(tmp_path / "m"), "--data", "/nowhere.jsonl"], "/nowhere.jsonl: No such file"),
        ([str(tmp_path / "m"), "--data", str(write(tmp_path / "n.jsonl", [{"a": 1}]))], "no text"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["init-model", *arguments])


def test_version_and_codes_are_in_the_help(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"fastpo {fastpo.__version__}\n"
    main(["--help"])
    shown = capsys.readouterr().out
    assert all(code in shown for code in ("0 done", "1 failed", "2 refused", "130", "143"))


def test_without_torch_a_program_says_so_in_one_line(tmp_path):
    """By both ways to start it; imported, it raises as any module does."""
    root = str(Path(fastpo.__file__).parents[1])
    program = f"import sys; sys.modules['torch'] = None; sys.path.insert(0, {root!r}); "
    program += "import importlib.util as u; plain = u.find_spec; "
    program += "u.find_spec = lambda name, *more: None if name == 'torch' else plain(name, *more); "
    for name in ("-m", "/usr/bin/fastpo"):
        code = f"{program}sys.argv = [{name!r}]; import fastpo.cli"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        assert done.stderr == "fastpo: torch is not installed. Remedy: pip install torch\n"
        assert done.returncode == 1
    code = f"{program}sys.argv = ['my.py']; import fastpo"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ModuleNotFoundError" in done.stderr


def test_info_does_not_promise_a_gpu(monkeypatch):
    """The CUDA kernels may be built where torch cannot use them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(info.backends, "why_not", lambda name, device: "")
    for version, reason in ((None, "torch is built without CUDA"), ("13.0", "no GPU is found")):
        monkeypatch.setattr(torch.version, "cuda", version)
        lines = [line.split(maxsplit=2) for line in info.report().splitlines()]
        shown = {(line[0], line[1]): line[2] for line in lines if line[0] in ("cpu", "cuda")}
        assert shown["cuda", "cuda"] == f"built, but {reason}"
        assert shown["cpu", "cpu"] == "available"


def test_ties_are_half_right():
    """A policy that is its own reference has ties alone, and the accuracy of a coin."""
    chosen, rejected = torch.tensor([1.0, 0, 0, torch.nan]), torch.tensor([0.0, 0, 1, 0])
    assert accuracy(chosen, rejected).tolist() == [1.0, 0.5, 0.0, 0.0]
