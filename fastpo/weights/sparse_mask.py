"""SparsePO's small network from hidden states to token weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastpo.weights._common import fail


class SparseMask(nn.Module):
    """Token weights >= 0 that are learned with the policy, for :func:`fastpo.losses.sparse_po`.

    (arXiv:2410.05102, the authors' code.) Of each token, the hidden states of all layers of the
    reference model: LayerNorm (one for all layers), a Linear(H, 1) of each layer's own, ReLU and
    dropout; then Linear(L, 1) without bias over the layers, ReLU and dropout. One module serves for
    both the log-ratios and the KL (*common*), or one for each (*independent*). Give its parameters
    to an optimiser; the authors decay them by 0.01.

    Args:
        hidden_size: H.
        layers: L, how many hidden states a token has.
        dropout: probability, in training mode.

    Raises:
        ValueError: ``forward`` got another number of layers.

    Example:
        >>> mask = SparseMask(hidden_size=8, layers=2).eval()
        >>> weights = mask([torch.randn(3, 5, 8), torch.randn(3, 5, 8)])
        >>> weights.shape, bool((weights >= 0).all())
        (torch.Size([3, 5]), True)
    """

    def __init__(self, hidden_size: int, layers: int, dropout: float = 0.1):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.per_layer = nn.ModuleList(nn.Linear(hidden_size, 1) for _ in range(layers))
        self.mixer = nn.Linear(layers, 1, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: Sequence[Tensor]) -> Tensor:
        """Weights of the tokens, with a gradient to the parameters alone.

        Args:
            hidden_states: L tensors [..., H], one per layer, padded [B, T, H] or packed [N, H].

        Returns:
            [...] of the parameters' dtype.
        """
        if len(hidden_states) != len(self.per_layer):
            expected, remedy = f"{len(self.per_layer)} layers", "Give the same layers as at first."
            raise fail("SparseMask", "hidden_states", expected, f"{len(hidden_states)}", remedy)
        dtype = self.mixer.weight.dtype
        scores = [
            self.dropout(torch.relu(linear(self.norm(hidden.detach().to(dtype)))))
            for linear, hidden in zip(self.per_layer, hidden_states, strict=True)
        ]
        return self.dropout(torch.relu(self.mixer(torch.cat(scores, -1)))).squeeze(-1)
