"""Activation sparsity: thresholds, the product without small inputs, and its Triton kernels without a GPU."""

import math

import pytest
import torch

from sparsesurvey import activation
from sparsesurvey.structure import Unavailable
from test_kernels_block import TRITON, interpreted


def test_a_threshold_leaves_its_share():
    x = torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
    for sparsity in 0.25, 0.5, 0.9:
        cut = activation.threshold_at(x, sparsity)
        assert int((activation.without_small(x, cut) == 0).sum()) == round(sparsity * x.numel())
    assert activation.threshold_at(x, 0) == 0.0 and torch.equal(activation.without_small(x, 0.0), x)


def test_the_reference_leaves_out_what_is_small():
    weight, x = torch.tensor([[1.0, 10, 100], [2, 20, 200]]), torch.tensor([[1.0, -0.5, 0.25], [0.5, 0.75, math.nan]])
    y = activation.reference_plan(weight, 0.5)(x)
    assert y[0].tolist() == [1, 2] and y[1].isnan().all(), "what equals the threshold goes, NaN stays"


@pytest.mark.parametrize("call, said", [
    (lambda: activation.threshold_at(torch.ones(2, 2), 1.0), "sparsity must be a number of at least 0 and below 1, got 1.0"),
    (lambda: activation.threshold_at(torch.ones(0, 2), 0.5), "activations must not be empty"),
    (lambda: activation.without_small(torch.ones(2, 2), -1.0), "threshold must be a finite number of at least 0, got -1.0"),
    (lambda: activation.product_plan(torch.ones(2), 0.0), "weight must be a matrix"),
    (lambda: activation.product_plan(torch.ones(2, 2), math.nan), "threshold must be a finite number"),
    (lambda: activation.reference_plan(torch.ones(2, 2), 0.0)(torch.ones(2, 3)), "x must be torch.float32 .tokens, 2."),
])
def test_what_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()


NUMBERS = """
import math
import torch
from sparsesurvey import activation
from sparsesurvey.kernels import active
from sparsesurvey.structure import Unavailable
generator = torch.Generator().manual_seed(0)
draw = lambda *size: torch.randn(size, generator=generator)
for out, inn, tokens, threshold, dtype in (
        (300, 700, 1, 0.7, torch.float32),     # two chunks, the second one short; two tiles of outputs
        (40, 520, 3, 1.5, torch.float16),      # of three tokens each needs others
        (17, 90, 4, 0.0, torch.bfloat16),
        (16, 600, 2, 99.0, torch.float32)):    # nothing is needed
    weight, x = draw(out, inn).to(dtype), draw(tokens, inn).to(dtype)
    x[:, ::5] = 0
    run = activation.product_plan(weight, threshold)
    want = activation.reference_plan(weight.double(), threshold)(x.double())
    for given in x, x.T.contiguous().T:
        got = run(given)
        assert got.shape == want.shape and got.dtype == dtype
        assert (got.double() - want).abs().max() <= 2 * torch.finfo(dtype).eps * want.abs().max(), (out, inn, tokens)
    assert run(x[:0]).shape == (0, out)
weight = torch.ones(20, 100)
weight[:, 3] = math.inf
x = torch.ones(2, 100)
x[:, 3] = 0.5
run = active.plan(weight, 0.5)
assert (run(x) == 99).all(), "the weights of what is left out are not looked at"
x[1, 7] = math.nan
assert run(x)[1].isnan().all() and (run(x)[0] == 99).all()
try:
    run(torch.ones(5, 100))
except Unavailable as reason:
    assert str(reason) == "needs at most 4 tokens, got 5"
else:
    assert False
"""


def test_the_kernels_equal_float64_in_the_interpreter():
    pytest.importorskip("triton", reason=TRITON)
    done = interpreted(code=NUMBERS)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


def test_what_cannot_run_says_what_it_needs():
    pytest.importorskip("triton", reason=TRITON)
    for dtype, reason in (torch.bfloat16, "needs a CUDA device, got an operand on cpu"), (torch.float32, "needs bfloat16 or float16, got torch.float32"):
        with pytest.raises(Unavailable, match=reason):
            activation.product_plan(torch.ones(4, 4, dtype=dtype), 0.0)


@pytest.mark.parametrize("tokens, capability", [(1, 90), (4, 90), (1, 80), (1, 100)])
def test_machine_code(tokens, capability):
    """Rows of weights come 16 bytes a thread, nothing is spilt."""
    pytest.importorskip("triton", reason=TRITON)
    from machine_code import compiled

    from sparsesurvey.kernels import active

    kinds = {"x": "*bf16", "rows": "*bf16", "sums": "*fp32", "listed": "*i32", "counts": "*i32", "threshold": "fp32"}
    signature = {name: kinds.get(name, "i32") for name in active.add_rows.arg_names if not name.isupper()}
    made = compiled(active.add_rows, signature, {"TOKENS": tokens, "CHUNK": active.CHUNK, "BK": active.ROWS, "BN": active.WIDE}, capability)
    assert made.count("LDG.E.128") >= 2 and made.spilt == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu_it_equals_float64(dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1000, 4096, generator=generator).to(dtype).cuda()
    for tokens, threshold in (1, 0.0), (1, 0.7), (3, 1.5), (4, 99.0):
        x = torch.randn(tokens, 4096, generator=generator).to(dtype).cuda()
        want = activation.reference_plan(weight.double(), threshold)(x.double())
        error = (activation.product_plan(weight, threshold)(x).double() - want).abs().max()
        assert error <= 2 * torch.finfo(dtype).eps * want.abs().max()
