"""Is a provider right? Compared with a float64 oracle before any of its times is believed, and again after they were taken.

Every key head of every batch element, as far as a budget of pairs allows, gets a block of query rows: the last rows, the first
ones, rows across the edge of a tile, or random ones. Where there are fewer than four such heads, each takes part in several
rounds, so that every case compares all four. dO is zero in all other rows, so that every gradient, that of a parameter too,
comes from the compared rows alone, and a million tokens take no longer than a few thousand. With top_k, rows whose selection is
within rounding may rightly differ; they are left out, with dO zero.

An output passes when the norm of its error is at most CAPS[dtype] times its own norm. Ours also has to keep the rule of
accuracy (accuracy.py). Where what it allows by the norm is beyond the cap, the case can show nothing: no provider passes.

The gradient of a parameter (sigma) is one number a head, a sum over rows in which terms cancel, and errors may by luck. It
counts relative to the sum of the rows' absolute gradients, and the plain formula's error is what its rows' errors make as
independent ones, the root of the sum of their squares, and a rounding of the sum.
"""

from typing import NamedTuple

import torch

from bench.accuracy import FROBENIUS, LARGEST

PAIRS = {"cuda": 2**25, "cpu": 2**21}  # query-key pairs compared
CAPS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
POSITIONS = 4  # of blocks: last, first, across an edge, random
TILE = 64  # rows: blocks across an edge of such a tile are across the edges of larger ones, too, now and then


class Block(NamedTuple):
    """The rows of one batch element and key head that are compared, and the keys that they see.

    rows: of the queries that the formula is given, the last positions of `keys`. counted: how many of them, from the first,
    see no key beyond `keys`, and so are compared.
    """

    batch: int
    kv_head: int
    rows: slice
    keys: slice
    counted: int


class Part(NamedTuple):
    """A block of one output: its position, and its values by the oracle and by the plain formula."""

    index: tuple
    exact: torch.Tensor
    plain: torch.Tensor
    scale: torch.Tensor  # what errors are relative to


class Round(NamedTuple):
    """Blocks of different heads, which one backward pass compares."""

    parts: dict  # {name: Parts} of the output and of each gradient
    compared: list  # for each block, which elements of the output are compared: rows whose selection rounding cannot change
    do: torch.Tensor


class Expected(NamedTuple):
    rounds: list
    dtype: torch.dtype  # whose rounding the results have


class Error(NamedTuple):
    """error: norm of the error over the norm of the output. cap: what it may be. rule: error over what the rule allows.

    shows: whether the plain formula itself is within the cap, so that a right result can be told from a wrong one.
    """

    error: float
    cap: float
    rule: float
    shows: bool = True


class Check(NamedTuple):
    """errors: {output: Error}. ours: whether the rule of accuracy counts beside the cap."""

    errors: dict
    rows: int
    rows_left_out: int
    ours: bool

    @property
    def worst(self):
        """(output, error, cap) of the one closest to its limit or furthest beyond; NaN is beyond everything."""
        name = max(self.errors, key=lambda name: (self.excess(name) != self.excess(name), self.excess(name)))
        return name, self.errors[name].error, self.errors[name].cap

    def excess(self, name):
        """How many times its limit an output is off."""
        found = self.errors[name]
        return max(found.error / found.cap, found.rule if self.ours else 0.0) if found.error == found.error else found.error

    @property
    def passed(self):
        return not self.blind and all(self.excess(name) <= 1 for name in self.errors)

    @property
    def blind(self):
        """Outputs of which the case can show nothing."""
        return [name for name, found in self.errors.items() if not found.shows]


def expect(formula, case, inputs):
    """What the oracle and the plain formula say about the compared blocks of a problem."""
    generator = torch.Generator(inputs[0].device).manual_seed(0)
    pairs = PAIRS[inputs[0].device.type]
    rounds = [expect_round(formula, case, inputs, chosen, generator) for chosen in rounds_of_blocks(formula, case, pairs)]
    return Expected(rounds, formula.precision(case))


def expect_round(formula, case, inputs, chosen, generator):
    names, group = [*formula.inputs(case), *formula.rows, *formula.parameters], case.heads // case.kv_heads
    do = torch.zeros(*case.output_shape[:3], formula.columns(case), device=inputs[0].device, dtype=inputs[0].dtype)
    parts, masks = {}, []
    for block in chosen:
        batch, heads = slice(block.batch, block.batch + 1), slice(block.kv_head * group, (block.kv_head + 1) * group)
        of_rows, of_keys = (batch, heads, block.rows), (batch, slice(block.kv_head, block.kv_head + 1), block.keys)
        places = {"o": of_rows}
        for name in names:
            of_queries = name.startswith("q") or name in formula.rows
            places[f"d{name}"] = (heads,) if name in formula.parameters else of_rows if of_queries else of_keys
        values = [tensor.detach()[places[f"d{name}"]] for name, tensor in zip(names, inputs, strict=True)]
        keep, clear = formula.selection(*[value.double() for value in values])
        clear = clear & (torch.arange(clear.shape[-1], device=clear.device) < block.counted)
        mask = formula.compared(clear, last=block.rows.stop == case.length)
        numbers = torch.randn(*clear.shape, do.shape[-1], generator=generator, device=do.device, dtype=do.dtype)
        block_do = numbers * mask
        do[of_rows] = block_do
        masks.append(mask)
        for name, found in results(formula, case, names, values, keep, mask, block_do).items():
            parts.setdefault(name, []).append(Part(places[name], *found))
    for name in [f"d{name}" for name in formula.parameters if f"d{name}" in parts]:
        parts[name] = [whole(parts[name], case.heads)]
    return Round(parts, masks, do)


def whole(parts, heads):
    """The gradient of a parameter of all heads: each batch element adds to it."""
    sums = [torch.zeros(heads, dtype=torch.float64, device=parts[0].exact.device) for _ in range(3)]
    for part in parts:
        for total, value in zip(sums, part[1:], strict=True):
            total[part.index] += value
    return Part((), *sums)


def rounds_of_blocks(formula, case, pairs):
    """Lists of Blocks, one for a key head of a batch element, spread evenly where there are more than the budget allows."""
    group, length, members = case.heads // case.kv_heads, case.length, case.batch * case.kv_heads
    least = length if formula.every_row else min(length, 16)
    most = max(POSITIONS, pairs // (group * least * seen_by(formula, least, length)))
    chosen = sorted({round(x) for x in torch.linspace(0, members - 1, min(members, most)).tolist()})
    rows = least
    while rows < length and group * len(chosen) * 2 * rows * seen_by(formula, 2 * rows, length) <= pairs:
        rows *= 2
    rows, random = min(rows, length), torch.Generator().manual_seed(0)
    rounds = 1 if rows == length else -(-POSITIONS // len(chosen))
    return [
        [
            block_at(formula, divmod(member, case.kv_heads), rows, length, position % POSITIONS, random)
            for position, member in enumerate(chosen, first * len(chosen))
        ]
        for first in range(rounds)
    ]


def block_at(formula, member, rows, length, position, random):
    """The Block of (batch, kv_head) whose rows are the last, the first, across the edge of a tile, or random."""
    anywhere = int(torch.randint(length - rows + 1, (), generator=random))
    edge = min(max(anywhere // TILE * TILE - rows // 2, 0), length - rows)
    begin = (length - rows, 0, edge, anywhere)[position]
    end, sees_all = begin + rows, formula.left < 0 and formula.right < 0
    last = length if formula.right < 0 else min(length, end + formula.right)
    first = 0 if formula.left < 0 else max(0, begin - formula.left)
    # The formula takes its queries for the last positions of its keys: those that follow come along, uncounted.
    return Block(*member, slice(begin, end if sees_all else last), slice(first, last), rows)


def seen_by(formula, rows, length):
    """The most keys that a block of rows sees."""
    return length if formula.left < 0 or formula.right < 0 else min(length, rows + formula.left + formula.right)


def results(formula, case, names, values, keep, mask, do):
    """{name: (exact, plain, scale)} of the output of a block and, where the case has a backward, of its gradients."""
    parameters, rows, dtype = set(formula.parameters), mask.shape[2], formula.precision(case)

    def by_row(values):
        """The values with a number for each row, and with it a gradient for each row, in a parameter."""
        return [v[:, None].repeat(1, rows) if name in parameters else v for name, v in zip(names, values, strict=True)]

    def outputs(run, values):
        leaves = [value.detach().requires_grad_(case.backward) for value in values]
        o = run(*leaves)
        found = {"o": o.detach() * mask}
        if case.backward:
            gradients = torch.autograd.grad(o, leaves, do.to(o.dtype))
            found |= {f"d{name}": gradient for name, gradient in zip(names, gradients, strict=True)}
        return found

    def plain(*inputs):
        return formula.plain(*inputs, keep=keep)

    exact = outputs(formula.oracle, [value.double() for value in values])
    coarse = outputs(plain, by_row([value.float() for value in values]))
    of_rows = outputs(plain, by_row([value.double() for value in values])) if parameters and case.backward else {}
    found = {}
    for name, value in exact.items():
        if name[1:] in parameters:
            scale = of_rows[name].abs().sum(-1)
            of_sum = torch.finfo(torch.float32).eps * scale  # the sum over rows rounds, too
            found[name] = value, value + (coarse[name] - of_rows[name]).square().sum(-1).sqrt() + of_sum, scale
        else:
            found[name] = value, coarse[name].to(dtype), value.abs()
    return found


def outputs_of(run, inputs, expected, ours):
    """[{name: value}], for each round the output of a provider and, where the case has a backward, its gradients.

    A baseline may leave a parameter constant, we may not.
    """
    o, found = run(*inputs), []
    for each in expected.rounds:
        names = [name for name in each.parts if name != "o"]
        again = {"retain_graph": each is not expected.rounds[-1], "allow_unused": not ours}
        gradients = torch.autograd.grad(o, inputs, each.do.to(o.dtype), **again) if names else ()
        pairs = zip(names, gradients, strict=True)
        found.append({"o": o.detach(), **{name: gradient for name, gradient in pairs if gradient is not None}})
    return found


def check(expected, found, ours):
    """The Check of what `outputs_of` found."""
    errors = {name: compare(expected, name, [values[name] for values in found]) for name in found[0]}
    compared = [mask.any(-1) for each in expected.rounds for mask in each.compared]
    return Check(errors, sum(rows.numel() for rows in compared), sum(int((~rows).sum()) for rows in compared), ours)


def changed(first, last):
    """Names of what differs, in any bit, between two results of `outputs_of`."""
    return [name for name in first[0] if not all(torch.equal(a[name], b[name]) for a, b in zip(first, last, strict=True))]


def compare(expected, name, actual):
    """The Error of an output, over all rounds. actual: its value in each of them."""
    cap = CAPS[expected.dtype]
    largest, squares = torch.zeros(3, 2, dtype=torch.float64).unbind(1)  # of the error, of the plain formula's, of the scale
    for each, value in zip(expected.rounds, actual, strict=True):
        for part, mask in zip(each.parts[name], each.compared, strict=False):
            found = value[part.index].double()
            if name == "o":
                found = found * mask
            for index, x in enumerate((found - part.exact, part.plain.double() - part.exact, part.scale)):
                largest[index] = torch.maximum(largest[index], x.abs().max().cpu())
                squares[index] += x.square().sum().cpu()
    norms = squares.sqrt()
    if not norms[2]:
        return Error(norms[0].item(), cap, 0.0 if not norms[0] else float("inf"))
    error, plain, _ = (norms / norms[2]).tolist()
    by_largest = (largest[0] / LARGEST.of(largest[1], largest[2], largest[2], expected.dtype)).item()
    allowed = FROBENIUS.of(plain, 1, 1, expected.dtype)
    return Error(error, cap, max(by_largest, error / allowed), allowed <= cap)
