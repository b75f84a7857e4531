"""Every CUDA kernel on the samples of its tests, with little beside them: which prints a digest.

`make sanitize` looks at it, and a test compares the digests of fresh processes. References, which would be compared, are left
to the tests: racecheck breaks kernels of cuBLAS, and initcheck takes what these store for memory that nobody has written.
"""

import hashlib
import itertools

import conftest  # noqa: F401  lets bench be found
import torch
from harness import as_tuple, randn, run
from samples.cuda import affine, diagnostics, hadamard, krause, linear, synchronization
from samples.krause_step import FORMS, cache_before, positions_of, sample_of, step

import nearfar as nf
from nearfar import _cuda


def results(dtype):
    for options in krause.SAMPLES.values():
        o, gradients = run(nf.krause_attention, krause.cuda_sample(dtype, **options), backend="cuda")
        yield from (o, *gradients.values())
    for options in linear.SAMPLES.values() if dtype == torch.bfloat16 else ():
        sample = linear.cuda_sample(**options)
        o, gradients = run(linear.attention(sample), sample, backend="cuda")
        yield from (*as_tuple(o), *gradients.values())
    for options in hadamard.SAMPLES.values() if dtype == torch.bfloat16 else ():
        o, gradients = hadamard.run_cuda(hadamard.cuda_sample(**options))
        yield from (*as_tuple(o), *gradients.values())
    for options in FORMS.values():
        if options.get("width", 32) in _cuda.KRAUSE_WIDTHS:
            positions = positions_of(**options)
            sample = sample_of(dtype=dtype, batch=len(positions), **options)
            yield step(sample, positions, cache_before(sample, positions), "cuda")
    for options in diagnostics.SAMPLES.values():
        yield from diagnostics.everything(diagnostics.cuda_sample(dtype, **options))
    for options in affine.SAMPLES.values():
        sample = affine.cuda_sample(dtype, **options)
        o, gradients = run(affine.attention(sample), sample, backend="cuda")
        yield from (o, *gradients.values())
    for options in synchronization.SAMPLES.values():
        sample = synchronization.cuda_sample(dtype, **options)
        o, gradients = run(nf.synchronization_attention, sample, backend="cuda")
        yield from (o, *gradients.values())
    for width in (16, 64, 100, 256):
        yield _cuda.row_sumsq(randn(2, 3, 65, width, dtype=dtype))


def digest(tensors):
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.flatten().view(torch.uint8).cpu().numpy().tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    print(digest(itertools.chain(results(torch.float16), results(torch.bfloat16))))
