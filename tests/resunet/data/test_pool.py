import os
import signal
import time
from pathlib import Path

import SimpleITK
import threadpoolctl

from resunet.data.manifest import open_manifest
from resunet.data.pool import Fault, Limits, guarded_map


def outcomes(function, chunks, gather=list, **limits):
    """repr(item) → what the function gave, or the fault."""
    found = {}
    for one in guarded_map(function, gather, chunks, 2, Limits(**limits)):
        results = [] if one.result is None else one.result
        found |= {repr(item): (result, None) for item, result in zip(one.items, results, strict=True)}
        found |= {repr(item): (None, fault) for item, fault in one.faults}
    return found


def test_every_item_has_its_result():
    assert outcomes(abs, [[-1, -2], [-3]]) == {"-1": (1, None), "-2": (2, None), "-3": (3, None)}
    assert outcomes(abs, []) == {}


def test_what_passed_is_gathered_a_chunk_at_a_time():
    (found,) = guarded_map(int, sum, [["10", "x", "3"]], 1, Limits())
    assert (found.items, found.result) == (["10", "3"], 13)
    assert found.faults == [("x", Fault("reading it failed unexpectedly: ValueError"))]


def test_where_gathering_fails_the_item_at_fault_alone_is_lost():
    found = outcomes(abs, [[1, -2, 3]], gather=refuse_two)
    assert found == {"1": (1, None), "-2": (None, Fault("reading it failed unexpectedly: ZeroDivisionError")), "3": (3, None)}


def test_what_hangs_costs_itself_only():
    found = outcomes(time.sleep, [[0, 60, 0.001]], seconds=1)
    fault = Fault("reading it took longer than 1 s", "1 s, 4 GiB")
    assert found == {"0": (None, None), "60": (None, fault), "0.001": (None, None)}


def test_what_brings_a_worker_down_costs_itself_only():
    found = outcomes(signal.raise_signal, [[signal.SIGCHLD, signal.SIGSEGV], [signal.SIGURG]])
    reasons = {item: fault and fault.reason for item, (_, fault) in found.items()}
    assert reasons == {
        repr(signal.SIGCHLD): None,
        repr(signal.SIGSEGV): "reading it brought the reader down (SIGSEGV)",
        repr(signal.SIGURG): None,
    }
    fault = Fault("reading it brought the reader down (exit code 7)", "120 s, 4 GiB")
    assert outcomes(os._exit, [[7]]) == {"7": (None, fault)}


def test_a_worker_that_somebody_stopped_does_its_work_again(tmp_path):
    found = outcomes(stop_once, [[tmp_path / "1", tmp_path / "2"]])
    assert found == {repr(tmp_path / "1"): ("again", None), repr(tmp_path / "2"): ("again", None)}


def test_memory_is_limited():
    found = outcomes(bytearray, [[1, 3 << 30]], gib=1)
    assert found == {"1": (bytearray(1), None), str(3 << 30): (None, Fault("reading it needs more than 1 GiB", "120 s, 1 GiB"))}


def test_an_error_is_a_reason_and_ours_speaks_for_itself(tmp_path):
    assert outcomes(int, [["1", "one"]]) == {
        "'1'": (1, None),
        "'one'": (None, Fault("reading it failed unexpectedly: ValueError")),
    }
    found = outcomes(open_manifest, [[tmp_path / "m.parquet"], [Path(__file__)]])
    (_, missing), (_, wrong) = (found[repr(path)] for path in (tmp_path / "m.parquet", Path(__file__)))
    assert missing.reason.startswith(f"{tmp_path / 'm.parquet'}: no such manifest")
    assert (missing.under, wrong.under) == ("", None)  # it may be there tomorrow; this is no Parquet for good


def test_a_worker_is_a_core():
    ((threads, blas),) = (result for result, _ in outcomes(threads_of, [[0]]).values())
    assert threads == 1 and set(blas) == {1}


def refuse_two(numbers):
    """Gathers, unless 2 is there."""
    return [number for number in numbers if number != 2 or 1 // 0]


def stop_once(path):
    if path.exists():
        return "again"
    path.touch()
    signal.raise_signal(signal.SIGTERM)
    return "the signal did not arrive"


def threads_of(_):
    return SimpleITK.ProcessObject.GetGlobalDefaultNumberOfThreads(), [
        one["num_threads"] for one in threadpoolctl.threadpool_info()
    ]
