"""The examples run and learn; the README lists every operator of the registry."""

import importlib.util
import math
import re
from pathlib import Path

import pytest
import torch

from nearfar import registry

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def train_digits():
    spec = importlib.util.spec_from_file_location("train_digits", ROOT / "examples/train_digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # workers of pytest-xdist share the cores, and waiting threads would spin on them
    yield module
    torch.set_num_threads(threads)


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
    assert {path.name for path in tmp_path.iterdir()} == {"losses.png", "samples.png"}


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
    assert states.keys() == {"krause", "linear", "hadamard"}
    for name, state in states.items():
        own = {parameter.split(".")[-1] for parameter in state.keys() - softmax.keys()}
        assert own == ({"log_sigma"} if name == "krause" else set()), name
        assert all(torch.equal(softmax[parameter], state[parameter]) for parameter in softmax), name


@pytest.mark.parametrize("name", ["softmax", "krause", "linear", "hadamard"])
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


@pytest.mark.parametrize("operator", registry.OPERATORS, ids=lambda operator: operator.function.__name__)
def test_readme_lists_every_operator(operator):
    readme = (ROOT / "README.md").read_text()
    table = readme.split("<!-- operators -->")[1].split("<!-- /operators -->")[0]
    (row,) = [line for line in table.splitlines() if f"`nf.{operator.function.__name__}`" in line]
    assert operator.summary in row
    assert operator.source in row
