"""What moves the weights: AdamW or Muon of torch, in groups with a learning rate of their own, and the schedule."""

from __future__ import annotations

from collections.abc import Iterable
from math import cos, pi
from typing import Any

import torch
from torch import nn

from sparsesurvey.linear import SparseLinear, sparse_layers
from sparsesurvey.recipe import Recipe


def learning_rate(config: Any, step: int) -> float:
    """Factor on the learning rate in step 0, 1, ..., by the fields of ``train.TrainConfig``."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    if config.schedule == "cosine":
        done = (step - config.warmup) / max(1, config.steps - config.warmup)
        return config.final_lr + (1 - config.final_lr) * (1 + cos(pi * done)) / 2
    cooling = config.cooldown * config.steps
    left = min(1.0, (config.steps - step) / cooling) if cooling else 1.0
    return config.final_lr + (1 - config.final_lr) * left


class AdamW(torch.optim.AdamW):
    """torch's, but a group may stop to follow the second moment: then its "frozen" is true, and it stays as it is.

    That is the second phase of STEP (Lu et al. 2023): ``w -= lr * (m / (1 - b1^t)) / (sqrt(v / c) + eps)``, with the
    moment v and its bias correction c as they were when the group froze, after the decoupled weight decay.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group.get("frozen")]
            if self.param_groups:
                super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group.get("frozen"):
                self._frozen_step(group)

    def _frozen_step(self, group: dict[str, Any]) -> None:
        first, second = group["betas"]
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            state["step"] += 1
            count = state["step"].item()
            if "frozen_at" not in state:
                state["frozen_at"] = state["step"] - 1
            state["exp_avg"].lerp_(p.grad, 1 - first)
            size = (state["exp_avg_sq"] / (1 - second ** max(1.0, state["frozen_at"].item()))).sqrt_().add_(group["eps"])
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.addcdiv_(state["exp_avg"], size, value=-group["lr"] / (1 - first**count))


def optimizers(model: nn.Module, config: Any) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon for the hidden matrices and AdamW for the rest, by the fields of ``train.TrainConfig``.

    A group's "base" is its highest learning rate: the recipe's multiplier is in it. Weight decay is on matrices. What a
    recipe adds to a layer (adapters, the logits of a permutation) is AdamW's and has none.
    """
    layers = sparse_layers(model).values()
    weights = {id(layer.parameter): layer for layer in layers}
    added = {id(p) for layer in layers for p in layer.parameters(recurse=False)} - weights.keys()
    added -= {id(layer.bias) for layer in layers}
    outer = {id(part.weight) for part in (model.get_input_embeddings(), model.get_output_embeddings())}
    groups: dict[tuple, list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        layer = weights.get(id(p))
        packed = layer is not None and layer.kernel != "masked"
        matrix = (p.dim() >= 2 or packed) and id(p) not in added
        kind = "muon" if config.optimizer == "muon" and matrix and id(p) not in outer else "adamw"
        if kind == "muon" and packed:
            raise ValueError(f"optimizer muon needs matrices, but {name} is packed: take adamw, or kernel='masked'")
        base = config.muon_lr if kind == "muon" else config.lr
        base *= layer.recipe.lr_multiplier(layer.structure) if layer is not None else 1.0
        alone = id(p) if isinstance(layer, SparseLinear) and _may_freeze(layer) else 0
        groups.setdefault((kind, base, config.weight_decay if matrix else 0.0, alone), []).append(p)
    made = []
    for kind in ("adamw", "muon"):
        some = [{"params": params, "lr": base, "base": base, "weight_decay": decay}
                for (which, base, decay, _), params in groups.items() if which == kind]
        if some and kind == "adamw":
            made.append(AdamW(some, betas=config.betas, fused=True))
        elif some:
            made.append(torch.optim.Muon(some, momentum=0.95))
    return made


def _may_freeze(layer: SparseLinear) -> bool:
    return type(layer.recipe).freezes_variance is not Recipe.freezes_variance


def freeze(found: Iterable[torch.optim.Optimizer], layers: Iterable[nn.Module]) -> None:
    """Tell AdamW which layers' second moments their recipes want to keep as they are."""
    frozen = {id(layer.weight) for layer in layers
              if isinstance(layer, SparseLinear) and layer.recipe.freezes_variance(layer)}
    for optimizer in found:
        for group in optimizer.param_groups:
            group["frozen"] = len(group["params"]) == 1 and id(group["params"][0]) in frozen
