import numpy as np
import pytest

from resunet.embedding.picture import Colouring, map_picture, place_boxes, principal_plane, spread_out, thumbnail
from resunet.report import Section, write_page


def test_the_plane_is_that_of_the_covariance():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(60, 6)) * [5, 3, 1, 1, 1, 1] + 7
    plane = principal_plane(vectors.astype(np.float32))
    values = np.linalg.eigvalsh(np.cov(vectors.T))[::-1]
    np.testing.assert_allclose(plane.explained, values[:2] / values.sum(), rtol=1e-5)
    np.testing.assert_allclose(plane.places.var(axis=0, ddof=1), values[:2], rtol=1e-5)
    assert abs(plane.places[:, 0] @ plane.places[:, 1]) < 1e-3
    np.testing.assert_allclose(principal_plane(vectors[::-1]).places[::-1], plane.places, atol=1e-4)


@pytest.mark.parametrize("vectors", [np.ones((5, 3)), np.arange(4.0)[:, None], np.eye(2)])
def test_a_plane_of_little(vectors):
    plane = principal_plane(vectors)
    assert plane.places.shape == (len(vectors), 2) and np.isfinite(plane.places).all() and np.isfinite(plane.explained).all()


def test_boxes_do_not_overlap_and_stay_inside():
    places = np.random.default_rng(0).uniform(0, 100, (80, 2))
    placed = place_boxes(places, np.array([100.0, 100.0]), 15)
    assert placed[0][0] == 0 and 10 < len(placed) < 36
    centres = np.array([centre for _, centre in placed])
    assert centres.min() >= 7.5 and centres.max() <= 92.5
    gaps = np.abs(centres[:, None] - centres).max(axis=2)[np.triu_indices(len(centres), 1)]
    assert gaps.min() >= 15


def test_places_are_spread_out():
    order = spread_out(np.array([[0.0, 0], [0.1, 0], [10, 0], [4.9, 0], [10, 0.1]]))
    assert order[0] == 3 and {order[1], order[2]} == {0, 4} and sorted(order) == [0, 1, 2, 3, 4]


def test_a_thumbnail_is_square_and_keeps_its_proportions():
    grey = thumbnail(np.stack([np.linspace(0, 1, 40 * 80, dtype=np.float32).reshape(40, 80)] * 2), 20)
    assert grey.shape == (20, 20) and grey.dtype == np.uint8 and grey.max() == 255
    assert (grey[:5] == 0).all() and (grey[15:] == 0).all() and (grey[10] > 0).all()
    assert thumbnail(np.zeros((1, 3, 3), np.float32), 8).max() == 0


@pytest.mark.parametrize("kind", ["classes", "scale", "none"])
def test_a_map_can_be_read(kind, tmp_path, look_at):
    rng = np.random.default_rng(0)
    plane = principal_plane(rng.normal(size=(50, 4)))
    colouring = {
        "classes": Colouring("Group", rng.integers(0, 3, 50).astype(float), ("1", "2", "3")),
        "scale": Colouring("Place in the volume", rng.random(50)),
        "none": None,
    }[kind]
    pictures = [(number, rng.integers(0, 255, (64, 64), np.uint8)) for number in spread_out(plane.places)[:30]]
    drawn = map_picture(plane, colouring, pictures, "caption", "what is to be seen", marked=[3, 4])
    shown = str(drawn.markup).count("<image ")
    assert 8 <= shown <= 31 and "of the variance" in drawn.markup
    assert drawn == map_picture(plane, colouring, pictures, "caption", "what is to be seen", marked=[3, 4])
    write_page(tmp_path / "page.html", "Page", [Section("Map", pictures=[drawn])])
    seen = look_at(tmp_path / "page.html")
    assert [one["name"] for one in seen.pictures] == ["what is to be seen"] and seen.letters >= 7
