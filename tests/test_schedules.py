import jax
import numpy as np
import pytest

from effnetlib import Recipe
from effnetlib.schedules import scaled_lr, warmup_exponential_decay, warmup_polynomial_decay

W, T = 50, 200


@pytest.mark.parametrize("t", [0, 1, W - 1, W, W + 1, T - 1, T, T + 100])
def test_polynomial_is_the_closed_form(t):
    schedule = jax.jit(warmup_polynomial_decay(15.104, W, T))
    d = T - W + 1
    s = min(max(1, t - W), d)
    wanted = 15.104 * t / W if t < W else (15.104 - 0.1) * (1 - s / d) ** 2 + 0.1
    np.testing.assert_allclose(schedule(t), wanted, rtol=1e-5)


@pytest.mark.parametrize("t", [0, 1, W - 1, W, W + 1, T - 1, T, T + 100])
def test_exponential_counts_from_step_zero(t):
    schedule = jax.jit(warmup_exponential_decay(0.256, W, 0.97, 7.5))
    wanted = 0.256 * t / W if t < W else 0.256 * 0.97 ** np.floor(t / 7.5)
    np.testing.assert_allclose(schedule(t), wanted, rtol=1e-5)


def test_without_warmup_the_first_step_is_finite():
    assert float(warmup_polynomial_decay(2.0, 0, 10)(0)) == pytest.approx((2.0 - 0.1) * (10 / 11) ** 2 + 0.1)
    assert float(warmup_exponential_decay(2.0, 0, 0.5, 3.0)(0)) == 2.0


def test_linear_scaling_rule():
    assert scaled_lr(0.016, 4096) == pytest.approx(0.256)
    assert scaled_lr(0.081, 65536) == pytest.approx(20.736)


@pytest.mark.parametrize("preset", ["b2-4096-rmsprop", "b2-32768-lars", "digits-64-lars"])
def test_rates_are_float64_of_numpy_and_those_of_jax_to_float32(preset):
    recipe = Recipe.preset(preset)
    steps = np.arange(0, recipe.total_steps, 7)
    rates = recipe.schedule(steps)
    assert rates.dtype == np.float64
    # The last digits of a power in float32; at a step of a staircase, either side of it.
    close = np.isclose(jax.jit(recipe.schedule)(steps), rates, rtol=1e-4)
    assert close.mean() > 0.999
