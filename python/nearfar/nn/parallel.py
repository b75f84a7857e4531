"""Tensor parallelism of the layers over their heads, for torch.distributed.tensor.parallel."""

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from nearfar.nn.base import Layer
from nearfar.runtime.checks import require


class HeadParallel(ParallelStyle):
    """Plan of a nearfar layer for `parallelize_module`: each rank of a mesh computes num_heads / ranks heads.

        parallelize_module(model, mesh, {"blocks.*.attention": HeadParallel(), "blocks.*.ffn.0": ColwiseParallel(), ...})

    ColwiseParallel shards the projections and RowwiseParallel the output projection. Tensors with one number per head
    (bandwidths, sinks, averages) are sharded with them. Numbers and feature maps that all heads share are replicated, and their
    gradients are summed. x and the output of the layer are whole on every rank.

    Raises (from parallelize_module):
        TypeError: the module is not a nearfar layer with heads.
        ValueError: num_heads or num_kv_heads is not a multiple of the number of ranks.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        fits = isinstance(module, Layer) and hasattr(module, "num_heads")
        require(fits, f"HeadParallel shards the layers of nearfar.nn, got {type(module).__name__}", TypeError)
        ranks = device_mesh.size()
        for name in ("num_heads", "num_kv_heads"):
            heads = getattr(module, name, ranks)
            require(heads % ranks == 0, f"{name} must be a multiple of the {ranks} ranks of the mesh, got {heads}")
        for name, child in module.named_children():
            if name.endswith("_proj"):
                style = RowwiseParallel() if name == "out_proj" else ColwiseParallel()
                parallelize_module(child, device_mesh, style)
            else:  # a feature map, which sees (B, H, N, width)
                distribute_module(child, device_mesh, input_fn=_sharded_heads, output_fn=lambda _, y, mesh: y.to_local())
        every: Any = dict(recurse=False, remove_duplicate=False)
        for name, tensor in (*module.named_parameters(**every), *module.named_buffers(**every)):
            placement = Shard(0) if name in module.per_head else Replicate()  # type: ignore[operator]
            sharded = distribute_tensor(tensor, device_mesh, [placement])
            setattr(module, name, nn.Parameter(sharded, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else sharded)
        return module


def _sharded_heads(_: nn.Module, inputs: tuple[torch.Tensor, ...], mesh: DeviceMesh) -> Any:
    return tuple(DTensor.from_local(x, mesh, [Shard(1)], run_check=False) for x in inputs)
