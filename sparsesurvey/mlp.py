"""A gated MLP of packed weights, y = down(silu(gate(x)) * up(x)), with its first half fused where the structure can.

Fused, the forward pass writes h = silu(x @ G.T) * (x @ U.T) and keeps x for the backward pass, which computes both products
again; their gradients dg and du are then multiplied together, once for dx and once for dG and dU. Apart, these are the
products of two layers, and both products are kept.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from sparsesurvey.linear import MLP, SparseLinear
from sparsesurvey.operators import KINDS, LIBRARY, OPERATORS, below_autograd, define
from sparsesurvey.packed import PackedLinear
from sparsesurvey.recipes.static import Static
from sparsesurvey.structure import Pattern, Structure

FUSED = ("swiglu_", "both_spmmt_", "both_sddmm_")  # methods of a structure, before the name of a kernel, that fusing takes


def multiply(method: str, gate: Tensor, up: Tensor, places: list[Tensor], number: int, *inputs: Tensor, **how: bool) -> Any:
    """A fused product with two weights of one kind and pattern, in the dtype of the activations."""
    of = KINDS[number]
    make = lambda parts: getattr(of.structure, method + of.kernel)(*(of.operand(part, places) for part in parts), **how)
    with torch.autocast(gate.device.type, enabled=False):  # a plan computes in the dtype that it was made for
        return of.plans_of(gate).find(f"{method}{how}", [gate, up], places, inputs[0].dtype, make)(*inputs)


def differentiate(gate: Tensor, up: Tensor, places: list[Tensor], number: int, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the values of gate and up. Whoever wants them is going to change these."""
    first, second = multiply("both_sddmm_", gate, up, places, number, *inputs)
    KINDS[number].plans_of(gate).forget()
    return first.to(gate.dtype), second.to(up.dtype)


define("swiglu(Tensor x, Tensor gate, Tensor up, Tensor[] places, int kind, SymInt hidden) -> Tensor",
       lambda x, gate, up, places, kind, hidden: multiply("swiglu_", gate, up, places, kind, x),
       lambda x, gate, up, places, kind, hidden: x.new_empty(x.shape[0], hidden))
define("swiglu_backward(Tensor x, Tensor dh, Tensor gate, Tensor up, Tensor[] places, int kind) -> (Tensor, Tensor)",
       lambda x, dh, gate, up, places, kind: multiply("swiglu_", gate, up, places, kind, x, dh, backward=True),
       lambda x, dh, gate, up, places, kind: (dh.new_empty(dh.shape), dh.new_empty(dh.shape)))
define("both_spmmt(Tensor dg, Tensor du, Tensor gate, Tensor up, Tensor[] places, int kind, SymInt inn) -> Tensor",
       lambda dg, du, gate, up, places, kind, inn: multiply("both_spmmt_", gate, up, places, kind, dg, du),
       lambda dg, du, gate, up, places, kind, inn: dg.new_empty(dg.shape[0], inn))
define("both_sddmm(Tensor dg, Tensor du, Tensor x, Tensor gate, Tensor up, Tensor[] places, int kind) -> (Tensor, Tensor)",
       lambda dg, du, x, gate, up, places, kind: differentiate(gate, up, places, kind, dg, du, x),
       lambda dg, du, x, gate, up, places, kind: (gate.new_empty(gate.shape), up.new_empty(up.shape)))


class FirstHalf(torch.autograd.Function):
    """h = silu(x @ G.T) * (x @ U.T), ``[tokens, hidden]``, and its gradients; the hidden ones are made when they are needed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor, kind: int, hidden: int, *places: Tensor) -> Tensor:
        ctx.kind = kind
        ctx.save_for_backward(x, gate, up, *places)
        return below_autograd(OPERATORS.swiglu.default, x, gate, up, places, kind, hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, *places = ctx.saved_tensors
        weights = gate, up, places, ctx.kind
        dg, du = OPERATORS.swiglu_backward.default(x, dh.to(x.dtype).contiguous(), *weights)
        dx = OPERATORS.both_spmmt.default(dg, du, *weights, x.shape[1]) if ctx.needs_input_grad[0] else None
        wanted = any(ctx.needs_input_grad[1:3])
        grads = OPERATORS.both_sddmm.default(dg, du, x, *weights) if wanted else (None, None)
        return dx, *grads, None, None, *[None] * len(places)


def recorded(x: Tensor, gate: Tensor, up: Tensor, places: list[Tensor], kind: int, hidden: int) -> Tensor:
    if torch.is_grad_enabled() and any(part.requires_grad for part in (x, gate, up)):
        return FirstHalf.apply(x, gate, up, kind, hidden, *places)
    return below_autograd(OPERATORS.swiglu.default, x, gate, up, places, kind, hidden)


LIBRARY.impl("swiglu", recorded, "Autograd")


class SparseMLP(nn.Module):
    """``y = down(silu(gate(x)) * up(x))`` for ``x [..., in]``, where all weights are packed.

    The layers stay what they are, under the names ``gate_proj``, ``up_proj`` and ``down_proj`` that they have in a model: so do
    checkpoints. Where the first half is fused, hooks of gate and up are not called.

    Args:
        gate, up: ``[hidden, in]``, without bias, of one structure, kernel and pattern.
        down: ``[in, hidden]``, of any structure.
        fused: shall gate, up and activation be one kernel? By default where the structure has one of the layers' name.

    Raises:
        ValueError: weights that do not fit together, or ``fused`` where nothing is.
    """

    def __init__(self, gate: PackedLinear, up: PackedLinear, down: PackedLinear, fused: bool | None = None) -> None:
        super().__init__()
        check_layers(gate, up, down)
        able = can_fuse(gate.structure, gate.kernel)
        if fused and not able:
            raise ValueError(f"fused must be False for {gate.structure} with kernel {gate.kernel!r}, which has no fused kernel")
        self.gate_proj, self.up_proj, self.down_proj = gate, up, down
        self.fused = able if fused is None else fused
        self.original: tuple[nn.Module, ...] = ()  # what this stands for in a model; a tuple, so that it is no part of this

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj, self.up_proj
        if not self.fused:
            return self.down_proj(silu(gate(x)) * up(x))
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        flat = x.reshape(-1, gate.in_features)
        h = OPERATORS.swiglu(flat, gate.values, up.values, gate.places, gate.kind, gate.out_features)
        return self.down_proj(h.view(*x.shape[:-1], gate.out_features))

    def extra_repr(self) -> str:
        return f"fused={self.fused}"


def can_fuse(structure: Structure, kernel: str) -> bool:
    """Has the structure a kernel of that name for the first half of a gated MLP, forward and backward?"""
    return all(hasattr(structure, method + kernel) for method in FUSED)


def check_layers(gate: nn.Module, up: nn.Module, down: nn.Module) -> None:
    """Raise ValueError unless these are the packed layers of one gated MLP, gate and up with one pattern."""
    for name, layer in (("gate", gate), ("up", up), ("down", down)):
        if not isinstance(layer, PackedLinear):
            raise ValueError(f"{name} must be a PackedLinear, got {type(layer).__name__}: see packed.pack_layers")
    for name, layer in (("gate", gate), ("up", up)):
        if layer.bias is not None:
            raise ValueError(f"{name} must have no bias, got one")
    said = lambda layer: f"{layer.structure} [{layer.out_features} x {layer.in_features}] with kernel {layer.kernel!r}"
    if said(up) != said(gate):
        raise ValueError(f"up must be as gate, {said(gate)}, got {said(up)}")
    if (down.out_features, down.in_features) != (gate.in_features, gate.out_features):
        raise ValueError(f"down must be [{gate.in_features} x {gate.out_features}] for this gate, got {said(down)}")
    if not all(mine.equal(its) for mine, its in zip(gate.places, up.places)):
        raise ValueError("up must keep the places that gate keeps, got others: choose one mask for both, as sparse_mlps does")


# ---- in a model


def mlps(model: nn.Module) -> dict[str, nn.Module]:
    """The gated MLPs of a model by name: modules with gate_proj, up_proj and down_proj, and SiLU between them."""
    found = [(name, part) for name, part in model.named_modules() if all(hasattr(part, layer) for layer in MLP)]
    if not found:
        raise ValueError(f"model must have gated MLPs with {', '.join(MLP)}, got a {type(model).__name__} with none")
    probe = torch.linspace(-3, 3, 7)  # libraries have classes of their own for it
    for name, part in found:
        act = silu if isinstance(part, SparseMLP) else getattr(part, "act_fn", None)
        if act is None or not torch.equal(act(probe), silu(probe)):
            raise ValueError(f"{name} must have SiLU as its act_fn, got {act}")
    return dict(found)


def fuse_mlps(model: nn.Module, fused: bool | None = None) -> nn.Module:
    """Replace, in place, the gated MLPs of a model whose layers are packed by ``SparseMLP`` ones of the same layers; return it.

    Names and values stay as they are. Every MLP is checked before any is replaced; ``split_mlps`` inverts it.

    Raises:
        ValueError: no gated MLP, or layers that do not make a ``SparseMLP``.
    """
    made = {}
    for name, part in mlps(model).items():
        if not isinstance(part, SparseMLP):
            try:
                made[name] = SparseMLP(*(getattr(part, layer) for layer in MLP), fused)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            made[name].original = (part,)
    for name, part in made.items():
        model.set_submodule(name, part)
    return model


def split_mlps(model: nn.Module) -> nn.Module:
    """Invert ``fuse_mlps``, in place: the modules that were there before, with the layers of now."""
    for name, part in [(name, part) for name, part in model.named_modules() if isinstance(part, SparseMLP)]:
        if not part.original:
            raise ValueError(f"{name} must stand for another module, as fuse_mlps makes it, got one made by hand")
        plain, = part.original
        for layer in MLP:
            setattr(plain, layer, getattr(part, layer))
        model.set_submodule(name, plain.train(part.training))
    return model


def sparse_mlps(model: nn.Module, structure: Pattern, kernel: str, recipe: Static = Static(), seed: int = 0,
                fused: bool | None = None) -> nn.Module:
    """Make the gated MLPs of a dense model sparse, in place, with one mask for gate and up of each; return the model.

    A random mask depends on ``seed`` and the MLP's name; a recipe with a score keeps what the scores of gate and up add up to.

    Raises:
        ValueError: no gated MLP of plain linear layers, or a structure, kernel and recipe that do not go together.
    """
    if fused and not can_fuse(structure, kernel):
        raise ValueError(f"fused must be False for {structure} with kernel {kernel!r}, which has no fused kernel")
    made = {}
    for name, part in mlps(model).items():
        plain = [getattr(part, layer) for layer in MLP]
        if not all(isinstance(layer, nn.Linear) for layer in plain):
            raise ValueError(f"{name} must have plain linear layers, got {', '.join(type(layer).__name__ for layer in plain)}")
        shared = recipe if recipe.score is None else replace(recipe, score=added(recipe.score, plain[0].weight, plain[1].weight))
        for layer, weight, how, side in zip(MLP, plain, (shared, shared, recipe), ("first", "first", "second")):
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name} {side}".encode()))
            packed = PackedLinear(SparseLinear(weight.weight, structure, how, weight.bias, generator), kernel)
            packed.recipe = recipe
            made[f"{name}.{layer}"] = packed
    for name, layer in made.items():
        model.set_submodule(name, layer)
    return fuse_mlps(model, fused)


def added(score: Callable[[Tensor, Any], Tensor], gate: Tensor, up: Tensor) -> Callable[[Tensor, Any], Tensor]:
    """A score that is the same for both weights."""
    return wraps(score)(lambda weight, inputs: score(gate.detach(), inputs) + score(up.detach(), inputs))
