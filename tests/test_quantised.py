"""N:M with 4-bit weights: what is stored, that storing twice stores the same, and why the order of the two steps matters."""

import pytest
import torch

from sparsesurvey.structure import Unavailable, stored_bytes
from sparsesurvey.structures import NM, QuantisedNM
from sparsesurvey.structures.quantised import dequantise, quantise, seventh

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def random(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_hand(weight, n, m, group):
    """Masked and quantised one group after the other, in plain Python on float64, with the scales as they are stored."""
    result, scales = torch.zeros_like(weight), []
    for number, row in enumerate(weight.double().tolist()):
        kept = []
        for start in range(0, len(row), m):
            order = sorted(range(start, start + m), key=lambda place: -abs(row[place]))
            kept += sorted(order[:n])
        scales.append([])
        for start in range(0, len(kept), group):
            places = kept[start:start + group]
            scale = torch.tensor(max(abs(row[place]) for place in places) / 7).to(weight.dtype)
            scales[-1].append(float(scale))
            for place in places:
                code = max(-8, min(7, round(row[place] / float(scale))))
                result[number, place] = torch.tensor(code * float(scale), dtype=torch.float64).to(weight.dtype)
    return result, torch.tensor(scales, dtype=torch.float64)


@pytest.mark.parametrize("structure", [QuantisedNM(2, 4, 8), QuantisedNM(3, 5, 6), QuantisedNM(1, 4, 3)], ids=str)
def test_unpacked_is_the_masked_weight_quantised(structure):
    weight = random((7, 60))
    right, scales = by_hand(weight, structure.n, structure.m, structure.group)
    packed = structure.pack(weight)
    torch.testing.assert_close(packed.scales.double(), scales, rtol=1.2e-7, atol=0)  # to the last place
    torch.testing.assert_close(structure.unpack(packed), right, rtol=2.5e-7, atol=0)
    assert torch.equal(structure.unpack(packed) != 0, right != 0)


@every_dtype
@pytest.mark.parametrize("size", [1.0, 1e-3, 3e-6, 1e-7, 6e4])
def test_a_member_is_packed_as_it_was(dtype, size):
    """Codes, scales and places, also where a scale is subnormal or seven of it are more than the dtype holds."""
    for structure in QuantisedNM(2, 4, 16), QuantisedNM(3, 5, 6), QuantisedNM(1, 4, 3):
        weight = random((64, 60)).clamp(-1, 1).mul(size).to(dtype)
        packed = structure.pack(weight)
        again = structure.pack(structure.unpack(packed))
        for name in ("values", "scales", "index"):
            assert torch.equal(getattr(again, name), getattr(packed, name)), name
        assert packed.scales.dtype == dtype and structure.unpack(packed).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_number_finds_its_scale_again(dtype):
    """All positive finite numbers of two bytes as the largest weight of a group of one."""
    every = torch.arange(1, 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()].view(-1, 1)
    codes, scales = quantise(every, 1)
    near = dequantise(codes, scales, 1)
    again, same = quantise(near, 1)
    assert torch.equal(same, scales) and torch.equal(again, codes)
    usual = every.flatten() > 64 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert (codes.flatten()[usual] == 7).all()
    plain = seventh(every).view(torch.int16).int()
    assert int((scales.view(torch.int16).int() - plain)[usual].abs().max()) <= 1, "at most one unit in the last place"


@every_dtype
def test_group_of_zeros(dtype):
    packed = QuantisedNM(2, 4).pack(torch.zeros(3, 8, dtype=dtype))
    assert not packed.values.any() and (packed.scales > 0).all()
    assert not QuantisedNM(2, 4).unpack(packed).any()


def test_halves_go_to_the_even_code_and_the_lowest_code_is_not_used():
    codes, scales = quantise(torch.tensor([[-7.0, 0.5, 1.5, 2.5, -3.5]]), 5)
    assert codes.tolist() == [[-7, 0, 2, 2, -4]] and scales.tolist() == [[1.0]]


def test_bits_of_a_weight_are_the_catalogues():
    shape = (4096, 14336)
    size, bits = shape[0] * shape[1], lambda structure: 8 * structure.cost(shape, 1).weight_bytes
    assert bits(QuantisedNM()) / size == 3.0625  # (4 x 2 + 2 x 2) / 4 + 16 / 256
    scales = 16 * shape[0] * 7168 // 128
    assert 16 * size / (bits(QuantisedNM()) - scales) == pytest.approx(16 / 3)  # 5.33 times smaller, the scales aside
    assert 4 * size / (bits(QuantisedNM()) - scales) == pytest.approx(4 / 3)  # than INT4 alone: 1.33 times


@every_dtype
def test_a_ragged_last_group_has_a_scale_of_its_own(dtype):
    structure = QuantisedNM(2, 4, 4)
    weight = torch.tensor([[7.0, 3, 0, 0, 2, 1, 0, 0, 0.7, 0.1, 0, 0], [1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0]], dtype=dtype)
    packed = structure.pack(weight)
    assert packed.scales.shape == (2, 2) and packed.values.shape == (2, 3)
    assert packed.scales[0].tolist() == pytest.approx([1, 0.1], rel=0.01)
    assert stored_bytes(packed) == structure.cost((2, 12), 1, dtype.itemsize).weight_bytes == 6 + 4 * dtype.itemsize + 4


def test_an_odd_number_of_codes_leaves_half_a_byte():
    packed = QuantisedNM(1, 4).pack(torch.eye(2, 12))
    assert packed.values.tolist() == [[7, 0], [7, 0]]


def test_quantising_first_makes_ties_and_changes_the_mask():
    weight = torch.tensor([[7.0, 2.6, 3.4, 0.1]])
    codes, _ = quantise(weight, 4)
    assert codes.tolist() == [[7, 3, 3, 0]]
    assert NM(2, 4).mask(weight).tolist() == [[True, False, True, False]]
    assert NM(2, 4).mask(codes.float()).tolist() == [[True, True, False, False]]
    weight = random((64, 512))
    early = NM(2, 4).mask(quantise(weight, 128)[0].float().abs())
    kept = lambda mask: float((weight * mask).square().sum())
    assert (early != NM(2, 4).mask(weight.abs())).any() and kept(early) < kept(NM(2, 4).mask(weight.abs()))


@pytest.mark.parametrize("product", ["spmm", "spmmt"])
def test_the_codes_are_read_in_every_run(product):
    structure = QuantisedNM(2, 4, 8)
    packed = structure.pack(random((6, 16)))
    run = structure.kernels(product)["decode_csr"](packed)
    x = torch.eye(16 if product == "spmm" else 6)
    before = run(x)
    packed.values.copy_(torch.where(packed.values == 0, packed.values, 0x11))
    after = run(x)
    weight = structure.unpack(packed)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, weight.T if product == "spmm" else weight)


def test_no_gradient():
    packed = QuantisedNM().pack(torch.ones(2, 8))
    with pytest.raises(Unavailable, match="needs floating-point values: 4-bit integers take no gradient"):
        QuantisedNM().sddmm_reference(packed)


def test_bad_input():
    with pytest.raises(ValueError, match="^group must be a multiple of n, which is 3, got 128"):
        QuantisedNM(3, 5)
    packed = QuantisedNM().pack(torch.ones(2, 8))
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="packed.scales must be finite and above 0"):
            QuantisedNM().unpack(packed._replace(scales=torch.full_like(packed.scales, wrong)))
