"""Drawn calls of every operator and step against their float64 oracles; `make fuzz MINUTES=5` draws for longer."""

import hypothesis
import pytest
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


def test_every_function_of_the_registry_is_drawn():
    listed = {entry.function.__name__ for entry in (*OPERATORS, *PARTS, *STEPS) if getattr(entry, "differentiable", True)}
    assert set(CALLS) == listed
