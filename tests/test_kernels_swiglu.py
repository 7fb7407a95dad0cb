"""The fused first half of a gated MLP: its numbers in the interpreter, its machine code ahead of time."""

import pytest
import torch

from sparsesurvey.kernels.launch import SHARED
from sparsesurvey.structure import Unavailable
from sparsesurvey.structures import Block
from test_kernels_block import TRITON, interpreted

NUMBERS = """
import torch
from sparsesurvey.structures import Block
generator = torch.Generator().manual_seed(0)
draw = lambda *size: torch.randn(size, generator=generator)
for block, dtype in ((Block(32, 64, 0.25), torch.float32), (Block(128, 128, 0.5), torch.bfloat16), (Block(16, 16, 0.3), torch.float16)):
    mask = block.mask(draw(256, 256))
    gate, up = (block.pack((draw(256, 256) / 8 * mask).to(dtype)) for _ in range(2))
    for tokens in 0, 1, 45:
        x, dh = draw(tokens, 256).to(dtype), draw(tokens, 256).to(dtype)
        g, u = ((x.double() @ block.unpack(part).double().T).requires_grad_() for part in (gate, up))
        h = torch.nn.functional.silu(g) * u
        h.backward(dh.double())
        got = block.swiglu_triton(gate, up)(x), *block.swiglu_triton(gate, up, backward=True)(x, dh)
        for name, mine, right in zip(("h", "dg", "du"), got, (h.detach(), g.grad, u.grad)):
            assert mine.dtype == dtype and mine.shape == right.shape
            error = (mine.double() - right).abs().max() / right.abs().max() if tokens else 0
            assert error < 4 * torch.finfo(dtype).eps, (block, dtype, tokens, name, float(error))
"""


def test_forward_and_backward_equal_float64():
    pytest.importorskip("triton", reason=TRITON)
    done = interpreted(code=NUMBERS)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


def test_the_two_weights_must_have_one_pattern():
    pytest.importorskip("triton", reason=TRITON)
    block = Block(32, 32, 0.5)
    with pytest.raises(Unavailable, match="needs a CUDA device"):
        packed = block.pack(torch.zeros(64, 64, dtype=torch.bfloat16))
        block.swiglu_triton(packed, packed)
    done = interpreted(code="""
import torch
from sparsesurvey.structures import Block
block, weight = Block(32, 32, 0.5), torch.randn(64, 64)
gate, up = (block.pack(weight * mask) for mask in (block.mask(weight), block.mask(-weight)))
try:
    block.swiglu_triton(gate, up)
except ValueError as error:
    assert "up must have the blocks of gate" in str(error)
else:
    raise AssertionError
""")
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("block, tokens, warps, stages, backward, instruction, loads", [
    (128, 128, 8, 3, False, "HGMMA.64x128x16", 9), (128, 64, 8, 4, True, "HGMMA.64x64x16", 13), (64, 128, 8, 4, False, "HGMMA.64x64x16", 12),
])
def test_hopper_code(block, tokens, warps, stages, backward, instruction, loads):
    pytest.importorskip("triton", reason=TRITON)
    from machine_code import compiled

    from sparsesurvey.kernels import swiglu

    tile = lambda *shape: f"tensordesc<bf16[{shape[0]},{shape[1]}]>"
    types = {"x": tile(tokens, 64), "gate": tile(block, 64), "up": tile(block, 64), **dict.fromkeys(
        ("dh", "first_out", "second_out"), tile(tokens, block)), **dict.fromkeys(("pointers", "sources", "order"), "*i32"),
        **dict.fromkeys(("tokens", "targets", "stored", "x_width", "value_width", "y_width", "KEY"), "i32")}
    constants = {"TARGET": block, "SOURCE": block, "BACKWARD": backward, "EXACT": False, "READY": True, "TMA": True, "PROGRAMS": 132,
                 "BT": tokens, "BN": block, "BK": 64}
    code = compiled(swiglu.gated, types, constants, num_warps=warps, num_stages=stages)
    assert code.count(instruction) >= 1 and not code.spilt and code.shared <= SHARED
    assert code.count("UTMALDG") == loads, "three tiles a stage, and dh behind the loop"
