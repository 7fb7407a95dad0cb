"""Libraries as the peers to beat: which kernels call them, what they need, and what of them a CPU can check."""

import ctypes
import importlib.util
import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sparsesurvey.kernels import built, cublaslt, macko, semi_structured, spatha, spinfer, sputnik, stk, torch_bsr
from sparsesurvey.structure import Unavailable
from sparsesurvey.structures import NM, VNM, Block, Dense, Unstructured

PEERS = {
    Dense(): {"spmm": {"torch", "torch_compile", "cublaslt"}, "spmmt": {"torch", "cublaslt"}, "sddmm": {"torch", "cublaslt"}},
    NM(2, 4): {"spmm": {"torch_csr", "cusparselt", "cusparselt_searched", "cutlass"}, "spmmt": {"torch_csr"}},
    Block(32, 32, 0.5): {"spmm": {"torch_bsr", "torch_bsr_searched", "torch_csr", "stk"}, "spmmt": {"stk"}, "sddmm": {"stk"}},
    VNM(64, 2, 8): {"spmm": {"spatha"}},
    Unstructured(0.5): {"spmm": {"torch_csr", "cupy_csr", "spinfer", "macko", "sputnik"}, "spmmt": {"torch_csr", "cupy_csr"},
                        "sddmm": {"torch_csr"}},
}
ON_GPU = [("spmm", "torch_compile", Dense()), ("spmm", "cublaslt", Dense()), ("spmmt", "cublaslt", Dense()),
          ("sddmm", "cublaslt", Dense()), ("spmm", "cusparselt", NM(2, 4)), ("spmm", "cusparselt_searched", NM(1, 4)),
          ("spmmt", "cusparselt", NM(2, 4, "out")), ("spmmt", "cusparselt_searched", NM(2, 4, "out")), ("spmm", "cutlass", NM(2, 4)),
          ("spmm", "torch_bsr_searched", Block(32, 32, 0.5)), ("spmm", "cupy_csr", Unstructured(0.5)),
          ("spmmt", "cupy_csr", Unstructured(0.5))]


def packed(structure, dtype=torch.bfloat16, shape=(64, 64)):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return structure.pack(structure.project(weight))


def test_every_peer_is_a_kernel_with_the_name_of_its_library():
    for structure, products in PEERS.items():
        for product, names in products.items():
            assert names <= set(structure.kernels(product)), (str(structure), product)


@pytest.mark.parametrize("product, kernel, structure", ON_GPU, ids=lambda part: str(part))
def test_a_peer_that_needs_a_gpu_says_so(product, kernel, structure):
    with pytest.raises(Unavailable, match="needs a CUDA device, got an operand on cpu"):
        structure.kernels(product)[kernel](packed(structure))


def test_what_sparse_tensor_cores_cannot_take():
    for structure, product in ((NM(3, 4), "spmm"), (NM(2, 5), "spmm"), (NM(2, 4, "out"), "spmm"), (NM(2, 4), "spmmt")):
        with pytest.raises(Unavailable, match="needs at most 2 of every 4 along the"):
            structure.kernels(product)["cusparselt"](packed(structure, shape=(60, 60)))
    with pytest.raises(Unavailable, match="needs float32 or float64"):
        Unstructured(0.5).sddmm_torch_csr(packed(Unstructured(0.5)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("structure", [NM(2, 4), NM(1, 4), NM(2, 8)], ids=str)
def test_our_index_is_that_of_cutlass_in_another_order(structure, dtype):
    """Also with groups that hold fewer than two weights."""
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

    weight = structure.unpack(packed(structure, dtype, (96, 192)))
    weight[:32] *= torch.rand(32, 192) < 0.5
    pairs = NM(2, 4).pack(weight)
    values, meta = semi_structured.cutlass_form(pairs.values, pairs.index)
    assert values.shape == (96, 96) and meta.shape == (96, 12) and meta.dtype == torch.int16
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, meta), weight)


def test_the_order_is_that_of_torchs_own_converter():
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

    full = packed(NM(2, 4), torch.float16, (64, 128))
    values, meta = semi_structured.cutlass_form(full.values, full.index)
    right = sparse_semi_structured_from_dense_cutlass(NM(2, 4).unpack(full))
    assert torch.equal(values, right[0]) and torch.equal(meta, right[1])


@pytest.mark.parametrize("tokens", [1, 7, 8, 9])
def test_tokens_are_filled_up(tokens):
    x = torch.randn(tokens, 6)
    eights = semi_structured.eights(x)
    assert len(eights) == -(-tokens // 8) * 8 and torch.equal(eights[:tokens], x) and not eights[tokens:].any()
    tiles = torch_bsr.padded(x, 16)
    assert tiles.shape == (6, 16) and torch.equal(tiles[:, :tokens].T, x)


@pytest.mark.parametrize("columns, rows, widths", [(16, 16, {16}), (64, 64, {64}), (192, 64, {64}), (8192, 128, {64, 128}), (48, 16, {16})])
def test_what_is_searched_for_torchs_block_kernel(columns, rows, widths):
    found = torch_bsr.metas(columns, rows)
    assert {columns // meta["SPLIT_N"] for meta in found} == widths and all(columns % meta["SPLIT_N"] == 0 for meta in found)
    assert len(found) == len(widths) * len(torch_bsr.STAGES) * len(torch_bsr.WARPS)


def test_the_answer_of_cublaslt_has_the_layout_of_its_header():
    """cublasLtMatmulHeuristicResult_t: 64 bytes of algorithm, size_t, int, float, int[4]."""
    fields = {name: getattr(cublaslt.Heuristic, name).offset for name, _ in cublaslt.Heuristic._fields_}
    assert fields == {"algo": 0, "workspace": 64, "state": 72, "waves": 76, "reserved": 80}
    assert ctypes.sizeof(cublaslt.Heuristic) == 96


class Recorder:
    """Stands in for the C library: answers success, and keeps what it was asked."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append((name, arguments))
            if name == "cublasLtMatmulAlgoGetHeuristic":
                found, count = arguments[-2], arguments[-1]
                found[0].state, found[1].state, count._obj.value = 7, 0, 2
            return 0
        return call


@pytest.fixture
def library(monkeypatch):
    made = cublaslt.Library.__new__(cublaslt.Library)
    made.library, made.handle = Recorder(), None
    monkeypatch.setattr(cublaslt, "library", lambda weight: made)
    monkeypatch.setattr(cublaslt.Product, "seconds", lambda self, item, *operands: item.state)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: type("Stream", (), {"cuda_stream": 0}))
    monkeypatch.setattr(cublaslt, "WORKSPACE", 16)
    return made.library


@pytest.mark.parametrize("product", ["spmm", "spmmt", "sddmm"])
def test_the_matrices_that_cublaslt_is_given_make_the_product(library, product):
    """Column-major: C (m x n) = op(A) op(B). Read back what was asked for, and multiply it by hand."""
    weight, x, dy = (torch.randn(size, generator=torch.Generator().manual_seed(0)) for size in ((6, 4), (3, 4), (3, 6)))
    inputs = {"spmm": (x,), "spmmt": (dy,), "sddmm": (dy, x)}[product]
    result = cublaslt.searched_plan(weight, product)(*inputs)
    asked = dict((name, arguments) for name, arguments in library.calls)
    layouts = [arguments for name, arguments in library.calls if name == "cublasLtMatrixLayoutCreate"]
    flags = [arguments[2]._obj.value for name, arguments in library.calls if name == "cublasLtMatmulDescSetAttribute"]
    pointers = {tensor.data_ptr(): tensor for tensor in (weight, x, dy, result)}
    _, _, _, a, _, b, _, _, c, *_ = asked["cublasLtMatmul"]
    a, b, c = (pointers[pointer.value] for pointer in (a, b, c))
    seen = [(layout[2].value, layout[3].value, layout[4].value) for layout in layouts]
    assert seen == [(len(part[0]), len(part), len(part[0])) for part in (a, b, c)]  # rows, columns, leading dimension
    column_major = lambda part, flag: part if flag else part.T
    made = column_major(a, flags[0]) @ column_major(b, flags[1])
    assert made.T.shape == c.shape == result.shape
    right = {"spmm": x @ weight.T, "spmmt": dy @ weight, "sddmm": dy.T @ x}[product]
    assert torch.allclose(made.T, right, atol=1e-6)


def test_cublaslt_searches_once_for_a_number_of_tokens(library):
    run = cublaslt.searched_plan(torch.randn(6, 4), "spmm")
    for tokens in (3, 3, 5):
        run(torch.randn(tokens, 4))
    names = [name for name, _ in library.calls]
    assert names.count("cublasLtMatmulAlgoGetHeuristic") == 2 and names.count("cublasLtMatmul") == 3
    assert run(torch.randn(0, 4)).shape == (0, 6)


# ---- STK, as the package documents it, in plain products; the package itself where it is installed


class Blocks:
    """stk.Matrix: blocks row by row, their rows and columns, and where each row starts."""

    def __init__(self, size, data, row_indices, column_indices, offsets):
        assert data.is_contiguous() and offsets.dtype == torch.int32 and offsets.tolist() == sorted(offsets.tolist())
        assert row_indices.tolist() == [row for row, count in enumerate(offsets.diff().tolist()) for _ in range(count)]
        self.given, self.whole = (size, data, row_indices, column_indices), torch.zeros(*size, dtype=data.dtype)
        for place, block in zip(self.places(), data):
            self.whole[place] = block

    def places(self):
        size, _, rows, columns = self.given
        return [(slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128)) for row, column in zip(rows, columns)]

    def t(self):
        other = Blocks.__new__(Blocks)
        other.whole = self.whole.T
        return other

    def size(self):
        return self.whole.shape


def whole_tiles(*sides):
    assert all(side % 128 == 0 for side in sides)  # its kernels mask nothing


def dds(a, b):
    whole_tiles(*a.shape, *b.size())
    return a @ b.whole


def sdd(a, b, topology):
    whole_tiles(*a.shape, *b.shape)
    return SimpleNamespace(data=torch.stack([(a @ b)[place] for place in topology.places()]))


@pytest.fixture
def fake_stk(monkeypatch):
    monkeypatch.setitem(sys.modules, "stk", SimpleNamespace(Matrix=Blocks, ops=SimpleNamespace(dds=dds, sdd=sdd)))
    monkeypatch.setattr(stk, "require", lambda values: None)


@pytest.mark.parametrize("tokens", [0, 3, 128, 130])
def test_what_stk_is_given_makes_the_products(fake_stk, tokens):
    structure = Block(128, 128, 0.5)
    operand = packed(structure, torch.float32, (256, 384))
    x, dy = torch.randn(tokens, 384), torch.randn(tokens, 256)
    for product, inputs in (("spmm", (x,)), ("spmmt", (dy,)), ("sddmm", (dy, x))):
        kernels = structure.kernels(product)
        assert torch.allclose(kernels["stk"](operand)(*inputs), kernels["reference"](operand)(*inputs), atol=1e-3)


def test_what_stk_cannot_take(monkeypatch):
    with pytest.raises(Unavailable, match="needs blocks of 128x128, got 64x64"):
        Block(64, 64, 0.5).spmm_stk(packed(Block(64, 64, 0.5), shape=(128, 128)))
    monkeypatch.setitem(sys.modules, "stk", None)
    with pytest.raises(Unavailable, match="needs the package stanford-stk"):
        Block(128, 128, 0.5).sddmm_stk(packed(Block(128, 128, 0.5), shape=(128, 256)))


STK = """
import torch
from sparsesurvey.benchmark import products
from sparsesurvey.structures import Block
for product in ("spmm", "spmmt", "sddmm"):
    found = products(Block(128, 128, 0.5), (256, 256), 130, "x", dtype="bfloat16", product=product, record={folder!r},
                     kernels=["stk"], timed=False)
    assert [row.method for row in found.rows] == ["stk"], (found.unavailable, found.failed)
"""


@pytest.mark.skipif(not importlib.util.find_spec("stk"), reason="needs stanford-stk")
def test_stk_itself_multiplies_our_blocks(tmp_path):
    """In Triton's interpreter, which takes a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", STK.format(folder=str(tmp_path))], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- SpInfer: its kernel's way through the format, by hand; its own packing where it is built


def number_of(pointer, count, kind):
    """So many numbers at an address."""
    return np.ctypeslib.as_array((ctypes.c_char * (count * np.dtype(kind).itemsize)).from_address(pointer)).view(kind)


def strip_of(values, masks):
    """16 x 64 weights from what a warp reads: four operands of mma.m16n8k16, four registers of a thread each (PTX ISA)."""
    strip, place = np.zeros((16, 64)), 0
    for number, mask in enumerate(masks.tolist()):
        for bit in range(64):
            if mask >> bit & 1:
                lane, half = divmod(bit, 2)  # a thread holds two neighbours
                row, column = lane // 4 + 8 * (number % 2), 2 * (lane % 4) + half + 8 * (number // 2 % 2)
                strip[row, 16 * (number // 4) + column] = values[place]
                place += 1
    return strip


def spinfer_product(stream, _, values, tiles, strips, masks, largest, x, y, out, tokens, inn, sums, split):
    """The function of the library in float64, from the same addresses."""
    across = inn // 64
    count = out // 64 * across
    tiles, strips = number_of(tiles, count + 3, np.int32), number_of(strips, 4 * count + 4, np.int32)
    masks, values = number_of(masks, 64 * count, np.uint64), number_of(values, tiles[count], np.float16)
    assert number_of(largest, 1, np.int32) % 64 == 0 and np.diff(tiles).max() <= number_of(largest, 1, np.int32) <= 2304
    assert not (tiles[:count] % 8).any() and tokens in (8, 16, 32, 64, 128) or tokens % 128 == 0
    weight = np.zeros((out, inn))
    for tile in range(count):
        for strip in range(4):
            start, chosen = tiles[tile] + strips[4 * tile + strip], masks[64 * tile + 16 * strip:][:16]
            row, column = 64 * (tile // across) + 16 * strip, 64 * (tile % across)
            weight[row:row + 16, column:column + 64] = strip_of(values[start:], chosen)
    dense = number_of(x, tokens * inn, np.float16).reshape(tokens, inn)
    number_of(y, tokens * out, np.float16)[:] = (dense.astype(np.float64) @ weight.T).flatten()
    return 0


@pytest.mark.parametrize("tokens", [0, 1, 9, 129])
@pytest.mark.parametrize("density", [0.5, 0.1, 0.0])
def test_what_spinfer_is_given_makes_the_product(monkeypatch, density, tokens):
    monkeypatch.setattr(spinfer, "function", lambda weight: spinfer_product)
    monkeypatch.setattr(spinfer, "seconds", lambda run: float(run().sum() * 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    weight = torch.randn(128, 192, generator=torch.Generator().manual_seed(0)) * (torch.rand(128, 192) < density)
    operand = Unstructured(0.6).pack(weight.half())
    x = torch.randn(tokens, 192).half()
    y = Unstructured(0.6).spmm_spinfer(operand)(x)
    assert y.dtype == torch.float16 and torch.allclose(y.double(), x.double() @ weight.half().double().T, atol=2e-2)


def test_what_spinfer_cannot_take(monkeypatch):
    halves = packed(Unstructured(0.5), torch.float16)
    monkeypatch.delenv(spinfer.VARIABLE, raising=False)
    with pytest.raises(Unavailable, match="needs SpInfer, built by you, and its path in SPARSESURVEY_SPINFER"):
        Unstructured(0.5).spmm_spinfer(halves)
    monkeypatch.setenv(spinfer.VARIABLE, "/nowhere/libspinfer.so")
    with pytest.raises(Unavailable, match="needs float16"):
        Unstructured(0.5).spmm_spinfer(packed(Unstructured(0.5)))
    with pytest.raises(Unavailable, match="needs a CUDA device"):
        Unstructured(0.5).spmm_spinfer(halves)
    monkeypatch.setattr(built, "require_gpu", lambda values: None)
    with pytest.raises(Unavailable, match="needs SpInfer in SPARSESURVEY_SPINFER: /nowhere"):
        Unstructured(0.5).spmm_spinfer(halves)
    for weight, said in ((torch.ones(64, 32), "multiples of 64x64, got 64x32"), (torch.ones(64, 64), "at most 2304 weights")):
        with pytest.raises(Unavailable, match=said):
            spinfer.arrange(weight.half())


@pytest.mark.skipif(not os.environ.get(spinfer.VARIABLE), reason="needs SpInfer's library")
def test_spinfers_own_packing_is_ours():
    """Bit for bit, by the library's function for a CPU."""
    out, inn = 192, 320
    weight = (torch.randn(out, inn) * (torch.rand(out, inn) < 0.4)).half()
    ours = spinfer.arrange(weight)
    pack = getattr(ctypes.CDLL(os.environ[spinfer.VARIABLE]), "_Z24InitSparseMatrixA_bitmapP6__halfiiiiiiiiPS0_PPiS3_S3_PPmRi")
    values, single, strips, tiles, masks = (ctypes.c_void_p() for _ in range(5))
    largest = ctypes.c_int()
    found = map(ctypes.byref, (values, single, strips, tiles, masks, largest))
    count = pack(ctypes.c_void_p(weight.data_ptr()), out, inn, 8, 16, 64, 8, 64, 64, *found)
    assert count == out // 64 * (inn // 64)
    theirs = number_of(tiles.value, count + 1, np.int32)
    assert (ours.tiles[:count + 1].numpy() == theirs).all()
    assert (ours.strips[:4 * count].numpy() == number_of(strips.value, 4 * count, np.int32)).all()
    assert (ours.masks.numpy() == number_of(masks.value, 64 * count, np.int64)).all()
    assert (ours.values.numpy() == number_of(values.value, theirs[-1], np.float16)).all()
    assert int(ours.largest) == -(-largest.value // 64) * 64


# ---- Spatha: its kernel's addresses, and mma.sp.m16n8k32 by hand (PTX ISA)


def spatha_product(v, choice, out, tokens, inn, m, values, metadata, columns, x, y, stream):
    """The C function in float64, from the same addresses."""
    quads = inn // m
    stored = 2 * quads  # of a row
    values = number_of(values, out * stored, np.float16).astype(np.float64)
    metadata, columns = number_of(metadata, out * stored // 16, np.uint32), number_of(columns, out // v * 4 * quads, np.int32)
    dense = number_of(x, inn * tokens, np.float16).reshape(inn, tokens).astype(np.float64)
    result = number_of(y, out * tokens, np.float16).reshape(out, tokens)
    result[:] = 0
    for group in range(out // 32):
        for step in range(quads // 8):
            inputs = [step * 8 * m + place // 4 * m + columns[group * 32 // v * 4 * quads + step * 32 + place] for place in range(32)]
            weight = np.zeros((32, 32))
            for lane in range(32):
                g, t = divmod(lane, 4)
                start = (2 * group + lane // 16) * 16 * stored + step * 256 + lane % 16 * 8
                registers = np.concatenate([values[start:start + 8], values[start + 128:start + 136]]).reshape(8, 2)
                for half in (0, 1):  # of the step: quads t, and 4 + t
                    word = group * 2 * stored + step * 32 + g * 2 + half * 16  # lane 4 g + half gives it to the row
                    for row in range(4):
                        code = int(metadata[word + row // 2]) >> 16 * (row % 2) + 4 * t & 15
                        for value, place in zip(registers[4 * half + row], (code & 3, code >> 2)):
                            weight[4 * g + row, 4 * (4 * half + t) + place] = value
            result[32 * group:32 * group + 32] += (weight @ dense[inputs]).astype(np.float16)
    return 0


@pytest.mark.parametrize("structure", [VNM(64, 2, 8), VNM(128, 2, 16), VNM(64, 2, 5)], ids=str)
def test_what_spatha_is_given_makes_the_product(monkeypatch, structure):
    monkeypatch.setattr(spatha, "function", lambda values: spatha_product)
    monkeypatch.setattr(spatha, "seconds", lambda run: float(run().sum() * 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    operand = packed(structure, torch.float16, (256, 16 * structure.m))
    weight = structure.unpack(operand).double()
    run = structure.spmm_spatha(operand)
    for tokens in (0, 3, 128):
        x = torch.randn(tokens, weight.shape[1]).half()
        y = run(x)
        assert y.dtype == torch.float16 and torch.allclose(y.double(), x.double() @ weight.T, atol=5e-2)


def test_what_spatha_cannot_take(monkeypatch):
    for structure, inn in ((VNM(32, 2, 8), 128), (VNM(64, 1, 8), 128), (VNM(64, 2, 8), 96)):
        with pytest.raises(Unavailable, match="needs panels of 64 or 128 outputs, 2 of 4 columns"):
            structure.spmm_spatha(packed(structure, torch.float16, (64, inn)))
    halves = packed(VNM(64, 2, 8), torch.float16, (64, 128))
    monkeypatch.delenv(spatha.VARIABLE, raising=False)
    with pytest.raises(Unavailable, match="needs Spatha, built by you, and its path in SPARSESURVEY_SPATHA"):
        VNM(64, 2, 8).spmm_spatha(halves)
    monkeypatch.setenv(spatha.VARIABLE, "/nowhere/libspatha.so")
    with pytest.raises(Unavailable, match="needs a CUDA device"):
        VNM(64, 2, 8).spmm_spatha(halves)


@pytest.mark.skipif(not os.environ.get(spatha.VARIABLE), reason="needs Spatha's library")
def test_spathas_library_has_the_tiles_that_we_try():
    found = ctypes.CDLL(os.environ[spatha.VARIABLE]).spatha_product
    for v, choice in ((64, spatha.CHOICES), (64, -1), (32, 0)):
        assert found(v, choice, *[0] * 4, *[ctypes.c_void_p()] * 6) == -1


# ---- Sputnik and MACKO, by their formats


def sputnik_product(out, inn, tokens, count, order, values, pointers, columns, x, y, stream, kinds):
    """The function of the library in float64, from the same addresses; in float16 it takes two weights of a row at a time."""
    kind, index = kinds
    pointers, order = number_of(pointers, out + 1, np.int32), number_of(order, out, np.int32)
    assert pointers[-1] == count and sorted(order) == list(range(out)) and (np.diff(np.diff(pointers)[order]) <= 0).all()
    assert tokens % 8 == 0 and (kind == np.float32 or not (pointers % 2).any())
    values, columns = number_of(values, count, kind).astype(np.float64), number_of(columns, count, index)
    dense, result = number_of(x, inn * tokens, kind).reshape(inn, tokens), number_of(y, out * tokens, kind).reshape(out, tokens)
    for row in order:
        part = slice(pointers[row], pointers[row + 1])
        result[row] = values[part] @ dense[columns[part]].astype(np.float64)
    return 0


def macko_product(out, inn, values, gaps, rows, x, y, stream):
    """The same of MACKO: a weight's place is the zeros counted so far and the entries before it."""
    rows = number_of(rows, out + 33, np.int32)
    count = -(-rows[out] // 8) * 8
    values, gaps = number_of(values, count, np.float16).astype(np.float64), number_of(gaps, count // 2, np.uint8)
    dense, result = number_of(x, inn, np.float16).astype(np.float64), number_of(y, out, np.float16)
    assert (rows[out:] == rows[out]).all()
    for row in range(out):
        part = np.arange(rows[row], rows[row + 1])
        places = np.cumsum(gaps[part // 2] >> 4 * (part % 2) & 15) + part - rows[row]
        result[row] = values[part] @ dense[places]
    return 0


@pytest.mark.parametrize("density", [0.5, 0.03, 1e-5])  # the last keeps nothing
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_what_sputnik_is_given_makes_the_product(monkeypatch, dtype, density):
    kinds = (np.float16, np.int16) if dtype == torch.float16 else (np.float32, np.int32)
    monkeypatch.setattr(sputnik, "function", lambda values: partial(sputnik_product, kinds=kinds))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    operand = packed(Unstructured(density), dtype, (40, 96))
    for tokens in (0, 5, 16):
        x = torch.randn(tokens, 96).to(dtype)
        right = x.double() @ Unstructured(density).unpack(operand).double().T
        assert torch.allclose(Unstructured(density).spmm_sputnik(operand)(x).double(), right, atol=2e-2)
    with pytest.raises(Unavailable, match="needs at most 32768 inputs in float16"):
        sputnik.arrange(packed(Unstructured(0.5), torch.float16, (1, 32770)))


@pytest.mark.parametrize("density", [0.5, 0.03, 1e-5])
def test_what_macko_is_given_makes_the_product(monkeypatch, density):
    monkeypatch.setattr(macko, "function", lambda values: macko_product)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    operand = packed(Unstructured(density), torch.float16, (40, 96))
    run = Unstructured(density).spmm_macko(operand)
    for tokens in (0, 1, 3):
        x = torch.randn(tokens, 96).half()
        assert torch.allclose(run(x).double(), x.double() @ Unstructured(density).unpack(operand).double().T, atol=2e-2)
    with pytest.raises(Unavailable, match="needs at most 16 tokens"):
        run(torch.randn(17, 96).half())


@pytest.mark.parametrize("kernel, title", [("sputnik", "Sputnik"), ("macko", "MACKO")])
def test_a_library_that_is_not_built_is_named(monkeypatch, kernel, title):
    monkeypatch.delenv(f"SPARSESURVEY_{title.upper()}", raising=False)
    with pytest.raises(Unavailable, match=f"needs {title}, built by you, and its path in SPARSESURVEY_{title.upper()}"):
        Unstructured(0.5).kernels()[kernel](packed(Unstructured(0.5), torch.float16))


@pytest.mark.skipif(not os.environ.get(sputnik.VARIABLE), reason="needs Sputnik's library")
def test_sputniks_library_has_the_functions_that_we_call():
    library = ctypes.CDLL(os.environ[sputnik.VARIABLE])
    assert all(hasattr(library, name) for name in sputnik.NAMES.values())
