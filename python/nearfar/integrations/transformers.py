"""Attention implementations of Hugging Face transformers 5: "nearfar_softmax", "nearfar_krause" and "nearfar_affine"."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from nearfar.integrations.masks import Attend, Mask, Window, attend_within, check_window, make_mask, mask_without
from nearfar.integrations.widths import padded
from nearfar.localities import SlidingWindow
from nearfar.ops.affine import affine_attention, softmax_attention
from nearfar.ops.krause import krause_attention
from nearfar.runtime.dispatch import Backend

__all__ = ["register"]

# Options of transformers' attention interface that no operator supports: refused if they are set.
REFUSED = ("softcap", "position_bias", "head_mask", "layer_head_mask", "alibi", "output_attentions", "indices", "block_indices")
SINKS = ("s_aux", "sinks")
NEEDED = "nearfar.integrations.transformers needs a recent transformers 5 (5.24 is tested): pip install -U 'transformers>=5'"


class Settings(NamedTuple):
    """Arguments of `register`, which `config.nearfar` of a model overrides."""

    sigma: float | None = None
    window: int | None = None
    top_k: int | None = None
    backend: Backend = "auto"


def register(
    *, sigma: float | None = None, window: int | None = None, top_k: int | None = None, backend: Backend = "auto"
) -> None:
    """Register `attn_implementation="nearfar_softmax"`, `"nearfar_krause"` and `"nearfar_affine"` in transformers 5.

    They compute `nearfar.softmax_attention`, `nearfar.krause_attention` and `nearfar.affine_attention` over the keys that the
    model's mask allows: causal or bidirectional, its sliding window, packed sequences (`position_ids` that restart, or
    `cu_seq_lens_q` as transformers passes it to FlashAttention), and padding on either side. Padding is excluded exactly: a
    forward over whole sequences packs the tokens, and a forward with a cache computes one sequence after the other. Outputs of
    padding tokens are zeros. Attention sinks (gpt-oss) work with softmax and affine attention. Key heads are not repeated.

    `config.nearfar`, a dict with any of the argument names below, overrides them for one model and is saved with it. Two more
    settings are attributes of an attention module, so that they can be trained. `nearfar_sigma`, a tensor (Hq,) or 0-d,
    overrides sigma. `nearfar_scales` is required by "nearfar_affine": a callable, usually an nn.Module, that takes the query
    (B, Hq, N, D) and returns alpha and beta, each (B, Hq, N) or None.

    Krause attention measures distances and ignores the model's `scaling`.

    Call this function again to change the arguments.

    Args:
        sigma: bandwidth of "nearfar_krause" in units of |q - k|, positive.
        window: a query of "nearfar_krause" sees the keys that are less than `window` positions away, among those that the
            model's mask allows; None for all of these.
        top_k: how many of these keys it keeps, None for all.
        backend: as for the operators.

    Raises:
        ImportError: transformers is missing or too old: it must describe masks as transformers 5 does.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError as error:
        raise ImportError(NEEDED) from error
    if "q_offset" not in inspect.signature(sdpa_mask).parameters:
        raise ImportError(NEEDED)
    settings = Settings(sigma, window, top_k, backend)
    mask = torch.compiler.disable(make_mask)  # the result depends on the values of the padding
    for name, attention in (("softmax", _softmax), ("krause", _krause), ("affine", _affine)):
        name = f"nearfar_{name}"
        AttentionInterface.register(name, functools.partial(_forward, name, attention, settings))
        AttentionMaskInterface.register(name, mask)


Attention = Callable[[nn.Module, torch.Tensor, Settings, Mask, float, torch.Tensor | None], tuple[Attend, list[torch.Tensor]]]


def _forward(
    name: str,
    attention: Attention,
    settings: Settings,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: object,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """The function for AttentionInterface: query (B, Hq, N, D), key, value (B, Hkv, M, D) -> (o (B, N, Hq, Dv), None)."""
    _refuse(name, dropout, options)
    settings = _of_model(module, settings)
    mask = _mask(name, module, query, key, attention_mask, options)
    sink = next((options[sink] for sink in SINKS if options.get(sink) is not None), None)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attend, per_query = attention(module, query, settings, mask, scale, sink)
    width = value.shape[-1]
    o = attend_within(attend, mask, padded(query), padded(key), padded(value), *per_query)
    return o[..., :width].transpose(1, 2).contiguous(), None


def _refuse(name: str, dropout: float, options: dict[str, Any]) -> None:
    if dropout:
        raise NotImplementedError(f"{name} has no dropout, got {dropout}: set config.attention_dropout to 0")
    for option in REFUSED:
        given = options.get(option)
        if given is not None and given is not False:
            raise NotImplementedError(f'{name} does not support {option}: use attn_implementation="eager"')


def _of_model(module: nn.Module, settings: Settings) -> Settings:
    """The settings, overridden by config.nearfar."""
    own = getattr(getattr(module, "config", None), "nearfar", None)
    if own is None:
        return settings
    if not isinstance(own, dict):
        raise TypeError(f"config.nearfar must be a dict, got {type(own).__name__}")
    if unknown := set(own) - set(Settings._fields):
        raise ValueError(f"config.nearfar takes {', '.join(Settings._fields)}; got {', '.join(sorted(map(str, unknown)))}")
    return settings._replace(**own)


def _mask(
    name: str, module: nn.Module, query: torch.Tensor, key: torch.Tensor, attention_mask: object, options: dict[str, Any]
) -> Mask:
    """The Mask of a call, packed by cu_seq_lens_q if given."""
    sizes = query.shape[0], query.shape[2], key.shape[2]
    if isinstance(attention_mask, Mask):
        mask = attention_mask
        if mask.sizes != sizes:
            raise ValueError(f"{name}: the mask is for (batch, queries, keys) of {mask.sizes}, the call has {sizes}")
    elif attention_mask is None:
        causal = options.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        mask = mask_without(*sizes, bool(causal), options.get("sliding_window"))
    else:
        shape = tuple(getattr(attention_mask, "shape", ()))
        raise NotImplementedError(
            f"{name} takes an attention_mask of (batch, tokens) and no arbitrary mask, got {type(attention_mask).__name__} of "
            f'shape {shape}: use attn_implementation="eager", "sdpa" or "flex_attention"'
        )
    ends = options.get("cu_seq_lens_q")
    return mask if ends is None else _packed(name, mask, ends, options.get("cu_seq_lens_k"))


def _packed(name: str, mask: Mask, ends: torch.Tensor, key_ends: torch.Tensor | None) -> Mask:
    batch, queries, keys = mask.sizes
    if mask.tokens is not None or mask.rows is not None:
        raise NotImplementedError(f"{name} takes cu_seq_lens_q or padding in attention_mask, not both")
    if batch != 1 or queries != keys:
        raise NotImplementedError(f"{name} takes cu_seq_lens_q in a batch of 1 without a cache, got sizes {mask.sizes}")
    if key_ends is not None and key_ends is not ends and not torch.equal(key_ends, ends):
        raise NotImplementedError(f"{name} takes one packing of queries and keys: cu_seq_lens_k must equal cu_seq_lens_q")
    return mask._replace(cu_seqlens=ends.to(torch.int32))


def _softmax(
    module: nn.Module, query: torch.Tensor, settings: Settings, mask: Mask, scale: float, sink: torch.Tensor | None
) -> tuple[Attend, list[torch.Tensor]]:
    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: Window, cu_seqlens: torch.Tensor | None
    ) -> torch.Tensor:
        return softmax_attention(
            q, k, v, window_size=window, scale=scale, sink=sink, cu_seqlens=cu_seqlens, backend=settings.backend
        )

    return attend, []


def _krause(
    module: nn.Module, query: torch.Tensor, settings: Settings, mask: Mask, scale: float, sink: torch.Tensor | None
) -> tuple[Attend, list[torch.Tensor]]:
    if sink is not None:
        raise NotImplementedError("nearfar_krause has no attention sink (s_aux): use nearfar_softmax")
    sigma = getattr(module, "nearfar_sigma", settings.sigma)
    if sigma is None:
        raise ValueError('nearfar_krause needs a bandwidth: config.nearfar = {"sigma": ..} or register(sigma=..)')
    if settings.window is not None and settings.window < 1:
        raise ValueError(f"nearfar_krause: window must be at least 1, got {settings.window}")
    left, right = mask.window
    if settings.window is not None:
        reach = settings.window - 1
        left, right = (reach if side < 0 else min(side, reach) for side in mask.window)
    check_window(mask, (left, right))

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: Window, cu_seqlens: torch.Tensor | None
    ) -> torch.Tensor:
        return krause_attention(
            q, k, v, sigma, SlidingWindow(left, right),
            top_k=settings.top_k, cu_seqlens=cu_seqlens, backend=settings.backend,
        )

    return attend, []


def _affine(
    module: nn.Module, query: torch.Tensor, settings: Settings, mask: Mask, scale: float, sink: torch.Tensor | None
) -> tuple[Attend, list[torch.Tensor]]:
    scales = getattr(module, "nearfar_scales", None)
    if scales is None:
        raise ValueError(
            "nearfar_affine needs alpha and beta: set nearfar_scales of every attention module to a callable that takes the "
            "query (B, Hq, N, D) and returns both, (B, Hq, N) each"
        )
    numbers = scales(query)
    present = [x for x in numbers if x is not None]

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: Window, cu_seqlens: torch.Tensor | None,
        *per_query: torch.Tensor,
    ) -> torch.Tensor:
        given = iter(per_query)
        alpha, beta = (None if x is None else next(given) for x in numbers)
        return affine_attention(
            q, k, v, alpha, beta,
            window_size=window, scale=scale, sink=sink, cu_seqlens=cu_seqlens, backend=settings.backend,
        )

    return attend, present
