"""Pictures and frames as Qwen2-VL takes them: resized, normalised, cut into patches.

A picture of `h` x `w` patches becomes `pixel_values` [h * w, 1176] float32. Patches that the model merges lie together:
rows run over blocks of 2 x 2 patches, then over the patches of a block. A row holds, for each colour and each of two
frames, the 14 x 14 values of the patch; a still picture counts as two equal frames.
"""

from __future__ import annotations

import importlib
import math
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Callable

Pixels: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]
Patches: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]

PATCH: Final = 14
MERGE: Final = 2
FRAMES: Final = 2
WIDTH: Final = 3 * FRAMES * PATCH * PATCH
PATCH_BYTES: Final = 4 * WIDTH
MIN_PIXELS: Final = 56 * 56
MAX_PIXELS: Final = 28 * 28 * 1280
MAX_ASPECT: Final = 200

# The mean and the deviation of each colour over CLIP's training pictures.
_MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
_DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711])
# A colour value has 256 possible outcomes: looking them up is faster than computing each, and as exact.
_NORMALISED = (((np.arange(256)[:, None] / 255 - _MEAN) / _DEVIATION).T).astype(np.float32)


class NotUsable(Exception):
    """A file cannot go into the request; the message says why, and reads on from the file's name."""


class Grid(NamedTuple):
    """How many patches there are in time, height and width."""

    t: int
    h: int
    w: int

    @property
    def patches(self) -> int:
        """How many there are in all."""
        return self.t * self.h * self.w


class Processor(NamedTuple):
    """What turns a picture into patches, and its name for a person."""

    name: str
    run: Callable[[Image.Image], tuple[Patches, Grid]]


def fitted_size(width: int, height: int, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """The (width, height) that a picture is resized to: multiples of 28, and about as many pixels as it has.

    Between `MIN_PIXELS` and `max_pixels` of them, as near as whole multiples come. Raises `NotUsable` for a strip
    longer than 200 times its breadth.
    """
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise NotUsable(f"is {width} x {height}: one side is more than {MAX_ASPECT} times the other")
    step = PATCH * MERGE
    fitted = [round(side / step) * step for side in (width, height)]
    if math.prod(fitted) > max_pixels:
        shrink = math.sqrt(width * height / max_pixels)
        fitted = [max(step, math.floor(side / shrink / step) * step) for side in (width, height)]
    elif math.prod(fitted) < MIN_PIXELS:
        grow = math.sqrt(MIN_PIXELS / (width * height))
        fitted = [math.ceil(side * grow / step) * step for side in (width, height)]
    return fitted[0], fitted[1]


def fitted(image: Image.Image, max_pixels: int = MAX_PIXELS) -> Pixels:
    """The picture at its fitted size, [height, width, 3] uint8."""
    rgb = image.convert("RGB")
    return np.asarray(rgb.resize(fitted_size(*rgb.size, max_pixels), Image.Resampling.BICUBIC))


def patches_of(frames: Pixels) -> tuple[Patches, Grid]:
    """Patches of an even number of frames, [frames, height, width, 3] with sides that are multiples of 28."""
    count, height, width, _ = frames.shape
    grid = Grid(count // FRAMES, height // PATCH, width // PATCH)
    cut = frames.reshape(grid.t, FRAMES, grid.h // MERGE, MERGE, PATCH, grid.w // MERGE, MERGE, PATCH, 3)
    rows = cut.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(grid.patches, 3, -1)
    patches = np.empty(rows.shape, np.float32)
    for colour, normalised in enumerate(_NORMALISED):
        patches[:, colour] = normalised[rows[:, colour]]
    return patches.reshape(grid.patches, WIDTH), grid


def picture_patches(image: Image.Image, max_pixels: int = MAX_PIXELS) -> tuple[Patches, Grid]:
    """Patches of a still picture."""
    pixels = fitted(image, max_pixels)
    return patches_of(np.broadcast_to(pixels, (FRAMES, *pixels.shape)))


def own_processor(max_pixels: int = MAX_PIXELS) -> Processor:
    """The functions of this module."""
    return Processor("Pillow and numpy", lambda image: picture_patches(image, max_pixels))


def transformers_processor(max_pixels: int = MAX_PIXELS) -> Processor:
    """The processor of the package transformers that runs on Pillow and numpy, made from its defaults.

    Raises ImportError where the package is missing, or cannot be loaded in this environment.
    """
    try:
        module = importlib.import_module("transformers")
        # Since release 5 the plain name is a processor on torchvision.
        kind = getattr(module, "Qwen2VLImageProcessorPil", None) or module.Qwen2VLImageProcessor
        process = kind(min_pixels=MIN_PIXELS, max_pixels=max_pixels)
    except (AttributeError, RuntimeError, TypeError) as error:
        raise ImportError(f"this release of transformers cannot be used: {error}", name="transformers") from error

    def run(image: Image.Image) -> tuple[Patches, Grid]:
        made = process(images=[image.convert("RGB")], return_tensors="np")
        patches = np.ascontiguousarray(made["pixel_values"], np.float32)
        return patches, Grid(*(int(number) for number in made["image_grid_thw"][0]))

    return Processor(f"transformers {module.__version__}", run)


def best_processor(max_pixels: int = MAX_PIXELS) -> Processor:
    """That of transformers where it is installed and works, else this module's own."""
    try:
        return transformers_processor(max_pixels)
    except ImportError:
        return own_processor(max_pixels)
