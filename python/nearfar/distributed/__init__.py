"""Context parallelism: the operators, for sequences whose tokens are sharded over the ranks of a process group.

Each function takes what the operator of the same name takes, this rank's shard of every tensor with tokens, and `group`. Every
rank of the group makes the same call, and runs the backward of it, too. Everything runs on torch.distributed.
"""

from nearfar.distributed.affine import affine_attention, softmax_attention
from nearfar.distributed.krause import krause_attention
from nearfar.distributed.linear import hadamard_attention, linear_attention

__all__ = [
    "affine_attention",
    "hadamard_attention",
    "krause_attention",
    "linear_attention",
    "softmax_attention",
]
