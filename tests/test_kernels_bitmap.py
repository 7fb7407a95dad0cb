"""The CUDA kernel for any zeros and few tokens: its layout, its source run on a CPU, its machine code, and a GPU if there is one."""

from math import ceil

import pytest
import torch
from torch import Tensor

from emulation import SOURCES, emulator  # noqa: F401
from sparsesurvey.kernels import bitmap, cuda
from sparsesurvey.kernels.launch import SHARED
from sparsesurvey.structure import Unavailable
from sparsesurvey.structures import NM, Balanced, Unstructured


def draw(*size: int, dtype=torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sparse(shape: tuple[int, int], density: float, dtype=torch.bfloat16) -> Tensor:
    return draw(*shape, dtype=dtype) * (torch.rand(shape, generator=torch.Generator().manual_seed(1)) < density)


def arranged(weight: Tensor, unit: int | None) -> bitmap.Operand:
    rows, columns = weight.nonzero().T
    return bitmap.arrange(weight[rows, columns], rows, columns, tuple(weight.shape), unit)


# ---- the layout


def decoded(operand: bitmap.Operand) -> Tensor:
    """The matrix that the threads of the kernel would see: loops over threads and bits, nothing shared with the layout's code."""
    (out, inn), across = operand.shape, ceil(operand.shape[1] / 64)
    whole = torch.zeros(ceil(out / 64) * 64, across * 64, dtype=torch.float64)
    for tile in range(len(operand.starts) - 1):
        start, stop = (16 * int(operand.starts[tile + step]) for step in (0, 1))
        words = operand.records.view(torch.int32)[start // 4 : stop // 4].tolist()
        values = operand.records.view(operand.dtype)[(start + 512 // operand.unit) // 2 : stop // 2].double().tolist()
        order = singles if operand.unit == 1 else pairs
        used = 0
        for lane, step, i, register, odd in order(words):
            row = 16 * i + lane // 4 + register % 2 * 8
            column = 16 * step + lane % 4 * 2 + register // 2 * 8 + odd
            whole[tile // across * 64 + row, tile % across * 64 + column] = values[used]
            used += 1
        assert len(values) - used < 8, "filled up to 16 bytes and no more"
    assert not whole[out:].any() and not whole[:, inn:].any()
    return whole[:out, :inn]


def singles(words: list[int]):
    """Thread, step, operand, register and number of each value, in the order of the values: a bit each."""
    for step in range(4):
        for i in range(4):
            for half in range(2):
                for lane in range(32):
                    for part in range(2):
                        for odd in range(2):
                            if words[4 * lane + step] >> (8 * i + 4 * half + 2 * part + odd) & 1:
                                yield lane, step, i, 2 * half + part, odd


def pairs(words: list[int]):
    for lane in range(32):
        for step in range(4):
            for i in range(4):
                for register in range(4):
                    if words[2 * lane + step // 2] >> (16 * (step % 2) + 4 * i + register) & 1:
                        yield from ((lane, step, i, register, odd) for odd in range(2))


@pytest.mark.parametrize("unit", [1, 2])
@pytest.mark.parametrize("shape, density", [((64, 64), 0.5), ((70, 130), 0.2), ((1, 3), 1.0), ((128, 192), 0.02), ((64, 128), 0.0)], ids=str)
def test_the_layout_holds_the_weight(shape, density, unit):
    weight = sparse(shape, density)
    operand = arranged(weight, unit)
    assert torch.equal(decoded(operand), weight.double())
    assert operand.capacity == int(operand.starts.diff().max()) and operand.records.numel() == 4 * int(operand.starts[-1])


def test_bytes_by_hand():
    """Half of 64 x 64: 512 bytes of bits and 2048 values of two. A lone weight: its bits, and 16 bytes for one value or pair."""
    half = torch.zeros(64, 64, dtype=torch.bfloat16)
    half[:, ::2] = 1
    assert arranged(half, 1).starts.tolist() == [0, (512 + 4096) // 16] and arranged(half, 2).starts.tolist() == [0, (256 + 8192) // 16]
    lone = torch.zeros(64, 128, dtype=torch.bfloat16)
    lone[5, 100] = 1
    assert arranged(lone, 1).starts.tolist() == [0, 32, 65] and arranged(lone, 2).starts.tolist() == [0, 16, 33]


def test_pairs_where_they_are_few():
    assert [arranged(sparse((256, 256), density), None).unit for density in (0.5, 0.25, 0.15, 0.1, 0.01)] == [1, 1, 2, 2, 2]


# ---- how it is launched


def test_every_tile_is_somebodys_and_fits():
    for shape in (14336, 4096), (4096, 14336), (768, 3072), (64, 64), (100, 70), (16384, 16384):
        for capacity in 40, 100, 294, 544:  # 1 % of pairs, 10 % of pairs, half and all of single values
            for tokens in 1, 8, 9, 16, 17, 64:
                operand = bitmap.Operand(torch.zeros(0), torch.zeros(0), 1, capacity, shape, torch.bfloat16)
                for processors, most in (132, SHARED), (108, 166_912), (128, 101_376):
                    made = bitmap.launch(operand, tokens, processors, most)
                    across = ceil(shape[1] / 64)
                    assert made.shared <= most and made.each * made.parts >= across > made.each * (made.parts - 1)
                    assert 8 * made.definitions["NT"] >= tokens and made.definitions["SLICES"] <= made.each


def test_a_product_in_decoding_is_one_block_a_processor():
    """7B, 16 tokens, half kept: the blocks of threads are there at once, 16 warps each, two tiles ahead."""
    for shape in (14336, 4096), (4096, 14336):
        operand = bitmap.Operand(torch.zeros(0), torch.zeros(0), 1, 294, shape, torch.bfloat16)
        made = bitmap.launch(operand, 16, 132, SHARED)
        assert made.definitions["SLICES"] == 4 and made.definitions["STAGES"] >= 2
        assert 110 <= ceil(shape[0] / 256) * made.parts <= 132


def test_too_little_shared_memory_is_told():
    operand = bitmap.Operand(torch.zeros(0), torch.zeros(0), 1, 544, (64, 64), torch.bfloat16)
    with pytest.raises(Unavailable, match="needs 26624 bytes of shared memory a block of threads, the device has 20000"):
        bitmap.launch(operand, 64, 132, 20_000)


def test_what_cannot_run_says_what_it_needs():
    for structure in Unstructured(0.5), Balanced(4, 0.5), NM(2, 4):
        for dtype, reason in (torch.bfloat16, "needs a CUDA device, got an operand on cpu"), (torch.float32, "needs bfloat16 or float16, got torch.float32"):
            with pytest.raises(Unavailable, match=reason):
                structure.spmm_cuda_bitmap(structure.pack(torch.zeros(64, 64, dtype=dtype)))
    across = NM(2, 4, "out")
    with pytest.raises(Unavailable, match="needs groups along the inputs, 2:4 out has them along the outputs"):
        across.spmm_cuda_bitmap(across.pack(torch.zeros(64, 64, dtype=torch.bfloat16)))


# ---- the source, on a CPU


@pytest.fixture
def device(emulator, monkeypatch):  # noqa: F811
    """An imaginary GPU: a few processors, and shared memory as small as the caller wants."""
    def set_up(processors: int, most: int, late: bool):
        monkeypatch.setattr(cuda, "processors", lambda device: processors)
        monkeypatch.setattr(cuda, "shared_bytes", lambda device: most)
        emulator.late = late
        return emulator

    return set_up


CASES = [  # shape, density, tokens, unit, processors, parts, bytes of shared memory, dtype
    ((64, 640), 0.6, 16, 1, 1, 1, SHARED, torch.bfloat16),  # one row of tiles, three for each of four warps
    ((192, 456), 0.5, 9, 1, 3, 3, SHARED, torch.float16),  # edges on both sides; parts of the inputs; idle warps
    ((70, 328), 1.0, 33, 1, 1, 1, 101_376, torch.bfloat16),  # nothing missing, 64 tokens, little room
    ((300, 130), 0.1, 3, 2, 4, 2, SHARED, torch.float16),  # two blocks of threads a part; inputs no multiple of 16 bytes
]


@pytest.mark.parametrize("shape, density, tokens, unit, processors, parts, most, dtype", CASES, ids=str)
def test_the_source_run_on_a_cpu_equals_float64(device, shape, density, tokens, unit, processors, parts, most, dtype):
    """Every thread of it, with copies as early and as late as they may be; and empty tiles."""
    weight, x = sparse(shape, density, dtype), draw(tokens, shape[1], dtype=dtype, seed=2)
    for late in False, True:
        emulator = device(processors, most, late)
        run, want = bitmap.product_plan(arranged(weight, unit)), x.double() @ weight.double().T
        got = run(x)
        assert got.shape == want.shape and got.dtype == dtype
        error = (got.double() - want).abs().max() / want.abs().max()
        assert error < torch.finfo(dtype).eps, (late, float(error))
    empty = bitmap.product_plan(arranged(torch.zeros_like(weight), unit))(x)
    assert not empty.any() and not empty.isnan().any()
    assert [file for file, *_ in emulator.launches] == 3 * ["bitmap.cu", *["sums.cu"] * (parts > 1)], "parts are added up by a second kernel"


def test_whole_numbers_are_exact_whatever_the_layout_of_x(device):
    """Nothing is rounded here, so that one value in a wrong place would show."""
    weight = torch.arange(1, 64 * 128 + 1).remainder(251).view(64, 128).to(torch.bfloat16) * (sparse((64, 128), 0.4) != 0)
    emulator = device(1, SHARED, True)
    run, whole = bitmap.product_plan(arranged(weight, None)), torch.eye(128, dtype=torch.bfloat16)
    for start in 0, 64:
        x = whole[start : start + 64]
        for given in x, x.T.contiguous().T, torch.stack([x, x], -1)[..., 0], torch.cat([x[:, :1], x], 1)[:, 1:]:
            assert torch.equal(run(given), weight.T[start : start + 64])
    assert run(whole[:0]).shape == (0, 64) and len(emulator.launches) == 8
    with pytest.raises(Unavailable, match="needs at most 64 tokens, got 65"):
        run(whole[:65])
    with pytest.raises(ValueError, match="x must be torch.bfloat16"):
        run(whole[:3].float())


def test_structures_reach_the_kernel(device, monkeypatch):
    """From the packed operand of each, in one compilation."""
    device(1, SHARED, False)
    monkeypatch.setattr(bitmap, "require", lambda values: None)
    for structure in Unstructured(0.5), Balanced(4, 0.4), NM(3, 5):
        packed = structure.pack(structure.project(draw(70, 60)))
        x = draw(5, 60, seed=1)
        want = x.double() @ structure.unpack(packed).double().T
        error = (structure.spmm_cuda_bitmap(packed)(x).double() - want).abs().max() / want.abs().max()
        assert error < torch.finfo(torch.bfloat16).eps, structure


# ---- machine code


def compiled(architecture: str = "sm_90a", **changes: int):
    pytest.importorskip("triton", reason="needs triton, whose tools read machine code")
    from machine_code import can_compile_cuda, cuda_compiled

    if not can_compile_cuda():
        pytest.skip("needs nvcc or NVRTC")
    definitions = {"DOWN": 4, "SLICES": 4, "NT": 2, "UNIT": 1, "STAGES": 2, "BFLOAT": 1, "PARTS": 1, **changes}
    return cuda_compiled(SOURCES / "bitmap.cu", cuda.options(definitions), 0, architecture)


@pytest.mark.parametrize("eights, slices, unit, architecture", [
    (2, 4, 1, "sm_90a"), (2, 4, 2, "sm_90a"), (8, 2, 1, "sm_90a"), (8, 2, 1, "sm_80"), (8, 2, 2, "sm_100a"),
])
def test_machine_code(eights, slices, unit, architecture):
    """Tensor cores, nothing spilt, weights fetched 16 bytes at a time and taken from shared memory by one conditional load each."""
    made = compiled(architecture, NT=eights, SLICES=slices, UNIT=unit)
    assert made.count("HMMA.16816.F32.BF16") == 4 * eights and made.count("LDSM.16.M88.2") == eights
    assert made.count("LDGSTS.E.BYPASS.128") >= 2 and made.count("LDG.E.U16") == made.count("LDG.E.U8") == 0
    assert made.spilt == 0 and made.count("LDS.U16") == (32 if unit == 1 else 0)
    assert made.registers * 128 * slices <= 65_536, "a processor has so many"


def test_machine_code_of_the_other_variants():
    made = compiled(BFLOAT=0, PARTS=0, NT=1, DOWN=1, SLICES=1, STAGES=4)
    assert made.count("HMMA.16816.F32") and not made.count("HMMA.16816.F32.BF16") and made.spilt == 0 and made.count("STG.E.U16")


# ---- where there is a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("structure, shape", [
    (Unstructured(0.5), (1000, 1100)), (Unstructured(0.1), (512, 4096)), (Unstructured(0.02), (4096, 512)), (Balanced(16, 0.25), (300, 1024)),
    (NM(8, 16), (256, 2048)),
], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu_it_equals_float64(structure, shape, dtype):
    packed = structure.pack(structure.project(draw(*shape, dtype=dtype).cuda()))
    run, weight = structure.spmm_cuda_bitmap(packed), structure.unpack(packed).double()
    for tokens in 0, 1, 3, 16, 30, 64:
        x = draw(tokens, shape[1], dtype=dtype, seed=1).cuda()
        for given in x, x.T.contiguous().T:
            want = x.double() @ weight.T
            error = (run(given).double() - want).abs().max() / want.abs().max() if tokens else 0
            assert error < 2 * torch.finfo(dtype).eps, (tokens, float(error))
