"""Depthwise convolution: the platform's own convolution, or on CPU a sum of shifted products."""

import functools

import jax
import jax.numpy as jnp


def _convolution(x, kernel, stride):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def _shifted_products(x, kernel, stride):
    size = kernel.shape[0]
    _, height, width, _ = x.shape
    out_h, out_w = -(-height // stride), -(-width // stride)
    pad_h = max((out_h - 1) * stride + size - height, 0)
    pad_w = max((out_w - 1) * stride + size - width, 0)
    x = jnp.pad(x, ((0, 0), (pad_h // 2, pad_h - pad_h // 2), (pad_w // 2, pad_w - pad_w // 2), (0, 0)))
    total = 0.0
    for i in range(size):
        for j in range(size):
            rows, cols = slice(i, i + (out_h - 1) * stride + 1, stride), slice(j, j + (out_w - 1) * stride + 1, stride)
            total = total + x[:, rows, cols] * kernel[i, j, 0]
    return total


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def depthwise_conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Convolves each channel with its own k x k kernel, padding SAME as TensorFlow does.

    On CPU it is written as ``sum_ij shift_ij(x) * kernel[i, j]``: XLA's grouped convolution there is the bottleneck of
    training (about four times slower on a whole B0 step at 32 px). Which form is lowered follows the platform that is
    compiled *for*, so a TPU program compiled on a laptop has the convolution.

    Args:
      x: ``[batch, height, width, C]``.
      kernel: ``[k, k, 1, C]``, same dtype as x.
      stride: 1 or 2, both directions.

    Returns:
      ``[batch, ceil(height / stride), ceil(width / stride), C]``, x's dtype.
    """
    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(_shifted_products, stride=stride),
        default=functools.partial(_convolution, stride=stride),
    )


def _forward(x, kernel, stride):
    return depthwise_conv(x, kernel, stride), (x, kernel)


def _backward(stride, residuals, cotangent):
    # Differentiating through the choice would keep the residuals of both forms, so each platform differentiates its own.
    def backward_of(form):
        return lambda x, kernel, g: jax.vjp(functools.partial(form, stride=stride), x, kernel)[1](g)

    return jax.lax.platform_dependent(
        *residuals, cotangent, cpu=backward_of(_shifted_products), default=backward_of(_convolution)
    )


depthwise_conv.defvjp(_forward, _backward)
