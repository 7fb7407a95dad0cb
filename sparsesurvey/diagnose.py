"""How masks move while a model trains: flip rate, divergence, and how many weights were ever kept.

With m the mask of a layer of D weights: the flip rate of a step is ``|m_t xor m_(t-1)| / D`` (Hu et al. 2024), the
divergence ``|m_b xor m_a| / D`` between two evaluations a and b (Zhou et al. 2021, sparse architecture divergence), and the
explored share counts the weights that were in some mask (Liu et al. 2021, in-time over-parametrisation).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsesurvey.linear import SparseLinear, StructuredLinear
from sparsesurvey.recipe import Recipe

FLIPS, DIVERGENCE, EXPLORED = "flip rate", "mask divergence", "explored share"


class Masks:
    """Watches the masks of the layers whose recipe moves them; without such layers it does nothing."""

    def __init__(self, layers: dict[str, StructuredLinear]) -> None:
        self.layers = {name: layer for name, layer in layers.items() if isinstance(layer, SparseLinear)
                       and not layer.recipe.fixed_mask and type(layer.recipe).update is not Recipe.update}
        self.reference = {name: layer.mask.clone() for name, layer in self.layers.items()}
        self.ever = {name: layer.mask.clone() for name, layer in self.layers.items()}
        self.size = sum(mask.numel() for mask in self.reference.values())
        self.flips: Tensor | int = 0  # since the last report; a tensor, so that no step waits for the device
        self.steps = 0

    def follow(self, before: dict[str, Tensor]) -> None:
        """After a step, with the masks of ``now()`` from before it."""
        self.steps += 1
        for name, layer in self.layers.items():
            self.flips = self.flips + (layer.mask != before[name]).sum()
            self.ever[name] |= layer.mask

    def now(self) -> dict[str, Tensor]:
        return {name: layer.mask.clone() for name, layer in self.layers.items()}

    def report(self) -> dict[str, float]:
        """Mean flip rate since the last report, divergence since then, explored share; nothing before the first step."""
        if not self.layers or not self.steps:
            return {}
        moved = sum(int((layer.mask != self.reference[name]).sum()) for name, layer in self.layers.items())
        found = {FLIPS: float(self.flips) / self.size / self.steps, DIVERGENCE: moved / self.size,
                 EXPLORED: sum(int(ever.sum()) for ever in self.ever.values()) / self.size}
        self.reference, self.flips, self.steps = self.now(), 0, 0
        return found

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        found = {f"masks.{name}.reference": mask for name, mask in self.reference.items()}
        found |= {f"masks.{name}.ever": mask for name, mask in self.ever.items()}
        return found | {"masks.count": torch.tensor([int(self.flips), self.steps])} if found else {}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """What ``tensors`` said."""
        for name, layer in self.layers.items():
            self.reference[name], self.ever[name] = (tensors[f"masks.{name}.{part}"].to(layer.mask.device)
                                                     for part in ("reference", "ever"))
        if self.layers:
            self.flips, self.steps = tensors["masks.count"].tolist()


def state_of(optimizers: list[torch.optim.Optimizer], layer: StructuredLinear) -> dict[str, Any]:
    """What the optimizer keeps of the layer's trained numbers."""
    return next((optimizer.state[layer.parameter] for optimizer in optimizers if layer.parameter in optimizer.state), {})
