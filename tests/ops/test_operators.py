"""The properties that every operator of nearfar.registry promises, tested on the samples in tests/samples/."""

from pathlib import Path

import pytest
import samples
import torch
import torch.autograd.forward_ad as fw
from harness import (
    DEVICE,
    DTYPES,
    Sample,
    as_tuple,
    assert_same,
    detached,
    grad,
    has_tokens,
    leaves,
    like,
    needs_gpu,
    of_the_reference,
    poison,
    run,
)
from samples import public
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

import nearfar
from nearfar.registry import OPERATORS, PARTS

HALF = torch.float16
CASES = [
    pytest.param(op, name, id=f"{op.room}-{name}")
    for op in (*OPERATORS, *PARTS) if op.differentiable for name in samples.names(op)
]
each_sample = pytest.mark.parametrize("operator, name", CASES)
# Where calls are interpreted they take seconds: tests of many calls take the first sample of each operator there.
FIRST = list({case.values[0].function: case for case in reversed(CASES)}.values())
samples_of_many_calls = pytest.mark.parametrize("operator, name", CASES if DEVICE == "cuda" else FIRST)
each_operator = pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.function.__name__)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def make(operator, name, dtype, **keywords):
    return samples.of(operator).make(name, dtype, **keywords)


def op(operator, suffix=""):
    return getattr(torch.ops.nearfar, operator.op + suffix).default


@each_dtype
@each_sample
def test_kernels_against_the_oracle(operator, name, dtype):
    sample = make(operator, name, dtype)
    o, gradients = run(public(operator), sample)
    samples.of(operator).check(sample, like(o), o, gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@each_sample
def test_reference_against_the_oracle(operator, name, dtype):
    sample = make(operator, name, dtype, device="cpu")
    o, gradients = run(public(operator), sample, backend="reference")
    module = samples.of(operator)
    selected = {"selected": module.reference_selection(sample)} if hasattr(module, "reference_selection") else {}
    with of_the_reference():
        module.check(sample, like(o), o, gradients, **selected)


@each_sample
def test_reference_derivatives(operator, name):
    sample = make(operator, name, torch.float64, device="cpu", length=7)
    tensors = leaves(sample)

    def function(*values):
        return public(operator)(**dict(zip(tensors, values, strict=True)), **sample.options, backend="reference")

    # Fast mode compares along random directions: every entry enters, at a fraction of the calls.
    assert torch.autograd.gradcheck(function, tuple(tensors.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tuple(tensors.values()), fast_mode=True)


def run_op(operator, sample, do):
    """Forward and backward through the registered operators: outputs and gradients, everything that they return."""
    module = samples.of(operator)
    outputs = op(operator)(*module.op_arguments(sample))
    gradients = op(operator, "_backward")(*module.backward_arguments(sample, do, outputs))
    return list(as_tuple(outputs)), tree_leaves(gradients)


def test_poison_reaches_every_way_of_allocation():
    zeros = torch.zeros(3, device=DEVICE)
    with poison():
        made = [torch.empty(3), torch.empty_like(zeros), zeros.new_empty(3), torch.empty_strided((3,), (1,))]
        integers = zeros.new_empty((2, 1), dtype=torch.int32)
    assert all(torch.isnan(tensor).all() for tensor in made)
    assert (integers == torch.iinfo(torch.int32).max).all()


@each_sample
def test_every_element_of_outputs_and_workspaces_is_written(operator, name):
    for length in (75, 3):
        sample = make(operator, name, HALF, length=length)
        with poison():
            eager = run(public(operator), sample)
            do = like(eager[0])
            poisoned = run_op(operator, sample, do)
        outputs, gradients = run_op(operator, sample, do)
        for index, (a, b) in enumerate(zip(outputs + gradients, sum(poisoned, []), strict=True)):
            assert not torch.isnan(b).any(), f"result {index} holds NaN"
            assert torch.equal(a, b), f"result {index} depends on what its memory held"
        o = tuple(outputs[: len(as_tuple(eager[0]))])
        assert_same(eager, (o, shaped(sample, gradients)))


def shaped(sample, gradients):
    """Gradients of a sample's tensors, by name and in their shapes; those of arguments that it lacks are empty or come last."""
    given = (gradient for gradient in gradients if gradient.numel())
    return {n: g.reshape(t.shape) for (n, t), g in zip(sample.tensors.items(), given, strict=False)}


@each_sample
def test_the_same_bits_every_time(operator, name):
    sample = make(operator, name, HALF)
    first = run(public(operator), sample)
    for repeat in range(100 if DEVICE == "cuda" else 1):
        assert_same(first, run(public(operator), sample), f"at repeat {repeat}")


@each_sample
def test_opcheck(operator, name):
    """Schema, autograd registration, fake tensors, and AOT autograd with symbolic shapes."""
    module = samples.of(operator)
    sample = make(operator, name, torch.float32, length=19)
    arguments = module.op_arguments(sample)
    torch.library.opcheck(op(operator), module.op_arguments(Sample(leaves(sample), sample.options)))
    outputs = op(operator)(*arguments)
    torch.library.opcheck(op(operator, "_backward"), module.backward_arguments(sample, upstream(operator, sample), outputs))


def upstream(operator, sample):
    """A gradient for each output of the public function."""
    return like(public(operator)(**sample.tensors, **sample.options, backend="triton"))


def layouts(sample):
    """The sample, and with its tokens before its heads, (B, N, H, D) in memory."""
    yield sample
    moved = {
        name: tensor.transpose(1, 2).contiguous().transpose(1, 2) if has_tokens(name) else tensor
        for name, tensor in sample.tensors.items()
    }
    yield Sample(moved, sample.options)


@each_sample
def test_fake_and_meta_tensors_tell_shapes_strides_and_dtypes(operator, name):
    module = samples.of(operator)
    for sample in layouts(make(operator, name, HALF, length=19)):
        arguments = module.op_arguments(sample)
        outputs = op(operator)(*arguments)
        backward_arguments = module.backward_arguments(sample, upstream(operator, sample), outputs)
        gradients = op(operator, "_backward")(*backward_arguments)

        def to_meta(value):
            return value.to("meta") if isinstance(value, torch.Tensor) else value

        meta = op(operator)(*tree_map(to_meta, arguments))
        meta_gradients = op(operator, "_backward")(*tree_map(to_meta, backward_arguments))
        with FakeTensorMode() as mode:
            fake = op(operator)(*tree_map(lambda a: mode.from_tensor(a) if isinstance(a, torch.Tensor) else a, arguments))
        for real, other in zip(tree_leaves((outputs, gradients)), tree_leaves((meta, meta_gradients)), strict=True):
            assert (other.shape, other.stride(), other.dtype) == (real.shape, real.stride(), real.dtype)
        for real, other in zip(outputs, fake, strict=True):
            assert (other.shape, other.stride(), other.dtype) == (real.shape, real.stride(), real.dtype)
            assert other.device == real.device


@each_sample
def test_compile_without_graph_break(operator, name):
    torch._dynamo.reset()
    sample = make(operator, name, torch.float32, length=19)
    compiled = torch.compile(public(operator), fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    assert_same(run(public(operator), sample), run(compiled, sample), "when compiled")


@each_sample
def test_compile_once_for_all_lengths(operator, name):
    torch._dynamo.reset()
    compiled = torch.compile(
        public(operator), fullgraph=True, dynamic=True, backend="inductor" if DEVICE == "cuda" else "aot_eager"
    )
    lengths = samples.of(operator).compile_lengths(name)
    for index, length in enumerate(lengths if DEVICE == "cuda" else lengths[:2]):
        sample = make(operator, name, torch.float32, length=length)
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            result = run(compiled, sample)
        assert_same(run(public(operator), sample), result, f"when compiled, at length {length}")


@each_sample
def test_compile_the_reference(operator, name):
    """What "auto" takes for CPU tensors: one graph for all lengths, of one block of rows and of several, packed or not."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(public(operator), fullgraph=True, dynamic=True, backend=counter)
    for length in (19, 35, 150):
        sample = make(operator, name, torch.float32, device="cpu", length=length)
        expected = run(public(operator), sample, backend="auto")
        assert_same(expected, run(compiled, sample, backend="auto"), f"when compiled, at length {length}")
    assert counter.frame_count <= 2


@each_sample
def test_function_transforms_of_the_reference(operator, name):
    """torch.func: grad, and vmap of it over a batch of the tensors with tokens."""
    sample = make(operator, name, torch.float32, device="cpu", length=19)
    outputs, expected = run(public(operator), sample, backend="reference")
    do = as_tuple(like(outputs))

    def loss(tensors):
        o = as_tuple(public(operator)(**tensors, **sample.options, backend="reference"))
        return sum((part * d).sum() for part, d in zip(o, do, strict=True))

    assert_same(((), torch.func.grad(loss)(sample.tensors)), ((), expected))
    other = {n: t.flip(2) if has_tokens(n) else t for n, t in sample.tensors.items()}
    batch = {n: torch.stack((t, other[n])) if has_tokens(n) else t for n, t in sample.tensors.items()}
    dims = {n: 0 if has_tokens(n) else None for n in batch}
    mapped = torch.func.vmap(torch.func.grad(loss), in_dims=(dims,))(batch)
    for index, tensors in enumerate((sample.tensors, other)):
        own = {n: gradient[index] for n, gradient in mapped.items()}
        torch.testing.assert_close(own, torch.func.grad(loss)(tensors), rtol=1e-4, atol=1e-5)


def tangents(sample):
    return {n: like(t, seed=31) for n, t in sample.tensors.items()}


@each_sample
def test_forward_ad_of_the_kernels_is_refused(operator, name):
    """A tangent of any one tensor, by each way to bring it, forward over reverse and batched too; then all is as before."""
    sample = make(operator, name, torch.float32, length=5)
    function = public(operator)
    expected = function(**sample.tensors, **sample.options, backend="triton")

    def call(**tensors):
        return function(**{**sample.tensors, **tensors}, **sample.options, backend="triton")

    for only, tangent in tangents(sample).items():
        one, x = (lambda y, only=only: call(**{only: y})), sample.tensors[only]
        with pytest.raises(NotImplementedError, match=f'{operator.function.__name__}.*backend="reference"'):
            torch.func.jvp(one, (x,), (tangent,))
        with fw.dual_level(), pytest.raises(NotImplementedError, match=operator.function.__name__):
            one(fw.make_dual(x, tangent))
        with fw.dual_level(), pytest.raises(NotImplementedError, match=operator.function.__name__):
            one(fw.make_dual(x.clone().requires_grad_(), tangent))
    first = next(iter(sample.tensors))
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.hessian(lambda y: as_tuple(call(**{first: y}))[0].sum())(sample.tensors[first])
    with fw.dual_level():  # no tensor has a tangent
        assert_same((call(), {}), (expected, {}), "beside a level of forward AD")
        tensors = leaves(sample)
        o = as_tuple(call(**tensors))[0]
        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.autograd.grad(o, list(tensors.values()), fw.make_dual(like(o), like(o)), allow_unused=True)
    assert_same((call(), {}), (expected, {}), "after forward AD")


@each_sample
def test_a_plain_forward_differentiated_in_forward_ad_is_refused(operator, name):
    """What the forward decided does not bind the backward."""
    sample = make(operator, name, torch.float32, length=5)
    tensors = leaves(sample)
    o = as_tuple(public(operator)(**tensors, **sample.options, backend="triton"))[0].clone()
    with fw.dual_level(), pytest.raises(NotImplementedError, match=operator.function.__name__):
        torch.autograd.grad(o, list(tensors.values()), fw.make_dual(like(o), like(o)), allow_unused=True)


@each_sample
def test_forward_ad_of_the_reference(operator, name):
    """Against differences of float64, of all tensors at once."""
    sample = make(operator, name, torch.float64, device="cpu", length=5)
    directions, step = {n: like(t, seed=31) for n, t in sample.tensors.items()}, 1e-6

    def call(*values):
        tensors = dict(zip(sample.tensors, values, strict=True))
        return as_tuple(public(operator)(**tensors, **sample.options, backend="reference"))

    x, t = tuple(sample.tensors.values()), tuple(directions.values())
    _, got = torch.func.jvp(call, x, t)
    ahead, behind = (call(*[a + sign * step * b for a, b in zip(x, t, strict=True)]) for sign in (1, -1))
    for tangent, a, b in zip(got, ahead, behind, strict=True):
        torch.testing.assert_close(tangent, (a - b) / (2 * step), rtol=1e-5, atol=1e-5)


@samples_of_many_calls
def test_batched_gradients(operator, name):
    """torch.autograd.grad(is_grads_batched=True), and vmap over it, of a plain forward: what a loop gives."""
    sample = make(operator, name, torch.float32, length=19)
    tensors = leaves(sample)
    o = as_tuple(public(operator)(**tensors, **sample.options, backend="triton"))
    do = [torch.stack([like(part, seed=s) for s in (1, 2, 3)]) for part in o]

    def gradients(*do, **options):
        return torch.autograd.grad(o, list(tensors.values()), do, retain_graph=True, **options)

    expected = [torch.stack(parts) for parts in zip(*[gradients(*one) for one in zip(*do, strict=True)], strict=True)]
    for got in (gradients(*do, is_grads_batched=True), torch.vmap(gradients)(*do)):
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)


@samples_of_many_calls
def test_vmap_of_the_kernels(operator, name):
    """Over all tensors, nested and in chunks, and over each alone, parameters of heads among them; with gradients."""
    first = make(operator, name, torch.float32, length=19)
    second = Sample({n: t * 0.75 for n, t in first.tensors.items()}, first.options)
    function = public(operator)
    expected = [function(**sample.tensors, **sample.options, backend="triton") for sample in (first, second)]
    stacked = {n: torch.stack((t, second.tensors[n])) for n, t in first.tensors.items()}

    def call(tensors):
        return function(**tensors, **first.options, backend="triton")

    def check(got, results):
        for part, wanted in zip(as_tuple(got), zip(*map(as_tuple, results), strict=True), strict=True):
            assert torch.equal(part, torch.stack(wanted))

    check(torch.vmap(call)(stacked), expected)
    check(torch.vmap(call, chunk_size=1)(stacked), expected)
    nested = torch.vmap(torch.vmap(call))({n: x[None] for n, x in stacked.items()})
    check(tuple(part[0] for part in as_tuple(nested)), expected)
    for only in first.tensors:
        dims = {n: 1 if n == only else None for n in first.tensors}
        mixed = {**first.tensors, only: stacked[only].movedim(0, -1 if stacked[only].dim() == 1 else 1)}
        if stacked[only].dim() == 1:
            dims[only] = 0
        others = [{**first.tensors, only: x} for x in stacked[only]]
        check(torch.vmap(call, in_dims=(dims,))(mixed), [call(tensors) for tensors in others])

    def loss(tensors):
        return sum(part.square().sum() for part in as_tuple(call(tensors)))

    per_sample = torch.vmap(torch.func.grad(loss))(stacked)
    summed = torch.func.grad(lambda x: sum(part.square().sum() for part in as_tuple(torch.vmap(call)(x))))(stacked)
    for index, sample in enumerate((first, second)):
        wanted = torch.func.grad(loss)(sample.tensors)
        for key, gradient in wanted.items():
            assert torch.equal(per_sample[key][index], gradient) and torch.equal(summed[key][index], gradient), key


@each_sample
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_autocast(operator, name, backend):
    """float32 inputs are cast to the autocast dtype, but phases; gradients come back in float32."""
    sample = make(operator, name, torch.float32, length=19)
    casts = operator not in PARTS
    cast = Sample({n: t.to(HALF) if casts and has_tokens(n) else t for n, t in sample.tensors.items()}, sample.options)
    expected_o, expected = run(public(operator), cast, backend=backend)
    tensors = leaves(sample)
    with torch.autocast(DEVICE, dtype=HALF):
        o = public(operator)(**tensors, **sample.options, backend=backend)
    gradients = dict(zip(tensors, grad(o, list(tensors.values()), like(o)), strict=True))
    assert as_tuple(o)[0].dtype == as_tuple(expected_o)[0].dtype
    assert_same((o, {}), (expected_o, {}), "under autocast")
    for key, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, expected[key].float()), key
    with torch.autocast(DEVICE, dtype=HALF), torch.autocast(DEVICE, enabled=False):
        assert as_tuple(public(operator)(**sample.tensors, **sample.options, backend=backend))[0].dtype == torch.float32


@each_sample
def test_activation_checkpointing(operator, name):
    sample = make(operator, name, HALF, length=19)

    def checkpointed(**keywords):
        return checkpoint(public(operator), use_reentrant=False, **keywords)

    assert_same(run(public(operator), sample), run(checkpointed, sample), "under checkpointing")


@each_sample
def test_double_backward_of_the_kernels_is_refused(operator, name):
    sample = make(operator, name, torch.float32, length=5)
    tensors = leaves(sample)
    o = public(operator)(**tensors, **sample.options, backend="triton")
    first = torch.autograd.grad(o, list(tensors.values()), like(o), create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no double backward.*reference"):
        first.square().sum().backward()


@each_sample
def test_gradients_of_some_inputs_only(operator, name):
    sample = make(operator, name, HALF, length=19)
    o, gradients = run(public(operator), sample)
    for only in sample.tensors:
        tensors = {n: t.detach().requires_grad_(n == only) for n, t in sample.tensors.items()}
        result = public(operator)(**tensors, **sample.options, backend="triton")
        assert torch.equal(grad(result, [tensors[only]], like(o))[0], gradients[only]), only
    with torch.no_grad():
        result = public(operator)(**leaves(sample), **sample.options, backend="triton")
    assert not any(part.requires_grad for part in as_tuple(result))
    assert_same((result, {}), (o, {}), "without gradients")


@each_sample
def test_backends_agree_and_auto_is_one_of_them(operator, name):
    """At the roundings of float32, as the selections of the samples are clear."""
    sample = make(operator, name, torch.float32)
    kernel, reference = (run(public(operator), sample, backend=backend) for backend in ("triton", "reference"))
    torch.testing.assert_close(kernel, reference, rtol=2e-5, atol=2e-5)
    assert_same(run(public(operator), sample, backend="auto"), kernel if DEVICE == "cuda" else reference)


@pytest.mark.gpu
@needs_gpu
@each_sample
def test_cuda_graph(operator, name):
    sample = make(operator, name, HALF)
    expected = run(public(operator), sample)
    do = like(expected[0])
    tensors = leaves(sample)

    def step():
        o = public(operator)(**tensors, **sample.options, backend="triton")
        return detached(o), dict(zip(tensors, grad(o, list(tensors.values()), do), strict=True))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for tensor in tree_leaves(captured):
        tensor.fill_(float("nan"))
    graph.replay()
    assert_same(expected, captured, "in a CUDA graph")
    # New numbers in the same memory: the graph computes with them, not with those of its capture.
    query = next(iter(tensors))
    with torch.no_grad():
        tensors[query].mul_(0.5)
    graph.replay()
    changed = Sample({**sample.tensors, query: tensors[query].detach().clone()}, sample.options)
    assert_same(run(public(operator), changed, do), captured, "in a CUDA graph")


@pytest.mark.gpu
@needs_gpu
@each_sample
def test_other_stream(operator, name):
    """Inputs are written late on a side stream; a kernel on any other stream would read them before."""
    sample = make(operator, name, HALF)
    expected = run(public(operator), sample)
    do = like(expected[0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = {n: torch.full_like(t, float("nan")) for n, t in sample.tensors.items()}
        torch.cuda._sleep(50_000_000)
        for key, tensor in late.items():
            tensor.copy_(sample.tensors[key])
        result = run(public(operator), Sample(late, sample.options), do)
    stream.synchronize()
    assert_same(expected, result, "on another stream")


@each_operator
def test_rooms(operator):
    """An operator's file has one name in every folder."""
    root = Path(__file__).resolve().parents[2]
    for room in ("python/nearfar/ops", "python/nearfar/reference", "triton_kernels", "tests/samples"):
        assert (root / room / f"{operator.room}.py").is_file(), room
    assert (root / "tests/ops" / f"test_{operator.room}.py").is_file()
    assert getattr(nearfar, operator.function.__name__) is operator.function
    assert operator.function.__name__ in nearfar.__all__
    assert operator.source in operator.function.__doc__
    for section in ("Args:", "Returns:", "Raises:"):
        assert section in operator.function.__doc__
