"""One list of checks for every structure: what ``structure.py`` promises, tried on each instance of ``variants()``.

A new file in ``structures/`` is found and checked with no change here.
"""

import dataclasses
import math
from functools import cached_property, lru_cache
from itertools import product as cross

import pytest
import torch
from torch import Tensor

from sparsesurvey import structures
from sparsesurvey.structure import PRODUCTS, Pattern, Structure, Unavailable, stored_bytes
from sparsesurvey.structures import all_structures

ALL = [variant for kind in all_structures().values() for variant in kind.variants()]
PATTERNS = [structure for structure in ALL if isinstance(structure, Pattern)]
KERNELS = [(structure, product, kernel) for structure in ALL for product in PRODUCTS
           for kernel in structure.kernels(product)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}

every_structure = pytest.mark.parametrize("structure", ALL, ids=str)
every_pattern = pytest.mark.parametrize("structure", PATTERNS, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_kernel = pytest.mark.parametrize("structure, product, kernel", KERNELS,
                                       ids=[f"{structure} {product}_{kernel}" for structure, product, kernel in KERNELS])


def shape_of(structure: Structure) -> tuple[int, int]:
    """A small shape of several tiles, more rows than a byte has bits."""
    rows, cols = structure.tile
    return rows * max(3, math.ceil(9 / rows)), cols * max(5, math.ceil(40 / cols))


def random(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def member(structure: Structure, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return structure.project(random(shape_of(structure), dtype, seed))


def few(structure: Structure, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Members with fewer non-zeros than may be: a few zeros, empty rows, a single weight, none. Without a mask, only none."""
    weight = member(structure, dtype)
    if not isinstance(structure, Pattern):
        return [structure.project(torch.zeros_like(weight))] * 4
    thinned = weight * (random(weight.shape, seed=1) > 0)
    rows = weight.clone()
    rows[: len(rows) // 2] = 0
    single = torch.zeros_like(weight)
    single[-1, -1] = 1
    return [thinned, rows, single, torch.zeros_like(weight)]


class Operand:
    """A packed weight that many checks share, and what they compare with, made once. Nobody may change it."""

    def __init__(self, structure: Structure, weight: Tensor) -> None:
        self.structure, self.packed = structure, structure.pack(weight)

    @cached_property
    def dtype(self) -> torch.dtype:
        return self.structure.unpack(self.packed).dtype

    @cached_property
    def forward(self) -> Tensor:
        return self.structure.forward_weight(self.packed).T.double()

    @cached_property
    def backward(self) -> Tensor:
        return self.structure.backward_weight(self.packed).double()

    @cached_property
    def stored(self) -> Tensor:
        return self.structure.unpack(self.packed._replace(values=torch.ones_like(self.packed.values))) != 0


@lru_cache(None)
def operand(structure: Structure, dtype: torch.dtype = torch.float32, which: int = 0) -> Operand:
    """Of a member, or of one of the ``few``, from 1."""
    return Operand(structure, few(structure, dtype)[which - 1] if which else member(structure, dtype))


# ---- what it is called


@every_structure
def test_repr_makes_an_equal_one(structure):
    again = eval(repr(structure), vars(structures))
    assert again == structure and hash(again) == hash(structure) and again is not structure
    with pytest.raises(dataclasses.FrozenInstanceError):
        structure.density = 0.5


def test_names_are_unique():
    names = [str(structure) for structure in ALL]
    assert len(set(names)) == len(names)
    for kind in all_structures().values():
        assert kind.variants()[0] == kind(), "the default comes first"


# ---- what it may keep, and what it chooses


@every_pattern
@every_dtype
def test_mask_is_a_member_of_exactly_the_density(structure, dtype):
    shape = shape_of(structure)
    for scores in random(shape, dtype).abs(), random(shape, dtype), torch.zeros(shape, dtype=dtype):
        before = scores.clone()
        mask = structure.mask(scores)
        assert mask.dtype == torch.bool and mask.shape == scores.shape
        assert structure.holds(mask)
        assert int(mask.sum()) == structure.nnz(shape)
        assert torch.equal(scores, before) and torch.equal(mask, structure.mask(scores))
        assert torch.equal(mask, structure.mask(scores.T.contiguous().T)), "scores need not be contiguous"


@every_pattern
def test_large_shapes_come_close_to_the_density(structure):
    rows, cols = structure.tile
    shape = (rows * 1000, cols * 1000)
    assert structure.nnz(shape) / math.prod(shape) == pytest.approx(structure.density, abs=1e-6)


@every_pattern
@every_dtype
def test_select_waits_for_no_device(structure, dtype):
    """On the meta device there are no numbers to wait for: whatever depends on them, a sync or a shape, fails here."""
    scores = torch.empty(shape_of(structure), dtype=dtype, device="meta")
    mask = structure.select(scores)
    assert mask.shape == scores.shape and mask.dtype == torch.bool and mask.device == scores.device
    real = random(scores.shape, dtype).abs()
    assert torch.equal(structure.select(real), structure.mask(real))


@every_structure
def test_project_is_close_to_the_weight_and_leaves_members_alone(structure):
    weight = random(shape_of(structure), torch.float64)
    before = weight.clone()
    near = structure.project(weight)
    assert near.shape == weight.shape and near.dtype == weight.dtype and torch.equal(weight, before)
    lost = (weight - near).square().sum()
    assert lost < weight.square().sum(), "something is kept"
    if isinstance(structure, Pattern):
        assert torch.equal(near, weight * structure.mask(weight.abs()))
    again = (structure.project(near) - near).square().sum()
    assert again <= (1e-24 * near.square().sum() if structure.exact else 0.1 * lost)


@every_pattern
def test_holds_is_closed_under_dropping_and_not_under_adding(structure):
    shape = shape_of(structure)
    mask = structure.mask(random(shape))
    assert structure.holds(mask & (random(shape, seed=1) > 0))
    assert structure.holds(torch.zeros(shape, dtype=torch.bool))
    for place in (~mask).nonzero()[:: max(1, int((~mask).sum()) // 20)].tolist():
        more = mask.clone()
        more[tuple(place)] = True
        assert not structure.holds(more), f"one more at {place}"


@every_pattern
def test_mask_keeps_more_than_other_members(structure):
    scores = random(shape_of(structure)).abs()
    best = scores[structure.mask(scores)].sum()
    for seed in range(1, 30):
        other = random(scores.shape, seed=seed)
        assert scores[structure.mask(other)].sum() <= best
        assert scores[structure.mask(scores + 0.02 * other)].sum() <= best * (1 + 1e-2)


@every_pattern
def test_no_mask_of_a_small_matrix_keeps_more(structure):
    """All masks of one tile, or a few, where there are few enough to try."""
    rows, cols = structure.tile
    shape = next(((rows * i, cols * j) for i, j in ((2, 2), (1, 2), (1, 1)) if rows * i * cols * j <= 10), None)
    if shape is None:
        pytest.skip("too many masks to try")
    scores = random(shape).abs()
    every = torch.tensor(list(cross([False, True], repeat=math.prod(shape)))).view(-1, *shape)
    best = max(float(scores[mask].sum()) for mask in every if structure.holds(mask))
    assert float(scores[structure.mask(scores)].sum()) == pytest.approx(best)


# ---- how it is stored


@every_pattern
@every_dtype
def test_pack_and_unpack_are_exact(structure, dtype):
    for weight in member(structure, dtype), *few(structure, dtype):
        packed = structure.pack(weight)
        assert packed.values.dtype == dtype and packed.values.numel() == structure.nnz(weight.shape)
        assert torch.equal(structure.unpack(packed), weight)
        assert torch.equal(structure.forward_weight(packed), weight)


@every_structure
@every_dtype
def test_what_is_stored_costs_what_it_says(structure, dtype):
    for weight in member(structure, dtype), *few(structure, dtype):
        packed = structure.pack(weight)
        assert packed._fields[0] == "values" and structure.unpack(packed).dtype == dtype
        assert stored_bytes(packed) == structure.cost(weight.shape, 1, dtype.itemsize).weight_bytes
        strided = structure.pack(weight.T.contiguous().T)
        assert all(torch.equal(a, b) for (_, a, _), (_, b, _) in zip(tensors(strided), tensors(packed), strict=True))


def tensors(packed, change=lambda new: new):
    """Each tensor of an operand, of inner ones too: its name, itself, and the operand with another in its place."""
    for name, part in packed._asdict().items():
        put = lambda new, name=name: change(packed._replace(**{name: new}))
        if isinstance(part, Tensor):
            yield name, part, put
        elif hasattr(part, "_replace"):  # the values of an inner operand are those of the whole
            yield from ((inner, *rest) for inner, *rest in tensors(part, put) if inner != "values")


@every_structure
def test_cost_counts_two_flops_a_token_and_stored_weight(structure):
    out, inn = shape = shape_of(structure)
    cost = structure.cost(shape, tokens=10, itemsize=2)
    assert cost.flops == 20 * structure.nnz(shape)
    assert cost.io_bytes == 20 * (out + inn)
    stored = math.ceil(structure.value_bits(shape, 2) / 8) + math.ceil(structure.index_bits(shape) / 8)
    assert cost.weight_bytes == stored


@every_structure
def test_pack_does_not_alias_the_weight(structure):
    weight = member(structure)
    packed = structure.pack(weight)
    before = structure.unpack(packed)
    weight.zero_()
    assert torch.equal(structure.unpack(packed), before)


@every_pattern
def test_pack_refuses_what_is_no_member(structure):
    if structure.density == 1:
        pytest.skip("every matrix is a member")
    with pytest.raises(ValueError, match="weight is not .*mask"):
        structure.pack(random(shape_of(structure)))


@every_structure
def test_a_tampered_operand_is_refused_or_still_a_member(structure):
    packed = structure.pack(member(structure))
    for name, part, put in tensors(packed):
        if not part.numel():
            continue
        if not part.is_floating_point():
            with pytest.raises(ValueError, match=f"packed.{name}"):
                structure.unpack(put(part.to(torch.float32)))
        if "shape" in packed._fields:
            for cut in part[:-1], part.unsqueeze(0), part.flatten()[1:]:
                with pytest.raises(ValueError, match="packed."):
                    structure.unpack(put(cut))
        for wrong in wrong_contents(part) if not part.is_floating_point() else ():
            try:
                weight = structure.unpack(put(wrong))
            except ValueError as error:
                assert "packed." in str(error)
            else:
                assert weight.isfinite().all()
                assert not isinstance(structure, Pattern) or structure.holds(weight != 0)


def wrong_contents(part: Tensor) -> list[Tensor]:
    """The same size and dtype, other numbers: all low, all high, reversed, shuffled, one entry changed, noise."""
    info = torch.iinfo(part.dtype)
    one = part.clone()
    one.view(-1)[part.numel() // 2] = info.max
    shuffled = part.flatten()[torch.randperm(part.numel(), generator=torch.Generator().manual_seed(0))]
    noise = torch.randint(info.min, info.max, part.shape, generator=torch.Generator().manual_seed(1), dtype=torch.int64)
    return [torch.full_like(part, info.min), torch.full_like(part, info.max), part.flatten().flip(0).view_as(part),
            shuffled.view_as(part), one, noise.to(part.dtype)]


# ---- how it is multiplied


def operands(structure: Structure, product: str, tokens: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    out, inn = shape_of(structure)
    x, dy = random((tokens, inn), dtype, seed=2), random((tokens, out), dtype, seed=3)
    return {"spmm": (x,), "spmmt": (dy,), "sddmm": (dy, x)}[product]


def expected(of: Operand, product: str, inputs: tuple[Tensor, ...]) -> Tensor:
    """The product in float64 from the unpacked weight; the weight gradient where something is stored, [out, in], or that
    of the values of a structure without a mask.
    """
    wide = [part.double() for part in inputs]
    if product != "sddmm":
        return wide[0] @ (of.forward if product == "spmm" else of.backward)
    if has_places(of.structure):
        return wide[0].T @ wide[1] * of.stored
    unpacked = lambda values: of.structure.unpack(of.packed._replace(values=values))
    return torch.autograd.functional.vjp(unpacked, of.packed.values.double(), wide[0].T @ wide[1])[1]


def has_places(structure: Structure) -> bool:
    """Is each stored value the weight of one place in the matrix, or of one in either of two directions?"""
    return isinstance(structure, Pattern) or type(structure).forward_weight is not Structure.forward_weight


def plan_or_skip(structure: Structure, product: str, kernel: str, packed):
    try:
        return structure.kernels(product)[kernel](packed)
    except Unavailable as reason:
        assert str(reason).startswith("needs ")
        pytest.skip(str(reason))


def check(of: Operand, product, run, inputs) -> None:
    structure, packed = of.structure, of.packed
    copies = [part.clone() for part in inputs]
    got, want = run(*inputs), expected(of, product, inputs)
    assert all(torch.equal(part, copy) for part, copy in zip(inputs, copies)), "the input was written to"
    dtype = of.dtype
    assert got.dtype == dtype and not got.requires_grad
    if product == "sddmm":
        assert got.shape == packed.values.shape
    if product == "sddmm" and has_places(structure):
        got = structure.unpack(packed._replace(values=got))
    assert got.shape == want.shape
    scale = max(1.0, float(want.abs().max())) if want.numel() else 1.0
    torch.testing.assert_close(got.double(), want, rtol=0, atol=TOLERANCE[dtype] * scale)


@every_kernel
@every_dtype
def test_kernels_equal_float64(structure, product, kernel, dtype):
    for of in operand(structure, dtype), operand(structure, dtype, 2):
        run = plan_or_skip(structure, product, kernel, of.packed)
        for tokens in 0, 1, 7:
            check(of, product, run, operands(structure, product, tokens, dtype))


@every_kernel
def test_kernels_take_any_layout_and_zero_weights(structure, product, kernel):
    for of in operand(structure), operand(structure, which=3), operand(structure, which=4):
        run = plan_or_skip(structure, product, kernel, of.packed)
        inputs = operands(structure, product, 6, torch.float32)
        check(of, product, run, tuple(part.T.contiguous().T for part in inputs))
        check(of, product, run, tuple(torch.stack([part, part], -1)[::2, :, 0] for part in inputs))
        check(of, product, run, tuple(part[:1].expand(5, -1) for part in inputs))


@every_kernel
def test_kernels_return_new_tensors_outside_autograd(structure, product, kernel):
    packed = structure.pack(member(structure).requires_grad_())
    run = plan_or_skip(structure, product, kernel, packed)
    inputs = tuple(part.requires_grad_() for part in operands(structure, product, 5, torch.float32))
    first = run(*inputs)
    kept = first.clone()
    second = run(*(2 * part for part in inputs))
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
    assert first.untyped_storage().data_ptr() != packed.values.untyped_storage().data_ptr()
    assert torch.equal(first, kept) and not first.requires_grad


@every_kernel
def test_kernels_refuse_other_inputs(structure, product, kernel):
    packed = operand(structure).packed
    run = plan_or_skip(structure, product, kernel, packed)
    good = operands(structure, product, 3, torch.float32)
    for number, name in enumerate({"spmm": ["x"], "spmmt": ["dy"], "sddmm": ["dy", "x"]}[product]):
        part = good[number]
        for bad in part[:, 1:], part.double(), part.flatten(), part.unsqueeze(0), part.tolist():
            with pytest.raises(ValueError, match=f"^{name} must be torch.float32 .tokens, {part.shape[1]}."):
                run(*good[:number], bad, *good[number + 1:])
    if product == "sddmm":
        with pytest.raises(ValueError, match="same number of tokens, got 3 and 2"):
            run(good[0], good[1][:2])


@every_kernel
def test_kernels_refuse_a_corrupt_operand(structure, product, kernel):
    packed = operand(structure).packed
    if "shape" not in packed._fields:
        pytest.skip("any values are an operand")
    with pytest.raises((ValueError, Unavailable), match="packed.values|needs"):
        structure.kernels(product)[kernel](packed._replace(values=packed.values.flatten()[1:]))
    columns = getattr(packed, "columns", None)
    if columns is not None:
        with pytest.raises((ValueError, Unavailable), match="packed.columns|needs"):
            structure.kernels(product)[kernel](packed._replace(columns=torch.full_like(columns, 127)))


@every_structure
def test_kernels_are_the_methods_of_their_product(structure):
    for product in PRODUCTS:
        assert "reference" in structure.kernels(product)
    with pytest.raises(ValueError, match="product must be one of spmm, spmmt, sddmm, got 'matmul'"):
        structure.kernels("matmul")


# ---- what it refuses


@every_structure
def test_impossible_parameters_fail_at_construction(structure):
    for field in dataclasses.fields(structure):
        good = getattr(structure, field.name)
        wrong = [0, -1, None, "2", [1], object(), float("nan"), float("inf"), -0.5, 1.0001] + [True] * (type(good) is not bool)
        wrong += [1.5, 1.0] if isinstance(good, int) else []
        for value in wrong:
            with pytest.raises(ValueError, match=f"^{field.name} must be"):
                dataclasses.replace(structure, **{field.name: value})


@every_structure
def test_n_of_m_needs_n_at_most_m(structure):
    if not {"n", "m"} <= {field.name for field in dataclasses.fields(structure)}:
        pytest.skip("no n of m")
    with pytest.raises(ValueError, match="^n must be an integer from 1 to"):
        dataclasses.replace(structure, n=structure.m + 1)


@every_structure
def test_shapes_that_do_not_divide_fail_at_first_use(structure):
    rows, cols = structure.tile
    bad = [(0, cols), (rows, 0)] + [(rows + 1, cols)] * (rows > 1) + [(rows, cols + 1)] * (cols > 1)
    for shape in bad:
        with pytest.raises(ValueError, match="shape"):
            structure.nnz(shape)
        with pytest.raises(ValueError, match="shape"):
            structure.cost(shape, 1)
        uses = [(structure.pack, torch.zeros(shape)), (structure.project, torch.zeros(shape))]
        if isinstance(structure, Pattern):
            uses += [(structure.mask, torch.ones(shape)), (structure.holds, torch.zeros(shape, dtype=torch.bool))]
        for use, argument in uses:
            with pytest.raises(ValueError, match="shape"):
                use(argument)


@every_structure
@pytest.mark.parametrize("use, name", [("mask", "scores"), ("pack", "weight"), ("project", "weight")])
def test_only_finite_float_matrices_are_weights_and_scores(structure, use, name):
    if use == "mask" and not isinstance(structure, Pattern):
        pytest.skip("chooses nothing from scores")
    shape = shape_of(structure)
    zeros = torch.zeros(shape)
    for value in math.nan, math.inf, -math.inf:
        bad = zeros.clone()
        bad[0, 0] = value
        with pytest.raises(ValueError, match=f"{name} must be finite, got 1 NaN or infinite"):
            getattr(structure, use)(bad)
    for bad in zeros.long(), zeros.bool(), zeros.to(torch.complex64):
        with pytest.raises(ValueError, match=f"{name} must be floating point, got torch."):
            getattr(structure, use)(bad)
    for bad in zeros.flatten(), zeros.unsqueeze(0), zeros.tolist(), None:
        with pytest.raises(ValueError, match=f"{name} must be a matrix .out, in., got"):
            getattr(structure, use)(bad)


@every_pattern
def test_masks_are_boolean_matrices(structure):
    mask = torch.zeros(shape_of(structure), dtype=torch.bool)
    for bad in mask.float(), mask.flatten(), mask.unsqueeze(0), mask.tolist():
        with pytest.raises(ValueError, match="mask must be a boolean matrix .out, in., got"):
            structure.holds(bad)
