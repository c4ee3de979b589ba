"""The README's code and every example in a docstring run."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import fastpo

README = Path(__file__).parent.parent / "README.md"
SKIPPED = ("_cpu", "_cuda", "_sim", "_sim_asan", "__main__")
OPTIONAL = (
    "fastpo.trainers",
    "fastpo.recipes",
    "fastpo.integrations",
    "fastpo.data",
    "fastpo.cli",
    "fastpo.demo",
)


def modules():
    for module in pkgutil.walk_packages(fastpo.__path__, "fastpo."):
        last = module.name.rpartition(".")[2]
        if not module.name.startswith(OPTIONAL) and last not in SKIPPED:
            yield module.name


@pytest.mark.parametrize("name", ["fastpo", *modules()])
def test_docstring_examples(name):
    module = importlib.import_module(name)
    import torch

    found = doctest.testmod(module, extraglobs={"torch": torch, "fastpo": fastpo})
    assert found.failed == 0


def blocks():
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("number", range(len(blocks())))
def test_readme_code(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks()[number], f"README block {number}", "exec"), {})


def test_every_public_function_has_an_example():
    for name in fastpo.__all__:
        member = getattr(fastpo, name)
        if callable(member) and not isinstance(member, type):
            assert ">>>" in member.__doc__, name
            assert "Returns:" in member.__doc__, name
            assert "Raises:" in member.__doc__ or "errors are those" in member.__doc__, name
