"""The Triton kernels for panels without a GPU: their numbers in the interpreter, their machine code ahead of time."""

import pytest
import torch

from sparsesurvey.kernels.launch import SHARED
from sparsesurvey.structure import Unavailable
from sparsesurvey.structures import TVW, VNM, HiNM, TileWise, VectorNM
from sparsesurvey.structures.block import Panel
from test_kernels_block import TRITON, interpreted


def test_the_contract_holds_in_the_interpreter():
    """One of each structure that is made of panels: float64, any layout, no token at all, zero weights, wrong operands."""
    pytest.importorskip("triton", reason=TRITON)
    names = "16:2:8", "HiNM and 64", "TW and 50 and not only and not 128 and not 2:4", "TW and 2:4 and 40", "vector and 16x8"
    done = interpreted(*(f"triton and {name} and not permuted" for name in names))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    passed = int(done.stdout.split(" passed")[0].split()[-1])
    assert passed >= 100, done.stdout


NUMBERS = """
import torch
from sparsesurvey.structures.block import Panel
from sparsesurvey.kernels import panel
generator = torch.Generator().manual_seed(0)
draw = lambda *size: torch.randn(size, generator=generator)

def check(counts, height, inn, tokens, dtype, each=1, features=False):
    names = [torch.randperm(inn, generator=generator)[:count].sort().values for count in counts]
    weights = [draw(len(name) * each, height).to(dtype) for name in names]
    like = torch.empty(sum(counts), height, each, dtype=dtype)
    made = [Panel(*parts) for parts in zip(names, weights)], (len(counts), inn), like
    dense = torch.zeros(len(counts), height, inn, each, dtype=torch.float64)
    for whole, name, weight in zip(dense, names, weights):
        whole[:, name] = weight.double().view(-1, each, height).permute(2, 0, 1)
    dense = dense.view(len(counts) * height, inn * each)
    x, dy = draw(tokens, inn * each).to(dtype), draw(tokens, len(dense)).to(dtype)
    if features:
        x = x.T.contiguous().T
    full = (dy.double().T @ x.double()).view(len(counts), height, inn, each)
    pairs = ((panel.gather_plan(*made)(x), x.double() @ dense.T), (panel.spread_plan(*made)(dy), dy.double() @ dense),
             (panel.scatter_plan(*made)(dy), dy.double() @ dense),
             (panel.sample_plan(*made)(dy, x), torch.cat([full[at][:, name].transpose(0, 1) for at, name in enumerate(names)])))
    for got, want in pairs:
        assert got.shape == want.shape and got.dtype == dtype, (got.shape, want.shape)
        error = (got.double() - want).abs().max() / want.abs().max()
        assert error < 4 * torch.finfo(dtype).eps, (counts, height, tokens, dtype, float(error))
    assert (pairs[0][0].stride(0) == 1) == features

check((3, 0, 65, 7), 16, 80, 45, torch.float32)                 # panels of any length, none among them, in two steps
check((20, 64), 100, 64, 33, torch.float16)                     # a height that is no power of two
check((5, 9), 256, 16, 20, torch.bfloat16)                      # two tiles of outputs
check((600, 500), 16, 640, 17, torch.float32)                   # long enough for the weight gradient to take 128 inputs
check((30,), 32, 40, 600, torch.float32)                        # more strips than one group; tokens in parts
check((12, 7, 9), 16, 20, 48, torch.float32, each=3)            # groups of three inputs
check((24, 30), 32, 48, 64, torch.float32, features=True)       # feature-major in, feature-major out
"""


def test_any_panels_equal_float64():
    pytest.importorskip("triton", reason=TRITON)
    done = interpreted(code=NUMBERS)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


def test_stack_by_hand():
    """Three panels of two outputs: inputs 1 and 3, none, and input 2, which fills its panel up by its own name."""
    pytest.importorskip("triton", reason=TRITON)
    from sparsesurvey.kernels import panel

    made = [Panel(torch.tensor([1, 3]), torch.tensor([[1.0, 2], [3, 4]])), Panel(torch.tensor([], dtype=torch.int64), torch.zeros(0, 2)),
            Panel(torch.tensor([2]), torch.tensor([[5.0, 6]]))]
    stacked = panel.stack(made, (3, 4), torch.zeros(3, 2, 1))
    assert stacked.weights.shape == (128, 16) and stacked.pointers.tolist() == [0, 64, 64, 128] and stacked.step == 64
    assert stacked.places.tolist() == [0, 1, 64] and stacked.weights[stacked.places, :2].tolist() == [[1, 2], [3, 4], [5, 6]]
    assert stacked.weights.count_nonzero() == 6
    assert stacked.inputs[:128].tolist() == [1] + [3] * 63 + [2] * 64 and len(stacked.inputs) == 192
    assert stacked.order.tolist() == [0, 2, 1] and stacked.shape == (6, 4)
    assert panel.find(stacked).tolist() == [[-1, 0, -1, 1], [-1] * 4, [-1, -1, 64, -1], [-1] * 4]


def test_feature_major_takes_what_it_can():
    from sparsesurvey.kernels.features import feature_major

    whole = torch.arange(96.0).view(2, 48)
    rows, taken = feature_major(whole[:, :32].T)  # 32 tokens of 2 features, in rows of 48
    assert taken and rows.data_ptr() == whole.data_ptr() and rows.stride() == (48, 1)
    for x in whole[:, :20].T, whole.view(48, 2), whole[:, 1:33].T, whole[:1, :1].expand(2, 32).T:
        rows, taken = feature_major(x)
        assert not taken and torch.equal(rows[:, : len(x)], x.T) and not rows[:, len(x):].any() and rows.shape[1] % 16 == 0


def test_what_cannot_run_says_what_it_needs():
    pytest.importorskip("triton", reason=TRITON)
    for structure, shape, dtype, reason in (
        (VNM(64, 2, 8), (64, 64), torch.bfloat16, "needs a CUDA device, got an operand on cpu"),
        (HiNM(32), (64, 64), torch.float64, "needs bfloat16 or float16, got torch.float64"),
        (TileWise(16), (64, 64), torch.float32, "needs bfloat16 or float16, got torch.float32"),
        (TVW(8, 0.25), (64, 64), torch.bfloat16, "needs panels of at least 16 outputs that share their inputs, got 8"),
        (VectorNM(4, 2, 4), (64, 64), torch.bfloat16, "needs panels of at least 16 outputs that share their inputs, got 4"),
    ):
        packed = structure.pack(torch.zeros(shape, dtype=dtype))
        for product in ("spmm", "spmmt", "sddmm"):
            for kernel in (name for name in structure.kernels(product) if name.startswith("triton")):
                with pytest.raises(Unavailable, match=reason):
                    structure.kernels(product)[kernel](packed)


# ---- machine code


def code(kernel, dtype, height, tokens, warps, stages, capability=90, **constants):
    """The machine code of one of the kernels for panels of one tile of ``height`` outputs."""
    from machine_code import compiled

    from sparsesurvey.kernels import panel

    kind = {**dict.fromkeys(("inputs", "pointers", "order", "slots", "owners", "real"), "*i32"), "out": "*fp32", "sums": "*fp32"}
    ints = {"tokens", "panels", "each", "KEY"}
    wide, _ = panel.cut(max(panel.LOW, panel.power_of_two(height)))
    fixed = {"HEIGHT": height, "PIECES": 1, "FEATURES": False, "EXACT": False, "BT": tokens, "BN": wide, "BK": 64, "GROUP": 8}
    fixed = {name: constants.get(name, value) for name, value in fixed.items() if name in kernel.arg_names}
    types = {name: kind.get(name, "i32" if name in ints or name.endswith("_width") else f"*{dtype}")
             for name in kernel.arg_names if name not in fixed}
    return compiled(kernel, types, fixed, capability, num_warps=warps, num_stages=stages)


def check_hopper(made, instruction: str, buffers: int) -> None:
    """Tensor cores by wgmma, nothing spilt, single numbers fetched nowhere, and as many stages as were asked for."""
    assert made.count(instruction) >= 1 and made.spilt == 0
    assert made.count("LDGSTS.E.BYPASS.128") >= 1 and made.count("LDG.E.U16") == 0 and made.count("LDGSTS.E.64") == 0
    assert buffers <= made.shared <= SHARED


@pytest.mark.parametrize("dtype, height, tokens, warps, stages", [
    ("bf16", 128, 256, 8, 4), ("bf16", 128, 128, 8, 4), ("bf16", 64, 256, 8, 4), ("bf16", 64, 128, 4, 4), ("bf16", 16, 128, 4, 4),
    ("fp16", 64, 128, 8, 4),
])
def test_hopper_code_of_the_forward_product(dtype, height, tokens, warps, stages):
    pytest.importorskip("triton", reason=TRITON)
    from sparsesurvey.kernels import panel

    made = code(panel.gather, dtype, height, tokens, warps, stages)
    check_hopper(made, f"HGMMA.64x{height}x16.F32", 2 * stages * 64 * (tokens + height))
    assert made.count("STG.E.128") >= 1 and made.count("STG.E.U16") == 0


def test_hopper_code_with_a_feature_major_result():
    pytest.importorskip("triton", reason=TRITON)
    from sparsesurvey.kernels import panel

    made = code(panel.gather, "bf16", 64, 128, 4, 4, FEATURES=True)
    check_hopper(made, "HGMMA.64x64x16.F32.BF16", 2 * 4 * 64 * (128 + 64))
    assert made.count("STG.E.128") >= 1 and made.count("STG.E.U16") == 0


@pytest.mark.parametrize("height, tokens, warps, stages", [(128, 256, 8, 3), (64, 128, 8, 4), (32, 128, 8, 4)])
def test_hopper_code_of_the_input_gradient(height, tokens, warps, stages):
    pytest.importorskip("triton", reason=TRITON)
    from sparsesurvey.kernels import panel

    deep = min(64, height)
    made = code(panel.spread, "bf16", height, tokens, warps, stages, BN=128, BK=deep, PIECES=height // deep)
    check_hopper(made, "HGMMA.64x128x16.F32.BF16", 2 * stages * deep * (tokens + 128))


@pytest.mark.parametrize("height, inputs, tokens, warps", [(128, 128, 128, 8), (64, 64, 128, 4)])
def test_hopper_code_of_the_input_gradient_that_adds_in_memory(height, inputs, tokens, warps):
    pytest.importorskip("triton", reason=TRITON)
    from sparsesurvey.kernels import panel

    made = code(panel.scatter, "bf16", height, tokens, warps, 2, BK=inputs)
    assert made.count("HGMMA.64x128x16.F32.BF16") >= 1 and made.spilt == 0 and made.shared <= SHARED and made.count("LDG.E.U16") == 0
    assert made.count("REDG.E.ADD.F32x4") >= 1 and made.count("REDG") == made.count("REDG.E.ADD.F32x4"), "four sums an operation"


@pytest.mark.parametrize("height, inputs, tokens, warps, stages", [(128, 128, 128, 8, 3), (128, 128, 64, 4, 4), (64, 64, 64, 4, 4), (16, 64, 64, 4, 4)])
def test_hopper_code_of_the_weight_gradient(height, inputs, tokens, warps, stages):
    pytest.importorskip("triton", reason=TRITON)
    from sparsesurvey.kernels import panel

    made = code(panel.sample, "bf16", height, tokens, warps, stages, BK=inputs)
    check_hopper(made, f"HGMMA.64x{height}x16.F32.BF16", 2 * stages * tokens * (inputs + height))


def test_ampere_and_blackwell_code():
    pytest.importorskip("triton", reason=TRITON)
    from sparsesurvey.kernels import panel

    for kernel in (panel.gather, panel.spread, panel.sample):
        ampere, blackwell = code(kernel, "bf16", 64, 64, 4, 3, 80), code(kernel, "bf16", 64, 128, 8, 4, 100)
        assert ampere.count("HMMA.16816.F32.BF16") and ampere.count("LDGSTS") and not ampere.spilt and not ampere.count("LDG.E.U16")
        assert blackwell.count("UTCHMMA") and not blackwell.spilt
