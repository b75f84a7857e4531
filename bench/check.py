"""Is a provider right? Compared with the float64 oracle before any of its times is believed.

An output passes when its largest error is at most twice that of the plain formula in the same dtype, plus 4 eps of that
dtype; errors count relative to the largest value of the oracle. A baseline may be off by twice that: the check is whether it
computes the same, not how well.

Only the last rows of the last key head are compared, against all keys that they see, so that a million tokens take no
longer than a few thousand; there index arithmetic overflows first, too. dO is zero elsewhere: then every gradient, that of
a parameter too, comes from those rows alone. With top_k, rows whose selection is within rounding may rightly differ; they
are left out, with dO zero.

The gradient of a parameter (sigma) is one number a head, a sum over all rows in which terms cancel and errors may by luck.
It counts relative to the sum of the rows' absolute gradients, and the plain formula's error is what its rows' errors make
as independent ones: the root of the sum of their squares.
"""

from typing import NamedTuple

import torch

PAIRS = {"cuda": 2**23, "cpu": 2**20}  # query-key pairs compared


class Expected(NamedTuple):
    parts: dict  # {name: index of the compared part} of the output and of each gradient
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


def expect(formula, case, inputs):
    """What the oracle and the plain formula say about the compared part of a problem."""
    names, parameters = [*formula.inputs(case), *formula.rows, *formula.parameters], set(formula.parameters)
    group, last = case.heads // case.kv_heads, slice(-1, None)
    rows, keys = compared(formula, case.length, PAIRS[inputs[0].device.type])
    parts = {"o": (last, slice(-group, None), slice(-rows, None))}
    of_keys = (last, last, slice(-keys, None))
    for name in names:
        of_queries = name.startswith("q") or name in formula.rows
        parts[f"d{name}"] = slice(-group, None) if name in parameters else parts["o"] if of_queries else of_keys
    values = [tensor.detach()[parts[f"d{name}"]] for name, tensor in zip(names, inputs, strict=True)]
    values64 = [value.double() for value in values]
    keep, clear = formula.selection(*values64)
    do = torch.randn(*clear.shape, case.width, device=clear.device, dtype=values[0].dtype) * clear[..., None]

    def plain(*inputs):
        return formula.plain(*inputs, keep=keep)

    def by_row(values):
        """The values with a number for each row, and with it a gradient for each row, in a parameter."""
        return [v[:, None].repeat(1, rows) if name in parameters else v for name, v in zip(names, values, strict=True)]

    def outputs(run, values):
        """{name: value} of the output and, where the case has a backward, of the gradients."""
        leaves = [value.detach().requires_grad_(case.backward) for value in values]
        o = run(*leaves)
        found = {"o": o.detach() * clear[..., None]}
        if case.backward:
            gradients = torch.autograd.grad(o, leaves, do.to(o.dtype))
            found |= {f"d{name}": gradient for name, gradient in zip(names, gradients, strict=True)}
        return found

    oracle, coarse = outputs(formula.oracle, values64), outputs(plain, by_row(values))
    single = {f"d{name}" for name in parameters} & set(oracle)
    scale = {name: value.abs().max() for name, value in oracle.items()}
    spread = {name: (coarse[name] - oracle[name]).abs().max() for name in set(oracle) - single}
    exact = outputs(plain, by_row(values64)) if single else {}
    for name in single:
        scale[name] = exact[name].abs().sum(-1)
        spread[name] = (coarse[name] - exact[name]).square().sum(-1).sqrt()
    allowed = {
        name: (2 * spread[name] / scale[name]).max().item() + 4 * torch.finfo(coarse[name].dtype).eps for name in oracle
    }
    return Expected(parts, clear, do, oracle, scale, allowed)


def compared(formula, length, pairs):
    """(rows, keys): how many of the last queries and keys fit the budget of pairs; all where a formula needs every row."""
    if formula.every_row:
        return length, length
    if formula.left < 0:
        return max(1, min(length, pairs // length)), length
    rows = min(length, max(1, int((formula.left**2 / 4 + pairs) ** 0.5 - formula.left / 2)))
    return rows, min(length, rows + formula.left)


def forward(expected, o, ours):
    """{"o": (error, allowed)} of a provider's output."""
    return {"o": compare(expected, "o", o.detach()[expected.parts["o"]] * expected.clear[..., None], ours)}


def backward(expected, o, inputs, ours):
    """The same for a provider's gradients. A baseline may leave a parameter constant, we may not."""
    do = torch.zeros_like(o)
    do[expected.parts["o"]] = expected.do
    gradients = torch.autograd.grad(o, inputs, do, retain_graph=True, allow_unused=not ours)
    names = [name for name in expected.parts if name != "o"]
    return {
        name: compare(expected, name, gradient[expected.parts[name]], ours)
        for name, gradient in zip(names, gradients, strict=True)
        if gradient is not None
    }


def compare(expected, name, actual, ours):
    """(error, allowed) of an output."""
    difference = (actual.double() - expected.oracle[name]).abs()
    return (difference / expected.scale[name]).max().item(), expected.allowed[name] * (1 if ours else 2)
