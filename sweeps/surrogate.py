"""What a search believes of the loss: a Gaussian process with a quadratic mean.

Near its optimum the loss is a parabola in the logarithms of the hyperparameters, and farther away
it is not. The quadratic, whose coefficients have a prior and are integrated out (Rasmussen and
Williams 2006, eq. 2.40), finds the optimum from few trials; the Matérn 5/2 process on top of it
takes up what no parabola fits. Scales and noise are the most probable ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]

# logarithms of variances, in units of the losses': mean and standard deviation of the prior
_PROCESS, _QUADRATIC, _NOISE = (-1.0, 1.0), (0.0, 1.0), (-2.0, 1.0)
_LIMITS = (-9.0, 6.0)  # of all logarithms
_JITTER = 1e-6  # added to the diagonal, in units of the losses' variance
_ROUNDS = 12  # of L-BFGS


@dataclass(frozen=True, kw_only=True)
class Surrogate:
    """The belief after some trials.

    Attributes:
        x: Places in the unit cube, shape `(trial, parameter)`.
        scales: Logarithms of the lengthscales (one per parameter), of the process's variance, of
            the quadratic's variance and of the noise's, in units of the losses' variance.
        factor: Cholesky factor of the losses' covariance, shape `(trial, trial)`.
        weights: That covariance's inverse times the losses, shape `(trial,)`.
        mean: Of the losses.
        deviation: Their standard deviation.
    """

    x: Tensor
    scales: Tensor
    factor: Tensor
    weights: Tensor
    mean: float
    deviation: float

    @property
    def noise(self) -> float:
        """Standard deviation of a loss, in its own unit."""
        return self.deviation * math.exp(float(self.scales[-1]) / 2)

    def predict(self, x: Floats) -> tuple[Floats, Floats]:
        """Mean and standard deviation of the loss without its noise, at places `(n, parameter)`."""
        at = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float64))
        cross = _kernel(self.x, at, self.scales)
        mean = self.weights @ cross
        half = torch.linalg.solve_triangular(self.factor, cross, upper=False)
        variance = (_diagonal(at, self.scales) - (half**2).sum(dim=0)).clamp_min(1e-12)
        return (self.mean + self.deviation * mean).numpy(), (
            self.deviation * variance.sqrt()
        ).numpy()

    def believe(self, x: Floats) -> Surrogate:
        """The belief if the losses at `x` were known, without noise, to be what is expected."""
        at = torch.from_numpy(x)
        cross, own = _kernel(self.x, at, self.scales), _kernel(at, at, self.scales)
        half = torch.linalg.solve_triangular(self.factor, cross, upper=False)
        rest = torch.linalg.cholesky(own - half.T @ half + _JITTER * torch.eye(len(x)))
        factor = torch.cat([
            torch.cat([self.factor, torch.zeros_like(half)], dim=1),
            torch.cat([half.T, rest], dim=1),
        ])  # fmt: skip
        # what is expected changes no expectation: it has no weight
        weights = torch.cat([self.weights, torch.zeros(len(x), dtype=torch.float64)])
        return replace(self, x=torch.cat([self.x, at]), factor=factor, weights=weights)


def fit(x: Floats, y: Floats, *, extra: Floats | None = None) -> Surrogate:
    """Fits the surrogate.

    Args:
        x: Places in the unit cube, shape `(trial, parameter)`; two at least.
        y: Losses, shape `(trial,)`.
        extra: Variance of each loss beyond the noise that all have; of a trial that was stopped
            early and is extrapolated.
    """
    mean, deviation = float(y.mean()), float(y.std()) or 1.0
    at = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float64))
    target = torch.from_numpy((y - mean) / deviation)
    more = torch.zeros(len(y), dtype=torch.float64)
    if extra is not None:
        more = torch.from_numpy(extra / deviation**2)
    dimensions = x.shape[1]
    # the prior of the lengthscales as in Hvarfner et al. 2024 (2402.02229), eq. 6
    rest = torch.tensor([_PROCESS, _QUADRATIC, _NOISE], dtype=torch.float64)
    lengths = torch.tensor([[math.sqrt(2) + math.log(dimensions) / 2, math.sqrt(3)]])
    centre, width = torch.cat([lengths.repeat(dimensions, 1), rest]).T
    scales = centre.clone()
    scales[:dimensions] = 0.0
    scales.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [scales], max_iter=_ROUNDS, line_search_fn="strong_wolfe", tolerance_change=1e-4
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        # a step of the line search may be wild: beyond the limits only the prior pulls
        surprise = _surprise(at, target, more, scales.clamp(*_LIMITS))
        loss: Tensor = surprise + (((scales - centre) / width) ** 2).sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    scales = scales.detach().clamp(*_LIMITS)
    factor, weights = _solve(at, target, more, scales)
    return Surrogate(
        x=at, scales=scales, factor=factor, weights=weights, mean=mean, deviation=deviation
    )


def _surprise(x: Tensor, y: Tensor, extra: Tensor, scales: Tensor) -> Tensor:
    """Negative logarithm of the evidence, up to a constant (Rasmussen and Williams, eq. 2.30)."""
    factor, weights = _solve(x, y, extra, scales)
    return y @ weights / 2 + factor.diagonal().log().sum()


def _solve(x: Tensor, y: Tensor, extra: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    covariance = _kernel(x, x, scales) + torch.diag(scales[-1].exp() + _JITTER + extra)
    factor: Tensor = torch.linalg.cholesky(covariance)
    return factor, torch.cholesky_solve(y[:, None], factor)[:, 0]


def _kernel(a: Tensor, b: Tensor, scales: Tensor) -> Tensor:
    lengths, (process, quadratic) = scales[:-3].exp(), scales[-3:-1].exp()
    gap = (a / lengths)[:, None] - (b / lengths)[None]
    distance = (5 * ((gap**2).sum(dim=-1)) + 1e-18).sqrt()
    matern = (1 + distance + distance**2 / 3) * (-distance).exp()
    covariance: Tensor = process * matern + quadratic * (_features(a) @ _features(b).T)
    return covariance


def _diagonal(x: Tensor, scales: Tensor) -> Tensor:
    process, quadratic = scales[-3:-1].exp()
    variance: Tensor = process + quadratic * (_features(x) ** 2).sum(dim=-1)
    return variance


def _features(x: Tensor) -> Tensor:
    """Constant, linear, square and mixed terms on [-1, 1]; shape `(n, feature)`."""
    u = 2 * x - 1
    i, j = torch.triu_indices(x.shape[1], x.shape[1])
    return torch.cat([torch.ones_like(u[:, :1]), u, u[:, i] * u[:, j]], dim=1)


def expected_improvement(best: float, mean: Floats, deviation: Floats) -> Floats:
    """Expectation of max(0, best - loss), where the loss is normal; same shape as `mean`."""
    z = (best - mean) / deviation
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    share = torch.special.ndtr(torch.from_numpy(z)).numpy()
    improvement: Floats = deviation * (z * share + density)
    return improvement
