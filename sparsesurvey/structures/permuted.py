"""Permuted: any pattern behind one order of the inputs, W = S P (PA-DST, Tyagi et al. 2025); S(Px) is S times x[order].

>>> scores = torch.tensor([[9.0, 8.0, 7.0, 1.0, 2.0, 1.0, 0.0, 0.0]])
>>> structure = Permuted(NM(2, 4), (0, 2, 4, 6, 1, 3, 5, 7))  # the even inputs, then the odd ones
>>> structure.mask(scores).int()  # 9, 7 of the even ones, 8, 1 of the odd ones; 2:4 alone keeps 9, 8 and 2, 1
tensor([[1, 1, 1, 1, 0, 0, 0, 0]], dtype=torch.int32)
>>> packed = structure.pack(scores * structure.mask(scores))
>>> packed.values
tensor([[[9., 7.],
         [8., 1.]]])
>>> packed.order.tolist()
[0, 2, 4, 6, 1, 3, 5, 7]
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from math import lcm
from typing import Any, NamedTuple
from zlib import crc32

import torch
from torch import Tensor

from sparsesurvey.structure import Facts, Pattern, Plan, Shape, check_activations, check_int, check_part
from sparsesurvey.structures.block import Block
from sparsesurvey.structures.diagonal import Diagonal
from sparsesurvey.structures.nm import NM
from sparsesurvey.structures.vnm import VNM


def shuffle(window: int, width: int) -> tuple[int, ...]:
    """The perfect shuffle that deals the inputs of a window to tiles of ``width`` in turn, as cards.

    >>> shuffle(8, 4)
    (0, 2, 4, 6, 1, 3, 5, 7)
    """
    check_int("window", window, 1)
    check_int("width", width, 1, window)
    if window % width:
        raise ValueError(f"width must divide window, got {width} and {window}")
    tiles = window // width
    return tuple(start + step * tiles for start in range(tiles) for step in range(width))


def random_order(window: int, seed: int = 0) -> tuple[int, ...]:
    """A random order of ``window`` inputs."""
    check_int("window", window, 1)
    return tuple(torch.randperm(window, generator=torch.Generator().manual_seed(seed)).tolist())


class PackedPermuted(NamedTuple):
    values: Tensor  # those of inner
    order: Tensor  # [window], uint8 up to 256 inputs, then int16, then int32
    inner: Any  # operand of the inner structure, of the weight with its inputs in order
    shape: Shape


@dataclass(frozen=True)
class Permuted(Pattern):
    """``mask[:, order]`` is a mask of the inner pattern; the order is one of every ``len(order)`` consecutive inputs.

    An order of all inputs is the general case; a shorter one serves a layer of any width.
    """

    inner: Pattern = NM(2, 4)
    order: tuple[int, ...] = shuffle(16, 4)

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Pattern):
            raise ValueError(f"inner must be a Pattern such as NM(2, 4), got {self.inner!r}")
        order = self.order
        whole = isinstance(order, tuple) and all(type(place) is int for place in order)
        if not whole or not order or sorted(order) != list(range(len(order))):
            raise ValueError(f"order must be a tuple of the numbers from 0 up, each once, got {order!r}"[:200])

    def __str__(self) -> str:
        return f"permuted {self.inner} {len(self.order)}#{crc32(repr(self.order).encode()) & 0xffffff:06x}"

    @classmethod
    def variants(cls) -> tuple["Permuted", ...]:
        mixed = random_order(64)
        return (cls(), cls(NM(2, 8), shuffle(64, 8)), cls(Block(16, 16, 0.25), mixed), cls(Diagonal(0.1), mixed),
                cls(NM(2, 4), mixed), cls(VNM(16, 2, 8), shuffle(32, 8)), cls(Block(32, 1, 0.25), random_order(256)))

    @property
    def tile(self) -> Shape:
        rows, cols = self.inner.tile
        return rows, lcm(cols, len(self.order))

    @property
    def density(self) -> float:
        return self.inner.density

    def facts(self) -> Facts:
        inner = self.inner.facts()
        hardware = inner.hardware + (
            " The order of the inputs is a gather of the activations before the product, or nothing where the layer "
            "before can write its outputs in this order, or where the kernel gathers anyway."
        )
        return Facts(inner.verdict, hardware, inner.arithmetic, inner.positions, input_grad=inner.input_grad,
                     weight_grad=inner.weight_grad)

    def ordered(self, matrix: Tensor) -> Tensor:
        """``[out, in]`` with its inputs in order: what the inner structure sees."""
        return windows(matrix, self.order)

    def restored(self, matrix: Tensor) -> Tensor:
        """Invert ``ordered``."""
        return windows(matrix, inverse(self.order))

    def holds(self, mask: Tensor) -> bool:
        return self.inner.holds(self.ordered(self.check_mask(mask)))

    def select(self, scores: Tensor) -> Tensor:
        """What the inner structure chooses of the inputs in order: the best where that is."""
        return self.restored(self.inner.select(self.ordered(scores)))

    def nnz(self, shape: Shape) -> int:
        return self.inner.nnz(self.check_shape(shape))

    def value_bits(self, shape: Shape, itemsize: int = 2) -> int:
        return self.inner.value_bits(self.check_shape(shape), itemsize)

    def index_bits(self, shape: Shape) -> int:
        return self.inner.index_bits(self.check_shape(shape)) + 8 * self.order_dtype.itemsize * len(self.order)

    @property
    def order_dtype(self) -> torch.dtype:
        last = len(self.order) - 1
        return torch.uint8 if last < 1 << 8 else torch.int16 if last < 1 << 15 else torch.int32

    def pack(self, weight: Tensor) -> PackedPermuted:
        inner = self.inner.pack(self.ordered(self.check_member(weight)))
        order = index(self.order, weight.device).to(self.order_dtype)
        return PackedPermuted(inner.values, order, inner, tuple(weight.shape))

    def unpack(self, packed: PackedPermuted) -> Tensor:
        weight = self.inner.unpack(self.operand(packed))
        if tuple(weight.shape) != packed.shape:
            raise ValueError(f"packed.inner must be of shape {packed.shape}, got {tuple(weight.shape)}")
        return self.restored(weight)

    def operand(self, packed: PackedPermuted) -> Any:
        """The inner structure's operand, with the values of the whole; ValueError if the order is another one."""
        self.check_shape(packed.shape)
        check_part("order", packed.order, self.order_dtype, (len(self.order),))
        if not torch.equal(packed.order.long(), index(self.order, packed.order.device)):
            raise ValueError(f"packed.order must be the order of {self}")
        return packed.inner._replace(values=packed.values)

    # Every kernel of the inner structure is one of this, behind a gather of x or a scatter of dx.

    def kernels(self, product: str = "spmm") -> dict[str, Callable[[Any], Plan]]:
        own = super().kernels(product)
        behind = {name: partial(self.through, product, name) for name in self.inner.kernels(product)}
        return behind | own

    def through(self, product: str, kernel: str, packed: PackedPermuted) -> Plan:
        """Plan of the inner structure's kernel on inputs in order."""
        run = self.inner.kernels(product)[kernel](self.operand(packed))
        inn, device, values = packed.shape[1], packed.values.device, packed.values
        order = columns(self.order, inn, device)
        back = columns(inverse(self.order), inn, device)
        gather = lambda x: check_activations("x", x, inn, values).index_select(1, order)
        if product == "spmm":
            return lambda x: run(gather(x))
        if product == "spmmt":
            return lambda dy: run(dy).index_select(1, back)
        return lambda dy, x: run(dy, gather(x))


@lru_cache(maxsize=64)
def index(order: tuple[int, ...], device: torch.device) -> Tensor:
    """An order as an int64 tensor, made once: choosing a mask waits for no device."""
    return torch.tensor(order, device=device)


@lru_cache(maxsize=64)
def inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    """The order that undoes another.

    >>> inverse((2, 0, 1))
    (1, 2, 0)
    """
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def columns(order: tuple[int, ...], inn: int, device: torch.device) -> Tensor:
    """The order of every window of inputs as one of all ``inn``, int64."""
    starts = torch.arange(0, inn, len(order), device=device)
    return (starts[:, None] + index(order, device)).flatten()


def windows(matrix: Tensor, order: tuple[int, ...]) -> Tensor:
    """``[out, in]`` with every ``len(order)`` consecutive inputs in this order."""
    return matrix.index_select(1, columns(order, matrix.shape[1], matrix.device))


def reached(layers: Iterable[Tensor]) -> list[float]:
    """Share of (output, input) pairs that are connected after each layer of a stack, from their masks ``[out, in]``.

    >>> blocks = torch.block_diag(torch.ones(2, 2), torch.ones(2, 2)).bool()
    >>> reached([blocks, blocks]), reached([blocks, blocks[:, [0, 2, 1, 3]]])
    ([0.5, 0.5], [0.5, 1.0])
    """
    shares, paths = [], None
    for mask in layers:
        paths = mask if paths is None else (mask.float() @ paths.float()) > 0
        shares.append(paths.double().mean().item())
    return shares
