import jax
import numpy as np
import pytest

from effnetlib import EffnetlibError, make_mesh, simulate_devices
from effnetlib.mesh import AXES, batch_sharding, replica_groups


def test_groups_of_up_to_sixteen_are_contiguous():
    np.testing.assert_array_equal(replica_groups(8, 2), [[0, 1], [2, 3], [4, 5], [6, 7]])
    np.testing.assert_array_equal(replica_groups(1024, 16), np.arange(1024).reshape(64, 16))


@pytest.mark.parametrize(("replicas", "columns"), [(128, 8), (256, 8), (512, 16), (1024, 16)])
@pytest.mark.parametrize(("size", "tile"), [(32, (4, 4)), (64, (4, 8))])
def test_larger_groups_are_tiles(replicas, columns, size, tile):
    groups = replica_groups(replicas, size)
    np.testing.assert_array_equal(np.sort(groups.ravel()), np.arange(replicas))  # each core once
    rows, cols = groups // (2 * columns), groups % (2 * columns) // 2
    for r, c in zip(rows, cols, strict=True):
        assert np.ptp(r) == tile[0] - 1 and np.ptp(c) == tile[1] - 1
        assert r.min() % tile[0] == 0 and c.min() % tile[1] == 0


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
