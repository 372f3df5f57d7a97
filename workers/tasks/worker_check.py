"""Whether this worker computes what the task names: the same code, with the same math library."""

from __future__ import annotations

import platform

from mmerge.manifests.errors import MmergeError
from mmerge.workers.methods.interface import Method
from mmerge.workers.runtime.math_library import describe_math_library
from mmerge.workers.runtime.method_source import digest_source


def check_worker(method: Method, *, source: str | None, math_library: str, device: str) -> None:
    """Compare what this process would compute with what the task says.

    Args:
        method: the method as it is installed here.
        source: `digest_source` on the driver.
        math_library: `describe_math_library` on the driver, empty where bits do not depend on it.
        device: where the method merges whole matrices.

    Raises:
        MmergeError: the code or the math library differs.
    """
    if digest_source(type(method)) != source:
        raise MmergeError(
            f"method {method.name!r}: its code on {platform.node()} differs from that of the"
            " process that started the run. Install the same version of its package everywhere"
        )
    if math_library in ("", "cuda"):
        return
    library_here = describe_math_library(device)
    if library_here != math_library:
        raise MmergeError(
            f"method {method.name!r}: {platform.node()} merges matrices with {library_here}, the"
            f" run was started with {math_library}: the last bits could differ. Use workers of one"
            " kind, and start the run on a machine of that kind"
        )
