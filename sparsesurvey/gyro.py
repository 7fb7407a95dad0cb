"""Gyro-permutation (Yu et al. 2024): which outputs share a panel of HiNM, and in which order a panel takes its inputs.

Both steps repeat: sample a few channels of each part, group them, and put each group where it loses least, by the
Hungarian method. What the paper leaves open, how many are sampled when and what is accepted, is our reading. Neither
permutation costs anything at run time: the order of the inputs stands in the operand, the order of the outputs is that
of the next layer's inputs. Inside an MLP that is ``down_proj``; it must be the same for ``gate_proj`` and ``up_proj``.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsesurvey.structure import Structure, check_int


class Arrangement(NamedTuple):
    """Where each output and each panel's inputs go, and what was retained on the way there.

    ``structure`` is in the methods the one it was found for; weights and scores are in their own order, ``[out, in]``.
    """

    rows: Tensor  # int64 [out]: the output that stands in each place of the arranged weight
    order: Tensor  # int64 [out / v, in], each panel's order of the inputs
    outputs: list[float]  # retained scores: at first, and after each round that moved outputs
    inputs: list[float]  # the same of the rounds that moved inputs, the last of ``outputs`` first

    def mask(self, structure: Any, scores: Tensor) -> Tensor:
        """What is kept in this arrangement, True in the weight's own places ``[out, in]``."""
        arranged = structure.select(structure.check_scores(scores)[self.rows], self.order)
        return torch.empty_like(arranged).index_copy_(0, self.rows, arranged)

    def pack(self, structure: Any, weight: Tensor) -> Any:
        """The operand of a weight that was pruned by ``mask``: it takes x as it is and gives ``y[:, rows]``."""
        return structure.pack(weight[self.rows], self.order)

    def restore(self, y: Tensor) -> Tensor:
        """Outputs ``[tokens, out]`` of the arranged weight in the order of the weight itself."""
        return torch.empty_like(y).index_copy_(1, self.rows, y)


def gyro(scores: Tensor, structure: Any, generator: torch.Generator | None = None, rounds: int = 24) -> Arrangement:
    """Search an arrangement in which a ``HiNM`` retains more of the scores ``[out, in]``; higher is better, at least 0.

    ``rounds`` moves outputs, then as many inputs. What is retained never falls: a round that would lose is not made.
    The work of one round grows as (out / v)^2 * v * in for the outputs and as out * kept^2 / m^2 for the inputs.
    """
    check_int("rounds", rounds, 0)
    if not isinstance(structure, Structure) or not hasattr(structure, "survivors"):
        raise ValueError(f"structure must be a HiNM, got {structure!r}")
    structure.check_scores(scores)
    if (scores < 0).any():
        raise ValueError(f"scores must be at least 0, got {scores.min():g}")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    scores = scores.detach().double().cpu()
    rows, outputs = move_outputs(scores, structure, generator, rounds)
    order, inputs = move_inputs(scores[rows], structure, generator, rounds)
    return Arrangement(rows, order, outputs, [outputs[-1], *inputs])


def move_outputs(scores: Tensor, structure: Any, generator: torch.Generator, rounds: int) -> tuple[Tensor, list[float]]:
    """The order of the outputs ``[out]`` and what is retained after each round, from half a panel sampled down to one."""
    rows = torch.arange(len(scores))
    history = [float(retained(scores, structure).sum())]
    for step in range(rounds if len(scores) > structure.v else 0):
        sample = max(1, round(structure.v / 2 * (1 - step / rounds) ** 2))
        trial = exchange(scores, structure, rows.view(-1, structure.v), sample, generator)
        worth = float(retained(scores[trial], structure).sum())
        if worth > history[-1]:
            rows = trial
        history.append(max(worth, history[-1]))
    return rows, history


def exchange(scores: Tensor, structure: Any, panels: Tensor, sample: int, generator: torch.Generator) -> Tensor:
    """One round: ``sample`` outputs of each panel ``[panels, v]`` are taken out, clustered, and put where they keep most."""
    count, v = panels.shape
    shuffled = panels.gather(1, torch.rand(count, v, generator=generator).argsort(1))
    taken, rest = shuffled[:, :sample], shuffled[:, sample:]
    clusters = cluster(scores, taken)
    trial = torch.cat([rest.expand(count, count, -1), clusters.unsqueeze(1).expand(-1, count, -1)], 2)  # cluster, panel, v
    worth = torch.stack([retained(scores[row.flatten()], structure) for row in trial])
    which, where = assign(worth)
    return torch.cat([rest[where], clusters[which]], 1).flatten()


def cluster(scores: Tensor, taken: Tensor, steps: int = 4) -> Tensor:
    """Numbers of rows ``[panels, sample]`` regrouped by k-means of their scores, with clusters of equal size."""
    count, sample = taken.shape
    vectors = scores[taken.flatten()]  # [count * sample, in]
    labels = torch.arange(count).repeat_interleave(sample)
    for _ in range(steps):
        centres = torch.stack([vectors[labels == number].mean(0) for number in range(count)])
        near = -torch.cdist(vectors, centres).square().repeat_interleave(sample, 1)  # a centre takes as many as it had
        labels = assign(near)[1] // sample
    return taken.flatten()[labels.argsort(stable=True)].view(count, sample)


def move_inputs(scores: Tensor, structure: Any, generator: torch.Generator, rounds: int) -> tuple[Tensor, list[float]]:
    """Each panel's order of its inputs ``[out / v, in]``, survivors first, and what is retained after each round."""
    panels = structure.split(scores)
    survivors = structure.survivors(scores)
    history = torch.zeros(rounds, dtype=torch.float64)
    orders = []
    for panel, columns in zip(panels, survivors):
        order, worth = regroup(panel[:, columns].T, structure.n, structure.m, generator, rounds)
        gone = torch.ones(panel.shape[1], dtype=torch.bool).index_fill_(0, columns, False).nonzero().flatten()
        orders.append(torch.cat([columns[order], gone]))
        history += torch.tensor(worth, dtype=torch.float64)
    return torch.stack(orders), history.tolist()


def regroup(vectors: Tensor, n: int, m: int, generator: torch.Generator, rounds: int) -> tuple[Tensor, list[float]]:
    """An order of ``[kept, v]`` vectors in groups of m that keep more at n of m, and what is retained after each round.

    One vector of every group is taken out; the best assignment of them to the groups, which may be the one they came
    from, is exact, so that no round loses.
    """
    groups = torch.arange(len(vectors)).view(-1, m)
    history = []
    for _ in range(rounds):
        groups = groups.gather(1, torch.rand(groups.shape, generator=generator).argsort(1))
        taken, rest = groups[:, 0], vectors[groups[:, 1:]]  # [groups, m - 1, v]
        best = rest.topk(min(n, m - 1), 1).values
        base = best[:, : n - 1].sum((1, 2))
        last = best[:, n - 1] if n < m else rest.new_zeros(len(rest), rest.shape[2])  # what a newcomer must beat
        worth = base + torch.stack([torch.maximum(last, vector).sum(1) for vector in vectors[taken]])
        which, where = assign(worth)
        groups[where, 0] = taken[which]
        history.append(float(worth[which, where].sum()))
    return groups.sort(1).values.flatten(), history


def retained(scores: Tensor, structure: Any) -> Tensor:
    """What a structure keeps of the scores ``[out, in]``, by panel of ``v`` outputs."""
    return (scores * structure.select(scores)).view(-1, structure.v * scores.shape[1]).sum(1)


def assign(worth: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the one-to-one assignment of the highest worth, by the Hungarian method; rows rise."""
    from scipy.optimize import linear_sum_assignment

    which, where = linear_sum_assignment(worth.numpy(), maximize=True)
    return torch.from_numpy(which), torch.from_numpy(where)


def clustered(shape: tuple[int, int], v: int, seed: int = 0, sigma: float = 1.0) -> Tensor:
    """A Gaussian weight in which v outputs each, scattered over it, have the same log-normal scales of the inputs."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.randn(shape[0] // v, shape[1], generator=generator).mul(sigma).exp().repeat_interleave(v, 0)
    weight = torch.randn(shape, generator=generator) * scales
    return weight[torch.randperm(len(weight), generator=generator)]
