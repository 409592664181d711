"""EfficientNet B0 to B7, and a nano variant for laptops, to the reference's constants.

Source: arXiv 1905.11946; tensorflow/tpu, models/official/efficientnet/efficientnet_builder.py and
efficientnet_model.py. Images and activations are ``[batch, height, width, channels]``.
"""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from effnetlib.errors import EffnetlibError, did_you_mean
from effnetlib.norm import GroupedBatchNorm
from effnetlib.ops.depthwise import depthwise_conv
from effnetlib.ops.norm_swish import norm_swish
from effnetlib.ops.norm_swish_gate import norm_swish_gate
from effnetlib.ops.pointwise import full_conv, pointwise_conv


@dataclass(frozen=True)
class Variant:
    """Compound scaling of the B0 baseline: width and depth coefficients, resolution in pixels, dropout rate, strides."""

    width: float
    depth: float
    resolution: int
    dropout: float
    strides: tuple[int, ...] = (1, 2, 2, 2, 1, 2, 1)


VARIANTS = {
    # B0 divides 224 pixels by 32. That would leave maps of 1x1 at 32 pixels. Batch norm then sees so few values that
    # training amplifies rounding errors a thousandfold within twenty steps. Here the strides, with the stem's, divide by 8.
    "nano": Variant(0.2, 0.3, 32, 0.1, strides=(1, 2, 2, 1, 1, 1, 1)),
    "b0": Variant(1.0, 1.0, 224, 0.2),
    "b1": Variant(1.0, 1.1, 240, 0.2),
    "b2": Variant(1.1, 1.2, 260, 0.3),
    "b3": Variant(1.2, 1.4, 300, 0.3),
    "b4": Variant(1.4, 1.8, 380, 0.4),
    "b5": Variant(1.6, 2.2, 456, 0.4),
    "b6": Variant(1.8, 2.6, 528, 0.5),
    "b7": Variant(2.0, 3.1, 600, 0.5),
}

# The B0 stages: repeats, kernel, expansion, output filters. The stem gives 32 filters, the head 1280.
STAGES = ((1, 3, 1, 16), (2, 3, 6, 24), (2, 5, 6, 40), (3, 3, 6, 80), (3, 5, 6, 112), (4, 5, 6, 192), (1, 3, 6, 320))
STEM_FILTERS, HEAD_FILTERS = 32, 1280


def scaling(name: str) -> Variant:
    """The scaling of a variant by name; an unknown name is an EffnetlibError."""
    if name not in VARIANTS:
        raise EffnetlibError(f"there is no EfficientNet variant {name!r}: {did_you_mean(name, VARIANTS)}")
    return VARIANTS[name]


def round_filters(filters: int, width: float) -> int:
    """Scales `filters` by `width` to a multiple of 8, at least 8 and never below 90 % of the exact value."""
    exact = filters * width
    rounded = max(8, int(exact + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * exact else rounded


def stage_repeats(name: str) -> list[int]:
    """Blocks per stage of a variant, rounded up."""
    return [math.ceil(scaling(name).depth * repeats) for repeats, *_ in STAGES]


def head_filters(name: str) -> int:
    """Channels of a variant's last convolution, the features of its classifier."""
    return round_filters(HEAD_FILTERS, scaling(name).width)


@dataclass(frozen=True)
class BlockSpec:
    """One MBConv block: its filters after rounding, and the rate at which stochastic depth drops it."""

    kernel: int
    stride: int
    expansion: int
    in_filters: int
    out_filters: int
    drop_path: float

    @property
    def expanded(self) -> int:
        """Filters of the depthwise convolution."""
        return self.in_filters * self.expansion

    @property
    def squeezed(self) -> int:
        """Filters inside squeeze-and-excite: a quarter of the block's input, not of the expanded filters."""
        return max(1, self.in_filters // 4)


def block_specs(name: str, drop_path: float = 0.2) -> list[BlockSpec]:
    """The blocks of a variant. Block i of N is dropped at the rate ``drop_path * i / N`` (the first one never)."""
    width, strides = scaling(name).width, scaling(name).strides
    shapes = []
    filters = round_filters(STEM_FILTERS, width)
    for repeats, (_, kernel, expansion, out), stride in zip(stage_repeats(name), STAGES, strides, strict=True):
        for repeat in range(repeats):
            shapes.append((kernel, stride if repeat == 0 else 1, expansion, filters, round_filters(out, width)))
            filters = round_filters(out, width)
    return [BlockSpec(*shape, drop_path=drop_path * i / len(shapes)) for i, shape in enumerate(shapes)]


# Convolutions start from N(0, 2 / fan_out), not truncated. The classifier's range follows its outputs, not its inputs.
_conv_init = jax.nn.initializers.variance_scaling(2.0, "fan_out", "normal")
_dense_init = jax.nn.initializers.variance_scaling(1 / 3, "fan_out", "uniform")


class Pointwise(nnx.Linear):
    """A 1x1 convolution."""

    def __init__(self, in_filters, out_filters, *, dtype, rngs):
        super().__init__(in_filters, out_filters, use_bias=False, dtype=dtype, kernel_init=_conv_init, rngs=rngs)

    def __call__(self, x):
        return pointwise_conv(x, self.kernel[...])


class Stem(nnx.Conv):
    """The first convolution, 3x3 with stride 2."""

    def __init__(self, filters, *, dtype, rngs):
        super().__init__(3, filters, (3, 3), use_bias=False, dtype=dtype, kernel_init=_conv_init, rngs=rngs)

    def __call__(self, x):
        return full_conv(x.astype(self.dtype), self.kernel[...], stride=2)


class SqueezeExcite(nnx.Module):
    """A gate per channel: spatial mean, 1x1 to `reduced` filters, swish, 1x1 back, sigmoid. Both 1x1 have a bias.

    Its op also does what comes before: ``y = swish((x - mean) * scale + shift)``, then ``y * gate(mean of y)``.
    """

    def __init__(self, filters, reduced, *, rngs):
        self.reduce = nnx.Linear(filters, reduced, kernel_init=_conv_init, rngs=rngs)
        self.expand = nnx.Linear(reduced, filters, kernel_init=_conv_init, rngs=rngs)

    def __call__(self, x, mean, scale, shift):
        layers = (self.reduce, self.expand)
        return norm_swish_gate(x, mean, scale, shift, [(layer.kernel[...], layer.bias[...]) for layer in layers])


def _drop(x, rate, key, shape):
    """Zeroes entries of a mask of `shape` (broadcast to x) at `rate` and divides by the survival, as dropout does."""
    if rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)


def _norm_swish(norm, x, train):
    return norm_swish(x, *norm.coefficients(x, train=train))


class MBConv(nnx.Module):
    """Inverted bottleneck: expand 1x1, depthwise k x k, squeeze-and-excite, project 1x1, skip with drop path."""

    def __init__(self, spec: BlockSpec, *, dtype, norm, rngs):
        self.spec = spec
        self.dtype = dtype
        if spec.expansion != 1:
            self.expand = Pointwise(spec.in_filters, spec.expanded, dtype=dtype, rngs=rngs)
            self.expand_norm = norm(spec.expanded, rngs=rngs)
        # (k, k, 1, C) has fan_out k * k * C for JAX's initialiser; the reference's depthwise fan_out is k * k.
        depthwise_init = jax.nn.initializers.normal(math.sqrt(2.0 / spec.kernel**2))
        self.depthwise = nnx.Param(depthwise_init(rngs.params(), (spec.kernel, spec.kernel, 1, spec.expanded)))
        self.depthwise_norm = norm(spec.expanded, rngs=rngs)
        self.se = SqueezeExcite(spec.expanded, spec.squeezed, rngs=rngs)
        self.project = Pointwise(spec.expanded, spec.out_filters, dtype=dtype, rngs=rngs)
        self.project_norm = norm(spec.out_filters, rngs=rngs)

    def __call__(self, x, *, train, key):
        y = x
        if self.spec.expansion != 1:
            y = _norm_swish(self.expand_norm, self.expand(y), train)
        y = depthwise_conv(y, self.depthwise[...], self.spec.stride)
        y = self.se(y, *self.depthwise_norm.coefficients(y, train=train))
        y = self.project_norm(self.project(y), train=train).astype(self.dtype)
        if self.spec.stride == 1 and self.spec.in_filters == self.spec.out_filters:
            if train:
                y = _drop(y, self.spec.drop_path, key, (len(y), 1, 1, 1))
            y = y + x
        return y


class EfficientNet(nnx.Module):
    """EfficientNet with grouped batch norm.

    Args:
      variant: "b0" to "b7", or "nano".
      num_classes: size of the logits.
      num_groups: batch-norm groups in training (see `GroupedBatchNorm`).
      dtype: dtype of the convolutions; parameters, batch norm, pooling and the classifier stay float32.
      dropout: rate before the classifier; None is the variant's own.
      drop_path: rate of stochastic depth at (beyond) the last block.
      batch_norm_momentum: see `GroupedBatchNorm`.
      rngs: initialises the parameters; `nnx.Rngs(0)` when not given.

    ``model(images)`` takes normalised ``[batch, height, width, 3]`` and returns float32 logits ``[batch, num_classes]``.
    ``model(images, train=True, key=key)`` drops units and paths by `key` and updates the batch statistics in place.
    """

    def __init__(
        self,
        variant: str,
        num_classes: int = 1000,
        *,
        num_groups: int = 1,
        dtype=jnp.bfloat16,
        dropout: float | None = None,
        drop_path: float = 0.2,
        batch_norm_momentum: float = 0.99,
        rngs: nnx.Rngs | None = None,
    ):
        rngs = nnx.Rngs(0) if rngs is None else rngs
        norm = functools.partial(GroupedBatchNorm, num_groups=num_groups, momentum=batch_norm_momentum)
        specs = block_specs(variant, drop_path)
        stem, head = specs[0].in_filters, head_filters(variant)
        self.dtype = dtype
        self.dropout = scaling(variant).dropout if dropout is None else dropout
        self.stem = Stem(stem, dtype=dtype, rngs=rngs)
        self.stem_norm = norm(stem, rngs=rngs)
        self.blocks = nnx.data([MBConv(spec, dtype=dtype, norm=norm, rngs=rngs) for spec in specs])
        self.head = Pointwise(specs[-1].out_filters, head, dtype=dtype, rngs=rngs)
        self.head_norm = norm(head, rngs=rngs)
        self.classifier = nnx.Linear(head, num_classes, kernel_init=_dense_init, precision="highest", rngs=rngs)

    def __call__(self, images: jax.Array, *, train: bool = False, key: jax.Array | None = None) -> jax.Array:
        x = _norm_swish(self.stem_norm, self.stem(images), train)
        for i, block in enumerate(self.blocks):
            x = block(x, train=train, key=jax.random.fold_in(key, i) if train else None)
        x = _norm_swish(self.head_norm, self.head(x), train)
        x = x.mean((1, 2), dtype=jnp.float32)
        if train:
            x = _drop(x, self.dropout, jax.random.fold_in(key, len(self.blocks)), x.shape)
        return self.classifier(x)
