"""Images of pairs as a denoiser is to see them: turned, cropped, and never stretched."""

from __future__ import annotations

import math
import random
import struct
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from fastpo.data.errors import DataError
from fastpo.trainers.config import ConfigError

# What Pillow raises for files that it cannot read.
_UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)
_ORIENTATION = 0x0112  # of EXIF; 1 is upright, from 5 on the sides are swapped


class Frame(NamedTuple):
    """How an image becomes one of a bucket: resized on its short side, then cropped; pixels.

    Attributes:
        original: height and width, upright.
        resized: the same after resizing, at least those of the bucket.
        corner: top and left of the crop.
        size: height and width of the bucket.
    """

    original: tuple[int, int]
    resized: tuple[int, int]
    corner: tuple[int, int]
    size: tuple[int, int]

    @property
    def time_ids(self) -> list[float]:
        """What SDXL is told: original size, corner of the crop, size (arXiv:2307.01952, 2.2)."""
        return [float(n) for n in (*self.original, *self.corner, *self.size)]


def frame_of(
    original: tuple[int, int], buckets: Sequence[tuple[int, int]], draw: random.Random | None = None
) -> Frame:
    """The frame in the bucket of the nearest shape.

    Args:
        original: height and width.
        buckets: heights and widths.
        draw: for the place of the crop; the centre without it.

    Example:
        >>> frame_of((32, 64), [(16, 16)])
        Frame(original=(32, 64), resized=(16, 32), corner=(0, 8), size=(16, 16))
    """
    height, width = original
    size = min(buckets, key=lambda b: abs(math.log(b[0] * width / (b[1] * height))))
    scale = max(size[0] / height, size[1] / width)
    resized = max(size[0], round(height * scale)), max(size[1], round(width * scale))
    spare = [side - kept for side, kept in zip(resized, size, strict=True)]
    corner = [draw.randint(0, n) if draw else round(n / 2) for n in spare]
    return Frame((height, width), resized, (corner[0], corner[1]), size)


def parse_buckets(text: str) -> list[tuple[int, int]]:
    """Buckets of ``height,width;height,width``, as diffusers' scripts write them.

    Raises:
        ConfigError: it is not written so.

    Example:
        >>> parse_buckets("512,768;768,512")
        [(512, 768), (768, 512)]
    """
    try:
        pairs = [tuple(int(n) for n in pair.split(",")) for pair in text.split(";") if pair.strip()]
    except ValueError:
        pairs = []
    if not pairs or any(len(pair) != 2 or min(pair) < 1 for pair in pairs):
        expected = "heights and widths like 512,768;768,512"
        raise ConfigError(f"aspect_ratio_buckets: expected {expected}, got {text!r}.")
    return pairs


def image_size(path: str) -> tuple[int, int]:
    """Height and width of an image as it stands upright, by its header alone.

    Raises:
        DataError: it is no image, or several.
    """
    try:
        with Image.open(path) as image:
            # Cameras add a smaller image to theirs; it is the second one of the file.
            if getattr(image, "is_animated", False) and image.format != "MPO":
                frames = image.n_frames
                raise DataError(f"{path}: expected one image, got {frames} frames. Pick one.")
            width, height = image.size
            turned = image.getexif().get(_ORIENTATION, 1) >= 5
            return (width, height) if turned else (height, width)
    except _UNREADABLE as error:
        raise DataError(f"{path}: no image that can be read ({error}).") from error


class ImageReader:
    """Reads images of frames, and counts what it changes of them.

    Args:
        channels: of the images, 1 or 3.

    Attributes:
        counts: of images, and of those among them that were changed, by how.
        most_cut: the largest share of an image that a crop left out.
    """

    def __init__(self, channels: int):
        self.mode = {1: "L", 3: "RGB"}[channels]
        self.counts: Counter[str] = Counter()
        self.most_cut = 0.0

    def read(self, path: str, frame: Frame) -> Image.Image:
        """The image, upright, in the frame's size.

        One of the shape that the frame was made for is resized and cropped as that says, so that
        both of a pair have one geometry. One of another shape is cut from its own, at its centre.

        Raises:
            DataError: the image cannot be read.
        """
        try:
            with Image.open(path) as image:
                turned = image.getexif().get(_ORIENTATION, 1) > 1
                is_png = image.format == "PNG"
                found = self._colours(ImageOps.exif_transpose(image), is_png)
        except _UNREADABLE as error:
            raise DataError(f"{path}: no image that can be read ({error}).") from error
        resized, corner = frame.resized, frame.corner
        # Half a pixel of the other side is rounding.
        if abs(found.width * resized[0] - found.height * resized[1]) > max(found.size):
            resized, corner = frame.size, (0, 0)
        scale = max(resized[0] / found.height, resized[1] / found.width)
        shown = frame.size[0] * frame.size[1] / (found.height * found.width * scale**2)
        cut = 1 - min(shown, 1.0)
        # Less than a pixel of it is rounding.
        is_cut = cut * max(frame.size) > 1
        self.counts["images"] += 1
        self.counts["turned upright"] += turned
        self.counts["resized"] += (found.height, found.width) != resized
        self.counts["enlarged"] += scale > 1
        self.counts["cropped"] += is_cut
        self.most_cut = max(self.most_cut, cut if is_cut else 0.0)
        top, left = corner
        box = left, top, left + frame.size[1], top + frame.size[0]
        return ImageOps.fit(found, resized[::-1], Image.Resampling.LANCZOS).crop(box)

    def _colours(self, image: Image.Image, is_png: bool) -> Image.Image:
        """8 bits per channel, of 16 without a cut of the bright ones; transparency on white."""
        if image.mode.startswith("I;16") or (image.mode == "I" and is_png):
            self.counts["of 16 bits, taken to 8"] += 1
            pixels = np.asarray(image).astype(np.float64)
            return Image.fromarray((pixels / 257).round().astype(np.uint8)).convert(self.mode)
        if image.mode in ("I", "F"):
            raise ValueError("expected 8 or 16 bits per channel, got 32")
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            if image.getchannel("A").getextrema()[0] < 255:
                self.counts["transparent, put on white"] += 1
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert(self.mode)

    def report(self) -> str:
        """What was changed, in one line.

        Example:
            >>> reader = ImageReader(3)
            >>> reader.counts.update({"images": 4, "resized": 4, "cropped": 2})
            >>> reader.most_cut = 0.25
            >>> reader.report()
            'images: 4; 4 resized, 2 cropped (by 25 % at most)'
        """
        counts = dict(self.counts)
        parts = [f"{n} {what}" for what, n in counts.items() if n and what != "images"]
        line = ", ".join(parts) or "none changed"
        line = line.replace(
            "cropped", f"cropped (by {self.most_cut:.0%} at most)".replace("%", " %")
        )
        return f"images: {counts.get('images', 0)}; {line}"
