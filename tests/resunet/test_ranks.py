import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import Accelerator

from resunet.errors import EnvironmentFault, InputError
from resunet.ranks import by_main_rank, on_every_rank, refuse_other_steps

SCRIPT = Path(__file__).with_name("faulty_ranks.py")
ROOT = SCRIPT.parents[2]


def test_what_fails_on_one_rank_fails_on_all_and_is_told_once(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(tmp_path)],
            env=shared | {"MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    seen = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert seen[0] == seen[1]
    (disk, steps) = seen[0]
    assert disk[0] == "EnvironmentFault" and "No space left on device" in disk[1] and disk[2]
    assert steps[0] == "InputError" and "continue after steps 0, 3. Put it on a disk that all machines share" in steps[1]
    assert sorted(path.name for path in tmp_path.glob("written-*")) == ["written-by-0"]
    # then rank 1 leaves for a reason of its own, while rank 0 waits for it
    assert [rank.returncode for rank in ranks] == [3, 3], errors
    assert "resunet: another rank has left." in errors[0] and "resunet: rank 1: a fault of its machine" in errors[1]
    assert not any("Traceback" in text for text in errors)


def test_one_rank_is_all_ranks(tmp_path):
    accelerator = Accelerator(cpu=True)
    by_main_rank((tmp_path / "here").touch, tmp_path, accelerator)
    refuse_other_steps(7, tmp_path, accelerator)
    assert (tmp_path / "here").exists() and on_every_rank(lambda: 5, accelerator) == 5

    def refused() -> None:
        raise InputError("no")

    with pytest.raises(InputError, match="no"):
        on_every_rank(refused, accelerator)

    def full() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(EnvironmentFault, match="cannot be written: No space left"):
        by_main_rank(full, tmp_path, accelerator)
