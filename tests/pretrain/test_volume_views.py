"""Views of volumes; what they share with images is in test_views.py."""

from itertools import pairwise, product

import numpy as np
import pytest
import scipy.ndimage
import torch

from pretrain.crop import Grid, crop, crop_grid
from pretrain.recipe import ViewSettings
from pretrain.views import make_views, stack_scans
from resunet.draws import Draws
from resunet.intensity import _blur, _gamma

STILL = {"scale": (1, 1), "ratio": (1, 1), "flip": 0, "rotation": 0, "intensity": 0, "blur": 0, "noise": 0}
CUBES, LONG, THICK = (1.0, 1.0, 1.0), (2.5, 1.0, 0.9), (1.0, 4.0, 1.0)


def still(size: int | tuple[int, int, int], **changes: object) -> ViewSettings:
    return ViewSettings.model_validate(STILL | {"size": size} | changes)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_scans(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed))


def whole(scans: torch.Tensor) -> torch.Tensor:
    return torch.tensor([scans.shape[2:]] * len(scans))


def middle(sizes: torch.Tensor) -> torch.Tensor:
    return (sizes // 2)[:, None].expand(-1, 2, -1)


def views_of(scans: torch.Tensor, settings: ViewSettings, spacing: tuple[float, ...] = CUBES, seed: int = 0) -> torch.Tensor:
    sizes = whole(scans)
    its = torch.tensor([spacing] * len(scans))
    return make_views(scans, sizes, middle(sizes), settings, generator(seed), spacing=its).values


def grid_of(size: tuple[int, ...], settings: ViewSettings, spacing: tuple[float, ...], count: int = 200) -> Grid:
    sizes = torch.tensor([size] * count)
    draws = Draws(generator(), range(count), count)
    return crop_grid(sizes, sizes // 2, torch.tensor([spacing] * count), settings, draws)[0]


def axes_of(grid: Grid) -> torch.Tensor:
    """(N, 3, 3): the steps from a view's voxel to the next along z, y and x, as (z, y, x) in voxels of the scan."""
    at = grid.positions.flip(-1)
    origin = at[:, 0, 0, 0]
    return torch.stack([at[:, 1, 0, 0] - origin, at[:, 0, 1, 0] - origin, at[:, 0, 0, 1] - origin], dim=1)


@pytest.mark.parametrize("size", [9, (8, 13, 10)])
def test_identity_settings_give_the_volume(size):
    scans = random_scans(2, 2, *((size,) * 3 if isinstance(size, int) else size))
    views = views_of(scans, still(size))
    torch.testing.assert_close(views, torch.cat([scans, scans]), atol=5e-5, rtol=0)


def test_flips_are_those_of_torch():
    scans = random_scans(1, 1, 8, 8, 8).expand(48, -1, -1, -1, -1)
    wanted = {dims: torch.flip(scans[0], dims) for dims in ((), (1,), (2,), (3,), (1, 2), (1, 3), (2, 3), (1, 2, 3))}
    seen = set()
    for view in views_of(scans, still(8, flip=0.5)):
        (match,) = (dims for dims, one in wanted.items() if torch.allclose(view, one, atol=5e-5))
        seen.add(match)
    assert len(seen) == 8


def test_reading_is_that_of_scipy():
    scan = random_scans(1, 1, 9, 14, 10)
    positions = torch.rand(1, 8, 9, 10, 3, generator=generator(1)) * 50 - 20  # far outside on all sides
    read = crop(scan, Grid(positions, torch.ones(1, 3)), whole(scan))
    x, y, z = positions[0].double().numpy().transpose(3, 0, 1, 2)
    oracle = scipy.ndimage.map_coordinates(scan[0, 0].double().numpy(), [z, y, x], order=1, mode="mirror")
    np.testing.assert_allclose(read[0, 0].numpy(), oracle, atol=1e-4)


@pytest.mark.parametrize("spacing", [CUBES, LONG])
def test_a_view_is_turned_rigidly_in_mm_about_every_axis(spacing):
    """A view's axes stay at right angles and as long as they were, in mm and not in voxels; its centre stays."""
    grid = grid_of((20, 30, 40), still((8, 10, 9), rotation=40, scale=(0.3, 0.3)), spacing)
    straight = grid_of((20, 30, 40), still((8, 10, 9), scale=(0.3, 0.3)), spacing)
    mm = torch.tensor(spacing)
    turned, before = axes_of(grid) * mm, axes_of(straight) * mm
    inner = before.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(before, torch.diag_embed(inner), atol=2e-5, rtol=0)
    torch.testing.assert_close(turned @ turned.mT, torch.diag_embed(inner**2), atol=2e-4, rtol=0)
    torch.testing.assert_close(grid.positions.mean(dim=(1, 2, 3)), straight.positions.mean(dim=(1, 2, 3)), atol=1e-4, rtol=0)
    rotations = turned / inner[..., None]
    off = rotations - torch.eye(3)
    assert (off.abs().amax(dim=0) > 0.25).all(), "about every axis"
    assert torch.linalg.det(rotations).min() > 0.99
    degrees = torch.rad2deg(torch.acos(((rotations.diagonal(dim1=1, dim2=2).sum(dim=1) - 1) / 2).clamp(-1, 1)))
    assert 35 < degrees.max() < 40 * 3**0.5


def test_thick_slices_are_turned_within_themselves():
    grid = grid_of((30, 12, 40), still(8, rotation=40, scale=(0.3, 0.3)), THICK)
    straight = grid_of((30, 12, 40), still(8, scale=(0.3, 0.3)), THICK)
    along = (..., 1)  # y, of (x, y, z)
    torch.testing.assert_close(grid.positions[along], straight.positions[along], atol=1e-5, rtol=0)
    assert (grid.positions - straight.positions)[..., 0].abs().max() > 3


@pytest.mark.parametrize("spacing", [CUBES, LONG])
@pytest.mark.parametrize("size", [8, (8, 16, 12)])
def test_crops_cover_the_share_of_the_volume_they_are_told_to(spacing, size):
    """In mm of the proportions of the view, up to `ratio`, and inside the scan."""
    settings = still(size, scale=(0.05, 0.12), ratio=(0.8, 1.25))
    grid = grid_of((40, 100, 110), settings, spacing, 400)
    step = axes_of(grid).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(grid.zoom, step, atol=1e-4, rtol=0)
    view, mm = torch.tensor(settings.sides(3)), torch.tensor(spacing)
    share = (step * view).prod(dim=1) / (40 * 100 * 110)
    assert 0.0499 < share.min() < 0.053 and 0.115 < share.max() < 0.1201
    voxel = step * mm  # of the view
    for other in (0, 1):
        ratio = voxel[:, 2] / voxel[:, other]
        assert 0.799 < ratio.min() < 0.82 and 1.22 < ratio.max() < 1.251
    first, last = grid.positions.flip(-1)[:, 0, 0, 0], grid.positions.flip(-1)[:, -1, -1, -1]
    assert (first - step / 2 > -0.501).all() and (last + step / 2 < torch.tensor([40, 100, 110]) - 0.499).all()


def test_the_voxels_of_a_view_are_cubes_or_those_of_the_scan():
    for voxels, wanted in (("cubes", CUBES), ("scan", LONG)):
        grid = grid_of((60, 60, 60), still(8, scale=(0.02, 0.02), voxels=voxels), LONG, 2)
        mm = axes_of(grid).diagonal(dim1=1, dim2=2) * torch.tensor(LONG)
        expected = (0.02 * 60**3 * 2.5 * 0.9 / (np.prod(wanted) * 8**3)) ** (1 / 3) * torch.tensor(wanted)
        torch.testing.assert_close(mm, expected.float().expand(2, 3), atol=1e-4, rtol=0)


def test_a_crop_is_no_longer_than_the_scan():
    grid = grid_of((6, 40, 40), still(8), (3.0, 1.0, 1.0), 1)
    assert (grid.zoom * 8)[0].tolist() == pytest.approx([6, (18 * 40 * 40) ** (1 / 3), (18 * 40 * 40) ** (1 / 3)])


@pytest.mark.parametrize("zoom", [(1, 1, 1), (2, 2, 2), (1, 2, 4)])
def test_large_crops_are_means_along_each_axis(zoom):
    """Also where the scan's voxels are no cubes: of a view of cubes along one axis more of them."""
    scans = random_scans(2, 2, *(8 * n for n in zoom))
    views = views_of(scans, still(8), tuple(max(zoom) / n for n in zoom))
    torch.testing.assert_close(views[:2], torch.nn.functional.avg_pool3d(scans, zoom), atol=5e-5, rtol=0)


def test_every_scan_is_read_from_its_own_level():
    shapes = [(32, 32, 32), (8, 8, 8), (16, 32, 8)]
    spacing = torch.tensor([CUBES, CUBES, (2.0, 1.0, 4.0)])
    volumes = [np.random.default_rng(i).standard_normal((1, *shape), np.float32) for i, shape in enumerate(shapes)]
    scans, sizes = stack_scans(volumes)
    views = make_views(scans, sizes, middle(sizes), still(8), generator(), spacing=spacing).values[:3]
    for view, one, kernel in zip(views, volumes, ((4, 4, 4), (1, 1, 1), (2, 4, 1)), strict=True):
        torch.testing.assert_close(view, torch.nn.functional.avg_pool3d(torch.from_numpy(one), kernel), atol=5e-5, rtol=0)


@pytest.mark.parametrize("size", [8, 20])
def test_the_padding_is_never_read(size):
    shapes = [(9, 23, 31), (30, 12, 17), (19, 19, 19)]
    settings = ViewSettings(size=size, rotation=180, scale=(0.1, 1), intensity=0, noise=0, blur=0)
    scans, sizes = stack_scans([np.random.default_rng(0).random((1, *shape), np.float32) for shape in shapes])
    for scan, its in zip(scans, sizes.tolist(), strict=True):
        inside = torch.zeros_like(scan, dtype=torch.bool)
        inside[(slice(None), *map(slice, its))] = True
        scan[~inside] = 1e6
    for seed in range(4):
        spacing = torch.tensor([LONG, CUBES, THICK])
        views = make_views(scans, sizes, middle(sizes), settings, generator(seed), spacing=spacing).values
        assert views.min() > -100 and views.max() < 100  # see test_views.py for the rounding that shows


def test_every_crop_holds_its_anchor_and_stays_inside():
    size, count = (20, 33, 27), 300
    draw = generator(3)
    anchors = torch.stack([torch.randint(n, (count,), generator=draw) for n in size], dim=1)
    anchors[:8] = torch.tensor([*product(*((0, n - 1) for n in size))])
    sizes, draws = torch.tensor([size] * count), Draws(generator(), range(count), count)
    grid, _ = crop_grid(sizes, anchors, torch.tensor([LONG] * count), still(8, scale=(0.01, 1), ratio=(0.5, 2)), draws)
    for axis, extent in enumerate(size):
        line = grid.positions[..., 2 - axis]
        first, last = line.amin(dim=(1, 2, 3)), line.amax(dim=(1, 2, 3))
        half = (last - first) / 7 / 2
        assert (first - half <= anchors[:, axis] + 1e-3).all() and (last + half >= anchors[:, axis] - 1e-3).all()
        assert (first - half > -0.501).all() and (last + half < extent - 0.499).all()


def test_blur_is_that_of_scipy():
    view, sigma = random_scans(3, 2, 9, 12, 10), [0.3, 0.9, 1.5]
    blurred = _blur(view, torch.tensor(sigma), max(sigma))
    for one, oracle, s in zip(blurred, view.double().numpy(), sigma, strict=True):
        wanted = scipy.ndimage.gaussian_filter(oracle, (0, s, s, s), mode="mirror", radius=(0, 4, 4, 4))
        np.testing.assert_allclose(one.numpy(), wanted, atol=1e-5)


def test_intensities_change_as_those_of_images_do():
    scans = random_scans(16, 1, 8, 8, 8)
    settings = still(8, intensity=1, gamma=(1, 1), intensity_scale=(0.5, 2), intensity_shift=(-1, 3))
    views, before = views_of(scans, settings), torch.cat([scans, scans])
    over = (1, 2, 3, 4)
    scale = (views.std(dim=over) / before.std(dim=over)).view(-1, 1, 1, 1, 1)
    shift = views.mean(dim=over, keepdim=True) - scale * before.mean(dim=over, keepdim=True)
    assert 0.499 < scale.min() < 0.7 and 1.8 < scale.max() < 2.001 and shift.min() < -0.5 and shift.max() > 2
    torch.testing.assert_close(views, before * scale + shift, atol=2e-4, rtol=0)
    curved = _gamma(scans, torch.full((16, 1, 1, 1, 1), 0.6))
    torch.testing.assert_close(curved.amax(dim=over), scans.amax(dim=over))
    noisy = views_of(torch.zeros(4, 1, 16, 16, 16), still(16, noise=1, noise_sigma=(0.15, 0.15)))
    assert noisy.std().item() == pytest.approx(0.15, rel=0.02)


@pytest.mark.parametrize("bounds", [(0, 2, 4), (0, 1, 4)])
def test_a_volumes_views_do_not_depend_on_who_makes_the_others(bounds):
    shapes = [(10, 21, 14), (24, 18, 9), (13, 20, 11), (17, 17, 17)]
    scans, sizes = stack_scans([np.random.default_rng(i).random((2, *shape), np.float32) for i, shape in enumerate(shapes)])
    anchors, settings = middle(sizes), ViewSettings(size=9, noise=1)
    spacing = torch.tensor([CUBES, LONG, THICK, CUBES])
    wanted = make_views(scans, sizes, anchors, settings, generator(), spacing=spacing).values
    shares = []
    for first, end in pairwise(bounds):
        part = scans[first:end][(..., *map(slice, sizes[first:end].amax(dim=0).tolist()))]
        views = make_views(
            part, sizes[first:end], anchors[first:end], settings, generator(), first, 4, spacing=spacing[first:end]
        )
        shares.append(views.values.chunk(2))
    views = torch.cat([torch.cat(one) for one in zip(*shares, strict=True)])
    torch.testing.assert_close(views, wanted, atol=1e-4, rtol=0)


def test_views_are_a_function_of_the_generator_and_change_no_input():
    scans = random_scans(2, 1, 12, 14, 13)
    before, settings = scans.clone(), ViewSettings(size=8, noise=1, blur=1, intensity=1)
    first, again, other = (views_of(scans, settings, LONG, seed) for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other) and torch.equal(scans, before)
    assert not torch.equal(first[0], first[2])
