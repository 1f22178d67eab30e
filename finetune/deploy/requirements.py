"""requirements.txt of a bundle: what a machine needs that predicts with it, and no more."""

import importlib.metadata
import re
from collections.abc import Sequence

from resunet.bundle.contract import Contract, Runtime
from resunet.bundle.engines import name_of

_IMAGES = ("imagecodecs", "nibabel", "numpy", "pillow", "SimpleITK", "tifffile")
_DICOM = ("pydicom", "pyjpegls", "pylibjpeg", "pylibjpeg-openjpeg")
_COMMAND = ("tqdm", "typer")
_OBJECTS = "connected-components-3d"  # which removes objects
_OPTIONAL = {"highdicom": "writes predictions of DICOM series, as DICOM-SEG", "pyarrow": "reads a manifest as INPUT"}
# The modules of each runtime, and the package of a module that is called otherwise.
_ENGINES: dict[Runtime, tuple[str, ...]] = {
    "openvino": ("openvino",),
    "onnxruntime": ("onnxruntime",),
    "tensorrt": ("tensorrt", "cuda.bindings"),
}
_NAMES = {"cuda.bindings": "cuda-python"}


def requirements(contract: Contract) -> str:
    """The file's text: the readers, and the preferred runtime of the bundle; the others as comments."""
    rules = contract.postprocessing.rules if contract.postprocessing else ()
    needed = [*_IMAGES, *_DICOM, *_COMMAND, *([_OBJECTS] if rules else [])]
    runtimes = list(dict.fromkeys(graph.runtime for graph in contract.graphs if graph.runtime in _ENGINES))
    lines = [
        f"# pip install --no-deps resunet=={contract.resunet}",
        "# pip install -r requirements.txt",
        *sorted(map(_ranged, needed), key=str.lower),
    ]
    lines += _engine_lines(runtimes)
    lines += ["", "# if wanted:", *(f"# {_ranged(name)}  {what}" for name, what in _OPTIONAL.items())]
    return "\n".join(lines) + "\n"


def _engine_lines(runtimes: Sequence[Runtime]) -> list[str]:
    if not runtimes:
        return ["", "# PyTorch is the only runtime of this bundle: pip install resunet instead, with all that it needs"]
    first, *others = runtimes
    lines = {one: [_ranged(_distribution(part)) for part in _ENGINES[one]] for one in runtimes}
    return [*lines[first], *(f"# or, for {name_of(one)}: {' '.join(lines[one])}" for one in others)]


def _distribution(module: str) -> str:
    """The package that a module is of here: onnxruntime may be onnxruntime-gpu."""
    found = importlib.metadata.packages_distributions().get(module.split(".")[0])
    return found[0] if found else _NAMES.get(module, module)


def _ranged(package: str) -> str:
    """From what this package asks for to below the major version after the one that it was exported with."""
    try:
        tested = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # nothing is known of its versions
        return package
    pattern = re.compile(rf"{re.escape(package)}(?![\w.-])[^;]*>=\s*([\w.]+)", re.IGNORECASE)
    asked = (pattern.match(one) for one in importlib.metadata.requires("resunet") or ())
    lowest = next((found[1] for found in asked if found), tested)
    return f"{package}>={lowest},<{int(tested.split('.')[0]) + 1}"
