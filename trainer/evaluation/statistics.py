"""What is known of a set of pictures after one pass over it: made, stored, read back, and compared.

Stored in one safetensors file: `FAMILY.OUTPUT.mean` and `.covariance` in fp64, `.features` in fp32 where a
metric needs every picture's, `digests` of the pictures, and as metadata a record of where it comes from.
The .npz of other programs (mu and sigma; mu_s and sigma_s) are read as well.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from data_pipeline.errors import NotFound
from data_pipeline.storage.files import read_bytes
from data_pipeline.storage.large import write_whole
from trainer.config.run import ConfigError
from trainer.evaluation.inception import SPATIAL_CHANNELS, SPATIAL_EDGE, SPATIAL_ORDER
from trainer.weights import read_weights

ENDINGS = (".safetensors", ".npz")
FORMAT = 1
KEY = "fidelity_statistics"
UNKNOWN = "unknown"
_NPZ_NAMES = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
_SPATIAL = "inception.spatial"
_NPZ_WIDTHS = {"inception.pool": 2048, _SPATIAL: 2023}


@dataclass(frozen=True)
class NetworkRecord:
    """What made the features of one family."""

    name: str
    sha256: str
    """Of the weights; unknown for the files of other programs."""
    sees: str
    details: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """Where statistics come from, JSON-able."""

    source: str
    """URL of the pictures, or of the file that was read."""
    pictures: int
    networks: dict[str, NetworkRecord]
    image_size: int | None = None
    """Edge to which pictures were brought first; None: they were taken as they are."""
    fit: str = "crop"
    formats: dict[str, int] = field(default_factory=dict)
    """Pictures by file format."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Pictures by WIDTHxHEIGHT before they were brought to any size; rare ones are `others`."""
    duplicates: int = 0
    """Pictures that equal an earlier one of the set."""
    blank: int = 0
    """Pictures of a single colour."""
    broken: dict[str, int] = field(default_factory=dict)
    """Pictures left out, by reason."""


@dataclass(frozen=True)
class SetStatistics:
    """Outputs are called `family.output`."""

    record: Record
    counts: dict[str, int]
    """Rows by output: fewer than pictures where not every one has a caption."""
    means: dict[str, Tensor]
    """[D] fp64"""
    covariances: dict[str, Tensor]
    """[D, D] fp64"""
    features: dict[str, Tensor]
    """[n, D] fp32 in the order of the set, of the outputs that were to be kept"""
    digests: Tensor
    """int64 [n], or empty."""

    def outputs(self) -> dict[str, list[str]]:
        """What there is of each family."""
        found: dict[str, list[str]] = {family: [] for family in self.record.networks}
        for name in sorted(self.means.keys() | self.features.keys()):
            family, _, output = name.partition(".")
            found[family].append(output)
        return found

    def content(self) -> str:
        """Names the pictures, in any order, or the numbers of a file that does not know its pictures."""
        found = hashlib.sha256(np.sort(self.digests.numpy()).tobytes())
        if not len(self.digests):
            for part in (self.means, self.covariances):
                for name in sorted(part):
                    found.update(name.encode() + part[name].numpy().tobytes())
        return found.hexdigest()[:16]


def write_statistics(url: str, found: SetStatistics) -> None:
    """Store them."""
    tensors = {f"{name}.mean": value for name, value in found.means.items()}
    tensors |= {f"{name}.covariance": value for name, value in found.covariances.items()}
    tensors |= {f"{name}.features": value for name, value in found.features.items()}
    record = {"format": FORMAT, "record": asdict(found.record), "counts": found.counts}
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_whole(url, safetensors.torch.save(tensors | {"digests": found.digests}, {KEY: json.dumps(record)}))


def read_statistics(url: str) -> SetStatistics:
    """Statistics from a file of ours, or a .npz of another program.

    Raises:
        ConfigError: no such file, or not one of statistics.
    """
    if url.endswith(".npz"):
        return _read_npz(url)
    tensors, metadata = read_weights(url)
    try:
        stored = json.loads(metadata[KEY])
        if stored["format"] != FORMAT:
            raise ValueError(f"format {stored['format']}")
        fields = stored["record"]
        networks = {family: NetworkRecord(**record) for family, record in fields["networks"].items()}
        found = SetStatistics(
            record=Record(**(fields | {"networks": networks})),
            counts=stored["counts"],
            means=_ending(tensors, ".mean"),
            covariances=_ending(tensors, ".covariance"),
            features=_ending(tensors, ".features"),
            digests=tensors["digests"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{url} holds no statistics of pictures ({error!r}); make them with `ldm evaluate statistics`, "
            "or give `ldm evaluate fidelity` --sample '--count N' to draw from them, if they are a model's."
        ) from error
    _order_spatial(found)
    return found


def _order_spatial(found: SetStatistics) -> None:
    """Bring Inception's spatial features of an earlier version into the order of now."""
    network = found.record.networks.get("inception")
    if network is None or network.sha256 == UNKNOWN or network.details.items() >= SPATIAL_ORDER.items():
        return  # what was stored from a .npz has the order of its program
    network.details.update(SPATIAL_ORDER)
    index = torch.arange(SPATIAL_CHANNELS * SPATIAL_EDGE**2)
    index = index.view(SPATIAL_CHANNELS, SPATIAL_EDGE, SPATIAL_EDGE).permute(1, 2, 0).flatten()
    for part in (found.means, found.covariances, found.features):
        if _SPATIAL in part:
            part[_SPATIAL] = part[_SPATIAL][..., index]
    if _SPATIAL in found.covariances:
        found.covariances[_SPATIAL] = found.covariances[_SPATIAL][index]


def _ending(tensors: Mapping[str, Tensor], ending: str) -> dict[str, Tensor]:
    return {name.removesuffix(ending): value for name, value in tensors.items() if name.endswith(ending)}


def _read_npz(url: str) -> SetStatistics:
    """mu [D] and sigma [D, D] of Inception's features, and those of its spatial ones where they are there."""
    try:
        with np.load(io.BytesIO(read_bytes(url)), allow_pickle=False) as arrays:
            found = {
                f"inception.{output}": tuple(
                    torch.from_numpy(np.asarray(arrays[n], np.float64)) for n in names
                )
                for output, names in _NPZ_NAMES.items()
                if names[0] in arrays and names[1] in arrays
            }
    except NotFound as error:
        raise ConfigError(f"there is no file of statistics at {url}; check the path or URL.") from error
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{url} is not a .npz file of numbers ({error}).") from error
    for name, (mean, covariance) in found.items():
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ConfigError(f"{url}: mu and sigma of {name} do not belong together.")
        if len(mean) != _NPZ_WIDTHS[name]:
            raise ConfigError(
                f"{url} has {len(mean)} features where {name} has {_NPZ_WIDTHS[name]}: statistics of another "
                "layer or network, which compare with nothing here; name a file of FID statistics."
            )
        if not bool(mean.isfinite().all() and covariance.isfinite().all()):
            raise ConfigError(f"{url} has NaN or infinity in the statistics of {name}; make it anew.")
    if not found:
        raise ConfigError(
            f"{url} holds neither mu and sigma nor mu_s and sigma_s; name a file of FID statistics."
        )
    network = NetworkRecord(UNKNOWN, UNKNOWN, UNKNOWN)
    return SetStatistics(
        record=Record(source=url, pictures=0, networks={"inception": network}),
        counts=dict.fromkeys(found, 0),
        means={name: mean for name, (mean, _) in found.items()},
        covariances={name: covariance for name, (_, covariance) in found.items()},
        features={},
        digests=torch.zeros(0, dtype=torch.int64),
    )


def check_comparable(made: Record, real: Record, families: Mapping[str, Any]) -> None:
    """Refuse sets whose features do not compare.

    Raises:
        ConfigError: another network, other weights, or pictures that were brought to it in another way.
    """
    for family in families:
        for each in (made, real):
            if family not in each.networks:
                raise ConfigError(
                    f"{each.source} holds no {family} features but {', '.join(each.networks)}; make it anew "
                    f"with --features {family}, or choose what it holds."
                )
        ours, theirs = made.networks[family], real.networks[family]
        for what, a, b in (("weights", ours.sha256, theirs.sha256), ("resizing", ours.sees, theirs.sees)):
            if UNKNOWN not in (a, b) and a != b:
                raise ConfigError(
                    f"the {family} features of {made.source} and {real.source} do not compare ({what} "
                    f"{_short(a)} against {_short(b)}); measure both with the same network and options."
                )


def _short(text: str) -> str:
    """Of a hash its beginning; what a network sees in full."""
    return text if " " in text else text[:12] + "..."
