"""Watches over what calls nearfar's operators: their own weights, layers, transformers, trainings; regimes of such weights."""

import pytest
import torch
from harness import randn
from samples.diagnostics import dense_scores
from torch import nn

import nearfar as nf
from nearfar.diagnostics import Monitor, bootstrap, plot_history, running, watch
from nearfar.diagnostics.regimes import keys_kept, random_control
from nearfar.ops.diagnostics import prepare_selection_geometry
from nearfar.runtime.observed import observers


class Attend(nn.Module):
    """Attention by a function of four heads of 8 on two key heads, and numbers for each query."""

    def __init__(self, function, **options):
        super().__init__()
        self.project, self.function, self.options = nn.Linear(32, 64, bias=False), function, options

    def tensors(self, x):
        q, k, v = self.project(x).unflatten(-1, (-1, 8)).transpose(1, 2).split([4, 2, 2], 1)
        return {"q": q, "k": k, "v": v}

    def forward(self, x):
        return x + self.function(**self.tensors(x), **self.options).transpose(1, 2).flatten(2)


def per_query(seed):
    return 0.5 + 0.1 * randn(2, 4, 20, seed=seed, device="cpu")


SINK = torch.tensor([0.0, 1.0, -1.0, 2.0])
CALLS = {
    "softmax": (nf.softmax_attention, dict(causal=True, sink=SINK, scale=0.5), dict(causal=True, sink=SINK, scale=0.5)),
    "window": (nf.softmax_attention, dict(window_size=(3, 1)), dict(locality=nf.SlidingWindow(3, 1))),
    "affine": (nf.affine_attention, dict(alpha=per_query(1), beta=per_query(2) / 20, causal=True),
               dict(alpha=per_query(1), beta=per_query(2) / 20, causal=True)),
    "krause": (nf.krause_attention, dict(sigma=2.0, locality=nf.SlidingWindow(9), top_k=5),
               dict(sigma=2.0, locality=nf.SlidingWindow(9), top_k=5)),
    "grid": (nf.krause_attention, dict(sigma=2.0, locality=nf.GridNeighborhood((4, 5), 1), top_k=3),
             dict(sigma=2.0, locality=nf.GridNeighborhood((4, 5), 1), top_k=3)),
}


@pytest.mark.parametrize("case", CALLS)
def test_the_weights_of_operators_are_seen(case):
    function, options, same = CALLS[case]
    torch.manual_seed(0)
    model, x = nn.Sequential(Attend(function, **options)), randn(2, 20, 32, device="cpu")
    expected = model(x)
    with watch(model, top_n=2, sweep=(2,), on_unsupported="raise") as watched:
        assert torch.equal(model(x), expected)
        function(**model[0].tensors(x), **options)  # by none of its modules
    assert not observers and not running.installed
    tensors = model[0].tensors(x)
    found = nf.attention_statistics(tensors["q"], tensors["k"], **same)
    [(layer, means)] = watched.layers.items()
    assert layer == "0"
    for name in ("entropy", "max_weight", "mean_logit", "weight_sum"):
        torch.testing.assert_close(means[name], getattr(found, name).double().mean((0, 2)), msg=name)
    torch.testing.assert_close(means["first_mass"], found.first_mass().double().mean(0))
    if "top_k" in options:
        assert (means["entropy"].exp() <= options["top_k"]).all()


def test_texts_of_a_packed_call_are_read_one_by_one():
    ends = torch.tensor([0, 7, 7, 20], dtype=torch.int32)
    x, options = randn(1, 20, 32, device="cpu"), dict(sigma=2.0, locality=nf.SlidingWindow(9), top_k=4)
    packed = Attend(nf.krause_attention, **options, cu_seqlens=ends)
    with watch(packed, sweep=(2,), on_unsupported="raise") as watched:
        packed(x)
    alone = Attend(nf.krause_attention, **options)
    alone.load_state_dict(packed.state_dict())
    with watch(alone, sweep=(2,)) as separate:
        for text in x.split([7, 13], 1):
            alone(text)
    for name, numbers in separate.layers["model"].items():
        torch.testing.assert_close(watched.layers["model"][name], numbers, msg=name, rtol=1e-5, atol=1e-6)


def test_queries_that_see_no_key_are_left_out():
    class Longer(Attend):
        def tensors(self, x):
            q, k, v = super().tensors(x).values()
            return {"q": q, "k": k[:, :, 5:], "v": v[:, :, 5:]}

    model, x = Longer(nf.softmax_attention, causal=True), randn(1, 20, 32, device="cpu")
    with watch(model, sweep=(2,), on_unsupported="raise") as watched:
        model(x)
    tensors = model.tensors(x)
    found = nf.attention_statistics(tensors["q"][:, :, 5:], tensors["k"], causal=True)
    torch.testing.assert_close(watched.layers["model"]["entropy"], found.entropy[0].double().mean(-1))


def test_calls_that_statistics_do_not_know_are_skipped():
    window = nf.ShiftedWindow((4, 5), (2, 5))
    bias = torch.zeros(4, window.bias_size)
    model = Attend(nf.krause_attention, sigma=2.0, locality=window, bias=bias)
    with pytest.raises(ValueError, match="model: krause_attention with bias"), watch(model, on_unsupported="raise"):
        model(randn(1, 20, 32, device="cpu"))


@pytest.mark.parametrize("kind", ["KrauseAttention", "AffineScaledAttention"])
def test_layers_are_seen(kind):
    model = nn.Sequential(getattr(nf.nn, kind)(32, 4), nn.LayerNorm(32), getattr(nf.nn, kind)(32, 4))
    with watch(model, sweep=(2,), on_unsupported="raise") as watched:
        model(randn(2, 12, 32, device="cpu"))
    assert list(watched.layers) == ["0", "2"] and not watched.skipped
    assert all(means["entropy"].isfinite().all() and len(means["entropy"]) == 4 for means in watched.layers.values())


@pytest.mark.parametrize("kind", ["softmax", "krause"])
@torch.no_grad()
def test_registered_attention_of_transformers_is_seen(kind):
    transformers = pytest.importorskip("transformers", minversion="5.0", reason="needs transformers 5 to be installed")
    nf.integrations.transformers.register(sigma=2.0, top_k=3)
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=50,
        sliding_window=None, initializer_range=0.3, attn_implementation=f"nearfar_{kind}",
    )
    model, tokens = transformers.MistralModel(config).eval(), torch.randint(50, (2, 20))
    with watch(model, sweep=(2,), on_unsupported="raise") as watched:
        model(tokens)
    assert list(watched.layers) == ["layers.0.self_attn", "layers.1.self_attn"]
    if kind == "krause":
        assert all((means["entropy"].exp() <= 3).all() for means in watched.layers.values())
        return
    model.set_attn_implementation("eager")
    with watch(model, sweep=(2,)) as eager:
        model(tokens)
    for layer, means in eager.layers.items():
        torch.testing.assert_close(watched.layers[layer]["entropy"], means["entropy"], rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- regimes


def test_regimes_of_selected_keys():
    """With as many keys selected as kept all are; a top_k that keeps all keys changes nothing."""
    q, k, v = (randn(1, heads, 40, 16, seed=heads, device="cpu") for heads in (4, 2, 2))
    options = dict(sigma=3.0, locality=nf.SlidingWindow(12))
    every = nf.head_regimes(q, k, v, top_n=4, **options, top_k=4)
    assert all((getattr(every, name) == 1).all() for name in ("precision", "recall", "control_precision", "control_recall"))
    whole, same = (nf.head_regimes(q, k, v, top_n=4, **options, top_k=top_k) for top_k in (None, 13))
    for name, a, b in zip(whole._fields, whole, same, strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_the_control_draws_of_the_keys_that_are_kept():
    q, k, v = (randn(1, 2, 30, 16, seed=seed, device="cpu") for seed in (1, 2, 3))
    call = prepare_selection_geometry(q, k, v, 2, locality=nf.GridNeighborhood((5, 6), 1), top_k=4)
    assert keys_kept(call).tolist() == 30 * [4]
    precision, recall, _ = random_control(call, 2, 30, 0)

    position = torch.arange(30)
    scores = dense_scores({}, q, k).masked_fill(~call.locality.visible(position[:, None], position), -torch.inf)
    keep = scores.argsort(dim=-1, descending=True).argsort(-1) < 4
    weights = scores.masked_fill(~keep, -torch.inf).softmax(-1)
    generator = torch.Generator().manual_seed(0)
    found = torch.zeros(2, 2, 30)
    for row in torch.randperm(30, generator=generator).tolist():
        seen = call.locality.visible(torch.tensor(row), position).nonzero().flatten()
        shuffled = seen[torch.randperm(len(seen), generator=generator)].tolist()
        for head in range(2):
            drawn = [key for key in shuffled if keep[0, head, row, key]][:2]
            others = [key for key in shuffled if keep[0, head, row, key] and key not in drawn]
            y = weights[0, head, row, :, None] * v[0, head]
            distance = (y - y[drawn].sum(0)).norm(dim=-1)
            found[0, head, row] = 2 / (2 + (distance[others] <= distance[drawn].max()).sum())
            found[1, head, row] = (distance[drawn] < distance[others].min()).sum() / 2
    torch.testing.assert_close(torch.stack((precision[0], recall[0])), found.mean(-1))


def test_bootstrap_intervals_of_a_mean():
    """Of n normal numbers about the mean +- 1.96 s / sqrt(n); of equal ones the number itself."""
    values = randn(3, 400, dtype=torch.float64, device="cpu")
    low, mean, high = bootstrap(values)
    half = 1.96 * values.std(-1) / 20
    torch.testing.assert_close(low, mean - half, rtol=0, atol=0.15 * half.max().item())
    torch.testing.assert_close(high, mean + half, rtol=0, atol=0.15 * half.max().item())
    assert torch.equal(low, bootstrap(values).low) and not torch.equal(low, bootstrap(values, seed=1).low)
    assert bootstrap(torch.full((5,), 2.0)) == (2.0, 2.0, 2.0)
    for wrong, message in ((dict(confidence=1.0), "confidence"), (dict(count=0), "count")):
        with pytest.raises(ValueError, match=f"^{message} must be"):
            bootstrap(values, **wrong)
    with pytest.raises(ValueError, match="^values must have at least 2"):
        bootstrap(values[:, :1])


# ------------------------------------------------------------------------------------------------------------- monitor


def train(steps, monitor_options):
    torch.manual_seed(0)
    layers = [Attend(nf.softmax_attention, causal=True), Attend(nf.krause_attention, sigma=2.0, top_k=4)]
    model = nn.Sequential(*layers)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = Monitor(model, sweep=(2,), **monitor_options)
    for step in range(steps):
        with monitor.step(step):
            loss = model(randn(2, 12, 32, seed=step, device="cpu")).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, monitor


def test_a_training_is_watched_every_few_steps():
    logged = []
    model, monitor = train(5, dict(every=2, log=lambda step, watched: logged.append((step, list(watched.layers)))))
    assert logged == [(step, ["0", "1"]) for step in (0, 2, 4)]
    assert list(monitor.steps) == [0, 2, 4]
    rows = monitor.table()
    assert [row["step"] for row in rows] == 8 * [0] + 8 * [2] + 8 * [4]
    assert rows[0]["entropy"] != rows[-1]["entropy"]
    plain, _ = train(5, dict(every=1000))
    with torch.no_grad():
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("error, every", [(ValueError, 0), (TypeError, 2.0)])
def test_bad_input_of_a_monitor(error, every):
    with pytest.raises(error, match="^every must be"):
        Monitor(nn.Identity(), every=every)


def test_plot_of_a_training(tmp_path):
    pytest.importorskip("matplotlib")
    _, monitor = train(5, dict(every=2))
    figure = plot_history(monitor, tmp_path / "history.png", ("entropy", "first_mass"))
    assert (tmp_path / "history.png").stat().st_size > 10_000
    over_time, by_depth = figure.axes[:2]
    assert [list(line.get_xdata()) for line in over_time.lines] == [[0, 2, 4], [0, 2, 4]]
    entropies = [watched.layers["1"]["entropy"].mean().item() for watched in monitor.steps.values()]
    assert list(over_time.lines[1].get_ydata()) == pytest.approx(entropies)
    first, last = (list(line.get_ydata()) for line in by_depth.lines)
    assert first[1] == pytest.approx(entropies[0]) and last[1] == pytest.approx(entropies[-1])
    with pytest.raises(ValueError, match="^quantities must be among entropy, .*got 'geometry'"):
        plot_history(monitor, quantities=("geometry",))


def test_plot_of_no_training():
    with pytest.raises(ValueError, match="^monitor has seen no attention"):
        plot_history(Monitor(nn.Identity()))
