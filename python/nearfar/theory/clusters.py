"""Particles that attend to near ones, in the plane or on a sphere: clusters with bounded confidence, consensus without."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from nearfar.runtime.checks import require


class KrauseParticles(NamedTuple):
    """Trajectories of B systems at T recorded steps."""

    steps: torch.Tensor  # (T,) int64 steps taken
    x: torch.Tensor  # (T, B, N, d)


def _distances(x: torch.Tensor) -> torch.Tensor:
    """(.., N, N), from differences: by products, equal particles would be apart."""
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")


def krause_weights(
    x: torch.Tensor, sigma: float, radius: float | None = None, top_k: int | None = None
) -> torch.Tensor:
    """(.., N, N) weights of Krause attention with q = k = x (.., N, d), arXiv 2602.11534.

    w_ij is the softmax over j of -|x_i - x_j|^2 / (2 sigma^2). Only the top_k nearest j take part (of equally near ones the
    smaller j), and of these only those within `radius`.
    """
    distance = _distances(x)
    scores = -(distance**2) / (2 * sigma**2)
    if top_k is not None:
        nearest = distance.sort(dim=-1, stable=True).indices[..., :top_k]
        scores = torch.full_like(scores, -torch.inf).scatter(-1, nearest, scores.gather(-1, nearest))
    if radius is not None:
        scores = scores.masked_fill(distance > radius, -torch.inf)
    return scores.softmax(-1)


@torch.no_grad()
def krause_particles(
    x: torch.Tensor,
    steps: Sequence[int] | torch.Tensor,
    *,
    sigma: float = 1.0,
    radius: float | None = None,
    top_k: int | None = None,
    sphere: bool = True,
    step_size: float = 0.1,
) -> KrauseParticles:
    """Move particles towards what they attend to, with the weights of Krause attention (arXiv 2602.11534) and q = k = v = x.

        y_i = sum_j w_ij x_j
        in space:      x_i <- x_i + step_size (y_i - x_i)
        on the sphere: x_i <- normalize(x_i + step_size (y_i - (y_i . x_i) x_i))

    The radius is Hegselmann's and Krause's bound of confidence. On the unit sphere |x_i - x_j|^2 = 2 - 2 x_i . x_j, so without
    a radius and top_k the weights are those of softmax attention with scores x_i . x_j / sigma^2: what tells the two apart
    there is who takes part, not the distance.

    Args:
        x: (B, N, d) floating, initial positions; of norm 1 with sphere. It is not modified.
        steps: when to record, increasing, 0 for the start; the run ends with the last (`log_spaced`).
        sigma: bandwidth, positive.
        radius: distance beyond which particles do not see each other, positive; None for no bound.
        top_k: how many nearest particles one sees, itself among them; None for all.
        sphere: whether particles stay on the unit sphere.
        step_size: above 0 and at most 1.

    Returns:
        KrauseParticles.

    Raises:
        ValueError: shapes, steps or numbers do not fit, or with sphere a norm is not 1.
        TypeError: x is not floating.
    """
    require(x.ndim == 3, f"x must be (B, N, d), got {tuple(x.shape)}")
    require(x.is_floating_point(), f"x must be floating, got {x.dtype}", TypeError)
    for name, number in (("sigma", sigma), ("radius", radius)):
        require(number is None or number > 0, f"{name} must be positive, got {number}")
    require(top_k is None or top_k >= 1, f"top_k must be at least 1, got {top_k}")
    require(0 < step_size <= 1, f"step_size must be above 0 and at most 1, got {step_size}")
    steps = torch.as_tensor(steps)
    require(
        steps.dtype == torch.int64 and steps.ndim == 1 and bool((steps.diff(prepend=steps.new_tensor([-1])) > 0).all()),
        "steps must be a sequence of increasing integers, 0 or more",
    )
    norms = torch.linalg.vector_norm(x, dim=-1)
    require(not sphere or bool(((norms - 1).abs() < 1e-3).all()), "x must have rows of norm 1 on the sphere")

    records, taken = [], 0
    for step in steps.tolist():
        for _ in range(step - taken):
            y = krause_weights(x, sigma, radius, top_k) @ x
            if sphere:
                x = F.normalize(x + step_size * (y - (y * x).sum(-1, keepdim=True) * x), dim=-1)
            else:
                x = x + step_size * (y - x)
        taken = step
        records.append(x)
    return KrauseParticles(steps, torch.stack(records) if records else x.new_empty(0, *x.shape))


def count_clusters(x: torch.Tensor, distance: float) -> torch.Tensor:
    """(..) int64 numbers of clusters of particles x (.., N, d): sets that chains of steps of at most `distance` connect.

    Raises ValueError if distance is negative or x has fewer than two dimensions.
    """
    require(x.ndim >= 2, f"x must be (.., N, d), got {tuple(x.shape)}")
    require(distance >= 0, f"distance must not be negative, got {distance}")
    near = _distances(x) <= distance
    own = torch.arange(x.shape[-2], device=x.device)
    labels = own.expand(x.shape[:-1])
    while True:  # each particle takes the smallest label in reach, until none changes
        smallest = torch.where(near, labels[..., None, :], x.shape[-2]).amin(-1)
        if torch.equal(smallest, labels):
            return (labels == own).sum(-1)
        labels = smallest
