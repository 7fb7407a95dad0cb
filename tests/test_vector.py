"""Vector-wise N:M: cases to verify by hand, the best choice by trying all, and what the paper says of it."""

from itertools import combinations, product

import pytest
import torch

from sparsesurvey.pruning import channel_scaled, gaussian, kept
from sparsesurvey.structure import stored_bytes
from sparsesurvey.structures import NM, VNM, Block, VectorNM
from sparsesurvey.structures.vector import arithmetic_intensity


def boolean(rows: list[str]) -> torch.Tensor:
    return torch.tensor([[letter == "x" for letter in row] for row in rows])


@pytest.mark.parametrize("structure, rows, holds", [
    (VectorNM(2, 2, 4), ["xx..", "xx.."], True),
    (VectorNM(2, 2, 4), ["x...", ".x.."], True),  # the union of the two outputs counts
    (VectorNM(2, 2, 4), ["xx..", "..x."], False),  # 2:4 in each output, but three inputs in the panel
    (VectorNM(2, 1, 4), ["x....x..", "x...x..."], False),
    (VectorNM(2, 1, 4), ["x....x..", "x....x.."], True),
    (VectorNM(1, 2, 4), ["xx..", "..xx"], True),  # panels of one output are plain 2:4
])
def test_holds_by_hand(structure, rows, holds):
    assert structure.holds(boolean(rows)) is holds


def test_mask_is_the_best_of_all_choices():
    structure = VectorNM(3, 2, 5)
    scores = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    best = 0.0
    for panel, group in product(range(2), range(2)):
        block = scores[3 * panel:3 * panel + 3, 5 * group:5 * group + 5]
        best += max(float(block[:, list(pair)].sum()) for pair in combinations(range(5), 2))
    assert float(scores[structure.mask(scores)].sum()) == pytest.approx(best)


@pytest.mark.parametrize("structure, magnitude, energy", [
    (VectorNM(32, 16, 32), 0.552, 0.590), (Block(8, 1, 0.5), 0.601, 0.693), (Block(32, 1, 0.5), 0.550, 0.598),
    (Block(8, 1, 0.25), 0.333, 0.422), (Block(32, 1, 0.25), 0.291, 0.333),
], ids=str)
def test_kept_of_gaussian_weights(structure, magnitude, energy):
    """The catalogue's section 4.1, 512 x 512."""
    weight = gaussian((512, 512))
    assert kept(weight, structure.mask(weight.abs()))[1:] == pytest.approx((magnitude, energy), abs=0.01)


def test_kept_of_channel_scaled_weights():
    """The catalogue has .698 and .855 for vectors of 32; its weights were other draws, with other channel scales."""
    shares = [kept(weight, Block(32, 1, 0.5).mask(weight.abs())) for weight in
              (channel_scaled((512, 512), seed) for seed in range(5))]
    assert sum(share.magnitude for share in shares) / 5 == pytest.approx(0.698, abs=0.02)
    assert sum(share.energy for share in shares) / 5 == pytest.approx(0.855, abs=0.02)


def test_tying_the_outputs_costs_what_the_catalogue_says():
    """Energy kept at half density: 16:32 .92, tied over 32 outputs .59; freer choices keep more."""
    weight = gaussian((512, 512))
    energy = [kept(weight, structure.mask(weight.abs())).energy for structure in
              (VectorNM(32, 16, 32), VectorNM(8, 16, 32), VectorNM(1, 16, 32), NM(16, 32))]
    assert energy[0] < energy[1] < energy[2] == energy[3] == pytest.approx(0.92, abs=0.01)


def test_special_cases_are_other_structures():
    weight = gaussian((64, 64))
    assert torch.equal(VectorNM(1, 2, 8).mask(weight), NM(2, 8).mask(weight))
    assert torch.equal(VectorNM(16, 4, 8).mask(weight), VNM(16, 4, 8).mask(weight))  # all four columns of the tile
    tall = VectorNM(16, 4, 8).mask(weight)
    assert Block(16, 1, 0.5).holds(tall), "vector-wise N:M is a V x 1 structure whose panels keep equally many"
    assert not VectorNM(16, 4, 8).holds(Block(16, 1, 0.5).mask(weight))


def test_product_by_the_papers_reference():
    """``for u in range(w): C[:, j] += A[:, D[u, j // L]] * B[u, j]``, with absolute indices, in float64."""
    structure = VectorNM(4, 2, 8)
    weight = structure.project(gaussian((12, 24)).double())
    a = torch.randn(5, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    packed = structure.pack(weight)
    b, d = packed.values.T, structure.places(packed).T  # [w, n] and [w, n / L]
    c = torch.zeros(5, 12, dtype=torch.float64)
    for u, j in product(range(6), range(12)):
        c[:, j] += a[:, d[u, j // 4]] * b[u, j]
    torch.testing.assert_close(structure.spmm_gather(packed)(a), c)
    torch.testing.assert_close(a @ weight.T, c)


def test_bytes_by_hand():
    """[4096 x 1024] at 16:32 in 16 bits: half the weights of 2 bytes, and 128 panels with a byte for each of 512 inputs."""
    structure = VectorNM(32, 16, 32)
    packed = structure.pack(structure.project(gaussian((4096, 1024)).bfloat16()))
    assert stored_bytes(packed) == 4096 * 1024 // 2 * 2 + 128 * 512


def test_a_wrong_index_is_refused():
    structure = VectorNM(2, 2, 4)
    packed = structure.pack(structure.project(gaussian((4, 8))))
    assert packed.index.shape == (2, 4)
    for wrong in ([0, 0, 1, 2], [1, 0, 1, 2], [0, 4, 1, 2]):  # twice the same, falling, outside the group
        index = packed.index.clone()
        index[1] = torch.tensor(wrong)
        with pytest.raises(ValueError, match="packed.index must rise strictly and stay from 0 to 3"):
            structure.unpack(packed._replace(index=index))
    with pytest.raises(ValueError, match="packed.values must be floating point"):
        structure.unpack(packed._replace(values=packed.values[:2]))


def test_arithmetic_intensity():
    """2 Ms Ns w / (Ms Ks + Ns w + index); loading only the inputs that are needed raises it."""
    assert arithmetic_intensity(64, 64, 32, 16, used=32) == 2 * 64 * 64 * 16 / (4 * (64 * 32 + 64 * 16) + 16 * 2)
    sparse = [arithmetic_intensity(64, 64, 256, 32, used) for used in (256, 64)]
    assert sparse[0] < sparse[1]
    with pytest.raises(ValueError, match="^used must be an integer from 1 to 32"):
        arithmetic_intensity(64, 64, 32, 16, used=33)
