"""`watch` records the attention of a model: for each layer and head, the results of `nearfar.head_regimes` and more."""

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch

from nearfar.diagnostics import running
from nearfar.diagnostics.read import Call
from nearfar.diagnostics.regimes import HeadRegimes, Thresholds, classify, mean_geometry, measured, regime_name
from nearfar.diagnostics.visible import Part, Unreadable
from nearfar.runtime.dispatch import Backend
from nearfar.runtime.private import is_compiled

AVERAGED = tuple(name for name in HeadRegimes._fields if name not in ("sink_key", "regime"))
MORE = ("first_mass", "max_weight", "mean_logit", "weight_sum")  # means of statistics, beside those of HeadRegimes
ON_UNSUPPORTED = ("skip", "raise")
merging = threading.Lock()  # several threads may update the same means


class Watch:
    """Results of a `watch`: for each layer, means over its calls, weighted by batch size times queries.

    layers: {name of the module that called attention: {quantity: (Hq,) float64 tensor on the CPU}}, in order of the first call.
        The quantities are those of `HeadRegimes` except sink_key and regime, and the means over queries of what
        `AttentionStatistics` calls max_weight, mean_logit, weight_sum and first_mass (of one key). In addition there are
        sink_at_start, the share of texts whose sink is their first key, and geometry, (3, sweep, Hq): precision, recall and F
        for each top_n of the sweep.
        If a module is called with another number of heads, these calls form a layer "name#2".
    skipped: {name of the layer: why a call of it was skipped}, the first reason of each.
    model: name of the class of the watched model, for titles; "" if `watch` did not make this Watch.
    """

    def __init__(
        self,
        top_n: int = 4,
        sweep: Sequence[int] = (1, 2, 4, 8, 16),
        thresholds: Thresholds = Thresholds(),  # noqa: B008
        backend: Backend = "auto",
    ) -> None:
        self.top_n, self.sweep, self.thresholds, self.backend = top_n, tuple(sweep), thresholds, backend
        self.layers: dict[str, dict[str, torch.Tensor]] = {}
        self.skipped: dict[str, str] = {}
        self.model = ""
        self._weights: dict[str, int] = {}

    def record(self, layer: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **keywords: Any) -> None:
        """Record one attention call. `watch` calls this, and so may any code that has q, k and v.

        A call without queries, or of an empty batch, changes nothing.

        Args:
            layer: name of the layer. q, k, v, **keywords: as for `nearfar.head_regimes`.
        """
        self._merge(layer, [self._measured(q, k, v, **keywords)])

    def _take(self, layer: str, calls: list[Call]) -> None:
        """Record the calls if all their parts can be measured, otherwise none of them."""
        parts = [
            self._measured(
                call.q[part.batch, :, part.queries], call.k[part.batch, :, part.keys], call.v[part.batch, :, part.keys],
                scale=call.scale, locality=part.locality, **of_part(call.weighing, part),
            )
            for call in calls for part in call.parts
        ]
        self._merge(layer, parts)

    @torch.no_grad()
    def _measured(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **keywords: Any
    ) -> tuple[int, dict[str, torch.Tensor]]:
        """(batch times queries, {quantity: mean over the batch})."""
        weight = q.shape[0] * q.shape[2]
        if not weight:
            return 0, {}
        heads, statistics = measured(q, k, v, self.top_n, self.thresholds, backend=self.backend, **keywords)
        found = {name: getattr(heads, name) for name in AVERAGED}
        found |= {name: getattr(statistics, name).mean(-1) for name in ("max_weight", "mean_logit", "weight_sum")}
        found["first_mass"] = statistics.first_mass()
        found["sink_at_start"] = (heads.sink_key == 0).double().masked_fill(heads.sink_mass.isnan(), torch.nan)
        curves = [mean_geometry(q, k, v, top_n, backend=self.backend, **keywords) for top_n in self.sweep]
        found["geometry"] = torch.stack([torch.stack(curve) for curve in curves], 1)
        return weight, {name: value.double().mean(-2).cpu() for name, value in found.items()}

    def _merge(self, module: str, parts: list[tuple[int, dict[str, torch.Tensor]]]) -> None:
        for weight, found in parts:
            if not weight:
                continue
            with merging:
                layer = self._layer(module, found["entropy"].shape)
                before = self._weights.get(layer, 0)
                means = self.layers.setdefault(layer, {})
                for name, value in found.items():
                    means[name] = value if not before else (before * means[name] + weight * value) / (before + weight)
                self._weights[layer] = before + weight

    def _layer(self, module: str, heads: torch.Size) -> str:
        """Name of the module's first layer with this many heads, or of a new one."""
        layer, count = module, 1
        while layer in self.layers and self.layers[layer]["entropy"].shape != heads:
            count += 1
            layer = f"{module}#{count}"
        return layer

    def regimes(self) -> dict[str, torch.Tensor]:
        """{layer: (Hq,) int64 index into nearfar.diagnostics.REGIMES}, by the means."""
        heads = {
            layer: HeadRegimes(**{name: means[name] for name in AVERAGED}, sink_key=None, regime=None)  # type: ignore[arg-type]
            for layer, means in self.layers.items()
        }
        return {layer: classify(found, self.top_n, self.thresholds) for layer, found in heads.items()}

    def table(self) -> list[dict[str, Any]]:
        """One dict per head: layer, head, means, effective_support = exp(entropy), relative sink_norm, regime."""
        rows = []
        for (layer, means), regimes in zip(self.layers.items(), self.regimes().values(), strict=True):
            for head, regime in enumerate(regimes.tolist()):
                own = {name: means[name][head].item() for name in (*AVERAGED, *MORE, "sink_at_start")}
                own["effective_support"] = means["entropy"][head].exp().item()
                own["sink_norm"] = own["sink_value_norm"] / max(own["value_norm"], 1e-30)
                rows.append({"layer": layer, "head": head, **own, "regime": regime_name(regime)})
        return rows

    def __str__(self) -> str:
        columns = (
            "entropy", "effective_support", "first_mass", "sink_mass", "sink_norm", "sink_similarity", "precision", "recall",
            "f_score", "control_f_score",
        )
        rows = self.table()
        width = max((len(row["layer"]) for row in rows), default=5)
        lines = [f"{'layer':{width}} head " + " ".join(f"{name:>{max(len(name), 6)}}" for name in columns) + "  regime"]
        for row in rows:
            numbers = " ".join(f"{row[name]:{max(len(name), 6)}.3f}" for name in columns)
            lines.append(f"{row['layer']:{width}} {row['head']:4} {numbers}  {row['regime']}")
        return "\n".join((*lines, *(f"skipped {layer}: {reason}" for layer, reason in self.skipped.items())))


def of_part(weighing: Mapping[str, Any], part: Part) -> dict[str, Any]:
    """What makes weights of a call's scores, of its part."""
    per_query = ("alpha", "beta")
    return {name: x[part.batch, :, part.queries] if name in per_query else x for name, x in weighing.items()}


class Session:
    """An open `watch`, to which `running.report` reports attention calls."""

    def __init__(self, model: torch.nn.Module, watched: Watch, on_unsupported: str) -> None:
        self.modules = [(name or "model", module) for name, module in model.named_modules()]  # held: keys must stay theirs
        self.names = {running.key(module): name for name, module in self.modules}
        # Dynamo cannot trace all of torch under a TorchFunctionMode, so modules that run compiled ones run without it.
        self.compiled = {running.key(m) for _, m in self.modules if any(map(is_compiled, m.modules()))}
        self.watched, self.on_unsupported = watched, on_unsupported
        self.ran: set[int] = set()

    def take(self, layer: str, read: Callable[[], list[Call]]) -> None:
        try:
            with torch.no_grad():
                self.watched._take(layer, read())
        except Exception as error:  # any error: watching must not interrupt the model
            reason = str(error) if isinstance(error, Unreadable) else f"{type(error).__name__}: {error}"
            self.watched.skipped.setdefault(layer, reason)
            if self.on_unsupported == "raise":
                raise ValueError(f"watch cannot read the attention of {layer}: {reason}") from error

    def close(self) -> None:
        """List unseen attention in `skipped`, and warn if none was seen."""
        watched = self.watched
        for name, module in self.modules:
            if reason := self.unseen(module):
                known = [*watched.layers, *watched.skipped]
                if not any(is_inside(seen, name) or is_inside(name, seen) for seen in known):
                    watched.skipped[name] = reason
        if not watched.layers:
            classes = {name: type(module).__name__ for name, module in self.modules}
            lines = [f"{name} ({classes[name]}): {reason}" for name, reason in watched.skipped.items()]
            lines += [] if self.ran else ["no module of it ran while the watch was open"]
            model = type(self.modules[0][1]).__name__
            warnings.warn("\n  ".join((f"nearfar.diagnostics.watch saw no attention in {model}", *lines)), stacklevel=4)

    def unseen(self, module: torch.nn.Module) -> str | None:
        """Why attention of a module may have been missed, or None."""
        if is_compiled(module):
            return "torch.compile runs it: watch the uncompiled model"
        if running.key(module) in self.ran and "attention" in type(module).__name__.lower():
            return "it calls no attention that watch can read, such as scaled_dot_product_attention: call watched.record in it"
        return None


def is_inside(name: str, other: str) -> bool:
    """Whether a module is another one, or is inside it."""
    return other == "model" or f"{name.split('#')[0]}.".startswith(f"{other}.")


@contextmanager
def watch(
    model: torch.nn.Module,
    *,
    top_n: int = 4,
    sweep: Sequence[int] = (1, 2, 4, 8, 16),
    thresholds: Thresholds = Thresholds(),  # noqa: B008
    backend: Backend = "auto",
    on_unsupported: Literal["skip", "raise"] = "skip",
) -> Iterator[Watch]:
    """Context manager that yields a `Watch` of every attention that the model computes inside it.

        with nearfar.diagnostics.watch(model) as watched:
            model(**tokenizer(text, return_tensors="pt"))
        print(watched)
        nearfar.diagnostics.plot(watched, "heads.png")

    In every thread that runs modules of the model, it sees nearfar.softmax_attention, affine_attention and krause_attention,
    and so the layers of nearfar.nn and the implementations of nearfar.integrations.transformers that call them,
    torch.nn.functional.scaled_dot_product_attention, torch.nn.MultiheadAttention, torch's encoder layers (including their fast
    path), and Hugging Face models that use transformers' attention interface (5.0 or later) with "eager", "sdpa",
    "flex_attention" or FlashAttention. Other attention can call `Watch.record` itself. The outputs of the model do not change,
    and nothing is registered on it or on replicas of it. The watch ignores dropout, and forwards that checkpointing repeats in
    the backward.

    A query may see all keys, or a causal or sliding window of them. Padding on the left and several texts in one sequence are
    supported: each text is read on its own, and queries that see no key are left out. Attention with anything else that changes
    the weights (other masks, biases, soft caps, sinks of other implementations) cannot be read, nor can attention inside
    torch.compile or a CUDA graph. Such calls are skipped, with a reason in `Watch.skipped`. `Monitor` watches every n-th step
    of a training.

    Args:
        model: a torch.nn.Module; the names of its modules name the layers.
        top_n: how many keys a query selects, for the regimes.
        sweep: the values of top_n for which precision, recall and F are recorded.
        thresholds: of the regimes.
        backend: of the diagnostics, as for `nearfar.attention_statistics`.
        on_unsupported: what to do with a call that cannot be read: "skip" it, or "raise" a ValueError from it.

    Raises:
        TypeError: model is no torch.nn.Module.
        ValueError: on_unsupported is neither "skip" nor "raise". With "raise", a call that cannot be read raises one with the
            layer and the reason.

    Warns:
        UserWarning: the watch ends without an error and has read no attention; the warning names modules that look like
            attention.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if on_unsupported not in ON_UNSUPPORTED:
        raise ValueError(f"on_unsupported must be one of {', '.join(ON_UNSUPPORTED)}, got {on_unsupported!r}")
    watched = Watch(top_n, sweep, thresholds, backend)
    watched.model = type(model).__name__
    session = Session(model, watched, on_unsupported)
    with running.opened(session):
        yield watched
    session.close()
