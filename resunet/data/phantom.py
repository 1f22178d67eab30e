"""The embedded data set: SIMULATED multiple-sclerosis patients on real anatomy, with exact lesion masks.

The anatomy is the MNI152 T1 template with its grey- and white-matter maps, which ship inside nilearn: nothing is downloaded.
Every patient is a new deformation of it with FLAIR-like contrast; lesions are painted on a grid finer than the output and
averaged down with the tissue, so partial volume is real and the mask is exact: lesion fraction >= 0.5 in the voxel.
All coordinates are LPS mm (SimpleITK's), all arrays (z, y, x). Sources: `SOURCE_TEXT`.
"""

import csv
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.random import Generator
from scipy import ndimage

from resunet.data.anatomy import average_down, deformed_template, smooth_noise, template_maps, tissue_fractions
from resunet.errors import InputError

SOURCE_TEXT = """\
The patients in this folder are SIMULATED. No scan of a person with multiple sclerosis went into them, and no figure measured
on them says how a model does on real patients.

anatomy   MNI152 T1 template (ICBM 2009, 1 mm, skull-stripped) with its grey- and white-matter probability maps, as nilearn
          ships them, deformed anew for every patient.
          Fonov et al. 2009, NeuroImage 47 (Suppl. 1), S102; Fonov et al. 2011, NeuroImage 54(1), 313-327.
lesions   painted into white matter with exact masks, the idea of BrainWeb's MS phantom (brainweb.bic.mni.mcgill.ca):
          Cocosco et al. 1997, NeuroImage 5(4), S425; Kwan, Evans, Pike 1999, IEEE Trans. Med. Imaging 18(11), 1085-1097.
          Their numbers, sizes, places and contrasts are drawn from distributions chosen by hand, not fitted to patients.
contrast  a random deformation, tissue contrast, bias field and resolution for each patient, the idea of SynthSeg:
          Billot et al. 2023, Medical Image Analysis 86, 102789.
noise     Rician: Gudbjartsson and Patz 1995, Magn. Reson. Med. 34(6), 910-914.

made by   resunet.data.phantom
"""

PARTS = ("test", "val", "pool")  # the order of numbering: a larger pool renumbers nobody
FIELD_OF_VIEW = (192.0, 216.0, 192.0)  # mm (x, y, z), the box all patients are cut from; z is then cut to the brain
WORKING_SPACING = (1.0, 1.0, 2.0)  # mm (x, y, z), about what lesions and tissue are painted on
Triple = tuple[float, float, float]
Range = tuple[float, float]


def _check(name: str, value: object, allowed: bool, what: str) -> None:
    if not allowed:
        raise InputError(f"phantom: {name} = {value!r}; allowed is {what}. Change {name}.")


@dataclass(frozen=True)
class PhantomConfig:
    """Sizes and difficulty of the simulated data set. A range is (low, high) of a uniform draw for each patient."""

    pool: int = 26  # patients to train on
    val: int = 4  # patients
    test: int = 10  # patients
    spacing_mm: Triple = (2.0, 2.0, 4.0)  # mm (x, y, z)
    lesion_contrast: float = 1.0  # factor on every lesion's brightness over white matter: the one knob of difficulty
    lesion_contrast_range: Range = (0.62, 1.4)  # of white matter's signal, one draw a patient
    lesion_contrast_spread: float = 0.15  # standard deviation of its log between a patient's lesions
    lesions_median: float = 9.0  # painted lesions of the median patient; touching ones become one in the mask
    lesions_sigma: float = 0.45  # of the logarithm, between patients
    volume_median_mm3: float = 420.0  # mm3, of the median lesion as painted
    volume_sigma: float = 1.3  # of the logarithm, within a patient
    volume_sigma_between: float = 0.5  # of the logarithm of the patients' own medians
    volume_range_mm3: Range = (80.0, 14000.0)  # mm3, volumes are clipped to it
    places: Triple = (0.5, 0.2, 0.3)  # shares of lesions: periventricular, juxtacortical, deep white matter; patients differ
    confluent: float = 0.5  # share of periventricular lesions made of several that run together
    edge_mm: float = 0.35  # mm, half width of a lesion's border
    grey_signal: Range = (0.92, 1.5)  # of grey matter, white matter's signal being 1: echo and inversion times differ by site
    csf_signal: Range = (0.05, 2.2)  # of fluid: from suppressed to as bright as in a T2-weighted scan
    noise: Range = (0.02, 0.07)  # Rician sigma as a fraction of white matter's signal
    bias: Range = (0.05, 0.3)  # standard deviation of the logarithm of the bias field
    scale: float = 0.05  # standard deviation of the log size; shear is half of it
    rotation_deg: float = 4.0  # degrees, standard deviation about each axis
    deformation_mm: float = 2.5  # mm, standard deviation of the smooth displacement along each axis
    ventricles_mm: Range = (-0.5, 4.0)  # mm, how far the ventricles' walls move outwards (atrophy)
    confounders: float = 1.0  # factor on rims, dirty white matter, flow artefacts and local variation of the cortex
    bright_spots: Range = (2.0, 14.0)  # number in grey matter (inflow, motion, partial volume), as bright as lesions
    gain: Range = (300.0, 3000.0)  # grey value of normal white matter

    def __post_init__(self) -> None:
        for name in PARTS:
            value = getattr(self, name)
            _check(name, value, isinstance(value, int) and value >= 0, "a whole number >= 0")
        _check("pool + val + test", self.patients, self.patients > 0, "at least one patient")
        spacing = len(self.spacing_mm) == 3 and all(0.5 <= s <= 8 for s in self.spacing_mm)
        _check("spacing_mm", self.spacing_mm, spacing, "three values of 0.5 to 8 mm")
        shares = min(self.places) >= 0 and abs(sum(self.places) - 1) < 1e-6
        _check("places", self.places, len(self.places) == 3 and shares, "three shares that sum to 1")
        _check("confluent", self.confluent, 0 <= self.confluent <= 1, "a share of 0 to 1")
        _check("volume_median_mm3", self.volume_median_mm3, self.volume_median_mm3 > 0, "a volume above 0 mm3")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is float:
                _check(field.name, value, value >= 0, "a number >= 0")
            elif field.type == Range:
                _check(field.name, value, len(value) == 2 and value[0] <= value[1], "(low, high) with low <= high")
                _check(field.name, value, field.name == "ventricles_mm" or value[0] >= 0, "low >= 0")

    @property
    def patients(self) -> int:
        return self.pool + self.val + self.test


@dataclass(frozen=True)
class SimulatedPatient:
    image: np.ndarray  # uint16 (z, y, x), 0 outside the brain
    mask: np.ndarray  # uint8 (z, y, x), 1 where the lesion fraction is >= 0.5
    spacing: Triple  # mm (x, y, z)
    origin: Triple  # mm (x, y, z), LPS centre of voxel 0; the axes are parallel to L, P, S
    lesion_volumes_mm3: np.ndarray  # float64 (lesions,), of the mask's 26-connected components, largest first

    @property
    def lesions(self) -> int:
        return len(self.lesion_volumes_mm3)


def write_phantom(
    folder: Path,
    config: PhantomConfig = PhantomConfig(),
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write images/, masks/, groups.csv, splits.json and SOURCE.txt to a new folder; the folder appears whole or not at all.

    Patient i (`sim-0001` is i = 1) depends on (seed, i) and the config's simulation values only. `progress(done, total)` is
    called after each patient. Raises InputError if `folder` exists or `seed` is negative.
    """
    folder = Path(folder)
    if folder.exists() or folder.is_symlink():
        raise InputError(f"{folder} exists already; allowed is a new folder. Name another one, or remove it first.")
    _check("seed", seed, seed >= 0, "a whole number >= 0")
    stems = [f"sim-{number:04d}" for number in range(1, config.patients + 1)]
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name in ("images", "masks"):
            (aside / name).mkdir()
        for number, stem in enumerate(stems, start=1):
            patient = simulate_patient(_patient_seed(seed, number), config)
            _write_nifti(aside / "images" / f"{stem}.nii.gz", patient.image, patient)
            _write_nifti(aside / "masks" / f"{stem}.nii.gz", patient.mask, patient)
            if progress is not None:
                progress(number, len(stems))
        with (aside / "groups.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([("stem", "group"), *((stem, stem) for stem in stems)])
        splits, start = {}, 0
        for part in PARTS:
            splits[part] = stems[start : start + getattr(config, part)]
            start += getattr(config, part)
        (aside / "splits.json").write_text(
            json.dumps({part: splits[part] for part in ("pool", "val", "test")}, indent=1) + "\n"
        )
        (aside / "SOURCE.txt").write_text(f"{SOURCE_TEXT}seed      {seed}\nconfig    {config}\n", encoding="utf-8")
        aside.chmod(0o755)  # mkdtemp makes it private
        aside.rename(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return folder


def simulate_patient(seed: int, config: PhantomConfig = PhantomConfig()) -> SimulatedPatient:
    """One patient, the same for the same seed and config."""
    rng = np.random.default_rng(seed)
    spacing = np.array(config.spacing_mm[::-1])  # (z, y, x) from here on
    factor = np.maximum(1, np.round(spacing / WORKING_SPACING[::-1])).astype(int)
    shape = np.ceil(np.array(FIELD_OF_VIEW[::-1]) / spacing).astype(int)
    fine = spacing / factor
    anatomy = deformed_template(rng, config, shape * factor, fine)
    occupied = np.flatnonzero((anatomy["brain"] > 0.5).any(axis=(1, 2))) // factor[0]
    low, high = max(occupied[0] - 1, 0), min(occupied[-1] + 2, shape[0])  # the brain's slices and one beyond
    anatomy = {name: values[low * factor[0] : high * factor[0]] for name, values in anatomy.items()}
    tissue = tissue_fractions(rng, anatomy, fine)
    lesion, brightness = _lesions(rng, config, anatomy, tissue, factor, fine)
    signal = _flair(rng, config, anatomy, tissue, lesion, brightness, fine)

    signal, lesion, brain = (average_down(a, factor) for a in (signal, lesion, anatomy["brain"]))
    sigma = rng.uniform(*config.noise)
    real, imaginary = rng.standard_normal((2, *signal.shape), dtype=np.float32) * np.float32(sigma)
    image = np.hypot(signal + real, imaginary) * rng.uniform(*config.gain)
    brain = ndimage.binary_fill_holes(brain >= 0.5)
    image = np.where(brain, np.clip(np.round(image), 1, 65535), 0).astype(np.uint16)
    mask = ((lesion >= 0.5) & brain).astype(np.uint8)

    corner = template_maps()["centre"] - (shape - 1) / 2 * spacing + np.array([low * spacing[0], 0, 0])
    origin = corner + np.round(rng.uniform(-20, 20, 3), 2)  # how the patient lay in the scanner
    labels, count = ndimage.label(mask, np.ones((3, 3, 3)))
    volumes = np.sort(np.bincount(labels.ravel(), minlength=count + 1)[1:])[::-1] * float(spacing.prod())
    return SimulatedPatient(
        image=image,
        mask=mask,
        spacing=config.spacing_mm,
        origin=(float(origin[2]), float(origin[1]), float(origin[0])),
        lesion_volumes_mm3=volumes,
    )


def _lesions(
    rng: Generator, config: PhantomConfig, anatomy: dict, tissue: dict, factor: np.ndarray, fine: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Lesion fraction and lesion brightness (fraction of white matter's signal), both (z, y, x) on the working grid."""
    distance, shape = anatomy["distance"], np.array(anatomy["brain"].shape)
    wall = np.exp(-np.clip(distance, 0, None) / 2.5)  # next to the ventricles what looks grey is partial volume
    room = np.clip((tissue["white"] + tissue["grey"] * (0.25 + 0.6 * wall) - 0.2) / 0.4, 0, 1) * (anatomy["brain"] > 0.9)
    room *= np.clip((distance + 0.5) / 1.0, 0, 1)

    # centres are drawn among the output's voxels, so that the smallest lesion fills one
    likely = anatomy["likely"]
    white, near, cortex, home = (average_down(a, factor) for a in (tissue["white"], distance, anatomy["cortex"], likely))
    home *= np.clip((white - 0.7) / 0.2, 0, 1) * (average_down(room, factor) > 0.9)
    deep = np.clip(1 - cortex / 0.2, 0, 1)
    weights = (
        home * np.exp(-(((near - 4.0) / 3.0) ** 2)),
        home * np.clip((cortex - 0.2) / 0.2, 0, 1) * (near > 12),
        home * deep * np.exp(-np.clip(near, 0, None) / 15) * (near > 6),
    )
    cumulative = [np.cumsum(w, dtype=np.float64) for w in weights]

    bumps = smooth_noise(rng, shape, fine, 4.0)
    lesion, brightness = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    count = max(1, round(config.lesions_median * np.exp(rng.normal(0, config.lesions_sigma))))
    voxel = float((fine * factor).prod())
    # patients differ more than the lesions of one patient do: brightness, size and place are the patient's own
    own_contrast = config.lesion_contrast * rng.uniform(*config.lesion_contrast_range)
    own_volume = config.volume_median_mm3 * np.exp(rng.normal(0, config.volume_sigma_between))
    own_places = rng.dirichlet(6 * np.array(config.places) + 1e-3)
    for place in rng.choice(3, size=count, p=own_places):
        total = cumulative[place][-1]
        flat = np.searchsorted(cumulative[place], rng.uniform(0, total), side="right").clip(max=home.size - 1)
        centre = np.array(np.unravel_index(flat, home.shape)) * factor + (factor - 1) / 2
        volume = own_volume * (1.6, 0.7, 0.7)[place] * np.exp(rng.normal(0, config.volume_sigma))
        volume = float(np.clip(volume, max(2.2 * voxel, config.volume_range_mm3[0]), config.volume_range_mm3[1]))
        contrast = np.float32(own_contrast * np.exp(rng.normal(0, config.lesion_contrast_spread)))
        parts = int(rng.integers(3, 6)) if place == 0 and volume > 25 * voxel and rng.random() < config.confluent else 1
        if volume > 6 * voxel:
            centre = centre + rng.uniform(-0.5, 0.5, 3) * factor
        for part in range(parts):
            size = volume if parts == 1 else 1.3 * volume / parts
            spot = centre if part == 0 else centre + rng.normal(0, 0.9 * volume ** (1 / 3), 3) * (0.6, 1.0, 0.35) / fine
            if part > 0 and likely[tuple(np.round(spot).astype(int).clip(0, shape - 1))] < 0.3:
                continue
            axes = _ellipsoid(rng, distance, spot, size, place, smallest=volume < 6 * voxel, fine=fine)
            _paint(lesion, brightness, room, bumps, spot, axes, contrast, config.edge_mm, fine)
    return lesion, brightness


def _ellipsoid(
    rng: Generator, distance: np.ndarray, centre: np.ndarray, volume: float, place: int, smallest: bool, fine: np.ndarray
) -> np.ndarray:
    """Rows are the axes' directions over their half lengths, (3, 3) per mm: |axes @ r| < 1 is inside."""
    radius = (3 * volume / (4 * np.pi)) ** (1 / 3)
    i = np.round(centre).astype(int).clip(1, np.array(distance.shape) - 2)
    first = rng.standard_normal(3)
    if place == 0:  # Dawson's fingers stand on the ventricle's wall, along the medullary veins
        slope = [distance[tuple(i + e)] - distance[tuple(i - e)] for e in np.eye(3, dtype=int)]
        first = np.array(slope) / (2 * fine) * (0.5, 1, 1) + 0.15 * first
    lengths = np.exp(np.abs(rng.normal(0, 0.45 if place == 0 else 0.25)) * np.array([1.0, -0.5, -0.5]))
    lengths = np.ones(3) if smallest else lengths
    basis, _ = np.linalg.qr(np.column_stack([first, rng.standard_normal((3, 2))]))
    axes: np.ndarray = basis.T / (radius * lengths[:, None])
    return axes


def _paint(
    lesion: np.ndarray, brightness: np.ndarray, room: np.ndarray, bumps: np.ndarray,
    centre: np.ndarray, axes: np.ndarray, contrast: np.float32, edge_mm: float, fine: np.ndarray,
) -> None:  # fmt: skip
    """Add one ellipsoid with an uneven surface to `lesion` and `brightness`, in place; where two overlap the brighter shows."""
    radius = 1 / np.linalg.norm(axes, axis=1)
    reach = 1.4 * np.linalg.norm(np.linalg.inv(axes), axis=1) + 4 * edge_mm
    low = np.floor(centre - reach / fine).astype(int).clip(0)
    high = (np.ceil(centre + reach / fine).astype(int) + 1).clip(max=lesion.shape)
    if (low >= high).any():
        return
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    offsets = np.meshgrid(
        *((np.arange(a, b) - c) * f for a, b, c, f in zip(low, high, centre, fine, strict=True)), indexing="ij"
    )
    r = np.linalg.norm(np.einsum("ij,jzyx->izyx", axes, np.stack(offsets)), axis=0)
    unevenness = 0.16 * np.clip((radius.mean() - 2.0) / 2.0, 0, 1)  # a lesion of a voxel stays round
    inside = (1 - r + unevenness * bumps[box]) * radius.min()  # about mm to the surface
    fraction = (1 / (1 + np.exp(np.clip(-2 * inside / max(edge_mm, 0.05), -30, 30)))).astype(np.float32) * room[box]
    core = contrast * np.clip(0.85 + 0.15 * inside / radius.min(), 0.7, 1).astype(np.float32)
    brightness[box] = np.where(fraction > 0.02, np.maximum(brightness[box], core), brightness[box])
    lesion[box] = np.maximum(lesion[box], fraction)


def _bright_spots(rng: Generator, config: PhantomConfig, tissue: dict, distance: np.ndarray, fine: np.ndarray) -> np.ndarray:
    """What is bright in grey matter and no lesion, (z, y, x): told from lesions by where it is, not by how it looks."""
    spots = np.zeros(distance.shape, np.float32)
    places = np.argwhere((tissue["grey"] > 0.6) & (distance > 8))
    for centre in places[rng.integers(0, len(places), round(rng.uniform(*config.bright_spots)))]:
        sigma = float(np.exp(rng.normal(np.log(2.4), 0.35)))  # mm
        reach = np.ceil(3 * sigma / fine).astype(int)
        low, high = (centre - reach).clip(0), (centre + reach + 1).clip(max=distance.shape)
        axes = [((np.arange(a, b) - c) * f) ** 2 for a, b, c, f in zip(low, high, centre, fine, strict=True)]
        squared = axes[0][:, None, None] + axes[1][None, :, None] + axes[2][None, None, :]
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        height = np.float32(rng.uniform(*config.lesion_contrast_range))
        spots[box] = np.maximum(spots[box], height * np.exp(-squared / (2 * sigma**2)).astype(np.float32))
    return spots


def _flair(
    rng: Generator, config: PhantomConfig, anatomy: dict, tissue: dict,
    lesion: np.ndarray, brightness: np.ndarray, fine: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """The noise-free signal (z, y, x), normal white matter = 1, with what makes real FLAIR ambiguous."""
    shape, distance = np.array(lesion.shape), anatomy["distance"]
    amount = np.float32(config.confounders)
    outside = np.clip(distance, 0, None)
    grey = (
        rng.uniform(*config.grey_signal)
        + amount * 0.05 * smooth_noise(rng, shape, fine, 12.0)
        - rng.uniform(0.3, 1.0) * anatomy["texture"]
    )
    white = 1 - rng.uniform(0.2, 0.7) * anatomy["texture"] + amount * 0.02 * smooth_noise(rng, shape, fine, 8.0)
    grey = grey + amount * _bright_spots(rng, config, tissue, distance, fine)
    # rims and caps along the ventricles, and dirty-appearing white matter further out
    rim = rng.uniform(0.05, 0.25) * np.exp(-outside / 1.5) * np.clip(0.7 + 0.5 * smooth_noise(rng, shape, fine, 10.0), 0, 2)
    dirty = rng.uniform(0.0, 0.1) * np.exp(-outside / 14) * np.clip(smooth_noise(rng, shape, fine, 9.0), 0, 2.5)
    white = white + amount * (rim + dirty)
    white = white * (1 - lesion) + (1 + brightness) * lesion
    # a lesion that reaches the cortex is a lesion there too
    grey = grey * (1 - lesion) + np.maximum(grey, 1 + brightness) * lesion
    csf = np.full(shape, rng.uniform(*config.csf_signal), np.float32)
    if rng.random() < 0.6:  # choroid plexus and inflow: bright spots in the ventricles' fluid
        inside = np.argwhere((distance < -0.5) & (tissue["csf"] > 0.5))
        for spot in inside[rng.integers(0, len(inside), int(rng.integers(1, 4)))]:
            grid = [((np.arange(n) - c) * f).astype(np.float32) ** 2 for n, c, f in zip(shape, spot, fine, strict=True)]
            squared = grid[0][:, None, None] + grid[1][None, :, None] + grid[2][None, None, :]
            csf = csf + amount * np.float32(rng.uniform(0.3, 0.9)) * np.exp(
                -squared / np.float32(2 * rng.uniform(1.5, 3.0) ** 2)
            )
    signal = grey * tissue["grey"] + white * tissue["white"] + csf * tissue["csf"]
    shaded: np.ndarray = signal * np.exp(rng.uniform(*config.bias) * smooth_noise(rng, shape, fine, 70.0))
    return shaded


def _write_nifti(path: Path, array: np.ndarray, patient: SimulatedPatient) -> None:
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(array)
    image.SetSpacing(patient.spacing)
    image.SetOrigin(patient.origin)
    sitk.WriteImage(image, str(path), useCompression=True)


def _patient_seed(seed: int, number: int) -> int:
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0])
