"""What several kernels share."""

import os

import triton
import triton.language as tl

# The interpreter multiplies the bit patterns of bf16 as integers (Triton 3.6 and 3.9): there alone, operands go through
# fp32, which is exact. Elsewhere the branch is compiled away.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in fp32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)
