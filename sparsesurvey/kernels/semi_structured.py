"""2:4 on sparse tensor cores through libraries: cuSPARSELt, as it comes and searched, and the CUTLASS kernels in torch.

Both give W x^T, feature-major, and want tokens in eights. What is packed here is what they take: our two bits a position
are CUTLASS's, which stores them in another order.
"""

import torch
from torch import Tensor

from sparsesurvey.structure import Plan, Unavailable, check_activations, check_pair

DTYPES = (torch.bfloat16, torch.float16)
EIGHT = 8  # tokens; what is missing to a multiple is filled up with zeros
SEARCHED: dict[tuple, dict[int, dict[str, int]]] = {}  # what trained weights have found, by device, dtype and shape, by tokens


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
    require_cusparselt(weight, tuple(weight.shape))
    compressed = compress(weight.detach().contiguous())
    best: dict[int, dict[str, int]] = {}

    def run(x: Tensor) -> Tensor:
        check_activations("x", x, weight.shape[1], weight)
        with torch.cuda.device_of(x):
            return sparse_product(compressed, x, weight.shape[0], best if searched else None)

    return run


def require_cusparselt(values: Tensor, shape: tuple[int, int]) -> None:
    require(values, shape, (16, 16))
    if not torch.backends.cusparselt.is_available():
        raise Unavailable("needs a torch that was built with cuSPARSELt")


def compress(weight: Tensor) -> Tensor:
    try:
        return torch._cslt_compress(weight)
    except RuntimeError as error:
        raise Unavailable(f"needs a cuSPARSELt that takes this weight: {str(error).splitlines()[0]}") from None


def sparse_product(compressed: Tensor, x: Tensor, out: int, best: dict[int, dict[str, int]] | None) -> Tensor:
    """``x @ W.T``; ``best`` keeps the algorithm that was found for a number of tokens, None is for the library's own choice."""
    tokens = len(x)
    if not tokens:
        return x.new_empty(0, out)
    dense = eights(x.detach()).T
    if best is not None and dense.shape[1] not in best:
        found = torch._C._cusparselt.mm_search(compressed, dense, None, None, None, True)
        best[dense.shape[1]] = dict(zip(("alg_id", "split_k", "split_k_mode"), map(int, found)))
    chosen = best[dense.shape[1]] if best is not None else {}
    return torch._cslt_sparse_mm(compressed, dense, transpose_result=True, **chosen)[:tokens]


def trained_plan(values: Tensor, used: Tensor, places: Tensor, shape: tuple[int, int]) -> Plan:
    """Plan of ``x @ W.T`` with weights that are trained: each run reads the values where they are and compresses W anew.

    Number ``used[i]`` of the values, flat, is at ``places[i]`` of W, flat; W ``[out, in]`` has at most 2 of every 4 in a row.
    The algorithm is searched for once for every shape and number of tokens: a model has many such weights.
    """
    require_cusparselt(values, shape)
    values, best = values.detach(), SEARCHED.setdefault((values.device, values.dtype, shape), {})

    def run(x: Tensor) -> Tensor:
        check_activations("x", x, shape[1], values)
        with torch.cuda.device_of(x):
            weight = values.new_zeros(shape)
            weight.view(-1)[places] = values.flatten()[used]
            return sparse_product(compress(weight), x, shape[0], best)

    return run


def fresh_product(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` for a weight ``[out, in]`` with at most 2 of every 4 in a row, which is compressed for this product alone.

    The algorithm is searched for once for every shape and number of tokens.
    """
    shape = tuple(weight.shape)
    require_cusparselt(weight, shape)
    check_activations("x", x, shape[1], weight)
    with torch.cuda.device_of(x):
        return sparse_product(compress(weight.contiguous()), x, shape[0], SEARCHED.setdefault((weight.device, weight.dtype, shape), {}))


def sampled_plan(values: Tensor, used: Tensor, places: Tensor, shape: tuple[int, int]) -> Plan:
    """Plan of ``dy.T @ x`` at the places of a weight as ``trained_plan`` has them: here 2:4 skips nothing, the product is dense."""
    require_cusparselt(values, shape)

    def run(dy: Tensor, x: Tensor) -> Tensor:
        dy, x = check_pair(dy, x, shape, values)
        grad = values.new_zeros(values.numel())
        grad[used] = (dy.T @ x).flatten()[places]
        return grad.view(values.shape)

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
