"""A recipe compiled for a TPU slice that is not there: does it fit, how fast will it step, what do its collectives cost.

All of it is a prediction: the compiler's counts are exact, its times and ours are models. Nothing runs.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import jax

from effnetlib.errors import EffnetlibError
from effnetlib.evaluation import lower_eval_step
from effnetlib.mesh import make_mesh
from effnetlib.planning.collectives import Collective, collectives, seconds
from effnetlib.planning.flops import multiply_adds
from effnetlib.planning.topology import GIB, chip_of, devices_of
from effnetlib.recipe import Recipe
from effnetlib.runs.files import write_atomically
from effnetlib.runs.machine import pinned
from effnetlib.runs.paths import outputs_folder
from effnetlib.runs.progress import at_work
from effnetlib.step import lower_train_step, make_train_step

PROGRAM = (
    "recipe",
    "data/images",
    "model",
    "norm",
    "ops/depthwise",
    "ops/norm_swish",
    "ops/platforms",
    "ops/pointwise",
    "ops/norm_swish_gate",
    "step",
    "optim",
    "evaluation",
    "mesh",
    "planning/plan",
    "planning/collectives",
    "planning/topology",
)


@dataclass(frozen=True)
class Plan:
    """What the compiler says of a recipe on a slice; per device where it says so, and a prediction throughout.

    Attributes:
      topology, devices, chips: the slice.
      variant, global_batch_size, batch_per_device, recipe_hash: of the recipe.
      fits: whether the train step's memory is there.
      hbm_bytes, hbm_limit_bytes: memory of the train step a device (arguments, results that are not donated, temporaries, code),
        and what there is. None where the compiler gave up before it knew.
      largest_batch: where it does not fit, the largest that does of half the batch, a quarter, and so on; else the batch.
      temp_bytes: the temporaries among hbm_bytes.
      flops, bytes_accessed: a step, a device, by the compiler's count.
      compiler_seconds, roofline_seconds: the compiler's estimate of a step without collectives, and
        max(flops / peak, bytes_accessed / bandwidth).
      compute_seconds, compute_source: the one of the two that is used: the compiler's where it is sane, that is no less than
        the arithmetic alone takes and no more than ten times the roofline.
      collectives, collective_seconds: what is exchanged a step, and for how long by `effnetlib.planning.collectives.seconds`.
      step_seconds: the sum of computing and exchanging; all_reduce_share: the share of the latter.
      images_per_second: of the whole slice. mfu: 6 x multiply-adds of the model x images/s / the slice's peak.
      eval_seconds: an evaluation of the raw weights and their average on all evaluation images.
      minutes: all steps and evaluations of the recipe. dollars: of `minutes` at the price given, else None.
      versions: jax, jaxlib and libtpu.
    """

    topology: str
    devices: int
    chips: int
    variant: str
    global_batch_size: int
    batch_per_device: int
    recipe_hash: str
    fits: bool
    largest_batch: int
    hbm_bytes: int | None = None
    hbm_limit_bytes: int | None = None
    temp_bytes: int | None = None
    flops: float | None = None
    bytes_accessed: float | None = None
    compiler_seconds: float | None = None
    roofline_seconds: float | None = None
    compute_seconds: float | None = None
    compute_source: str | None = None
    collectives: tuple[Collective, ...] = ()
    collective_seconds: float | None = None
    step_seconds: float | None = None
    all_reduce_share: float | None = None
    images_per_second: float | None = None
    mfu: float | None = None
    eval_seconds: float | None = None
    epochs: float | None = None
    minutes: float | None = None
    dollars: float | None = None
    versions: dict = dataclasses.field(default_factory=dict)

    def priced(self, chip_hour: float | None) -> "Plan":
        """With the dollars that it costs at so many a chip and hour."""
        if chip_hour is None or self.minutes is None:
            return self
        return dataclasses.replace(self, dollars=chip_hour * self.chips * self.minutes / 60)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        fields = json.loads(text)
        return cls(**fields | {"collectives": tuple(Collective(**each) for each in fields["collectives"])})

    def row(self) -> dict:
        """The figures that a table of several plans shows, by the names of its columns."""
        row = {"devices": self.devices, "images a device": self.batch_per_device, "fits": self.fits}
        if not self.fits:
            return row | {"largest batch": self.largest_batch}
        return row | {
            "GiB a device": self.hbm_bytes / GIB,
            "GiB there are": self.hbm_limit_bytes / GIB,
            "step ms": 1e3 * self.step_seconds,
            "all-reduce %": 100 * self.all_reduce_share,
            "images/s": self.images_per_second,
            "MFU %": 100 * self.mfu,
            "minutes": self.minutes,
        }

    def table(self) -> str:
        """The figures as lines of text."""
        lines = [
            ("slice", f"{self.topology}, {self.devices:,} devices on {self.chips:,} chips"),
            ("batch", f"{self.global_batch_size:,}, {self.batch_per_device:,} a device"),
        ]
        if not self.fits:
            need = (
                ""
                if self.hbm_bytes is None
                else f": {self.hbm_bytes / GIB:.2f} of {self.hbm_limit_bytes / GIB:.2f} GiB"
            )
            lines += [
                ("memory", f"does not fit{need}"),
                ("what fits", f"{self.largest_batch:,}, of half the batch, a quarter and so on"),
            ]
            return "\n".join(f"{name:18}{value}" for name, value in lines)
        lines += [
            ("memory", f"fits: {self.hbm_bytes / GIB:.2f} of {self.hbm_limit_bytes / GIB:.2f} GiB a device, "
                       f"{self.temp_bytes / GIB:.2f} of it temporaries"),
            ("flops", f"{self.flops / 1e9:,.1f} G a device and step"),
            ("bytes accessed", f"{self.bytes_accessed / 1e9:,.2f} GB a device and step"),
            ("computing", f"{1e3 * self.compute_seconds:,.2f} ms by the {self.compute_source} "
                          f"(roofline {1e3 * self.roofline_seconds:,.2f} ms)"),
        ]  # fmt: skip
        lines += [
            (each.kind, f"{each.count} x {each.bytes:,} bytes over {each.replicas:,} devices")
            for each in self.collectives[:6]
        ]
        if rest := sum(each.count for each in self.collectives[6:]):
            lines.append(("", f"and {rest} smaller ones"))
        lines += [
            ("exchanging", f"{1e3 * self.collective_seconds:,.2f} ms, {self.all_reduce_share:.2%} of the step"),
            ("step", f"{1e3 * self.step_seconds:,.2f} ms"),
            ("speed", f"{self.images_per_second:,.0f} images/s, model flops utilisation {self.mfu:.2%}"),
            ("whole run", f"{self.minutes:,.1f} min for {self.epochs:g} epochs and their evaluations"),
        ]
        if self.dollars is not None:
            lines.append(("price", f"{self.dollars:,.2f} dollars"))
        return "\n".join(f"{name:18}{value}" for name, value in lines)


@pinned()
def plan(recipe: Recipe, topology: str, *, chip_hour: float | None = None, folder: Path | str | None = None) -> Plan:
    """Compiles a recipe's train and evaluation steps for a slice that need not be there, and says what to expect.

    Takes minutes, and shows that it is at work; the result is kept in `outputs/plans` under the recipe's hash, the topology,
    the versions of the compiler and of our program, and the flags in the environment's ``LIBTPU_INIT_ARGS``, which the compiler
    reads here as it does on a TPU.

    Args:
      recipe: what would be trained.
      topology: such as "v3:32x16x1" or "v5e:2x4": generation, and chips in each direction.
      chip_hour: dollars a chip and hour.
      folder: where plans are kept, if not there.

    Raises:
      EffnetlibError: an unknown topology, a batch that does not divide over it, or no compiler for TPUs (extra `plan`).
    """
    devices = devices_of(topology)
    recipe.validate(len(devices))
    kept = (
        Path(folder or outputs_folder() / "plans")
        / f"{recipe.variant}-{topology.replace(':', '-')}-{_key(recipe, topology)}.json"
    )
    if kept.exists():
        return Plan.from_json(kept.read_text()).priced(chip_hour)
    found = _plan(recipe, topology, devices)
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(kept, found.to_json() + "\n")
    return found.priced(chip_hour)


def load_plans(folder: Path | str) -> list[Plan]:
    """Every plan that is kept in a folder, whichever version of the compiler made it."""
    return [Plan.from_json(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]


def find_plan(plans: list[Plan], recipe: Recipe, topology: str) -> Plan | None:
    """The plan of a recipe for a slice, compiled without flags of one's own, or None: of several, the newest compiler's (libtpu,
    then jaxlib and jax), and of those of one compiler, the slowest step's."""
    wanted = recipe.hash, topology
    found = [each for each in plans if (each.recipe_hash, each.topology) == wanted and "flags" not in each.versions]

    def rank(each):
        versions = (each.versions.get(name, "") for name in ("libtpu", "jaxlib", "jax"))
        numbers = [[int(n) for n in re.findall(r"\d+", version)] for version in versions]
        return numbers, each.step_seconds or math.inf, each.to_json()

    return max(found, key=rank, default=None)


def _versions() -> dict:
    found = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}
    flags = os.environ.get("LIBTPU_INIT_ARGS")
    return found | {"flags": flags} if flags else found


def _key(recipe: Recipe, topology: str) -> str:
    digest = hashlib.sha256(json.dumps([recipe.hash, topology, _versions()]).encode())
    for module in PROGRAM:
        digest.update((Path(__file__).parents[1] / f"{module}.py").read_bytes())
    return digest.hexdigest()[:12]


def _plan(recipe: Recipe, topology: str, devices: list) -> Plan:
    chip = chip_of(topology)
    chips = len(devices) // chip.cores
    limit = chip.hbm_bytes // chip.cores
    batch = recipe.global_batch_size
    known = dict(
        topology=topology, devices=len(devices), chips=chips, variant=recipe.variant, global_batch_size=batch,
        batch_per_device=batch // len(devices), recipe_hash=recipe.hash, hbm_limit_bytes=limit, epochs=recipe.epochs,
        versions=_versions(),
    )  # fmt: skip
    train = _compile_train(recipe, devices)
    hbm = _hbm_bytes(train) if train else None
    evaluation = None if hbm is None or hbm > limit else _compile_evaluation(recipe, devices)
    if evaluation is None:
        return Plan(fits=False, largest_batch=_largest_batch(recipe, devices, limit), hbm_bytes=hbm, **known)
    exchanged = tuple(collectives(train.as_text()))
    timing = _step_timing(train, chip)
    exchanging = sum(seconds(each, chip) for each in exchanged)
    step = timing["compute_seconds"] + exchanging
    rate = batch / step
    eval_step = _step_timing(evaluation, chip)["compute_seconds"]
    eval_seconds = 2 * math.ceil(recipe.data.eval_examples / batch) * eval_step
    return Plan(
        fits=True,
        largest_batch=batch,
        hbm_bytes=hbm,
        temp_bytes=train.memory_analysis().temp_size_in_bytes,
        **timing,
        collectives=exchanged,
        collective_seconds=exchanging,
        step_seconds=step,
        all_reduce_share=exchanging / step,
        images_per_second=rate,
        mfu=rate * 6 * multiply_adds(recipe.variant, recipe.resolution, recipe.data.num_classes) / (chips * chip.flops),
        eval_seconds=eval_seconds,
        minutes=(recipe.total_steps * step + len(recipe.eval_steps) * eval_seconds) / 60,
        **known,
    )


def _compile_train(recipe: Recipe, devices: list) -> jax.stages.Compiled | None:
    """The compiled train step, or None where the compiler runs out of memory."""
    lowered = lower_train_step(recipe, make_mesh(recipe.num_groups, devices))[1]
    return _compile(
        lowered, f"the train step of {recipe.variant} at {recipe.global_batch_size:,} for {len(devices):,} devices"
    )


def _compile_evaluation(recipe: Recipe, devices: list) -> jax.stages.Compiled | None:
    """The compiled evaluation step, or None where the compiler runs out of memory."""
    init, _, graphdef = make_train_step(recipe)
    state = jax.eval_shape(init, jax.random.key(0))
    lowered = lower_eval_step(
        graphdef,
        (state.params, state.batch_stats),
        batch=recipe.global_batch_size,
        size=recipe.resolution,
        mesh=make_mesh(recipe.num_groups, devices),
    )
    return _compile(lowered, "the evaluation step")


def _compile(lowered: jax.stages.Lowered, what: str) -> jax.stages.Compiled | None:
    try:
        with at_work(f"compiling {what}"):
            return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error):
            raise
        return None


def _hbm_bytes(compiled) -> int:
    memory = compiled.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )


def _largest_batch(recipe: Recipe, devices: list, limit: int) -> int:
    """Of half the batch, a quarter and so on, the first that fits; 0 where none does."""
    batch, group = recipe.global_batch_size // 2, recipe.batch_norm_batch_size
    while batch and batch % len(devices) == 0:
        # The peak learning rate falls with the batch, maybe below end_lr, which a recipe refuses; memory depends on neither.
        smaller = dict(global_batch_size=batch, batch_norm_batch_size=min(batch, group), end_lr=0.0)
        with contextlib.suppress(EffnetlibError):
            tried = recipe.replace(**smaller)
            tried.validate(len(devices))
            if (train := _compile_train(tried, devices)) and _hbm_bytes(train) <= limit:
                return batch
        batch //= 2
    return 0


def _step_timing(compiled, chip) -> dict:
    costs = compiled.cost_analysis()
    arithmetic = costs["flops"] / (chip.flops / chip.cores)
    roofline = max(arithmetic, costs["bytes accessed"] / (chip.hbm_bandwidth / chip.cores))
    estimate = costs.get("optimal_seconds")
    sane = estimate is not None and arithmetic <= estimate <= 10 * roofline
    return {
        "flops": costs["flops"],
        "bytes_accessed": costs["bytes accessed"],
        "compiler_seconds": estimate,
        "roofline_seconds": roofline,
        "compute_seconds": estimate if sane else roofline,
        "compute_source": "compiler" if sane else "roofline",
    }
