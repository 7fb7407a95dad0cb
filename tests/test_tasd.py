"""TASD: the family and its best member against every mask, the catalogue's table 4.6, and the choice for a layer."""

from itertools import combinations, product

import pytest
import torch

from sparsesurvey import figures
from sparsesurvey.structure import stored_bytes
from sparsesurvey.structures import NM, TASD, Unstructured
from sparsesurvey.structures.tasd import captured, choose, cost, dropped, energy_delay, output_error, series

DENSITY = {50: 0.5, 70: 0.3, 90: 0.1, 95: 0.05}
SERIES = {
    (NM(2, 4),): (0.813, 0.925, 0.991, 0.997), (NM(4, 8),): (0.863, 0.971, 0.999, 1.0),
    (NM(2, 8),): (0.491, 0.704, 0.946, 0.984), (NM(2, 4), NM(2, 16)): (0.966, 0.998, 1.0, 1.0),
    (NM(2, 4), NM(2, 8)): (0.990, 0.999, 1.0, 1.0),
}
COST = (0.5, 0.5, 0.25, 0.625, 0.75)
SMALL = [TASD((NM(1, 2), NM(1, 4))), TASD((NM(1, 4), NM(1, 4))), TASD((NM(1, 4), NM(1, 8))), TASD((NM(1, 2), NM(1, 8))),
         TASD((NM(1, 4), NM(1, 4), NM(1, 8))), TASD((NM(1, 3), NM(1, 6))), TASD((NM(1, 2), NM(1, 4), NM(1, 8)))]


@pytest.fixture(scope="module")
def gaussian():
    return torch.randn(512, 512, generator=torch.Generator().manual_seed(0))


def pruned(weight, density):
    return weight * Unstructured(density).mask(weight.abs())


@pytest.mark.parametrize("terms", SERIES, ids=lambda terms: "+".join(map(str, terms)))
def test_table_of_captured_non_zeros(gaussian, terms):
    """Catalogue section 4.6: weights pruned without structure to 50, 70, 90 and 95 % sparsity."""
    got = [captured(pruned(gaussian, density), terms) for density in DENSITY.values()]
    assert got == [pytest.approx(share, abs=0.01) for share in SERIES[terms]]


def test_the_cost_is_the_sum_of_the_terms():
    assert [cost(terms) for terms in SERIES] == list(COST)
    assert TASD().density == 0.75 and TASD().facts().arithmetic == 1.0, "two products of half a dense one"
    assert TASD().cost((64, 64), 1).weight_bytes == sum(
        term.cost((64, 64), 1).weight_bytes for term in TASD().terms) == stored_bytes(
        TASD().pack(torch.zeros(64, 64, dtype=torch.float16)))


# ---- the family


def in_family(kept: frozenset[int], terms) -> bool:
    """By trying: some set of the first term's form within ``kept``, and the rest in the family of the other terms."""
    if not terms:
        return not kept
    groups = {}
    for place in kept:
        groups.setdefault(place // terms[0].m, []).append(place)
    takes = [[frozenset(some) for some in combinations(group, min(terms[0].n, len(group)))] for group in groups.values()]
    return any(in_family(kept - frozenset().union(*some), terms[1:]) for some in product(*takes))


@pytest.mark.parametrize("structure", SMALL, ids=str)
def test_the_family_and_its_best_member_by_brute_force(structure):
    """All masks of one row of 8 (or 6): ``holds`` says what trying says, and nothing keeps more than greedy does."""
    width = 6 if structure.terms[0].m == 3 else 8
    every = torch.tensor(list(product([False, True], repeat=width)))
    members = torch.tensor([in_family(frozenset(mask.nonzero().flatten().tolist()), structure.terms) for mask in every])
    assert [structure.holds(mask[None]) for mask in every] == members.tolist()
    assert int(every[members].sum(1).max()) == structure.nnz((1, width))
    for seed in range(20):
        scores = torch.rand(1, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        best = (every[members] * scores).sum(1).max()
        assert float((structure.mask(scores) * scores).sum()) == pytest.approx(float(best), abs=1e-12)


def test_what_two_terms_may_keep_by_hand():
    """2:4+2:8 may keep whatever 6:8 may, in two products that hardware knows; 2:4+2:16 less than 10:16."""
    row = lambda bits: torch.tensor([[bit == "1" for bit in bits]])
    assert TASD().holds(row("11110011")) and TASD().holds(row("11101110")) and not NM(2, 4).holds(row("11110011"))
    assert not TASD().holds(row("11111110"))  # seven of eight
    every = torch.tensor(list(product([False, True], repeat=8)))
    assert [TASD().holds(mask[None]) for mask in every] == [NM(6, 8).holds(mask[None]) for mask in every]
    thin, crowded = TASD((NM(2, 4), NM(2, 16))), row("1111111100000000")
    assert NM(10, 16).holds(crowded) and not thin.holds(crowded)  # 2 too many in either group, where 2 of 16 can go
    assert thin.holds(row("1111110011001100"))


# ---- the series


def test_terms_that_cover_are_exact(gaussian):
    """2:4+2:4 is the identity, bit for bit."""
    parts = series(gaussian, [NM(2, 4), NM(2, 4)])
    assert torch.equal(parts.terms[0] + parts.terms[1], gaussian) and not parts.residual.any()
    assert torch.equal(TASD((NM(2, 4), NM(2, 4))).project(gaussian), gaussian)


def test_terms_and_residual_add_up_and_do_not_overlap(gaussian):
    parts = series(gaussian, [NM(2, 4), NM(1, 4), NM(2, 16)])
    supports = torch.stack([part != 0 for part in (*parts.terms, parts.residual)])
    assert supports.sum(0).eq(1).all() and torch.equal(sum(parts.terms) + parts.residual, gaussian)
    for part, term in zip(parts.terms, (NM(2, 4), NM(1, 4), NM(2, 16))):
        assert term.holds(part != 0)


def test_error_falls_with_every_term(gaussian):
    terms = [NM(1, 8), NM(1, 8), NM(2, 16), NM(1, 4), NM(4, 8)]
    norms = [float(series(gaussian, terms[:count]).residual.norm()) for count in range(len(terms) + 1)]
    assert norms == sorted(norms, reverse=True) and norms[-1] < norms[0] / 10


def test_the_pattern_is_the_series(gaussian):
    for structure in TASD.variants():
        weight = gaussian[:, : 480]
        assert torch.equal(structure.project(weight), sum(series(weight, structure.terms).terms))


def test_a_product_is_the_sum_of_the_terms_products():
    draw = torch.Generator().manual_seed(0)
    weight, x = torch.randn(24, 32, generator=draw).double(), torch.randn(7, 32, generator=draw).double()
    structure = TASD()
    member = structure.project(weight)
    packed = structure.pack(member)
    parts = series(member, structure.terms).terms
    torch.testing.assert_close(sum(x @ part.T for part in parts), x @ member.T)
    for term, operand, part in zip(structure.terms, structure.operands(packed), parts, strict=True):
        assert torch.equal(term.unpack(operand), part)


def test_activations_too(gaussian):
    """A rectified activation is half zeros, at random: two terms hold nearly all of it."""
    assert captured(gaussian.relu(), TASD().terms) == pytest.approx(0.99, abs=0.01)


# ---- the choice


def test_tasder_takes_the_cheapest_that_is_good_enough(gaussian):
    layers = {f"{sparsity} %": pruned(gaussian, density) for sparsity, density in DENSITY.items()}
    chosen = choose(layers, SERIES, alpha=0.02)
    assert chosen == {"50 %": (NM(2, 4), NM(2, 8)), "70 %": (NM(2, 4), NM(2, 16)), "90 %": (NM(2, 4),), "95 %": (NM(2, 8),)}
    assert all(dropped(layers[name], terms) <= 0.02 for name, terms in chosen.items())
    assert choose(layers, SERIES, alpha=0.0)["50 %"] is None
    costs = [cost(choose(layers, SERIES, alpha)["50 %"]) for alpha in (0.02, 0.1, 0.2, 0.6)]
    assert costs == sorted(costs, reverse=True) and len(set(costs)) == 4


def test_tasder_by_output_error(gaussian):
    layers, x = {"a": pruned(gaussian, 0.3)}, torch.randn(64, 512, generator=torch.Generator().manual_seed(1))
    chosen = choose(layers, SERIES, alpha=0.1, inputs={"a": x})["a"]
    assert output_error(layers["a"], chosen, x) <= 0.1
    cheaper = [terms for terms in SERIES if cost(terms) < cost(chosen)]
    assert cheaper and all(output_error(layers["a"], terms, x) > 0.1 for terms in cheaper)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan"), None, True, "0.1"])
def test_alpha_is_a_share(alpha):
    with pytest.raises(ValueError, match="^alpha must be a number from 0 to 1"):
        choose({}, SERIES, alpha)


def test_energy_delay_by_hand():
    """Free reads: the square of the cost. Reads alone: cost times bits, 9 of 16 for 2:4 in half precision."""
    assert energy_delay((NM(2, 4),), (8, 16), tokens=4, bit=0.0) == 0.25
    assert energy_delay((NM(2, 4), NM(2, 8)), (8, 16), tokens=4, bit=0.0) == 0.75**2
    assert energy_delay((NM(2, 4),), (8, 16), tokens=1, bit=1e9) == pytest.approx(0.5 * 9 / 16)
    assert energy_delay((NM(2, 4), NM(2, 4)), (8, 16), tokens=1, bit=1e9) > 1, "positions make it more than dense"


# ---- what it refuses


@pytest.mark.parametrize("terms, what", [
    ((NM(2, 4),), "a tuple of two or more NM"), ((), "a tuple of two or more NM"), ([NM(2, 4), NM(2, 8)], "a tuple of two"),
    ((NM(2, 4), 0.5), "a tuple of two"), ((NM(2, 4), NM(2, 8, "out")), "along the inputs"),
    ((NM(2, 8), NM(2, 4)), "have each m a multiple"), ((NM(2, 4), NM(2, 6)), "have each m a multiple"),
    ((NM(2, 4), NM(5, 8)), "not keep more than all"), ((NM(3, 4), NM(2, 4)), "not keep more than all"),
])
def test_terms_that_make_no_series(terms, what):
    with pytest.raises(ValueError, match=f"^terms must (be )?{what}"):
        TASD(terms)


def test_its_name_is_its_sum():
    assert str(TASD()) == "2:4+2:8" and figures.family(str(TASD())) == "TASD"
    assert figures.colour("2:4+2:8") != figures.colour("2:4")
