"""Recipes whose backward pass has a sparse operand of its own: BDWP, FST and SLoPe."""

from dataclasses import replace

import pytest
import torch

from sparsesurvey.data import markov
from sparsesurvey.linear import SparseLinear, densify, sparse_layers, sparsify
from sparsesurvey.mistral import build
from sparsesurvey.mvue import mvue24, mvue24_approximate
from sparsesurvey.packed import PackedLinear
from sparsesurvey.recipes import BDWP, FST, SLoPe, Static
from sparsesurvey.recipes.fst import approximate, least_variance, transposable
from sparsesurvey.scores import magnitude
from sparsesurvey.structure import Pattern
from sparsesurvey.structures import NM, VNM, Block, DoublePruned, Transposable, Unstructured, all_structures
from sparsesurvey.train import TrainConfig, train

WEIGHT = torch.tensor([[9.0, 4.0, 3.0, 2.0],
                       [4.0, 5.0, 8.0, 0.0],
                       [2.0, 0.0, 7.0, 6.0],
                       [3.0, 6.0, 1.0, 5.0]])
SHORT = TrainConfig(steps=12, batch=4, seq=16, lr=3e-3, warmup=2, eval_every=6, eval_batches=2)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def products(layer, x, dy):
    """Output, input gradient and weight gradient of a layer."""
    x = x.clone().requires_grad_()
    layer.weight.grad = None
    y = layer(x)
    y.backward(dy)
    return y.detach(), x.grad, layer.weight.grad


def cosine(one, two):
    return torch.nn.functional.cosine_similarity(one.flatten(), two.flatten(), dim=0).item()


@pytest.fixture(scope="module")
def language():
    return markov(length=1 << 13, valid=1 << 11)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- BDWP -----------------------------------------------------------------------------------------------------------

def test_bdwp_by_hand():
    layer = SparseLinear(WEIGHT, NM(2, 4), BDWP())
    forward = [[9, 4, 0, 0], [0, 5, 8, 0], [0, 0, 7, 6], [0, 6, 0, 5]]  # two of each row
    backward = [[9, 0, 0, 0], [4, 5, 8, 0], [0, 0, 7, 6], [0, 6, 0, 5]]  # two of each column of the dense weight
    y, dx, dw = products(layer, torch.eye(4), torch.eye(4))
    assert y.T.tolist() == forward and dx.tolist() == backward
    assert torch.equal(dw, torch.eye(4))  # dense and straight through
    layer.weight.data[0] = torch.tensor([0.0, 0.0, 9.0, 9.0])
    layer.update(1, 10, {})
    assert layer.mask[0].tolist() == [False, False, True, True]
    assert layer.back_mask[:, 3].tolist() == [True, False, True, False]


@pytest.mark.parametrize("structure", [NM(2, 4), NM(2, 8), NM(3, 5)], ids=str)
def test_bdwp_products(structure):
    weight, x, dy = random(40, 80), random(12, 80, seed=1), random(12, 40, seed=2)
    y, dx, dw = products(SparseLinear(weight, structure, BDWP()), x, dy)
    pair = DoublePruned(structure.n, structure.m)
    packed = pair.pack(weight)
    torch.testing.assert_close(y, x @ pair.forward_weight(packed).T)
    torch.testing.assert_close(dx, dy @ pair.backward_weight(packed))
    torch.testing.assert_close(dw, dy.T @ x)


def multiplications(layer, tokens=16):
    """Share of a dense step's multiplications that the three products of a layer have left, counted in their operands."""
    recipe = layer.recipe
    forward = recipe.forward_weight(layer)
    backward = recipe.input_weight(layer)
    backward = forward if backward is None else backward
    dy = random(tokens, layer.out_features, seed=5).to(layer.weight)
    dy = dy if recipe.output_grad(layer) is None else recipe.output_grad(layer)(dy)
    return sum((operand != 0).double().mean().item() for operand in (forward, backward, dy)) / 3


def test_arithmetic_of_a_step():
    """Catalogue: (2 n / m + 1) / 3 for BDWP, one half for transposable 2:4 with MVUE."""
    weight = random(64, 64)
    assert multiplications(SparseLinear(weight, NM(2, 8), BDWP())) == pytest.approx(0.5)
    assert multiplications(SparseLinear(weight, NM(2, 4), BDWP())) == pytest.approx(2 / 3)
    assert DoublePruned(2, 8).training_arithmetic == pytest.approx(0.5)
    assert multiplications(SparseLinear(weight, Transposable(2, 4), FST(exact=True))) == pytest.approx(0.5)
    assert multiplications(SparseLinear(weight, Transposable(2, 4), FST())) == pytest.approx(0.5)
    assert multiplications(SparseLinear(weight, NM(2, 4), SLoPe())) < 2 / 3  # its second pruning leaves groups unfilled


def test_bdwp_input_gradient_points_the_right_way(language):
    """Against the dense weight: cosine above 0.8 at 2:8, at the start and in training."""
    model = sparsify(build("markov"), NM(2, 8), BDWP())
    dy = {name: random(64, layer.out_features, dtype=torch.float32) for name, layer in sparse_layers(model).items()}
    for config in (SHORT, None):
        for name, layer in sparse_layers(model).items():
            dx = dy[name] @ (layer.weight * layer.back_mask)
            assert cosine(dx, dy[name] @ layer.weight) > 0.8
            assert 0.2 < cosine(dx, dy[name] @ (layer.weight * layer.mask)) < 0.95  # it is not the forward product's
        if config:
            train(model, language, config, progress=False)


# ---- FST ------------------------------------------------------------------------------------------------------------

def test_fst_by_hand():
    layer = SparseLinear(WEIGHT, Transposable(2, 4), FST(every=3, decay=0.5, mvue=False))
    kept = [[9, 4, 0, 0], [4, 0, 8, 0], [0, 0, 7, 6], [0, 6, 0, 5]]
    y, dx, dw = products(layer, torch.eye(4), torch.eye(4))
    assert y.T.tolist() == dx.tolist() == kept
    layer.edit_grad()
    decayed = [[0, 0, 1.5, 1], [0, 2.5, 0, 0], [1, 0, 0, 0], [1.5, 0, 0.5, 0]]  # half of what is masked
    assert (layer.weight.grad - torch.eye(4)).tolist() == decayed
    layer.weight.data.copy_(WEIGHT.flip(1))
    before = layer.mask.clone()
    for step in (1, 2):
        layer.update(step, 100, {})
        assert torch.equal(layer.mask, before)
    layer.update(3, 100, {})
    assert torch.equal(layer.mask, before.flip(1))
    assert Transposable(2, 4).holds(layer.mask) and Transposable(2, 4).holds(layer.mask.T)


@pytest.mark.parametrize("recipe, draw", [(FST(), mvue24_approximate), (FST(exact=True), mvue24)], ids=["fst", "exact"])
def test_fst_products(recipe, draw):
    weight, x, dy = random(32, 64), random(16, 64, seed=1), random(16, 32, seed=2)
    layer = SparseLinear(weight, Transposable(4, 8), recipe)
    torch.manual_seed(3)
    y, dx, dw = products(layer, x, dy)
    torch.manual_seed(3)
    drawn = draw(dy.T.contiguous())
    kept = weight * Transposable(4, 8).mask(weight.abs())
    torch.testing.assert_close(y, x @ kept.T)
    torch.testing.assert_close(dx, dy @ kept)  # of the gradient as it came
    torch.testing.assert_close(dw, drawn @ x)
    assert ((drawn != 0).view(32, 4, 4).sum(-1) <= 2).all()


@pytest.mark.parametrize("estimate", [approximate, least_variance])
def test_fst_weight_gradient_is_unbiased(estimate):
    x, dy = random(8, 8, seed=1), random(8, 4, seed=2)
    torch.manual_seed(0)
    draws = estimate(dy.repeat(1, 4000)).view(8, 4000, 4)
    draws = torch.einsum("tdo,ti->doi", draws, x)
    error = (draws.mean(0) - dy.T @ x) / (draws.std(0) / len(draws) ** 0.5)
    assert error.abs().max() < 4.5 and draws.std(0).min() > 0


@pytest.mark.parametrize("estimate", [approximate, least_variance])
def test_fst_bad_gradients(estimate):
    with pytest.raises(ValueError, match="tokens of a step must be a multiple of 4, .* got 6"):
        estimate(torch.ones(6, 4))
    dy = random(8, 4)
    dy[0, 0], dy[5, 2] = torch.nan, torch.inf
    assert torch.equal(estimate(dy).isfinite(), dy.isfinite())  # so that training stops and says where
    layer = SparseLinear(random(4, 4), Transposable(2, 4), FST(exact=estimate is least_variance))
    with pytest.raises(ValueError, match="tokens of a step"):
        layer(random(2, 4)).sum().backward()


def test_which_structures_are_transposable():
    found = {type(variant).__name__ for kind in all_structures().values() for variant in kind.variants()
             if isinstance(variant, Pattern) and transposable(variant)}
    assert found == {"Transposable"}
    for structure in (NM(2, 4), VNM(8, 2, 8), Block(4, 4, 0.5), Unstructured(0.5)):
        with pytest.raises(ValueError, match="fst needs masks that are n:m along both axes"):
            SparseLinear(random(32, 32), structure, FST())


# ---- SLoPe ----------------------------------------------------------------------------------------------------------

def test_slope_by_hand():
    layer = SparseLinear(WEIGHT, NM(2, 4), SLoPe(score=magnitude))
    forward = [[9, 4, 0, 0], [0, 5, 8, 0], [0, 0, 7, 6], [0, 6, 0, 5]]
    backward = [[9, 0, 0, 0], [0, 5, 8, 0], [0, 0, 7, 6], [0, 6, 0, 5]]  # of each column two of those, the 4 is gone
    y, dx, _ = products(layer, torch.eye(4), torch.eye(4))
    assert y.T.tolist() == forward and dx.tolist() == backward
    layer.edit_grad()
    assert torch.equal(layer.weight.grad, torch.eye(4) * layer.mask)
    layer.weight.data += 1  # as an optimizer with a dense update would
    mask = layer.mask.clone()
    layer.update(1, 10, {})
    assert torch.equal(layer.mask, mask) and torch.equal(layer.weight != 0, mask)


@pytest.mark.parametrize("structure", [NM(2, 4), NM(2, 8)], ids=str)
def test_slope_products_and_adapters(structure):
    weight, x, dy = random(32, 64), random(12, 64, seed=1), random(12, 32, seed=2)
    layer = SparseLinear(weight, structure, SLoPe(rank=0.0625))
    pair = DoublePruned(structure.n, structure.m, nested=True)
    packed = pair.pack(layer.weight.detach())
    expected = x @ pair.forward_weight(packed).T, dy @ pair.backward_weight(packed), dy.T @ x
    left, right = layer.adapter_left, layer.adapter_right
    assert left.shape == (64, 2) and right.shape == (2, 32) and not right.any()
    for step in (0, 98):  # asleep
        layer.prepare(step, 100)
        torch.testing.assert_close(products(layer, x, dy), expected)
        assert left.grad is None and right.grad is None
    layer.prepare(99, 100)
    torch.testing.assert_close(products(layer, x, dy), expected)  # R is zero yet
    torch.testing.assert_close(right.grad, (x @ left).T @ dy / 2)
    right.data.copy_(random(2, 32, seed=3))
    y, dx, dw = products(layer, x, dy)
    torch.testing.assert_close(y, expected[0] + x @ left @ right / 2)
    torch.testing.assert_close(dx, expected[1] + dy @ right.T @ left.T / 2)
    torch.testing.assert_close(dw, expected[2])
    torch.testing.assert_close(x @ layer.dense().T, y.detach())


def test_slope_starts_like_static_and_its_adapters_come_late(language):
    model = sparsify(build("markov"), NM(2, 4), SLoPe(lazy=0.75))
    static = sparsify(build("markov"), NM(2, 4), Static())
    for one, two in zip(sparse_layers(model).values(), sparse_layers(static).values()):
        assert torch.equal(one.weight, two.weight) and torch.equal(one.mask, two.mask)
    start = {name: layer.adapter_left.detach().clone() for name, layer in sparse_layers(model).items()}
    assert not torch.equal(*[start[f"model.layers.0.mlp.{name}"] for name in ("gate_proj", "up_proj")])
    history = train(model, language, SHORT, progress=False)
    assert history.valid[-1][1] < history.valid[0][1]
    for name, layer in sparse_layers(model).items():
        assert layer.adapter_right.any() and not torch.equal(layer.adapter_left, start[name])
        assert NM(2, 4).holds(layer.weight != 0)
    x = torch.from_numpy(language.valid[:16].astype("int64"))[None]
    expected = model(x).logits
    torch.testing.assert_close(densify(model)(x).logits, expected, rtol=1e-4, atol=1e-4)
    early = sparsify(build("markov"), NM(2, 4), SLoPe(lazy=1.0))
    train(early, language, replace(SHORT, steps=3), progress=False)
    assert not any(layer.adapter_right.any() for layer in sparse_layers(early).values())


# ---- all three ------------------------------------------------------------------------------------------------------

def test_a_mask_that_is_not_all_is_not_packed():
    for structure, recipe in [(NM(2, 4), BDWP()), (NM(2, 4), SLoPe()), (Transposable(2, 4), FST())]:
        with pytest.raises(ValueError, match="mask never changes"):
            PackedLinear(SparseLinear(random(32, 32), structure, recipe), "reference")


@pytest.mark.parametrize("recipe", [BDWP(), SLoPe()], ids=str)
def test_unfit_structures(recipe):
    for structure in (NM(2, 4, "out"), Transposable(2, 4), Unstructured(0.5)):
        with pytest.raises(ValueError, match=f"recipe {recipe} needs n:m along the inputs"):
            SparseLinear(random(32, 32), structure, recipe)
    with pytest.raises(ValueError, match="2:4 out needs a shape whose out is a multiple of 4"):
        SparseLinear(random(30, 32), NM(2, 4), recipe)


@pytest.mark.parametrize("make, match", [
    (lambda: FST(every=0), "every must be an integer of at least 1, got 0"),
    (lambda: FST(decay=-1.0), "decay must be a number of at least 0, got -1.0"),
    (lambda: FST(mvue="exact"), "mvue must be True or False, got 'exact'"),
    (lambda: FST(mvue=False, exact=True), "exact must be False without mvue"),
    (lambda: SLoPe(rank=2.0), "rank must be a number from 0 to 1, got 2.0"),
    (lambda: SLoPe(lazy=-0.1), "lazy must be a number from 0 to 1, got -0.1"),
])
def test_bad_constants(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_live_adapters_compile():
    torch._dynamo.reset()
    layer = SparseLinear(random(16, 16, dtype=torch.float32), NM(2, 4), SLoPe())
    layer.prepare(100, 100)
    layer.adapter_right.data += 1
    x, found = random(8, 16, seed=1, dtype=torch.float32), []
    for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        layer.zero_grad()
        y = run(x)
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad.clone() for p in layer.parameters())])
    torch.testing.assert_close(*found)
