"""The competitor of the streamed diagnostics, beside softmax attention itself: all N x N weights in memory."""

from nearfar.reference.pairwise import top_k_mask


def eager(formula):
    def statistics(q, k):
        return formula.plain(q, *to_query_heads(q, k), keep=None)

    def geometry(q, k, v):
        k, v = to_query_heads(q, k, v)
        return formula.plain(q, k, v, keep=top_k_mask(formula.scores(q, k), formula.top_n))

    return geometry if hasattr(formula, "top_n") else statistics


def to_query_heads(q, *tensors):
    return [x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in tensors]
