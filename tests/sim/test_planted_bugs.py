"""The simulator finds what a GPU would do wrong: each planted bug is caught, its correct twin passes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLANTED = Path(__file__).parent / "planted"
ASCENDING, DESCENDING, SHUFFLED = "0", "1", "2"

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture
def build(tmp_path):
    """Compile planted/<name>.cu for the simulator, with or without its bug."""

    def compile_one(name: str, *, planted: bool, flags: tuple[str, ...] = ()) -> Path:
        binary = tmp_path / f"{name}_{'planted' if planted else 'correct'}"
        defines = ["-DFASTPO_SIM", *(["-DPLANTED"] if planted else [])]
        command = ["g++", "-x", "c++", "-std=c++17", "-g", "-O1", "-I", ROOT / "csrc", *defines]
        subprocess.run([*command, *flags, PLANTED / f"{name}.cu", "-o", binary], check=True)
        return binary

    return compile_one


def run(binary: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([binary, *arguments], capture_output=True, text=True, timeout=60)


def planted_line(name: str) -> str:
    """``<name>.cu:<line>`` of the line marked as planted."""
    lines = (PLANTED / f"{name}.cu").read_text().splitlines()
    (number,) = (i for i, line in enumerate(lines, 1) if line.endswith("// planted"))
    return f"{name}.cu:{number}"


def test_missing_barrier_is_wrong_in_some_thread_order(build):
    correct, planted = (build("missing_barrier", planted=p) for p in (False, True))
    orders = ASCENDING, DESCENDING, SHUFFLED
    assert [run(correct, order).returncode for order in orders] == [0, 0, 0]
    assert 1 in [run(planted, order).returncode for order in orders]


def test_read_past_the_row_is_named_by_address_sanitizer(build):
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
    assert run(build("read_past_row", planted=False, flags=flags)).returncode == 0
    caught = run(build("read_past_row", planted=True, flags=flags))
    assert caught.returncode != 0
    assert "heap-buffer-overflow" in caught.stderr
    assert planted_line("read_past_row") in caught.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("divergent_barrier", "divergent barrier"),
        ("misaligned_load", "misaligned 16-byte access"),
    ],
)
def test_fault_aborts_and_names_the_line(build, name, message):
    assert run(build(name, planted=False)).returncode == 0
    caught = run(build(name, planted=True))
    assert caught.returncode == -6  # SIGABRT
    assert message in caught.stderr
    assert planted_line(name) in caught.stderr
