"""Methods on small games whose solutions are known: all responses enumerated, softmax policies.

A policy over N responses is a vector of logits; its pairs are all N^2. The Nash policy of the game
with a KL to the reference comes from Newton's method on its own equation, and is certified by the
definition of the game; cyclic games have it in closed form.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from fastpo import losses

DOUBLE = {"dtype": torch.float64}
MIXED = torch.tensor([[0.5, 0.8, 0.3], [0.2, 0.5, 0.9], [0.7, 0.1, 0.5]], **DOUBLE)
# Beats, loses, in a circle, with three different strengths a = 0.1, b = 0.2, c = 0.3.
CYCLE = 0.5 + torch.tensor([[0, 0.1, -0.2], [-0.1, 0, 0.3], [0.2, -0.3, 0]], **DOUBLE)
CYCLE_NASH = torch.tensor([3, 2, 1], **DOUBLE) / 6  # c, b, a: every response wins half
ROCK_PAPER_SCISSORS = torch.tensor([[0.5, 1, 0], [0, 0.5, 1], [1, 0, 0.5]], **DOUBLE)
# The first response beats all others: the Nash policy without a reference is the first alone.
WINNER = torch.tensor([[0.5, 0.9, 0.8], [0.1, 0.5, 0.3], [0.2, 0.7, 0.5]], **DOUBLE)
UNIFORM = torch.zeros(3, **DOUBLE)
SKEWED = torch.tensor([0.3, -0.5, 0.9], **DOUBLE)
THETA = torch.tensor([0.2, -0.1, 0.4], **DOUBLE)

GAMES = {
    "mixed": (MIXED, UNIFORM),
    "mixed_skewed_reference": (MIXED, SKEWED),
    "cycle": (CYCLE, SKEWED),
    "rock_paper_scissors": (ROCK_PAPER_SCISSORS, UNIFORM),
}


@pytest.fixture(params=GAMES)
def game(request):
    preferences, ref = GAMES[request.param]
    return preferences, ref.log_softmax(0)


def value(policy, opponent, ref, preferences, beta):
    """What the game pays to ``policy``, both as probabilities."""
    kl = lambda probs: (probs * (probs.log() - ref)).sum()
    return policy @ preferences @ opponent - beta * kl(policy) + beta * kl(opponent)


def best_answer(policy, ref, preferences, beta):
    return (ref + preferences @ policy / beta).softmax(0)


def nash(ref, preferences, beta):
    """Probabilities p with p = best_answer(p), by Newton's method."""
    residual = lambda p: p - best_answer(p, ref, preferences, beta)
    probs = torch.full_like(ref, 1 / len(ref))
    for _ in range(30):
        jacobian = torch.autograd.functional.jacobian(residual, probs)
        probs = probs - torch.linalg.solve(jacobian, residual(probs))
    assert residual(probs).abs().max() < 1e-15
    assert (probs > 0).all()
    return probs


def pairs_of(*logps):
    """First and second of all N^2 pairs, for each vector of log-probs."""
    first, second = (x.flatten() for x in torch.meshgrid(*[torch.arange(3)] * 2, indexing="ij"))
    return [side for logp in logps for side in (logp[first], logp[second])]


def gradient(loss, theta):
    theta = theta.detach().requires_grad_()
    return torch.autograd.grad(loss(theta), theta)[0]


def minimise(loss, theta, steps):
    """Newton's method; logits are free up to a constant, hence the pseudo-inverse."""
    for _ in range(steps):
        hessian = torch.autograd.functional.hessian(loss, theta)
        step = torch.linalg.pinv(hessian, rtol=1e-12, hermitian=True) @ gradient(loss, theta)
        theta = (theta - step).log_softmax(0)
    return theta


# ------------------------------------------------------------------ the games themselves


def test_nash_policy_of_the_symmetric_cycle_is_uniform():
    got = nash(UNIFORM.log_softmax(0), ROCK_PAPER_SCISSORS, 0.5)
    torch.testing.assert_close(got, torch.full_like(got, 1 / 3), rtol=0, atol=1e-15)


def test_dual_gap_is_what_two_best_answers_gain(game):
    preferences, ref = game
    policy = THETA.softmax(0)
    answer = best_answer(policy, ref, preferences, 0.5)
    best = value(answer, policy, ref, preferences, 0.5)
    # The game is symmetric: the worst opponent is the best answer.
    worst = value(policy, answer, ref, preferences, 0.5)
    gap = losses.dual_gap(THETA.log_softmax(0), ref, preferences, 0.5)
    torch.testing.assert_close(gap, best - worst, rtol=0, atol=1e-15)
    torch.manual_seed(0)
    for other in torch.randn(50, 3, **DOUBLE).softmax(1):
        assert value(other, policy, ref, preferences, 0.5) <= best
        assert value(policy, other, ref, preferences, 0.5) >= worst


def test_dual_gap_is_not_rounded_by_autocast():
    arguments = THETA.log_softmax(0).float(), UNIFORM.log_softmax(0).float(), MIXED.float(), 0.5
    with torch.autocast("cpu", torch.bfloat16):
        got = losses.dual_gap(*arguments)
    assert torch.equal(got, losses.dual_gap(*arguments))


def test_dual_gap_is_0_at_the_nash_policy_alone(game):
    preferences, ref = game
    solution = nash(ref, preferences, 0.5).log()
    assert abs(losses.dual_gap(solution, ref, preferences, 0.5)) < 1e-15
    assert losses.dual_gap(solution + 0.01 * THETA, ref, preferences, 0.5) > 1e-7


def test_dual_gap_of_a_policy_without_some_responses_is_finite():
    policy = torch.tensor([0.0, -torch.inf, -torch.inf])
    assert torch.isfinite(losses.dual_gap(policy, UNIFORM.log_softmax(0), MIXED, 0.5))
    with pytest.raises(ValueError, match=r"dual_gap: policy: expected \[N\], \[N\] and \[N, N\]"):
        losses.dual_gap(policy, UNIFORM, MIXED[:2], 0.5)


# ------------------------------------------------------------------ INPO


def inpo_loss(current, ref, preferences, eta, ratio):
    """Pairs of the current policy, in the order the preference draws."""
    weights = torch.outer(current.exp(), current.exp()) * preferences

    def loss(theta):
        *sums, chosen, rejected = pairs_of(theta.log_softmax(0), ref, current)
        history = {"history_chosen": [chosen], "history_rejected": [rejected]}
        per_pair = losses.inpo(*sums, **history, eta=eta, ratio=ratio, reduction="none").loss
        return (weights.flatten() * per_pair).sum()

    return loss


def inpo_target(current, ref, preferences, eta, ratio):
    wins = preferences @ current.exp()
    return (wins / eta + ratio * ref + (1 - ratio) * current).log_softmax(0)


def test_inpo_has_no_gradient_at_its_target(game):
    preferences, ref = game
    current = THETA.log_softmax(0)
    for ratio in (0.0, 1 / 3, 1.0):
        loss = inpo_loss(current, ref, preferences, 0.5, ratio)
        target = inpo_target(current, ref, preferences, 0.5, ratio)
        assert gradient(loss, target).abs().max() < 1e-15
        assert gradient(loss, THETA).abs().max() > 1e-3


def test_inpo_rewards_at_the_target_are_win_rates_up_to_a_constant(game):
    preferences, ref = game
    current = THETA.log_softmax(0)
    target = inpo_target(current, ref, preferences, 0.5, 1 / 3)
    out = losses.inpo(target, target, ref, ref, [current], [current], eta=0.5)
    difference = out.chosen_rewards - preferences @ current.exp()
    torch.testing.assert_close(difference, difference[:1].expand(3), rtol=0, atol=1e-14)


def test_inpo_iterates_to_the_nash_policy(game):
    preferences, ref = game
    eta, ratio = 1.0, 0.5
    current = ref
    for _ in range(60):
        current = minimise(inpo_loss(current, ref, preferences, eta, ratio), current, 1)
    want = nash(ref, preferences, eta * ratio)
    torch.testing.assert_close(current.exp(), want, rtol=0, atol=1e-12)


# ------------------------------------------------------------------ DNO


def dno_loss(current, preferences, eta, weights=None):
    wins = preferences @ current.exp()

    def loss(theta):
        arguments = pairs_of(theta.log_softmax(0), current, wins)
        per_pair = losses.dno(*arguments, beta=eta, reduction="none").loss
        return per_pair.mean() if weights is None else (weights.flatten() * per_pair).sum()

    return loss


def test_dno_has_no_gradient_at_its_target(game):
    preferences, _ = game
    current = THETA.log_softmax(0)
    loss = dno_loss(current, preferences, 0.5, torch.outer(current.exp(), current.exp()))
    target = (current + preferences @ current.exp() / 0.5).log_softmax(0)
    assert gradient(loss, target).abs().max() < 1e-16
    assert gradient(loss, THETA).abs().max() > 1e-3
    # All pairs are met at once: the minimum does not depend on how often each is drawn.
    got = minimise(dno_loss(current, preferences, 0.5), THETA, 6)
    torch.testing.assert_close(got, target, rtol=0, atol=1e-13)


def test_dno_iterates_to_the_nash_policy_where_one_response_beats_all():
    current = THETA.log_softmax(0)
    for _ in range(15):
        current = minimise(dno_loss(current, WINNER, 0.2), current, 5)
    want = torch.tensor([1.0, 0, 0], **DOUBLE)
    torch.testing.assert_close(current.exp(), want, rtol=0, atol=1e-8)


def test_dno_stays_at_the_nash_policy_of_a_cycle_but_does_not_find_it():
    # Without a reference the iterates of mirror descent circle outwards.
    stays = minimise(dno_loss(CYCLE_NASH.log(), CYCLE, 0.5), THETA.log_softmax(0), 8)
    torch.testing.assert_close(stays.exp(), CYCLE_NASH, rtol=0, atol=1e-12)
    current, distances = THETA.log_softmax(0), []
    for _ in range(10):
        current = minimise(dno_loss(current, CYCLE, 0.5), current, 5)
        distances.append((CYCLE_NASH * (CYCLE_NASH.log() - current)).sum())
    assert all(later > earlier for earlier, later in itertools.pairwise(distances))


# ------------------------------------------------------------------ EGPO and online IPO


def egpo_loss(opponent, ref, preferences, beta):
    wins = preferences @ opponent.softmax(0)
    return lambda theta: losses.egpo(*pairs_of(theta.log_softmax(0), ref, wins), beta=beta).loss


def extragradient(theta, ref, preferences, beta, lr):
    half = theta - lr * gradient(egpo_loss(theta, ref, preferences, beta), theta)
    return theta - lr * gradient(egpo_loss(half, ref, preferences, beta), theta), half


def test_extragradient_vectors():
    ref = UNIFORM.log_softmax(0)
    close = lambda got, want: torch.testing.assert_close(
        got, torch.tensor(want, **DOUBLE), rtol=0, atol=1e-9
    )
    new, half = extragradient(THETA, ref, MIXED, 0.5, 0.3)
    close(egpo_loss(THETA, ref, MIXED, 0.5)(THETA), 0.163879044971)
    close(half, [0.174396235183, 0.051271448801, 0.274332316016])
    close(egpo_loss(half, ref, MIXED, 0.5)(THETA), 0.162449609924)
    close(new, [0.195594032549, 0.041771582554, 0.262634384897])
    close(losses.dual_gap(THETA.log_softmax(0), ref, MIXED, 0.5), 0.0392719639110)
    close(losses.dual_gap(new.log_softmax(0), ref, MIXED, 0.5), 0.0135039285025)


def test_a_gradient_step_of_egpo_is_mirror_descent(game):
    preferences, ref = game
    beta, lr = 0.5, 0.3
    new = THETA - lr * gradient(egpo_loss(THETA, ref, preferences, beta), THETA)
    eta = 4 * lr / (beta * 3)
    policy = THETA.log_softmax(0)
    want = (1 - eta * beta) * policy + eta * beta * ref + eta * preferences @ policy.exp()
    torch.testing.assert_close(new.log_softmax(0), want.log_softmax(0), rtol=0, atol=1e-15)


def test_egpo_without_preferences_is_distillation_to_the_reference():
    ref, indifferent = SKEWED.log_softmax(0), torch.full_like(MIXED, 0.5)
    loss = egpo_loss(THETA, ref, indifferent, 0.5)
    got = minimise(loss, THETA, 1)
    torch.testing.assert_close(got, ref, rtol=0, atol=1e-14)


@pytest.mark.parametrize("beta", [0.5, 0.2])
def test_egpo_iterates_to_the_nash_policy(game, beta):
    preferences, ref = game
    theta = THETA
    for _ in range(150):
        theta, _ = extragradient(theta, ref, preferences, beta, 0.3)
    want = nash(ref, preferences, beta)
    torch.testing.assert_close(theta.softmax(0), want, rtol=0, atol=1e-10)


def test_online_ipo_has_no_gradient_at_the_nash_policy(game):
    # Both responses from the policy: weights by its probabilities, held fixed.
    preferences, ref = game
    solution = nash(ref, preferences, 0.5)

    def loss(theta):
        sums = pairs_of(theta.log_softmax(0), ref)
        per_pair = losses.online_ipo(
            *sums, label=preferences.flatten(), beta=0.5, reduction="none"
        ).loss
        return (torch.outer(solution, solution).flatten() * per_pair).sum()

    assert gradient(loss, solution.log()).abs().max() < 1e-15
    assert gradient(loss, THETA).abs().max() > 1e-3


# ------------------------------------------------------------------ SPPO


def sppo_loss(current, preferences, beta):
    wins = preferences @ current.exp()
    return lambda theta: losses.sppo(*pairs_of(theta.log_softmax(0), current, wins), beta=beta).loss


def test_sppo_iterates_to_the_nash_policy_where_one_response_beats_all():
    current = THETA.log_softmax(0)
    for _ in range(25):
        current = minimise(sppo_loss(current, WINNER, 0.3), current, 12)
    want = torch.tensor([1.0, 0, 0], **DOUBLE)
    torch.testing.assert_close(current.exp(), want, rtol=0, atol=1e-8)


def test_sppo_stays_at_the_nash_policy_of_a_cycle():
    # Every win rate is 1/2 there: the constant for log Z is exact.
    loss = sppo_loss(CYCLE_NASH.log(), CYCLE, 0.3)
    assert loss(CYCLE_NASH.log()) < 1e-30
    got = minimise(loss, THETA.log_softmax(0), 12)
    torch.testing.assert_close(got.exp(), CYCLE_NASH, rtol=0, atol=1e-12)


def test_sppo_without_a_normaliser_is_multiplicative_weights(game):
    # Log-probs as free values, as the loss treats them: one step is p exp((p_i - 1/2) / beta).
    preferences, _ = game
    current = THETA.log_softmax(0)
    wins = preferences @ current.exp()
    loss = lambda free: losses.sppo(*pairs_of(free, current, wins), beta=0.3).loss
    target = current + (wins - 0.5) / 0.3
    assert loss(target) < 1e-28
    want = (current + wins / 0.3).log_softmax(0)
    torch.testing.assert_close(target.log_softmax(0), want, rtol=0, atol=1e-14)


# ------------------------------------------------------------------ SRPO


def test_srpo_residuals_are_0_at_the_solution(game):
    preferences, ref = game
    beta = 0.4
    # Column i: improvements of response i. P[j, i] is the probability that j beats i.
    tilted = ref[:, None] + preferences / beta
    log_normaliser = tilted.logsumexp(0)
    improver = tilted - log_normaliser
    policy = (ref - log_normaliser).log_softmax(0)
    rejected, chosen = (x.flatten() for x in torch.meshgrid(*[torch.arange(3)] * 2, indexing="ij"))
    conditional = {
        "chosen_given_rejected": (chosen, rejected),
        "rejected_given_chosen": (rejected, chosen),
        "chosen_given_chosen": (chosen, chosen),
        "rejected_given_rejected": (rejected, rejected),
    }
    streams = {name: improver[pair] for name, pair in conditional.items()}
    streams |= {f"ref_{name}": ref[pair[0]] for name, pair in conditional.items()}
    out = losses.srpo(
        policy[chosen],
        policy[rejected],
        ref[chosen],
        ref[rejected],
        **streams,
        label=preferences[chosen, rejected],
        beta=beta,
        reduction="none",
    )
    assert out.loss.max() < 1e-30
    assert out.metrics["joint"] < 1e-30
    assert out.metrics["improver"] < 1e-30


# ------------------------------------------------------------------ Nash-MD


@pytest.mark.parametrize("credit", ["token", "sequence"])
@pytest.mark.parametrize("mixture", [0.0, 0.5, 1.0])
def test_nash_md_gradient_is_that_of_its_objective(game, credit, mixture):
    preferences, ref = game
    policy = THETA.log_softmax(0)
    opponent = ((1 - mixture) * policy + mixture * ref).softmax(0)
    wins, one_token = preferences @ opponent, torch.ones(3, 1, dtype=torch.bool)

    def sampled(theta):
        out = losses.nash_md(
            theta.log_softmax(0)[:, None],
            ref[:, None],
            one_token,
            wins,
            beta=0.3,
            credit=credit,
            reduction="none",
        )
        return (policy.exp() * out.loss).sum()

    def objective(theta):
        logps = theta.log_softmax(0)
        return 0.3 * (logps.exp() * (logps - ref)).sum() - logps.exp() @ wins

    want = gradient(objective, THETA)
    torch.testing.assert_close(gradient(sampled, THETA), want, rtol=0, atol=1e-16)


def test_nash_md_by_sequence_is_unbiased_for_two_tokens_and_by_token_is_not():
    torch.manual_seed(0)
    theta, ref = torch.randn(2, 3, 2, **DOUBLE)  # rows: first token; second after 0, after 1
    sequences = list(itertools.product(range(2), repeat=2))
    wins = torch.tensor([0.9, 0.2, 0.4, 0.7], **DOUBLE)

    def tokens(logits):
        logps = logits.log_softmax(-1)
        return torch.stack([torch.stack((logps[0, a], logps[1 + a, b])) for a, b in sequences])

    probs = tokens(theta).sum(1).exp()
    mask = torch.ones(4, 2, dtype=torch.bool)

    def sampled(credit):
        def loss(logits):
            out = losses.nash_md(
                tokens(logits), tokens(ref), mask, wins, 0.3, credit=credit, reduction="none"
            )
            return (probs * out.loss).sum()

        return loss

    def objective(logits):
        logps = tokens(logits).sum(1)
        return 0.3 * (logps.exp() * (logps - tokens(ref).sum(1))).sum() - logps.exp() @ wins

    want = gradient(objective, theta)
    got = gradient(sampled("sequence"), theta)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-15)
    assert (gradient(sampled("token"), theta) - want).abs().max() > 1e-3


def test_nash_md_finds_the_nash_policy_against_itself(game):
    # With the policy as opponent the expected gradient vanishes there.
    preferences, ref = game
    solution = nash(ref, preferences, 0.3)
    out = lambda theta: losses.nash_md(
        theta.log_softmax(0)[:, None],
        ref[:, None],
        torch.ones(3, 1, dtype=torch.bool),
        preferences @ solution,
        beta=0.3,
        reduction="none",
    )
    assert (
        gradient(lambda theta: (solution * out(theta).loss).sum(), solution.log()).abs().max()
        < 1e-15
    )


# ------------------------------------------------------------------ VPO


def test_vpo_bonus_is_the_optimal_value_of_a_calibrated_reward():
    torch.manual_seed(0)
    ref, reward = SKEWED.log_softmax(0), torch.randn(3, **DOUBLE)
    beta, alpha = 0.4, 0.05
    reward = reward - reward.mean()  # mean 0 under the uniform calibration distribution
    policy = (ref + reward / beta).log_softmax(0)
    optimal = (policy.exp() * (reward - beta * (policy - ref))).sum()
    torch.testing.assert_close(optimal, beta * (ref + reward / beta).logsumexp(0))
    for setting, sign in (("online", 1), ("offline", -1)):
        out = losses.vpo(*[ref] * 4, policy, ref, beta=beta, alpha=alpha, setting=setting)
        torch.testing.assert_close(
            out.metrics["bonus"], -sign * alpha * optimal, rtol=0, atol=1e-16
        )


# ------------------------------------------------------------------ regression to rewards


def test_rebel_and_copg_have_their_minimum_at_the_optimal_policy():
    ref, reward = SKEWED.log_softmax(0), torch.tensor([0.3, -0.7, 1.1], **DOUBLE)
    scores = pairs_of(reward)

    def rebel(theta):
        return losses.rebel(*pairs_of(theta.log_softmax(0), ref), *scores, eta=2.5).loss

    def copg(theta):
        return losses.copg(*pairs_of(theta.log_softmax(0), ref), *scores, beta=0.4).loss

    want = (ref + reward / 0.4).log_softmax(0)
    for loss in (rebel, copg):
        torch.testing.assert_close(minimise(loss, THETA, 1), want, rtol=0, atol=1e-13)
