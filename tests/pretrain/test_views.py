from itertools import pairwise

import numpy as np
import pytest
import scipy.ndimage
import torch

from pretrain.crop import Grid, _mirror, crop, crop_grid
from pretrain.recipe import ViewSettings
from pretrain.views import make_views, stack_scans
from resunet.draws import Draws
from resunet.intensity import _blur, _gamma
from resunet.runtime import normalise, percentile_intensity

# one view pixel is one scan pixel where the scan is of `size`
STILL = {
    "scale": (1, 1),
    "ratio": (1, 1),
    "flip": 0,
    "rotation": 0,
    "intensity": 0,
    "blur": 0,
    "noise": 0,
}


def still(size: int, **changes: object) -> ViewSettings:
    return ViewSettings.model_validate(STILL | {"size": size} | changes)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def grid_of(sizes: torch.Tensor, anchors: torch.Tensor, settings: ViewSettings) -> Grid:
    draws = Draws(generator(), range(len(sizes)), len(sizes))
    return crop_grid(sizes, anchors, torch.ones(sizes.shape), settings, draws)[0]


def random_scans(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed))


def whole(scans: torch.Tensor) -> torch.Tensor:
    """Sizes of scans that are not padded."""
    return torch.tensor([scans.shape[2:]] * len(scans))


def centres(sizes: torch.Tensor) -> torch.Tensor:
    """The middle of every scan, for both views."""
    return (sizes // 2)[:, None].expand(-1, 2, -1)


def views_of(scans: torch.Tensor, sizes: torch.Tensor, settings: ViewSettings, its: torch.Generator) -> torch.Tensor:
    return make_views(scans, sizes, centres(sizes), settings, its).values


def checkerboard(size: int, block: int) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return ((y // block + x // block) % 2).float()[None, None]


def test_views_keep_more_than_eight_bits():
    raw = np.linspace(-1000, 3000, 64 * 64).astype(np.int16).reshape(1, 64, 64)
    scan = normalise(raw, percentile_intensity(raw, 0.5, 99.5))
    scans, sizes = stack_scans([scan])
    views = views_of(scans, sizes, still(64, intensity=1), generator())
    assert all(len(view.unique()) > 3000 for view in views)  # of 4001 raw values, 1 % clipped


def test_identity_settings_give_the_scan():
    scans = random_scans(3, 2, 17, 17)
    views = views_of(scans, whole(scans), still(17), generator())
    assert views.shape == (6, 2, 17, 17)
    torch.testing.assert_close(views, torch.cat([scans, scans]), atol=2e-5, rtol=0)


def test_a_scan_that_is_not_square_fills_a_square_view():
    ramp = torch.arange(32.0).expand(1, 1, 16, 32)
    view = views_of(ramp, whole(ramp), still(16, ratio=(2, 2)), generator())[:1]
    torch.testing.assert_close(view[0, 0, 0], torch.arange(16.0) * 2 + 0.5)


def test_flips_are_those_of_torch():
    scans = random_scans(1, 2, 9, 9)
    both = views_of(scans, whole(scans), still(9, flip=1), generator())
    torch.testing.assert_close(both[:1], torch.flip(scans, (2, 3)), atol=2e-5, rtol=0)
    scans = scans.expand(32, -1, -1, -1)
    seen = set()
    for view in views_of(scans, whole(scans), still(9, flip=0.5), generator()):
        wanted = {dims: torch.flip(scans[0], dims) if dims else scans[0] for dims in ((), (1,), (2,), (1, 2))}
        (match,) = (dims for dims, one in wanted.items() if torch.allclose(view, one, atol=2e-5))
        seen.add(match)
    assert len(seen) == 4


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_reading_through_a_quarter_turn(turns):
    scans = random_scans(2, 3, 11, 11)
    line = torch.arange(11.0)
    y, x = torch.meshgrid(line, line, indexing="ij")
    positions = torch.rot90(torch.stack([x, y], dim=-1), turns, (0, 1)).expand(2, -1, -1, -1)
    turned = crop(scans, Grid(positions, torch.ones(2, 2)), torch.full((2, 2), 11))
    torch.testing.assert_close(turned, torch.rot90(scans, turns, (2, 3)), atol=2e-5, rtol=0)


def test_the_grid_is_turned_rigidly_about_the_centre_within_the_limits():
    grid, _ = grid_of(torch.tensor([[13, 13]] * 200), torch.full((200, 2), 6), still(13, rotation=30))
    straight, _ = grid_of(torch.tensor([[13, 13]]), torch.tensor([[6, 6]]), still(13))
    from_centre, wanted = (torch.view_as_complex((one - 6).contiguous()) for one in (grid, straight))
    corner = from_centre[:, 0, 0] / wanted[:, 0, 0]
    torch.testing.assert_close(corner.abs(), torch.ones(200))
    torch.testing.assert_close(from_centre, corner[:, None, None] * wanted, atol=1e-4, rtol=0)
    degrees = torch.rad2deg(corner.angle())
    assert degrees.abs().max() < 30.01 and degrees.min() < -25 and degrees.max() > 25


def test_reading_is_that_of_scipy():
    scan = random_scans(1, 1, 14, 10)
    positions = torch.rand(1, 20, 20, 2, generator=generator(1)) * 50 - 20  # far outside on all sides
    read = crop(scan, Grid(positions, torch.ones(1, 2)), torch.tensor([[14, 10]]))
    x, y = positions[0].double().numpy().transpose(2, 0, 1)
    oracle = scipy.ndimage.map_coordinates(scan[0, 0].double().numpy(), [y, x], order=1, mode="mirror")
    np.testing.assert_allclose(read[0, 0].numpy(), oracle, atol=5e-5)


def test_crops_cover_the_share_of_the_scan_they_are_told_to():
    sizes = torch.tensor([[40, 60]] * 300)
    grid, zoom = grid_of(sizes, sizes // 2, still(10, scale=(0.2, 0.5), ratio=(0.5, 2)))
    width = (grid[:, 0, 1, 0] - grid[:, 0, 0, 0]) * 10
    height = (grid[:, 1, 0, 1] - grid[:, 0, 0, 1]) * 10
    share = width * height / (40 * 60)
    assert 0.199 < share.min() < 0.22 and 0.48 < share.max() < 0.501
    assert 0.499 < (width / height).min() < 0.55 and 1.8 < (width / height).max() < 2.001
    torch.testing.assert_close(zoom, (torch.minimum(width, height) / 10)[:, None].expand(-1, 2), atol=1e-4, rtol=0)
    assert grid.min() > -0.5 and grid[..., 0].max() < 59.5 and grid[..., 1].max() < 39.5  # inside without rotation


@pytest.mark.parametrize("zoom", [1, 2, 4, 8])
def test_large_crops_are_means_and_do_not_alias(zoom):
    scans = random_scans(2, 3, 16 * zoom, 16 * zoom)
    views = views_of(scans, whole(scans), still(16), generator())
    torch.testing.assert_close(views[:2], torch.nn.functional.avg_pool2d(scans, zoom), atol=2e-5, rtol=0)
    board = checkerboard(16 * zoom, 1)
    if zoom > 1:
        torch.testing.assert_close(views_of(board, whole(board), still(16), generator()), torch.full((2, 1, 16, 16), 0.5))


def test_every_scan_is_read_from_its_own_level():
    fine, coarse = random_scans(1, 64, 64), random_scans(1, 16, 16, seed=1)
    scans, sizes = stack_scans([fine.numpy(), coarse.numpy()])
    fine_view, coarse_view = views_of(scans, sizes, still(16), generator())[:2]
    torch.testing.assert_close(fine_view, torch.nn.functional.avg_pool2d(fine, 4), atol=2e-5, rtol=0)
    torch.testing.assert_close(coarse_view, coarse, atol=2e-5, rtol=0)


def test_stacked_scans_keep_their_values_and_sizes():
    scans = [np.full((2, 3, 5), 1, np.float32), np.full((2, 4, 2), 2, np.float32)]
    padded, sizes = stack_scans(scans)
    assert padded.shape == (2, 2, 4, 5) and sizes.tolist() == [[3, 5], [4, 2]]
    for scan, stacked, (height, width) in zip(scans, padded, sizes.tolist(), strict=True):
        assert (stacked[:, :height, :width].numpy() == scan).all()
        assert stacked.sum() == scan.sum()


@pytest.mark.parametrize("size", [8, 40])
def test_the_padding_is_never_read(size):
    shapes = [(33, 47), (61, 20), (19, 19), (64, 64)]
    settings = ViewSettings(size=size, rotation=180, scale=(0.1, 1), intensity=0, noise=0, blur=0)
    scans, sizes = stack_scans([np.random.default_rng(0).random((1, *shape), np.float32) for shape in shapes])
    poisoned = scans.clone()
    for scan, (height, width) in zip(poisoned, sizes.tolist(), strict=True):
        scan[:, height:] = scan[:, :, width:] = 1e6
    for seed in range(10):
        views = views_of(poisoned, sizes, settings, generator(seed))
        # a position on the last pixel is off by the float32 rounding of the grid (about 1e-5 pixels), which times 1e6 shows;
        # one pixel read for real would be far above
        assert views.min() > -100 and views.max() < 100


def test_the_mirror_stays_inside_the_scan():
    positions = torch.arange(-40.0, 60.0)
    for extent in (2, 5, 17):
        line = np.arange(extent)
        oracle = np.pad(line, (40, 60 - extent), mode="reflect")
        mirrored = _mirror(positions, torch.tensor(float(extent)))
        assert mirrored.tolist() == pytest.approx(oracle.tolist())
    between = _mirror(torch.rand(1000, generator=generator()) * 1e4 - 5e3, torch.tensor(7.0))
    assert between.min() >= 0 and between.max() <= 6
    assert (_mirror(positions, torch.tensor(1.0)) == 0).all()


def test_channels_share_one_geometry_and_one_intensity():
    one = random_scans(4, 1, 30, 26)
    scans = torch.cat([one, 2 * one, -one], dim=1)
    settings = still(16, scale=(0.2, 1), ratio=(0.5, 2), flip=0.5, rotation=90)
    views = views_of(scans, whole(scans), settings, generator())
    torch.testing.assert_close(views[:, 1], 2 * views[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(views[:, 2], -views[:, 0], atol=1e-5, rtol=0)


def test_scale_and_shift_are_within_their_limits():
    scans = random_scans(64, 1, 8, 8)
    settings = still(8, intensity=1, gamma=(1, 1), intensity_scale=(0.5, 2), intensity_shift=(-1, 3))
    views = views_of(scans, whole(scans), settings, generator())
    before = torch.cat([scans, scans])
    scale = views.std(dim=(1, 2, 3)) / before.std(dim=(1, 2, 3))
    shift = views.mean(dim=(1, 2, 3)) - scale * before.mean(dim=(1, 2, 3))
    assert 0.499 < scale.min() < 0.6 and 1.9 < scale.max() < 2.001
    assert -1.001 < shift.min() < -0.8 and 2.8 < shift.max() < 3.001
    torch.testing.assert_close(views, before * scale[:, None, None, None] + shift[:, None, None, None], atol=1e-4, rtol=0)


def test_gamma_keeps_the_range_and_the_order():
    view = random_scans(3, 2, 10, 10)
    gamma = torch.tensor([0.5, 1.0, 2.0])[:, None, None, None]
    curved = _gamma(view, gamma)
    for reduce in (torch.amin, torch.amax):
        torch.testing.assert_close(reduce(curved, dim=(1, 2, 3)), reduce(view, dim=(1, 2, 3)))
    torch.testing.assert_close(curved[1], view[1], atol=1e-5, rtol=0)
    assert (curved[0] >= view[0] - 1e-5).all() and (curved[2] <= view[2] + 1e-5).all()
    assert (curved[0].flatten()[view[0].flatten().argsort()].diff() >= 0).all()
    flat = torch.full((1, 1, 4, 4), -3.0)
    torch.testing.assert_close(_gamma(flat, torch.full((1, 1, 1, 1), 0.7)), flat)


@pytest.mark.parametrize("sigma, radius", [([0.3, 0.9, 1.5], 4), ([0.5, 2.0, 4.0], 11)])
def test_blur_is_that_of_scipy(sigma, radius):
    view = random_scans(3, 2, 40, 40)
    blurred = _blur(view, torch.tensor(sigma), max(sigma))
    for one, oracle, s in zip(blurred, view.double().numpy(), sigma, strict=True):
        wanted = scipy.ndimage.gaussian_filter(oracle, (0, s, s), mode="mirror", radius=(0, radius, radius))
        np.testing.assert_allclose(one.numpy(), wanted, atol=1e-5)
    impulse = torch.zeros(1, 1, 41, 41)
    impulse[0, 0, 20, 20] = 1
    spread = _blur(impulse, torch.tensor([max(sigma)]), max(sigma))[0, 0].sum(dim=0)
    assert float((spread * (torch.arange(41) - 20) ** 2).sum().sqrt()) == pytest.approx(max(sigma), rel=0.04)
    assert _blur(view[..., :3, :3], torch.tensor(sigma), max(sigma)).shape == (3, 2, 3, 3)


def test_noise_has_the_standard_deviation_it_is_given():
    scans = torch.zeros(8, 1, 64, 64)
    views = views_of(scans, whole(scans), still(64, noise=1, noise_sigma=(0.15, 0.15)), generator())
    assert views.std().item() == pytest.approx(0.15, rel=0.02) and abs(views.mean().item()) < 0.002
    views = views_of(scans, whole(scans), still(64, noise=1, noise_sigma=(0.0, 0.3)), generator())
    deviations = views.std(dim=(1, 2, 3))
    assert deviations.max() < 0.31 and deviations.max() > 2 * deviations.min()  # each view's own


@pytest.mark.parametrize("name", ["intensity", "blur", "noise"])
def test_a_change_happens_as_often_as_it_should(name):
    scans = random_scans(400, 1, 8, 8)
    settings = still(8, **{name: 0.25}, noise_sigma=(0.1, 0.1), blur_sigma=(1, 1), intensity_shift=(0.2, 0.3))
    views = views_of(scans, whole(scans), settings, generator())
    changed = (views - torch.cat([scans, scans])).abs().amax(dim=(1, 2, 3)) > 1e-3
    assert 0.19 < changed.float().mean() < 0.31  # 4 standard deviations of 800 draws


def test_views_are_a_function_of_the_generator_and_differ():
    scans = random_scans(3, 1, 24, 24)
    settings = ViewSettings(size=16)
    first, again, other = (views_of(scans, whole(scans), settings, generator(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    same = scans[:1].expand(3, -1, -1, -1)
    views = views_of(same, whole(same), settings, generator(5))
    assert len({tuple(view.flatten().tolist()) for view in views}) == 6


@pytest.mark.parametrize("bounds", [(0, 3, 6), (0, 1, 2, 6)])
def test_a_scans_views_do_not_depend_on_who_makes_the_others(bounds):
    """Also where the share's windows are padded less than those of the set."""
    shapes = [(20, 31), (24, 18), (33, 20), (17, 17), (40, 35), (26, 28)]
    scans, sizes = stack_scans([np.random.default_rng(i).random((2, *shape), np.float32) for i, shape in enumerate(shapes)])
    anchors = centres(sizes)
    settings = ViewSettings(size=12, noise=1)
    wanted = make_views(scans, sizes, anchors, settings, generator()).values
    shares = []
    for first, end in pairwise(bounds):
        height, width = sizes[first:end].amax(dim=0).tolist()
        part = scans[first:end, :, :height, :width]
        views = make_views(part, sizes[first:end], anchors[first:end], settings, generator(), first, len(scans))
        shares.append(views.values.chunk(2))
    views = torch.cat([torch.cat(one) for one in zip(*shares, strict=True)])
    torch.testing.assert_close(views, wanted, atol=1e-4, rtol=0)
    again = make_views(scans[3:], sizes[3:], anchors[3:], settings, generator(), 3, 6).values.chunk(2)[0]
    assert torch.equal(again, wanted[3:6])  # the same padding: the same bits


def test_inputs_are_not_changed():
    scans = random_scans(2, 1, 24, 24)
    sizes = torch.tensor([[24, 20], [18, 24]])
    anchors = centres(sizes).clone()
    before = scans.clone(), sizes.clone(), anchors.clone()
    make_views(scans, sizes, anchors, ViewSettings(size=8, noise=1, blur=1, intensity=1), generator())
    assert torch.equal(scans, before[0]) and torch.equal(sizes, before[1]) and torch.equal(anchors, before[2])


def test_every_crop_holds_its_anchor_and_stays_inside():
    height, width, count = 60, 45, 500
    draw = generator(3)
    anchors = torch.stack([torch.randint(n, (count,), generator=draw) for n in (height, width)], dim=1)
    anchors[:4] = torch.tensor([[0, 0], [0, width - 1], [height - 1, 0], [height - 1, width - 1]])
    sizes = torch.tensor([[height, width]] * count)
    grid, _ = grid_of(sizes, anchors, still(10, scale=(0.02, 1), ratio=(0.5, 2)))
    for axis, extent in ((0, width), (1, height)):  # of (x, y)
        line = grid[..., axis]
        first, last = line.amin(dim=(1, 2)), line.amax(dim=(1, 2))
        half = (last - first) / 9 / 2  # of a view pixel
        anchor = anchors[:, 1 - axis]
        assert (first - half <= anchor + 1e-3).all() and (last + half >= anchor - 1e-3).all()
        assert (first - half > -0.501).all() and (last + half < extent - 0.499).all()


def test_crops_of_one_anchor_are_where_they_can_be():
    """Uniform over all places that hold it: at the middle of a long line from one end of the anchor to the other."""
    sizes, anchors = torch.tensor([[100, 100]] * 2000), torch.full((2000, 2), 50)
    grid, _ = grid_of(sizes, anchors, still(8, scale=(0.04, 0.04)))
    first = grid[:, 0, 0, 0] + 0.5 - 1.25  # half a view pixel of 2.5: the crop's left edge
    assert 30.5 <= first.min() < 31 and 50 < first.max() <= 50.5
    assert abs(first.mean() - 40.5) < 0.8 and abs(first.std() - 20 / 12**0.5) < 0.4


def test_views_have_anchors_of_their_own():
    scans = torch.zeros(1, 1, 40, 40)
    scans[0, 0, :20] = 1
    anchors = torch.tensor([[[2, 20], [37, 20]]])
    views = make_views(scans, whole(scans), anchors, still(8, scale=(0.01, 0.01)), generator()).values
    assert (views[0] == 1).all() and (views[1] == 0).all()


def test_views_of_images_are_as_ever():
    """Golden: what this gave before volumes came, to float32's rounding."""
    y, x = torch.meshgrid(torch.arange(70.0), torch.arange(90.0), indexing="ij")
    scans = torch.stack([(y * (i + 1) / 17).sin() + (x / (3 + i)).cos() for i in range(3)])[:, None]
    sizes = torch.tensor([[70, 90], [24, 90], [70, 31]])
    views = views_of(scans, sizes, ViewSettings(size=16, noise=1, blur=0.5), generator(11))
    assert views[:, 0, 8, 5].tolist() == pytest.approx([0.347727, 0.459149, -0.313559, 0.611436, 0.725692, -0.008753], abs=2e-5)
    assert views.mean(dim=(1, 2, 3)).tolist() == pytest.approx(
        [0.565033, 0.374974, -0.143699, 0.686175, 0.668086, -0.108173], abs=2e-5
    )
