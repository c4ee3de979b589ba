"""Ids by content: which responses are the same, and which pair is which, in every process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from fastpo.data._checks import fail
from fastpo.data.pairs import Pairs

MISSING = -1


def content_id(content: Any) -> int:
    """Number in [0, 2**63) of text, token ids or lists of them; the same in every process.

    Example:
        >>> content_id("a") == content_id("a") != content_id(["a"])
        True
    """
    if isinstance(content, Tensor):
        content = content.tolist()
    packed = json.dumps(content, separators=(",", ":"), sort_keys=True)
    return int.from_bytes(blake2b(packed.encode(), digest_size=8).digest(), "big") >> 1


def response_ids(responses: Sequence[Sequence[Any]]) -> Tensor:
    """Ids of responses: equal responses have equal ids.

    Args:
        responses: B prompts with K texts, chats or lists of token ids each; None for a missing one.

    Returns:
        [B, K] int64, -1 for a missing one.

    Raises:
        ValueError: prompts have different numbers of responses.

    Example:
        >>> ids = response_ids([["yes", "no", "yes", None]])
        >>> bool(ids[0, 0] == ids[0, 2]), bool(ids[0, 0] == ids[0, 1]), int(ids[0, 3])
        (True, False, -1)
    """
    widths = {len(row) for row in responses}
    if len(widths) > 1:
        remedy = "Fill up with None."
        raise fail("response_ids", "responses", "K for every prompt", f"{sorted(widths)}", remedy)
    rows = [[MISSING if r is None else content_id(r) for r in row] for row in responses]
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), *widths or (0,))


def pair_ids(prompts: Sequence[Any], chosen: Sequence[Any], rejected: Sequence[Any]) -> Tensor:
    """Ids of pairs that stay the same over epochs, processes and machines.

    They key what is stored per pair, such as the dynamic labels of POWER-DL (arXiv:2412.09544). The
    same pair the other way round has another id.

    Args:
        prompts: P prompts (or their ids): text, chats, numbers or lists of token ids.
        chosen: P chosen responses.
        rejected: P rejected responses.

    Returns:
        [P] int64 in [0, 2**63).

    Raises:
        ValueError: lengths differ.

    Example:
        >>> pair_ids(["1 + 1 ="], [" 2"], [" 3"]).tolist()
        [2224629270520115384]
    """
    if not len(prompts) == len(chosen) == len(rejected):
        got = f"{len(prompts)}, {len(chosen)} and {len(rejected)}"
        remedy = "Repeat a prompt for each of its pairs."
        raise fail("pair_ids", "prompts, chosen, rejected", "one length", got, remedy)
    lists = (x.tolist() if isinstance(x, Tensor) else x for x in (prompts, chosen, rejected))
    ids = [content_id([content_id(part) for part in pair]) for pair in zip(*lists, strict=True)]
    return torch.tensor(ids, dtype=torch.int64)


def has_variety(ids: Tensor) -> Tensor:
    """Prompts with at least two different responses.

    MNPO (arXiv:2509.23102) drops the others, in whose pairs chosen and rejected are one text.

    Args:
        ids: [B, K] of :func:`response_ids`.

    Returns:
        Bool [B].

    Example:
        >>> has_variety(torch.tensor([[7, 7, -1], [7, 8, -1]]))
        tensor([False,  True])
    """
    other_BKK = ids[:, :, None] != ids[:, None, :]
    known_BK = ids != MISSING
    return (other_BKK & known_BK[:, :, None] & known_BK[:, None, :]).any((1, 2))


def drop_identical(pairs: Pairs, ids: Tensor) -> Pairs:
    """The pairs whose two responses differ; REBEL (arXiv:2404.16767) drops the others.

    Args:
        pairs: the pairs.
        ids: [B, K] of :func:`response_ids`.

    Returns:
        Pairs, in their order.

    Example:
        >>> pairs = Pairs(torch.tensor([0, 0]), torch.tensor([0, 0]), torch.tensor([1, 2]))
        >>> drop_identical(pairs, torch.tensor([[7, 7, 8]])).rejected
        tensor([2])
    """
    chosen_P, rejected_P = pairs.gather(ids)
    return pairs.select(chosen_P != rejected_P)
