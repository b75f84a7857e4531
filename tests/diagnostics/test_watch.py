"""Head regimes, the watch over a model, and its pictures."""

import copy
import io
import math
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from harness import randn
from samples import diagnostics as oracle
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as imported_attention
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack

import nearfar as nf
from nearfar.diagnostics import REGIMES, Thresholds, Watch, plot, read, running, watch
from nearfar.diagnostics.regimes import random_control
from nearfar.diagnostics.visible import Unreadable
from nearfar.ops.diagnostics import prepare_selection_geometry

RETRIEVER, MIXER, RESET = range(3)


# ------------------------------------------------------------------------------------------------------------- regimes


def test_head_regimes_against_dense_weights():
    q, k, v = (randn(2, heads, 60, 16, seed=seed, device="cpu") for seed, heads in ((1, 4), (2, 2), (3, 2)))
    heads = nf.head_regimes(q, k, v, top_n=5, causal=True)
    weights = oracle.dense_scores({"causal": True}, q.double(), k.double()).softmax(-1)
    values = oracle.to_query_heads(q, v).double()
    mass = weights.sum(-2) / 60
    key = mass.argmax(-1)
    sink = values.gather(2, key[..., None, None].expand(-1, -1, 1, 16))
    others = torch.ones_like(mass).scatter(-1, key[..., None], 0)
    expected = {
        "entropy": torch.special.entr(weights).sum(-1).mean(-1),
        "sink_mass": mass.amax(-1),
        "sink_value_norm": sink.norm(dim=-1)[..., 0],
        "value_norm": (values.norm(dim=-1) * others).sum(-1) / 59,
        "sink_similarity": (F.cosine_similarity(values, sink, dim=-1) * others).sum(-1) / 59,
    }
    assert torch.equal(heads.sink_key, key)
    for name, numbers in expected.items():
        torch.testing.assert_close(getattr(heads, name).double(), numbers, rtol=1e-5, atol=1e-6, msg=name)
    geometry = nf.selection_geometry(q, k, v, 5, causal=True)
    for name in ("precision", "recall", "f_score"):  # the first five queries see no more than they select
        torch.testing.assert_close(getattr(heads, name), getattr(geometry, name)[..., 5:].mean(-1))


def test_the_control_is_the_geometry_of_random_keys():
    """Seeded, of as many keys as top_n, and with all queries drawn the mean over all of them."""
    q, k, v = (randn(1, 2, 40, 16, seed=seed, device="cpu") for seed in (1, 2, 3))
    first = nf.head_regimes(q, k, v, top_n=3, control_queries=40)
    again, other = (nf.head_regimes(q, k, v, top_n=3, control_queries=40, seed=seed) for seed in (0, 1))
    assert torch.equal(first.control_f_score, again.control_f_score)
    assert not torch.equal(first.control_f_score, other.control_f_score)
    assert torch.equal(first.f_score, other.f_score)

    weights = oracle.dense_scores({}, q.double(), k.double()).softmax(-1)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(40, generator=generator)
    precision, recall = torch.zeros(1, 2, 40), torch.zeros(1, 2, 40)
    for row in rows.tolist():
        drawn = torch.randperm(40, generator=generator)[:3]
        y = weights[:, :, row, :, None] * v.double()
        distance = (y - y[:, :, drawn].sum(2, keepdim=True)).norm(dim=-1)
        inside = torch.zeros(40, dtype=torch.bool)
        inside[drawn] = True
        reach, nearest = distance[..., inside].amax(-1), distance[..., ~inside].amin(-1)
        precision[..., row] = 3 / (3 + (distance[..., ~inside] <= reach[..., None]).sum(-1))
        recall[..., row] = (distance[..., inside] < nearest[..., None]).sum(-1) / 3
    torch.testing.assert_close(first.control_precision, precision.mean(-1))
    torch.testing.assert_close(first.control_recall, recall.mean(-1))


def three_heads(length=40, width=64):
    """q, k, v of a head that looks up one key, one that averages all, and one that rests on a first key with no value."""
    q, k, v = (torch.zeros(1, 3, length, width) for _ in range(3))
    v[:] = randn(1, 3, length, width, seed=5, device="cpu")
    k[:, 0, :, :length] = q[:, 0, :, :length] = 12 * torch.eye(length).flip(0)
    k[:, 2, 0, 0], q[:, 2, :, 0], v[:, 2, 0] = 10.0, 10.0, 0.1 * v[:, 2, 0]
    return q, k, v


def test_regimes_of_heads_built_for_them():
    q, k, v = three_heads()
    heads = nf.head_regimes(q, k, v, top_n=1)
    assert heads.regime.tolist() == [[RETRIEVER, MIXER, RESET]]
    assert heads.sink_key[0, 2] == 0 and heads.sink_mass[0, 2] > 0.99
    assert heads.sink_value_norm[0, 2] < 0.2 * heads.value_norm[0, 2]
    assert math.isclose(heads.entropy[0, 1].item(), math.log(40), rel_tol=1e-5)
    lenient = nf.head_regimes(q, k, v, top_n=1, thresholds=Thresholds(support=40.0, separation=0.0))
    assert lenient.regime[0, 0] == RETRIEVER and lenient.regime[0, 2] == RESET
    strict = nf.head_regimes(q, k, v, top_n=1, thresholds=Thresholds(reset_norm=0.01, separation=1.01))
    assert strict.regime.tolist() == [[MIXER, MIXER, MIXER]]
    assert REGIMES == ("retriever", "mixer", "reset")


@pytest.mark.parametrize("error, message, changes", [
    (ValueError, "^top_n must be from 1 to 256", {"top_n": 0}),
    (ValueError, "^control_queries must be at least 1, got 0", {"control_queries": 0}),
    (TypeError, "^control_queries must be an int", {"control_queries": 2.0}),
    (ValueError, "^q must have at least one query", {"q": torch.zeros(1, 3, 0, 64)}),
    (ValueError, "^backend", {"backend": "cudnn"}),
])
def test_bad_input_of_head_regimes(error, message, changes):
    q, k, v = three_heads()
    with pytest.raises(error, match=message):
        nf.head_regimes(**{"q": q, "k": k, "v": v, **changes})


@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_a_head_with_nan_has_no_regime(where):
    parts = dict(zip("qkv", three_heads(), strict=True))
    parts[where][0, 1, 17] = math.nan
    heads = nf.head_regimes(**parts, top_n=1)
    assert heads.regime.tolist() == [[RETRIEVER, -1, RESET]]
    watched = Watch(top_n=1, sweep=(1, 2))
    watched.record("mine", **parts)
    assert [row["regime"] for row in watched.table()] == ["retriever", "undefined", "reset"]


def test_another_default_device_changes_no_control():
    q, k, v = three_heads()
    expected = random_control(prepare_selection_geometry(q, k, v, 1), 1, 64, 0)
    with torch.device("meta"):
        found = random_control(prepare_selection_geometry(q, k, v, 1), 1, 64, 0)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


# --------------------------------------------------------------------------------------------------------------- watch


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.project, self.options = nn.Linear(32, 96, bias=False), options

    def qkv(self, x):
        return self.project(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)

    def forward(self, x):
        return x + F.scaled_dot_product_attention(*self.qkv(x), **self.options).transpose(1, 2).flatten(2)


def make_model(**options):
    torch.manual_seed(0)
    return nn.Sequential(Attention(**options), nn.LayerNorm(32), Attention(**options))


def sliding_mask(length, back, ahead=0, dtype=torch.bool):
    distance = torch.arange(length) - torch.arange(length)[:, None]
    mask = (distance >= -back) & (distance <= ahead)
    return mask if dtype == torch.bool else torch.zeros(length, length, dtype=dtype).masked_fill(~mask, float("-inf"))


def test_watch_of_scaled_dot_product_attention():
    model, x = make_model(is_causal=True), randn(2, 30, 32, device="cpu")
    expected = model(x)
    with watch(model, top_n=2, sweep=(1, 3)) as watched:
        assert torch.equal(model(x), expected)
        F.scaled_dot_product_attention(*torch.zeros(3, 1, 1, 4, 16))  # by none of its modules
    assert list(watched.layers) == ["0", "2"]
    q, k, v = model[0].qkv(x)
    heads = nf.head_regimes(q, k, v, top_n=2, causal=True)
    for name in ("entropy", "sink_mass", "precision", "control_f_score"):
        torch.testing.assert_close(watched.layers["0"][name], getattr(heads, name).double().mean(0))
    curve = nf.selection_geometry(q, k, v, 3, causal=True)
    torch.testing.assert_close(watched.layers["0"]["geometry"][1, 1], curve.recall[..., 3:].double().mean((0, 2)))
    assert torch.equal(watched.layers["0"]["geometry"][:, 0], torch.ones(3, 2, dtype=torch.float64))

    model(x)  # the watch is over
    assert_nothing_left()
    torch.testing.assert_close(watched.layers["0"]["entropy"], heads.entropy.double().mean(0))
    rows = watched.table()
    assert [(row["layer"], row["head"]) for row in rows] == [("0", 0), ("0", 1), ("2", 0), ("2", 1)]
    assert rows[0]["effective_support"] == pytest.approx(math.exp(rows[0]["entropy"]))
    assert str(watched).count("\n") == 4 and rows[0]["regime"] in str(watched)


def test_means_over_calls_weigh_by_queries():
    model = make_model(is_causal=True)
    texts = randn(1, 30, 32, seed=1, device="cpu"), randn(3, 12, 32, seed=2, device="cpu")
    with watch(model) as watched:
        for text in texts:
            model(text)
    single = []
    for text in texts:
        with watch(model) as one:
            model(text)
        single.append(one.layers["2"]["entropy"])
    torch.testing.assert_close(watched.layers["2"]["entropy"], (30 * single[0] + 36 * single[1]) / 66)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=["bool", "added"])
@pytest.mark.parametrize("back, ahead", [(29, 0), (5, 0), (4, 2), (29, 29)])
def test_masks_that_are_windows(back, ahead, dtype):
    model, x = make_model(attn_mask=sliding_mask(30, back, ahead, dtype)), randn(1, 30, 32, device="cpu")
    with watch(model) as watched:
        model(x)
    q, k, _ = model[0].qkv(x)
    expected = nf.attention_statistics(q, k, locality=nf.SlidingWindow(back, ahead)).entropy.double().mean((0, 2))
    torch.testing.assert_close(watched.layers["0"]["entropy"], expected)


@pytest.mark.parametrize("mask, message", [
    (sliding_mask(30, 29) & (torch.arange(30) < 25), "no causal or sliding window.*without padding"),
    (torch.arange(30).expand(30, 30) < 25, "no causal or sliding window.*without padding"),
    (sliding_mask(30, 29) & (torch.arange(30) != 12), "hides keys between"),
    (sliding_mask(30, 5) | (torch.arange(30)[:, None] > 20) & sliding_mask(30, 9), "no causal or sliding window"),
    (torch.zeros(30, 30, dtype=torch.bool), "hides every key"),
    (torch.linspace(-1, 0, 900).reshape(30, 30), "adds a bias"),
    (torch.stack((sliding_mask(30, 29), sliding_mask(30, 5))), "differs between heads"),
], ids=["right padding", "padding without causality", "gap", "two windows", "nothing", "bias", "heads"])
def test_masks_that_cannot_be_read(mask, message):
    model, x = make_model(attn_mask=mask), randn(1, 30, 32, device="cpu")
    expected = model(x)
    with pytest.raises(ValueError, match=f"watch cannot read the attention of 0: .*{message}"):
        with watch(model, on_unsupported="raise"):
            model(x)
    assert_nothing_left()
    with pytest.warns(UserWarning, match=f"diagnostics.watch saw no attention in Sequential\n  0 .Attention.: .*{message}"):
        with watch(model) as watched:
            assert torch.equal(model(x), expected)
    assert not watched.layers and list(watched.skipped) == ["0", "2"]
    assert "skipped 2: attention_mask" in str(watched)


def assert_nothing_left():
    assert not running.sessions and not running.installed and not running.busy and not torch_module._has_any_global_hook()
    assert not _get_current_function_mode_stack()


def dense_means(q, k, mask, scale=None, texts=None):
    """{entropy, sink_mass} of dense float64 weights over texts, (batch element, queries); queries without keys are left out."""
    q, k = q.double(), k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    mask = torch.as_tensor(mask).expand(len(q), *scores.shape[-2:])
    entropy, mass, total = 0, 0, 0
    for b, rows in texts or [(b, range(q.shape[2])) for b in range(len(q))]:
        rows = [row for row in rows if mask[b, row].any()]
        weights = scores[b].masked_fill(~mask[b], -torch.inf)[:, rows].softmax(-1)
        entropy = entropy + torch.special.entr(weights).sum((-1, -2))
        mass, total = mass + weights.sum(-2).amax(-1), total + len(rows)
    return {"entropy": entropy / total, "sink_mass": mass / total}


def assert_means(means, expected, **tolerances):
    for name, numbers in expected.items():
        torch.testing.assert_close(means[name], numbers, msg=name, **{"rtol": 1e-5, "atol": 1e-6} | tolerances)


class Calls(nn.Module):
    """Attention of what it is called with."""

    def forward(self, *arguments, **options):
        return imported_attention(*arguments, **options)


TEXTS = torch.block_diag(torch.ones(5, 5), torch.ones(3, 3), torch.ones(4, 4)).bool()
PADDED = torch.stack([torch.arange(12) >= 5, torch.arange(12) >= 0])
READABLE = {
    "causal": (12, 12, sliding_mask(12, 11), {}),
    "a token does not see itself": (12, 12, sliding_mask(12, 11, -1), {}),
    "two before": (12, 12, sliding_mask(12, 11, -2), {}),
    "later tokens": (12, 12, sliding_mask(12, -1, 11), {}),
    "own key": (12, 12, sliding_mask(12, 0), {}),
    "a window that lies behind": (12, 12, sliding_mask(12, 5, -2), {}),
    "a step, free slots": (1, 12, torch.arange(12)[None] < 9, {}),
    "a prompt, free slots": (7, 12, sliding_mask(12, 11)[:7], {}),
    "a chunk, free slots": (4, 12, sliding_mask(12, 3)[5:9], {}),
    "texts": (12, 12, TEXTS & sliding_mask(12, 11), {"texts": [range(5), range(5, 8), range(8, 12)]}),
    "texts that see all of theirs": (12, 12, TEXTS, {"texts": [range(5), range(5, 8), range(8, 12)]}),
    "padding on the left": (12, 12, PADDED[:, None, None] & sliding_mask(12, 11), {}),
    "padding on the left, a window": (12, 12, PADDED[:, None, None] & sliding_mask(12, 3), {}),
    "padding without queries": (12, 12, PADDED[:, None, None] & PADDED[:, None, :, None], {}),
    "other tokens": (5, 12, torch.arange(12).expand(5, 12) < 8, {}),
}


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("case", READABLE)
def test_masks_against_dense_weights(case, added):
    num_queries, num_keys, mask, options = READABLE[case]
    k, v = (randn(2, 2, num_keys, 16, seed=seed, device="cpu") for seed in (1, 2))
    q = 3 * randn(2, 4, num_queries, 16, device="cpu")
    given = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf) if added else mask
    with watch(model := Calls(), on_unsupported="raise") as watched:
        model(q, k, v, given, enable_gqa=True, scale=0.3)
    texts = [(b, rows) for b in range(2) for rows in options["texts"]] if options else None
    assert_means(watched.layers["model"], dense_means(q, k, mask.view(-1, *mask.shape[-2:]), 0.3, texts))


@pytest.mark.parametrize("shape, heads", [((9, 16), 1), ((2, 9, 16), 1), ((2, 3, 4, 9, 16), 4)])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_of_any_rank(shape, heads, causal):
    q, k, v = (randn(*shape, seed=seed, device="cpu") for seed in range(3))
    expected = imported_attention(q, k, v, is_causal=causal)
    with watch(model := Calls(), on_unsupported="raise") as watched:
        assert torch.equal(model(q, k, v, is_causal=causal), expected)
        model(q, k, v, sliding_mask(9, 8, 0 if causal else 8))
    mask = sliding_mask(9, 8, 0 if causal else 8)
    assert_means(watched.layers["model"], dense_means(q.reshape(-1, heads, 9, 16), k.reshape(-1, heads, 9, 16), mask))


def test_is_causal_counts_from_the_first_key():
    q, k, v = (randn(1, 2, n, 16, seed=i, device="cpu") for i, n in enumerate((5, 8, 8)))
    with watch(model := Calls()) as watched:
        model(q, k, v, is_causal=True)
        model(k, q, q, is_causal=True)
    assert_means(watched.layers["model"], dense_means(q, k, sliding_mask(8, 7)[:5]))
    assert "8 queries and 5 keys" in watched.skipped["model"]


def test_empty_calls_change_nothing():
    x = randn(3, 2, 7, 16, device="cpu")
    with watch(model := Calls()) as alone:
        model(x, x, x)
    with watch(model) as watched:
        model(x[:, :, :0], x[:, :, :0], x[:, :, :0])
        model(x[:, :, :0], x, x, torch.ones(0, 7, dtype=torch.bool))
        model(x, x, x)
        model(x[:0], x[:0], x[:0])
    assert not watched.skipped and torch.equal(watched.layers["model"]["entropy"], alone.layers["model"]["entropy"])


@pytest.mark.parametrize("heads", [1, 2])
def test_calls_with_other_heads_are_layers_of_their_own(heads):
    x = randn(1, 4, 9, 16, device="cpu")
    few = 3 * x[:, :heads]
    with watch(model := Calls()) as watched:
        for _ in range(2):
            model(x, x, x)
            model(few, few, few)
    assert list(watched.layers) == ["model", "model#2"]
    for means, part in zip(watched.layers.values(), (x, few), strict=True):
        assert_means(means, dense_means(part, part, torch.ones(9, 9, dtype=torch.bool)))


# What runs where: threads, copies, hooks, other watches


def test_threads_have_running_modules_of_their_own():
    """Two replicas as nn.DataParallel makes them, whose modules run at the same time."""
    model, x = make_model(is_causal=True).eval(), randn(4, 12, 32, device="cpu")
    with watch(model) as alone, torch.no_grad():
        model(x)
    meet = threading.Barrier(2, timeout=60)
    model[1].register_forward_pre_hook(lambda *_: meet.wait() * 0 or None)
    errors = []

    def replica(module):
        copied = module._replicate_for_data_parallel()
        copied._parameters = module._parameters
        copied._modules = {name: replica(child) for name, child in module._modules.items()}
        return copied

    def work(module, part):
        try:
            with torch.no_grad():
                module(part)
            assert not _get_current_function_mode_stack()
        except BaseException as error:  # noqa: BLE001  (for the main thread)
            errors.append(error)

    threads = [threading.Thread(target=work, args=(replica(model), part)) for part in x.chunk(2)]
    with watch(model) as watched:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    for name in ("0", "2"):
        assert_means(watched.layers[name], {"entropy": alone.layers[name]["entropy"]})
    assert_nothing_left()


def test_a_thread_that_ends_after_the_watch():
    begun, end, left = threading.Event(), threading.Event(), []

    class Slow(Calls):
        def forward(self, x):
            begun.set()
            end.wait(60)
            return super().forward(x, x, x)

    def work():
        model(randn(1, 2, 7, 16, device="cpu"))
        left.append(list(_get_current_function_mode_stack()))

    model, thread = Slow(), threading.Thread(target=work)
    with pytest.warns(UserWarning, match="saw no attention"), watch(model):
        thread.start()
        assert begun.wait(60)
    end.set()
    thread.join()
    assert left == [[]]
    assert_nothing_left()


def test_copies_and_files_made_inside_a_watch_know_nothing_of_it():
    model, x = make_model(), randn(1, 9, 32, device="cpu")
    with watch(model) as watched:
        copied = copy.deepcopy(model)
        copied(x)
        torch.save(model, io.BytesIO())
        assert not watched.layers
        model(x)
    assert len(watched.layers) == 2 and copy.deepcopy(watched).layers.keys() == watched.layers.keys()
    for module in (*model.modules(), *copied.modules()):
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_watches_may_end_in_any_order_and_lie_inside_each_other():
    model, x = make_model(), randn(1, 9, 32, device="cpu")
    attend = F.scaled_dot_product_attention
    first, second, third = watch(model), watch(model), watch(model[2])
    outer, inner, part = first.__enter__(), second.__enter__(), third.__enter__()
    model(x)
    first.__exit__(None, None, None)
    model(2 * x)
    second.__exit__(None, None, None)
    third.__exit__(None, None, None)
    assert_nothing_left()
    assert F.scaled_dot_product_attention is attend
    assert outer._weights == {"0": 9, "2": 9} and inner._weights == {"0": 18, "2": 18} and part._weights == {"model": 18}
    torch.testing.assert_close(inner.layers["2"]["entropy"], part.layers["model"]["entropy"])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_errors_of_the_model_leave_nothing_behind(error):
    model, x = make_model(), randn(1, 9, 32, device="cpu")

    def fail(*_):
        raise error("mine")

    handle = model[2].register_forward_pre_hook(fail)
    with pytest.raises(error, match="mine"), watch(model) as watched:
        model(x)
    assert list(watched.layers) == ["0"]
    assert_nothing_left()
    handle.remove()


def test_an_error_that_the_model_catches_leaves_the_names_right():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make_model()

        def forward(self, x):
            try:
                self.inner(x)
            except RuntimeError:
                return F.scaled_dot_product_attention(x, x, x)

    def fail(*_):
        raise RuntimeError

    model, x = Outer(), randn(1, 9, 32, device="cpu")
    model.inner[2].register_forward_pre_hook(fail)
    with watch(model) as watched:
        model(x)
    assert list(watched.layers) == ["inner.0", "model"]


def test_checkpoints_inference_mode_and_autocast():
    model, x = make_model(is_causal=True), randn(1, 9, 32, device="cpu")
    with watch(model) as expected:
        model(x)
    with watch(model) as watched:
        torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).sum().backward()
    assert watched._weights == expected._weights
    with watch(model) as watched, torch.inference_mode():
        model(x)
    assert_means(watched.layers["2"], {"entropy": expected.layers["2"]["entropy"]})
    with watch(model, on_unsupported="raise") as watched, torch.autocast("cpu"):
        model(x)
    assert_means(watched.layers["2"], {"entropy": expected.layers["2"]["entropy"]}, rtol=0.02)


def test_compiled_models_run_as_ever_and_are_named():
    model, x = make_model(is_causal=True), randn(1, 9, 32, device="cpu")
    expected = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch: that global hooks see a compiled module twice
        with watch(whole := torch.compile(model, backend="aot_eager", fullgraph=True)) as watched:
            torch.testing.assert_close(whole(x), expected)
    assert not watched.layers and "torch.compile" in watched.skipped["model"]
    model[2].compile(backend="aot_eager", fullgraph=True)
    with watch(model) as watched:
        torch.testing.assert_close(model(x), expected)
    assert list(watched.layers) == ["0"] and "torch.compile" in watched.skipped["2"]
    assert_nothing_left()


def test_whatever_fails_is_skipped(monkeypatch):
    model, x = make_model(), randn(1, 9, 32, device="cpu")
    monkeypatch.setattr(read, "everything", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="division by zero"), watch(model):
        model(x)
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="no module of it ran"), watch(model):
        pass
    with pytest.raises(ValueError, match="^on_unsupported must be one of skip, raise, got 'warn'"):
        watch(model, on_unsupported="warn").__enter__()


# torch.nn.MultiheadAttention and encoder layers


@pytest.mark.parametrize("options", [
    {}, {"batch_first": True}, {"batch_first": True, "kdim": 24, "vdim": 20}, {"bias": False},
], ids=str)
@pytest.mark.parametrize("mask", [None, "causal", "each head", "padding"])
def test_multihead_attention_against_its_weights(options, mask):
    torch.manual_seed(0)
    model = nn.MultiheadAttention(32, 4, **options)
    itself = "kdim" not in options
    x = randn(2, 10, 32, seed=1, device="cpu")
    k, v = (x, x) if itself else (randn(2, 10, size, seed=size, device="cpu") for size in (24, 20))
    given = {"causal": {"attn_mask": ~sliding_mask(10, 9)}, "padding": {"key_padding_mask": torch.arange(10).expand(2, 10) < 4},
             "each head": {"attn_mask": ~sliding_mask(10, 9).expand(8, 10, 10)}}.get(mask, {})
    if not options.get("batch_first"):
        x = k = v = x.transpose(0, 1)
    if mask == "padding" and not itself:  # whose padding it is cannot be told
        with pytest.raises(ValueError, match="without padding"), watch(model, on_unsupported="raise"):
            model(x, k, v, **given)
        return
    with watch(model) as watched:
        _, weights = model(x, k, v, average_attn_weights=False, **given)
    weights = weights.detach().double()[:, :, 4 if mask == "padding" else 0 :]
    expected = {"entropy": torch.special.entr(weights).sum(-1).mean((0, 2)), "sink_mass": weights.mean(-2).amax(-1).mean(0)}
    assert_means(watched.layers["model"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_encoders_take_their_fast_path_and_are_seen(norm_first, padded):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch: norm_first has no nested tensors
        model, x = nn.TransformerEncoder(layer, 2).eval(), randn(2, 9, 32, device="cpu")
    padding = {"src_key_padding_mask": torch.arange(9) >= torch.tensor([[9], [6]])} if padded else {}
    found = []
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            expected = model(x, **padding)
            with watch(model, on_unsupported="raise") as watched:
                assert torch.equal(model(x, **padding), expected)
        found.append(watched.layers)
    assert list(found[0]) == list(found[1]) == ["layers.0.self_attn", "layers.1.self_attn"]
    for name, means in found[0].items():
        for quantity in ("entropy", "sink_mass", "f_score"):
            torch.testing.assert_close(found[1][name][quantity], means[quantity], rtol=1e-4, atol=1e-5)


def test_record_by_hand():
    q, k, v = three_heads()
    watched = Watch(top_n=1)
    watched.record("mine", q, k, v, sigma=2.0, locality=nf.SlidingWindow(9))
    expected = nf.attention_statistics(q, k, sigma=2.0, locality=nf.SlidingWindow(9)).entropy[0].double().mean(-1)
    torch.testing.assert_close(watched.layers["mine"]["entropy"], expected)


def test_watch_takes_a_module():
    with pytest.raises(TypeError, match="^model must be a torch.nn.Module, got function"), watch(lambda x: x):
        pass


# -------------------------------------------------------------------------------------------------- Hugging Face models


def hugging_face(kind, implementation):
    transformers = pytest.importorskip("transformers", minversion="5.0", reason="needs transformers 5 to be installed")
    torch.manual_seed(0)
    size = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=50)
    if kind == "bert":
        model = transformers.BertModel(transformers.BertConfig(**size, attn_implementation=implementation))
    else:
        config = transformers.MistralConfig(
            **size, num_key_value_heads=2, sliding_window=None if kind == "full" else 6, attn_implementation=implementation,
            initializer_range=0.3,
        )
        model = transformers.MistralModel(config)
    return model.eval(), torch.randint(50, (2, 20), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["full", "sliding", "bert"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_watch_of_hugging_face_models(kind, implementation):
    """Entropies and masses are those of the weights that the eager model returns; the model's output does not change."""
    model, tokens = hugging_face(kind, implementation)
    expected = model(tokens).last_hidden_state
    with watch(model) as watched:
        assert torch.equal(model(tokens).last_hidden_state, expected)
    assert len(watched.layers) == 2 and all("layer" in name for name in watched.layers)
    eager, _ = hugging_face(kind, "eager")
    for means, weights in zip(watched.layers.values(), eager(tokens, output_attentions=True).attentions, strict=True):
        entropy = torch.special.entr(weights.double()).sum(-1).mean((0, 2))
        torch.testing.assert_close(means["entropy"], entropy, rtol=1e-4, atol=1e-5)
        mass = weights.double().mean(-2).amax(-1).mean(0)
        torch.testing.assert_close(means["sink_mass"], mass, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_hugging_face_models_with_padding(implementation):
    """On the left each text is as if alone; on the right it is skipped, since what sees a text's keys need not be of it."""
    model, tokens = hugging_face("full", implementation)
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    with watch(model, on_unsupported="raise") as watched:
        model(tokens, attention_mask=mask)
    with watch(model) as alone:
        model(tokens[:1])
        model(tokens[1:, 5:])
    for name, means in watched.layers.items():
        assert_means(means, {quantity: alone.layers[name][quantity] for quantity in ("entropy", "sink_mass")}, rtol=1e-4)
    with pytest.raises(ValueError, match="layers.0.self_attn: .*without padding"), watch(model, on_unsupported="raise"):
        model(tokens, attention_mask=mask.flip(1))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_hugging_face_models_with_caches(implementation):
    """A prompt and two single tokens, with keys that grow or were allocated before: the weights of the whole text."""
    transformers = pytest.importorskip("transformers", minversion="5.0", reason="needs transformers 5 to be installed")
    model, tokens = hugging_face("full", implementation)
    with watch(model) as whole:
        model(tokens)
    for cache in (transformers.DynamicCache(), transformers.StaticCache(config=model.config, max_cache_len=27)):
        with watch(model, on_unsupported="raise") as watched:
            for part in tokens.split([18, 1, 1], 1):
                model(part, past_key_values=cache, use_cache=True)
        for name, means in whole.layers.items():
            assert_means(watched.layers[name], {"entropy": means["entropy"]}, rtol=1e-4)


def test_functions_of_transformers_that_are_not_known():
    """They are read by the scaled_dot_product_attention that they call, and skipped where they call none."""
    transformers = pytest.importorskip("transformers", minversion="5.0", reason="needs transformers 5 to be installed")

    def own(module, query, key, value, attention_mask, scaling=None, **_):
        key, value = (x.repeat_interleave(2, 1) for x in (key, value))
        if module.layer_idx:
            return imported_attention(query[:, :, :7], key[:, :, :7], value[:, :, :7], is_causal=True).transpose(1, 2), None
        return (query @ key.mT).softmax(-1).matmul(value).transpose(1, 2)[:, :7], None

    transformers.AttentionInterface.register("own", own)
    model, _ = hugging_face("full", "own")
    attention = [layer.self_attn for layer in model.layers]
    x, positions = randn(1, 7, 32, device="cpu"), (torch.ones(1, 7, 8), torch.zeros(1, 7, 8))
    with watch(model) as watched:
        for module in attention:
            module(x, positions, None)
    assert list(watched.layers) == ["layers.1.self_attn"]
    assert "calls no attention" in watched.skipped["layers.0.self_attn"]


def test_eager_functions_that_do_more_than_their_arguments_say():
    q, k, v = (randn(2, h, 9, 16, seed=i, device="cpu") for i, h in enumerate((4, 2, 2)))
    output = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    mask = sliding_mask(9, 8, dtype=torch.float32)[None, None]
    assert read.transformers_call("eager", (output, None), nn.Identity(), q, k, v, mask)
    for wrong in (0.98 * output, output.flip(1)):
        with pytest.raises(Unreadable, match="not softmax attention"):
            read.transformers_call("eager", (wrong, None), nn.Identity(), q, k, v, mask)
    with pytest.raises(Unreadable, match="softcap"):
        read.transformers_call("sdpa", (output, None), nn.Identity(), q, k, v, mask, softcap=30.0)


def parts_as_mask(parts, batch, num_queries, num_keys):
    """The mask that parts make."""
    mask = torch.zeros(batch, num_queries, num_keys, dtype=torch.bool)
    for part in parts:
        queries, keys = range(num_queries)[part.queries], range(num_keys)[part.keys]
        for row, query in enumerate(queries):
            at = len(keys) - len(queries) + row
            window = part.locality or nf.SlidingWindow(-1, -1)
            for column, key in enumerate(keys):
                behind, ahead = at - column, column - at
                mask[part.batch, query, key] = (window.left < 0 or behind <= window.left) and (
                    window.right < 0 or ahead <= window.right)
    return mask


def test_flash_attention_is_read_as_transformers_calls_it():
    q = torch.zeros(1, 2, 12, 16)
    module = nn.Identity()
    causal = sliding_mask(12, 11)

    def mask_of(x=q, **options):
        mask = options.pop("mask", None)
        [call] = read.transformers_call("flash", None, module, x, x, x, mask, **options)
        return parts_as_mask(call.parts, len(x), 12, 12)

    assert torch.equal(mask_of()[0], causal)
    assert mask_of(is_causal=False).all()
    assert torch.equal(mask_of(sliding_window=4)[0], sliding_mask(12, 3))
    assert torch.equal(mask_of(sliding_window=4, is_causal=False)[0], sliding_mask(12, 3, 3))
    assert torch.equal(mask_of(sliding_window=12)[0], causal)
    ends = torch.tensor([0, 5, 8, 12])
    packed = dict(cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=5, max_length_k=5)
    assert torch.equal(mask_of(**packed)[0], TEXTS & causal)
    positions = torch.cat([torch.arange(n) for n in (5, 3, 4)])[None]
    assert torch.equal(mask_of(position_ids=positions)[0], TEXTS & causal)
    assert torch.equal(mask_of(position_ids=torch.arange(12)[None])[0], causal)
    padding = torch.stack([torch.arange(12) < 7, torch.arange(12) >= 2])
    got = mask_of(q.expand(2, -1, -1, -1), mask=padding)
    assert torch.equal(got, padding[:, None] & padding[:, :, None] & causal)
    for wrong in ({"position_ids": torch.tensor([[0, 1, 5, *range(6, 15)]])}, {"block_table": ends}, {"s_aux": ends}):
        with pytest.raises(Unreadable):
            mask_of(**wrong)


def test_block_masks_of_flex_attention():
    from torch.nn.attention.flex_attention import create_block_mask

    def texts(b, h, query, key):
        return (query >= key) & ((query < 130) == (key < 130))

    q = torch.zeros(1, 2, 300, 16)
    block_mask = create_block_mask(texts, 1, None, 300, 300, device="cpu", BLOCK_SIZE=64)
    [call] = read.transformers_call("flex", None, nn.Identity(), q, q, q, block_mask)
    spans = [(part.queries, part.keys, part.locality.right) for part in call.parts]
    assert spans == [(slice(0, 130), slice(0, 130), 0), (slice(130, 300), slice(130, 300), 0)]


def test_attention_that_is_not_seen_is_named():
    transformers = pytest.importorskip("transformers", minversion="5.0", reason="needs transformers 5 to be installed")
    model = transformers.BloomModel(transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4)).eval()
    with pytest.warns(UserWarning, match=r"watch saw no attention in BloomModel\n  h.0.self_attention .BloomAttention."):
        with watch(model):
            model(torch.randint(1, 64, (1, 12)))


# -------------------------------------------------------------------------------------------------------------- plot


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    model = make_model(is_causal=True)
    with watch(model, top_n=2, sweep=(1, 2, 5)) as watched:
        model(randn(1, 30, 32, device="cpu"))
    figure = plot(watched, tmp_path / "heads.png")
    assert (tmp_path / "heads.png").stat().st_size > 10_000
    entropy, geometry, sinks, regimes = figure.axes[:4]
    drawn = sorted(number for line in entropy.lines for number in line.get_ydata() if line.get_linestyle() == "None")
    assert drawn == pytest.approx(sorted(row["entropy"] for row in watched.table()))
    recall = next(line for line in geometry.lines if line.get_label() == "recall")
    assert list(recall.get_xdata()) == [2, 5]  # with one selected key everything is 1 by definition
    medians = torch.cat([means["geometry"] for means in watched.layers.values()], -1)[1, 1:].quantile(0.5, -1)
    assert list(recall.get_ydata()) == pytest.approx(medians.tolist())
    masses = [means["sink_mass"].tolist() for means in watched.layers.values()]
    assert sinks.images[0].get_array().tolist() == masses
    assert regimes.images[0].get_array().tolist() == [heads.tolist() for heads in watched.regimes().values()]
    heads = len(watched.table())
    assert figure.get_suptitle() == f"{type(model).__name__}: {len(watched.layers)} layers, {heads} heads, 30 queries a head"
    assert "mixer" in " ".join(text.get_text() for text in regimes.get_legend().get_texts())


def test_plot_of_nothing():
    with pytest.raises(ValueError, match="^watched has seen no attention"):
        plot(Watch())
