"""Unstructured: any weight may be kept, the best of the whole matrix (Han et al. 2015); stored row by row, CSR.

>>> scores = torch.tensor([[5.0, 1.0, 0.0, 4.0],
...                        [1.0, 2.0, 0.0, 3.0]])
>>> structure = Unstructured(0.5)
>>> structure.mask(scores).int()
tensor([[1, 0, 0, 1],
        [0, 1, 0, 1]], dtype=torch.int32)
>>> packed = structure.pack(scores * structure.mask(scores))
>>> packed.values
tensor([5., 4., 2., 3.])
>>> packed.columns.tolist(), packed.row_pointers.tolist()  # row 1 is entries 2 and 3
([0, 3, 1, 3], [0, 2, 4])
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsesurvey.packing import compress_rows, entropy, expand_rows, index_dtype, top
from sparsesurvey.structure import (
    Facts, Pattern, Plan, Shape, Unavailable, check_activations, check_density, check_pair, check_part,
)

TOKENS = 64  # multiplied at a time by tiled_product


class PackedCSR(NamedTuple):
    values: Tensor  # [nnz], row after row
    columns: Tensor  # [nnz], int16 where in <= 32768, else int32
    row_pointers: Tensor  # int32 [out + 1]
    shape: Shape

    def transposed(self) -> "PackedCSR":
        """The same weights with inputs and outputs exchanged."""
        row, column = expand_rows(self.columns, self.row_pointers, *self.shape)
        order = column.argsort(stable=True)
        pointers = torch.nn.functional.pad(column.bincount(minlength=self.shape[1]).cumsum(0), (1, 0)).int()
        return PackedCSR(self.values[order], row[order].to(index_dtype(self.shape[0])), pointers, self.shape[::-1])


NO_PATH = "no tensor-core path"
WHY_NOT = (
    "Tensor cores cannot skip these zeros: with them the product costs a dense product's arithmetic. Only bytes can be "
    "saved, which helps while reading the weight is the limit (on an H200 up to about 200 tokens)."
)


@dataclass(frozen=True)
class Unstructured(Pattern):
    """At most ``round(density * out * in)`` weights of the matrix, anywhere.

    Stored as CSR with exactly that many entries: a matrix with fewer non-zeros stores zeros as well.
    """

    density: float = 0.5

    def __post_init__(self) -> None:
        check_density(self.density)

    def __str__(self) -> str:
        return f"unstructured {100 * self.density:g}%"

    @classmethod
    def variants(cls) -> tuple["Unstructured", ...]:
        return cls(0.5), cls(0.25), cls(0.1), cls(0.05), cls(0.01)

    def facts(self) -> Facts:
        why = "number {rank_all} of {total} by magnitude; the first {kept_all} are kept, wherever they are"
        slow = " Ordinary CUDA cores can skip, but so slowly that it pays only above about 96 % sparsity (estimate)."
        return Facts(NO_PATH, WHY_NOT + slow, 1.0, entropy(self.density), why, pruned=why)

    def holds(self, mask: Tensor) -> bool:
        return int(self.check_mask(mask).count_nonzero()) <= round(self.density * mask.numel())

    def select(self, scores: Tensor) -> Tensor:
        """The highest scores of the whole matrix, which is optimal."""
        return top(scores.flatten(), self.nnz(scores.shape)).view(scores.shape)

    def index_bits(self, shape: Shape) -> int:
        out, inn = self.check_shape(shape)
        return self.nnz(shape) * 8 * index_dtype(inn).itemsize + 32 * (out + 1)

    def pack(self, weight: Tensor) -> PackedCSR:
        kept = self.stored(weight)
        return PackedCSR(weight[kept], *compress_rows(kept), tuple(weight.shape))

    def unpack(self, packed: PackedCSR) -> Tensor:
        rows, columns = self.places(packed)
        weight = packed.values.new_zeros(packed.shape)
        weight[rows, columns] = packed.values
        return weight

    def places(self, packed: PackedCSR) -> tuple[Tensor, Tensor]:
        """Row and column (int64) of every stored weight; ValueError if the operand is corrupt."""
        check_part("values", packed.values, None, (self.nnz(packed.shape),))
        check_part("columns", packed.columns, index_dtype(packed.shape[1]), packed.values.shape)
        return expand_rows(packed.columns, packed.row_pointers, *packed.shape)

    def spmm_torch_csr(self, packed: PackedCSR) -> Plan:
        self.places(packed)
        return torch_product("x", torch_csr(packed))

    def spmmt_torch_csr(self, packed: PackedCSR) -> Plan:
        self.places(packed)
        return torch_product("dy", torch_csr(packed.transposed()))

    def sddmm_torch_csr(self, packed: PackedCSR) -> Plan:
        self.places(packed)
        return torch_sampled(torch_csr(packed))

    def spmm_cupy_csr(self, packed: PackedCSR) -> Plan:
        self.places(packed)
        return cupy_product("x", packed)

    def spmmt_cupy_csr(self, packed: PackedCSR) -> Plan:
        self.places(packed)
        return cupy_product("dy", packed.transposed())

    def spmm_spinfer(self, packed: PackedCSR) -> Plan:
        """SpInfer's kernel for few tokens, where the reader has built it (kernels/spinfer.py)."""
        from sparsesurvey.kernels import spinfer

        return spinfer.plan(self.unpack(packed))

    def spmm_macko(self, packed: PackedCSR) -> Plan:
        """MACKO's kernel for one token (kernels/macko.py)."""
        from sparsesurvey.kernels import macko

        self.places(packed)
        return macko.plan(packed)

    def spmm_sputnik(self, packed: PackedCSR) -> Plan:
        """Sputnik's kernels for CUDA cores (kernels/sputnik.py)."""
        from sparsesurvey.kernels import sputnik

        self.places(packed)
        return sputnik.plan("x", packed)

    # Kernels of ours on a GPU: for few tokens, which wait for bytes (kernels/bitmap.py), and for so few weights that ordinary
    # arithmetic is faster than tensor cores (kernels/skip.py).

    def spmm_cuda_bitmap(self, packed: PackedCSR) -> Plan:
        self.places(packed)
        return bitmap_product(packed)

    def spmm_cuda_skip(self, packed: PackedCSR) -> Plan:
        self.places(packed)
        return skipping_product("x", packed)

    def spmmt_cuda_skip(self, packed: PackedCSR) -> Plan:
        self.places(packed)
        return skipping_product("dy", packed.transposed())

    def spmm_tiled_csr(self, packed: PackedCSR) -> Plan:
        self.places(packed)
        return tiled_product("x", torch_csr(packed))

    def spmmt_tiled_csr(self, packed: PackedCSR) -> Plan:
        self.places(packed)
        return tiled_product("dy", torch_csr(packed.transposed()))

    def spmm_scipy_csr(self, packed: PackedCSR) -> Plan:
        self.places(packed)
        return scipy_product("x", scipy_csr(packed), packed.values)

    def spmmt_scipy_csr(self, packed: PackedCSR) -> Plan:
        self.places(packed)
        return scipy_product("dy", scipy_csr(packed.transposed()), packed.values)


# What libraries can do with any sparse matrix. Other structures call these too, as the peers to beat.


def check_library(values: Tensor) -> None:
    """Raise Unavailable where torch has no sparse product: on a CPU that means MKL, in single or double precision."""
    if values.device.type == "cpu" and not torch.backends.mkl.is_available():
        raise Unavailable("needs a torch that was built with MKL")
    if values.device.type == "cpu" and values.dtype not in (torch.float32, torch.float64):
        raise Unavailable(f"needs float32 or float64 on a CPU, got {values.dtype}")


def torch_csr(packed: PackedCSR) -> Tensor:
    """The weight as a tensor of torch's CSR layout."""
    check_library(packed.values)
    return compressed(torch.sparse_csr_tensor, packed)


def compressed(layout: Callable[..., Tensor], packed: Any) -> Tensor:
    """A tensor of one of torch's compressed layouts, with the int32 index that MKL takes as it is."""
    index = packed.row_pointers.int(), packed.columns.int()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse ")  # torch calls these layouts beta, and unchecked
        return layout(*index, packed.values.detach(), packed.shape, check_invariants=False)


def torch_product(name: str, matrix: Tensor) -> Plan:
    """Plan of ``x @ matrix.T``, written ``(matrix @ x.T).T`` because ``F.linear`` is four times slower here."""
    def run(x: Tensor) -> Tensor:
        return (matrix @ check_activations(name, x, matrix.shape[1], matrix).T).T

    return run


def tiled_product(name: str, matrix: Tensor) -> Plan:
    """Plan of ``x @ matrix.T`` a few tokens at a time: the library walks all of x once per row of the matrix, so that x
    should stay in a core's cache. Faster than dense already from 20 % density down, where ``torch_product`` needs 10 %.
    """
    def run(x: Tensor) -> Tensor:
        x = check_activations(name, x, matrix.shape[1], matrix)
        y = x.new_empty(matrix.shape[0], len(x))
        for start in range(0, len(x), TOKENS):
            torch.mm(matrix, x[start:start + TOKENS].T, out=y[:, start:start + TOKENS])
        return y.T

    return run


def cupy_product(name: str, packed: PackedCSR) -> Plan:
    """Plan of ``x @ W.T`` by cuSPARSE through CuPy (kernels/cupy_csr.py)."""
    from sparsesurvey.kernels import cupy_csr

    return cupy_csr.plan(name, packed)


def bitmap_product(packed: PackedCSR) -> Plan:
    """Plan of ``x @ W.T`` for at most 64 tokens: bits and values read, dense tensor cores (kernels/bitmap.py)."""
    from sparsesurvey.kernels import bitmap

    bitmap.require(packed.values)
    places = expand_rows(packed.columns, packed.row_pointers, *packed.shape)
    return bitmap.product_plan(bitmap.arrange(packed.values, *places, packed.shape))


def skipping_product(name: str, packed: PackedCSR) -> Plan:
    """Plan of ``x @ W.T`` that multiplies what is stored and nothing else, for sparse enough weights (kernels/skip.py)."""
    from sparsesurvey.kernels import skip

    skip.require(packed.values, packed.shape)
    places = expand_rows(packed.columns, packed.row_pointers, *packed.shape)
    return skip.product_plan(skip.arrange(packed.values, *places, packed.shape), name)


def torch_sampled(matrix: Tensor) -> Plan:
    """Plan of the values of ``dy.T @ x`` at the entries of a CSR matrix: one dot product over the tokens each."""
    if matrix.dtype not in (torch.float32, torch.float64):
        raise Unavailable(f"needs float32 or float64, got {matrix.dtype}")
    def run(dy: Tensor, x: Tensor) -> Tensor:
        dy, x = check_pair(dy, x, matrix.shape, matrix)
        features = dy.T.contiguous(), x.T.contiguous().T  # tokens contiguous in both
        return torch.sparse.sampled_addmm(matrix, *features, beta=0.0).values()

    return run


def scipy_csr(packed: PackedCSR) -> Any:
    """The weight as a scipy CSR array that shares the values."""
    sparse = scipy_sparse(packed.values)
    parts = packed.values.detach().numpy(), packed.columns.int().numpy(), packed.row_pointers.numpy()
    return sparse.csr_array(parts, shape=packed.shape)


def scipy_sparse(values: Tensor) -> Any:
    """The module ``scipy.sparse``, or raise Unavailable where it cannot take these values."""
    if values.device.type != "cpu":
        raise Unavailable(f"needs a packed operand on the CPU, got {values.device}")
    if values.dtype not in (torch.float32, torch.float64):
        raise Unavailable(f"needs float32 or float64, got {values.dtype}")
    try:
        from scipy import sparse
    except ImportError:
        raise Unavailable("needs scipy") from None
    return sparse


def scipy_product(name: str, matrix: Any, values: Tensor) -> Plan:
    """Plan of ``x @ matrix.T`` for a scipy sparse array."""
    def run(x: Tensor) -> Tensor:
        x = check_activations(name, x, matrix.shape[1], values)
        return torch.from_numpy((matrix @ x.T.numpy()).T)

    return run
