"""Calls that are like an earlier one take its plan (runtime/plans.py), and no other calls do."""

import gc
import weakref

import pytest
import samples
import torch
from harness import DEVICE, LAYOUTS, Sample, assert_same, leaves, randn, run, turns
from samples import public
from torch._subclasses import FakeTensorMode

import nearfar as nf
from nearfar.kernels.krause import krause
from nearfar.ops import synchronization
from nearfar.registry import OPERATORS
from nearfar.runtime import checks, dispatch, plans
from nearfar.runtime.plans import forget_plans

pytestmark = pytest.mark.full

WINDOW = nf.SlidingWindow(9)


@pytest.fixture(autouse=True)
def cpu_repeats(monkeypatch):
    """On a CPU, where calls are not kept, they are here: no test gives numbers that are to be refused."""
    assert plans.GUARDS_WORK
    if DEVICE == "cpu":
        monkeypatch.setattr(plans, "can_repeat", lambda tensor: True)
    forget_plans()
    yield
    forget_plans()


@pytest.fixture
def found(monkeypatch):
    """Notes for every look whether it found a plan."""
    find, looks = plans.Repeats.find, []

    def noted(repeats, *tensors):
        plan = find(repeats, *tensors)
        looks.append(plan is not None)
        return plan

    monkeypatch.setattr(plans.Repeats, "find", noted)
    return looks


# ---------------------------------------------------------------------------------------------------------- signatures


def tensors(width=16, dtype=torch.float16, grad=False):
    return [randn(1, 2, 20, width, dtype=dtype, seed=seed).requires_grad_(grad) for seed in range(2)]


def other_strides(x):
    return LAYOUTS["tokens before heads"](x.detach())


OTHERS = {
    "shape": lambda x, y: (x[:, :, :-1].contiguous(), y),
    "strides": lambda x, y: (x, other_strides(y)),
    "dtype": lambda x, y: (x, y.bfloat16()),
    "device": lambda x, y: (x.to("meta"), y),
    "gradients": lambda x, y: (x, y.clone().requires_grad_()),
    "a parameter": lambda x, y: (torch.nn.Parameter(x, requires_grad=False), y),
    "a subclass": lambda x, y: (x.as_subclass(type("Sub", (torch.Tensor,), {})), y),
    "a fake": lambda x, y: (FakeTensorMode().from_tensor(x), y),
    "no tensor": lambda x, y: (x, y.tolist()),
    "nothing": lambda x, y: (x, None),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_tensors_are_not_taken_for_those_that_were_kept(other):
    x, y = tensors()
    repeats = plans.Repeats()
    repeats.keep("plan", x, y)
    assert repeats.find(x, y) == repeats.find(y, x + 1) == "plan"
    assert repeats.find(*OTHERS[other](x, y)) is None


STATES = {
    "no_grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast(DEVICE, dtype=torch.bfloat16),
    "a dispatch mode": lambda: FakeTensorMode(allow_non_fake_inputs=True),
}


@pytest.mark.parametrize("state", STATES)
def test_another_state_of_torch_has_plans_of_its_own(state):
    x, y = tensors()
    repeats = plans.Repeats()
    repeats.keep("outside", x, y)
    with STATES[state]():
        assert repeats.find(x, y) is None
    if state != "a dispatch mode":
        with STATES[state]():
            repeats.keep("inside", x, y)
            assert repeats.find(x, y) == "inside"
    assert repeats.find(x, y) == "outside"


def test_each_dtype_of_autocast_has_plans_of_its_own():
    """Tensors that one leaves alone another casts, and no dispatch key tells the two apart."""
    x, y = tensors()
    repeats = plans.Repeats()
    with torch.autocast("cuda" if DEVICE == "cuda" else "cpu", dtype=torch.float16):
        torch.set_autocast_dtype("cuda", torch.float16)
        repeats.keep("float16", x, y)
        assert repeats.find(x, y) == "float16"
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        assert repeats.find(x, y) is None


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad])
def test_under_a_transform_nothing_is_found(transform):
    """Not even for tensors that it does not transform."""
    x, y = tensors()
    repeats, seen = plans.Repeats(), []
    repeats.keep("plan", x, y)

    def look(z):
        seen.append(repeats.find(x, y))
        return z.sum()

    transform(look)(torch.ones(3, device=DEVICE))
    assert seen == [None] and repeats.find(x, y) == "plan"


def test_the_last_signatures_of_a_shape_are_kept():
    """And of the last shapes: five or more lengths in turn are found."""
    repeats = plans.Repeats()
    x, _ = tensors()
    alike = [[x, tensors(width)[1]] for width in range(16, 16 + 2 * plans.MOST_ALIKE)]
    for index, call in enumerate(alike):
        repeats.keep(index, *call)
        repeats.keep("again", *call)
    kept = [repeats.find(*call) for call in alike]
    assert kept == [*[None] * plans.MOST_ALIKE, *range(plans.MOST_ALIKE, 2 * plans.MOST_ALIKE)]
    shapes = [tensors(width) for width in range(100, 100 + 2 * plans.MOST_SHAPES)]
    for index, call in enumerate(shapes):
        repeats.keep(index, *call)
    kept = [repeats.find(*call) for call in shapes]
    assert kept == [*[None] * plans.MOST_SHAPES, *range(plans.MOST_SHAPES, 2 * plans.MOST_SHAPES)]


def test_nothing_that_is_kept_keeps_a_tensor_alive():
    """Neither a signature nor the plan of a call with gradients, whose graph is gone."""
    given = [randn(1, 2, 20, 16, dtype=torch.float16, seed=seed).requires_grad_() for seed in range(3)]
    given.append(torch.full((2,), 2.0, device=DEVICE, requires_grad=True))
    o = nf.krause_attention(*given, WINDOW, backend="triton")
    assert plans.repeats(krause, WINDOW, None, "index", 0.0, True, "triton").find(*given) is not None
    alive = [weakref.ref(x) for x in (*given, o)]
    del given, o
    gc.collect()
    assert not any(reference() is not None for reference in alive)


def test_a_tensor_that_is_given_twice_takes_no_room():
    x, y = tensors()
    repeats = plans.Repeats()
    repeats.keep("plan", x, y)
    for _ in range(plans.MOST_ALIKE):
        repeats.keep("twice", x, x)
    assert repeats.find(x, x) is None and repeats.find(x, y) == "plan"


def test_options_of_other_types_are_other_options():
    repeats = plans.repeats("name", 1, (2, -1))
    assert plans.repeats("name", 1, (2, -1)) is repeats
    others = [("name", True, (2, -1)), ("name", 1.0, (2, -1)), ("other", 1, (2, -1)), ("name", 1, (2, 0))]
    for options in others:
        assert plans.repeats(*options) is not repeats
    assert plans.repeats("name", [1]) is None
    forget_plans()
    assert plans.repeats("name", 1, (2, -1)) is not repeats


# ---------------------------------------------------------------------------------------------------------------- calls

def calls():
    for operator in OPERATORS:
        if operator.differentiable and operator.room != "diagnostics":
            for name in samples.names(operator):
                yield pytest.param(operator, name, id=f"{operator.function.__name__}-{name}")


@pytest.mark.parametrize("operator, name", list(calls()))
def test_a_call_like_an_earlier_one_gives_what_it_gives_alone(operator, name, found, monkeypatch):
    """Other numbers at other addresses, with gradients and without; checks and dispatch are left out."""
    make, function = samples.of(operator).make, public(operator)
    first = make(name, torch.float16, length=21)
    second = Sample({key: other_numbers(key, x) for key, x in first.tensors.items()}, first.options)
    repeated = "sort" not in first.options  # which orders tokens by their values
    alone = []
    for sample in (first, second):
        forget_plans()
        alone.append((run(function, sample), without_gradients(function, sample)))
    forget_plans()
    run(function, first), without_gradients(function, first)
    assert not any(found)
    found.clear()
    if repeated:
        monkeypatch.setattr(checks, "plain_layouts", lambda *_: pytest.fail("a call is checked again"))
        monkeypatch.setattr(dispatch.Backends, "served", lambda *_: pytest.fail("a call is dispatched again"))
    for sample, (expected, plain) in zip((second, first), alone[::-1], strict=True):
        assert_same(run(function, sample), expected, "after another call")
        assert_same((without_gradients(function, sample), {}), (plain, {}), "after another call")
    assert found and all(found) if repeated else not any(found[:1])


def other_numbers(name, tensor):
    """Of the same signs, as bandwidths and orders need."""
    return tensor * (0.875 if name in ("sigma", "coupling", "bandwidth", "order") else -0.5)


def without_gradients(function, sample):
    with torch.no_grad():
        return function(**sample.tensors, **sample.options, backend="triton")


def test_what_fits_no_kept_call_is_refused_as_ever():
    q, k, v = [randn(1, 2, 20, 16, dtype=torch.float16, seed=seed) for seed in range(3)]
    sigma = torch.full((2,), 2.0, device=DEVICE)
    for _ in range(2):
        nf.krause_attention(q, k, v, sigma, WINDOW, top_k=1, backend="triton")
        for error, match, change in (
            (TypeError, "top_k must be an int or None, got bool", dict(top_k=True)),
            (TypeError, "top_k must be an int or None, got float", dict(top_k=1.0)),
            (TypeError, "locality must be None, a SlidingWindow, .* or a ShiftedWindow, got list", dict(locality=[9])),
            (TypeError, "q must be a torch.Tensor, got list", dict(q=q.tolist())),
            (TypeError, "k must have the dtype of q", dict(k=k.float())),
            (ValueError, "v must have the heads and length of k", dict(v=v[:, :, 1:])),
            (ValueError, "sigma must be a number or one number per query head", dict(sigma=torch.ones(3, device=DEVICE))),
            (TypeError, "sigma must be a float or a floating-point tensor, got str", dict(sigma="2")),
            (ValueError, "backend must be", dict(backend="tritom")),
        ):
            arguments = dict(q=q, k=k, v=v, sigma=sigma, locality=WINDOW, top_k=1, backend="triton") | change
            with pytest.raises(error, match=match):
                nf.krause_attention(**arguments)


def test_calls_whose_tensors_are_alike_do_not_take_each_others_plans(found):
    """Which arguments they are given as, and whether there are more of them."""
    q, k, v = [randn(1, 2, 20, 16, dtype=torch.float16, seed=seed) for seed in range(3)]
    numbers, state = torch.rand(1, 2, 20, device=DEVICE), torch.rand(1, 2, 16, 17, device=DEVICE)
    omega, order, one = q * 0.2, torch.ones(1, 2, device=DEVICE), torch.ones(1, device=DEVICE)
    turns(
        lambda: nf.affine_attention(q, k, v, numbers, None, backend="triton"),
        lambda: nf.affine_attention(q, k, v, None, numbers, backend="triton"),
        lambda: nf.affine_attention(q, k, v, numbers, 2 * numbers, backend="triton"),
        lambda: nf.softmax_attention(q, k, v, backend="triton"),
        lambda: nf.softmax_attention(q, k, v, sink=order[0], backend="triton"),
    )
    turns(
        lambda: nf.linear_attention(q, k, v, causal=True, backend="triton"),
        lambda: nf.linear_attention(q, k, v, causal=True, initial_state=state, backend="triton"),
        lambda: nf.hadamard_attention((q, k / 2), (k, q / 2), v, causal=True, backend="triton"),
        lambda: nf.hadamard_attention((q, k / 2, q / 2), (k, 2 * q, 2 * k), v, causal=True, backend="triton"),
    )
    turns(
        lambda: nf.synchronization_attention(omega, v, 2 * one, one / 2, order, backend="triton"),
        lambda: nf.synchronization_attention(omega, v, 2 * one, one / 2, order, omega_k=k * 0.2, backend="triton"),
    )
    assert found.count(True) == 6 + 5 + 3  # the last of those alone, then all of the second round


def test_tokens_are_sorted_in_every_call_that_asks_for_it(monkeypatch):
    sorts, by_frequency = [], synchronization.by_frequency
    monkeypatch.setattr(synchronization, "by_frequency", lambda omega: sorts.append(omega) or by_frequency(omega))
    omega, v = [0.2 * randn(1, 2, 20, 16, dtype=torch.float16, seed=seed) for seed in range(2)]
    order, one = torch.ones(1, 2, device=DEVICE), torch.ones(1, device=DEVICE)
    for sort in (False, True, True):
        nf.synchronization_attention(omega, v, 2 * one, one / 2, order, sort=sort, backend="triton")
    assert len(sorts) == 2


def test_feature_maps_of_the_user_are_applied_in_every_call():
    q, k, v = [randn(1, 2, 20, 16, dtype=torch.float16, seed=seed) for seed in range(3)]
    for _ in range(3):
        o = nf.linear_attention(q, k, v, feature_map=torch.exp, backend="triton")
        assert torch.equal(o, nf.linear_attention(q.exp(), k.exp(), v, feature_map="identity", backend="triton"))


def test_tensors_that_do_not_start_at_16_bytes_take_the_long_way():
    q, k, v = [randn(1, 2, 20, 16, dtype=torch.float16, seed=seed) for seed in range(3)]
    numbers = torch.tensor([2.0, 2.5, 3.0], device=DEVICE)
    shifted = torch.cat((q.flatten()[:1], q.flatten()))[1:].view(q.shape)
    assert shifted.data_ptr() % 16 and numbers[1:].data_ptr() % 16
    expected = nf.krause_attention(q, k, v, numbers[1:].clone(), WINDOW, backend="triton")
    for x, sigma in ((shifted, numbers[1:]), (q, numbers[1:]), (shifted, numbers[1:].clone())):
        assert torch.equal(nf.krause_attention(x, k, v, sigma, WINDOW, backend="triton"), expected)


def test_a_number_takes_the_plan_of_another(found):
    """Where numbers become tensors: on a GPU alone they are not asked for in every call."""
    q, k, v = [randn(1, 2, 20, 16, dtype=torch.float16, seed=seed) for seed in range(3)]
    for sigma in (2.0, 3.0, 2.0):
        expected = nf.krause_attention(q, k, v, torch.full((1,), sigma, device=DEVICE), WINDOW, backend="triton")
        assert torch.equal(nf.krause_attention(q, k, v, sigma, WINDOW, backend="triton"), expected)
    assert found.count(True) >= (4 if DEVICE == "cuda" else 2)


def test_double_backward_is_refused_in_a_repeated_call():
    sample = samples.of(OPERATORS[0]).make("causal window", torch.float16, length=21)
    for _ in range(2):
        given = leaves(sample)
        o = nf.krause_attention(**given, **sample.options, backend="triton")
        (dq,) = torch.autograd.grad(o.sum(), given["q"], create_graph=True)
        with pytest.raises(RuntimeError, match="no double backward"):
            torch.autograd.grad(dq.sum(), given["q"])


def test_a_compiled_call_looks_for_no_plan(found):
    q, k, v = [randn(1, 2, 20, 16, dtype=torch.float16, seed=seed) for seed in range(3)]
    sigma = torch.full((2,), 2.0, device=DEVICE)
    call = lambda: nf.krause_attention(q, k, v, sigma, WINDOW, backend="triton")  # noqa: E731
    expected = call()
    found.clear()
    assert torch.equal(torch.compile(call, backend="aot_eager", fullgraph=True)(), expected) and not found
