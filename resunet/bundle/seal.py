"""Whether a bundle is the one that was written: its own digest, and that of every file in it.

The seal shows that nothing was damaged or changed in one place. It is no signature: who rewrites files, contract and seal together
makes another bundle that is in order. Compare its digest with the one that was noted when it was exported (`verify --sha256`).
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from resunet.bundle.contract import CONTRACT, SEAL, Contract, FileFacts, parse
from resunet.errors import CheckFailed
from resunet.files import sha256

_LARGEST_CONTRACT = 16 * 2**20


def described(folder: Path) -> dict[str, FileFacts]:
    """Every file but the contract and its seal, by its path below the folder."""
    return {
        name: FileFacts(sha256(folder / name), (folder / name).stat().st_size)
        for name in sorted(_names(folder))
        if name not in (CONTRACT, SEAL)
    }


def write_sealed(folder: Path, contract: Contract) -> str:
    """contract.json and contract.sha256; the bundle's digest."""
    data = contract.to_json().encode()
    digest = hashlib.sha256(data).hexdigest()
    (folder / CONTRACT).write_bytes(data)
    (folder / SEAL).write_text(f"{digest}  {CONTRACT}\n", encoding="utf-8")  # what sha256sum --check reads
    return digest


def read_sealed(folder: Path) -> tuple[Contract, str]:
    """The contract of a bundle of which every byte is as it was written, and the bundle's digest.

    Raises:
        CheckFailed: the contract is not the sealed one, cannot be read, or a file is missing, changed or not listed.
    """
    for name in (CONTRACT, SEAL):
        if (folder / name).is_symlink() or not (folder / name).is_file():
            raise CheckFailed(f"{name}: is missing from the bundle. Copy or export it again.")
    if (folder / CONTRACT).stat().st_size > _LARGEST_CONTRACT:
        raise CheckFailed(f"{CONTRACT}: is larger than {_LARGEST_CONTRACT >> 20} MiB: refused.")
    data = (folder / CONTRACT).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if (folder / SEAL).read_bytes() != f"{digest}  {CONTRACT}\n".encode():
        raise CheckFailed(f"{CONTRACT}: its sha256 is {digest}, which {SEAL} does not say: it was changed. Export it again.")
    try:
        contract = parse(data.decode())
    except (ValueError, RecursionError) as error:
        raise CheckFailed(
            f"{CONTRACT}: {error}. Export the bundle again, or use the version of resunet that wrote it."
        ) from error
    _refuse_files(folder, contract)
    return contract, digest


def _refuse_files(folder: Path, contract: Contract) -> None:
    named = [graph.file for graph in contract.graphs] + [golden.file for golden in contract.golden]
    if faults := file_faults(folder, contract.files, named, "the contract", {CONTRACT, SEAL}):
        raise CheckFailed("the bundle is not the one that was exported:\n" + "\n".join(f"  {fault}" for fault in faults))


def file_faults(folder: Path, files: Mapping[str, FileFacts], named: Sequence[str], facts_in: str, own: set[str]) -> list[str]:
    """How a folder differs from what was written of its files: missing, too many, changed, or named and not among them.

    Args:
        named: files and folders that the facts speak of. facts_in: what holds the facts, in words. own: its files.
    """
    there = set(_names(folder)) - own
    faults = [f"{name}: is missing" for name in sorted(files.keys() - there)]
    faults += [f"{name}: is not in {facts_in}" for name in sorted(there - files.keys())]
    for name in sorted(there & files.keys()):
        path, facts = folder / name, files[name]
        # sizes first: of what was cut short or blown up nothing is read
        if path.is_symlink() or path.stat().st_size != facts.bytes or sha256(path) != facts.sha256:
            faults.append(f"{name}: was changed, its sha256 is not that of {facts_in}")
    return faults + [
        f"{name}: named in {facts_in}, and not among its files"
        for name in named
        if name not in files and not any(file.startswith(f"{name}/") for file in files)
    ]


def _names(folder: Path) -> Iterator[str]:
    """Every file and link, links not followed."""
    for parent, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        for name in (*files, *links):
            yield (Path(parent) / name).relative_to(folder).as_posix()
