"""Decoding against Pillow, Detectron2 and PNG files that are written byte by byte here."""

from __future__ import annotations

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from detectron2.data import detection_utils
from PIL import Image, ImageOps

from multiseg_d2.data import decode
from multiseg_d2.data.decode import BadFileError, decode_color, decode_first_channel, decode_index, open_file

ORIENTATION = 0x0112


def photo(height: int = 40, width: int = 56) -> np.ndarray:
    """A smooth colour picture, (height, width, 3) uint8 RGB; no symmetry, so every turn shows."""
    y, x = np.mgrid[:height, :width]
    return np.stack([3 * x % 200 + 20, 4 * y % 180 + 10, (x + 2 * y) % 220], axis=2).astype(np.uint8)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def write_png(path, values: np.ndarray, depth: int, color_type: int, before=(), after=(), interlaced=False) -> str:
    """Writes (H, W) or (H, W, C) samples as an unfiltered PNG, packed bit by bit."""

    def rows(part: np.ndarray) -> bytes:
        lines = []
        for row in part.reshape(len(part), -1):
            bits = "".join(format(int(v), f"0{depth}b") for v in row)
            bits += "0" * (-len(bits) % 8)
            lines.append(b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big"))
        return b"".join(lines)

    height, width = values.shape[:2]
    parts = [values]
    if interlaced:  # the seven passes of Adam7
        passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
        parts = [values[y::dy, x::dx] for y, x, dy, dx in passes]
    data = b"".join(rows(part) for part in parts if part.size)
    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, int(interlaced))
    chunks = [chunk(b"IHDR", header), *before, chunk(b"IDAT", zlib.compress(data)), *after, chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    return str(path)


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags.tobytes()


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1"])
def test_png_of_every_kind_reads_as_detectron2_reads_it(tmp_path, mode):
    Image.fromarray(photo()).convert(mode).save(tmp_path / "a.png")
    for order in ("RGB", "BGR"):
        expected = detection_utils.read_image(str(tmp_path / "a.png"), order)
        np.testing.assert_array_equal(decode_color(open_file(str(tmp_path / "a.png")), order), expected)


@pytest.mark.parametrize("suffix", ["bmp", "tif", "gif", "webp", "ppm"])
def test_other_formats_read_as_detectron2_reads_them(tmp_path, suffix):
    path = str(tmp_path / f"a.{suffix}")
    Image.fromarray(photo()).save(path)
    np.testing.assert_array_equal(decode_color(open_file(path)), detection_utils.read_image(path, "BGR"))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_of_every_kind_reads_as_detectron2_reads_it(tmp_path, mode, options):
    path = str(tmp_path / "a.jpg")
    Image.fromarray(photo()).convert(mode).save(path, **options)
    for order in ("RGB", "BGR"):
        expected = detection_utils.read_image(path, order).astype(int)
        got = decode_color(open_file(path), order)
        assert got.shape == expected.shape and np.abs(got - expected).max() <= 2  # two versions of libjpeg-turbo


def test_jpeg_without_simplejpeg_is_read_all_the_same(tmp_path, monkeypatch):
    path = str(tmp_path / "a.jpg")
    Image.fromarray(photo()).save(path)
    fast = decode_color(open_file(path)).astype(int)
    monkeypatch.setattr(decode, "simplejpeg", None)
    assert np.abs(decode_color(open_file(path)) - fast).max() <= 2


def test_jpeg_with_harmless_rubbish_between_markers_is_read(tmp_path):
    stream = io.BytesIO()
    Image.fromarray(photo()).save(stream, "JPEG")
    whole = stream.getvalue()
    (tmp_path / "a.jpg").write_bytes(whole[:20] + b"\x00\x00" + whole[20:-2] + b"rubbish" + whole[-2:])
    with pytest.raises(ValueError, match="extraneous"):
        decode.simplejpeg.decode_jpeg((tmp_path / "a.jpg").read_bytes())  # else this test is moot
    expected = np.asarray(Image.open(io.BytesIO(whole))).astype(int)
    got = decode_color(open_file(str(tmp_path / "a.jpg")), "RGB")
    assert np.abs(got - expected).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png before IDAT", "png after IDAT"])
def test_exif_orientation_turns_the_image(tmp_path, kind, orientation):
    path = tmp_path / f"a.{kind[:3]}"
    if kind == "jpg":
        Image.fromarray(photo()).save(path, exif=exif(orientation), quality=95)
    else:
        place = "before" if "before" in kind else "after"
        body = exif(orientation).removeprefix(b"Exif\0\0")
        write_png(path, photo(), 8, 2, **{place: [chunk(b"eXIf", body)]})
    with Image.open(path) as image:
        image.load()
        expected = np.asarray(ImageOps.exif_transpose(image)).astype(int)
    file = open_file(str(path))
    assert (file.height, file.width) == expected.shape[:2]
    for rows in (None, 3):
        got = decode_color(file, "RGB", rows)
        assert len(got) == len(expected) if rows is None else len(got) >= rows
        assert np.abs(got - expected[: len(got)]).max() <= 2


def test_a_turned_label_is_turned_like_an_image(tmp_path):
    ids = np.arange(12).reshape(3, 4)
    body = exif(8).removeprefix(b"Exif\0\0")
    file = open_file(write_png(tmp_path / "a.png", ids, 8, 0, before=[chunk(b"eXIf", body)]))
    for rows in (None, 1):
        np.testing.assert_array_equal(decode_index(file, rows), np.rot90(ids))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_data_does_not_stop_reading(tmp_path):
    Image.fromarray(photo()).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\xff")
    assert open_file(str(tmp_path / "a.jpg")).orientation == 1


def test_sixteen_bit_images_keep_the_upper_eight_bits(tmp_path):
    values = np.random.default_rng(0).integers(0, 1 << 16, (9, 11, 3))
    grey, color = write_png(tmp_path / "g.png", values[..., 0], 16, 0), write_png(tmp_path / "c.png", values, 16, 2)
    for rows in (None, 4):
        got = decode_color(open_file(color), "RGB", rows)
        np.testing.assert_array_equal(got, (values >> 8)[: len(got)])
        got = decode_color(open_file(grey), "BGR", rows)
        np.testing.assert_array_equal(got, np.repeat(values[: len(got), :, :1] >> 8, 3, axis=2))


def test_float_images_are_refused_by_name(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "depth.tif")
    with pytest.raises(BadFileError, match=r"depth\.tif.*no defined range of colours"):
        decode_color(open_file(str(tmp_path / "depth.tif")))


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.98])
def test_a_truncated_file_is_named_wherever_it_ends(tmp_path, suffix, share):
    path = tmp_path / f"street.{suffix}"
    picture = np.random.default_rng(1).integers(0, 256, (64, 96, 3)).astype(np.uint8)
    Image.fromarray(picture).save(path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(BadFileError, match=rf"street\.{suffix}"):
        decode_color(open_file(str(path)))
    if suffix == "png":
        Image.fromarray(picture[..., 0]).save(path)
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        with pytest.raises(BadFileError, match=r"street\.png"):
            decode_index(open_file(str(path)))


def test_a_png_with_a_changed_byte_is_named(tmp_path):
    path = tmp_path / "street.png"
    Image.fromarray(photo()).save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(BadFileError, match=r"street\.png.*broken"):
        decode_color(open_file(str(path)))


def test_missing_empty_and_foreign_files_are_named(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("404 not found")
    for name, reason in (
        ("nowhere.png", "No such file"),
        ("empty.png", "empty"),
        ("text.png", "13 bytes"),
        ("", "directory"),
    ):
        with pytest.raises(BadFileError, match=f"{name}.*{reason}"):
            open_file(str(tmp_path / name))


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 7)])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_extreme_sizes(tmp_path, size, suffix):
    path = str(tmp_path / f"a.{suffix}")
    Image.fromarray(photo(*size)).save(path, quality=95)
    file = open_file(path)
    assert decode_color(file).shape == (file.height, file.width, 3) == (*size, 3)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
@pytest.mark.parametrize("rows", [1, 7, 30, 40])
def test_the_first_rows_equal_those_of_the_whole_image(tmp_path, mode, rows):
    path = str(tmp_path / "a.png")
    Image.fromarray(photo()).convert(mode).save(path)
    whole, part = decode_color(open_file(path)), decode_color(open_file(path), rows=rows)
    assert rows <= len(part) <= 40
    np.testing.assert_array_equal(part, whole[: len(part)])
    if rows == 7:
        assert len(part) == 7, "rows below the wanted ones were decoded"


def test_rows_of_an_interlaced_png(tmp_path):
    values = np.random.default_rng(2).integers(0, 256, (13, 17))
    path = write_png(tmp_path / "a.png", values, 8, 0, interlaced=True)
    np.testing.assert_array_equal(decode_index(open_file(path), rows=5)[:5], values[:5])
    np.testing.assert_array_equal(decode_color(open_file(path), rows=5)[:5, :, 1], values[:5])


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_grey_ids_of_every_depth_come_out_as_stored(tmp_path, depth):
    ids = np.random.default_rng(depth).integers(0, 1 << depth, (11, 13))
    for rows in (None, 4, 11):
        got = decode_index(open_file(write_png(tmp_path / "a.png", ids, depth, 0)), rows)
        assert got.dtype == (np.uint16 if depth == 16 else np.uint8)
        np.testing.assert_array_equal(got, ids[: len(got)])


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_palette_images_give_indices_not_colours(tmp_path, depth):
    rng = np.random.default_rng(depth)
    ids = rng.integers(0, 1 << depth, (11, 13))
    palette = rng.integers(0, 256, 3 << depth).astype(np.uint8).tobytes()
    path = write_png(tmp_path / "a.png", ids, depth, 3, before=[chunk(b"PLTE", palette), chunk(b"tRNS", b"\0")])
    np.testing.assert_array_equal(decode_index(open_file(path)), ids)
    assert not np.array_equal(cv2.imread(path, cv2.IMREAD_UNCHANGED), ids), "OpenCV expands palettes; this test is moot"


@pytest.mark.parametrize(
    ("color_type", "channels", "kind"),
    [(2, 3, "8-bit RGB PNG"), (6, 4, "8-bit RGBA PNG"), (4, 2, "8-bit grey.alpha PNG")],
)
def test_index_labels_with_several_channels_are_refused_by_name(tmp_path, color_type, channels, kind):
    path = write_png(tmp_path / "label.png", np.full((4, 4, channels), 7), 8, color_type)
    with pytest.raises(BadFileError, match=rf"label\.png.*encoding: index.*{kind}.*encoding: color"):
        decode_index(open_file(path))


def test_first_of_three_sixteen_bit_channels(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (9, 7, 3))
    path = write_png(tmp_path / "label.png", values, 16, 2)
    decoded = decode_first_channel(open_file(path))
    assert decoded.dtype == np.uint16 and decoded.flags.c_contiguous
    np.testing.assert_array_equal(decoded, values[..., 0])
    write_png(tmp_path / "label.png", values % 23, 8, 2)
    with pytest.raises(BadFileError, match=r"label\.png.*8-bit RGB PNG.*as downloaded"):
        decode_first_channel(open_file(path))
    write_png(tmp_path / "label.png", values[..., 0], 16, 0)
    with pytest.raises(BadFileError, match="16-bit grey PNG"):
        decode_first_channel(open_file(path))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.98, "changed"])
def test_broken_sixteen_bit_colours_are_named(tmp_path, share):
    path = write_png(tmp_path / "label.png", np.random.default_rng(0).integers(0, 65536, (64, 50, 3)), 16, 2)
    data = bytearray((tmp_path / "label.png").read_bytes())
    if share == "changed":
        data[len(data) // 2] ^= 0xFF
    else:
        data = data[: int(share * len(data))]
    (tmp_path / "label.png").write_bytes(data)
    with pytest.raises(BadFileError, match=r"label\.png"):
        decode_first_channel(open_file(path))


def test_a_jpeg_label_is_refused_by_name(tmp_path):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "label.jpg")
    with pytest.raises(BadFileError, match=r"label\.jpg.*cannot be a JPEG"):
        decode_index(open_file(str(tmp_path / "label.jpg")))


def test_an_unknown_channel_order_is_an_error(tmp_path):
    Image.fromarray(photo()).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"INPUT\.FORMAT is 'YUV'"):
        decode_color(open_file(str(tmp_path / "a.png")), "YUV")


def test_every_real_image_reads_as_detectron2_reads_it(samples):
    paths = [
        p for s in ("jpg", "png") for folder in samples.glob("*/images") for p in sorted(folder.rglob(f"*.{s}"))[:3]
    ]
    assert len(paths) >= 10
    for path in paths:
        expected = detection_utils.read_image(str(path), "BGR")
        difference = cv2.absdiff(decode_color(open_file(str(path))), np.ascontiguousarray(expected))
        assert difference.max() <= 4 and difference.mean() < 0.1, path


# ---- pyspng, beside what decodes where it is not installed ----

#: Name -> (bits, PNG colour type, channels, chunks before the pixels).
PNG_KINDS = {
    "grey": (8, 0, 1, ()),
    "grey with a transparent value": (8, 0, 1, (chunk(b"tRNS", b"\0\x07"),)),
    "grey and alpha": (8, 4, 2, ()),
    "colour": (8, 2, 3, ()),
    "colour with a gamma": (8, 2, 3, (chunk(b"gAMA", struct.pack(">I", 100000)),)),
    "colour and alpha": (8, 6, 4, ()),
    "palette": (8, 3, 1, (chunk(b"PLTE", bytes(range(256)) * 3), chunk(b"tRNS", bytes(range(100))))),
    "palette of 4 bits": (4, 3, 1, (chunk(b"PLTE", bytes(range(48))),)),
    "grey of 4 bits": (4, 0, 1, ()),
    "16-bit grey": (16, 0, 1, ()),
    "16-bit colour": (16, 2, 3, ()),
}


def outcome(function, path: str, *args):
    """(What it returns or None, the text of its error)."""
    try:
        return function(open_file(path), *args), ""
    except BadFileError as problem:
        return None, str(problem)


def both_outcomes(monkeypatch, function, path: str, *args):
    with monkeypatch.context() as without:
        without.setattr(decode, "pyspng", None)
        slow = outcome(function, path, *args)
    return outcome(function, path, *args), slow


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("kind", PNG_KINDS)
def test_pyspng_gives_the_same_pixels(tmp_path, monkeypatch, kind, interlaced):
    depth, color_type, channels, before = PNG_KINDS[kind]
    values = np.random.default_rng(3).integers(0, 2**depth, (23, 17, channels))
    path = write_png(tmp_path / "a.png", values, depth, color_type, before, interlaced=interlaced)
    for function, *args in ((decode_color, "RGB"), (decode_color, "BGR", 9), (decode_index,), (decode_index, 9)):
        (fast, error), (slow, slow_error) = both_outcomes(monkeypatch, function, path, *args)
        assert error == slow_error
        if slow is not None:
            rows = args[-1] if args and isinstance(args[-1], int) else 23
            assert fast.dtype == slow.dtype and len(fast) >= rows
            np.testing.assert_array_equal(fast[:rows], slow[:rows])


def test_pyspng_is_used_and_refuses_what_the_others_refuse(tmp_path, monkeypatch):
    assert decode._spng(open_file(write_png(tmp_path / "a.png", photo(), 8, 2)), "RGB", None) is not None
    sound, rng = (tmp_path / "a.png").read_bytes(), np.random.default_rng(5)
    refused = 0
    for _ in range(150):
        data = bytearray(sound)
        data[rng.integers(33, len(data))] ^= 1 << int(rng.integers(8))
        (tmp_path / "b.png").write_bytes(data)
        (fast, error), (slow, slow_error) = both_outcomes(monkeypatch, decode_color, str(tmp_path / "b.png"), "RGB")
        refused += slow is None
        assert error == slow_error and (slow is None) == (fast is None)
        if slow is not None:
            np.testing.assert_array_equal(fast, slow)
    assert refused > 100
