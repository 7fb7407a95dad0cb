"""A sparse layer computes and differentiates like a masked dense one, whatever its structure, kernel and recipe."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from sparsesurvey.linear import SparseLinear, densify, densities, sparse_layers, sparsify
from sparsesurvey.mistral import build
from sparsesurvey.packed import PackedLinear
from sparsesurvey.recipes import Recipe, Static
from sparsesurvey.scores import magnitude
from sparsesurvey.structure import PRODUCTS, Pattern, Unavailable
from sparsesurvey.structures import NM, VNM, Block, Dense, Unstructured, all_structures

SHAPE = (64, 128)
STRUCTURES = [variant for kind in all_structures().values() for variant in kind.variants()
              if isinstance(variant, Pattern) and SHAPE[0] % variant.tile[0] == 0 and SHAPE[1] % variant.tile[1] == 0]
FEW = [Dense(), NM(2, 4), VNM(16, 2, 8), Block(8, 8, 0.5), Unstructured(0.25)]


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def kernels(structure):
    """Kernels with all three products that can run here."""
    able = set.intersection(*(set(structure.kernels(product)) for product in PRODUCTS))
    weight = random(*SHAPE) * structure.mask(random(*SHAPE))
    for name in sorted(able):
        try:
            for product in PRODUCTS:
                structure.kernels(product)[name](structure.pack(weight))
        except Unavailable:
            continue
        yield name


def reference(layer, x, dy):
    """Output and gradients by torch's own autograd, through the dense weight and a mask of its non-zeros."""
    weight = layer.dense().requires_grad_()
    mask = weight.detach() != 0
    x = x.detach().requires_grad_()
    y = nn.functional.linear(x, weight * mask, None if layer.bias is None else layer.bias.detach())
    y.backward(dy)
    return y.detach(), x.grad, weight.grad * mask


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_masked_products_match_autograd(structure):
    layer = SparseLinear(random(*SHAPE), structure, Static(), bias=random(SHAPE[0]))
    x, dy = random(3, 5, SHAPE[1], seed=1).requires_grad_(), random(3, 5, SHAPE[0], seed=2)
    y = layer(x)
    y.backward(dy)
    expected = reference(layer, x, dy)
    layer.edit_grad()
    for got, want in zip((y.detach(), x.grad, layer.weight.grad), expected):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.bias.grad, dy.sum((0, 1)))


@pytest.mark.parametrize("structure", FEW, ids=str)
def test_every_kernel_matches_the_masked_layer(structure):
    masked = SparseLinear(random(*SHAPE), structure, Static())
    x, dy = random(16, SHAPE[1], seed=1), random(16, SHAPE[0], seed=2)
    _, dx, dw = reference(masked, x, dy)
    names = list(kernels(structure))
    assert "reference" in names
    for name in names:
        layer = PackedLinear(SparseLinear(random(*SHAPE), structure, Static()), name)
        assert torch.equal(layer.dense(), masked.dense())
        here = x.clone().requires_grad_()
        y = layer(here)
        y.backward(dy)
        torch.testing.assert_close(y.detach(), masked(x).detach(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(here.grad, dx, rtol=1e-10, atol=1e-10)
        got = structure.unpack(layer.packed._replace(values=layer.values.grad))
        torch.testing.assert_close(got, dw, rtol=1e-10, atol=1e-10)


def test_gradients_match_finite_differences():
    masked = SparseLinear(random(8, 16), NM(2, 4), Static())
    packed = PackedLinear(SparseLinear(random(8, 16), NM(2, 4), Static()), "reference")
    x = random(4, 16, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(masked, (x,))
    assert torch.autograd.gradcheck(packed, (x,))


def test_packed_layer_holds_the_kept_weights_only():
    for structure in FEW[1:]:
        layer = PackedLinear(SparseLinear(random(*SHAPE), structure, Static()), "reference")
        assert sum(p.numel() for p in layer.parameters()) == structure.nnz(SHAPE)
        assert not any(buffer.is_floating_point() for buffer in layer.buffers())
        assert layer.density == pytest.approx(structure.density)


def test_kept_zero_stays_trainable():
    weight = random(*SHAPE)
    weight[:, :4] = 0
    layer = PackedLinear(SparseLinear(weight, NM(2, 4), Static()), "reference")
    masked = SparseLinear(weight, NM(2, 4), Static())
    mask = NM(2, 4).unpack(layer.packed._replace(values=torch.ones_like(layer.values))) != 0
    assert torch.equal(mask, masked.mask)


@pytest.mark.parametrize("fused", [False, True])
def test_packed_layer_sees_updated_values(fused):
    layer = PackedLinear(SparseLinear(random(*SHAPE), NM(2, 4), Static()), "reference")
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=fused)
    x = random(4, SHAPE[1], seed=1)
    for _ in range(2):
        layer(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch.testing.assert_close(layer(x), x @ layer.dense().T)
    with torch.no_grad():
        layer.values.mul_(2.0)
        torch.testing.assert_close(layer(x), x @ layer.dense().T)


def test_dense_structure_leaves_a_model_as_it_is():
    model = build("markov")
    tokens = torch.arange(32).view(2, 16)
    before = model(input_ids=tokens).logits
    sparsify(model, Dense(), Static())
    torch.testing.assert_close(model(input_ids=tokens).logits, before, rtol=0, atol=1e-5)
    assert densities(model) == dict.fromkeys(sparse_layers(model), 1.0)


def test_sparsify_replaces_the_projections_and_densify_puts_plain_ones_back():
    model = sparsify(build("markov"), NM(2, 4), Static())
    layers = sparse_layers(model)
    assert len(layers) == 6 and all(name.endswith(("gate_proj", "up_proj", "down_proj")) for name in layers)
    assert set(densities(model).values()) == {0.5}
    tokens = torch.arange(32).view(2, 16)
    before = model(input_ids=tokens).logits
    densify(model)
    assert not sparse_layers(model)
    torch.testing.assert_close(model(input_ids=tokens).logits, before, rtol=0, atol=1e-5)


def test_masks_depend_on_seed_and_layer():
    models = [sparsify(build("markov"), Unstructured(0.5), Static(), seed=seed) for seed in (0, 0, 1)]
    first, same, other = map(sparse_layers, models)
    gate, up = (name for name in first if name.startswith("model.layers.0") and "down" not in name)
    assert torch.equal(first[gate].mask, same[gate].mask)
    assert not torch.equal(first[gate].mask, first[up].mask)
    assert not torch.equal(first[gate].mask, other[gate].mask)


def test_mask_is_saved_as_bool():
    state = sparsify(build("markov"), NM(2, 4), Static()).state_dict()
    masks = [tensor for name, tensor in state.items() if name.endswith(".mask")]
    assert len(masks) == 6 and all(mask.dtype == torch.bool for mask in masks)


def test_random_mask_keeps_the_variance_of_the_output():
    weight = random(256, 256)
    x = random(64, 256, seed=1)
    dense = (x @ weight.T).std().item()
    for structure in (Unstructured(0.25), VNM(16, 2, 8), Block(8, 8, 0.25)):
        scaled = SparseLinear(weight, structure, Static())(x).std().item()
        plain = SparseLinear(weight, structure, Static(rescale=False))(x).std().item()
        assert scaled / dense == pytest.approx(1, abs=0.1)
        assert plain / dense == pytest.approx(0.5, abs=0.05)


def test_mask_from_a_score_keeps_the_weights_as_they_are():
    weight = random(*SHAPE)
    layer = SparseLinear(weight, NM(2, 4), Static(magnitude))
    assert torch.equal(layer.mask, NM(2, 4).mask(weight.abs()))
    assert torch.equal(layer.dense(), weight * layer.mask)


def test_learning_rate_multiplier():
    assert Static().lr_multiplier(NM(1, 4)) == 1
    assert Static(scale_lr=True).lr_multiplier(NM(1, 4)) == 4
    assert [str(recipe) for recipe in (Recipe(), Static(), Static(magnitude), Static(scale_lr=True))] == [
        "dense", "static", "static magnitude", "static, lr / density"]


def test_a_recipe_is_a_small_class():
    """Straight-through: the forward product sees the best of the weights now, the gradient reaches all of them."""

    @dataclass(frozen=True)
    class StraightThrough(Recipe):
        def forward_weight(self, layer):
            return layer.weight * layer.mask

        def update(self, layer, step, steps, state):
            layer.mask.copy_(layer.structure.mask(layer.weight.abs()))

    layer = SparseLinear(random(*SHAPE), NM(2, 4), StraightThrough())
    layer.update(1, 2, {})
    assert layer.density == 0.5
    x, dy = random(8, SHAPE[1], seed=1).requires_grad_(), random(8, SHAPE[0], seed=2)
    y = layer(x)
    y.backward(dy)
    torch.testing.assert_close(y, x @ (layer.weight * layer.mask).T)
    torch.testing.assert_close(layer.weight.grad, dy.T @ x)
    torch.testing.assert_close(x.grad, dy @ (layer.weight * layer.mask))
    before = layer.mask.clone()
    with torch.no_grad():
        layer.weight.copy_(random(*SHAPE, seed=9))
    layer.update(2, 2, {})
    assert not torch.equal(layer.mask, before)


def test_autocast_computes_in_bfloat16():
    for kernel in ("masked", "reference"):
        layer = SparseLinear(random(*SHAPE, dtype=torch.float32), NM(2, 4), Static())
        layer = layer if kernel == "masked" else PackedLinear(layer, kernel)
        x = random(16, SHAPE[1], seed=1, dtype=torch.float32).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
        assert x.grad.dtype == torch.float32
        assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in layer.parameters())


def test_copies_do_not_share_plans():
    layer = PackedLinear(SparseLinear(random(*SHAPE), NM(2, 4), Static()), "reference")
    x = random(4, SHAPE[1], seed=1)
    layer(x)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.values.zero_()
        assert other(x).abs().max() == 0 and layer(x).abs().max() > 0


# ---- bad input ------------------------------------------------------------------------------------------------------

def test_unknown_modules():
    with pytest.raises(ValueError, match="modules must name linear layers of the model, got fc1"):
        sparsify(build("markov"), NM(2, 4), Static(), modules=("fc1",))


def test_shape_that_is_not_divided_replaces_nothing():
    model = build("markov")
    with pytest.raises(ValueError, match=r"layers.0.mlp.gate_proj cannot be made sparse: 2:5 needs .* multiple of 5"):
        sparsify(model, NM(2, 5), Static())
    assert not sparse_layers(model)


def test_unknown_kernel():
    with pytest.raises(ValueError, match="kernel must be one of .*reference.* products of 2:4; got 'magic'"):
        PackedLinear(SparseLinear(random(*SHAPE), NM(2, 4), Static()), "magic")


def test_kernel_with_a_mask_that_may_change():
    with pytest.raises(ValueError, match="needs a recipe whose mask never changes"):
        PackedLinear(SparseLinear(random(*SHAPE), NM(2, 4), Recipe()), "reference")


@pytest.mark.parametrize("weight, message", [
    (torch.full(SHAPE, float("nan")), "finite"), (torch.ones(SHAPE, dtype=torch.int64), "floating-point"),
    (torch.ones(4), "matrix"), (torch.ones(4, 6), "multiple of 4"),
])
def test_bad_weight(weight, message):
    with pytest.raises(ValueError, match=message):
        SparseLinear(weight, NM(2, 4), Static())
