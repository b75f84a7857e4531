"""Is a provider right? Compared with the float64 oracle before any of its times is believed.

An output passes when its largest error is at most twice that of the plain formula in the same dtype, plus 4 eps of that
dtype; errors count relative to the largest value of the oracle.

Only the last rows of the last key head are compared, so that a million tokens take no longer than a few thousand; there
index arithmetic overflows first, too. dO is zero elsewhere: then every gradient, that of sigma too, comes from those
rows alone. With top_k, rows whose selection is within rounding may rightly differ; they are left out, with dO zero.

The gradient of sigma is one number a head, a sum over all rows in which terms cancel and errors may by luck. It counts
relative to the sum of the rows' absolute gradients, and the plain formula's error is what its rows' errors make as
independent ones: the root of the sum of their squares.
"""

from typing import NamedTuple

import torch

PAIRS = {"cuda": 2**23, "cpu": 2**20}  # query-key pairs compared
GRADIENTS = ("dq", "dk", "dv", "dsigma")


class Expected(NamedTuple):
    rows: tuple  # index of the compared part of q and o
    keys: tuple  # index of the compared part of k and v
    clear: torch.Tensor  # compared rows whose selection rounding cannot change
    do: torch.Tensor
    oracle: dict
    scale: dict  # what the errors of each output are relative to
    allowed: dict


class Check(NamedTuple):
    """errors: {output: (error, allowed)}, relative to the output's largest value."""

    errors: dict
    rows: int
    rows_left_out: int

    @property
    def worst(self):
        """(output, error, allowed) of the one closest to its limit or furthest beyond; NaN is beyond everything."""
        return max(((name, *pair) for name, pair in self.errors.items()), key=lambda e: (e[1] != e[1], e[1] / e[2]))

    @property
    def passed(self):
        return all(error <= allowed for error, allowed in self.errors.values())


def expect(formula, inputs, backward):
    """What the oracle and the plain formula say about the compared part of a problem."""
    q, k, v, sigma = inputs
    length, group = q.shape[2], q.shape[1] // k.shape[1]
    rows, keys = compared(formula, length, PAIRS[q.device.type])
    rows, keys = (-1, slice(-group, None), slice(-rows, None)), (-1, slice(-1, None), slice(-keys, None))
    part = [t.detach() for t in (q[rows][None], k[keys][None], v[keys][None], sigma[-group:])]
    part64 = [t.double() for t in part]
    keep, clear = formula.selection(part64[0], part64[1], part64[3])
    do = torch.randn(part[0].shape[:3] + v.shape[3:], device=q.device, dtype=q.dtype) * clear[..., None]

    def plain(q, k, v, sigma):
        return formula.plain(q, k, v, sigma, keep)

    def sigma_by_row(q, k, v, sigma):
        return q, k, v, sigma[:, None].repeat(1, q.shape[2])

    oracle = outputs(formula.oracle, part64, do, clear, backward)
    coarse = outputs(plain, sigma_by_row(*part), do, clear, backward)
    scale = {name: value.abs().max() for name, value in oracle.items()}
    spread = {name: (coarse[name] - oracle[name]).abs().max() for name in oracle if name != "dsigma"}
    if "dsigma" in oracle:
        by_row = outputs(plain, sigma_by_row(*part64), do, clear, backward)["dsigma"]
        scale["dsigma"] = by_row.abs().sum(-1)
        spread["dsigma"] = (coarse["dsigma"] - by_row).square().sum(-1).sqrt()
    allowed = {
        name: (2 * spread[name] / scale[name]).max().item() + 4 * torch.finfo(coarse[name].dtype).eps for name in oracle
    }
    return Expected(rows, keys, clear[0], do[0], oracle, scale, allowed)


def compared(formula, length, pairs):
    """(rows, keys): how many of the last queries and keys fit the budget of pairs."""
    if formula.left < 0:
        return max(1, min(length, pairs // length)), length
    rows = min(length, max(1, int((formula.left**2 / 4 + pairs) ** 0.5 - formula.left / 2)))
    return rows, min(length, rows + formula.left)


def outputs(run, inputs, do, clear, backward):
    """{name: value} of the output and, with backward, of the gradients that exist."""
    leaves = [t.detach().requires_grad_(backward) for t in inputs]
    o = run(*leaves)
    gradients = torch.autograd.grad(o, leaves, do.to(o.dtype), allow_unused=True) if backward else [None] * len(leaves)
    named = {name: value for name, value in zip(GRADIENTS, gradients, strict=True) if value is not None}
    return {"o": (o.detach() * clear[..., None])[0], **{n: g if n == "dsigma" else g[0] for n, g in named.items()}}


def forward(expected, o):
    """{"o": (error, allowed)} of a provider's output."""
    actual = o.detach()[expected.rows] * expected.clear[..., None]
    return {"o": compare(expected, "o", actual)}


def backward(expected, o, inputs, ours):
    """The same for a provider's gradients. A baseline may leave sigma constant, we may not."""
    do = torch.zeros_like(o)
    do[expected.rows] = expected.do
    gradients = torch.autograd.grad(o, inputs, do, retain_graph=True, allow_unused=not ours)
    group = expected.do.shape[0]
    parts = (expected.rows, expected.keys, expected.keys, slice(-group, None))
    return {
        name: compare(expected, name, gradient[part])
        for name, gradient, part in zip(GRADIENTS, gradients, parts, strict=True)
        if gradient is not None
    }


def compare(expected, name, actual):
    """(error, allowed) of an output."""
    difference = (actual.double() - expected.oracle[name]).abs()
    return (difference / expected.scale[name]).max().item(), expected.allowed[name]
