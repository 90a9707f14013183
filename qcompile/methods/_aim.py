"""Aim at what the float model computes: a weight makes up for the drift of its inputs before it is rounded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..observers import Statistics


def aimed(weight: Tensor, statistics: Statistics, damping: float = 0.01, share: float = 1.0) -> Tensor:
    """The weight float32 [out, in] that makes of its inputs X what is nearest to the product of ``weight`` with F,
    the inputs of the float model.

    Of least squares: ``W + W @ (F - X).T @ X @ inverse(H)`` with the damped ``H = X.T @ X`` (GPTAQ and Qronos, arXiv
    2504.02692 and 2505.11695, correct the same error column by column). ``share`` of the correction is made; none
    where the drift is not known, or H has no inverse.
    """
    drift, hessian = statistics.drift, statistics.hessian
    if drift is None or hessian is None:
        return weight.float()
    damped = hessian.clone()
    damped.diagonal().add_(damping * hessian.diagonal().mean() + 1e-12)
    with one_thread():
        factor, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            return weight.float()
        correction = torch.cholesky_solve((weight.float() @ drift).T, factor).T
    return weight.float() + share * correction if torch.isfinite(correction).all() else weight.float()


@contextmanager
def one_thread() -> Iterator[None]:
    """Fixes the order of the sums of a factorization."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
