"""Calls on shards beside the same call on the whole sequence, with gradients. They run in the processes of a pool."""

import importlib.util
from itertools import accumulate
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import nearfar as nf

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/context_parallel.py"
# What has no tokens: the same on every rank. The others are shards along dimension 2.
SHARED = "sigma", "sink", "initial_state", "coupling", "bandwidth", "state", "r"


def is_shared(name, x):
    name = name.removeprefix("d")
    return name in SHARED or name == "order" and x.dim() == 2


def tensors_of(operator, length, dtype, state=False, sink=False, by_token=False, batch=2, width=4, value_width=3):
    """{name: tensor} of a whole call, with 4 query heads and 2 key heads where they may differ."""
    torch.manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, dtype=dtype)

    if operator == "order_parameter":
        return {"theta": randn(batch, 2, length, width)}
    if operator == "synchronization_attention":
        found = {"omega": randn(batch, 4, length, width) / 4, "omega_k": randn(batch, 2, length, width) / 4}
        order = torch.rand(batch, 4, *[length] * by_token, dtype=dtype)
        parameters = {"coupling": randn(4).exp() + 2, "bandwidth": randn(4).exp(), "order": order}
        return {**found, "v": randn(batch, 2, length, value_width), **parameters}
    found = {"q": randn(batch, 4, length, width), "k": randn(batch, 2, length, width)}
    if operator == "attention_statistics":
        return found
    if operator == "hadamard_attention":
        found |= {"q1": randn(batch, 4, length, 2), "k1": randn(batch, 2, length, 2)}
    found["v"] = randn(batch, 2, length, value_width)
    if operator == "affine_attention":
        found |= {"alpha": randn(batch, 4, length), "beta": randn(batch, 4, length)}
    if operator == "krause_attention":
        found["sigma"] = randn(4).exp()
    if state:
        widths = [x.shape[3] for name, x in found.items() if name[0] == "k"]
        found["initial_state"] = torch.rand(batch, 2, *widths, value_width + 1, dtype=dtype)
    if sink:
        found["sink"] = randn(4)
    return found


def call(module, operator, tensors, options):
    """{name: result} of an operator."""
    tensors = dict(tensors)
    if "q1" in tensors:
        q, q1, k, k1 = (tensors.pop(name) for name in ("q", "q1", "k", "k1"))
        tensors |= {"qs": [q, q1], "ks": [k, k1]}
    result = getattr(module, operator)(**tensors, **options)
    if operator == "attention_statistics":
        return result._asdict()
    if operator == "order_parameter" and not options.get("causal"):
        return {"r": result}
    return dict(zip(("o", "state"), result, strict=True)) if isinstance(result, tuple) else {"o": result}


def gradients(results, tensors, upstream):
    """{"d" + name: gradient} from those of the results that upstream has."""
    found = torch.autograd.grad([results[name] for name in upstream], list(tensors.values()), list(upstream.values()))
    return {f"d{name}": x for name, x in zip(tensors, found, strict=True)}


def results_on_shards(group, rank, operator, lengths, dtype, options, make=None):
    """Two dicts {name: tensor}, of the shards and of the whole call: results and gradients, shared ones summed."""
    start = [0, *accumulate(lengths)][rank]

    def shard(name, x):
        return x if is_shared(name, x) else x.narrow(2, start, lengths[rank])

    whole = {name: x.requires_grad_() for name, x in tensors_of(operator, sum(lengths), dtype, **(make or {})).items()}
    mine = {name: shard(name, x.detach()).requires_grad_() for name, x in whole.items()}
    expected = call(nf, operator, whole, options)
    got = call(nf.distributed, operator, mine, {**options, "group": group, "lengths": lengths})
    torch.manual_seed(1)
    upstream = {name: torch.randn_like(x) for name, x in expected.items() if x.requires_grad}
    # Of a result that all ranks have, one rank has the gradient.
    last = rank == len(lengths) - 1
    parts = {name: x * last if is_shared(name, x) else shard(name, x) for name, x in upstream.items()}
    got |= gradients(got, mine, parts)
    expected |= gradients(expected, whole, upstream)
    for name in got:
        if name[0] == "d" and is_shared(name, got[name]):
            dist.all_reduce(got[name], group=group)
    return {name: x.detach() for name, x in got.items()}, {name: shard(name, x.detach()) for name, x in expected.items()}


def error(group, rank, *arguments):
    """{name: largest error, relative to the largest value of the whole call's shard}."""
    got, expected = results_on_shards(group, rank, *arguments)
    assert list(got) == list(expected)
    errors = {}
    for name, x in got.items():
        assert x.shape == expected[name].shape and x.dtype == expected[name].dtype, name
        if x.numel():
            errors[name] = float((x - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1e-3))
    return errors


def arrays(*arguments):
    """{name: numpy array} of this rank's results and gradients."""
    return {name: x.numpy() for name, x in results_on_shards(*arguments)[0].items()}


def mismatched(group, rank, operator, changes, lengths=None):
    """What a rank raises if rank 1 calls with other tensors or options: (its type, its message)."""
    tensors = {"q": torch.randn(1, 2, 8, 4), "k": torch.randn(1, 2, 8, 4), "v": torch.randn(1, 2, 8, 3)}
    options = {"group": group, "lengths": lengths}
    if rank == 1:
        operator = changes.get("operator", operator)
        options |= changes.get("options", {})
        tensors |= {name: torch.randn(shape) for name, shape in changes.get("shapes", {}).items()}
        if changes.get("dtype"):
            tensors = {name: x.to(changes["dtype"]) for name, x in tensors.items()}
        if changes.get("tracked"):
            tensors["k"].requires_grad_()
    try:
        getattr(nf.distributed, operator)(**tensors, **options)
    except (TypeError, ValueError) as failure:
        return type(failure).__name__, str(failure)
    return None


def over_a_mesh(group, rank):
    """Largest difference between a call over a mesh and over its group, and what a mesh of two dimensions raises."""
    q, k, v = (torch.randn(1, 2, 8, 4) for _ in range(3))
    mesh = DeviceMesh.from_group(group, "cpu")
    one, other = (nf.distributed.softmax_attention(q, k, v, causal=True, group=x) for x in (mesh, group))
    try:
        nf.distributed.softmax_attention(q, k, v, group=DeviceMesh("cpu", [[0, 1], [2, 3]]))
    except ValueError as failure:
        return float((one - other).abs().max()), str(failure)


def example():
    spec = importlib.util.spec_from_file_location("context_parallel", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def example_losses(group, rank, steps):
    """The losses of `examples/context_parallel.py`."""
    return example().train(group, steps)


def beside_fsdp(group, rank):
    """{name: error of the gradient} of the example's model, with FSDP over one dimension of a mesh, shards over the other."""
    module, alone = example(), [dist.new_group([other]) for other in range(group.size())][rank]
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))
    blocks = torch.randint(module.VOCABULARY, (4, module.PERIOD), generator=torch.Generator().manual_seed(0))

    def gradients_of(model, blocks, positions):
        logits = model(blocks[:, positions % module.PERIOD], positions)
        targets = blocks[:, (positions + 1) % module.PERIOD]
        cross_entropy = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        (cross_entropy / (4 * module.LENGTH)).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    models = []
    for where in (alone, mesh["context"]):
        torch.manual_seed(0)
        models.append(module.Model(where))
    positions = torch.arange(module.LENGTH)
    expected = gradients_of(models[0], blocks, positions)
    for layer in models[1].layers:
        fully_shard(layer, mesh=mesh["data"])
    fully_shard(models[1], mesh=mesh["data"])
    data, context = (mesh.get_local_rank(name) for name in ("data", "context"))
    errors = {}
    for name, x in gradients_of(models[1], blocks.chunk(2)[data], positions.chunk(2)[context]).items():
        x = 2 * x.full_tensor()  # FSDP takes the mean
        dist.all_reduce(x, group=mesh["context"].get_group())
        errors[name] = float((x - expected[name]).abs().max() / expected[name].abs().max())
    return errors


def twice(group, rank):
    """What a second derivative raises."""
    q, k, v = (torch.randn(1, 2, 8, 4, requires_grad=True) for _ in range(3))
    o = nf.distributed.softmax_attention(q, k, v, causal=True, group=group)
    (dk,) = torch.autograd.grad(o.square().sum(), k, create_graph=True)
    try:
        dk.sum().backward()
    except RuntimeError as failure:
        return str(failure)
