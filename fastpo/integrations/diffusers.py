"""Denoisers of diffusers: how each family is called, what its scheduler fits it to, its VAE.

    adapter = Adapter(unet)
    schedule = Schedule(pipeline.scheduler)
    noisy, timesteps, target = schedule.corrupt(clean, noise, schedule.indices(uniforms))
    errors = fastpo.diffusion.noise_errors(adapter(unet, noisy, timesteps, condition), target)

Conditions are named as in the model's own forward and hold one row per sample.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpo.diffusion import Target, targets
from fastpo.integrations import IntegrationError

DENSITIES = ("uniform", "logit_normal")


def _first(call: Callable, *arguments: Any, **named: Any) -> Tensor:
    return call(*arguments, **named, return_dict=False)[0]


def _plain(call, noisy, timesteps, condition):
    return _first(call, noisy, timesteps, **condition)


def _conditional_unet(call, noisy, timesteps, condition):
    added = {name: condition[name] for name in ("text_embeds", "time_ids") if name in condition}
    own = {name: value for name, value in condition.items() if name not in added}
    return _first(call, noisy, timesteps, **own, added_cond_kwargs=added or None)


def _sd3(call, noisy, timesteps, condition):
    return _first(call, noisy, timestep=timesteps, **condition)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Latents [N, C, height, width] of Flux's tokens [N, L, 4 C], one per two by two patch."""
    return F.pixel_shuffle(tokens.mT.unflatten(2, (height // 2, width // 2)), 2)


def _flux(call, noisy, timesteps, condition):
    height, width = noisy.shape[2:]
    places = [torch.arange(side // 2, device=noisy.device) for side in (height, width)]
    ids = F.pad(torch.cartesian_prod(*places), (1, 0)).to(noisy.dtype)
    text = condition["encoder_hidden_states"]
    tokens = _first(
        call,
        F.pixel_unshuffle(noisy, 2).flatten(2).mT,
        timestep=timesteps / 1000,
        img_ids=ids,
        txt_ids=ids.new_zeros(text.shape[1], 3),
        **condition,
    )
    return unpack(tokens, height, width)


class _Family(NamedTuple):
    call: Callable[..., Tensor]
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


_TEXT = ("encoder_hidden_states", "pooled_projections")
# Beside these, class_labels, guidance and SDXL's conditions are of the models that embed them.
_FAMILIES = {
    "UNet2DModel": _Family(_plain),
    "UNet2DConditionModel": _Family(
        _conditional_unet, ("encoder_hidden_states",), ("encoder_attention_mask",)
    ),
    "DiTTransformer2DModel": _Family(_plain, ("class_labels",)),
    "SD3Transformer2DModel": _Family(_sd3, _TEXT),
    "FluxTransformer2DModel": _Family(_flux, _TEXT),
}


# What models of a family are made for beside a prediction from their conditions.
_ELSE = {
    "addition_embed_type": ("text_time", "text"),
    "encoder_hid_dim_type": ("text_proj",),
    "time_cond_proj_dim": (),
}


class Adapter:
    """Calls models of one family: UNet2D, UNet2DCondition (SD, SDXL), DiT, SD3 and Flux.

    Args:
        model: the denoiser, of which the class decides; a ``PeftModel`` around one will do.

    Attributes:
        channels: of the samples it denoises.
        patch: what the sides of the samples are multiples of.

    Raises:
        IntegrationError: there is no adapter for its class, or it takes or gives more than a
            sample and its conditions: masks, images, an embedding of guidance.
    """

    def __init__(self, model: torch.nn.Module):
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        self.name = type(model).__name__
        if self.name not in _FAMILIES:
            expected = ", ".join(_FAMILIES)
            raise IntegrationError(f"denoiser: expected one of {expected}, got {self.name}.")
        self.family = _FAMILIES[self.name]
        self.config = model.config
        for option, known in _ELSE.items():
            kind = self.config.get(option)
            if kind is not None and kind not in known:
                expected = f"expected {' or '.join((*known, 'None'))}, got {kind!r}"
                raise IntegrationError(f"denoiser: {self.name}: {option}: {expected}.")
        self.has_classes = getattr(model, "class_embedding", None) is not None
        taken, given = self.config.in_channels, self.config.get("out_channels")
        given = taken if given is None else given
        if given not in (taken, 2 * taken):  # twice: a learned variance in the second half
            remedy = (
                "Inpainting and image-conditioned models take masks or images, which pairs lack."
            )
            got = f"{taken} channels in and {given} out"
            raise IntegrationError(f"denoiser: {self.name}: expected as many, got {got}. {remedy}")
        is_flux = self.name == "FluxTransformer2DModel"  # its patches come packed in channels
        self.channels = taken // 4 if is_flux else taken
        self.patch = 2 if is_flux else self.config.get("patch_size") or 1

    def check(self, names: Mapping[str, Any] | set[str]) -> None:
        """Whether these are conditions that the model takes, and all it needs.

        Raises:
            IntegrationError: one is missing, or unknown.
        """
        required = list(self.family.required)
        if self.has_classes:
            required.append("class_labels")
        if self.config.get("guidance_embeds"):
            required.append("guidance")
        if self.config.get("addition_embed_type") == "text_time":
            required += ["text_embeds", "time_ids"]
        known = {*required, *self.family.optional}
        wrong = [f"{name} is missing" for name in required if name not in names]
        wrong += [f"{name} is unknown" for name in sorted(names) if name not in known]
        if wrong:
            takes = ", ".join(sorted(known)) or "none"
            raise IntegrationError(f"conditions of {self.name}: {wrong[0]}; it takes {takes}.")

    def check_sample(self, shape: Sequence[int]) -> None:
        """Whether the model denoises samples of this shape [C, H, W].

        Raises:
            IntegrationError: they have other channels, or patches do not cover them.
        """
        if shape[0] != self.channels:
            expected = f"samples of {self.channels} channels"
            raise IntegrationError(f"{self.name}: expected {expected}, got {list(shape)}.")
        if shape[1] % self.patch or shape[2] % self.patch:
            expected = f"sides that are multiples of {self.patch}"
            raise IntegrationError(f"{self.name}: expected {expected}, got {list(shape)}.")

    def __call__(
        self,
        call: Callable[..., Any],
        noisy: Tensor,
        timesteps: Tensor,
        condition: Mapping[str, Tensor],
    ) -> Tensor:
        """The prediction [N, C, H, W].

        Args:
            call: the model as it is to be called: wrapped, or another copy of it.
            noisy: [N, C, H, W]; images, or latents scaled as the denoiser sees them.
            timesteps: [N], those of :meth:`Schedule.corrupt`.
            condition: tensors [N, ...] by name, those of :meth:`check`.
        """
        return self.family.call(call, noisy, timesteps, condition)[:, : self.channels]


class _Table(NamedTuple):
    """Of each timestep of training, from low to high noise; float64 [T] each.

    The model sees ``signal * clean + noise * noise`` at ``timesteps``, and is fitted to
    ``fit_noise * noise + fit_clean * clean``.
    """

    timesteps: Tensor
    signal: Tensor
    noise: Tensor
    fit_noise: Tensor
    fit_clean: Tensor


# Of how a scheduler steps when it samples: training has all of its steps, and these do not tell.
_SAMPLING = (
    "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas",
    "use_dynamic_shifting",
)  # fmt: skip


def _with_plain_steps(scheduler: Any) -> Any:
    """Another scheduler of its class and options, but for the choice of its steps."""
    plain = {name: False for name in _SAMPLING if scheduler.config.get(name)}
    return type(scheduler).from_config(scheduler.config, **plain)


def _fitted(kind: str, signal: Tensor, noise: Tensor, velocity: str) -> tuple[Tensor, Tensor]:
    """``fit_noise`` and ``fit_clean`` of a prediction type."""
    zero, one = torch.zeros_like(signal), torch.ones_like(signal)
    known = {"epsilon": (one, zero), "sample": (zero, one)}
    known[velocity] = (signal, -noise) if velocity == "v_prediction" else (one, -one)
    if kind not in known:
        raise IntegrationError(f"prediction_type: expected {', '.join(known)}, got {kind!r}.")
    return known[kind]


def _variance_preserving(scheduler: Any) -> _Table:
    """Of ``alphas_cumprod``: all that keep the variance, in whatever scale they add noise."""
    abar, kind = scheduler.alphas_cumprod.double().cpu(), scheduler.config.prediction_type
    signal, noise = abar.sqrt(), (1 - abar).sqrt()
    timesteps = torch.arange(len(abar))
    if scheduler.config.get("timestep_type") == "continuous" and kind == "v_prediction":
        timesteps = scheduler.timesteps.flip(0).cpu()  # log sigma / 4, as EDM tells it
    return _Table(timesteps, signal, noise, *_fitted(kind, signal, noise, "v_prediction"))


def _flow(scheduler: Any) -> _Table:
    """Of sigmas that lead from clean to noise in a straight line."""
    kind = scheduler.config.get("prediction_type", "flow_prediction")
    if scheduler.config.get("use_flow_sigmas"):  # They are there once a solver has its timesteps.
        scheduler = _with_plain_steps(scheduler)
        scheduler.set_timesteps(scheduler.config.num_train_timesteps)
    if scheduler.config.get("invert_sigmas"):
        raise IntegrationError("invert_sigmas: its model is told the noise the other way round.")
    timesteps = scheduler.timesteps.flip(0).cpu()
    noise = scheduler.sigmas.double().cpu()[: len(timesteps)].flip(0)
    signal = 1 - noise
    return _Table(timesteps, signal, noise, *_fitted(kind, signal, noise, "flow_prediction"))


def _edm(scheduler: Any) -> _Table:
    """Of EDM's preconditioning (arXiv:2206.00364, table 1): its scales of inputs and outputs."""
    timesteps = scheduler.timesteps.flip(0).cpu()
    sigmas = scheduler.sigmas.double().cpu()[: len(timesteps)].flip(0)
    zero, one = torch.zeros_like(sigmas), torch.ones_like(sigmas)
    signal = scheduler.precondition_inputs(one, sigmas)
    skip = scheduler.precondition_outputs(one, zero, sigmas)
    out = scheduler.precondition_outputs(zero, one, sigmas)
    return _Table(timesteps, signal, signal * sigmas, -skip * sigmas / out, (1 - skip) / out)


def _table(scheduler: Any) -> _Table:
    """What a scheduler of this kind trains by.

    Raises:
        IntegrationError: it is of another kind.
    """
    config = scheduler.config
    adds = getattr(scheduler, "add_noise", None) or getattr(scheduler, "scale_noise", None)
    if adds is None:
        raise IntegrationError("it adds no noise, with neither add_noise nor scale_noise.")
    if len(inspect.signature(adds).parameters) != 3:
        expected = "clean samples, noise and timesteps alone"
        raise IntegrationError(f"{adds.__name__}: expected one that takes {expected}.")
    step = getattr(scheduler, "step", None)
    if step is not None and "r_timestep" in inspect.signature(step).parameters:
        raise IntegrationError("its model predicts the way between two times.")
    if config.get("use_flow_sigmas"):
        return _flow(scheduler)
    if hasattr(scheduler, "precondition_outputs"):
        return _edm(scheduler)
    if hasattr(scheduler, "alphas_cumprod") and "prediction_type" in config:
        return _variance_preserving(scheduler)
    if hasattr(scheduler, "scale_noise") and isinstance(getattr(scheduler, "sigmas", None), Tensor):
        return _flow(scheduler)
    expected = "alphas_cumprod with a prediction_type, sigmas of a flow, or EDM's preconditioning"
    raise IntegrationError(f"it has none of {expected}.")


def _check_table(scheduler: Any, table: _Table) -> None:
    """The scheduler's own samples, as its model sees them, have the noise of the table.

    Raises:
        IntegrationError: they differ by more than what lies between neighbouring timesteps.
    """
    sampler = _with_plain_steps(scheduler)
    sampler.set_timesteps(8)
    known = table.timesteps.double()
    clean, noise = torch.eye(2).reshape(2, 1, 1, 1, 2)
    timesteps = sampler.timesteps.unique()
    # Steps of second order visit others between them, where some solvers add noise of another.
    trained = timesteps[torch.isin(timesteps.double(), known)]
    for timestep in trained if len(trained) else timesteps:
        one = copy.deepcopy(sampler)  # which step it is at is a part of its state
        if hasattr(one, "add_noise"):
            sample = one.add_noise(clean, noise, timestep[None])
        else:
            sample = one.scale_noise(clean, timestep[None], noise)
        if hasattr(one, "scale_model_input"):
            sample = one.scale_model_input(sample, timestep)
        # Several may be equal: flows cut theirs to integers.
        first, last = (torch.searchsorted(known, timestep.double(), right=r) for r in (False, True))
        near = slice(max(first.item() - 1, 0), last.item() + 1)
        for name, got, own in zip(
            ("clean", "noise"), sample.flatten().tolist(), (table.signal, table.noise), strict=True
        ):
            rounding = 1e-4  # of float32, where 1 - abar is small
            if not own[near].min() - rounding <= got <= own[near].max() + rounding:
                expected = f"{own[near].mean().item():.4f} of the {name}, as it was trained"
                at = f"timestep {timestep.item():g}"
                raise IntegrationError(f"{at}: expected {expected}, got {got:.4f} by add_noise.")


class Schedule:
    """The training side of a scheduler: timesteps, noisy samples, and the target.

    All comes from the scheduler's own class and options: its ``alphas_cumprod``, its sigmas of a
    flow, or EDM's preconditioning; the target from its ``prediction_type``, and noise - clean for a
    flow. It is compared with what the scheduler's ``add_noise`` and ``scale_model_input`` give at
    timesteps of sampling. The scheduler itself is left as it is: sampling may set its timesteps
    meanwhile.

    Args:
        scheduler: of a pipeline.
        density: of the timesteps: ``uniform``, or ``logit_normal`` (arXiv:2403.03206 eq. 19), both
            over the training timesteps, from low to high noise.
        logit_mean: of ``logit_normal``.
        logit_std: of ``logit_normal``.

    Attributes:
        scheduler: another one of its class and options.
        steps: number of timesteps.

    Raises:
        IntegrationError: the scheduler is of another kind, or adds other noise than it was
            trained with; the message has the reason.

    Example:
        >>> from diffusers import DDPMScheduler
        >>> schedule = Schedule(DDPMScheduler())
        >>> noisy, timesteps, target = schedule.corrupt(
        ...     torch.ones(1, 3, 8, 8), torch.zeros(1, 3, 8, 8), torch.tensor([999]))
        >>> timesteps.item(), round(noisy[0, 0, 0, 0].item(), 5)
        (999, 0.00635)
    """

    def __init__(
        self,
        scheduler: Any,
        density: str = "uniform",
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
    ):
        if density not in DENSITIES:
            expected = " or ".join(DENSITIES)
            raise IntegrationError(f"timestep density: expected {expected}, got {density!r}.")
        self.density, self.logit_mean, self.logit_std = density, logit_mean, logit_std
        name = type(scheduler).__name__
        if not hasattr(scheduler, "from_config"):
            raise IntegrationError(f"scheduler: expected one of diffusers, got {name}.")
        try:
            # Anew from its options: set_timesteps changes the sigmas of a scheduler in use.
            self.scheduler = type(scheduler).from_config(scheduler.config)
            self.table = _table(self.scheduler)
            _check_table(self.scheduler, self.table)
        except Exception as error:  # of its own code, which we cannot know
            reason = str(error) if isinstance(error, IntegrationError) else repr(error)
            raise IntegrationError(f"scheduler {name}: cannot train by it: {reason}") from error
        self.steps = len(self.table.timesteps)
        self.is_of_noise = not self.table.fit_clean.any()
        self.is_of_clean = not self.table.fit_noise.any()

    def indices(self, uniforms: Tensor) -> Tensor:
        """Indices of timesteps, int64, from uniform numbers in [0, 1) by the density's quantile."""
        if self.density == "logit_normal":
            normals = torch.special.ndtri(uniforms)
            uniforms = torch.sigmoid(self.logit_mean + self.logit_std * normals)
        return (uniforms * self.steps).long().clamp(max=self.steps - 1)

    def corrupt(
        self, clean: Tensor, noise: Tensor, indices: Tensor
    ) -> tuple[Tensor, Tensor, Target]:
        """Noisy samples as the model sees them, the timesteps [N] to tell it, and the target.

        Args:
            clean: [N, ...].
            noise: [N, ...].
            indices: [N] int64, from the lowest noise on.
        """
        if self.table.signal.device != clean.device:  # moved once
            self.table = _Table(*(column.to(clean.device) for column in self.table))
        timesteps, *numbers = (column[indices] for column in self.table)
        shape = -1, *(1,) * (clean.ndim - 1)
        signal, scale, fit_noise, fit_clean = numbers
        noisy = signal.reshape(shape).to(clean.dtype) * clean
        noisy += scale.reshape(shape).to(clean.dtype) * noise
        if self.is_of_noise:
            return noisy, timesteps, targets.epsilon(noise)
        if self.is_of_clean:
            return noisy, timesteps, targets.sample(clean)
        return noisy, timesteps, Target(noise, fit_noise, clean, fit_clean)

    def split(self, prediction: Tensor, noisy: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """The clean samples and the noise that a prediction stands for, undoing :meth:`corrupt`.

        Args:
            prediction: [N, ...], the model's.
            noisy: [N, ...], what it saw.
            index: of the timestep.
        """
        _, signal, scale, fit_noise, fit_clean = (c[index].item() for c in self.table)
        size = signal * fit_noise - scale * fit_clean
        clean = (fit_noise * noisy - scale * prediction) / size
        return clean, (signal * prediction - fit_clean * noisy) / size


def encode_latents(vae: torch.nn.Module, pixels: Tensor) -> Tensor:
    """Latents [N, C, H, W] of a VAE, those of the mean where it gives a posterior."""
    out = vae.encode(pixels)
    if hasattr(out, "latent_dist"):
        return out.latent_dist.mode()
    return out.latents if hasattr(out, "latents") else out.latent


def latent_scales(vae: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """Shift and scale [C, 1, 1] or [1, 1, 1] with which a denoiser sees (latents - shift) * scale.

    ``latents_mean`` and ``latents_std`` of each channel, ``shift_factor`` and ``scaling_factor`` of
    all, those that the VAE has, as the pipelines of diffusers take them.
    """
    config = vae.config

    def numbers(name: str, default: float) -> Tensor:
        value = config.get(name)
        return torch.tensor(default if value is None else value).reshape(-1, 1, 1)

    shift = numbers("latents_mean", 0.0) + numbers("shift_factor", 0.0)
    return shift, numbers("scaling_factor", 1.0) / numbers("latents_std", 1.0)
