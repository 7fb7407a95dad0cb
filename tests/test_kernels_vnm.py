"""The CUDA kernel for panels with 2:4 inside: its layout, its source run on a CPU, its machine code, and a GPU if there is one."""

import ctypes
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparsesurvey.kernels import cuda, mma_sp
from sparsesurvey.kernels.launch import SHARED
from sparsesurvey.structure import Unavailable
from sparsesurvey.structures import NM, TVW, VNM, HiNM

HERE = Path(__file__).parent
SOURCES = Path(cuda.__file__).parent


def draw(*size: int, dtype=torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def operand(structure: VNM, shape: tuple[int, int], dtype=torch.bfloat16) -> tuple[mma_sp.Operand, Tensor]:
    """A random member as the kernel wants it, and as a matrix."""
    packed = structure.pack(structure.project(draw(*shape, dtype=dtype)))
    arranged = mma_sp.arrange(*structure.quads(packed, structure.positions(packed)), packed.shape)
    return arranged, structure.unpack(packed)


# ---- the layout


def instruction_operand(weights: Tensor, words: Tensor, selector: int) -> Tensor:
    """The matrix ``[16, 32]`` that an mma.sp multiplies, from the values ``[32, 8]`` and words ``[32]`` of its threads.

    Loops over rows, quads and values, as the PTX ISA tells where they are: slow and nothing shared with the layout's code.
    """
    matrix = torch.zeros(16, 32, dtype=torch.float64)
    for row in range(16):
        for quad in range(8):
            word = int(words[row % 8 * 4 + 2 * selector + quad // 4]) & 0xFFFFFFFF
            code = word >> (16 * (row // 8) + 4 * (quad % 4)) & 15
            assert code & 3 < code >> 2, "positions must rise"
            for which in range(2):
                register = quad // 4 * 2 + row // 8
                matrix[row, 4 * quad + (code >> 2 * which & 3)] += weights[row % 8 * 4 + quad % 4, 2 * register + which].double()
    return matrix


def multiplied(arranged: mma_sp.Operand, x: Tensor) -> Tensor:
    """``x @ W.T`` in float64 by the kernel's data path: steps of 64 gathered inputs, two instructions each."""
    panels = len(arranged.pointers) - 1
    height = arranged.shape[0] // panels
    y = torch.zeros(arranged.shape[0], len(x), dtype=torch.float64)
    for panel in range(panels):
        for step in range(arranged.pointers[panel], arranged.pointers[panel + 1]):
            gathered = x.T[arranged.columns[step].long()].double()
            for block in range(height // 16):
                rows = slice(panel * height + 16 * block, panel * height + 16 * block + 16)
                for half in range(2):
                    left = instruction_operand(arranged.weights[step, block, half], arranged.positions[step, block], half)
                    y[rows] += left @ gathered[32 * half : 32 * half + 32]
    return y.T


@pytest.mark.parametrize("structure, shape", [
    (VNM(16, 2, 8), (32, 128)), (VNM(32, 2, 5), (32, 40)), (VNM(16, 1, 4), (32, 72)), (VNM(48, 2, 4), (48, 64)), (VNM(16, 1, 16), (16, 272)),
], ids=str)
def test_the_data_path_equals_the_dense_product(structure, shape):
    arranged, weight = operand(structure, shape)
    x = draw(5, shape[1], seed=1)
    assert torch.equal(multiplied(arranged, x), x.double() @ weight.double().T) or torch.allclose(
        multiplied(arranged, x), x.double() @ weight.double().T, rtol=0, atol=1e-12)


def test_sums_over_whole_numbers_are_exact():
    """Nothing is rounded here, so that one wrong position or value would show."""
    structure = VNM(32, 2, 8)
    weight = structure.project(torch.arange(1, 64 * 160 + 1).remainder(251).view(64, 160).to(torch.bfloat16))
    packed = structure.pack(weight)
    arranged = mma_sp.arrange(*structure.quads(packed, structure.positions(packed)), packed.shape)
    assert torch.equal(multiplied(arranged, torch.eye(160, dtype=torch.bfloat16)), weight.double().T)
    assert arranged.weights.shape == (4, 2, 2, 32, 8)  # 20 tiles a panel are two steps, the second one padded
    assert arranged.columns[1, 16:].unique().tolist() == [int(packed.columns[0, -1, -1]) + 152]


def test_hierarchical_and_tile_wise_panels_take_the_same_path():
    """HiNM lists its inputs one by one, some twice; tiles of TVW have quads of any number, and quads of fewer than four."""
    hierarchical = HiNM(16, 0.5)
    thin = hierarchical.project(draw(32, 96)) * (draw(32, 96, seed=2) > 0)
    packed = hierarchical.pack(thin)
    arranged = mma_sp.arrange(*hierarchical.quads(hierarchical.compact(packed), packed.columns), packed.shape)
    x = draw(3, 96, seed=1)
    torch.testing.assert_close(multiplied(arranged, x), x.double() @ thin.double().T, rtol=0, atol=1e-12)
    tiles = TVW(16, 0.3)
    thin = tiles.project(draw(48, 96) * torch.tensor([3.0, 1, 0.2]).repeat_interleave(16)[:, None]) * (draw(48, 96, seed=2) > 0.9)
    packed = tiles.pack(thin)
    counts = packed.row_pointers.diff()
    assert len(counts.unique()) > 1 and (packed.columns < 0).any()
    arranged = mma_sp.arrange(*mma_sp.compressed(tiles.compact(packed)), packed.columns.clamp(min=0), counts, packed.shape)
    torch.testing.assert_close(multiplied(arranged, x), x.double() @ thin.double().T, rtol=0, atol=1e-12)


def test_rows_of_two_of_four_are_panels_that_keep_all():
    weight = NM(2, 4, "out").project(draw(80, 32)).T  # what the input gradient multiplies by, if the groups lie along the outputs
    arranged = mma_sp.arrange(*mma_sp.all_quads(weight, 16), weight.shape)
    x = draw(3, 80, seed=1)
    torch.testing.assert_close(multiplied(arranged, x), x.double() @ weight.double().T, rtol=0, atol=1e-12)


def test_positions_equal_those_of_torch():
    """Torch's own code for the same instruction, before it is put in the order of CUTLASS, for 2:4."""
    conversions = pytest.importorskip("torch.sparse._semi_structured_conversions")
    weight = NM(2, 4).project(draw(64, 128, dtype=torch.float16))
    values, reordered = conversions.sparse_semi_structured_from_dense_cutlass(weight)
    offsets = conversions._calculate_meta_reordering_scatter_offsets(64, reordered.shape[1], torch.int16, "cpu")
    theirs = reordered.view(-1)[offsets].view(64, -1)  # four quads each
    structure = VNM(64, 2, 4)
    packed = structure.pack(weight)
    arranged = mma_sp.arrange(*structure.quads(packed, structure.positions(packed)), packed.shape)
    for step in range(2):
        for block in range(4):
            lanes = arranged.positions[step, block].view(8, 4)  # g, which four quads
            halves = theirs[16 * block : 16 * block + 16, 4 * step : 4 * step + 4].int() & 0xFFFF
            assert torch.equal(lanes & 0xFFFF, halves[:8]) and torch.equal(lanes >> 16 & 0xFFFF, halves[8:])
    assert torch.equal(packed.values.flatten(1), values)
    words = reordered.contiguous().view(-1).view(torch.int32)  # and the words are those that CUTLASS stores
    assert torch.equal(words.sort().values, arranged.positions.flatten().sort().values)


def test_one_of_four_becomes_two_of_four():
    values, positions = mma_sp.two_of_four(torch.tensor([[5.0], [6.0]]), torch.tensor([[1], [3]]))
    assert values.tolist() == [[5, 0], [0, 6]] and positions.tolist() == [[1, 3], [2, 3]]


def test_two_of_four_of_a_dense_quad():
    values, positions = mma_sp.compressed(torch.tensor([[[0.0, 0, 7, 8], [0, 5, 0, 0], [0, 0, 0, 0]]]))
    assert positions.tolist() == [[[2, 3], [0, 1], [0, 1]]] and values.tolist() == [[[7, 8], [0, 5], [0, 0]]]


def test_what_cannot_run_says_what_it_needs():
    for structure, dtype, reason in (
        (VNM(64, 2, 8), torch.bfloat16, "needs a CUDA device, got an operand on cpu"),
        (VNM(64, 2, 8), torch.float32, "needs bfloat16 or float16, got torch.float32"),
        (VNM(64, 3, 8), torch.bfloat16, "needs at most 2 of every 4 columns, got 3 of 4"),
        (VNM(8, 2, 8), torch.bfloat16, "needs panels of a multiple of 16 outputs, got 8"),
    ):
        packed = structure.pack(torch.zeros(64, 64, dtype=dtype))
        with pytest.raises(Unavailable, match=reason):
            structure.spmm_cuda(packed)


def test_tiles():
    assert mma_sp.tile(128, 8192, 32, 132) == {"WM": 2, "WN": 2, "MF": 4, "NF": 8}
    assert mma_sp.tile(64, 16, 32, 132) == {"WM": 4, "WN": 1, "MF": 1, "NF": 4}
    assert mma_sp.tile(48, 8192, 32, 132) == mma_sp.tile(16, 8192, 96, 132)
    for outputs, made in [*mma_sp.WIDE.items(), *mma_sp.NARROW.items()]:
        tile = dict(zip(("WM", "WN", "MF", "NF"), made))
        depth = mma_sp.stages(tile, SHARED)
        rows, tokens, threads, shared = mma_sp.sizes(tile, depth)
        assert rows == outputs and depth == (3 if tokens == 256 else 4) and 2 * shared <= SHARED
        assert mma_sp.stages(tile, 166_912) >= 3 and mma_sp.sizes(tile, mma_sp.stages(tile, 101_376))[3] <= 101_376  # A100, RTX 4090
        lanes = min(8, tokens // 8)  # what mma_sp.cu takes for granted
        assert 64 * lanes % threads == 0 and tokens % (8 * lanes) == 0 and 2 * max(tokens * (rows + 8), rows * (tokens + 8)) <= shared


# ---- the source, on a CPU


@lru_cache
def library(folder: Path, definitions: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    path = folder / ("_".join(f"{name}{value}" for name, value in definitions) + ".so")
    command = ["g++", "-O1", "-std=c++20", "-shared", "-fPIC", "-Wno-unknown-pragmas", f"-I{SOURCES}", f"-I{HERE}", '-DEMULATED="emulated.h"',
               *cuda.options(dict(definitions))[1:], str(HERE / "emulated_mma_sp.cpp"), "-o", str(path)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(path))


@pytest.fixture
def emulator(monkeypatch, tmp_path_factory):
    """A function that multiplies by a plan whose launches run the kernel's threads on this CPU, one after the other."""
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    folder = tmp_path_factory.getbasetemp()

    def multiplied_by_plan(arranged: mma_sp.Operand, x: Tensor, tile: mma_sp.Tile, stages: int, late: bool) -> Tensor:
        launches = []

        def launch(file, name, definitions, programs, threads, shared, device, *arguments):
            arrays, numbers = [part for part in arguments if isinstance(part, Tensor)], [part for part in arguments if isinstance(part, int)]
            assert (file, name) == ("mma_sp.cu", "product") and all(part.is_contiguous() for part in arrays[:4])
            y = arrays[5]
            guarded = torch.full((y.numel() + 128,), -77.0, dtype=y.dtype)  # what is written beside y shows
            places = (ctypes.c_void_p * 6)(*(part.data_ptr() for part in (*arrays[:5], guarded[64:])))
            sizes = (ctypes.c_longlong * 6)(*(part.untyped_storage().nbytes() for part in arrays))
            made = library(folder, tuple(sorted(definitions.items())))
            assert threads == 32 * definitions["WM"] * definitions["WN"]
            made.launch(programs, shared, int(late), places, sizes, (ctypes.c_longlong * 6)(*numbers))
            assert (guarded[:64] == -77).all() and (guarded[-64:] == -77).all(), "written outside of y"
            y.copy_(guarded[64:-64].as_strided(y.shape, y.stride()))
            launches.append(programs)

        monkeypatch.setattr(cuda, "launch", launch)
        monkeypatch.setattr(cuda, "processors", lambda device: 1)
        monkeypatch.setattr(cuda, "shared_bytes", lambda device: mma_sp.sizes(tile, stages)[3])
        monkeypatch.setattr(mma_sp, "tile", lambda *problem: tile)
        monkeypatch.setattr(mma_sp, "stages", lambda *problem: stages)
        y = mma_sp.product_plan(arranged)(x)
        assert len(launches) == min(1, len(x))
        return y

    return multiplied_by_plan


@pytest.mark.parametrize("structure, shape, tokens, wide, stages, dtype", [
    (VNM(16, 2, 8), (48, 264), 13, False, 4, torch.bfloat16),  # three steps, the last one padded; few tokens
    (VNM(32, 2, 16), (32, 1600), 40, False, 3, torch.float16),  # seven steps; two strips of tokens, the second one short
    (VNM(64, 2, 8), (128, 128), 300, True, 4, torch.bfloat16),  # one step, fewer than stages; two strips of 256 tokens
    (VNM(256, 2, 4), (256, 192), 48, True, 2, torch.bfloat16),  # panels in two pieces; three steps in two stages
    (VNM(128, 1, 8), (128, 640), 17, False, 4, torch.float16),
    (VNM(32, 2, 5), (64, 400), 33, True, 4, torch.float16),
    (VNM(48, 2, 8), (48, 136), 20, True, 4, torch.bfloat16),
], ids=str)
def test_the_source_run_on_a_cpu_equals_float64(emulator, structure, shape, tokens, wide, stages, dtype):
    """Every thread of it, with copies as early and as late as they may be, row-major and feature-major."""
    arranged, weight = operand(structure, shape, dtype)
    kind = mma_sp.WIDE if wide else mma_sp.NARROW
    tile = dict(zip(("WM", "WN", "MF", "NF"), kind[next(size for size in kind if structure.v % size == 0)]))
    for late, features in ((False, False), (True, False), (True, True)):
        x = draw(-(-tokens // 16) * 16 if features else tokens, shape[1], dtype=dtype, seed=1)
        x = x.T.contiguous().T if features else x
        want = x.double() @ weight.double().T
        got = emulator(arranged, x, tile, stages, late)
        assert got.shape == want.shape and (got.stride(0) == 1) == features and not len(emulator(arranged, x[:0], tile, stages, late))
        error = (got.double() - want).abs().max() / want.abs().max()
        assert error < torch.finfo(dtype).eps, (late, features, float(error))


# ---- machine code


def compiled(tile: mma_sp.Tile, architecture: str, bfloat: int = 1, features: int = 0):
    pytest.importorskip("triton", reason="needs triton, whose tools read machine code")
    from machine_code import can_compile_cuda, cuda_compiled

    if not can_compile_cuda():
        pytest.skip("needs nvcc or NVRTC")
    depth = mma_sp.stages(tile, SHARED)
    definitions, shared = {**tile, "STAGES": depth, "BFLOAT": bfloat, "FEATURES": features}, mma_sp.sizes(tile, depth)[3]
    return cuda_compiled(SOURCES / "mma_sp.cu", cuda.options(definitions), shared, architecture)


@pytest.mark.parametrize("outputs, wide, architecture", [
    (128, True, "sm_80"), (64, True, "sm_80"), *((outputs, wide, "sm_90a") for outputs in (128, 64, 32, 16) for wide in (True, False)),
])
def test_machine_code(outputs, wide, architecture):
    """Sparse tensor cores, nothing spilt, activations fetched in the background by 16 bytes and turned by ldmatrix."""
    tile = dict(zip(("WM", "WN", "MF", "NF"), (mma_sp.WIDE if wide else mma_sp.NARROW)[outputs]))
    made = compiled(tile, architecture)
    assert made.count("HMMA.SP.16832.F32.BF16") == 2 * tile["MF"] * tile["NF"], "two instructions a step for each of the warp's tiles"
    assert made.count("LDSM.16.MT88.4") == 2 * tile["NF"] and made.count("LDGSTS.E.BYPASS.128") >= 1
    assert made.spilt == 0 and made.count("LDG.E.U16") == 0 and made.shared <= SHARED and made.count("STG.E.128") >= 1
    threads = 32 * tile["WM"] * tile["WN"]
    assert made.registers * threads * (2 if wide else 4) <= 65_536, "two wide blocks of threads share a processor, or four narrow ones"


def test_machine_code_of_the_other_variants():
    tile = dict(zip(("WM", "WN", "MF", "NF"), mma_sp.WIDE[64]))
    for architecture in "sm_80", "sm_90a", "sm_100a":
        made = compiled(tile, architecture, bfloat=0, features=1)
        assert made.count("HMMA.SP.16832.F32") and not made.count("HMMA.SP.16832.F32.BF16") and made.spilt == 0


# ---- where there is a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("structure, shape", [
    (VNM(16, 2, 8), (48, 264)), (VNM(64, 2, 8), (256, 1024)), (VNM(128, 1, 16), (512, 1024)), (HiNM(32), (96, 192)), (TVW(32, 0.3), (96, 160)),
    (NM(2, 4), (160, 320)),
], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu_it_equals_float64(structure, shape, dtype):
    """Few tokens and many, none, one and an odd number, row-major and feature-major."""
    packed = structure.pack(structure.project(draw(*shape, dtype=dtype).cuda()))
    run, weight = structure.spmm_cuda(packed), structure.unpack(packed).double()
    for tokens in 0, 1, 45, 1000, 4096:
        x = draw(tokens, shape[1], dtype=dtype, seed=1).cuda()
        for given in x, x.T.contiguous().T:
            want = x.double() @ weight.T
            error = (run(given).double() - want).abs().max() / want.abs().max() if tokens else 0
            assert error < 2 * torch.finfo(dtype).eps, (tokens, float(error))
