"""Head regimes, the watch over a model, and its pictures."""

import math

import pytest
import torch
import torch.nn.functional as F
from harness import randn
from samples import diagnostics as oracle
from torch import nn

import nearfar as nf
from nearfar.diagnostics import REGIMES, Thresholds, Watch, plot, watch

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
])  # fmt: skip
def test_bad_input_of_head_regimes(error, message, changes):
    q, k, v = three_heads()
    with pytest.raises(error, match=message):
        nf.head_regimes(**{"q": q, "k": k, "v": v, **changes})


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
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
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
    (sliding_mask(30, 29) & (torch.arange(30) > 3), "no causal or sliding window.*without padding"),
    (torch.zeros(30, 30, dtype=torch.bool), "no causal or sliding window"),
    (torch.linspace(-1, 0, 900).reshape(30, 30), "adds a bias"),
], ids=["padding", "nothing", "bias"])  # fmt: skip
def test_masks_that_are_none(mask, message):
    model, x = make_model(attn_mask=mask), randn(1, 30, 32, device="cpu")
    with pytest.raises(ValueError, match=message), watch(model):
        model(x)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    model(x)


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
        )  # fmt: skip
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


def test_padding_in_hugging_face_models_is_refused():
    model, tokens = hugging_face("full", "sdpa")
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    with pytest.raises(ValueError, match="without padding"), watch(model):
        model(tokens, attention_mask=mask)


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
    assert list(recall.get_xdata()) == [1, 2, 5]
    medians = torch.cat([means["geometry"] for means in watched.layers.values()], -1)[1].quantile(0.5, -1)
    assert list(recall.get_ydata()) == pytest.approx(medians.tolist())
    masses = [means["sink_mass"].tolist() for means in watched.layers.values()]
    assert sinks.images[0].get_array().tolist() == masses
    assert regimes.images[0].get_array().tolist() == [heads.tolist() for heads in watched.regimes().values()]
    assert "mixer" in " ".join(text.get_text() for text in regimes.get_legend().get_texts())


def test_plot_of_nothing():
    with pytest.raises(ValueError, match="^watched has seen no attention"):
        plot(Watch())
