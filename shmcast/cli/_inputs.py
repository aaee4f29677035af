"""Files as the raw multimodal inputs of one request: what `MultimodalInputs.from_dict` takes.

    picture, video     pixel_values [patches, 1176] float32, with image_grid_thw or video_grid_thw [1, 3] int64
    sound              features [1, 128, frames] float32, with audio_feature_lens [1] int64

All pictures are views of one tensor, as engines cut them. The inputs are dicts, lists, tensors, numbers and strings
only, so that torch writes and reads them without running code of theirs.
"""

from __future__ import annotations

import copy
import os
import stat
import warnings
import wave
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from shmcast.cli._clips import container_of, no_room, read_video, read_wav
from shmcast.cli._pixels import MERGE, PATCH, PATCH_BYTES, Grid, NotUsable, Patches, Processor, fitted_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Raw: TypeAlias = dict[str, Any]

ROOM: Final = 512 << 20
"""The most bytes of features in one request."""

# Those that Pillow decodes itself: EPS, say, would start another program.
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO")

# Token ids of Qwen2-VL.
_IDS = {"im_start_id": 151652, "im_end_id": 151653, "im_token_id": 151655, "video_token_id": 151656}


@dataclass(frozen=True)
class Refused:
    """A file that does not go into the request, and the reason, which reads on from its name."""

    file: str
    reason: str


class Part(NamedTuple):
    """What one file gives: `kind` is picture, video or sound; a sound has no grid."""

    kind: str
    feature: Patches
    grid: Grid | None


@dataclass(frozen=True)
class Request:
    """The raw inputs of one request, and what they are of."""

    raw: Raw
    parts: tuple[str, ...]
    patches: int
    nbytes: int
    processor: str
    refused: tuple[Refused, ...]


def find_files(paths: Iterable[Path]) -> Iterator[Path | Refused]:
    """The files that `paths` name, folders with all that is in them, sorted; hidden ones only if named themselves."""
    for path in paths:
        found = _look(path)
        if found is not None:
            yield found
        else:
            yield from _walk(path)


def _look(path: Path) -> Path | Refused | None:
    """A regular file, or why it is none; None for a folder."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        return Refused(str(path), _reason(error))
    if stat.S_ISDIR(mode):
        return None
    # Opening a pipe would wait for somebody who writes into it.
    return path if stat.S_ISREG(mode) else Refused(str(path), "is neither a file nor a folder")


def _walk(folder: Path) -> Iterator[Path | Refused]:
    failed: list[OSError] = []
    empty = True
    for base, folders, names in os.walk(folder, onerror=failed.append):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            found = None if name.startswith(".") else _look(Path(base, name))
            if found is not None:
                empty = False
                yield found
    yield from (Refused(str(error.filename), _reason(error)) for error in failed)
    if empty and not failed:
        yield Refused(str(folder), "is a folder without files")


def read_request(
    paths: Iterable[Path], processor: Processor, max_pixels: int, room: int = ROOM
) -> tuple[list[Part], list[Refused]]:
    """What the files give, in their order, and those that give nothing."""
    parts: list[Part] = []
    refused: list[Refused] = []
    for found in find_files(paths):
        if isinstance(found, Refused):
            refused.append(found)
            continue
        try:
            parts.append(read_file(found, processor, max_pixels, room))
            room -= parts[-1].feature.nbytes
        except NotUsable as error:
            refused.append(Refused(str(found), str(error)))
    return parts, refused


def read_file(path: Path, processor: Processor, max_pixels: int, room: int) -> Part:
    """One file; what it is, its first bytes decide, not its name. Raises `NotUsable`, whatever is wrong with it."""
    try:
        with path.open("rb") as file:
            head = file.read(12)
        if not head:
            raise NotUsable("is empty")
        if head[:4] == b"RIFF" and head[8:] == b"WAVE":
            return Part("sound", read_wav(path, room), None)
        container = container_of(head)
        if container is not None:
            return Part("video", *read_video(path, container, max_pixels, room))
        return Part("picture", *_read_picture(path, processor, max_pixels, room))
    except NotUsable:
        raise
    except Exception as error:
        # Decoders raise almost anything on damaged files.
        raise NotUsable(_reason(error)) from error


def _read_picture(path: Path, processor: Processor, max_pixels: int, room: int) -> tuple[Patches, Grid]:
    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=formats) as opened:
            width, height = fitted_size(*opened.size, max_pixels)
            if width // PATCH * (height // PATCH) * PATCH_BYTES > room:
                raise no_room()
            opened.load()
            return processor.run(_upright(opened))


def _upright(image: Image.Image) -> Image.Image:
    """Turned as the camera was held; as it is where the note of that is damaged."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def _reason(error: BaseException) -> str:
    """Why a file cannot be used, for a person."""
    if isinstance(error, FileNotFoundError):
        return "does not exist"
    if isinstance(error, PermissionError):
        return "may not be read: permission denied"
    if isinstance(error, UnidentifiedImageError):
        return "is not a picture, a video or a WAV file that can be read here"
    if isinstance(error, Image.DecompressionBombWarning | Image.DecompressionBombError):
        return f"looks like a decompression bomb: {str(error).partition(',')[0]}"
    if isinstance(error, wave.Error):
        return f"is not a WAV file that can be read here: {error}"
    if isinstance(error, EOFError):
        return "is damaged: it ends too early"
    if isinstance(error, MemoryError):
        return "takes more memory than there is"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return f"cannot be read: {text}" if type(error) is OSError and error.errno else f"is damaged: {text}"


def build_request(parts: list[Part], refused: Iterable[Refused], processor: str) -> Request:
    """The request of these parts, at least one."""
    pictures = [part for part in parts if part.kind == "picture"]
    pixels = torch.from_numpy(np.concatenate([part.feature for part in pictures])) if pictures else None
    items: list[Raw] = []
    row, position = 0, 0
    for part in parts:
        feature = torch.from_numpy(part.feature)
        if part.kind == "picture" and pixels is not None:
            feature, row = pixels[row : row + len(feature)], row + len(feature)
        tokens = feature.shape[-1] if part.grid is None else part.grid.patches // MERGE**2
        items.append(_item(part, feature, (position + 1, position + tokens)))
        position += tokens + 2
    return Request(
        raw={"mm_items": items, **_IDS},
        parts=tuple(part.kind for part in parts),
        patches=sum(part.grid.patches for part in parts if part.grid is not None),
        nbytes=sum(part.feature.nbytes for part in parts),
        processor=processor,
        refused=tuple(refused),
    )


def _item(part: Part, feature: torch.Tensor, offsets: tuple[int, int]) -> Raw:
    modality, extra = {
        "picture": ("IMAGE", "image_grid_thw"),
        "video": ("VIDEO", "video_grid_thw"),
        "sound": ("AUDIO", "audio_feature_lens"),
    }[part.kind]
    value = torch.tensor([feature.shape[-1]] if part.grid is None else [list(part.grid)])
    return {"modality": modality, "feature": feature, "offsets": [offsets], "model_specific_data": {extra: value}}


def fresh(raw: Raw) -> Raw:
    """The same inputs over memory of their own, which no digest is remembered for; views of one tensor stay so."""
    return copy.deepcopy(raw)


def apart(raw: Raw) -> Raw:
    """As `fresh`, but every feature a tensor of its own: pickle would send the tensor behind a view whole, for each."""
    items = [{**fresh({**item, "feature": None}), "feature": item["feature"].clone()} for item in raw["mm_items"]]
    return {**raw, "mm_items": items}


def sample_parts(processor: Processor) -> list[Part]:
    """Pictures that Pillow draws, of the sizes that cameras and screens give, about 90 MB of patches."""
    return [Part("picture", *processor.run(image)) for image in sample_pictures()]


def sample_pictures() -> Iterator[Image.Image]:
    """Five of them, the same each time."""
    places = (
        ((1280, 720), (-2.2, -1.1, 1.1, 1.1)),
        ((1024, 768), (-0.80, 0.05, -0.70, 0.13)),
        ((768, 1024), (-1.30, -0.10, -1.20, 0.03)),
        ((1600, 900), (0.25, -0.03, 0.31, 0.004)),
    )
    for (width, height), extent in places:
        bands = [Image.effect_mandelbrot((width, height), extent, quality) for quality in (60, 90)]
        round_ = Image.radial_gradient("L").resize((width, height))
        yield Image.merge("RGB", (*bands, round_))
    sky = Image.linear_gradient("L").resize((640, 480))
    yield Image.merge("RGB", (sky, sky.rotate(180), Image.new("L", sky.size, 128)))
