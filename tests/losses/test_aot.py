"""AOT: vectors, and what sorting over the batch does."""

from __future__ import annotations

import torch

from fastpo.losses import aot, aot_unpaired, dpo


def test_published_vectors(f1_cast, check_vector):
    options = dict(beta=0.5, reduction="none")
    check_vector(aot(*f1_cast.sums, **options).loss, [0.7184596480, 0.5333821554, 0.6684596480])
    check_vector(aot(*f1_cast.sums, beta=0.5).loss, 0.6401004838)
    unpaired = [0.6684596480, 0.5543552445, 0.6931471806]
    check_vector(aot_unpaired(*f1_cast.sums, **options).loss, unpaired)
    check_vector(aot_unpaired(*f1_cast.sums, beta=0.5).loss, 0.6386540243)


def test_crossing_orders(vector_dtype, check_vector):
    policy = torch.tensor([0.2, -1.0, 0.7], dtype=vector_dtype)
    ref = torch.tensor([0.5, 0.3, -0.4], dtype=vector_dtype)
    zero = torch.zeros(3, dtype=vector_dtype)
    out = aot(policy, zero, ref, zero, beta=0.5, reduction="none")
    check_vector(out.loss, [0.8543552445, 0.7184596480, 0.6443966601])
    check_vector(out.loss.mean(), 0.7390705175)


def test_smoothing_of_a_sorted_margin(f1):
    e, options = 0.1, dict(beta=0.5, reduction="none")
    for loss in (aot, aot_unpaired):
        margin = -torch.log(torch.expm1(loss(*f1.sums, **options).loss))  # of -logsigmoid
        want = e * torch.nn.functional.softplus(margin)
        want = want + (1 - e) * torch.nn.functional.softplus(-margin)
        got = loss(*f1.sums, label_smoothing=e, **options).loss
        torch.testing.assert_close(got, want)


def test_one_pair_is_dpo(f1):
    one = [x[:1] for x in f1.sums]
    want = dpo(*one, beta=0.5, label_smoothing=0.1)
    for loss in (aot, aot_unpaired):
        got = loss(*one, beta=0.5, label_smoothing=0.1)
        for x, y in zip(got[:-1], want[:-1], strict=True):
            torch.testing.assert_close(x, y)


def test_rewards_stay_with_their_pair(f1_cast, check_vector):
    for loss in (aot, aot_unpaired):
        out = loss(*f1_cast.sums, beta=0.5)
        check_vector(out.chosen_rewards, [0.1, 0.05, -0.2])
        check_vector(out.rejected_rewards, [-0.25, 0.1, -0.25])


def test_gradient_goes_back_to_the_unsorted_place():
    policy = torch.tensor([3.0, -5.0], requires_grad=True)
    zero = torch.zeros(2)
    # Sorted, the second pair faces the smaller reference margin, at -5 - 0; the first 3 - 1.
    aot(policy, zero, torch.tensor([0.0, 1.0]), zero, beta=1.0, reduction="sum").loss.backward()
    torch.testing.assert_close(policy.grad, -torch.sigmoid(torch.tensor([-2.0, 5.0])))


def test_unpaired_sides_may_be_permuted_on_their_own(f1):
    chosen, rejected, ref_chosen, ref_rejected = f1.sums
    order = torch.tensor([2, 0, 1])
    got = aot_unpaired(chosen[order], rejected, ref_chosen[order], ref_rejected).loss
    torch.testing.assert_close(got, aot_unpaired(*f1.sums).loss)
