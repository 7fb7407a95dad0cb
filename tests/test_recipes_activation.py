"""2:4 weights and V:N:M activations: which operand of which product is sparse, against masked references in float64."""

import pytest
import torch
from torch import nn

from sparsesurvey.data import markov
from sparsesurvey.linear import SparseLinear, sparse_layers, sparsify
from sparsesurvey.mistral import build, config
from sparsesurvey.recipes import DenseLast, VenomActivations
from sparsesurvey.recipes.activation import activation_mask
from sparsesurvey.recipes.s_ste import soft_threshold
from sparsesurvey.structures import NM, VNM, Transposable
from sparsesurvey.train import TrainConfig, train


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer_of(name, structure=VNM(4, 2, 8), shape=(16, 32), sparse=True, seed=0):
    layer = SparseLinear(random(*shape, seed=seed), structure, VenomActivations(), name=f"model.layers.0.mlp.{name}")
    layer.prepare(100 if sparse else 0, 100)
    return layer


def products(layer, x, dy):
    x = x.clone().requires_grad_()
    layer.weight.grad = None
    y = layer(x)
    y.backward(dy)
    return y.detach(), x.grad, layer.weight.grad


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_activations_by_hand():
    """Two tokens share four of eight neurons, the ones of the largest sums, and each keeps two of these."""
    x = torch.tensor([[9.0, 1, -5, 0, 0, 4, 8, 0],
                      [0.0, 1, 5, 0, 7, -3, 6, 1]])
    assert activation_mask(VNM(2, 2, 8), x).int().tolist() == [[1, 0, 0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 0, 1, 0]]
    alone = activation_mask(VNM(2, 2, 8), x[:1])  # the last tile may be short
    assert alone.int().tolist() == [[1, 0, 0, 0, 0, 0, 1, 0]]


def test_the_last_projection():
    """x is masked, and dx where it is; dx is multiplied with the soft weight in groups of four outputs."""
    layer, x, dy = layer_of("down_proj"), random(12, 32, seed=1), random(12, 16, seed=2)
    y, dx, dw = products(layer, x, dy)
    mask, weight = activation_mask(VNM(4, 2, 8), x), layer.weight.detach()
    assert VNM(4, 2, 8).holds(mask) and mask.double().mean() == 0.25
    soft = soft_threshold(weight.T.contiguous(), 2, 4).T
    scale = (weight * soft).sum() / soft.square().sum()
    assert NM(2, 4, "out").holds(soft != 0) and not NM(2, 4).holds(soft != 0)
    torch.testing.assert_close(y, (x * mask) @ weight.T)
    torch.testing.assert_close(dx, dy @ (scale * soft) * mask)
    torch.testing.assert_close(dw, dy.T @ (x * mask))


@pytest.mark.parametrize("name", ["gate_proj", "up_proj"])
def test_the_first_projections(name):
    """The weight is 2:4 in the forward product alone: in the others the gradient is sparse."""
    layer, x, dy = layer_of(name), random(12, 32, seed=1), random(12, 16, seed=2)
    y, dx, dw = products(layer, x, dy)
    weight = layer.weight.detach()
    soft = soft_threshold(weight, 2, 4)
    scale = (weight * soft).sum() / soft.square().sum()
    torch.testing.assert_close(y, x @ (scale * soft).T)
    torch.testing.assert_close(dx, dy @ weight)
    torch.testing.assert_close(dw, dy.T @ x)
    layer.weight.data.mul_(2)
    torch.testing.assert_close(layer(x), 2 * y)  # the scale is the one of the start


def test_the_gradient_of_the_first_product_has_the_support_of_the_activations():
    """W1, relu squared, W2: what the mask drops of the activations has no gradient before the nonlinearity either."""
    first, last = layer_of("up_proj", shape=(32, 16)), layer_of("down_proj", shape=(16, 32), seed=4)
    x = random(12, 16, seed=1)
    hidden = first(x)
    hidden.retain_grad()
    act = hidden.relu().square()
    last(act).backward(random(12, 16, seed=2))
    mask = activation_mask(VNM(4, 2, 8), act.detach())
    assert not hidden.grad[~mask].any() and hidden.grad[mask & (hidden > 0)].all()
    assert VNM(4, 2, 8).holds(hidden.grad != 0)


def test_similar_neighbours_keep_more():
    """Catalogue L15: of squared-ReLU activations the share of energy that is kept rises when like tokens are adjacent."""
    kinds, size = 8, 64
    centres = random(kinds, size, seed=3)
    which = torch.arange(256) % kinds
    act = (centres[which] + 0.5 * random(256, size, seed=4)).relu().square()
    kept = lambda x: ((x * activation_mask(VNM(16, 2, 16), x)).square().sum() / x.square().sum()).item()
    assert kept(act[which.argsort(stable=True)]) > kept(act) + 0.1


def test_warm_up_is_dense():
    for name in ("down_proj", "gate_proj"):
        layer, x, dy = layer_of(name, sparse=False), random(12, 32, seed=1), random(12, 16, seed=2)
        weight = layer.weight.detach()
        torch.testing.assert_close(products(layer, x, dy), (x @ weight.T, dy @ weight, dy.T @ x))
        assert torch.equal(layer.dense(), weight)


def test_it_trains_with_squared_relu_and_ends_dense():
    shape = config("markov")
    shape.hidden_act = "relu2"
    language = markov(length=1 << 13, valid=1 << 11)
    settings = TrainConfig(steps=18, batch=4, seq=16, lr=3e-3, warmup=2, eval_every=18, eval_batches=2)
    for recipe in (VenomActivations(), DenseLast(VenomActivations(), sparse=0.5)):
        model = sparsify(build(shape), VNM(16, 2, 8), recipe)
        history = train(model, language, settings, progress=False)
        assert history.valid[-1][1] < history.valid[0][1]
        ends_dense = isinstance(recipe, DenseLast)
        for name, layer in sparse_layers(model).items():
            assert layer.mask.all() if ends_dense or name.endswith("down_proj") else NM(2, 4).holds(layer.mask)
        layer = sparse_layers(model)["model.layers.0.mlp.down_proj"]
        x = torch.randn(16, 192)
        assert torch.allclose(layer(x), nn.functional.linear(x, layer.weight), atol=1e-5) == ends_dense


def test_unfit_structures():
    for structure in (NM(2, 4), Transposable(2, 4)):
        with pytest.raises(ValueError, match="recipe venom activations needs V:N:M, such as"):
            SparseLinear(random(32, 32), structure, VenomActivations())
    with pytest.raises(ValueError, match="2:4 needs a shape whose in is a multiple of 4"):
        SparseLinear(random(32, 10), VNM(4, 2, 5), VenomActivations())
    with pytest.raises(ValueError, match="warmup must be a number from 0 to 1, got 2"):
        VenomActivations(warmup=2)
