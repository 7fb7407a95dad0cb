"""A gated MLP of packed weights computes and differentiates like a dense one, fused and apart, alone and in a model."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import linear, silu

from sparsesurvey.linear import SparseLinear, densify, sparse_layers, sparsify
from sparsesurvey.mlp import SparseMLP, can_fuse, fuse_mlps, sparse_mlps, split_mlps
from sparsesurvey.packed import PackedLinear, pack_layers
from sparsesurvey.recipes.static import Static
from sparsesurvey.scores import magnitude
from sparsesurvey.structure import Unavailable
from sparsesurvey.structures import NM, Block, Unstructured
from test_kernels_block import TRITON, interpreted

HIDDEN, INN = 64, 32
STRUCTURES = [Block(32, 32, 0.5), Block(8, 4, 0.5), NM(2, 4), Unstructured(0.25)]


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layers(structure, kernel="gather", dtype=torch.float64, **biases):
    """gate, up and down; a generator of one seed gives gate and up the same random mask."""
    shapes = {"gate": (HIDDEN, INN), "up": (HIDDEN, INN), "down": (INN, HIDDEN)}
    return [PackedLinear(SparseLinear(random(*shape, seed=seed, dtype=dtype) / shape[1] ** 0.5, structure, Static(), biases.get(name)), kernel)
            for seed, (name, shape) in enumerate(shapes.items())]


def dense(mlp, x, dy):
    """Output, dx and the three weight gradients ``[out, in]`` at the kept places, by torch alone."""
    weights = [layer.dense().requires_grad_() for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
    x = x.detach().requires_grad_()
    gate, up, down = weights
    y = linear(silu(linear(x, gate)) * linear(x, up), down, mlp.down_proj.bias)
    y.backward(dy)
    return y.detach(), x.grad, *(weight.grad * (weight.detach() != 0) for weight in weights)


def packed(mlp, x, dy):
    x = x.detach().requires_grad_()
    mlp.zero_grad()
    y = mlp(x)
    y.backward(dy)
    unpacked = lambda layer: layer.structure.unpack(layer.operand(layer.values.grad))
    return y.detach(), x.grad, *(unpacked(layer) for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_products_apart_equal_a_dense_mlp(structure):
    kernel = "gather" if isinstance(structure, Block) else "torch_csr"
    mlp = SparseMLP(*layers(structure, kernel, down=random(INN)))
    assert not mlp.fused
    for shape in (2, 5), (1,), (0,):
        x, dy = random(*shape, INN, seed=3), random(*shape, INN, seed=4)
        for got, want in zip(packed(mlp, x, dy), dense(mlp, x, dy), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_gradients_match_finite_differences():
    mlp = SparseMLP(*layers(Block(16, 16, 0.5)))
    assert torch.autograd.gradcheck(mlp, (random(2, INN, seed=3).requires_grad_(),), fast_mode=True)


def test_nothing_dense_is_held():
    mlp = SparseMLP(*layers(Block(32, 32, 0.5)))
    assert sum(p.numel() for p in mlp.parameters()) == 3 * HIDDEN * INN // 2
    assert not any(buffer.is_floating_point() for buffer in mlp.buffers())
    assert sorted(mlp.state_dict())[0] == "down_proj.columns"


def test_lower_dtypes_add_up_in_float32():
    for dtype in torch.bfloat16, torch.float16:
        mlp = SparseMLP(*layers(Block(16, 16, 0.5), dtype=torch.float32)).to(dtype)
        x, dy = random(9, INN, seed=3).to(dtype), random(9, INN, seed=4).to(dtype)
        right = dense(copy.deepcopy(mlp).double(), x.double(), dy.double())
        for got, want in zip(packed(mlp, x, dy), right):
            assert got.dtype == dtype and (got.double() - want).abs().max() < 8 * torch.finfo(dtype).eps * want.abs().max()


# ---- fused, in the interpreter

FUSED = """
import copy
import torch
from torch._dynamo.backends.debugging import aot_eager
from sparsesurvey.mlp import SparseMLP
from sparsesurvey.operators import KINDS
from sparsesurvey.structures import Block
from test_mlp import dense, layers, packed, random, INN
for structure, dtype, counts in ((Block(32, 16, 0.5), torch.float32, (33, 0, 3)), (Block(16, 32, 0.5), torch.float16, (5, 2))):
    mlp = SparseMLP(*layers(structure, "triton", dtype=dtype))
    assert mlp.fused
    exact, calls = copy.deepcopy(mlp).double(), []
    mlp.gate_proj.register_forward_hook(lambda *_: calls.append(1))
    optimizer = torch.optim.AdamW(mlp.parameters(), lr=0.01, fused=True)
    for tokens in counts:  # the values change in between, and no plan may notice
        x = random(tokens, 2 * INN, seed=3).to(dtype)[:, ::2]
        dy = random(INN, tokens, seed=4).to(dtype).T
        exact.load_state_dict(mlp.state_dict())
        for got, want in zip(packed(mlp, x, dy), dense(exact, x.double(), dy.double()), strict=True):
            assert got.dtype == dtype and got.shape == want.shape and want.any() == (tokens > 0)
            assert (got.double() - want).abs().max() <= 8 * torch.finfo(dtype).eps * want.abs().max() if tokens else not got.any()
        optimizer.step()
    made = KINDS[mlp.gate_proj.kind].plans_of(mlp.gate_proj.values).made
    plans = dict(made)
    mlp(x)
    assert not calls and len(plans) == 4 and all(made[name] is plan for name, plan in plans.items())

mlp = SparseMLP(*layers(Block(16, 16, 0.5), "triton", dtype=torch.float32))
x, dy = random(5, INN, seed=3).float(), random(5, INN, seed=4).float()
right = dense(copy.deepcopy(mlp).double(), x.double(), dy.double())
for step in range(2):
    with torch.autocast("cpu", torch.float16):
        got = packed(mlp, x, dy.half())
    assert got[0].dtype == torch.float16 and all(part.dtype == torch.float32 for part in got[1:])
    for mine, want in zip(got, right):
        assert (mine.double() - want).abs().max() < 8 * torch.finfo(torch.float16).eps * want.abs().max()
    with torch.no_grad():
        for part in mlp.parameters():
            part.data.mul_(1.5)  # is not counted
    right = dense(copy.deepcopy(mlp).double(), x.double(), dy.double())

graphs = []
step = torch.compile(mlp, fullgraph=True, dynamic=True, backend=lambda graph, inputs: graphs.append(graph) or aot_eager(graph, inputs))
for tokens in (5, 7):
    x, dy = random(tokens, INN, seed=3).float(), random(tokens, INN, seed=4).float()
    for got, want in zip(packed(step, x, dy), packed(mlp, x, dy), strict=True):
        assert torch.equal(got, want)
assert len(graphs) == 1 and any("swiglu" in str(node.target) for node in graphs[0].graph.nodes)
"""


def test_fused_products_equal_a_dense_mlp():
    """Any layout and number of tokens, both dtypes, autocast, while the values are trained, and compiled."""
    pytest.importorskip("triton", reason=TRITON)
    done = interpreted(code=FUSED)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


def test_fused_kernels_say_what_they_need():
    pytest.importorskip("triton", reason=TRITON)
    assert can_fuse(Block(), "triton") and not can_fuse(Block(), "gather") and not can_fuse(NM(2, 4), "triton")
    mlp = SparseMLP(*layers(Block(16, 16, 0.5), "triton", dtype=torch.bfloat16))
    with pytest.raises(Unavailable, match="needs a CUDA device"):
        mlp(random(4, INN).bfloat16())


# ---- in a model


def markov():
    from sparsesurvey.mistral import build  # here, not above: the interpreted tests import this file too, and need no models

    return build("markov")


def tokens():
    return torch.arange(24).view(2, 12)


def outcome(model, inputs):
    model.zero_grad()
    y = model(input_ids=inputs).logits
    y.square().mean().backward()
    return y.detach(), {name: part.grad for name, part in model.named_parameters()}


def test_mlps_of_a_model_are_replaced_and_come_back():
    model = sparse_mlps(markov(), Block(16, 16, 0.5), "gather")
    mlps = [layer.mlp for layer in model.model.layers]
    assert all(isinstance(mlp, SparseMLP) for mlp in mlps) and len(sparse_layers(model)) == 6
    names, (y, grads) = list(model.state_dict()), outcome(model, tokens())
    kinds = {type(layer.mlp).__name__ for layer in split_mlps(model).model.layers}
    assert kinds == {"MistralMLP"} and list(model.state_dict()) == names
    again, same = outcome(model, tokens())
    torch.testing.assert_close(again, y)
    assert all(torch.equal(grads[name], same[name]) for name in same)
    assert isinstance(fuse_mlps(model).model.layers[0].mlp, SparseMLP)
    torch.testing.assert_close(outcome(model, tokens())[0], y)
    torch.testing.assert_close(densify(split_mlps(model))(input_ids=tokens()).logits, y)


def test_a_score_is_added_up_over_gate_and_up():
    model = markov()
    plain = model.model.layers[1].mlp
    gate, up, down = (part.weight.detach() for part in (plain.gate_proj, plain.up_proj, plain.down_proj))
    mlp = sparse_mlps(model, Block(8, 8, 0.25), "gather", Static(magnitude)).model.layers[1].mlp
    mask = Block(8, 8, 0.25).mask(gate.abs() + up.abs())
    assert torch.equal(mlp.gate_proj.dense(), gate * mask) and torch.equal(mlp.up_proj.dense(), up * mask)
    assert torch.equal(mlp.down_proj.dense(), down * Block(8, 8, 0.25).mask(down.abs()))
    assert mlp.gate_proj.recipe == Static(magnitude)


def test_random_masks_depend_on_seed_and_name():
    first, same, other = (sparse_mlps(markov(), Block(8, 8, 0.25), "gather", seed=seed) for seed in (0, 0, 1))
    columns = lambda model, layer=0: model.model.layers[layer].mlp.up_proj.columns
    assert columns(first).equal(columns(same)) and not columns(first).equal(columns(other))
    assert not columns(first).equal(columns(first, 1))


def test_copies_are_mlps_of_their_own():
    mlp = SparseMLP(*layers(Block(32, 32, 0.5)))
    x = random(4, INN)
    y = mlp(x)
    for other in copy.deepcopy(mlp), pickle.loads(pickle.dumps(mlp)):
        with torch.no_grad():
            other.up_proj.values.zero_()
            assert not other(x).any() and torch.equal(mlp(x), y)


def test_a_model_is_compiled_whole():
    model = sparse_mlps(markov(), Block(16, 16, 0.5), "gather")
    y, grads = outcome(model, tokens())
    again, same = outcome(torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False), tokens())
    torch.testing.assert_close(again, y)
    torch.testing.assert_close(same, {f"_orig_mod.{name}": grad for name, grad in grads.items()})


# ---- bad input


def test_layers_that_do_not_fit_together():
    gate, up, down = layers(Block(16, 16, 0.5))
    other = PackedLinear(SparseLinear(random(HIDDEN, INN), Block(16, 16, 0.5), Static(), generator=torch.Generator().manual_seed(7)), "gather")
    biased, *_ = layers(Block(16, 16, 0.5), gate=random(HIDDEN))
    for wrong, said in (
        ((gate.dense(), up, down), "gate must be a PackedLinear, got Tensor"),
        ((gate, nn.Linear(INN, HIDDEN), down), "up must be a PackedLinear, got Linear"),
        ((biased, up, down), "gate must have no bias"),
        ((gate, layers(Block(16, 16, 0.25))[1], down), "up must be as gate, block 16x16 50%"),
        ((gate, other, down), "up must keep the places that gate keeps"),
        ((gate, up, gate), r"down must be \[32 x 64\] for this gate"),
        ((gate, up, down, True), "fused must be False for block 16x16 50% with kernel 'gather'"),
    ):
        with pytest.raises(ValueError, match=said):
            SparseMLP(*wrong)


def test_models_that_do_not_fit():
    with pytest.raises(ValueError, match="model must have gated MLPs with gate_proj, up_proj, down_proj, got a Linear"):
        fuse_mlps(nn.Linear(4, 4))
    model = pack_layers(sparsify(markov(), Block(16, 16, 0.5), Static()), "gather")
    with pytest.raises(ValueError, match="model.layers.0.mlp: up must keep the places that gate keeps"):
        fuse_mlps(model)
    assert not any(isinstance(part, SparseMLP) for part in model.modules())
    with pytest.raises(ValueError, match="model.layers.0.mlp must have plain linear layers, got PackedLinear"):
        sparse_mlps(model, Block(16, 16, 0.5), "gather")
    with pytest.raises(ValueError, match="fused must be False"):
        sparse_mlps(markov(), Block(16, 16, 0.5), "gather", fused=True)
    model = markov()
    model.model.layers[1].mlp.act_fn = nn.GELU()
    with pytest.raises(ValueError, match=r"model.layers.1.mlp must have SiLU as its act_fn, got GELU"):
        sparse_mlps(model, Block(16, 16, 0.5), "gather")
    with pytest.raises(ValueError, match="made by hand"):
        split_mlps(nn.Sequential(SparseMLP(*layers(Block(16, 16, 0.5)))))
