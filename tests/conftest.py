"""Where the kernels run is decided here, before nearfar or Triton is imported: on a CUDA device, else interpreted.

xdist workers import this file first too, so all of them decide alike.
"""

import os
import sys
import warnings
from pathlib import Path

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.append(str(Path(__file__).parents[1]))  # for bench, which tests share the rule of accuracy with
torch.set_num_threads(1)  # the workers of xdist share the cores, and arrays on the CPU are small


def interpreter_problem():
    """Why Triton's interpreter cannot work with what is installed, or None."""
    import numpy
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) > (3, 6):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            int(numpy.ones(1))
    except TypeError:
        return (
            f"Triton {triton.__version__} interprets kernels with int() of one-element arrays, which numpy "
            f"{numpy.__version__} refuses. No kernel can be tested: pip install 'numpy<2.4'"
        )
    return None


def pytest_configure(config):
    # The interpreter computes masked lanes too; their infinities are none of the test's business.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime")
    config.addinivalue_line("filterwarnings", "ignore:Conversion of an array:DeprecationWarning:triton.runtime")
    if os.environ.get("TRITON_INTERPRET") == "1":
        problem = interpreter_problem()
        if problem:
            raise pytest.UsageError(problem)


# NEARFAR_FUZZ=500 draws that many examples from a fresh seed; by default the same few are drawn on every run. None is made
# smaller when it fails, which takes the interpreter minutes: `make fuzz` does that.
hypothesis.settings.register_profile(
    "nearfar",
    derandomize="NEARFAR_FUZZ" not in os.environ,
    max_examples=int(os.environ.get("NEARFAR_FUZZ", 40)),
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    database=None,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.load_profile("nearfar")
