"""The fused first half of a gated MLP and its backward pass: numbers in the interpreter, machine code ahead of time."""

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
        dg, du = (draw(tokens, 256).to(dtype) for _ in range(2))
        weights = [block.unpack(part).double() for part in (gate, up)]
        sampled = block.sddmm_reference(gate._replace(values=gate.values.double()))
        right = dg.double() @ weights[0] + du.double() @ weights[1], *(sampled(part.double(), x.double()) for part in (dg, du))
        got = block.both_spmmt_triton(gate, up)(dg, du), *block.both_sddmm_triton(gate, up)(dg, du, x)
        for name, mine, right in zip(("dx", "dgate", "dup"), got, right):
            assert mine.dtype == dtype and mine.shape == right.shape
            error = (mine.double() - right).abs().max() / right.abs().max() if tokens else mine.abs().sum()
            assert error < 4 * torch.finfo(dtype).eps, (block, dtype, tokens, name, float(error))
"""


def test_forward_and_backward_equal_float64():
    pytest.importorskip("triton", reason=TRITON)
    done = interpreted(code=NUMBERS)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


SPLIT = """
import torch
from sparsesurvey.kernels.block import split
from sparsesurvey.structures import Block
block, generator = Block(64, 32, 0.25), torch.Generator().manual_seed(0)
draw = lambda *size: torch.randn(size, generator=generator)
assert split(600, 2, 3) == 2
mask = block.mask(draw(128, 128))
gate, up = (block.pack(draw(128, 128) * mask) for _ in range(2))
dg, du, x = (draw(600, 128) for _ in range(3))
for mine, part in zip(block.both_sddmm_triton(gate, up)(dg, du, x), (dg, du)):
    right = block.sddmm_reference(gate)(part, x)
    assert (mine - right).abs().max() < 1e-5 * right.abs().max()
"""


def test_tokens_that_several_programs_share_are_added_up():
    pytest.importorskip("triton", reason=TRITON)
    done = interpreted(code=SPLIT)
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


WHOLE = """
import torch
from sparsesurvey.structure import Unavailable
from sparsesurvey.structures import Block
generator = torch.Generator().manual_seed(0)
draw = lambda *size: torch.randn(size, generator=generator)
for block, hidden, inn, dtype in (
    (Block(32, 64, 0.25), 128, 192, torch.float32), (Block(64, 16, 0.5), 128, 64, torch.float16), (Block(128, 128, 0.5), 256, 256, torch.bfloat16),
):
    mask = block.mask(draw(hidden, inn))
    gate, up = (block.pack((draw(hidden, inn) / 8 * mask).to(dtype)) for _ in range(2))
    down = block.pack(block.project(draw(inn, hidden)).to(dtype))
    run = block.mlp_triton(gate, up, down)
    for tokens in 0, 1, 45:
        x = draw(inn, tokens).to(dtype).T
        g, u = (x.double() @ block.unpack(part).double().T for part in (gate, up))
        right = (torch.nn.functional.silu(g) * u) @ block.unpack(down).double().T
        mine = run(x)
        assert mine.dtype == dtype and mine.shape == right.shape
        error = (mine.double() - right).abs().max() / right.abs().max() if tokens else 0
        assert error < 8 * torch.finfo(dtype).eps, (block, dtype, tokens, float(error))
    none = down._replace(values=torch.zeros_like(down.values))
    assert not block.mlp_triton(gate, up, none)(x).any()
sparse = Block(16, 16, 1 / 16)  # one block each, which do not meet
gate = sparse.pack(torch.block_diag(torch.ones(16, 16), torch.zeros(48, 48)))
down = sparse.pack(torch.block_diag(torch.zeros(48, 48), torch.ones(16, 16)))
assert not sparse.mlp_triton(gate, gate, down)(torch.ones(3, 64)).any()
assert (sparse.mlp_triton(gate, gate, gate)(torch.ones(3, 64)).count_nonzero(1) == 16).all()
block = Block(128, 128, 0.5)
gate, down, wide = (block.pack(block.project(torch.randn(shape))) for shape in ((256, 128), (128, 256), (1024, 256)))
for wrong, error, said in ((wide, Unavailable, "needs at most 768 outputs, whose sums fit the registers, got 1024"),
                           (gate, ValueError, "down must have the 256 outputs of gate as its inputs, got 128")):
    try:
        block.mlp_triton(gate, gate, wrong)
    except error as told:
        assert said in str(told), told
    else:
        raise AssertionError
"""


def test_the_whole_mlp_equals_float64():
    """Blocks of any sides, any tokens and layout, hidden features that nothing reads or makes; and what it cannot do."""
    pytest.importorskip("triton", reason=TRITON)
    done = interpreted(code=WHOLE)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


FORWARD = {"x": "TK", "gate": "NK", "up": "NK", "dh": "TN", "first_out": "TN", "second_out": "TN"}
INPUT = {"dg": "TK", "du": "TK", "gate": "KN", "up": "KN", "dx": "TN"}
WEIGHT = {"dg": "TN", "du": "TN", "x": "TK"}
ALL = {"x": "TK", "gate": "NK", "up": "NK", "down": "ON", "y": "TO"}


@pytest.mark.parametrize("kernel, tiles, block, deep, tokens, warps, stages, more, instruction, loads", [
    ("gated", FORWARD, 128, 64, 128, 8, 3, {"BACKWARD": False}, "HGMMA.64x128x16", 9),
    ("gated", FORWARD, 128, 64, 64, 8, 4, {"BACKWARD": True}, "HGMMA.64x64x16", 13),  # dh behind the loop
    ("gated", FORWARD, 64, 64, 128, 8, 4, {"BACKWARD": False}, "HGMMA.64x64x16", 12),
    ("together", INPUT, 128, 64, 128, 8, 3, {}, "HGMMA.64x128x16", 12),
    ("together", INPUT, 64, 64, 256, 8, 2, {}, "HGMMA.64x64x16", 8),
    ("sample", WEIGHT, 128, 128, 64, 8, 4, {}, "HGMMA.64x128x16", 12),
    ("whole", ALL, 128, 64, 64, 8, 4, {"OUTPUTS": 6, "COLS": 128, "BO": 128, "BN": 64}, "HGMMA.64x64x16", 18),  # and the six of D
    ("whole", ALL, 64, 64, 64, 8, 3, {"OUTPUTS": 12, "COLS": 64, "BO": 64}, "HGMMA.64x32x16", 21),
])
def test_hopper_code(kernel, tiles, block, deep, tokens, warps, stages, more, instruction, loads):
    """Tensor cores, nothing spilt, and every tile of a stage is fetched by descriptor: three, or four of ``together``.

    The sums of ``whole`` leave hardly a register.
    """
    pytest.importorskip("triton", reason=TRITON)
    from machine_code import compiled

    from sparsesurvey.kernels import swiglu, whole

    code = whole.whole if kernel == "whole" else getattr(swiglu, kernel)
    widths = {"TARGET": block, "SOURCE": block, "ROWS": block, "COLS": block, "PROGRAMS": 132, "EXACT": False, "READY": True, "TMA": True}
    constants = {**{name: size for name, size in widths.items() if name in code.arg_names}, "BT": tokens, "BN": block, "BK": deep, **more}
    pointers = ("pointers", "sources", "places", "order", "rows", "columns", "table")
    types = {name: "*i32" if name in pointers else "*fp32" if name.endswith("_out") else "i32"
             for name in code.arg_names if name not in constants}
    types |= {name: f"tensordesc<bf16[{','.join(str(constants[f'B{side}']) for side in tile)}]>" for name, tile in tiles.items()}
    made = compiled(code, types, constants, num_warps=warps, num_stages=stages)
    assert made.count(instruction) >= 1 and not made.spilt and made.shared <= SHARED
    assert made.count("UTMALDG") == loads
