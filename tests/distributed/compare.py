"""A call on shards beside the same call on the whole sequence, with gradients."""

from itertools import accumulate

import torch
import torch.distributed as dist

import nearfar as nf

HADAMARD = "hadamard_attention"


def tensors_of(operator, length, dtype, state=False, sink=False, batch=2, heads=(4, 2), width=4, value_width=3):
    """{name: tensor} of a whole call, and the names of those that are sharded along dimension 2."""
    torch.manual_seed(0)
    queries, keys = heads

    def randn(*shape):
        return torch.randn(*shape, dtype=dtype)

    found = {"q": randn(batch, queries, length, width), "k": randn(batch, keys, length, width)}
    if operator == HADAMARD:
        found |= {"q1": randn(batch, queries, length, 2), "k1": randn(batch, keys, length, 2)}
    found["v"] = randn(batch, keys, length, value_width)
    if operator == "affine_attention":
        found |= {"alpha": randn(batch, queries, length), "beta": randn(batch, queries, length)}
    sharded = list(found)
    if operator == "krause_attention":
        found["sigma"] = randn(queries).exp()
    if state:
        widths = (width, 2) if operator == HADAMARD else (width,)
        wide = torch.promote_types(dtype, torch.float32)
        found["initial_state"] = torch.rand(batch, keys, *widths, value_width + 1, dtype=wide)
    if sink:
        found["sink"] = randn(queries)
    return found, sharded


def call(module, operator, tensors, options):
    """The floating-point results of an operator, as a tuple."""
    tensors = dict(tensors)
    if operator == HADAMARD:
        q, q1, k, k1 = (tensors.pop(name) for name in ("q", "q1", "k", "k1"))
        tensors |= {"qs": [q, q1], "ks": [k, k1]}
    result = getattr(module, operator)(**tensors, **options)
    return result if isinstance(result, tuple) else (result,)


def gradients(results, tensors, upstream):
    found = torch.autograd.grad(results, list(tensors.values()), upstream, allow_unused=True)
    return dict(zip(tensors, found, strict=True))


def on_shards(group, rank, operator, lengths, dtype, options, make=None):
    """({name: (of the shards, of the whole call)}) of results and gradients of this rank, those of shared tensors summed."""
    whole, sharded = tensors_of(operator, sum(lengths), dtype, **(make or {}))
    start = [0, *accumulate(lengths)][rank]

    def shard(name, x):
        return x.narrow(2, start, lengths[rank]) if name in sharded or name == "o" else x

    whole = {name: x.requires_grad_() for name, x in whole.items()}
    mine = {name: shard(name, x.detach()).requires_grad_() for name, x in whole.items()}
    expected = call(nf, operator, whole, options)
    got = call(nf.distributed, operator, mine, {**options, "group": group, "lengths": lengths})
    torch.manual_seed(1)
    upstream = [torch.randn_like(x) for x in expected]
    # The state is a result of every rank: one of them has the gradient.
    of_state = [x if rank == len(lengths) - 1 else torch.zeros_like(x) for x in upstream[1:]]
    found = gradients(got, mine, [shard("o", upstream[0]), *of_state])
    wanted = gradients(expected, whole, upstream)
    for name in set(found) - set(sharded):
        dist.all_reduce(found[name], group=group)
    pairs = {"o": (got[0], shard("o", expected[0]))}
    if len(got) > 1:
        pairs["state"] = got[1], expected[1]
    pairs |= {f"d{name}": (found[name], shard(name, wanted[name])) for name in found}
    return {name: tuple(x.detach() for x in pair) for name, pair in pairs.items()}


def error(group, rank, *arguments):
    """{name: largest error relative to the whole call's largest value} of `on_shards`."""
    found = on_shards(group, rank, *arguments)
    errors = {}
    for name, (got, expected) in found.items():
        assert got.shape == expected.shape and got.dtype == expected.dtype, name
        difference = (got - expected).abs().max() if got.numel() else torch.zeros(())
        errors[name] = float(difference / max(float(expected.abs().max()) if got.numel() else 0, 1e-3))
    return errors
