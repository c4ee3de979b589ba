import random

import pytest

from fastpo.demo import measure, texts


def test_task_is_the_same_each_time_and_keeps_documents_apart(monkeypatch):
    words = {f"doc{i}": [f"w{i}_{j}" for j in range(200)] for i in range(10)}
    monkeypatch.setattr(texts, "documents", lambda: words)
    rows = texts.task(seed=1)
    assert rows == texts.task(seed=1)
    seen = {row["prompt"].split("_")[0] for row in rows["train"]}
    held = {row["prompt"].split("_")[0] for row in rows["held"]}
    assert len(held) == 1
    assert not seen & held
    for row in rows["train"]:
        chosen, rejected = row["chosen"].split(), row["rejected"].split()
        assert len(chosen) == len(rejected) == texts.CONTINUATION_WORDS
        changed = sum(a != b for a, b in zip(chosen, rejected, strict=True))
        assert 1 <= changed <= texts.STUTTERS


def test_docstrings_of_the_library_are_found():
    path = texts.Path(random.__file__)
    assert "Random variable generators." in texts._docstrings(path)


def test_measure_agrees_between_methods():
    sizes = {"tokens": 8, "hidden": 16, "vocab": 100}
    torch_, fused = (measure.measure(method, **sizes) for method in ("torch", "fastpo"))
    assert fused["sum_logprobs"] == pytest.approx(torch_["sum_logprobs"], rel=1e-5)
    assert fused["seconds"] > 0
