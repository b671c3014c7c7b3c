"""The flow-matching and diffusion prior (SiT, Ma et al., 2401.08740).

config      the configuration, and the presets
prior       FlowPrior: training objective, sampling, likelihood
dit         the network
path        x_t = alpha(t) x_1 + sigma(t) x_0, and the transitions between two times
prediction  velocity, noise, score, data: conversions and dynamics
times       training times and loss weights
guidance    classifier-free and classifier guidance
likelihood  instantaneous change of variables
rectified   reflow, and straightness
solvers/    ODE, SDE and ancestral solvers, and their time grids
"""

from smalti.prior.flow.config import PRESETS, FlowConfig
from smalti.prior.flow.prior import FlowPrior

__all__ = ["PRESETS", "FlowConfig", "FlowPrior"]
