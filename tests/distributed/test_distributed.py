"""Operators on shards of a sequence, in 1, 2 and 4 processes, beside one process: results and gradients."""

import pytest
import torch
from compare import error

import nearfar as nf

EXACT = 1e-12  # in float64


def check(pool, count, *arguments, tolerance=EXACT):
    for rank, errors in enumerate(pool(count, error, *arguments)):
        assert errors and all(found <= tolerance for found in errors.values()), (rank, errors)


LENGTHS = [(12, 12), (16, 16), (5, 20), (8, 8, 8, 8), (0, 9, 0, 8), (3, 16, 1, 0)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("operator", ["linear_attention", "hadamard_attention"])
@pytest.mark.parametrize("causal", [False, True])
def test_states(pool, operator, causal, lengths):
    options = {"causal": causal, "feature_map": "softplus" if causal else "elu", "normalize": lengths != (16, 16)}
    check(pool, len(lengths), operator, lengths, torch.float64, options)


@pytest.mark.parametrize("operator", ["linear_attention", "hadamard_attention"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(32,), (16, 8), (8, 16, 0, 5)], ids=str)
def test_states_in_and_out(pool, operator, causal, lengths):
    options = {"causal": causal, "return_state": True}
    check(pool, len(lengths), operator, lengths, torch.float64, options, {"state": True})


WINDOWS = [(3, 0), (0, 0), (0, 4), (5, 2), (30, 1), (-1, 0), (-1, -1), (2, -1), (-1, 3)]


@pytest.mark.parametrize("lengths", [(13, 13), (5, 20), (8, 1, 0, 9)], ids=str)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("operator", ["krause_attention", "softmax_attention", "affine_attention"])
def test_windows(pool, operator, window, lengths):
    options = {"locality": nf.SlidingWindow(*window)}
    if operator == "krause_attention" and window[0] > 0:
        options["top_k"] = 3
    check(pool, len(lengths), operator, lengths, torch.float64, options, {"sink": operator == "affine_attention"})
