"""How far the orders that a model learns have come: the penalty of their soft matrices, and how many are permutations already."""

from __future__ import annotations

from torch import nn

from sparsesurvey.linear import sparse_layers
from sparsesurvey.recipes.pa_dst import birkhoff_penalty, is_ordered

PENALTY, FOUND = "order penalty", "orders found"


def order_state(model: nn.Module) -> dict[str, float]:
    """The penalty of a row or column, the mean over the layers (0 for a permutation), and the share of layers that have one."""
    layers = [layer for layer in sparse_layers(model).values() if hasattr(layer, "soft_order")]
    if not layers:
        raise ValueError("model must have layers that learn an order (recipe PADST), got none")
    hard = [is_ordered(layer) for layer in layers]
    soft = [0.0 if done else float(birkhoff_penalty(layer.soft_order.detach())) / (2 * layer.in_features)
            for layer, done in zip(layers, hard)]
    return {PENALTY: sum(soft) / len(soft), FOUND: sum(hard) / len(hard)}


def soft_weights(shapes: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int, float]]:
    """By layer: weights ``[out, in]``, entries of the soft order ``[in, in]``, and the ratio of the two."""
    return {name: (out * inn, inn * inn, inn / out) for name, (out, inn) in shapes.items()}
