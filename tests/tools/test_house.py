"""Localities, dispatch, explain, annotations and what importing the package does."""

import importlib
import inspect
import os
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from harness import DEVICE, randn

import nearfar as nf
from nearfar.registry import OPERATORS


def qkv(width=16, **keywords):
    return [randn(1, 2, 6, width, seed=seed, **keywords) for seed in range(3)]


@pytest.mark.parametrize("arguments, side", [((-2,), "left"), ((3, -5), "right"), ((-7, -7), "left")])
def test_window_that_hides_the_own_key(arguments, side):
    with pytest.raises(ValueError, match=f"{side}=-.*own key"):
        nf.SlidingWindow(*arguments)


@pytest.mark.parametrize("arguments, side", [((2.0,), "left"), ((3, None), "right"), ((True,), "left")])
def test_window_that_is_no_integer(arguments, side):
    with pytest.raises(TypeError, match=f"{side} must be an int"):
        nf.SlidingWindow(*arguments)


def test_window_is_a_value():
    assert nf.SlidingWindow(3) == nf.SlidingWindow(3, 0) != nf.SlidingWindow(3, 1)
    assert hash(nf.SlidingWindow(3)) == hash(nf.SlidingWindow(3, 0))
    assert nf.SlidingWindow(left=-1, right=-1) == nf.SlidingWindow(-1, -1)
    with pytest.raises(AttributeError):
        nf.SlidingWindow(3).left = 4


def test_unlimited_window_is_no_window():
    q, k, v = qkv()
    for backend in ("triton", "reference"):
        everything = nf.krause_attention(q, k, v, 2.0, backend=backend)
        assert torch.equal(everything, nf.krause_attention(q, k, v, 2.0, nf.SlidingWindow(-1, -1), backend=backend))
        assert not torch.equal(everything, nf.krause_attention(q, k, v, 2.0, nf.SlidingWindow(2), backend=backend))


def test_unknown_backend():
    with pytest.raises(ValueError, match='^backend must be "auto", "cuda", "triton" or "reference", got \'cudnn\''):
        nf.krause_attention(*qkv(), 2.0, backend="cudnn")


def test_cuda_backend_says_that_it_is_missing():
    with pytest.raises(ValueError, match="backend='cuda' cannot serve this call: there is no CUDA kernel"):
        nf.order_parameter(qkv()[0], backend="cuda")


def test_triton_refuses_cpu_tensors_outside_the_interpreter():
    """In a process of its own: Triton decides once whether it interprets."""
    code = """
import torch, nearfar as nf
q = torch.ones(1, 1, 4, 16)
try:
    nf.krause_attention(q, q, q, 1.0, backend="triton")
except ValueError as error:
    assert "TRITON_INTERPRET=1" in str(error) and "backend='triton'" in str(error), error
else:
    raise SystemExit("no error")
text = nf.explain(nf.krause_attention, q, q, q, 1.0)
assert "served by reference" in text and "TRITON_INTERPRET=1" in text, text
assert torch.equal(nf.krause_attention(q, q, q, 1.0), q)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_import_is_light():
    """`import nearfar` imports none of these, each of which takes a second or more, and no GPU is touched."""
    code = """
import sys, torch
before = set(sys.modules)
import nearfar
heavy = {
    "triton", "transformers", "matplotlib", "numpy", "scipy", "rich", "torch._dynamo", "torch._inductor",
    "torch.distributed.tensor", "torch.nn.attention.flex_attention",
    "nearfar.diagnostics", "nearfar.integrations", "nearfar.theory", "nearfar.triton_kernels",
}
found = heavy & (set(sys.modules) - before)
assert not found, found
assert not torch.cuda.is_initialized()
for name in nearfar.__all__:
    assert name in dir(nearfar) and getattr(nearfar, name) is not None
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        getattr(nf, "nothing")  # noqa: B009


def test_auto_takes_the_reference_on_the_cpu():
    q, k, v = qkv(device="cpu", dtype=torch.float64)
    auto = nf.krause_attention(q, k, v, 2.0)
    assert torch.equal(auto, nf.krause_attention(q, k, v, 2.0, backend="reference"))
    assert auto.dtype == torch.float64  # which no kernel takes


@pytest.mark.skipif(DEVICE != "cuda", reason="only a CUDA tensor that no kernel serves is refused by auto")
def test_auto_does_not_crawl_on_a_gpu(monkeypatch):
    q, k, v = qkv(width=20)
    monkeypatch.delenv("NEARFAR_ALLOW_REFERENCE", raising=False)
    with pytest.raises(ValueError, match="no kernel serves this call.*20 wide.*NEARFAR_ALLOW_REFERENCE=1"):
        nf.krause_attention(q, k, v, 2.0)
    monkeypatch.setenv("NEARFAR_ALLOW_REFERENCE", "1")
    assert torch.equal(nf.krause_attention(q, k, v, 2.0), nf.krause_attention(q, k, v, 2.0, backend="reference"))


def test_explain():
    q, k, v = qkv()
    chosen = "triton" if DEVICE == "cuda" else "reference"
    head, cuda, triton, reference = nf.explain(nf.krause_attention, q, k, v, 2.0).split("\n")
    assert head == f"krause_attention: served by {chosen} (backend='auto', device={q.device})"
    assert cuda.split()[0] == "cuda" and "can serve" not in cuda  # float32, and often no extension or no GPU either
    assert triton.split() == ["triton", *"can serve this call".split()]
    assert reference.split() == ["reference", *"can serve this call".split()]
    assert "served by triton (backend='triton'" in nf.explain("krause_attention", q, k, v, 2.0, backend="triton")


def test_explain_tells_why_a_call_is_refused():
    q, k, v = qkv(width=20)
    text = nf.explain(nf.krause_attention, q, k, v, 2.0, backend="triton")
    assert "refused" in text.split("\n")[0] and "q is 20 wide" in text
    text = nf.explain(nf.krause_attention, *qkv(dtype=torch.float64), 2.0)
    assert "float64" in text.split("\n")[2]
    assert "backend must be" in nf.explain(nf.krause_attention, q, k, v, 2.0, backend="cudnn")
    many = randn(1, 1, 1100, 16)
    text = nf.explain(nf.krause_attention, many, many, many, 2.0, nf.SlidingWindow(-1), top_k=3, backend="triton")
    assert "top_k over 1100 candidate keys" in text


def test_explain_runs_the_checks():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="^sigma must be positive"):
        nf.explain(nf.krause_attention, q, k, v, -2.0)


@pytest.mark.parametrize("op", ["softmax", torch.nn.functional.scaled_dot_product_attention, None], ids=str)
def test_explain_of_an_unknown_operator(op):
    with pytest.raises(ValueError, match="^op must be an operator of nearfar.*krause_attention"):
        nf.explain(op, *qkv(), 2.0)


SPECIAL = ("__init__", "__call__")
# What `nearfar.__all__` does not lead to: modules whose names users or other modules import.
OTHER_MODULES = (
    *("diagnostics.read", "diagnostics.regimes", "diagnostics.visible", "localities", "registry", "nn.base", "nn.parallel"),
    *(f"kernels.{name}" for name in ("affine", "diagnostics", "krause", "linear", "order_parameter", "synchronization")),
    *(f"runtime.{name}" for name in ("backend", "checks", "choices", "dispatch", "library", "operator", "packing", "plans")),
    *(f"runtime.{name}" for name in ("private", "program", "step", "tensors")),
    *(f"ops.{operator.room}" for operator in OPERATORS),
)


def functions_of(values):
    """{qualified name: function} of the functions of nearfar among these values, and in modules and classes among them."""
    found = {}
    for value in values:
        if isinstance(value, ModuleType):
            found |= functions_of(getattr(value, name) for name in value.__all__)
            continue
        if isinstance(value, property | staticmethod | classmethod):
            value = value.fget if isinstance(value, property) else value.__func__
        value = inspect.unwrap(value) if callable(value) else value
        if not str(getattr(value, "__module__", "")).startswith("nearfar"):
            continue
        if inspect.isclass(value):
            for base in value.__mro__:
                if base.__module__.startswith("nearfar"):
                    found |= functions_of(x for name, x in vars(base).items() if name in SPECIAL or name[0] != "_")
        elif inspect.isfunction(value) and value.__name__ != "<lambda>":
            found[f"{value.__module__}.{value.__qualname__}"] = value
    return found


def public_functions():
    found = functions_of([nf])
    for name in OTHER_MODULES:
        module = importlib.import_module(f"nearfar.{name}")
        own = [x for name, x in vars(module).items() if name[0] != "_" and getattr(x, "__module__", None) == module.__name__]
        found |= functions_of(own)
    return found


def annotations_of(name, function):
    """{name: whether annotated} of the parameters and the result of a function."""
    signature = inspect.signature(function)
    parameters = [parameter for parameter in signature.parameters.values() if parameter.name not in ("self", "cls")]
    found = {f"{name}({parameter.name})": parameter.annotation is not parameter.empty for parameter in parameters}
    return {**found, f"{name} ->": signature.return_annotation is not signature.empty}


def test_every_public_function_is_annotated():
    functions = public_functions()
    assert {"nearfar.nn.base.AttentionLayer.forward", "nearfar.ops.krause_step.KrauseCache.empty"} <= functions.keys()
    assert {f"{op.function.__module__}.{op.function.__name__}" for op in OPERATORS} <= functions.keys()
    annotated = {}
    for name, function in functions.items():
        annotated |= annotations_of(name, function)
    assert len(annotated) > 800
    assert not [name for name, is_annotated in annotated.items() if not is_annotated]


def test_operators_are_listed_once():
    for field in ("function", "prepare", "summary"):
        values = [getattr(operator, field) for operator in OPERATORS]
        assert len(values) == len(set(values)), field
