"""The rule of accuracy, to which tests and benchmark hold results.

    largest error       <=  2   * that of the plain formula + eps / 2 * largest |exact| + eps_of_sums / 2 * largest scale
    norm of the error   <=  1.5 * that of the plain formula + eps / 8 * norm of exact   + eps_of_sums / 2 * norm of scale

exact is the float64 oracle, and eps that of the inputs' dtype. The plain formula is plain PyTorch: the same inputs, sums in
`accumulation(dtype)`, whose eps is eps_of_sums, results rounded once. scale is what exact becomes when every sum adds absolute
values: where terms cancel nobody is closer to 0 than the roundings of these terms, and a rounding that all numbers of a row
share does not average out. It counts at the eps of the sums, never at that of 16-bit numbers.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch


class Bound(NamedTuple):
    """What the rule allows by one measure of a tensor."""

    measure: Callable
    factor: float
    share: float

    def of(self, plain, exact, scale, dtype):
        """The most that the error may measure. plain, exact, scale: measures of the plain formula's error and of the others."""
        eps, eps_of_sums = (torch.finfo(kind).eps for kind in (dtype, accumulation(dtype)))
        return self.factor * plain + self.share * eps * exact + eps_of_sums / 2 * scale


LARGEST = Bound(lambda t: t.abs().max(), 2, 1 / 2)
FROBENIUS = Bound(lambda t: t.norm(), 1.5, 1 / 8)


def accumulation(dtype):
    """The dtype that sums of inputs of a dtype are computed in."""
    return torch.promote_types(dtype, torch.float32)
