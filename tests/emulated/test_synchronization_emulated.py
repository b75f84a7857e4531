"""Selective synchronization attention in CUDA C++ without a GPU, in the emulation."""

import math

import pytest
import torch
from emulated import Conditions, Extension, Guarded, build, launch, through_the_operator
from harness import Sample, randn
from samples.synchronization import check, differences, evaluate, op_arguments, parameters

from nearfar import _cuda

pytestmark = pytest.mark.full

WIDTH, CELL = 64, 64
ROWS, GRAD_ROWS, MEMBERS = 192, 128, 24  # kSynchronizationRows, kSynchronizationGradRows, kSynchronizationMembers
FLOOR = 0.1  # grad_floor: the allowed 4 eps of the terms do not cover the factor 1 / S^2 at the lock boundary


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    names = ["synchronization_forward", "synchronization_backward"]
    return build(tmp_path_factory.mktemp("emulated"), synchronization__synchronization=names)


# Copies that land at once, with products that read late, and the other way round; each in another order of lanes.
# One block takes all spans, or several share them.
ALL_CONDITIONS = (Conditions(device=0), Conditions(late_copies=True, seed=1))

SAMPLES = {
    "clusters": dict(length=330, heads=1, clusters=3),
    "ragged": dict(length=150, spread=0.08),
    "whole tiles": dict(length=384, heads=1, spread=0.04),
    "about half lock": dict(length=70, batch=2, spread=0.12),
    "one token": dict(length=1),
    "causal": dict(length=210, heads=1, causal=True, spread=0.08),
}


def make(dtype, length, batch=1, heads=2, clusters=1, of_cells=None, spread=0.05, **options):
    """Tokens around centres that are too far apart to lock; those of a cell of 64 share one.

    of_cells: the cluster of each cell; None: in turn.
    """
    of_cells = range(clusters) if of_cells is None else of_cells
    cluster = torch.tensor(of_cells)[torch.arange(length) // CELL % len(of_cells)]
    centre = 2.0 * randn(max(of_cells) + 1, WIDTH, seed=3, device="cpu")[cluster]
    tensors = {
        "omega": (0.3 * centre + spread * randn(batch, heads, length, WIDTH, seed=1, device="cpu")).to(dtype),
        "v": randn(batch, heads, length, WIDTH, dtype=dtype, seed=2, device="cpu"),
    }
    rows = (batch, heads, length) if options.get("causal") else (batch, heads)
    return Sample(tensors | parameters(rows, device="cpu"), {"grad_floor": FLOOR, **options})


def cells_of(sample, rows, everything):
    """(lists, counts) for tiles of this many rows: cells with a pair that locks or, with `everything`, all; not later ones.

    An entry also tells which cells of the tile have such a pair.
    """
    t, causal = sample.tensors, sample.options.get("causal")
    w, length = t["omega"].double(), t["omega"].shape[2]
    tiles, cells = -(-length // rows), -(-length // CELL)
    delta2 = differences(w, w)
    radius = (t["coupling"] * (t["order"][..., None] if causal else t["order"][..., None, None])).double()
    apart = (-2 * t["bandwidth"][:, None, None] * delta2).exp() * 1.01 + 1e-3 <= delta2 / radius**2  # NaN skips nothing
    lists = torch.full((*w.shape[:2], tiles, cells), -1, dtype=torch.int32)
    counts = torch.zeros(w.shape[:2] + (tiles,), dtype=torch.int32)
    for b, h, tile, cell in torch.cartesian_prod(*map(torch.arange, lists.shape)).reshape(-1, 4).tolist():
        theirs = slice(cell * CELL, (cell + 1) * CELL)
        members = 0
        for member, first in enumerate(range(tile * rows, min((tile + 1) * rows, length), CELL)):
            seen = not causal or cell * CELL < first + CELL
            if seen and (everything or not apart[b, h, first : first + CELL, theirs].all()):
                members |= 1 << member
        if members:
            lists[b, h, tile, counts[b, h, tile]] = cell | members << MEMBERS
            counts[b, h, tile] += 1
    return {"lists": lists, "counts": counts, "counter": torch.full((1,), -1, dtype=torch.int32)}


def given(sample, guarded):
    t = sample.tensors
    squares = t["omega"].float().square().sum(-1)
    radius = t["coupling"] * t["order"]
    c = (radius if radius.dim() == 3 else radius[..., None]).pow(-2).float().expand(squares.shape)
    numbers = dict(squares=squares, c=c.contiguous(), bandwidth=t["bandwidth"])
    copies = {name: guarded.empty(x.shape, x.dtype).copy_(x) for name, x in numbers.items()}
    return copies | {name: guarded.copy(t[name]) for name in ("omega", "v")}


def sizes(omega):
    return dict(batches=omega.shape[0], heads=omega.shape[1], num_tokens=omega.shape[2], bandwidth_stride=1)


def dtype_of(sample):
    return str(sample.tensors["omega"].dtype).removeprefix("torch.")


def forward(kernels, sample, conditions, everything=False):
    guarded = Guarded(poison=conditions.seed)
    tensors, causal = given(sample, guarded), bool(sample.options.get("causal"))
    omega = tensors["omega"]
    found = dict(o=guarded.copy(torch.full_like(omega, math.nan)), total=guarded.empty(omega.shape[:3], torch.float32))
    tensors |= cells_of(sample, ROWS, everything)
    kernel = kernels["synchronization_forward"]
    launch(kernel, dtype_of(sample), tensors | found, conditions, causal=causal, **sizes(omega))
    guarded.assert_intact()
    return found


def backward(kernels, sample, do, o, total, conditions, everything=False):
    guarded = Guarded(poison=conditions.seed)
    tensors = given(sample, guarded)
    omega = tensors["omega"]
    inverse = 1 / (total + 1e-8)
    rows = dict(inverse=inverse, shift=(o.float() * do.float()).sum(-1) * inverse)
    tensors |= {name: guarded.empty(x.shape, x.dtype).copy_(x) for name, x in rows.items()} | {"grad_o": guarded.copy(do)}
    found = {name: guarded.copy(torch.full_like(omega, math.nan)) for name in ("dw", "dv")}
    found |= {name: guarded.empty(omega.shape[:3], torch.float32) for name in ("dalpha", "dradius")}
    tensors |= cells_of(sample, GRAD_ROWS, everything)
    floor = sample.options["grad_floor"]
    launch(
        kernels["synchronization_backward"], dtype_of(sample), tensors | found, conditions,
        grad_floor=floor, **sizes(omega),
    )
    guarded.assert_intact()
    return found


def gradients(sample, found):
    coupling, bandwidth, order = (sample.tensors[name] for name in ("coupling", "bandwidth", "order"))
    of_radius, of_bandwidth = found["dradius"].sum(2), found["dalpha"].sum((0, 2))
    return {
        "omega": found["dw"], "v": found["dv"], "coupling": (of_radius * order).sum(),
        "bandwidth": of_bandwidth if bandwidth.numel() > 1 else of_bandwidth.sum().reshape(1), "order": of_radius * coupling,
    }


def same(first, second, what):
    for name, x in first.items():
        assert torch.equal(x, second[name]), f"{name} {what}"


def backward_of(kernels, sample, conditions, everything=False, do=None):
    do = randn(*sample.tensors["omega"].shape, dtype=torch.float16, seed=9, device="cpu") if do is None else do
    o, total = forward(kernels, sample, conditions, everything).values()
    return dict(o=o, total=total) | backward(kernels, sample, do, o, total, conditions, everything)


def met_by_members(sample, rows):
    """Whether each cell of a tile meets those of its list, as strings: of 1 and 0."""
    lists, counts, _ = (x.flatten(0, 1)[0].tolist() if x.dim() > 2 else x for x in cells_of(sample, rows, False).values())
    for entries, count in zip(lists, counts, strict=True):
        for member in range(rows // CELL):
            yield "".join(str(entry >> MEMBERS + member & 1) for entry in entries[:count])


def test_pruning_changes_no_bit(kernels):
    """Groups pass by the first of their tile's cells, the last, every other, and more than there are slots in the ring."""
    sample = make(torch.float16, 14 * CELL, heads=1, of_cells=(0, *[1] * 9, 0, 1, 0, 1))
    for rows in (ROWS, GRAD_ROWS):
        met = f" {' '.join(met_by_members(sample, rows))} "
        assert all(pattern in met for pattern in (" 01", "10 ", "0101", "1000000000"))
    full = backward_of(kernels, sample, Conditions(), everything=True)
    for conditions in ALL_CONDITIONS:
        same(backward_of(kernels, sample, conditions), full, "changes when nothing is pruned")


def test_tiles_that_meet_nothing(kernels, monkeypatch):
    """Lists made by hand, empty ones or of cells that no group meets: rows get zeros, but for a token's own share of dv."""
    sample = make(torch.float16, heads=3, length=150)
    original = cells_of

    def without(*arguments):
        lists = original(*arguments)
        lists["counts"][:, 1] = 0
        lists["lists"][:, 2] &= (1 << MEMBERS) - 1
        return lists

    monkeypatch.setitem(globals(), "cells_of", without)
    do = randn(*sample.tensors["omega"].shape, dtype=torch.float16, seed=9, device="cpu")
    found = backward_of(kernels, sample, Conditions(device=0, seed=2), do=do)
    for name, x in found.items():
        assert x[:, 0].isfinite().all() and x[:, 0].abs().max() > 0, name
        assert name == "dv" or x[:, 1:].abs().max() == 0, name
    torch.testing.assert_close(found["dv"][:, 1:], do[:, 1:] * 1e8, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "value"), [("omega", math.nan), ("omega", math.inf), ("v", math.nan), ("order", math.nan)])
def test_broken_inputs_reach_the_outputs_of_their_head_alone(kernels, name, value):
    sample = make(torch.float16, length=90)
    token = 77  # not the token whose numbers are tested for its cell
    sample.tensors[name][(0, 1, token, 5)[: sample.tensors[name].dim()]] = value
    found = backward_of(kernels, sample, Conditions())
    assert found["o"][:, 1].isnan().any(-1).all()
    for which, x in found.items():
        assert x[:, 0].isfinite().all(), which
        if name != "v" or which not in ("total", "dv"):  # which do not depend on v
            assert not x[:, 1].isfinite().all(), which


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SAMPLES)
def test_against_the_oracle(kernels, name, dtype):
    sample = make(dtype, **SAMPLES[name])
    do = randn(*sample.tensors["omega"].shape, dtype=dtype, seed=9, device="cpu")
    runs = [forward(kernels, sample, conditions) for conditions in ALL_CONDITIONS]
    same(*runs, "depends on the order")
    o, total = runs[0].values()
    if sample.options.get("causal"):  # its gradients are Triton's
        check(sample, do, o, {}, names=())
        return
    runs = [backward(kernels, sample, do, o, total, conditions) for conditions in ALL_CONDITIONS]
    same(*runs, "depends on the order")
    check(sample, do, o, gradients(sample, runs[0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_parameters_do_not_take_what_o_lost_by_rounding(kernels, dtype):
    """Values with a common part, which cancels from gradients but for that rounding, many times the rule's share of them."""
    sample = make(dtype, length=70, spread=0.08)
    sample.tensors["v"] += 8
    do = randn(*sample.tensors["omega"].shape, dtype=dtype, seed=9, device="cpu")
    o, total = forward(kernels, sample, Conditions()).values()
    found = gradients(sample, backward(kernels, sample, do, o, total, Conditions()))
    _, exact, _ = evaluate(sample, torch.float64, differences, do)
    for name in ("coupling", "bandwidth", "order"):
        error = (found[name] - exact[name]).norm() / exact[name].norm()
        assert error < 1e-4, f"the gradient of {name} is off by {error:.1e}"


@pytest.mark.parametrize(
    ("causal", "layout", "backends"),
    [
        (False, "tokens before heads", ("cuda", "cuda")),
        (False, "tokens before heads", ("cuda", "triton")),
        (False, "off by eight bytes", ("triton", "cuda")),
        (True, "off by eight bytes", ("cuda", "cuda")),  # gradients by Triton's kernels all the same
    ],
    ids=str,
)
def test_through_the_operator(causal, layout, backends, kernels, monkeypatch):
    """Arguments arrive where they belong, and either backward takes what either forward saves."""
    constants = dict(SYNCHRONIZATION_ROWS=ROWS, SYNCHRONIZATION_GRAD_ROWS=GRAD_ROWS, SYNCHRONIZATION_MEMBERS=MEMBERS)
    monkeypatch.setattr(_cuda, "extension", Extension(kernels, **constants))
    monkeypatch.setattr(_cuda, "stream_of", lambda tensor: 0)
    sample = make(torch.float16, length=150, batch=2, **(dict(causal=True) if causal else {}))
    operator = torch.ops.nearfar.synchronization_attention
    check(sample, *through_the_operator(operator, op_arguments, sample, layout, backends))
