"""Compiles the pipelined kernels for sm_90 without a GPU and prints, as JSON, what their products read. See test_races.py.

Run as a script: in the process of the tests Triton may be interpreting, and then compiles nothing.
"""

import json
import re

import torch
import triton
from nearfar.triton_kernels import krause, launch, pairwise
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

KERNELS = {kernel.__name__: kernel for kernel in (pairwise.attend, pairwise.grad_queries, pairwise.grad_keys)}
FLOATS = ("parameter", "lse", "delta", "dlog_scale")


def argument_type(name):
    if name.endswith("_strides") or name == "window":
        return ("i32",) * 3
    if name in FLOATS:
        return "*fp32"
    return "*i32" if name == "bits" else "*bf16" if name in ("q", "k", "v", "o", "do", "dq", "dk", "dv") else "i32"


def compile_kernel(kernel, width, selected):
    """The TTGIR of a kernel with the parameters of the launch table."""
    parameters = launch.launch_parameters(kernel.__name__, width, torch.bfloat16.itemsize)
    constants = {
        "SCALE": krause.PAIR.scale, "SCORE": krause.PAIR.score, "GRAD_KEYS": krause.PAIR.grad_keys, "PRECISION": "ieee",
        "D": width, "DV": width, "BLOCK_D": width, "BLOCK_DV": width, "BLOCK_M": parameters.block_m,
        "BLOCK_N": parameters.block_n, "token_bounds": None, "k_squares": None, "group": 1,
    }  # fmt: skip
    if not selected:
        constants["bits"] = None
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {name: "constexpr" if name in constants else argument_type(name) for name in names}
    aligned = [["tt.divisibility", 16]]
    attributes = {(i,): aligned for i, name in enumerate(names) if str(signature[name]).startswith("*")}
    attributes |= {(i, j): aligned for i, name in enumerate(names) if name.endswith("_strides") for j in range(3)}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, attributes)
    options = {"num_warps": parameters.num_warps, "num_stages": parameters.num_stages, "maxnreg": parameters.maxnreg}
    return parameters.num_stages, triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ttgir"]


def pending_products(ttgir):
    """Buffers behind the second operand of each product that a loop step starts and does not wait for."""
    buffers = dict(re.findall(r"(%\w+) = ttg.local_alloc : \(\) -> !ttg.memdesc<(\d+)x", ttgir))
    tiles = dict(re.findall(r"(%\w+) = ttg.memdesc_index (%\w+)\[", ttgir))
    transposed = dict(re.findall(r"(%\w+) = ttg.memdesc_trans (%\w+)", ttgir))
    waited = re.findall(r"warp_group_dot_wait (%\w+)", ttgir)
    products = re.findall(r"(%\w+) = ttng.warp_group_dot %\w+, (%\w+), %\w+ \{isAsync = true\}", ttgir)
    read = [transposed.get(tile, tile) for product, tile in products if product not in waited]
    return len(products), [int(buffers[tiles[tile]]) for tile in read if tiles.get(tile) in buffers]


if __name__ == "__main__":
    found = []
    for width in (64, 128, 256):
        for name, kernel in KERNELS.items():
            for selected in (False, True) if "bits" in kernel.arg_names else (False,):
                stages, ttgir = compile_kernel(kernel, width, selected)
                products, pending = pending_products(ttgir)
                found.append({"kernel": name, "width": width, "selected": selected, "stages": stages,
                              "products": products, "buffers": pending})  # fmt: skip
    print(json.dumps(found))
