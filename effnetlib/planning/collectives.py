"""The collectives of a compiled program, and a model of the time that they take."""

import math
import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

from effnetlib.planning.topology import Chip

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
HOP_SECONDS = 1e-6

_ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8}
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(?:-start)?\(")


@dataclass(frozen=True)
class Collective:
    """One kind of exchange: bytes per device, devices per group, and how often per step."""

    kind: str
    bytes: int
    replicas: int
    count: int


def parse_replica_groups(line: str) -> list[list[int]]:
    """The groups of devices in a collective's line of compiled HLO. XLA writes them in three ways.

    >>> parse_replica_groups("all-reduce(x), replica_groups={{0,1},{2,3}}, to_apply=add")
    [[0, 1], [2, 3]]
    >>> parse_replica_groups("all-reduce(x), replica_groups=[2,2]<=[2,2]T(1,0), to_apply=add")
    [[0, 2], [1, 3]]
    """
    text = line.partition("replica_groups=")[2]
    if listed := re.match(r"\{(\{[\d,{}]*\})\}", text):
        return [[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    if counted := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, dimensions, order = ([int(n) for n in part.split(",")] if part else None for part in counted.groups())
        return np.arange(math.prod(dimensions)).reshape(dimensions).transpose(order).reshape(shape).tolist()
    named = re.match(r"mesh\[(.*?)\] \{(.*?)\}", text)
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
    axes = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", named[2])]
    grid = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
    members = math.prod(grid.shape[axis] for axis in axes)
    return np.moveaxis(grid, axes, range(-len(axes), 0)).reshape(-1, members).tolist()


def shapes(line: str) -> list[tuple[str, list[int]]]:
    """dtype and shape of each array in a collective's line of compiled HLO.

    >>> shapes("%r = (f32[8]{0}, bf16[2,4]{1,0}) all-reduce(%a, %b), replica_groups={{0,1}}")
    [('f32', [8]), ('bf16', [2, 4])]
    """
    found = _COLLECTIVE.search(line)
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", found[1]) if found else []
    return [(dtype, [int(n) for n in dims.split(",") if n]) for dtype, dims in arrays]


def collectives(text: str) -> list[Collective]:
    """The exchanges of a compiled program (its `compiled.as_text()`), the largest first."""
    counts = Counter()
    for line in text.splitlines():
        if found := _COLLECTIVE.search(line):
            size = sum(_ITEM_BYTES[dtype] * math.prod(dims) for dtype, dims in shapes(line))
            replicas = len(parse_replica_groups(line)[0]) if "replica_groups=" in line else 2
            counts[found[2], size, replicas] += 1
    return sorted((Collective(*key, count) for key, count in counts.items()), key=lambda c: -c.bytes * c.count)


def seconds(collective: Collective, chip: Chip) -> float:
    """Seconds per step of one kind of exchange: a model, not a measurement::

        count * (2 * bytes * (n - 1) / n / (links * link bandwidth) + d * n ** (1 / d) * hop)

    n chips form a d-dimensional torus and use all links (two per dimension) at once. An all-reduce is two passes: a
    reduce-scatter, then an all-gather ("How to scale your model", chapter 3). Other kinds are one pass. A pass takes
    n ** (1 / d) / 2 hops per dimension, and a hop 1 microsecond. The cores of a chip add up first, at no cost. Every
    slice counts as a torus, though small ones do not close their rings. Nothing overlaps with computing.
    """
    chips = math.ceil(collective.replicas / chip.cores)
    passes = 2 if collective.kind == "all-reduce" else 1
    links = 2 * chip.dimensions
    transfer = passes * collective.bytes * (chips - 1) / chips / (links * chip.link_bandwidth)
    latency = passes / 2 * chip.dimensions * chips ** (1 / chip.dimensions) * HOP_SECONDS if chips > 1 else 0.0
    return collective.count * (transfer + latency)
