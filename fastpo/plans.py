"""The loops over tiles: matrix products by torch between two kernel calls.

One pass is one product of 2 N H V FLOP over the active rows. Without a gradient there is one pass.
With a frozen head ``forward`` makes two and ``backward`` none, because the log-prob's gradient by
the hidden state is known up to a factor per row. Otherwise ``forward`` makes one and ``backward``
one to recompute the logits it did not keep, one for the hidden gradient and one for the weight's.

Rows whose target is ignored never enter a product, and rows without an upstream gradient never
enter the backward's. Finding them reads one count from the device, except while a CUDA graph is
captured: then all rows enter, to the same result.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastpo import backends
from fastpo.tiles import MOMENTS, RowState, Tile, accumulation_dtype

# A tile has at most this many rows: enough for the products to run at full speed, and the
# accumulators beside it stay small.
_ROWS = {"cpu": 1024, "cuda": 4096}
# On a CPU a wider tile falls out of the caches, which costs more than the product gains.
_COLUMNS = {"cpu": 1024, "cuda": 21760}  # on CUDA: 510 MiB for bf16
# Tiles are a multiple of this wide, and never narrower: thinner ones would sum in too many
# roundings.
_ALIGN = 128


def multiply(
    a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, *, add: bool, factor: float = 1.0
) -> None:
    """``out = factor * a @ b``, or that added to it, never rounded below ``out``'s own type."""
    dtype = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    if add or factor != 1.0:
        torch.addmm(out, a, b, **dtype, beta=int(add), alpha=factor, out=out)
    else:
        torch.mm(a, b, **dtype, out=out)


def spans(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    """``start .. stop`` in pieces of ``step``."""
    for begin in range(start, stop, step):
        yield begin, min(begin + step, stop)


def capturing(tensor: torch.Tensor) -> bool:
    """Whether a CUDA graph is being captured, when the host may not wait for the device."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def kept(keep_N: torch.Tensor) -> torch.Tensor | None:
    """Indices of the rows to keep, None when that is all of them."""
    if capturing(keep_N):
        return None
    rows = keep_N.nonzero().squeeze(1)
    return None if rows.shape[0] == keep_N.shape[0] else rows


class Rows:
    """The kept rows of [N] and [N, ...] tensors, gathered block by block."""

    def __init__(
        self, rows: torch.Tensor | None, N: int, keep_N: torch.Tensor | None = None
    ) -> None:
        self.index = rows
        self.count = N if rows is None else rows.shape[0]
        # Where rows to be dropped could not be.
        self._keep_N = keep_N if keep_N is not None and capturing(keep_N) else None

    def take(self, tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Kept rows ``start .. stop`` of a tensor [N, ...]."""
        if self.index is None:
            return tensor[start:stop]
        return tensor.index_select(0, self.index[start:stop])

    def take_to_sum(self, tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """As ``take``, for a product that sums over rows: those to be dropped are 0, never NaN."""
        taken = self.take(tensor, start, stop)
        if self._keep_N is None:
            return taken
        return taken.masked_fill(~self._keep_N[start:stop, None], 0)

    def take_all(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """All kept rows."""
        return None if tensor is None else self.take(tensor, 0, self.count)

    def target(self, out: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Where results of rows ``start .. stop`` go in ``out`` [N, ...], by ``indices``."""
        return out[start:stop] if self.index is None else out

    def indices(self, start: int, stop: int) -> torch.Tensor | None:
        """Where kept rows ``start .. stop`` lie among all rows; None when ``target`` says it."""
        return None if self.index is None else self.index[start:stop]

    def scatter(self, values: torch.Tensor, out: torch.Tensor, start: int, stop: int) -> None:
        """Write values of kept rows ``start .. stop`` to their places in ``out`` [N, ...]."""
        if self.index is None:
            out[start:stop] = values
        else:
            out.index_copy_(0, self.index[start:stop], values.to(out.dtype))


class Head:
    """The head's weight, bias and LoRA factors in slices, in the type they are multiplied in.

    A CPU multiplies bf16 and fp16 by emulation, so there slices are converted to fp32 one at a
    time. CUDA multiplies them as they are and writes fp32.
    """

    def __init__(
        self, hidden, weight, bias, lora_a, lora_b, lora_scale, scale, softcap, temperature
    ):
        self.dtype = hidden.dtype
        self.acc = accumulation_dtype(hidden.dtype)
        self.compute = product_dtype(hidden.dtype, hidden.device)
        self.vocab = weight.shape[0]
        self._weight_VH, self._lora_b_Vr, self.lora_scale = weight, lora_b, lora_scale
        self.lora_a_rH = None if lora_a is None else lora_a.to(self.compute)
        self._bias_V = None if bias is None else bias.to(self.acc)
        self.transform = {"scale": scale, "softcap": softcap, "temperature": temperature}

    def weight(self, start: int, stop: int) -> torch.Tensor:
        """Rows ``start .. stop`` of the weight."""
        return self._weight_VH[start:stop].to(self.compute)

    def lora_b(self, start: int, stop: int) -> torch.Tensor:
        """Rows ``start .. stop`` of B, to be multiplied with ``factor=lora_scale``."""
        return self._lora_b_Vr[start:stop].to(self.compute)

    def lora_hidden(self, hidden_nH: torch.Tensor) -> torch.Tensor | None:
        """``hidden @ A^T``, the LoRA branch before B."""
        if self.lora_a_rH is None:
            return None
        lora_nr = hidden_nH.new_empty((hidden_nH.shape[0], self.lora_a_rH.shape[0]))
        multiply(hidden_nH, self.lora_a_rH.t(), lora_nr, add=False)
        return lora_nr

    def logits(self, hidden_nH, lora_nr, weight_vH, start, out_nv) -> torch.Tensor:
        """Raw logits of the slice that begins at ``start``, without the bias, into ``out``."""
        multiply(hidden_nH, weight_vH.t(), out_nv, add=False)
        self.add_lora(lora_nr, start, out_nv)
        return out_nv

    def add_lora(self, lora_nr, start, out_nv) -> None:
        """The LoRA's share of the slice that begins at ``start``, if there is one."""
        if lora_nr is not None:
            b_rv = self.lora_b(start, start + out_nv.shape[1]).t()
            multiply(lora_nr, b_rv, out_nv, add=True, factor=self.lora_scale)

    def tile(self, logits_nv, targets_n, start: int, ignore_index: int) -> Tile:
        """The record the kernels take."""
        bias_v = None
        if self._bias_V is not None:
            bias_v = self._bias_V[start : start + logits_nv.shape[1]]
        return Tile(
            logits_nv, targets_n, start, bias_v, ignore_index=ignore_index, **self.transform
        )


def planned_as(device: torch.device) -> str:
    """Whose sizes of tiles a device has: those of a GPU for meta tensors, which have no numbers."""
    return "cpu" if device.type == "cpu" else "cuda"


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The type that hidden states of ``dtype`` are multiplied in."""
    return accumulation_dtype(dtype) if device.type == "cpu" else dtype


def columns_at_once(device: torch.device) -> int:
    """Columns of a slice of the weight."""
    return _COLUMNS[planned_as(device)]


def logit_bytes(dtype: torch.dtype, device: torch.device) -> int:
    """Bytes one logit of a tile takes, with what is made of it in the type of the product."""
    acc, product = accumulation_dtype(dtype), product_dtype(dtype, device)
    return acc.itemsize + (product.itemsize if product != acc else 0)


def tile_shape(
    count: int, vocab: int, workspace_bytes: int, element_bytes: int, device: torch.device
) -> tuple[int, int, int]:
    """Rows, columns and bytes of one tile with its product, for ``count`` rows of hidden states."""
    rows = max(min(count, _ROWS[planned_as(device)]), 1)
    columns = max(
        min(workspace_bytes // (rows * element_bytes), _COLUMNS[planned_as(device)]), _ALIGN
    )
    columns = min(columns - columns % _ALIGN, vocab)
    return rows, columns, rows * columns * element_bytes


def columns_to_save(hidden_NH: torch.Tensor, vocab: int, workspace_bytes: int) -> int:
    """Columns of logits that the budget holds from forward to backward, beside one tile.

    Fewer than a tile has are not worth holding memory for.
    """
    N, (dtype, device) = hidden_NH.shape[0], (hidden_NH.dtype, hidden_NH.device)
    element_bytes = logit_bytes(dtype, device)
    _, columns, tile_bytes = tile_shape(N, vocab, workspace_bytes, element_bytes, device)
    left = (workspace_bytes - tile_bytes) // max(N * accumulation_dtype(dtype).itemsize, 1)
    if left >= vocab:
        return vocab
    return left - left % _ALIGN if left >= columns else 0


class Workspace:
    """Buffers for one tile: the logits, and their weights or gradients in the type to multiply."""

    def __init__(self, head: Head, count: int, workspace_bytes: int, device: torch.device) -> None:
        element_bytes = logit_bytes(head.dtype, device)
        self.rows, self.columns, _ = tile_shape(
            count, head.vocab, workspace_bytes, element_bytes, device
        )
        size = self.rows * self.columns
        self._logits = torch.empty(size, dtype=head.acc, device=device)
        self._product = self._logits
        if head.compute != head.acc:
            self._product = torch.empty(size, dtype=head.compute, device=device)

    def logits(self, n: int, v: int) -> torch.Tensor:
        """[n, v] for the logits."""
        return self._logits[: n * v].view(n, v)

    def product(self, n: int, v: int) -> torch.Tensor:
        """[n, v] for what is made of them; the same memory where the type is."""
        return self._product[: n * v].view(n, v)


def forward(
    hidden, weight, targets, bias, lora_a, lora_b, lora_scale, scale, softcap, temperature,
    ignore_index, workspace_bytes, moments, keep_unit_grad, saved_columns,
):  # fmt: skip
    """One pass, or two with ``keep_unit_grad``; returns the fields of ``linear_stats.Stats``."""
    (N, H), device = hidden.shape, hidden.device
    head = Head(hidden, weight, bias, lora_a, lora_b, lora_scale, scale, softcap, temperature)
    kernels = backends.kernels(device)

    def zeros(wanted: bool, dtype: torch.dtype = head.acc) -> torch.Tensor:
        return torch.zeros(N if wanted else 0, dtype=dtype, device=device)

    outputs = {name: zeros(True) for name in ("logprobs", "lse", "lse_low")}
    for name, bit in MOMENTS.items():
        outputs[name] = zeros(bool(moments & bit), torch.bool if name == "is_top1" else head.acc)
    asked = {name: tensor for name, tensor in outputs.items() if tensor.shape[0]}
    unit_grad_NH = torch.zeros((N if keep_unit_grad else 0, H), dtype=head.acc, device=device)
    saved_NS = torch.empty(
        (N if saved_columns else 0, saved_columns), dtype=head.acc, device=device
    )
    rows = Rows(kept(targets != ignore_index), N)
    saved_NS[rows.count :] = 0
    workspace = Workspace(head, rows.count, workspace_bytes, device)
    if keep_unit_grad:
        partial = torch.empty((workspace.rows, H), dtype=head.acc, device=device)

    for first, last in spans(0, rows.count, workspace.rows):
        n = last - first
        hidden_nH = rows.take(hidden, first, last).to(head.compute)
        targets_n = rows.take(targets, first, last)
        lora_nr = head.lora_hidden(hidden_nH)
        state = RowState.start(n, head.acc, device, moments)
        for start, stop in slices(head.vocab, workspace.columns, saved_columns):
            weight_vH = head.weight(start, stop)
            out_nv = workspace.logits(n, stop - start)
            if stop <= saved_columns:
                out_nv = saved_NS[first:last, start:stop]
            logits_nv = head.logits(hidden_nH, lora_nr, weight_vH, start, out_nv)
            tile = head.tile(logits_nv, targets_n, start, ignore_index)
            if not keep_unit_grad:
                kernels.chunk_stats(tile, state)
                continue
            weights_nv = workspace.product(n, stop - start)
            kernels.chunk_weights(tile, state, weights_nv, partial[:n] if start else None)
            multiply(weights_nv, weight_vH, partial[:n], add=start > 0)
        where = {"rows": rows.indices(first, last)}
        wanted = {name: rows.target(out, first, last) for name, out in asked.items()}
        kernels.finish_stats(
            state, targets_n, vocab=head.vocab, ignore_index=ignore_index, **where, **wanted
        )
        if keep_unit_grad:
            # A target out of range has poisoned its state; here it only must not be read.
            target_rows_nH = weight.index_select(0, targets_n.clamp(0, head.vocab - 1))
            target_rows_nH = target_rows_nH.to(head.acc)
            out_NH = rows.target(unit_grad_NH, first, last)
            kernels.finish_weights(
                state, partial[:n], target_rows_nH, out_NH, targets_n,
                ignore_index=ignore_index, **where, **head.transform,
            )  # fmt: skip
    return *outputs.values(), unit_grad_NH, saved_NS


def slices(vocab: int, step: int, saved_columns: int) -> Iterator[tuple[int, int]]:
    """Vocabulary slices, none of which crosses the end of the saved columns."""
    yield from spans(0, saved_columns, step)
    yield from spans(saved_columns, vocab, step)


class Gradients:
    """Gradients by hidden, weight, bias, LoRA A and B, summed from the logits' tile by tile.

    Tiles come in slices of the vocabulary, each in blocks of the kept rows, both in order. Results
    that are not needed are empty.
    """

    def __init__(self, head: Head, inputs, needs, rows: Rows, block_rows: int, columns: int):
        self.hidden, H = inputs[0], inputs[0].shape[1]
        self.results = tuple(
            torch.zeros_like(t, memory_format=torch.contiguous_format)
            if need
            else self.hidden.new_empty(0)
            for t, need in zip(inputs, needs, strict=True)
        )
        self.head, self.rows = head, rows
        self.needs_hidden, self.needs_weight, self.needs_bias, self.needs_a, self.needs_b = needs
        rank = 0 if head.lora_a_rH is None else head.lora_a_rH.shape[0]
        self.needs_lora = self.needs_a or (self.needs_hidden and rank > 0)
        self.dhidden_nH = self._buffer(self.needs_hidden, rows.count, H)
        self.dlora_nr = self._buffer(self.needs_lora, rows.count, rank)
        self.lora_Nr = None
        if rank:
            self.lora_Nr = self.hidden.new_empty((rows.count, rank), dtype=head.compute)
            for first, last in spans(0, rows.count, block_rows):
                self.lora_Nr[first:last] = head.lora_hidden(self._take_hidden(first, last))
        # Summed over the rows in fp32 and rounded once, slice by slice: no [V, H] buffer.
        self.dweight_vH = self._buffer(self.needs_weight, columns, H)
        self.dbias_v = self._buffer(self.needs_bias, columns)
        self.dlora_b_vr = self._buffer(self.needs_b, columns, rank)

    def _buffer(self, wanted: bool, *shape: int) -> torch.Tensor | None:
        return self.hidden.new_zeros(shape, dtype=self.head.acc) if wanted else None

    def _take_hidden(self, first: int, last: int) -> torch.Tensor:
        return self.rows.take_to_sum(self.hidden, first, last).to(self.head.compute)

    def take(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states of kept rows ``first .. last``, and their LoRA branch."""
        lora_nr = None if self.lora_Nr is None else self.lora_Nr[first:last]
        return self._take_hidden(first, last), lora_nr

    def add(self, dlogits_nv, hidden_nH, lora_nr, weight_vH, start: int, first: int) -> None:
        """Add the tile whose first column is ``start`` and whose first kept row is ``first``."""
        n, v = dlogits_nv.shape
        block = slice(first, first + n)
        if self.needs_hidden:
            multiply(dlogits_nv, weight_vH, self.dhidden_nH[block], add=start > 0)
        if self.needs_weight:
            multiply(dlogits_nv.t(), hidden_nH, self.dweight_vH[:v], add=first > 0)
        if self.needs_bias:
            sum_v = dlogits_nv.sum(0, dtype=self.head.acc)
            self.dbias_v[:v] = self.dbias_v[:v] + sum_v if first else sum_v
        if self.needs_lora:
            lora_b_vr = self.head.lora_b(start, start + v)
            scale = self.head.lora_scale
            multiply(dlogits_nv, lora_b_vr, self.dlora_nr[block], add=start > 0, factor=scale)
        if self.needs_b:
            multiply(dlogits_nv.t(), lora_nr, self.dlora_b_vr[:v], add=first > 0)

    def end_slice(self, start: int, stop: int) -> None:
        """Every row of the slice has been added."""
        _, dW_VH, db_V, _, dB_Vr = self.results
        if self.needs_weight:
            dW_VH[start:stop] = self.dweight_vH[: stop - start]
        if self.needs_bias:
            db_V[start:stop] = self.dbias_v[: stop - start]
        if self.needs_b:
            dB_Vr[start:stop] = self.dlora_b_vr[: stop - start] * self.head.lora_scale

    def finish(self) -> tuple[torch.Tensor, ...]:
        """The results, every slice having been added."""
        dX_NH, _, _, dA_rH, _ = self.results
        if self.needs_lora:
            dlora_nr = self.dlora_nr.to(self.head.compute)
            if self.needs_hidden:
                multiply(dlora_nr, self.head.lora_a_rH, self.dhidden_nH, add=True)
            if self.needs_a:
                da_rH = self._buffer(True, *dA_rH.shape)
                hidden_nH = self._take_hidden(0, self.rows.count)
                multiply(dlora_nr.t(), hidden_nH, da_rH, add=False)
                dA_rH.copy_(da_rH)
        if self.needs_hidden:
            self.rows.scatter(self.dhidden_nH, dX_NH, 0, self.rows.count)
        return self.results


def backward(
    hidden, weight, targets, bias, lora_a, lora_b, lora_scale, scale, softcap, temperature,
    ignore_index, workspace_bytes, logprobs, lse, lse_low, entropy, saved_logits, grad_logprobs,
    grad_lse, grad_entropy, needs,
):  # fmt: skip
    """Gradients by hidden, weight, bias, LoRA A and B; those not in ``needs`` are empty."""
    N, device = hidden.shape[0], hidden.device
    head = Head(hidden, weight, bias, lora_a, lora_b, lora_scale, scale, softcap, temperature)
    kernels = backends.kernels(device)
    saved_columns = saved_logits.shape[1]

    active_N = targets != ignore_index
    moved_N = torch.zeros_like(active_N)
    for grad_N in (grad_logprobs, grad_lse, grad_entropy):
        if grad_N is not None:
            moved_N |= grad_N != 0
    keep_N = active_N & moved_N
    rows = Rows(kept(keep_N), N, keep_N)
    saved_rows = Rows(None, N)  # saved logits hold the active rows only, in their order
    if saved_columns and rows.index is not None:
        saved_rows = Rows((active_N.cumsum(0) - 1).index_select(0, rows.index), N)
    workspace = Workspace(head, rows.count, workspace_bytes, device)
    inputs = (hidden, weight, bias, lora_a, lora_b)
    gradients = Gradients(head, inputs, needs, rows, workspace.rows, workspace.columns)
    if rows.count == 0:
        return gradients.results
    targets_n, logprobs_n = rows.take_all(targets), rows.take_all(logprobs)
    lse_n, lse_low_n = rows.take_all(lse), rows.take_all(lse_low)
    entropy_n = rows.take_all(entropy) if grad_entropy is not None else None
    grads = [rows.take_all(g) for g in (grad_logprobs, grad_lse, grad_entropy)]

    for start, stop in slices(head.vocab, workspace.columns, saved_columns):
        weight_vH, v = head.weight(start, stop), stop - start
        for first, last in spans(0, rows.count, workspace.rows):
            n, block = last - first, slice(first, last)
            hidden_nH, lora_nr = gradients.take(first, last)
            if stop <= saved_columns:
                logits_nv = saved_rows.take(saved_logits[:, start:stop], first, last)
            else:
                out_nv = workspace.logits(n, v)
                logits_nv = head.logits(hidden_nH, lora_nr, weight_vH, start, out_nv)
            dlogits_nv = workspace.product(n, v)
            kernels.chunk_grad(
                head.tile(logits_nv, targets_n[block], start, ignore_index),
                dlogits_nv,
                logprobs=logprobs_n[block],
                lse=lse_n[block],
                lse_low=lse_low_n[block],
                entropy=None if entropy_n is None else entropy_n[block],
                grad_logprobs=None if grads[0] is None else grads[0][block],
                grad_lse=None if grads[1] is None else grads[1][block],
                grad_entropy=None if grads[2] is None else grads[2][block],
            )
            gradients.add(dlogits_nv, hidden_nH, lora_nr, weight_vH, start, first)
        gradients.end_slice(start, stop)
    return gradients.finish()
