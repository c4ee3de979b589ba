"""The simulator finds what a GPU would do wrong: planted bugs are caught, correct twins pass."""

from __future__ import annotations

import shutil
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLANTED = Path(__file__).parent / "planted"
CORRECT_TWIN, PLANTED_BUG = "0", "1"
ASCENDING, DESCENDING, SHUFFLED = "0", "1", "2"
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture
def run(tmp_path):
    """Compile planted/<name>.cu for the simulator, and run it with the given arguments."""

    def compile_and_run(name: str, *arguments: str, flags: tuple[str, ...] = ()):
        binary = tmp_path / name
        if not binary.exists():
            command = ["g++", "-x", "c++", "-std=c++17", "-g", "-DFASTPO_SIM", *flags]
            source = PLANTED / f"{name}.cu"
            subprocess.run([*command, "-I", ROOT / "csrc", source, "-o", binary], check=True)
        return subprocess.run([binary, *arguments], capture_output=True, text=True, timeout=60)

    return compile_and_run


def planted_line(name: str) -> str:
    """``<name>.cu:<line>`` of the line marked as planted."""
    lines = (PLANTED / f"{name}.cu").read_text().splitlines()
    (number,) = (i for i, line in enumerate(lines, 1) if line.endswith("// planted"))
    return f"{name}.cu:{number}"


def test_missing_barrier_is_wrong_in_some_thread_order(run):
    orders = ASCENDING, DESCENDING, SHUFFLED
    correct = [run("missing_barrier", CORRECT_TWIN, order).returncode for order in orders]
    planted = [run("missing_barrier", PLANTED_BUG, order).returncode for order in orders]
    assert correct == [0, 0, 0]
    assert 1 in planted


def test_read_past_the_row_is_named_by_address_sanitizer(run):
    assert run("read_past_row", CORRECT_TWIN, flags=SANITIZERS).returncode == 0
    caught = run("read_past_row", PLANTED_BUG)
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
def test_fault_aborts_and_names_the_line(run, name, message):
    assert run(name, CORRECT_TWIN).returncode == 0
    caught = run(name, PLANTED_BUG)
    assert caught.returncode == -signal.SIGABRT
    assert message in caught.stderr
    assert planted_line(name) in caught.stderr
