"""What selection and storage are built from: tiles, the highest of a group, bits, and the index of a sparse matrix."""

from collections.abc import Iterator, Sequence
from math import ceil, log2

import torch
from torch import Tensor

from sparsesurvey.structure import check_part


def tiles(matrix: Tensor, rows: int, cols: int) -> Tensor:
    """``[out, in]`` as ``[out/rows, in/cols, rows, cols]``, one tile per leading index (a view where it can be)."""
    out, inn = matrix.shape
    return matrix.reshape(out // rows, rows, inn // cols, cols).transpose(1, 2)


def untile(tiled: Tensor) -> Tensor:
    """Invert ``tiles``."""
    out, inn = tiled.shape[0] * tiled.shape[2], tiled.shape[1] * tiled.shape[3]
    return tiled.transpose(1, 2).reshape(out, inn)


SHORT = 32  # entries of an axis up to which each is compared with each
CACHED = 1 << 18  # entries that a core works on at a time, so that what it makes of them stays in its cache


def in_cache(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of all tensors: on a CPU as many at a time as fit its cache, elsewhere all at once."""
    first = tensors[0]
    rows = CACHED * len(first) // max(1, first.numel()) if first.device.type == "cpu" else len(first)
    return zip(*(part.split(max(1, rows)) for part in tensors))


def top(scores: Tensor, keep: int) -> Tensor:
    """Boolean mask of the ``keep`` highest of the last axis, exactly ``keep``: of equal ones, the first.

    Short axes (2:4, 4:8) count by how many each entry is beaten, elementwise over all groups at once and several times
    as fast as ``torch.topk``; long ones compare with the keep-th highest.
    """
    size = scores.shape[-1]
    if keep in (0, size):
        return torch.full_like(scores, keep > 0, dtype=torch.bool)
    if size <= SHORT:
        kept = torch.empty(scores.shape, dtype=torch.uint8, device=scores.device)
        for part, chosen in in_cache(torch.atleast_2d(scores), torch.atleast_2d(kept)):
            torch.stack(_least_beaten(part.unbind(-1), keep), -1, out=chosen)
        return kept.view(torch.bool)
    threshold = scores.kthvalue(size - keep + 1, dim=-1, keepdim=True).values
    above, equal = scores > threshold, scores == threshold
    room = keep - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))


def _least_beaten(entries: Sequence[Tensor], keep: int) -> Sequence[Tensor]:
    """For each entry of the groups, 1 (uint8) where fewer than ``keep`` others beat it; of equal ones the first wins."""
    last, first = len(entries) - 1, entries[0]
    start = torch.arange(last - keep, -keep - 1, -1, dtype=torch.int8, device=first.device)
    beaten = start.view(-1, *[1] * first.dim()).repeat(1, *first.shape)  # by all that follow, less ``keep``
    counts = beaten.unbind()
    for later in range(last + 1):
        for earlier in range(later):
            wins = (entries[earlier] >= entries[later]).view(torch.int8)
            counts[later].add_(wins)
            counts[earlier].sub_(wins)
    return (beaten.view(torch.uint8) >> 7).unbind()  # the sign: negative is kept


def entropy(share: float) -> float:
    """Bits that one yes or no of probability ``share`` needs."""
    return -sum(part * log2(part) for part in (share, 1 - share) if part > 0)


def bits_for(choices: int) -> int:
    """Bits that tell ``choices`` things apart."""
    return (choices - 1).bit_length()


def pack_bits(codes: Tensor, width: int) -> Tensor:
    """Codes ``[rows, n]`` below ``2**width`` (at most 8 bits) to bytes ``[rows, ceil(n * width / 8)]``, lowest bit first."""
    rows, count = codes.shape
    eights = words(torch.nn.functional.pad(as_bytes(codes), (0, -count % 8)), torch.int64)  # of 8 codes, the first lowest
    if width == 1:  # one product moves bit 8 i of a word to bit 56 + i
        return (eights * 0x0102040810204080 >> 56).to(torch.uint8)
    for lane, used in _lanes(width):  # neighbours move together: from 8 lanes of a word 4, 2 and 1
        low = _repeated((1 << used) - 1, 2 * lane)
        eights = (eights & low) | ((eights >> (lane - used)) & (low << used))
    packed = words(eights, torch.uint8).view(rows, -1, 8)[..., :width].flatten(1)
    return packed[:, : ceil(count * width / 8)].contiguous()


def unpack_bits(data: Tensor, width: int, count: int) -> Tensor:
    """Invert ``pack_bits``: bytes ``[rows, ...]`` to ``count`` uint8 codes per row."""
    groups = ceil(count / 8)  # of 8 codes
    data = torch.nn.functional.pad(data, (0, groups * width - data.shape[1])).view(len(data), groups, width)
    eights = words(torch.nn.functional.pad(data, (0, 8 - width)), torch.int64)
    for lane, used in reversed(_lanes(width)):
        low = _repeated((1 << used) - 1, 2 * lane)
        eights = (eights & low) | ((eights << (lane - used)) & (low << lane))
    return words(eights, torch.uint8).flatten(1)[:, :count]


def _lanes(width: int) -> list[tuple[int, int]]:
    """Bits of a lane and those in use of it, in each of the steps that pack 8 codes; none for whole bytes."""
    return [(lane, lane // 8 * width) for lane in (8, 16, 32)] if width < 8 else []


def _repeated(bits: int, every: int) -> int:
    """A 64-bit word with ``bits`` in each lane of ``every``."""
    return sum(bits << start for start in range(0, 64, every))


def as_bytes(codes: Tensor) -> Tensor:
    """Small integers as uint8; booleans are so already."""
    return codes.view(torch.uint8) if codes.dtype == torch.bool else codes.to(torch.uint8)


def words(data: Tensor, dtype: torch.dtype) -> Tensor:
    """The same bytes read as integers of another size, the first byte lowest (as on every machine that torch knows)."""
    *shape, last = data.shape
    flat = data.contiguous().view(-1)
    aligned = flat.storage_offset() * flat.element_size() % dtype.itemsize == 0
    return (flat if aligned else flat.clone()).view(dtype).view(*shape, last * data.element_size() // dtype.itemsize)


def index_dtype(choices: int) -> torch.dtype:
    """The dtype of an index below ``choices``: int16 where it fits, else int32."""
    return torch.int16 if choices <= 1 << 15 else torch.int32


def compress_rows(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of the True entries of ``[rows, cols]`` row by row, and int32 row pointers ``[rows + 1]`` (CSR)."""
    dtype = index_dtype(kept.shape[1])
    columns = torch.cat([part.nonzero()[:, 1].to(dtype) for part, in in_cache(kept)])
    pointers = torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0))
    return columns, pointers.int()


def expand_rows(columns: Tensor, row_pointers: Tensor, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """Invert ``compress_rows``: row and column (int64) of every stored entry; ValueError if they are corrupt."""
    check_part("row_pointers", row_pointers, torch.int32, (rows + 1,))
    check_part("columns", columns, index_dtype(cols), (columns.numel(),))
    row_pointers, columns = row_pointers.long(), columns.long()
    counts = row_pointers.diff()
    if row_pointers[0] != 0 or row_pointers[-1] != columns.numel() or (counts < 0).any():
        raise ValueError(f"packed.row_pointers must rise from 0 to {columns.numel()}, the number of stored columns")
    row = torch.repeat_interleave(torch.arange(rows, device=columns.device), counts)
    if columns.numel() and (columns.min() < 0 or columns.max() >= cols):
        raise ValueError(f"packed.columns must be from 0 to {cols - 1}")
    if ((row.diff() == 0) & (columns.diff() <= 0)).any():
        raise ValueError("packed.columns must rise strictly within each row")
    return row, columns
