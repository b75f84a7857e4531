"""Gradient flow of a value matrix and the logits of its weights (arXiv 2603.06248): V and a of L(V s(a)) trained together."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from nearfar.runtime.checks import require


class ValueSoftmax(NamedTuple):
    """Batch of B value-softmax models; the loss is a function of z = v @ s(a)."""

    v: torch.Tensor  # (B, d, n) values, a column a token
    a: torch.Tensor  # (B, n) logits of the weights s(a)
    beta: torch.Tensor  # (B, d) target: a direction, a point or a distribution, depending on the loss


class ValueSoftmaxFlow(NamedTuple):
    """Trajectories at T recorded steps of B models."""

    steps: torch.Tensor  # (T,) int64 Euler steps taken; times the step size, the time of the flow
    v: torch.Tensor  # (T, B, d, n)
    a: torch.Tensor  # (T, B, n)
    weights: torch.Tensor  # (T, B, n) s(a); they sum to 1, except with "sigmoid"
    entropy: torch.Tensor  # (T, B) in nats, of the weights divided by their sum
    loss: torch.Tensor  # (T, B)

    @property
    def effective_support(self) -> torch.Tensor:
        """exp(entropy), (T, B): from 1 (one token has all weight) to n (equal weights)."""
        return self.entropy.exp()


class Differentiable(NamedTuple):
    """A loss or a normaliser with its gradient."""

    value: Callable[..., torch.Tensor]
    gradient: Callable[..., torch.Tensor]  # of a loss: (z, beta) -> dL/dz; of a normaliser: (a, s, dL/ds) -> dL/da


LOSSES = {
    "logistic": Differentiable(
        lambda z, beta: F.softplus(-(z * beta).sum(-1)),
        lambda z, beta: -(z * beta).sum(-1, keepdim=True).neg_().sigmoid_() * beta,
    ),
    "square": Differentiable(
        lambda z, beta: (z - beta).square().sum(-1) / 2,
        lambda z, beta: z - beta,
    ),
    "cross_entropy": Differentiable(
        lambda z, beta: z.logsumexp(-1) * beta.sum(-1) - (z * beta).sum(-1),
        lambda z, beta: z.softmax(-1) * beta.sum(-1, keepdim=True) - beta,
    ),
}


def centred(s: torch.Tensor, ds: torch.Tensor) -> torch.Tensor:
    """dL/ds minus its mean under s, the part that reaches a through a normaliser with sum(s) = 1."""
    return ds - (s * ds).sum(-1, keepdim=True)


NORMALISERS = {
    "softmax": Differentiable(lambda a: a.softmax(-1), lambda a, s, ds: s * centred(s, ds)),
    "l1": Differentiable(
        lambda a: a.abs() / a.abs().sum(-1, keepdim=True),
        lambda a, s, ds: centred(s, ds) * a.sign() / a.abs().sum(-1, keepdim=True),
    ),
    "square": Differentiable(
        lambda a: a.square() / a.square().sum(-1, keepdim=True),
        lambda a, s, ds: centred(s, ds) * a * (2 / a.square().sum(-1, keepdim=True)),
    ),
    "relu": Differentiable(
        lambda a: a.relu() / a.relu().sum(-1, keepdim=True),
        lambda a, s, ds: centred(s, ds) * (a > 0) / a.relu().sum(-1, keepdim=True),
    ),
    "sigmoid": Differentiable(torch.sigmoid, lambda a, s, ds: ds * s * (1 - s)),
}


def draw_value_softmax(
    models: int,
    n: int = 8,
    d: int = 8,
    *,
    beta: torch.Tensor | None = None,
    value_std: float = 0.1,
    logit_mean: float = 0.0,
    logit_std: float = 0.0,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
) -> ValueSoftmax:
    """Initial values as in the paper's experiments: V_0 = value_std N(0, 1), a_0 = logit_mean + logit_std N(0, 1).

    models:     B, how many independent draws; n tokens, values d wide
    beta:       (d,) or (B, d) target; None draws directions uniformly from the unit sphere
    generator:  torch.Generator, on whose device the tensors are made; None takes torch's own, on the CPU

    Returns a ValueSoftmax. The normalisers "l1", "square" and "relu" cannot start from a = 0: the paper's code takes logit_mean
    = 1 and logit_std = 0.1 for them. "cross_entropy" requires a distribution as beta.
    """
    options: dict[str, Any] = {"generator": generator, "dtype": dtype, "device": generator.device if generator else "cpu"}
    v = value_std * torch.randn(models, d, n, **options)
    a = logit_mean + logit_std * torch.randn(models, n, **options)
    if beta is None:
        return ValueSoftmax(v, a, F.normalize(torch.randn(models, d, **options), dim=-1))
    require(beta.shape in ((d,), (models, d)), f"beta must be ({d},) or ({models}, {d}), got {tuple(beta.shape)}")
    return ValueSoftmax(v, a, beta.to(v).expand(models, d))


def log_spaced(last: int, count: int = 100) -> list[int]:
    """0 and at most `count` different integers from 1 to `last`, evenly spaced on a logarithmic scale; [0] if last is 0."""
    require(last >= 0, f"last must be a number of steps, 0 or more, got {last}")
    require(count >= 1, f"count must be at least 1, got {count}")
    if not last:
        return [0]
    return [0, *torch.logspace(0, math.log10(last), count, dtype=torch.float64).round().long().unique().tolist()]


def value_softmax_flow(
    initial: ValueSoftmax,
    steps: Sequence[int] | torch.Tensor,
    *,
    loss: str = "logistic",
    normaliser: str = "softmax",
    step_size: float = 0.1,
    on_record: Callable[[int], object] | None = None,
) -> ValueSoftmaxFlow:
    """Gradient flow of L(V s(a)) in V and a by explicit Euler steps, arXiv 2603.06248, Section 3.

        z = V s(a);   V' = -grad L(z) s^T;   a' = -(ds/da)^T V^T grad L(z)

    initial:     ValueSoftmax of B models, any floating dtype and device (draw_value_softmax); it is not modified
    steps:       numbers of steps to record at, increasing, 0 for the start; the run ends with the last (log_spaced)
    loss:        "logistic"       log(1 + exp(-beta . z))
                 "square"         |z - beta|^2 / 2
                 "cross_entropy"  -sum_c beta_c log softmax(z)_c
    normaliser:  "softmax"; "l1" |a| / sum |a|; "square" a^2 / sum a^2; "relu" max(a, 0) / sum max(a, 0);
                 "sigmoid" 1 / (1 + exp(-a)), which is not normalised
    step_size:   time of a step
    on_record:   called with the number of steps after each record, for a progress bar

    Returns a ValueSoftmaxFlow. Conserved: under softmax the sum of a; under "l1", "square" and "relu" the norm of a, up to the
    step size; under the logistic loss the part of V orthogonal to beta, under cross-entropy the column sums of V. Raises
    ValueError for names, steps or shapes that do not fit, and if a normaliser would divide by 0 at the start.
    """
    v, a, beta = initial
    require(loss in LOSSES, f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    require(normaliser in NORMALISERS, f"normaliser must be one of {', '.join(NORMALISERS)}, got {normaliser!r}")
    require(step_size > 0, f"step_size must be positive, got {step_size}")
    steps = torch.as_tensor(steps)
    require(
        steps.dtype == torch.int64 and steps.ndim == 1 and bool((steps.diff(prepend=steps.new_tensor([-1])) > 0).all()),
        "steps must be a sequence of increasing integers, 0 or more",
    )
    require(
        v.ndim == 3 and a.shape == (v.shape[0], v.shape[2]) and beta.shape == v.shape[:2],
        f"initial must be v (B, d, n), a (B, n) and beta (B, d), got {[tuple(part.shape) for part in initial]}",
    )
    value, derivative = NORMALISERS[normaliser]
    require(bool(value(a).isfinite().all()), f"initial.a must not sum to 0 under normaliser={normaliser!r}")

    gradient, records, taken = LOSSES[loss].gradient, [], 0
    with torch.inference_mode():  # a quarter faster than no_grad: a step is a dozen small operations
        v, a = v.clone(), a.clone()
        for step in steps.tolist():
            for _ in range(step - taken):
                s = value(a)
                dz = gradient((v @ s[:, :, None]).squeeze(2), beta)[:, :, None]
                ds = (dz.mT @ v).squeeze(1)
                v.baddbmm_(dz, s[:, None], alpha=-step_size)
                a.sub_(derivative(a, s, ds), alpha=step_size)
            taken = step
            records.append((v.clone(), a.clone()))
            if on_record is not None:
                on_record(step)
    v, a = map(torch.stack, zip(*records, strict=True))
    weights = value(a)
    shares = F.logsigmoid(a).softmax(-1) if normaliser == "sigmoid" else weights  # sigmoids underflow, their logarithms do not
    z = (v @ weights[..., None]).squeeze(-1)
    return ValueSoftmaxFlow(steps, v, a, weights, torch.special.entr(shares).sum(-1), LOSSES[loss].value(z, beta))
