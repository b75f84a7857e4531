"""Readers of attention calls: they return queries, keys and values of each head, and the keys that each query sees."""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_mask

from nearfar.diagnostics.visible import (
    Part,
    Unreadable,
    causal_from_the_first,
    everything,
    of_locality,
    packed,
    parts_of_mask,
    visible_keys,
)
from nearfar.localities import Locality, SlidingWindow

CHANGES_WEIGHTS = ("softcap", "s_aux", "position_bias")  # options of transformers that statistics do not support
PAGED = ("block_table", "k_cache", "v_cache")
WEIGHING = ("sigma", "top_k", "alpha", "beta", "sink")  # of nearfar's operators: what makes weights of scores
# What else a watch understands of them; it ignores dropout.
UNDERSTOOD = (*WEIGHING, *"qkv", "causal", "window_size", "locality", "scale", "cu_seqlens", "dropout_p", "seed", "return_lse",
              "backend")
CHECKED_ROWS = 8  # rows that are compared with the output of a model's own "eager" attention


class Call(NamedTuple):
    """One attention call; query heads may share key heads."""

    q: torch.Tensor  # (B, Hq, N, D)
    k: torch.Tensor  # (B, Hkv, M, D)
    v: torch.Tensor  # (B, Hkv, M, Dv)
    scale: float | None
    parts: list[Part]
    weighing: Mapping[str, Any] = {}  # sigma, top_k, alpha, beta and sink, where there are any


def unreadable(reason: str) -> NoReturn:
    raise Unreadable(reason)


# torch.nn.functional.scaled_dot_product_attention


def scaled_dot_product(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> list[Call]:
    if query.is_nested or key.is_nested:
        raise Unreadable("its tensors are nested")
    if query.dim() < 4:  # no dimension of heads: one head
        query, key, value = (x.unsqueeze(-3) for x in (query, key, value))
        attn_mask = attn_mask.unsqueeze(-3) if attn_mask is not None and attn_mask.dim() == 3 else attn_mask
    lead = torch.broadcast_shapes(*(x.shape[:-3] for x in (query, key, value)))
    q, k, v = (x.expand(*lead, *x.shape[-3:]).reshape(lead.numel(), *x.shape[-3:]) for x in (query, key, value))
    heads, num_queries, num_keys = q.shape[1], q.shape[2], k.shape[2]
    if not enable_gqa and k.shape[1] not in (1, heads):
        raise Unreadable(f"it broadcasts {heads} heads of queries over {k.shape[1]} of keys")
    if attn_mask is not None:
        parts = parts_of_mask(expanded(attn_mask, lead, heads, num_queries, num_keys))
    else:
        parts = causal_from_the_first(num_queries, num_keys) if is_causal else everything(num_queries, num_keys)
    return [Call(q, k, v, scale, parts)]


def expanded(mask: torch.Tensor, lead: torch.Size, *rest: int) -> torch.Tensor:
    """A mask as (B, H, N, M); a view if one mask serves all heads and batch elements."""
    return visible_keys(mask).expand(*lead, *rest).reshape(lead.numel(), *rest)


# nearfar.krause_attention, softmax_attention and affine_attention


def nearfar_operator(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> list[Call]:
    parameters = inspect.signature(function).parameters
    given = inspect.signature(function).bind(*arguments, **keywords).arguments
    for name, value in given.items():
        default = parameters[name].default
        if name not in UNDERSTOOD and value is not default and not (isinstance(value, (int, float, str)) and value == default):
            raise Unreadable(f"{function.__name__} with {name}: statistics do not know its weights")
    q, k, v, ends = given["q"], given["k"], given["v"], given.get("cu_seqlens")
    weighing = {name: given[name] for name in WEIGHING if given.get(name) is not None}
    parts = of_locality(q.shape[2], k.shape[2], locality_of(given), None if ends is None else ends.tolist())
    return [Call(q, k, v, given.get("scale"), parts, weighing)]


def locality_of(given: Mapping[str, Any]) -> Locality | None:
    """The locality of a call of nearfar: its own, or that of window_size and causal."""
    if (locality := given.get("locality")) is not None:
        return locality
    left, right = given.get("window_size", (-1, -1))
    right = 0 if given.get("causal") else right
    return None if left < 0 and right < 0 else SlidingWindow(left, right)


# torch.nn.MultiheadAttention, and the encoder layer that computes its attention without calling it


def multihead(
    module: nn.MultiheadAttention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_padding_mask: torch.Tensor | None = None,
    need_weights: bool = True,
    attn_mask: torch.Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> list[Call]:
    if module.bias_k is not None or module.add_zero_attn:
        raise Unreadable("add_bias_kv or add_zero_attn add keys")
    if query.is_nested:
        if not query is key is value:
            raise Unreadable("its tensors are nested")
        return [call for text in query.unbind() for call in multihead(module, text, text, text)]
    itself = query is key
    if query.dim() == 3 and not module.batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    if query.dim() == 2:
        query, key, value = (x[None] for x in (query, key, value))
    weights: Sequence[Any] = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    weights = weights if module.in_proj_weight is None else module.in_proj_weight.chunk(3)
    biases = [None] * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
        for x, w, b in zip((query, key, value), weights, biases, strict=True)
    )
    shape = len(q), module.num_heads, q.shape[2], k.shape[2]
    visible = torch.ones((), dtype=torch.bool, device=q.device)
    if attn_mask is not None:
        visible = visible_keys(inverted(attn_mask)).reshape(*(shape[:2] if attn_mask.dim() == 3 else (1, 1)), *shape[2:])
    if key_padding_mask is not None:
        kept = visible_keys(inverted(key_padding_mask)).view(-1, 1, 1, shape[3])
        visible = visible & kept & (kept.mT if itself else True)  # padding tokens are no queries either
    return [Call(q, k, v, None, parts_of_mask(visible.expand(shape)))]


def inverted(mask: torch.Tensor) -> torch.Tensor:
    """Convert a mask of nn.MultiheadAttention (True hides) to one of scaled_dot_product_attention (True shows)."""
    return ~mask if mask.dtype == torch.bool else mask


def encoder_layer(
    layer: nn.TransformerEncoderLayer,
    src: torch.Tensor,
    src_mask: torch.Tensor | None = None,
    src_key_padding_mask: torch.Tensor | None = None,
    is_causal: bool = False,
) -> list[Call]:
    x = layer.norm1.forward(src) if layer.norm_first else src
    return multihead(layer.self_attn, x, x, x, src_key_padding_mask, attn_mask=src_mask)


# transformers' attention interface


def kind_of(attend: Callable[..., Any], default: Callable[..., Any]) -> str | None:
    """How a function of transformers' attention interface reads its arguments; None if unknown."""
    if attend is default:
        return "eager"
    function = getattr(attend, "func", attend)  # a kernel from the hub is a partial
    for kind in ("sdpa", "flash", "flex"):
        module = sys.modules.get(f"transformers.integrations.{kind}_attention")
        if function is getattr(module, f"{kind}_attention_forward", None):
            return kind
    return None


def transformers_call(
    kind: str,
    result: Any,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | BlockMask | None = None,
    *more: Any,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> list[Call]:
    for name in CHANGES_WEIGHTS:
        if options.get(name) is not None:
            raise Unreadable(f"{type(module).__name__} attends with {name}: its weights are no softmax of q . k alone")
    if any(options.get(name) is not None for name in PAGED):
        raise Unreadable("its keys are in a paged cache")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    shape = *query.shape[:3], key.shape[2]
    if isinstance(attention_mask, BlockMask):
        attention_mask = dense(attention_mask, *shape[2:])
    if kind == "flash":
        parts = parts_of_flash(attention_mask, *shape, is_causal, **options)  # type: ignore[call-arg]
    elif attention_mask is not None:
        mask = attention_mask[..., : shape[3]]
        parts = parts_of_mask(expanded(mask, query.shape[:1], *shape[1:]))
    elif kind == "sdpa" and is_causal and shape[2] > 1:
        parts = causal_from_the_first(*shape[2:])
    else:
        parts = everything(*shape[2:])
    call = Call(query, key, value, scaling, parts)
    if kind == "eager" and not options.get("dropout"):
        check(call, attention_mask, result[0])
    return [call]


def dense(mask: BlockMask, num_queries: int, num_keys: int) -> torch.Tensor:
    """A BlockMask as a bool mask (B, H, N, M): its mask function, restricted to the blocks that it computes."""
    rows, columns = mask.BLOCK_SIZE
    blocks = mask.to_dense().bool().repeat_interleave(rows, -2).repeat_interleave(columns, -1)[..., :num_queries, :num_keys]
    shown = create_mask(mask.mask_mod, *mask.shape[:2], num_queries, num_keys, device=blocks.device)  # type: ignore[call-arg,misc]
    return blocks & shown


def parts_of_flash(
    mask: torch.Tensor | None,
    batch: int,
    heads: int,
    num_queries: int,
    num_keys: int,
    is_causal: bool,
    *,
    sliding_window: int | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **options: Any,
) -> list[Part]:
    """The parts that transformers' flash_attention_forward computes, by padding, text lengths or restarting positions."""
    back = -1 if sliding_window is None or num_keys <= sliding_window else sliding_window - 1
    locality = SlidingWindow(back, 0 if is_causal else back) if is_causal or back >= 0 else None
    if mask is not None:
        if num_queries != num_keys or mask.shape != (batch, num_keys):
            raise Unreadable(f"attention_mask hides padding from {num_queries} queries with {num_keys} keys")
        texts = [torch.nonzero(row).flatten().tolist() for row in mask]
        if any(text and len(text) != text[-1] - text[0] + 1 for text in texts):
            raise Unreadable("attention_mask hides keys in the middle of a text")
        spans = [slice(text[0], text[-1] + 1) if text else slice(0, 0) for text in texts]
        return [Part(slice(b, b + 1), span, span, locality) for b, span in enumerate(spans)]
    if all(x is not None for x in (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)):
        if batch != 1:
            raise Unreadable(f"cu_seq_lens_q counts texts through a batch of {batch}")
        return packed(cu_seq_lens_q.tolist(), cu_seq_lens_k.tolist(), locality)  # type: ignore[union-attr]
    if batch == 1 and position_ids is not None and position_ids.dim() == 2 and position_ids.shape[1] == num_queries > 1:
        starts = (position_ids[0] == position_ids.min()).nonzero().flatten().tolist()
        if len(starts) > 1 and num_queries == num_keys:
            return packed([*starts, num_queries], [*starts, num_keys], locality)
        if bool((position_ids[0].diff() != 1).any()):
            raise Unreadable("position_ids are those of several texts")
    return [part._replace(locality=locality) for part in everything(num_queries, num_keys)]


def check(call: Call, mask: torch.Tensor | None, output: torch.Tensor) -> None:
    """Raise Unreadable if sampled rows of the output (B, N, Hq, Dv) differ from the softmax attention of the call.

    Each model has its own "eager" function, which may do more than its arguments show.
    """
    q, k, v = (x.float() if x.dtype.itemsize < 4 else x for x in call[:3])
    scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    eps = max(torch.finfo(output.dtype).eps, 2.0**-11 if output.is_cuda else 0)  # TF32
    for batch, queries, *_ in call.parts:
        rows = range(queries.start, queries.stop, max(1, (queries.stop - queries.start) // CHECKED_ROWS))
        scores = q[batch, :, rows] @ k[batch].mT * scale
        if mask is not None:
            added = mask.expand(len(q), q.shape[1], *mask.shape[2:])[batch, :, rows, : k.shape[2]]
            scores = scores.masked_fill(~added, -torch.inf) if added.dtype == torch.bool else scores + added
        expected = (scores.softmax(-1) @ v[batch]).transpose(1, 2)
        largest = q[batch, :, rows].norm(dim=-1).max() * k[batch].norm(dim=-1).max() * abs(scale)
        error = (output[batch, rows] - expected).abs().max()
        if bool(error > eps * (16 + 4 * largest) * v[batch].abs().max()):
            raise Unreadable("its output is not softmax attention of q . k over the keys that its mask allows")
