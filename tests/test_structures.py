"""What each structure is in particular: cases to verify by hand, and what the catalogue says that a mask keeps."""

import sys
from contextlib import suppress
from itertools import combinations
from math import comb

import pytest
import torch

from sparsesurvey.packing import bits_for, compress_rows, expand_rows, pack_bits, tiles, top, unpack_bits, untile
from sparsesurvey.structure import Cost, Pattern, Structure, Unavailable, stored_bytes
from sparsesurvey.structures import NM, VNM, Block, Dense, Unstructured, all_structures
from sparsesurvey.structures.nm import PackedNM
from sparsesurvey.structures.unstructured import PackedCSR, scipy_sparse

# Share of |w| and of w^2 that the mask by magnitude keeps of 512 x 512 weights drawn from N(0, 1): facts of the
# distribution, from the catalogue's section 4.1.
KEPT = [
    (Unstructured(0.5), 0.796, 0.928), (Unstructured(0.25), 0.516, 0.723),
    (NM(2, 4), 0.744, 0.868), (NM(1, 4), 0.459, 0.618),
    (NM(4, 8), 0.768, 0.897), (NM(2, 8), 0.484, 0.665),
    (NM(8, 16), 0.782, 0.912), (NM(4, 16), 0.499, 0.693),
    (NM(16, 32), 0.789, 0.920), (NM(8, 32), 0.507, 0.708),
    (Block(8, 1, 0.5), 0.601, 0.693), (Block(8, 1, 0.25), 0.333, 0.422),
    (Block(32, 1, 0.5), 0.550, 0.598), (Block(32, 1, 0.25), 0.291, 0.333),
    (Block(16, 16, 0.5), 0.516, 0.534), (Block(16, 16, 0.25), 0.264, 0.278),
    (Block(32, 32, 0.5), 0.508, 0.517), (Block(32, 32, 0.25), 0.256, 0.263),
    (Block(64, 64, 0.5), 0.503, 0.508), (Block(64, 64, 0.25), 0.253, 0.257),
    (VNM(16, 2, 8), 0.416, 0.529), (VNM(64, 2, 8), 0.395, 0.482), (VNM(128, 2, 8), 0.388, 0.468),
]


@pytest.fixture(scope="module")
def gaussian():
    return torch.randn(512, 512, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("structure, share, energy", KEPT, ids=[str(structure) for structure, *_ in KEPT])
def test_kept_of_gaussian_weights(gaussian, structure, share, energy):
    kept = structure.mask(gaussian.abs())
    assert (gaussian.abs()[kept].sum() / gaussian.abs().sum()).item() == pytest.approx(share, abs=0.01)
    assert (gaussian[kept].square().sum() / gaussian.square().sum()).item() == pytest.approx(energy, abs=0.01)


def test_column_sums_find_nearly_the_best_four_columns(gaussian):
    """VENOM's cheap choice against all C(8, 4) sets: .3949 of .3975 on these weights, and at least 97 % always."""
    scores = gaussian.abs()
    tiled = tiles(scores, 64, 8)
    best = torch.stack([tiled[..., list(four)].topk(2).values.sum((-2, -1)) for four in combinations(range(8), 4)])
    assert len(best) == comb(8, 4)
    cheap = scores[VNM(64, 2, 8).mask(scores)].sum()
    assert 0.985 < float(cheap / best.amax(0).sum()) < 1


# ---- by hand


@pytest.mark.parametrize("structure, mask, holds", [
    (NM(2, 4), [[1, 1, 0, 0, 0, 0, 1, 1]], True),
    (NM(2, 4), [[0, 1, 1, 1, 0, 0, 0, 1]], False),  # four of eight, but three of the first four
    (Unstructured(0.5), [[1, 1, 1, 1], [0, 0, 0, 0]], True),
    (Unstructured(0.5), [[1, 1, 1, 1], [0, 0, 0, 1]], False),
    (Block(2, 2, 0.5), [[1, 0, 0, 0], [0, 0, 0, 0]], True),
    (Block(2, 2, 0.5), [[1, 1, 0, 0], [1, 1, 0, 1]], False),  # both blocks
    (Block(2, 1, 0.5), [[1, 0, 1, 0], [0, 0, 1, 0]], True),
    (Block(2, 1, 0.5), [[1, 0, 1, 0], [0, 1, 0, 0]], False),  # three columns
    (VNM(2, 2, 8), [[1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1, 1]], True),
    (VNM(3, 2, 8), [[1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0, 0, 0]], False),  # 5 columns
    (VNM(2, 2, 8), [[1, 1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]], False),  # three in a row
    (VNM(1, 2, 8), [[1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0, 0, 0]], True),
    (Dense(), [[1, 0, 1]], True),
])
def test_holds_by_hand(structure, mask, holds):
    assert structure.holds(torch.tensor(mask, dtype=torch.bool)) is holds


def test_unstructured_breaks_ties_in_reading_order():
    assert Unstructured(0.5).mask(torch.ones(2, 3)).tolist() == [[True, True, True], [False, False, False]]


def test_unstructured_rounds_to_whole_weights():
    assert [Unstructured(density).nnz((3, 3)) for density in (0.01, 0.1, 0.5, 1.0)] == [0, 1, 4, 9]


@pytest.mark.parametrize("inn, dtype", [(32768, torch.int16), (32769, torch.int32)])
def test_columns_are_as_short_as_they_can_be(inn, dtype):
    structure = Unstructured(1 / inn)
    weight = torch.zeros(1, inn)
    weight[0, -1] = 3
    packed = structure.pack(weight)
    assert packed.columns.dtype == dtype and packed.columns.tolist() == [inn - 1]
    assert structure.index_bits((1, inn)) == 8 * dtype.itemsize + 2 * 32
    assert torch.equal(structure.unpack(packed), weight)


def test_the_widest_tile_of_vnm_has_256_columns():
    structure = VNM(2, 2, 256)
    weight = torch.zeros(2, 256)
    weight[:, -2:] = 3
    packed = structure.pack(weight)
    assert packed.columns.tolist() == [[[0, 1, 254, 255]]]
    assert torch.equal(structure.unpack(packed), weight)


def test_csr_transposed():
    weight = torch.tensor([[0.0, 5.0, 6.0], [7.0, 0.0, 8.0]])
    kept = weight != 0
    packed = PackedCSR(weight[kept], *compress_rows(kept), (2, 3)).transposed()
    assert packed.values.tolist() == [7, 5, 6, 8]
    assert packed.columns.tolist() == [1, 0, 0, 1]
    assert packed.row_pointers.tolist() == [0, 1, 2, 4]
    assert packed.shape == (3, 2)


@pytest.mark.parametrize("columns, pointers, what", [
    ([0, 2], [0, 1, 2], "columns must be from 0 to 1"),
    ([0, -1], [0, 1, 2], "columns must be from 0 to 1"),
    ([-32768, 32767], [0, 2, 2], "columns must be from 0 to 1"),
    ([1, 0], [0, 2, 2], "columns must rise strictly within each row"),
    ([0, 0], [0, 2, 2], "columns must rise strictly within each row"),
    ([0, 0], [0, 1, 3], "row_pointers must rise from 0 to 2"),
    ([0, 0], [1, 1, 2], "row_pointers must rise from 0 to 2"),
    ([0, 0], [0, 3, 2], "row_pointers must rise from 0 to 2"),
    ([0, 0], [0, 2], "row_pointers must be torch.int32 .3., got torch.int32 .2."),
])
def test_corrupt_csr(columns, pointers, what):
    with pytest.raises(ValueError, match=f"packed.{what}"):
        expand_rows(torch.tensor(columns, dtype=torch.int16), torch.tensor(pointers, dtype=torch.int32), 2, 2)


@pytest.mark.parametrize("structure, bits", [
    (NM(2, 4), 4), (NM(1, 4), 2), (NM(2, 8), 6), (NM(4, 8), 8), (NM(8, 16), 16), (NM(3, 5), 5), (NM(1, 64), 6),
    (NM(4, 4), 0), (NM(1, 1), 0), (NM(3, 4), 4),
])
def test_the_shorter_code_of_a_group(structure, bits):
    """Positions n * log2(m), or a bitmap of m bits: catalogue section 3.2."""
    assert structure.code_bits == bits
    inn = 8 * structure.m
    assert structure.index_bits((3, inn)) == 3 * 8 * bits
    assert structure.index_bits((3, structure.m)) == 3 * 8 * -(-bits // 8), "each row is padded to whole bytes"


def test_two_to_four_costs_nine_sixteenths_in_half_precision():
    """NVIDIA's format: 4 weights of 16 bits become 2 and 4 bits of positions, 36 of 64 bits."""
    assert NM(2, 4).cost((16, 64), tokens=1, itemsize=2).weight_bytes == 16 * 64 * 2 * 36 // 64


def test_nm_bitmap_by_hand():
    packed = NM(3, 5).pack(torch.tensor([[0.0, 1.0, 0.0, 2.0, 3.0, 4.0, 0.0, 0.0, 0.0, 5.0]]))
    assert packed.values.tolist() == [[[1, 2, 3], [4, 0, 5]]]  # a zero fills up the second group: its first zero input
    assert [f"{byte:08b}" for byte in packed.index[0].tolist()] == ["01111010", "00000010"]  # inputs from the right


@pytest.mark.parametrize("structure, index, what", [
    (NM(2, 4), 0b0000, "rise strictly and stay from 0 to 3"),
    (NM(2, 4), 0b0001, "rise strictly"),
    (NM(3, 5), 0b00011, "set 3 of the 5 bits of every group"),
    (NM(3, 5), 0b11110, "set 3 of the 5 bits of every group"),
    (NM(1, 5), 0b111, "rise strictly and stay from 0 to 4"),
])
def test_corrupt_nm_codes(structure, index, what):
    values = torch.ones(1, 1, structure.n)
    with pytest.raises(ValueError, match=f"packed.index must {what}"):
        structure.unpack(PackedNM(values, torch.tensor([[index]], dtype=torch.uint8), (1, structure.m)))


def test_block_is_rectangular_and_a_vector_is_one_wide():
    scores = torch.tensor([[1.0, 2.0, 9.0, 0.0], [1.0, 2.0, 0.0, 3.0]])
    assert Block(1, 2, 0.5).mask(scores).int().tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]  # 3, 9; 3, 3: the first 3
    assert Block(2, 1, 0.5).mask(scores).int().tolist() == [[0, 1, 1, 0], [0, 1, 1, 0]]  # 2, 4, 9, 3
    assert str(Block(2, 1, 0.5)) == "block 2x1 50%"
    assert Block(1, 1, 0.3).nnz((4, 5)) == Unstructured(0.3).nnz((4, 5))


def test_block_sums_do_not_overflow_half_precision():
    scores = torch.zeros(4, 8, dtype=torch.float16)
    scores[:, :4], scores[:, 4:] = 30000, 40000
    assert Block(4, 4, 0.5).mask(scores)[0].tolist() == [False] * 4 + [True] * 4
    assert VNM(4, 2, 8).mask(scores)[0].tolist() == [False] * 4 + [True] * 2 + [False] * 2


def test_vnm_is_nm_in_each_row_and_needs_common_columns():
    scores = torch.tensor([[9.0, 8, 7, 6, 0, 0, 0, 0], [0, 0, 0, 0, 9, 8, 7, 6]])
    assert NM(2, 8).mask(scores).int().tolist() == [[1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 0, 0]]
    assert VNM(2, 2, 8).mask(scores).int().tolist() == [[1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 0, 0]]
    scores[1, 4:] -= 5  # columns 4 to 7 become 4 3 2 1: out of the four best, which are 0 to 3
    assert VNM(2, 2, 8).mask(scores).int().tolist() == [[1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]]


def test_venom_of_four_columns_is_two_to_four():
    scores = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(VNM(64, 2, 4).mask(scores), NM(2, 4).mask(scores))


@pytest.mark.parametrize("v", [1, 2, 64])
def test_vnm_of_one_row_is_nm(v):
    scores = torch.rand(64, 64, generator=torch.Generator().manual_seed(v))
    mask = VNM(v, 2, 8).mask(scores)
    assert NM(2, 8).holds(mask)
    assert torch.equal(mask, NM(2, 8).mask(scores)) == (v == 1)


# ---- the products beyond one tile of tokens and with unbalanced rows


@pytest.mark.parametrize("structure", [Block(32, 32, 0.3), Block(16, 8, 0.3), Block(8, 1, 0.2), VNM(16, 2, 8),
                                       Unstructured(0.1), NM(1, 8)], ids=str)
@pytest.mark.parametrize("tokens", [65, 600, 1025])
def test_many_tokens_and_unbalanced_rows(structure, tokens):
    draw = torch.Generator().manual_seed(0)
    scores = torch.rand(128, 1536, generator=draw)
    scores[:32] *= 10  # the first rows keep as much as they may, the last next to nothing
    weight = torch.randn(128, 1536, generator=draw).double() * structure.mask(scores)
    packed = structure.pack(weight)
    x, dy = (torch.randn(tokens, size, generator=draw).double() for size in (1536, 128))
    stored = structure.unpack(packed._replace(values=torch.ones_like(packed.values))) != 0
    want = {"spmm": x @ weight.T, "spmmt": dy @ weight, "sddmm": dy.T @ x * stored}
    inputs = {"spmm": (x,), "spmmt": (dy,), "sddmm": (dy, x)}
    for product, expected in want.items():
        for name in {"gather", "torch_csr", "tiled_csr", "scipy_csr"} & set(structure.kernels(product)):
            got = structure.kernels(product)[name](packed)(*inputs[product])
            if product == "sddmm":
                got = structure.unpack(packed._replace(values=got))
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-9, msg=f"{product}_{name}")


# ---- the helpers


@pytest.mark.parametrize("size", [1, 2, 5, 8, 9, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_top_is_the_first_of_the_highest(size, dtype):
    scores = torch.randint(0, 4, (7, size), generator=torch.Generator().manual_seed(size)).to(dtype)
    order = scores.double().argsort(dim=-1, descending=True, stable=True)
    for keep in range(size + 1):
        want = torch.zeros(scores.shape, dtype=torch.bool).scatter_(-1, order[:, :keep], True)
        assert torch.equal(top(scores, keep), want)


@pytest.mark.parametrize("width", range(1, 9))
@pytest.mark.parametrize("count", [0, 1, 7, 8, 13])
def test_bits_return(width, count):
    codes = torch.randint(0, 1 << width, (3, count), generator=torch.Generator().manual_seed(width))
    packed = pack_bits(codes, width)
    assert packed.shape == (3, -(-count * width // 8)) and packed.dtype == torch.uint8
    assert torch.equal(unpack_bits(packed, width, count).long(), codes)


def test_bits_for():
    assert [bits_for(choices) for choices in (1, 2, 3, 4, 5, 64, 65)] == [0, 1, 2, 2, 3, 6, 7]


def test_tiles_return():
    matrix = torch.arange(24.0).view(4, 6)
    assert tiles(matrix, 2, 3)[1, 0].tolist() == [[12, 13, 14], [18, 19, 20]]
    assert torch.equal(untile(tiles(matrix, 2, 3)), matrix)
    assert torch.equal(untile(tiles(matrix.T, 2, 2)), matrix.T)


def test_cost_is_a_roofline():
    cost = Cost(flops=100, weight_bytes=10, io_bytes=40)
    assert (cost.bytes, cost.intensity) == (50, 2.0)
    assert cost.seconds(flops_per_second=10, bytes_per_second=1000) == 10
    assert cost.seconds(flops_per_second=1000, bytes_per_second=10) == 5


def test_dense_stores_itself():
    packed = Dense().pack(torch.ones(2, 3, dtype=torch.float16))
    assert stored_bytes(packed) == 12 == Dense().cost((2, 3), 1, 2).weight_bytes


def test_all_structures_are_found_once():
    found = all_structures()
    assert found["NM"] is NM and found["Block"] is Block
    assert not {"Structure", "Pattern"} & set(found)
    assert all(issubclass(kind, Structure) for kind in found.values())
    assert all(issubclass(kind, Pattern) for kind in (NM, VNM, Block, Dense, Unstructured))


# ---- what cannot run says what it needs


def test_without_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    for structure in (Unstructured(), NM(), Block()):
        packed = structure.pack(torch.zeros(32, 32))
        for name in (name for name in structure.kernels() if name.startswith("scipy")):
            with pytest.raises(Unavailable, match="^needs scipy$"):
                structure.kernels()[name](packed)


def test_without_mkl(monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    for structure in (Unstructured(), NM(), Block()):
        packed = structure.pack(torch.zeros(32, 32))
        for name in (name for name in structure.kernels() if name.startswith(("torch", "tiled"))):
            with pytest.raises(Unavailable, match="^needs a torch that was built with MKL$|^needs a CUDA device"):
                structure.kernels()[name](packed)


def test_libraries_need_single_or_double_precision_on_a_cpu():
    packed = Unstructured().pack(torch.zeros(8, 8, dtype=torch.bfloat16))
    for name in ("torch_csr", "tiled_csr", "scipy_csr"):
        with pytest.raises(Unavailable, match="^needs float32 or float64.*bfloat16$"):
            Unstructured().kernels()[name](packed)


def test_torch_bsr_needs_square_blocks():
    with pytest.raises(Unavailable, match="^needs square blocks$"):
        Block(8, 1).spmm_torch_bsr(Block(8, 1).pack(torch.zeros(8, 8)))


def test_scipy_needs_the_cpu():
    packed = Unstructured().pack(torch.zeros(8, 8))
    with pytest.raises(Unavailable, match="^needs a packed operand on the CPU, got meta$"):
        scipy_sparse(packed.values.to("meta"))
    with pytest.raises(ValueError, match="^x must be torch.float32 .tokens, 8. on cpu, got .* on meta$"):
        Unstructured().spmm_reference(packed)(torch.zeros(3, 8, device="meta"))


def test_no_warning_reaches_the_reader(recwarn):
    for structure in (Unstructured(), Block()):
        packed = structure.pack(torch.zeros(32, 32))
        for plan in structure.kernels().values():
            with suppress(Unavailable):
                plan(packed)(torch.zeros(2, 32))
    assert not recwarn.list
