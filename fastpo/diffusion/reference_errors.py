"""Errors of the reference computed once, with noise that training draws again bit for bit.

With timestep and noise fixed per row of the data, the reference is not needed while training:
its errors are looked up. A table knows which weights, data, seed and settings it was computed with
and is refused where they do not fit.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpo.ops._check import fail

_MODULE = "diffusion.reference_errors"


class Draws(NamedTuple):
    """Timesteps and noise of N rows.

    Attributes:
        timesteps: [N] int64, uniform in [0, num_timesteps).
        uniforms: [N] float64 in [0, 1), what the timesteps were made of. Other densities are their
            inverse distribution function of it: the logit-normal one of mean m and deviation s is
            ``sigmoid(m + s * torch.special.ndtri(uniforms))``.
        noise: [N, *shape] of standard normal numbers.
    """

    timesteps: Tensor
    uniforms: Tensor
    noise: Tensor


def _row_numbers(function: str, indices: Tensor | Iterable[int]) -> list[int]:
    """Rows of the data; masks and other shapes would pass for other rows."""
    rows = indices.tolist() if isinstance(indices, Tensor) else list(indices)
    if any(not isinstance(row, Integral) or isinstance(row, bool) for row in rows):
        remedy = "Give the numbers of the rows."
        raise fail(f"{_MODULE}.{function}", "indices", "[N] integers", f"{rows[:3]}", remedy)
    return rows


def fixed_draws(
    seed: int,
    indices: Tensor | Iterable[int],
    shape: Sequence[int],
    *,
    draw: int = 0,
    num_timesteps: int = 1000,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Draws:
    """Timestep and noise of each row, the same in every batch, order and process and on any device.

    Row n depends on (seed, indices[n], draw) alone. The noise is drawn in float32 on the CPU, from
    a seed of 32 bits: of 100 000 rows two may have the same noise, with timesteps of their own.

    Args:
        seed: of the run.
        indices: [N] rows of the data. Chosen and rejected of a pair share the draws of its row.
        shape: of one row's noise, such as (C, H, W).
        draw: which of several draws of a row, for example the epoch.
        num_timesteps: of the schedule.
        device: of the result, the CPU by default.
        dtype: of the noise.

    Returns:
        Draws.

    Raises:
        ValueError: ``num_timesteps`` is not positive, or the indices are not [N] integers.

    Example:
        >>> several = fixed_draws(0, [7, 3], (2, 2))
        >>> torch.equal(fixed_draws(0, [3], (2, 2)).noise[0], several.noise[1])
        True
    """
    if num_timesteps < 1:
        remedy = "Give scheduler.config.num_train_timesteps."
        raise fail(f"{_MODULE}.fixed_draws", "num_timesteps", ">= 1", f"{num_timesteps}", remedy)
    rows = _row_numbers("fixed_draws", indices)
    uniforms, generator = [], torch.Generator()
    noise = torch.empty(len(rows), *shape, dtype=torch.float32, device="cpu")
    for n, row in enumerate(rows):
        digest = hashlib.sha256(f"{seed} {row} {draw}".encode()).digest()
        uniforms.append((int.from_bytes(digest[:8], "little") >> 11) * 2.0**-53)
        generator.manual_seed(int.from_bytes(digest[8:12], "little"))  # it takes 32 bits of a seed
        noise[n].normal_(generator=generator)
    uniforms_N = torch.tensor(uniforms, dtype=torch.float64, device="cpu")
    timesteps_N = (uniforms_N * num_timesteps).long()
    placed = (timesteps_N.to(device), uniforms_N.to(device), noise.to(device, dtype))
    return Draws(*placed)


def digest(values: str | Tensor | Mapping[str, Tensor] | Iterable[str | Tensor]) -> str:
    """SHA-256 of text and of tensors: names, shapes, dtypes and every value.

    Example:
        >>> one = {"weight": torch.ones(2)}
        >>> digest(one) == digest({"weight": torch.ones(2)}) != digest({"weight": torch.zeros(2)})
        True
    """
    found = hashlib.sha256()
    if isinstance(values, Mapping):
        values = [part for item in sorted(values.items()) for part in item]
    elif isinstance(values, (str, Tensor)):
        values = [values]
    for part in values:
        if isinstance(part, str):
            found.update(json.dumps(part).encode())
        else:
            found.update(json.dumps([list(part.shape), str(part.dtype)]).encode())
            flat = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            if len(flat):
                found.update((ctypes.c_char * len(flat)).from_address(flat.data_ptr()))
    return found.hexdigest()


def _rows_where(values: Tensor) -> Tensor:
    """Rows [N] of bools [N, ...] with any True."""
    return values.reshape(len(values), math.prod(values.shape[1:])).any(1)


def fingerprints(
    *,
    weights: Mapping[str, Tensor],
    data: str | Tensor | Iterable[str | Tensor],
    seed: int,
    **settings: Any,
) -> dict[str, str]:
    """What reference errors depend on, by name: what :class:`ReferenceErrors` compares.

    Args:
        weights: of the reference, :meth:`fastpo.diffusion.references.Reference.weights`.
        data: a fingerprint that the data set has, or its tensors and texts in order.
        seed: of :func:`fixed_draws`.
        settings: others, for example of the scheduler and of mixed precision, of JSON's types.

    Returns:
        SHA-256 of the weights and of the data, and the others as JSON.

    Example:
        >>> found = fingerprints(weights={}, data="pairs", seed=0, prediction_type="epsilon")
        >>> sorted(found), found["prediction_type"]
        (['data', 'prediction_type', 'seed', 'weights'], '"epsilon"')
    """
    others = {name: json.dumps(value, sort_keys=True) for name, value in settings.items()}
    return {"weights": digest(weights), "data": digest(data), "seed": json.dumps(seed)} | others


class StaleReferenceError(RuntimeError):
    """Stored reference errors are damaged, or of another model, data, seed or setting."""


class ReferenceErrors:
    """The reference's errors of each row of a data set, as far as they are computed.

    Args:
        rows: of the data set.
        shape: of one row's errors: ``(2,)`` for chosen and rejected, ``(draws, 2)`` for several
            draws of each, ``()`` for one error.
        fingerprints: what the errors depend on, by name.

    Example:
        >>> table = ReferenceErrors(3, fingerprints={"seed": "0"})
        >>> table.write([2, 0], torch.tensor([0.5, 0.25]))
        >>> table.missing().tolist(), table.read([0, 2]).tolist()
        ([1], [0.25, 0.5])
    """

    def __init__(self, rows: int, shape: Sequence[int] = (), *, fingerprints: Mapping[str, str]):
        self.errors = torch.full((rows, *shape), torch.nan, dtype=torch.float32, device="cpu")
        self.fingerprints = dict(fingerprints)

    def missing(self) -> Tensor:
        """Rows [M] int64, rising, whose errors are not all there."""
        return _rows_where(self.errors.isnan()).nonzero().squeeze(1)

    def write(self, indices: Tensor | Sequence[int], errors: Tensor) -> None:
        """Put down the errors of some rows.

        Args:
            indices: [N] rows.
            errors: [N, *shape], finite.

        Raises:
            ValueError: a shape does not fit, a row does not exist, or an error is not finite.
        """
        rows_N = self._rows("write", indices)
        expected = [len(rows_N), *self.errors.shape[1:]]
        if list(errors.shape) != expected:
            remedy = "Give one row of errors for each index."
            raise self._fail("write", "errors", f"{expected}", f"{list(errors.shape)}", remedy)
        errors = errors.detach().cpu().to(self.errors.dtype)
        bad_N = _rows_where(~errors.isfinite())
        if bad_N.any():
            remedy = "The reference or the data is broken there."
            got = f"others in rows {rows_N[bad_N][:10].tolist()}"
            raise self._fail("write", "errors", "finite numbers", got, remedy)
        self.errors[rows_N] = errors

    def read(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Errors [N, *shape] of some rows, float32, on the CPU.

        Raises:
            ValueError: a row does not exist, or has not been computed.
        """
        rows_N = self._rows("read", indices)
        errors = self.errors[rows_N]
        bad_N = _rows_where(errors.isnan())
        if bad_N.any():
            got = f"none for {rows_N[bad_N][:10].tolist()}"
            raise self._fail("read", "indices", "computed rows", got, "Call fill first.")
        return errors

    def fill(
        self,
        compute: Callable[[Tensor], Tensor],
        batch_size: int,
        path: str | Path | None = None,
        save_every: int = 100,
    ) -> None:
        """Compute the rows that are missing, and save the table as it grows.

        Args:
            compute: errors [N, *shape] of the rows [N] it is given.
            batch_size: the largest N.
            path: of :meth:`save`; None keeps the table in memory.
            save_every: batches between two saves.

        Raises:
            ValueError: a number is not positive, or the errors do not fit.
        """
        for argument, number in (("batch_size", batch_size), ("save_every", save_every)):
            if number < 1:
                raise self._fail("fill", argument, ">= 1", f"{number}", "1 is the least.")
        missing_M = self.missing()
        for n, start in enumerate(range(0, len(missing_M), batch_size), 1):
            rows_N = missing_M[start : start + batch_size]
            self.write(rows_N, compute(rows_N))
            if path is not None and n % save_every == 0:
                self.save(path)
        if path is not None:
            self.save(path)

    def save(self, path: str | Path) -> None:
        """Write the table and its fingerprints; the file is replaced at once, or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        stored = {"errors": self.errors, "fingerprints": self.fingerprints}
        torch.save(stored | {"values": digest(self.errors)}, partial)
        partial.replace(path)

    @classmethod
    def open(
        cls,
        path: str | Path,
        rows: int,
        shape: Sequence[int] = (),
        *,
        fingerprints: Mapping[str, str],
    ) -> ReferenceErrors:
        """The table stored there, complete or not; an empty one if there is none.

        Raises:
            StaleReferenceError: the stored one is damaged, or has other fingerprints, rows or
                shape; the message names what differs.
        """
        table, path = cls(rows, shape, fingerprints=fingerprints), Path(path)
        if not path.exists():
            return table
        remedy = f"Delete {path} to compute it anew, or restore what it was made with."
        try:
            stored = torch.load(path, weights_only=True)
            errors, found = stored["errors"], stored["fingerprints"]
            is_whole = stored["values"] == digest(errors)
        except pickle.UnpicklingError as e:
            problem = "it was not read, as it holds more than tensors and plain containers"
            raise StaleReferenceError(f"{path}: damaged; {problem}. {remedy}") from e
        except (RuntimeError, zipfile.BadZipFile, EOFError, KeyError) as e:
            raise StaleReferenceError(f"{path}: damaged or cut short. {remedy}") from e
        if not is_whole:
            problem = "its values are not those that were written"
            raise StaleReferenceError(f"{path}: damaged, {problem}. {remedy}")
        names = sorted(found.keys() | table.fingerprints.keys())
        changed = [name for name in names if found.get(name) != table.fingerprints.get(name)]
        if errors.shape != table.errors.shape:
            changed.append(f"shape ({list(errors.shape)}, not {list(table.errors.shape)})")
        if changed:
            problem = f"the stored reference errors were made with another {', '.join(changed)}"
            raise StaleReferenceError(f"{path}: {problem}. {remedy}")
        table.errors = errors
        return table

    def _rows(self, method: str, indices: Tensor | Sequence[int]) -> Tensor:
        rows = _row_numbers(f"ReferenceErrors.{method}", indices)
        rows_N = torch.tensor(rows, dtype=torch.int64, device="cpu")
        count = len(self.errors)
        if rows_N.numel() and not 0 <= int(rows_N.min()) <= int(rows_N.max()) < count:
            got = f"{int(rows_N.min())} to {int(rows_N.max())}"
            remedy = "Indices are rows of the data set that the table was made for."
            raise self._fail(method, "indices", f"rows in [0, {count})", got, remedy)
        return rows_N

    @staticmethod
    def _fail(method: str, argument: str, expected: str, got: str, remedy: str) -> ValueError:
        name = f"{_MODULE}.ReferenceErrors.{method}"
        return fail(name, argument, expected, got, remedy)
