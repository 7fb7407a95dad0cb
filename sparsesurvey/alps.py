"""ALPS (Meng, Behdin, Wang and Mazumder 2024): choose what is kept by ADMM, then its values by conjugate gradients."""

from collections.abc import Callable

import torch
from torch import Tensor

from sparsesurvey.reconstruction import Pruned, alive, check_pattern, damped, gram_of
from sparsesurvey.structure import Pattern, check_int

EVERY = 3  # iterations between two looks at how the support changes
RAISE = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # where more than this share of it changed, the penalty grows so much
SETTLED = (30, 0.0003)  # after so many iterations it may stop when less than this share changed
LOOSEST = 1e-3  # a support that does not change with so small a penalty either is the one; the authors' code goes on


def alps(weight: Tensor, structure: Pattern, inputs: object, damp: float = 0.01, iterations: int = 300,
         polish: int = 10, dtype: torch.dtype = torch.float32) -> Pruned:
    """Prune ``weight`` ``[out, in]`` to ``structure``, with new values; ``inputs.gram`` is the layer's ``X^T X``.

    Minimises ``tr (W - V) H (W - V)^T`` with inputs scaled to a diagonal of ones. ADMM splits V from its copy D, which is
    in the structure (its choice by ``(V + U / rho)^2``), and the penalty ``rho`` grows from 0.1 until D keeps the same
    weights; then ``polish`` steps of conjugate gradients for each row on that support. Schedule and constants are those of
    the authors' code; for structures other than unstructured and N:M the projection is the structure's own choice.

    Raises:
        ValueError: no or an unfit gram, NaN, a structure that has no mask or does not divide the weight.

    Warns:
        DampingRaised: ``damp`` did not do, see ``reconstruction.damped``.
    """
    check_pattern(structure, "alps")
    check_int("iterations", iterations, 1)
    check_int("polish", polish, 0)
    gram = gram_of(weight, inputs, dtype, "alps")
    structure.check_shape(weight.shape)
    dense, gram = alive(weight.detach().to(dtype), gram)
    gram, _ = damped(gram, damp)
    scale = gram.diagonal().sqrt()
    gram, dense = gram / scale / scale[:, None], dense * scale
    target = dense @ gram
    start, mask = support(dense, target, gram, structure, iterations)
    fitted = conjugate_gradients(gram, target, mask, start * mask, polish)
    return Pruned((fitted / scale).to(weight.dtype), mask)


def support(dense: Tensor, target: Tensor, gram: Tensor, structure: Pattern, iterations: int,
            rho: float = 0.1) -> tuple[Tensor, Tensor]:
    """The weight ``[out, in]`` that ADMM ends with, before it is pruned, and the mask.

    ``gram`` has a diagonal of ones, ``target`` is ``dense @ gram``. Of ``pull``, the paper's V + U / rho, the kept part is
    the new D, and what is pruned is the new U / rho: U is all that the two disagreed by.
    """
    first = structure.select(dense.square())
    copy, price, last, grown = dense * first, torch.zeros_like(dense), first, False  # D and U / ``unit``
    kept, unit, solve = max(int(first.sum()), 1), rho, solver(gram, rho, len(dense))
    for iteration in range(1, iterations + 1):
        free = solve(torch.add(target, copy, alpha=rho).sub_(price, alpha=unit))
        pull, unit = torch.add(free, price, alpha=unit / rho), rho
        mask = structure.select(pull.square())
        copy = pull * mask
        price = pull.sub_(copy)
        if iteration % EVERY:
            continue
        changed = int((mask != last).sum()) / kept  # what went and what came
        last = mask
        if not grown and changed <= RAISE[1][0] and rho > LOOSEST:  # too stiff from the start: begin again, looser
            copy, price, rho = dense * first, torch.zeros_like(dense), rho / 5
        elif not changed or iteration > SETTLED[0] and changed < SETTLED[1]:
            break
        else:
            grown, rho = True, rho * next(factor for share, factor in RAISE if changed > share)
        solve = solver(gram, rho, len(dense))
    return free, structure.select(free.square())


def solver(gram: Tensor, rho: float, rows: int) -> Callable[[Tensor], Tensor]:
    """A function from S ``[rows, in]`` to ``S @ (gram + rho I)^-1``.

    For ``EVERY`` calls the inverse pays where there are many rows; a few are solved by the factor, twice.
    """
    shifted = gram.clone()
    shifted.diagonal().add_(rho)
    lower = torch.linalg.cholesky(shifted)
    if 2 * rows >= len(gram):
        inverse = torch.cholesky_inverse(lower)
        return lambda side: side @ inverse
    half = torch.linalg.solve_triangular
    return lambda side: half(lower, half(lower.mT, side, upper=True, left=False), upper=False, left=False)


def conjugate_gradients(gram: Tensor, target: Tensor, mask: Tensor, start: Tensor, steps: int, enough: float = 1e-4) -> Tensor:
    """Solve ``(V @ gram)_S = target_S`` on the support of each row ``[out, in]``, all rows at once, from ``start``.

    Stops before ``steps`` when every row's residual is below ``enough`` times its target's.
    """
    solution, residual = start, (target - start @ gram) * mask
    direction, size = residual, residual.square().sum(1, keepdim=True)
    goal = enough**2 * (target * mask).square().sum(1, keepdim=True)
    for _ in range(steps):
        if (size <= goal).all():
            break
        moved = (direction @ gram).mul_(mask)
        length = size / (direction * moved).sum(1, keepdim=True).clamp(min=torch.finfo(gram.dtype).tiny)
        solution, residual = torch.addcmul(solution, length, direction), torch.addcmul(residual, length, moved, value=-1)
        before, size = size, residual.square().sum(1, keepdim=True)
        direction = torch.addcmul(residual, size / before.clamp(min=torch.finfo(gram.dtype).tiny), direction)
    return solution
