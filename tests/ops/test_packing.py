"""Packed sequences: the tables that kernels read, and what is said of ends that do not fit."""

import itertools

import pytest
import samples
import torch
from harness import DEVICE, randn
from nearfar.triton_kernels import packing
from samples import public

import nearfar as nf
from nearfar.registry import OPERATORS

GOOD = [[0, 6], [0, 2, 6], [0, 0, 3, 3, 6, 6], [0, 1, 2, 3, 4, 5, 6], [0, *range(1, 601)], [0, 130, 257, 257, 700]]
INVALID = {
    "not from 0": ([1, 6], "^cu_seqlens must start at 0"),
    "too short": ([0, 5], "^cu_seqlens must .* end at 6"),
    "too long": ([0, 7], "^cu_seqlens must .* end at 6"),
    "that decrease": ([0, 4, 2, 6], "^cu_seqlens .*never decrease"),
    "huge": ([0, 2**31 - 1, -(2**31), 6], "^cu_seqlens .*never decrease"),
}
each_invalid = pytest.mark.parametrize("ends, message", INVALID.values(), ids=list(INVALID))
PACKED = [
    pytest.param(operator, name, id=f"{operator.function.__name__}-{name}")
    for operator in OPERATORS
    if operator.room != "diagnostics"
    for name in samples.names(operator)
    if "cu_seqlens" in (options := samples.of(operator).make(name, torch.float32, length=21).options)
    and "cu_seqlens_k" not in options
]


def int32(ends):
    return torch.tensor(ends, dtype=torch.int32, device=DEVICE)


def filled(launches, *tables):
    """The tables after the launches, the last rows of larger ones of -7."""
    guarded = [torch.full((table.numel() + 100,), -7, dtype=torch.int32, device=DEVICE) for table in tables]
    for launch, given in launches:
        launch(*given[: len(given) - len(tables)], *guarded)
    for table, guard in zip(tables, guarded, strict=True):
        assert (guard[table.numel() :] == -7).all(), "written beyond the table"
        table.copy_(guard[: table.numel()].view(table.shape))
    return [table.tolist() for table in tables]


@pytest.mark.parametrize("ends", GOOD, ids=lambda ends: f"{len(ends) - 1} sequences")
def test_bounds_are_those_of_each_tokens_sequence(ends):
    bounds, launches = packing.bounds_launches(int32(ends), ends[-1])
    expected = [(a, b, 0) for a, b in zip(ends, ends[1:], strict=False) for _ in range(a, b)]
    assert filled(launches, bounds)[0] == [list(side) for side in zip(*expected, strict=True)]


@pytest.mark.parametrize("ends", GOOD, ids=lambda ends: f"{len(ends) - 1} sequences")
def test_bounds_of_other_targets(ends):
    """Sequence i has i % 3 targets more or less than tokens."""
    targets = [0]
    for i, (a, b) in enumerate(itertools.pairwise(ends)):
        targets.append(targets[-1] + max(0, b - a + i % 3 - 1))
    bounds, launches = packing.bounds_launches(int32(ends), ends[-1], int32(targets), targets[-1])
    pairs = zip(itertools.pairwise(ends), itertools.pairwise(targets), strict=True)
    expected = [(*of_targets, of_targets[1] - b) for (a, b), of_targets in pairs for _ in range(a, b)]
    assert filled(launches, bounds)[0] == [list(row) for row in zip(*expected, strict=True)]


@pytest.mark.parametrize("length", [1, 4, 128])
@pytest.mark.parametrize("ends", GOOD, ids=lambda ends: f"{len(ends) - 1} sequences")
def test_pieces_cut_each_sequence(ends, length):
    num_pieces = ends[-1] // length + len(ends) - 1
    expected, first = [], [0]
    for sequence, (a, b) in enumerate(zip(ends, ends[1:], strict=False)):
        expected += [(begin, min(begin + length, b), sequence, a, b) for begin in range(a, b, length)]
        first.append(len(expected))
    pieces, first_pieces, launches = packing.piece_launches(int32(ends), ends[-1], num_pieces, length)
    found, found_first = filled(launches, pieces, first_pieces)
    assert found_first == first
    assert list(zip(*found, strict=True))[: len(expected)] == expected
    assert all(begin == end for begin, end in zip(found[0][len(expected) :], found[1][len(expected) :], strict=True))


@each_invalid
def test_invalid_ends_stay_inside(ends, message):
    """Whatever they are: bounds hold the token, or nothing, and pieces and their counts fit the tables."""
    bounds, launches = packing.bounds_launches(int32(ends), 6)
    for token, (begin, end, ahead) in enumerate(zip(*filled(launches, bounds)[0], strict=True)):
        assert ahead == 0 and ((begin, end) == (0, 0) or 0 <= begin <= token < end <= 6)
    for length in (1, 4):
        num_pieces = 6 // length + len(ends) - 1
        pieces, first_pieces, launches = packing.piece_launches(int32(ends), 6, num_pieces, length)
        (begin, end, sequence, first, last), counts = filled(launches, pieces, first_pieces)
        assert all(0 <= a <= b <= 6 for a, b in zip(begin, end, strict=True))
        assert all(0 <= x < len(ends) - 1 for x in sequence) and all(0 <= x <= 6 for x in (*first, *last))
        assert counts == sorted(counts) and counts[0] == 0 and counts[-1] <= num_pieces


@each_invalid
def test_the_check_that_waits(ends, message):
    with pytest.raises(ValueError, match=message):
        nf.check_cu_seqlens(int32(ends), 6)


def test_the_check_of_other_things():
    nf.check_cu_seqlens(int32([0, 2, 2, 6]), 6)
    with pytest.raises(TypeError, match="^cu_seqlens must be an int32 tensor, got list"):
        nf.check_cu_seqlens([0, 6], 6)
    with pytest.raises(ValueError, match="^cu_seqlens must have shape"):
        nf.check_cu_seqlens(int32([0]), 6)


@pytest.mark.skipif(DEVICE != "cpu", reason="on CUDA the ends are not read back")
@pytest.mark.parametrize("backend", ["triton", "reference"])
@each_invalid
@pytest.mark.parametrize("operator, name", PACKED)
def test_ends_on_a_cpu_are_checked_in_every_call(operator, name, ends, message, backend):
    sample = samples.of(operator).make(name, torch.float32, length=21)
    good = sample.options["cu_seqlens"]
    bad = int32([*ends[:-1], {6: 21, 5: 20, 7: 22}[ends[-1]]])
    call = public(operator)
    state = {} if "initial_state" not in sample.tensors else {
        "initial_state": randn(len(ends) - 1, *sample.tensors["initial_state"].shape[1:])
    }
    call(**sample.tensors, **sample.options, backend=backend)
    with pytest.raises(ValueError, match=message.replace("6", "21")):
        call(**sample.tensors | state, **sample.options | {"cu_seqlens": bad}, backend=backend)
    changed = good.clone()
    call(**sample.tensors, **sample.options | {"cu_seqlens": changed}, backend=backend)
    changed[-1] += 1
    with pytest.raises(ValueError, match="^cu_seqlens must .* end at 21"):
        call(**sample.tensors, **sample.options | {"cu_seqlens": changed}, backend=backend)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="on a CPU such ends are refused")
@each_invalid
@pytest.mark.parametrize("operator, name", PACKED)
def test_invalid_ends_on_a_gpu_hurt_nobody(operator, name, ends, message):
    """Neither an illegal access, in either direction, nor another call."""
    sample = samples.of(operator).make(name, torch.float32, length=21)
    call, bad = public(operator), int32([*ends[:-1], {6: 21, 5: 20, 7: 22}[ends[-1]]])
    tensors = {n: x.detach().requires_grad_() for n, x in sample.tensors.items() if n != "initial_state"}
    expected = call(**sample.tensors, **sample.options, backend="triton")
    o = call(**tensors, **sample.options | {"cu_seqlens": bad}, backend="triton")
    o = o[0] if isinstance(o, tuple) else o
    torch.autograd.grad(o, list(tensors.values()), torch.ones_like(o), allow_unused=True)
    torch.cuda.synchronize()
    again = call(**sample.tensors, **sample.options, backend="triton")
    assert torch.equal(*(x[0] if isinstance(x, tuple) else x for x in (expected, again)))
