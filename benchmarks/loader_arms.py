"""The loaders that benchmarks/loader.py compares: ours, webdataset, MosaicML streaming, Megatron Energon.

Each is a generator over a URL of tars: first something once everything that is not measured is done
(imports, conversion), then the number of images of every batch. The peers run as their documentation shows
them: Pillow decode and torchvision's antialiased resize, random crop and flip.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

EDGE = 256
BATCH = 16
WORKERS = 2


def ours(url: str, skip: int = 0) -> Iterator[int]:
    """This project's loader, `skip` samples into an epoch."""
    from data_pipeline.config import DataConfig
    from data_pipeline.loader import build_loader

    config = DataConfig(shards=url, image_size=EDGE, crop="random", horizontal_flip=True, workers=WORKERS)
    position = None
    if skip:
        with build_loader(config, seed=1, global_batch_size=BATCH) as loader:
            whole = next(loader).position
        position = {**whole, "states": [[0, skip // whole["lanes"]]] * whole["lanes"]}
    yield 0
    with build_loader(config, seed=1, global_batch_size=BATCH, position=position) as loader:
        for batch in loader:
            yield len(batch)


def cached(url: str, skip: int = 0) -> Iterator[int]:
    """The same where a full `first_stage.cache` beside the shards has everything: moments instead of pixels.

    A stand-in for SD's first stage (f = 8, z = 4, bf16) fills it, with zeros, which are as many bytes.
    """
    from data_pipeline.config import DataConfig
    from data_pipeline.loader import build_loader, open_dataset
    from data_pipeline.moments.entry import Moments, MomentsCache
    from data_pipeline.moments.writer import MomentsWriter

    del skip
    config = DataConfig(shards=url, image_size=EDGE, workers=WORKERS)
    folder = f"{url.rpartition('/')[0]}/moments"
    moments = Moments(cache=MomentsCache(folder, "stand-in", "bf16", channels=8, downsampling=8))
    assert moments.cache is not None
    writer = MomentsWriter(moments.cache, patient=True)
    steps = -(-int(open_dataset(config).counts.sum()) // BATCH)
    with build_loader(config, seed=1, global_batch_size=BATCH, moments=moments) as loader:
        for batch in (next(loader) for _ in range(2 * steps)):  # lanes end their epochs one by one
            assert batch.cached is not None
            blank = np.zeros((BATCH, *moments.cache.shape(EDGE, EDGE)), np.int16)
            writer.put(batch.cached.labels, partial(np.asarray, blank), blank.nbytes)
    writer.close()
    yield 0
    with build_loader(config, seed=1, global_batch_size=BATCH, moments=moments) as loader:
        for batch in loader:
            assert batch.cached is not None
            yield int(batch.cached.found.sum())


def torchvision_transform() -> Any:
    """What tutorials use on Pillow images."""
    import torchvision.transforms.v2 as T

    return T.Compose(
        [T.Resize(EDGE, antialias=True), T.RandomCrop(EDGE), T.RandomHorizontalFlip(), T.PILToTensor()]
    )


def webdataset(url: str, skip: int = 0) -> Iterator[int]:
    """Stock: resampled shards, decode "pil", WebLoader. From S3 through curl and signed URLs."""
    import webdataset as wds

    del skip
    transform = torchvision_transform()
    dataset = (
        wds.WebDataset(readable_urls(url), resampled=True, nodesplitter=wds.split_by_node)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "txt")
        .map_tuple(transform, lambda text: text)
        .batched(BATCH)
    )
    yield 0
    for pixels, _ in wds.WebLoader(dataset, batch_size=None, num_workers=WORKERS):
        yield len(pixels)


def readable_urls(url: str) -> list[str]:
    """Paths of the tars, or signed http URLs of those on S3 (webdataset knows no s3://)."""
    import s3fs

    from data_pipeline.storage.listing import list_files

    found = [file.url for file in list_files(url)]
    if not url.startswith("s3://"):
        return found
    signer = s3fs.S3FileSystem(
        endpoint_url=os.environ["AWS_ENDPOINT_URL"], config_kwargs={"signature_version": "s3v4"}
    )
    return [signer.sign(each, expiration=3600) for each in found]


def streaming(url: str, skip: int = 0) -> Iterator[int]:
    """MosaicML streaming on a copy converted to MDS without compression; local only."""
    from streaming import StreamingDataLoader, StreamingDataset

    del skip
    transform = torchvision_transform()

    class Pictures(StreamingDataset):
        def __getitem__(self, at: int) -> Any:
            sample = super().__getitem__(at)
            return transform(sample["jpg"].convert("RGB")), sample["txt"]

    copy = convert(Path(url).parent)
    yield 0
    while True:
        dataset = Pictures(local=copy, shuffle=True, batch_size=BATCH)
        for pixels, _ in StreamingDataLoader(dataset, batch_size=BATCH, num_workers=WORKERS, drop_last=True):
            yield len(pixels)


def convert(folder: Path) -> str:
    """MDS copy beside the tars, with the same JPEG bytes; made once."""
    from streaming import MDSWriter

    out = folder.parent / "mds"
    if not out.exists():
        with MDSWriter(out=str(out), columns={"jpg": "jpeg", "txt": "str"}) as writer:
            for path in sorted(folder.glob("*.tar")):
                with tarfile.open(path) as tar:
                    for member in tar.getmembers():
                        if member.name.endswith(".jpg"):
                            data = tar.extractfile(member)
                            assert data is not None
                            picture = Image.open(io.BytesIO(data.read()))
                            writer.write({"jpg": picture, "txt": "a benchmark picture"})
    return str(out)


def energon(url: str, skip: int = 0) -> Iterator[int]:
    """Megatron Energon on the tars as they are, prepared with its own command; local only."""
    from megatron.energon import DefaultTaskEncoder, WorkerConfig, get_loader, get_train_dataset
    from megatron.energon.flavors import SampleDecoder

    del skip
    transform = torchvision_transform()

    class Encoder(DefaultTaskEncoder):
        decoder = SampleDecoder(image_decode="pilrgb")

        def encode_sample(self, sample: Any) -> Any:
            sample.image = transform(sample.image)
            return sample

    folder = Path(url).parent
    prepare(folder)
    dataset = get_train_dataset(
        folder,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=WORKERS),
        batch_size=BATCH,
        shuffle_buffer_size=1000,
        max_samples_per_sequence=100,
        task_encoder=Encoder(),
    )
    yield 0
    for batch in get_loader(dataset):
        yield len(batch.image)


def prepare(folder: Path) -> None:
    """Energon's own index and metadata beside the tars; made once."""
    if not (folder / ".nv-meta").exists():
        fields = '{"image": "jpg", "caption": "txt"}'
        command = "from megatron.energon.cli.main import main; main()"
        options = ["--non-interactive", "--no-progress", "--split-ratio", "1,0,0"]
        options += ["--sample-type", "CaptioningSample", "--field-map", fields]
        subprocess.run([sys.executable, "-c", command, "prepare", *options, str(folder)], check=True)


ARMS: dict[str, Callable[..., Iterator[int]]] = {
    "ours": ours,
    "cached": cached,
    "webdataset": webdataset,
    "streaming": streaming,
    "energon": energon,
}
