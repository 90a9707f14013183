"""What follows from the Hessian H = X.T @ X of a weight's inputs X: its factor, and the weight to aim at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..observers import Statistics


def factorized(statistics: Statistics, damping: float = 0.01, order: Tensor | None = None) -> Tensor | None:
    """Upper triangular R, float32 [in, in], with ``R @ R.T = H[order][:, order]``, damped; None if there is none.

    damping: share of the mean of H's diagonal that is added to it; more where rounding made H indefinite. Inputs that
    are always zero stand alone. Made once for weights that share the statistics; in one thread, which fixes the order
    of sums.
    """
    hessian = statistics.hessian
    assert hessian is not None
    key = damping, None if order is None else tuple(order.tolist())
    if key in statistics.memo:
        return statistics.memo[key]
    backwards = (torch.arange(len(hessian), device=hessian.device) if order is None else order).flip(0)
    diagonal, found = hessian.diagonal()[backwards], None
    for share in (damping, *(step for step in (0.01, 0.1, 1.0) if step > damping)):
        damped = hessian[backwards][:, backwards]
        damped.diagonal().add_(diagonal.mean() * share + (diagonal == 0))
        with one_thread():
            lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed and bool(torch.isfinite(lower.diagonal()).all()):
            found = lower.flip(0, 1)
            break
    statistics.memo[key] = found
    return found


def aimed(weight: Tensor, statistics: Statistics, damping: float = 0.01, order: Tensor | None = None) -> Tensor:
    """The weight float32 [out, in] that makes of its inputs X what is nearest to the product of ``weight`` with F,
    the inputs of the float model.

    Of least squares: ``W + W @ (F - X).T @ X @ inverse(H)`` with the damped ``H = X.T @ X`` (GPTAQ and Qronos, arXiv
    2504.02692 and 2505.11695, correct the same error column by column). None of that where the drift is not known, or
    H has no inverse. order: for which H is factorized anyhow.
    """
    weight, drift = weight.float(), statistics.drift
    if drift is None or (factor := factorized(statistics, damping, order)) is None:
        return weight
    aim = drift.T @ weight.T  # [in, out]
    with one_thread():
        half = torch.linalg.solve_triangular(factor, aim if order is None else aim[order], upper=True)
        solved = torch.linalg.solve_triangular(factor.T, half, upper=False)
    correction = solved if order is None else aim.index_copy_(0, order, solved)
    return weight + correction.T if torch.isfinite(correction).all() else weight


@contextmanager
def one_thread() -> Iterator[None]:
    """Fixes the order of the sums of a factorization."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
