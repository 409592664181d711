"""Exact distributed evaluation: each example counts once, on all devices, by masked sums and one division at the end.

Source: section 3.3 of the paper. The reference dropped the remainder of a batch; nothing is dropped here.
"""

import contextlib
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from effnetlib.data.images import normalize
from effnetlib.data.loader import Reader, eval_batches
from effnetlib.data.sources import Split
from effnetlib.mesh import batch_sharding, make_mesh, on_every_device, replicated, shapes_of
from effnetlib.runs.machine import pinned
from effnetlib.runs.progress import Progress


@dataclass(frozen=True)
class EvalResult:
    """Sums over the counted examples: their number, those right at first and among the first five, and the loss.

    The loss is the cross-entropy in nats, without label smoothing.
    """

    nseen: int
    ncorrect: int
    ncorrect5: int
    loss_sum: float

    @property
    def top1(self) -> float:
        return self.ncorrect / self.nseen

    @property
    def top5(self) -> float:
        return self.ncorrect5 / self.nseen

    @property
    def loss(self) -> float:
        return self.loss_sum / self.nseen


ZEROS = {"nseen": np.int32(0), "ncorrect": np.int32(0), "ncorrect5": np.int32(0), "loss_sum": np.float32(0)}


def masked_sums(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """The sums of `EvalResult` over the rows where `mask` holds: int32 counts, float32 loss.

    Args:
      logits: float32 ``[batch, classes]``; labels: int32 ``[batch]``; mask: bool ``[batch]``.
    """
    _, best = jax.lax.top_k(logits, min(5, logits.shape[-1]))
    hits = best == labels[:, None]
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1)[:, 0]
    return {
        "nseen": jnp.sum(mask, dtype=jnp.int32),
        "ncorrect": jnp.sum(hits[:, 0] & mask, dtype=jnp.int32),
        "ncorrect5": jnp.sum(hits.any(-1) & mask, dtype=jnp.int32),
        "loss_sum": jnp.sum(jnp.where(mask, nll, 0.0)),
    }


def lower_eval_step(graphdef, weights, *, batch: int, size: int, mesh: Mesh) -> jax.stages.Lowered:
    """``(weights, sums, batch) -> sums`` lowered for a mesh, whose devices need not exist.

    Args:
      graphdef: of the model, from ``nnx.split``.
      weights: (params, batch_stats), or their shapes.
      batch, size: images per step, and pixels per side.
    """
    everywhere, sharded = replicated(mesh), batch_sharding(mesh)

    def step(weights, sums, batch):
        logits = nnx.merge(graphdef, *weights)(normalize(batch["images"]))
        return jax.tree.map(jnp.add, sums, masked_sums(logits, batch["labels"], batch["mask"]))

    shapes = {"images": ((batch, size, size, 3), "uint8"), "labels": ((batch,), "int32"), "mask": ((batch,), bool)}
    batch = {name: jax.ShapeDtypeStruct(*shape, sharding=sharded) for name, shape in shapes.items()}
    step = jax.jit(step, donate_argnums=1, out_shardings=everywhere)
    return step.lower(shapes_of(weights, everywhere), shapes_of(ZEROS, everywhere), batch)


class Evaluator:
    """Evaluates weights of one model on one split, compiled once. `close` ends its input's worker processes.

    Args:
      graphdef: of the model, from ``nnx.split``.
      split: what to evaluate on.
      batch: global batch size; the last batch is padded and masked.
      size, augmentation: as in the recipe.
      mesh: the devices that share the work.
    """

    def __init__(self, graphdef, split: Split, *, batch: int, size: int, augmentation: str, mesh: Mesh):
        self.split = split
        self.batches = dict(batch=batch, size=size, augmentation=augmentation, sharding=batch_sharding(mesh))
        self.reader = Reader(split, size, augmentation)
        self.close = self.reader.close
        self.graphdef, self.mesh, self.step = graphdef, mesh, None
        # CPU devices share a pool of threads. Several programs at once, whose devices wait for one another, can use it up.
        # Then all wait for ever (seen with two devices on two cores).
        self.one_at_a_time = mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"

    def compile(self, weights) -> None:
        """Compiles the step for weights of these shapes, so that the first evaluation is not slower than the rest."""
        batch, size = self.batches["batch"], self.batches["size"]
        self.step = lower_eval_step(self.graphdef, weights, batch=batch, size=size, mesh=self.mesh).compile()

    def __call__(self, *weights, progress: Progress | None = None) -> list[EvalResult]:
        """One result for each (params, batch_stats) pair, in one pass over the split; `progress` counts its batches.

        Raises:
          RuntimeError: the number of examples counted is not the size of the split.
        """
        if self.step is None:
            self.compile(weights[0])
        everywhere = replicated(self.mesh)
        weights = jax.device_put(weights, everywhere)
        sums = [on_every_device(ZEROS, everywhere) for _ in weights]
        for number, batch in enumerate(eval_batches(self.split, **self.batches, reader=self.reader), 1):
            for i, each in enumerate(weights):
                sums[i] = self.step(each, sums[i], batch)
                if self.one_at_a_time:
                    jax.block_until_ready(sums[i])
            if progress:
                progress.update(number)
        results = [EvalResult(**{name: value.item() for name, value in total.items()}) for total in sums]
        for seen in (result.nseen for result in results):
            if seen != len(self.split):
                raise RuntimeError(f"evaluation counted {seen:,} examples, not the {len(self.split):,} there are")
        return results


@pinned()
def evaluate(
    model: nnx.Module, split: Split, *, batch: int, size: int, augmentation: str = "inception", mesh: Mesh | None = None
) -> EvalResult:
    """Evaluates a model on a split, on all devices unless a mesh is given, and shows its progress.

    The arguments are those of `Evaluator`. Example (not run here: it needs ImageNet)::

        evaluate(model, effnetlib.data.load("imagenet", "eval"), batch=1024, size=260).top1
    """
    mesh = make_mesh(jax.device_count()) if mesh is None else mesh
    graphdef, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    progress = Progress(-(-len(split) // batch), 0, batch)
    options = dict(batch=batch, size=size, augmentation=augmentation, mesh=mesh)
    with contextlib.closing(Evaluator(graphdef, split, **options)) as evaluator:
        return evaluator((nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats)), progress=progress)[0]
