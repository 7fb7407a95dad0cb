"""Low rank and low rank + sparse: the closest B A, and what alternating projections find beside it."""

import pytest
import torch

from sparsesurvey import benchmark, pruning
from sparsesurvey.structure import PRODUCTS, stored_bytes
from sparsesurvey.structures import NM, Block, LowRank, LowRankSparse, Monarch, Unstructured

SUM = LowRankSparse(0.125, Unstructured(0.05))


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def energy(weight, structure):
    return pruning.captured(weight, structure.project(weight), 1.0).energy


def spiked(size=128, rank=8, spikes=0.05):
    """A matrix of a low rank and one of a few large entries: weights, and where the entries are."""
    low = random(size, rank, seed=1) @ random(rank, size, seed=2) / rank**0.5
    place = random(size, size, seed=3).abs().flatten().topk(round(spikes * size * size)).indices
    sparse = torch.zeros(size * size, dtype=torch.float64)
    sparse[place] = 8 * random(len(place), seed=4).sign() + random(len(place), seed=5)
    return low, sparse.view(size, size)


# ---- low rank alone


@pytest.mark.parametrize("density, shape, rank", [(0.25, (64, 64), 8), (0.25, (192, 64), 12), (0.125, (256, 256), 16),
                                                  (0.5, (4096, 14336), 1593), (0.01, (8, 8), 1), (1, (4, 4), 2)])
def test_rank_is_what_the_density_pays_for(density, shape, rank):
    assert LowRank(density).rank(shape) == rank
    assert LowRank(density).nnz(shape) == rank * sum(shape)


def test_project_keeps_the_largest_singular_values():
    weight = random(20, 30)
    singular = torch.linalg.svdvals(weight)
    near = LowRank(0.5).project(weight)  # rank 6
    torch.testing.assert_close(torch.linalg.svdvals(near)[:6], singular[:6])
    torch.testing.assert_close((weight - near).square().sum(), singular[6:].square().sum())


def test_factors_have_equal_norms_and_are_b_then_a():
    packed = LowRank(0.25).pack(random(16, 48))
    second, first = LowRank(0.25).factors(packed)
    assert second.shape == (16, 3) and first.shape == (3, 48)
    torch.testing.assert_close(second.norm(dim=0), first.norm(dim=1))
    assert torch.equal(packed.values, torch.cat([second.flatten(), first.flatten()]))


def test_no_other_factors_are_closer():
    structure, weight = LowRank(0.25), random(8, 8)
    packed = structure.pack(weight)
    loss = (weight - structure.unpack(packed)).square().sum()
    for seed in range(200):
        for scale in 1e-3, 0.1, 1.0:
            other = packed._replace(values=packed.values + scale * random(packed.values.numel(), seed=seed))
            assert (weight - structure.unpack(other)).square().sum() > loss


# ---- low rank + sparse


def test_a_single_spike_is_found_and_what_it_replaces_is_taken_off():
    weight = torch.outer(torch.tensor([1.0, 2, 1, 1]), torch.tensor([1.0, 1, 2, 1])).double()
    weight[3, 0] = 9
    structure = LowRankSparse(0.5, Unstructured(1 / 16))
    packed = structure.pack(weight)
    assert packed.values.numel() == 4 + 4 + 1 and packed.inner.columns.tolist() == [0]
    assert packed.values[-1] == pytest.approx(8, abs=1e-3)
    torch.testing.assert_close(structure.unpack(packed), weight, atol=1e-3, rtol=0)


def test_low_rank_and_spikes_are_told_apart():
    low, sparse = spiked()
    packed = SUM.pack(low + sparse)
    inner = SUM.inner.unpack(SUM.parts(packed)[1])
    assert ((inner != 0) == (sparse != 0)).double().mean() > 0.999
    near = SUM.outer.unpack(SUM.parts(packed)[0])
    assert (near - low).norm() < 0.02 * low.norm()


def test_on_spikes_and_low_rank_the_sum_beats_either_at_equal_storage():
    low, sparse = spiked()
    weight = low + sparse
    alone = LowRank(0.175)
    assert pruning.density(alone, (128, 128)) == pytest.approx(pruning.density(SUM, (128, 128)), rel=0.02)
    assert energy(weight, SUM) > 0.999
    assert energy(weight, alone) < 0.6
    assert pruning.best_kept(weight, 0.175).energy < 0.95


def test_on_a_gaussian_it_lies_between_the_two():
    weight = pruning.gaussian((256, 256))
    kept = energy(weight, SUM)
    assert kept == pytest.approx(0.47, abs=0.01)
    assert energy(weight, LowRank(0.175)) == pytest.approx(0.278, abs=0.01)
    assert pruning.best_kept(weight, 0.175).energy == pytest.approx(0.605, abs=0.01)


@pytest.mark.parametrize("weight", [pruning.gaussian((64, 64)).double(), sum(spiked()), pruning.channel_scaled((64, 96)).double()],
                         ids=["gaussian", "spiked", "channel-scaled"])
def test_no_round_is_further_than_the_one_before(weight):
    losses = []
    for count in range(1, 9):
        low, sparse = SUM.rounds(weight, count)
        losses.append(float((weight - SUM.outer.unpack(low) - sparse).square().sum()))
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in zip(losses, losses[1:]))
    assert losses[-1] < losses[0]
    assert losses[0] <= (weight - SUM.inner.project(weight)).square().sum(), "the first S alone"


def test_the_greedy_is_near_the_best_of_small_matrices():
    """Rank 1 and 2 of 16 entries: on average 83 % of the energy, where trying all 120 places gives 88 %."""
    structure = LowRankSparse(0.5, Unstructured(2 / 16))
    kept, best = [], []
    for seed in range(12):
        weight = random(4, 4, seed=seed)
        kept.append(energy(weight, structure))
        best.append(1 - structure.smallest_loss(weight) / float(weight.square().sum()))
        assert kept[-1] <= best[-1] + 1e-9
    assert sum(kept) / 12 == pytest.approx(0.830, abs=0.002) and sum(best) / 12 == pytest.approx(0.884, abs=0.002)


@pytest.mark.parametrize("inner", [NM(2, 4), Block(4, 4, 0.25), Unstructured(0.1)], ids=str)
def test_any_pattern_can_be_the_sparse_part(inner):
    structure = LowRankSparse(0.25, inner)
    packed = structure.pack(random(16, 32))
    low, sparse = structure.parts(packed)
    assert inner.holds(inner.unpack(sparse) != 0)
    assert packed.values.numel() == structure.nnz((16, 32)) == 3 * 48 + inner.nnz((16, 32))
    torch.testing.assert_close(structure.unpack(packed), structure.outer.unpack(low) + inner.unpack(sparse))
    assert stored_bytes(packed) == structure.cost((16, 32), 1, 8).weight_bytes


def test_scaled_weights_have_scaled_projections():
    """``FactoredLinear`` relies on it."""
    weight = random(32, 32)
    for structure in SUM, LowRank(0.25), LowRankSparse(0.1, NM(2, 4)):
        torch.testing.assert_close(structure.project(4 * weight), 4 * structure.project(weight))


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("structure", [SUM, LowRank(0.25), Monarch(4, 3)], ids=str)
def test_benchmarks_hold_the_product_against_what_is_packed(structure, product, tmp_path):
    """Factors are not unique: those of another packing, in float64 say, have another gradient."""
    found = benchmark.products(structure, (64, 64), 8, "low_rank", product=product, record=str(tmp_path), rounds=3, min_seconds=1e-4)
    errors = [row.value for row in found.rows if row.metric == "relative error"]
    assert errors and max(errors) < 1e-5


def test_an_inner_operand_of_another_shape_is_refused():
    packed, other = SUM.pack(random(32, 32)), SUM.pack(random(32, 64))
    with pytest.raises(ValueError, match="packed.inner must hold 51 values, got 102"):
        SUM.unpack(packed._replace(inner=other.inner))
    block = LowRankSparse(0.25, Block(4, 4, 0.25))
    packed, other = block.pack(random(16, 64)), block.pack(random(32, 32))
    with pytest.raises(ValueError, match="packed.inner must be"):
        block.unpack(packed._replace(inner=other.inner))


@pytest.mark.parametrize("inner", [None, 0.05, "2:4", Unstructured, LowRank(0.1)])
def test_inner_must_be_a_pattern(inner):
    with pytest.raises(ValueError, match="^inner must be a pattern"):
        LowRankSparse(0.1, inner)
