"""Files as multimodal inputs: what a picture, a video and a sound become, and what is said of a file that is none."""

import math
import os
import struct
import sys
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shmcast.cli import _clips, _inputs, _pixels
from shmcast.cli._inputs import Part, Refused, apart, build_request, find_files, fresh, read_file, read_request
from shmcast.cli._pixels import MAX_PIXELS, MIN_PIXELS, Grid, NotUsable, fitted_size, patches_of, picture_patches
from shmcast.multimodal import Modality, MultimodalInputs

OWN = _pixels.own_processor()
ROOM = 1 << 30


def colours(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture of random colours."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def saved(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


# The size.


# (width, height, most pixels) -> (width, height), as transformers 5.23 gives it.
@pytest.mark.parametrize(
    ("size", "most", "expected"),
    [
        ((1280, 720), MAX_PIXELS, (1288, 728)),
        ((500, 400), MAX_PIXELS, (504, 392)),
        ((3000, 2000), MAX_PIXELS, (1204, 812)),
        ((1, 1), MAX_PIXELS, (56, 56)),
        ((28, 28), MAX_PIXELS, (56, 56)),
        ((10, 2000), MAX_PIXELS, (28, 812)),
        ((42, 70), MAX_PIXELS, (56, 56)),
        ((4000, 20), 3136, (784, 28)),
    ],
)
def test_a_picture_is_fitted_as_the_model_does(size: tuple[int, int], most: int, expected: tuple[int, int]) -> None:
    assert fitted_size(*size, most) == expected


@given(st.integers(1, 20_000), st.integers(1, 20_000), st.integers(MIN_PIXELS, MAX_PIXELS))
def test_a_fitted_size_is_whole_blocks_within_the_limits(width: int, height: int, most: int) -> None:
    if max(width, height) > 200 * min(width, height):
        with pytest.raises(NotUsable, match=f"is {width} x {height}: one side"):
            fitted_size(width, height, most)
        return
    fitted = fitted_size(width, height, most)
    assert all(side > 0 and side % 28 == 0 for side in fitted)
    assert math.prod(fitted) >= MIN_PIXELS or most < 2 * MIN_PIXELS
    # One block of 28 in the shorter side may be more than its share, and what grows to the least grows to whole blocks.
    assert math.prod(fitted) <= max(most, 28 * max(fitted), 3 * MIN_PIXELS)


# The patches, against the definition in plain loops.

MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)


def patches_by_definition(frames: Any) -> Any:
    """Patches of [frames, height, width, 3] uint8: one value after the other."""
    count, height, width, _ = frames.shape
    rows = []
    for pair in range(0, count, 2):
        for top in range(0, height, 28):
            for left in range(0, width, 28):
                for y, x in ((top, left), (top, left + 14), (top + 14, left), (top + 14, left + 14)):
                    row = []
                    for colour in range(3):
                        for frame in (pair, pair + 1):
                            patch = frames[frame, y : y + 14, x : x + 14, colour].astype(np.float64).reshape(-1)
                            row.append((patch / 255 - MEAN[colour]) / DEVIATION[colour])
                    rows.append(np.concatenate(row))
    return np.stack(rows)


@pytest.mark.parametrize("shape", [(2, 28, 28, 3), (2, 56, 84, 3), (4, 28, 84, 3), (6, 84, 56, 3)])
def test_patches_are_those_of_the_definition(shape: tuple[int, ...]) -> None:
    frames = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    patches, grid = patches_of(frames)
    assert grid == (shape[0] // 2, shape[1] // 14, shape[2] // 14)
    assert patches.dtype == np.float32
    assert patches.shape == (grid.patches, 1176)
    np.testing.assert_allclose(patches, patches_by_definition(frames), atol=1e-6)


def test_a_still_picture_is_two_equal_frames() -> None:
    patches, grid = picture_patches(colours(84, 56))
    assert grid == (1, 4, 6)
    pixels = np.asarray(colours(84, 56))
    np.testing.assert_allclose(patches, patches_by_definition(np.stack([pixels, pixels])), atol=1e-6)


@pytest.mark.parametrize("size", [(84, 56), (500, 400), (31, 77), (1500, 900)])
def test_transformers_gives_the_same(size: tuple[int, int]) -> None:
    pytest.importorskip("transformers")
    for most in (MAX_PIXELS, 100_000):
        theirs, their_grid = _pixels.transformers_processor(most).run(colours(*size))
        ours, grid = _pixels.own_processor(most).run(colours(*size))
        assert grid == their_grid
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_without_transformers_our_own_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert _pixels.best_processor().name == "Pillow and numpy"


class Broken:
    """Stands for a release of transformers that does not load here."""

    __spec__ = None

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"cannot import {name}")


def test_with_a_broken_transformers_our_own_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", Broken())
    assert _pixels.best_processor().name == "Pillow and numpy"


# Finding files.


def test_folders_are_searched_in_order_without_what_is_hidden(tmp_path: Path) -> None:
    for name in ("b/2", "b/10", "a", "c/d/e", ".hidden", ".folder/x"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found = [path.relative_to(tmp_path).as_posix() for path in find_files([tmp_path]) if isinstance(path, Path)]
    assert found == ["a", "b/10", "b/2", "c/d/e"]
    assert list(find_files([tmp_path / ".hidden"])) == [tmp_path / ".hidden"]


def test_what_is_no_file_is_named_and_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "empty").mkdir()
    (tmp_path / "to-pipe").symlink_to("pipe")
    found = find_files([tmp_path, tmp_path / "gone", tmp_path / "empty"])
    assert {Path(r.file).name: r.reason for r in found if isinstance(r, Refused)} == {
        "pipe": "is neither a file nor a folder",
        "to-pipe": "is neither a file nor a folder",
        "dangling": "does not exist",
        "loop": "cannot be read: Too many levels of symbolic links",
        "gone": "does not exist",
        "empty": "is a folder without files",
    }


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "a").touch()
    real = os.scandir

    def scandir(path: Any) -> Any:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert list(find_files([tmp_path])) == [
        tmp_path / "a",
        Refused(str(tmp_path / "closed"), "may not be read: permission denied"),
    ]


# Files that give nothing.


def png(path: Path) -> bytes:
    return saved(colours(300, 200), path).read_bytes()


def wav(path: Path, frames: bytes = b"\0" * 32000, *, rate: int = 16000, channels: int = 1, width: int = 2) -> bytes:
    with wave.open(str(path), "wb") as opened:
        opened.setnchannels(channels)
        opened.setsampwidth(width)
        opened.setframerate(rate)
        opened.writeframes(frames)
    return path.read_bytes()


def changed(content: bytes, offset: int, new: bytes) -> bytes:
    return content[:offset] + new + content[offset + len(new) :]


NOTHING = r"is not a picture, a video or a WAV file that can be read here"
UNUSABLE: list[tuple[str, Callable[[Path], bytes], str]] = [
    ("empty", lambda _: b"", "is empty"),
    ("text", lambda _: b"hello\n" * 99, NOTHING),
    ("html", lambda _: b"<html>", NOTHING),
    ("playlist", lambda _: b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n", NOTHING),
    ("postscript", lambda p: saved(colours(9, 9), p, format="EPS").read_bytes(), NOTHING),
    ("heic", lambda _: b"\0\0\0\x20ftypheic" + b"x" * 99, NOTHING),
    ("half-png", lambda p: png(p)[:40_000], "is damaged: image file is truncated"),
    ("bad-png", lambda p: changed(png(p), 9_000, b"\0" * 200), "is damaged: "),
    ("half-jpeg", lambda p: saved(colours(99, 99), p, format="JPEG").read_bytes()[:2000], "is damaged: .*truncated"),
    ("strip", lambda p: saved(Image.new("L", (4000, 10)), p).read_bytes(), "is 4000 x 10: one side is more than 200"),
    ("half-header", lambda p: wav(p)[:20], "is damaged: it ends too early"),
    ("half-wav", lambda p: wav(p)[:1000], "is damaged: it ends too early"),
    ("silent", lambda p: wav(p, b""), "is a WAV file without sound in it"),
    ("float", lambda p: changed(wav(p), 20, b"\3\0"), "is not a WAV file that can be read here: unknown format: 3"),
    ("timeless", lambda p: changed(wav(p), 24, b"\0\0\0\0"), "gives no sample rate"),
    ("long", lambda p: changed(wav(p), 40, struct.pack("<I", 2**31)), "is 1118 minutes long; 10 are the most"),
]


@pytest.mark.parametrize(("content", "reason"), [row[1:] for row in UNUSABLE], ids=[row[0] for row in UNUSABLE])
def test_a_file_that_gives_nothing_says_why(tmp_path: Path, content: Callable[[Path], bytes], reason: str) -> None:
    path = tmp_path / "file.png"
    path.write_bytes(content(path))
    with pytest.raises(NotUsable, match=f"^{reason}"):
        read_file(path, OWN, MAX_PIXELS, ROOM)


@pytest.mark.parametrize("limit", [9_999, 4_999])
def test_a_decompression_bomb_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    path = saved(colours(100, 100), tmp_path / "bomb.png")
    # Pillow warns from this many pixels on, and raises from twice as many.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(NotUsable, match=r"looks like a decompression bomb: Image size \(10000 pixels\)"):
        read_file(path, OWN, MAX_PIXELS, ROOM)


def test_a_file_that_may_not_be_read_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(NotUsable, match="may not be read: permission denied"):
        read_file(tmp_path / "secret.png", OWN, MAX_PIXELS, ROOM)


@given(
    st.binary(max_size=300),
    st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WAVE", b"\xff\xd8\xff", b"GIF89a"]),
)
def test_any_bytes_give_a_part_or_a_reason(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, head: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(head + content)
    parts, refused = read_request([path], OWN, MAX_PIXELS)
    assert [part.feature.size > 0 for part in parts] + [r.reason != "" for r in refused] == [True]


def test_the_others_go_through_in_order(tmp_path: Path) -> None:
    saved(colours(84, 56), tmp_path / "1.png")
    (tmp_path / "2.txt").write_text("hello")
    saved(colours(56, 56), tmp_path / "3.jpg")
    (tmp_path / "4.png").touch()
    wav(tmp_path / "5.wav")
    parts, refused = read_request([tmp_path, tmp_path / "6"], OWN, MAX_PIXELS)
    assert [(part.kind, part.grid) for part in parts] == [
        ("picture", Grid(1, 4, 6)),
        ("picture", Grid(1, 4, 4)),
        ("sound", None),
    ]
    assert [(Path(r.file).name, r.reason) for r in refused] == [
        ("2.txt", NOTHING),
        ("4.png", "is empty"),
        ("6", "does not exist"),
    ]


def test_what_would_make_the_request_too_large_is_left_out_before_it_is_decoded(tmp_path: Path) -> None:
    for name in ("1.png", "2.png"):
        saved(colours(280, 280), tmp_path / name)
    saved(colours(56, 56), tmp_path / "3.png")
    big, small = 20 * 20 * 4704, 4 * 4 * 4704
    parts, refused = read_request([tmp_path], OWN, MAX_PIXELS, big + small)
    assert [part.feature.nbytes for part in parts] == [big, small]
    assert [Path(r.file).name for r in refused] == ["2.png"]
    assert "the request would grow too large" in refused[0].reason


# Pictures of all kinds.


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "I;16", "RGB"])
def test_every_mode_becomes_colours(tmp_path: Path, mode: str) -> None:
    image = Image.new("I;16", (84, 56), 9000) if mode == "I;16" else colours(84, 56).convert(mode)
    part = read_file(saved(image, tmp_path / "x.png"), OWN, MAX_PIXELS, ROOM)
    assert part.grid == Grid(1, 4, 6)
    assert np.isfinite(part.feature).all()


def test_a_picture_is_turned_upright(tmp_path: Path) -> None:
    image = colours(84, 56)
    notes = image.getexif()
    notes[0x0112] = 6
    part = read_file(saved(image, tmp_path / "x.png", exif=notes), OWN, MAX_PIXELS, ROOM)
    expected, grid = picture_patches(image.rotate(-90, expand=True))
    assert part.grid == grid == Grid(1, 6, 4)
    np.testing.assert_array_equal(part.feature, expected)


def test_fewer_pixels_are_fewer_patches(tmp_path: Path) -> None:
    path = saved(colours(560, 560), tmp_path / "x.png")
    part = read_file(path, _pixels.own_processor(100_000), 100_000, ROOM)
    assert part.grid == Grid(1, 22, 22)


# Sound.


def tone(frequency: float, rate: int, seconds: float = 1.0) -> Any:
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(int(rate * seconds)) / rate)


def as_pcm(sound: Any, width: int) -> Any:
    if width == 1:
        return (sound * 127 + 128).astype(np.uint8).tobytes()
    wide = np.ascontiguousarray((sound * (2**31 - 1)).astype("<i4"))
    return wide.view(np.uint8).reshape(-1, 4)[:, 4 - width :].tobytes()


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize(("rate", "channels"), [(16000, 1), (44100, 2), (8000, 1)])
def test_a_tone_lies_in_its_band(tmp_path: Path, width: int, rate: int, channels: int) -> None:
    pcm = as_pcm(np.repeat(tone(1000, rate), channels), width)
    wav(tmp_path / "x.wav", pcm, rate=rate, channels=channels, width=width)
    part = read_file(tmp_path / "x.wav", OWN, MAX_PIXELS, ROOM)
    assert (part.kind, part.grid) == ("sound", None)
    assert part.feature.dtype == np.float32
    assert part.feature.shape == (1, 128, 98)
    # 1 kHz is 1000 mel, the whole range 2840 in 129 steps.
    loudest = part.feature[0].mean(axis=1).argmax()
    assert loudest == pytest.approx(1000 / 2840 * 129 - 1, abs=1)
    assert part.feature.max() <= 2
    assert part.feature.max() - part.feature.min() <= 2


def test_the_least_sound_is_one_frame(tmp_path: Path) -> None:
    wav(tmp_path / "x.wav", b"\1\0")
    assert read_file(tmp_path / "x.wav", OWN, MAX_PIXELS, ROOM).feature.shape == (1, 128, 1)


def test_a_long_sound_is_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = np.random.default_rng(3).standard_normal(16000).astype(np.float32)
    whole = _clips.log_mel(sound)
    monkeypatch.setattr(_clips, "_STEP", 7)
    np.testing.assert_allclose(_clips.log_mel(sound), whole, atol=1e-6)


# Video.


def film(path: Path, frames: int, rate: int = 25, size: tuple[int, int] = (112, 84)) -> Path:
    """A video that gets brighter from frame to frame."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as opened:
        stream = opened.add_stream("mpeg4", rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            picture = np.full((size[1], size[0], 3), 255 * number // max(1, frames - 1), np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                opened.mux(packet)
        for packet in stream.encode():
            opened.mux(packet)
    return path


@pytest.mark.parametrize("name", ["x.mp4", "x.mkv", "x.avi"])
def test_two_frames_a_second_are_taken(tmp_path: Path, name: str) -> None:
    part = read_file(film(tmp_path / name, frames=75), OWN, MAX_PIXELS, ROOM)
    assert (part.kind, part.grid) == ("video", Grid(3, 6, 8))
    frames = part.feature.reshape(3, 48, 3, 2, 196)
    brightness = frames.mean(axis=(1, 2, 4)).reshape(-1)
    assert (np.diff(brightness) > 0).all()
    # The first of each pair is the earlier one; half a second is a sixth of the way.
    steps = np.diff(brightness)
    np.testing.assert_allclose(steps, steps.mean(), rtol=0.2)


def test_a_single_frame_is_repeated(tmp_path: Path) -> None:
    part = read_file(film(tmp_path / "x.mp4", frames=1), OWN, MAX_PIXELS, ROOM)
    assert part.grid == Grid(1, 6, 8)
    frames = part.feature.reshape(48, 3, 2, 196)
    np.testing.assert_array_equal(frames[:, :, 0], frames[:, :, 1])


def test_a_long_video_is_sampled_over_its_whole_length(tmp_path: Path) -> None:
    part = read_file(film(tmp_path / "x.mp4", frames=100, rate=1), OWN, MAX_PIXELS, ROOM)
    assert part.grid == Grid(16, 6, 8)
    brightness = part.feature.reshape(16, 48, 3, 2, 196).mean(axis=(1, 2, 4)).reshape(-1)
    white = (1 - np.array(MEAN)) / DEVIATION
    assert brightness[-1] > 0.9 * white.mean()


def test_a_video_that_is_too_large_is_left_out(tmp_path: Path) -> None:
    path = film(tmp_path / "x.mp4", frames=75)
    with pytest.raises(NotUsable, match="the request would grow too large"):
        read_file(path, OWN, MAX_PIXELS, 3 * 48 * 4704 - 1)
    assert read_file(path, OWN, MAX_PIXELS, 3 * 48 * 4704).grid == Grid(3, 6, 8)


@pytest.mark.parametrize(
    "head", [b"\0\0\0\x20ftypisom", b"\x1aE\xdf\xa3", b"RIFF\0\0\0\0AVI ", b"FLV\1", b"\0\0\1\xba"]
)
def test_a_damaged_video_says_so(tmp_path: Path, head: bytes) -> None:
    pytest.importorskip("av")
    (tmp_path / "x.mp4").write_bytes(head + b"\0junk" * 99)
    with pytest.raises(NotUsable, match=r"^is damaged: |without a"):
        read_file(tmp_path / "x.mp4", OWN, MAX_PIXELS, ROOM)


def test_without_pyav_a_video_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.mp4").write_bytes(b"\0\0\0\x20ftypisom" + b"\0" * 99)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(NotUsable, match=r"is a video, .* pip install 'shmcast\[video\]'"):
        read_file(tmp_path / "x.mp4", OWN, MAX_PIXELS, ROOM)


# The request.


def three_parts() -> list[Part]:
    first, second = (Part("picture", *picture_patches(colours(84, 56, seed))) for seed in (1, 2))
    sound = Part("sound", _clips.log_mel(tone(440, 16000).astype(np.float32)), None)
    return [first, sound, second]


def test_a_request_is_what_from_dict_takes() -> None:
    request = build_request(three_parts(), [Refused("x", "is empty")], "by hand")
    assert (request.patches, request.nbytes) == (48, 48 * 4704 + 128 * 98 * 4)
    assert request.parts == ("picture", "sound", "picture")
    made = MultimodalInputs.from_dict(request.raw)
    assert [item.modality for item in made.mm_items] == [Modality.IMAGE, Modality.AUDIO, Modality.IMAGE]
    assert made.mm_items[0].image_grid_thw.tolist() == [[1, 4, 6]]
    assert made.mm_items[1].audio_feature_lens.tolist() == [98]
    # Six tokens of a picture between its marks, then 98 of the sound between its.
    assert [item.offsets for item in made.mm_items] == [[(1, 6)], [(9, 106)], [(109, 114)]]
    assert made.im_token_id == 151655


def test_pictures_are_views_of_one_tensor_with_the_right_rows() -> None:
    parts = three_parts()
    items = build_request(parts, [], "by hand").raw["mm_items"]
    for part, item in zip(parts, items, strict=True):
        np.testing.assert_array_equal(item["feature"].numpy(), part.feature)
    first, sound, second = (item["feature"].untyped_storage().data_ptr() for item in items)
    assert first == second != sound


def storages(raw: dict[str, Any]) -> list[int]:
    return [item["feature"].untyped_storage().data_ptr() for item in raw["mm_items"]]


def test_fresh_inputs_share_nothing_with_those_before_but_still_share_among_themselves() -> None:
    raw = build_request(three_parts(), [], "by hand").raw
    again, other = fresh(raw), apart(raw)
    for new in (again, other):
        for old_item, item in zip(raw["mm_items"], new["mm_items"], strict=True):
            assert torch.equal(old_item["feature"], item["feature"])
            assert item is not old_item
        assert not set(storages(new)) & set(storages(raw))
    assert len(set(storages(again))) == 2
    assert len(set(storages(other))) == 3


def test_raw_inputs_are_read_back_without_running_code(tmp_path: Path) -> None:
    raw = build_request(three_parts(), [], "by hand").raw
    torch.save(raw, tmp_path / "request.pt")
    read = fresh(torch.load(tmp_path / "request.pt", mmap=True, weights_only=True))
    assert len(set(storages(read))) == 2
    hashes = [[item.hash for item in MultimodalInputs.from_dict(each).mm_items] for each in (raw, read)]
    assert hashes[0] == hashes[1]


def test_drawn_pictures_make_a_request_of_a_usual_size() -> None:
    sizes = [picture.size for picture in _inputs.sample_pictures()]
    nbytes = [math.prod(fitted_size(*size)) // 196 * 4704 for size in sizes]
    assert 50e6 < sum(nbytes) < 100e6
    assert len(set(sizes)) == len(sizes) >= 4


def test_drawn_pictures_are_the_same_each_time_and_not_blank() -> None:
    first, second = (next(_inputs.sample_pictures()) for _ in range(2))
    assert first.tobytes() == second.tobytes()
    assert all(low < high for low, high in first.getextrema())  # type: ignore[misc]
