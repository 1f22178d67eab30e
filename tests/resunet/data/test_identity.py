import hashlib
import hmac
import os
import stat
from pathlib import Path

import pytest

from resunet.data.identity import Salt, default_salt_file, load_salt
from resunet.errors import EnvironmentFault, InputError

KEY = bytes(range(32))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """The user's own salt, in a home of the test's own."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert tmp_path in default_salt_file().parents
    return tmp_path


def test_an_id_is_the_hmac_of_kind_and_name():
    expected = hmac.new(KEY, b"file\x00scan_1", hashlib.sha256).hexdigest()[:32]
    assert Salt(KEY).identify("file", "scan_1") == expected


def test_ids_tell_kinds_names_and_salts_apart():
    ids = [Salt(key).identify(kind, name) for key in (KEY, KEY[::-1]) for kind in ("file", "group") for name in ("a", "b", "é")]
    assert len(set(ids)) == len(ids)
    assert all(len(i) == 32 and set(i) <= set("0123456789abcdef") for i in ids)


def test_the_fingerprint_tells_salts_apart_and_is_not_the_key():
    assert Salt(KEY).fingerprint == Salt(KEY).fingerprint != Salt(KEY[::-1]).fingerprint
    assert Salt(KEY).fingerprint not in KEY.hex()


def test_the_users_salt_is_made_once_and_only_the_user_can_read_it():
    before = os.umask(0)
    try:
        first = load_salt(None)
    finally:
        os.umask(before)
    file = default_salt_file()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert len(bytes.fromhex(file.read_text(encoding="utf-8").strip())) == 32
    assert list(file.parent.iterdir()) == [file]
    assert load_salt(None).fingerprint == first.fingerprint == load_salt(file).fingerprint


def test_two_users_have_two_salts(monkeypatch, home):
    first = load_salt(None)
    monkeypatch.setenv("XDG_DATA_HOME", str(home / "other"))
    assert load_salt(None).fingerprint != first.fingerprint


def test_a_salt_file_that_is_named_must_be_there(home):
    with pytest.raises(InputError, match=r"data\.salt_file=.*none: cannot be read"):
        load_salt(home / "none")
    assert not (home / "none").exists()


@pytest.mark.parametrize("text, message", [("not hex", "not a salt"), ("abcd", "this file 4"), ("", "this file 0")])
def test_a_file_that_is_no_salt(home, text, message):
    (home / "salt").write_text(text)
    with pytest.raises(InputError, match=message):
        load_salt(home / "salt")


def test_a_salt_that_cannot_be_written_is_the_environments_fault(home):
    (home / "data").write_text("a file where a folder should be")
    with pytest.raises(EnvironmentFault, match=r"data\.salt_file="):
        load_salt(None)
