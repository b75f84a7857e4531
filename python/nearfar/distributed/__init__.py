"""Context parallelism: the operators, for sequences whose tokens are sharded over the ranks of a process group.

Each function takes what the operator of the same name takes, this rank's shard of every tensor with tokens, and `group`. Every
rank of the group makes the same call, and runs its backward too. Everything runs on torch.distributed.
"""

from nearfar.distributed.affine import affine_attention, softmax_attention
from nearfar.distributed.diagnostics import attention_statistics
from nearfar.distributed.krause import krause_attention
from nearfar.distributed.linear import hadamard_attention, linear_attention
from nearfar.distributed.synchronization import order_parameter, synchronization_attention

__all__ = [
    "affine_attention",
    "attention_statistics",
    "hadamard_attention",
    "krause_attention",
    "linear_attention",
    "order_parameter",
    "softmax_attention",
    "synchronization_attention",
]
