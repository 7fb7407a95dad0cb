"""The CUDA kernel that skips what is not stored: its layout, its source run on a CPU, its machine code, and a GPU if there is one."""

from math import ceil

import pytest
import torch
from torch import Tensor

from emulation import SOURCES, emulator  # noqa: F401
from sparsesurvey.kernels import cuda, skip
from sparsesurvey.kernels.launch import SHARED
from sparsesurvey.structure import Unavailable
from sparsesurvey.structures import NM, Balanced, Diagonal, Unstructured


def draw(*size: int, dtype=torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sparse(shape: tuple[int, int], density: float, dtype=torch.bfloat16) -> Tensor:
    return draw(*shape, dtype=dtype) * (torch.rand(shape, generator=torch.Generator().manual_seed(1)) < density)


def arranged(weight: Tensor, depth: int) -> skip.Operand:
    rows, columns = weight.nonzero().T
    return skip.arrange(weight[rows, columns], rows, columns, tuple(weight.shape), depth)


# ---- the layout


def test_the_layout_by_hand():
    """Two outputs, inputs 0 to 5 in blocks of four: 1 is 0x3F80 in bfloat16, 2 is 0x4000, -2 is 0xC000."""
    weight = torch.zeros(2, 6, dtype=torch.bfloat16)
    weight[0, 5], weight[1, 1], weight[1, 3], weight[1, 4] = 1, 2, -2, 1
    made = arranged(weight, 4)
    assert made.pointers.tolist() == [0, 0, 2, 3, 4]
    assert made.entries[:4].tolist() == [1 << 16 | 0x4000, 3 << 16 | 0xC000, 1 << 16 | 0x3F80, 0x3F80]
    assert made.entries[4:].tolist() == [0] * 4, "the four after the last one may be read"
    order = torch.tensor([3, 1, 0, 2])
    rows, columns = weight.nonzero().T
    again = skip.arrange(weight[rows, columns][order], rows[order], columns[order], (2, 6), 4)
    assert torch.equal(again.entries, made.entries)


def test_launches():
    operand = lambda out, inn, depth=512: skip.Operand(torch.zeros(0), torch.zeros(0), depth, (out, inn), torch.bfloat16)
    many = skip.launch(operand(14336, 4096), 8192, 132, SHARED)
    assert many == ({"LANES": 8, "WARPS": 16, "ROWS": 8, "DEEP": 512, "STAGES": 3}, 8, 1, 28 * 128, 3 * 65_536)
    one = skip.launch(operand(4096, 14336), 1, 132, SHARED)
    assert one == ({"LANES": 1, "WARPS": 4, "ROWS": 1, "DEEP": 512, "STAGES": 4}, 7, 4, 32 * 4, 4 * 8192)
    for tokens, lanes in (8, 1), (9, 2), (32, 4), (33, 8), (64, 8):
        made = skip.launch(operand(768, 3072), tokens, 132, SHARED).definitions
        assert made["LANES"] == lanes and 32 * made["WARPS"] // lanes * made["ROWS"] == 128
    assert skip.depth(SHARED) == skip.depth(166_912) == 512 and skip.depth(101_376) == 256
    assert skip.launch(operand(768, 3072, 256), 8192, 128, 101_376).shared <= 101_376
    with pytest.raises(Unavailable, match="needs 131072 bytes of shared memory a block of threads, the device has 101376"):
        skip.launch(operand(768, 3072), 8192, 128, 101_376)


def test_what_cannot_run_says_what_it_needs():
    for structure, dtype, reason in (
        (Unstructured(0.01), torch.bfloat16, "needs a CUDA device, got an operand on cpu"),
        (Unstructured(0.5), torch.bfloat16, "needs at most 1 of 8 weights kept, got 50%"),
        (Balanced(1, 0.05), torch.float32, "needs bfloat16 or float16, got torch.float32"),
        (NM(1, 64), torch.bfloat16, "needs a CUDA device"),
        (NM(2, 8, "out"), torch.bfloat16, "needs at most 1 of 8 weights kept, got 25%"),
        (Diagonal(0.05), torch.bfloat16, "needs a CUDA device"),
    ):
        packed = structure.pack(torch.zeros(64, 128, dtype=dtype))
        for product in "spmm", "spmmt":
            with pytest.raises(Unavailable, match=reason):
                structure.kernels(product)["cuda_skip"](packed)


# ---- the source, on a CPU


@pytest.fixture
def small(emulator, monkeypatch):  # noqa: F811
    """An imaginary GPU of a few processors."""
    def set_up(processors: int, late: bool):
        monkeypatch.setattr(cuda, "processors", lambda device: processors)
        monkeypatch.setattr(cuda, "shared_bytes", lambda device: SHARED)
        emulator.late = late
        return emulator

    return set_up


@pytest.mark.parametrize("shape, density, tokens, depth, processors, parts, features, dtype", [
    ((150, 300), 0.05, 1, 64, 2, 1, False, torch.bfloat16),  # two blocks of threads; five blocks of inputs, the last one short
    ((40, 200), 0.1, 20, 32, 3, 3, False, torch.float16),  # the inputs in parts
    ((70, 130), 0.12, 64, 32, 1, 1, True, torch.float16),  # teams of eight
    ((520, 70), 0.05, 96, 32, 9, 1, False, torch.bfloat16),  # many tokens: two blocks of 512 outputs, strips of 64 tokens
    ((520, 70), 0.05, 80, 32, 9, 1, True, torch.bfloat16),
], ids=str)
def test_the_source_run_on_a_cpu_equals_float64(small, shape, density, tokens, depth, processors, parts, features, dtype):
    """Every thread of it, with copies as early and as late as they may be; some outputs have more entries, others none."""
    weight, x = sparse(shape, density, dtype), draw(tokens, shape[1], dtype=dtype, seed=2)
    weight[3], weight[5:8] = draw(shape[1], dtype=dtype, seed=3), 0
    x = x.T.contiguous().T if features else x
    want = x.double() @ weight.double().T
    for late in False, True:
        emulator = small(processors, late)
        got = skip.product_plan(arranged(weight, depth))(x)
        assert got.shape == want.shape and got.dtype == dtype and (got.stride(0) == 1) == features
        error = (got.double() - want).abs().max() / want.abs().max()
        assert error < torch.finfo(dtype).eps, (late, float(error))
    assert [file for file, *_ in emulator.launches] == 2 * ["skip.cu", *["sums.cu"] * (parts > 1)]


def test_what_is_not_stored_is_not_multiplied(small):
    """An infinite activation reaches those outputs that have a weight for it, and no other; whole numbers are exact."""
    small(1, True)
    weight = torch.zeros(20, 40, dtype=torch.bfloat16)
    weight[::3, 7], weight[1::3, 8] = 2, 3
    x = torch.ones(5, 40, dtype=torch.bfloat16)
    x[2, 7] = torch.inf
    run = skip.product_plan(arranged(weight, 32))
    got = run(x)
    assert torch.equal(got[[0, 1, 3, 4]], x[[0, 1, 3, 4]] @ weight.T) and got[2, ::3].isinf().all() and (got[2, 1::3] == 3).all() and not got[2, 2::3].any()
    assert run(x[:0]).shape == (0, 20)
    with pytest.raises(ValueError, match="x must be torch.bfloat16"):
        run(x.half())


def test_structures_reach_the_kernel(small, monkeypatch):
    """From the packed operand of each, forward and transposed, in one compilation."""
    small(1, False)
    monkeypatch.setattr(skip.bitmap, "require", lambda values: None)
    for structure in Unstructured(0.05), Balanced(2, 0.1), NM(1, 64), NM(1, 64, "out"), Diagonal(0.05):
        packed = structure.pack(structure.project(draw(64, 128)))
        weight = structure.unpack(packed).double()
        for product, matrix in ("spmm", weight), ("spmmt", weight.T):
            x = draw(5, matrix.shape[1], seed=1)
            want = x.double() @ matrix.T
            error = (structure.kernels(product)["cuda_skip"](packed)(x).double() - want).abs().max() / want.abs().max()
            assert error < torch.finfo(torch.bfloat16).eps, (structure, product)


# ---- machine code


@pytest.mark.parametrize("lanes, warps, rows, features, architecture", [
    (8, 16, 8, 0, "sm_90a"), (1, 4, 1, 0, "sm_80"), (8, 16, 8, 1, "sm_100a"),
])
def test_machine_code(lanes, warps, rows, features, architecture):
    """Four weights a load and 8 tokens a load, nothing spilt, activations fetched in the background by 16 bytes."""
    pytest.importorskip("triton", reason="needs triton, whose tools read machine code")
    from machine_code import can_compile_cuda, cuda_compiled

    if not can_compile_cuda():
        pytest.skip("needs nvcc or NVRTC")
    parts = int(warps == 4)
    definitions = {"LANES": lanes, "WARPS": warps, "ROWS": rows, "DEEP": 512, "STAGES": 3, "BFLOAT": 1, "PARTS": parts, "FEATURES": features}
    made = cuda_compiled(SOURCES / "skip.cu", cuda.options(definitions), skip.stage_bytes(512, lanes) * 3, architecture)
    assert made.spilt == 0 and made.shared <= SHARED and made.registers * 32 * warps <= 65_536
    assert made.count("LDG.E.128.CONSTANT") >= rows and made.count("LDS.128") >= 4 * rows and made.count("LDGSTS.E.BYPASS.128") >= 1
    assert made.count("LDG.E.U16") == made.count("LDS.U16") == 0 and made.count("FFMA") >= 32 * rows
    assert (made.count("STG.E.128") >= 1) == (not parts)


# ---- where there is a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("structure, shape", [
    (Unstructured(0.01), (1000, 1100)), (Unstructured(0.04), (512, 4096)), (Balanced(16, 0.05), (300, 1024)), (NM(1, 64), (256, 2048)),
    (Diagonal(0.02), (512, 1024)), (Diagonal(0.1), (1000, 300)),
], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu_it_equals_float64(structure, shape, dtype):
    packed = structure.pack(structure.project(draw(*shape, dtype=dtype).cuda()))
    weight = structure.unpack(packed).double()
    for product, matrix in ("spmm", weight), ("spmmt", weight.T):
        run = structure.kernels(product)["cuda_skip"](packed)
        for tokens in 0, 1, 3, 16, 30, 64, 200, 4096:
            x = draw(tokens, matrix.shape[1], dtype=dtype, seed=1).cuda()
            for given in x, x.T.contiguous().T:
                want = x.double() @ matrix.T
                error = (run(given).double() - want).abs().max() / want.abs().max() if tokens else 0
                assert error < 2 * torch.finfo(dtype).eps, (tokens, float(error))
