"""Double-pruned N:M: what BDWP and SLoPe say of themselves, as properties."""

import pytest
import torch

from sparsesurvey.structure import stored_bytes
from sparsesurvey.structures import NM, DoublePruned, Transposable
from sparsesurvey.structures.double_pruned import extra_zeros
from sparsesurvey.structures.transposable import row_then_column

BOTH = pytest.mark.parametrize("nested", [False, True], ids=["BDWP", "SLoPe"])


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- by hand


def test_a_weight_of_four_by_four():
    weight = torch.tensor([[1.0, 8, 0, 9], [2, 7, 0, 3], [3, 6, 5, 4], [4, 5, 1, 9]])
    forward = [[0, 8, 0, 9], [0, 7, 0, 3], [0, 6, 5, 0], [0, 5, 0, 9]]  # two of each row
    for nested, backward in (
        (False, [[0, 8, 0, 9], [0, 7, 0, 0], [3, 0, 5, 0], [4, 0, 1, 9]]),  # two of each column of the whole weight
        (True, [[0, 8, 0, 9], [0, 7, 0, 0], [0, 0, 5, 0], [0, 0, 0, 9]]),  # of the forward weight: none of the first
    ):
        structure = DoublePruned(2, 4, nested)
        packed = structure.pack(weight)
        assert structure.forward_weight(packed).tolist() == forward
        assert structure.backward_weight(packed).tolist() == backward
    union = DoublePruned(2, 4).project(weight)
    assert union.tolist() == [[0, 8, 0, 9], [0, 7, 0, 3], [3, 6, 5, 0], [4, 5, 1, 9]]
    assert DoublePruned(2, 4, True).project(weight).tolist() == forward


@BOTH
def test_bytes_are_those_of_two_n_of_m_operands(nested):
    structure, weight = DoublePruned(2, 4, nested), gaussian(64, 128).bfloat16()
    assert stored_bytes(structure.pack(weight)) == 2 * 64 * 128 * (8 + 1) // 8
    assert structure.nnz((64, 128)) == 64 * 128 // 2  # of either: what one product multiplies


# ---- what the papers say


@pytest.mark.parametrize("n, m, share", [(2, 8, 0.5), (2, 4, 2 / 3), (1, 4, 0.5), (4, 4, 1.0)])
def test_share_of_the_arithmetic_of_a_training_step(n, m, share):
    """Two of the three products of a layer are n:m, the gradient of W is dense (Fang et al. 2023; catalogue 4.7)."""
    structure = DoublePruned(n, m)
    assert structure.training_arithmetic == pytest.approx(share)
    sparse, dense = structure.cost((64, 64), 1).flops, 2 * 64 * 64
    assert (2 * sparse + dense) / (3 * dense) == pytest.approx(share)


@pytest.mark.parametrize("n, m, zeros", [
    (1, 2, 0.125), (2, 4, 0.09375), (2, 8, 0.0584), (4, 8, 0.0684), (8, 16, 0.0491),
])
def test_the_second_pruning_drops_as_many_as_the_formula_says(n, m, zeros):
    """Catalogue 4.2, SLoPe's expectation, on a Gaussian weight: its masks are as good as random."""
    assert extra_zeros(n, m) == pytest.approx(zeros, abs=5e-5)
    structure, weight = DoublePruned(n, m, nested=True), gaussian(1024, 1024)
    packed = structure.pack(weight)
    forward, backward = structure.forward_weight(packed) != 0, structure.backward_weight(packed) != 0
    assert float((forward & ~backward).float().mean()) == pytest.approx(zeros, abs=1e-3)
    assert not (backward & ~forward).any()
    short = row_then_column(weight.abs().unflatten(0, (-1, m)).unflatten(2, (-1, m)).movedim(2, 1).flatten(0, 1), n)
    assert float(short.float().mean()) == pytest.approx(n / m - zeros, abs=1e-3), "Bi-NM is the same"


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))


@pytest.mark.parametrize("n, m, energy, forward", [(2, 4, 0.868, 0.91), (2, 8, 0.665, 0.83)])
def test_the_input_gradient_points_nearly_the_right_way(n, m, energy, forward):
    """Of a Gaussian layer with dy at random, cosines above .8 even for 2:8 (catalogue, L19): with the gradient through
    the dense weight, the root of the energy kept of it, and with the one through the forward weight, which is true.
    """
    structure, weight = DoublePruned(n, m), gaussian(512, 512)
    packed, dy = structure.pack(weight), gaussian(256, 512, seed=1)
    dx = structure.spmmt_reference(packed)(dy)
    assert cosine(dx, dy @ weight) == pytest.approx(energy**0.5, abs=0.01)
    assert cosine(dx, dy @ structure.forward_weight(packed)) == pytest.approx(forward, abs=0.01)


def test_pruned_apart_keeps_more_than_pruned_together():
    """Each direction of BDWP keeps what N:M keeps; one mask for both, transposable, less; SLoPe's backward, least."""
    weight = gaussian(512, 512)
    apart, twice, together = DoublePruned(2, 4), DoublePruned(2, 4, True), Transposable(2, 4)
    size = lambda matrix: float(matrix.abs().sum() / weight.abs().sum())
    backward = size(apart.backward_weight(apart.pack(weight)))
    assert size(apart.forward_weight(apart.pack(weight))) == pytest.approx(backward, abs=0.01)
    assert backward > size(together.project(weight)) > size(twice.backward_weight(twice.pack(weight)))


# ---- members and places


@BOTH
@pytest.mark.parametrize("kind", ["normal", "ties", "sparse", "zero"])
def test_pruning_again_changes_nothing(nested, kind):
    weight = gaussian(32, 48)
    sparse = weight * (gaussian(32, 48, seed=1) > 1)
    weight = {"normal": weight, "ties": weight.round(), "sparse": sparse, "zero": 0 * weight}[kind]
    for n, m in ((2, 4), (1, 4), (3, 8), (4, 4)):
        structure = DoublePruned(n, m, nested)
        packed, again = structure.pack(weight), structure.pack(structure.project(weight))
        for view in structure.unpack, structure.forward_weight, structure.backward_weight:
            assert torch.equal(view(packed), view(again))
        assert NM(n, m).holds(structure.forward_weight(packed) != 0)
        assert NM(n, m, "out").holds(structure.backward_weight(packed) != 0)


@BOTH
def test_training_keeps_both_copies_of_a_weight_equal(nested):
    """A step along the gradient of the stored values: what was one weight in two places is one weight still."""
    structure = DoublePruned(2, 4, nested)
    packed = structure.pack(gaussian(16, 24))
    both = (structure.forward_weight(packed) != 0) & (structure.backward_weight(packed) != 0)
    before = structure.forward_weight(packed) != 0, structure.backward_weight(packed) != 0
    for kernel in "reference", "torch_csr":
        gradient = structure.kernels("sddmm")[kernel](packed)(gaussian(5, 16, seed=1), gaussian(5, 24, seed=2))
        packed = packed._replace(values=packed.values - 0.1 * gradient)
    forward, backward = structure.forward_weight(packed), structure.backward_weight(packed)
    torch.testing.assert_close(forward[both], backward[both])
    assert torch.equal(forward != 0, before[0]) and torch.equal(backward != 0, before[1]), "nothing else came to life"


@pytest.mark.parametrize("nested", [0, 1, None, "yes"])
def test_nested_is_yes_or_no(nested):
    with pytest.raises(ValueError, match="^nested must be True .SLoPe. or False .BDWP., got"):
        DoublePruned(2, 4, nested)


def test_a_corrupt_code_is_named():
    packed = DoublePruned(4, 8).pack(gaussian(16, 16))
    for name in "forward_index", "backward_index":
        bad = packed._replace(**{name: torch.zeros_like(getattr(packed, name))})
        with pytest.raises(ValueError, match=f"^packed.{name} must"):
            DoublePruned(4, 8).unpack(bad)
