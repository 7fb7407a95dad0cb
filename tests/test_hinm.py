"""HiNM: cases by hand, the definition by trying all groupings, the exact optimum, panels' own orders, gyro-permutation."""

from itertools import combinations

import pytest
import torch

from sparsesurvey.gyro import assign, cluster, clustered, gyro, retained
from sparsesurvey.pruning import gaussian, kept
from sparsesurvey.structure import stored_bytes
from sparsesurvey.structures import NM, Block, HiNM
from sparsesurvey.structures.hinm import optimum


def test_kept_of_gaussian_weights():
    """The catalogue's section 4.1: .407 of the magnitude, .509 of the energy of 512 x 512 normal weights."""
    weight = gaussian((512, 512))
    found = kept(weight, HiNM(32, 0.5, 2, 4).mask(weight.abs()))
    assert found.density == 0.25
    assert found.magnitude == pytest.approx(0.407, abs=0.01) and found.energy == pytest.approx(0.509, abs=0.01)


@pytest.mark.parametrize("mask, holds", [
    ([[1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1, 1]], True),
    ([[1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0, 1, 1]], False),  # five inputs
    ([[1, 1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]], False),  # three in a row of the only group
    ([[1, 0, 0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0, 0, 0]], False),  # also where they are far apart
])
def test_holds_by_hand(mask, holds):
    assert HiNM(2, 0.5, 2, 4).holds(torch.tensor(mask, dtype=torch.bool)) is holds


@pytest.mark.parametrize("mask, holds", [
    ([[1, 1, 1, 1, 0, 0, 0, 0]], True),  # two groups may part anywhere: 0 1 | 2 3
    ([[1, 1, 1, 0, 0, 0, 0, 1]], True),
    ([[1, 1, 1, 1, 1, 0, 0, 0]], False),
])
def test_groups_need_not_be_full(mask, holds):
    assert HiNM(1, 1.0, 2, 4).holds(torch.tensor(mask, dtype=torch.bool)) is holds


def fits(mask: torch.Tensor, n: int, m: int, most: int) -> bool:
    """The definition, by trying every way to cut the used columns into groups."""
    used = mask[:, mask.any(0)].int()
    width = used.shape[1]
    for cuts in (cut for number in range(most) for cut in combinations(range(1, width), number)):
        edges = [0, *cuts, width]
        parts = [used[:, a:b] for a, b in zip(edges, edges[1:])]
        if all(part.shape[1] <= m and bool((part.sum(1) <= n).all()) for part in parts):
            return True
    return width == 0


@pytest.mark.parametrize("n, m, columns", [(2, 4, 0.5), (1, 4, 0.75), (2, 3, 0.66), (3, 4, 1.0)])
def test_the_greedy_groups_are_as_few_as_any(n, m, columns):
    structure = HiNM(3, columns, n, m)
    most = structure.kept((3, 12)) // m
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(300):
        mask = torch.rand(3, 12, generator=generator) < 0.05 + 0.5 * (number % 10) / 10
        found.append(structure.holds(mask))
        assert found[-1] == fits(mask, n, m, most), mask.int()
        if found[-1]:
            weight = mask * gaussian((3, 12), number)
            assert torch.equal(structure.unpack(structure.pack(weight)), weight)
    assert 20 < sum(found) < 300


def test_of_the_survivors_every_row_is_n_of_m():
    structure, weight = HiNM(16, 0.5, 2, 4), gaussian((64, 96))
    mask = structure.mask(weight.abs())
    for panel, columns in zip(mask.view(4, 16, 96), structure.survivors(weight.abs())):
        assert len(columns) == 48 and not panel[:, [column not in columns for column in range(96)]].any()
        assert NM(2, 4).holds(panel[:, columns])


def test_all_inputs_kept_is_n_of_m_and_all_of_m_is_vectors():
    weight = gaussian((64, 64)).abs()
    assert torch.equal(HiNM(16, 1.0, 2, 4).mask(weight), NM(2, 4).mask(weight))
    vectors = HiNM(64, 0.5, 4, 4).mask(weight)
    assert torch.equal(vectors, Block(64, 1, 0.5).mask(weight))


def test_what_an_input_left_behind_is_not_seen_again():
    """Input 1 survives, and no row keeps it: chosen again, another input takes its place and the groups shift."""
    structure = HiNM(1, 0.5, 1, 2)
    scores = torch.tensor([[0.0, 0.0, 1.0, 5.0, 4.0, 6.0, 0.0, 0.0]])
    mask = structure.mask(scores)
    assert mask.int().tolist() == [[0, 0, 0, 1, 0, 1, 0, 0]]
    again = structure.mask(scores * mask)
    assert again.int().tolist() == [[1, 0, 0, 0, 0, 1, 0, 0]] and structure.holds(mask) and structure.holds(again)


# ---- the best choice


def test_the_optimum_is_the_best_of_all_masks():
    structure = HiNM(2, 0.5, 1, 2)
    every = (torch.arange(2**12)[:, None] >> torch.arange(12) & 1).bool().view(-1, 2, 6)
    every = every[every.sum((1, 2)) == structure.nnz((2, 6))]
    members = every[[structure.holds(mask) for mask in every]]
    for seed in range(5):
        scores = gaussian((2, 6), seed).abs()
        best = optimum(structure, scores)
        assert structure.holds(best) and best.sum() == structure.nnz((2, 6))
        assert float(scores[best].sum()) == pytest.approx(float((scores * members).sum((1, 2)).max()))


@pytest.mark.parametrize("structure", [HiNM(32, 0.5), HiNM(16, 0.25), HiNM(32, 0.5, 1, 4), HiNM(4, 0.5)], ids=str)
def test_column_sums_come_close_to_the_optimum(structure):
    scores = gaussian((64, 32)).abs()
    best = optimum(structure, scores)
    assert structure.holds(best)
    assert 0.93 * scores[best].sum() < scores[structure.mask(scores)].sum() < scores[best].sum()


def test_the_optimum_of_many_inputs_is_refused():
    with pytest.raises(ValueError, match="scores must have fewer inputs for an exact choice: 2924013 sets"):
        optimum(HiNM(2), torch.rand(2, 92))


# ---- how it is stored


def test_bytes_by_hand():
    """Half of 64 inputs, 2 of 4: 32 x 16 values, as many 2-bit positions, 32 columns of 2 bytes for each of 2 panels."""
    structure, weight = HiNM(16, 0.5), gaussian((32, 64)).half()
    packed = structure.pack(weight * structure.mask(weight.abs()))
    by_hand = 32 * 16 * 2 + 32 * 16 * 2 // 8 + 2 * 32 * 2
    assert stored_bytes(packed) == structure.cost((32, 64), 1, 2).weight_bytes == by_hand


@pytest.mark.parametrize("columns, message", [
    ([[0, 4, 2, 6]], "must not fall in a panel"),
    ([[0, 4, 6, 8]], "must be from 0 to 7"),
    ([[-1, 4, 6, 7]], "must be from 0 to 7"),
])
def test_corrupt_columns(columns, message):
    structure = HiNM(2, 0.5)
    packed = structure.pack((weight := gaussian((2, 8))) * structure.mask(weight.abs()))
    bad = packed._replace(columns=torch.tensor(columns, dtype=torch.int16))
    with pytest.raises(ValueError, match=f"packed.columns {message}"):
        structure.unpack(bad)
    if message.startswith("must not fall"):
        assert structure.unpack(bad._replace(rising=False)).shape == (2, 8), "in an order of its own it is an operand"


def test_an_input_listed_twice_is_refused():
    structure = HiNM(2, 0.5)
    order = torch.tensor([[7, 1, 4, 0, 2, 3, 5, 6]])
    packed = structure.pack(torch.tensor([[0.0, 0, 0, 0, 2, 0, 0, 3], [0, 4, 0, 0, 0, 0, 0, 0]]), order)
    assert packed.columns.tolist() == [[7, 1, 4, 4]] and not packed.rising
    with pytest.raises(ValueError, match="packed.columns must be distinct"):
        structure.unpack(packed._replace(columns=torch.tensor([[7, 1, 7, 4]], dtype=torch.int16)))


# ---- an order of its own for each panel


def shuffled(panels: int, inn: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(panels, inn, generator=torch.Generator().manual_seed(seed)).argsort(1)


@pytest.mark.parametrize("structure", HiNM.variants(), ids=str)
def test_an_order_is_the_same_as_moving_the_inputs(structure):
    """Choosing, storing and multiplying in an order equals doing so with the columns of each panel moved."""
    out, inn = 2 * structure.v, 40
    weight, order = gaussian((out, inn)), shuffled(2, inn)
    spread = order.repeat_interleave(structure.v, 0)
    mask = structure.select(weight.abs(), order)
    assert torch.equal(mask.gather(1, spread), structure.mask(weight.gather(1, spread).abs()))
    assert structure.holds(mask, order) and not structure.holds(mask)
    packed = structure.pack(weight * mask, order)
    assert torch.equal(structure.unpack(packed), weight * mask)
    assert stored_bytes(packed) == structure.cost((out, inn), 1, 4).weight_bytes
    x, dy = gaussian((5, inn), 1), gaussian((5, out), 2)
    torch.testing.assert_close(structure.spmm_gather(packed)(x), x @ (weight * mask).T)
    torch.testing.assert_close(structure.spmmt_gather(packed)(dy), dy @ (weight * mask))
    gradient = structure.unpack(packed._replace(values=structure.sddmm_gather(packed)(dy, x)))
    torch.testing.assert_close(gradient, (dy.T @ x) * mask)


@pytest.mark.parametrize("order, message", [
    (torch.zeros(2, 8), "order must be int64"), (torch.zeros(1, 8).long(), "order must be int64"),
    (torch.zeros(2, 8).long(), "a permutation of 0 to 7"), ([[0, 1]], "order must be int64"),
])
def test_bad_orders(order, message):
    structure, weight = HiNM(2, 0.5), torch.zeros(4, 8)
    with pytest.raises(ValueError, match=message):
        structure.pack(weight, order)
    with pytest.raises(ValueError, match=message):
        structure.holds(weight.bool(), order)


# ---- gyro-permutation


WEIGHTS = {"clustered": (clustered((128, 64), 16), HiNM(16)), "gaussian": (gaussian((128, 64)), HiNM(16)),
           "one panel": (gaussian((16, 64)), HiNM(16)), "1:4": (clustered((64, 64), 8), HiNM(8, 0.5, 1, 4)),
           "all of m": (clustered((64, 64), 8), HiNM(8, 0.5, 4, 4))}


@pytest.mark.parametrize("weight, structure", WEIGHTS.values(), ids=WEIGHTS)
def test_gyro_retains_more_round_by_round(weight, structure):
    scores = weight.abs()
    found = gyro(scores, structure)
    assert sorted(found.rows.tolist()) == list(range(len(weight)))
    assert found.outputs == sorted(found.outputs) and found.inputs[0] == found.outputs[-1]
    assert all(b >= a - 1e-9 * a for a, b in zip(found.inputs, found.inputs[1:]))
    mask = found.mask(structure, scores)
    assert float(scores[mask].sum()) == pytest.approx(found.inputs[-1], rel=1e-5)
    assert found.outputs[0] == pytest.approx(float(scores[structure.mask(scores)].sum()), rel=1e-5)
    rows_only = scores[found.rows]
    assert found.outputs[-1] == pytest.approx(float(rows_only[structure.mask(rows_only)].sum()), rel=1e-5)
    assert int(mask.sum()) == structure.nnz(weight.shape)


def test_gyro_finds_hidden_clusters_and_little_in_noise():
    gains = {}
    for name in ("clustered", "gaussian"):
        weight, structure = WEIGHTS[name]
        found = gyro(weight.abs(), structure)
        gains[name] = found.inputs[-1] / found.outputs[0]
    assert gains["clustered"] > 1.09 and gains["gaussian"] < 1.09


def test_gyro_reaches_what_the_hidden_order_of_the_outputs_keeps():
    generator = torch.Generator().manual_seed(0)
    weight = clustered((128, 64), 16)
    torch.randn(8, 64, generator=generator), torch.randn(128, 64, generator=generator)
    hidden = torch.empty_like(weight)
    hidden[torch.randperm(128, generator=generator)] = weight  # as it was before its rows were scattered
    found = gyro(weight.abs(), HiNM(16))
    assert found.outputs[-1] > 0.97 * float(retained(hidden.abs(), HiNM(16)).sum())


def test_permuting_and_back_leaves_the_product_unchanged():
    weight, structure = WEIGHTS["clustered"]
    found = gyro(weight.abs(), structure)
    pruned = weight * found.mask(structure, weight.abs())
    packed = found.pack(structure, pruned)
    assert torch.equal(structure.unpack(packed), pruned[found.rows])
    x = gaussian((7, 64), 3)
    y = structure.spmm_gather(packed)(x)
    torch.testing.assert_close(y, (x @ pruned.T)[:, found.rows])
    torch.testing.assert_close(found.restore(y), x @ pruned.T)


def test_inside_an_mlp_the_order_of_the_outputs_is_free():
    """gate and up share an order of their outputs, which is that of the inputs of down: nothing is left to undo."""
    gate, up, down = (gaussian(shape, seed).double() for seed, shape in enumerate([(64, 32), (64, 32), (32, 64)]))
    rows = gyro(gate.abs() + up.abs(), HiNM(16), rounds=4).rows
    mlp = lambda gate, up, down, x: (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    x = gaussian((5, 32), 4).double()
    torch.testing.assert_close(mlp(gate[rows], up[rows], down[:, rows], x), mlp(gate, up, down, x))


def test_gyro_is_the_same_for_the_same_generator_and_does_nothing_in_no_rounds():
    weight, structure = WEIGHTS["clustered"]
    first, again = (gyro(weight.abs(), structure, torch.Generator().manual_seed(5), rounds=3) for _ in range(2))
    assert torch.equal(first.rows, again.rows) and torch.equal(first.order, again.order)
    still = gyro(weight.abs(), structure, rounds=0)
    assert torch.equal(still.mask(structure, weight.abs()), structure.mask(weight.abs()))
    assert len(still.outputs) == len(still.inputs) == 1


@pytest.mark.parametrize("scores, structure, rounds, message", [
    (-torch.ones(32, 8), HiNM(), 1, "scores must be at least 0, got -1"),
    (torch.ones(33, 8), HiNM(), 1, "needs a shape whose out is a multiple of 32"),
    (torch.ones(32, 8), NM(), 1, "structure must be a HiNM, got NM"),
    (torch.ones(32, 8), HiNM(), -1, "rounds must be an integer of at least 0, got -1"),
    (torch.full((32, 8), torch.nan), HiNM(), 1, "scores must be finite"),
])
def test_bad_input(scores, structure, rounds, message):
    with pytest.raises(ValueError, match=message):
        gyro(scores, structure, rounds=rounds)


def test_assignment_and_clusters_by_hand():
    assert assign(torch.tensor([[1.0, 2.0], [5.0, 9.0]]))[1].tolist() == [0, 1]  # 1 + 9, not 2 + 5
    scores = torch.tensor([[0.0], [9.0], [0.1], [9.1]])
    groups = cluster(scores, torch.tensor([[0, 1], [2, 3]]))
    assert groups.shape == (2, 2) and sorted(groups.flatten().tolist()) == [0, 1, 2, 3]
