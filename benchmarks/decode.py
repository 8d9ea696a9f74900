"""Decode, resize and crop one picture: ours against the stock pipeline and Pillow, one thread.

    python benchmarks/decode.py                      # a minute

JPEGs of quality 92 of about a megapixel to 256 px. The grain decides about the bytes per pixel, and so how
much of the time goes into Huffman decoding, which no arm can avoid: the arm `entropy` decodes at an eighth
and throws the pixels away. Stock is what webdataset's "pil" and torchvision's Resize do; SSIM is against
Pillow's antialiased bicubic resize of the same part of the fully decoded picture. The arms take turns; the
figures are medians.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from loader_arms import EDGE, torchvision_transform
from numpy.typing import NDArray
from pictures import make_shards
from PIL import Image

from data_pipeline.pictures.crops import Geometry, crop_pixels, plan_crop
from data_pipeline.pictures.decoding import decode


def ours(data: bytes) -> NDArray[np.uint8]:
    """What a loader process does with one picture."""
    return crop_taken(data)[0]


def crop_taken(data: bytes) -> tuple[NDArray[np.uint8], Geometry]:
    """Our picture and the crop of the original that it shows."""
    picture = decode(data, target=(EDGE, EDGE), max_pixels=10**8)
    out = np.empty((EDGE, EDGE, 3), np.uint8)
    return out, crop_pixels(picture, centre(picture.height, picture.width), out)


def centre(height: int, width: int) -> Geometry:
    """The central square."""
    return plan_crop(height, width, (EDGE, EDGE), random_crop=False, may_flip=False, seed=0, ordinal=0)


def pillow(data: bytes, crop: Geometry | None = None) -> NDArray[np.uint8]:
    """Full decode and antialiased bicubic resize of the crop, else of the central square."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    crop = crop or centre(image.height, image.width)
    box = (
        *(crop.left * image.width, crop.top * image.height),
        *(crop.right * image.width, crop.bottom * image.height),
    )
    return np.asarray(image.resize((EDGE, EDGE), Image.Resampling.BICUBIC, box=box))


def stock() -> Callable[[bytes], Any]:
    """Pillow decode, torchvision's antialiased resize, random crop and flip."""
    transform = torchvision_transform()
    return lambda data: transform(Image.open(io.BytesIO(data)).convert("RGB"))


def entropy(data: bytes) -> object:
    """Little but the Huffman decoding of the whole picture."""
    return simplejpeg.decode_jpeg(data, "GRAY", fastdct=True, min_height=1, min_width=1, min_factor=1)


def ssim(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Mean SSIM of luma over 8x8 windows (Wang et al. 2004, uniform window)."""
    weights = np.array([0.299, 0.587, 0.114])
    x, y = (v.astype(np.float64) @ weights for v in (a, b))
    x, y = (np.lib.stride_tricks.sliding_window_view(v, (8, 8))[::4, ::4].reshape(-1, 64) for v in (x, y))
    mx, my = x.mean(1), y.mean(1)
    cov = ((x - mx[:, None]) * (y - my[:, None])).mean(1)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return float(
        ((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (x.var(1) + y.var(1) + c2))).mean()
    )


def likeness(data: bytes) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Our picture and Pillow's of the same crop."""
    pixels, crop = crop_taken(data)
    return pixels, pillow(data, crop)


def measure(pictures: list[bytes], rounds: int) -> dict[str, list[float]]:
    """Images per CPU second of every arm, a value per round."""
    arms: dict[str, Callable[[bytes], Any]] = {
        "ours": ours, "stock": stock(), "pillow": pillow, "entropy": entropy,
    }  # fmt: skip
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, function in arms.items():
            began = time.process_time()
            for data in pictures:
                function(data)
            rates[name].append(len(pictures) / (time.process_time() - began))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--grains", default="0,3,9", help="noise of the pictures, 8-bit levels")
    parser.add_argument("--pictures", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(
        f"{'edges':<12}{'KB':>5}  images per CPU second: ours, stock, Pillow, entropy   ours/stock      SSIM"
    )
    for spread, edges in ((0.25, "768-1280 px"), (0.0, "1024 px")):
        for grain in (float(g) for g in args.grains.split(",")):
            with tempfile.TemporaryDirectory() as folder:
                make_shards(Path(folder), args.pictures, 1024, grain, spread=spread)
                with tarfile.open(next(Path(folder).glob("*.tar"))) as tar:
                    members = [m for m in tar.getmembers() if m.name.endswith(".jpg")]
                    pictures = [tar.extractfile(m).read() for m in members]  # type: ignore[union-attr]
            rates = measure(pictures, args.rounds)
            middle = {name: statistics.median(values) for name, values in rates.items()}
            ratios = [a / b for a, b in zip(rates["ours"], rates["stock"], strict=True)]
            alike = statistics.mean(ssim(*likeness(data)) for data in pictures[:20])
            kilobytes = statistics.mean(len(data) for data in pictures) / 1000
            ratio = f"{middle['ours'] / middle['stock']:.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
            figures = "".join(f"{middle[name]:>9.0f}" for name in ("ours", "stock", "pillow", "entropy"))
            print(f"{edges:<12}{kilobytes:>5.0f}  {'':<15}{figures}   {ratio:<18}{alike:.4f}")


if __name__ == "__main__":
    main()
