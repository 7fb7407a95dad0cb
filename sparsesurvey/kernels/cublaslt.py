"""Dense products by cuBLASLt with the fastest of the algorithms that it proposes, searched once for every shape.

torch asks cuBLASLt's heuristic for one algorithm and takes it; its tunable operations try others on AMD's libraries only.
So we call the C interface of the library that torch has loaded (NVIDIA, cuBLAS documentation, cublasLtMatmul). Matrices
are its column-major ones: a row-major ``[rows, columns]`` is a column-major columns x rows.
"""

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from sparsesurvey.structure import Plan, Unavailable, check_activations, check_pair

TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}  # cudaDataType
COMPUTE_32F, TRANSA, TRANSB, MAX_WORKSPACE = 68, 3, 4, 1  # cublasComputeType_t and the attributes that we set
WORKSPACE = 1 << 25  # bytes, what NVIDIA recommends for Hopper
TRIED, REPEATS = 32, 10


class Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = [("algo", ctypes.c_uint64 * 8), ("workspace", ctypes.c_size_t), ("state", ctypes.c_int),
                ("waves", ctypes.c_float), ("reserved", ctypes.c_int * 4)]


class Side(NamedTuple):
    """A matrix as the library sees it: a row-major tensor, and whether it is multiplied as its transpose."""

    tensor: Tensor
    transposed: bool


class Library:
    """The library of torch's CUDA version; Unavailable where there is none. Every status but success is an error."""

    def __init__(self) -> None:
        if not torch.version.cuda or not torch.cuda.is_available():
            raise Unavailable("needs a CUDA device")
        try:
            self.library = ctypes.CDLL(f"libcublasLt.so.{torch.version.cuda.split('.')[0]}")
        except OSError:
            raise Unavailable(f"needs cuBLASLt of CUDA {torch.version.cuda}") from None
        self.handle = self.made("cublasLtCreate")

    def call(self, name: str, *arguments: object) -> None:
        status = getattr(self.library, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} returned status {status}")

    def made(self, name: str, *arguments: object) -> ctypes.c_void_p:
        """An opaque object; few are made, and they live as long as the process."""
        handle = ctypes.c_void_p()
        self.call(name, ctypes.byref(handle), *arguments)
        return handle

    def layout(self, tensor: Tensor) -> ctypes.c_void_p:
        rows, columns = tensor.shape
        size = ctypes.c_uint64
        return self.made("cublasLtMatrixLayoutCreate", TYPES[tensor.dtype], size(columns), size(rows), ctypes.c_int64(columns))

    def description(self, a: Side, b: Side) -> ctypes.c_void_p:
        made = self.made("cublasLtMatmulDescCreate", COMPUTE_32F, TYPES[torch.float32])
        for attribute, side in ((TRANSA, a), (TRANSB, b)):
            value = ctypes.c_int32(side.transposed)
            self.call("cublasLtMatmulDescSetAttribute", made, attribute, ctypes.byref(value), ctypes.c_size_t(4))
        return made

    def proposed(self, *objects: ctypes.c_void_p) -> list[Heuristic]:
        """The algorithms that the heuristic proposes, what it thinks best first."""
        preference, limit = self.made("cublasLtMatmulPreferenceCreate"), ctypes.c_uint64(WORKSPACE)
        self.call("cublasLtMatmulPreferenceSetAttribute", preference, MAX_WORKSPACE, ctypes.byref(limit), ctypes.c_size_t(8))
        found, count = (Heuristic * TRIED)(), ctypes.c_int()
        self.call("cublasLtMatmulAlgoGetHeuristic", self.handle, *objects, preference, TRIED, found, ctypes.byref(count))
        return [item for item in found[:count.value] if item.state == 0]


class Product:
    """``c = op(b) @ op(a)`` of row-major tensors of one shape, by the algorithm that was fastest when it was made."""

    def __init__(self, library: Library, a: Side, b: Side, c: Tensor) -> None:
        self.library = library
        self.layouts = [library.layout(part) for part in (a.tensor, b.tensor, c)]
        self.description = library.description(a, b)
        self.workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=c.device)
        tried = library.proposed(self.description, *self.layouts, self.layouts[-1])
        if not tried:
            raise Unavailable("needs a shape and dtype for which cuBLASLt has an algorithm")
        self.algorithm = min(tried, key=lambda item: self.seconds(item, a.tensor, b.tensor, c))

    def __call__(self, a: Tensor, b: Tensor, c: Tensor, algorithm: Heuristic | None = None) -> Tensor:
        one, none, place = ctypes.c_float(1), ctypes.c_float(0), ctypes.c_void_p
        first, second, third = self.layouts
        self.library.call(
            "cublasLtMatmul", self.library.handle, self.description, ctypes.byref(one), place(a.data_ptr()), first,
            place(b.data_ptr()), second, ctypes.byref(none), place(c.data_ptr()), third, place(c.data_ptr()), third,
            ctypes.byref((algorithm or self.algorithm).algo), place(self.workspace.data_ptr()), ctypes.c_size_t(WORKSPACE),
            place(torch.cuda.current_stream(c.device).cuda_stream))
        return c

    def seconds(self, algorithm: Heuristic, a: Tensor, b: Tensor, c: Tensor) -> float:
        """Time of one call, by the GPU's clock; infinite for an algorithm that is refused."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        try:
            self(a, b, c, algorithm)
            start.record()
            for _ in range(REPEATS):
                self(a, b, c, algorithm)
            end.record()
        except RuntimeError:
            return float("inf")
        end.synchronize()
        return start.elapsed_time(end) / REPEATS


_LIBRARY: list[Library] = []


def library(weight: Tensor) -> Library:
    """The library, opened once; Unavailable where it cannot multiply this weight."""
    if weight.device.type != "cuda":
        raise Unavailable(f"needs a CUDA device, got an operand on {weight.device}")
    if weight.dtype not in TYPES:
        raise Unavailable(f"needs bfloat16, float16 or float32, got {weight.dtype}")
    if not _LIBRARY:
        _LIBRARY.append(Library())
    return _LIBRARY[0]


def searched_plan(weight: Tensor, product: str) -> Plan:
    """Plan of one of ``PRODUCTS`` with a dense weight ``[out, in]``; the first run with so many tokens searches."""
    opened, weight, found = library(weight), weight.detach().contiguous(), {}
    out, inn = weight.shape

    def multiply(a: Side, b: Side, c: Tensor, tokens: int) -> Tensor:
        with torch.cuda.device_of(c):
            if tokens not in found:
                found[tokens] = Product(opened, a, b, c)
            return found[tokens](a.tensor, b.tensor, c)

    def forward(x: Tensor) -> Tensor:
        x = check_activations("x", x, inn, weight).contiguous()
        y = x.new_empty(len(x), out)
        return multiply(Side(weight, True), Side(x, False), y, len(x)) if len(x) else y

    def backward(dy: Tensor) -> Tensor:
        dy = check_activations("dy", dy, out, weight).contiguous()
        dx = dy.new_empty(len(dy), inn)
        return multiply(Side(weight, False), Side(dy, False), dx, len(dy)) if len(dy) else dx

    def gradient(dy: Tensor, x: Tensor) -> Tensor:
        dy, x = (part.contiguous() for part in check_pair(dy, x, (out, inn), weight))
        if not len(x):
            return torch.zeros_like(weight)
        return multiply(Side(x, False), Side(dy, True), torch.empty_like(weight), len(x))

    return {"spmm": forward, "spmmt": backward, "sddmm": gradient}[product]
