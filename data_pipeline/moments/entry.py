"""What is kept of one encoded picture: under which key, and how it lies in a part of the cache.

    stage        digest of the first stage: weights, structure, dtype of computing and of storing
    picture      the shard's URL, its edition (size, and ETag or time), first byte and size of the member
    transform    height and width of the batch, place of the crop, flip, version of decoding and resampling
                     |
                     v  blake2b
    0f3c...9a.safetensors     "moments" [C, h, w], and what a person or `ldm data purge` wants to know of it

All of it can be told before a byte of the picture is read. Whatever changes gives another key, so nothing is
ever out of date; it is only not found.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

KEY_BYTES = 16
SUFFIX = ".safetensors"
Dtype: TypeAlias = Literal["bf16", "fp32"]
_STORED: dict[str, tuple[str, str]] = {"bf16": ("BF16", "<i2"), "fp32": ("F32", "<f4")}
"""Setting -> name in safetensors, NumPy's dtype that carries the bits (it has no bfloat16)."""


class Damaged(Exception):
    """The bytes of an entry are not what was written under its key."""


@dataclass(frozen=True)
class MomentsCache:
    """Where the moments of one first stage lie, and how."""

    folder: str
    """URL; everything under it is of this stage."""
    stage: str
    """Digest of the first stage and of the precision that is stored."""
    dtype: Dtype
    channels: int
    """C: channels of what the encoder gives, mean and log variance together."""
    downsampling: int
    """Pixels per cell along one edge."""

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """What carries the stored bits: int16 for bf16."""
        return np.dtype(_STORED[self.dtype][1])

    def shape(self, height: int, width: int) -> tuple[int, int, int]:
        """[C, h, w] of a picture of this size."""
        return self.channels, height // self.downsampling, width // self.downsampling


@dataclass(frozen=True)
class Moments:
    """What a loader is told about encoding once."""

    variants: int = 0
    """Crops and flips that each picture has, one drawn per visit; 0: drawn anew at each visit."""
    cache: MomentsCache | None = None


NOTHING_ONCE = Moments()


@dataclass(frozen=True)
class IndexedPicture:
    """One picture member as the index knows it."""

    shard: str
    """URL"""
    size: int
    """Bytes of the shard."""
    version: str
    """Its ETag, or time of the last change."""
    first: int
    """First byte of the member."""
    bytes: int


class KeptMember(NamedTuple):
    """A member beside the picture: caption, json, class, small map."""

    extension: str
    first: int
    """Its first byte in the shard, by which it is known for the same one."""
    content: bytes


@dataclass(frozen=True)
class Entry:
    """What is kept of one picture."""

    values: NDArray[Any]
    """The bits of the moments, [C, h, w]."""
    geometry: tuple[float, ...]
    members: dict[str, KeptMember]
    """By extension."""


@dataclass(frozen=True)
class Label:
    """What the moments of one picture are stored under and with."""

    key: str
    """Hexadecimal"""
    shard: str
    """URL"""
    sample: str
    """Key of the sample within its shard."""
    first: int
    """First byte of its picture, by which neighbours stay neighbours."""
    identities: tuple[int, ...]
    """Hashes of its URL and digests, by which removal lists name it."""
    members: tuple[KeptMember, ...] = ()
    """Small members beside the picture, so that none of the sample needs to be read from its shard."""
    geometry: tuple[float, ...] = ()
    """The fields of `pictures.crops.Geometry`: size of the original, crop box, flip, size of the target."""


def entry_key(stage: str, picture: IndexedPicture, transform: tuple[object, ...]) -> bytes:
    """16 bytes that any change of the first stage, the picture or the transform changes."""
    told = [stage, picture.shard, picture.size, picture.version, picture.first, picture.bytes, *transform]
    return hashlib.blake2b(json.dumps(told).encode(), digest_size=KEY_BYTES).digest()


def digest(data: bytes | memoryview) -> int:
    """64-bit checksum of an entry's bytes."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def pack(label: Label, values: NDArray[Any], dtype: Dtype) -> bytes:
    """A safetensors file: "moments" [C, h, w], members as bytes; `values` carries the bits of `dtype`."""
    name, kind = _STORED[dtype]
    pieces = [np.ascontiguousarray(values, dtype=kind).tobytes()]
    tensors: dict[str, Any] = {
        "moments": {"dtype": name, "shape": list(values.shape), "data_offsets": [0, len(pieces[0])]}
    }
    place = len(pieces[0])
    for member in label.members:
        stop = place + len(member.content)
        tensors[f".{member.extension}"] = {
            "dtype": "U8",
            "shape": [stop - place],
            "data_offsets": [place, stop],
        }
        pieces.append(member.content)
        place = stop
    header = {
        "__metadata__": {
            "key": label.key,
            "shard": label.shard,
            "sample": label.sample,
            "identities": " ".join(f"{identity:016x}" for identity in label.identities),
            "geometry": json.dumps(label.geometry),
            "members": json.dumps({member.extension: member.first for member in label.members}),
        },
        **tensors,
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return struct.pack("<Q", len(text)) + text + b"".join(pieces)


def unpack(data: bytes, key: str, dtype: Dtype, shape: tuple[int, int, int]) -> Entry:
    """The inverse of `pack`.

    Raises:
        Damaged: it is not the entry of this key, dtype and shape.
    """
    name, kind = _STORED[dtype]
    try:
        (length,) = struct.unpack_from("<Q", data)
        header = json.loads(data[8 : 8 + length])
        metadata, told = header["__metadata__"], header["moments"]
        if metadata["key"] != key:
            raise Damaged("it is the entry of another picture")
        if (told["dtype"], told["shape"]) != (name, list(shape)):
            raise Damaged(f"it holds {told['dtype']} {told['shape']}, not {name} {list(shape)}")
        values = np.frombuffer(data, kind, count=int(np.prod(shape)), offset=8 + length)
        members = {}
        for extension, first in json.loads(metadata["members"]).items():
            start, stop = header[f".{extension}"]["data_offsets"]
            members[extension] = KeptMember(extension, first, data[8 + length + start : 8 + length + stop])
        return Entry(values.reshape(shape), tuple(json.loads(metadata["geometry"])), members)
    except (ValueError, LookupError, TypeError, struct.error) as error:
        raise Damaged(f"{type(error).__name__}: {error}") from error
