"""Checkpoints of a run: sealed by their checksums, whole or refused, and which one goes on.

A checkpoint is whole when its manifest is there, which is written last: the SHA-256 of every file
beside it, and digests of what the run was made of. A file that is pickled is read only if it holds
tensors and plain containers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import zipfile
from _codecs import encode
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from filelock import FileLock, Timeout

MANIFEST = "manifest.json"
_LOCK = ".lock"
_SAMPLES = 4096
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# What states of random generators are made of in a pickle: arrays of numpy, and bytes as text.
_OF_NUMPY = [np._core.multiarray._reconstruct, np.ndarray, np.dtype, np.dtypes.UInt32DType, encode]


def _is_main() -> bool:
    # Launchers say it before any library is set up.
    return os.environ.get("RANK", "0") == "0"


def say(line: str) -> None:
    """Print a line, once for all ranks."""
    if _is_main():
        print(line, flush=True)


class CheckpointError(RuntimeError):
    """There is no checkpoint to resume from, or it is damaged; the message names the file."""


def sha256(path: Path) -> str:
    """The digest of a file's bytes."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()


def _files(checkpoint: Path) -> dict[str, Path]:
    """All files of a checkpoint but its manifest, by their names in it."""
    paths = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    named = {path.relative_to(checkpoint).as_posix(): path for path in paths}
    return {name: path for name, path in named.items() if name != MANIFEST}


def seal(checkpoint: Path, inputs: Mapping[str, str]) -> None:
    """Write the manifest of a checkpoint that is complete.

    Args:
        checkpoint: its folder.
        inputs: digests of what the run was made of, by name.
    """
    files = {name: sha256(path) for name, path in _files(checkpoint).items()}
    partial = checkpoint.with_name(f"{checkpoint.name}.{MANIFEST}.partial")
    partial.write_text(json.dumps({"inputs": dict(inputs), "files": files}), encoding="utf-8")
    partial.replace(checkpoint / MANIFEST)


def is_pickle(path: Path) -> bool:
    """Whether a file may be unpickled by what reads it: by its name or by its first bytes."""
    with path.open("rb") as file:
        start = file.read(2)
    return path.suffix in (".pt", ".pth", ".bin", ".pkl") or start in (b"PK", *_PROTOCOLS)


_PROTOCOLS = [bytes((0x80, protocol)) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)]


def load_plain(path: Path, **options: Any) -> Any:
    """What ``torch.save`` wrote, if that is tensors and plain containers.

    Raises:
        CheckpointError: it holds something else, which is not run, or is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not look at its checksums
            bad = archive.testzip()
        if bad:
            raise CheckpointError(f"{path}: damaged (checksum of {bad}).")
        with torch.serialization.safe_globals(_OF_NUMPY):
            return torch.load(path, weights_only=True, map_location="cpu", **options)
    except (zipfile.BadZipFile, EOFError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: damaged or cut short, or not written by torch.") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds more than tensors and plain containers; it was not read."
        ) from error


def _manifest(checkpoint: Path) -> dict[str, dict[str, str]]:
    path = checkpoint / MANIFEST
    if not path.exists():
        raise CheckpointError(f"{path}: missing; the checkpoint was not finished")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {part: dict(found[part]) for part in ("inputs", "files")}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged or cut short") from error


def problem(checkpoint: Path) -> str:
    """What is wrong with a checkpoint folder, naming the file; empty if it is whole.

    >>> problem(Path("/nonexistent/checkpoint-10"))
    '/nonexistent/checkpoint-10: no such folder'
    """
    if not checkpoint.is_dir():
        return f"{checkpoint}: no such folder"
    try:
        files = _manifest(checkpoint)["files"]
        for name, digest in files.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{path}: missing"
            if sha256(path) != digest:
                return f"{path}: damaged or cut short, its bytes are not those that were written"
        for name, path in _files(checkpoint).items():
            if name not in files:
                return f"{path}: not written by the run"
            if is_pickle(path):
                load_plain(path, mmap=True)
    except CheckpointError as error:
        return str(error).removesuffix(".")
    return ""


def check_inputs(checkpoint: Path | None, inputs: Mapping[str, str]) -> None:
    """Whether a checkpoint's run was made of the same.

    Raises:
        CheckpointError: it was not; the message names what differs.
    """
    if checkpoint is None:
        return
    before = _manifest(checkpoint)["inputs"]
    changed = [name for name, value in inputs.items() if before.get(name) != value]
    if changed:
        plain = [n for n in changed if len(inputs[n]) < 20 and n in before]
        shown = [f"{n} {before[n]} -> {inputs[n]}" if n in plain else n for n in changed]
        remedy = "Restore what it was made with, or take another output."
        raise CheckpointError(f"{checkpoint}: of a run with another {', '.join(shown)}. {remedy}")


def weights_digest(model: torch.nn.Module, adapters: bool = False) -> str:
    """Over every parameter's name, shape, dtype, 4096 of its values, and the sum of all its bits.

    The sum is of integers: no order of adding and no device gives another one. Adapters are left
    out unless asked for: they do not belong to the base model.
    """
    found = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name and not adapters:
            continue
        bits = parameter.detach().flatten().view(_BITS[parameter.element_size()])
        sample = bits[:: max(1, bits.numel() // _SAMPLES)][:_SAMPLES].cpu().numpy()
        total = int(bits.sum(dtype=torch.int64))
        described = [name, list(parameter.shape), str(parameter.dtype), total]
        found.update(json.dumps(described).encode() + sample.tobytes())
    return found.hexdigest()


def digest_of(rows: Any) -> str:
    """SHA-256 over rows of data: a ``datasets.Dataset``, or dicts and tuples."""
    found = hashlib.sha256()
    for row in rows:
        values = sorted(row.items()) if isinstance(row, dict) else row
        found.update(json.dumps(values, default=str).encode())
    return found.hexdigest()


@contextlib.contextmanager
def locked(output: str | Path) -> Iterator[None]:
    """The folder of a run for this program alone; the lock of one that crashed is free.

    Raises:
        CheckpointError: another run is in it.
    """
    if not _is_main():
        yield
        return
    Path(output).mkdir(parents=True, exist_ok=True)
    lock = FileLock(Path(output) / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        remedy = "Wait for it, or take another output."
        raise CheckpointError(f"{output}: another run is writing there. {remedy}") from error
    try:
        yield
    finally:
        lock.release()


def checkpoints(output: str | Path) -> list[Path]:
    """The ``checkpoint-<step>`` folders of a run, by step."""
    found = [p for p in Path(output).glob("checkpoint-*") if p.name[11:].isdigit() and p.is_dir()]
    return sorted(found, key=lambda path: int(path.name[11:]))


def resume_point(
    output: str | Path,
    resume: bool | Literal["auto"],
    resume_from: str | None,
    say: Callable[[str], None] = say,
) -> Path | None:
    """The checkpoint to resume from, checked; None to begin anew.

    Args:
        output: folder of the run.
        resume: continue from its last checkpoint; ``auto``: from the last whole one, or begin anew
            if there is no checkpoint that was finished.
        resume_from: continue from this checkpoint, a path or a name inside ``output``.
        say: is told what ``auto`` leaves out.

    Raises:
        CheckpointError: the checkpoint is damaged or missing, or the folder has checkpoints and
            neither argument says what to do with them.
    """
    found = checkpoints(output)
    if resume_from is not None:
        path = Path(resume_from)
        path = path if path.is_dir() else Path(output) / path.name
    elif resume == "auto":
        return _last_whole(found, say)
    elif resume:
        if not found:
            raise CheckpointError(f"{output}: no checkpoint to resume from; leave out --resume.")
        path = found[-1]
    elif found:
        remedy = "Pass --resume to continue, or another --output."
        raise CheckpointError(
            f"{output}: holds checkpoints of a run up to {found[-1].name}. {remedy}"
        )
    else:
        return None
    wrong = problem(path)
    if wrong:
        good = [p.name for p in found if p != path and not problem(p)]
        remedy = f"Whole ones: {', '.join(good) or 'none'}."
        hint = f" Continue with --resume-from {good[-1]}." if good else ""
        raise CheckpointError(f"{wrong}. {remedy}{hint}")
    return path


def _last_whole(found: list[Path], say: Callable[[str], None]) -> Path | None:
    left = {}
    for path in reversed(found):
        wrong = problem(path)
        if not wrong:
            if left:
                say(f"resume: from {path.name}; left out: {'; '.join(left.values())}.")
            return path
        left[path] = wrong
    damaged = [wrong for path, wrong in left.items() if (path / MANIFEST).exists()]
    if damaged:
        raise CheckpointError(f"{damaged[0]}. No checkpoint is whole; take another --output.")
    if left:
        say(f"resume: anew; left out: {'; '.join(left.values())}.")
    return None
