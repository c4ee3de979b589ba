"""A tiny model folder, pairs and a config, shared by the trainer tests."""

import pytest
import torch
from recipe_parts import QUIET, vowels
from tiny_rows import make_pairs, write_jsonl

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from transformers import AutoModelForCausalLM

from fastpo.trainers import reference, run, scratch
from fastpo.trainers.rounds import OuterLoop


@pytest.fixture(scope="session")
def completions_file(tmp_path_factory):
    rows = [{"prompt": p["prompt"], "completion": p["chosen"]} for p in make_pairs(24)]
    return write_jsonl(tmp_path_factory.mktemp("data") / "sft.jsonl", rows)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    texts = [" ".join(row.values()) for row in make_pairs(50)]
    scratch.init_model(folder, texts, vocab_size=300, hidden_size=32, layers=2, heads=2)
    return str(folder)


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", make_pairs(24))


@pytest.fixture
def options(model_folder, pairs_file, tmp_path):
    """Options of a short run on the CPU that writes little."""
    return {
        "model": model_folder,
        "data": pairs_file,
        "output": str(tmp_path / "run"),
        "batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "logging_steps": 1,
        "save_steps": 2,
        "eval_share": 0.2,
        "tensorboard": False,
        "trainer": {"disable_tqdm": True, "use_cpu": True},
    }


@pytest.fixture
def start(model_folder, tmp_path):
    """Runs a recipe on the tiny model; its history and the model."""
    tokenizer = run.load_tokenizer(model_folder)

    def run_recipe(recipe, score=vowels, output="run", model=None, **options):
        model = model or AutoModelForCausalLM.from_pretrained(model_folder)
        training = QUIET | {"learning_rate": 1e-2, "per_device_train_batch_size": 4}
        options = {"max_new_tokens": 5, "samples": 2, "sample_batch_size": 3} | options
        options["training"] = training | options.get("training", {})
        prompts = options.pop("prompts", make_pairs(4))
        history = recipe(model, tokenizer, prompts, score, output=tmp_path / output, **options)
        return history, model

    return run_recipe


@pytest.fixture
def streams(monkeypatch):
    """Per training: the loop's states by name, the streams asked for, and their columns."""
    seen = []
    plain = OuterLoop.add_streams

    def record(self, trainer, rows, ref, history):
        sums = {}
        for name in ("initial", "current"):
            with self.states.using(name):
                sums[name] = reference.compute(trainer, rows)
        found = plain(self, trainer, rows, ref, history)
        columns = {n: torch.tensor(found[n]) for n in found.column_names if "_ids" not in n}
        names = {name: self.states.names[name] for name in history if name != "current"}
        seen.append({"sums": sums, "columns": columns, "names": names, "history": history})
        return found

    monkeypatch.setattr(OuterLoop, "add_streams", record)
    return seen
