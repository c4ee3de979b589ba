"""A tiny model folder, pairs and a config, shared by the trainer tests."""

import json
import random

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from fastpo.trainers import scratch

WORDS = "red blue tall small old cat dog bird house tree runs sings sleeps and the".split()


def make_pairs(count, seed=0):
    generator = random.Random(seed)
    text = lambda n: " ".join(generator.choices(WORDS, k=n))
    return [
        {"prompt": text(5), "chosen": " " + text(4), "rejected": " " + text(3)}
        for _ in range(count)
    ]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


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
