"""Bootstrap intervals of means, for the few texts or seeds that a measurement has."""

from typing import NamedTuple

import torch


class Interval(NamedTuple):
    """A mean and the bounds of its interval, each of the shape of the values without their last dimension."""

    low: torch.Tensor
    mean: torch.Tensor
    high: torch.Tensor


def bootstrap(values: torch.Tensor, *, confidence: float = 0.95, count: int = 1000, seed: int = 0) -> Interval:
    """Percentile bootstrap interval of the mean over the last dimension.

    Source: B. Efron, "Bootstrap methods: another look at the jackknife", 1979. All rows are resampled with the same draws, so
    that intervals of several quantities of one sample move together. Texts or seeds may be resampled, not the queries of a
    text: they depend on each other.

    Args:
        values: (.., n), n at least 2, floating.
        confidence: of the interval, above 0 and below 1.
        count: how many times to resample, at least 1. It allocates count times values.
        seed: of the draws.

    Returns:
        Interval: low, mean and high, each (..), in the dtype of values.

    Raises:
        TypeError: values is no floating-point tensor.
        ValueError: there are fewer than two values, or confidence or count is out of range.
    """
    if not isinstance(values, torch.Tensor) or not values.is_floating_point():
        raise TypeError("values must be a floating-point tensor")
    if not values.dim() or values.shape[-1] < 2:
        raise ValueError(f"values must have at least 2 numbers along their last dimension, got shape {tuple(values.shape)}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    size = values.shape[-1]
    draws = torch.randint(size, (count, size), generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    means = values[..., draws.to(values.device)].mean(-1)
    tail = (1 - confidence) / 2
    return Interval(means.quantile(tail, -1), values.mean(-1), means.quantile(1 - tail, -1))
