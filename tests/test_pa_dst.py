"""A learned order of the inputs: the polytope, the permutation, what a layer computes, and what an order is good for."""

from itertools import permutations

import pytest
import torch

from sparsesurvey.data import markov
from sparsesurvey.linear import SparseLinear, densify, sparse_layers, sparsify
from sparsesurvey.mistral import build
from sparsesurvey.recipes import BDWP, PADST, RigL, SLoPe, Static
from sparsesurvey.recipes.pa_dst import birkhoff_penalty, nearest_order, to_birkhoff
from sparsesurvey.structures import NM, Block, Unstructured
from sparsesurvey.structures.permuted import reached
from sparsesurvey.train import TrainConfig, train


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ordered(layer, order):
    """The layer with this order, as ``update`` sets it."""
    layer.order.copy_(torch.as_tensor(order))
    layer.prepare(0, 1)
    return layer


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- the polytope ---------------------------------------------------------------------------------------------------

def test_penalty_is_zero_for_permutations_alone():
    for order in permutations(range(4)):
        assert birkhoff_penalty(torch.eye(4, dtype=torch.float64)[list(order)]) == 0
    half = torch.eye(4, dtype=torch.float64)
    for mixed in (0.5 * half + 0.5 * half.flip(0), 0.9 * half + 0.1 * half.roll(1, 0), torch.full((4, 4), 0.25)):
        assert birkhoff_penalty(mixed) > 0.1
    assert birkhoff_penalty(torch.full((4, 4), 0.25)).item() == pytest.approx(2 * 4 * (1 - 1 / 2))  # the most there is


def test_to_the_polytope():
    """Rows sum to one at once, columns after some sweeps; what is there already stays; a dead row comes back."""
    soft = random(8, 8) - 0.3
    once = to_birkhoff(soft)
    assert (once >= 0).all() and torch.allclose(once.sum(1), torch.ones(8, dtype=torch.float64))
    for _ in range(300):
        soft = to_birkhoff(soft)
    torch.testing.assert_close(soft.sum(0), torch.ones(8, dtype=torch.float64), rtol=0, atol=1e-2)
    torch.testing.assert_close(to_birkhoff(torch.eye(8)), torch.eye(8), rtol=0, atol=1e-6)
    dead = torch.eye(4)
    dead[2] = -1
    assert to_birkhoff(dead).isfinite().all() and torch.allclose(to_birkhoff(dead).sum(1), torch.ones(4))


def test_nearest_order_is_the_best_of_all():
    soft = random(5, 5)
    best = max(permutations(range(5)), key=lambda order: sum(soft[row, column].item() for row, column in enumerate(order)))
    assert nearest_order(soft).tolist() == list(best)


# ---- the layer ------------------------------------------------------------------------------------------------------

def test_an_order_by_hand():
    """S P x is S times x[order]; the plain weight has its columns where they act."""
    layer = SparseLinear(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), Unstructured(1.0), PADST(inner=Static()))
    layer = ordered(layer, [2, 0, 3, 1])
    assert layer(torch.tensor([[10.0, 20.0, 30.0, 40.0]])).item() == 30 + 2 * 10 + 3 * 40 + 4 * 20
    assert layer.dense().tolist() == [[2, 4, 1, 3]]


@pytest.mark.parametrize("structure, inner", [(Block(4, 4, 0.5), RigL()), (NM(2, 4), Static()), (NM(2, 4), BDWP())], ids=str)
def test_products(structure, inner):
    weight, x, dy = random(16, 24) - 0.5, random(12, 24, seed=1) - 0.5, random(12, 16, seed=2) - 0.5
    layer = SparseLinear(weight, structure, PADST(inner, identity=0.5))
    layer.prepare(0, 100)
    start = layer.soft_order.detach().clone()
    assert torch.allclose(start.sum(1), torch.ones(24, dtype=torch.float64)) and start.diagonal().min() > 0.5
    permutation = torch.eye(24, dtype=torch.float64)[torch.randperm(24, generator=torch.Generator().manual_seed(3))]
    backward = inner.input_weight(layer)
    for matrix in (start, permutation):
        if matrix is permutation:
            ordered(layer, permutation.argmax(1))
        layer.zero_grad()
        here = x.clone().requires_grad_()
        y = layer(here)
        y.backward(dy)
        sparse = inner.forward_weight(layer)
        torch.testing.assert_close(y, x @ (sparse @ matrix).T)
        torch.testing.assert_close(layer.dense(), (sparse @ matrix).detach())
        torch.testing.assert_close(here.grad, dy @ (sparse if backward is None else backward) @ matrix)
        torch.testing.assert_close(layer.weight.grad, dy.T @ (x @ matrix.T))
        if matrix is start:
            seen = dy @ (sparse if backward is None else backward)
            torch.testing.assert_close(layer.soft_order.grad, seen.T @ x)
            assert layer.penalty().item() == pytest.approx(1e-3 * birkhoff_penalty(start).item())
        else:
            assert layer.soft_order.grad is None and layer.penalty() is None


def test_when_it_becomes_a_permutation():
    make = lambda **constants: SparseLinear(random(4, 8), NM(2, 4), PADST(inner=Static(), **constants))
    waits = make(threshold=0.0, identity=0.5)
    for step in range(1, 11):
        waits.prepare(step - 1, 10)
        waits.update(step, 10, {})
        assert (waits.order >= 0).all() == (step >= 5)  # the deadline
    assert waits.order.tolist() == list(range(8))  # it had begun near the identity
    soon = make(threshold=0.1)
    soon.soft_order.data.copy_(0.95 * torch.eye(8).roll(1, 0) + 0.05 * torch.eye(8))
    soon.update(1, 1000, {})
    assert soon.order.tolist() == [7, *range(7)]
    soon.soft_order.data.zero_()  # it no longer counts
    soon.update(2, 1000, {})
    soon.prepare(2, 1000)
    assert soon.order.tolist() == [7, *range(7)] and not soon.soft_order.requires_grad


def test_it_finds_the_order_of_a_teacher():
    """The weight is given, block-diagonal as the teacher's: only the order is to be learnt."""
    size, order = 8, torch.randperm(8, generator=torch.Generator().manual_seed(5))
    teacher = torch.block_diag(*(random(2, 2, seed=seed) + torch.eye(2) for seed in range(4))).float()
    recipe = PADST(inner=Static(), threshold=0.05, deadline=1.0)
    layer = SparseLinear(teacher, Block(2, 2, 0.25), recipe)
    layer.mask.copy_(teacher != 0)
    layer.weight.data.copy_(teacher)
    optimizer = torch.optim.Adam([layer.soft_order], lr=0.01)
    for step in range(1, 401):
        layer.prepare(step - 1, 400)
        if layer.ordered:
            break
        x = torch.randn(64, size, generator=torch.Generator().manual_seed(step))
        loss = (layer(x) - x[:, order] @ teacher.T).square().mean() + layer.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        layer.weight.data.copy_(teacher)
        layer.update(step, 400, {})
    assert layer.order.tolist() == order.tolist() and step < 400  # by the threshold, not by the deadline


def test_an_order_reaches_everything():
    """Catalogue L16: blocks of B on the diagonal never connect all of d inputs; with an order a layer, ceil(d / B) do."""
    size, block = 32, 8
    diagonal = torch.block_diag(*[torch.ones(block, block)] * (size // block))
    layers = [SparseLinear(diagonal, Block(block, block, 0.25), PADST(inner=Static())) for _ in range(-(-size // block))]
    generator = torch.Generator().manual_seed(0)
    for number, layer in enumerate(layers):
        layer.mask.copy_(diagonal != 0)
        layer.weight.data.copy_(diagonal)
        ordered(layer, torch.randperm(size, generator=generator))
    with_order = reached(layer.dense() != 0 for layer in layers)
    assert with_order == sorted(with_order) and with_order[0] == 0.25 and with_order[-1] == 1
    assert reached([diagonal != 0] * 20) == [0.25] * 20


# ---- in training ----------------------------------------------------------------------------------------------------

def test_training_ends_with_orders():
    language = markov(length=1 << 13, valid=1 << 11)
    model = sparsify(build("markov"), Block(8, 8, 0.25), PADST(inner=RigL(every=4), threshold=0.0))
    config = TrainConfig(steps=16, batch=4, seq=16, lr=3e-3, warmup=2, eval_every=16, eval_batches=2)
    history = train(model, language, config, progress=False)
    assert history.valid[-1][1] < history.valid[0][1]
    for layer in sparse_layers(model).values():
        assert layer.order.sort().values.tolist() == list(range(layer.in_features))
        assert Block(8, 8, 0.25).holds(layer.mask) and Block(8, 8, 0.25).holds(layer.dense()[:, layer.order] != 0)
    x = torch.from_numpy(language.valid[:16].astype("int64"))[None]
    expected = model(x).logits
    torch.testing.assert_close(densify(model)(x).logits, expected, rtol=1e-4, atol=1e-4)


def test_both_phases_compile():
    layer = SparseLinear(random(16, 16).float(), NM(2, 4), PADST(inner=Static()))
    x = random(8, 16, seed=1).float()
    for order in (None, torch.arange(16).flip(0)):
        torch._dynamo.reset()
        layer = layer if order is None else ordered(layer, order)
        found = []
        for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
            layer.zero_grad()
            y = run(x)
            y.square().sum().backward()
            found.append([y.detach(), *(p.grad.clone() for p in layer.parameters() if p.grad is not None)])
        assert len(found[0]) == (3 if order is None else 2)
        torch.testing.assert_close(*found)


# ---- bad input ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("make, match", [
    (lambda: PADST(inner=SLoPe()), "inner must leave x and what is added to the product alone, but slope has beside"),
    (lambda: PADST(inner=PADST()), "inner must be another recipe, such as RigL.. or Static.., got PADST"),
    (lambda: PADST(inner="rigl"), "inner must be another recipe"),
    (lambda: PADST(decay=-1.0), "decay must be a number of at least 0, got -1.0"),
    (lambda: PADST(threshold=2.0), "threshold must be a number from 0 to 1, got 2.0"),
    (lambda: SparseLinear(random(8, 8), NM(2, 4), PADST()), "recipe pa-dst rigl trains S by another one: recipe rigl needs"),
])
def test_bad_constants(make, match):
    with pytest.raises(ValueError, match=match):
        make()
