"""TPU slices by name: their devices for the compiler, and the figures of their chips and hosts."""

import importlib.metadata
import importlib.util
import math
import os
import re
from dataclasses import dataclass
from typing import NamedTuple

from packaging.requirements import Requirement

from effnetlib.errors import EffnetlibError, did_you_mean, require

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """The published figures of a generation's chip.

    Sources: Cloud TPU documentation for flops and memory. Of v4, v5e and v6e the memory is what a program may use, by the
    compiler's own messages ("of 15.75G hbm"). Links of v2 and v3 (496 and 656 Gbit/s): Jouppi et al., CACM
    63(7), 2020. Links from v4 on: "How to scale your model", chapter 2. Quoted from memory, so check before use.
    """

    cores: int  # devices that jax sees per chip
    flops: float  # dense bfloat16 operations per second
    hbm_bytes: int
    hbm_bandwidth: float  # bytes per second to and from memory
    link_bandwidth: float  # bytes per second per link and direction
    dimensions: int  # of the torus of links: two links per dimension
    slices: tuple[str, ...]  # common shapes, in chips


_SQUARES = ("2x2x1", "4x4x1", "8x8x1", "16x16x1")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")
_PLANES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CHIPS = {
    "v2": Chip(2, 46e12, 16 * GIB, 700e9, 62e9, 2, (*_SQUARES, "8x16x1")),
    "v3": Chip(2, 123e12, 32 * GIB, 900e9, 82e9, 2, (*_SQUARES, "16x8x1", "32x16x1", "32x32x1")),
    "v4": Chip(1, 275e12, int(30.75 * GIB), 1200e9, 45e9, 3, _CUBES),
    "v5e": Chip(1, 197e12, int(15.75 * GIB), 819e9, 45e9, 2, _PLANES),
    "v5p": Chip(1, 459e12, 95 * GIB, 2765e9, 90e9, 3, _CUBES),
    "v6e": Chip(1, 918e12, int(31.25 * GIB), 1638e9, 90e9, 2, _PLANES),
}
NAMES = tuple(f"{generation}:{chips}" for generation, chip in CHIPS.items() for chips in chip.slices)


class Host(NamedTuple):
    """Per host: chips, vCPUs and gigabytes of memory."""

    chips: int
    cores: int
    memory_gb: int


# A slice on one host takes the host with that many chips. A larger slice takes several of the last host in the list.
# Sources: Cloud TPU documentation, "TPU v5e", VM types; the machine types of GKE's cluster autoscaler (ct3, ct3p, ct4p,
# ct5lp, ct5p, ct6e). No source was found for v2, so it has v3's figures.
HOSTS = {
    "v2": (Host(4, 96, 340), Host(4, 48, 340)),
    "v3": (Host(4, 96, 340), Host(4, 48, 340)),
    "v4": (Host(4, 240, 407),),
    "v5e": (Host(1, 24, 48), Host(8, 224, 384), Host(4, 112, 192)),
    "v5p": (Host(4, 208, 448),),
    "v6e": (Host(1, 44, 176), Host(8, 180, 1440), Host(4, 180, 720)),
}


def host_of(topology: str) -> Host:
    """The host machine of a topology. `chip_of` must know the topology's generation."""
    hosts = HOSTS[topology.partition(":")[0]]
    return next((host for host in hosts if host.chips == _chips(topology)), hosts[-1])


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as "v3:32x16x1" (generation, and chips per direction).

    Raises:
      EffnetlibError: the generation is unknown.
    """
    generation = topology.partition(":")[0]
    if generation not in CHIPS:
        known = NAMES if ":" in topology else CHIPS
        raise EffnetlibError(f"no topology {topology!r} (v3:32x16x1 is one): {did_you_mean(topology, known)}")
    return CHIPS[generation]


def check_compiler() -> None:
    """Raises EffnetlibError if libtpu is missing, or if jax asks for another version. It dies when it compiles ahead with an
    old one, such as Colab's or Kaggle's. To run on a TPU, an old one is good enough."""
    how = "pip install 'effnetlib[plan]' in a fresh environment brings it (Linux on x86-64)"
    require(importlib.util.find_spec("libtpu"), f"the compiler for TPUs is not installed: {how}")
    installed, jax = (importlib.metadata.version(name) for name in ("libtpu", "jax"))
    for asked in map(Requirement, importlib.metadata.requires("jax")):
        fits = asked.name != "libtpu" or asked.specifier.contains(installed)
        require(
            fits,
            f"libtpu {installed} cannot compile plans for jax {jax}, which asks for libtpu{asked.specifier}: {how}",
        )


def devices_of(topology: str) -> list:
    """Devices to compile for, in the order that jax gives them on a real slice. Needs the package libtpu, but no TPU.

    Raises:
      EffnetlibError: the compiler does not know the slice, is not installed, or is not the one that jax asks for.
    """
    check_compiler()
    chip = chip_of(topology)
    # Without these libtpu looks for a TPU VM's metadata, prints that it found none, and locks out a second process. The
    # accelerator types are any valid ones: only the topology decides. libtpu would set the last two itself.
    no_tpu_vm = {
        "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0", "TPU_ACCELERATOR_TYPE": "v3-8",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "CLOUD_TPU_TASK_ID": "0", "CLOUD_TPU_ACCELERATOR_TYPE": "v3-8",
    }  # fmt: skip
    from jax.experimental import topologies

    added = {name: value for name, value in no_tpu_vm.items() if name not in os.environ}
    os.environ.update(added)
    # jax sees a v4 chip's two cores as one device. Without "megacore" the description has one core only.
    options = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    if topology.endswith(":1x1"):
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    except Exception:  # jaxlib raises one type for every error
        nearest = f"the nearest common one is {_nearest(topology)}"
        raise EffnetlibError(f"the compiler does not know the topology {topology!r}: {nearest}") from None
    finally:
        # A real TPU of this process or of its children must not read them.
        for name in added:
            del os.environ[name]
    chips = _chips(topology)
    if len(found) != chips * chip.cores:
        raise EffnetlibError(f"the compiler counts {len(found)} devices in {topology}, not {chips * chip.cores}")
    return list(found)


def _chips(topology: str) -> int:
    return math.prod(int(n) for n in re.findall(r"\d+", topology.partition(":")[2]))


def _nearest(topology: str) -> str:
    generation = topology.partition(":")[0]
    named = [name for name in NAMES if name.startswith(f"{generation}:")]
    return min(named, key=lambda name: abs(math.log(_chips(name) / max(1, _chips(topology)))))
