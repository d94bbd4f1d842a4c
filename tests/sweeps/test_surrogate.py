"""The surrogate: its belief against closed forms and against what it has not seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sweeps import surrogate as module
from sweeps.surrogate import Floats, expected_improvement, fit


def bowl(x: Floats) -> Floats:
    return 2.3 + 3 * (x[:, 0] - 0.3) ** 2 + (x[:, 1] - 0.6) ** 2 + x[:, 0] * x[:, 1] / 2


def test_a_noisy_bowl_is_learnt_with_its_noise() -> None:
    rng = np.random.default_rng(0)
    x, at = rng.random((40, 2)), rng.random((500, 2))
    model = fit(x, bowl(x) + 0.1 * rng.normal(size=40))
    mean, deviation = model.predict(at)
    assert model.noise == pytest.approx(0.1, rel=0.35)
    z = (mean - bowl(at)) / deviation
    assert np.abs(mean - bowl(at)).max() < 0.2
    assert 0.3 < z.std() < 2


def test_prediction_is_the_conditional_normal_of_the_whole_covariance() -> None:
    rng = np.random.default_rng(1)
    x, at = rng.random((6, 3)), rng.random((2, 3))
    y = rng.normal(size=6)
    model = fit(x, y)
    both = torch.from_numpy(np.concatenate([x, at]))
    covariance = module._kernel(both, both, model.scales).numpy()
    covariance[:6, :6] += np.eye(6) * (np.exp(float(model.scales[-1])) + module._JITTER)
    solved = np.linalg.solve(covariance[:6, :6], covariance[:6, 6:])
    expected = model.mean + solved.T @ (y - y.mean())
    variance = np.diag(covariance[6:, 6:] - covariance[6:, :6] @ solved)
    mean, deviation = model.predict(at)
    np.testing.assert_allclose(mean, expected, rtol=1e-6)
    np.testing.assert_allclose(deviation, y.std() * np.sqrt(variance), rtol=1e-5)


def test_what_is_believed_changes_no_expectation_and_lowers_the_doubt_there() -> None:
    rng = np.random.default_rng(2)
    x, at = rng.random((12, 2)), rng.random((5, 2))
    model = fit(x, bowl(x))
    pending = rng.random((2, 2))
    after = model.believe(pending)
    np.testing.assert_allclose(after.predict(at)[0], model.predict(at)[0], rtol=1e-9)
    assert (after.predict(pending)[1] < 0.01 * model.predict(pending)[1] + 1e-3).all()
    assert (after.predict(at)[1] <= model.predict(at)[1] + 1e-9).all()


def test_a_loss_with_more_variance_counts_less() -> None:
    x = np.linspace(0, 1, 9)[:, None]
    y = (x[:, 0] - 0.5) ** 2
    y[4] += 0.3
    extra = np.zeros(9)
    extra[4] = 1.0
    believed = fit(x, y, extra=extra).predict(x[4:5])[0]
    assert abs(believed[0]) < 0.05


def test_expected_improvement_is_that_of_a_normal() -> None:
    draws = np.random.default_rng(3).normal(1.0, 0.5, size=2_000_000)
    sampled = np.maximum(0, 0.8 - draws).mean()
    found = expected_improvement(0.8, np.array([1.0]), np.array([0.5]))[0]
    assert found == pytest.approx(sampled, rel=0.01)
