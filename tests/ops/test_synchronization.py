"""Selective synchronization attention: fuzz, pruning, the lock boundary, sorting, the order parameter, isolation, bad input.

What every operator promises is tested on its samples in test_operators.py; the oracle is in samples/synchronization.py.
"""

import math

import pytest
import torch
from harness import DEVICE, DTYPES, Sample, assert_same, generator, like, randn, run
from nearfar.triton_kernels import launch as launch_module
from nearfar.triton_kernels import synchronization_launch as launchers
from samples.synchronization import check, differences, parameters

import nearfar as nf

pytestmark = pytest.mark.full

BACKENDS = ("triton", "reference")
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def random_sample(dtype=torch.float32, length=70, heads=2, width=16, scale=None, by_token=False, seed=1, **options):
    """Frequencies of which about half of the pairs lock."""
    scale = width**-0.5 if scale is None else scale
    tensors = {
        "omega": scale * randn(1, heads, length, width, dtype=dtype, seed=seed),
        "v": randn(1, heads, length, 16, dtype=dtype, seed=seed + 1),
    }
    return Sample(tensors | parameters((1, heads, length) if by_token else (1, heads), seed=seed + 2), options)


def run_sample(sample, do=None, backend="triton"):
    return run(nf.synchronization_attention, sample, do, backend)


def changed(sample, **tensors):
    return Sample({**sample.tensors, **tensors}, sample.options)


# ---------------------------------------------------------------------------------------------------------- numbers


@each_backend
def test_random_frequencies_at_the_default_floor(backend):
    sample = random_sample(length=40)
    do = randn(1, 2, 40, 16, seed=9)
    check(sample, do, *run_sample(sample, do, backend))


@each_backend
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "top_k": 6}], ids=str)
def test_several_blocks(options, backend):
    """More tokens than a block of the reference or a cell of the kernels has."""
    sample = random_sample(length=150, heads=1, by_token=True, grad_floor=0.1, **options)
    do = randn(1, 1, 150, 16, seed=9)
    check(sample, do, *run_sample(sample, do, backend))


def test_queries_of_the_last_positions_decode_what_the_whole_sequence_gives():
    sample = random_sample(causal=True, by_token=True)
    omega, v, order = (sample.tensors[name] for name in ("omega", "v", "order"))
    whole = nf.synchronization_attention(**sample.tensors, causal=True, backend="triton")
    for count in (1, 3):
        last = changed(sample, omega=omega[:, :, -count:], order=order[:, :, -count:])
        o = nf.synchronization_attention(**last.tensors, omega_k=omega, causal=True, backend="triton")
        torch.testing.assert_close(o, whole[:, :, -count:], rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- pruning


def clustered(dtype=torch.float32, length=200, clusters=3, **options):
    """Runs of 64 tokens, each from one cluster; the clusters are apart by more than they can lock over and come by turns."""
    centre = 3 * randn(clusters, 16, seed=3)
    member = torch.arange(length) // 64 % clusters
    omega = (centre[member.to(DEVICE)] + 0.1 * randn(1, 2, length, 16, seed=4)).to(dtype)
    tensors = {"omega": omega, "v": randn(1, 2, length, 16, dtype=dtype, seed=5)}
    rows = (1, 2, length) if options.get("causal") else (1, 2)
    return Sample(tensors | parameters(rows), options)


def scaled(sample, factor):
    return changed(sample, omega=factor * sample.tensors["omega"])


def chain(length=200, step=0.03, **options):
    """Tokens along a line, each of which locks with its neighbours up to the lock radius and so with a part of a cell."""
    sample = clustered(length=length, **options)
    line = step * torch.arange(length, device=DEVICE)[:, None] * torch.nn.functional.normalize(randn(16, seed=6), dim=0)
    return changed(sample, omega=line + 0.001 * sample.tensors["v"])


class Spy:
    """Counts of cells that the kernels were told to walk; with `everything`, lock radii are infinite first."""

    def __init__(self, monkeypatch, everything):
        self.visited, self.possible = 0, 0
        original = launch_module.launch_all

        def launch_all(*launches):
            for made, tensors in launches:
                made(*tensors)
                name = made._kernel.__name__
                if everything and name == "survey":
                    tensors[-1][..., 2] = float("inf")
                if name == "neighbours":
                    lists, counts = tensors[-2:]
                    self.visited += int(counts.sum())
                    self.possible += lists.numel()

        monkeypatch.setattr(launch_module, "launch_all", launch_all if DEVICE == "cpu" else original)


@pytest.mark.skipif(DEVICE != "cpu", reason="looks between the launches, which the interpreter makes one by one")
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"top_k": 7}], ids=str)
def test_pruning_changes_no_bit(options, monkeypatch):
    sample = chain(**options)
    with monkeypatch.context() as patch:
        spy = Spy(patch, everything=False)
        pruned = run_sample(sample)
    with monkeypatch.context() as patch:
        full = Spy(patch, everything=True)
        dense = run_sample(sample)
    assert full.visited == full.possible if not options.get("causal") else full.visited > full.possible / 2
    assert spy.visited < 0.75 * full.visited
    assert_same(pruned, dense, "when nothing is pruned")


@pytest.mark.skipif(DEVICE != "cpu", reason="looks between the launches, which the interpreter makes one by one")
@pytest.mark.parametrize("sample, exact", [
    (scaled(clustered(length=200, clusters=3), 0.05), False),
    (scaled(clustered(length=200, clusters=3), 0.5), True),
    (chain(length=600, step=0.01), True),
    (chain(length=600, step=0.03), True),
], ids=["one cluster", "clusters", "chain", "long chain"])
def test_what_is_pruned_has_no_weight(sample, exact, monkeypatch):
    """Every pair of a cell outside the lists has S = 0 in float64. exact: and on a line no cell is visited in vain."""
    omega = sample.tensors["omega"]
    recorded = []
    original = launch_module.launch_all

    def record(*launches):
        original(*launches)
        recorded.extend(tensors[-2:] for made, tensors in launches if made._kernel.__name__ == "neighbours")

    monkeypatch.setattr(launch_module, "launch_all", record)
    nf.synchronization_attention(**sample.tensors, backend="triton")
    ((lists, counts),) = recorded
    size = launchers.CELL
    cells = -(-omega.shape[2] // size)
    tile = -(-cells // counts.shape[2]) * size
    t = {name: tensor.double() for name, tensor in sample.tensors.items()}
    delta2 = differences(t["omega"], t["omega"])
    margin = (-2 * t["bandwidth"][:, None, None] * delta2).exp() - delta2 / (t["coupling"] * t["order"])[..., None, None] ** 2
    skipped = unlocked = 0
    for head in range(2):
        for index in range(counts.shape[2]):
            listed = set(lists[0, head, index, : counts[0, head, index]].tolist())
            for cell in range(cells):
                rows = slice(index * tile, (index + 1) * tile)
                locks = margin[0, head, rows, cell * size : (cell + 1) * size].max() > 0
                assert cell in listed or not locks
                skipped += cell not in listed
                unlocked += not locks
    assert skipped == (unlocked if exact else 0)


@pytest.mark.parametrize("causal", [False, True])
def test_lists_tell_which_cells_of_a_tile_meet_another(causal):
    """From a bit on that the launch names; lists for tiles of one cell say the same."""
    members, size = 24, 3
    t = chain(length=700, step=0.01, causal=causal).tensors
    omega, parameter = t["omega"], (t["coupling"], t["bandwidth"], t["order"])
    call = launchers.signature(omega, None, t["v"], causal)
    queries, _, ((survey, given),) = launchers.survey_launches(omega, None, *parameter)
    survey(*given)
    cells = queries.centres, queries.extents

    def lists_of(rows, members):
        lists, counts = (omega.new_empty(s, dtype=torch.int32) for s in launchers.lists_shapes(call, "sync_attend", rows))
        launchers.plan_neighbours(call, "sync_attend", rows, members)(*cells, *cells, lists, counts)
        return lists[0, 1].tolist(), counts[0, 1].tolist()

    single = [entries[:count] for entries, count in zip(*lists_of(launchers.CELL, None), strict=True)]
    for tile, (entries, count) in enumerate(zip(*lists_of(size * launchers.CELL, members), strict=True)):
        cells = single[size * tile : size * (tile + 1)]
        assert [entry & (1 << members) - 1 for entry in entries[:count]] == sorted(set().union(*cells))
        for entry in entries[:count]:
            met = [entry & (1 << members) - 1 in cell for cell in cells]
            assert entry >> members == sum(meets << member for member, meets in enumerate(met))


@pytest.mark.parametrize("alpha", [1e-4, 0.3, 1.3, 40.0])
def test_lock_radius(alpha):
    """The radius of a cell is the root of d exp(alpha d^2) = K r, by bisection."""
    omega = randn(1, 1, 5, 16)
    for radius in (1e-5, 0.02, 0.9, 1.3, 50.0):
        parameter = [torch.tensor([value], device=DEVICE) for value in (2 * radius, alpha)]
        order = torch.full((1, 1), 0.5, device=DEVICE)
        queries, _, ((survey, given),) = launchers.survey_launches(omega, None, *parameter, order)
        survey(*given)
        low, high = 0.0, radius
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if middle * math.exp(min(alpha * middle**2, 700)) < radius else (low, middle)
        assert queries.extents[0, 0, 0, 2].sqrt().item() == pytest.approx(low, rel=2e-5)


@each_backend
def test_sorting_tokens_changes_nothing_but_the_order_of_sums(backend):
    for by_token in (False, True):
        sample = random_sample(by_token=by_token, length=70, grad_floor=0.2)
        expected = run_sample(sample, backend=backend)
        got = run_sample(Sample(sample.tensors, {**sample.options, "sort": True}), backend=backend)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_sorting_compiles_to_one_graph_for_all_lengths():
    torch._dynamo.reset()
    compiled = torch.compile(nf.synchronization_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for index, length in enumerate((19, 26, 33)):
        sample = random_sample(by_token=True, length=length, grad_floor=0.2, sort=True)
        with torch._dynamo.config.patch(error_on_recompile=index > 1):
            result = run(compiled, sample, backend="auto")
        torch.testing.assert_close(result, run_sample(sample, backend="auto"), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(DEVICE != "cpu", reason="looks between the launches, which the interpreter makes one by one")
def test_sorting_lets_more_be_pruned(monkeypatch):
    sample = clustered(length=320, clusters=5)
    shuffled = torch.randperm(320, generator=generator()).to(DEVICE)
    sample = changed(sample, omega=sample.tensors["omega"][:, :, shuffled])
    visited = {}
    for sort in (False, True):
        with monkeypatch.context() as patch:
            spy = Spy(patch, everything=False)
            nf.synchronization_attention(**sample.tensors, sort=sort, backend="triton")
        visited[sort] = spy.visited / spy.possible
    assert visited[False] == 1.0
    assert visited[True] < 0.7


# ------------------------------------------------------------------------------------------------------- lock boundary


@each_backend
def test_a_token_that_locks_with_no_other_keeps_its_value_and_gets_no_gradient(backend):
    sample = random_sample(scale=5.0)
    assert nf.locked_share(*(sample.tensors[n] for n in ("omega", "coupling", "bandwidth", "order"))).max() == 0
    o, gradients = run_sample(sample, backend=backend)
    torch.testing.assert_close(o, sample.tensors["v"], rtol=1e-6, atol=1e-6)
    for name in ("omega", "coupling", "bandwidth", "order"):
        assert gradients[name].abs().max() == 0, name


@each_backend
def test_queries_that_lock_with_no_key_give_zeros_and_no_gradient(backend):
    sample = random_sample()
    sample.tensors["omega_k"] = sample.tensors["omega"] + 9
    o, gradients = run_sample(sample, backend=backend)
    assert o.abs().max() == 0
    assert all(gradient.abs().max() == 0 for gradient in gradients.values())


@each_backend
def test_duplicate_tokens_have_finite_gradients_and_share_their_output(backend):
    sample = random_sample(length=66, grad_floor=0.1)
    omega = sample.tensors["omega"]
    sample = changed(sample, omega=omega[:, :, :33].repeat(1, 1, 2, 1))
    do = randn(1, 2, 66, 16, seed=9)
    o, gradients = run_sample(sample, do, backend)
    torch.testing.assert_close(o[:, :, :33], o[:, :, 33:], rtol=1e-4, atol=1e-5)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    check(sample, do, o, gradients)


def pair_at(strength, **options):
    """Two tokens with S_01 = strength, by bisection of their distance; K r = 1.5, alpha = 0.4."""
    low, high = 0.0, 3.0
    for _ in range(200):
        middle = (low + high) / 2
        margin = math.exp(-0.8 * middle**2) - middle**2 / 2.25
        low, high = (middle, high) if margin > strength**2 else (low, middle)
    omega = torch.zeros(1, 1, 2, 16, dtype=torch.float64)
    omega[..., 1, 0] = low
    tensors = {"omega": omega, "v": randn(1, 1, 2, 16, dtype=torch.float64, device="cpu"),
               "coupling": torch.tensor(3.0).double(), "bandwidth": torch.tensor([0.4], dtype=torch.float64),
               "order": torch.full((1, 1), 0.5).double()}
    return Sample(tensors, options)


@pytest.mark.parametrize("strength", [1e-5, 1e-4, 0.05, 0.6])
@pytest.mark.parametrize("floor", [1e-3, 0.1])
def test_grad_floor_bounds_the_slope_at_the_boundary(strength, floor):
    """The gradient of omega is that of a floor of 1e-12, times S / max(S, floor): on the reference, in float64."""
    do = randn(1, 1, 2, 16, dtype=torch.float64, device="cpu", seed=3)
    _, got = run_sample(pair_at(strength, grad_floor=floor), do, "reference")
    _, steep = run_sample(pair_at(strength, grad_floor=1e-12), do, "reference")
    expected = steep["omega"] * strength / max(strength, floor)
    torch.testing.assert_close(got["omega"], expected, rtol=1e-4, atol=1e-10)
    assert expected.abs().max() > 0


@pytest.mark.parametrize("floor", [1e-3, 0.1])
def test_kernels_at_the_boundary(floor):
    """Far inside the floor the slope does not depend on S, so float32 knows it well although it hardly knows S."""
    double = pair_at(0.02, grad_floor=floor)
    sample = Sample({n: t.to(DEVICE, torch.float32) for n, t in double.tensors.items()}, double.options)
    do = randn(1, 1, 2, 16, seed=3)
    _, exact = run_sample(double, do.double().cpu(), "reference")
    _, got = run_sample(sample, do)
    torch.testing.assert_close(got["omega"].double().cpu(), exact["omega"], rtol=2e-3, atol=1e-6)


def test_no_phase_agreement_locks_nobody_and_keeps_gradients_finite():
    for backend in BACKENDS:
        sample = changed(random_sample(), order=torch.zeros(1, 2, device=DEVICE))
        o, gradients = run_sample(sample, backend=backend)
        torch.testing.assert_close(o, sample.tensors["v"], rtol=1e-6, atol=1e-6)
        assert all(gradient.isfinite().all() for gradient in gradients.values())


# ----------------------------------------------------------------------------------------- isolation, invalid numbers


def test_later_tokens_change_no_bit():
    sample = random_sample(causal=True, by_token=True)
    o, _ = run_sample(sample)
    late = torch.arange(70, device=DEVICE)[:, None] >= 41
    moved = {n: torch.where(late, 30 * sample.tensors[n] + 1, sample.tensors[n]) for n in ("omega", "v")}
    other, _ = run_sample(changed(sample, **moved))
    assert torch.equal(o[:, :, :41], other[:, :, :41])
    assert not torch.equal(o[:, :, 41:], other[:, :, 41:])


@pytest.mark.parametrize("backward", [False, True])
def test_nan_reaches_the_output(backward):
    sample = random_sample(length=20)
    sample.tensors["omega"][0, 1, 7, 3] = float("nan")
    o, gradients = run_sample(sample)
    if backward:
        assert gradients["omega"][0, 1].isnan().any()
        assert gradients["omega"][0, 0].isfinite().all()
    else:
        assert o[0, 1, 7].isnan().all()
        assert o[0, 0].isfinite().all()


@pytest.mark.parametrize("name, value", [("coupling", -1.0), ("bandwidth", 0.0), ("order", 1.5), ("order", -0.1)])
def test_a_parameter_out_of_its_range_poisons_its_head(name, value):
    """Where it cannot be read back: the registered operator checks nothing."""
    sample = random_sample(length=20)
    sample.tensors["coupling"] = torch.tensor([2.5, 2.5], device=DEVICE)
    sample.tensors[name][..., 1] = value
    t = sample.tensors
    arguments = t["omega"], None, t["v"], t["coupling"], t["bandwidth"], t["order"], False, None, 1e-3
    o = torch.ops.nearfar.synchronization_attention(*arguments)[0]
    assert o[:, 1].isnan().all()
    assert o[:, 0].isfinite().all()


# ---------------------------------------------------------------------------------------------- scalars, locked share


@each_backend
def test_numbers_for_coupling_and_bandwidth(backend):
    sample = random_sample()
    t = changed(sample, coupling=1.7, bandwidth=0.3).tensors
    ones = torch.ones(2, device=DEVICE)
    expected = nf.synchronization_attention(**{**t, "coupling": 1.7 * ones, "bandwidth": 0.3 * ones}, backend=backend)
    assert torch.equal(nf.synchronization_attention(**t, backend=backend), expected)
    tensor = torch.tensor(1.7, device=DEVICE)
    assert torch.equal(nf.synchronization_attention(**{**t, "coupling": tensor}, backend=backend), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_locked_share(causal):
    """Counted on the weights of the operator itself, with the identity for v."""
    sample = random_sample(length=64, by_token=causal)
    t = sample.tensors
    eye = torch.eye(64, device=DEVICE).expand(1, 2, 64, 64)
    weights = nf.synchronization_attention(**{**t, "v": eye}, causal=causal, backend="triton")
    locked = (weights > 0).sum((-2, -1)) - 64
    share = nf.locked_share(t["omega"], t["coupling"], t["bandwidth"], t["order"], causal=causal)
    torch.testing.assert_close(share, locked / (64 * 63 / (2 if causal else 1)))
    assert 0.05 < share.min() and share.max() < 0.9
    both = nf.locked_share(t["omega"], t["coupling"], t["bandwidth"], t["order"], omega_k=t["omega"], causal=causal)
    assert (both > share).all()


def test_nothing_locks_at_the_defaults_of_the_paper():
    """Random tokens of heads of 64: they are about 6 apart or more, and would have to be within 0.65."""
    omega, one = randn(1, 4, 256, 64), torch.ones(1, 4, device=DEVICE)
    raw = math.log1p(math.e)
    assert nf.locked_share(omega, raw, raw, one).max() == 0
    assert 0.2 < nf.locked_share(omega / 16, raw, raw, one).mean() < 0.6
    assert nf.locked_share(omega / 32, raw, raw, one).min() > 0.9


# ----------------------------------------------------------------------------------------------------- order parameter


def order_by_formula(theta, causal):
    wave = torch.polar(torch.ones_like(theta), theta)
    if not causal:
        return wave.mean(2).abs().mean(-1)
    means = [wave[:, :, : i + 1].mean(2).abs().mean(-1) for i in range(theta.shape[2])]
    return torch.stack(means, -1)


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length, width", [(1, 16), (75, 24), (160, 64)])
def test_order_parameter(length, width, causal, dtype, backend):
    """Phases are what they are in their dtype; everything after is float32."""
    theta = (4 * randn(2, 3, length, width)).to(dtype).transpose(0, 1).requires_grad_()
    r = nf.order_parameter(theta, causal=causal, backend=backend)
    assert r.dtype == torch.float32 and r.shape == ((3, 2, length) if causal else (3, 2))
    exact = theta.detach().double().requires_grad_()
    expected = order_by_formula(exact, causal)
    torch.testing.assert_close(r.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    dr = like(r)
    (gradient,), (truth,) = torch.autograd.grad(r, theta, dr), torch.autograd.grad(expected, exact, dr.double())
    assert gradient.dtype == dtype
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(gradient.double(), truth, rtol=tolerance, atol=tolerance * truth.abs().max().item() + 1e-8)


@each_backend
def test_order_parameter_of_known_phases(backend):
    same = torch.full((1, 1, 8, 16), 0.7, device=DEVICE)
    assert nf.order_parameter(same, backend=backend).item() == pytest.approx(1.0, abs=1e-6)
    spread = (torch.arange(8, device=DEVICE) * (2 * math.pi / 8))[:, None].expand(1, 1, 8, 16)
    assert nf.order_parameter(spread, backend=backend).item() == pytest.approx(0.0, abs=1e-6)
    theta = torch.tensor([0.0, math.pi / 2], device=DEVICE)[:, None].expand(1, 1, 2, 16)
    assert nf.order_parameter(theta, causal=True, backend=backend)[0, 0].tolist() == pytest.approx([1.0, 0.5**0.5], abs=1e-6)


def test_no_token_is_in_phase_with_nothing():
    for backend in BACKENDS:
        assert nf.order_parameter(randn(1, 2, 0, 16), backend=backend).tolist() == [[0.0, 0.0]]
        assert nf.order_parameter(randn(1, 2, 0, 16), causal=True, backend=backend).shape == (1, 2, 0)


def test_gradient_of_an_order_parameter_of_zero_is_finite():
    """Means that are exactly 0: cos and sin of float32 multiples of pi are not, so the sums are handed to the reference."""
    from nearfar.reference.synchronization import modulus

    zero = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    length = modulus(zero, zero)
    (gradient,) = torch.autograd.grad(length.sum(), zero, create_graph=True)
    assert length.abs().max() == 0 and gradient.abs().max() == 0
    theta = torch.zeros(1, 1, 0, 16, device=DEVICE, requires_grad=True)
    nf.order_parameter(theta, backend="triton").sum().backward()
    assert theta.grad.shape == theta.shape


@pytest.mark.parametrize("causal", [False, True])
def test_order_parameter_is_a_torch_operator(causal):
    theta = randn(1, 2, 40, 16).requires_grad_()
    torch.library.opcheck(torch.ops.nearfar.order_parameter.default, (theta, causal))
    r = nf.order_parameter(theta, causal=causal, backend="triton")
    (first,) = torch.autograd.grad(r, theta, like(r), create_graph=True)
    with pytest.raises(RuntimeError, match="no double backward"):
        first.sum().backward()
    exact = theta[:, :, :6].detach().double().cpu().requires_grad_()
    function = lambda theta: nf.order_parameter(theta, causal=causal, backend="reference")  # noqa: E731
    assert torch.autograd.gradcheck(function, exact, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, exact, fast_mode=True)


def test_prefix_order_does_not_look_ahead():
    theta = randn(1, 2, 90, 16)
    other = theta.clone()
    other[:, :, 50:] += 1
    first, second = (nf.order_parameter(t, causal=True, backend="triton") for t in (theta, other))
    assert torch.equal(first[:, :, :50], second[:, :, :50])
    assert not torch.equal(first[:, :, 50:], second[:, :, 50:])


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("replacement, error, match", [
    ({"coupling": 0.0}, ValueError, "coupling must be positive, got 0.0"),
    ({"coupling": torch.tensor(-2.0)}, ValueError, "coupling must be positive, got -2.0"),
    ({"bandwidth": -0.5}, ValueError, "bandwidth must be positive"),
    ({"bandwidth": torch.ones(3)}, ValueError, "bandwidth must be a number or one number per query head"),
    ({"bandwidth": "wide"}, TypeError, "bandwidth must be a float"),
    ({"order": torch.full((1, 2), 1.2)}, ValueError, "order must be between 0 and 1, got 1.2"),
    ({"order": torch.full((1, 2), -0.1)}, ValueError, "order must be between 0 and 1"),
    ({"order": torch.full((1, 2), float("nan"))}, ValueError, "order must be between 0 and 1"),
    ({"order": torch.ones(2)}, ValueError, r"order must have shape \(B, Hq\), \(1, 2\), or \(B, Hq, N\)"),
    ({"order": torch.ones(1, 2, 69)}, ValueError, "order must have shape"),
    ({"order": 0.5}, TypeError, "order must be a torch.Tensor"),
    ({"order": torch.ones(1, 2).int()}, TypeError, "order must be float16"),
    ({"omega": torch.ones(1, 2, 70, 16).int()}, TypeError, "omega must be float16"),
    ({"omega": torch.ones(2, 70, 16)}, ValueError, "omega must have 4 dimensions"),
    ({"v": torch.ones(1, 2, 69, 16)}, ValueError, r"v must have the heads and length of omega, \(2, 70\)"),
    ({"v": torch.ones(1, 2, 70, 16).double()}, TypeError, "v must have the dtype of omega"),
    ({"omega_k": torch.ones(1, 2, 70, 24)}, ValueError, "omega_k must have the width of omega"),
    ({"causal": True}, ValueError, r"order of shape \(B, Hq\).*leak.*order_parameter\(theta, causal=True\)"),
    ({"sort": True, "top_k": 3}, ValueError, "sort orders tokens that all see each other"),
    ({"top_k": 0}, ValueError, "top_k must be at least 1"),
    ({"grad_floor": 0.0}, ValueError, "grad_floor must be positive and finite"),
    ({"grad_floor": None}, TypeError, "grad_floor must be a number"),
], ids=str)
def test_bad_input(replacement, error, match):
    sample = random_sample()
    arguments = {name: tensor.cpu() for name, tensor in sample.tensors.items()} | replacement
    with pytest.raises(error, match=match):
        nf.synchronization_attention(**arguments)


def test_bad_phases():
    with pytest.raises(ValueError, match="theta must have 4 dimensions"):
        nf.order_parameter(torch.ones(2, 3, 4))
    with pytest.raises(TypeError, match="theta must be float16"):
        nf.order_parameter(torch.ones(1, 2, 3, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="theta is 20 wide"):
        nf.order_parameter(randn(1, 1, 3, 20), backend="triton")


def test_explain():
    sample = random_sample(width=20)
    text = nf.explain(nf.synchronization_attention, **sample.tensors, **sample.options, backend="triton")
    assert "refused" in text and "omega is 20 wide" in text
    sample = random_sample(length=1100, top_k=3)
    text = nf.explain("synchronization_attention", **sample.tensors, top_k=3, backend="triton")
    assert "top_k over 1100 candidate keys" in text


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("radius", [0.5, 1e-2, 1e-4, 0.0])
def test_equal_tokens_pull_at_nothing(radius, dtype):
    """Their distance is 0, whatever the lock radius: no rounding of distances may be multiplied by 1 / r^2."""
    omega = torch.full((1, 2, 9, 16), 3.7, dtype=dtype, device=DEVICE)
    tensors = {"omega": omega, "v": randn(1, 2, 9, 16, dtype=dtype)}
    for causal, top_k, order in ((False, None, (1, 2)), (True, None, (1, 2, 9)), (True, 3, (1, 2, 9))):
        parameters = {"coupling": torch.tensor(1.3), "bandwidth": torch.tensor(1.3), "order": torch.full(order, radius)}
        sample = Sample({**tensors, **{n: p.to(DEVICE) for n, p in parameters.items()}}, dict(causal=causal, top_k=top_k))
        _, gradients = run(nf.synchronization_attention, sample)
        for name in ("omega", "order", "coupling", "bandwidth"):
            assert gradients[name].abs().max() <= (1e-5 if dtype == torch.float32 else 1e-2), name


@pytest.mark.parametrize("top_k", [None, 5])
def test_float32_far_from_the_origin(top_k):
    """A common offset changes nothing but the rounding of the tokens themselves. Near the lock boundary 1 / S grows to 1e3."""
    tensors = {"omega": 1000 + randn(1, 2, 20, 16, seed=1) / 5, "v": randn(1, 2, 20, 16, seed=2)}
    parameters = {
        "coupling": torch.tensor([1.3, 1.1]),
        "bandwidth": torch.tensor([0.5, 0.7]),
        "order": torch.tensor([[0.8, 0.3]]),
    }
    tensors |= {name: parameter.to(DEVICE) for name, parameter in parameters.items()}
    o, gradients = run(nf.synchronization_attention, Sample(tensors, dict(top_k=top_k)), do := randn(1, 2, 20, 16, seed=3))
    double = {name: tensor.double() for name, tensor in tensors.items()}
    exact, expected = run(nf.synchronization_attention, Sample(double, dict(top_k=top_k)), do.double(), backend="reference")
    torch.testing.assert_close(o.double(), exact, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        assert (gradient.double() - expected[name]).norm() <= 1e-4 * expected[name].norm(), name
