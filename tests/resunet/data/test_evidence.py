import itertools

import numpy as np
import pyarrow as pa
import pytest

from resunet.data.evidence import SCHEMA, Evidence, comparable_groups, find_pairs
from resunet.data.perceptual import ALONE, CORRELATION, HASH_BYTES, RADIUS, correlation, look


def record(rows, salt="salt", thumbnails=None):
    """rows: (group, file, pixels, hash)."""
    columns = list(zip(*rows, strict=True)) or [()] * 4
    table = pa.table([pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)
    return Evidence(table, salt, None if thumbnails is None else lambda i: thumbnails[i])


def random_record(rng, n, images, with_thumbnails=True, salt="salt"):
    """Rows over few values, so that many agree; some without a group, some flat."""
    chosen = rng.integers(0, len(images), n)
    rows, thumbnails = [], []
    for number in chosen:
        seen = look(images[number])
        group = ("", "a", "b", "c", "d", "e")[rng.integers(6)]
        rows.append((group, f"f{rng.integers(12)}", f"p{number}", seen.hash))
        thumbnails.append(seen.thumbnail)
    return record(rows, salt, thumbnails if with_thumbnails else None)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    made = [np.kron(rng.integers(0, 255, (12, 12)), np.ones((4, 4)))[None].astype(np.uint8) for _ in range(8)]
    return [*made, made[0][:, ::-1], np.rot90(made[1], axes=(1, 2)), np.full((1, 9, 9), 3, np.uint8)]


def naive(archive, held_out):
    """All pairs with their evidence, each with each."""
    found = {}
    rows, others = archive.table.to_pylist(), held_out.table.to_pylist()
    for (i, one), (j, other) in itertools.product(enumerate(rows), enumerate(others)):
        flat = not any(one["perceptual"]) or not any(other["perceptual"])
        shared = {name: one[name] == other[name] and one[name] != "" and not flat for name in ("file_sha256", "pixel_sha256")}
        shared["group"] = one["group"] == other["group"] != "" and archive.salt_fingerprint == held_out.salt_fingerprint
        apart = np.linalg.norm(np.subtract(*(np.frombuffer(r["perceptual"], np.uint8).astype(float) for r in (one, other))))
        if archive.thumbnail and held_out.thumbnail:
            looks = apart <= RADIUS and correlation(archive.thumbnail(i), held_out.thumbnail(j)) >= CORRELATION
        else:
            looks = apart <= ALONE
        found[i, j] = shared | {"look": bool(looks and not flat)}
    return {pair: shared for pair, shared in found.items() if any(shared.values())}


@pytest.mark.parametrize("salt", ["salt", "other"])
@pytest.mark.parametrize("thumbnails", [True, False])
def test_pairs_against_each_with_each(images, salt, thumbnails):
    rng = np.random.default_rng(5)
    archive = random_record(rng, 40, images)
    held_out = random_record(rng, 15, images, thumbnails, salt)
    expected = naive(archive, held_out)
    pairs = find_pairs(archive, held_out)
    keys = list(zip(pairs.archive.tolist(), pairs.held_out.tolist(), strict=True))
    assert keys == sorted(set(keys), key=lambda pair: pair[::-1])
    for k, key in enumerate(keys):  # what is listed is true, and complete for the pair
        assert {name: bool(pairs.shared[name][k]) for name in pairs.shared} == {n: expected[key][n] for n in pairs.shared}
        assert (not np.isnan(pairs.distance[k])) == expected[key]["look"]
        assert np.isnan(pairs.correlation[k]) == (not (expected[key]["look"] and thumbnails))
    for side in (0, 1):  # nobody is missing, by any evidence
        for name in (*pairs.shared, "look"):
            theirs = {pair[side] for pair, shared in expected.items() if shared[name]}
            told = pairs.shared.get(name, ~np.isnan(pairs.distance))
            assert {keys[k][side] for k in np.flatnonzero(told)} == theirs
    assert comparable_groups(archive, held_out) == (salt == "salt")


def test_a_group_that_both_have_many_of_does_not_become_each_with_each():
    flat = bytes(HASH_BYTES)
    archive = record([("g", f"a{i}", f"a{i}", flat) for i in range(300)])
    held_out = record([("g", f"h{i}", f"h{i}", flat) for i in range(70)])
    pairs = find_pairs(archive, held_out)
    assert len(pairs) == 300 and set(pairs.archive) == set(range(300)) and set(pairs.held_out) == set(range(70))


def test_images_without_contrast_are_no_evidence_but_their_groups_are():
    flat = bytes(HASH_BYTES)
    pairs = find_pairs(record([("a", "f", "p", flat)]), record([("b", "f", "p", flat), ("a", "f", "p", flat)]))
    assert (pairs.archive.tolist(), pairs.held_out.tolist()) == ([0], [1])
    assert pairs.evidence(slice(None)) == ("group",)


@pytest.mark.parametrize(("m", "n"), [(0, 0), (0, 3), (3, 0)])
def test_nothing_on_a_side(m, n):
    rng = np.random.default_rng(0)
    one, other = (record([("g", "f", "p", rng.bytes(HASH_BYTES)) for _ in range(count)]) for count in (m, n))
    assert len(find_pairs(one, other)) == 0
    assert one.hashes().shape == (m, HASH_BYTES)


def test_a_part_of_a_table_has_its_own_hashes():
    rng = np.random.default_rng(0)
    hashes = [rng.bytes(HASH_BYTES) for _ in range(6)]
    whole = record([("", "", "", one) for one in hashes])
    for part in (whole.table.slice(2, 3), pa.concat_tables([whole.table.slice(4), whole.table.slice(0, 1)])):
        expected = [one["perceptual"] for one in part.to_pylist()]
        assert [row.tobytes() for row in Evidence(part, "").hashes()] == expected


def test_words_of_several_pairs_give_the_best_look(images):
    seen = look(images[0])
    archive = record([("", "", "x", seen.hash), ("", "", "y", seen.hash)], thumbnails=[seen.thumbnail] * 2)
    held_out = record([("", "", "y", seen.hash)], thumbnails=[seen.thumbnail])
    assert find_pairs(archive, held_out).evidence(slice(None)) == ("sha256 of the pixels", "perceptual, correlation 1.000")
    alone = find_pairs(archive, Evidence(held_out.table, "salt"))
    assert alone.evidence(slice(0, 1)) == ("perceptual, distance 0 without thumbnails to verify it",)
