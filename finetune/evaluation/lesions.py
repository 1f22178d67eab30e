"""Objects of a segmentation: connected components, how large and how wide they are, and whether the other side hits them."""

import math
from dataclasses import dataclass

import cc3d
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

LESION_SIZES: tuple[tuple[str, int, float], ...] = (  # name, smallest, largest number of voxels
    ("<10", 1, 9),
    ("10-49", 10, 49),
    ("50-199", 50, 199),
    (">=200", 200, math.inf),
)
LESION_VOLUMES: tuple[tuple[str, float, float], ...] = (  # name, from, to below, in mm³, of images in mm²
    ("<10", 0, 10),
    ("10-50", 10, 50),
    ("50-200", 50, 200),
    (">=200", 200, math.inf),
)
THIN_WIDTHS: tuple[tuple[str, float, float], ...] = (  # name, from, to below, in pixels
    ("<2", 0, 2),
    ("2-4", 2, 4),
    ("4-8", 4, 8),
    (">=8", 8, math.inf),
)
THIN = 4  # times longer than wide


@dataclass(frozen=True)
class Lesions:
    """Connected components of one class each, in no particular order; arrays of one entry a component.

    kind: its class index. size: voxels. hit: it shares a voxel of its class with the other side. width: see `widths`; empty
    where it was not asked for.
    """

    kind: NDArray[np.integer]
    size: NDArray[np.integer]
    hit: NDArray[np.bool_]
    width: NDArray[np.float64]


def find_lesions(labels: NDArray[np.integer], other: NDArray[np.integer], with_widths: bool) -> Lesions:
    """The components of a label map, 8-connected in 2D and 26-connected in 3D; 0 is the background of both maps."""
    foreground = labels > 0
    components = components_of(labels)
    component, value = components[foreground], labels[foreground]
    size = np.bincount(component, minlength=1)
    kind = np.zeros(size.shape, dtype=labels.dtype)
    kind[component] = value
    hit = np.bincount(component[other[foreground] == value], minlength=len(size)) > 0
    width = widths(components, len(size) - 1) if with_widths else np.zeros(0)
    return Lesions(kind[1:], size[1:], hit[1:], width)  # component 0 is the background


def components_of(labels: NDArray) -> NDArray[np.unsignedinteger]:
    """Numbers from 1 for the components of every value but 0, 8-connected in 2D and 26-connected in 3D."""
    # of a label map with several values cc3d gives the components of each value
    components: NDArray[np.unsignedinteger] = cc3d.connected_components(labels, connectivity=8 if labels.ndim == 2 else 26)
    return components


def widths(components: NDArray[np.integer], count: int) -> NDArray[np.float64]:
    """The width of objects 1 … count of (y, x), in pixels: the diameter of the largest disc that fits into each.

    Found by the distance transform of the object enlarged twofold, where a disc may also have its centre between pixels:
    a straight line of w pixels has width w, for even and odd w. The outside of the image is not object.
    """
    found = np.zeros(count)
    for index, box in enumerate(ndimage.find_objects(components, max_label=count)):
        enlarged = np.pad((components[box] == index + 1).repeat(2, axis=0).repeat(2, axis=1), 1)
        found[index] = ndimage.distance_transform_edt(enlarged).max()
    return found


def is_thin(size: int, width: float) -> bool:
    """An object that is at least `THIN` times as long as wide, its length being its area over its width."""
    return size >= THIN * width**2
