"""Who may import whom, read from the source; and no torch in the C++ room."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fastpo"
SOURCES = Path(__file__).parent.parent / "csrc"
# The statistics' consumers and the specification: torch, the standard library, and each other.
# The other advantages, and the surrogates, are made of ops on groups and on tokens.
TORCH_ONLY = (
    "losses", "reference", "weights", "metrics", "tiles", "operands", "inputs", "checks", "bounds",
    "advantages._common", "advantages.crpg", "advantages.returns", "advantages.weights",
)  # fmt: skip
OPTIONAL = ("trl", "transformers", "diffusers", "datasets", "peft", "accelerate", "verl")


def imports(path, top_level_only=False):
    """Names of imported modules; with ``top_level_only`` those that importing the file runs."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(*parts):
    for part in parts:
        path = PACKAGE / part.replace(".", "/")
        yield from path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]


@pytest.mark.parametrize("part", TORCH_ONLY)
def test_pure_parts_import_torch_only(part):
    for path in files(part):
        for name in imports(path):
            if name.startswith("fastpo."):
                inside = f"{name.removeprefix('fastpo.')}."
                allowed = tuple(f"{part}." for part in TORCH_ONLY)
                assert inside.startswith(allowed), f"{path} imports {name}"
            else:
                root = name.split(".")[0]
                assert root not in (*OPTIONAL, "numpy"), f"{path} imports {name}"


def test_nobody_imports_trainers_or_integrations():
    ends = ("trainers", "recipes", "integrations", "cli", "demo", "data", "__main__")
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0].removesuffix(".py") in ends:
            continue
        for name in imports(path):
            assert not name.startswith(("fastpo.trainers", "fastpo.integrations")), (
                f"{path}: {name}"
            )


def test_optional_libraries_are_imported_where_they_are_used():
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] in ("trainers", "data", "demo"):
            continue
        for name in imports(path, top_level_only=True):
            assert name.split(".")[0] not in OPTIONAL, f"{path} imports {name} on import"


def test_torch_distributed_is_imported_in_one_place():
    for path in PACKAGE.rglob("*.py"):
        if path.name != "distributed.py":
            assert not any(n.startswith("torch.distributed") for n in imports(path)), path


def test_no_torch_in_the_cpp_room():
    for path in SOURCES.rglob("*"):
        if path.suffix in (".h", ".cpp", ".cu"):
            for line in path.read_text().splitlines():
                included = line.startswith("#include") and any(
                    word in line for word in ("torch/", "ATen/", "c10/")
                )
                assert not included, f"{path}: {line}"
                python = line.startswith("#include <pybind11")
                assert not python or path.name == "bindings.cpp", f"{path}: {line}"


def test_files_stay_short():
    for path in [*PACKAGE.rglob("*.py"), *SOURCES.rglob("*.*")]:
        if path.suffix in (".py", ".h", ".cpp", ".cu"):
            assert len(path.read_text().splitlines()) <= 500, path
