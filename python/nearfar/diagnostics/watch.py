"""A watch over the attention of a model while it reads: per layer and head, what `nearfar.head_regimes` tells, and more."""

import sys
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F

from nearfar.diagnostics.regimes import REGIMES, HeadRegimes, Thresholds, classify, head_regimes, mean_geometry
from nearfar.localities import UNLIMITED, SlidingWindow

CHANGES_WEIGHTS = ("softcap", "s_aux", "position_bias")  # of transformers' attention interface: what statistics do not know
AVERAGED = tuple(name for name in HeadRegimes._fields if name not in ("sink_key", "regime"))


class Watch:
    """What a `watch` has seen: for each layer means over its calls, each weighted by its batch times its queries.

    layers: {name of the module that called attention: {quantity: (Hq,) float64 tensor on the CPU}}, in order of the first call.
        The quantities are those of `HeadRegimes` but sink_key and regime, with sink_at_start, the share of texts whose sink is
        their first key, and geometry, (3, sweep, Hq) precision, recall and F for each top_n of the sweep.
    """

    def __init__(self, top_n=4, sweep=(1, 2, 4, 8, 16), thresholds=Thresholds(), backend="auto"):  # noqa: B008
        self.top_n, self.sweep, self.thresholds, self.backend = top_n, tuple(sweep), thresholds, backend
        self.layers, self._weights = {}, {}

    @torch.no_grad()
    def record(self, layer, q, k, v, **keywords):
        """Take in one call of attention; `watch` does it, and so may any code that has q, k and v.

        Args:
            layer: name of the layer. q, k, v, **keywords: as for `nearfar.head_regimes`.
        """
        heads = head_regimes(q, k, v, top_n=self.top_n, thresholds=self.thresholds, backend=self.backend, **keywords)
        found = {name: getattr(heads, name) for name in AVERAGED}
        found["sink_at_start"] = (heads.sink_key == 0).double()
        curves = [mean_geometry(q, k, v, top_n, backend=self.backend, **keywords) for top_n in self.sweep]
        found["geometry"] = torch.stack([torch.stack(curve) for curve in curves], 1)
        weight = q.shape[0] * q.shape[2]
        before = self._weights.get(layer, 0)
        means = self.layers.setdefault(layer, {})
        for name, value in found.items():
            value = value.double().mean(-2).cpu()  # over the batch
            means[name] = value if not before else (before * means[name] + weight * value) / (before + weight)
        self._weights[layer] = before + weight

    def regimes(self):
        """{layer: (Hq,) int64 index into nearfar.diagnostics.REGIMES}, of the means."""
        heads = {
            layer: HeadRegimes(**{name: means[name] for name in AVERAGED}, sink_key=None, regime=None)
            for layer, means in self.layers.items()
        }
        return {layer: classify(found, self.top_n, self.thresholds) for layer, found in heads.items()}

    def table(self):
        """One dict a head: layer, head, means, effective_support = exp(entropy), sink_norm relative to the others, regime."""
        rows = []
        for (layer, means), regimes in zip(self.layers.items(), self.regimes().values(), strict=True):
            for head, regime in enumerate(regimes.tolist()):
                own = {name: means[name][head].item() for name in (*AVERAGED, "sink_at_start")}
                own["effective_support"] = means["entropy"][head].exp().item()
                own["sink_norm"] = own["sink_value_norm"] / max(own["value_norm"], 1e-30)
                rows.append({"layer": layer, "head": head, **own, "regime": REGIMES[regime]})
        return rows

    def __str__(self):
        columns = (
            "entropy", "effective_support", "sink_mass", "sink_norm", "sink_similarity", "precision", "recall", "f_score",
            "control_f_score",
        )  # fmt: skip
        rows = self.table()
        width = max((len(row["layer"]) for row in rows), default=5)
        lines = [f"{'layer':{width}} head " + " ".join(f"{name:>{max(len(name), 6)}}" for name in columns) + "  regime"]
        for row in rows:
            numbers = " ".join(f"{row[name]:{max(len(name), 6)}.3f}" for name in columns)
            lines.append(f"{row['layer']:{width}} {row['head']:4} {numbers}  {row['regime']}")
        return "\n".join(lines)


@contextmanager
def watch(model, *, top_n=4, sweep=(1, 2, 4, 8, 16), thresholds=Thresholds(), backend="auto"):  # noqa: B008
    """Context manager that yields a `Watch` of every attention that the model computes inside it.

        with nearfar.diagnostics.watch(model) as watched:
            model(**tokenizer(text, return_tensors="pt"))
        print(watched)
        nearfar.diagnostics.plot(watched, "heads.png")

    Watched are Hugging Face models through transformers' attention interface (5.0 or later), whatever attn_implementation they
    have, and in every model the calls of torch.nn.functional.scaled_dot_product_attention. Other attention can call
    `Watch.record` itself. The model computes what it computes anyway. Dropout is not part of what is watched.

    Args:
        model: a torch.nn.Module; the names of its modules name the layers.
        top_n: how many keys a query selects, of the regimes.
        sweep: the values of top_n for which precision, recall and F are recorded.
        thresholds: of the regimes.
        backend: of the diagnostics, as for `nearfar.attention_statistics`.

    Raises:
        TypeError: model is no torch.nn.Module.
        ValueError: from the watched call, for attention whose weights are not a softmax over a window: padding (give texts of
            one length), biases, soft caps, learned sinks.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    watched, running = Watch(top_n, sweep, thresholds, backend), []
    with ExitStack() as stack:
        follow_modules(stack, model, running)
        watch_functional(stack, watched, running)
        if transformers := sys.modules.get("transformers.modeling_utils"):  # or the model is none of its own
            watch_transformers(stack, watched, running, transformers.AttentionInterface)
        yield watched


def follow_modules(stack, model, running):
    """Keep in `running` the names of the modules that are running, the innermost last."""

    def enter(name):
        return lambda *_: running.append(name)

    def leave(*_):
        running.pop()  # and return None, lest it replaced the module's output

    for name, module in model.named_modules():
        stack.callback(module.register_forward_pre_hook(enter(name or "model")).remove)
        stack.callback(module.register_forward_hook(leave, always_call=True).remove)


def watch_functional(stack, watched, running):
    """Watch scaled_dot_product_attention where modules of the model call it."""
    attend = F.scaled_dot_product_attention

    def watched_attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if running:
            if is_causal and query.shape[2] != key.shape[2]:
                raise ValueError("is_causal with unequal lengths counts positions from the first query: it is not watched")
            keywords = window_of(attn_mask, query, key) if attn_mask is not None else {"causal": is_causal}
            watched.record(running[-1], query, key, value, scale=scale, **keywords)
        return attend(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    stack.enter_context(patch.object(F, "scaled_dot_product_attention", watched_attend))


def watch_transformers(stack, watched, running, attention_interface):
    """Watch what transformers' models call for attention, and not what that calls in turn."""
    get_interface = attention_interface.get_interface

    def watched_interface(interface, *arguments, **keywords):
        attend = get_interface(interface, *arguments, **keywords)

        def watched_attend(module, query, key, value, attention_mask=None, **options):
            if running:
                watched.record(running[-1], query, key, value, **keywords_of(module, query, key, attention_mask, options))
            outer, running[:] = running[:], []
            try:
                return attend(module, query, key, value, attention_mask, **options)
            finally:
                running[:] = outer

        return watched_attend

    stack.enter_context(patch.object(attention_interface, "get_interface", watched_interface))


def keywords_of(module, query, key, mask, options):
    """scale, causal and locality of a call through transformers' attention interface."""
    for name in CHANGES_WEIGHTS:
        if options.get(name) is not None:
            raise ValueError(f"{type(module).__name__} attends with {name}: its weights are no softmax of q . k alone")
    scale = options.get("scaling")
    if mask is not None and mask.dim() == 4:
        return {"scale": scale, **window_of(mask, query, key)}
    if mask is not None and not bool(mask.all()):
        raise ValueError("attention_mask hides padding: watch texts of one length, without padding")
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal  # as transformers reads it
    window = options.get("sliding_window")
    locality = None if window is None else SlidingWindow(window - 1, 0 if causal else window - 1)
    return {"scale": scale, "causal": bool(causal) and query.shape[2] > 1, "locality": locality}


def window_of(mask, query, key):
    """{"locality": the window that a mask (.., N, M) makes}; mask is a bool, or is added to scores: 0, or next to -inf."""
    if mask.dtype != torch.bool:
        hidden = mask <= torch.finfo(mask.dtype).min / 2
        if bool(((mask != 0) & ~hidden).any()):
            raise ValueError("attention_mask adds a bias to the scores: its weights are no softmax of q . k alone")
        mask = ~hidden
    num_queries, num_keys = query.shape[2], key.shape[2]
    mask = mask[..., :num_keys].expand(*mask.shape[:-2], num_queries, num_keys).reshape(-1, num_queries, num_keys)
    distance = torch.arange(num_keys) - torch.arange(num_keys - num_queries, num_keys)[:, None]
    distance = distance.to(mask.device)
    shown = distance[mask[0]]
    if shown.numel():
        back, ahead = -int(shown.min()), int(shown.max())
        limits = [UNLIMITED if reach >= num_keys - 1 else reach for reach in (back, ahead)]
        window = (distance >= -back) & (distance <= ahead)
        if min(limits) >= UNLIMITED and bool((mask == window).all()):
            return {"locality": SlidingWindow(*limits)}
    raise ValueError("attention_mask is no causal or sliding window: watch texts of one length, without padding")
