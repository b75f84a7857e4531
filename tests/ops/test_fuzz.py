"""Drawn calls of every operator and step against their float64 oracles; `make fuzz MINUTES=5` draws for longer."""

import hypothesis
import pytest
from harness import DEVICE
from hypothesis import strategies as st
from strategies import CALLS

from nearfar.registry import OPERATORS, PARTS, STEPS

pytestmark = pytest.mark.full


@pytest.mark.parametrize("name", CALLS)
@hypothesis.settings(max_examples=-(-hypothesis.settings.default.max_examples // 4))
@hypothesis.given(data=st.data())
def test_fuzz(name, data):
    calls, check = CALLS[name]
    check(data.draw(calls))


NUMBERS = {
    "dtype": 1, "backend": "triton", "value_width": 24, "batch": 1, "group": 1, "numbers": "equal", "feature_map": "relu",
}
OPEN_CASES = {
    "one key through a state": NUMBERS | {
        "width": 64, "packed": True, "length": 1, "keys": 1, "kv_heads": 2, "magnitude": 1 / 64, "seed": 65536,
        "layouts": ["tokens before heads", "width before rows", "one row expanded"],
        "gradients": ["tokens before heads", "contiguous"], "ends": [0, 0, 1, 1, 1, 1], "widths": [8, 16], "causal": False,
        "direct": False, "normalize": True, "eps": 1e-6, "state": False, "return_state": False,
    },
    "gradient of the initial state": NUMBERS | {
        "width": 16, "packed": False, "length": 130, "keys": 130, "kv_heads": 1, "magnitude": 8.0, "seed": 17922,
        "layouts": ["width before rows", "slice of wider rows", "contiguous"], "gradients": ["contiguous", "contiguous"],
        "ends": None, "widths": [16, 8], "causal": True, "direct": True, "normalize": True, "eps": 1e-6, "state": True,
        "return_state": False,
    },
}


@pytest.mark.skipif(DEVICE != "cpu", reason="drawn in the interpreter, where the second dtype is float16")
@pytest.mark.xfail(strict=True, raises=AssertionError, reason="an open case of docs/contract.md")
@pytest.mark.parametrize("name", OPEN_CASES)
def test_hadamard_attention_in_float16(name):
    CALLS["hadamard_attention"][1](OPEN_CASES[name])


def test_every_function_of_the_registry_is_drawn():
    listed = {entry.function.__name__ for entry in (*OPERATORS, *PARTS, *STEPS) if getattr(entry, "differentiable", True)}
    assert set(CALLS) == listed
