"""From the names of a tar's members to samples: one sample per key, as webdataset groups.

A key ends where some member of it has one extension; whatever follows the key in other names is theirs:

    k.jpg  k.txt  k.mask.png  k.t5.npy       key k: jpg, txt, mask.png, t5.npy
    img.v2.jpg  img.v2.txt                   key img.v2: jpg, txt, since nothing is `img.` and one extension
    k.rgb.jpg  k.cap.txt                     key k: rgb.jpg, cap.txt, since no shorter piece makes a sample

webdataset ends every key at the first dot, which makes all of `img.1.jpg`, `img.2.jpg`, ... one sample.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from data_pipeline.errors import NotATar
from data_pipeline.shards.tars import TarMember

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
_COMPOUND = ("seg.png", "depth.png")
"""Extensions with a dot of their own."""
KNOWN_EXTENSIONS = (*IMAGE_EXTENSIONS, "txt", "caption", "json", "cls", "npy", "pyd", "ppm", *_COMPOUND)
_META = re.compile(r"__[^/]*__(/|$)|__MACOSX/")
"""webdataset's own metadata, and what macOS adds to archives."""
_MAX_APART = 2_000_000
"""Members of a tar that is not sorted whose places are held in memory to find those of one sample."""


@dataclass
class Sample:
    """The members of one key."""

    key: str
    members: dict[str, TarMember] = field(default_factory=dict)
    """By extension."""
    duplicate: bool = False
    """Another sample before it has this key."""


@dataclass
class Grouping:
    """All samples of a tar, in the order in which they begin."""

    samples: list[Sample] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    apart: int = 0
    """Samples with members of others in between."""


def split_name(name: str) -> tuple[str, str]:
    """Key and lower-case extension of a name alone: the longest known suffix, else all behind the first dot.

    `a/b.v2.JPG` gives (`a/b.v2`, `jpg`); `x.seg.png` gives (`x`, `seg.png`).
    """
    folder, _, base = name.rpartition("/")
    prefix = f"{folder}/" if folder else ""
    lower = base.lower()
    known = [e for e in KNOWN_EXTENSIONS if lower.endswith("." + e) and len(lower) > len(e) + 1]
    if known:
        extension = max(known, key=len)
        return prefix + base[: -len(extension) - 1], extension
    stem, _, extension = base.partition(".")
    return prefix + stem, extension.lower()


def group(members: Sequence[TarMember], *, most_apart: int = _MAX_APART) -> Grouping:
    """Members by sample, wherever in the tar they lie.

    Members of one key that lie apart are one sample, unless both places have the same extension: then the
    later is a second sample of that key. Raises NotATar when a tar of more than `most_apart` members is not
    sorted.
    """
    found, nameless = Grouping(), []
    keys = Keys(member.name for member in members)
    first: dict[str, Sample] = {}
    apart: set[str] = set()
    last = ""
    block: Sample | None = None
    for member in members:
        name = tidy(member.name)
        if not name:
            continue
        parts = keys.split(name)
        if parts is None:
            nameless.append(name)
            continue
        key, extension = parts
        if block is None or key != last:
            _close(block, first, found, apart)
            block, last = Sample(key), key
        if extension in block.members:
            found.problems.append(f"duplicate member {member.name[:80]!r}")
        else:
            block.members[extension] = member
    _close(block, first, found, apart)
    found.apart = len(apart)
    if apart and len(members) > most_apart:
        raise NotATar(
            f"the members of sample {min(apart)[:80]!r} and {len(apart) - 1} others lie apart, and "
            f"{len(members):,} are too many to be gathered; write it again with `tar --sort=name`"
        )
    if apart:
        found.problems.append(
            f"the members of {len(apart)} samples lie apart, each is read alone; `tar --sort=name` puts them "
            "side by side"
        )
    if nameless:
        listed = ", ".join(repr(name[:80]) for name in nameless[:3]) + (", ..." if len(nameless) > 3 else "")
        found.problems.append(f"{len(nameless)} members without an extension belong to no sample: {listed}")
    return found


def _close(block: Sample | None, first: dict[str, Sample], found: Grouping, apart: set[str]) -> None:
    """Add what stands side by side to the sample that its key has, or as a sample."""
    if block is None:
        return
    known = first.setdefault(block.key, block)
    if known is block:
        found.samples.append(block)
    elif known.members.keys().isdisjoint(block.members):
        known.members |= block.members
        apart.add(block.key)
    else:
        block.duplicate = True
        found.samples.append(block)
        found.problems.append(f"duplicate key {block.key[:80]!r}")


class Beginnings:
    """Which members begin a sample, by the names up to theirs; asked in their order.

    What is still to come is not known: a new one begins where what precedes the first dot changes, or where
    an extension comes again behind it (`img.v2.jpg`, `img.v3.jpg`).
    """

    def __init__(self) -> None:
        self._stem: str | None = None
        self._key = ""
        self._extensions: set[str] = set()

    def __call__(self, name: str) -> bool:
        """Whether the member of this tidy name does."""
        key, extension = split_name(name)
        if stem_of(name) == self._stem:
            within = key == self._key or key.startswith(f"{self._key}.")
            if within or extension not in self._extensions:
                self._extensions.add(extension)
                return False
        self._stem, self._key, self._extensions = stem_of(name), key, {extension}
        return True


def come_one_by_one(members: Sequence[TarMember], samples: Sequence[Sample]) -> bool:
    """Whether the samples are what `Beginnings` finds, wherever among them one begins to look.

    members: all of the tar, in its order
    """
    begins, found = Beginnings(), list[list[TarMember]]()
    for member in members:
        if name := tidy(member.name):
            if begins(name):
                found.append([])
            found[-1].append(member)
    stems = {stem_of(tidy(some[0].name)) for some in found}
    return len(stems) == len(found) and found == [list(sample.members.values()) for sample in samples]


class Keys:
    """Where the keys end in the names of one tar."""

    def __init__(self, names: Iterable[str]) -> None:
        tidied = {name for each in names if (name := tidy(each))}
        whole = {stem for stem, extension in map(_last_split, tidied) if extension}
        self._ends = {name: self._shortest(name, whole) for name in tidied}
        by_stem: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        for name, end in self._ends.items():
            if end:
                by_stem[name[: _first_dot(name)]][name[:end]].add(name[end + 1 :].lower())
        self._at_first = {
            stem for stem, groups in by_stem.items() if stem not in groups and not _make_samples(groups)
        }

    def split(self, name: str) -> tuple[str, str] | None:
        """Key and lower-case extension of one of the names; None for a name without an extension."""
        end = self._ends[name]
        if not end:
            return None
        if (stem := name[: _first_dot(name)]) in self._at_first:
            end = len(stem)
        return name[:end], name[end + 1 :].lower()

    def _shortest(self, name: str, whole: set[str]) -> int:
        """Where the shortest piece ends that is a key; 0 for none."""
        end = _first_dot(name)
        while 0 < end < len(name):
            if name[:end] in whole:
                return end
            end = name.find(".", end + 1)
        return 0


def _make_samples(groups: dict[str, set[str]]) -> bool:
    """Whether keys that share what precedes their first dot are samples of their own, not members of one."""
    pictures = [extensions & set(IMAGE_EXTENSIONS) for extensions in groups.values()]
    each = list(zip(pictures, groups.values(), strict=True))
    return any(p and p < extensions for p, extensions in each) or all(p == e for p, e in each)


def _first_dot(name: str) -> int:
    return name.find(".", name.rfind("/") + 2)  # a name that begins with a dot is hidden, or has no key


def _last_split(name: str) -> tuple[str, str]:
    lower = name.lower()
    for extension in _COMPOUND:
        if lower.endswith(f".{extension}"):
            return name[: -len(extension) - 1], extension
    _, dot, extension = name[name.rfind("/") + 2 :].rpartition(".")
    return (name[: -len(extension) - 1], extension) if dot else (name, "")


def stem_of(name: str) -> str:
    """What precedes the first dot of a tidy name's last part: where webdataset ends the key."""
    return name[: _first_dot(name)] if _first_dot(name) > 0 else name


def tidy(name: str) -> str:
    """A member's name without `./` and doubled slashes; empty for a folder and for what is no sample's."""
    parts = [part for part in name.split("/") if part != "."]
    if not parts[-1:] or not parts[-1] or parts[-1].startswith("."):
        return ""
    whole = "/".join(part for part in parts if part)
    return "" if _META.match(whole) else whole
