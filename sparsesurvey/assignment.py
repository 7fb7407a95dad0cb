"""Orders of inputs and outputs under which a pattern keeps more: found by assignment, or learned as PA-DST does.

An order is an int64 tensor: ``weight[:, order]`` has the inputs in it. A product is unchanged where the activations
come in the same order, ``x[:, order] @ weight[:, order].T``, and an order of the outputs folds into the next layer.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sparsesurvey.structure import Pattern, check_int


class Arrangement(NamedTuple):
    """Orders of a weight's outputs and inputs, and the share of the scores that the structure kept on the way."""

    rows: Tensor  # int64 [out]
    columns: Tensor  # int64 [in]
    kept: list[float]  # before the search and after each pass

    def apply(self, weight: Tensor) -> Tensor:
        """``[out, in]`` in these orders: ``P_o W P_i``."""
        return weight[self.rows][:, self.columns]

    def undo(self, weight: Tensor) -> Tensor:
        """Invert ``apply``, for a mask that was chosen in these orders."""
        return weight[self.rows.argsort()][:, self.columns.argsort()]


def kept_share(structure: Pattern, scores: Tensor, order: Tensor | None = None) -> float:
    """Share of the scores that the structure keeps, with the inputs of every window in ``order``."""
    ordered = scores if order is None else in_order(scores, order)
    return float((ordered * structure.mask(ordered)).sum(dtype=torch.float64) / ordered.sum(dtype=torch.float64))


def in_order(matrix: Tensor, order: Tensor) -> Tensor:
    """``[out, in]`` with every ``len(order)`` consecutive inputs in this order."""
    return matrix.unflatten(1, (-1, len(order)))[..., order].flatten(1)


def arrange(structure: Pattern, scores: Tensor, rounds: int = 2) -> Arrangement:
    """Orders of outputs and inputs, alternately improved, under which ``structure`` keeps more of ``scores``.

    Two rounds, as for V:N:M in Zhao et al. (2024). How one pass assigns is our reading, see ``improve``. What is kept
    never falls. For patterns whose tiles choose alone; takes ``rounds * (out + in)`` selections.
    """
    check_int("rounds", rounds, 0)
    structure.check_scores(scores)
    flipped = _Transposed(structure)
    rows, columns = (torch.arange(size, device=scores.device) for size in scores.shape)
    kept = [kept_share(structure, scores)]
    for number in range(rounds):
        rows = improve(flipped, scores[:, columns].T, rows, seed=number)
        columns = improve(structure, scores[rows], columns, seed=number)
        kept.append(kept_share(structure, scores[rows][:, columns]))
    return Arrangement(rows, columns, kept)


class _Transposed:
    """A pattern of outputs where one of inputs is expected: just what ``improve`` needs."""

    def __init__(self, structure: Pattern):
        self.tile, self.select = structure.tile[::-1], lambda scores: structure.select(scores.T).T


def improve(structure: Pattern, scores: Tensor, order: Tensor, seed: int = 0) -> Tensor:
    """One pass: again and again one input of every tile column is taken out, and these are dealt anew, by assignment.

    The tiles of a column keep what they keep whatever the others hold, so who is best where is a linear assignment,
    solved exactly (Kuhn 1955): what is kept does not fall. Who is taken out together is drawn by ``seed``. An order
    shorter than the inputs is that of every window of them.
    """
    width = structure.tile[1]
    groups = len(order) // width
    draw = torch.rand(groups, width, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
    mixed = order.view(groups, width).gather(1, draw.to(order.device)).flatten()  # in each tile, where it does not matter
    order = mixed if _kept(structure, scores, mixed) >= _kept(structure, scores, order) else order.clone()
    for place in range(width if min(width, groups) > 1 else 0):  # else nothing can be better
        given = order.view(groups, width)[:, place].clone()
        shifted = [_kept_by_tile(structure, scores, order, place, given.roll(-shift)) for shift in range(groups)]
        gain = torch.stack(shifted)  # [shift, tile]
        tile = torch.arange(groups, device=gain.device)
        best = _assign(gain[(tile[:, None] - tile) % groups, tile])  # [input, tile]
        trial = order.clone()
        trial.view(groups, width)[best, place] = given
        if _kept(structure, scores, trial) > _kept(structure, scores, order):
            order = trial
    return order


def _kept_by_tile(structure: Pattern, scores: Tensor, order: Tensor, place: int, inputs: Tensor) -> Tensor:
    """Scores kept by each tile column of a window ``[len(order) / width]``, given who is in one place of them."""
    width = structure.tile[1]
    order = order.clone()
    order.view(-1, width)[:, place] = inputs
    ordered = in_order(scores, order)
    kept = (ordered * structure.select(ordered)).sum(0, dtype=torch.float64)
    return kept.view(-1, len(order) // width, width).sum((0, 2))


def _kept(structure: Pattern, scores: Tensor, order: Tensor) -> float:
    ordered = in_order(scores, order)
    return float((ordered * structure.select(ordered)).sum(dtype=torch.float64))


class Learned(NamedTuple):
    """What ``learn_order`` found, and the way there."""

    order: Tensor  # int64 [window]
    soft: Tensor  # [window, window], the doubly stochastic matrix that was hardened
    penalty: list[float]  # of the soft matrix, before each step
    kept: list[float]  # share of the scores that the structure keeps of the softly ordered ones, before each step


def learn_order(structure: Pattern, scores: Tensor, window: int | None = None, steps: int = 300, *,
                strength: float = 1.0, lr: float = 0.01, below: float = 0.02, seed: int = 0) -> Learned:
    """An order of every ``window`` inputs by descent on a soft permutation, as PA-DST learns it (Tyagi et al. 2025).

    The soft matrix is kept doubly stochastic (clamped, then Sinkhorn's iteration) and pushed towards a permutation by
    ``penalty``, whose strength rises over the steps; it is hardened by assignment when the penalty is below ``below``,
    or at the end. Here the loss is the share of ``scores`` that is lost; in PA-DST it is the network's.
    """
    structure.check_scores(scores)
    window = scores.shape[1] if window is None else window
    check_int("steps", steps, 1)
    check_int("window", window, 1, scores.shape[1])
    if scores.shape[1] % window:
        raise ValueError(f"window must divide the {scores.shape[1]} inputs, got {window}")
    draw = torch.Generator().manual_seed(seed)
    raw = doubly_stochastic(1 + 0.1 * torch.rand(window, window, generator=draw)).to(scores.device).requires_grad_()
    descent, whole = torch.optim.Adam([raw], lr=lr), scores.sum()
    dealt, penalties, shares = scores.float().unflatten(1, (-1, window)), [], []
    for step in range(steps):
        soft = doubly_stochastic(raw, rounds=5)  # [input, place]
        ordered = (dealt @ soft).flatten(1)
        kept = (ordered * structure.select(ordered.detach())).sum() / whole
        hardness = penalty(soft)
        penalties.append(hardness.item())
        shares.append(kept.item())
        if penalties[-1] < below:
            break
        descent.zero_grad()
        (strength * step / steps * hardness - kept).backward()
        descent.step()
        with torch.no_grad():  # or it drifts away, and counts strong inputs more than once
            raw.copy_(doubly_stochastic(raw))
    soft = raw.detach()
    return Learned(_assign(soft.T), soft, penalties, shares)


def doubly_stochastic(matrix: Tensor, rounds: int = 10) -> Tensor:
    """A square matrix, clamped to be positive, with columns that sum to one and rows that nearly do (Sinkhorn 1964)."""
    matrix = matrix.clamp(min=1e-6)
    for _ in range(rounds):
        matrix = matrix / matrix.sum(1, keepdim=True)
        matrix = matrix / matrix.sum(0, keepdim=True)
    return matrix


def penalty(soft: Tensor) -> Tensor:
    """Mean over rows and columns of the l1 norm minus the l2 norm (Lyu et al. 2019): 0 for a permutation, else above.

    >>> round(float(penalty(torch.eye(4))), 6), round(float(penalty(torch.full((4, 4), 0.25))), 6)
    (0.0, 0.5)
    """
    rows, columns = (soft.abs().sum(axis) - soft.square().sum(axis).sqrt() for axis in (1, 0))
    return (rows.mean() + columns.mean()) / 2


def _assign(gain: Tensor) -> Tensor:
    """For each row of a square matrix its column, all different, so that the sum is largest."""
    from scipy.optimize import linear_sum_assignment  # ours may be used without scipy, but for this

    return torch.from_numpy(linear_sum_assignment(gain.cpu().numpy(), maximize=True)[1]).to(gain.device)
