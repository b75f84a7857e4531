"""What holds for every decoding step: what it writes to and what it leaves alone, autograd, compile, transforms, bad output."""

import io
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch
from harness import DEVICE, needs_extension, needs_gpu, randn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import nearfar as nf
from nearfar.runtime.step import overlaps_itself, share_memory
from nearfar.runtime.tensors import layouts

pytestmark = pytest.mark.full

HEADS, KV_HEADS, WIDTH, WINDOW = 4, 2, 16, 5


class Step(NamedTuple):
    """A step of a batch of sequences, in numbers and memory of its own."""

    inputs: dict  # what is read
    memory: dict  # what is updated in place
    options: dict
    call: Any  # (inputs, memory, options, out, backend)

    def __call__(self, out=None, backend="reference", **changes):
        inputs = {name: changes.get(name, x) for name, x in self.inputs.items()}
        memory = {name: changes.get(name, x) for name, x in self.memory.items()}
        return self.call(inputs, memory, self.options, out, backend)

    def clone(self):
        return self._replace(memory={name: x.clone() for name, x in self.memory.items()})


def krause(batch, dtype, **options):
    q, k, v = (randn(batch, heads, 1, WIDTH, dtype=dtype, seed=heads) for heads in (HEADS, KV_HEADS, KV_HEADS))
    memory = {f"cache.{n}": randn(batch, KV_HEADS, WINDOW, WIDTH, dtype=dtype, seed=s) for n, s in (("k", 7), ("v", 8))}
    memory["cache.length"] = torch.arange(batch, dtype=torch.int32, device=DEVICE) * 3 + 2
    options["sigma"] = torch.linspace(2.0, 3.0, HEADS, device=DEVICE, dtype=torch.promote_types(dtype, torch.float32))

    def call(inputs, memory, options, out, backend):
        cache = nf.KrauseCache(*memory.values())
        return nf.krause_attention_step(*inputs.values(), cache, out=out, backend=backend, **options)

    return Step(dict(q=q, k=k, v=v), memory, options, call)


def linear(batch, dtype, **options):
    q, k, v = (randn(batch, heads, 1, WIDTH, dtype=dtype, seed=heads) for heads in (HEADS, KV_HEADS, KV_HEADS))
    state = randn(batch, KV_HEADS, WIDTH, WIDTH + 1, dtype=torch.promote_types(dtype, torch.float32), seed=7).abs()

    def call(inputs, memory, options, out, backend):
        return nf.linear_attention_step(*inputs.values(), *memory.values(), out=out, backend=backend, **options)

    return Step(dict(q=q, k=k, v=v), dict(state=state), options, call)


def hadamard(batch, dtype, **options):
    widths = 8, 8
    inputs = {f"qs[{r}]": randn(batch, HEADS, 1, w, dtype=dtype, seed=r) for r, w in enumerate(widths)}
    inputs |= {f"ks[{r}]": randn(batch, KV_HEADS, 1, w, dtype=dtype, seed=r + 2) for r, w in enumerate(widths)}
    inputs["v"] = randn(batch, KV_HEADS, 1, WIDTH, dtype=dtype, seed=5)
    state = randn(batch, KV_HEADS, *widths, WIDTH + 1, dtype=torch.promote_types(dtype, torch.float32), seed=7).abs()

    def call(inputs, memory, options, out, backend):
        *factors, v = inputs.values()
        return nf.hadamard_attention_step(factors[:2], factors[2:], v, *memory.values(), out=out, backend=backend, **options)

    return Step(inputs, dict(state=state), options, call)


STEPS = {
    "krause": krause,
    "krause, top_k": lambda batch, dtype: krause(batch, dtype, top_k=3),
    "linear": linear,
    "linear, relu, not normalised": lambda batch, dtype: linear(batch, dtype, feature_map="relu", normalize=False),
    "hadamard": hadamard,
}
each_step = pytest.mark.parametrize("name", STEPS)
gpu_only = pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu, needs_extension])
each_backend = pytest.mark.parametrize("backend", ["triton", "reference"])


def make(name, batch=3, dtype=torch.float32):
    return STEPS[name](batch, dtype)


def written(step):
    """Names of what a step writes to: the number of tokens is counted, not learned from."""
    return [*step.memory, "out"]


def random_out(step):
    q, v = next(iter(step.inputs.values())), step.inputs["v"]
    return randn(*q.shape[:3], v.shape[3], dtype=v.dtype, seed=9)


# ---------------------------------------------------------------------------------------------------------------- autograd


@each_backend
@each_step
def test_a_backward_that_saved_what_a_step_overwrites_raises(name, backend):
    step, out = make(name), random_out(make(name))
    for argument, tensor in {**step.memory, "out": out}.items():
        w = torch.randn(tensor.shape, device=DEVICE, requires_grad=True)
        loss, version = (w * tensor).sum(), tensor._version
        step(out, backend)
        assert tensor._version > version, argument
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@each_backend
@each_step
def test_what_is_read_keeps_its_version(name, backend):
    step = make(name)
    versions = {n: x._version for n, x in step.inputs.items()}
    step(backend=backend)
    assert versions == {n: x._version for n, x in step.inputs.items()}


@each_backend
@each_step
def test_what_requires_grad_is_not_written_to(name, backend):
    """But under no_grad, as with the in-place operators of torch."""
    for argument in written(make(name)):
        if argument == "cache.length":
            continue
        step, out = make(name), random_out(make(name))
        before = {n: x.clone() for n, x in step.memory.items()}
        tensor = out if argument == "out" else step.memory[argument]
        tensor.requires_grad_()
        with pytest.raises(ValueError, match=f"^{argument} requires grad, but a step writes to it without a gradient"):
            step(out, backend)
        assert all(torch.equal(x, before[n]) for n, x in step.memory.items())
        with torch.no_grad():
            result = step(out, backend)
        assert torch.equal(result, make(name)(backend=backend)) and result is out


@each_backend
@each_step
def test_no_gradient_flows(name, backend):
    step = make(name)
    expected, wanted = make(name), {n: x.clone().requires_grad_() for n, x in step.inputs.items()}
    o = step(backend=backend, **wanted)
    assert not o.requires_grad and not any(x.requires_grad for x in step.memory.values())
    assert torch.equal(o, expected(backend=backend))
    assert all(torch.equal(step.memory[n], expected.memory[n]) for n in step.memory)


@each_backend
@each_step
def test_inference_mode(name, backend):
    expected = make(name)
    o = expected(backend=backend)
    with torch.inference_mode():
        for step in (make(name), make(name).clone()):  # tensors of inference mode, and their clones
            assert torch.equal(step(backend=backend), o)
            assert all(torch.equal(step.memory[n], expected.memory[n]) for n in step.memory)
    normal = make(name)
    with torch.inference_mode():
        assert torch.equal(normal(backend=backend), o)
    argument = next(iter(step.memory))
    with pytest.raises(ValueError, match=f"^{argument} was made in inference mode"):
        make(name)(backend=backend, **step.memory)


# ----------------------------------------------------------------------------------------------------------- what is given


@each_backend
@each_step
def test_out_and_tokens_in_other_layouts(name, backend):
    """A projection's transposed rows, a slice of a wider buffer, whose other columns stay as they are, batch behind heads."""
    expected = make(name)(backend=backend)
    shape = expected.shape
    wide = torch.full((shape[0], 3, *shape[1:]), 9.0, device=DEVICE)
    columns = torch.full((*shape[:3], shape[3] + 8), 9.0, device=DEVICE)
    outs = {
        "tokens before heads": torch.empty(shape[0], 1, *shape[1::2], device=DEVICE).transpose(1, 2),
        "heads before batch": torch.empty(shape[1], shape[0], *shape[2:], device=DEVICE).transpose(0, 1),
        "a slice of a wider buffer": wide[:, 1],
        "a slice of columns": columns[..., 3 : 3 + shape[3]],
    }
    for layout, out in outs.items():
        assert make(name)(out, backend) is out
        assert torch.equal(out, expected), layout
    assert (wide[:, ::2] == 9).all() and (columns[..., :3] == 9).all() and (columns[..., 3 + shape[3] :] == 9).all()
    strided = {n: torch.stack((x, -x), -1).flatten(-2)[..., ::2] for n, x in make(name).inputs.items()}
    assert torch.equal(make(name)(backend=backend, **strided), expected)


@each_backend
@each_step
def test_a_slice_of_the_buffer_of_the_tokens_takes_the_output(name, backend):
    """They interleave in memory, and share none of it."""
    expected, step = make(name)(backend=backend), make(name)
    v = step.inputs["v"]
    buffer = torch.full((v.shape[0], HEADS + KV_HEADS, 1, WIDTH), 9.0, device=DEVICE)
    buffer[:, HEADS:] = v
    out = step(buffer[:, :HEADS], backend, v=buffer[:, HEADS:])
    assert torch.equal(out, expected) and torch.equal(buffer[:, HEADS:], v)


def bad_outs(out):
    wide = torch.zeros(*out.shape[:3], 2 * WIDTH, device=DEVICE)
    overlapping = "^out must have a place in memory for each of its elements"
    return [
        ("^out must be a torch.Tensor, got list", [0.0]),
        (r"^out must have shape \(3, 4, 1, 16\), got \(3, 4, 16\)", out[:, :, 0]),
        ("^out must be torch.float32, got torch.float16", out.half()),
        ("^out must be on .*, got meta", out.to("meta")),
        (r"^out must have a contiguous last dimension, got strides \(128, 32, 32, 2\)", wide[..., ::2]),
        (overlapping, out[:, :1].expand(-1, 4, -1, -1)),
        (overlapping, out[:1].expand(3, -1, -1, -1)),
        (overlapping, wide.as_strided(out.shape, (40, 8, 8, 1))),
        (overlapping, wide.as_strided(out.shape, (17, 34, 1, 1))),
    ]


@each_backend
@each_step
def test_bad_out(name, backend):
    """The refusal comes before anything is written."""
    for message, out in bad_outs(random_out(make(name))):
        step, before = make(name), make(name).memory
        with pytest.raises((TypeError, ValueError), match=message):
            step(out, backend)
        assert all(torch.equal(x, before[n]) for n, x in step.memory.items()), message


@each_backend
@each_step
def test_bad_memory(name, backend):
    for argument in make(name).memory:
        step = make(name)
        x = step.memory[argument]
        strided = torch.stack((x, x), -1)[..., 0]
        for given in (strided, x[:1].expand(x.shape)):
            with pytest.raises(ValueError, match=f"^{argument} must be contiguous, as it is updated in place"):
                step(backend=backend, **{argument: given})


@each_backend
@each_step
def test_what_is_written_to_shares_no_memory(name, backend):
    step = make(name)
    q_name, q = next(iter(step.inputs.items()))
    buffer = torch.zeros(2**14, device=DEVICE)

    def at(offset, tensor):
        return buffer[offset : offset + tensor.numel()].view(tensor.shape)

    out = random_out(step)
    last = [n for n in step.memory if n != "cache.length"][-1]
    clashes = {
        ("out", q_name): ({q_name: at(0, q)}, at(0, out)),
        ("out", "v"): ({"v": at(16, step.inputs["v"])}, at(0, out)),
        ("out", last): ({last: at(out.numel() - 1, step.memory[last])}, at(0, out)),
        (last, "v"): ({last: at(5, step.memory[last]), "v": at(0, step.inputs["v"])}, None),
    }
    if "cache.k" in step.memory:
        clashes["cache.v", "cache.k"] = {"cache.v": step.memory["cache.k"]}, None
    for (one, other), (changes, out) in clashes.items():
        before = {n: x.clone() for n, x in {**step.memory, **changes}.items()}
        with pytest.raises(ValueError, match=re.escape(f"{one} must not share memory with {other}")):
            step(out, backend, **changes)
        assert all(torch.equal(x, before[n]) for n, x in {**step.memory, **changes}.items())


@pytest.mark.parametrize("shape, strides, overlaps", [
    ((3, 4, 1, 16), (64, 16, 16, 1), False),
    ((3, 4, 1, 16), (16, 48, 0, 1), False),
    ((3, 4, 1, 16), (0, 16, 16, 1), True),
    ((3, 4, 1, 16), (63, 16, 16, 1), True),
    ((3, 1, 1, 16), (63, 0, 0, 1), False),
    ((2, 2), (3, 2), False),  # 0, 2, 3, 5
    ((3, 4), (3, 2), True),  # 6 = 2 * 3 = 3 * 2
    ((3, 0, 1, 16), (0, 0, 0, 0), False),
])
def test_layouts_that_overlap_themselves(shape, strides, overlaps):
    assert overlaps_itself(shape, strides) is overlaps


def test_layouts_that_share_memory():
    buffer = torch.zeros(4, 3, 8)
    rows, columns = [buffer[:, i] for i in range(3)], [buffer[..., i : i + 4] for i in (0, 2, 4)]

    def shared(a, b):
        return share_memory(layouts(a)[0], a.data_ptr(), layouts(b)[0], b.data_ptr())

    assert shared(rows[0], rows[0]) and shared(rows[0], buffer) and shared(buffer[2:], rows[1])
    assert not shared(rows[0], rows[1]) and not shared(rows[2], rows[1]) and not shared(buffer[:2], buffer[2:])
    assert shared(columns[0], columns[1]) and shared(columns[2], columns[1]) and not shared(columns[0], columns[2])
    assert not shared(buffer[:0], buffer) and shared(buffer.view(torch.float16)[:1, :1, 1:2], buffer[:1, :1, :1])


@each_backend
@each_step
@pytest.mark.parametrize("batch", [0, 1])
def test_few_sequences(name, batch, backend):
    step, several = make(name, batch), make(name, 3)
    alone = step._replace(inputs={n: x[:batch] for n, x in several.inputs.items()},
                          memory={n: x[:batch].clone() for n, x in several.memory.items()})
    assert torch.equal(alone(backend=backend), several(backend=backend)[:batch])
    assert all(torch.equal(x, several.memory[n][:batch]) for n, x in alone.memory.items())


@each_backend
@each_step
def test_nan_stays_in_its_sequence(name, backend):
    """NaN in q, k or v is seen in the output of its sequence, and nowhere else."""
    expected = make(name)(backend=backend)
    for argument, x in make(name).inputs.items():
        x[1] = float("nan")
        step = make(name)
        o = step(backend=backend, **{argument: x})
        assert o[1].isnan().all(), argument
        assert torch.equal(o[::2], expected[::2]), argument
        assert not any(m[::2].isnan().any() for m in step.memory.values())


@each_backend
@each_step
def test_nan_of_the_memory_stays_in_its_sequence(name, backend):
    expected = make(name)(backend=backend)
    for argument in make(name).memory:
        if argument == "cache.length":
            continue
        step = make(name)
        step.memory[argument][1] = float("nan")
        o = step(backend=backend)
        assert o[1].isnan().all() and torch.equal(o[::2], expected[::2]), argument


@each_step
def test_float64_of_the_reference(name):
    step, rough = make(name, dtype=torch.float64), make(name)
    o = step()
    assert o.dtype == torch.float64
    torch.testing.assert_close(o.float(), rough(), rtol=1e-4, atol=1e-4)
    for n, x in step.memory.items():
        torch.testing.assert_close(x.to(rough.memory[n].dtype), rough.memory[n], rtol=1e-5, atol=1e-5)


@each_backend
@each_step
def test_another_default_device(name, backend):
    expected, step = make(name)(backend=backend), make(name)
    with torch.device("meta"):
        assert torch.equal(step(backend=backend), expected)


@pytest.mark.parametrize("backend", ["triton" if DEVICE == "cuda" else "reference"])  # Triton's interpreter has one thread
@each_step
def test_threads(name, backend):
    expected, steps = make(name)(backend=backend), [make(name) for _ in range(8)]
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(o, expected) for o in pool.map(lambda step: step(backend=backend), steps))


# --------------------------------------------------------------------------------------------------- compile, export, fake


@each_backend
@each_step
def test_opcheck(name, backend):
    """Of the operator that the public function calls when a call is not plain."""
    calls = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "nearfar":
                calls.append((function, args))
            return function(*args, **(kwargs or {}))

    with Record():
        make(name)(backend=backend)
    ((operator, arguments),) = calls
    torch.library.opcheck(operator, tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, arguments))


def decode(step, backend, count):
    """A loop of tokens, each the last one's scaled: what a compiled function has to keep in order."""

    def loop(inputs, memory, outs):
        for i in range(count):
            step({n: x * (1 + i) for n, x in inputs.items()}, memory, outs[i], backend)

    return loop


def batch_of(name, batch, count, backend):
    step = make(name, batch)
    outs = torch.full((count, *random_out(step).shape), 9.0, device=DEVICE)
    call = step.call, step.options
    return step, outs, lambda inputs, memory, out, backend: call[0](inputs, memory, call[1], out, backend)


@each_backend
@each_step
def test_compiled_loops_share_a_graph(name, backend):
    """Of tokens, with the outputs in slices of a buffer, for every batch size (the first is no other size in the call)."""
    torch._dynamo.reset()
    graphs, compiled, of_the_first = CompileCounterWithBackend("aot_eager"), None, None
    for batch in (6, 4, 2, 7):
        step, outs, call = batch_of(name, batch, 3, backend)
        plain, plain_outs, _ = batch_of(name, batch, 3, backend)
        if compiled is None:
            compiled = torch.compile(decode(call, backend, 3), backend=graphs, fullgraph=True, dynamic=True)
        versions = [x._version for x in step.memory.values()]
        for _ in range(2):
            compiled(step.inputs, step.memory, outs)
            decode(call, backend, 3)(plain.inputs, plain.memory, plain_outs)
            of_the_first = of_the_first or graphs.frame_count  # a backend may be called twice for one graph
        assert torch.equal(outs, plain_outs)
        assert all(torch.equal(x, plain.memory[n]) for n, x in step.memory.items())
        assert all(x._version > old for x, old in zip(step.memory.values(), versions, strict=True))
    assert graphs.frame_count == of_the_first


@each_backend
@each_step
def test_a_compiled_batch_that_is_marked_dynamic(name, backend):
    torch._dynamo.reset()
    step, _, call = batch_of(name, 3, 1, backend)
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda inputs, memory: call(inputs, memory, None, backend), backend=graphs, fullgraph=True)
    for batch in (3, 6):
        step = make(name, batch)
        for x in (*step.inputs.values(), *step.memory.values()):
            torch._dynamo.mark_dynamic(x, 0)
        assert torch.equal(compiled(step.inputs, step.memory), make(name, batch)(backend=backend))
    assert graphs.frame_count == 1


@each_step
def test_inductor(name):
    torch._dynamo.reset()
    step, outs, call = batch_of(name, 3, 2, "reference")
    plain, plain_outs, _ = batch_of(name, 3, 2, "reference")
    torch.compile(decode(call, "reference", 2), fullgraph=True)(step.inputs, step.memory, outs)
    decode(call, "reference", 2)(plain.inputs, plain.memory, plain_outs)
    torch.testing.assert_close(outs, plain_outs)
    for n, x in step.memory.items():
        torch.testing.assert_close(x, plain.memory[n])


@each_backend
@each_step
def test_a_compiled_step_with_inputs_that_require_grad(name, backend):
    torch._dynamo.reset()
    step, _, call = batch_of(name, 3, 1, backend)

    def f(inputs, memory):
        return call(inputs, memory, None, backend), sum(x.sum() for x in inputs.values())

    inputs = {n: x.requires_grad_() for n, x in step.inputs.items()}
    o, total = torch.compile(f, backend="aot_eager", fullgraph=True)(inputs, step.memory)
    assert not o.requires_grad and torch.equal(o, make(name)(backend=backend))
    total.backward()
    assert all(torch.equal(x.grad, torch.ones_like(x)) for x in inputs.values())


class Module(torch.nn.Module):
    def __init__(self, call, backend):
        super().__init__()
        self.step_call, self.step_backend = call, backend

    def forward(self, inputs, memory):
        return self.step_call(inputs, memory, None, self.step_backend)


@each_backend
@each_step
@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_dynamic_batch(name, backend, strict):
    step, _, call = batch_of(name, 3, 1, backend)
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = tuple({n: {0: batch} for n in group} for group in (step.inputs, step.memory))
    program = torch.export.export(Module(call, backend), (step.inputs, step.memory), dynamic_shapes=shapes, strict=strict)
    step, plain = make(name, 5), make(name, 5)
    assert torch.equal(program.module()(step.inputs, step.memory), plain(backend=backend))
    assert all(torch.equal(x, plain.memory[n]) for n, x in step.memory.items())


@each_backend
@each_step
def test_fake_tensors(name, backend):
    step = make(name)
    if "sigma" in step.options:
        step.options["sigma"] = 2.5
    with FakeTensorMode():
        memory, inputs = ({n: torch.empty(x.shape, dtype=x.dtype, device=x.device) for n, x in group.items()}
                          for group in (step.memory, step.inputs))
        o = step(backend=backend, **inputs, **memory)
    assert o.shape == random_out(step).shape and o.dtype == torch.float32 and o.device.type == DEVICE


# -------------------------------------------------------------------------------------------------------------- transforms


@each_backend
@each_step
def test_vmap(name, backend):
    """Over tokens and memory, the tokens' along another dimension than the memory's; and twice."""
    steps = [make(name) for _ in range(4)]
    for i, step in enumerate(steps):
        for x in step.inputs.values():
            x.mul_(1 + i / 10)
    inputs = {n: torch.stack([step.inputs[n] for step in steps], 1) for n in steps[0].inputs}
    memory = {n: torch.stack([step.memory[n] for step in steps]) for n in steps[0].memory}
    pairs = {n: x.clone().unflatten(0, (2, 2)) for n, x in memory.items()}
    expected = torch.stack([step(backend=backend) for step in steps])

    def call(inputs, memory):
        return steps[0](backend=backend, **inputs, **memory)

    dims = {n: 1 for n in inputs}, {n: 0 for n in memory}
    assert torch.equal(torch.vmap(call, dims)(inputs, memory), expected)
    inner = {n: x.unflatten(1, (2, 2)) for n, x in inputs.items()}
    assert torch.equal(torch.vmap(torch.vmap(call, dims), dims)(inner, pairs).flatten(0, 1), expected)
    for n, x in memory.items():
        assert torch.equal(x, torch.stack([step.memory[n] for step in steps])) and torch.equal(x, pairs[n].flatten(0, 1))


@each_step
def test_vmap_over_memory_or_tokens_alone(name):
    step, expected = make(name), make(name)()
    memory = {n: torch.stack([x, x]) for n, x in step.memory.items()}
    assert torch.equal(torch.vmap(lambda memory: step(**memory))(memory), torch.stack([expected, expected]))
    inputs, before = {n: torch.stack([x, x]) for n, x in step.inputs.items()}, step.clone().memory
    with pytest.raises(ValueError, match=r"^vmap maps over an argument of \w+_step, but not over \w+, which it writes to"):
        torch.vmap(lambda inputs: step(**inputs))(inputs)
    assert all(torch.equal(x, before[n]) for n, x in step.memory.items())


@each_backend
@each_step
def test_forward_ad_is_refused(name, backend):
    for argument, x in make(name).inputs.items():
        step, before = make(name), make(name).memory
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=r"^\w+_step has no derivative, in forward mode"):
            step(backend=backend, **{argument: forward_ad.make_dual(x, x)})
        with pytest.raises(NotImplementedError, match=r"^\w+_step has no derivative, in forward mode"):
            torch.func.jvp(lambda x: step(backend=backend, **{argument: x}), (x,), (x,))  # noqa: B023
        assert all(torch.equal(m, before[n]) for n, m in step.memory.items())


# -------------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("window", [1, 5])
def test_a_saved_cache_is_loaded_as_torch_load_does_by_default(window):
    cache, file = nf.KrauseCache.empty(2, 1, window, 16, 24), io.BytesIO()
    torch.save({"cache": cache}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["cache"]
    assert type(loaded) is nf.KrauseCache and all(torch.equal(x, y) for x, y in zip(loaded, cache, strict=True))
