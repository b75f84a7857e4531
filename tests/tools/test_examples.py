"""The examples run and learn; the README lists every operator of the registry."""

import importlib.util
import json
import math
import re
from pathlib import Path

import numpy
import pytest
import torch
from rich.table import Table

from nearfar import registry

pytestmark = pytest.mark.full

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # workers of pytest-xdist share the cores, and waiting threads would spin on them
    yield
    torch.set_num_threads(threads)


def example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"examples/{name}.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")  # as for a script: examples share pages.py
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def train_digits():
    return example("train_digits")


def test_train_digits_learns_and_prints_finite_numbers(train_digits, tmp_path, capsys):
    curves = train_digits.main(["--steps", "10", "--device", "cpu", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert list(curves) == list(train_digits.MODELS)
    for name, (losses, held_out) in curves.items():
        assert len(losses) == 10
        assert losses[-1] < losses[0] - 0.5, name
        assert held_out < math.log2(17), name
        (row,) = re.findall(rf"│ {name} +│(.*)│", printed)
        numbers = [float(cell.replace(",", "")) for cell in row.split("│")]
        assert len(numbers) == 4 and all(map(math.isfinite, numbers)), row
        assert numbers[0] == pytest.approx(held_out, abs=6e-4)
    assert {path.name for path in tmp_path.iterdir()} == {"losses.json", "losses.png", "samples.json", "samples.png"}


def test_train_digits_trains_the_models_that_were_asked_for(train_digits, tmp_path, capsys):
    curves = train_digits.main(["--models", "hadamard", "linear", "--steps", "1", "--device", "cpu", "--out", str(tmp_path)])
    assert list(curves) == ["hadamard", "linear"]
    assert "krause" not in capsys.readouterr().out


def test_models_of_train_digits_start_alike(train_digits):
    states = {}
    for name, attention in train_digits.MODELS.items():
        torch.manual_seed(0)
        states[name] = train_digits.PixelTransformer(attention).state_dict()
    softmax = states.pop("softmax")
    assert states.keys() == {"krause", "linear", "hadamard", "synchronization", "affine"}
    # Frequencies and phases start as queries and keys do.
    renamed = {"omega_proj": "q_proj", "theta_proj": "k_proj"}
    parameters = {
        "krause": {"log_sigma"},
        "synchronization": {"raw_coupling", "raw_bandwidth"},
        "affine": {"alpha_proj.weight", "alpha_average"},
    }
    for name, state in states.items():
        state = {".".join(renamed.get(part, part) for part in key.split(".")): value for key, value in state.items()}
        own = {parameter.split(".attention.")[-1] for parameter in state.keys() - softmax.keys()}
        assert own == parameters.get(name, set()), name
        assert all(torch.equal(softmax[parameter], state[parameter]) for parameter in softmax), name


@pytest.mark.parametrize("name", ["softmax", "krause", "linear", "hadamard", "synchronization", "affine"])
def test_models_of_train_digits_predict_from_earlier_pixels_only(train_digits, name):
    model = train_digits.PixelTransformer(train_digits.MODELS[name]).eval()
    tokens = torch.randint(train_digits.LEVELS, (2, train_digits.PIXELS))
    changed = tokens.clone()
    changed[:, 40] = (changed[:, 40] + 1) % train_digits.LEVELS
    difference = (model(changed) - model(tokens)).abs().amax((0, 2))
    assert difference[:40].max() == 0
    assert difference[40] > 0


def test_histogram_of_uniform_levels_costs_the_logarithm_of_their_number(train_digits):
    uniform = torch.arange(train_digits.LEVELS)[:, None].expand(-1, train_digits.PIXELS)
    for per_position in (False, True):
        bits = train_digits.histogram_bits_per_pixel(uniform, uniform, per_position)
        assert bits == pytest.approx(math.log2(train_digits.LEVELS))


def files(*names):
    return {f"{name}.{suffix}" for name in names for suffix in ("png", "json")}


def test_bad_arguments_get_one_line(train_digits, tmp_path, capsys):
    (tmp_path / "file").touch()
    cases = {
        "cannot write to": ["--out", str(tmp_path / "file")],
        "no device nowhere here": ["--device", "nowhere"],
        "whole number of at least 1": ["--steps", "0"],
        "is no file": ["--page", str(tmp_path / "missing.md")],
    }
    for message, arguments in cases.items():
        with pytest.raises(SystemExit):
            train_digits.main(arguments)
        assert message in capsys.readouterr().err.splitlines()[-1]


def page_with(name, path):
    path.write_text(f"before\n<!-- {name} -->\nold figures\n<!-- /{name} -->\nafter\n")
    return path


def rows_of(page):
    """Cells of the Markdown table of a page, first column -> the others, in the order of the page."""
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old figures" not in text
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [(cells[0], cells[1:]) for cells in lines[2:]]


def test_polarization_prints_what_the_flows_hold(tmp_path, capsys):
    page = page_with("polarization", tmp_path / "page.md")
    options = ["--steps", "1000", "--models", "3", "--out", str(tmp_path / "plots"), "--page", str(page)]
    polarisation, normalisers, square, cross_entropy = example("polarization").main(options)
    rows = dict(rows_of(page))
    assert polarisation.steps[-1] == 1000 and polarisation.entropy.shape == (len(polarisation.steps), 3)
    notebook, median, spread = rows["entropy, 1,000 steps (ln 8 = 2.08)"]
    assert notebook == "1.989" and float(median) == pytest.approx(polarisation.entropy[-1].median().item(), abs=0.006)
    assert spread == f"{polarisation.entropy[-1].min():.2f} to {polarisation.entropy[-1].max():.2f}"
    assert rows["winner is argmax V_0^T beta (theorem: always)"][1] == "3 of 3"
    for name, flow in normalisers.items():
        assert float(rows[f"support of 10, logistic, {name}"][1]) == pytest.approx(
            flow.effective_support[-1].median().item(), abs=0.006
        )
    assert len(square) == 6 and cross_entropy.effective_support[-1].max() < 10
    assert "winner" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "plots").iterdir()} == files("polarization", "support")


def test_malleability_prints_what_was_measured(tmp_path, capsys):
    page = page_with("malleability", tmp_path / "page.md")
    options = ["--networks", "1", "--points", "40", "--out", str(tmp_path / "plots"), "--page", str(page)]
    results = example("malleability").main(options)
    rows = rows_of(page)
    assert [(setting, cells[0].lower()) for setting, cells in rows] == list(results)
    for (_, cells), by_feature in zip(rows, results.values(), strict=True):
        flips = [100 * result.malleability.mean().item() for result in by_feature.values()]
        assert [float(cell) for cell in cells[1:4]] == pytest.approx(flips, abs=0.06)
    assert rows[0][1][4:6] == ["4.1", "34.6"]
    assert "cond(G)" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "plots").iterdir()} == files("flips", "influences")


def test_watch_attention_prints_and_draws_what_it_saw(tmp_path, capsys):
    results, losses = example("watch_attention").main(
        ["--steps", "3", "--images", "2", "--device", "cpu", "--out", str(tmp_path)]
    )
    assert len(losses) == 3 and list(results) == ["untrained", "trained"]
    printed = capsys.readouterr().out
    for name, watched in results.items():
        assert name in printed
        assert (tmp_path / f"heads-{name}.png").read_bytes().startswith(b"\x89PNG")
        rows = watched.table()
        heads = [(f"blocks.{layer}.attention", head) for layer in range(3) for head in range(4)]
        assert [(row["layer"], row["head"]) for row in rows] == heads
        assert json.loads((tmp_path / f"heads-{name}.json").read_text()) == rows
        for number, row in enumerate(rows):
            line = rf"^ {number // 4}\.{number % 4} +{row['entropy']:.3f} .* {row['regime']} *$"
            assert re.search(line, printed, re.MULTILINE), row
        assert all(len(line) <= 80 for line in printed.splitlines() if str(tmp_path) not in line)
        assert all(0 <= row["entropy"] <= math.log(64) and 0 < row["f_score"] <= 1 for row in rows)


@pytest.fixture(scope="module")
def affine_stability():
    return example("affine_stability")


def test_affine_stability_prints_and_saves_what_it_measured(affine_stability, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(affine_stability.train_digits, "WARMUP", 1)
    page = page_with("affine_stability", tmp_path / "page.md")
    options = ["--models", "affine", "--steps", "3", "--seeds", "2", "--device", "cpu", "--page", str(page)]
    results = affine_stability.main([*options, "--out", str(tmp_path / "out")])
    assert list(results) == ["softmax", "affine"]  # softmax, which the ratios are to, is always there
    assert json.loads((tmp_path / "out/affine_stability.json").read_text()) == results
    assert (tmp_path / "out/affine_stability.png").read_bytes().startswith(b"\x89PNG")
    rows = rows_of(page)
    norms = {name: numpy.array([run["gradient_norms"] for run in runs]) for name, runs in results.items()}
    assert norms["affine"].shape == (2, 3)
    held_out = {name: numpy.array([run["held_out"] for run in runs]) for name, runs in results.items()}
    expected = {"held out": held_out}
    for title, first in (("its variance", 0), ("variance after warm-up", 1)):
        expected[title] = {name: values[:, first:].var(1, ddof=1) for name, values in norms.items()}
    for title, values in expected.items():
        row = [name for name, _ in rows].index(title)
        assert_spread(rows[row][1], values.values())
        if title != "held out":
            assert_spread(rows[row + 1][1], [variance / values["softmax"] for variance in values.values()])
    assert rows[-2:] == [("paper, variance", ["3.93", "2.90"]), ("paper, ratio", ["1.00", "0.74"])]
    assert "gradient norm" in capsys.readouterr().out


def assert_spread(cells, values):
    """Each cell has the mean over the seeds and the largest deviation from it."""
    for cell, seeds in zip(cells, values, strict=True):
        mean, deviation = (float(number) for number in cell.split(" ± "))
        assert mean == pytest.approx(seeds.mean(), abs=0.006)
        assert deviation == pytest.approx(abs(seeds - seeds.mean()).max(), abs=0.006)


def test_models_of_affine_stability_start_alike_and_read_the_past_only(affine_stability):
    states, own = {}, {"softmax": set(), "halved": set(), "sink": {"sink"}, "affine": {"alpha_proj.weight", "alpha_average"}}
    own["sigmoid"] = own["affine"]
    for name, attention in affine_stability.MODELS.items():
        torch.manual_seed(0)
        model = affine_stability.train_digits.PixelTransformer(attention).eval()
        states[name] = model.state_dict()
        assert {key.split(".attention.")[-1] for key in states[name].keys() - states["softmax"].keys()} == own[name]
        assert all(torch.equal(states["softmax"][key], states[name][key]) for key in states["softmax"]), name
        tokens = torch.zeros(1, 64, dtype=torch.int64)
        changed = tokens.index_fill(1, torch.tensor(40), 1)
        difference = (model(changed) - model(tokens)).abs().amax((0, 2))
        assert difference[:40].max() == 0 and difference[41:].max() > 0, name


def test_a_sink_takes_weight_from_the_pixels(affine_stability):
    q, k, v = torch.randn(3, 1, affine_stability.train_digits.HEADS, 5, 8)
    layer = affine_stability.SinkAttention()
    weights = layer.attend(q, k, torch.ones_like(v))[..., 0]
    scores = (q @ k.mT / 8**0.5).masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
    torch.testing.assert_close(weights, 1 - 1 / (1 + scores.exp().sum(-1)))


def test_a_page_without_its_markers_is_refused(tmp_path):
    pages, page = example("pages"), tmp_path / "page.md"
    page.write_text("nothing")
    with pytest.raises(ValueError, match="must have the lines <!-- name -->"):
        pages.write_table(page, "name", Table("column", title="title"))
    assert page.read_text() == "nothing"


@pytest.mark.parametrize("operator", registry.OPERATORS, ids=lambda operator: operator.function.__name__)
def test_readme_lists_every_operator(operator):
    readme = (ROOT / "README.md").read_text()
    table = readme.split("<!-- operators -->")[1].split("<!-- /operators -->")[0]
    (row,) = [line for line in table.splitlines() if f"`nf.{operator.function.__name__}`" in line]
    assert operator.summary in row
    assert operator.source in row
