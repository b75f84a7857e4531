"""2^x with a share of its elements on the FMA units, for kernels that the special-function unit limits."""

import triton
import triton.language as tl

from .tiles import INTERPRETED, exp2

PACK: tl.constexpr = tl.constexpr(4)  # elements of a thread that one piece of assembly computes
# 2^f for f in [-1/2, 1/2] by a polynomial of degree 4, 3e-6 off at most and exact at 0; highest power first, as float32 bits.
COEFFICIENTS = ("0f3C1D0166", "0f3D64FE23", "0f3E7601BC", "0f3F317096", "0f3F800000")
SPECIAL = "ex2.approx.ftz.f32 ${result}, ${x};"
# Adding 1.5 * 2^23 rounds x to an integer n, which then stands in the low bits, from where it goes to the exponent.
POLYNOMIAL = """
    max.ftz.f32 x, ${x}, 0fC2FC0000;
    add.rn.f32 n, x, 0f4B400000;
    mov.b32 bits, n;
    sub.rn.f32 n, n, 0f4B400000;
    sub.rn.f32 x, x, n;
    fma.rn.f32 p, x, {0}, {1};
    fma.rn.f32 p, p, x, {2};
    fma.rn.f32 p, p, x, {3};
    fma.rn.f32 p, p, x, {4};
    shl.b32 bits, bits, 23;
    mov.b32 result, p;
    add.s32 result, result, bits;
    mov.b32 ${result}, result;"""


def assembly(polynomials):
    """PTX of PACK elements, the first `polynomials` of them by the polynomial."""
    lines = [
        (POLYNOMIAL if index < polynomials else SPECIAL).format(*COEFFICIENTS, result=index, x=PACK.value + index)
        for index in range(PACK.value)
    ]
    return "{ .reg .f32 x, n, p; .reg .b32 bits, result;" + "\n".join(lines) + "}"


ASSEMBLY: tl.constexpr = tl.constexpr(tuple(assembly(polynomials) for polynomials in range(PACK.value + 1)))
CONSTRAINTS: tl.constexpr = tl.constexpr(",".join(["=f"] * PACK.value + ["f"] * PACK.value))


@triton.jit
def mixed_exp2(x, POLYNOMIALS: tl.constexpr):
    """2^x, of every four elements POLYNOMIALS by the polynomial, whose results do not fall below 2^-126."""
    if INTERPRETED or POLYNOMIALS == 0:
        return exp2(x)
    else:
        return tl.inline_asm_elementwise(ASSEMBLY[POLYNOMIALS], CONSTRAINTS, [x], tl.float32, is_pure=True, pack=PACK)
