"""Regions: unions of classes, which may overlap, as in BraTS the whole tumour ⊃ its core ⊃ what enhances.

Masks and predictions hold one class a pixel all the same; what belongs to two regions at once is a class of its own.
"""

from collections.abc import Mapping, Sequence

Regions = dict[str, tuple[str, ...]]  # name → names of the foreground classes that it is the union of


def refuse_wrong_regions(classes: Mapping[int, str], regions: Mapping[str, Sequence[str]]) -> None:
    """Raises ValueError with what is wrong with regions of these classes, the background first."""
    background, *foreground = classes.values()
    if len(foreground) < 2:
        raise ValueError(f"regions of one class are that class; the classes are {list(classes.values())}. Leave regions out")
    members: dict[frozenset[str], str] = {}
    for name, its in regions.items():
        if not its:
            raise ValueError(f"region {name!r} is empty; name at least one of {foreground}")
        if unknown := sorted(set(its) - set(foreground)):
            raise ValueError(f"region {name!r} names {unknown}; the foreground classes are {foreground}")
        if len(set(its)) < len(its):
            raise ValueError(f"region {name!r} names a class twice: {list(its)}")
        if name == background or (name in foreground and set(its) != {name}):
            raise ValueError(f"region {name!r} has the name of a class that it is not; give it another")
        if (same := members.setdefault(frozenset(its), name)) != name:
            raise ValueError(f"regions {same!r} and {name!r} are the same; leave one out")
    if lost := [name for name in foreground if not any(name in its for its in regions.values())]:
        raise ValueError(f"no region holds {lost}; every foreground class is in one at least, else it would be background")


def members_of(classes: Mapping[int, str], regions: Mapping[str, Sequence[str]]) -> tuple[tuple[int, ...], ...]:
    """The class indices of every region, in order."""
    names = list(classes.values())
    return tuple(tuple(sorted(names.index(name) for name in its)) for its in regions.values())
