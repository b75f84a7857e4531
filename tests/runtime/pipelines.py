"""Compiles the kernels of an operator, its argument, for sm_90 without a GPU and prints, as JSON, what their products read.

Of "packed" calls it prints the machine's instructions that read a uniform register before any is written.

Run as a script by test_races.py: in the process of the tests Triton may be interpreting, and then compiles nothing.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton

import nearfar as nf
from bench.ahead import captured, compile_launch


def pending_products(ttgir):
    """(number of products, buffers behind the second operand of each that a loop step starts and does not wait for)."""
    buffers = dict(re.findall(r"(%\w+) = ttg.local_alloc : \(\) -> !ttg.memdesc<(\d+)x", ttgir))
    views = dict(re.findall(r"(%\w+) = ttg.memdesc_(?:trans|subslice) (%\w+)", ttgir))
    tiles = dict(re.findall(r"(%\w+) = ttg.memdesc_index (%\w+)\[", ttgir))
    waited = re.findall(r"warp_group_dot_wait (%\w+)[^{]*\{pendings = 0", ttgir)
    products = re.findall(r"(%\w+) = ttng.warp_group_dot %[\w#]+, (%\w+),[^{]*\{isAsync = true\}", ttgir)
    pending = []
    for product, tile in products:
        while tile in views:
            tile = views[tile]
        if product not in waited and tiles.get(tile) in buffers:
            pending.append(int(buffers[tiles[tile]]))
    return len(products), pending


def unwritten_reads(cubin):
    """Instructions of the machine code that read a uniform register which no instruction before them has written.

    The addresses of wgmma's operands are in uniform registers.
    """
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}  # cuobjdump runs nvdisasm
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tools / "cuobjdump", "--dump-sass", file.name]
        text = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    written, found = set(), []
    for name, arguments in re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+ )?([\w.]+)\s+(.*?) ;", text):
        first, _, rest = arguments.partition(",")
        target = re.fullmatch(r"UR(\d+)", first) if name.startswith(("U", "R2UR", "S2UR", "REDUX")) else None
        if any(int(number) not in written for number in re.findall(r"\bUR(\d+)\b", rest if target else arguments)):
            found.append(f"{name} {arguments}")
        if target:
            number = int(target[1])
            written |= {number, number + 1} if ".64" in name or "WIDE" in name else {number}
    return found


def calls():
    """(what, function, tensors), in bfloat16 but for one: the shapes that the launch parameters were measured for."""

    def rows(*widths):
        return [torch.empty(1, 2, 4096, width, dtype=torch.bfloat16) for width in widths]

    for width in (64, 128, 256):
        for top_k in (None, 96):
            window, sigma = nf.SlidingWindow(127), torch.full((2,), 2.0)
            yield (
                f"krause {width} top_k {top_k}",
                lambda q, k, v, sigma, top_k=top_k, window=window: nf.krause_attention(
                    q, k, v, sigma, window, top_k=top_k, backend="triton"
                ),
                [*rows(width, width, width), sigma],
            )
    for width, value_width in ((24, 16), (64, 64)):  # tiles of packed calls pass through registers on their way to a product
        ends = torch.tensor([0, 25, 4096], dtype=torch.int32)
        yield (
            f"packed krause {width} {value_width}",
            lambda q, k, v, sigma, ends=ends: nf.krause_attention(
                q, k, v, sigma, nf.SlidingWindow(30, 3), cu_seqlens=ends, backend="triton"
            ),
            [*rows(width, width, value_width), torch.full((2,), 2.0)],
        )
        yield (
            f"packed affine {width} {value_width}",
            lambda *t, ends=ends: nf.affine_attention(*t, causal=True, cu_seqlens=ends, backend="triton"),
            [*rows(width, width, value_width), torch.empty(1, 2, 4096), torch.empty(1, 2, 4096)],
        )
    for what, dtype, width, keys, top_k in (  # those that take the compiler longest
        ("selection", torch.float32, 64, 256, 96),
        ("selection", torch.float32, 256, 1024, 96),
        ("selection", torch.bfloat16, 64, 256, 96),
        ("gradients", torch.float32, 256, 64, None),
    ):
        yield (
            f"longest krause {what} {dtype} {width} {keys}",
            lambda q, k, v, sigma, keys=keys, top_k=top_k: nf.krause_attention(
                q, k, v, sigma, nf.SlidingWindow(keys - 1), top_k=top_k, backend="triton"
            ),
            [*(x.to(dtype) for x in rows(width, width, width)), torch.full((2,), 2.0)],
        )
    yield (
        "longest synchronization selection",
        lambda *t: nf.synchronization_attention(*t, top_k=96, backend="triton"),
        [*(torch.empty(1, 2, 1024, 256) for _ in range(2)), torch.ones(2), torch.ones(2), torch.ones(1, 2)],
    )
    for factors, width, causal in (
        ((64,), 64, True), ((64,), 64, False), ((128,), 128, False),
        ((16, 16), 64, True), ((16, 16), 64, False), ((64, 64), 128, False),
    ):
        count = len(factors)
        yield (
            f"hadamard {factors} {width} {'causal' if causal else 'full'}",
            lambda *t, count=count, causal=causal: nf.hadamard_attention(
                t[:count], t[count:-1], t[-1], causal=causal, backend="triton"
            ),
            rows(*factors, *factors, width),
        )
    for width, dtype in ((64, torch.bfloat16), (128, torch.bfloat16), (64, torch.float32)):  # float32 has float64 sums
        yield (
            f"affine {width} causal {dtype}",
            lambda *t: nf.affine_attention(*t, causal=True, backend="triton"),
            [*(x.to(dtype) for x in rows(width, width, width)), torch.empty(1, 2, 4096), torch.empty(1, 2, 4096)],
        )
    for width in (64, 128):
        for causal in (False, True):
            yield (
                f"synchronization {width} {'causal' if causal else 'full'}",
                lambda *t, causal=causal: nf.synchronization_attention(*t, causal=causal, backend="triton"),
                [*rows(width, width), torch.ones(2), torch.ones(2), torch.ones((1, 2, 4096) if causal else (1, 2))],
            )
        yield (
            f"statistics {width} causal",
            lambda q, k: sum(nf.attention_statistics(q, k, causal=True, backend="triton")[:2]),
            rows(width, width),
        )
        for sigma in (None, 2.0):
            yield (
                f"geometry {width} sigma {sigma}",
                lambda *t, sigma=sigma: nf.selection_geometry(*t, 4, causal=True, sigma=sigma, backend="triton") and None,
                rows(width, width, width),
            )
    yield (
        "statistics 128 by distance",
        lambda q, k, sigma: sum(nf.attention_statistics(q, k, causal=True, sigma=sigma, backend="triton")[:2]),
        [*rows(128, 128), torch.full((2,), 2.0)],
    )


if __name__ == "__main__":
    found = []
    for what, function, tensors in (call for call in calls() if call[0].startswith(sys.argv[1])):
        for launch, arguments in captured(function, tensors):
            compiled = compile_launch(launch, arguments)
            products, buffers = pending_products(compiled.asm["ttgir"])
            found.append({"call": what, "kernel": launch._kernel.__name__, "stages": launch._options["num_stages"],
                          "shared": compiled.metadata.shared, "products": products, "buffers": buffers,
                          "instructions": compiled.asm["ptx"].count(";\n"),
                          "unwritten": unwritten_reads(compiled.asm["cubin"]) if "packed" in what else []})
    json.dump(found, sys.stdout)
