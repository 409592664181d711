"""The 1x1 convolution, and the stem's convolution as one of patches."""

import jax
import jax.numpy as jnp
import numpy as np

from effnetlib.ops.depthwise import TPU_NARROW_CHANNELS, same_padding, shifted
from effnetlib.ops.platforms import precision_of


def plain_pointwise_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """``x @ kernel``: ``[batch, height, width, C]`` times float32 ``[C, F]``, in x's dtype."""
    return jnp.matmul(x, kernel.astype(x.dtype), precision=precision_of(x))


# Why other forms: on a TPU a convolution has the layout of the depthwise ones around it, so the compiler
# fuses norms and swishes into both. A product has another layout, and each change of layout is a copy.


@jax.custom_vjp
def pointwise_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`plain_pointwise_conv`, in the form that suits the platform; dkernel is float32.

    dkernel has a rule of its own because JAX's would be bfloat16 where x is. Devices would then add up
    bfloat16, and 1,024 of them would round away what float32 keeps.
    """

    def convolution(x, kernel):
        options = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=precision_of(x))
        return jax.lax.conv_general_dilated(x, kernel[None, None], (1, 1), "VALID", **options)

    def on_gpu(x, kernel):
        # Without the barrier XLA sees a product, and makes a pass for each of batch norm's two sums.
        return jax.lax.optimization_barrier(plain_pointwise_conv(x, kernel))

    default = plain_pointwise_conv if _narrow(kernel) else convolution
    return jax.lax.platform_dependent(x, kernel.astype(x.dtype), cpu=plain_pointwise_conv, cuda=on_gpu, default=default)


def _narrow(kernel):
    # The narrow layers have no depthwise convolutions around them on a TPU, but sums of products.
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
    # In float32: XLA's products of bfloat16 summed in float32 need its optimizer, which tests leave out. The
    # first operand is copied and transposed, so it should be the one of fewer channels.
    x, dy = x.astype(jnp.float32), dy.astype(jnp.float32)
    return _product_dkernel(dy, x).T if x.shape[-1] > dy.shape[-1] else _product_dkernel(x, dy)


def _convolution_dkernel(x, dy):
    return jax.lax.conv_general_dilated(
        x, dy, (1, 1), "VALID", dimension_numbers=("CHWN", "IHWO", "HWNC"), precision=precision_of(x),
        preferred_element_type=jnp.float32,
    )[0, 0]  # fmt: skip


def full_conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Convolution over all channels with a ``[k, k, C, F]`` kernel, padded SAME, as `pointwise_conv` of x's patches.

    The k x k patches are few numbers where x has few channels. On a TPU the result has the layout of narrow layers.
    """
    size, filters = len(kernel), kernel.shape[-1]
    out_h, out_w = (-(-extent // stride) for extent in x.shape[1:3])
    x = jnp.pad(x, [(0, 0), *same_padding(x, kernel, stride), (0, 0)])
    # First one strided slice per residue. The taps are plain slices of those, which cost a TPU little.
    residues = {(i, j): x[:, i::stride, j::stride] for i, j in np.ndindex(stride, stride)}
    taps = [
        shifted(residues[i % stride, j % stride], i // stride, j // stride, 1, out_h, out_w)
        for i, j in np.ndindex(size, size)
    ]
    return pointwise_conv(jnp.concatenate(taps, -1), kernel.reshape(-1, filters))
