import errno
import json
import multiprocessing
import pickle
import resource
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from resunet.data.store import Absent, Store, StoredScan, store_key
from resunet.errors import EnvironmentFault

KEY = store_key("a scan")
OTHER = store_key("another scan")
DTYPES = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "float32", "float64"]


def scan(shape: tuple[int, ...] = (1, 40, 70, 35), dtype: str = "int16", seed: int = 0) -> np.ndarray:
    """Random bits of any dtype, so that the whole range and, of floats, NaN and infinity occur."""
    rng = np.random.default_rng(seed)
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(rng.bytes(size), dtype).reshape(shape)


def whole(stored: StoredScan) -> np.ndarray:
    return stored.crop((slice(None),) * len(stored.shape))


def entry(store: Store, key: str = KEY) -> Path:
    return store.folder / key[:2] / key


def files(store: Store) -> list[Path]:
    return sorted(path for path in store.folder.rglob("*") if path.is_file())


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.tobytes() == expected.tobytes()


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_back_bit_by_bit(store, dtype):
    values = scan((2, 33, 40, 35), dtype)
    store.put(KEY, values, {})
    assert_same(whole(store.open(KEY)), values)


@pytest.mark.parametrize("slice_axis", [None, 0, 1, 2])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 129, 1), (1, 300, 257), (1, 1, 1, 1), (1, 65, 1, 130), (2, 33, 31, 64), (17, 3, 5, 7)]
)
def test_every_shape_comes_back(store, shape, slice_axis):
    values = scan(shape, "uint16")
    store.put(KEY, values, {}, slice_axis)
    stored = store.open(KEY)
    assert (stored.shape, stored.dtype) == (shape, np.uint16)
    assert_same(whole(stored), values)


@pytest.mark.parametrize("slice_axis", [None, 0, 1, 2])
def test_a_crop_is_what_numpy_cuts_out(store, slice_axis):
    values = scan((2, 40, 70, 35))
    store.put(KEY, values, {}, slice_axis)
    rng = np.random.default_rng(1)
    for _ in range(40):
        slices = tuple(slice(*sorted(rng.integers(0, n + 1, 2).tolist())) for n in values.shape)
        assert_same(store.open(KEY).crop(slices), values[slices])
    odd = (slice(None), slice(-7, None), slice(60, 900), slice(5, 5))
    assert_same(store.open(KEY).crop(odd), values[odd])


def test_a_crop_reads_only_its_chunks(store):
    """Everything but what the crop needs is damaged, and the crop is right."""
    values = scan((1, 64, 64, 64))
    store.put(KEY, values, {})
    stored = store.open(KEY)
    begin = int(stored._offsets[1])
    with open(entry(store), "r+b") as file:
        file.seek(begin)
        file.write(b"\0" * (entry(store).stat().st_size - begin))
    corner = (slice(None), *[slice(0, 32)] * 3)
    assert_same(stored.crop(corner), values[corner])


def test_other_byte_orders_and_strides(store):
    values = scan((1, 40, 50, 60))
    store.put(KEY, values.astype(">i2"), {})
    store.put(OTHER, values.swapaxes(1, 3)[:, ::-1], {})
    assert_same(whole(store.open(KEY)), values)
    assert_same(whole(store.open(OTHER)), np.ascontiguousarray(values.swapaxes(1, 3)[:, ::-1]))


def test_values_are_not_changed_and_bool_is_refused(store):
    values = scan()
    before = values.copy()
    store.put(KEY, values, {})
    assert_same(values, before)
    with pytest.raises(AssertionError):
        store.put(OTHER, values > 0, {})


def test_facts_come_back(store):
    facts = {"spacing": [2.5, 0.7, 0.7], "axis": 0, "modality": "CT", "map": {"block": 16}, "none": None, "name": "é"}
    store.put(KEY, scan(), facts)
    assert store.open(KEY).facts == facts
    with pytest.raises(ValueError, match="JSON"):
        store.put(OTHER, scan(), {"low": float("nan")})
    assert [path.name for path in files(store)] == [KEY]


def test_what_is_absent(store):
    assert KEY not in store
    with pytest.raises(KeyError):
        store.open(KEY)
    store.put(KEY, scan(), {})
    assert KEY in store and OTHER not in store
    assert store.size() == (1, entry(store).stat().st_size)
    store.remove(KEY)
    store.remove(KEY)
    with pytest.raises(Absent):
        store.open(KEY)


def test_keys(store):
    keys = [store_key(*parts) for parts in (["a", "b"], ["ab"], ["a"], ["b", "a"], [])]
    assert len(set(keys)) == len(keys)
    with pytest.raises(AssertionError):
        store.open("../../secret")


def test_a_scan_that_is_there_is_left_alone(store):
    store.put(KEY, scan(), {"first": True})
    before = entry(store).stat()
    store.put(KEY, scan(), {"first": False})
    after = entry(store).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert store.open(KEY).facts == {"first": True}


def test_the_same_scan_makes_the_same_bytes(store, tmp_path):
    again = Store(tmp_path / "again")
    for each in (store, again):
        each.put(KEY, scan(), {"b": 1, "a": 2})
    assert entry(store).read_bytes() == entry(again).read_bytes()


def test_every_damage_is_found(store):
    """A flip of any byte, cut or added ends: absent when opened or when read, never other pixels; then it can be put again."""
    values, facts = scan((1, 3, 40, 40)), {"spacing": [1, 1, 1]}
    store.put(KEY, values, facts)
    good = entry(store).read_bytes()
    rng = np.random.default_rng(0)
    header = range(220)
    flips = [*header, *rng.integers(len(header), len(good), 60).tolist()]
    damaged = [good[:i] + bytes([good[i] ^ (1 << i % 8)]) + good[i + 1 :] for i in flips]
    damaged += [good[:cut] for cut in (0, 1, 19, 20, 25, 150, len(good) // 2, len(good) - 1)]
    damaged += [good + b"\0", bytes(len(good)), good[: len(good) // 2] + bytes(len(good) - len(good) // 2)]
    for content in damaged:
        entry(store).write_bytes(content)
        with pytest.raises(Absent):
            whole(StoredScan(entry(store)))
        assert not entry(store).exists()
    store.put(KEY, values, facts)
    assert entry(store).read_bytes() == good


def test_a_damaged_header_is_refilled_by_put(store):
    store.put(KEY, scan(), {})
    entry(store).write_bytes(entry(store).read_bytes()[:-1])
    store.put(KEY, scan(), {})
    assert_same(whole(store.open(KEY)), scan())


def test_damage_does_not_remove_what_was_put_in_its_place(store):
    store.put(KEY, scan(), {})
    stored = StoredScan(entry(store))
    good = entry(store).read_bytes()
    with open(entry(store), "r+b") as file:
        file.truncate(len(good) - 1)
    entry(store).rename(store.folder / "old")
    entry(store).write_bytes(good)
    with pytest.raises(Absent):
        whole(stored)
    assert entry(store).read_bytes() == good


def test_open_scans_are_bounded(tmp_path):
    store = Store(tmp_path, handles=3)
    before = len(list(Path("/dev/fd").iterdir()))
    for i in range(10):
        store.put(store_key(str(i)), scan((1, 4, 4), seed=i), {})
    for i in range(10):
        assert_same(whole(store.open(store_key(str(i)))), scan((1, 4, 4), seed=i))
    assert len(list(Path("/dev/fd").iterdir())) <= before + 3
    held = store.open(store_key("0"))
    for i in range(1, 10):
        store.open(store_key(str(i)))
    assert_same(whole(held), scan((1, 4, 4), seed=0))  # an evicted scan that somebody holds stays readable


def _read(store: Store) -> bytes:
    return whole(store.open(KEY)).tobytes()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_store_goes_to_other_processes(store, method):
    store.put(KEY, scan(), {})
    stored = store.open(KEY)
    assert_same(whole(pickle.loads(pickle.dumps(stored))), scan())
    context = multiprocessing.get_context(method)
    with context.Pool(1) as pool:
        assert pool.apply(_read, (store,)) == scan().tobytes()
    assert_same(whole(stored), scan())


def _fill(folder: Path) -> None:
    store = Store(folder)
    for i in range(12):
        store.put(store_key(str(i)), scan(seed=i), {"seed": i})


def test_several_writers_at_once(tmp_path):
    with ProcessPoolExecutor(3, multiprocessing.get_context("fork")) as pool:
        list(pool.map(_fill, [tmp_path] * 3))
    store = Store(tmp_path)
    assert len(files(store)) == 12
    for i in range(12):
        assert_same(whole(store.open(store_key(str(i)))), scan(seed=i))


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from resunet.data.store import Store

class Deadly(np.ndarray):
    def __getitem__(self, item):
        if item[1].start > 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(item)

Store(Path(sys.argv[1])).put(sys.argv[2], np.zeros((1, 40, 40, 40), np.int16).view(Deadly), {})
"""


def test_a_killed_writer_leaves_nothing_after_the_next_start(store):
    process = subprocess.run([sys.executable, "-c", KILLED, str(store.folder), KEY])
    assert process.returncode == -signal.SIGKILL
    assert KEY not in store
    (stale,) = files(store)
    assert stale.parent.name == "aside"
    again = Store(store.folder)
    assert files(again) == []
    again.put(KEY, scan(), {})
    assert files(again) == [entry(again)]


class Failing(np.ndarray):
    """Values whose reading calls something, and goes on or fails with it."""

    def __getitem__(self, item):
        type(self).call()
        return super().__getitem__(item)


def test_a_writer_that_fails_leaves_nothing(store):
    class Broken(Failing):
        @staticmethod
        def call():
            raise RuntimeError("decoder")

    with pytest.raises(RuntimeError, match="decoder"):
        store.put(KEY, scan().view(Broken), {})
    assert files(store) == []


def test_a_sweep_leaves_what_is_being_written(store):
    swept = []

    class Swept(Failing):
        @staticmethod
        def call():
            swept.append(Store(store.folder).sweep())

    store.put(KEY, scan().view(Swept), {})
    assert swept and not any(swept)
    assert_same(whole(store.open(KEY)), scan())


def test_a_writer_survives_a_sweep_that_sees_no_locks(store):
    swept = []

    class Unlocked(Failing):
        @staticmethod
        def call():
            if not swept:
                swept.extend((store.folder / "aside").iterdir())
                swept[0].unlink()

    store.put(KEY, scan().view(Unlocked), {})
    assert_same(whole(store.open(KEY)), scan())


def test_a_full_disk_is_a_fault_of_the_environment(store):
    """RLIMIT_FSIZE makes the kernel refuse a write in the middle, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(EnvironmentFault, match=r"store.*cannot be written: File too large\. Free some space") as error:
            store.put(KEY, scan((1, 64, 64, 64)), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(store.folder) in str(error.value)
    assert isinstance(error.value.__cause__, OSError) and error.value.__cause__.errno == errno.EFBIG
    assert files(store) == []
    store.put(KEY, scan(), {})
    assert_same(whole(store.open(KEY)), scan())


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentFault, match="cannot be written"):
        Store(tmp_path / "file" / "store")


def test_a_store_that_was_deleted_is_made_again(store):
    entry(store).parent.mkdir()
    (store.folder / "aside").rmdir()
    store.put(KEY, scan(), {})
    assert_same(whole(store.open(KEY)), scan())


def test_the_format_is_what_the_docstring_says(store):
    store.put(KEY, scan(), {"a": 1})
    content = entry(store).read_bytes()
    assert content[:8] == b"RESUNET2"
    length = int.from_bytes(content[8:12], "little")
    assert json.loads(content[20 : 20 + length]) == {
        "shape": [1, 40, 70, 35],
        "dtype": "<i2",
        "chunk": [1, 32, 32, 32],
        "facts": {"a": 1},
    }


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32", "float64"])
@pytest.mark.parametrize("share", [0.0, 1e-4, 0.01])
def test_air_comes_back_as_air(tmp_path, dtype, share):
    rng = np.random.default_rng(0)
    values = (rng.random((1, 3, 130, 201)) < share).astype(dtype)  # far chunks of odd sizes, most of them zeros
    store = Store(tmp_path / "store")
    for axis in (None, 0):
        key = store_key("air", dtype, str(axis))
        store.put(key, values, {}, slice_axis=axis)
        found = store.open(key).crop((slice(None),) * 4)
        assert found.dtype == values.dtype
        np.testing.assert_array_equal(found, values)
