"""2:4 on sparse tensor cores through libraries: cuSPARSELt, as it comes and searched, and the CUTLASS kernels in torch.

Both give W x^T, feature-major, and want tokens in eights. What is packed here is what they take: our two bits a position
are CUTLASS's, which stores them in another order.
"""

import torch
from torch import Tensor

from sparsesurvey.structure import Plan, Unavailable, check_activations

DTYPES = (torch.bfloat16, torch.float16)
EIGHT = 8  # tokens; what is missing to a multiple is filled up with zeros


def require(values: Tensor, shape: tuple[int, int], tile: tuple[int, int]) -> None:
    """Raise Unavailable unless sparse tensor cores can multiply a weight ``[out, in]`` of this shape here."""
    if values.device.type != "cuda":
        raise Unavailable(f"needs a CUDA device, got an operand on {values.device}")
    if values.dtype not in DTYPES:
        raise Unavailable(f"needs bfloat16 or float16, got {values.dtype}")
    have = torch.cuda.get_device_capability(values.device)
    if have < (8, 0):
        raise Unavailable(f"needs CUDA compute capability 8.0, got {have[0]}.{have[1]}")
    if any(size % step for size, step in zip(shape, tile)):
        raise Unavailable(f"needs a weight of multiples of {tile[0]}x{tile[1]}, got {shape[0]}x{shape[1]}")


def eights(x: Tensor) -> Tensor:
    """``x [tokens, in]`` with tokens filled up to a multiple of eight."""
    return torch.nn.functional.pad(x, (0, 0, 0, -len(x) % EIGHT))


def cusparselt_plan(weight: Tensor, searched: bool) -> Plan:
    """Plan of ``x @ weight.T`` for a weight ``[out, in]`` with at most 2 of every 4 non-zero.

    Searched: the first run with so many tokens tries every algorithm and split of the sum, as the library's own search does.
    """
    require(weight, tuple(weight.shape), (16, 16))
    if not torch.backends.cusparselt.is_available():
        raise Unavailable("needs a torch that was built with cuSPARSELt")
    try:
        compressed = torch._cslt_compress(weight.detach().contiguous())
    except RuntimeError as error:
        raise Unavailable(f"needs a cuSPARSELt that takes this weight: {str(error).splitlines()[0]}") from None
    out, best = weight.shape[0], {}

    def run(x: Tensor) -> Tensor:
        tokens = len(check_activations("x", x, weight.shape[1], weight))
        if not tokens:
            return x.new_empty(0, out)
        with torch.cuda.device_of(x):
            dense = eights(x.detach()).T
            if searched and dense.shape[1] not in best:
                found = torch._C._cusparselt.mm_search(compressed, dense, None, None, None, True)
                best[dense.shape[1]] = dict(zip(("alg_id", "split_k", "split_k_mode"), map(int, found)))
            chosen = best.get(dense.shape[1], {})
            return torch._cslt_sparse_mm(compressed, dense, transpose_result=True, **chosen)[:tokens]

    return run


def cutlass_form(values: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """2:4 values ``[out, in / 4, 2]`` and our index (uint8, 4 bits a group) as CUTLASS's pair, ``[out, in / 2]`` and metadata.

    A group's 4 bits are the same, first position lowest, and four groups make an int16; only their order is another.
    """
    from torch.sparse._semi_structured_conversions import _calculate_meta_reordering_scatter_offsets as places

    meta = index.contiguous().view(torch.int16)  # [out, in / 16]
    moved = torch.empty_like(meta).view(-1)
    moved[places(*meta.shape, torch.int16, meta.device)] = meta.flatten()
    return values.flatten(1).contiguous(), moved.view(meta.shape)


def cutlass_plan(values: Tensor, index: Tensor, shape: tuple[int, int]) -> Plan:
    """Plan of ``x @ W.T`` by torch's CUTLASS kernels, which are those of Ampere on every GPU."""
    require(values, shape, (32, 64))
    compressed, meta = cutlass_form(values.detach(), index)

    def run(x: Tensor) -> Tensor:
        tokens = len(check_activations("x", x, shape[1], compressed))
        if not tokens:
            return x.new_empty(0, shape[0])
        with torch.cuda.device_of(x):
            return torch._sparse_semi_structured_mm(compressed, meta, eights(x.detach()).T).T[:tokens]

    return run
