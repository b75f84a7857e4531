"""What is looked up by signature: checks, plans, tensors of numbers. None of them may serve a call that it does not fit."""

import math
import sys
import threading
import time
from functools import partial
from types import SimpleNamespace

import pytest
import samples
import torch
from harness import DEVICE, LAYOUTS, Sample, assert_same, needs_gpu, randn, run, turns
from nearfar.triton_kernels import interpreter, launch
from samples import public
from triton.runtime.jit import JITFunction

import nearfar as nf
from nearfar import _cuda
from nearfar.kernels.affine import affine
from nearfar.kernels.linear import linear
from nearfar.kernels.synchronization import synchronization
from nearfar.registry import OPERATORS
from nearfar.runtime import checks
from nearfar.runtime import operator as runtime_operator
from nearfar.runtime.plans import forget_plans, planned
from nearfar.runtime.program import Program
from nearfar.runtime.tensors import Layout, allocate, layouts, tf32_allowed

pytestmark = pytest.mark.full

GRADED = [op for op in OPERATORS if op.differentiable]
each_operator = pytest.mark.parametrize("operator", GRADED, ids=lambda op: op.function.__name__)
WINDOW = nf.SlidingWindow(7)


def first_sample(operator, dtype, length=21):
    return samples.of(operator).make(samples.names(operator)[0], dtype, length=length)


def relaid(sample, layout):
    """The same numbers of the tensors with tokens in another memory order."""
    tensors = {name: layout(tensor) if tensor.dim() == 4 else tensor for name, tensor in sample.tensors.items()}
    return Sample(tensors, sample.options)


@each_operator
def test_calls_of_one_shape_do_not_take_each_others_plans(operator):
    """Strides and dtypes take turns; each call gives what it gives when nothing has been planned before."""
    calls = [first_sample(operator, dtype) for dtype in (torch.float32, torch.float16)]
    calls += [relaid(calls[0], LAYOUTS[name]) for name in ("tokens before heads", "width before rows")]
    alone = []
    for sample in calls:
        forget_plans()
        alone.append(run(public(operator), sample))
    for result in alone[2:]:
        torch.testing.assert_close(result, alone[0], rtol=1e-4, atol=1e-5)
    forget_plans()
    for sample, expected in zip(calls, alone, strict=True):
        assert_same(run(public(operator), sample), expected, "after calls with other strides and dtypes")


def rows(width=16, length=20, dtype=torch.float32):
    return [randn(1, 2, length, width, dtype=dtype, seed=seed) for seed in range(3)]


def test_calls_with_other_options_do_not_take_each_others_plans():
    q, k, v = rows()
    ones, halves = torch.ones(1, 2, 20, device=DEVICE), torch.full((1, 2, 20), 0.5, device=DEVICE)
    order, ends = torch.ones(1, 2, device=DEVICE), torch.tensor([0, 7, 20], dtype=torch.int32, device=DEVICE)
    krause = {"locality": nf.SlidingWindow(9), "backend": "triton"}
    turns(
        lambda: nf.krause_attention(q, k, v, 2.0, **krause),
        lambda: nf.krause_attention(q, k, v, 3.0, **krause),
        lambda: nf.krause_attention(q, k, v, torch.tensor([2.0, 3.0], device=DEVICE), **krause),
        lambda: nf.krause_attention(q, k, v, 2.0, top_k=3, **krause),
        lambda: nf.krause_attention(q, k, v, 2.0, cu_seqlens=ends, **krause),
        lambda: nf.krause_attention(q, k, v, 2.0, dropout_p=0.5, seed=1, **krause),
        lambda: nf.krause_attention(q, k, v, 2.0, dropout_p=0.5, seed=2, **krause),
        lambda: nf.krause_attention(q, k, v, 2.0, dropout_p=0.3, seed=2, **krause),
        lambda: nf.krause_attention(q, k, v, 2.0, nf.SlidingWindow(3), backend="triton"),
    )
    turns(
        lambda: nf.affine_attention(q, k, v, None, ones, backend="triton"),
        lambda: nf.affine_attention(q, k, v, halves, None, backend="triton"),
        lambda: nf.affine_attention(q, k, v, halves, ones, backend="triton"),
        lambda: nf.affine_attention(q, k, v, halves, ones, causal=True, backend="triton"),
        lambda: nf.affine_attention(q, k, v, halves, ones, scale=0.1, backend="triton"),
    )
    turns(
        lambda: nf.linear_attention(q, k, v, backend="triton"),
        lambda: nf.linear_attention(q, k, v, eps=0.5, backend="triton"),
        lambda: nf.linear_attention(q, k, v, normalize=False, backend="triton"),
        lambda: nf.linear_attention(q, k, v, feature_map="exp", backend="triton"),
        lambda: nf.linear_attention(q, k, v, causal=True, backend="triton"),
        lambda: nf.linear_attention(q, k, v, causal=True, cu_seqlens=ends, backend="triton"),
    )
    omega = q * 0.2
    turns(
        lambda: nf.synchronization_attention(omega, v, 2.0, 0.5, order, backend="triton"),
        lambda: nf.synchronization_attention(omega, v, 2.0, 0.4, order, backend="triton"),
        lambda: nf.synchronization_attention(omega, v, 2.0, 0.5, order, top_k=3, backend="triton"),
        lambda: nf.synchronization_attention(omega, v, 2.0, 0.5, order, omega_k=k * 0.2, backend="triton"),
        lambda: nf.synchronization_attention(omega, v, 2.0, 0.5, ones, causal=True, backend="triton"),
    )


def test_what_was_checked_once_is_refused_again():
    q, k, v = rows()
    for _ in range(2):
        nf.softmax_attention(q, k, v)
        with pytest.raises(ValueError, match="k must have the batch size of q"):
            nf.softmax_attention(q, torch.cat((k, k)), torch.cat((v, v)))
        with pytest.raises(TypeError, match="k must have the dtype of q"):
            nf.softmax_attention(q, k.half(), v)
        with pytest.raises(TypeError, match="top_k must be an int or None, got bool"):
            nf.krause_attention(q, k, v, 2.0, top_k=True)
        nf.krause_attention(q, k, v, 2.0, top_k=1)
        with pytest.raises(TypeError, match="top_k must be an int or None, got float"):
            nf.krause_attention(q, k, v, 2.0, top_k=1.0)
        with pytest.raises(TypeError, match="q must be a torch.Tensor, got list"):
            nf.krause_attention(q.tolist(), k, v, 2.0)


@pytest.mark.skipif(DEVICE != "cpu", reason="the switch is for CPU tensors")
def test_the_interpreters_switch_is_looked_at_in_every_call(monkeypatch):
    q, k, v = rows()
    for _ in range(2):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert nf.softmax_attention(q, k, v, backend="triton").shape == q.shape
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        with pytest.raises(ValueError, match="backend='triton' cannot serve this call: q is on cpu"):
            nf.softmax_attention(q, k, v, backend="triton")


def test_autocast_is_looked_at_in_every_call():
    q, k, v = rows()
    for _ in range(2):
        assert nf.softmax_attention(q, k, v).dtype == torch.float32
        with torch.autocast(DEVICE, dtype=torch.float16):
            assert nf.softmax_attention(q, k, v).dtype == torch.float16


@each_operator
def test_autocast_casts_what_torch_casts(operator):
    """float64 stays, alone or beside others, which are then refused; integers are refused, as without autocast."""
    sample = first_sample(operator, torch.float64)
    sample = Sample({name: tensor.cpu() for name, tensor in sample.tensors.items()}, sample.options)
    expected = run(public(operator), sample, backend="reference")
    with torch.autocast("cpu", torch.bfloat16):
        result = public(operator)(**sample.tensors, **sample.options, backend="reference")
        assert_same((result, {}), (expected[0], {}), "under autocast")
        names = [name for name, tensor in sample.tensors.items() if tensor.dim() == 4]
        for name in names:
            for dtype in (torch.float64, torch.int64):
                others = {n: x.float() if n in names else x for n, x in sample.tensors.items()}
                others[name] = sample.tensors[name].to(dtype)
                with pytest.raises(TypeError, match="must (have the dtype of|be float16)"):
                    public(operator)(**others, **sample.options, backend="reference")
        halves = {n: x.half() if n in names[:1] else x.float() if n in names else x for n, x in sample.tensors.items()}
        mixed = public(operator)(**halves, **sample.options, backend="reference")  # both are cast
        assert torch.isfinite(mixed[0] if isinstance(mixed, tuple) else mixed).all()
    meta = {name: tensor.float().to("meta") for name, tensor in sample.tensors.items()}
    with torch.autocast("cpu", torch.bfloat16):
        result = public(operator)(**meta, **sample.options, backend="reference")
    assert (result[0] if isinstance(result, tuple) else result).is_meta


SWITCHES = {
    "the global one": (dict(generic="tf32"), True),
    "that of products": (dict(matmul="tf32"), True),
    "that of products before the global one": (dict(generic="tf32", matmul="ieee"), False),
    "an older one": (dict(older="high"), True),
    "an older one, then that of products": (dict(older="high", matmul="ieee"), False),
    "an older one after that of products": (dict(matmul="tf32", older="highest"), False),
    "none": (dict(), False),
}


@pytest.fixture
def switches():
    """Sets switches of tf32 in order; all are as at first afterwards."""

    def switch(**settings):
        for name, value in settings.items():
            if name == "older":
                torch.set_float32_matmul_precision(value)
            else:
                (torch.backends if name == "generic" else torch.backends.cuda.matmul).fp32_precision = value

    yield switch
    switch(older="highest", matmul="none", generic="none")


@pytest.mark.parametrize("name", SWITCHES)
def test_tf32_is_read_from_every_switch(name, switches):
    """As torch reads it for its own products, forward and backward, also where it is set between the two."""
    settings, allowed = SWITCHES[name]
    made = [first_sample(operator, torch.float32) for operator in GRADED]
    calls = [partial(public(operator), **x.options, backend="triton") for operator, x in zip(GRADED, made, strict=True)]
    tensors = [x.tensors for x in made]
    graded = [{n: x.detach().requires_grad_() for n, x in given.items()} for given in tensors]
    before = [call(**given) for call, given in zip(calls, graded, strict=True)]
    switches(**settings)
    assert launch.dot_precision(torch.float32) == ("tf32" if allowed else "ieee")
    assert launch.dot_precision(torch.float16) == "ieee" and tf32_allowed(torch.float32) == allowed
    for o in before:
        (o[0] if isinstance(o, tuple) else o).sum().backward()
    for call, given in zip(calls, tensors, strict=True):
        call(**given)


HUGE = [2**30 - 1, 2**30, 2**31 - 10, 2**31 - 1, 2**31, sys.maxsize, 2**80]


@pytest.mark.parametrize("keys", [20, 9])
@pytest.mark.parametrize("huge", HUGE)
def test_huge_windows_are_unlimited(huge, keys):
    """On either side and on both, for every operator that takes a window and every backend."""
    q, k, v = randn(1, 2, 20, 16), randn(1, 2, keys, 16, seed=1), randn(1, 2, keys, 16, seed=2)
    for sides, same in (((5, huge), (5, -1)), ((huge, 0), (-1, 0)), ((huge, huge), (-1, -1))):
        calls = [
            lambda w, b: nf.krause_attention(q, k, v, 2.0, nf.SlidingWindow(*w), backend=b),
            lambda w, b: nf.krause_attention(q, k, v, 2.0, nf.SlidingWindow(*w), top_k=3, backend=b),
            lambda w, b: nf.softmax_attention(q, k, v, window_size=w, backend=b),
            lambda w, b: nf.affine_attention(q, k, v, None, q[..., 0], window_size=w, backend=b),
        ]
        if keys == 20:
            calls += [
                lambda w, b: nf.attention_statistics(q, k, locality=nf.SlidingWindow(*w), backend=b).entropy,
                lambda w, b: nf.selection_geometry(q, k, v, 2, locality=nf.SlidingWindow(*w), backend=b).precision,
            ]
        for call in calls:
            for backend in ("reference", "triton"):
                torch.testing.assert_close(call(sides, backend), call(same, backend), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrong, error", [(-2, ValueError), (-(2**40), ValueError), (1.0, TypeError), (True, TypeError)])
def test_sides_of_windows_are_checked(wrong, error):
    q, k, v = rows()
    for sides in ((wrong, 0), (0, wrong)):
        with pytest.raises(error, match="left|right"):
            nf.softmax_attention(q, k, v, window_size=sides)
        with pytest.raises(error, match="left|right"):
            nf.SlidingWindow(*sides)


@pytest.mark.skipif(DEVICE != "cpu", reason="of Triton's interpreter")
@pytest.mark.parametrize("right", [False, True])
@each_operator
def test_bfloat16_is_interpreted_where_its_products_are_right(operator, right, monkeypatch):
    monkeypatch.setattr(interpreter, "multiplies_bfloat16", lambda: right)
    sample = first_sample(operator, torch.bfloat16)
    if right:
        public(operator)(**sample.tensors, **sample.options, backend="triton")
        return
    with pytest.raises(ValueError, match="bfloat16.*Triton's interpreter"):
        public(operator)(**sample.tensors, **sample.options, backend="triton")


@pytest.mark.skipif(DEVICE != "cpu", reason="of Triton's interpreter")
def test_explain_names_the_interpreter():
    q, k, v = rows(dtype=torch.bfloat16)
    text = nf.explain(nf.softmax_attention, q, k, v, backend="triton")
    if not interpreter.multiplies_bfloat16():
        assert "refused" in text and "bfloat16" in text and "Triton's interpreter" in text
    assert "interpreter" not in nf.explain(nf.softmax_attention, q.half(), k.half(), v.half(), backend="triton")


@each_operator
def test_compile_with_parameters_of_heads(operator):
    """dynamic=True makes symbols of numbers of heads, which fixed shapes are compared with."""
    torch._dynamo.reset()
    heads = 2

    def module(q, k, v, number):
        numbers, rows = number.expand(heads), number.expand(2, heads, 19)
        return {
            "krause_attention": lambda: nf.krause_attention(q, k, v, numbers, WINDOW, backend="triton"),
            "linear_attention": lambda: nf.linear_attention(q, k, v, backend="triton"),
            "hadamard_attention": lambda: nf.hadamard_attention([q], [k], v, initial_state=None, backend="triton"),
            "affine_attention": lambda: nf.affine_attention(q, k, v, rows, rows, sink=numbers, backend="triton"),
            "softmax_attention": lambda: nf.softmax_attention(q, k, v, sink=numbers, backend="triton"),
            "synchronization_attention": lambda: nf.synchronization_attention(
                q / 8, v, numbers, numbers, rows, causal=True, backend="triton"
            ),
            "attention_statistics": lambda: nf.attention_statistics(q, k, sigma=numbers, backend="triton").entropy,
        }[operator.function.__name__]()

    arguments = *(randn(2, heads, 19, 16, seed=seed) for seed in range(3)), torch.full((1,), 0.5, device=DEVICE)
    for backend in ("eager", "aot_eager"):
        compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
        assert torch.equal(compiled(*arguments), module(*arguments))


def test_plans_depend_on_layouts_and_options_alone():
    seen = []

    class Planner:
        @planned
        def plan(self, tensors, option):
            x, y = tensors
            seen.append((x.shape, x.stride(), x.dtype, x.device.type, y, option))
            return layouts(x, None)

    x, planner = torch.empty(2, 3, device=DEVICE), Planner()
    for tensor, option in ((x, 1), (x, 2), (x.T.contiguous().T, 1), (x.half(), 1)):
        for _ in range(2):
            like, nothing = allocate(planner.plan(layouts(tensor, None), option), tensor.device)
            assert Layout(*layouts(like)[0]) == Layout(*layouts(tensor)[0]) and nothing is None
    assert seen == [
        ((2, 3), (3, 1), torch.float32, "meta", None, 1),
        ((2, 3), (3, 1), torch.float32, "meta", None, 2),
        ((2, 3), (1, 2), torch.float32, "meta", None, 1),
        ((2, 3), (3, 1), torch.float16, "meta", None, 1),
    ]


# ------------------------------------------------------------------------------------------------------- ahead of time


class Ahead:
    """Notes (launch, dtypes) of what is launched, and of what a GPU would compile ahead; nothing runs."""

    def __init__(self, monkeypatch):
        self.launched, self.compiled = [], []
        monkeypatch.setattr(launch.Launch, "run", lambda made, _, surveyed: self.launched.append((made, surveyed[1][1:])))
        monkeypatch.setattr(launch.Launch, "bound", lambda made, _, kinds: lambda *_: self.launched.append((made, kinds[1:])))
        monkeypatch.setattr(launch.Launch, "is_new", lambda made, surveyed: False)
        monkeypatch.setattr(runtime_operator, "compiles", lambda device: device.type == DEVICE)
        monkeypatch.setattr(Program, "build_ahead", lambda program, _: self.build(*program._launches))

    def build(self, *launches):
        of_triton = [pair for pair in launches if isinstance(pair[0], launch.Launch)]
        self.compiled += [(made, launch.survey(tensors)[1][1:]) for made, tensors in of_triton]


def calls_with_gradients():
    """(function, sample) of every eager operator."""
    for operator in OPERATORS:
        if operator.room != "diagnostics":
            for name in samples.names(operator):
                sample = samples.of(operator).make(name, torch.float32, length=21)
                yield pytest.param(public(operator), sample, id=f"{operator.function.__name__}-{name}")
    sample = Sample(dict(zip("qkv", rows(), strict=True)), {})
    numbers = torch.ones(1, 2, 20, device=DEVICE)
    for name, alpha, beta in (("alpha", numbers, None), ("beta", None, numbers)):
        yield pytest.param(partial(nf.affine_attention, alpha=alpha, beta=beta), sample, id=f"affine_attention-{name} alone")


@pytest.mark.parametrize("function, sample", list(calls_with_gradients()))
def test_the_first_forward_compiles_what_its_backward_launches(function, sample, monkeypatch):
    forget_plans()
    ahead = Ahead(monkeypatch)
    function(**sample.tensors, **sample.options, backend="triton")
    assert not ahead.compiled
    for _ in range(2):
        tensors = {name: tensor.detach().requires_grad_() for name, tensor in sample.tensors.items()}
        o = function(**tensors, **sample.options, backend="triton")
        o, compiled = o[0] if isinstance(o, tuple) else o, ahead.compiled[:]
        ahead.launched.clear()
        torch.autograd.grad(o, list(tensors.values()), torch.zeros_like(o), allow_unused=True)
        assert ahead.launched and set(ahead.launched) <= set(compiled)  # launches are compared by identity
    assert len(compiled) == len(ahead.launched)  # once


def test_states_around_a_cuda_walk_are_compiled_ahead(monkeypatch):
    """Its own kernels need no compiler, and are not launched for meta tensors."""
    forget_plans()
    ahead, walked = Ahead(monkeypatch), []
    names = "linear_causal_forward", "linear_causal_grad_queries", "linear_causal_grad_keys"
    extension = SimpleNamespace(**{name: lambda *_, name=name, **_others: lambda *_: walked.append(name) for name in names})
    monkeypatch.setattr(_cuda, "extension", extension)
    monkeypatch.setattr(_cuda, "stream_of", lambda tensor: 0)
    q, k, v = (x.requires_grad_() for x in rows(width=64, dtype=torch.bfloat16))
    state = torch.zeros(1, 2, 64, 65, device=DEVICE)
    options = "elu", True, True, 1e-6, False, "cuda", "cuda"
    o, _ = linear(None, True, (q, k, v, state, None), *options)
    assert walked == ["linear_causal_forward"] and len(ahead.launched) == len(ahead.compiled) == 2
    ahead.launched.clear()
    torch.autograd.grad(o, (q, k, v), torch.zeros_like(o))
    assert walked[1:] == ["linear_causal_grad_queries", "linear_causal_grad_keys"] and ahead.launched == ahead.compiled
    forget_plans()


def attend(operator, q, k, v, *backends):
    """Affine or synchronization attention by the backends of the forward and of the backward."""
    ones = torch.ones(q.shape[:3], device=DEVICE)
    if operator == "affine":
        return affine(None, True, (q, k, v, ones, ones, None, None, None, None), -1, 0, 0.1, 0.0, *backends)
    one, order = torch.ones(1, device=DEVICE), torch.ones(q.shape[:2], device=DEVICE)
    return synchronization(None, True, (q, None, v, one, one, order), False, None, 1e-3, *backends)


@pytest.mark.parametrize("backends", [("cuda", "cuda"), ("cuda", "triton"), ("triton", "cuda")], ids="-".join)
@pytest.mark.parametrize("operator", ["affine", "synchronization"])
def test_a_backward_of_its_own_backend_is_compiled_ahead(operator, backends, monkeypatch):
    """What is Triton's of it, beside a kernel in CUDA C++ or without one."""
    forget_plans()
    ahead, launched = Ahead(monkeypatch), []
    names = f"{operator}_forward", f"{operator}_backward"
    numbers = dict(AFFINE_CHUNK=128, AFFINE_TERMS=128, SYNCHRONIZATION_ROWS=192)
    numbers |= dict(SYNCHRONIZATION_GRAD_ROWS=128, SYNCHRONIZATION_MEMBERS=24)
    made = {name: lambda *_, name=name, **_others: lambda *_: launched.append(name) for name in names}
    monkeypatch.setattr(_cuda, "extension", SimpleNamespace(**numbers, **made))
    monkeypatch.setattr(_cuda, "stream_of", lambda tensor: 0)
    q, k, v = (x.requires_grad_() for x in rows(width=64, dtype=torch.bfloat16))
    o = attend(operator, q, k, v, *backends)
    expected = [name for name, backend in zip(names, backends, strict=True) if backend == "cuda"]
    assert launched == [name for name in expected if "forward" in name] and ahead.compiled
    ahead.launched.clear()
    torch.autograd.grad(o, (q, v), torch.zeros_like(o))
    assert launched == expected and ahead.launched == ahead.compiled
    forget_plans()


def fresh_rows(count, width):
    """Of a width that hardly another test has, whose kernels nothing has compiled in this process."""
    return [randn(1, 2, 272, width, dtype=torch.float16, seed=seed).requires_grad_() for seed in range(count)]


ORDER = torch.ones(1, 2)


@needs_gpu
@pytest.mark.parametrize("count, call", [
    (3, lambda q, k, v: nf.krause_attention(q, k, v, 2.0, nf.SlidingWindow(37), backend="triton")),
    (3, lambda q, k, v: nf.affine_attention(q, k, v, None, v[..., 0], causal=True)),
    (5, lambda q, r, k, s, v: nf.hadamard_attention((q, r), (k, s), v, causal=True)),
    (2, lambda omega, v: nf.synchronization_attention(omega, v, 2.0, 0.5, ORDER.to(v.device))),
], ids=["krause", "affine", "hadamard", "synchronization"])
def test_a_backward_compiles_nothing(count, call, monkeypatch):
    tensors = fresh_rows(count, width=104)
    o = call(*tensors)
    for thread in threading.enumerate():
        if thread.name.startswith("ThreadPoolExecutor"):
            thread.join(timeout=120)
    monkeypatch.setattr(JITFunction, "_do_compile", lambda *arguments: pytest.fail("something is compiled"))
    gradients = torch.autograd.grad(o, tensors, torch.ones_like(o))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@needs_gpu
def test_a_graph_is_captured_while_a_backward_is_compiled():
    q, k, v = fresh_rows(3, width=168)
    o = nf.softmax_attention(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        doubled = 2 * o.detach()
        time.sleep(3)
    graph.replay()
    assert torch.equal(doubled, 2 * o)
    assert torch.isfinite(torch.autograd.grad(o, q, torch.ones_like(o))[0]).all()


# --------------------------------------------------------------------------------------------------- tensors of numbers


def constant(value, dtype=torch.float32):
    return checks.positive_per_head("sigma", value, torch.empty(1, dtype=dtype, device=DEVICE), 2)


def test_numbers_become_tensors_once():
    assert constant(2.5) is constant(2.5) and constant(2) is constant(2.0)
    assert constant(2.5).item() == 2.5 and constant(2.5).dtype == torch.float32 and constant(2.5).shape == (1,)
    assert constant(0.1, torch.float64).item() == 0.1 and constant(0.1).item() != 0.1
    for refused in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="sigma must be positive"):
            constant(refused)


def test_a_number_that_was_first_seen_in_inference_mode_can_be_saved_for_a_backward():
    q, k, v = (x.requires_grad_() for x in rows())
    with torch.inference_mode():
        expected = nf.krause_attention(q, k, v, 1.7654, backend="triton")
    o = nf.krause_attention(q, k, v, 1.7654, backend="triton")
    assert torch.equal(o, expected)
    o.sum().backward()
    assert torch.isfinite(q.grad).all()


def test_a_traced_number_is_no_tensor_of_another_call():
    q, k, v = rows()
    compiled = torch.compile(nf.krause_attention, backend="aot_eager", fullgraph=True)
    for sigma in (1.2345, 1.3456):
        expected = nf.krause_attention(q, k, v, sigma, backend="triton")
        assert torch.equal(compiled(q, k, v, sigma, backend="triton"), expected)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(x) for x in (q, k, v)]
        assert nf.krause_attention(*fake, 1.4567, backend="triton").shape == q.shape
    assert type(constant(1.4567)) is torch.Tensor


@needs_gpu
def test_a_graph_fills_its_own_tensors():
    """Memory of a graph is not to be kept for other calls, and is filled by each replay only."""
    q, k, v = rows(dtype=torch.float16)
    call = lambda sigma: nf.krause_attention(q, k, v, sigma, nf.SlidingWindow(9), backend="triton")  # noqa: E731
    expected = call(2.2345)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = call(2.3456)  # seen for the first time while the graph is captured
    assert not torch.equal(call(2.3456), expected)
    assert torch.equal(call(2.2345), expected)
    graph.replay()
    assert torch.equal(o, call(2.3456))


@needs_gpu
def test_every_stream_fills_its_own_tensors():
    side = torch.cuda.Stream()
    first = constant(3.4567)
    with torch.cuda.stream(side):
        assert constant(3.4567) is not first
    assert constant(3.4567) is first
