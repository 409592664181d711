"""The train step: its state, the model that a recipe means, and the pure function itself."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from effnetlib.data.images import normalize
from effnetlib.mesh import batch_sharding, replicated, shapes_of
from effnetlib.model import EfficientNet
from effnetlib.optim import OPTIMIZERS, ema_update, l2_penalty
from effnetlib.recipe import Recipe

# Above this percentage of memory XLA computes arrays again instead of storing them. B5's step at 64 images per core on
# v3 then has 12.7 GiB of temporaries instead of 13.4, for 0.8 % of the time (outputs/published/tuning.json).
TPU_OPTIONS = {"xla_jf_rematerialization_percent_shared_memory_limit": "90"}


@jax.tree_util.register_dataclass
@dataclass
class TrainState:
    """Everything that a step changes. All arrays are replicated and float32, but `step` is int32: the steps done."""

    step: jax.Array
    params: dict
    batch_stats: dict
    opt_state: optax.OptState
    ema_params: dict
    ema_batch_stats: dict


def build_model(recipe: Recipe, key: jax.Array) -> EfficientNet:
    """The recipe's model, initialised from `key`."""
    return EfficientNet(
        recipe.variant,
        recipe.data.num_classes,
        num_groups=recipe.num_groups,
        dtype=jnp.dtype(recipe.precision),
        dropout=recipe.dropout,
        drop_path=recipe.drop_path,
        batch_norm_momentum=recipe.batch_norm_momentum,
        rngs=nnx.Rngs(key),
    )


def smoothed_cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float) -> jax.Array:
    """Mean cross-entropy (nats) against ``(1 - smoothing) * onehot + smoothing / classes``.

    Args:
      logits: float32 ``[batch, classes]``; labels: int32 ``[batch]``.
    """
    log_probs = jax.nn.log_softmax(logits)
    right = jnp.take_along_axis(log_probs, labels[:, None], axis=-1)[:, 0]
    return -jnp.mean((1.0 - smoothing) * right + smoothing * log_probs.mean(-1))


def make_train_step(recipe: Recipe) -> tuple[Callable, Callable, nnx.GraphDef]:
    """The pure functions of a recipe, not yet jitted, and the model's graphdef::

        init(key) -> TrainState                       step(state, batch, key, lr) -> (TrainState, metrics)

    The batch holds uint8 "images" ``[batch, size, size, 3]`` and int32 "labels" ``[batch]``. The key is the run's, the
    same at every step. The learning rate is a float32 scalar. It is an argument so that recipes which differ only in
    their schedule share one compiled program.
    """
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: build_model(recipe, jax.random.key(0))))
    optimizer = OPTIMIZERS[recipe.optimizer]

    def init(key):
        _, params, batch_stats = nnx.split(build_model(recipe, key), nnx.Param, nnx.BatchStat)
        params, batch_stats = nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats)
        # The averages start as copies: buffers shared with the parameters could not be donated.
        averages = jax.tree.map(jnp.copy, (params, batch_stats))
        return TrainState(jnp.int32(0), params, batch_stats, optimizer(recipe, 0.0).init(params), *averages)

    def step(state, batch, key, lr):
        step_key = jax.random.fold_in(key, state.step)

        def loss_fn(params):
            model = nnx.merge(graphdef, params, state.batch_stats)
            logits = model(normalize(batch["images"]), train=True, key=step_key)
            loss = smoothed_cross_entropy(logits, batch["labels"], recipe.label_smoothing)
            # Updates made to the merged model are lost unless they leave the differentiated function as its output.
            batch_stats = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
            return loss + recipe.loss_weight_decay * l2_penalty(params), (loss, logits, batch_stats)

        grads, (loss, logits, batch_stats) = jax.grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = optimizer(recipe, lr).update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        done = state.step + 1
        averages = (state.ema_params, state.ema_batch_stats)
        averages = ema_update(averages, (params, batch_stats), done, recipe.ema_decay)
        top1 = jnp.mean(logits.argmax(-1) == batch["labels"])
        norms = {"grad_norm": optax.global_norm(grads), "param_norm": optax.global_norm(params)}
        metrics = {"loss": loss, "top1": top1, **norms}
        return TrainState(done, params, batch_stats, opt_state, *averages), metrics

    return init, step, graphdef


def lower_train_step(recipe: Recipe, mesh: Mesh) -> tuple[Callable, jax.stages.Lowered, TrainState, nnx.GraphDef]:
    """For a mesh, whose devices need not exist: `init` jitted, the step lowered, the state's shapes, and the graphdef.

    The state is donated, the batch is sharded, and everything else is on every device.
    """
    init, step, graphdef = make_train_step(recipe)
    everywhere, sharded = replicated(mesh), batch_sharding(mesh)

    init = jax.jit(init, out_shardings=everywhere)
    key = shapes_of(jax.eval_shape(lambda: jax.random.key(0)), everywhere)
    state = init.eval_shape(key)
    size, batch = recipe.resolution, recipe.global_batch_size
    shapes = {"images": ((batch, size, size, 3), jnp.uint8), "labels": ((batch,), jnp.int32)}
    batch_shapes = {name: jax.ShapeDtypeStruct(*shape, sharding=sharded) for name, shape in shapes.items()}
    options = TPU_OPTIONS if mesh.devices.flat[0].platform == "tpu" else None
    step = jax.jit(step, donate_argnums=0, out_shardings=everywhere, compiler_options=options)
    lowered = step.lower(shapes_of(state, everywhere), batch_shapes, key, shapes_of(jnp.float32(0), everywhere))
    return init, lowered, state, graphdef
