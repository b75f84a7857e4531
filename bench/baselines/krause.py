"""Krause attention's competitors: the formula written down, and FlexAttention."""

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from bench.baselines import static
from bench.formulas.krause import Rbf, rbf_scores
from nearfar.reference.pairwise import masked_softmax

FLEX_BLOCK = 128


def eager(formula):
    """Krause attention as one would write it down: all N x N scores in memory.

    Scores are float32 whatever the inputs: in bfloat16, rounding would decide nearly every selection.
    """

    def run(q, k, v, sigma):
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = rbf_scores(q.float(), k.float(), sigma)
        keep = formula.visible(q.shape[2], k.shape[2], q.device)
        if formula.top_k is not None:
            best = scores.detach().masked_fill(~keep, float("-inf")).topk(min(formula.top_k, k.shape[2])).indices
            keep = keep & torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
        return masked_softmax(scores, keep).to(v.dtype) @ v

    return run


def half_squares(k):
    return 0.5 * k.float().square().sum(-1)


def flex(formula, length, device, compiled=static):
    """FlexAttention over the formula's window, without top-k.

    The gradient of k flows through the captured |k|^2 as well, which is computed outside, since FlexAttention
    differentiates what it captures as an input. sigma counts as a constant.
    """
    mask = window_block_mask(formula, length, device)
    attention, squares = compiled(flex_attention), compiled(half_squares)

    def softmax(q, k, v):
        return attention(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])

    def rbf(q, k, v, sigma):
        group = q.shape[1] // k.shape[1]
        scale, key_squares = sigma.detach().square().reciprocal(), squares(k)

        def score(product, batch, head, row, key):
            return (product - key_squares[batch, head // group, key]) * scale[head]

        return attention(q, k, v, score_mod=score, block_mask=mask, scale=1.0, enable_gqa=group != 1)

    return rbf if isinstance(formula, Rbf) else softmax


def window_block_mask(formula, length, device):
    """BlockMask of a window, from its blocks: torch's create_block_mask evaluates all N x N pairs, more than fit."""
    left, right = (length if side < 0 else side for side in (formula.left, formula.right))
    start = torch.arange(0, length, FLEX_BLOCK, device=device)
    offset = start[:, None] - start
    nearest, farthest = offset - (FLEX_BLOCK - 1), offset + (FLEX_BLOCK - 1)
    touched = (farthest >= -right) & (nearest <= left)
    # Blocks that hang over the end count as masked.
    complete = start + FLEX_BLOCK <= length
    whole = (nearest >= -right) & (farthest <= left) & complete & complete[:, None]

    def blocks(dense):
        order = torch.argsort(dense.int(), dim=-1, descending=True, stable=True).int()
        return dense.sum(-1, dtype=torch.int32)[None, None], order[None, None]

    def inside(batch, head, row, key):
        return (row - key <= left) & (key - row <= right)

    return BlockMask.from_kv_blocks(
        *blocks(touched & ~whole), *blocks(whole), BLOCK_SIZE=FLEX_BLOCK, mask_mod=inside, seq_lengths=(length, length)
    )
