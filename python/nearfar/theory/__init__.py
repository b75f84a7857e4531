"""Results from papers on attention, as small experiments in plain PyTorch, one file per paper."""

from nearfar.theory.clusters import KrauseParticles, count_clusters, krause_particles
from nearfar.theory.malleability import (
    InfluenceMalleability,
    influence_malleability,
    leave_one_out_influence,
    neural_tangent_kernel,
    perturb,
    spectral_amplification,
)
from nearfar.theory.polarization import (
    ValueSoftmax,
    ValueSoftmaxFlow,
    draw_value_softmax,
    log_spaced,
    value_softmax_flow,
)

__all__ = [
    "InfluenceMalleability",
    "KrauseParticles",
    "ValueSoftmax",
    "ValueSoftmaxFlow",
    "count_clusters",
    "draw_value_softmax",
    "influence_malleability",
    "krause_particles",
    "leave_one_out_influence",
    "log_spaced",
    "neural_tangent_kernel",
    "perturb",
    "spectral_amplification",
    "value_softmax_flow",
]
