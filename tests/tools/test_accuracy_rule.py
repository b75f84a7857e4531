"""The rule of accuracy of harness.py accepts the float32 formula rounded once, and refuses bugs of a few percent.

No kernel runs here: a bug is planted in the plain formula of tests/samples, or in its results, and those are judged.
"""

import pytest
import torch
from harness import Sample, accumulation, as_tuple, randn
from samples import affine, krause, linear, synchronization

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def rounded(results, sample):
    """What a kernel would return: outputs in the dtype of v, gradients in those of their tensors."""
    o, gradients = results
    dtype = sample.tensors["v"].dtype
    first, *rest = as_tuple(o)
    o = (first.to(dtype), *rest) if rest else first.to(dtype)
    return o, {name: gradient.to(sample.tensors[name].dtype) for name, gradient in gradients.items()}


class Krause:
    oracle, name = krause, "causal window"

    @classmethod
    def make(cls, dtype):
        return krause.make(cls.name, dtype, device="cpu", length=60)

    @staticmethod
    def do(sample):
        q, v = sample.tensors["q"], sample.tensors["v"]
        return randn(*q.shape[:3], v.shape[3], dtype=q.dtype, seed=1, device="cpu")

    @staticmethod
    def results(sample, do):
        return krause.evaluate(krause.plain, sample, krause.best(sample), do, accumulation(do.dtype))

    @staticmethod
    def check(sample, do, o, gradients):
        krause.check(sample, do, o, gradients, krause.best(sample))


class Softmax(Krause):
    oracle = affine

    @staticmethod
    def make(dtype):
        sample = affine.make("affine, two-sided window, sink", dtype, device="cpu", length=60)
        return Sample({n: t for n, t in sample.tensors.items() if n not in ("alpha", "beta")}, sample.options)

    @staticmethod
    def results(sample, do):
        return affine.evaluate(affine.plain, sample, do, accumulation(do.dtype))

    @staticmethod
    def check(sample, do, o, gradients):
        affine.check(sample, do, o, gradients)


class Affine(Softmax):
    @staticmethod
    def make(dtype):
        return affine.make("affine, two-sided window, sink", dtype, device="cpu", length=60)


class Linear(Krause):
    oracle = linear

    @staticmethod
    def make(dtype):
        sample = linear.make("elu, grouped heads", dtype, device="cpu", length=60)
        return Sample(sample.tensors, {**sample.options, "eps": 50.0})

    @staticmethod
    def results(sample, do):
        tensors = linear.in_dtype(sample.tensors, accumulation(do.dtype))
        o = linear.attend(tensors, sample.options)
        return o.detach(), linear.gradients_of(o, tensors, do.to(o.dtype))

    @staticmethod
    def check(sample, do, o, gradients):
        linear.check(sample, do, o, gradients)


class Synchronization(Krause):
    oracle = synchronization

    @staticmethod
    def make(dtype):
        return synchronization.make("separate queries, grouped heads", dtype, device="cpu", length=40)

    @staticmethod
    def do(sample):
        omega, v = sample.tensors["omega"], sample.tensors["v"]
        return randn(*omega.shape[:3], v.shape[3], dtype=omega.dtype, seed=1, device="cpu")

    @staticmethod
    def results(sample, do):
        return synchronization.evaluate(sample, accumulation(do.dtype), synchronization.products, do)[:2]

    @staticmethod
    def check(sample, do, o, gradients):
        synchronization.check(sample, do, o, gradients)


CASES = [Krause, Softmax, Affine, Linear, Synchronization]


@each_dtype
@pytest.mark.parametrize("case", CASES)
def test_the_formula_in_float32_is_accepted(case, dtype):
    sample = case.make(dtype)
    do = case.do(sample)
    case.check(sample, do, *rounded(case.results(sample, do), sample))


# ------------------------------------------------------------------------------------------------- bugs in the formula


def one_key_too_many(visible):
    """One more key at the left edge of the window."""

    def wrong(sample):
        mask = visible(sample)
        return mask | torch.cat((mask[..., 1:], mask[..., -1:]), -1)

    return wrong


def last_key_ignored(visible):
    def wrong(*arguments):
        mask = visible(*arguments).clone()
        mask[:, -1] = False
        return mask

    return wrong


def heads_swapped(to_query_heads):
    """The first two query heads read each other's keys: of one group and the next."""

    def wrong(q, kv):
        heads = to_query_heads(q, kv)
        order = torch.arange(heads.shape[1])
        order[[0, -1]] = order[[-1, 0]]
        return heads[:, order]

    return wrong


def sees(case, sample, do, o, gradients):
    with pytest.raises(AssertionError, match="times what is allowed"):
        case.check(sample, do, *rounded((o, gradients), sample))


def planted(case, sample, do, monkeypatch, name, wrap):
    """The results of the formula with one function of the oracle's module wrapped."""
    with monkeypatch.context() as patch:
        patch.setattr(case.oracle, name, wrap(getattr(case.oracle, name)))
        return case.results(sample, do)


FORMULA_BUGS = [  # where, the function of the oracle's module, how it is wrapped
    pytest.param(Krause, "best", one_key_too_many, id="Krause: key too many"),
    pytest.param(Softmax, "visible", one_key_too_many, id="Softmax: key too many"),
    pytest.param(Affine, "visible", one_key_too_many, id="Affine: key too many"),
    pytest.param(Krause, "to_query_heads", heads_swapped, id="Krause: heads swapped"),
    pytest.param(Softmax, "to_query_heads", heads_swapped, id="Softmax: heads swapped"),
    pytest.param(Linear, "to_query_heads", heads_swapped, id="Linear: heads swapped"),
    pytest.param(Softmax, "visible", last_key_ignored, id="Softmax: last key"),
    pytest.param(Linear, "visible", last_key_ignored, id="Linear: last key"),
    pytest.param(Synchronization, "visible", last_key_ignored, id="Synchronization: last key"),
]


@each_dtype
@pytest.mark.parametrize("case, function, bug", FORMULA_BUGS)
def test_bugs_in_the_formula_are_seen(case, function, bug, dtype, monkeypatch):
    sample = case.make(dtype)
    do = case.do(sample)
    o, gradients = planted(case, sample, do, monkeypatch, function, bug)
    exact_o, exact = case.results(sample, do)
    sees(case, sample, do, o, exact)  # in the output alone, and
    sees(case, sample, do, exact_o, gradients)  # in the gradients alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["output", "gradient of v"])
def test_weights_rounded_to_bfloat16_are_seen(backward, dtype, monkeypatch):
    sample = Krause.make(dtype)
    do = Krause.do(sample)
    o, gradients = Krause.results(sample, do)
    q, k, v, sigma = (t.detach().to(torch.float32) for t in sample.tensors.values())
    weight = krause.weights(krause.scores(q, k, sigma), krause.best(sample)).bfloat16().float()
    if backward:
        gradients["v"] = (weight.mT @ do.float()).unflatten(1, (v.shape[1], -1)).sum(2)
    else:
        o = weight @ krause.to_query_heads(q, v)
    sees(Krause, sample, do, o, gradients)


@each_dtype
@pytest.mark.parametrize(
    "case, change",
    [
        (Linear, lambda sample: {"eps": 100.0}),
        (Softmax, lambda sample: {"scale": 1.02 * sample.tensors["q"].shape[-1] ** -0.5}),
    ],
    ids=["eps of the normaliser doubled", "scale off by 2%"],
)
def test_bugs_in_options_are_seen(case, change, dtype):
    sample = case.make(dtype)
    do = case.do(sample)
    o, gradients = case.results(Sample(sample.tensors, {**sample.options, **change(sample)}), do)
    exact_o, exact = case.results(sample, do)
    sees(case, sample, do, o, exact)
    sees(case, sample, do, exact_o, gradients)


# -------------------------------------------------------------------------------------------------- bugs in the results


def one_row_of_a_tile(tensor):
    """The 17th row is that of its neighbour."""
    wrong = tensor.clone()
    wrong[..., 16, :] = tensor[..., 17, :]
    return wrong


RESULT_BUGS = {
    "one row of a tile": (CASES, None, one_row_of_a_tile),
    "alpha's gradient by 1.02": ([Affine], "alpha", lambda g: 1.02 * g),
    "gradient of the order by 1.02": ([Synchronization], "order", lambda g: 1.02 * g),
    "gradient of the coupling by 1.02": ([Synchronization], "coupling", lambda g: 1.02 * g),
    "gradient of the sink by 1.02": ([Softmax], "sink", lambda g: 1.02 * g),
    "gradient of sigma by 1.02": ([Krause], "sigma", lambda g: 1.02 * g),
}


@each_dtype
@pytest.mark.parametrize("case, name, bug", [
    pytest.param(case, name, bug, id=f"{case.__name__}: {what}")
    for what, (cases, name, bug) in RESULT_BUGS.items() for case in cases
])
def test_bugs_in_results_are_seen(case, name, bug, dtype):
    sample = case.make(dtype)
    do = case.do(sample)
    o, gradients = case.results(sample, do)
    if name is None:
        sees(case, sample, do, bug(o), gradients)
    else:
        sees(case, sample, do, o, {**gradients, name: bug(gradients[name])})


def pairs(sample, do):
    """(dS, scores, weights, q, keys, sigma) of Krause attention's backward in float32, by pairs."""
    q, k, v, sigma = (t.detach().float() for t in sample.tensors.values())
    score = krause.scores(q, k, sigma)
    weight = krause.weights(score, krause.best(sample))
    dp = do.float() @ krause.to_query_heads(q, v).mT
    return weight * (dp - (weight * dp).sum(-1, keepdim=True)), score, q, krause.to_query_heads(q, k), sigma


@each_dtype
def test_a_missing_term_of_a_gradient_is_seen(dtype):
    """dk_j = (sum_i dS_ij q_i - k_j sum_i dS_ij) / sigma^2 without its second term; dsigma without the pairs of one row."""
    sample = Krause.make(dtype)
    do = Krause.do(sample)
    o, gradients = Krause.results(sample, do)
    ds, score, q, keys, sigma = pairs(sample, do)
    by_head = krause.by_head(sigma, q.shape[1])
    heads = sample.tensors["k"].shape[1]

    def dk(weight_of_second):
        per_head = (ds.mT @ q - weight_of_second * ds.sum(2)[..., None] * keys) / by_head.square()
        return per_head.unflatten(1, (heads, -1)).sum(2)

    def dsigma(rows):
        return -2 * (ds * torch.where(ds == 0, 0, score))[:, :, rows].sum((0, 2, 3)) / sigma

    Krause.check(sample, do, *rounded((o, {**gradients, "k": dk(1), "sigma": dsigma(slice(None))}), sample))
    sees(Krause, sample, do, o, {**gradients, "k": dk(0)})
    sees(Krause, sample, do, o, {**gradients, "k": dk(0.98)})
    sees(Krause, sample, do, o, {**gradients, "sigma": dsigma(slice(None, -1))})


@each_dtype
def test_a_query_head_missing_in_dv_is_seen(dtype):
    sample = Softmax.make(dtype)
    do = Softmax.do(sample)
    o, gradients = Softmax.results(sample, do)
    without = do.clone()
    without[:, -1] = 0
    sees(Softmax, sample, do, o, {**gradients, "v": Softmax.results(sample, without)[1]["v"]})
