"""The depthwise convolution: each channel has its own weights."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from effnetlib.ops.platforms import barrier_on, precision_of


def plain_depthwise_conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """``y[.., c] = sum_ij x[stride * h + i, stride * w + j, c] * kernel[i, j, 0, c]``, in x's dtype.

    Args:
      x: ``[batch, height, width, C]``, padded with TensorFlow's SAME.
      kernel: the weights, float32 ``[k, k, 1, C]``. A tap is one of the k x k positions.
      stride: 1 or 2, in both directions.

    Returns:
      ``[batch, ceil(height / stride), ceil(width / stride), C]``.
    """
    return jax.lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
        precision=precision_of(x),
    )


# Why other forms: some platforms run this convolution slowly. A sum of shifted products gives the same.

# A TPU's convolution puts the channels on 128 lanes, so an array of 32 channels takes four times its bytes.
# A sum of products puts a row of pixels on the lanes. The large maps of the first layers fill them. By the
# compiler's count that saves about a sixth of the memory traffic of B0's whole step.
TPU_NARROW_CHANNELS = 64

# cuDNN 9 is slow on maps up to this side, for 3x3 with stride 1 in bfloat16: 0.98 ms instead of 0.10 on an
# H200 (14x14x480, batch 256). It is slow at 7 and 14, and fast from 15 on: two or three times as fast as the
# products. The forward pass with stride 2 is slow on all maps (0.67 ms instead of 0.30 on 112x112x96).
CUDNN_SLOW_MAP = 14

# Above this size of the padded x in float32, cuDNN 9 chooses a slow CUDA kernel for dkernel: 30.6 ms instead
# of 1.9 (112x112x96, stride 2, batch 1,024). So a large x is split into parts of CUDNN_CHANNELS channels.
CUDNN_SLOW_BYTES = 2**31
CUDNN_CHANNELS = 32

# The size of an array that stays in a CPU's caches.
CPU_CACHE_BYTES = 2**21
# The batch is summed in this many parts, so that up to as many devices need only one all-reduce.
CPU_BATCH_PARTS = 8


def _forms(x, kernel, stride):
    """The functions for y, dx and dkernel by platform. "default" is a TPU."""
    convolution = plain_depthwise_conv, _convolution_dx, _convolution_dkernel
    products = _products, _products_dx, _products_dkernel
    slow_map = len(kernel) == 3 and stride == 1 and max(x.shape[1:3]) <= CUDNN_SLOW_MAP
    return {
        "cpu": (_products, _products_dx, functools.partial(_products_dkernel, tap_sums=_tap_sums_in_strips)),
        "cuda": (
            _products if slow_map or stride > 1 else plain_depthwise_conv,
            _products_dx if slow_map else _convolution_dx,
            _convolution_dkernel_in_parts,
        ),
        "default": products if x.shape[-1] < TPU_NARROW_CHANNELS else convolution,
    }


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def depthwise_conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """`plain_depthwise_conv`, in the form that suits the platform; dkernel is float32.

    The platform is the one that is compiled *for*: a TPU program compiled on a laptop has the TPU's forms.
    """
    # One object per form: then platforms with the same form share one branch of the program.
    bound = {y: functools.partial(y, stride=stride) for y in (_products, plain_depthwise_conv)}
    forms = {name: bound[y] for name, (y, _, _) in _forms(x, kernel, stride).items()}
    return jax.lax.platform_dependent(x, kernel, **forms)


def _forward(x, kernel, stride):
    return depthwise_conv(x, kernel, stride), (x, kernel)


def _backward(stride, residuals, dy):
    # Each form has its own gradients: autodiff of the choice would store the residuals of all forms.
    def gradients(dx, dkernel):
        return lambda *arguments: (dx(*arguments, stride), dkernel(*arguments, stride))

    forms = {name: gradients(dx, dkernel) for name, (_, dx, dkernel) in _forms(*residuals, stride).items()}
    return jax.lax.platform_dependent(*residuals, dy, **forms)


depthwise_conv.defvjp(_forward, _backward)


def same_padding(x, kernel, stride):
    """TensorFlow's SAME padding: ``[(top, bottom), (left, right)]``."""
    return jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], (stride, stride), "SAME")


def _useful_taps(x, kernel, stride):
    """The rows and columns of weights that touch a real pixel, as slices, and the SAME padding for these alone.

    On small maps they are few: one of 5 on a map one pixel wide.
    """
    taps, padding = [], [(0, 0)]
    for size, (before, after) in zip(x.shape[1:3], same_padding(x, kernel, stride), strict=True):
        first, end = max(before - (size - 1) // stride * stride, 0), min(before + size, len(kernel))
        taps.append(slice(first, end))
        padding.append((before - first, after - (len(kernel) - end)))
    return *taps, [*padding, (0, 0)]


def shifted(padded, i, j, stride, out_h, out_w):
    """The pixels that tap ``(i, j)`` is multiplied with."""
    return padded[:, i : i + (out_h - 1) * stride + 1 : stride, j : j + (out_w - 1) * stride + 1 : stride]


def _sum_of_taps(padded, kernel, stride, out_h, out_w):
    """``sum_ij shifted_ij(padded) * kernel[i, j]`` for weights ``[rows, columns, C]``, summed in float32."""
    kernel = kernel.astype(jnp.float32)
    taps = np.ndindex(kernel.shape[:2])
    return sum(shifted(padded, i, j, stride, out_h, out_w) * kernel[i, j] for i, j in taps).astype(padded.dtype)


def _products(x, kernel, stride):
    rows, columns, padding = _useful_taps(x, kernel, stride)
    padded = barrier_on(("cpu", "cuda"), jnp.pad(x, padding))
    y = _sum_of_taps(padded, kernel[rows, columns, 0], stride, -(-x.shape[1] // stride), -(-x.shape[2] // stride))
    return barrier_on(("cuda",), y)


def _products_dx(x, kernel, dy, stride):
    """The sum of products of the dilated dy and the flipped weights."""
    rows, columns, padding = _useful_taps(x, kernel, stride)

    def around(axis, taps):
        low = taps.stop - taps.start - 1 - padding[axis][0]
        dilated = (dy.shape[axis] - 1) * stride + 1
        return low, x.shape[axis] + taps.stop - taps.start - 1 - low - dilated, stride - 1

    dilated = jax.lax.pad(dy, jnp.zeros([], dy.dtype), ((0, 0, 0), around(1, rows), around(2, columns), (0, 0, 0)))
    dx = _sum_of_taps(dilated, kernel[rows, columns, 0][::-1, ::-1], 1, *x.shape[1:3])
    return barrier_on(("cuda",), dx)


def _tap_sums(padded, dy, stride, taps):
    """``sum_bhw shifted_ij(padded) * dy`` per tap: float32 ``[taps, C]``."""
    pixels = (shifted(padded, i, j, stride, *dy.shape[1:3]) for i, j in np.ndindex(taps))
    return jnp.stack([(x.astype(jnp.float32) * dy).sum((1, 2)) for x in pixels]).sum(1)


def _tap_sums_in_strips(padded, dy, stride, taps):
    """`_tap_sums` in a loop over strips of rows, and over taps. A strip stays in a CPU's cache.

    This is up to a third faster than whole maps tap by tap, and compiles fewer reductions.
    """
    batch, out_h, out_w, channels = dy.shape
    row_bytes = batch * out_w * channels * 4
    most = max(CPU_CACHE_BYTES, row_bytes)
    strip = max(rows for rows in range(1, out_h + 1) if out_h % rows == 0 and rows * row_bytes <= most)
    parts = math.gcd(batch, CPU_BATCH_PARTS)
    window = (batch, (strip - 1) * stride + 1, (out_w - 1) * stride + 1, channels)

    def strip_sums(first):
        dy_strip = jax.lax.dynamic_slice_in_dim(dy, first, strip, axis=1)

        def tap_sum(tap):
            start = (0, first * stride + tap // taps[1], tap % taps[1], 0)
            x = jax.lax.dynamic_slice(padded, start, window)[:, ::stride, ::stride]
            # Sum per example first: a sum over a part of the batch at once takes 1.5 times as long.
            example_sums = (x.astype(jnp.float32) * dy_strip).sum((1, 2))
            return example_sums.reshape(parts, -1, channels).sum(1)

        return jax.lax.map(tap_sum, jnp.arange(taps[0] * taps[1]))

    return jax.lax.map(strip_sums, jnp.arange(0, out_h, strip)).sum((0, 2))


def _products_dkernel(x, kernel, dy, stride, tap_sums=_tap_sums):
    """The sums of `_tap_sums`; zero for taps that touch padding only."""
    rows, columns, padding = _useful_taps(x, kernel, stride)
    taps = rows.stop - rows.start, columns.stop - columns.start
    dkernel = tap_sums(jnp.pad(x, padding), dy, stride, taps).reshape(*taps, 1, -1).astype(kernel.dtype)
    unused = [(used.start, len(kernel) - used.stop) for used in (rows, columns)]
    return jnp.pad(dkernel, (*unused, (0, 0), (0, 0)))


def _convolution_dx(x, kernel, dy, stride):
    return jax.vjp(lambda x: plain_depthwise_conv(x, kernel, stride), x)[1](dy)[0]


def _convolution_dkernel(x, kernel, dy, stride):
    """JAX's own rule, but with float32 output (see `pointwise_conv`)."""
    return jax.lax.conv_general_dilated(
        x,
        dy,
        (1, 1),
        same_padding(x, kernel, stride),
        rhs_dilation=(stride, stride),
        dimension_numbers=("CHWN", "IHWO", "HWNC"),  # the batch is summed over, so it takes the place of the channels
        batch_group_count=x.shape[-1],
        precision=precision_of(x),
        preferred_element_type=jnp.float32,
    )


def _convolution_dkernel_in_parts(x, kernel, dy, stride):
    """`_convolution_dkernel`, for a large x in parts of its channels. x has the shape of the global batch."""
    channels = x.shape[-1]
    padded = (size + sum(pads) for size, pads in zip(x.shape[1:3], same_padding(x, kernel, stride), strict=True))
    part = channels if 4 * len(x) * channels * math.prod(padded) <= CUDNN_SLOW_BYTES else CUDNN_CHANNELS
    parts = (np.s_[..., first : first + part] for first in range(0, channels, part))
    return jnp.concatenate([_convolution_dkernel(x[p], kernel[p], dy[p], stride) for p in parts], -1)
