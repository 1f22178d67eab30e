import pyarrow as pa
import pytest

from resunet.data.describe import DESCRIBED, PERCENTILES
from resunet.data.dicom import DicomHeader
from resunet.data.ledger import header_from, header_text, open_ledger
from resunet.data.pool import Fault, Limits
from resunet.data.walk import FoundFile
from resunet.errors import InputError

HEADER = DicomHeader("p", "s", "e", "CT", "(1, 2)", -1.5, 3, 1, ("a", ""))


def found(path, mtime=1):
    return FoundFile(path, 10, mtime)


def described(*numbers, planes=1):
    rows = [
        {
            "file_sha256": f"{number:064x}",
            "pixel_sha256": "",
            "perceptual": b"",
            "format": "png",
            "modality": "",
            "shape": (2, 3),
            "channels": 1,
            "spacing": (1.0, 1.0),
            "orientation": "",
            "dtype": "uint8",
            "percentiles": [0.5] * len(PERCENTILES),
            "files": 1,
            "bytes": number,
            "thumbnail": bytes([number]) * (planes * 32 * 32),
        }
        for number in numbers
    ]
    return pa.RecordBatch.from_pylist(rows, schema=DESCRIBED)


def thumbnails(ledger, scans):
    """Of each scan, how many planes and what is in them."""
    rows = ledger.rows_of(scans)
    found = {}
    for positions, planes in ledger.thumbnails_at(rows):
        for position in positions.tolist():  # as many planes as the scan's number of files
            count = len(scans[position])
            found[position] = (count, set(planes[:count].ravel().tolist()))
            planes = planes[count:]
        assert not len(planes)
    return found


def reopened(out, salt="salt", limits=None):
    return open_ledger(out, salt, limits or Limits())


def test_headers_survive_as_text():
    assert header_from(header_text(HEADER)) == HEADER
    assert header_text(None) is None


def test_what_was_found_is_known_again(tmp_path):
    out = tmp_path / "m.parquet"
    scans = [(found("a"),), (found("b\udcff\n"), found("c")), (found("d"),), (found("f"),)]
    with reopened(out) as ledger:
        assert not ledger.knows_something
        for number, scan in enumerate(scans[:2]):
            ledger.add_scans([scan], described(number, planes=number + 1))
        ledger.flush()
        ledger.add_scans(scans[2:], described(2, 3))
        ledger.add_header(found("c"), HEADER)
        ledger.add_reject(found("e"), Fault("broken"))
    with reopened(out) as ledger:
        assert all(scan in ledger for scan in scans)
        assert (found("a", mtime=2),) not in ledger and (found("c"), found("b\udcff\n")) not in ledger
        assert ledger.headers == {found("c"): HEADER} and ledger.rejects == {found("e"): Fault("broken")}
        order = [scans[2], scans[0], scans[3], scans[1]]
        assert ledger.facts_at(ledger.rows_of(order)).column("bytes").to_pylist() == [2, 0, 3, 1]
        assert thumbnails(ledger, order) == {0: (1, {2}), 1: (1, {0}), 2: (1, {3}), 3: (2, {1})}
        assert ledger.knows_something and ledger.rows_of([scans[0], (found("a", mtime=2),)]).tolist()[1] == -1


def test_the_last_word_on_a_scan_counts(tmp_path):
    for number in range(3):
        with reopened(tmp_path / "m.parquet") as ledger:
            ledger.add_scans([(found("a"),)], described(number))
    with reopened(tmp_path / "m.parquet") as ledger:
        assert ledger.facts_at(ledger.rows_of([(found("a"),)])).column("bytes").to_pylist() == [2]
        assert thumbnails(ledger, [(found("a"),)]) == {0: (1, {2})}


def test_rejects_hold_while_their_reasons_do(tmp_path):
    out = tmp_path / "m.parquet"
    faults = {"own": Fault("no image"), "slow": Fault("too slow", str(Limits(1.0))), "locked": Fault("permission", "")}
    with reopened(out, limits=Limits(1.0)) as ledger:
        for name, fault in faults.items():
            ledger.add_reject(found(name), fault)
    with reopened(out, limits=Limits(1.0)) as ledger:
        assert {file.path for file in ledger.rejects} == {"own", "slow"}
    with reopened(out, limits=Limits(2.0)) as ledger:
        assert {file.path for file in ledger.rejects} == {"own"}


def test_headers_that_another_salt_hid_are_not_used(tmp_path):
    with reopened(tmp_path / "m.parquet", "one") as ledger:
        ledger.add_header(found("a"), HEADER)
    with reopened(tmp_path / "m.parquet", "other") as ledger:
        assert not ledger.headers and ledger.hidden == {found("a")}


def test_parts_that_are_damaged_are_passed_over(tmp_path):
    with reopened(tmp_path / "m.parquet") as ledger:
        ledger.add_scans([(found("a"),)], described(1))
        ledger.flush()
        ledger.add_scans([(found("b"),)], described(2))
    first, second = sorted((tmp_path / "m.parts").glob("scans*"))
    first.write_bytes(second.read_bytes()[:-20])
    with reopened(tmp_path / "m.parquet") as ledger:
        assert (found("a"),) not in ledger and (found("b"),) in ledger
        ledger.add_scans([(found("c"),)], described(3))  # must not take the place of what is there
    with reopened(tmp_path / "m.parquet") as ledger:
        assert ledger.facts_at(ledger.rows_of([(found("b"),), (found("c"),)])).column("bytes").to_pylist() == [2, 3]


def test_one_at_a_time_and_nothing_left_where_nothing_was_found(tmp_path):
    out = tmp_path / "deep" / "m.parquet"
    with reopened(out), pytest.raises(InputError, match="another resunet index is writing it"), reopened(out):
        pass
    assert list((tmp_path / "deep").iterdir()) == []


def test_what_is_found_is_kept_when_a_run_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), reopened(tmp_path / "m.parquet") as ledger:
        ledger.add_scans([(found("a"),)], described(1))
        raise ZeroDivisionError
    with reopened(tmp_path / "m.parquet") as ledger:
        assert (found("a"),) in ledger


def test_what_a_kill_left_aside_is_swept(tmp_path):
    ours = [f".m.{name}.{'a1' * 16}" for name in ("parquet", "paths.parquet", "thumbnails-0f.npy", "html")]
    theirs = [f".other.parquet.{'a1' * 16}", ".m.parquet", ".m.parquet.bak"]
    for name in ours + theirs:
        (tmp_path / name).touch()
    with reopened(tmp_path / "m.parquet"):
        assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == sorted(theirs)
