"""Names that can be compared but not read: HMACs with a salt that stays on the machine.

A stem or a patient id never goes into a run, a checkpoint or W&B; its HMAC does, together with the salt's
fingerprint, so that two records are compared only where the same salt made them.
"""

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from platformdirs import user_data_path

from resunet.errors import EnvironmentFault, InputError

_BYTES = 32


class Salt:
    """A secret key for `identify`."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self.fingerprint = hashlib.sha256(b"resunet salt fingerprint" + key).hexdigest()[:16]

    def identify(self, kind: str, name: str) -> str:
        """The HMAC-SHA256 of a name of some kind ('file', 'group'), as 32 hex digits."""
        return hmac.digest(self._key, f"{kind}\0{name}".encode(), "sha256").hex()[:32]


def own_group(path: str | Path, salt: Salt) -> str:
    """The group of a scan of which nobody said whose it is: equal names of two folders are not one patient."""
    return salt.identify("path", os.path.realpath(path))


def default_salt_file() -> Path:
    """Where the salt of this user on this machine is kept."""
    return Path(user_data_path("resunet")) / "salt"


def load_salt(path: Path | None, called: str = "data.salt_file=") -> Salt:
    """The salt in a file; the user's own is made (mode 0600) where it does not exist yet. called: for messages.

    Raises:
        InputError: `path` was given and does not exist, or is no salt.
        EnvironmentFault: the user's own salt cannot be written.
    """
    file = path or default_salt_file()
    if path is None and not file.exists():
        _create(file)
    try:
        key = bytes.fromhex(file.read_text(encoding="utf-8").strip())
    except OSError as error:
        raise InputError(
            f"{called}{file}: cannot be read: {error.strerror}. Leave it out to use {default_salt_file()}."
        ) from error
    except ValueError as error:
        raise InputError(f"{file}: not a salt (64 hex digits).") from error
    if len(key) != _BYTES:
        raise InputError(f"{file}: a salt has {2 * _BYTES} hex digits, this file {2 * len(key)}.")
    return Salt(key)


def _create(file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_name(f".salt.{secrets.token_hex(8)}")
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as out:
            out.write(secrets.token_hex(_BYTES) + "\n")
        try:
            os.link(aside, file)  # the first of several ranks wins; the others read what it wrote
        except FileExistsError:
            return
        finally:
            aside.unlink()
    except OSError as error:
        raise EnvironmentFault(f"{file}: the salt cannot be written ({error}). Name another file: data.salt_file=…") from error
