"""Samples and oracles, in one file per operator (named as its `room` in the registry). None shares code with nearfar.

A file offers to the generic tests of test_operators.py, by the name of each operator of its room:
    SAMPLES                     its samples, by name
    FUNCTIONS                   the public function, called with the tensors of a sample by name
and for every sample:
    make(name, dtype, device, length)   the Sample
    check(sample, do, o, gradients)     the rule of accuracy against the dense float64 formula
    op_arguments(sample)        positional arguments of torch.ops.nearfar.<op>
    backward_arguments(sample, do, outputs)     those of its backward; its results are in the order of the sample's tensors
    compile_lengths(name)       lengths that one compiled graph must serve
    reach(sample)               (N, M) mask: which keys a row of the output may depend on
"""

import importlib


def of(operator):
    return importlib.import_module(f"samples.{operator.room}")


def names(operator):
    return list(of(operator).SAMPLES[operator.function.__name__])


def public(operator):
    """The public function of an operator, called with the tensors of a sample by name."""
    return of(operator).FUNCTIONS[operator.function.__name__]
