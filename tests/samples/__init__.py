"""Samples and oracle of each operator, in the file named like its room; none of it shares code with nearfar.

A file offers to the generic tests of test_operators.py:
    SAMPLES                     names of its samples
    make(name, dtype, device, length)   the Sample
    check(sample, do, o, gradients)     the rule of accuracy against the dense float64 formula
    op_arguments(sample)        positional arguments of torch.ops.nearfar.<op>
    compile_lengths(name)       lengths that one compiled graph must serve
    saved(sample, outputs)      positional arguments of its backward after `do`
"""

import importlib


def of(operator):
    return importlib.import_module(f"samples.{operator.room}")
