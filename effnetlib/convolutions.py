"""The convolutions of the model, each in the form that suits the platform that it is compiled for."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from effnetlib.activation import barrier

# A TPU's convolution lays the channels along 128 lanes, so an array of 32 channels takes four times its bytes in memory.
# What is not called a convolution gets another layout, a row of pixels along the lanes, which the first layers (large maps,
# few channels) fill: about a sixth less memory traffic for B0's whole step, by the compiler's count.
NARROW = 64

# Bytes of an array that the cores of a CPU keep close; and a multiple of the devices that sums over a batch are ready for.
CACHE = 2**21
SHARES = 8

SMALL = 14

# Every convolution starts from N(0, sqrt(2 / fan_out)), not truncated.
conv_init = jax.nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def _convolution(x, kernel, stride):
    return jax.lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def _same_padding(size, kernel, stride):
    """(before, after, output size) of TensorFlow's SAME padding in one direction."""
    out = -(-size // stride)
    total = max((out - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2, out


def _met(size, kernel, stride):
    """``(first, end)`` of the kernel's taps in one direction that meet more than padding, and what `_same_padding` says of these
    alone. On a map smaller than the kernel they are few: of 5, one where the map is one pixel wide."""
    before, after, out = _same_padding(size, kernel, stride)
    first, end = max(before - (out - 1) * stride, 0), min(before + size, kernel)
    return (first, end), (before - first, after - (kernel - end), out)


def _shifted(x, i, j, stride, out_h, out_w):
    return x[:, i : i + (out_h - 1) * stride + 1 : stride, j : j + (out_w - 1) * stride + 1 : stride]


def _sum_of_taps(padded, kernel, stride, out_h, out_w):
    """``sum_ij shift_ij(padded) * kernel[i, j]`` of a ``[rows, columns, C]`` kernel, summed in float32 as a convolution does."""
    kernel = kernel.astype(jnp.float32)
    taps = np.ndindex(kernel.shape[:2])
    return sum(_shifted(padded, i, j, stride, out_h, out_w) * kernel[i, j] for i, j in taps).astype(padded.dtype)


def _shifted_products(x, kernel, stride):
    """The convolution as products of the shifted image, of the taps that meet it."""
    (i0, i1), (top, bottom, out_h) = _met(x.shape[1], len(kernel), stride)
    (j0, j1), (left, right, out_w) = _met(x.shape[2], len(kernel), stride)
    padded = barrier(jnp.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0))), "cpu", "cuda")
    return barrier(_sum_of_taps(padded, kernel[i0:i1, j0:j1, 0], stride, out_h, out_w), "cuda")


def _image_gradient_of_products(x, kernel, cotangent, stride):
    """The cotangent of `_shifted_products`' x. A pixel meets every stride-th tap, from a first one that its place decides: so the
    gradient is a sum of taps for each of ``stride * stride`` places, interlaced."""
    height, width, channels = x.shape[1:]
    (i0, i1), (top, _, out_h) = _met(height, len(kernel), stride)
    (j0, j1), (left, _, out_w) = _met(width, len(kernel), stride)
    taps = kernel[i0:i1, j0:j1, 0]
    (i0, rows), (j0, columns) = ((before // stride, (before + extent - 1) // stride - before // stride + 1)
                                 for before, extent in ((top, height), (left, width)))  # fmt: skip

    def of_place(i, j):
        met = taps[i::stride, j::stride][::-1, ::-1]
        if not met.size:
            return jnp.zeros((len(x), rows, columns, channels), x.dtype)
        low_i, low_j = len(met) - 1 - i0, met.shape[1] - 1 - j0
        padding = (0, 0, 0), (low_i, i0 + rows - out_h, 0), (low_j, j0 + columns - out_w, 0), (0, 0, 0)
        return _sum_of_taps(jax.lax.pad(cotangent, jnp.zeros([], x.dtype), padding), met, 1, rows, columns)

    if stride == 1:
        return barrier(of_place(0, 0), "cuda")
    places = jnp.stack([jnp.stack([of_place(i, j) for j in range(stride)], 3) for i in range(stride)], 2)
    interlaced = places.reshape(len(x), rows * stride, columns * stride, channels)
    i0, j0 = top - i0 * stride, left - j0 * stride
    return barrier(interlaced[:, i0 : i0 + height, j0 : j0 + width], "cuda")


def _kernel_gradient_of_products(x, kernel, cotangent, stride, on_cpu):
    """The cotangent of `_shifted_products`' kernel: a sum over the image a tap."""
    (i0, i1), (top, bottom, out_h) = _met(x.shape[1], len(kernel), stride)
    (j0, j1), (left, right, out_w) = _met(x.shape[2], len(kernel), stride)
    met = i1 - i0, j1 - j0
    padded = jnp.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    if on_cpu:
        of_taps = _tap_sums_in_strips(padded, cotangent, stride, met)
    else:
        shifted = (_shifted(padded, i, j, stride, out_h, out_w) for i, j in np.ndindex(met))
        of_taps = jnp.stack([(each.astype(jnp.float32) * cotangent).sum((1, 2)) for each in shifted]).sum(1)
    of_kernel = of_taps.reshape(*met, 1, -1).astype(kernel.dtype)
    return jnp.pad(of_kernel, ((i0, len(kernel) - i1), (j0, len(kernel) - j1), (0, 0), (0, 0)))


def _tap_sums_in_strips(padded, cotangent, stride, taps):
    """``sum_bhw shift_ij(padded) * cotangent`` of every tap: float32 ``[taps, C]``.

    In loops over strips of rows, which stay in a CPU's cache, and over the taps of each: up to a third faster than tap after tap
    over all rows, and fewer reductions to compile than unrolled.
    """
    batch, out_h, out_w, channels = cotangent.shape
    row = batch * out_w * channels * 4
    strip = max(rows for rows in range(1, out_h + 1) if out_h % rows == 0 and rows * row <= max(CACHE, row))
    # Summed in shares of the batch, so that devices that share it meet once after the loops, and not in them.
    shares = math.gcd(batch, SHARES)
    window = (batch, (strip - 1) * stride + 1, (out_w - 1) * stride + 1, channels)

    def of_strip(first):
        part = jax.lax.dynamic_slice_in_dim(cotangent, first, strip, axis=1)

        def of_tap(tap):
            start = (0, first * stride + tap // taps[1], tap % taps[1], 0)
            shifted = jax.lax.dynamic_slice(padded, start, window)[:, ::stride, ::stride]
            products = shifted.astype(jnp.float32) * part
            return products.reshape(shares, -1, *products.shape[1:]).sum((1, 2, 3))

        return jax.lax.map(of_tap, jnp.arange(taps[0] * taps[1]))

    return jax.lax.map(of_strip, jnp.arange(0, out_h, strip)).sum((0, 2))


def _image_gradient_of_convolution(x, kernel, cotangent, stride):
    return jax.vjp(lambda x: _convolution(x, kernel, stride), x)[1](cotangent)[0]


def _kernel_gradient_of_convolution(x, kernel, cotangent, stride):
    """What JAX's own rule does, but for the dtype: float32, see `pointwise_conv`."""
    padding = [_same_padding(extent, len(kernel), stride)[:2] for extent in x.shape[1:3]]
    # The batch is what is summed over, so it takes the place of the channels.
    return jax.lax.conv_general_dilated(
        x,
        cotangent,
        (1, 1),
        padding,
        rhs_dilation=(stride, stride),
        dimension_numbers=("CHWN", "IHWO", "HWNC"),
        batch_group_count=x.shape[-1],
        preferred_element_type=jnp.float32,
    )


def _cudnn_is_slow(shape, kernel, stride):
    return stride > 1 or (len(kernel) == 3 and shape[1] <= SMALL)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def depthwise_conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Convolves each channel with its own k x k kernel, padding SAME as TensorFlow does.

    On CPU it is written as ``sum_ij shift_ij(x) * kernel[i, j]``: XLA's grouped convolution there is the bottleneck of
    training (about four times slower on a whole B0 step at 32 px). Elsewhere it is written so where the channels are few.
    Which form is lowered follows the platform that is compiled *for*, so a TPU program compiled on a laptop has the
    convolution.

    Args:
      x: ``[batch, height, width, C]``.
      kernel: ``[k, k, 1, C]``, float32, which is also its gradient's dtype; the products are those of x's dtype.
      stride: 1 or 2, both directions.

    Returns:
      ``[batch, ceil(height / stride), ceil(width / stride), C]``, x's dtype.
    """
    of_products = functools.partial(_shifted_products, stride=stride)
    of_convolution = functools.partial(_convolution, stride=stride)
    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=of_products,
        cuda=of_products if _cudnn_is_slow(x.shape, kernel, stride) else of_convolution,
        default=of_products if x.shape[-1] < NARROW else of_convolution,
    )


def _forward(x, kernel, stride):
    return depthwise_conv(x, kernel, stride), (x, kernel)


def _backward(stride, residuals, cotangent):
    # Differentiating through the choice would keep the residuals of both forms, so each platform has its own backward pass.
    def backward(image_gradient, kernel_gradient):
        return lambda *arguments: (image_gradient(*arguments, stride), kernel_gradient(*arguments, stride))

    of_convolution = backward(_image_gradient_of_convolution, _kernel_gradient_of_convolution)
    of_products = backward(_image_gradient_of_products, functools.partial(_kernel_gradient_of_products, on_cpu=False))
    x, kernel = residuals
    return jax.lax.platform_dependent(
        *residuals,
        cotangent,
        cpu=backward(_image_gradient_of_products, functools.partial(_kernel_gradient_of_products, on_cpu=True)),
        cuda=backward(_image_gradient_of_products, _kernel_gradient_of_convolution)
        if _cudnn_is_slow(x.shape, kernel, stride)
        else of_convolution,
        default=of_products if x.shape[-1] < NARROW else of_convolution,
    )


depthwise_conv.defvjp(_forward, _backward)


@jax.custom_vjp
def pointwise_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """1x1 convolution of ``[batch, height, width, C]`` with ``[C, F]``, in x's dtype; the kernel and its gradient are float32.

    On a TPU a convolution has the layout of the depthwise ones around it, and the compiler fuses the norms and swishes
    between them into both; a matrix product has another, and each change of layout is a copy. It suits the narrow layers,
    which have no convolutions around them, and CPU.

    The gradient of the kernel has its own rule, because JAX's would be bfloat16 where x is, and devices would add theirs up
    so: over 1,024 of them that rounds away what float32 keeps.
    """

    def convolution(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel[None, None], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    default = jnp.matmul if _narrow(kernel) else convolution
    return jax.lax.platform_dependent(x, kernel.astype(x.dtype), cpu=jnp.matmul, cuda=jnp.matmul, default=default)


def _narrow(kernel):
    return max(kernel.shape) < NARROW


def _pointwise_forward(x, kernel):
    return pointwise_conv(x, kernel), (x, kernel)


def _kernel_gradient_as_product(x, cotangent):
    pixels = ((0, 1, 2), (0, 1, 2)), ((), ())
    return jax.lax.dot_general(x, cotangent, pixels, preferred_element_type=jnp.float32)


def _kernel_gradient_on_cpu(x, cotangent):
    # The first operand is copied, with its rows and columns exchanged: it should be the one of fewer channels. Products of bfloat16
    # summed in float32 are there only where the compiler optimizes.
    x, cotangent = x.astype(jnp.float32), cotangent.astype(jnp.float32)
    if x.shape[-1] > cotangent.shape[-1]:
        return _kernel_gradient_as_product(cotangent, x).T
    return _kernel_gradient_as_product(x, cotangent)


def _kernel_gradient_as_convolution(x, cotangent):
    return jax.lax.conv_general_dilated(
        x, cotangent, (1, 1), "VALID", dimension_numbers=("CHWN", "IHWO", "HWNC"), preferred_element_type=jnp.float32
    )[0, 0]  # fmt: skip


def _pointwise_backward(residuals, cotangent):
    x, kernel = residuals
    default = _kernel_gradient_as_product if _narrow(kernel) else _kernel_gradient_as_convolution
    of_kernel = jax.lax.platform_dependent(
        x, cotangent, cpu=_kernel_gradient_on_cpu, cuda=_kernel_gradient_as_product, default=default
    )
    return pointwise_conv(cotangent, kernel.T), of_kernel


pointwise_conv.defvjp(_pointwise_forward, _pointwise_backward)


def full_conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Convolution over all channels, padding SAME, as a matrix product with the k x k patches of x, which are few numbers
    where x has few channels. Its layout on a TPU is that of narrow layers."""
    size, filters = len(kernel), kernel.shape[-1]
    top, bottom, out_h = _same_padding(x.shape[1], size, stride)
    left, right, out_w = _same_padding(x.shape[2], size, stride)
    x = jnp.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    # Strided slices first, one a residue: of those the taps are plain slices, which cost a TPU little.
    residues = {(i, j): x[:, i::stride, j::stride] for i in range(stride) for j in range(stride)}
    taps = [
        _shifted(residues[i % stride, j % stride], i // stride, j // stride, 1, out_h, out_w)
        for i in range(size)
        for j in range(size)
    ]
    return pointwise_conv(jnp.concatenate(taps, -1), kernel.reshape(-1, filters))
