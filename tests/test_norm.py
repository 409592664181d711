import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effnetlib import EffnetlibError, GroupedBatchNorm

RNG = np.random.default_rng(1)


def make(features=3, groups=1, **options):
    return GroupedBatchNorm(features, num_groups=groups, rngs=nnx.Rngs(0), **options)


def by_hand(x, groups, epsilon=1e-3):
    """Group by group in plain numpy: output, mean of group means, mean of group variances."""
    out, means, variances = [], [], []
    for part in np.split(x, groups):
        axes = tuple(range(x.ndim - 1))
        means.append(part.mean(axes))
        variances.append(part.var(axes))
        out.append((part - means[-1]) / np.sqrt(variances[-1] + epsilon))
    return np.concatenate(out), np.mean(means, 0), np.mean(variances, 0)


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_forward_and_running_statistics(groups):
    x = RNG.normal(2.0, 3.0, (8, 2, 5, 3))
    norm = make(groups=groups)
    out = norm(jnp.array(x, jnp.float32), train=True)
    wanted, mean, var = by_hand(x, groups)
    np.testing.assert_allclose(out, wanted, atol=1e-4)
    np.testing.assert_allclose(norm.mean[...], 0.01 * mean, rtol=1e-4)
    np.testing.assert_allclose(norm.var[...], 0.99 + 0.01 * var, rtol=1e-4)


def test_the_spread_between_groups_is_not_in_the_running_variance():
    x = jnp.array([[3.0], [3.0], [9.0], [9.0]])  # two constant groups: each has variance 0, together they have 9
    norm = make(1, groups=2, momentum=0.0)
    norm(x, train=True)
    assert float(norm.mean[0]) == 6.0
    assert float(norm.var[0]) == 0.0
    pooled = make(1, groups=1, momentum=0.0)
    pooled(x, train=True)
    assert float(pooled.var[0]) == 9.0


@pytest.mark.parametrize("groups", [1, 4])
def test_backward_is_the_numerical_gradient(groups):
    x, weight = RNG.normal(size=(8, 2)), RNG.normal(size=(8, 2))
    norm = make(2, groups)
    graphdef, state = nnx.split(norm)
    state = nnx.to_pure_dict(state)
    grad = jax.grad(lambda x: jnp.sum(nnx.merge(graphdef, state)(x, train=True) * weight))(jnp.array(x, jnp.float32))
    numerical = np.zeros_like(x)
    for at in np.ndindex(*x.shape):
        step = np.zeros_like(x)
        step[at] = 1e-5
        high, low = by_hand(x + step, groups)[0], by_hand(x - step, groups)[0]
        numerical[at] = np.sum((high - low) * weight) / 2e-5
    np.testing.assert_allclose(grad, numerical, atol=2e-4)


def test_inference_uses_the_running_statistics_and_changes_nothing():
    norm = make(1, epsilon=0.0)
    norm.mean[...], norm.var[...] = jnp.array([2.0]), jnp.array([4.0])
    norm.gamma[...], norm.beta[...] = jnp.array([3.0]), jnp.array([1.0])
    np.testing.assert_allclose(norm(jnp.array([[2.0], [6.0]])), [[1.0], [7.0]])
    assert float(norm.mean[0]) == 2.0


def test_bfloat16_in_float32_out():
    out = make(groups=2)(jnp.ones((4, 3), jnp.bfloat16), train=True)
    assert out.dtype == jnp.float32


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(EffnetlibError, match="a batch of 6 does not divide into 4 batch-norm groups"):
        make(groups=4)(jnp.ones((6, 3)), train=True)
