"""Files as users' programs, cameras and file systems make them: read as what they are, or refused by name."""

from __future__ import annotations

import json
import os
import struct
import unicodedata

import numpy as np
import pytest
import yaml
from PIL import Image

from multiseg_d2.data.decode import BadFileError, decode_index, open_file, read_image
from multiseg_d2.data.files import DatasetFilesError, list_pairs
from multiseg_d2.data.labels import LabelReader
from multiseg_d2.data.spec import SpecError, load_spec
from multiseg_d2.text_file import read_text

IDS = np.random.default_rng(0).integers(0, 20, (32, 40)).astype(np.uint8)


def split_of(folder, *, top=None, **split):
    content = {"name": "own", "classes": [{"name": "road", "raw": [1]}, {"name": "sky", "raw": [3]}], **(top or {})}
    content["splits"] = {"train": {"images": "./im/{id}.jpg", **split}}
    (folder / "own.yaml").write_text(yaml.safe_dump(content))
    return load_spec(folder / "own.yaml").splits["train"]


def touch(folder, *names) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def ids_of(folder, **split) -> list[str]:
    return [r["image_id"] for r in list_pairs(split_of(folder, **split), str(folder))]


# ---- text files ----


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_text_of_windows_programs_is_read(tmp_path, encoding, newline):
    (tmp_path / "list.txt").write_bytes(newline.join(("a", "f\u00fcnf", "")).encode(encoding))
    assert read_text(tmp_path / "list.txt") == "a\nf\u00fcnf\n"
    touch(tmp_path, "im/a.jpg", "im/f\u00fcnf.jpg", "im/other.jpg")
    assert ids_of(tmp_path, ids="./list.txt", annotation="none") == ["a", "f\u00fcnf"]


@pytest.mark.parametrize("content", ["a\nf\u00fcnf\n".encode("latin-1"), "a\nb\n".encode("utf-16-le")])
def test_text_in_another_encoding_is_refused_with_its_path(tmp_path, content):
    (tmp_path / "list.txt").write_bytes(content)
    touch(tmp_path, "im/a.jpg")
    with pytest.raises(DatasetFilesError, match=r"list.txt: .*encoding UTF-8.*save the file as UTF-8"):
        ids_of(tmp_path, ids="./list.txt", annotation="none")


def test_specs_and_annotation_files_may_carry_a_mark(tmp_path):
    split_of(tmp_path, annotation="none")
    text = (tmp_path / "own.yaml").read_text()
    (tmp_path / "own.yaml").write_text(text, encoding="utf-8-sig")
    assert load_spec(tmp_path / "own.yaml").name == "own"
    (tmp_path / "own.yaml").write_bytes(b"# caf\xe9\n" + text.encode())
    with pytest.raises(SpecError, match=r"own.yaml: line 1 is not in the encoding UTF-8"):
        load_spec(tmp_path / "own.yaml")
    touch(tmp_path, "im/a.jpg")
    weak(tmp_path, {}, encoding="utf-8-sig")
    assert len(records(tmp_path)) == 1


# ---- names and folders ----


def test_extensions_in_capitals_are_read(tmp_path):
    touch(tmp_path, "im/0.jpg", "im/1.JPG", "im/2.Jpg", "gt/0.PNG", "gt/1.png", "gt/2.png")
    assert ids_of(tmp_path, labels="./gt/{id}.png") == ["0", "1", "2"]
    (tmp_path / "list.txt").write_text("1\n0\n")
    assert ids_of(tmp_path, labels="./gt/{id}.png", ids="./list.txt") == ["1", "0"]
    touch(tmp_path, "im/1.jpg")
    with pytest.raises(DatasetFilesError, match="two files have the id '1'"):
        ids_of(tmp_path, labels="./gt/{id}.png")


def test_only_the_extension_may_differ(tmp_path):
    touch(tmp_path, "im/a_left.jpg", "im/b_LEFT.jpg")
    assert ids_of(tmp_path, images="./im/{id}_left.jpg", annotation="none") == ["a"]


def test_pictures_that_no_pattern_takes_are_named(tmp_path, caplog):
    touch(tmp_path, "im/a.jpg", "im/b.jpeg", "im/c.png", "im/readme.txt", "im/a_gt.png")
    assert ids_of(tmp_path, labels="./im/{id}_gt.png") == ["a"]
    (message,) = [r.getMessage() for r in caplog.records]
    assert "no pattern of the spec takes are left out: 2" in message and "b.jpeg" in message and "c.png" in message
    assert "a_gt" not in message and "readme" not in message


def test_loops_of_links_end(tmp_path):
    touch(tmp_path, "im/0.jpg", "im/city/1.jpg")
    os.symlink(".", tmp_path / "im" / "self")
    os.symlink("..", tmp_path / "im" / "city" / "up")
    os.symlink(tmp_path / "im", tmp_path / "im" / "city" / "absolute")
    assert ids_of(tmp_path, annotation="none") == ["0", "city/1"]
    touch(tmp_path, "elsewhere/2.jpg")
    os.symlink(tmp_path / "elsewhere", tmp_path / "im" / "more")  # no loop: read as before
    assert ids_of(tmp_path, annotation="none") == ["0", "city/1", "more/2"]


NFC, NFD = (unicodedata.normalize(form, "Zu\u0308rich") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(("image", "label"), [(NFC, NFD), (NFD, NFC), (NFD, NFD)])
def test_accents_pair_in_either_form(tmp_path, image, label):
    touch(tmp_path, f"im/{image}.jpg", f"gt/{label}.png")
    assert ids_of(tmp_path, labels="./gt/{id}.png") == [NFC]
    (tmp_path / "list.txt").write_text(f"{image}\n", encoding="utf-8")
    assert ids_of(tmp_path, labels="./gt/{id}.png", ids="./list.txt") == [NFC]


def test_names_that_look_alike_are_explained(tmp_path):
    touch(tmp_path, f"im/{NFC}.jpg", f"im/{NFD}.jpg")
    if len(os.listdir(tmp_path / "im")) == 1:
        pytest.skip("this file system keeps one form only")
    with pytest.raises(DatasetFilesError, match="differ only in how their accents are encoded"):
        ids_of(tmp_path, annotation="none")


# ---- numbers of JSON files ----

BOX = {"id": 9, "image_id": 5, "category_id": 3, "bbox": [1, 2, 3, 4]}


def weak(folder, changes, images=({"id": 5, "file_name": "a.jpg", "width": 8, "height": 6},), encoding="utf-8") -> None:
    content = {"images": list(images), "annotations": [{**BOX, **changes}]}
    (folder / "boxes.json").write_text(json.dumps(content), encoding=encoding)


def records(folder, annotation="box"):
    return list_pairs(split_of(folder, annotation=annotation, annotation_file="./boxes.json"), str(folder))


@pytest.mark.parametrize(
    "changes",
    [
        {"category_id": 3.0},
        {"image_id": "5"},
        {"image_id": 5.0},
        {"iscrowd": False},
        {"iscrowd": None},
        {"iscrowd": 0.0},
    ],
)
def test_numbers_that_are_written_in_another_way(tmp_path, changes):
    touch(tmp_path, "im/a.jpg")
    weak(tmp_path, changes)
    (box,) = records(tmp_path)[0]["annotations"]
    assert (box["category_id"], box["bbox"], box["iscrowd"]) == (1, [1.0, 2.0, 4.0, 6.0], 0)
    assert isinstance(box["category_id"], int)
    if "iscrowd" not in changes:
        assert records(tmp_path, "tag")[0]["image_tags"] == [1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bbox": [1, 2, float("nan"), 4]}, "'bbox' has NaN, which is no number: .*'id': 9"),
        ({"bbox": [1, 2, float("inf"), 4]}, "'bbox' has Infinity, which is no number: .*'id': 9"),
        ({"bbox": [1, 2, "3", 4]}, "annotation 9 of a.jpg: bbox .*'3', not a number"),
        ({"bbox": [1, None, 3, 4]}, "annotation 9 of a.jpg: bbox .*None, not a number"),
        ({"bbox": "1234"}, r"annotation 9 of a.jpg: bbox is '1234', not \[x, y, w, h\]"),
        ({"category_id": 3.5}, "category_id of annotation 9 .* is 3.5, not a whole number"),
        ({"iscrowd": 0.5}, "annotation 9 of a.jpg is 0.5, not a whole number"),
        ({"image_id": 6}, r"annotations of images that `images` does not list: image_id 6 \(1 annotations\)"),
        ({"image_id": "a.jpg"}, r"does not list: image_id a.jpg"),
    ],
)
def test_numbers_that_are_none(tmp_path, changes, message):
    touch(tmp_path, "im/a.jpg")
    weak(tmp_path, changes)
    with pytest.raises(DatasetFilesError, match=f"boxes.json: .*{message}"):
        records(tmp_path)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([{"id": 5, "file_name": "a.jpg"}, {"id": 5.0, "file_name": "b.jpg"}], "several images have the id 5"),
        ([{"id": 5, "file_name": "a.jpg", "width": "8"}, {"id": 6, "file_name": "b.jpg"}], "width of a.jpg is '8'"),
        ([{"id": 5, "file_name": "a.jpg"}, {"id": 1.5, "file_name": "b.jpg"}], "image id is 1.5, not a whole number"),
    ],
)
def test_images_of_a_json(tmp_path, images, message):
    touch(tmp_path, "im/a.jpg", "im/b.jpg")
    weak(tmp_path, {}, images)
    with pytest.raises(DatasetFilesError, match=message):
        records(tmp_path)


def test_json_and_file_system_may_encode_accents_differently(tmp_path):
    touch(tmp_path, f"im/{NFD}.jpg")
    weak(tmp_path, {}, [{"id": 5, "file_name": f"{NFC}.jpg"}])
    assert len(records(tmp_path)[0]["annotations"]) == 1


PANOPTIC = {"encoding": "panoptic", "ignore": [0]}


def panoptic(folder, segments):
    touch(folder, "im/a.jpg", "gt/a.png")
    content = {"annotations": [{"file_name": "a.png", "segments_info": segments}]}
    (folder / "pan.json").write_text(json.dumps(content))
    split = split_of(folder, top=PANOPTIC, labels="./gt/{id}.png", annotation_file="./pan.json")
    return split.spec, list_pairs(split, str(folder))


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([{"id": 7, "category_id": 1}, {"id": 7.0, "category_id": 3}], "lists twice: segment 7"),
        ([{"id": 7, "category_id": 1}, {"id": 7, "category_id": 1}], "lists twice: segment 7"),
        ([{"id": 7, "category_id": 1.5}], "category_id is 1.5, not a whole number"),
        ([{"id": "x", "category_id": 1}], "id is 'x', not a whole number"),
        ([{"id": 7}], "not in COCO's form"),
    ],
)
def test_segments_that_cannot_be_meant(tmp_path, segments, message):
    with pytest.raises(DatasetFilesError, match=f"pan.json.*{message}"):
        panoptic(tmp_path, segments)


def test_segments_with_whole_numbers_as_floats(tmp_path):
    _, (record,) = panoptic(tmp_path, [{"id": 7.0, "category_id": 3.0, "area": 1.5}])
    assert record["segments_info"] == [{"id": 7, "category_id": 3, "area": 1.5}]


def test_segments_that_other_code_lists_twice(tmp_path):
    spec, (record,) = panoptic(tmp_path, [{"id": 7, "category_id": 1}])
    record["segments_info"] = [{"id": 7, "category_id": 1}, {"id": 7, "category_id": 3}]
    with pytest.raises(BadFileError, match=r"a.png: .*a segment id stands twice"):
        LabelReader.from_spec(spec).to_raw(np.zeros((2, 2, 3), np.uint8), record)


# ---- label maps ----


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.png", {}),
        ("a.tif", {}),
        ("lzw.tif", {"compression": "tiff_lzw"}),
        ("deflate.tif", {"compression": "tiff_adobe_deflate"}),
        ("a.bmp", {}),
        ("a.gif", {}),
    ],
)
def test_containers_that_keep_ids(tmp_path, name, options):
    Image.fromarray(IDS).save(tmp_path / name, **options)
    assert decode_index(open_file(str(tmp_path / name))).tolist() == IDS.tolist()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.jpg", {}),
        ("a.tif", {"compression": "jpeg"}),
        ("a.jp2", {"irreversible": True, "quality_layers": [30]}),
        ("a.webp", {}),
        ("a.avif", {}),
    ],
)
@pytest.mark.parametrize("encoding", ["index", "color"])
def test_lossy_labels_are_refused_whatever_the_container(tmp_path, name, options, encoding):
    image = Image.fromarray(IDS if encoding == "index" else np.repeat(IDS[..., None], 3, 2))
    try:
        image.save(tmp_path / name, **options)
    except (OSError, KeyError, ValueError) as problem:
        pytest.skip(f"this Pillow cannot write {name}: {problem}")
    table = (np.array([0], np.uint32), np.array([0], np.uint16)) if encoding == "color" else None
    reader = LabelReader(encoding, np.zeros(65536, np.uint8), table)
    with pytest.raises(BadFileError, match=rf"{name}: a label map cannot be an? \w+ like this: .* changes ids"):
        reader.decode(open_file(str(tmp_path / name)))


def bmp(pixels: np.ndarray, bits: int, greys) -> bytes:
    """A BMP of 4 or 8 bits with a palette of greys."""
    rows = b""
    for row in pixels[::-1].tolist():
        line = bytes(row) if bits == 8 else bytes(row[i] << 4 | row[i + 1] for i in range(0, len(row), 2))
        rows += line + b"\0" * (-len(line) % 4)
    palette = b"".join(bytes([g, g, g, 0]) for g in greys)
    offset, (height, width) = 54 + len(palette), pixels.shape
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, 0, len(rows), 2835, 2835, len(greys), 0)
    return b"BM" + struct.pack("<IHHI", offset + len(rows), 0, 0, offset) + header + palette + rows


@pytest.mark.parametrize("greys", [range(256), range(16), [*range(10, 30)]])
def test_bmp_labels_of_8_bits_hold_what_is_stored(tmp_path, greys):
    ids = np.arange(12, dtype=np.uint8).reshape(3, 4)
    (tmp_path / "a.bmp").write_bytes(bmp(ids, 8, greys))
    assert decode_index(open_file(str(tmp_path / "a.bmp"))).tolist() == ids.tolist()


@pytest.mark.parametrize(("bits", "greys"), [(4, range(16)), (8, (0, 255))])
def test_other_bmp_labels_are_refused(tmp_path, bits, greys):
    (tmp_path / "a.bmp").write_bytes(bmp(np.arange(12, dtype=np.uint8).reshape(3, 4) % 2, bits, greys))
    with pytest.raises(BadFileError, match=r"a.bmp: a label map cannot be a BMP like this.*Export it as PNG"):
        decode_index(open_file(str(tmp_path / "a.bmp")))


def test_tiff_labels_that_are_upside_down_are_refused(tmp_path):
    Image.fromarray(IDS).save(tmp_path / "a.tif", tiffinfo={262: 0})
    with Image.open(tmp_path / "a.tif") as image:
        assert image.tag_v2[262] == 0  # white is 0
    with pytest.raises(BadFileError, match="a.tif: .*upside down"):
        decode_index(open_file(str(tmp_path / "a.tif")))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.tif", "a.png"])
def test_orientation_is_corrected_once(tmp_path, orientation, name):
    exif = Image.Exif()
    exif[274] = orientation
    options = {"tiffinfo": {274: orientation}} if name == "a.tif" else {"exif": exif}
    Image.fromarray(IDS).save(tmp_path / name, **options)
    expected = {
        1: IDS,
        2: IDS[:, ::-1],
        3: IDS[::-1, ::-1],
        4: IDS[::-1],
        5: IDS.T,
        6: IDS[::-1].T,
        7: IDS[::-1, ::-1].T,
        8: IDS[:, ::-1].T,
    }[orientation]
    file = open_file(str(tmp_path / name))
    assert (file.height, file.width) == expected.shape
    assert decode_index(file).tolist() == expected.tolist()
    assert read_image(str(tmp_path / name))[..., 0].tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.png", b"", "the file is empty"),
        ("a.npy", b"\x93NUMPY\x01\x00v\x00", "a NumPy array: save label maps as 8- or 16-bit grey PNG"),
        ("a.png", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        ("a.png", b"<!DOCTYPE html><html>404</html>", "a web page or XML"),
        ("a.png", b"\x00\x01\x02", "of no known format"),
    ],
)
def test_files_that_are_no_pictures(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadFileError, match=message) as problem:
        open_file(str(tmp_path / name))
    assert "BytesIO" not in str(problem.value) and str(tmp_path / name) in str(problem.value)


def test_float_labels_are_told_what_to_become(tmp_path):
    Image.fromarray(IDS.astype(np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(BadFileError, match="numbers of 32 bits.*8- or 16-bit grey PNG") as problem:
        decode_index(open_file(str(tmp_path / "a.tif")))
    assert "colours" not in str(problem.value)


def test_messages_speak_english(tmp_path):
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(BadFileError, match="this is an 8-bit RGB PNG"):
        decode_index(open_file(str(tmp_path / "a.png")))
    Image.fromarray(IDS).save(tmp_path / "grey.png")
    reader = LabelReader("color", np.zeros(65536, np.uint8), (np.array([0], np.uint32), np.array([0], np.uint16)))
    with pytest.raises(BadFileError, match="an 8-bit grey PNG.*made from a picture in colours"):
        reader.decode(open_file(str(tmp_path / "grey.png")))


def test_pictures_beyond_pillows_limit_come_with_a_remedy(tmp_path, monkeypatch):
    Image.fromarray(IDS).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadFileError, match=r"a.png: .*Cut or shrink.*PIL.Image.MAX_IMAGE_PIXELS"):
        open_file(str(tmp_path / "a.png"))
