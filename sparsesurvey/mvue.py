"""Minimum-variance unbiased 2:4: two of every four gradients, drawn and scaled so that their mean is the gradient.

Chmiel et al. (2023), for the gradients of a layer's output. The largest two of four are nearer to the gradient in every
draw, but wrong on average, and a training sums over thousands of draws.

>>> chances, values = mvue24_probabilities(torch.tensor([1.0, 2.0, 3.0, 4.0]))
>>> chances  # of the pairs 12, 13, 14, 23, 24 and 34, numbered from the smallest magnitude
tensor([0.0000, 0.0500, 0.1500, 0.1500, 0.2500, 0.4000])
>>> values[1:3]  # what is kept where 13 or 14 is drawn
tensor([[5., 0., 5., 0.],
        [5., 0., 0., 5.]])
>>> chances @ values  # the mean
tensor([1., 2., 3., 4.])
"""

from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

PAIRS = tuple(combinations(range(4), 2))  # by magnitude: 0 is the smallest of the group


class Draw(NamedTuple):
    """How groups of four are drawn: the chance of each of ``PAIRS``, and what is kept of the group then."""

    chances: Tensor  # [..., 6]
    values: Tensor  # [..., 6, 4]

    @property
    def mean(self) -> Tensor:
        """Expectation ``[..., 4]``: the group itself, if the draw is unbiased."""
        return (self.chances.unsqueeze(-1) * self.values).sum(-2)

    def variance(self, groups: Tensor) -> Tensor:
        """Expected square distance ``[...]`` from the group, summed over its four entries."""
        return (self.chances * (self.values - groups.unsqueeze(-2)).square().sum(-1)).sum(-1)


def mvue24(g: Tensor, generator: torch.Generator | None = None, released: bool = False) -> Tensor:
    """A draw of the unbiased 2:4 estimate with the least variance of ``g``, in groups of four along the last axis.

    ``released``: with the two slips of the published code, see ``mvue24_probabilities``. ValueError unless ``g`` is a
    floating-point tensor whose last axis is a multiple of 4.
    """
    return _draw(g, mvue24_probabilities(_groups(g), released), generator)


def mvue24_approximate(g: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Two of each four, drawn in proportion to magnitude without replacement, over the chance of being drawn.

    Drawn as a race (Efraimidis and Spirakis 2006): of exponential variables over the magnitudes the two smallest win, which
    costs a few passes over ``g`` where a draw among the six pairs sorts each group. What is not finite stays so.
    """
    wide = _groups(g).to(torch.promote_types(g.dtype, torch.float32))
    share, drawn = _race(wide)
    keys = -torch.rand(wide.shape, generator=generator, device=wide.device, dtype=wide.dtype).log() / share
    a, b, c, d = keys.unbind(-1)
    second = torch.minimum(torch.maximum(torch.minimum(a, b), torch.minimum(c, d)), torch.minimum(torch.maximum(a, b), torch.maximum(c, d)))
    return (wide / drawn * (keys <= second.unsqueeze(-1))).view(g.shape).to(g.dtype)


def _race(group: Tensor) -> tuple[Tensor, Tensor]:
    """Of each entry of groups ``[..., 4]`` its share of the magnitude, and its chance to be among the two that are drawn."""
    size = group.abs().clamp_min(torch.finfo(group.dtype).tiny * 1e4)
    share = size / size.sum(-1, keepdim=True)
    first = share / _others(share)  # over the chance that another one was drawn first
    return share, share * (1 + _others(first))


def _others(part: Tensor) -> Tensor:
    """The sum of the three others of each entry of groups ``[..., 4]``, without the cancelling of a difference."""
    a, b, c, d = part.unbind(-1)
    left, right = a + b, c + d
    return torch.stack([b + right, a + right, left + d, left + c], -1)


def mvue24_probabilities(group: Tensor, released: bool = False) -> Draw:
    """How the unbiased estimate with the least variance is drawn from groups ``[..., 4]`` (Chmiel et al. 2023).

    With magnitudes a1 <= a2 <= a3 <= a4 of sum S there are three cases. While a4 < 2 a1 + a3, and then while it is
    below a1 + a2 + a3, both that are kept become S / 2. Above that a4 is always kept, as it is, and beside it one
    other as a1 + a2 + a3.

    ``released`` repeats what ``MVUE24`` in the code published with Hu et al. (2024) computes: in the second case the
    chance of 24 is halved, in the third all becomes S / 2. Their training calls another function, which is unbiased.
    """
    wide = group.to(torch.promote_types(group.dtype, torch.float32))
    size, order = wide.abs().sort(dim=-1, stable=True)
    a1, a2, a3, a4 = size.unbind(-1)
    total, rest, zero = size.sum(-1), a1 + a2 + a3, torch.zeros_like(a1)
    first = [zero, a1 + (a3 - a4) / 2, a1 - (a3 - a4) / 2, a2 + (a3 - a4) / 2, a2 - (a3 - a4) / 2, a3 + a4 - a1 - a2]
    slip = 0.5 if released else 1.0
    second = [zero, zero, 2 * a1, rest - a4, slip * (a2 + a4 - a1 - a3), a3 + a4 - a1 - a2]
    third = [zero, zero, a1, zero, a2, torch.where(rest > 0, a3, 1.0)]  # a4 alone: with any other, which is zero
    light, heavy = (2 * a1 + a3 > a4).unsqueeze(-1), (a4 >= rest).unsqueeze(-1)
    others = torch.where(heavy, torch.stack(third, -1), torch.stack(second, -1))
    chances = torch.where(light, torch.stack(first, -1), others)
    chances = chances.clamp_min(0)
    half = (total / 2).unsqueeze(-1).expand_as(size)
    kept = half if released else torch.where(~light & heavy, torch.stack([rest, rest, rest, a4], -1), half)
    return Draw(chances / chances.sum(-1, keepdim=True), _place(kept, order, wide))


def approximate_probabilities(group: Tensor) -> Draw:
    """How groups ``[..., 4]`` are drawn two without replacement; 6 % more variance than the least on Gaussian ones."""
    wide = group.to(torch.promote_types(group.dtype, torch.float32))
    size, order = wide.abs().sort(dim=-1, stable=True)
    size = size.clamp_min(torch.finfo(size.dtype).tiny * 1e4)
    share = size / size.sum(-1, keepdim=True)
    others = [sum(share[..., j] for j in range(4) if j != i) for i in range(4)]  # 1 - share, without cancelling
    then = torch.stack([share[..., i] * share[..., j] * (1 / others[i] + 1 / others[j]) for i, j in PAIRS], -1)
    drawn = torch.stack([sum(then[..., k] for k, pair in enumerate(PAIRS) if i in pair) for i in range(4)], -1)
    return Draw(then, _place(size / drawn, order, wide))


def _place(kept: Tensor, order: Tensor, group: Tensor) -> Tensor:
    """What each pair keeps ``[..., 6, 4]``, in the group's order and with its signs, from sizes by rising magnitude."""
    inside = torch.tensor([[float(i in pair) for i in range(4)] for pair in PAIRS]).to(kept)
    values = kept.unsqueeze(-2) * inside
    back = order.argsort(dim=-1).unsqueeze(-2).expand_as(values)
    return values.gather(-1, back) * group.sign().unsqueeze(-2)


def _groups(g: Tensor) -> Tensor:
    if not isinstance(g, Tensor) or not g.is_floating_point() or g.dim() == 0 or g.shape[-1] % 4:
        got = f"{g.dtype} {list(g.shape)}" if isinstance(g, Tensor) else type(g).__name__
        raise ValueError(f"g must be floating point with a last axis that is a multiple of 4, got {got}")
    return g.detach().reshape(-1, 4)


def _draw(g: Tensor, draw: Draw, generator: torch.Generator | None) -> Tensor:
    chosen = torch.multinomial(draw.chances, 1, generator=generator)
    drawn = draw.values.gather(1, chosen.unsqueeze(-1).expand(-1, 1, 4))
    return drawn.view(g.shape).to(g.dtype)
