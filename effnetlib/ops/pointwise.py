"""The 1x1 convolution, and the stem's convolution as a 1x1 convolution of patches."""

import jax
import jax.numpy as jnp
import numpy as np

from effnetlib.ops.depthwise import TPU_NARROW_CHANNELS, same_padding, shifted
from effnetlib.ops.platforms import precision_of


def plain_pointwise_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """``x @ kernel``: ``[batch, height, width, C]`` times float32 ``[C, F]``, in x's dtype."""
    return jnp.matmul(x, kernel.astype(x.dtype), precision=precision_of(x))


# Why other forms: on a TPU a 1x1 convolution has the same memory layout as the depthwise convolutions around
# it, so the compiler fuses norms and swishes into both. A product has another layout, which costs copies.


@jax.custom_vjp
def pointwise_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`plain_pointwise_conv`, in the form that suits the platform; dkernel is float32.

    JAX's own dkernel has x's dtype. In bfloat16 the sum over 1,024 devices would lose digits that float32 keeps.
    """

    def convolution(x, kernel):
        options = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=precision_of(x))
        return jax.lax.conv_general_dilated(x, kernel[None, None], (1, 1), "VALID", **options)

    def on_gpu(x, kernel):
        # Without the barrier XLA makes a separate pass for each of batch norm's two sums.
        return jax.lax.optimization_barrier(plain_pointwise_conv(x, kernel))

    default = plain_pointwise_conv if _narrow(kernel) else convolution
    return jax.lax.platform_dependent(x, kernel.astype(x.dtype), cpu=plain_pointwise_conv, cuda=on_gpu, default=default)


def _narrow(kernel):
    # On a TPU the depthwise convolutions around narrow layers are sums of products.
    return max(kernel.shape) < TPU_NARROW_CHANNELS


def _forward(x, kernel):
    return pointwise_conv(x, kernel), (x, kernel)


def _backward(residuals, dy):
    x, kernel = residuals
    default = _product_dkernel if _narrow(kernel) else _convolution_dkernel
    dkernel = jax.lax.platform_dependent(x, dy, cpu=_dkernel_on_cpu, cuda=_product_dkernel, default=default)
    return pointwise_conv(dy, kernel.T), dkernel


pointwise_conv.defvjp(_forward, _backward)


def _product_dkernel(x, dy):
    pixels = ((0, 1, 2), (0, 1, 2)), ((), ())
    return jax.lax.dot_general(x, dy, pixels, precision_of(x), preferred_element_type=jnp.float32)


def _dkernel_on_cpu(x, dy):
    # float32, because bfloat16 products with float32 sums need XLA's optimizer, which tests switch off. XLA copies
    # and transposes the first operand, so that is the one with fewer channels.
    x, dy = x.astype(jnp.float32), dy.astype(jnp.float32)
    return _product_dkernel(dy, x).T if x.shape[-1] > dy.shape[-1] else _product_dkernel(x, dy)


def _convolution_dkernel(x, dy):
    return jax.lax.conv_general_dilated(
        x, dy, (1, 1), "VALID", dimension_numbers=("CHWN", "IHWO", "HWNC"), precision=precision_of(x),
        preferred_element_type=jnp.float32,
    )[0, 0]  # fmt: skip


def full_conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Convolution over all channels with weights ``[k, k, C, F]``, padded SAME, as `pointwise_conv` of x's patches.

    The patches are small where x has few channels, as in an image. On a TPU the result has the layout of narrow layers.
    """
    size, filters = len(kernel), kernel.shape[-1]
    out_h, out_w = (-(-extent // stride) for extent in x.shape[1:3])
    x = jnp.pad(x, [(0, 0), *same_padding(x, kernel, stride), (0, 0)])
    # Strided slices are slow on a TPU. So take one per residue (row, column modulo stride), and plain slices of those.
    residues = {(i, j): x[:, i::stride, j::stride] for i, j in np.ndindex(stride, stride)}
    taps = [
        shifted(residues[i % stride, j % stride], i // stride, j // stride, 1, out_h, out_w)
        for i, j in np.ndindex(size, size)
    ]
    return pointwise_conv(jnp.concatenate(taps, -1), kernel.reshape(-1, filters))
