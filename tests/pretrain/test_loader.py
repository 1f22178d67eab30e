import json
import os
import signal
from collections.abc import Callable
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from accelerate import Accelerator

from pretrain.archive import read_archive
from pretrain.loader import ContrastiveSets, reading
from pretrain.loop import pretrain
from pretrain.recipe import PretrainRecipe
from resunet.data.order import batch_order
from resunet.errors import EnvironmentFault, InputError, Stopped

Make = Callable[..., PretrainRecipe]


@pytest.fixture
def volumes(archive: Path) -> Path:
    """Volumes among the images, so that store and files are both read."""
    for i in range(2):
        values = np.random.default_rng(i).integers(0, 900, (5, 24, 32), dtype=np.int16)
        sitk.WriteImage(sitk.GetImageFromArray(values), str(archive / f"volume{i}.nii.gz"))
    return archive


@pytest.fixture
def sets(recipe: Make, volumes: Path) -> Callable[..., ContrastiveSets]:
    scans = read_archive(recipe(), Accelerator(cpu=True)).scans

    def make(rank: int = 0, processes: int = 1, **changes: object) -> ContrastiveSets:
        return ContrastiveSets(scans, recipe(processes=processes, **changes), rank)

    return make


def same(one, other) -> bool:
    """Bit for bit; a position that is not known is like another."""
    pairs = [(a.nan_to_num(-1), b.nan_to_num(-1)) for a, b in zip(one, other, strict=True)]
    return all(torch.equal(a, b) for a, b in pairs)


def test_a_set_is_a_pure_function_of_seed_index_and_rank(sets):
    first = sets().read(3)
    sets().read(0)
    np.random.seed(1)
    torch.manual_seed(1)
    assert same(sets().read(3), first)
    others = [sets().read(4), sets(seed=1).read(3), sets(rank=1, processes=2).read(3), sets(rank=0, processes=2).read(3)]
    assert not any(same(other, first) for other in others)
    assert not same(others[2], others[3])


def test_ranks_divide_a_set_between_them(sets, recipe):
    """Whole images, that are told by their sizes and values: the two ranks' are those of one."""
    alone = sets(batch=6).read(2)
    shares = [sets(rank, 2, batch=6).read(2) for rank in range(2)]
    assert [len(share[0]) for share in shares] == [3, 3]
    scans, sizes = alone[:2]
    of_ranks = [(scan, size) for share in shares for scan, size in zip(*share[:2], strict=True)]
    for scan, size, (its_scan, its_size) in zip(scans, sizes, of_ranks, strict=True):
        height, width = size.tolist()
        assert torch.equal(size, its_size) and torch.equal(scan[:, :height, :width], its_scan[:, :height, :width])


def test_ranks_read_what_one_would_read(sets):
    """Windows that are parts of slices, around content: each draws for itself."""
    views = {"size": 8, "window": 12}
    for index in range(3):
        alone = sets(batch=6, views=views).read(index)
        shares = [sets(rank, 3, batch=6, views=views).read(index) for rank in range(3)]
        assert same([torch.cat(parts) for parts in zip(*shares, strict=True)], alone)


def test_a_set_says_where_its_windows_are_from(sets, volumes):
    """Nine images, then the volumes' slices: 5 along z, of which the first and the last are at 0 and 1."""
    ours = sets(batch=19)
    found = ours.read(0)
    scans = ours._scans
    for place, item in enumerate(batch_order(19, 19, 0, 0)):
        window = scans.window(int(item), 512, np.random.default_rng(0))
        assert found.scan[place] == window.scan == (item if item < 9 else 9 + (item - 9) // 5)
        assert torch.equal(
            found.windows[place, :, : found.sizes[place, 0], : found.sizes[place, 1]], torch.from_numpy(window.values)
        )
        if item < 9:
            assert found.axis[place] == -1 and found.position[place].isnan()
        else:
            assert found.axis[place] == 0 and found.position[place] == ((item - 9) % 5) / 4


def test_an_epoch_of_sets_holds_every_slice_once(sets):
    ours = sets(batch=4)
    count = 9 + 10
    seen = []
    for index in range(count // 4):
        scans, sizes, anchors = ours.read(index)[:3]
        assert len(scans) == len(sizes) == len(anchors) == 4 and (anchors < sizes[:, None]).all() and (anchors >= 0).all()
        seen += [tuple(scan.sum().tolist() for scan in scans[i]) for i in range(4)]
    assert len(set(seen)) == len(seen) == 16
    assert len({int(i) for index in range(4) for i in batch_order(count, 4, 0, index)}) == 16


def test_a_large_slice_is_read_in_part(recipe, archive):
    scans = read_archive(recipe(), Accelerator(cpu=True)).scans
    windows, sizes = ContrastiveSets(scans, recipe(views={"size": 8, "window": 12}), 0).read(0)[:2]
    assert windows.shape == (4, 1, 12, 12) and (sizes == 12).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_sets_come_in_order_and_the_workers_go(sets, workers):
    ours = sets()
    before = set(active_children())
    with reading(ours, range(3, 8), workers, pin=False) as reader:
        found = [next(reader) for _ in range(2)]
        assert len(set(active_children()) - before) == workers
    assert set(active_children()) == before
    with reading(ours, range(5, 8), workers, pin=False) as reader:
        found += list(reader)
    assert all(same(one, ours.read(index)) for index, one in enumerate(found, 3))
    with reading(ours, range(8, 8), workers, pin=False) as reader:
        assert list(reader) == []
    assert set(active_children()) == before


def test_workers_give_the_same_weights(recipe, volumes, tmp_path):
    runs = []
    for workers in (0, 2):
        out = pretrain(recipe(steps=3, accumulate=2, data={"workers": workers}, out=str(tmp_path / str(workers))))
        runs.append([(out / "model" / name).read_bytes() for name in ("model.safetensors", "archive.parquet")])
        runs[-1].append((out / "metrics.jsonl").read_text(encoding="utf-8"))
    assert runs[0] == runs[1]


def test_a_run_whose_workers_were_ahead_is_resumed_exactly(recipe, volumes, tmp_path, sigterm_after):
    """SIGTERM to the whole group: the workers, who hear it first, go on until the rank has left."""
    ours = {"steps": 6, "data": {"workers": 2}}
    whole = pretrain(recipe(**ours, out=str(tmp_path / "whole")))
    stopped = recipe(**ours, out=str(tmp_path / "stopped"))

    def tell_workers() -> None:
        assert len(active_children()) == 2
        for worker in active_children():
            os.kill(worker.pid, signal.SIGTERM)
            os.kill(worker.pid, signal.SIGINT)

    sigterm_after(2, tell_workers)
    with pytest.raises(Stopped, match="after step 2"):
        pretrain(stopped)
    assert active_children() == []
    pretrain(stopped.model_copy(update={"resume": True}))
    for name in ("model/model.safetensors", "model/archive.parquet", "metrics.jsonl"):
        assert (stopped.out / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_vanishes_is_told_in_one_message(recipe, archive, workers):
    ours = recipe(steps=3, data={"workers": workers})
    scans = read_archive(ours, Accelerator(cpu=True)).scans
    for path in archive.glob("*.png"):
        path.unlink()
    with pytest.raises(InputError) as error, reading(ContrastiveSets(scans, ours, 0), range(3), workers, pin=False) as reader:
        next(reader)
    assert "Traceback" not in str(error.value) and "DataLoader" not in str(error.value) and ".png" in str(error.value)
    assert "\n" not in str(error.value) and active_children() == []


def test_a_scan_that_the_store_lost_is_told(recipe, volumes):
    ours = recipe(steps=3, data={"workers": 1})
    scans = read_archive(ours, Accelerator(cpu=True)).scans
    for path in ours.data.store.glob("??/*"):
        path.unlink()
    scans._store._opened.cache_clear()
    lost = pytest.raises(EnvironmentFault, match=r"missing or damaged\. resume=true")
    with lost, reading(ContrastiveSets(scans, ours, 0), range(9), 1, pin=False) as reader:
        list(reader)


def test_a_worker_that_is_killed_is_the_machines_fault(sets):
    died = pytest.raises(EnvironmentFault, match=r"a process that reads the archive died.*data\.workers")
    with died, reading(sets(), range(1000), 1, pin=False) as reader:
        next(reader)
        (worker,) = active_children()
        os.kill(worker.pid, signal.SIGKILL)
        for _ in reader:
            pass
    assert active_children() == []


def test_an_error_of_ours_shows_its_traceback(sets):
    with pytest.raises(ZeroDivisionError), reading(sets(), range(5), 1, pin=False) as reader:
        next(reader)
        _ = 1 / 0
    assert active_children() == []


def test_the_store_is_its_owners_alone_and_filled_once(recipe, volumes, capsys, monkeypatch, tmp_path):
    ours = recipe(data={"store": None})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    read_archive(ours, Accelerator(cpu=True))
    store = tmp_path / "cache" / "resunet" / "store"
    assert store.stat().st_mode & 0o777 == 0o700
    assert f"store: 2 of 2 scans decoded into {store}, 0 were there" in capsys.readouterr().err
    read_archive(ours, Accelerator(cpu=True))
    assert f"store: 0 of 2 scans decoded into {store}, 2 were there" in capsys.readouterr().err
    for path in volumes.glob("*.nii.gz"):
        path.unlink()
    read_archive(ours, Accelerator(cpu=True))
    assert "store" not in capsys.readouterr().err


def test_a_folder_that_is_given_keeps_its_mode(recipe, volumes, tmp_path):
    (tmp_path / "given").mkdir(mode=0o755)
    read_archive(recipe(data={"store": str(tmp_path / "given")}), Accelerator(cpu=True))
    assert (tmp_path / "given").stat().st_mode & 0o777 == 0o755
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match="the store of decoded scans cannot be"):
        read_archive(recipe(data={"store": str(tmp_path / "file")}), Accelerator(cpu=True))


def test_no_path_of_the_store_leaves_the_machine(recipe, volumes, tmp_path):
    out = pretrain(recipe(steps=1))
    record = (
        (out / "run.json").read_text(encoding="utf-8")
        + (out / "report.html").read_text(encoding="utf-8")
        + (out / "model" / "config.json").read_text(encoding="utf-8")
    )
    assert str(tmp_path) not in record and json.loads((out / "run.json").read_text(encoding="utf-8"))["status"] == "done"
