"""Packages nearfar, and builds its CUDA extension `nearfar._C` where there is a CUDA compiler.

The extension includes no PyTorch header, so nvcc, pybind11 and ninja are all that it takes. Environment:

    NEARFAR_CUDA        unset: build if nvcc is found, else say so and go on; 1: fail without nvcc; 0: do not build
    NEARFAR_CUDA_ARCHS  architectures to compile for, separated by ";" (default "80;90a")
    CUDA_HOME           the toolkit whose bin/nvcc is used; without it, the nvcc on PATH
    MAX_JOBS            compilers to run at once (default: one per core)
"""

import os
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VERSION = runpy.run_path(str(ROOT / "python/nearfar/version.py"))["__version__"]

# Kept across builds, unlike setuptools' own folder (temporary in editable installs): ninja recompiles what changed.
BUILD = Path("build/cuda")


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    in_home = shutil.which("nvcc", path=str(Path(home, "bin"))) if home else None
    return in_home or shutil.which("nvcc")


def cuda_extensions() -> list[Extension]:
    """`nearfar._C` if it is wanted and can be built, otherwise nothing, and aloud."""
    wanted = os.environ.get("NEARFAR_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"nearfar: NEARFAR_CUDA must be 0, 1 or unset, not {wanted!r}")
    if wanted != "0" and find_nvcc():
        sources = [*sorted(Path("csrc").rglob("*.cu")), *sorted(Path("csrc").rglob("*.cpp"))]
        return [Extension("nearfar._C", [source.as_posix() for source in sources])]
    # Only a command that would have compiled reports: build front ends run this file for metadata, too.
    if {"build", "build_ext", "bdist_wheel", "editable_wheel"} & set(sys.argv):
        reason = "NEARFAR_CUDA=0" if wanted == "0" else "no nvcc in CUDA_HOME or on PATH"
        if wanted == "1":
            sys.exit(f"nearfar: NEARFAR_CUDA=1, but {reason}")
        print(f"nearfar: {reason}: CUDA extension skipped, the Triton kernels will be used", file=sys.stderr)
    return []


def quote(*words: str) -> str:
    """`words` as shell arguments inside a ninja file."""
    return shlex.join(words).replace("$", "$$")


class NinjaBuild(build_ext):
    """Compiles an extension's sources with nvcc, driven by ninja."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11  # here, because a build without CUDA does not need it

        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        archs = [arch for arch in os.environ.get("NEARFAR_CUDA_ARCHS", "80;90a").split(";") if arch]
        common = ["-O3", "-std=c++17", "-Icsrc", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra", "-cudart", "static"]
        device = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        device += ["-lineinfo", f"--threads={min(jobs, len(archs))}"]
        # These paths differ from one isolated build to the next: kept from the kernels, which then need no recompiling.
        host = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
        host += [f'-DNEARFAR_VERSION="{VERSION}"', f'-DNEARFAR_CUDA_ARCHS="{";".join(archs)}"']

        lines = [
            f"builddir = {BUILD.as_posix()}",  # where ninja keeps its own log
            f"nvcc = {quote(find_nvcc(), *common)}",
            "rule cuda",
            f"  command = $nvcc {quote(*device)} -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule host",
            f"  command = $nvcc {quote(*host)} -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            "  command = $nvcc -shared $in -o $out",
        ]
        objects = []
        for source in map(Path, ext.sources):
            objects.append(f"{(BUILD / source.relative_to('csrc')).as_posix()}.o")
            lines.append(f"build {objects[-1]}: {'cuda' if source.suffix == '.cu' else 'host'} {source.as_posix()}")
        library = BUILD / "_C.so"
        lines.append(f"build {library.as_posix()}: link {' '.join(objects)}")

        BUILD.mkdir(parents=True, exist_ok=True)
        ninja_file = BUILD / "build.ninja"
        ninja_file.write_text("\n".join(lines) + "\n")
        subprocess.run([sys.executable, "-m", "ninja", "-v", f"-j{jobs}", "-f", ninja_file], check=True)

        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(library, target)


setup(
    version=VERSION,
    # triton_kernels/ must not install under that name at top level: another project owns it.
    package_dir={"nearfar": "python/nearfar", "nearfar.triton_kernels": "triton_kernels"},
    packages=[
        *find_packages("python"),
        "nearfar.triton_kernels",
        *(f"nearfar.triton_kernels.{name}" for name in find_packages("triton_kernels")),
    ],
    package_data={"nearfar": ["py.typed"], "nearfar.runtime": ["*.json"], "nearfar.triton_kernels": ["*.json"]},
    ext_modules=cuda_extensions(),
    cmdclass={"build_ext": NinjaBuild},
)
