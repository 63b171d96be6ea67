"""A Triton kernel of three lines: compiling it needs a C compiler and Python's headers, as Unsloth's kernels do."""

import torch
import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def _double(x, size: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202 - Triton reads the annotations
    place = tl.arange(0, size)
    tl.store(x + place, 2 * tl.load(x + place))


def doubles(size: int = 64) -> bool:
    """Whether a compiled kernel doubles a vector of ones on the GPU.

    Args:
        size: of the vector, a power of two.
    """
    x = torch.ones(size, device="cuda")
    _double[(1,)](x, size)
    return bool((x == 2).all())
