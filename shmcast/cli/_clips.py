"""What lasts: a video as pairs of frames, a WAV file as a log-mel spectrogram."""

from __future__ import annotations

import importlib
import math
import wave
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

from shmcast.cli._pixels import FRAMES, PATCH, PATCH_BYTES, Grid, NotUsable, Patches, Pixels, fitted, patches_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from PIL import Image

Samples: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]

FRAMES_PER_SECOND: Final = 2
MAX_FRAMES: Final = 32
MAX_FRAME_PIXELS: Final = 28 * 28 * 768

RATE: Final = 16_000
MAX_SECONDS: Final = 600
MELS: Final = 128
_HOP: Final = 160
_WINDOW: Final = 400
_POINTS: Final = 1024
_STEP: Final = 4096

_CONTAINERS = {b"\x1aE\xdf\xa3": "matroska", b"\0\0\1\xba": "mpeg", b"FLV\1": "flv"}
_PICTURE_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"hevc", b"mif1", b"msf1")


def container_of(head: bytes) -> str | None:
    """The name that ffmpeg has for the video container that starts with `head`; None if it looks like none.

    Only these are given to ffmpeg, each to its own demuxer: it knows formats (playlists) that name other files.
    """
    if head[4:8] == b"ftyp":
        return None if head[8:12] in _PICTURE_BRANDS else "mov"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "avi"
    return _CONTAINERS.get(head[:4])


def read_video(path: Path, container: str, max_pixels: int, room: int) -> tuple[Patches, Grid]:
    """Patches of the video's frames: two a second, or fewer where that would be more than `MAX_FRAMES`.

    Raises `NotUsable` where PyAV is missing, or the patches would take more than `room` bytes, and what PyAV raises.
    """
    try:
        av = importlib.import_module("av")
    except ImportError:
        raise NotUsable("is a video, and reading it needs PyAV: pip install 'shmcast[video]'") from None
    frames: list[Pixels] = []
    with av.open(str(path), format=container) as opened:
        if not opened.streams.video:
            raise NotUsable(f"is a {container} file without a video in it")
        for image in _sampled(opened):
            frames.append(fitted(image, min(max_pixels, MAX_FRAME_PIXELS)))
            height, width, _ = frames[-1].shape
            if math.ceil(len(frames) / FRAMES) * (height // PATCH) * (width // PATCH) * PATCH_BYTES > room:
                raise no_room()
    if not frames:
        raise NotUsable("is a video without a single frame")
    frames += [frames[-1]] * (-len(frames) % FRAMES)
    return patches_of(np.stack(frames))


def _sampled(opened: Any) -> Iterator[Image.Image]:
    """Pictures of an opened container, in even steps of time."""
    stream = opened.streams.video[0]
    seconds = float(opened.duration or 0) / 1e6
    step = max(1 / FRAMES_PER_SECOND, seconds / MAX_FRAMES)
    start, taken = None, 0
    for number, frame in enumerate(opened.decode(stream)):
        at = float(frame.time if frame.time is not None else number / float(stream.average_rate or 25))
        start = at if start is None else start
        # Half a millisecond for time stamps that are rounded.
        if at - start >= taken * step - 5e-4:
            taken += 1
            yield frame.to_image()
        if taken == MAX_FRAMES:
            return


def read_wav(path: Path, room: int) -> Patches:
    """A WAV file as [1, 128, frames] float32; `NotUsable` for what is too long or too large, and what `wave` raises."""
    with wave.open(str(path)) as opened:
        rate, channels, width = opened.getframerate(), opened.getnchannels(), opened.getsampwidth()
        if rate <= 0:
            raise NotUsable("gives no sample rate")
        if opened.getnframes() > MAX_SECONDS * rate:
            raise NotUsable(f"is {opened.getnframes() / rate / 60:.0f} minutes long; {MAX_SECONDS // 60} are the most")
        raw = opened.readframes(opened.getnframes())
        if len(raw) < opened.getnframes() * channels * width:
            raise EOFError
    mono = _mono(raw, channels, width)
    if not len(mono):
        raise NotUsable("is a WAV file without sound in it")
    count = max(1, len(mono) * RATE // rate)
    if count // _HOP * MELS * 4 > room:
        raise no_room()
    # Linear interpolation, no filter against aliases: enough for a demonstration, not for a recogniser.
    resampled = np.interp(np.arange(count) * (rate / RATE), np.arange(len(mono)), mono).astype(np.float32)
    return log_mel(resampled)


def _mono(raw: bytes, channels: int, width: int) -> Samples:
    """The mean of the channels, in -1 to 1; PCM of 1 (unsigned), 2, 3 or 4 bytes a sample."""
    octets = np.frombuffer(raw, np.uint8).reshape(-1, width)
    if width == 1:
        values = (octets[:, 0].astype(np.float32) - 128) / 128
    else:
        # Into the upper bytes of an int32: keeps the sign, and makes one scale of all.
        wide = np.zeros((len(octets), 4), np.uint8)
        wide[:, 4 - width :] = octets
        values = wide.view("<i4")[:, 0].astype(np.float32) / 2**31
    mono: Samples = values.reshape(-1, channels).mean(axis=1)
    return mono


def log_mel(samples: Samples) -> Patches:
    """A spectrogram of 16 kHz sound, [1, 128, frames] float32, one frame each 10 ms.

    Power of windows of 25 ms (Hann) on 128 mel bands up to 8 kHz, as its logarithm, cut off 80 dB below the loudest,
    in a range of about -1 to 1: the shape and the scale that audio encoders take, without their exact filters.
    """
    padded = np.pad(samples, (0, max(0, _WINDOW - len(samples))))
    windows = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[::_HOP]
    shape, bands = np.hanning(_WINDOW).astype(np.float32), _mel_bands()
    logs = np.empty((MELS, len(windows)), np.float32)
    for first in range(0, len(windows), _STEP):
        power = np.abs(np.fft.rfft(windows[first : first + _STEP] * shape, _POINTS)) ** 2
        logs[:, first : first + _STEP] = np.log10(np.maximum(bands @ power.T, 1e-10))
    spectrogram: Patches = ((np.maximum(logs, logs.max() - 8) + 4) / 4)[None]
    return spectrogram


def _mel_bands() -> np.ndarray[Any, np.dtype[np.float64]]:
    """Triangles, evenly spaced on the mel scale, [128, 513]: the weight of each frequency in each band."""
    top = 2595 * math.log10(1 + RATE / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, MELS + 2) / 2595) - 1)
    frequencies = np.linspace(0, RATE / 2, _POINTS // 2 + 1)
    left, middle, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising, falling = (frequencies - left) / (middle - left), (right - frequencies) / (right - middle)
    return np.maximum(0, np.minimum(rising, falling))


def no_room() -> NotUsable:
    """Why a file is left out when the request has grown large enough."""
    return NotUsable("is left out: the request would grow too large; take fewer files, or a smaller --max-pixels")
