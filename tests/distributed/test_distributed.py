"""Operators on shards of a sequence, in 1, 2 and 4 processes, beside one process: results and gradients."""

import numpy
import pytest
import torch
from compare import arrays, beside_fsdp, error, example_losses, mismatched, over_a_mesh, twice

import nearfar as nf
from nearfar.distributed.exchange import after, before, tree

EXACT = 1e-12  # in float64


def check(pool, operator, lengths, options, make=None, dtype=torch.float64, tolerance=EXACT):
    for rank, errors in enumerate(pool(len(lengths), error, operator, lengths, dtype, options, make)):
        assert all(found <= tolerance for found in errors.values()), (rank, errors)
        assert errors or not lengths[rank]


@pytest.mark.parametrize("operator", ["linear_attention", "hadamard_attention"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(16, 16), (8, 16, 0, 5)], ids=str)
def test_states(pool, operator, causal, lengths):
    options = {"causal": causal, "feature_map": "softplus" if causal else "elu", "normalize": operator != "linear_attention"}
    check(pool, operator, lengths, options)


@pytest.mark.parametrize("operator", ["linear_attention", "hadamard_attention"])
@pytest.mark.parametrize("causal", [False, True])
def test_states_in_and_out(pool, operator, causal):
    options = {"causal": causal, "return_state": True}
    for lengths in ((16,), (5, 8)) if causal else ((3, 16),):
        check(pool, operator, lengths, options, {"state": True})


def test_a_function_as_feature_map(pool):
    check(pool, "linear_attention", (8, 5), {"causal": True, "feature_map": torch.nn.functional.softplus})


# The window, and shards that it crosses: several where they are short, and an empty one.
EVEN, UNEVEN = (13, 13), (8, 1, 0, 9)
WINDOWS = [
    ("krause_attention", (3, 0), EVEN),
    ("krause_attention", (5, 2), UNEVEN),
    ("krause_attention", (-1, -1), EVEN),
    ("affine_attention", (0, 0), EVEN),
    ("affine_attention", (12, 0), UNEVEN),
    ("affine_attention", (-1, 0), UNEVEN),
    ("affine_attention", (-1, -1), UNEVEN),
    ("affine_attention", (-1, 3), EVEN),
    ("softmax_attention", (0, 4), UNEVEN),
    ("softmax_attention", (2, -1), EVEN),
]


@pytest.mark.parametrize(("operator", "window", "lengths"), WINDOWS, ids=str)
def test_windows(pool, operator, window, lengths):
    options = {"locality": nf.SlidingWindow(*window)}
    if operator == "krause_attention":
        options["top_k"] = 3
    check(pool, operator, lengths, options, {"sink": operator == "affine_attention"})


@pytest.mark.parametrize("operator", ["krause_attention", "affine_attention", "linear_attention", "hadamard_attention"])
@pytest.mark.parametrize("ends", [(0, 2, 2, 11, 18), (0, 8, 18)], ids=str)
def test_packed_sequences_cross_ranks(pool, operator, ends):
    windowed = operator in ("krause_attention", "affine_attention")
    options = {"locality": nf.SlidingWindow(5, 1)} if windowed else {"causal": True}
    options["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32)
    check(pool, operator, UNEVEN, options, {"batch": 1})


@pytest.mark.parametrize("causal", [False, True])
def test_synchronization(pool, causal):
    check(pool, "synchronization_attention", UNEVEN, {"causal": causal}, {"by_token": causal})
    check(pool, "order_parameter", UNEVEN, {"causal": causal})


def test_statistics(pool):
    check(pool, "attention_statistics", UNEVEN, {"causal": True})
    check(pool, "attention_statistics", EVEN, {"sigma": 1.5})


@pytest.mark.parametrize(
    ("operator", "options"),
    [("linear_attention", {"causal": True}), ("krause_attention", {"locality": nf.SlidingWindow(5, 2)})],
)
def test_kernels(pool, operator, options):
    make = {"width": 16, "value_width": 16, "batch": 1}
    check(pool, operator, (16, 8), {**options, "backend": "triton"}, make, torch.float32, 2e-6)


def bits(pool, operator, options, make, total):
    """For 1, 2 and 4 ranks, {name: array}: whole results and gradients."""
    found = []
    for count in (1, 2, 4):
        lengths = (total // count,) * count
        ranks = pool(count, arrays, operator, lengths, torch.float32, options, make)
        found.append({name: numpy.concatenate([rank[name] for rank in ranks], 2) for name in ranks[0]})
    return found


@pytest.mark.parametrize("operator", ["linear_attention", "hadamard_attention"])
@pytest.mark.parametrize("causal", [False, True])
def test_states_have_the_same_bits_on_any_number_of_ranks(pool, operator, causal):
    first, *others = bits(pool, operator, {"causal": causal}, {"batch": 1}, 64)
    for other in others:
        for name in first:
            assert numpy.array_equal(first[name], other[name]), name


@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
def test_trees_over_ranks_add_as_one_tree(ranks):
    torch.manual_seed(0)
    leaves, start = torch.randn(16, 5), torch.randn(5)
    levels = tree(leaves)
    of_ranks = [tree(x) for x in leaves.chunk(ranks)]
    over_ranks = tree(torch.stack([x[-1][0] for x in of_ranks]))
    assert torch.equal(over_ranks[-1], levels[-1])
    for walk, others in ((before, torch.tril), (after, torch.triu)):
        whole = walk(start, levels)
        weights = others(torch.ones(16, 16, dtype=torch.float64), -1 if walk is before else 1)
        torch.testing.assert_close(whole.double(), start.double() + weights @ leaves.double(), atol=1e-5, rtol=1e-5)
        parts = [walk(own, x) for own, x in zip(walk(start, over_ranks), of_ranks, strict=True)]
        assert torch.equal(torch.cat(parts), whole)


def test_a_tree_of_any_number_of_leaves():
    leaves = torch.arange(1.0, 7.0)[:, None]
    levels = tree(leaves)
    assert [len(level) for level in levels] == [8, 4, 2, 1] and levels[-1].item() == 21
    assert before(torch.ones(1), levels)[:6, 0].tolist() == [1, 2, 4, 7, 11, 16]
    assert after(torch.ones(1), levels)[:6, 0].tolist() == [21, 19, 16, 12, 7, 1]


def test_outputs_of_windows_have_the_same_bits_on_any_number_of_ranks(pool):
    """Shards of whole tiles. Keys that several ranks see add up otherwise."""
    make = {"batch": 1, "width": 4}
    first, *others = bits(pool, "softmax_attention", {"locality": nf.SlidingWindow(70, 3)}, make, 512)
    for other in others:
        for name in first:
            bound = 1e-7 * abs(first[name]).max() if name in ("dk", "dv") else 0
            assert abs(first[name] - other[name]).max() <= bound, name


MISMATCHES = {
    "operators": {"operator": "softmax_attention"},
    "dtypes of tensors": {"dtype": torch.float64},
    "shapes of tensors": {"shapes": {"v": (1, 2, 8, 4)}},
    "options": {"options": {"eps": 0.5}},
    "tensors that require gradients": {"tracked": True},
    "lengths of shards": {"shapes": {"q": (1, 2, 9, 4), "k": (1, 2, 9, 4), "v": (1, 2, 9, 3)}},
}


@pytest.mark.parametrize("what", MISMATCHES)
def test_every_rank_raises_where_ranks_disagree(pool, what):
    for kind, message in pool(2, mismatched, "linear_attention", MISMATCHES[what]):
        assert kind == "ValueError" and f"ranks disagree on {what}: ranks [1] differ from rank 0" in message


def test_every_rank_raises_where_one_has_arguments_that_do_not_fit(pool):
    changes = {"shapes": {"k": (1, 3, 8, 4)}}
    others, own = pool(2, mismatched, "softmax_attention", changes)
    assert own == ("ValueError", "v must have the heads and length of k, (3, 8), got (2, 8)")
    assert others == (
        "ValueError", "softmax_attention: the arguments of ranks [1] of the group do not fit; those ranks say why"
    )


@pytest.mark.parametrize("lengths", [(8, 9), (8,), (8, -1)], ids=str)
def test_lengths_must_be_those_of_the_shards(pool, lengths):
    for kind, message in pool(2, mismatched, "softmax_attention", {}, lengths):
        assert kind in ("ValueError", "TypeError") and "lengths" in message or "of ranks [1]" in message


def test_a_mesh_of_one_dimension_is_a_group(pool):
    for difference, message in pool(4, over_a_mesh):
        assert difference == 0 and message == "group must be a DeviceMesh of one dimension, got 2; take a slice of it"


def test_the_example_trains_alike_on_two_processes(pool):
    (alone,), together = pool(1, example_losses, 12), pool(2, example_losses, 12)
    assert alone[-1] < alone[0] - 0.1
    for losses in together:
        assert losses == pytest.approx(alone, rel=1e-4)


def test_a_model_beside_fsdp(pool):
    for errors in pool(4, beside_fsdp):
        assert len(errors) > 10 and max(errors.values()) < 1e-5, errors


def test_a_second_derivative_is_refused(pool):
    for message in pool(2, twice):
        assert "once_differentiable" in message


def test_without_process_groups():
    with pytest.raises(ValueError, match=r"torch\.distributed\.init_process_group"):
        nf.distributed.linear_attention(*torch.randn(3, 1, 1, 4, 4))
