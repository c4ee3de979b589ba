"""The one rule of closeness: as good as plain torch in the same type, up to a factor of two."""

import torch

FLOOR_ULPS = 4
# Of float64: the truth is computed in float64 too, with an error of its own.
TRUTH_ULPS = 64
ELEMENT_ULPS = 8


def assert_close_to_truth(out, truth, base, *, what="", per_element=False) -> None:
    """Check ``out`` against the float64 ``truth``, with the error of ``base`` as the yardstick.

    ``max|out - truth| <= 2 max|base - truth| + 4 eps32 max(1, max|truth|)``, and where asked, for
    every element, ``|out - truth| <= |base - truth| + 8 eps(out) max(1, max|truth|)``.
    """
    assert out.shape == truth.shape == base.shape, f"{what}: {out.shape} {truth.shape} {base.shape}"
    got, truth, base = (t.detach().double().cpu().reshape(-1) for t in (out, truth, base))
    if truth.numel() == 0:
        return
    same = (got == truth) | (got.isnan() & truth.isnan())
    error = torch.where(same, 0.0, (got - truth).abs())
    yardstick = torch.where((base == truth) | base.isnan(), 0.0, (base - truth).abs())
    finite = truth[truth.isfinite()]
    scale = max(1.0, finite.abs().max().item()) if finite.numel() else 1.0
    floor = FLOOR_ULPS * torch.finfo(torch.float32).eps * scale
    if out.dtype == torch.float64:
        floor = TRUTH_ULPS * torch.finfo(torch.float64).eps * scale
    worst = error.nan_to_num(nan=torch.inf).argmax()

    def tell(bound: float) -> str:
        i = worst.item()
        return (
            f"{what}: at {i} got {got[i]:.9g}, want {truth[i]:.9g}, base "
            f"{base[i]:.9g}; error {error.max():.3g} > {bound:.3g}"
        )

    bound = 2 * yardstick.max().item() + floor
    assert error.max().item() <= bound, tell(bound)
    if per_element:
        limit = yardstick + ELEMENT_ULPS * torch.finfo(out.dtype).eps * scale
        excess = (error - limit).argmax()
        assert (error <= limit).all(), (
            f"{what}: element {excess.item()} got {got[excess]:.9g}, "
            f"want {truth[excess]:.9g}, base {base[excess]:.9g}"
        )
