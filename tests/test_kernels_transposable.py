"""2:4 both ways through cuSPARSELt, with the library played by dense products that refuse what is not 2:4."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparsesurvey.kernels import semi_structured
from sparsesurvey.linear import sparse_layers, sparsify
from sparsesurvey.packed import pack_layers
from sparsesurvey.recipes import Static
from sparsesurvey.structure import PRODUCTS, Unavailable
from sparsesurvey.structures import NM, Transposable

PAIRS = Transposable(2, 4)


@pytest.fixture
def library(monkeypatch):
    """Counts its searches."""
    counted = []

    def compress(weight):
        assert weight.is_contiguous() and NM(2, 4).holds(weight != 0)
        return weight.clone()

    def multiply(compressed, dense, transpose_result, alg_id=None, **_):
        assert transpose_result and alg_id == 3 and dense.shape[1] % 8 == 0
        return (compressed @ dense).T

    monkeypatch.setattr(semi_structured, "SEARCHED", {})
    monkeypatch.setattr(semi_structured, "require_cusparselt", lambda values, shape: None)
    monkeypatch.setattr(torch, "_cslt_compress", compress, raising=False)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", multiply, raising=False)
    monkeypatch.setattr(torch._C, "_cusparselt", SimpleNamespace(mm_search=lambda *_: counted.append(1) or (3, 1, 0)), raising=False)
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: torch.autograd.profiler.record_function("on the device of x"))
    return counted


def weights(full, seed=0):
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mask = PAIRS.mask(weight.abs())
    if not full:
        mask[:4, :8] = False  # tiles that keep nothing: their slots stand nowhere
    return weight * mask


@pytest.mark.parametrize("full", (True, False))
def test_products_follow_the_values(library, full):
    packed = PAIRS.pack(weights(full))
    plans = {product: PAIRS.kernels(product)["cusparselt"](packed) for product in PRODUCTS}
    x, dy = (torch.randn(5, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size)) for size in (32, 16))
    for _ in range(2):
        right = PAIRS.unpack(packed)
        torch.testing.assert_close(plans["spmm"](x), x @ right.T)
        torch.testing.assert_close(plans["spmmt"](dy), dy @ right)
        expected = PAIRS.kernels("sddmm")["reference"](packed)(dy, x)
        torch.testing.assert_close(plans["sddmm"](dy, x), expected)
        packed.values.mul_(-1.5)  # as an optimizer does
    assert PAIRS.kernels("spmm")["cusparselt"](packed)(x).shape == (5, 16)
    assert len(library) == 2, "one search a shape and number of tokens"
    assert plans["spmm"](x[:0]).shape == (0, 16)


def test_a_layer_is_trained_by_them(library):
    """The same step as by masked products: output, gradients, and the next output with other values."""
    masked, packed = (sparsify(nn.ModuleDict({"gate_proj": nn.Linear(32, 16, bias=False)}), PAIRS, Static()) for _ in range(2))
    packed.load_state_dict(masked.state_dict())
    pack_layers(packed, "cusparselt")
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        seen = []
        for model in (masked, packed):
            [layer] = sparse_layers(model).values()
            inputs = x.clone().requires_grad_()
            y = layer(inputs)
            y.square().sum().backward()
            layer.edit_grad()
            with torch.no_grad():
                layer.parameter.sub_(0.01 * layer.parameter.grad)
            layer.parameter.grad = None
            seen.append((y.detach(), inputs.grad, layer.dense()))
        for one, other in zip(*seen):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_what_is_no_2_4(library):
    structure = Transposable(4, 8)
    packed = structure.pack(torch.zeros(16, 32))
    with pytest.raises(Unavailable, match="needs at most 2 of every 4, transposable 4:8 may keep more"):
        structure.kernels("spmm")["cusparselt"](packed)


def test_without_a_gpu():
    for product in PRODUCTS:
        with pytest.raises(Unavailable, match="needs a CUDA device"):
            PAIRS.kernels(product)["cusparselt"](PAIRS.pack(weights(True)))
