"""The device mesh: its two axes are the batch-norm groups and the members of a group.

Source: section 3.4 of the paper (groups of more than 16 replicas form 2-D tiles). The tiles are those of Google's MLPerf
v0.7 entry (resnet-research-TF-tpu-v3-8192/util/image_util.py), the nearest published code by the same people.
"""

import functools
import itertools
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from effnetlib.errors import EffnetlibError

AXES = ("bn_group", "bn_member")

# Google's entry, on chips of two cores: replicas -> (rows, columns) of the slice in chips; group sizes that are tiles.
SLICES = {128: (8, 8), 256: (16, 8), 512: (16, 16), 1024: (32, 16), 2048: (32, 32), 4096: (32, 64), 8192: (32, 128)}
TILED_GROUPS = 32, 64
LARGEST_CONTIGUOUS_GROUP = 16


def replica_groups(num_replicas: int, group_size: int, torus: Sequence[int] | None = None) -> np.ndarray:
    """Which replicas share batch-norm statistics: ids ``[num_replicas // group_size, group_size]``.

    Groups of up to 16 replicas are contiguous: ``arange.reshape(-1, group_size)``. Larger groups are boxes of chips
    that fill the torus, with sides as equal as possible: 32 replicas are 4x4 chips of two cores, or 2x4x4 of one.
    Inside a box, ids go from chip to neighbour: along one row, and back along the next. A large group is contiguous
    where no box fits, and where Google's entry has it so: on its slices, all sizes but 32 and 64.

    Args:
      group_size: replicas per group.
      torus: chips in each direction and cores per chip, such as ``(32, 16, 2)``. Ids count through it row by row.
        None is the slice of Google's entry with that many replicas, or a line where it has none.
    """
    contiguous = np.arange(num_replicas).reshape(-1, group_size)
    published = (*SLICES.get(num_replicas, ()), 2)
    *chips, cores = torus or published
    theirs = (*chips, cores) == published and group_size not in TILED_GROUPS
    sides = ([n for n in range(1, side + 1) if side % n == 0] for side in chips)
    boxes = [box for box in itertools.product(*sides) if math.prod(box) * cores == group_size]
    if group_size <= LARGEST_CONTIGUOUS_GROUP or theirs or not boxes:
        return contiguous
    box, walk = min(boxes, key=sum), [()]
    for side in reversed(box):
        walk = [(i, *place) for i in range(side) for place in (walk[::-1] if i % 2 else walk)]
    grid = contiguous.reshape(*chips, cores)
    corners = np.array(list(np.ndindex(*np.floor_divide(chips, box)))) * box
    return np.array([grid[tuple(np.transpose(corner + walk))].ravel() for corner in corners])


def groups_fit(num_groups: int, num_devices: int) -> bool:
    """Whether each device holds whole groups, or each group spans whole devices.

    >>> groups_fit(16, 8), groups_fit(2, 8), groups_fit(3, 8)
    (True, True, False)
    """
    return num_groups % num_devices == 0 or num_devices % num_groups == 0


def nearest_group_size(batch: int, size: int, num_devices: int = 1) -> int:
    """Examples per group: the number nearest to `size` that divides the batch into groups which fit the devices.

    >>> nearest_group_size(96, 30), nearest_group_size(96, 30, num_devices=8)
    (32, 24)
    """
    small = [n for n in range(1, math.isqrt(batch) + 1) if batch % n == 0]
    divisors = small + [batch // n for n in reversed(small)]
    fitting = (n for n in divisors if groups_fit(batch // n, num_devices))
    return min(fitting, key=lambda n: abs(n - size))


def make_mesh(num_groups: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh ``(bn_group, bn_member)`` over `devices` (all of them by default), with axis type Auto.

    With fewer groups than devices each group spans ``devices / num_groups`` members; with more, each device holds
    several groups and ``bn_member`` is 1. On a TPU the replica id follows the chip's place in the torus.

    Raises:
      EffnetlibError: neither number divides the other.
    """
    devices = jax.devices() if devices is None else devices
    if not groups_fit(num_groups, len(devices)):
        raise EffnetlibError(
            f"{num_groups} batch-norm groups do not fit {len(devices)} devices: one number must divide the other"
        )
    replicas = sorted(devices, key=_place)
    members = max(1, len(devices) // num_groups)
    grid = np.empty(len(replicas), object)
    grid[:] = replicas
    return Mesh(grid[replica_groups(len(replicas), members, _torus(replicas))], AXES, axis_types=(AxisType.Auto,) * 2)


def _torus(devices):
    """Chips in each direction that has more than one, and cores per chip; a line where devices fill no torus, or several."""
    slices, *chips, cores = (len(set(places)) for places in zip(*map(_place, devices), strict=True))
    if hasattr(devices[0], "coords") and slices == 1 and math.prod(chips) * cores == len(devices):
        return *(side for side in chips if side > 1), cores
    return len(devices), 1


def _place(device: jax.Device) -> tuple:
    if hasattr(device, "coords"):
        return (getattr(device, "slice_index", 0), *device.coords, getattr(device, "core_on_chip", 0))
    return (device.process_index, device.id)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first dimension split over all devices, group by group."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def on_every_device(tree, sharding: NamedSharding):
    """Arrays of the host, the same on every process, as arrays on all devices of a sharding.

    `jax.device_put` would first compare them across the processes, with one collective per array.
    """
    place = functools.partial(jax.make_array_from_callback, sharding=sharding)
    return jax.tree.map(lambda x: place(np.shape(x), data_callback=lambda index: np.asarray(x)[index]), tree)


def shapes_of(tree, sharding: NamedSharding):
    """The shapes of a tree's arrays, with a sharding: enough to lower a program for, without any array or device."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
