"""The block-sparse Triton kernels without a GPU: their numbers in the interpreter, their machine code ahead of time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsesurvey.kernels.launch import SHARED, bucket, tuning
from sparsesurvey.structure import Unavailable
from sparsesurvey.structures import Block

HERE = Path(__file__).parent
TRITON = "needs triton"


def interpreted(*names: str, code: str = "") -> subprocess.CompletedProcess:
    """Contract tests of these kernels, or some code, in a process whose Triton is interpreted: it can be only one of both."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    wanted = " or ".join(f"({name})" for name in names)
    command = ["-c", code] if code else ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "test_contract.py", "-k", wanted]
    return subprocess.run([sys.executable, *command], cwd=HERE, env=environment, capture_output=True, text=True)


def test_the_contract_holds_in_the_interpreter():
    """Every check of a kernel: float64, any layout, no token at all, zero weights, wrong and corrupt operands."""
    pytest.importorskip("triton", reason=TRITON)
    done = interpreted("triton and block and 32x32 and 50 and not permuted", "triton and block and 16x64 and 25 and not permuted")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    passed = int(done.stdout.split(" passed")[0].split()[-1])
    assert passed >= 40, done.stdout


WIDE = """
import torch
from sparsesurvey.structures import Block
for block, dtype in ((Block(128, 128, 0.4), torch.bfloat16), (Block(256, 16, 0.5), torch.float16), (Block(16, 256, 0.5), torch.float32)):
    shape = (2 * max(block.rows, 128), 2 * max(block.cols, 128))
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(size, generator=generator).to(dtype)
    packed = block.pack(block.project(draw(*shape)))
    weight, x, dy = block.unpack(packed).double(), draw(300, shape[1]), draw(300, shape[0])
    right = {"spmm": x.double() @ weight.T, "spmmt": dy.double() @ weight,
             "sddmm": block.sddmm_reference(block.pack(weight))(dy.double(), x.double())}
    one = block.spmm_triton(packed)(x[:1].T.contiguous().T)  # a single row, whose stride is 1
    assert torch.equal(one, block.spmm_triton(packed)(x[:1]))
    for product, inputs in (("spmm", (x,)), ("spmmt", (dy,)), ("sddmm", (dy, x))):
        error = block.kernels(product)["triton"](packed)(*inputs).double() - right[product]
        assert error.abs().max() < 4 * torch.finfo(dtype).eps * right[product].abs().max(), (block, product, error.abs().max())
"""


def test_wide_blocks_are_cut_and_tokens_split():
    """Blocks wider than a tile, tokens that two programs a block share, and bf16 as a GPU rounds it."""
    pytest.importorskip("triton", reason=TRITON)
    done = interpreted(code=WIDE)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


def test_what_cannot_run_says_what_it_needs():
    pytest.importorskip("triton", reason=TRITON)
    for block, shape, dtype, reason in (
        (Block(32, 32, 0.5), (64, 64), torch.bfloat16, "needs a CUDA device, got an operand on cpu"),
        (Block(32, 32, 0.5), (64, 64), torch.float64, "needs bfloat16 or float16, got torch.float64"),
        (Block(8, 8, 0.5), (64, 64), torch.bfloat16, "needs blocks whose sides are powers of two of at least 16, got 8x8"),
        (Block(24, 32, 0.5), (48, 64), torch.bfloat16, "got 24x32"),
    ):
        packed = block.pack(torch.zeros(shape, dtype=dtype))
        for product in ("spmm", "spmmt", "sddmm"):
            with pytest.raises(Unavailable, match=reason):
                block.kernels(product)["triton"](packed)


def test_arrangement_by_hand():
    """Four blocks in three block rows and two block columns; row 2 has two of them and comes first."""
    pytest.importorskip("triton", reason=TRITON)
    from sparsesurvey.kernels.block import arrange

    rows, columns = torch.tensor([0, 2, 2]), torch.tensor([1, 0, 1])
    forward = arrange(torch.zeros(3, 16, 16), rows, columns, (3, 16), (2, 16), transposed=False)
    assert forward.pointers.tolist() == [0, 1, 1, 3] and forward.order.tolist() == [2, 0, 1]
    assert forward.sources.tolist() == [1, 0, 1, 0] and forward.places.tolist() == [0, 1, 2, 0]  # and one to look ahead at
    back = arrange(torch.zeros(3, 16, 16), columns, rows, (2, 16), (3, 16), transposed=True)
    assert back.pointers.tolist() == [0, 1, 3] and back.places.tolist() == [1, 0, 2, 0] and back.sources.tolist() == [2, 0, 2, 0]


def test_tokens_that_share_a_tuning_and_parts_of_at_least_256():
    pytest.importorskip("triton", reason=TRITON)
    from sparsesurvey.kernels.block import split

    assert [bucket(tokens) for tokens in (1, 16, 17, 4096, 4097)] == [16, 16, 32, 4096, 8192]
    few, many = (tuning(torch.zeros(tokens, 1)) for tokens in (4096, 4097))
    assert few != many == tuning(torch.zeros(8192, 1)) and few % 16 == many % 16 == 0
    assert split(100, 4, 132) == 1 and split(8192, 10_000, 132) == 1 and split(8192, 64, 132) == 5 and split(8192, 1, 132) == 16


# ---- machine code


def multiply(dtype, target, source, transposed, tokens, warps, stages, capability=90):
    from machine_code import compiled

    from sparsesurvey.kernels import block

    wide, deep = min(target, block.WIDE), min(source, block.DEEP)
    tile = lambda *shape: f"tensordesc<{dtype}[{shape[0]},{shape[1]}]>" if capability >= 90 else f"*{dtype}"
    weight = tile(deep, wide) if transposed else tile(wide, deep)
    types = {"x": tile(tokens, deep), "values": weight, "y": tile(tokens, wide), **dict.fromkeys(
        ("pointers", "sources", "places", "order"), "*i32"), **dict.fromkeys(("tokens", "targets", "stored"), "i32"),
        **dict.fromkeys(("x_width", "value_width", "y_width", "KEY"), "i32")}
    constants = {"TARGET": target, "SOURCE": source, "TRANSPOSED": transposed, "EXACT": False, "READY": True, "TMA": capability >= 90,
                 "PROGRAMS": 132, "BT": tokens, "BN": wide, "BK": deep}
    return compiled(block.multiply, types, constants, capability, num_warps=warps, num_stages=stages)


def sample(dtype, rows, cols, tokens, warps, stages, capability=90):
    from machine_code import compiled

    from sparsesurvey.kernels import block

    tile = lambda width: f"tensordesc<{dtype}[{tokens},{width}]>" if capability >= 90 else f"*{dtype}"
    tall, wide = min(rows, block.WIDE), min(cols, block.WIDE)
    types = {"dy": tile(tall), "x": tile(wide), "out": "*fp32", "rows": "*i32", "columns": "*i32", "tokens": "i32", "each": "i32",
             "dy_width": "i32", "x_width": "i32", "KEY": "i32"}
    constants = {"ROWS": rows, "COLS": cols, "EXACT": False, "READY": True, "TMA": capability >= 90, "BT": tokens, "BN": tall, "BK": wide}
    return compiled(block.sample, types, constants, capability, num_warps=warps, num_stages=stages)


@pytest.mark.parametrize("case, instruction", [
    (("bf16", 128, 128, False, 256, 8, 3), "HGMMA.64x128x16.F32.BF16"),
    (("bf16", 64, 64, False, 256, 8, 4), "HGMMA.64x64x16.F32.BF16"),
    (("bf16", 32, 32, False, 256, 8, 4), "HGMMA.64x32x16.F32.BF16"),
    (("bf16", 16, 16, False, 128, 4, 4), "HGMMA.64x16x16.F32.BF16"),
    (("bf16", 128, 128, True, 256, 8, 3), "HGMMA.64x128x16.F32.BF16"),
    (("bf16", 64, 16, True, 128, 4, 4), "HGMMA.64x64x16.F32.BF16"),
    (("fp16", 64, 64, False, 128, 8, 4), "HGMMA.64x64x16.F32"),
], ids=str)
def test_hopper_code_of_the_forward_product_and_the_input_gradient(case, instruction):
    pytest.importorskip("triton", reason=TRITON)
    code = multiply(*case)
    assert code.count(instruction) >= 1 and code.spilt == 0 and code.shared <= SHARED
    assert code.count("UTMALDG") == 2 * case[-1], "two tiles a stage: the pipeline has all of its stages"
    assert code.count("UTMASTG") >= 1 and code.count("LDG.E.U16") == 0


@pytest.mark.parametrize("case, instruction", [
    (("bf16", 128, 128, 64, 8, 4), "HGMMA.64x128x16.F32.BF16"),
    (("bf16", 64, 64, 64, 4, 4), "HGMMA.64x64x16.F32.BF16"),
    (("bf16", 32, 32, 64, 4, 4), "HMMA.16816.F32.BF16"),  # wgmma wants 64 rows
], ids=str)
def test_hopper_code_of_the_weight_gradient(case, instruction):
    pytest.importorskip("triton", reason=TRITON)
    code = sample(*case)
    assert code.count(instruction) >= 1 and code.spilt == 0 and code.shared <= SHARED
    assert code.count("UTMALDG") == 2 * case[-1] and code.count("LDG.E.U16") == 0


def test_ampere_and_blackwell_code():
    pytest.importorskip("triton", reason=TRITON)
    ampere = multiply("bf16", 64, 64, False, 64, 4, 4, 80), sample("bf16", 64, 64, 64, 4, 3, 80)
    for code in ampere:
        assert code.count("HMMA.16816.F32.BF16") and code.count("LDGSTS") and not code.spilt and not code.count("LDG.E.U16")
    blackwell = multiply("bf16", 64, 64, False, 128, 8, 4, 100), sample("bf16", 64, 64, 64, 4, 3, 100)
    for code in blackwell:
        assert code.count("UTCHMMA") and not code.spilt
