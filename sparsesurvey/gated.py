"""The forward pass of a gated MLP, down(silu(gate(x)) * up(x)), with sparse weights: fused and not, against dense ones.

Fusing pays where the hidden activations are most of the traffic. So the honest baseline is a fused dense MLP too: the
same fused kernel at density 1, timed beside the plain one.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from sparsesurvey import measure
from sparsesurvey.benchmark import DTYPES, Benchmark, Book, How, allowed, cpu_threads, relative_error
from sparsesurvey.measure import Machine
from sparsesurvey.scores import magnitude
from sparsesurvey.structure import Pattern, Plan, Shape, check_int

FUSED = "swiglu_"  # methods of a structure that fuse gate, up and the activation
WHOLE = "mlp_"  # and those that fuse down as well
DENSE = "dense "  # before the name of a kernel at density 1


def mlp(structure: Pattern, shape: Shape, tokens: int, chapter: str, *, full: Pattern | None = None, dtype: str = "float32",
        device: str = "cpu", threads: int = 1, record: str = "", **how: Any) -> Benchmark:
    """Time the MLP with gate and up ``[out, in]`` of ``shape`` and down ``[in, out]``, all of ``structure``.

    For every fused kernel ``swiglu_<name>`` of the structure: "<name>", fused; "<name> unfused", three products and the
    activation apart; "<name> whole", where a method ``mlp_<name>`` makes all of it one kernel; and with ``full``, the
    structure at density 1, "dense <name>", fused. Baseline "dense" is torch's: one product for gate and up, the activation,
    one for down. Rows as those of ``benchmark.products`` with product "mlp". ``how`` are
    fields of ``benchmark.How``; ValueError where the structure has no fused kernel.
    """
    names = [name.removeprefix(FUSED) for name in dir(type(structure)) if name.startswith(FUSED)]
    if not names:
        raise ValueError(f"structure must have a fused kernel, a method {FUSED}<name>, got {structure}")
    for name, size in (("tokens", tokens), ("threads", threads)):
        check_int(name, size, 1)
    timing, where = How(**how), measure.check_device(device)
    at = {"out": shape[0], "in": shape[1], "tokens": tokens, "dtype": dtype, "threads": threads, "product": "mlp",
          **timing.settings(where)}
    with cpu_threads(threads):
        book = Book(str(structure), f"sparsesurvey.gated,{type(structure).__module__}", at, Machine.current(device), chapter, record)
        case = _MLP(structure, full, structure.check_shape(shape), tokens, DTYPES[dtype], where)
        makers: dict[str, Callable[[], Plan]] = {}
        for name in names:
            makers[name] = lambda name=name: case.fused(structure, name)
            makers[f"{name} unfused"] = lambda name=name: case.apart(name)
            if hasattr(structure, WHOLE + name):
                makers[f"{name} whole"] = lambda name=name: getattr(structure, WHOLE + name)(*case.packed)
            if full:
                makers[DENSE + name] = lambda name=name: case.fused(full, name)
        return book.fill(case, makers, timing, where)


class _MLP:
    """The operands, made when they are needed. Gate and up share one mask, as fusing wants it."""

    def __init__(self, structure: Pattern, full: Pattern | None, shape: Shape, tokens: int, dtype: torch.dtype, device: torch.device):
        self.structure, self.full, self.shape, self.tokens, self.dtype, self.device = structure, full, shape, tokens, dtype, device
        self.allowed = 2 * allowed(dtype, max(shape))  # the hidden activations are rounded too

    @cached_property
    def operands(self) -> tuple[Tensor, ...]:
        """x, gate, up, down."""
        generator = torch.Generator(self.device).manual_seed(0)
        (hidden, inn), draw = self.shape, lambda *size: torch.randn(*size, generator=generator, device=self.device)
        sizes = (self.tokens, inn, 1), (hidden, inn, inn), (hidden, inn, inn), (inn, hidden, hidden)
        return tuple((draw(*size) / fan**0.5).to(self.dtype) for *size, fan in sizes)

    @property
    def inputs(self) -> tuple[Tensor]:
        return self.operands[:1]

    def weights(self, structure: Pattern) -> tuple[Tensor, Tensor, Tensor]:
        """gate, up and down, made members by magnitude."""
        _, gate, up, down = self.operands
        mask = structure.mask(magnitude(gate) + magnitude(up))
        return gate * mask, up * mask, down * structure.mask(magnitude(down))

    @property
    def packed(self) -> tuple[Any, ...]:
        return tuple(map(self.structure.pack, self.weights(self.structure)))

    @cached_property
    def dense(self) -> Plan:
        _, gate, up, down = self.operands
        both = torch.cat([gate, up])

        def run(x: Tensor) -> Tensor:
            g, u = linear(x, both).chunk(2, 1)
            return linear(silu(g) * u, down)

        return run

    def fused(self, structure: Pattern, name: str) -> Plan:
        gate, up, down = map(structure.pack, self.weights(structure))
        first = getattr(structure, FUSED + name)(gate, up)
        second = structure.kernels()[name](down)
        return lambda x: second(first(x))

    def apart(self, name: str) -> Plan:
        structure = self.structure
        gate, up, down = (structure.kernels()[name](weight) for weight in self.packed)
        return lambda x: down(silu(gate(x)) * up(x))

    def error(self, name: str, plan: Plan) -> float:
        structure = self.full if name.startswith(DENSE) else self.structure
        x, (gate, up, down) = self.inputs[0].double(), (weight.double() for weight in self.weights(structure))
        right = linear(silu(linear(x, gate)) * linear(x, up), down)
        return relative_error(name, plan(*self.inputs), right, self.dtype, self.allowed)
