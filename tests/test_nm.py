"""N:M along either axis: both codes, the order of the stored weights, and the fast paths against slow ones."""

import pytest
import torch

from sparsesurvey import figures, structures
from sparsesurvey.packing import in_cache, words
from sparsesurvey.structure import Pattern, stored_bytes
from sparsesurvey.structures import NM
from sparsesurvey.structures.nm import PackedNM

OUT = [NM(2, 4, "out"), NM(1, 4, "out"), NM(2, 8, "out"), NM(4, 8, "out"), NM(3, 5, "out"), NM(1, 64, "out")]


def weight_of(structure: NM, rows: int = 15, cols: int = 24, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A member that is not square: ``rows`` by ``cols`` tiles of size one in the other axis."""
    shape = (structure.m * 3, cols) if structure.across else (rows, structure.m * 3)
    return structure.project(torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype))


# ---- what is told by positions, what by a bitmap


@pytest.mark.parametrize("n, m, positions, bitmap", [(2, 8, 6, 8), (4, 8, 12, 8), (8, 16, 32, 16), (1, 4, 2, 4), (2, 4, 4, 4)])
def test_the_code_is_the_shorter_of_positions_and_bitmap(n, m, positions, bitmap):
    """Catalogue section 3.2: positions where n log2(m) is at most m."""
    for structure in NM(n, m), NM(n, m, "out"):
        assert n * (m.bit_length() - 1) == positions and m == bitmap
        assert structure.code_bits == min(positions, bitmap)
        assert bool(structure.position_bits) == (positions <= bitmap)


def test_a_bitmap_by_hand():
    packed = NM(4, 8).pack(torch.tensor([[0.0, 1.0, 2.0, 0.0, 0.0, 3.0, 0.0, 4.0]]))
    assert packed.values.tolist() == [[[1, 2, 3, 4]]]
    assert [f"{byte:08b}" for byte in packed.index[0].tolist()] == ["10100110"]  # input 0 from the right


def test_positions_of_three_bits_by_hand():
    packed = NM(2, 8).pack(torch.tensor([[0.0, 0, 0, 1, 0, 0, 2, 0, 3, 0, 0, 0, 0, 0, 0, 4]]))
    assert packed.values.tolist() == [[[1, 2], [3, 4]]]
    assert [f"{byte:08b}" for byte in packed.index[0].tolist()] == ["00110011", "00001110"]  # 7, 0 | 6, 3 from the right


@pytest.mark.parametrize("structure", [NM(n, m) for m in (1, 2, 3, 4, 5, 6, 8, 12, 16, 32, 64) for n in {1, m // 2 or 1, m}],
                         ids=str)
@pytest.mark.parametrize("groups", [1, 3, 8])
def test_every_code_returns_and_has_the_bytes_that_it_costs(structure, groups):
    """The table of bytes, the search for each place, rows that end inside a byte, groups that are not full."""
    draw = torch.Generator().manual_seed(structure.n)
    for full in (True, False):
        weight = structure.project(torch.randn(7, structure.m * groups, generator=draw))
        weight = weight if full else weight * (torch.rand(weight.shape, generator=draw) > 0.5)
        for item, matrix in ((structure, weight), (NM(structure.n, structure.m, "out"), weight.T)):
            packed = item.pack(matrix)
            assert torch.equal(item.unpack(packed), matrix)
            assert stored_bytes(packed) == item.cost(matrix.shape, 1, 4).weight_bytes


def test_pack_fills_groups_in_any_part_of_a_large_weight(monkeypatch):
    """Parts that fit a cache are packed one by one: the same as all at once, where only one group has a zero too many."""
    weight = NM(2, 4).project(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
    weight[40, 8:12] = 0
    whole = NM(2, 4).pack(weight)
    monkeypatch.setattr(f"{in_cache.__module__}.CACHED", 3 * 64)
    assert len(list(in_cache(weight))) == 22
    parts = NM(2, 4).pack(weight)
    assert all(torch.equal(a, b) for a, b in zip(whole[:2], parts[:2]))
    scores = weight.abs()
    assert torch.equal(NM(2, 4).mask(scores), NM(2, 4).mask(scores.clone()))
    weight[40, 8:12] = 1
    with pytest.raises(ValueError, match="^weight is not 2:4: apply a mask"):
        NM(2, 4).pack(weight)


def test_words_of_memory_that_is_not_aligned():
    data = torch.arange(17, dtype=torch.uint8)[1:]
    assert words(data, torch.int64).tolist() == [int.from_bytes(bytes(range(1 + 8 * i, 9 + 8 * i)), "little") for i in (0, 1)]
    assert words(words(data, torch.int32), torch.uint8).tolist() == data.tolist()


# ---- which axis


def test_groups_along_the_outputs_by_hand():
    scores = torch.tensor([[5.0, 1.0, 0.0],
                           [4.0, 2.0, 0.0],
                           [3.0, 3.0, 7.0],
                           [2.0, 4.0, 0.0]])
    structure = NM(2, 4, "out")
    mask = structure.mask(scores)
    assert mask.int().tolist() == [[1, 0, 1], [1, 0, 0], [0, 1, 1], [0, 1, 0]]
    assert structure.holds(mask)
    with pytest.raises(ValueError, match="2:4 needs a shape whose in is a multiple of 4"):
        NM(2, 4).holds(mask)
    packed = structure.pack(scores * mask)
    assert packed.values.tolist() == [[[5, 4]], [[3, 4]], [[0, 7]]]  # one input after the other
    assert [f"{byte:04b}" for byte in packed.index.flatten().tolist()] == ["0100", "1110", "1000"]


@pytest.mark.parametrize("structure", OUT, ids=str)
def test_the_out_axis_is_the_in_axis_of_the_transpose(structure):
    inner = NM(structure.n, structure.m)
    weight = weight_of(structure)
    assert torch.equal(structure.mask(weight.abs()), inner.mask(weight.T.abs()).T)
    assert structure.mask(weight.abs()).is_contiguous()
    mine, other = structure.pack(weight), inner.pack(weight.T)
    assert torch.equal(mine.values, other.values) and torch.equal(mine.index, other.index)
    assert mine.shape == tuple(weight.shape) and other.shape == tuple(weight.T.shape)
    assert structure.index_bits(weight.shape) == inner.index_bits(weight.T.shape)
    assert structure.holds(weight != 0) and inner.holds(weight.T != 0)


@pytest.mark.parametrize("structure", [*OUT, NM(2, 4), NM(3, 5)], ids=str)
def test_kernels_of_either_axis(structure):
    """On a weight that is not square, against float64: rows of W and of its transpose cannot be mistaken."""
    weight = weight_of(structure, dtype=torch.float64)
    packed = structure.pack(weight)
    draw = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(6, size, generator=draw, dtype=torch.float64) for size in reversed(weight.shape))
    want = {"spmm": x @ weight.T, "spmmt": dy @ weight, "sddmm": dy.T @ x * (weight != 0)}
    for product, inputs in (("spmm", (x,)), ("spmmt", (dy,)), ("sddmm", (dy, x))):
        for name, make in structure.kernels(product).items():
            if name not in ("reference", "torch_csr", "tiled_csr", "scipy_csr"):
                continue
            got = make(packed)(*inputs)
            got = structure.unpack(packed._replace(values=got)) if product == "sddmm" else got
            torch.testing.assert_close(got, want[product], rtol=0, atol=1e-12, msg=f"{product}_{name}")


def test_sparse_tensor_cores_help_the_product_that_sums_over_the_groups():
    assert NM(2, 4).facts().arithmetic == 0.5
    facts = NM(2, 4, "out").facts()
    assert facts.arithmetic == 1.0 and "input gradient" in facts.hardware
    assert NM(4, 8, "out").facts().verdict == NM(4, 8).facts().verdict == "no tensor-core path"
    assert NM(4, 4, "out").facts().arithmetic == 1.0


@pytest.mark.parametrize("axis", ["rows", "IN", "", None, 0, ["in"]])
def test_the_axis_is_in_or_out(axis):
    with pytest.raises(ValueError, match="^axis must be 'in' or 'out'"):
        NM(2, 4, axis)


def test_both_axes_are_one_family():
    assert str(NM(2, 4, "out")) == "2:4 out" and NM(2, 4, "out") != NM(2, 4)
    assert figures.family("2:4 out") == figures.family("2:4") == "N:M"
    assert figures.family("2:4+2:8") == "TASD" and figures.family("64:2:8") == "V:N:M"


@pytest.mark.parametrize("values, index, what", [
    (torch.ones(3, 1, 2), torch.full((3, 1), 0b0100, dtype=torch.uint8), None),
    (torch.ones(3, 1, 2), torch.zeros(3, 1, dtype=torch.uint8), "index must rise"),
    (torch.ones(4, 1, 2), torch.full((3, 1), 0b0100, dtype=torch.uint8), "values must be"),
    (torch.ones(3, 1, 2), torch.full((4, 1), 0b0100, dtype=torch.uint8), "index must be"),
])
def test_a_corrupt_operand_along_the_outputs(values, index, what):
    packed = PackedNM(values, index, (4, 3))
    if what is None:
        assert NM(2, 4, "out").unpack(packed).tolist() == [[1, 1, 1], [1, 1, 1], [0, 0, 0], [0, 0, 0]]
        return
    with pytest.raises(ValueError, match=f"^packed.{what}"):
        NM(2, 4, "out").unpack(packed)


# ---- larger groups


def test_larger_groups_keep_more_at_the_same_density():
    """Lesson (i) of the catalogue's section 4.1; the values are in test_structures.KEPT."""
    energy = torch.randn(512, 512, generator=torch.Generator().manual_seed(0)).square()
    for chain in ([NM(2, 4), NM(4, 8), NM(8, 16), NM(16, 32), NM(32, 64)], [NM(1, 4), NM(2, 8), NM(4, 16), NM(8, 32)]):
        kept = [float(energy[structure.mask(energy)].sum()) for structure in chain]
        assert kept == sorted(kept) and len(set(kept)) == len(kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_ties_go_to_the_first_in_every_dtype(dtype):
    assert NM(2, 4).mask(torch.ones(2, 8, dtype=dtype)).int().tolist() == [[1, 1, 0, 0, 1, 1, 0, 0]] * 2
    assert NM(2, 4, "out").mask(torch.ones(4, 3, dtype=dtype)).int().tolist() == [[1] * 3, [1] * 3, [0] * 3, [0] * 3]
    assert NM(1, 4).mask(torch.tensor([[-0.0, 0.0, -1.0, 0.0]], dtype=dtype)).int().tolist() == [[1, 0, 0, 0]]


def test_a_negative_zero_is_no_weight():
    packed = NM(1, 4).pack(torch.tensor([[-0.0, 0.0, 2.0, -0.0]]))
    assert packed.values.tolist() == [[[2.0]]]


def test_other_patterns_find_the_axis_too():
    assert all(isinstance(item, Pattern) for item in structures.NM.variants())
    assert {item.axis for item in NM.variants()} == {"in", "out"}
