"""The contract of docs/contract.md, for whatever nearfar.registry lists; what test_operators.py tests is not repeated here.

A new operator is tested by its registry line and its file in tests/samples.
"""

import copy
import functools
import io
import pickle
import threading
from contextlib import nullcontext

import pytest
import samples
import torch
from harness import DEVICE, Sample, as_tuple, assert_same, has_tokens, leaves, like, needs_gpu, run
from samples import public, steps
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

import nearfar as nf
from nearfar.registry import OPERATORS, PARTS, STEPS

pytestmark = pytest.mark.full

LENGTH = 21
DIFFERENTIABLE = [operator for operator in (*OPERATORS, *PARTS) if operator.differentiable]
BACKENDS = ("triton", "reference")
PER_HEAD = {"sigma", "sink", "coupling", "bandwidth"}  # parameters without a batch


# Triton's interpreter takes a second for a call, so there one sample of each operator goes through the kernels.
FEW = DEVICE == "cpu"


def names(operator, backend):
    return samples.names(operator)[: 1 if FEW and backend == "triton" else None]


def case(operator, name, *rest):
    return pytest.param(operator, name, *rest, id="-".join((operator.function.__name__, name, *rest)))


each_operator = pytest.mark.parametrize("operator, name", [case(op, samples.names(op)[0]) for op in DIFFERENTIABLE])
each_backend = pytest.mark.parametrize("backend", BACKENDS)
CALLS = [(op, name, backend) for op in DIFFERENTIABLE for backend in BACKENDS for name in names(op, backend)]
PACKED = [(op, n, backend) for op in DIFFERENTIABLE for backend in BACKENDS for n in samples.names(op) if "packed" in n]
UNPACKED = [call for call in CALLS if "packed" not in call[1]]


def each(calls):
    return pytest.mark.parametrize("operator, name, backend", [case(*call) for call in calls])


each_call, each_packed, each_unpacked = map(each, (CALLS, PACKED, UNPACKED))
each_step = pytest.mark.parametrize("step", STEPS, ids=lambda step: step.function.__name__)


def make(operator, name, dtype=torch.float32, length=LENGTH, batch=1, **keywords):
    """A sample of so many batch elements."""
    sample = samples.of(operator).make(name, dtype, length=length, **keywords)
    return change(sample, lambda t: torch.cat((t, t.flip(0)))[:batch], of_batch(sample)) if "packed" not in name else sample


@functools.cache
def expected_of(operator, name, backend):
    """(Sample, its result by `run`)."""
    sample = make(operator, name)
    return sample, run(public(operator), sample, backend=backend)


def of_batch(sample):
    """Names of the tensors that have a number for each batch element; of those of packed sequences it is 1."""
    return [name for name in sample.tensors if name not in PER_HEAD]


def change(sample, function, names):
    return Sample({n: function(t) if n in names else t for n, t in sample.tensors.items()}, sample.options)


def agree(got, expected, what):
    """Two results of `run`, to the roundings of float32 sums, whose terms are of size 1 or more and may cancel to 0."""
    for kind, parts in (("output", zip(as_tuple(got[0]), as_tuple(expected[0]), strict=True)),
                        ("gradient", ((got[1][n], expected[1][n]) for n in expected[1]))):
        for a, b in parts:
            size = b.abs().max().item() if b.numel() else 0
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * max(size, 1.0), msg=lambda m, k=kind: f"{k} {what}: {m}")


def rows_of(outputs, length):
    """The outputs with a row for each query: states have none."""
    return [part for part in as_tuple(outputs) if part.dim() > 2 and part.shape[2] == length]


# --------------------------------------------------------------------------------------------------------------- layouts


def reversed_in_memory(x):
    order = list(range(x.dim()))[::-1]
    return x.permute(order).contiguous().permute(order)


def every_other(x):
    return torch.stack((x, x + 1), -1).flatten(-2)[..., ::2] if x.dim() else x


def offset(x):
    return torch.cat((x.new_ones(1), x.flatten()))[1:].view(x.shape)


def batch_last(x):
    return x.movedim(0, -1).contiguous().movedim(-1, 0) if x.dim() else x


def padded_rows(x):
    return torch.nn.functional.pad(x, (3, 5), value=float("nan"))[..., 3:-5] if x.dim() else x


def negated_lazily(x):
    """A view that torch negates when it is read, as the imaginary part of a conjugate is."""
    return torch.complex(torch.zeros_like(x), -x).conj().imag


LAYOUTS = [reversed_in_memory, every_other, offset, batch_last, padded_rows, negated_lazily]
each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)


@each_layout
@each_call
def test_tensors_of_any_rank_come_in_any_layout(operator, name, backend, layout):
    """Inputs, and the upstream gradient of every output, have the same numbers however they lie in memory."""
    sample, expected = expected_of(operator, name, backend)
    do = like(expected[0])
    moved = Sample({n: layout(t) for n, t in sample.tensors.items()}, sample.options)
    assert all(torch.equal(moved.tensors[n], t) for n, t in sample.tensors.items())
    other = tuple(map(layout, as_tuple(do)))
    agree(run(public(operator), moved, other if isinstance(do, tuple) else other[0], backend), expected, "of moved tensors")


@pytest.mark.parametrize("dims", [(), (2,), (0, 1), (3,)], ids=["a sum", "rows", "batch and heads", "width"])
@each_call
def test_expanded_gradients(operator, name, backend, dims):
    """Upstream gradients that are one number, or the same for each row, batch element and head, or element of a row."""
    sample, (outputs, _) = expected_of(operator, name, backend)

    def expanded(part, index):
        if not dims:
            return part.new_ones(()).expand(part.shape)
        d = like(part, 1 + index)
        for dim in dims:
            if dim < part.dim():
                d = d.narrow(dim, 0, 1)
        return d.expand(part.shape)

    do = tuple(expanded(part, index) for index, part in enumerate(as_tuple(outputs)))
    got, expected = (
        run(public(operator), sample, d if isinstance(outputs, tuple) else d[0], backend)
        for d in (do, tuple(d.contiguous() for d in do))
    )
    agree(got, expected, "of an expanded gradient")


# ----------------------------------------------------------------------------------------------------------- empty sizes


def outcome(operator, sample, backend):
    """Shapes, dtypes and gradients of a call, or the type of its error and its first word, the argument's name."""
    try:
        outputs, gradients = run(public(operator), sample, backend=backend)
    except (TypeError, ValueError) as error:
        return type(error), str(error)
    return outputs, gradients


@each_operator
@pytest.mark.parametrize("what", ["no batch", "no tokens", "no queries", "one token"])
def test_empty_sizes(operator, name, what):
    """Every backend accepts them alike, or refuses them alike; without rows there is nothing but zeros to sum."""
    sample = make(operator, name)
    queries = [n for n in sample.tensors if n[0] == "q" or n in ("omega", "alpha", "beta") or n == "order"]
    if what == "no batch":
        sample = change(sample, lambda t: t[:0], of_batch(sample))
    else:
        tokens = [n for n in sample.tensors if has_tokens(n) or n in ("alpha", "beta", "order") and sample.tensors[n].dim() > 2]
        chosen = [n for n in tokens if n in queries] if what == "no queries" else tokens
        if not chosen:
            pytest.skip("no tensor has rows of queries alone")
        count = 1 if what == "one token" else 0
        sample = change(sample, lambda t: t[:, :, :count].contiguous() if t.dim() > 2 else t, chosen)
        for ends, tensor in (("cu_seqlens", next(iter(sample.tensors))), ("cu_seqlens_k", "k")):
            if ends in sample.options:
                tokens = count if tensor in chosen or ends == "cu_seqlens" else sample.tensors[tensor].shape[2]
                sample.options[ends] = torch.tensor([0, tokens], dtype=torch.int32, device=DEVICE)
    kernel, reference = (outcome(operator, sample, backend) for backend in BACKENDS)
    assert isinstance(kernel[0], type) == isinstance(reference[0], type), (kernel, reference)
    if isinstance(kernel[0], type):
        assert kernel == reference
        return
    agree(kernel, reference, what)
    if what != "one token":
        for key, gradient in kernel[1].items():
            if key != "initial_state":  # it may go to the output as it is
                assert not gradient.any(), key


# ------------------------------------------------------------------------------------------------------- NaN, isolation


@each_unpacked
def test_nan_of_one_batch_element_stays_there(operator, name, backend):
    sample = make(operator, name, batch=2)
    names = of_batch(sample)
    expected = run(public(operator), sample, backend=backend)
    do = like(expected[0])
    for key in (n for n in names if has_tokens(n)):
        spoilt = change(sample, lambda t: torch.cat((t[:1], torch.full_like(t[1:], float("nan")))), [key])
        outputs, gradients = run(public(operator), spoilt, do, backend)
        for part, clean in zip(as_tuple(outputs), as_tuple(expected[0]), strict=True):
            assert torch.equal(part[0], clean[0]), f"NaN of {key} reached an output"
        for other in names:
            assert torch.equal(gradients[other][0], expected[1][other][0]), f"NaN of {key} reached the gradient of {other}"
        # The distance of an oscillator to itself is 0, whatever its frequency: a row that sees no other one need not show it.
        alone = key == "omega" and "omega_k" not in sample.tensors
        touched = as_tuple(outputs)[0][1:]
        assert torch.isnan(touched[:, :, 1:] if alone else touched).all(), f"NaN of {key} was swallowed"
        assert any(torch.isnan(gradients[other][1:]).any() for other in names), f"no gradient shows the NaN of {key}"


@each_packed
def test_nan_of_one_packed_sequence_stays_there(operator, name, backend):
    sample, expected = expected_of(operator, name, backend)
    do = like(expected[0])

    def spoiled(tensor):
        """The tokens of a tensor that are of the sequence."""
        kind = "cu_seqlens_k" if tensor in ("k", "v") and "cu_seqlens_k" in sample.options else "cu_seqlens"
        *_, first, last, _ = sample.options[kind].tolist()
        tokens = torch.arange(sample.tensors[tensor].shape[2], device=DEVICE)
        return (tokens >= first) & (tokens < last)

    rows = ~spoiled(next(iter(sample.tensors)))
    for key in (n for n in sample.tensors if has_tokens(n)):
        spoilt = change(sample, torch.clone, [key])
        spoilt.tensors[key][:, :, spoiled(key)] = float("nan")
        outputs, gradients = run(public(operator), spoilt, do, backend)
        assert torch.equal(as_tuple(outputs)[0][:, :, rows], as_tuple(expected[0])[0][:, :, rows]), f"NaN of {key}"
        for other in (n for n in sample.tensors if has_tokens(n)):
            got, clean = (g[other][:, :, ~spoiled(other)] for g in (gradients, expected[1]))
            assert torch.equal(got, clean), f"NaN of {key} reached the gradient of {other} in another sequence"


@each_call
def test_tokens_reach_those_that_see_them_and_no_others(operator, name, backend):
    """A key that changes, and stays finite, changes no bit of a row that does not see it; NaN shows in each row that does."""
    sample = make(operator, name)
    call, module = public(operator), samples.of(operator)
    reach = module.reach(sample)
    clean = as_tuple(call(**sample.tensors, **sample.options, backend=backend))
    length = reach.shape[0]
    keys = [n for n in sample.tensors if n[0] in "kv" or n in ("omega_k", "theta")]
    if "omega" in sample.tensors and "omega_k" not in sample.tensors:
        keys.append("omega")
    at = reach.shape[1] // 2
    for key in keys:
        for number in (3.0, float("nan")):
            other = change(sample, torch.clone, [key])
            other.tensors[key][:, :, at] = number
            outputs = as_tuple(call(**other.tensors, **other.options, backend=backend))
            for part, before in zip(rows_of(outputs, length), rows_of(clean, length), strict=True):
                if number == number:
                    rows = ~reach[:, at]
                    assert torch.equal(part[:, :, rows], before[:, :, rows]), f"{key} reached a row that does not see it"
                    continue
                nan = torch.isnan(part.flatten(3)).any(-1) if part.dim() > 3 else torch.isnan(part)
                touched = reach[:, at].expand(nan.shape) if key != "v" else weighs(call, sample, at, backend)
                assert nan[touched].all(), f"NaN in {key} was swallowed"


def weighs(call, sample, at, backend):
    """(B, Hq, N) mask of the rows in which the value `at` has a weight that is not 0."""
    other = change(sample, torch.clone, ["v"])
    other.tensors["v"][:, :, at] += 64
    before, after = (as_tuple(call(**s.tensors, **s.options, backend=backend))[0] for s in (sample, other))
    return (before != after).any(-1)


@each_call
def test_nan_of_a_query_is_seen_in_its_row_alone(operator, name, backend):
    sample = make(operator, name)
    reach = samples.of(operator).reach(sample)
    query = next(iter(sample.tensors))
    if query in ("omega", "theta") and "omega_k" not in sample.tensors:
        pytest.skip("its queries are keys too")
    at = next(i for i in range(reach.shape[0] - 1, -1, -1) if reach[i].any())
    expected = run(public(operator), sample, backend=backend)
    spoilt = change(sample, torch.clone, [query])
    spoilt.tensors[query][:, :, at] = float("nan")
    outputs, gradients = run(public(operator), spoilt, like(expected[0]), backend)
    rest = torch.arange(reach.shape[0], device=DEVICE) != at
    for part, clean in zip(rows_of(outputs, len(rest)), rows_of(expected[0], len(rest)), strict=True):
        assert torch.isnan(part[:, :, at]).all(), "NaN was swallowed"
        assert torch.equal(part[:, :, rest], clean[:, :, rest]), "NaN reached another row"
    assert any(torch.isnan(gradient).any() for gradient in gradients.values()), "no gradient shows the NaN"
    assert torch.equal(gradients[query][:, :, rest], expected[1][query][:, :, rest]), "NaN reached another row's gradient"


# -------------------------------------------------------------------------------------------------------- same bits


def repeated(sample, times):
    return change(sample, lambda t: t.repeat(times, *(1,) * (t.dim() - 1)), of_batch(sample))


def assert_batch_invariant(operator, sample, times, backend, with_gradients=True):
    """Each of many copies of a batch gives the bits of the batch alone; gradients of parameters, sums over it, do not."""
    expected = run(public(operator), sample, backend=backend)
    do = like(expected[0])
    many = tuple(d.repeat(times, *(1,) * (d.dim() - 1)) for d in as_tuple(do))
    outputs, gradients = run(
        public(operator), repeated(sample, times), many if isinstance(do, tuple) else many[0], backend
    )
    for index, (part, clean) in enumerate(zip(as_tuple(outputs), as_tuple(expected[0]), strict=True)):
        assert torch.equal(part, clean.repeat(times, *(1,) * (clean.dim() - 1))), f"output {index} depends on the batch"
    for key in of_batch(sample) if with_gradients else ():
        clean = expected[1][key]
        assert torch.equal(gradients[key], clean.repeat(times, *(1,) * (clean.dim() - 1))), f"gradient of {key}"


of_kernels = each([call for call in UNPACKED if call[2] == "triton"])


@of_kernels
def test_batch_invariance(operator, name, backend):
    """Of the kernels: the reference's products are those of a BLAS."""
    assert_batch_invariant(operator, make(operator, name), 2 if FEW else 7, backend)


@pytest.mark.gpu
@needs_gpu
@of_kernels
def test_batch_invariance_of_131200_batch_heads(operator, name, backend):
    """Beyond 65,535 blocks of the last two dimensions of a grid; the base is 64 of them."""
    sample = make(operator, name, torch.float16, length=17)
    heads = next(iter(sample.tensors.values())).shape[1]
    base = repeated(sample, 64 // heads)
    assert_batch_invariant(operator, base, 2050, backend, operator.function.__name__ != "attention_statistics")


# ---------------------------------------------------------------------------------------------------------- transforms


def reference_function(operator, sample):
    names = list(sample.tensors)

    def function(*values):
        outputs = public(operator)(**dict(zip(names, values, strict=True)), **sample.options, backend="reference")
        return sum((part * like(part)).sum() for part in as_tuple(outputs))

    return function


@each_operator
def test_forward_derivatives_of_the_reference(operator, name):
    sample = make(operator, name, torch.float64, length=9, device="cpu")
    function, values = reference_function(operator, sample), tuple(sample.tensors.values())
    tangents = tuple(like(t, seed=40 + i) for i, t in enumerate(values))
    _, got = torch.func.jvp(function, values, tangents)
    step = 1e-6
    ahead, behind = (function(*(v + sign * step * t for v, t in zip(values, tangents, strict=True))) for sign in (1, -1))
    torch.testing.assert_close(got, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-6)


@each_operator
def test_forward_derivatives_of_the_kernels_are_refused(operator, name):
    """For every tensor, by dual tensors and by torch.func.jvp, on a plain call and behind one that was cached."""
    sample = make(operator, name, length=9)
    call = public(operator)
    for key, tensor in sample.tensors.items():
        with forward_ad.dual_level(), pytest.raises(NotImplementedError):
            call(**{**sample.tensors, key: forward_ad.make_dual(tensor, like(tensor))}, **sample.options, backend="triton")
        with pytest.raises(NotImplementedError):
            torch.func.jvp(
                lambda t, key=key: as_tuple(call(**{**sample.tensors, key: t}, **sample.options, backend="triton"))[0],
                (tensor,), (like(tensor),),
            )


@each_backend
@each_operator
def test_batched_gradients_are_those_of_a_loop(operator, name, backend):
    sample = make(operator, name, length=9)
    tensors = leaves(sample)
    outputs = as_tuple(public(operator)(**tensors, **sample.options, backend=backend))
    many = [torch.stack([like(part, seed) for seed in (1, 2)]) for part in outputs]
    inputs = list(tensors.values())
    got = torch.autograd.grad(outputs, inputs, many, is_grads_batched=True, retain_graph=True)
    for index in range(2):
        expected = torch.autograd.grad(outputs, inputs, [d[index] for d in many], retain_graph=True)
        for key, a, b in zip(tensors, got, expected, strict=True):
            torch.testing.assert_close(a[index], b, rtol=1e-5, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


@each_backend
@each_operator
def test_vmap_is_a_loop(operator, name, backend):
    """Over all tensors, over one of them, and of gradients."""
    sample = make(operator, name, length=9)
    call, names = public(operator), list(sample.tensors)

    def outputs(*values):
        return as_tuple(call(**dict(zip(names, values, strict=True)), **sample.options, backend=backend))

    def loss(*values):
        return sum(part.square().sum() for part in outputs(*values))

    both = [torch.stack((t, t * 0.9)) for t in sample.tensors.values()]
    gradients = torch.func.grad(loss, argnums=tuple(range(len(names))))
    for mapped in (range(len(names)), [0], [len(names) - 1])[: 1 if FEW and backend == "triton" else None]:
        dims = tuple(0 if index in mapped else None for index in range(len(names)))
        values = [both[index] if index in mapped else t for index, t in enumerate(sample.tensors.values())]
        for function in (outputs, gradients):
            got = torch.func.vmap(function, in_dims=dims)(*values)
            for index in range(2):
                expected = function(*(v[index] if dim == 0 else v for v, dim in zip(values, dims, strict=True)))
                for a, b in zip(got, expected, strict=True):
                    torch.testing.assert_close(a[index], b, rtol=1e-4, atol=1e-5)


@each_backend
@each_operator
def test_reentrant_checkpointing(operator, name, backend):
    """Its backward takes no inputs: gradients come from .backward()."""
    sample = make(operator, name)
    names = list(sample.tensors)

    def gradients(call):
        tensors = leaves(sample)
        outputs = [o for o in as_tuple(call(*tensors.values())) if o.requires_grad]
        torch.autograd.backward(outputs, [like(o.detach()) for o in outputs])
        return [tensor.grad for tensor in tensors.values()]

    def call(*values):
        return public(operator)(**dict(zip(names, values, strict=True)), **sample.options, backend=backend)

    expected, got = gradients(call), gradients(lambda *values: checkpoint(call, *values, use_reentrant=True))
    for key, a, b in zip(names, got, expected, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b)), key


# -------------------------------------------------------------------------------------------------- compile, autocast


@pytest.mark.parametrize("backend", [pytest.param("triton", marks=[pytest.mark.gpu, needs_gpu]), "auto"])
@pytest.mark.parametrize("operator, name", [case(op, name) for op in DIFFERENTIABLE for name in samples.names(op)])
def test_one_graph_for_all_lengths(operator, name, backend):
    """After the second length nothing is compiled again; test_operators.py interprets the kernels compiled at two lengths."""
    torch._dynamo.reset()
    device = DEVICE if backend == "triton" else "cpu"
    compiled = torch.compile(public(operator), fullgraph=True, dynamic=True, backend="aot_eager")
    for index, length in enumerate((19, 26, 33, 45)):
        sample = make(operator, name, length=length, device=device)
        with torch._dynamo.config.patch(error_on_recompile=index > 1):
            result = run(compiled, sample, backend=backend)
        agree(result, run(public(operator), sample, backend=backend), f"when compiled, at length {length}")


class Call(torch.nn.Module):
    """A call with these options, of a tuple of its tensors: the guards of torch 2.9 cannot name those of a variadic one."""

    def __init__(self, operator, sample, backend):
        super().__init__()
        self.function, self.names = functools.partial(public(operator), **sample.options, backend=backend), list(sample.tensors)

    def forward(self, tensors):
        return self.function(**dict(zip(self.names, tensors, strict=True)))


def exported(operator, name, backend):
    """A call and the program that it is exported to, with a dynamic length."""
    sample = make(operator, name)
    call, dynamic = Call(operator, sample, backend), {2: torch.export.Dim.DYNAMIC}
    sizes = tuple([dynamic if has_tokens(n) or LENGTH in t.shape[2:3] else {} for n, t in sample.tensors.items()])
    tensors = tuple(sample.tensors.values())
    return call, torch.export.export(call, (tensors,), dynamic_shapes={"tensors": sizes}, strict=False)


@each_unpacked
def test_export_with_a_dynamic_length(operator, name, backend):
    """The exported program serves all lengths, on either side of the thresholds by which kernels are chosen."""
    call, program = exported(operator, name, backend)
    for other in (LENGTH, 3, 300)[: 2 if FEW and backend == "triton" else 3]:
        tensors = tuple(make(operator, name, length=other).tensors.values())
        for a, b in zip(as_tuple(program.module()(tensors)), as_tuple(call(tensors)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("operator, name", [case(*call[:2]) for call in UNPACKED if call[2] == "reference"])
def test_exported_kernels_take_every_length(operator, name):
    """By their fakes, which choose nothing by the length that they were exported with; no kernel is interpreted."""
    call, program = exported(operator, name, "triton")
    for length in (3, 100, 300, 1000):
        tensors = make(operator, name, length=length).tensors.values()
        with FakeTensorMode() as mode:
            fakes = tuple(map(mode.from_tensor, tensors))
            for a, b in zip(as_tuple(program.module()(fakes)), as_tuple(call(fakes)), strict=True):
                assert a.shape == b.shape


SELECTING = [case(*call[:2]) for call in UNPACKED if call[2] == "reference" and "top" in call[1]]


@pytest.mark.parametrize("operator, name", SELECTING)
def test_the_reference_selects_among_any_number_of_keys(operator, name):
    """Exported, too, with fewer than the 1,024 that bind a kernel."""
    call, program = exported(operator, name, "reference")
    tensors = tuple(make(operator, name, length=1030).tensors.values())
    assert torch.equal(program.module()(tensors), call(tensors))


@pytest.mark.parametrize("operator, name", [param for param in SELECTING if "window" not in param.values[1]])
def test_too_many_candidates_of_a_kernel_are_an_error(operator, name):
    compiled = torch.compile(public(operator), fullgraph=True, dynamic=True, backend="eager")
    sample, message = make(operator, name, length=1030), "top_k over 1030 candidate keys a query; kernels take at most 1024"
    for function, error in ((public(operator), ValueError), (compiled, Exception)):
        with pytest.raises(error, match=message):
            function(**sample.tensors, **sample.options, backend="triton")
    torch._dynamo.reset()


@each_operator
def test_autocast_leaves_float64_and_integers_alone(operator, name):
    sample = make(operator, name, torch.float64, device="cpu")
    call = public(operator)
    expected = as_tuple(call(**sample.tensors, **sample.options))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for a, b in zip(as_tuple(call(**sample.tensors, **sample.options)), expected, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)
        query = next(iter(sample.tensors))
        integers = {**sample.tensors, query: sample.tensors[query].long()}
        with pytest.raises(TypeError, match=query[:1]):
            call(**integers, **sample.options)


@each_call
def test_another_default_device_and_dtype(operator, name, backend):
    sample, expected = expected_of(operator, name, backend)
    do = like(expected[0])
    with torch.device("meta"):
        assert_same(run(public(operator), sample, do, backend), expected, "under another default device")
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            result = run(public(operator), sample, do, backend)
        finally:
            torch.set_default_dtype(torch.float32)
        assert_same(result, expected, f"under the default dtype {dtype}")
        assert [p.dtype for p in as_tuple(result[0])] == [p.dtype for p in as_tuple(expected[0])]


# ------------------------------------------------------------------------------------------------------ threads, errors


@pytest.mark.parametrize("backend", [pytest.param("triton", marks=[pytest.mark.gpu, needs_gpu]), "reference"])
@each_operator
def test_threads_get_what_one_gets(operator, name, backend):
    """Triton's interpreter itself does not run in two threads."""
    problems = [make(operator, name, length=length) for length in (LENGTH, 30)]
    expected = [run(public(operator), sample, backend=backend) for sample in problems]
    failures = []

    def work(index):
        try:
            for _ in range(3):
                assert_same(run(public(operator), problems[index], backend=backend), expected[index], "in a thread")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def names_it(key, message):
    """Whether an error names the argument; q1, q2, .. of a list go by the name of the list, qs."""
    return key in message or (key[-1].isdigit() and f"{key[:-1]}s" in message)


@each_call
def test_errors_name_the_argument(operator, name, backend):
    sample = make(operator, name, length=9)
    call = public(operator)
    wrong = {
        "a list": lambda t: t.tolist() if t.dim() else [1.0],
        "integers": lambda t: t.long(),
        "complex numbers": lambda t: t.to(torch.complex64),
        "two dimensions more": lambda t: t.expand(3, 2, *t.shape),
    }
    if len(sample.tensors) > 1:
        wrong["another device"] = lambda t: t.to("meta")
    for key, tensor in sample.tensors.items():
        for what, function in wrong.items():
            with pytest.raises((TypeError, ValueError)) as error:
                call(**{**sample.tensors, key: function(tensor)}, **sample.options, backend=backend)
            assert names_it(key, str(error.value)), f"{key} as {what}: {error.value}"
    with pytest.raises(ValueError, match="backend"):
        call(**sample.tensors, **sample.options, backend="cudnn")


# ------------------------------------------------------------------------------------------------------ steps and layers


@each_backend
@each_step
def test_steps_write_where_autograd_sees_it(step, backend):
    """What was saved for a backward, and `out`, count as changed."""
    sample = steps.make(step)
    for key, tensor in sample.memory.items():
        if not tensor.is_floating_point():
            continue
        weight = torch.ones_like(tensor, requires_grad=True)
        loss = (weight * tensor).sum()
        steps.call(step, sample, backend=backend)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, weight)
        assert tensor._version, key
    out = torch.zeros_like(steps.call(step, steps.clone(sample), backend=backend))
    weight = torch.ones_like(out, requires_grad=True)
    loss = (weight * out).sum()
    assert steps.call(step, sample, out=out, backend=backend) is out
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, weight)


@each_layout
@each_backend
@each_step
def test_steps_take_tensors_in_any_layout(step, backend, layout):
    sample = steps.make(step)
    moved = steps.clone(sample)._replace(tensors={n: layout(t) for n, t in sample.tensors.items()})
    expected = steps.call(step, sample, backend=backend)
    torch.testing.assert_close(steps.call(step, moved, backend=backend), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moved.memory, sample.memory, rtol=1e-5, atol=1e-6)


@each_backend
@each_step
def test_out_of_a_step_is_written_as_it_lies(step, backend):
    """Strided memory between its elements is left alone; elements that share memory are refused by name."""
    sample = steps.make(step)
    expected = steps.call(step, steps.clone(sample), backend=backend)
    between_heads, between_rows = (lambda x: torch.stack((x, x), 1)[:, 0]), (lambda x: torch.stack((x, x), 3)[..., 0, :])
    for layout in (between_heads, between_rows, batch_last, every_other):
        out = layout(torch.full_like(expected, 7))
        whole = out.as_strided((out.untyped_storage().nbytes() // out.element_size(),), (1,), 0)
        before = whole.clone()
        try:
            got = steps.call(step, steps.clone(sample), out=out, backend=backend)
        except ValueError as error:
            assert "out" in str(error)
            assert torch.equal(whole, before)
            continue
        assert got is out and torch.equal(out, expected)
        out.copy_(torch.full_like(out, 7))
        other = before.clone()
        other.as_strided(out.shape, out.stride(), 0).fill_(7)
        assert torch.equal(whole, other), "memory beside out was written"
    shared = torch.zeros_like(expected[:1]).expand(expected.shape)
    with pytest.raises(ValueError, match="out"):
        steps.call(step, steps.clone(sample), out=shared, backend=backend)


@each_backend
@each_step
def test_nan_of_a_sequence_of_a_step_stays_there(step, backend):
    sample = steps.make(step)
    clean = steps.clone(sample)
    expected = steps.call(step, clean, backend=backend)
    for key in sample.tensors:
        spoilt = steps.clone(sample)
        tensor = sample.tensors[key].clone()
        tensor[1] = float("nan")
        spoilt = spoilt._replace(tensors={**sample.tensors, key: tensor})
        o = steps.call(step, spoilt, backend=backend)
        assert torch.equal(o[0], expected[0]), f"NaN of {key} reached another sequence"
        assert torch.isnan(o[1]).any(-1).all(), f"NaN of {key} was swallowed"
        for part, whole in spoilt.memory.items():
            assert torch.equal(whole[0], clean.memory[part][0]), f"NaN of {key} reached {part} of another sequence"


@pytest.mark.parametrize("backend", ["triton", "auto"])
@each_step
def test_steps_compile_without_graph_break(step, backend):
    torch._dynamo.reset()
    device = DEVICE if backend == "triton" else "cpu"
    compiled = torch.compile(lambda sample: steps.call(step, sample, backend=backend), fullgraph=True, backend="aot_eager")
    for batch in (2, 3, 5):
        sample = steps.make(step, batch=batch, device=device)
        expected = steps.clone(sample)
        o = steps.call(step, expected, backend=backend)
        torch.testing.assert_close(compiled(sample), o, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(sample.memory, expected.memory, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["fake", "meta"])
@pytest.mark.parametrize("backend", ["triton", "auto", "reference"])
@each_step
def test_steps_of_fake_and_meta_tensors(step, backend, kind):
    """They tell shape, strides and dtype of the output, and touch no memory."""
    mode = FakeTensorMode()
    convert = mode.from_tensor if kind == "fake" else lambda tensor: tensor.to("meta")
    sample = steps.make(step)
    expected = steps.call(step, steps.clone(sample))
    out, sample = tree_map_only(torch.Tensor, convert, (torch.empty_like(expected), sample))
    with mode if kind == "fake" else nullcontext():
        for o in (steps.call(step, sample, backend=backend), steps.call(step, sample, out=out, backend=backend)):
            assert (o.shape, o.stride(), o.dtype, o.device) == (expected.shape, expected.stride(), expected.dtype, out.device)


@each_step
def test_steps_are_batch_invariant(step):
    """A sequence of a batch gets the bits that it gets alone, from the kernels."""
    backend = "triton"
    sample = steps.make(step, batch=3)
    parts = [
        steps.StepSample(*({n: t[b : b + 1].clone() for n, t in group.items()} for group in sample[:2]), sample.options)
        for b in range(3)
    ]
    whole = steps.call(step, sample, backend=backend)
    for b, part in enumerate(parts):
        assert torch.equal(steps.call(step, part, backend=backend), whole[b : b + 1])
        for key, tensor in part.memory.items():
            assert torch.equal(tensor[0], sample.memory[key][b]), key


LAYERS = [getattr(nf.nn, name) for name in nf.nn.__all__ if name.endswith(("Attention", "Block"))]
each_layer = pytest.mark.parametrize("kind", LAYERS, ids=lambda kind: kind.__name__)


def layer_of(kind, **options):
    torch.manual_seed(0)
    return kind(32, 2, **options)


@each_layer
def test_layers_are_copied_pickled_and_loaded(kind):
    layer, x = layer_of(kind), torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))
    layer(x)  # what a layer keeps of its calls is copied with it
    layer.eval()
    expected = layer(x)
    fresh = kind(32, 2).eval()
    fresh.load_state_dict(layer.state_dict())
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    saved = kind(32, 2).eval()
    saved.load_state_dict(torch.load(file))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh, saved):
        assert torch.equal(other(x), expected)


MEMORIES = {
    "KrauseCache": lambda: nf.KrauseCache.empty(1, 2, 4, 16),
    "SlidingWindow": lambda: {"locality": nf.SlidingWindow(3, 1)},
    **{kind.__name__: lambda kind=kind: layer_of(kind, causal=True).init_cache(1, 8) for kind in LAYERS},
    "KrauseAttention window": lambda: layer_of(nf.nn.KrauseAttention, locality=nf.SlidingWindow(3)).init_cache(1),
}


@pytest.mark.parametrize("name", MEMORIES)
def test_caches_are_copied_pickled_and_loaded(name):
    memory = MEMORIES[name]()
    file = io.BytesIO()
    torch.save(memory, file)
    file.seek(0)
    for other in (copy.deepcopy(memory), pickle.loads(pickle.dumps(memory)), torch.load(file)):
        assert type(other) is type(memory)
        torch.testing.assert_close(tensors_of(other), tensors_of(memory), rtol=0, atol=0)


def tensors_of(memory):
    return [value for value in torch.utils._pytree.tree_leaves(memory) if isinstance(value, torch.Tensor)]
