"""Linear attention with the signature of flash-linear-attention (fla), computed by `nearfar.linear_attention`.

    from nearfar.integrations.fla import chunk_linear_attn  # was: from fla.ops.linear_attn import chunk_linear_attn

fla's three functions compute the same in different ways; here they are one function.
"""

import torch
from torch.nn.functional import pad

from nearfar.integrations.widths import padded
from nearfar.ops.linear import linear_attention
from nearfar.runtime.checks import check_tensor, require

__all__ = ["chunk_linear_attn", "fused_chunk_linear_attn", "fused_recurrent_linear_attn"]


def chunk_linear_attn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    normalize: bool = True,
    head_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Causal linear attention without a feature map: o_t = scale sum_{s <= t} (q_t . k_s) v_s.

    With normalize, o_t is divided by scale sum_{s <= t} q_t . k_s + 1e-10. As in fla, apply feature maps to q and k before.

    Args:
        q: (B, T, H, K), float32, float16 or bfloat16 (float64 on a CPU).
        k: (B, T, H, K) in the dtype of q. It may have fewer heads, which the heads of q then share.
        v: (B, T, H, V), with the heads of k.
        scale: factor of q . k, positive; None for K^-0.5.
        initial_state: (B, H, K, V) float32, the sum of k v^T before the first token; (S, H, K, V) with cu_seqlens.
        output_final_state: also return that sum after the last token.
        normalize: divide by the sum of the weights. Not with states: fla's states contain no normaliser, and its versions
            disagree on the result of such a call.
        head_first: must be False, as in fla.
        cu_seqlens: (S + 1,), the boundaries of S sequences packed along T in a batch of 1, starting with 0.

    Returns:
        o (B, T, H, V) in the dtype of q and the final state, float32, or None.

    Raises:
        NotImplementedError: head_first, or a state together with normalize.
        TypeError, ValueError: as `nearfar.linear_attention`.
    """
    if head_first:
        raise NotImplementedError("head_first must be False: tensors are (B, T, H, D)")
    if normalize and (initial_state is not None or output_final_state):
        name = "initial_state" if initial_state is not None else "output_final_state"
        raise NotImplementedError(
            f"{name} needs normalize=False: fla's states have no normaliser; nearfar.linear_attention has states with one"
        )
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, tensor)
        require(tensor.dim() == 4, f"{name} must have 4 dimensions (B, T, H, D), got shape {tuple(tensor.shape)}")
    key_width, value_width = k.shape[3], v.shape[3]
    scale = key_width**-0.5 if scale is None else scale
    require(scale > 0, f"scale must be positive, got {scale}")
    q, k, v = (padded(x).transpose(1, 2) for x in (q, k, v))
    if normalize:  # the scale cancels, but for the 1e-10
        eps = 1e-10 / scale
    else:
        q, eps = q * scale, 0.0
    state = None
    if initial_state is not None:
        state = _padded_state(initial_state, key_width, value_width, k.shape[3], v.shape[3])
    o, final = linear_attention(
        q, k, v, feature_map="identity", normalize=normalize, causal=True, eps=eps, initial_state=state, return_state=True,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.to(torch.int32),
    )
    o = o[..., :value_width].transpose(1, 2)
    return o, final[:, :, :key_width, :value_width] if output_final_state else None


fused_chunk_linear_attn = fused_recurrent_linear_attn = chunk_linear_attn


def _padded_state(
    state: torch.Tensor, key_width: int, value_width: int, padded_key_width: int, padded_value_width: int
) -> torch.Tensor:
    """Convert fla's state (B, H, K, V) to nearfar's: padded widths, and a last column of zeros in place of the normaliser."""
    check_tensor("initial_state", state)
    require(
        state.dim() == 4 and tuple(state.shape[2:]) == (key_width, value_width),
        f"initial_state must have shape (B, H, K, V) with K={key_width} and V={value_width}, got {tuple(state.shape)}",
    )
    return pad(state, (0, padded_value_width + 1 - value_width, 0, padded_key_width - key_width))
