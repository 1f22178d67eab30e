"""The bundle: a trained segmenter as one folder or one zipped file, whose answers can be checked, and which needs no PyTorch.

    contract.json     what goes in, what comes out, how masks are made of it, and the sha256 of every other file
    contract.sha256   of contract.json: the bundle's own digest
    graphs/           the network for each runtime and precision
    golden/           small synthetic inputs, with the answers of the live PyTorch network
    model/            optional: the PyTorch weights
    README.md         the model card
    requirements.txt  what a machine needs to predict

`finetune.deploy` writes it. Imports no torch, MONAI or pydantic, but for the runtime that is PyTorch.
"""

from resunet.bundle.bundle import Bundle, BundleSegmenter, is_bundle

__all__ = ["Bundle", "BundleSegmenter", "is_bundle"]
