"""The convolutions of the model, each in the form that suits the platform that it is compiled for."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from effnetlib.ops.norm_swish import barrier

# A TPU's convolution lays the channels along 128 lanes, so an array of 32 channels takes four times its bytes in memory.
# What is not called a convolution gets another layout, a row of pixels along the lanes, which the first layers (large maps,
# few channels) fill: about a sixth less memory traffic for B0's whole step, by the compiler's count.
NARROW = 64

# Bytes of an array that the cores of a CPU keep close; and a multiple of the devices that sums over a batch are ready for.
CACHE = 2**21
SHARES = 8

# On an H200 cuDNN 9's depthwise convolution of bfloat16 is two or three times as fast as the products, save two: of 3x3 on maps
# up to this (0.98 ms instead of 0.10 on 14x14 of 480 channels, batch 256; measured at 7 and 14, and not slow from 15 on), and,
# forward only, with stride 2 (0.67 ms instead of 0.30 on 112x112 of 96 channels).
SMALL = 14

# Of a padded x of more bytes than this in float32, cuDNN 9 finds the gradient of a depthwise kernel by a kernel of its own that is
# slow (30.6 ms instead of 1.9 on 112x112 of 96 channels, stride 2, batch 1,024); so it gets so many channels at a time.
LARGE = 2**31
PART = 32

# Every convolution starts from N(0, sqrt(2 / fan_out)), not truncated.
conv_init = jax.nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def precision_of(x: jax.Array) -> jax.lax.Precision:
    """The precision of every product of x: the highest for float32, which a TPU would else multiply in bfloat16 and an NVIDIA GPU
    in TF32, and the default for bfloat16. It is always stated, so that ``JAX_DEFAULT_MATMUL_PRECISION`` changes no result."""
    return jax.lax.Precision.HIGHEST if x.dtype.itemsize >= 4 else jax.lax.Precision.DEFAULT


def _convolution(x, kernel, stride):
    return jax.lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
        precision=precision_of(x),
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
    """The cotangent of `_shifted_products`' x: the products of the dilated cotangent with the kernel turned round."""
    height, width = x.shape[1:3]
    (i0, i1), (top, _, out_h) = _met(height, len(kernel), stride)
    (j0, j1), (left, _, out_w) = _met(width, len(kernel), stride)

    def around(taps, before, extent, out):
        low = taps - 1 - before
        return low, extent + taps - 1 - low - ((out - 1) * stride + 1), stride - 1

    dilated = jax.lax.pad(
        cotangent,
        jnp.zeros([], cotangent.dtype),
        ((0, 0, 0), around(i1 - i0, top, height, out_h), around(j1 - j0, left, width, out_w), (0, 0, 0)),
    )
    of_x = _sum_of_taps(dilated, kernel[i0:i1, j0:j1, 0][::-1, ::-1], 1, height, width)
    return barrier(of_x, "cuda")


def _kernel_gradient_of_products(x, kernel, cotangent, stride, tap_sums):
    """The cotangent of `_shifted_products`' kernel: a sum over the image a tap, by `tap_sums`."""
    (i0, i1), (top, bottom, out_h) = _met(x.shape[1], len(kernel), stride)
    (j0, j1), (left, right, out_w) = _met(x.shape[2], len(kernel), stride)
    met = i1 - i0, j1 - j0
    padded = jnp.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    of_kernel = tap_sums(padded, cotangent, stride, met).reshape(*met, 1, -1).astype(kernel.dtype)
    return jnp.pad(of_kernel, ((i0, len(kernel) - i1), (j0, len(kernel) - j1), (0, 0), (0, 0)))


def _tap_sums(padded, cotangent, stride, taps):
    """``sum_bhw shift_ij(padded) * cotangent`` of every tap: float32 ``[taps, C]``."""
    shifted = (_shifted(padded, i, j, stride, *cotangent.shape[1:3]) for i, j in np.ndindex(taps))
    return jnp.stack([(each.astype(jnp.float32) * cotangent).sum((1, 2)) for each in shifted]).sum(1)


def _tap_sums_in_strips(padded, cotangent, stride, taps):
    """The same on CPU.

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
            # An example at a time first: summed straight over a share, it takes the compiler's code half as long again.
            of_example = (shifted.astype(jnp.float32) * part).sum((1, 2))
            return of_example.reshape(shares, -1, channels).sum(1)

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
        precision=precision_of(x),
        preferred_element_type=jnp.float32,
    )


def _kernel_gradient_by_cudnn(x, kernel, cotangent, stride):
    """`_kernel_gradient_of_convolution`, of a large x in parts. Channels are what devices do not share, so x is that of all."""
    channels = x.shape[-1]
    padded = (sum(_same_padding(extent, len(kernel), stride)[:2], extent) for extent in x.shape[1:3])
    part = channels if 4 * len(x) * channels * math.prod(padded) <= LARGE else PART
    parts = (np.s_[..., first : first + part] for first in range(0, channels, part))
    return jnp.concatenate([_kernel_gradient_of_convolution(x[p], kernel[p], cotangent[p], stride) for p in parts], -1)


def _is_small(x, kernel, stride):
    return len(kernel) == 3 and stride == 1 and max(x.shape[1:3]) <= SMALL


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def depthwise_conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Convolves each channel with its own k x k kernel, padding SAME as TensorFlow does.

    On CPU it is written as ``sum_ij shift_ij(x) * kernel[i, j]``: XLA's grouped convolution there is the bottleneck of
    training (about four times slower on a whole B0 step at 32 px). On a TPU it is written so where the channels are few, on an
    NVIDIA GPU where cuDNN's convolution is slow. Which form is lowered follows the platform that is compiled *for*, so a TPU
    program compiled on a laptop has the convolution.

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
        cuda=of_products if stride > 1 or _is_small(x, kernel, stride) else of_convolution,
        default=of_products if x.shape[-1] < NARROW else of_convolution,
    )


def _forward(x, kernel, stride):
    return depthwise_conv(x, kernel, stride), (x, kernel)


def _backward(stride, residuals, cotangent):
    # Differentiating through the choice would keep the residuals of both forms, so each platform has its own backward pass.
    def gradients(of_image, of_kernel):
        return lambda *arguments: (of_image(*arguments, stride), of_kernel(*arguments, stride))

    def of_products(tap_sums):
        of_kernel = functools.partial(_kernel_gradient_of_products, tap_sums=tap_sums)
        return gradients(_image_gradient_of_products, of_kernel)

    of_convolution = gradients(_image_gradient_of_convolution, _kernel_gradient_of_convolution)
    by_cudnn = gradients(
        _image_gradient_of_products if _is_small(*residuals, stride) else _image_gradient_of_convolution,
        _kernel_gradient_by_cudnn,
    )
    return jax.lax.platform_dependent(
        *residuals,
        cotangent,
        cpu=of_products(_tap_sums_in_strips),
        cuda=by_cudnn,
        default=of_products(_tap_sums) if cotangent.shape[-1] < NARROW else of_convolution,
    )


depthwise_conv.defvjp(_forward, _backward)


@jax.custom_vjp
def pointwise_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """1x1 convolution of ``[batch, height, width, C]`` with ``[C, F]``, in x's dtype; the kernel and its gradient are float32.

    On a TPU a convolution has the layout of the depthwise ones around it, and the compiler fuses the norms and swishes
    between them into both; a matrix product has another, and each change of layout is a copy. It suits the narrow layers,
    which have no convolutions around them, CPU, and GPUs (8 % less of a B0 step on an H200).

    The gradient of the kernel has its own rule, because JAX's would be bfloat16 where x is, and devices would add theirs up
    so: over 1,024 of them that rounds away what float32 keeps.
    """

    product = functools.partial(jnp.matmul, precision=precision_of(x))

    def convolution(x, kernel):
        options = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=precision_of(x))
        return jax.lax.conv_general_dilated(x, kernel[None, None], (1, 1), "VALID", **options)

    def on_gpu(x, kernel):
        # Of what XLA sees to be a product, it makes a pass for each of batch norm's sums; of anything else, one for both.
        return jax.lax.optimization_barrier(product(x, kernel))

    default = product if _narrow(kernel) else convolution
    return jax.lax.platform_dependent(x, kernel.astype(x.dtype), cpu=product, cuda=on_gpu, default=default)


def _narrow(kernel):
    return max(kernel.shape) < NARROW


def _pointwise_forward(x, kernel):
    return pointwise_conv(x, kernel), (x, kernel)


def _kernel_gradient_as_product(x, cotangent):
    pixels = ((0, 1, 2), (0, 1, 2)), ((), ())
    return jax.lax.dot_general(x, cotangent, pixels, precision_of(x), preferred_element_type=jnp.float32)


def _kernel_gradient_on_cpu(x, cotangent):
    # The first operand is copied, with its rows and columns exchanged: it should be the one of fewer channels. Products of bfloat16
    # summed in float32 are there only where the compiler optimizes.
    x, cotangent = x.astype(jnp.float32), cotangent.astype(jnp.float32)
    if x.shape[-1] > cotangent.shape[-1]:
        return _kernel_gradient_as_product(cotangent, x).T
    return _kernel_gradient_as_product(x, cotangent)


def _kernel_gradient_as_convolution(x, cotangent):
    return jax.lax.conv_general_dilated(
        x, cotangent, (1, 1), "VALID", dimension_numbers=("CHWN", "IHWO", "HWNC"), precision=precision_of(x),
        preferred_element_type=jnp.float32,
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
