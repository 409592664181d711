import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effnetlib import EffnetlibError, GroupedBatchNorm, make_mesh
from effnetlib.mesh import batch_sharding, replicated

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


def backward_by_hand(x, gamma, dy, groups, epsilon=1e-3):
    """The textbook backward pass of each group: gradients of x, gamma and beta."""
    axes = tuple(range(x.ndim - 1))
    dx = []
    for part, weight in zip(np.split(x, groups), np.split(dy, groups), strict=True):
        root = np.sqrt(part.var(axes) + epsilon)
        normal = (part - part.mean(axes)) / root
        dx.append(gamma / root * (weight - weight.mean(axes) - normal * (weight * normal).mean(axes)))
    return np.concatenate(dx), (dy * by_hand(x, groups, epsilon)[0]).sum(axes), dy.sum(axes)


BATCH, CHANNELS = 32, 3


def example(seed=2):
    """x, the weights of a scalar loss, gamma and beta."""
    rng = np.random.default_rng(seed)
    shape = (BATCH, 3, 5, CHANNELS)
    return rng.normal(2, 3, shape), rng.normal(size=shape), rng.uniform(0.5, 2, CHANNELS), rng.normal(size=CHANNELS)


def on_mesh(groups, devices):
    """Forward, running statistics and gradients with the batch over `devices`, through jit."""
    x, weight, gamma, beta = (np.float32(value) for value in example())
    mesh = make_mesh(groups, devices)
    graphdef, params, stats = nnx.split(make(CHANNELS, groups), nnx.Param, nnx.BatchStat)
    stats = nnx.to_pure_dict(stats)

    def loss(x, params, weight):
        norm = nnx.merge(graphdef, params, stats)
        out = norm(x, train=True)
        return jnp.sum(out * weight), (out, nnx.to_pure_dict(nnx.state(norm, nnx.BatchStat)))

    def place(array, sharding):
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    sharded, everywhere = batch_sharding(mesh), replicated(mesh)
    params = {"gamma": place(gamma, everywhere), "beta": place(beta, everywhere)}
    step = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), out_shardings=everywhere)
    (dx, dparams), (out, moved) = step(place(x, sharded), params, place(weight, sharded))
    values = {"out": out, "dx": dx, "dgamma": dparams["gamma"], "dbeta": dparams["beta"], **moved}
    return {name: np.asarray(value.addressable_data(0)) for name, value in values.items()}


GROUPS = (1, 2, 4, 8, 16, 32)  # from the whole batch down to one example a group


def check_against_numpy(groups, got):
    x, weight, gamma, beta = example()
    normal, mean, var = by_hand(x, groups)
    dx, dgamma, dbeta = backward_by_hand(x, gamma, weight, groups)
    wanted = {"out": normal * gamma + beta, "dx": dx, "dgamma": dgamma, "dbeta": dbeta,
              "mean": 0.01 * mean, "var": 0.99 + 0.01 * var}  # fmt: skip
    for name, value in wanted.items():
        np.testing.assert_allclose(got[name], value, rtol=2e-5, atol=2e-5, err_msg=f"{name}, {groups} groups")


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("groups", GROUPS)
def test_forward_backward_and_running_statistics_are_numpys(groups, devices):
    check_against_numpy(groups, on_mesh(groups, jax.devices()[:devices]))


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
def test_the_textbook_backward_is_the_numerical_gradient(groups):
    x, weight = RNG.normal(size=(8, 2)), RNG.normal(size=(8, 2))
    numerical = np.zeros_like(x)
    for at in np.ndindex(*x.shape):
        step = np.zeros_like(x)
        step[at] = 1e-5
        high, low = by_hand(x + step, groups)[0], by_hand(x - step, groups)[0]
        numerical[at] = np.sum((high - low) * weight) / 2e-5
    np.testing.assert_allclose(backward_by_hand(x, 1.0, weight, groups)[0], numerical, atol=1e-6)


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
