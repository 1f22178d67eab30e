"""Real anatomy for the phantom: the MNI152 maps, deformed anew for every patient, and smooth random fields.

All coordinates are LPS mm (SimpleITK's), all arrays (z, y, x).
"""

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.random import Generator
from scipy import ndimage
from torch.nn import functional

if TYPE_CHECKING:
    from resunet.data.phantom import PhantomConfig

COARSE = 4.0  # mm, the grid of the deformation


@lru_cache(maxsize=1)
def template_maps() -> dict:
    """The MNI152 maps at 1 mm, (z, y, x) in LPS, cut to the brain.

    `maps` (channels, z, y, x) float32 in the order of `names`; `push` (3, z, y, x) unit vectors away from the lateral ventricles,
    fading with distance; `origin` and `centre` in mm (z, y, x).
    """
    from nilearn.datasets import load_mni152_gm_template, load_mni152_template, load_mni152_wm_template

    loaders = (load_mni152_template, load_mni152_gm_template, load_mni152_wm_template)
    images = [load(resolution=1) for load in loaders]
    # nilearn's x, y, z run to R, A, S: two flips make them L, P, S
    t1, grey, white = (image.get_fdata(dtype=np.float32).transpose(2, 1, 0)[:, ::-1, ::-1] for image in images)
    last = np.array(t1.shape) - 1
    first = images[0].affine[:3, 3][::-1]
    origin = np.array([first[0], -(first[1] + last[1]), -(first[2] + last[2])])
    box = ndimage.find_objects((t1 > 0).astype(np.uint8))[0]
    t1, grey, white = (np.pad(a[box], 2) for a in (t1, grey, white))  # the template is cut through the brain stem
    origin = origin + [s.start - 2 for s in box]
    brain = (t1 > 0).astype(np.float32)
    csf = np.clip(brain - grey - white, 0, 1)

    z, y, x = (o + np.arange(n) for o, n in zip(origin, t1.shape, strict=True))
    z, y, x = z[:, None, None], y[None, :, None], np.abs(x)[None, None, :]
    # lateral ventricles: fluid near the middle without the third ventricle and the cisterns, joined to the bodies
    fluid = (csf > 0.5) & (z > -14) & (z < 40) & (y > -45) & (y < 62) & (x > 2) & (x < 42) & ~((x < 20) & (z < 8) & (y > 20))
    labels, _ = ndimage.label(fluid)
    bodies = np.unique(labels[(z > 15) & (z < 28) & (x < 20) & (y > -25) & (y < 25) & fluid])
    ventricles = np.isin(labels, bodies)
    distance = ndimage.distance_transform_edt(~ventricles) - ndimage.distance_transform_edt(ventricles)
    distance = ndimage.gaussian_filter(distance.astype(np.float32), 1.0)

    # a ventricle's wall is half fluid, half white matter, which the grey-matter map takes for grey: give it back
    thin = np.clip(grey - ndimage.grey_opening(grey, 5), 0, None) * (distance < 5)
    grey, white = grey - thin, white + thin * np.clip((t1 - 0.25) / 0.62, 0, 1)
    csf = np.clip(brain - grey - white, 0, 1)
    texture = np.clip(t1 - (0.65 * grey + 0.875 * white + 0.25 * csf), -0.2, 0.2) * brain
    texture = ndimage.gaussian_filter(texture, 0.7) * (grey + white)
    cortex = ndimage.gaussian_filter(grey * (distance > 15), 3.0)  # how near the cortex is
    # where lesions are rare: below the tentorium, in the deep grey nuclei, on the midline
    likely = np.where((z < -22) | ((x < 30) & (y > -25) & (y < 33) & (z < 17)), 0.05, np.where(x < 5, 0.15, 1.0))
    likely = ndimage.gaussian_filter(likely.astype(np.float32), 2.0)
    maps = {"grey": grey, "white": white, "csf": csf, "brain": brain, "texture": texture, "distance": distance}
    maps |= {"cortex": cortex, "likely": likely}
    push = np.stack(np.gradient(ndimage.gaussian_filter(distance, 3.0))) * np.exp(-np.clip(distance, 0, None) / 15)
    return {
        "names": tuple(maps),
        "maps": torch.from_numpy(np.stack(list(maps.values())).astype(np.float32)),
        "push": torch.from_numpy(push.astype(np.float32)),
        "origin": origin,
        "centre": origin + (np.array(t1.shape) - 1) / 2,
    }


def deformed_template(rng: Generator, config: "PhantomConfig", shape: np.ndarray, fine: np.ndarray) -> dict[str, np.ndarray]:
    """The template's maps on the patient's grid (z, y, x): affine, smooth displacement, ventricles pushed outwards."""
    template = template_maps()
    extent = (shape - 1) * fine
    coarse = np.ceil(extent / COARSE).astype(int) + 1
    axes = [np.linspace(-e / 2, e / 2, n) for e, n in zip(extent, coarse, strict=True)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"))  # (3, z, y, x), mm from the centre

    angles = np.deg2rad(rng.normal(0, config.rotation_deg, 3).clip(-2.5 * config.rotation_deg, 2.5 * config.rotation_deg))
    matrix = np.diag(np.exp(rng.normal(0, config.scale, 3).clip(-1.6 * config.scale, 1.6 * config.scale)))
    matrix = matrix + np.triu(rng.normal(0, config.scale / 2, (3, 3)), 1)
    for axis, angle in enumerate(angles):
        rotation = np.eye(3)
        i, j = (k for k in range(3) if k != axis)
        rotation[[i, i, j, j], [i, j, i, j]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        matrix = matrix @ rotation
    points = np.einsum("ij,jzyx->izyx", matrix, points) + template["centre"][:, None, None, None]
    for axis in range(3):
        # 30 mm bends lobes, 12 mm bends gyri; amplitudes stay below what would fold space
        points[axis] += config.deformation_mm * smooth_noise(rng, coarse, np.full(3, COARSE), 30.0)
        points[axis] += 0.4 * config.deformation_mm * smooth_noise(rng, coarse, np.full(3, COARSE), 12.0)
    push = sample(template["push"], points - template["origin"][:, None, None, None])
    points = points - rng.uniform(*config.ventricles_mm) * push
    points = points - template["origin"][:, None, None, None]
    brain = sample(template["maps"][template["names"].index("brain")][None], points)[0] > 0
    near_brain = upsample(ndimage.binary_dilation(brain, iterations=2).astype(np.float32), shape) > 0
    index = np.stack([upsample(axis.astype(np.float32), shape)[near_brain] for axis in points])
    values = sample(template["maps"], index[:, None, None, :]).reshape(len(template["names"]), -1)
    anatomy = {}
    for name, inside in zip(template["names"], values, strict=True):
        anatomy[name] = np.full(shape, 100.0 if name == "distance" else 0.0, np.float32)
        anatomy[name][near_brain] = inside
    return anatomy


def tissue_fractions(rng: Generator, anatomy: dict[str, np.ndarray], fine: np.ndarray) -> dict[str, np.ndarray]:
    """Tissue fractions (z, y, x): the template's probabilities made crisp, and redrawn locally so that sulci differ."""
    shape = np.array(anatomy["brain"].shape)
    weights = {}
    for name, strength, crispness in (("grey", 0.35, 1.7), ("white", 0.35, 1.7), ("csf", 0.6, 1.4)):
        weights[name] = np.clip(anatomy[name], 0, 1) ** crispness * np.exp(strength * smooth_noise(rng, shape, fine, 5.0))
    total = sum(weights.values()) + 1e-6
    return {name: weight / total * anatomy["brain"] for name, weight in weights.items()}


def smooth_noise(rng: Generator, shape: np.ndarray, spacing: np.ndarray, scale_mm: float) -> np.ndarray:
    """A smooth Gaussian field (z, y, x), float32, expected mean 0 and standard deviation 1, correlated over about `scale_mm`."""
    extent = np.asarray(shape) * spacing
    coarse = np.ceil(extent / scale_mm * 2).astype(int) + 6
    field = ndimage.gaussian_filter(rng.standard_normal(coarse, dtype=np.float32), 1.0)[2:-2, 2:-2, 2:-2]
    field = field / np.float32(0.134)  # its deviation: (2 sqrt(pi))^-1.5 = 0.150 after the Gaussian, 0.134 after upsampling too
    return upsample(field, shape)


def upsample(field: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """Trilinear (z, y, x); the first and last points of `field` and of the result coincide."""
    size = tuple(int(n) for n in shape)
    return functional.interpolate(torch.from_numpy(field)[None, None], size, mode="trilinear", align_corners=True)[0, 0].numpy()


def sample(maps: torch.Tensor, index: np.ndarray) -> np.ndarray:
    """Trilinear values (channels, z, y, x) of `maps` at voxel indices `index` (3, z, y, x); the border repeats outside."""
    size = np.array(maps.shape[1:], np.float32)[:, None, None, None]
    grid = (2 * index.astype(np.float32) / (size - 1) - 1)[::-1]  # grid_sample wants x, y, z in [-1, 1]
    positions = torch.from_numpy(np.ascontiguousarray(np.moveaxis(grid, 0, -1)))
    return functional.grid_sample(maps[None], positions[None], padding_mode="border", align_corners=True)[0].numpy()


def average_down(array: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Means (z, y, x) over blocks of `factor` voxels."""
    blocks = tuple(int(f) for f in factor)
    return functional.avg_pool3d(torch.from_numpy(np.asarray(array, np.float32))[None, None], blocks, blocks)[0, 0].numpy()
