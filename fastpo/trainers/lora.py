"""The LoRA that a config asks for, each of its targets found in the model."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch

from fastpo.trainers.options import ConfigError, items, near

if TYPE_CHECKING:
    from peft import LoraConfig

    from fastpo.trainers.config import RunConfig
    from fastpo.trainers.diffusion_config import DiffusionDPOConfig


def lora_targets(model: torch.nn.Module, targets: str | list[str]) -> str | list[str]:
    """Targets as PEFT takes them: names of modules or ends of them, or one regex of whole names.

    PEFT says nothing of a name that matches nothing as long as another one does.

    Args:
        model: that the LoRA is for.
        targets: ``all-linear``, names with commas or in a list, or a regex.

    Raises:
        ConfigError: a name or the regex matches no module.

    Example:
        >>> model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(2, 2)})
        >>> lora_targets(model, "q_proj, ")
        ['q_proj']
        >>> lora_targets(model, ".*_proj")
        '.*_proj'
    """
    if targets == "all-linear":
        return targets
    modules = [name for name, _ in model.named_modules() if name]
    ends = {name.rpartition(".")[2] for name in modules}
    if isinstance(targets, str) and not re.fullmatch(r"[\w.,\s-]*", targets):
        try:
            found = any(re.fullmatch(targets, name) for name in modules)
        except re.error as error:
            raise ConfigError(f"lora_targets: {targets!r} is no regex ({error}).") from error
        if not found:
            raise ConfigError(f"lora_targets: the regex {targets!r} matches no module's name.")
        return targets
    names = items(targets)
    if not names:
        raise ConfigError("lora_targets: there is none; give names of modules, or all-linear.")
    for name in names:
        if not any(module == name or module.endswith(f".{name}") for module in modules):
            raise ConfigError(f"lora_targets: no module is named {name!r}; {near(name, ends)}")
    return names


def lora_config(
    model: torch.nn.Module, config: RunConfig | DiffusionDPOConfig, **more: Any
) -> LoraConfig:
    """The LoRA of a run.

    Raises:
        ConfigError: a target matches no module.
    """
    from peft import LoraConfig

    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=lora_targets(model, config.lora_targets),
        **more,
    )
