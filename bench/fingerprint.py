"""Is a record still of today's code? A hash of an operator's kernels, and of what makes a case's inputs.

Sources are the operator's module in ops/, what it imports of ops, kernels and triton_kernels, its CUDA C++, and its modules in
cases/ and formulas/. The runtime and the tables of launch parameters are everybody's and left out.
"""

import ast
import functools
import hashlib
from pathlib import Path

from bench import cases
from bench.runs import case_identity

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "nearfar.ops": ROOT / "python/nearfar/ops",
    "nearfar.kernels": ROOT / "python/nearfar/kernels",
    "nearfar.triton_kernels": ROOT / "triton_kernels",
}
CUDA = {"linear": ("linear", "hadamard")}  # folders of csrc/ whose name is not the operator's
CURRENT, STALE, UNKNOWN = "current", "stale", "unknown"


@functools.cache
def of(room):
    """The hash of an operator's sources."""
    digest = hashlib.sha256()
    for path in sources(room):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def sources(room):
    found, waiting = set(), [PACKAGES["nearfar.ops"] / f"{room}.py"]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += imported(path)
    folders = [ROOT / "csrc" / name for name in ("common", *CUDA.get(room, (room,)))]
    found |= {path for folder in folders for path in folder.iterdir() if path.is_file()}
    found |= {path for folder in ("cases", "formulas") for path in (ROOT / "bench" / folder).glob(f"{room}.py")}
    return sorted(found)


def imported(path):
    """Files of PACKAGES that a module imports, also by triton_module("name")."""
    package = next(name for name, folder in PACKAGES.items() if folder == path.parent)
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, (package if node.level else "", node.module)))
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "triton_module":
            names.append(f"nearfar.triton_kernels.{node.args[0].value}")
    split = [name.rpartition(".") for name in names]
    files = [PACKAGES[base] / f"{name}.py" for base, _, name in split if base in PACKAGES]
    return [file for file in files if file.exists()]


def state(record):
    """(CURRENT, STALE or UNKNOWN, why) of a record. One without a fingerprint is from before there were any."""
    if "fingerprint" not in record:
        return UNKNOWN, "it has no fingerprint"
    if record["fingerprint"] != of(record["room"]):
        return STALE, f"the sources of {record['room']} have changed"
    table = {case_identity(case.describe()) for case in cases.suite(cases.GPU).get(record["room"], ())}
    if any(case_identity(row["case"]) not in table for row in record["rows"]):
        return STALE, "cases.toml has other cases of that name"
    return CURRENT, ""
