"""Operators of packed layers: known to torch.compile, right while the values are trained, and planned as seldom as may be."""

import copy
import gc
import pickle

import pytest
import torch
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from sparsesurvey import operators
from sparsesurvey.linear import SparseLinear
from sparsesurvey.operators import KINDS, OPERATORS
from sparsesurvey.packed import PackedLinear
from sparsesurvey.recipes.static import Static
from sparsesurvey.structure import PRODUCTS, Unavailable
from sparsesurvey.structures import NM, Block, Unstructured, all_structures
from test_kernels_block import TRITON, interpreted

OUT, INN = 64, 96
LASTING, COPYING = (Block(32, 32, 0.5), "gather"), (NM(2, 4), "reference")
VARIANTS = [variant for kind in all_structures().values() for variant in kind.variants()
            if hasattr(variant, "lasting") and not (OUT % variant.tile[0] or INN % variant.tile[1])]


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def packed(structure, kernel="gather", dtype=torch.float64, bias=None):
    return PackedLinear(SparseLinear(random(OUT, INN, dtype=dtype), structure, Static(), bias), kernel)


def made(layer):
    return KINDS[layer.kind].plans_of(layer.values).made


def both(run, layer, x, dy):
    """Output, dx and the gradient of the values."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    y = run(x)
    y.backward(dy)
    return y.detach(), x.grad, layer.values.grad


def check(layer, x, dy, **tolerance):
    """The layer against its dense weight, as that is now."""
    weight = layer.dense().double()
    got = both(layer, layer, x, dy)
    right = x.double() @ weight.T, dy.double() @ weight
    for mine, want in zip(got, right):
        torch.testing.assert_close(mine.double(), want, **tolerance)
    dense = layer.structure.unpack(layer.operand(got[2])).double()
    torch.testing.assert_close(dense, (dy.double().T @ x.double()) * (dense != 0), **tolerance)


# ---- as operators


@pytest.mark.parametrize("case", [LASTING, COPYING, (Unstructured(0.25), "torch_csr")], ids=str)
def test_operators_are_registered_as_torch_wants_them(case):
    layer = packed(*case)
    x, dy, values = random(5, INN, seed=1), random(5, OUT, seed=2), layer.values.detach()
    torch.library.opcheck(OPERATORS.spmm.default, (x.requires_grad_(), layer.values, layer.places, layer.kind, OUT))
    torch.library.opcheck(OPERATORS.spmmt.default, (dy, values, layer.places, layer.kind, INN))
    torch.library.opcheck(OPERATORS.sddmm.default, (dy, x.detach(), values, layer.places, layer.kind))


@pytest.mark.parametrize("case", [LASTING, COPYING], ids=str)
def test_a_layer_is_compiled_whole_for_any_number_of_tokens(case):
    torch.compiler.reset()
    layer = packed(*case, bias=random(OUT))
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        from torch._dynamo.backends.debugging import aot_eager
        return aot_eager(graph, inputs)

    step = torch.compile(lambda x: layer(x * 2).sin(), fullgraph=True, backend=backend)
    for tokens in 4, 6, 9:
        x, dy = random(2, tokens, INN, seed=1), random(2, tokens, OUT, seed=2)
        got, right = both(step, layer, x, dy), both(lambda x: layer(x * 2).sin(), layer, x, dy)
        torch.testing.assert_close(got, right)
        with torch.no_grad():
            layer.values.mul_(1.5)
    assert len(seen) == 2, "for one number of tokens, and then for any"
    x, dy = random(INN, 7, 2, seed=3).permute(2, 1, 0), random(OUT, 7, 2, seed=4).permute(2, 1, 0)
    torch.testing.assert_close(both(step, layer, x, dy), both(lambda x: layer(x * 2).sin(), layer, x, dy))
    assert len(made(layer)) == (3 if case is LASTING else 0)


def test_one_compilation_serves_layers_of_one_shape():
    torch.compiler.reset()
    layers = [packed(*LASTING) for _ in range(6)]
    graphs = []
    run = torch.compile(lambda layer, x: layer(x), fullgraph=True, dynamic=False,
                        backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    x = random(4, INN)
    for scale, layer in enumerate(layers):
        with torch.no_grad():
            layer.values.mul_(scale)
            torch.testing.assert_close(run(layer, x), layer(x))
    assert len(graphs) == 1


def test_second_gradients_are_refused():
    layer, x = packed(*LASTING), random(4, INN).requires_grad_()
    grad, = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# ---- plans


@pytest.mark.parametrize("structure", VARIANTS, ids=str)
def test_plans_that_are_said_to_last_follow_the_values(structure):
    weight = random(OUT, INN) * structure.mask(random(OUT, INN))
    inputs = {"spmm": (random(5, INN),), "spmmt": (random(5, OUT),), "sddmm": (random(5, OUT), random(5, INN))}
    for product in PRODUCTS:
        for name, make in structure.kernels(product).items():
            if not structure.lasting(name):
                continue
            operand = structure.pack(weight)
            try:
                run = make(operand)
            except Unavailable:
                continue
            run(*inputs[product])
            operand.values.copy_(random(*operand.values.shape, seed=5))
            torch.testing.assert_close(run(*inputs[product]), make(operand)(*inputs[product]), rtol=0, atol=0)


def test_some_plans_last():
    assert Block(32, 32, 0.5).lasting("gather") and Block(64, 64, 0.5).lasting("triton")
    assert not Block(8, 8, 0.5).lasting("gather") and not Block(32, 1, 0.5).lasting("triton")
    assert not Block(32, 32, 0.5).lasting("reference") and not hasattr(NM(2, 4), "lasting")


@pytest.mark.parametrize("case", [LASTING, COPYING, (Block(8, 8, 0.5), "gather")], ids=str)
@pytest.mark.parametrize("fused", [False, True])
def test_products_are_right_while_the_values_are_trained(case, fused):
    layer = packed(*case)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=fused)
    x, dy, plans = random(4, INN, seed=1), random(4, OUT, seed=2), []
    for _ in range(3):
        check(layer, x, dy)
        with torch.no_grad():
            layer(x)  # between the gradient and the step
        plans.append(dict(made(layer)))
        optimizer.step()
    lasting = case is LASTING
    assert [plan is plans[0].get(name) for name, plan in plans[1].items()] == ([True] * 3 if lasting else [False])
    with torch.no_grad():
        layer.values.mul_(2)
    check(layer, x, dy)


def test_lasting_plans_see_writes_that_nobody_counts():
    layer = packed(*LASTING)
    x, dy = random(4, INN, seed=1), random(4, OUT, seed=2)
    for dtype in torch.float64, torch.float32:
        check(layer, x.to(dtype), dy.to(dtype), rtol=1e-4, atol=1e-4)
        layer.values.data.mul_(1.5)
    check(layer, x, dy)


def test_values_that_moved_and_places_that_changed():
    layer = packed(*LASTING)
    x, dy = random(4, INN, seed=1), random(4, OUT, seed=2)
    check(layer, x, dy)
    layer.values.data = random(*layer.values.shape, seed=6)
    check(layer, x, dy)
    other = PackedLinear(SparseLinear(random(OUT, INN), layer.structure, Static(), generator=torch.Generator().manual_seed(3)), "gather")
    assert not other.columns.equal(layer.columns)
    layer.load_state_dict(other.state_dict())
    check(layer, x, dy)
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("case", [LASTING, COPYING], ids=str)
def test_autocast_multiplies_a_copy_of_the_values(case):
    layer = packed(*case, dtype=torch.float32)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x, dy = random(4, INN, seed=1, dtype=torch.float32), random(4, OUT, seed=2).bfloat16()
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            y, dx, grad = both(layer, layer, x, dy)
        assert (y.dtype, dx.dtype, grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)
        weight = layer.dense().bfloat16().float()
        torch.testing.assert_close(y.float(), x.bfloat16().float() @ weight.T, rtol=0.02, atol=0.1)
        torch.testing.assert_close(dx, dy.float() @ weight, rtol=0.02, atol=0.1)
        optimizer.step()


@pytest.mark.parametrize("case", [LASTING, COPYING], ids=str)
def test_a_layer_trains_after_inference(case):
    layer = packed(*case, dtype=torch.float32)
    x, dy = random(4, INN, dtype=torch.float32), random(4, OUT, dtype=torch.float32)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        both(layer, layer, x, dy.bfloat16())
    with torch.inference_mode():
        layer(x)
    check(layer, x, dy, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", [LASTING, COPYING], ids=str)
def test_values_from_elsewhere_and_activations_computed_again(case):
    layer = packed(*case)
    x, dy, other = random(4, INN), random(4, OUT, seed=2), random(*layer.values.shape, seed=8).requires_grad_()
    right = both(layer, layer, x, dy)
    y = functional_call(layer, {"values": other}, (x,))
    again = both(lambda x: checkpoint(layer, x, use_reentrant=False), layer, x, dy)
    torch.testing.assert_close(again, right, rtol=0, atol=0)
    weight = layer.structure.unpack(layer.operand(other.detach()))
    torch.testing.assert_close(y.detach(), x @ weight.T)
    y.backward(dy)
    torch.testing.assert_close(other.grad, right[2])


def test_copies_are_layers_of_their_own():
    layer = packed(*LASTING)
    x = random(4, INN)
    y = layer(x)
    for other in copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)):
        assert made(layer) and not made(other)
        with torch.no_grad():
            other.values.zero_()
            assert not other(x).any() and torch.equal(layer(x), y)


def test_another_process_numbers_kinds_anew(monkeypatch):
    layer = packed(*LASTING)
    x, written = random(4, INN), pickle.dumps(layer)
    monkeypatch.setattr(operators, "NUMBERS", {})
    read = pickle.loads(written)
    assert read.kind != layer.kind and torch.equal(read(x), layer(x))


def test_plans_go_with_the_values():
    layer = packed(*LASTING)
    plans = KINDS[layer.kind].plans
    before = len(plans)
    layer(random(4, INN))
    assert len(plans) == before + 1
    del layer
    gc.collect()
    assert len(plans) == before


INTERPRETED = """
import torch
from test_packed import check, made, packed, random, OUT, INN
from sparsesurvey.structures import Block
for structure in Block(16, 32, 0.5), Block(32, 1, 0.5):  # multiplied where they are, and gathered
    layer = packed(structure, "triton", torch.float32)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    for tokens in 4, 9:
        x, dy = random(tokens, INN, seed=1, dtype=torch.float32), random(OUT, tokens, seed=2, dtype=torch.float32).T
        check(layer, x, dy, rtol=1e-4, atol=1e-4)
        optimizer.step()
    assert len(made(layer)) == 3 * (structure.cols > 1)
"""


def test_triton_kernels_are_right_while_the_values_are_trained():
    pytest.importorskip("triton", reason=TRITON)
    done = interpreted(code=INTERPRETED)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


def test_bad_activations():
    layer = packed(*LASTING)
    with pytest.raises(ValueError, match=r"x must be torch.float32 \[tokens, 96\]"):
        OPERATORS.spmm(random(4, 32, dtype=torch.float32), layer.values, layer.places, layer.kind, OUT)
