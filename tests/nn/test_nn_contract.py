"""What holds for every layer of nearfar.nn: dtypes, loading, initialisation, checkpointing, caches, sharding over processes."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from samples.layers import DIM, HEADS, LAYERS, WINDOW, with_features
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import nearfar as nf

pytestmark = pytest.mark.full

EACH = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
CACHED = pytest.mark.parametrize("kind", LAYERS)


def tokens(seed=1, length=9):
    return torch.randn(2, length, DIM, generator=torch.Generator().manual_seed(seed))


def own(layer):
    """The tensors of a layer that are not those of its projections, by name."""
    tensors = dict(layer.named_parameters()) | dict(layer.named_buffers())
    return {name: x for name, x in tensors.items() if name.split(".")[-1] not in ("weight", "bias")}


def gradients(layer, x, run=None):
    x = x.clone().requires_grad_()
    y = (run or layer)(x)
    y.square().sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    layer.zero_grad()
    return {"y": y.detach(), "x": x.grad, **found}


def assert_same(got, expected, **tolerance):
    assert got.keys() == expected.keys()
    for name in expected:
        assert_close(got[name], expected[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


# Dtypes -------------------------------------------------------------------------------------------------------------------


@EACH
def test_casts_leave_own_tensors_float32_with_their_values(make):
    layer = make()
    values = {name: x.detach().clone() + 1 / 3 for name, x in own(layer).items()}
    with torch.no_grad():
        for name, x in own(layer).items():
            x.copy_(values[name])
    for cast in (nn.Module.half, nn.Module.bfloat16, lambda layer: layer.to("cpu", torch.bfloat16), nn.Module.float):
        cast(layer)
        assert own(layer).keys() == values.keys()
        for name, x in own(layer).items():
            assert x.dtype == torch.float32, name
            assert torch.equal(x, values[name]), name
    layer.bfloat16()
    assert next(child for child in layer.modules() if isinstance(child, nn.Linear)).weight.dtype == torch.bfloat16
    layer(tokens().bfloat16()).sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.dtype == parameter.dtype, name
    layer.half()  # with gradients
    assert {x.dtype for x in own(layer.double()).values()} <= {torch.float64}


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float64])
@EACH
def test_own_tensors_under_a_default_dtype(make, default):
    torch.set_default_dtype(default)
    try:
        layer = make()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {x.dtype for x in own(layer).values()} <= {torch.promote_types(default, torch.float32)}
    y = layer.train()(tokens().to(default))
    y.sum().backward()
    assert y.dtype == default and y.isfinite().all()


@pytest.mark.parametrize("assign", [False, True])
@EACH
def test_half_checkpoints_load_into_float32(make, assign):
    layer = make()
    half = {name: x.bfloat16() for name, x in layer.state_dict().items()}
    layer.load_state_dict(half, assign=assign)
    assert {x.dtype for x in own(layer).values()} <= {torch.float32}
    assert {x.dtype for x in half.values()} == {torch.bfloat16}  # those of the caller
    layer.train()(tokens().to(torch.bfloat16 if assign else torch.float32)).sum().backward()


@EACH
def test_own_tensors_of_any_dtype_are_computed_with_in_float32(make):
    """FSDP with mixed precision puts half tensors there; nothing of nn.Module is asked."""
    layer = make()
    expected = layer(tokens())
    for module in layer.modules():
        if isinstance(module, nf.nn.base.Layer):
            for name, parameter in module._parameters.items():
                module._parameters[name] = None if parameter is None else nn.Parameter(parameter.detach().bfloat16())
            module._buffers.update({name: torch.zeros_like(x).bfloat16() for name, x in module._buffers.items()})
    got = layer(tokens())
    got.sum().backward()
    assert_close(got, expected, atol=1e-2, rtol=1e-2)


def test_a_state_dict_with_a_0d_coupling_loads():
    layer = LAYERS["osn"]()
    old = {name: x[0] * 2 if name.endswith("raw_coupling") else x for name, x in layer.state_dict().items()}
    assert old["attention.raw_coupling"].dim() == 0
    for assign in (False, True):
        layer = LAYERS["osn"]()
        layer.load_state_dict(old, assign=assign)
        assert layer.attention.raw_coupling.shape == (1,) and layer.attention.raw_coupling.item() == 2


# Initialisation -----------------------------------------------------------------------------------------------------------


@EACH
def test_reset_parameters_of_every_module_initialises_what_to_empty_left(make):
    with torch.device("meta"):
        layer = make()
    layer.to_empty(device="cpu")
    with torch.no_grad():
        for x in layer.state_dict().values():
            x.fill_(torch.nan)
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert_same(own(layer), own(make()))
    y = layer.train()(tokens())
    assert y.isfinite().all()


@EACH
def test_reset_parameters_of_a_layer_leaves_its_projections(make):
    """A loader that finds log_sigma missing calls it, when the projections are loaded."""
    layer = make()
    before = {name: x.clone() for name, x in layer.state_dict().items()}
    with torch.no_grad():
        for x in own(layer).values():
            x += 1
    for module in layer.modules():
        if isinstance(module, nf.nn.base.Layer):
            module.reset_parameters()
    assert_same(dict(layer.state_dict()), before, atol=0, rtol=0)


# Copies, caches -----------------------------------------------------------------------------------------------------------


@EACH
def test_copies_and_pickles_of_layers_compute_the_same(make):
    layer = make().train()
    layer(tokens(2))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)) if make is not with_features else layer):
        assert_same(gradients(other.eval(), tokens()), gradients(layer.eval(), tokens()), atol=0, rtol=0)


@CACHED
def test_caches_load_by_default_and_are_copied(kind):
    layer, x = LAYERS[kind]().eval(), tokens()
    memory = layer.init_cache(2, 9)
    layer(x[:, :1], cache=memory)
    file = io.BytesIO()
    torch.save({"memory": memory, "locality": WINDOW}, file)
    file.seek(0)
    loaded = torch.load(file)
    assert loaded["locality"] == WINDOW
    others = loaded["memory"], copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))
    results = [layer(x[:, 1:2], cache=other) for other in (memory, *others)]
    for got in results[1:]:
        assert torch.equal(got, results[0])


class Wrapped(nn.Module):
    """As adapters wrap a projection: no weight."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("how", ["wrapped", "quantized"])
@CACHED
def test_layers_with_other_projections_decode(kind, how):
    layer, x = LAYERS[kind]().eval(), tokens(length=4)
    if how == "wrapped":
        for name, child in list(layer.named_children()):
            if name.endswith("_proj"):
                setattr(layer, name, Wrapped(child))
        layer.bfloat16()
        x = x.bfloat16()
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, dtype=torch.qint8)
    memory = layer.init_cache(2, 4)
    got = torch.cat([layer(token, cache=memory) for token in x.split(1, 1)], 1)
    # Rows are quantized together in forward, and one by one in steps.
    assert got.dtype == x.dtype
    assert_close(got, layer(x), atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("kind", ["krause", "linear", "affine", "synchronization"])
def test_caches_take_the_dtype_they_are_asked_for(kind):
    layer = LAYERS[kind]()
    for name, child in list(layer.named_children()):
        setattr(layer, name, _Unweighted(child))
    memory = layer.init_cache(2, 9, dtype=torch.float64)
    assert (memory if kind == "linear" else memory.k).dtype == torch.float64


class _Unweighted(nn.Module):
    """A projection that computes in the dtype of x, and whose numbers do not tell it."""

    def __init__(self, linear):
        super().__init__()
        self.out_features = linear.out_features

    def forward(self, x):
        return x.new_ones(*x.shape[:-1], self.out_features)


def trained_affine(**options):
    layer = nf.nn.AffineScaledAttention(DIM, HEADS, num_kv_heads=2, causal=True, **options).eval()
    layer.alpha_average.fill_(0.6)
    return layer


@pytest.mark.parametrize("window", [(-1, -1), (3, 0)])
@pytest.mark.parametrize("kept", [0, 1, 8, 12])
def test_a_length_set_back_drops_the_tokens_behind_it(window, kept):
    layer = trained_affine(window_size=window)
    x, y = tokens(length=12), tokens(3, 6)
    cache, fresh = layer.init_cache(2, 20), layer.init_cache(2, 20)
    layer(x[:, :8], cache=cache)
    layer(x[:, 8:], cache=cache)
    cache.length = kept
    if kept:
        layer(x[:, :kept], cache=fresh)
    for part in y.split(3, 1):
        assert_close(layer(part, cache=cache), layer(part, cache=fresh))
    assert_close(cache.total, fresh.total)


GROWING = {
    "affine": trained_affine,
    "affine-window": lambda: trained_affine(window_size=(3, 0)),
    "softmax": lambda: LAYERS["softmax"]().eval(),
    "synchronization": lambda: LAYERS["synchronization"]().eval(),
}


@pytest.mark.parametrize("make", GROWING.values(), ids=GROWING)
def test_a_cached_call_is_one_graph_for_all_lengths(make):
    torch._dynamo.reset()
    layer = make()
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(lambda x, cache: layer(x, cache=cache), backend=counter, fullgraph=True, dynamic=True)
    x, cache, expected = tokens(length=14), layer.init_cache(2, 20), layer.init_cache(2, 20)
    for token in x.split(1, 1):
        assert_close(call(token, cache), layer(token, cache=expected))
    assert counter.frame_count <= 3


@pytest.mark.parametrize("kind", ["affine", "krause", "gated", "synchronization"])
def test_cached_calls_are_exported_with_their_cache(kind):
    layer, x = LAYERS[kind]().eval(), tokens(length=1)

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, cache):
            return self.layer(x, cache=cache)

    program = torch.export.export(Step(), (x, layer.init_cache(2, 4))).module()
    cache, expected = layer.init_cache(2, 4), layer.init_cache(2, 4)
    assert_close(program(x, cache), layer(x, cache=expected))
    tensors = [[x for x in torch.utils._pytree.tree_leaves(c) if isinstance(x, torch.Tensor)] for c in (cache, expected)]
    assert_close(*tensors)


# Feature maps -------------------------------------------------------------------------------------------------------------

ACROSS = {
    "largest": lambda x: (x - x.amax((-2, -1), keepdim=True)).exp(),
    "mean": lambda x: x.softmax(-2),
    "position": lambda x: x.exp() * torch.arange(1, x.shape[2] + 1)[:, None],
}


@pytest.mark.parametrize("across", ACROSS.values(), ids=ACROSS)
@pytest.mark.parametrize("kind", [nf.nn.LinearAttention, nf.nn.HadamardAttention])
def test_feature_maps_across_tokens_are_refused_where_tokens_must_be_apart(kind, across):
    layer, x = kind(DIM, HEADS, causal=True, feature_map=across), tokens()
    layer(x)  # all tokens at once are what such a map is for
    state = kind(DIM, HEADS, causal=True, feature_map=torch.exp).init_cache(2)
    ends = torch.tensor([0, 4, 9], dtype=torch.int32)
    calls = (
        lambda: layer.init_cache(2), lambda: layer(x[:, :1], cache=state), lambda: layer(x, cache=state),
        lambda: layer(x[:1], cu_seqlens=ends), lambda: layer(x, key_padding_mask=x[..., 0] > 0),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"^feature_map must map each token by itself"):
            call()


def test_feature_maps_of_tokens_are_tried_once():
    called = []
    layer = nf.nn.LinearAttention(DIM, HEADS, causal=True, feature_map=lambda x: called.append(x.shape) or x.exp())
    state = layer.init_cache(2)
    before = len(called)
    layer(tokens(length=1), cache=state)
    assert before > 2 and len(called) == before + 2


# Activation checkpointing -------------------------------------------------------------------------------------------------


def reentrant(function, *arguments):
    return checkpoint(function, *arguments, use_reentrant=True)


def saving(function, *arguments):
    return checkpoint(function, *arguments, use_reentrant=False)


def selective(function, *arguments):
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    kept = torch.ops.aten.mm.default, torch.ops.aten.sum.dim_IntList, torch.ops.aten.addmm.default

    def policy(context, operator, *arguments, **options):
        return CheckpointPolicy.MUST_SAVE if operator in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return checkpoint(
        function, *arguments, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
    )


def nested(how):
    return lambda function, *arguments: how(lambda *inner: how(function, *inner), *arguments)


WAYS = {
    "reentrant": reentrant, "not reentrant": saving, "selective": selective,
    "nested reentrant": nested(reentrant), "nested": nested(saving),
}
CHECKPOINTED = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def trainable_affine(**options):
    torch.manual_seed(0)
    options = {"num_kv_heads": 2, "causal": True, "momentum": 0.5, "output_gate": True, **options}
    layer = nf.nn.AffineScaledAttention(DIM, HEADS, **options).train()
    with torch.no_grad():
        layer.alpha_proj.weight *= 10
    return layer


def results(calls, way):
    """Gradients and average after `calls`, a function of (layer, run, x): run(f, x) is f(x), checkpointed or not."""
    layer = trainable_affine()
    xs = [tokens(seed).requires_grad_() for seed in (1, 2, 3)]
    calls(layer, way or (lambda function, x: function(x)), xs)
    found = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {**found, **{f"x{i}": x.grad for i, x in enumerate(xs)}, "average": layer.alpha_average}


def one_after_the_other(layer, run, xs):
    for x in xs:
        run(layer, x).square().sum().backward()


def all_before_a_backward(layer, run, xs):
    losses = [run(layer, x).square().sum() for x in xs]
    for loss in losses:
        loss.backward()


def one_backward_of_all(layer, run, xs):
    sum(run(layer, x).square().sum() for x in xs).backward()


def twice_in_one_region(layer, run, xs):
    for x in xs:
        run(lambda x: layer(layer(x)), x).square().sum().backward()


def in_two_regions(layer, run, xs):
    for x in xs:
        run(layer, run(layer, x)).square().sum().backward()


def equal_tokens_again(layer, run, xs):
    for x in xs:
        for _ in range(2):
            run(layer, x).square().sum().backward()


CALLS = one_after_the_other, all_before_a_backward, one_backward_of_all, twice_in_one_region, in_two_regions, equal_tokens_again


@CHECKPOINTED
@pytest.mark.parametrize("calls", CALLS, ids=lambda calls: calls.__name__)
def test_recomputing_an_affine_layer_changes_no_gradient_and_no_average(calls, way):
    assert_same(results(calls, way), results(calls, None), atol=1e-6, rtol=1e-5)


@CHECKPOINTED
@EACH
def test_recomputing_changes_no_gradient_of_a_layer(make, way):
    layer = make().train()
    expected = gradients(copy.deepcopy(layer), tokens())
    assert_same(gradients(layer, tokens(), lambda x: way(layer, x)), expected, atol=1e-6, rtol=1e-5)


def test_a_compiled_affine_layer_is_recomputed_exactly():
    torch._dynamo.reset()

    def way(function, x):
        return saving(torch.compile(function, backend="aot_eager", fullgraph=True), x)

    assert_same(results(all_before_a_backward, way), results(all_before_a_backward, None), atol=1e-5, rtol=1e-5)


def test_compiling_over_a_checkpoint_of_an_affine_layer_raises():
    """A compiler that recomputes on its own wants the average of before, which is overwritten."""
    torch._dynamo.reset()

    def way(function, x):
        return torch.compile(lambda x: saving(function, x), backend="aot_eager_decomp_partition", fullgraph=True)(x)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        results(one_after_the_other, way)


# Two processes ------------------------------------------------------------------------------------------------------------


def spawn(worker, tmp_path, *arguments):
    mp.spawn(_started, (worker, str(tmp_path / "store"), *arguments), nprocs=2)


def _started(rank, worker, store, *arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        worker(rank, *arguments)
    finally:
        dist.destroy_process_group()


def parallel_plan(kind):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    from nearfar.nn.parallel import HeadParallel

    if kind == "osn":
        return {"attention": HeadParallel(), "ffn.0": ColwiseParallel(), "ffn.2": RowwiseParallel()}
    if kind == "gated":
        return {"softmax": HeadParallel(), "krause": HeadParallel()}
    return HeadParallel()


def tensor_parallel_worker(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.parallel import parallelize_module

    mesh = init_device_mesh("cpu", (2,))
    for kind, make in LAYERS.items():
        torch.manual_seed(0)
        layer = make(bias=True, qk_norm=True)
        if kind == "affine":
            with torch.no_grad():
                layer.alpha_proj.weight *= 10
        with torch.no_grad():  # heads unlike each other
            for x in own(layer).values():
                x += torch.linspace(-0.3, 0.3, x.numel())
        whole = copy.deepcopy(layer)
        whole.group_name = [dist.new_group([0]), dist.new_group([1])][rank].group_name
        layer = parallelize_module(layer, mesh, parallel_plan(kind))
        for seed in (1, 2):
            expected, got = gradients(whole, tokens(seed)), gradients(layer, tokens(seed))
            for name in got:
                if isinstance(got[name], DTensor):
                    got[name] = got[name].full_tensor()
            assert_same(got, expected, atol=1e-5, rtol=1e-4)
        full = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in layer.state_dict().items()}
        assert_same(full, dict(whole.state_dict()), atol=1e-6, rtol=1e-5)
        layer.eval(), whole.eval()
        memory, expected = layer.init_cache(2, 4), whole.init_cache(2, 4)
        for part in tokens(3, 4).split((1, 1, 2), 1):
            assert_close(layer(part, cache=memory), whole(part, cache=expected), atol=1e-5, rtol=1e-4)


def test_head_parallel_layers_equal_whole_ones_forward_and_backward(tmp_path):
    spawn(tensor_parallel_worker, tmp_path)


def refusing_worker(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    from nearfar.nn.parallel import HeadParallel

    mesh = init_device_mesh("cpu", (2,))

    def projections(layer):
        names = [name for name, child in layer.named_children() if isinstance(child, nn.Linear)]
        plan = {name: RowwiseParallel() if name == "out_proj" else ColwiseParallel() for name in names}
        return parallelize_module(layer, mesh, plan)

    for kind, name in (("krause", "log_sigma"), ("synchronization", "raw_bandwidth"), ("affine", "alpha_average")):
        with pytest.raises(ValueError, match=rf"^{name} holds the numbers of 4 heads.* give 2 heads.*HeadParallel"):
            projections(LAYERS[kind]())(tokens())
    for kind in ("linear", "hadamard"):
        torch.manual_seed(0)
        layer = LAYERS[kind]()
        expected = layer(tokens())
        assert_close(projections(layer)(tokens()), expected, atol=1e-5, rtol=1e-4)
    one = dict(num_kv_heads=1)
    with pytest.raises(ValueError, match=r"^num_kv_heads must be a multiple of the 2 ranks of the mesh, got 1"):
        parallelize_module(nf.nn.LinearAttention(DIM, HEADS, **one), mesh, HeadParallel())
    with pytest.raises(ValueError, match=r"^k_proj gives 4 numbers a token.*a rank must hold whole heads"):
        projections(nf.nn.LinearAttention(DIM, HEADS, **one))(tokens())
    layer = nf.nn.LinearAttention(DIM, HEADS, num_kv_heads=2)
    parallelize_module(layer, mesh, {"q_proj": ColwiseParallel(), "out_proj": RowwiseParallel()})
    with pytest.raises(ValueError, match=r"\bnum_kv_heads=2\b.*a rank must hold the key heads of its query heads"):
        layer(tokens())
    with pytest.raises(TypeError, match=r"^HeadParallel shards the layers of nearfar.nn, got Linear"):
        parallelize_module(nn.Linear(4, 4), mesh, HeadParallel())


def test_shards_that_do_not_fit_are_refused_and_named(tmp_path):
    spawn(refusing_worker, tmp_path)


def fsdp_worker(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard

    mesh, half = init_device_mesh("cpu", (2,)), torch.bfloat16
    mixed = MixedPrecision(param_dtype=half, buffer_dtype=half)
    policy = MixedPrecisionPolicy(param_dtype=half)
    ways = (
        lambda layer: fully_shard(layer, mesh=mesh), lambda layer: fully_shard(layer, mesh=mesh, mp_policy=policy),
        lambda layer: FullyShardedDataParallel(layer, device_id=torch.device("cpu"), use_orig_params=True),
        lambda layer: FullyShardedDataParallel(layer, device_id=torch.device("cpu"), mixed_precision=mixed),
    )
    for make in LAYERS.values():
        torch.manual_seed(0)
        layer = make()
        expected = copy.deepcopy(layer)(tokens())
        for number, way in enumerate(ways):
            y = way(copy.deepcopy(layer))(tokens())
            tolerance = 3e-2 if number % 2 else 1e-5
            assert_close(y.float(), expected, atol=tolerance, rtol=tolerance)
            y.float().sum().backward()


def test_fully_sharded_layers_compute_the_same(tmp_path):
    spawn(fsdp_worker, tmp_path)


def average_worker(rank):
    """Each rank a group of its own, as two stages of a pipeline are."""
    groups = [dist.new_group([0]), dist.new_group([1])]
    layer = nf.nn.AffineScaledAttention(DIM, HEADS, process_group=groups[rank])
    for _ in range(1 + rank):  # unequally often
        layer(tokens(rank))
    mean = (0.1 * layer.alpha_proj(tokens(rank)) + 0.5).clamp(0, 1).mean((0, 1))
    assert_close(layer.alpha_average, (1 - 0.9 ** (1 + rank)) * mean)


def test_process_group_names_the_ranks_of_the_average(tmp_path):
    spawn(average_worker, tmp_path)
