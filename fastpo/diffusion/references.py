"""Reference models: a frozen copy, the model without its adapter, a second adapter, an average.

All are used alike. ``predict`` calls the reference without gradient and in eval mode, ``using``
lends what to call for several predictions, ``refresh`` brings it up to the policy as it is now, and
``state_dict`` is what a checkpoint must hold of it. Policies are given without the wrappers of
distributed training. Errors computed beforehand are in :mod:`fastpo.diffusion.reference_errors`.
"""

from __future__ import annotations

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastpo.diffusion._adapters import (
    active_adapters,
    adapter_scales,
    adapter_tensors,
    adapters_switched,
    base_weights,
    kept_adapters,
    outside_adapters,
    trainability_kept,
)
from fastpo.ops._check import fail


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, and for every submodule its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def _casts_not_kept() -> Iterator[None]:
    """Autocast keeps no casts of weights: without gradient they would serve the policy as well."""
    kept = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(kept)


class Reference(ABC):
    """What every reference can do."""

    @abstractmethod
    def using(self) -> contextlib.AbstractContextManager[Callable[..., Any]]:
        """What to call in place of the policy, without gradient, for the time of a ``with``."""

    @abstractmethod
    def refresh(self) -> None:
        """Bring it up to the policy as it is now.

        Raises:
            RuntimeError: this reference cannot change.
        """

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """What its predictions depend on, for a fingerprint."""

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """What the policy would return for these arguments, by the reference."""
        with self.using() as model:
            return model(*args, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        """What changes by refreshing; empty where nothing does."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Take over what :meth:`state_dict` gave."""


class NoReference(Reference):
    """For losses without a reference: its prediction is None.

    Example:
        >>> NoReference().predict(torch.zeros(1)) is None
        True
    """

    @contextlib.contextmanager
    def using(self) -> Iterator[Callable[..., None]]:
        """Lends a function that returns None."""
        yield lambda *args, **kwargs: None

    def refresh(self) -> None:
        """Nothing to do."""

    def weights(self) -> dict[str, Tensor]:
        """None."""
        return {}


class Fixed(Reference):
    """Another module as it is, from now on without gradient and in eval mode.

    Args:
        model: on the policy's device.

    Example:
        >>> Fixed(torch.nn.Linear(1, 1)).predict(torch.ones(1, requires_grad=True)).requires_grad
        False
    """

    def __init__(self, model: nn.Module):
        self.model = model.requires_grad_(False).eval()

    @contextlib.contextmanager
    def using(self) -> Iterator[nn.Module]:
        """Lends the module."""
        with torch.no_grad(), _casts_not_kept():
            yield self.model

    def refresh(self) -> None:
        """It never changes: an error."""
        raise RuntimeError(
            "fastpo.diffusion.references.Fixed cannot be refreshed: it does not know the policy. "
            "Take FrozenCopy."
        )

    def weights(self) -> dict[str, Tensor]:
        """Those of the module."""
        return self.model.state_dict()


class FrozenCopy(Fixed):
    """A copy of the policy as it is now; refreshing copies again.

    Args:
        policy: the trained module.
        dtype: of the copy's floating weights, the policy's by default. bfloat16 halves the memory,
            and its rounding enters the reference's errors.

    Example:
        >>> policy = torch.nn.Linear(1, 1)
        >>> reference = FrozenCopy(policy)
        >>> with torch.no_grad():
        ...     _ = policy.weight.add_(1)
        >>> torch.equal(reference.model.weight, policy.weight)
        False
        >>> reference.refresh()
        >>> torch.equal(reference.model.weight, policy.weight)
        True
    """

    def __init__(self, policy: nn.Module, dtype: torch.dtype | None = None):
        self.policy = policy
        copied = copy.deepcopy(policy)
        super().__init__(copied if dtype is None else copied.to(dtype=dtype))

    def refresh(self) -> None:
        """Copy the policy's weights and buffers, rounded to the copy's dtype."""
        self.model.load_state_dict(self.policy.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """The copy's weights and buffers."""
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Write them into the copy."""
        self.model.load_state_dict(state)


class _Switched(Reference):
    """The policy itself, switched over for the time that it is lent."""

    def __init__(self, policy: nn.Module):
        self.policy, self._is_lent = policy, False

    @abstractmethod
    def _switch(self) -> contextlib.AbstractContextManager[None]:
        """To the reference, and back to the policy."""

    @contextlib.contextmanager
    def using(self) -> Iterator[nn.Module]:
        """Lends the policy, switched over; as it was afterwards, whatever happens."""
        if self._is_lent:  # Switching back within would leave the policy to those outside.
            yield self.policy
            return
        with (
            torch.no_grad(),
            _casts_not_kept(),
            _evaluating(self.policy),
            trainability_kept(self.policy),
            self._switch(),
        ):
            self._is_lent = True
            try:
                yield self.policy
            finally:
                self._is_lent = False


class AdapterOff(_Switched):
    """The policy itself without the adapter that trains: a reference without memory of its own.

    Args:
        policy: with adapters, a model of PEFT, or one of diffusers or transformers with
            ``disable_adapters`` and ``enable_adapters``.
        adapter: name of the adapter that the reference keeps, such as one of supervised training
            below the learner's; None keeps the active ones that do not train.

    Raises:
        ValueError: the policy has no adapter, or none that can be switched off; it has none of that
            name; or a parameter that the reference keeps trains, so that it would drift.
    """

    def __init__(self, policy: nn.Module, adapter: str | None = None):
        name = "diffusion.references.AdapterOff"
        switches = ("disable_adapter", "disable_adapters")
        if not any(hasattr(policy, switch) for switch in switches):
            remedy = "Give the module itself, not its wrapper for distributed training."
            got = type(policy).__name__
            raise fail(name, "policy", "a model with disable_adapter(s)", got, remedy)
        if not adapter_tensors(policy):
            remedy = "Add one with peft.get_peft_model or add_adapter, or take FrozenCopy."
            raise fail(name, "policy", "a model with an adapter", "none in it", remedy)
        active = active_adapters(policy)
        if adapter is not None and adapter not in active:
            there = ", ".join(active) or "none"
            raise fail(name, "adapter", f"an active adapter ({there})", repr(adapter), "")
        trained = [found for found, trains in active.items() if trains]
        if adapter in trained or (adapter is None and len(trained) > 1):
            remedy = "Freeze the one that the reference keeps and name it, or take FrozenCopy."
            got = f"{', '.join(trained)} in training"
            raise fail(name, "policy", "one adapter that trains, the learner's", got, remedy)
        self.kept = kept_adapters(policy) if adapter is None else [adapter]
        super().__init__(policy)
        self._require_frozen()

    def _require_frozen(self) -> None:
        """That nothing trains which stays in use; again at each use, as flags may change."""
        trained = [name for name, p in outside_adapters(self.policy).items() if p.requires_grad]
        if trained:
            raise fail(
                "diffusion.references.AdapterOff",
                "policy",
                "a model of which only the adapter trains",
                f"{len(trained)} parameters outside it that train, such as {trained[0]}",
                "The reference would drift with them: freeze them, or take FrozenCopy.",
            )

    @contextlib.contextmanager
    def _switch(self) -> Iterator[None]:
        self._require_frozen()
        with adapters_switched(self.policy, self.kept):
            yield

    def refresh(self) -> None:
        """The model below the adapters does not change: an error."""
        raise RuntimeError(
            "fastpo.diffusion.references.AdapterOff cannot be refreshed: the model below the "
            "adapter does not change. Take SecondAdapter, or merge the adapter and add a new one."
        )

    def weights(self) -> dict[str, Tensor]:
        """Those of the policy before it had adapters, and the adapters that are kept."""
        found = adapter_tensors(self.policy)
        kept = {f"{name}.{key}": t for name in self.kept for key, t in found[name].items()}
        return base_weights(self.policy) | kept


class SecondAdapter(_Switched):
    """The policy with another adapter in place of the learner's, of the same form.

    Flow-GRPO's DPO (arXiv:2505.05470, the authors' code) trains one adapter and has the other
    follow it every so many steps. The learner's adapter is active and trainable from here on, the
    reference's is neither; it is as it was loaded until the first :meth:`refresh`.

    Args:
        policy: with both adapters and ``set_adapter``, a model of PEFT, diffusers or transformers.
        reference: name of the reference's adapter.
        learner: name of the trained one.

    Raises:
        ValueError: an adapter is missing, or the two differ in layers, ranks or scales.
    """

    def __init__(self, policy: nn.Module, reference: str = "ref", learner: str = "default"):
        name = "diffusion.references.SecondAdapter"
        if not hasattr(policy, "set_adapter"):
            remedy = "Give the module itself, not its wrapper for distributed training."
            raise fail(name, "policy", "a model with set_adapter", type(policy).__name__, remedy)
        found = adapter_tensors(policy)
        for argument, adapter in (("reference", reference), ("learner", learner)):
            if adapter not in found:
                there = ", ".join(sorted(found)) or "no adapter"
                remedy = "Add it with add_adapter, with the configuration of the other one."
                raise fail(name, argument, f"an adapter {adapter!r}", there, remedy)
        shapes = [{k: t.shape for k, t in found[a].items()} for a in (reference, learner)]
        scales = [adapter_scales(policy, a) for a in (reference, learner)]
        if shapes[0] != shapes[1] or scales[0] != scales[1]:
            got = "other layers, ranks or scales"
            remedy = "Add both with one configuration."
            raise fail(name, "reference", f"an adapter like {learner!r}", got, remedy)
        super().__init__(policy)
        self.reference, self.learner = reference, learner
        policy.set_adapter(learner)

    @contextlib.contextmanager
    def _switch(self) -> Iterator[None]:
        try:
            self.policy.set_adapter(self.reference)
            yield
        finally:
            self.policy.set_adapter(self.learner)

    def refresh(self) -> None:
        """Copy the learner's adapter to the reference's."""
        self.load_state_dict(adapter_tensors(self.policy)[self.learner])

    def weights(self) -> dict[str, Tensor]:
        """Those of the model below, and the reference's adapter."""
        return base_weights(self.policy) | self.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """The reference's adapter."""
        return adapter_tensors(self.policy)[self.reference]

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Write it into the reference's adapter."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])


class Averaged(Reference):
    """A moving average of the policy's weights; refreshing takes one step of it.

    Args:
        policy: the trained module.
        average: ``torch.optim.swa_utils.AveragedModel`` of the policy, which is a copy of it, or
            ``diffusers.training_utils.EMAModel`` of all its parameters or of the trainable ones,
            whose averages are lent to the policy for the time of a call.

    Raises:
        ValueError: the averages are not those of the policy's parameters.

    Example:
        >>> from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
        >>> policy = torch.nn.Linear(1, 1, bias=False)
        >>> average = AveragedModel(policy, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        >>> reference = Averaged(policy, average)
        >>> reference.refresh()
        >>> before = policy.weight.item()
        >>> with torch.no_grad():
        ...     _ = policy.weight.add_(1)
        >>> reference.refresh()
        >>> round(reference.predict(torch.ones(1)).item() - before, 6)
        0.5
    """

    def __init__(self, policy: nn.Module, average: Any):
        self.policy, self.average = policy, average
        if isinstance(average, nn.Module):
            average.requires_grad_(False).eval()
        else:
            self._parameters = self._averaged_parameters()

    def _averaged_parameters(self) -> dict[str, nn.Parameter]:
        """The policy's parameters whose averages there are, in the order of the averages."""
        every = dict(self.policy.named_parameters())
        trainable = {name: p for name, p in every.items() if p.requires_grad}
        shapes = [average.shape for average in self.average.shadow_params]
        for named in (every, trainable):
            if [p.shape for p in named.values()] == shapes:
                return named
        raise fail(
            "diffusion.references.Averaged",
            "average",
            f"averages of {len(every)} parameters, or of the {len(trainable)} trainable ones",
            f"{len(shapes)}, or of other shapes",
            "Make it with EMAModel(policy.parameters()).",
        )

    def _lent(self) -> dict[str, Tensor]:
        """The averages by the names of the policy's parameters, on their device, in their dtype."""
        averages = zip(self._parameters.items(), self.average.shadow_params, strict=True)
        return {name: average.to(p.device, p.dtype) for (name, p), average in averages}

    @contextlib.contextmanager
    def using(self) -> Iterator[Callable[..., Any]]:
        """Lends the averaged copy, or a call of the policy with the averages as its weights."""
        with torch.no_grad(), _casts_not_kept():
            if isinstance(self.average, nn.Module):
                yield self.average.module
            else:
                with _evaluating(self.policy):
                    call = partial(torch.func.functional_call, self.policy, self._lent())
                    yield lambda *args, **kwargs: call(args, kwargs)

    def refresh(self) -> None:
        """One step of the average towards the policy."""
        if isinstance(self.average, nn.Module):
            self.average.update_parameters(self.policy)
        else:
            self.average.step(self._parameters.values())

    def weights(self) -> dict[str, Tensor]:
        """The averages, and what of the policy is not averaged."""
        if isinstance(self.average, nn.Module):
            return self.average.module.state_dict()
        return self.policy.state_dict() | self._lent()

    def state_dict(self) -> dict[str, Any]:
        """That of the average."""
        return self.average.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the average take it over."""
        self.average.load_state_dict(state)
