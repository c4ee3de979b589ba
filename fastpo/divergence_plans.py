"""The loops of the divergence: rows with their whole vocabulary forward, slices of it backward.

``f(p / q)`` needs both models' normalisers before its first term, so a running sum over slices
would take a second pass of each product. ``forward`` instead holds the logits of a few rows whole:
two passes, one for each model. With frozen heads it then turns them into gradients in place: one
pass more for each hidden state that wants one, and none in ``backward``. With a trained head
``backward`` makes the logits again, but for the first rows, whose logits were kept as far as the
budget goes. It goes by slices of the vocabulary, so that each row of a weight's gradient is written
once.

Masked rows never enter a product, rows without an upstream gradient never the backward's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastpo import backends, plans
from fastpo.tiles import Tile

# Blocks have a multiple of this many rows where the budget holds as many, and never fewer than 16:
# thinner products read the weight more than they multiply.
_ROWS = {"cpu": 16, "cuda": 128}
_FEWEST_ROWS = 16
# Each row of logits begins at a multiple of this, where products and kernels load fastest.
_ROW_ALIGN = 16


class Pair:
    """The policy's and the reference's heads, and whether one weight serves both."""

    def __init__(
        self, hidden, weight, bias, lora_a, lora_b, ref_hidden, ref_weight, ref_bias, lora_scale,
        scale, softcap, temperature,
    ):  # fmt: skip
        transform = (scale, softcap, temperature)
        self.heads = (
            plans.Head(hidden, weight, bias, lora_a, lora_b, lora_scale, *transform),
            plans.Head(ref_hidden, ref_weight, ref_bias, None, None, 1.0, *transform),
        )
        self.acc, self.vocab, self.device = self.heads[0].acc, weight.shape[0], hidden.device
        same = [(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in (weight, ref_weight)]
        self._shared = same[0] == same[1]
        # No wider where the weight is not converted: it would not be faster, and a CPU's BLAS keeps
        # a packed copy of the slice.
        self.columns = plans.columns_at_once(self.device)
        self._no_targets = torch.empty(0, dtype=torch.int64, device=self.device)

    def weights(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows ``start .. stop`` of both weights."""
        policy, ref = self.heads
        weight_vH = policy.weight(start, stop)
        return weight_vH, weight_vH if self._shared else ref.weight(start, stop)

    def logits(self, hiddens, lora_nr, weights, start: int, out_n2v) -> torch.Tensor:
        """Raw logits of the slice that begins at ``start``, without the biases, into ``out``."""
        if not self._shared:
            self.heads[1].logits(hiddens[1], None, weights[1], start, out_n2v[:, 1])
            self.heads[0].logits(hiddens[0], lora_nr, weights[0], start, out_n2v[:, 0])
            return out_n2v
        n, _, v = out_n2v.shape
        both_mH = torch.stack(hiddens, dim=1).view(2 * n, -1)
        plans.multiply(both_mH, weights[0].t(), out_n2v.view(2 * n, v), add=False)
        self.heads[0].add_lora(lora_nr, start, out_n2v[:, 0])
        return out_n2v

    def tiles(self, logits_n2v, start: int) -> tuple[Tile, Tile]:
        """The records the kernels take, policy first."""
        policy, ref = (
            head.tile(logits_n2v[:, i], self._no_targets, start, 0)
            for i, head in enumerate(self.heads)
        )
        return policy, ref

    def element_bytes(self, wanted: Sequence[bool]) -> int:
        """Bytes of one logit of each, and of the gradients that are ``wanted``."""
        size = 2 * self.acc.itemsize
        for head, want in zip(self.heads, wanted, strict=True):
            if want and head.compute != self.acc:
                size += head.compute.itemsize
        return size


class Buffers:
    """Memory for tiles of both logits [n, 2, v], and of their gradients in the type to multiply."""

    def __init__(self, pair: Pair, wanted: Sequence[bool], rows: int, columns: int) -> None:
        self._stride = padded(columns)
        size = rows * self._stride
        self._logits = torch.empty(2 * size, dtype=pair.acc, device=pair.device)
        self._wanted = wanted
        self._gradients = [
            torch.empty(size if want else 0, dtype=head.compute, device=pair.device)
            if head.compute != pair.acc
            else None
            for head, want in zip(pair.heads, wanted, strict=True)
        ]

    def logits(self, n: int, v: int) -> torch.Tensor:
        """[n, 2, v] for the logits, policy first."""
        return self._logits[: 2 * n * self._stride].view(n, 2, -1)[:, :, :v]

    def gradients(self, n: int, v: int) -> list[torch.Tensor | None]:
        """[n, v] for each wanted gradient; the memory of its logits where the type is the same."""
        return [
            None
            if not want
            else self.logits(n, v)[:, i]
            if own is None
            else own[: n * self._stride].view(n, -1)[:, :v]
            for i, (want, own) in enumerate(zip(self._wanted, self._gradients, strict=True))
        ]


def padded(columns: int) -> int:
    """Columns from the beginning of a row to that of the next."""
    return -(-columns // _ROW_ALIGN) * _ROW_ALIGN


def _block_rows(pair: Pair, count: int, workspace_bytes: int, wanted: Sequence[bool]) -> int:
    rows = workspace_bytes // (padded(pair.vocab) * pair.element_bytes(wanted))
    align = _ROWS[plans.planned_as(pair.device)]
    align = align if rows >= align else _FEWEST_ROWS
    rows = max(rows - rows % align, _FEWEST_ROWS)
    even = -(-count // max(-(-count // rows), 1))  # not most of them and a thin rest
    return max(min(-(-even // align) * align, count), 1)


def rows_to_save(hidden_NH: torch.Tensor, vocab: int, workspace_bytes: int) -> int:
    """Rows whose logits, of both models, the budget holds beside a tile of each in backward."""
    N, (dtype, device) = hidden_NH.shape[0], (hidden_NH.dtype, hidden_NH.device)
    element_bytes = 2 * plans.logit_bytes(dtype, device)
    _, _, tile_bytes = plans.tile_shape(N, vocab, workspace_bytes, element_bytes, device)
    row_bytes = 2 * padded(vocab) * plans.accumulation_dtype(dtype).itemsize
    rows = max(workspace_bytes - tile_bytes, 0) // row_bytes
    return N if rows >= N else rows - rows % _ROWS[plans.planned_as(device)]


def forward(
    hidden, weight, bias, lora_a, lora_b, ref_hidden, ref_weight, ref_bias, mask, lora_scale,
    scale, softcap, temperature, kind, alpha, workspace_bytes, unit_grads, rows_to_save,
):  # fmt: skip
    """Divergences [N], what the kernels keep of rows [6, N], unit gradients and saved logits.

    Kept rows and logits hold the unmasked rows only, in their order; the logits the first of them.
    """
    N, (inputs, device) = hidden.shape[0], ((hidden, ref_hidden), hidden.device)
    pair = Pair(
        hidden, weight, bias, lora_a, lora_b, ref_hidden, ref_weight, ref_bias, lora_scale,
        scale, softcap, temperature,
    )  # fmt: skip
    acc, vocab = pair.acc, pair.vocab
    kernels = backends.kernels(device)
    rows = plans.Rows(None if mask is None else plans.kept(mask), N)

    divergences_N = torch.zeros(N, dtype=acc, device=device)
    rows_RN = torch.zeros((6, N), dtype=acc, device=device)
    units_NH = [
        torch.zeros((N if wanted else 0, x.shape[1]), dtype=acc, device=device)
        for x, wanted in zip(inputs, unit_grads, strict=True)
    ]
    # A zero gives a zero gradient, where masked rows cannot be left out.
    ones_N = torch.ones_like(divergences_N) if mask is None else mask.to(acc)

    def score(first: int, last: int, logits_n2V: torch.Tensor) -> None:
        n = last - first
        hiddens = [
            rows.take(x, first, last).to(head.compute)
            for x, head in zip(inputs, pair.heads, strict=True)
        ]
        lora_nr = pair.heads[0].lora_hidden(hiddens[0])
        for start, stop in plans.spans(0, vocab, pair.columns):
            out_n2v = logits_n2V[:, :, start:stop]
            pair.logits(hiddens, lora_nr, pair.weights(start, stop), start, out_n2v)
        tiles, block_Rn = pair.tiles(logits_n2V, 0), rows_RN[:, first:last]
        values_n = torch.empty(n, dtype=acc, device=device)
        kernels.divergence(*tiles, block_Rn, values_n, kind=kind, alpha=alpha)
        rows.scatter(values_n, divergences_N, first, last)
        if any(unit_grads):
            dlogits = buffers.gradients(n, vocab)
            ones_n = rows.take(ones_N, first, last)
            kernels.divergence_grad(*tiles, block_Rn, ones_n, *dlogits, kind=kind, alpha=alpha)
            for unit_NH, dhidden_nH in zip(units_NH, _times_weights(pair, dlogits), strict=True):
                if dhidden_nH is not None:
                    rows.scatter(dhidden_nH, unit_NH, first, last)

    saved = min(rows_to_save, rows.count)
    if saved < rows.count:
        # First the others, which so have all of the budget, too.
        block_rows = _block_rows(pair, rows.count - saved, workspace_bytes, unit_grads)
        buffers = Buffers(pair, unit_grads, block_rows, vocab)
        for first, last in plans.spans(saved, rows.count, block_rows):
            score(first, last, buffers.logits(last - first, vocab))
        del buffers
    saved_S2V = torch.empty((rows_to_save, 2, padded(vocab)), dtype=acc, device=device)
    saved_S2V[rows.count :] = 0
    saved_S2V[:, :, vocab:] = 0
    if saved:
        score(0, saved, saved_S2V[:saved, :, :vocab])
    if mask is not None:
        divergences_N.masked_fill_(~mask, 0)
    return divergences_N, rows_RN, *units_NH, saved_S2V


def _times_weights(pair: Pair, dlogits) -> list[torch.Tensor | None]:
    """``dlogits @ weight`` of each side that has them, slice by slice."""
    grads: list[torch.Tensor | None] = [None, None]
    for i, (head, dlogits_nV) in enumerate(zip(pair.heads, dlogits, strict=True)):
        if dlogits_nV is None:
            continue
        for start, stop in plans.spans(0, pair.vocab, pair.columns):
            weight_vH = head.weight(start, stop)
            if start == 0:
                shape = (dlogits_nV.shape[0], weight_vH.shape[1])
                grads[i] = torch.empty(shape, dtype=pair.acc, device=pair.device)
            plans.multiply(dlogits_nV[:, start:stop], weight_vH, grads[i], add=start > 0)
    return grads


def backward(
    hidden, weight, bias, lora_a, lora_b, ref_hidden, ref_weight, ref_bias, mask, lora_scale,
    scale, softcap, temperature, kind, alpha, workspace_bytes, rows_RN, saved_logits, grads, needs,
):  # fmt: skip
    """Gradients by hidden, weight, bias, LoRA A and B, and the reference's first three."""
    N, device = hidden.shape[0], hidden.device
    pair = Pair(
        hidden, weight, bias, lora_a, lora_b, ref_hidden, ref_weight, ref_bias, lora_scale,
        scale, softcap, temperature,
    )  # fmt: skip
    kernels = backends.kernels(device)
    if mask is not None:
        grads = torch.where(mask, grads, 0.0)
    keep_N = grads != 0
    rows = plans.Rows(plans.kept(keep_N), N, keep_N)
    saved_rows = rows
    if mask is not None and rows.index is not None:
        saved_rows = plans.Rows((mask.cumsum(0) - 1).index_select(0, rows.index), N)

    saved = min(saved_logits.shape[0], rows.count)  # of the rows, the first ones
    if 0 < saved_logits.shape[0] < N and saved_rows.index is not None:
        saved = int((saved_rows.index < saved_logits.shape[0]).sum())

    wanted = [any(needs[:5]), any(needs[5:])]
    block_rows, columns, _ = plans.tile_shape(
        rows.count, pair.vocab, workspace_bytes - saved_logits.nbytes, pair.element_bytes(wanted),
        device,
    )  # fmt: skip
    tensors = (hidden, weight, bias, lora_a, lora_b, ref_hidden, ref_weight, ref_bias, None, None)
    policy, ref = sides = [
        plans.Gradients(
            head, tensors[i : i + 5], [*needs, False, False][i : i + 5], rows, block_rows, columns
        )
        for head, i in zip(pair.heads, (0, 5), strict=True)
    ]
    if rows.count == 0:
        return *policy.results, *ref.results[:3]
    buffers = Buffers(pair, wanted, block_rows, columns)
    grads_n = rows.take_all(grads)
    rows_Rn = rows_RN if saved_rows.index is None else rows_RN.index_select(1, saved_rows.index)

    for start, stop in plans.spans(0, pair.vocab, columns):
        weights = pair.weights(start, stop)
        for first, last in plans.slices(rows.count, block_rows, saved):
            n, v, block = last - first, stop - start, slice(first, last)
            (hidden_nH, lora_nr), (ref_nH, _) = inputs = [s.take(first, last) for s in sides]
            if last <= saved:
                logits_n2v = saved_rows.take(saved_logits[:, :, start:stop], first, last)
            else:
                out_n2v = buffers.logits(n, v)
                logits_n2v = pair.logits((hidden_nH, ref_nH), lora_nr, weights, start, out_n2v)
            dlogits = buffers.gradients(n, v)
            kernels.divergence_grad(
                *pair.tiles(logits_n2v, start), rows_Rn[:, block], grads_n[block], *dlogits,
                kind=kind, alpha=alpha,
            )  # fmt: skip
            for side, dlogits_nv, given, weight_vH in zip(
                sides, dlogits, inputs, weights, strict=True
            ):
                if dlogits_nv is not None:
                    side.add(dlogits_nv, *given, weight_vH, start, first)
        for side in sides:
            side.end_slice(start, stop)
    return *policy.finish(), *ref.finish()[:3]
