"""Reference log-probs computed once, kept beside the run, refused where they do not belong."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastpo.trainers.checkpoints import weights_digest
from fastpo.trainers.dpo import REFERENCE, DPOTrainer, sum_logprobs
from fastpo.trainers.head import shift_labels
from fastpo.trainers.states import digest

FILE = "reference_logprobs.safetensors"


class ReferenceCacheError(RuntimeError):
    """A cache of reference log-probs is damaged or belongs to another model, data or setting."""


def _rows_digest(rows: Dataset) -> str:
    digest = hashlib.sha256()
    for row in rows:
        for field in ("prompt_ids", "chosen_ids", "rejected_ids"):
            digest.update(np.asarray([len(row[field]), *row[field]], dtype=np.int64).tobytes())
    return digest.hexdigest()


def fingerprint(trainer: DPOTrainer, rows: Dataset) -> dict[str, str]:
    """What cached values depend on, by part: model, data and settings."""
    settings = {"mixed_precision": trainer.accelerator.mixed_precision}
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {
        "model": weights_digest(model, adapters=trainer.differs_without_adapter()),
        "data": _rows_digest(rows),
        "settings": json.dumps(settings, sort_keys=True),
    }


@torch.no_grad()
def compute(trainer: DPOTrainer, rows: Dataset) -> Tensor:
    """Log-probs [P, R] of the R responses of each row under the model as it is, nats, on the CPU.

    R is 2, chosen and rejected, or 3 where the rows carry ``extra_ids``.
    """
    responses = 3 if "extra_ids" in rows.column_names else 2
    values_PR = torch.full((len(rows), responses), float("nan"))
    # Not accelerator.prepare_model: a model it has seen is not wrapped for training any more.
    model = trainer.model.to(trainer.args.device)
    was_training = model.training
    model.eval()
    with trainer.accelerator.autocast():
        for batch in trainer.get_eval_dataloader(rows):
            inputs = trainer._prepare_inputs(batch)
            sums = sum_logprobs(model, inputs, shift_labels(inputs["labels"]) >= 0)
            found = inputs["index"], torch.stack(sums.chunk(responses), 1)
            index_P, found_PR = trainer.accelerator.gather_for_metrics(found)
            values_PR[index_P.cpu()] = found_PR.float().cpu()
    model.train(was_training)
    return values_PR


def add_cached(trainer: DPOTrainer, rows: Dataset, name: str, folder: str | Path) -> Dataset:
    """``rows`` with ``ref_chosen``, ``ref_rejected`` (and ``ref_extra``), cached or computed.

    Args:
        trainer: whose model, as it is, is the reference, before any training step.
        rows: of :func:`fastpo.data.tokens.tokenize_rows`.
        name: of these rows, ``train`` or ``eval``.
        folder: of the run.

    Raises:
        ReferenceCacheError: the cache was made with another model, data or setting, is damaged, or
            the reference gives non-finite values.
    """
    path = Path(folder) / f"{name}_{FILE}"
    expected = fingerprint(trainer, rows)
    if path.exists():
        values_PR = _read(path, expected)
    else:
        values_PR = compute(trainer, rows)
        bad = (~values_PR.isfinite().all(1)).nonzero().flatten().tolist()
        if bad:
            numbers = [rows[i]["row"] for i in bad[:10]]
            raise ReferenceCacheError(
                f"the reference gives non-finite log-probs on rows {numbers}."
            )
        if trainer.accelerator.is_main_process:
            partial = path.with_suffix(".partial")
            written = expected | {"values": digest({"ref_logprobs": values_PR})}
            save_file({"ref_logprobs": values_PR}, partial, metadata=written)
            partial.replace(path)
    trainer.accelerator.wait_for_everyone()
    for column, values_P in zip(REFERENCE, values_PR.unbind(1), strict=False):
        rows = rows.add_column(column, values_P.tolist())
    return rows


def _read(path: Path, expected: dict[str, str]) -> Tensor:
    remedy = f"Delete {path} to compute it anew, or restore what it was made with."
    try:
        with safe_open(path, "pt") as stored:
            found, values_PR = stored.metadata() or {}, stored.get_tensor("ref_logprobs")
    except SafetensorError as error:
        raise ReferenceCacheError(f"{path}: damaged ({error}). {remedy}") from error
    if found.get("values") != digest({"ref_logprobs": values_PR}):
        problem = "damaged, its values are not those that were written"
        raise ReferenceCacheError(f"{path}: {problem}. {remedy}")
    changed = [part for part in expected if found.get(part) != expected[part]]
    if changed:
        parts = " and ".join(changed)
        problem = f"the cached reference log-probs were made with another {parts}"
        raise ReferenceCacheError(f"{path}: {problem}. {remedy}")
    return values_PR
