"""The measured choices between backends as a page shows them; `python -m bench.report` writes them."""

from nearfar.dispatch import CUDA_FIRST
from nearfar.runtime import choices

OVERVIEW = "overview"


def markdown(operator):
    """The table of an operator, and where its figures are from; or a sentence about all."""
    if operator == OVERVIEW:
        return overview()
    return "placeholder"
