"""nf.theory against autograd, refitting, torch.func and what the papers prove."""

import math

import numpy
import pytest
import torch
import torch.nn.functional as F

import nearfar as nf
from nearfar.theory.malleability import ATTACKS, FEATURES
from nearfar.theory.polarization import LOSSES, NORMALISERS

theory = nf.theory


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small operations, and the workers of pytest-xdist share the cores
    yield
    torch.set_num_threads(threads)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(models=6, n=5, d=4, seed=0, **options):
    return theory.draw_value_softmax(models, n, d, generator=seeded(seed), **{"logit_std": 0.5, "logit_mean": 0.2} | options)


# Value-softmax flow


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_a_step_is_the_gradient_of_autograd(loss, normaliser):
    v, a, beta = initial = draw(value_std=1.0, beta=torch.tensor([0.1, 0.2, 0.3, 0.4]) if loss == "cross_entropy" else None)
    assert (a < 0).any()  # "l1", "square" and "relu" treat signs in ways of their own
    v, a = v.clone().requires_grad_(), a.clone().requires_grad_()
    s = {
        "softmax": lambda: a.softmax(-1),
        "l1": lambda: F.normalize(a.abs(), p=1, dim=-1),
        "square": lambda: F.normalize(a, dim=-1) ** 2,
        "relu": lambda: F.normalize(a.relu(), p=1, dim=-1),
        "sigmoid": a.sigmoid,
    }[normaliser]()
    z = torch.einsum("bdn,bn->bd", v, s)
    losses = {
        "logistic": lambda: torch.log(1 + torch.exp(-torch.linalg.vecdot(z, beta))),
        "square": lambda: 0.5 * torch.linalg.vector_norm(z - beta, dim=-1) ** 2,
        "cross_entropy": lambda: F.cross_entropy(z, beta, reduction="none"),
    }[loss]()
    losses.sum().backward()

    flow = theory.value_softmax_flow(initial, [0, 1], loss=loss, normaliser=normaliser, step_size=0.25)
    torch.testing.assert_close(flow.v[1] - flow.v[0], -0.25 * v.grad)
    torch.testing.assert_close(flow.a[1] - flow.a[0], -0.25 * a.grad)
    torch.testing.assert_close(flow.loss[0], losses.detach())
    torch.testing.assert_close(flow.weights[0], s.detach())
    assert a.grad.abs().max() > 1e-3 and flow.v.dtype == torch.float64


def test_records_are_those_of_one_run_and_leave_the_start_alone():
    initial = draw()
    before, seen = [part.clone() for part in initial], []
    flow = theory.value_softmax_flow(initial, [0, 3, 10], on_record=seen.append)
    for row, step in enumerate(seen):
        torch.testing.assert_close(theory.value_softmax_flow(initial, [step]).a[0], flow.a[row], rtol=0, atol=0)
    assert seen == flow.steps.tolist() == [0, 3, 10]
    assert all(torch.equal(*pair) for pair in zip(before, initial, strict=True))
    assert not flow.v.is_inference() and not flow.loss.is_inference()
    alone = theory.value_softmax_flow(theory.ValueSoftmax(*(part[2:3] for part in initial)), [10])
    torch.testing.assert_close(alone.v[:, 0], flow.v[2:, 2])


def test_entropy_and_support():
    a = torch.tensor([[0.0, 0, 0, 0], [50.0, 0, 0, 0], [50.0, 50, 0, 0]])
    start = theory.ValueSoftmax(torch.zeros(3, 2, 4), a, torch.ones(3, 2))
    softmax, sigmoid = (theory.value_softmax_flow(start, [0], normaliser=name) for name in ("softmax", "sigmoid"))
    torch.testing.assert_close(softmax.effective_support, torch.tensor([[4.0, 1, 2]]))
    shares = torch.tensor([[1, 1, 1, 1], [2, 1, 1, 1], [2, 2, 1, 1]]) / torch.tensor([[4.0], [5], [6]])  # sum to 1 again
    torch.testing.assert_close(sigmoid.entropy[0], -(shares * shares.log()).sum(-1))


@pytest.mark.parametrize("dtype, level", [(torch.float64, -800.0), (torch.float32, -120.0)])
def test_entropy_of_sigmoids_that_underflow(dtype, level):
    a = level + torch.tensor([[0.0, 0, 0, 0], [math.log(3), 0, 0, 0]], dtype=dtype)
    start = theory.ValueSoftmax(torch.zeros(2, 2, 4, dtype=dtype), a, torch.ones(2, 2, dtype=dtype))
    flow = theory.value_softmax_flow(start, [0], normaliser="sigmoid")
    shares = torch.tensor([[1, 1, 1, 1], [3, 1, 1, 1]], dtype=dtype) / torch.tensor([[4], [6]])
    assert not flow.weights.any()
    torch.testing.assert_close(flow.entropy[0], torch.special.entr(shares).sum(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_conserved_quantities(loss):
    initial = draw(value_std=1.0, beta=F.one_hot(torch.tensor(2), 4) if loss == "cross_entropy" else None)
    flow = theory.value_softmax_flow(initial, [0, 300], loss=loss)
    assert (flow.a[1] - flow.a[0]).abs().amax() > 0.05
    torch.testing.assert_close(flow.a[1].sum(-1), flow.a[0].sum(-1))
    direction = F.normalize(initial.beta, dim=-1)[..., None]
    if loss == "logistic":
        orthogonal = flow.v - direction * (direction * flow.v).sum(-2, keepdim=True)
        torch.testing.assert_close(orthogonal[1], orthogonal[0])
    if loss == "cross_entropy":
        torch.testing.assert_close(flow.v[1].sum(-2), flow.v[0].sum(-2))


@pytest.mark.parametrize("normaliser", ["l1", "square", "relu"])
def test_normalisers_that_ignore_scale_keep_the_norm_of_a(normaliser):
    initial = draw(value_std=1.0, logit_mean=1.0, logit_std=0.1)
    drift = []
    for step_size in (0.02, 0.01):
        flow = theory.value_softmax_flow(initial, [0, round(1 / step_size)], normaliser=normaliser, step_size=step_size)
        norms = flow.a.square().sum(-1)
        drift.append((norms[1] - norms[0]).abs().max().item())
    assert drift[0] < 0.02 and drift[1] == pytest.approx(drift[0] / 2, rel=0.1)  # of the order of the step


def test_logistic_loss_polarises_to_the_token_known_at_the_start():
    initial = theory.draw_value_softmax(32, generator=seeded())
    flow = theory.value_softmax_flow(initial, [0, 1_000, 10_000])
    winner = (initial.v * initial.beta[:, :, None]).sum(1).argmax(-1)
    assert torch.equal(flow.weights[-1].argmax(-1), winner)
    assert torch.allclose(flow.entropy[0], torch.tensor(math.log(8), dtype=torch.float64))
    for row, reference in ((1, 1.989), (2, 0.606)):  # one draw of the same distribution, by the authors' code
        assert flow.entropy[row].min() < reference < flow.entropy[row].max()
    assert (flow.entropy.diff(dim=0) < 0).all() and (flow.loss.diff(dim=0) < 0).all()


def test_entropies_of_the_published_draw():
    """The authors' notebook, run by us with numpy's seed 123."""
    numbers = numpy.random.RandomState(123)
    v, _, beta = 0.1 * numbers.randn(8, 8), numbers.randn(8), numbers.randn(8)
    initial = (torch.as_tensor(part)[None] for part in (v, numpy.zeros(8), beta / numpy.linalg.norm(beta)))
    flow = theory.value_softmax_flow(theory.ValueSoftmax(*initial), [1_000, 10_000, 100_000])
    assert flow.entropy.flatten().tolist() == pytest.approx([1.989, 0.606, 0.279], abs=1e-3)


def test_other_normalisers_end_at_one_token_and_the_sigmoid_at_all():
    initial = theory.draw_value_softmax(16, 10, 10, logit_mean=1.0, logit_std=0.1, generator=seeded())
    final = {
        name: theory.value_softmax_flow(initial, [10_000], normaliser=name, step_size=0.5).effective_support[0]
        for name in ("softmax", "square", "sigmoid")
    }
    assert 1.2 < final["softmax"].median() < 1.5
    assert final["square"].median() < 1.02
    assert final["sigmoid"].min() > 9.99
    fastest = theory.value_softmax_flow(initial, [10_000], normaliser="relu", step_size=0.5).effective_support[0].min()
    assert fastest == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("norm, support", [(1, 9.849), (4, 3.32), (16, 1.08)])
def test_square_loss_polarises_for_large_targets(norm, support):
    """From the draw of the authors' notebook, numpy's seed 42. It has norm 1, run by us; the other norms are ours."""
    numbers = numpy.random.RandomState(42)
    v, a = 0.1 * numbers.randn(10, 10), 1 + 0.1 * numbers.randn(10)
    beta = numpy.random.RandomState(42).randn(10)
    initial = (torch.as_tensor(part)[None] for part in (v, a, norm * beta / numpy.linalg.norm(beta)))
    flow = theory.value_softmax_flow(theory.ValueSoftmax(*initial), [5_000], loss="square")
    assert flow.effective_support.item() == pytest.approx(support, abs=1e-3 if norm == 1 else 0.055)
    assert flow.loss.item() < 1e-20


def test_draws_are_seeded():
    assert all(torch.equal(*pair) for pair in zip(draw(seed=3), draw(seed=3), strict=True))
    assert not torch.equal(draw(seed=3).v, draw(seed=4).v)
    assert draw(dtype=torch.float32).v.dtype == torch.float32
    torch.testing.assert_close(draw().beta.norm(dim=-1), torch.ones(6, dtype=torch.float64))


def test_log_spaced():
    steps = theory.log_spaced(10**6, 50)
    assert steps[:3] == [0, 1, 2] and steps[-1] == 10**6 and steps == sorted(set(steps)) and 40 < len(steps) <= 51
    assert theory.log_spaced(1) == [0, 1] and theory.log_spaced(0) == [0]
    for arguments, message in (((-1,), "^last must be"), ((5, 0), "^count must be")):
        with pytest.raises(ValueError, match=message):
            theory.log_spaced(*arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"loss": "hinge"}, "loss must be one of logistic"),
        ({"normaliser": "tanh"}, "normaliser must be one of softmax"),
        ({"steps": [3, 3]}, "steps must be"),
        ({"steps": [-1]}, "steps must be"),
        ({"steps": 7}, "steps must be"),
        ({"steps": [0.5]}, "steps must be"),
        ({"step_size": 0.0}, "step_size must be positive"),
        ({"initial": theory.ValueSoftmax(torch.ones(2, 3, 4), torch.ones(2, 3), torch.ones(2, 3))}, "initial must be"),
        ({"initial": draw(logit_mean=0.0, logit_std=0.0), "normaliser": "relu"}, "must not sum to 0"),
    ],
)
def test_flow_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        theory.value_softmax_flow(**{"initial": draw(), "steps": [1]} | change)


def test_draw_refuses_a_target_of_another_width():
    with pytest.raises(ValueError, match="beta must be"):
        draw(beta=torch.ones(3))


# Influence malleability


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def test_linearized_attention_has_the_kernel_of_the_cubed_gram_matrix():
    x = normal(7, 12)
    gram, features = x @ x.mT, x @ x.mT @ x
    torch.testing.assert_close(features @ features.mT, torch.linalg.matrix_power(gram, 3))
    torch.testing.assert_close(FEATURES["attention"](x, x), F.normalize(features, dim=-1))
    through_the_operator = nf.linear_attention(*(x[None, None],) * 3, feature_map="identity", normalize=False)[0, 0]
    torch.testing.assert_close(through_the_operator, features)


@pytest.mark.parametrize("points", [6, 30])
def test_spectral_amplification_is_the_condition_of_the_cubed_gram_matrix(points):
    x = normal(points, 12)
    values = torch.linalg.svdvals(x @ x.mT @ x)[: min(points, 12)]
    torch.testing.assert_close(theory.spectral_amplification(x), (values[0] / values[-1]) ** 2)
    twins = torch.cat((x, x[:1]))  # of lower rank than its shape says
    assert theory.spectral_amplification(twins) < 1e12
    both = theory.spectral_amplification(torch.stack((x, 0 * x)))  # of rank 0, which amplifies nothing
    torch.testing.assert_close(both[0], theory.spectral_amplification(x))
    assert both[1].isnan()
    for empty in (x[:0], x[:, :0]):
        with pytest.raises(ValueError, match="^x must be"):
            theory.spectral_amplification(empty)


def test_neural_tangent_kernel_is_that_of_torch_func():
    q, x, w = normal(4, 6), normal(5, 6, seed=1), normal(2, 9, 6, seed=2)
    signs = normal(9, seed=3).sign()

    def network(weights, point):
        return (signs * (weights @ point).relu()).sum() / 3

    gradient = torch.func.vmap(torch.func.grad(network), in_dims=(None, 0))
    for kernel, weights in zip(theory.neural_tangent_kernel(q, x, w), w, strict=True):
        torch.testing.assert_close(kernel, gradient(weights, q).flatten(1) @ gradient(weights, x).flatten(1).mT)


def test_neural_tangent_kernel_of_a_wide_network_is_the_arc_cosine_kernel():
    x = F.normalize(normal(6, 3), dim=-1)
    cosines = (x @ x.mT).clamp(-1, 1)
    limit = cosines * (math.pi - cosines.acos()) / (2 * math.pi)
    torch.testing.assert_close(theory.neural_tangent_kernel(x, x, normal(200_000, 3, seed=1)), limit, rtol=0, atol=0.005)


def test_leave_one_out_influence_is_that_of_fitting_again():
    x, x_test, y, y_test = normal(8, 5), normal(3, 5, seed=1), normal(8, 2, seed=2), normal(3, 2, seed=3)
    kernel, test_kernel, ridge = x @ x.mT + 1, x_test @ x.mT + 1, 0.1
    influence, prediction, alpha = theory.leave_one_out_influence(kernel, test_kernel, y, y_test, ridge)
    damping = ridge * kernel.diagonal().mean()

    def fitted(kept):
        own = kernel[kept][:, kept]
        return test_kernel[:, kept] @ torch.linalg.solve(own + damping * torch.eye(len(kept)), y[kept])

    everything = list(range(8))
    torch.testing.assert_close(prediction, fitted(everything))
    torch.testing.assert_close(test_kernel @ alpha, prediction)
    for i in everything:
        without = fitted([j for j in everything if j != i])
        torch.testing.assert_close(influence[:, i], (y_test * (prediction - without)).sum(-1))


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_stay_in_reach_and_raise_the_error(attack):
    x, y, w = torch.rand(2, 9, 4, generator=seeded(), dtype=torch.float64), normal(9, 3), normal(4, 3, seed=1)
    moved = torch.arange(9) % 3 > 0

    def predict(points):
        return (points @ w).sin()

    def error(points):
        return (predict(points) - y).square().sum((-2, -1))

    options = {"eps": 0.2, "moved": moved.expand(2, 9), "generator": seeded()}
    perturbed = theory.perturb(x, y, predict, attack, **options)
    assert torch.equal(perturbed[:, ~moved], x[:, ~moved])
    assert perturbed.min() >= 0 and perturbed.max() <= 1 and not perturbed.requires_grad
    distance = (perturbed - x)[:, moved].abs()
    assert distance.max() <= 0.2 + 1e-12 and distance.max() == pytest.approx(0.2)
    if attack == "noise":
        return
    assert (error(perturbed) > error(x) + 1).all()
    start = x.clone().requires_grad_()
    error(start).sum().backward()
    fgsm = torch.where(moved[:, None], (x + 0.2 * start.grad.sign()).clamp(0, 1), x)
    if attack == "fgsm":
        torch.testing.assert_close(perturbed, fgsm)
    else:
        assert (error(perturbed) > error(fgsm)).all()  # more steps find more


def test_mim_accumulates_its_directions():
    x, y = torch.rand(9, 4, generator=seeded(), dtype=torch.float64), normal(9, 3)
    w = 8 * normal(4, 3, seed=1)  # bends so much that gradients turn within the reach

    def walk(decay):
        points, direction = x.clone(), 0
        for _ in range(10):
            points.requires_grad_()
            (gradient,) = torch.autograd.grad(((points @ w).sin() - y).square().sum(), points)
            direction = decay * direction + gradient / gradient.abs().sum(-1, keepdim=True)
            points = (points.detach() + 0.02 * direction.sign()).clamp(x - 0.2, x + 0.2).clamp(0, 1)
        return points

    perturbed = theory.perturb(x, y, lambda points: (points @ w).sin(), "mim", eps=0.2)
    torch.testing.assert_close(perturbed, walk(decay=1))
    assert not torch.allclose(perturbed, walk(decay=0))


def test_perturb_refuses_points_out_of_bounds():
    with pytest.raises(ValueError, match="x must lie inside bounds"):
        theory.perturb(2 * torch.ones(3, 2), torch.ones(3, 1), lambda x: x[:, :1], "fgsm")


def two_clouds(seed=0, train=60, test=30):
    y = normal(train + test, 1, seed=seed).sign()
    x = (0.5 + 0.15 * y * torch.tensor([1.0, -1, 1, -1, 0, 0, 0, 0]) + 0.15 * normal(train + test, 8, seed=seed + 1)).clamp(
        0, 1
    )
    return x[:train], y[:train], x[train:], y[train:]


@pytest.mark.parametrize("features", FEATURES)
def test_malleability_counts_sign_changes(features):
    data = two_clouds()
    result = theory.influence_malleability(
        *data, features=features, networks=3, width=256, ridge=0.01, moved=0.2, generator=seeded()
    )
    x, y, x_test, y_test = data
    assert result.influence.shape == result.perturbed_influence.shape == (3, 30, 60)
    assert ((result.prediction > 0) == (y_test > 0)).double().mean() > 0.9
    for network in range(3):
        changed = []
        for before, after in zip(result.influence[network], result.perturbed_influence[network], strict=True):
            top = before.abs().argsort(descending=True)[:6]
            changed += (before[top] * after[top] < 0).tolist()
        assert result.malleability[network].item() == pytest.approx(sum(changed) / len(changed))
        spearman = [
            numpy.corrcoef(before.argsort().argsort(), after.argsort().argsort())[0, 1]
            for before, after in zip(result.influence[network], result.perturbed_influence[network], strict=True)
        ]
        assert result.rank_correlation[network].item() == pytest.approx(numpy.mean(spearman))
        moved = (result.perturbed_x[network] != x).any(-1)
        expected = result.influence[network].abs().mean(0).topk(12).indices
        assert set(moved.nonzero().flatten().tolist()) == set(expected.tolist())
    assert (result.perturbed_x - x).abs().max() <= 0.3 + 1e-12


def test_an_attack_of_no_reach_changes_no_influence():
    for attack in ATTACKS:
        result = theory.influence_malleability(*two_clouds(), attack=attack, eps=0.0, width=64, generator=seeded())
        assert result.malleability.item() == 0 and result.rank_correlation.item() == pytest.approx(1)
        assert torch.equal(result.influence, result.perturbed_influence)


def test_malleability_is_seeded():
    first, second, other = (
        theory.influence_malleability(*two_clouds(), attack="pgd", width=64, networks=2, generator=seeded(seed))
        for seed in (5, 5, 6)
    )
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert not torch.equal(first.influence, other.influence)
    assert not torch.equal(first.influence[0], first.influence[1])


def test_attention_is_more_malleable_than_relu_on_digits():
    """The paper's finding, on scikit-learn's digits with the most influential tenth of the training points moved."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    chosen = torch.randperm(1797, generator=seeded())[:250]
    x, y = torch.as_tensor(digits.data)[chosen] / 16, 2 * F.one_hot(torch.as_tensor(digits.target)[chosen], 10).double() - 1
    relu, attention = (
        theory.influence_malleability(
            x[:200], y[:200], x[200:], y[200:], features=features, networks=2, width=512, generator=seeded()
        )
        for features in ("rows", "attention")
    )
    assert relu.malleability.max() < 0.15 and attention.malleability.min() > 0.25
    assert relu.rank_correlation.min() > 0.5 and attention.rank_correlation.max() < 0.3


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"features": "softmax"}, ValueError, "features must be one of attention"),
        ({"attack": "cw"}, ValueError, "attack must be one of fgsm"),
        ({"top": 0.0}, ValueError, "top must be a share"),
        ({"moved": 1.5}, ValueError, "moved must be a share"),
        ({"y": torch.ones(60)}, ValueError, r"x must be \(points, D\)"),
        ({"x_test": torch.ones(29, 8)}, ValueError, r"x_test must be \(points, D\)"),
        ({"x": torch.ones(60, 8, dtype=torch.int64)}, TypeError, "x must be floating"),
    ],
)
def test_malleability_refuses(change, error, message):
    x, y, x_test, y_test = two_clouds()
    with pytest.raises(error, match=message):
        theory.influence_malleability(**{"x": x, "y": y, "x_test": x_test, "y_test": y_test} | change)


@pytest.mark.parametrize(
    "change, message", [({"attack": "PGD"}, "^attack must be one of fgsm"), ({"attack_steps": 0}, "^attack_steps")]
)
def test_perturb_refuses(change, message):
    x = normal(6, 4).sigmoid()
    with pytest.raises(ValueError, match=message):
        theory.perturb(**{"x": x, "y": x[:, :2], "predict": lambda p: p[:, :2], "attack": "pgd"} | change)
