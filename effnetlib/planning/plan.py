"""Predicts memory, speed and input of a recipe on a TPU slice that is not there.

The recipe is compiled, and nothing runs. The compiler's counts are exact. Its times and ours are models.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax

from effnetlib.errors import EffnetlibError
from effnetlib.evaluation import lower_eval_step
from effnetlib.mesh import make_mesh
from effnetlib.planning.collectives import Collective, collectives, seconds
from effnetlib.planning.flops import multiply_adds
from effnetlib.planning.topology import GIB, chip_of, devices_of, host_of
from effnetlib.recipe import Recipe
from effnetlib.runs.files import write_atomically
from effnetlib.runs.machine import pinned
from effnetlib.runs.paths import outputs_folder, published_folder
from effnetlib.runs.progress import at_work
from effnetlib.step import lower_train_step, make_train_step

ROOT = Path(__file__).parents[1]
# The mean of ImageNet's training photographs: an archive of 147,897,477,120 bytes / 1,281,167 photographs.
PHOTOGRAPH_BYTES = 115_440


@dataclass(frozen=True)
class Plan:
    """The compiler's prediction for a recipe on a slice, and what the hosts must supply.

    Bytes and flops are per step and device. Unknown values are None. If the batch does not fit, only the values up to
    `largest_batch` are known. The values for hosts need the images per second that a core makes.
    """

    topology: str
    devices: int
    chips: int
    variant: str
    global_batch_size: int
    batch_per_device: int
    recipe_hash: str
    fits: bool  # whether the train step fits in memory
    largest_batch: int  # the batch if it fits, or else the largest of its half, its quarter … that fits
    hbm_bytes: int | None = None  # the train step's arguments, results that are not donated, temporaries and code
    hbm_limit_bytes: int | None = None
    temp_bytes: int | None = None  # the temporaries among hbm_bytes
    flops: float | None = None
    bytes_accessed: float | None = None
    compiler_seconds: float | None = None  # the compiler's estimate per step, without collectives
    roofline_seconds: float | None = None  # max(flops / peak, bytes_accessed / bandwidth)
    compute_seconds: float | None = None  # compiler_seconds in [flops / peak, 10 roofline_seconds], or roofline_seconds
    compute_source: str | None = None  # which of the two: "compiler" or "roofline"
    collectives: tuple[Collective, ...] = ()
    collective_seconds: float | None = None  # by `effnetlib.planning.collectives.seconds`
    step_seconds: float | None = None  # compute_seconds + collective_seconds, if the devices never wait for images
    all_reduce_share: float | None = None  # collective_seconds / step_seconds
    images_per_second: float | None = None  # of the whole slice: global_batch_size / step_seconds
    mfu: float | None = None  # 6 x multiply-adds of the model x images_per_second / the slice's peak
    eval_seconds: float | None = None  # per evaluation: the raw weights and their average, on all evaluation images
    epochs: float | None = None
    minutes: float | None = None  # of all steps and evaluations, at the speed of the devices or the hosts (the slower)
    dollars: float | None = None
    hosts: int | None = None
    host_cores: int | None = None  # per host, as are the next three
    host_cores_needed: float | None = None  # host_images_per_second / images_per_core
    host_images_per_second: float | None = None  # images_per_second / hosts
    host_bytes_per_second: float | None = None  # of photographs to read
    images_per_core: float | None = None  # decoded and augmented per second
    input_seconds: float | None = None  # for all cores of all hosts to make one global batch
    waits: bool | None = None  # whether the devices wait for images: input_seconds > step_seconds
    versions: dict = dataclasses.field(default_factory=dict)  # of jax, jaxlib, libtpu …; and "flags" if any are set

    def supplied(self, recipe: Recipe, images_per_core: float | None) -> "Plan":
        """Adds what the hosts must supply, and the minutes of a run that may wait for images.

        By default `images_per_core` is what `make bench-input` measured on photographs with the recipe's augmentation.
        Images in memory have no such figure: the plan stays as it is."""
        images_per_core = images_per_core or measured_images_per_core().get(recipe.augmentation)
        if images_per_core is None or self.step_seconds is None:
            return self
        host = host_of(self.topology)
        hosts = math.ceil(self.chips / host.chips)
        supply, needed = hosts * host.cores * images_per_core, self.images_per_second / hosts
        input_seconds, eval_input_seconds = self.global_batch_size / supply, recipe.data.eval_examples / supply
        steps = recipe.total_steps * max(input_seconds, self.step_seconds)
        evaluations = len(recipe.eval_steps) * max(eval_input_seconds, self.eval_seconds)
        return dataclasses.replace(
            self, hosts=hosts, host_cores=host.cores, host_cores_needed=needed / images_per_core,
            host_images_per_second=needed, host_bytes_per_second=needed * PHOTOGRAPH_BYTES,
            images_per_core=images_per_core, input_seconds=input_seconds, waits=input_seconds > self.step_seconds,
            minutes=(steps + evaluations) / 60,
        )  # fmt: skip

    def priced(self, chip_hour: float | None) -> "Plan":
        """Adds the dollars of the run, at `chip_hour` dollars per chip and hour."""
        if chip_hour is None or self.minutes is None:
            return self
        return dataclasses.replace(self, dollars=chip_hour * self.chips * self.minutes / 60)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        fields = json.loads(text)
        return cls(**fields | {"collectives": tuple(Collective(**item) for item in fields["collectives"])})

    def table(self) -> str:
        """The figures as lines of text."""
        memory = f"{(self.hbm_bytes or 0) / GIB:.2f} of {self.hbm_limit_bytes / GIB:.2f} GiB per device"
        lines = [
            ("slice", f"{self.topology}, {self.devices:,} devices on {self.chips:,} chips"),
            ("batch", f"{self.global_batch_size:,}, {self.batch_per_device:,} per device"),
        ]
        if self.fits:
            lines += self._figures(memory)
        else:
            lines += [("memory", "does not fit" + (f": {memory}" if self.hbm_bytes else "")),
                      ("what fits", f"{self.largest_batch:,}, of half the batch, a quarter and so on")]  # fmt: skip
        return "\n".join(f"{name:18}{value}" for name, value in lines)

    def _figures(self, memory: str) -> Iterator[tuple[str, str]]:
        yield "memory", f"fits: {memory}, {self.temp_bytes / GIB:.2f} of it temporaries"
        yield "flops", f"{self.flops / 1e9:,.1f} G per device and step"
        yield "bytes accessed", f"{self.bytes_accessed / 1e9:,.2f} GB per device and step"
        roofline = f"(roofline {1e3 * self.roofline_seconds:,.2f} ms)"
        yield "computing", f"{1e3 * self.compute_seconds:,.2f} ms by the {self.compute_source} {roofline}"
        for exchange in self.collectives[:6]:
            yield exchange.kind, f"{exchange.count} x {exchange.bytes:,} bytes over {exchange.replicas:,} devices"
        if rest := sum(exchange.count for exchange in self.collectives[6:]):
            yield "", f"and {rest} smaller ones"
        yield "exchanging", f"{1e3 * self.collective_seconds:,.2f} ms, {self.all_reduce_share:.2%} of the step"
        yield "step", f"{1e3 * self.step_seconds:,.2f} ms"
        yield "speed", f"{self.images_per_second:,.0f} images/s, model flops utilisation {self.mfu:.2%}"
        if self.hosts:
            to_read = f"{self.host_bytes_per_second / 1e6:,.0f} MB/s to read"
            yield "hosts", f"{self.hosts:,}; each makes {self.host_images_per_second:,.0f} images/s, {to_read}"
            needed = f"{self.host_cores_needed:,.1f} of {self.host_cores} cores per host"
            yield "input", f"{needed}, at {self.images_per_core:,.0f} images/s per core"
            waits = ": the devices wait" if self.waits else ""
            yield "step of input", f"{1e3 * self.input_seconds:,.2f} ms with all cores{waits}"
        yield "whole run", f"{self.minutes:,.1f} min for {self.epochs:g} epochs and their evaluations"
        if self.dollars is not None:
            yield "price", f"{self.dollars:,.2f} dollars"


def measured_images_per_core() -> dict[str, float]:
    """By augmentation, the images per second that a core decodes and augments. `make bench-input` publishes them."""
    file = published_folder() / "input.json"
    return json.loads(file.read_text())["images_per_core"] if file.is_file() else {}


@pinned()
def plan(
    recipe: Recipe, topology: str, *, chip_hour: float | None = None, images_per_core: float | None = None,
    folder: Path | str | None = None,
) -> Plan:  # fmt: skip
    """Compiles the train and evaluation steps of a recipe for a slice that is not there, and predicts the run.

    That takes minutes, so plans are saved and found again. Flags in ``LIBTPU_INIT_ARGS`` count as on a TPU.

    Args:
      topology: generation and chips per direction, such as "v3:32x16x1" or "v5e:2x4".
      chip_hour: dollars per chip and hour.
      images_per_core: decoded and augmented per second, see `Plan.supplied`.
      folder: of saved plans; `outputs/plans` by default.

    Raises:
      EffnetlibError: an unknown topology, a batch that does not divide over it, or no compiler for TPUs (extra `plan`).
    """
    devices = devices_of(topology)
    recipe.validate(len(devices))
    name = f"{recipe.variant}-{topology.replace(':', '-')}-{_key(recipe, topology)}.json"
    file = Path(folder or outputs_folder() / "plans") / name
    if not file.exists():
        new = _plan(recipe, topology, devices)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, new.to_json() + "\n")
    return Plan.from_json(file.read_text()).supplied(recipe, images_per_core).priced(chip_hour)


def load_plans(folder: Path | str) -> list[Plan]:
    """Every plan saved in a folder, from any version of the compiler."""
    return [Plan.from_json(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]


def find_plan(plans: list[Plan], recipe: Recipe, topology: str) -> Plan | None:
    """The plan of a recipe for a slice, compiled without `LIBTPU_INIT_ARGS`; None if there is none.

    The newest compiler's plan (libtpu, then jaxlib, then jax). On a tie the slowest, to be cautious."""
    key = recipe.hash, topology
    found = [plan for plan in plans if (plan.recipe_hash, plan.topology) == key and "flags" not in plan.versions]

    def rank(plan):
        versions = (re.findall(r"\d+", plan.versions.get(name, "")) for name in ("libtpu", "jaxlib", "jax"))
        return [list(map(int, numbers)) for numbers in versions], plan.step_seconds or math.inf

    return max(found, key=rank, default=None)


def _versions() -> dict:
    found = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu", "flax", "optax")}
    # jax itself sets this one on every TPU VM.
    flags = os.environ.get("LIBTPU_INIT_ARGS", "").replace("--xla_tpu_use_enhanced_launch_barrier=true", "").strip()
    return found | {"flags": flags} if flags else found


def _key(recipe: Recipe, topology: str) -> str:
    """A hash of recipe, topology, versions and source code. Hashing the lowered program takes a minute for B5."""
    digest = hashlib.sha256(json.dumps([recipe.hash, topology, _versions()]).encode())
    patterns = "*.py", "ops/*.py", "planning/*.py", "data/images.py"
    for path in sorted(path for pattern in patterns for path in ROOT.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _plan(recipe: Recipe, topology: str, devices: list) -> Plan:
    chip, batch = chip_of(topology), recipe.global_batch_size
    chips, limit = len(devices) // chip.cores, chip.hbm_bytes // chip.cores
    known = dict(
        topology=topology, devices=len(devices), chips=chips, variant=recipe.variant, global_batch_size=batch,
        batch_per_device=batch // len(devices), recipe_hash=recipe.hash, hbm_limit_bytes=limit, epochs=recipe.epochs,
        versions=_versions(),
    )  # fmt: skip
    train = _compile_train(recipe, devices)
    hbm = hbm_bytes(train) if train else None
    evaluation = None if hbm is None or hbm > limit else _compile_evaluation(recipe, devices)
    if evaluation is None:
        return Plan(fits=False, largest_batch=_largest_batch(recipe, devices, limit), hbm_bytes=hbm, **known)
    exchanged, timing = tuple(collectives(train.as_text())), _step_timing(train, chip)
    collective_seconds = sum(seconds(exchange, chip) for exchange in exchanged)
    step = timing["compute_seconds"] + collective_seconds
    eval_steps = math.ceil(recipe.data.eval_examples / batch)
    eval_seconds = 2 * eval_steps * _step_timing(evaluation, chip)["compute_seconds"]
    image_flops = 6 * multiply_adds(recipe.variant, recipe.resolution, recipe.data.num_classes)
    return Plan(
        fits=True, largest_batch=batch, hbm_bytes=hbm, temp_bytes=train.memory_analysis().temp_size_in_bytes, **timing,
        collectives=exchanged, collective_seconds=collective_seconds, step_seconds=step,
        all_reduce_share=collective_seconds / step, images_per_second=batch / step, eval_seconds=eval_seconds,
        mfu=batch / step * image_flops / (chips * chip.flops),
        minutes=(recipe.total_steps * step + len(recipe.eval_steps) * eval_seconds) / 60, **known,
    )  # fmt: skip


def _compile_train(recipe: Recipe, devices: list) -> jax.stages.Compiled | None:
    what = f"the train step of {recipe.variant} at {recipe.global_batch_size:,} for {len(devices):,} devices"
    return _compile(lower_train_step(recipe, make_mesh(recipe.num_groups, devices))[1], what)


def _compile_evaluation(recipe: Recipe, devices: list) -> jax.stages.Compiled | None:
    init, _, graphdef = make_train_step(recipe)
    state, mesh = jax.eval_shape(init, jax.random.key(0)), make_mesh(recipe.num_groups, devices)
    shapes = dict(batch=recipe.global_batch_size, size=recipe.resolution, mesh=mesh)
    return _compile(lower_eval_step(graphdef, (state.params, state.batch_stats), **shapes), "the evaluation step")


def _compile(lowered: jax.stages.Lowered, what: str) -> jax.stages.Compiled | None:
    """The compiled program, or None if it does not fit in memory."""
    try:
        with at_work(f"compiling {what}"):
            return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error):
            raise
        return None


def hbm_bytes(compiled: jax.stages.Compiled) -> int:
    memory = compiled.memory_analysis()
    inputs, results = memory.argument_size_in_bytes, memory.output_size_in_bytes - memory.alias_size_in_bytes
    return inputs + results + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes


def _largest_batch(recipe: Recipe, devices: list, limit: int) -> int:
    """The first of half the batch, a quarter … that fits; 0 if none does."""
    batch, group = recipe.global_batch_size // 2, recipe.batch_norm_batch_size
    while batch and batch % len(devices) == 0:
        # The peak learning rate falls with the batch. It must not fall below end_lr, which does not change the memory.
        smaller = dict(global_batch_size=batch, batch_norm_batch_size=min(batch, group), end_lr=0.0)
        with contextlib.suppress(EffnetlibError):
            tried = recipe.replace(**smaller)
            tried.validate(len(devices))
            if (train := _compile_train(tried, devices)) and hbm_bytes(train) <= limit:
                return batch
        batch //= 2
    return 0


def _step_timing(compiled, chip) -> dict:
    costs = compiled.cost_analysis()
    arithmetic = costs["flops"] / (chip.flops / chip.cores)
    roofline = max(arithmetic, costs["bytes accessed"] / (chip.hbm_bandwidth / chip.cores))
    estimate = costs.get("optimal_seconds")
    plausible = estimate is not None and arithmetic <= estimate <= 10 * roofline
    return dict(
        flops=costs["flops"], bytes_accessed=costs["bytes accessed"], compiler_seconds=estimate, roofline_seconds=roofline,
        compute_seconds=estimate if plausible else roofline, compute_source="compiler" if plausible else "roofline",
    )  # fmt: skip
