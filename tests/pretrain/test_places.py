"""Matching places, judged by scans whose intensity is their own coordinate."""

import pytest
import torch

from pretrain.crop import AffineMap
from pretrain.dense import read_level
from pretrain.places import Matches, matching_places
from pretrain.recipe import ViewSettings
from pretrain.views import Views, make_views
from resunet.draws import Draws
from resunet.encoder import ResidualEncoder

# size of the scans, their spacing in mm, sides of the views: no crop has more voxels than a view, so that nothing is averaged
SCANS = {
    "images": ((30, 22), None, (32, 32)),
    "images, longer than wide": ((30, 22), None, (40, 28)),
    "cubes": ((14, 16, 18), (1.0, 1.0, 1.0), (20, 20, 20)),
    "anisotropic": ((14, 18, 16), (2.5, 1.0, 1.5), (40, 24, 28)),
    "thick slices": ((8, 18, 16), (6.0, 1.0, 1.0), (20, 24, 20)),
}
COUNT = 60


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def settings_of(sides: tuple[int, ...], **changes: object) -> ViewSettings:
    """Every change of place and none of intensity."""
    still = {"intensity": 0, "blur": 0, "noise": 0, "flip": 0.5, "rotation": 30, "scale": (0.2, 1.0)}
    return ViewSettings.model_validate(still | {"size": sides} | changes)


def coordinates(size: tuple[int, ...], count: int) -> torch.Tensor:
    """(count, dimensions, *size): channel i is the coordinate along x, y, z for i = 0, 1, 2."""
    lines = torch.meshgrid(*[torch.arange(float(n)) for n in size], indexing="ij")
    return torch.stack(lines[::-1]).expand(count, -1, *size).contiguous()


def views_of(name: str, count: int = 24, seed: int = 3) -> tuple[Views, torch.Tensor]:
    size, spacing, sides = SCANS[name]
    scans, sizes = coordinates(size, count), torch.tensor([size] * count)
    anchors = (sizes // 2)[:, None].expand(-1, 2, -1)
    its = None if spacing is None else torch.tensor([spacing] * count)
    return make_views(scans, sizes, anchors, settings_of(sides), generator(seed), spacing=its), sizes


def matches_of(views: Views, sizes: torch.Tensor, count: int = COUNT, seed: int = 5) -> Matches:
    return matching_places(views.places, sizes, count, Draws(generator(seed), range(len(sizes)), len(sizes)))


@pytest.mark.parametrize("name", SCANS)
def test_both_views_show_the_same_of_a_scan_at_matching_places(name):
    views, sizes = views_of(name)
    sides = views.values.shape[2:]
    matches = matches_of(views, sizes)
    assert matches.found.float().mean() > 0.9
    first, second = (
        place.to_scan(its) for place, its in zip(views.places, matches.places.chunk(2), strict=True)
    )  # by the maps
    torch.testing.assert_close(first[matches.found], second[matches.found], atol=1e-4, rtol=0)
    read = read_level(views.values, 1, sides, matches.places).chunk(2)  # by what is there
    # between the outermost voxels of view and scan nothing has to be made up
    edge = 1 - 1 / torch.tensor(sides).flip(0)
    inner = matches.found & (matches.places.abs() <= edge).all(dim=2).view(2, -1, COUNT).all(dim=0)
    inner &= ((first >= 1) & (first <= sizes.flip(1)[:, None] - 2)).all(dim=2)
    assert inner.float().mean() > 0.4
    for values in read:
        torch.testing.assert_close(values[inner], first[inner], atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", SCANS)
def test_the_views_are_flipped_turned_and_of_different_zooms(name):
    """So that the test above says something."""
    (first, second), dims = views_of(name)[0].places, len(SCANS[name][0])
    determinants = first.matrix.det(), second.matrix.det()
    assert all((one > 0).any() and (one < 0).any() for one in determinants)
    zoom = (determinants[0] / determinants[1]).abs()
    assert zoom.max() > 1.4 and zoom.min() < 0.7
    off_diagonal = first.matrix * (1 - torch.eye(dims))
    assert off_diagonal.abs().amax(dim=(1, 2)).min() > 0.01


@pytest.mark.parametrize("name", SCANS)
def test_the_map_and_its_inverse(name):
    place = views_of(name)[0].places[0]
    there = torch.rand(24, 7, len(SCANS[name][0]), generator=generator()) * 2 - 1
    torch.testing.assert_close(place.to_view(place.to_scan(there)), there, atol=1e-4, rtol=0)


def place_of(start: tuple[float, float], end: tuple[float, float]) -> AffineMap:
    """A crop of an image from border to border, (x, y)."""
    low, high = torch.tensor(start), torch.tensor(end)
    return AffineMap(torch.diag((high - low) / 2)[None], ((low + high) / 2 - 0.5)[None])


def test_places_are_uniform_in_what_both_crops_show_of_the_scan():
    views = place_of((-4.0, 0.0), (12.0, 16.0)), place_of((-2.0, 8.0), (30.0, 24.0))  # (x, y); beyond the scan's left border
    matches = matching_places(views, torch.tensor([[14, 40]]), 4000, Draws(generator(), range(1), 1))
    assert matches.found.sum() == 4000
    x, y = (views[0].to_scan(matches.places[:1])[0] + 0.5).unbind(dim=1)
    for values, low, high in ((x, 0.0, 12.0), (y, 8.0, 14.0)):
        assert low <= values.min() < low + 0.02 * (high - low) and high - 0.02 * (high - low) < values.max() <= high
        counts = torch.histc(values, 6, low, high)
        assert (counts - 4000 / 6).abs().max() < 5 * (4000 / 6) ** 0.5


def test_crops_that_do_not_overlap_have_no_places_and_small_overlaps_have_fewer():
    first = [place_of((0.0, 0.0), (10.0, 10.0))] * 3
    second = [place_of((10.5, 0.0), (20.0, 10.0)), place_of((9.8, 9.8), (20.0, 20.0)), place_of((0.0, 0.0), (10.0, 10.0))]
    views = tuple(AffineMap(*(torch.cat(one) for one in zip(*places, strict=True))) for places in (first, second))
    matches = matching_places(views, torch.tensor([[20, 20]] * 3), 40, Draws(generator(), range(3), 3))
    counts = matches.found.sum(dim=1)
    assert counts[0] == 0 and counts[1] < 10 and counts[2] == 40
    assert (matches.found.int().diff(dim=1) <= 0).all(), "those that were found come first"
    assert (matches.places.view(2, 3, 40, 2)[:, ~matches.found] == 0).all()


def test_shares_are_those_of_the_whole_set():
    views, sizes = views_of("images", count=6)
    whole = matches_of(views, sizes)
    for first, end in ((0, 2), (2, 6)):
        part = tuple(AffineMap(place.matrix[first:end], place.offset[first:end]) for place in views.places)
        matches = matching_places(part, sizes[first:end], COUNT, Draws(generator(5), range(first, end), 6))
        assert torch.equal(matches.found, whole.found[first:end])
        wanted = whole.places.view(2, 6, COUNT, 2)[:, first:end].flatten(0, 1)
        torch.testing.assert_close(matches.places, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sides", [(16, 13), (9, 12, 10)])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_a_level_is_read_where_its_strides_put_its_features(sides, stride):
    level = coordinates(tuple(-(-side // stride) for side in sides), 2) * stride  # features that say where they are
    places = torch.rand(2, 200, len(sides), generator=generator()) * 2 - 1
    voxel = (places + 1) * torch.tensor(sides).flip(0) / 2 - 0.5
    last = stride * torch.tensor([-(-side // stride) - 1 for side in sides]).flip(0)
    wanted = torch.minimum(voxel.clamp_min(0), last)  # beyond the outermost features these are read
    torch.testing.assert_close(read_level(level, stride, sides, places), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("side", [16, 15])
def test_features_of_a_flipped_view_are_found_at_the_flipped_place(side):
    """Through an encoder that is linear and looks at single voxels: each place has the features of its own coordinate."""
    encoder = ResidualEncoder(2, (2, 3, 4), units=1).eval()
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            parameter.zero_() if "conv2" in name else parameter.abs_()
    view = coordinates((side, side), 1)
    places = torch.rand(1, 300, 2, generator=generator()) * 1.4 - 0.7
    for level, stride in ((1, 2), (2, 4)):
        inside = places.abs().amax(dim=2)[0] < 1 - 2 * stride / side  # of the outermost features
        with torch.no_grad():
            here = read_level(encoder(view)[level], stride, (side, side), places)
            there = read_level(encoder(view.flip(3))[level], stride, (side, side), places * torch.tensor([-1.0, 1.0]))
        assert here[0].std(dim=0).min() > 0.1 and inside.sum() > 30
        torch.testing.assert_close(there[0, inside], here[0, inside], atol=1e-3, rtol=1e-4)
