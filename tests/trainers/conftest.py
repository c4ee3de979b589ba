"""A tiny model folder, pairs and a config, shared by the trainer tests."""

import pytest
from tiny_rows import make_pairs, write_jsonl

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from fastpo.trainers import scratch


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
