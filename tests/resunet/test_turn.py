import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from resunet.turn import rotation, thick_axis, turn

CUBES = (1.0, 1.0, 1.0)


def test_thick_slices_are_more_than_three_times_as_coarse():
    assert thick_axis((3.0, 1.0, 1.0)) is None and thick_axis(CUBES) is None
    assert thick_axis((3.1, 1.0, 2.0)) == 0 and thick_axis((0.5, 2.0, 0.6)) == 1 and thick_axis((1.0, 1.0, 5.0)) == 2


def test_the_rotation_is_that_of_scipy():
    angles = (0.3, -0.7, 1.1)
    # scipy's coordinates are (x, y, z); a turn about y from z to x is there positive, here from z to x in (z, x)
    expected = Rotation.from_euler("ZYX", [-0.3, -0.7, -1.1]).as_matrix()
    np.testing.assert_allclose(rotation(angles).numpy(), expected[::-1, ::-1], atol=1e-12)
    assert torch.linalg.det(rotation(angles)).item() == pytest.approx(1)


@pytest.mark.parametrize("spacing", [CUBES, (2.5, 1.0, 1.0), (0.8, 0.7, 2.0)])
def test_a_turn_in_voxels_is_rigid_in_mm(spacing):
    voxels = np.random.default_rng(0).standard_normal((3, 50))
    mm = np.array(spacing)[:, None]
    turned = turn((0.3, -0.7, 1.1), spacing).numpy() @ voxels
    np.testing.assert_allclose(turned * mm, rotation((0.3, -0.7, 1.1)).numpy() @ (voxels * mm), atol=1e-12)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_thick_slices_are_turned_within_themselves(axis):
    spacing = [4.0 if i == axis else 1.0 for i in range(3)]
    made = turn((0.3, -0.7, 1.1), spacing)
    across = torch.eye(3, dtype=torch.float64)[axis]
    assert torch.equal(made[axis], across) and torch.equal(made[:, axis], across)
    assert (made - torch.eye(3)).abs().max() > 0.04
