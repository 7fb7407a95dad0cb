"""The products of packed weights as operators of torch, ``torch.ops.sparsesurvey``, so that ``torch.compile`` takes a model
with such layers whole: it need not look into a kernel, and knows the shape of what comes out.

An operator is handed tensors, and a number for all that is none: the structure, the kernel and the form of what is packed
(``Kind``). Weights of one kind share it, and with it what was compiled for them. Plans belong to the values: they go with them.

The operators are registered below ``torch.library.custom_op``, whose wrapper around an operator with gradients takes as
long as a small product on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from sparsesurvey.plans import Plans
from sparsesurvey.structure import Structure

LIBRARY = torch.library.Library("sparsesurvey", "DEF")
OPERATORS = torch.ops.sparsesurvey


class Kind:
    """Packed weights of one structure, kernel and shape."""

    def __init__(self, structure: Structure, kernel: str, form: Any) -> None:
        self.structure, self.kernel, self.form = structure, kernel, form
        lasting = getattr(structure, "lasting", None)  # a structure need not say
        self.lasting = lasting is not None and lasting(kernel)
        self.plans = WeakTensorKeyDictionary()  # Plans of the weight with these values

    def operand(self, values: Tensor, places: list[Tensor]) -> Any:
        """The packed weight, of its values and its other tensors as ``parts`` gives them."""
        return _refill(self.form, iter(places))._replace(values=values)

    def plans_of(self, values: Tensor) -> Plans:
        if values not in self.plans:
            self.plans[values] = Plans(self.lasting)
        return self.plans[values]


KINDS: list[Kind] = []
NUMBERS: dict[tuple[Structure, str, str], int] = {}


def kind(structure: Structure, kernel: str, packed: Any) -> int:
    """The number, in ``KINDS``, of packed weights like this one."""
    form = _refill(packed, (part.to("meta") for _, part in parts(packed)))
    key = structure, kernel, repr(form)  # shapes and dtypes, and what is no tensor
    if key not in NUMBERS:
        NUMBERS[key] = len(KINDS)
        KINDS.append(Kind(structure, kernel, form))
    return NUMBERS[key]


def parts(packed: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of an operand, of inner ones too, but the values: with the names of the fields that lead to it."""
    for name, part in packed._asdict().items():
        if hasattr(part, "_replace"):
            yield from parts(part, f"{prefix}{name}_")
        elif isinstance(part, Tensor) and name != "values":
            yield prefix + name, part


def _refill(packed: Any, places: Iterator[Tensor]) -> Any:
    """The operand with other tensors in the places that ``parts`` names.

    Values become shapes: those of an inner operand are a part of the whole's, which the caller puts in.
    """
    made = {}
    for name, part in packed._asdict().items():
        if hasattr(part, "_replace"):
            made[name] = _refill(part, places)
        elif isinstance(part, Tensor):
            made[name] = part.to("meta") if name == "values" else next(places)
    return packed._replace(**made)


def define(schema: str, run: Callable[..., Any], shapes: Callable[..., Any]) -> None:
    """Add an operator: ``run`` on tensors, and ``shapes`` on tensors without numbers, which returns such; see torch.library."""
    name = LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparsesurvey::{name}", shapes, lib=LIBRARY)


def below_autograd(operator: Callable[..., Any], *arguments: Any) -> Any:
    """Call an operator past the function that autograd calls instead of it."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


def multiply(product: str, values: Tensor, places: list[Tensor], number: int, *inputs: Tensor) -> Tensor:
    """One of ``structure.PRODUCTS`` of a packed weight, in the dtype of the activations."""
    of = KINDS[number]
    make = lambda parts: of.structure.kernels(product)[of.kernel](of.operand(*parts, places))
    with torch.autocast(values.device.type, enabled=False):  # a plan computes in the dtype that it was made for
        run = of.plans_of(values).find(product, [values], places, inputs[0].dtype, make)
        return run(*inputs).contiguous()


def differentiate(values: Tensor, places: list[Tensor], number: int, dy: Tensor, x: Tensor) -> Tensor:
    """The gradient of the values. Whoever wants it is going to change them."""
    grad = multiply("sddmm", values, places, number, dy, x).to(values.dtype)
    KINDS[number].plans_of(values).forget()
    return grad


define("spmm(Tensor x, Tensor values, Tensor[] places, int kind, SymInt out) -> Tensor",
       lambda x, values, places, kind, out: multiply("spmm", values, places, kind, x),
       lambda x, values, places, kind, out: x.new_empty(x.shape[0], out))
define("spmmt(Tensor dy, Tensor values, Tensor[] places, int kind, SymInt inn) -> Tensor",
       lambda dy, values, places, kind, inn: multiply("spmmt", values, places, kind, dy),
       lambda dy, values, places, kind, inn: dy.new_empty(dy.shape[0], inn))
define("sddmm(Tensor dy, Tensor x, Tensor values, Tensor[] places, int kind) -> Tensor",
       lambda dy, x, values, places, kind: differentiate(values, places, kind, dy, x),
       lambda dy, x, values, places, kind: values.new_empty(values.shape))


class Products(torch.autograd.Function):
    """y = x @ W.T with gradients dx = dy @ W and dW = dy.T @ x in the layout of the values, each by a kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, kind: int, out: int, *places: Tensor) -> Tensor:
        ctx.kind = kind
        ctx.save_for_backward(x, values, *places)
        return below_autograd(OPERATORS.spmm.default, x, values, places, kind, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, values, *places = ctx.saved_tensors
        dy = dy.to(x.dtype).contiguous()
        dx = OPERATORS.spmmt.default(dy, values, places, ctx.kind, x.shape[1]) if ctx.needs_input_grad[0] else None
        grad = OPERATORS.sddmm.default(dy, x, values, places, ctx.kind) if ctx.needs_input_grad[1] else None
        return dx, grad, None, None, *[None] * len(places)


def recorded(x: Tensor, values: Tensor, places: list[Tensor], kind: int, out: int) -> Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or values.requires_grad):
        return Products.apply(x, values, kind, out, *places)
    return below_autograd(OPERATORS.spmm.default, x, values, places, kind, out)


LIBRARY.impl("spmm", recorded, "Autograd")
