"""BLAS on one thread, for linear algebra between trials."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from threadpoolctl import ThreadpoolController

P = ParamSpec("P")
R = TypeVar("R")


@functools.cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()


def on_one_blas_thread(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, for whose time NumPy's and SciPy's BLAS libraries have one thread each.

    A strategy's matrices are small, and workers have the cores: threads of BLAS that wait for one another beside busy
    workers take several times as long as one. And sums do not depend on how many cores there are, so that a journal
    of one machine is good for others that have more or fewer of the same kind.
    """

    @functools.wraps(function)
    def limited(*args: P.args, **kwargs: P.kwargs) -> R:
        with _libraries().limit(limits=1, user_api="blas"):
            return function(*args, **kwargs)

    return limited
