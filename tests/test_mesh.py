import importlib.util
import math
from dataclasses import dataclass
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from effnetlib import EffnetlibError, Recipe, make_mesh, simulate_devices
from effnetlib.mesh import AXES, _torus, batch_sharding, replica_groups
from effnetlib.planning.topology import CHIPS, NAMES, chip_of, devices_of


def test_groups_of_up_to_sixteen_are_contiguous():
    np.testing.assert_array_equal(replica_groups(8, 2), [[0, 1], [2, 3], [4, 5], [6, 7]])
    np.testing.assert_array_equal(replica_groups(1024, 16), np.arange(1024).reshape(64, 16))


@pytest.mark.parametrize(("cores", "chips"), [(128, (8, 8)), (256, (16, 8)), (512, (16, 16)), (1024, (32, 16))])
@pytest.mark.parametrize(("size", "tile"), [(32, (4, 4)), (64, (4, 8))])
def test_larger_groups_are_the_references_tiles(cores, chips, size, tile):
    """From each core to its place, the other way round than the code goes: which tile, and which step of the walk."""
    wanted = np.full((cores // size, size), -1)
    for core in range(cores):
        row, column = core // (2 * chips[1]), core % (2 * chips[1]) // 2
        group = row // tile[0] * (chips[1] // tile[1]) + column // tile[1]
        row, column = row % tile[0], column % tile[1]
        along = column if row % 2 == 0 else tile[1] - 1 - column  # there on even rows, back on odd ones
        wanted[group, 2 * (row * tile[1] + along) + core % 2] = core
    np.testing.assert_array_equal(replica_groups(cores, size), wanted)


@pytest.mark.parametrize("cores", [128, 256, 512, 1024])
def test_group_sizes_and_contiguous_groups_are_the_references(cores):
    def replicas_a_group(optimizer):
        recipe = Recipe.preset(f"b2-{32 * cores}-{optimizer}")
        return recipe.batch_norm_batch_size * cores // recipe.global_batch_size

    assert replicas_a_group("rmsprop") == max(8, cores // 8)  # TpuBatchNormalization
    assert replicas_a_group("lars") == 128 / 32  # DistributedBatchNormalization, its default of 128 examples
    for size in (2, 4, 8, 16, 128):
        np.testing.assert_array_equal(replica_groups(cores, size), np.arange(cores).reshape(-1, size))


def test_the_first_tile_is_walked_there_and_back():
    first = replica_groups(1024, 32)[0]
    np.testing.assert_array_equal(first[:16], [0, 1, 2, 3, 4, 5, 6, 7, 38, 39, 36, 37, 34, 35, 32, 33])


def torus_of(name):
    generation, chips = name.split(":")
    return tuple(int(n) for n in chips.split("x")), CHIPS[generation].cores


def chips_of_box(places):
    """Chips in the smallest box that holds them all."""
    return np.prod(np.ptp(places, axis=-2) + 1, axis=-1)


@pytest.mark.parametrize("way", [1, -1])
@pytest.mark.parametrize("name", NAMES)
def test_a_group_is_a_box_of_neighbours_on_every_slice_that_is_named(name, way):
    chips, cores = torus_of(name)
    chips, replicas = chips[::way], math.prod(chips) * cores
    place = np.stack(np.unravel_index(np.arange(replicas) // cores, chips), -1)
    for power in range(replicas.bit_length()):
        groups = place[replica_groups(replicas, 2**power, (*chips, cores))]
        assert (chips_of_box(groups) == max(1, 2**power // cores)).all()
        if power in (5, 6):
            assert np.abs(np.diff(groups, axis=1)).sum(-1).max() == 1


@pytest.mark.parametrize(
    ("torus", "size", "box"),
    [((4, 8, 8, 1), 32, (2, 4, 4)), ((4, 8, 8, 1), 64, (4, 4, 4)), ((16, 16, 1), 32, (4, 8)), ((16, 32, 2), 32, (4, 4)),
     ((8, 16, 2), 64, (4, 8)), ((4, 4, 12, 1), 48, (4, 4, 3)), ((8, 8, 8, 1), 128, (4, 4, 8)), ((16, 2, 1), 32, (16, 2))],
)  # fmt: skip
def test_the_box_has_the_most_equal_sides_that_fill_the_slice(torus, size, box):
    *chips, cores = torus
    replicas = math.prod(torus)
    groups = replica_groups(replicas, size, torus)
    np.testing.assert_array_equal(np.sort(groups, axis=None), np.arange(replicas))
    place = np.stack(np.unravel_index(groups // cores, chips), -1)
    np.testing.assert_array_equal(np.ptp(place, axis=1) + 1, np.broadcast_to(box, (len(groups), len(box))))


def test_groups_that_share_a_chip_are_contiguous():
    np.testing.assert_array_equal(replica_groups(108, 27, (9, 6, 2)), np.arange(108).reshape(4, 27))


def test_devices_without_places_or_with_gaps_between_them_are_a_line():
    def device(x, y, core=0):
        return SimpleNamespace(coords=(x, y, 0), core_on_chip=core)

    full = [device(x, y, core) for x in range(2) for y in range(3) for core in range(2)]
    assert _torus(full) == (2, 3, 2) and _torus(full[:4]) == (2, 2) and _torus(full[:-2]) == (10, 1)
    assert _torus(jax.devices()) == (8, 1)


@dataclass(frozen=True)
class Core:
    """What a mesh asks of a TPU's device."""

    coords: tuple[int, int, int]
    core_on_chip: int
    slice_index: int = 0


@pytest.mark.parametrize("chips", [(16, 32), (32, 16)])
def test_tiles_follow_the_coordinates_in_either_orientation_of_a_slice(chips):
    devices = [
        Core((x, y, 0), core)
        for y in range(chips[1]) for x in range(chips[0]) for core in range(2)
    ]  # fmt: skip
    for size, box in ((32, (4, 4)), (64, (4, 8))):
        places = np.array([d.coords for d in make_mesh(1024 // size, devices).devices.flat]).reshape(-1, size, 3)
        sides = np.ptp(places, axis=1)[:, :2] + 1
        assert set(map(tuple, np.sort(sides))) == {box}


def test_of_several_slices_no_group_spans_two():
    devices = [
        Core((x, y, 0), 0, part)
        for x in range(8) for y in range(8) for part in range(2)
    ]  # fmt: skip
    for size in (16, 32, 64):
        groups = make_mesh(128 // size, devices).devices
        assert all(len({device.slice_index for device in group}) == 1 for group in groups)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the compiler for TPUs")
@pytest.mark.parametrize("name", ["v3:32x16x1", "v3:16x32x1", "v4:4x8x8", "v5p:4x8x8", "v5e:16x16", "v6e:16x16"])
def test_the_mesh_of_a_slice_that_is_not_there_has_compact_groups(name):
    devices, cores = devices_of(name), chip_of(name).cores
    for size in (32, 64, 128):
        mesh = make_mesh(len(devices) // size, devices)
        places = np.array([device.coords for device in mesh.devices.flat]).reshape(-1, size, 3)
        assert (chips_of_box(places) == size // cores).all()


@pytest.mark.parametrize(("groups", "shape"), [(1, (1, 8)), (2, (2, 4)), (8, (8, 1)), (32, (8, 1))])
def test_mesh_shape(groups, shape):
    mesh = make_mesh(groups)
    assert mesh.axis_names == AXES and mesh.devices.shape == shape


def test_each_device_holds_a_contiguous_slice_of_its_group():
    sharding = batch_sharding(make_mesh(2))
    slices = {device.id: index[0] for device, index in sharding.devices_indices_map((16,)).items()}
    assert [slices[i].start for i in range(8)] == [0, 2, 4, 6, 8, 10, 12, 14]


def test_groups_that_do_not_fit():
    with pytest.raises(EffnetlibError, match="3 batch-norm groups do not fit 8 devices"):
        make_mesh(3)


def test_simulating_too_late_says_what_to_do():
    jax.devices()
    simulate_devices(8)
    with pytest.raises(EffnetlibError, match="restart the kernel"):
        simulate_devices(4)
