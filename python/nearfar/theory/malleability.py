"""Influence malleability of linearized attention (arXiv 2603.13085): does an attack change which training points matter?"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from nearfar.runtime.checks import require

# Features of queries q (.., M, D) given the training rows x (.., N, D).
FEATURES = {
    "attention": lambda q, x: F.normalize(q @ (x.mT @ x), dim=-1),  # for q = x the rows of X X^T X
    "rows": lambda q, x: q,
    "unit_rows": lambda q, x: F.normalize(q, dim=-1),
}
ATTACKS = ("fgsm", "pgd", "mim", "noise")


class InfluenceMalleability(NamedTuple):
    """Result of `influence_malleability` for R networks, N training points and T test points with C outputs."""

    malleability: torch.Tensor  # (R,) share of the most influential points whose influence changes sign, mean over test points
    rank_correlation: torch.Tensor  # (R,) Spearman's, of influences before and after, mean over test points
    influence: torch.Tensor  # (R, T, N)
    perturbed_influence: torch.Tensor  # (R, T, N)
    prediction: torch.Tensor  # (R, T, C) of the test points
    perturbed_prediction: torch.Tensor  # (R, T, C) of the same test points, after training on the perturbed points
    perturbed_x: torch.Tensor  # (R, N, D)


def neural_tangent_kernel(q: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Tangent kernel, at the initial weights, of f(x) = m^-1/2 sum_r a_r relu(w_r . x) with fixed a_r = +-1.

    From q (.., M, D), x (.., N, D) and w (.., m, D) to (.., M, N):

        K(q, x) = sum_r df(q)/dw_r . df(x)/dw_r = (q . x) / m #{r: w_r . q > 0 and w_r . x > 0}

    The signs a_r cancel. The limit for wide networks is (q . x) (pi - angle(q, x)) / (2 pi).
    """
    active_q, active_x = ((points @ w.mT > 0).to(w.dtype) for points in (q, x))
    return (active_q @ active_x.mT / w.shape[-2]) * (q @ x.mT)


def leave_one_out_influence(
    kernel: torch.Tensor, test_kernel: torch.Tensor, y: torch.Tensor, y_test: torch.Tensor, ridge: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Influence of training point i on the prediction at test point t, towards t's label, in kernel ridge regression.

        P = (K + lambda I)^-1,   alpha = P y,   f(t) - f_-i(t) = (k_t P)_i alpha_i / P_ii,   lambda = ridge * mean(diag K)

    From kernel (.., N, N), test_kernel (.., T, N), y (N, C) and y_test (T, C) to (influence (.., T, N), prediction (.., T, C),
    alpha (.., N, C)). The influence is y_test[t] . (f(t) - f_-i(t)), exact and without N fits. Only the label of i is left out:
    the features stay the same, although with attention they depend on i as a token.
    """
    damping = ridge * kernel.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] * torch.eye(kernel.shape[-1]).to(kernel)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(kernel + damping))
    alpha = inverse @ y
    weights = test_kernel @ inverse / inverse.diagonal(dim1=-2, dim2=-1)[..., None, :]
    return weights * (y_test @ alpha.mT), test_kernel @ alpha, alpha


def most_influential(influence: torch.Tensor, share: float) -> torch.Tensor:
    """Indices (.., k) of the k = max(1, round(share N)) points of largest absolute influence (.., N)."""
    return influence.abs().topk(max(1, round(share * influence.shape[-1])), dim=-1).indices


def check_attack(attack: str) -> None:
    require(attack in ATTACKS, f"attack must be one of {', '.join(ATTACKS)}, got {attack!r}")


def perturb(
    x: torch.Tensor,
    y: torch.Tensor,
    predict: Callable[[torch.Tensor], torch.Tensor],
    attack: str,
    *,
    eps: float = 0.3,
    moved: torch.Tensor | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    attack_steps: int = 10,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Move each coordinate of x (.., N, D) by at most eps, to raise the squared error of predict(x) (.., N, C) against y.

    attack:   "fgsm"  one step of eps along the sign of the gradient (arXiv 1412.6572)
              "pgd"   attack_steps steps of eps / 4 from a random start, projected (arXiv 1706.06083)
              "mim"   attack_steps steps of eps / attack_steps along the sign of the accumulated gradient (arXiv 1710.06081)
              "noise" one step of eps along random signs: no adversary, for comparison
    moved:    (.., N) bool, which points move; None for all
    bounds:   lowest and highest value of a coordinate, which x must keep to already (else ValueError)

    Raises ValueError for an unknown attack, for x outside bounds and for attack_steps below 1.
    """
    check_attack(attack)
    require(attack_steps >= 1, f"attack_steps must be at least 1, got {attack_steps}")
    inside = bool(((x >= bounds[0]) & (x <= bounds[1])).all())
    require(inside, f"x must lie inside bounds={bounds}, got values from {x.min():.3g} to {x.max():.3g}")
    reach = eps if moved is None else eps * moved[..., None].to(x.dtype)
    low, high = (x - reach).clamp(min=bounds[0]), (x + reach).clamp(max=bounds[1])

    def ascent(points: torch.Tensor) -> torch.Tensor:
        points = points.detach().requires_grad_()
        with torch.enable_grad():
            error = (predict(points) - y).square().sum()
        return torch.autograd.grad(error, points)[0]

    if attack == "fgsm":
        return (x + reach * ascent(x).sign()).clamp(low, high)
    noise = 2 * torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device) - 1
    if attack == "noise":
        return (x + reach * noise.sign()).clamp(low, high)
    points, momentum, step = x, torch.zeros_like(x), reach / attack_steps
    if attack == "pgd":
        points, step = (x + reach * noise).clamp(low, high), reach / 4
    for _ in range(attack_steps):
        direction = ascent(points)
        if attack == "mim":
            direction = momentum = momentum + F.normalize(direction, p=1, dim=-1, eps=torch.finfo(x.dtype).tiny)
        points = (points + step * direction.sign()).clamp(low, high)
    return points


def rank_correlation(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Spearman's rank correlation along the last dimension, of values without ties."""
    ranks = (values.argsort(-1).argsort(-1).to(first.dtype) for values in (first, second))
    return F.cosine_similarity(*(rank - rank.mean(-1, keepdim=True) for rank in ranks), dim=-1)  # type: ignore[misc,arg-type]


def spectral_amplification(x: torch.Tensor) -> torch.Tensor:
    """cond(G)^3 of G = X X^T on its range, (.., N, D) to (..): the condition number of the kernel G^3 of f(X) = X X^T X.

    With more points than dimensions G is singular: its range has the numerical rank of X, by torch.linalg.matrix_rank. NaN
    where X has rank 0. Raises ValueError if X has no points or no dimensions.
    """
    require(x.ndim >= 2 and x.shape[-2] > 0 and x.shape[-1] > 0, f"x must be (.., N, D), not empty, got {tuple(x.shape)}")
    values = torch.linalg.svdvals(x)
    smallest = values.gather(-1, (torch.linalg.matrix_rank(x)[..., None] - 1).clamp_min(0)).squeeze(-1)
    return (values[..., 0] / smallest) ** 6  # 0 / 0 at rank 0, where all values are 0


@torch.no_grad()
def influence_malleability(
    x: torch.Tensor,
    y: torch.Tensor,
    x_test: torch.Tensor,
    y_test: torch.Tensor,
    *,
    features: str = "attention",
    attack: str = "pgd",
    networks: int = 1,
    width: int = 1024,
    ridge: float = 1e-3,
    eps: float = 0.3,
    top: float = 0.1,
    moved: float = 0.1,
    bounds: tuple[float, float] = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> InfluenceMalleability:
    """Share of the most influential training points whose influence changes sign under an attack, arXiv 2603.13085.

    Each of `networks` random networks m^-1/2 sum_r a_r relu(w_r . x~) is trained on the points in the kernel regime. Then the
    points are attacked, and the network is trained again on the attacked points. leave_one_out_influence computes the
    influences.

    x, y:            (N, D) training points and (N, C) labels, -1 or 1; floating, of one dtype: float64 is advised
    x_test, y_test:  (T, D), (T, C); never perturbed themselves
    features:        "attention"  x~ are the l2-normalised rows of X X^T X, for test points of X_test X^T X
                     "rows"       x~ = x;   "unit_rows"  x~ = x / |x|, which tells attention from normalisation
    attack, eps, bounds:  see perturb; it raises the training error of the trained network, and through the attention
                     every point depends on every moved one
    width:           m, units of a network
    ridge:           of the regression, in units of the mean of the kernel's diagonal
    top:             share of training points that count as influential for a test point, by absolute influence
    moved:           share of training points that the attack moves: those of largest mean absolute influence; 1 for all
    generator:       torch.Generator of weights and random starts, on the device of x; None takes torch's own

    Returns an InfluenceMalleability. Raises ValueError for names, shares and shapes that do not fit.
    """
    require(features in FEATURES, f"features must be one of {', '.join(FEATURES)}, got {features!r}")
    check_attack(attack)
    for name, share in (("top", top), ("moved", moved)):
        require(0 < share <= 1, f"{name} must be a share above 0 and at most 1, got {share}")
    for name, points, labels in (("x", x, y), ("x_test", x_test, y_test)):
        require(
            points.ndim == labels.ndim == 2 and len(points) == len(labels),
            f"{name} must be (points, D) and its labels (points, C), got {tuple(points.shape)} and {tuple(labels.shape)}",
        )
    require(x.is_floating_point(), f"x must be floating, got {x.dtype}", TypeError)
    w = torch.randn(networks, width, x.shape[1], generator=generator, dtype=x.dtype, device=x.device)
    feature, x = FEATURES[features], x.expand(networks, *x.shape)

    def influences(points: torch.Tensor) -> tuple[torch.Tensor, ...]:
        trained = feature(points, points)
        kernel, test_kernel = (neural_tangent_kernel(q, trained, w) for q in (trained, feature(x_test, points)))
        return trained, *leave_one_out_influence(kernel, test_kernel, y, y_test, ridge)

    trained, influence, prediction, alpha = influences(x)
    mask = torch.zeros_like(x[..., 0], dtype=torch.bool).scatter(-1, most_influential(influence.abs().mean(-2), moved), True)
    perturbed_x = perturb(
        x,
        y,
        lambda points: neural_tangent_kernel(feature(points, points), trained, w) @ alpha,
        attack,
        eps=eps,
        moved=mask,
        bounds=bounds,
        generator=generator,
    )
    _, perturbed_influence, perturbed_prediction, _ = influences(perturbed_x)
    chosen = most_influential(influence, top)
    flipped = influence.gather(-1, chosen).sign() != perturbed_influence.gather(-1, chosen).sign()
    return InfluenceMalleability(
        flipped.to(x.dtype).mean((-2, -1)),
        rank_correlation(influence, perturbed_influence).mean(-1),
        influence,
        perturbed_influence,
        prediction,
        perturbed_prediction,
        perturbed_x,
    )
