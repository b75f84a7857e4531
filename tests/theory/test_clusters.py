"""nf.theory.krause_particles: bounded confidence makes clusters, its absence consensus."""

import math

import pytest
import torch
import torch.nn.functional as F

import nearfar as nf
from nearfar.theory.clusters import krause_weights

theory = nf.theory


def particles(systems=2, count=12, width=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(systems, count, width, generator=generator, dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("radius, top_k", [(None, None), (0.9, None), (None, 4), (0.9, 4)])
def test_a_step_is_that_of_loops_over_particles(radius, top_k):
    x = particles(systems=1)
    expected = []
    for i, own in enumerate(x[0]):
        by_distance = sorted((math.dist(own, other), j) for j, other in enumerate(x[0]))[:top_k]
        chosen = [(d, j) for d, j in by_distance if radius is None or d <= radius]
        assert chosen[0][1] == i
        weights = [math.exp(-d * d / (2 * 0.7**2)) for d, _ in chosen]
        y = sum(w * x[0, j] for w, (_, j) in zip(weights, chosen, strict=True)) / sum(weights)
        moved = own + 0.3 * (y - (y @ own) * own)
        expected.append(moved / moved.norm())
    options = {"sigma": 0.7, "radius": radius, "top_k": top_k, "step_size": 0.3}
    found = theory.krause_particles(x, [0, 1], **options)
    torch.testing.assert_close(found.x[1, 0], torch.stack(expected))
    assert torch.equal(found.x[0], x)
    flat = theory.krause_particles(x, [1], sphere=False, **options)
    weights = krause_weights(x, 0.7, radius, top_k)
    torch.testing.assert_close(flat.x[0], 0.7 * x + 0.3 * weights @ x)


@pytest.mark.parametrize("top_k", [None, 4])
def test_weights_are_those_of_krause_attention(top_k):
    x = particles()
    values = torch.eye(x.shape[1], dtype=x.dtype).expand(2, 1, -1, -1)
    attention = nf.krause_attention(x[:, None], x[:, None], values, 0.7, top_k=top_k, backend="reference")
    torch.testing.assert_close(krause_weights(x, 0.7, None, top_k), attention[:, 0])


def test_on_the_sphere_weights_without_a_bound_are_those_of_softmax():
    x = particles()
    torch.testing.assert_close(krause_weights(x, 0.7), (x @ x.mT / 0.7**2).softmax(-1))


@pytest.mark.parametrize("width", [2, 3])
def test_without_a_bound_a_half_sphere_comes_to_consensus(width):
    x = particles(width=width)
    x[..., 0] = x[..., 0].abs()
    flow = theory.krause_particles(x, [0, 100, 2000], sigma=0.7)
    assert theory.count_clusters(flow.x[-1], 1e-3).tolist() == [1, 1]
    diameters = torch.cdist(flow.x, flow.x).amax((-2, -1))
    assert (diameters.diff(dim=0) < 0).all() and diameters[-1].max() < 1e-6


@pytest.mark.parametrize("sphere", [True, False])
def test_groups_out_of_reach_of_each_other_never_meet(sphere):
    angles = torch.tensor([[0.0, 0.1, 0.3, 2.0, 2.2, 2.3]], dtype=torch.float64)
    x = torch.stack((angles.cos(), angles.sin()), -1)
    flow = theory.krause_particles(x, [0, 2000], radius=0.5, sphere=sphere)
    assert theory.count_clusters(flow.x, 1e-6)[:, 0].tolist() == [6, 2]
    alone = theory.krause_particles(x[:, :3], [2000], radius=0.5, sphere=sphere)
    torch.testing.assert_close(flow.x[-1, :, :3], alone.x[0])
    together = theory.krause_particles(x, [2000], sphere=sphere)
    assert theory.count_clusters(together.x[0], 1e-3).tolist() == [1]


def test_equal_weights_keep_the_order_of_opinions():
    """Hegselmann and Krause's model on a line, where every opinion in reach counts alike."""
    x = torch.rand(3, 40, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64).sort(1).values
    flow = theory.krause_particles(x, [0, 1, 10, 1000], sigma=1e6, radius=0.1, sphere=False, step_size=1.0)
    assert (flow.x.diff(dim=2) >= -1e-9).all()  # rounding of equal opinions
    counts = theory.count_clusters(flow.x[-1], 1e-6)
    assert (counts > 1).all() and (counts < 10).all()
    gaps = flow.x[-1].diff(dim=1)
    assert ((gaps < 1e-6) | (gaps > 0.1)).all()  # clusters end out of each other's reach


def test_rotations_rotate_the_trajectory():
    x = particles()
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    options = {"radius": 1.0, "sigma": 0.5}
    turned = theory.krause_particles(x @ rotation, [50], **options)
    torch.testing.assert_close(turned.x, theory.krause_particles(x, [50], **options).x @ rotation)


def test_clusters_are_connected_components():
    chain = torch.tensor([[0.0], [1], [2], [5], [6], [9]])
    assert theory.count_clusters(chain, 1).item() == 3
    assert theory.count_clusters(chain, 0).item() == 6
    assert theory.count_clusters(chain, 3).item() == 1
    assert theory.count_clusters(torch.stack((chain, 0 * chain)), 1).tolist() == [3, 1]


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.zeros(3, 2)}, ValueError, "x must be"),
        ({"x": torch.zeros(1, 3, 2, dtype=torch.int64)}, TypeError, "x must be floating"),
        ({"x": torch.zeros(1, 3, 2)}, ValueError, "norm 1"),
        ({"sigma": 0.0}, ValueError, "sigma must be positive"),
        ({"radius": -1.0}, ValueError, "radius must be positive"),
        ({"top_k": 0}, ValueError, "top_k must be"),
        ({"step_size": 1.5}, ValueError, "step_size must be"),
        ({"steps": [3, 1]}, ValueError, "steps must be"),
    ],
)
def test_particles_refuse(change, error, message):
    arguments = {"x": particles(), "steps": [1]} | change
    with pytest.raises(error, match=message):
        theory.krause_particles(**arguments)


@pytest.mark.parametrize("x, distance, message", [(torch.zeros(3), 1, "x must be"), (torch.zeros(3, 1), -1, "negative")])
def test_counting_refuses(x, distance, message):
    with pytest.raises(ValueError, match=message):
        theory.count_clusters(x, distance)
