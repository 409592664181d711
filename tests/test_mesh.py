import jax
import numpy as np
import pytest

from effnetlib import EffnetlibError, Recipe, make_mesh, simulate_devices
from effnetlib.mesh import AXES, batch_sharding, replica_groups


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
