"""What installs and under which names; the CUDA extension `nearfar._C`: that it loads, and its kernel row_sumsq."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import nearfar
from nearfar import _cuda

ROOT = Path(__file__).resolve().parents[2]


def has_nvcc() -> bool:
    home = os.environ.get("CUDA_HOME")
    return bool(shutil.which("nvcc") or (home and shutil.which("nvcc", path=os.path.join(home, "bin"))))


needs_extension = pytest.mark.skipif(
    not has_nvcc() or os.environ.get("NEARFAR_CUDA") == "0",
    reason="without nvcc, or with NEARFAR_CUDA=0, the CUDA extension is not built",
)


def test_version():
    assert importlib.metadata.version("nearfar") == nearfar.__version__


def test_citation_has_the_version():
    assert f"\nversion: {nearfar.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_triton_kernels_install_inside_the_package(tmp_path):
    """Another project owns the top-level name; what it may have installed must not be ours."""
    code = (
        "import importlib.util, nearfar.triton_kernels as ours\n"
        "other = importlib.util.find_spec('triton_kernels')\n"
        "assert other is None or other.origin != ours.__file__, other.origin\n"
    )
    # From an empty folder and without PYTHONPATH: in the source tree the folder is importable as a matter of course.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True)


def test_sources_include_no_torch_header():
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert sources
    include = re.compile(r"^\s*#\s*include\s*[<\"](torch|ATen|c10)/", re.MULTILINE)
    assert [path for path in sources if include.search(path.read_text())] == []


def test_wheel_without_cuda(tmp_path):
    source = tmp_path / "source"
    for folder in ("python", "triton_kernels", "csrc"):
        shutil.copytree(ROOT / folder, source / folder)
    # An extension left over from an editable install must not travel either.
    (source / "python/nearfar/_C.so").write_bytes(b"stale")
    (source / "triton_kernels/launch_parameters_probe.json").write_text("{}")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    subprocess.run(command, env={**os.environ, "NEARFAR_CUDA": "0"}, check=True)

    [wheel] = tmp_path.glob("*.whl")
    assert wheel.name == f"nearfar-{nearfar.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {"nearfar", f"nearfar-{nearfar.__version__}.dist-info"}
    assert not [name for name in names if "_C" in name]
    for folder, installed in (("python/nearfar", "nearfar"), ("triton_kernels", "nearfar/triton_kernels")):
        expected = {f"{installed}/{path.relative_to(ROOT / folder)}" for path in (ROOT / folder).rglob("*.py")}
        assert expected and expected <= names
    others = ("py.typed", "runtime/choices.json", "triton_kernels/launch_parameters_probe.json")
    assert {f"nearfar/{name}" for name in others} <= names


def test_either_an_extension_or_a_reason():
    assert (_cuda.extension is None) == (_cuda.unavailable_reason is not None)


@needs_extension
def test_extension_loads_without_a_gpu():
    assert _cuda.extension is not None, _cuda.unavailable_reason
    assert _cuda.extension.version() == nearfar.__version__
    assert _cuda.extension.cuda_runtime_version() >= 12000
    expected = os.environ.get("NEARFAR_CUDA_ARCHS", "80;90a").split(";")
    assert _cuda.extension.architectures() == expected
    devices = _cuda.extension.devices()
    assert isinstance(devices, list)
    if not torch.cuda.is_available():
        return
    assert len(devices) == torch.cuda.device_count()
    for index, device in enumerate(devices):
        properties = torch.cuda.get_device_properties(index)
        assert device["name"] == properties.name
        assert device["capability"] == (properties.major, properties.minor)
        assert device["multiprocessors"] == properties.multi_processor_count
        assert device["total_memory"] == properties.total_memory
        assert device["l2_bytes"] == properties.L2_cache_size
        assert device["shared_memory_per_block_optin"] >= 48 * 1024


def plan(kernel, **changed):
    """A launch of a kernel of the extension, and the number of its tensors. changed: arguments; Ellipsis leaves one out."""
    values = {**_cuda.extension.ARGUMENTS[kernel], **changed}
    tensors = [name for name, value in values.items() if value is None]
    others = {name: value for name, value in values.items() if value is not None and value is not ...}
    variant = "elu" if kernel.startswith(("linear", "hadamard")) else "bfloat16"
    return getattr(_cuda.extension, kernel)(variant, tensors, **others), len(tensors)


@needs_extension
def test_every_kernel_takes_its_arguments_by_name():
    """And raises CUDA's errors: without a GPU the runtime has no device to make current, with one it has no device 4096."""
    assert len(_cuda.extension.ARGUMENTS) > 15
    for kernel, arguments in _cuda.extension.ARGUMENTS.items():
        launch, tensors = plan(kernel)
        with pytest.raises(RuntimeError, match="cudaError"):
            launch([0] * tensors, 4096, 0)
        with pytest.raises(TypeError, match=f"{tensors} addresses are needed, not {tensors - 1}"):
            launch([0] * (tensors - 1), 0, 0)
        for name, value in arguments.items():
            if value is not None:
                with pytest.raises(TypeError, match=f"{kernel} needs {name} once"):
                    plan(kernel, **{name: ...})
                with pytest.raises(TypeError, match=f"{kernel}: {name} cannot be 'many'"):
                    plan(kernel, **{name: "many"})
    with pytest.raises(TypeError, match="krause_forward takes no argument windows, but q_strides, .* top_k"):
        plan("krause_forward", windows=3)
    with pytest.raises(TypeError, match="krause_forward takes no tensor dq, but q, k, v, sigma, token_bounds, o, lse, bits"):
        plan("krause_forward", dq=None)
    with pytest.raises(TypeError, match="krause_forward: q_strides cannot be"):
        plan("krause_forward", q_strides=(1, 2))


@needs_extension
def test_row_sumsq_checks_its_input():
    with pytest.raises(ValueError, match="shape"):
        _cuda.row_sumsq(torch.zeros(2, 3, 16))
    with pytest.raises(TypeError, match="float64"):
        _cuda.row_sumsq(torch.zeros(1, 2, 3, 16, dtype=torch.float64))
    with pytest.raises(ValueError, match="contiguous"):
        _cuda.row_sumsq(torch.zeros(1, 2, 16, 3).mT)
    with pytest.raises(ValueError, match="CUDA device"):
        _cuda.row_sumsq(torch.zeros(1, 2, 3, 16))


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="row_sumsq runs on a CUDA device only")


def random(*shape, dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


LAYOUTS = {
    "contiguous": lambda width, dtype: random(2, 3, 133, width, dtype=dtype),
    "transposed": lambda width, dtype: random(2, 133, 3, width, dtype=dtype).transpose(1, 2),
    "rows sliced": lambda width, dtype: random(2, 3, 267, width, dtype=dtype)[:, :, 1::2],
    "batch permuted": lambda width, dtype: random(133, 2, 3, width, dtype=dtype).permute(1, 2, 0, 3),
    "heads expanded": lambda width, dtype: random(2, 1, 133, width, dtype=dtype).expand(-1, 3, -1, -1),
    "unaligned rows": lambda width, dtype: random(2, 3, 133, width + 1, dtype=dtype)[..., :width],
    "unaligned base": lambda width, dtype: random(2, 3, 133, width + 8, dtype=dtype)[..., 1 : width + 1],
    "one row": lambda width, dtype: random(700, 3, 1, width, dtype=dtype),
}


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [1, 16, 20, 24, 80, 128, 256])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_row_sumsq(layout, width, dtype):
    x = LAYOUTS[layout](width, dtype)
    out = _cuda.row_sumsq(x)
    assert out.dtype == torch.float32 and out.shape == x.shape[:-1] and out.is_contiguous()
    exact = x.double().square().sum(-1)
    # A lane adds at most 8 squares, then 5 steps join the lanes: 13 roundings, and positive numbers do not cancel.
    assert ((out.double() - exact).abs() <= 13 * 2.0**-24 * exact * 1.001).all()
    assert torch.equal(out, _cuda.row_sumsq(x))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("shape", [(0, 3, 5, 16), (2, 0, 5, 16), (2, 3, 0, 16), (2, 3, 5, 0)])
def test_row_sumsq_empty(shape):
    out = _cuda.row_sumsq(torch.empty(shape, device="cuda"))
    assert torch.equal(out, torch.zeros(shape[:-1], device="cuda"))


@pytest.mark.gpu
@needs_gpu
def test_row_sumsq_beyond_32_bit_offsets():
    x = torch.zeros(1, 1, 2**27 + 3, 16, dtype=torch.float16, device="cuda")
    x[..., -1, :] = 2
    out = _cuda.row_sumsq(x)
    assert out[..., -1].item() == 64
    assert torch.count_nonzero(out).item() == 1


@pytest.mark.gpu
@needs_gpu
def test_row_sumsq_runs_on_the_current_stream_and_in_a_graph():
    x = random(2, 3, 133, 64, dtype=torch.float16)
    expected = _cuda.row_sumsq(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # Capture fails if the launch goes to any other stream.
        out = _cuda.row_sumsq(x)
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(out, expected)
