import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effnetlib.optim import ema_decay, ema_update, l2_penalty, lars, nesterov, rmsprop

RNG = np.random.default_rng(0)
SHAPES = {"kernel": (3, 4), "depthwise": (3, 3, 1, 2), "bias": (4,), "gamma": (2,), "zero": (2, 2)}


def run(optimizer, grads):
    params = {name: jnp.array(RNG.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}
    params["zero"] = jnp.zeros((2, 2))
    first = {name: np.array(value, np.float64) for name, value in params.items()}
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for grad in grads:
        updates, state = update({k: jnp.array(v, jnp.float32) for k, v in grad.items()}, state, params)
        params = optax.apply_updates(params, updates)
    return first, params


def gradients(steps=50):
    return [{name: RNG.normal(size=shape) for name, shape in SHAPES.items()} for _ in range(steps)]


def test_lars_is_the_formula_over_fifty_steps():
    grads = gradients()
    lr = 0.3 + 0.1 * np.arange(50)
    params, ours = run(lars(lambda t: 0.3 + 0.1 * t, weight_decay=1e-2, trust_coefficient=0.01, eps=1e-3), grads)
    momentum = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for t, grad in enumerate(grads):
        for name, g in grad.items():
            w = params[name]
            if w.ndim > 1:
                w_norm, g_norm = np.linalg.norm(w), np.linalg.norm(g)
                ratio = 0.01 * w_norm / (g_norm + 1e-2 * w_norm + 1e-3) if w_norm > 0 and g_norm > 0 else 1.0
                u = lr[t] * ratio * (g + 1e-2 * w)
            else:
                u = lr[t] * g
            momentum[name] = 0.9 * momentum[name] + u
            params[name] = w - momentum[name]
    for name, wanted in params.items():
        np.testing.assert_allclose(ours[name], wanted, rtol=2e-4, atol=2e-5, err_msg=name)


def test_lars_with_a_zero_gradient_or_weight_has_ratio_one():
    w, g = jnp.zeros((2, 2)), jnp.ones((2, 2))
    optimizer = lars(2.0, weight_decay=0.0)
    np.testing.assert_array_equal(optimizer.update(g, optimizer.init(w), w)[0], -2.0 * g)
    np.testing.assert_array_equal(optimizer.update(w, optimizer.init(g), g)[0], w)


def test_optax_lars_differs_by_default_and_agrees_where_the_definitions_do():
    grads = [{"kernel": RNG.normal(size=(3, 4)), "bias": RNG.normal(size=4)}]
    params = {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}
    grad = jax.tree.map(jnp.asarray, grads[0])

    def update(optimizer):
        return optimizer.update(grad, optimizer.init(params), params)[0]

    ours = update(lars(1.0, weight_decay=0.0))
    default = update(optax.lars(1.0))
    masked = update(optax.lars(1.0, trust_ratio_mask={"kernel": True, "bias": False}))
    np.testing.assert_allclose(ours["kernel"], default["kernel"], rtol=1e-6)
    assert not np.allclose(ours["bias"], default["bias"])
    np.testing.assert_allclose(ours["bias"], masked["bias"], rtol=1e-6)
    # With weight decay the ratio of optax has the norm of the sum, ours the sum of the norms.
    assert not np.allclose(update(lars(1.0, weight_decay=1.0))["kernel"], update(optax.lars(1.0, 1.0))["kernel"])


def test_nesterov_momentum_is_the_formula_over_fifty_steps():
    grads = gradients()
    first, params = run(nesterov(0.03, weight_decay=0.1, momentum=0.8), grads)
    for name, w in first.items():
        m = np.zeros_like(w)
        for grad in grads:
            g = grad[name] + (0.1 * w if w.ndim > 1 else 0)
            m = 0.8 * m + g
            w = w - 0.03 * (g + 0.8 * m)
        np.testing.assert_allclose(params[name], w, rtol=1e-5, atol=1e-6)


def test_rmsprop_is_the_formula_over_fifty_steps():
    grads = gradients()
    params, ours = run(rmsprop(0.01), grads)
    ms = {name: np.ones(shape) for name, shape in SHAPES.items()}
    momentum = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for grad in grads:
        for name, g in grad.items():
            ms[name] = 0.9 * ms[name] + 0.1 * g**2
            momentum[name] = 0.9 * momentum[name] + 0.01 * g / np.sqrt(ms[name] + 1e-3)
            params[name] = params[name] - momentum[name]
    for name, wanted in params.items():
        np.testing.assert_allclose(ours[name], wanted, rtol=1e-4, atol=1e-5, err_msg=name)


def test_l2_counts_kernels_and_biases_but_not_batch_norm():
    params = {"se": {"kernel": jnp.full((2, 2), 2.0), "bias": jnp.array([3.0])},
              "norm": {"gamma": jnp.ones(5), "beta": jnp.ones(5)}}  # fmt: skip
    assert float(l2_penalty(params)) == (4 * 4 + 9) / 2


@pytest.mark.parametrize(("step", "decay"), [(1, 2 / 11), (8, 0.5), (89, 90 / 99), (10**6, 0.9999)])
def test_ema_decay(step, decay):
    assert float(ema_decay(step)) == pytest.approx(decay, rel=1e-6)


def test_ema_moves_every_leaf():
    average = ema_update(
        {"w": jnp.array(1.0), "mean": jnp.array(0.0)}, {"w": jnp.array(3.0), "mean": jnp.array(4.0)}, 8
    )
    assert (float(average["w"]), float(average["mean"])) == (2.0, 2.0)


def test_ema_is_the_formula_over_fifty_steps():
    values = RNG.normal(size=(51, 3, 4))
    average, wanted = {"w": jnp.array(values[0], jnp.float32)}, values[0]
    update = jax.jit(ema_update)
    for step in range(1, 51):
        average = update(average, {"w": jnp.array(values[step], jnp.float32)}, step)
        decay = min(0.9999, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * values[step]
    np.testing.assert_allclose(average["w"], wanted, rtol=1e-5, atol=1e-6)
