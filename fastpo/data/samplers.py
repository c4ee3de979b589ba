"""Which prompts come next, from how often the policy has solved them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpo.data._checks import at_least, fail, real, same_shape, share


def _prompts(function: str, prompts: Tensor, count: int) -> Tensor:
    """int64 [P] on the CPU, each once and in [0, count)."""
    prompts_P = prompts.cpu()
    if prompts_P.ndim != 1 or prompts_P.is_floating_point() or prompts_P.dtype == torch.bool:
        got = f"{prompts.dtype} {list(prompts.shape)}"
        raise fail(function, "prompts", "integers [P]", got, "Give the indices of the prompts.")
    prompts_P = prompts_P.long()
    if len(prompts_P) and not 0 <= int(prompts_P.min()) <= int(prompts_P.max()) < count:
        got = f"{int(prompts_P.min())} to {int(prompts_P.max())}"
        remedy = "The sampler was made for fewer prompts."
        raise fail(function, "prompts", f"indices in [0, {count})", got, remedy)
    if len(prompts_P.unique()) < len(prompts_P):
        remedy = "Join the rollouts of a prompt that was drawn twice."
        raise fail(function, "prompts", "each prompt once", "some of them twice", remedy)
    return prompts_P


def _load(function: str, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Copy tensors of the state over those of the sampler, of the same shapes."""
    for name, tensor in tensors.items():
        expected, got = list(tensor.shape), list(state[name].shape)
        if expected != got:
            remedy = "Make the sampler with as many prompts as the one that was saved."
            raise fail(function, f"state[{name!r}]", str(expected), str(got), remedy)
        tensor.copy_(state[name])


def variance_weights(
    success_rates: Tensor, diversity: Tensor | None = None, diversity_weight: float = 1.0
) -> Tensor:
    """Weights of prompts by the variance of their reward: variance-aware sampling.

    w = (s - min s) / (max s - min s + 1e-8), s = p (1 - p) + diversity_weight * diversity over the
    data set  (arXiv:2509.21268, the authors' code).

    Args:
        success_rates: [N] p, each the share of right answers among a prompt's rollouts (eight in
            the paper); NaN for a prompt without rollouts.
        diversity: [N], higher for responses less alike: for a similarity, such as self-BLEU, one
            minus it; a weighted sum of several.
        diversity_weight: weight of ``diversity``, >= 0.

    Returns:
        [N] in [0, 1); 0 at NaN. All are 0 where the prompts do not differ.

    Raises:
        ValueError: shapes do not fit, or a rate is not in [0, 1].

    Example:
        >>> variance_weights(torch.tensor([0.0, 0.25, 0.5, 1.0]))
        tensor([0.0000, 0.7500, 1.0000, 0.0000])
    """
    rates_N = real("variance_weights", "success_rates", success_rates, "N")
    if bool(((rates_N < 0) | (rates_N > 1)).any()):
        remedy = "Divide the number of right answers by that of the rollouts."
        got = f"{float(rates_N.nan_to_num(0).min())} to {float(rates_N.nan_to_num(0).max())}"
        raise fail("variance_weights", "success_rates", "numbers in [0, 1]", got, remedy)
    at_least("variance_weights", "diversity_weight", diversity_weight, 0)
    scores_N = rates_N * (1 - rates_N)
    if diversity is not None:
        same_shape("variance_weights", success_rates=success_rates, diversity=diversity)
        scores_N = scores_N + diversity_weight * real(
            "variance_weights", "diversity", diversity, "N"
        )
    if not len(scores_N):
        return scores_N
    low = scores_N.nan_to_num(nan=torch.inf).min()
    high = scores_N.nan_to_num(nan=-torch.inf).max()
    return ((scores_N - low) / (high - low + 1e-8)).nan_to_num(nan=0.0)


class VarianceAwareSampler:
    """Batches of prompts, one part drawn by the variance of their reward, the rest in random order.

    A batch is int(weighted_share * batch_size) draws with replacement in proportion to the weights
    of :func:`variance_weights`, then the next prompts of a random permutation of all, which is
    drawn anew at its end  (arXiv:2509.21268, the authors' code). Where all weights are 0, as before
    the first rollouts or where prompts do not differ, the draws are uniform. A prompt without
    rollouts has weight 0: the permutation brings it. The first weights are taken as they are; with
    ``momentum`` the later ones are mixed with the old.

    Args:
        num_prompts: N.
        batch_size: prompts of a batch, weighted ones first.
        generator: source of the draws, on the CPU; its state is saved and restored with the rest.
        weighted_share: share of weighted draws in a batch.
        momentum: share of the old weights that a refresh keeps, in [0, 1).
        refresh_every: batches between two refreshes of the weights, >= 1.
        diversity_weight: as in :func:`variance_weights`.

    Raises:
        ValueError: a size or a share is out of range.

    Example:
        >>> sampler = VarianceAwareSampler(4, batch_size=4, generator=torch.Generator())
        >>> sampler.record(torch.tensor([0, 1, 2, 3]), torch.tensor([0.0, 0.5, 1.0, 1.0]))
        >>> sampler.draw()[:2]
        tensor([1, 1])
    """

    def __init__(
        self,
        num_prompts: int,
        batch_size: int,
        generator: torch.Generator,
        *,
        weighted_share: float = 0.5,
        momentum: float = 0.0,
        refresh_every: int = 4,
        diversity_weight: float = 1.0,
    ) -> None:
        name = "VarianceAwareSampler"
        at_least(name, "num_prompts", num_prompts, 1)
        at_least(name, "batch_size", batch_size, 1)
        at_least(name, "refresh_every", refresh_every, 1)
        at_least(name, "diversity_weight", diversity_weight, 0)
        share(name, "weighted_share", weighted_share)
        if not 0 <= momentum < 1:
            raise fail(name, "momentum", "a number in [0, 1)", repr(momentum), "0 keeps nothing.")
        self.batch_size, self.generator = batch_size, generator
        self.weighted_share, self.momentum = weighted_share, momentum
        self.refresh_every, self.diversity_weight = refresh_every, diversity_weight
        self.success_rates = torch.full((num_prompts,), torch.nan, dtype=torch.float64)
        self.diversity = torch.zeros(num_prompts, dtype=torch.float64)
        self.weights = torch.zeros(num_prompts, dtype=torch.float64)
        self.permutation = torch.randperm(num_prompts, generator=generator)
        self.position, self.draws = 0, 0

    def record(
        self, prompts: Tensor, success_rates: Tensor, diversity: Tensor | None = None
    ) -> None:
        """Take in what rollouts have shown; it counts from the next refresh on.

        Args:
            prompts: int [P] indices of prompts, each once.
            success_rates: [P] shares of right answers.
            diversity: [P], as in :func:`variance_weights`; 0 if not given.

        Raises:
            ValueError: shapes do not fit, or an index or a rate is out of range.
        """
        prompts_P = _prompts("VarianceAwareSampler.record", prompts, len(self.weights))
        given = {"success_rates": success_rates}
        if diversity is not None:
            given["diversity"] = diversity
        same_shape("VarianceAwareSampler.record", prompts=prompts, **given)
        variance_weights(**given)  # checks them
        self.success_rates[prompts_P] = success_rates.detach().cpu().double()
        self.diversity[prompts_P] = 0.0 if diversity is None else diversity.detach().cpu().double()

    def draw(self) -> Tensor:
        """int64 [batch_size], the prompts of the next batch; some may come twice."""
        if self.draws % self.refresh_every == 0:
            new_N = variance_weights(self.success_rates, self.diversity, self.diversity_weight)
            kept = self.momentum if self.weights.any() else 0.0  # at first there is nothing to keep
            self.weights = kept * self.weights + (1 - kept) * new_N
        self.draws += 1
        weighted = int(self.weighted_share * self.batch_size)
        parts = []
        if weighted:
            weights_N = self.weights if self.weights.any() else torch.ones_like(self.weights)
            parts.append(weights_N.multinomial(weighted, True, generator=self.generator))
        missing = self.batch_size - weighted
        while missing:
            if self.position == len(self.permutation):
                self.permutation = torch.randperm(self.position, generator=self.generator)
                self.position = 0
            part = self.permutation[self.position :][:missing]
            self.position += len(part)
            missing -= len(part)
            parts.append(part)
        return torch.cat(parts)

    def _tensors(self) -> dict[str, Tensor]:
        names = ("success_rates", "diversity", "weights", "permutation")
        return {name: getattr(self, name) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """All that the next batches depend on, the state of the generator with it."""
        state = {name: tensor.clone() for name, tensor in self._tensors().items()}
        counters = {"position": self.position, "draws": self.draws}
        return state | counters | {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            ValueError: it is of a sampler with another number of prompts.
        """
        _load("VarianceAwareSampler", self._tensors(), state)
        self.position, self.draws = state["position"], state["draws"]
        self.generator.set_state(state["generator"])


class BetaSampler:
    """Thompson sampling of prompts that are hard but not hopeless: VADE.

    Each prompt has a Beta(prior + successes, prior + failures) belief about its success rate. A
    batch is the prompts with the largest p (1 - p)^2, p drawn from their beliefs. Counts fade with
    every record, at one rate for the prompts just rolled out and at another for the rest, since the
    policy moves on  (arXiv:2511.18902).

    Args:
        num_prompts: N.
        generator: source of the draws, on the CPU; its state is saved and restored with the rest.
        decay_recorded: factor in [0, 1] of the old counts of prompts with new rollouts.
        decay_others: factor in [0, 1] of the counts of the others.
        prior: of both sides of a belief, > 0; 1 is uniform.

    Raises:
        ValueError: an option is out of range.

    Experimental: score and rule of decay are second-hand; what the two rates apply to is our
    reading, and their values are not known.

    Example:
        >>> decay = {"decay_recorded": 0.9, "decay_others": 0.99}
        >>> sampler = BetaSampler(3, generator=torch.Generator(), **decay)
        >>> rollouts = torch.tensor([900.0, 300.0, 0.0])
        >>> sampler.record(torch.tensor([0, 1, 2]), rollouts, 900 - rollouts)
        >>> sampler.draw(1)
        tensor([1])
    """

    def __init__(
        self,
        num_prompts: int,
        generator: torch.Generator,
        *,
        decay_recorded: float,
        decay_others: float,
        prior: float = 1.0,
    ) -> None:
        at_least("BetaSampler", "num_prompts", num_prompts, 1)
        share("BetaSampler", "decay_recorded", decay_recorded)
        share("BetaSampler", "decay_others", decay_others)
        if not prior > 0:
            raise fail("BetaSampler", "prior", "a number > 0", repr(prior), "1 is uniform.")
        self.generator, self.prior = generator, prior
        self.decay_recorded, self.decay_others = decay_recorded, decay_others
        self.successes = torch.zeros(num_prompts, dtype=torch.float64)
        self.failures = torch.zeros(num_prompts, dtype=torch.float64)

    def record(self, prompts: Tensor, successes: Tensor, failures: Tensor) -> None:
        """Let all counts fade, then add new rollouts.

        Args:
            prompts: int [P] indices of prompts, each once.
            successes: [P] right answers.
            failures: [P] wrong answers.

        Raises:
            ValueError: shapes do not fit, an index is out of range, or a count is negative.
        """
        name = "BetaSampler.record"
        prompts_P = _prompts(name, prompts, len(self.successes))
        same_shape(name, prompts=prompts, successes=successes, failures=failures)
        rates_N = torch.full_like(self.successes, self.decay_others)
        rates_N[prompts_P] = self.decay_recorded
        new = {"successes": successes, "failures": failures}
        new = {key: real(name, key, value, "P").cpu().double() for key, value in new.items()}
        for key, counts_P in new.items():
            if not bool((counts_P >= 0).all()):
                got, remedy = f"{float(counts_P.min())}", "Count the rollouts of each kind."
                raise fail(name, key, "counts >= 0", got, remedy)
        for key, counts_P in new.items():
            getattr(self, key).mul_(rates_N)[prompts_P] += counts_P

    def draw(self, batch_size: int) -> Tensor:
        """int64 [batch_size], the prompts of the next batch, the largest score first.

        Raises:
            ValueError: there are not as many prompts.
        """
        if not 0 <= batch_size <= len(self.successes):
            expected = f"a number in [0, {len(self.successes)}]"
            remedy = "A batch has each prompt once."
            raise fail("BetaSampler.draw", "batch_size", expected, repr(batch_size), remedy)
        # Two gammas make a beta; torch.distributions takes no generator.
        parts_2N = torch.stack((self.successes, self.failures)) + self.prior
        parts_2N = torch._standard_gamma(parts_2N, generator=self.generator)
        rates_N = parts_2N[0] / parts_2N.sum(0)
        return (rates_N * (1 - rates_N) ** 2).topk(batch_size).indices

    def state_dict(self) -> dict[str, Any]:
        """All that the next batches depend on, the state of the generator with it."""
        state = {"successes": self.successes.clone(), "failures": self.failures.clone()}
        return state | {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            ValueError: it is of a sampler with another number of prompts.
        """
        _load("BetaSampler", {"successes": self.successes, "failures": self.failures}, state)
        self.generator.set_state(state["generator"])
