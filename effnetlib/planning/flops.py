"""Parameters and multiply-adds of a model, from its shapes."""

import math

import jax
from flax import nnx

from effnetlib.model import EfficientNet, block_specs, head_filters, scaling


def count_params(name: str, num_classes: int = 1000) -> int:
    """Trainable parameters of a variant. Allocates no arrays."""
    model = nnx.eval_shape(lambda: EfficientNet(name, num_classes))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def multiply_adds(name: str, resolution: int | None = None, num_classes: int = 1000) -> int:
    """Multiply-adds per image of a forward pass, in convolutions and classifier: the FLOPS of the EfficientNet paper.

    `resolution` is the variant's own by default.
    """
    size = -(-(resolution or scaling(name).resolution) // 2)
    specs = block_specs(name)
    total = size**2 * 27 * specs[0].in_filters
    for spec in specs:
        if spec.expansion != 1:
            total += size**2 * spec.in_filters * spec.expanded
        size = -(-size // spec.stride)
        total += size**2 * spec.expanded * (spec.kernel**2 + spec.out_filters) + 2 * spec.expanded * spec.squeezed
    return total + size**2 * specs[-1].out_filters * head_filters(name) + head_filters(name) * num_classes
