"""Orders of the inputs in which N:M keeps more, and how a gated MLP takes one on without a trace.

An order is an int64 tensor, ``weight[:, order]`` has the inputs in it. These are the published heuristics; search by
assignment for any tile is in ``assignment``, that of HiNM in ``gyro``. Inside a gated MLP an order of the hidden features
costs nothing: ``fold`` gives it to the outputs of gate_proj and up_proj and to the inputs of down_proj.

>>> scores = torch.tensor([[9.0, 8.0, 7.0, 6.0, 4.0, 3.0, 2.0, 1.0]])  # 2:4 keeps 9 + 8 + 4 + 3 of 40
>>> order = deal(scores, 4)
>>> order.tolist(), scores[:, order].tolist()
([0, 2, 4, 6, 1, 3, 5, 7], [[9.0, 7.0, 4.0, 2.0, 8.0, 6.0, 3.0, 1.0]])
>>> snake(scores, 4).tolist()
[7, 4, 3, 0, 6, 5, 2, 1]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import TYPE_CHECKING

import pandas as pd
import torch
from torch import Tensor, nn

from sparsesurvey.assignment import improve, kept_share
from sparsesurvey.linear import MLP
from sparsesurvey.sparsegpt import chooses_alone
from sparsesurvey.structure import Pattern, check_int, check_weight, describe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Finder = Callable[[Pattern, Tensor], Tensor]  # structure, scores -> order


def deal(scores: Tensor, width: int) -> Tensor:
    """E-Sparse's global shuffle (Li et al. 2023): inputs from the best mean score to the worst, dealt to the groups in turn.

    ``width`` is the M of N:M. Every group gets one of the best inputs, one of the next best, and so on.
    """
    return _rounds(scores, width, descending=True).T.flatten()


def snake(scores: Tensor, width: int) -> Tensor:
    """RIA's channel allocation (Zhang et al. 2024): as ``deal``, from the worst up, every other round in the other direction."""
    rounds = _rounds(scores, width, descending=False).clone()
    rounds[1::2] = rounds[1::2].flip(1)
    return rounds.T.flatten()


def _rounds(scores: Tensor, width: int, descending: bool) -> Tensor:
    """Inputs by the mean of their scores, ``[width, groups]``: who is dealt in which round."""
    check_weight(scores, "scores")
    check_int("width", width, 1)
    if scores.shape[1] % width:
        raise ValueError(f"width must divide the {scores.shape[1]} inputs, got {width}")
    return scores.mean(0, dtype=torch.float64).argsort(descending=descending, stable=True).view(width, -1)


def swapped(structure: Pattern, scores: Tensor, order: Tensor, block: int = 256) -> Tensor:
    """E-Sparse's local shuffle: inside every ``block`` of places, exchange two inputs as long as more is kept.

    Greedy, in our reading: each place in turn makes the exchange that gains most, if any gains. One pass, that takes
    ``2 * in`` selections of ``[out, block * M]``. What is kept does not fall.
    """
    _check_alone(structure, "swapped")
    check_int("block", block, 1)
    structure.check_scores(scores)
    order, width = check_order(order, scores.shape[1]).to(scores.device).clone(), structure.tile[1]
    block = max(width, block - block % width)
    for start in range(0, len(order), block):
        _swap_inside(structure, scores, order[start:start + block])
    return order


def _swap_inside(structure: Pattern, scores: Tensor, order: Tensor) -> None:
    """One pass over the places of ``order``, in place."""
    width = structure.tile[1]
    places = torch.arange(len(order), device=order.device)
    kept = _kept_by_group(structure, scores, order.view(-1, width))
    for place in range(len(order)):
        groups = order.view(-1, width)
        mine, others = place // width, places[places // width != place // width]
        with_other = groups[mine].repeat(len(others), 1)
        with_other[:, place % width] = order[others]
        with_mine = groups[others // width].clone()
        with_mine[torch.arange(len(others), device=order.device), others % width] = order[place]
        new_mine, new_other = (_kept_by_group(structure, scores, inputs) for inputs in (with_other, with_mine))
        gain = new_mine + new_other - kept[mine] - kept[others // width]
        if not len(others) or gain.max() <= 1e-9 * kept.sum():
            continue
        best = int(gain.argmax())
        other = int(others[best])
        order[place], order[other] = order[other].clone(), order[place].clone()
        kept[mine], kept[other // width] = new_mine[best], new_other[best]


def _kept_by_group(structure: Pattern, scores: Tensor, inputs: Tensor) -> Tensor:
    """Scores that are kept by groups made of these inputs ``[groups, width]``."""
    members = scores[:, inputs.flatten()]
    kept = (members * structure.select(members)).sum(0, dtype=torch.float64)
    return kept.view(inputs.shape).sum(1)


def e_sparse_order(structure: Pattern, scores: Tensor, block: int = 256) -> Tensor:
    """E-Sparse's two shuffles (Li et al. 2023), the global one first. Known to us without the paper's pseudo-code."""
    return swapped(structure, scores, deal(scores, structure.tile[1]), block)


def ria_order(structure: Pattern, scores: Tensor, passes: int = 1) -> Tensor:
    """RIA's permutation (Zhang et al. 2024): channel allocation, then one input of each group after the other by assignment.

    The assignment is ``assignment.improve``, which takes a pass only where more is kept. ``in`` selections for a pass.
    """
    _check_alone(structure, "ria_order")
    check_int("passes", passes, 0)
    order = snake(scores, structure.tile[1])
    for number in range(passes):
        order = improve(structure, scores, order, seed=number)
    return order


def mask_in(structure: Pattern, scores: Tensor, order: Tensor) -> Tensor:
    """What the structure keeps with the inputs in this order, True in the weight's own places ``[out, in]``."""
    order = check_order(order, scores.shape[1]).to(scores.device)
    return structure.mask(scores[:, order])[:, order.argsort()]


def compare(structure: Pattern, scores: Tensor, block: int = 256) -> pd.DataFrame:
    """The share of the scores that is kept in each of the orders, and by how much more than as they are."""
    width = structure.tile[1]
    found = {"as they are": torch.arange(scores.shape[1], device=scores.device), "dealt (E-Sparse, global)": deal(scores, width),
             "dealt, swapped (E-Sparse)": e_sparse_order(structure, scores, block),
             "snake (RIA, allocation)": snake(scores, width), "snake, assigned (RIA)": ria_order(structure, scores)}
    kept = pd.Series({name: kept_share(structure, scores, order) for name, order in found.items()})
    return pd.DataFrame({"kept": kept, "gain %": 100 * (kept / kept.iloc[0] - 1)})


def gated(model: nn.Module) -> dict[str, nn.Module]:
    """The gated MLPs of a model by name, modules with gate_proj, up_proj and down_proj; ValueError if it has none."""
    found = {name: module for name, module in model.named_modules()
             if all(isinstance(getattr(module, part, None), nn.Linear) for part in MLP)}
    if not found:
        raise ValueError(f"model must have gated MLPs with {', '.join(MLP)}, got a {type(model).__name__} with none")
    return found


def hidden_orders(model: nn.Module, structure: Pattern, score: Callable[[Tensor, object], Tensor],
                  inputs: Mapping[str, object], find: Finder = ria_order) -> dict[str, Tensor]:
    """For each gated MLP the order of its hidden features in which ``structure`` keeps more of down_proj, for ``fold``.

    ``inputs`` are those of ``calibrate``; ``find`` is ``e_sparse_order``, ``ria_order`` or another of that form.
    """
    layers = {name: module.down_proj for name, module in gated(model).items()}
    full = {name: f"{name}.down_proj".lstrip(".") for name in layers}
    missing = [full[name] for name in layers if full[name] not in inputs]
    if missing:
        raise ValueError(f"inputs must hold {', '.join(missing)}: calibrate with modules that include down_proj")
    return {name: find(structure, score(layer.weight.detach(), inputs[full[name]])) for name, layer in layers.items()}


def fold(model: nn.Module, orders: Tensor | Mapping[str, Tensor]) -> None:
    """Put the hidden features of gated MLPs in other orders, in place; what the model computes stays the same.

    ``down(act(gate x) * (up x))`` treats its features alike, so rows of gate_proj and up_proj, their biases and columns of
    down_proj move together; no gather is left at run time. The order of the features before: ``orders.argsort()``.

    Args:
        orders: an order for a model with one gated MLP, or for each by name, as ``hidden_orders`` gives it.

    Raises:
        ValueError: no gated MLP, an unknown name, no permutation of the features. Then nothing was changed.
    """
    mlps = gated(model)
    if isinstance(orders, Tensor):
        if len(mlps) > 1:
            raise ValueError(f"orders must name the MLPs they are for, {type(model).__name__} has {len(mlps)}")
        orders = dict.fromkeys(mlps, orders)
    if unknown := [name for name in orders if name not in mlps]:
        raise ValueError(f"orders must be for gated MLPs of the model, got {', '.join(map(repr, unknown))}")
    for name, order in orders.items():
        check_order(order, mlps[name].down_proj.in_features)
    with torch.no_grad():
        for name, order in orders.items():
            mlp, order = mlps[name], order.to(mlps[name].down_proj.weight.device)
            rows = [part for layer in (mlp.gate_proj, mlp.up_proj) for part in (layer.weight, layer.bias) if part is not None]
            for part in rows:
                part.copy_(part[order])
            mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, order])


def folded(model: nn.Module, orders: Tensor | Mapping[str, Tensor]) -> nn.Module:
    """A copy of the model, its hidden features in other orders, see ``fold``; ``{}`` leaves all as they are."""
    model = deepcopy(model)
    fold(model, orders)
    return model


def draw(structure: Pattern, scores: Tensor, orders: Mapping[str, Tensor]) -> Figure:
    """What is kept in each order, darker = higher scores, with the inputs in it; below, the mean score of each place."""
    import matplotlib.pyplot as plt

    from sparsesurvey import figures

    figure, axes = plt.subplots(2, len(orders), figsize=(3.5 * len(orders), 3.0), sharex="col", sharey="row", squeeze=False,
                                gridspec_kw={"height_ratios": [3, 1]})
    for (name, order), (above, below) in zip(orders.items(), axes.T):
        ordered = scores[:, order]
        figures.pattern(structure, structure.mask(ordered), ordered, above)
        above.set(aspect="auto", xlabel="", ylabel="", title=f"{name}: {kept_share(structure, scores, order):.1%} kept")
        below.bar(range(len(order)), ordered.mean(0).numpy(), width=1.0, color=figures.COLOURS["dense"])
        for edge in range(structure.tile[1], len(order), structure.tile[1]):
            below.axvline(edge - 0.5, color="#888888", linewidth=0.5, alpha=0.7)
        below.set(xlabel="inputs in this order", yticks=[])
        below.grid(False)
    axes[0, 0].set_ylabel("out")
    axes[1, 0].set_ylabel("score")
    return figure


def check_order(order: Tensor, size: int) -> Tensor:
    """Return an int64 permutation of the numbers below ``size``, or raise ValueError."""
    right = isinstance(order, Tensor) and order.dtype == torch.int64 and order.shape == (size,)
    if not right or not torch.equal(order.sort().values, torch.arange(size, device=order.device)):
        raise ValueError(f"order must be an int64 tensor with each number below {size} once, got {describe(order)}"[:200])
    return order


def _check_alone(structure: Pattern, who: str) -> None:
    if not isinstance(structure, Pattern) or not chooses_alone(structure):
        raise ValueError(f"{who} needs a pattern whose tiles choose alone, such as NM(2, 4), got {structure!r}")
