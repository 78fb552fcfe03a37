"""Every kind of source gives the images and labels that were written to it, and says what is wrong with others."""

from __future__ import annotations

import io
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradstore.adapters.images.entries import Entry, ImageSource
from gradstore.adapters.images.sources import FolderImages, open_images
from gradstore.errors import DataError, SpecError
from gradstore.spec import SplitSection
from tests.pictures import CLASSES, draw, encode, write_folder, write_idx, write_npz, write_parquet

COUNT = 7


def source(path: Path, **options: Any) -> ImageSource:
    return open_images(SplitSection(source=str(path), **options), "data.train")


def folder_source(folder: Path) -> tuple[ImageSource, list[Entry]]:
    images, classes = draw(COUNT)
    write_folder(folder / "pictures", images, classes)
    entries = [Entry(image_id=f"{CLASSES[row % 3]}/{row:03d}.png", label=CLASSES[row % 3]) for row in range(COUNT)]
    return source(folder / "pictures"), sorted(entries, key=lambda entry: entry.image_id)


def npz_source(folder: Path) -> tuple[ImageSource, list[Entry]]:
    path = write_npz(folder / "a.npz", *draw(COUNT))
    return source(path), [Entry(image_id=f"a.npz:{row}", label=row % 3) for row in range(COUNT)]


def idx_source(folder: Path) -> tuple[ImageSource, list[Entry]]:
    images, classes = draw(COUNT)
    path = write_idx(folder / "images.idx", images)
    labels = write_idx(folder / "labels.idx.gz", classes)
    return source(path, labels=str(labels)), [
        Entry(image_id=f"images.idx:{row}", label=row % 3) for row in range(COUNT)
    ]


def parquet_source(folder: Path) -> tuple[ImageSource, list[Entry]]:
    images, classes = draw(COUNT)
    files = [encode(pixels) for pixels in images]
    (folder / "table").mkdir()
    write_parquet(folder / "table" / "0.parquet", files[:4], classes[:4].tolist(), names=CLASSES)
    write_parquet(folder / "table" / "1.parquet", files[4:], classes[4:].tolist(), names=CLASSES)
    names = ["0.parquet:0", "0.parquet:1", "0.parquet:2", "0.parquet:3", "1.parquet:0", "1.parquet:1", "1.parquet:2"]
    return source(folder / "table"), [Entry(image_id=n, label=CLASSES[row % 3]) for row, n in enumerate(names)]


WRITERS = (folder_source, npz_source, idx_source, parquet_source)


@pytest.mark.parametrize("write", WRITERS)
def test_a_source_gives_the_images_and_labels_that_were_written(
    write: Callable[[Path], tuple[ImageSource, list[Entry]]], tmp_path: Path
) -> None:
    images, _ = draw(COUNT)
    opened, expected = write(tmp_path)

    entries = opened.entries()

    assert entries == expected
    rows = list(range(COUNT))
    if isinstance(opened, FolderImages):
        rows = [int(entry.image_id.split("/")[1].removesuffix(".png")) for entry in entries]
    for chosen in (list(range(COUNT)), [1, 2, 6], [5], []):
        found = list(opened.pixels(chosen))
        assert len(found) == len(chosen)
        for place, pixels in zip(chosen, found, strict=True):
            np.testing.assert_array_equal(pixels, images[rows[place]])


def test_arrays_and_tables_may_name_their_columns_and_ids(tmp_path: Path) -> None:
    images, classes = draw(COUNT)
    np.savez(tmp_path / "a.npz", x=images, y=[CLASSES[number] for number in classes], key=np.arange(COUNT) + 10)
    table = write_parquet(tmp_path / "b.parquet", [encode(pixels) for pixels in images], classes.tolist())

    archive = source(tmp_path / "a.npz", image="x", label="y", id="key")

    assert archive.entries()[1] == Entry(image_id="11", label="cat")
    np.testing.assert_array_equal(next(archive.pixels([3])), images[3])
    assert source(table, id="key").entries()[2] == Entry(image_id="k2", label=2)


def test_plain_bytes_and_captions_of_a_table_are_read(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images, _ = draw(2)
    columns = {"image": [encode(pixels) for pixels in images], "label": ["cat", "dog"], "text": ["a cat", None]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")

    opened = source(tmp_path / "a.parquet")

    assert [entry.text for entry in opened.entries()] == ["a cat", ""]
    np.testing.assert_array_equal(list(opened.pixels([0, 1])), images)


def test_the_class_of_a_file_is_the_first_folder_whatever_lies_below(tmp_path: Path) -> None:
    (tmp_path / "cat" / "of" / "2020").mkdir(parents=True)
    (tmp_path / "cat" / "of" / "2020" / "a.JPG").write_bytes(encode(draw(1)[0][0], "JPEG"))
    (tmp_path / "alone.jpeg").write_bytes(encode(draw(1)[0][0], "JPEG"))
    (tmp_path / "cat" / "notes.txt").write_text("no image")

    entries = source(tmp_path).entries()

    assert entries == [Entry(image_id="alone.jpeg", label=None), Entry(image_id="cat/of/2020/a.JPG", label="cat")]


def test_a_class_that_datasets_does_not_know_is_no_label(tmp_path: Path) -> None:
    image = encode(draw(1)[0][0])
    path = write_parquet(tmp_path / "a.parquet", [image, image, image], [1, -1, None], names=CLASSES)

    opened = source(path)

    assert [entry.label for entry in opened.entries()] == ["cat", None, None]
    assert opened.names == CLASSES


def damaged_folder(folder: Path) -> ImageSource:
    write_folder(folder / "pictures", *draw(2))
    (folder / "pictures" / "bird" / "000.png").write_bytes(encode(draw(1)[0][0])[:60])
    return source(folder / "pictures")


def other_format(folder: Path) -> ImageSource:
    (folder / "cat").mkdir()
    (folder / "cat" / "a.png").write_bytes(encode(draw(1)[0][0], "GIF"))
    return source(folder)


def deep_pixels(folder: Path) -> ImageSource:
    (folder / "cat").mkdir()
    (folder / "cat" / "a.png").write_bytes(encode(np.zeros((4, 4), np.uint16)))
    return source(folder)


def no_bytes(folder: Path) -> ImageSource:
    return source(write_parquet(folder / "a.parquet", [encode(draw(1)[0][0]), None], [0, 1]))


def short_idx(folder: Path) -> ImageSource:
    path = write_idx(folder / "images.idx", draw(3)[0])
    path.write_bytes(path.read_bytes()[:-1])
    return source(path, labels=str(write_idx(folder / "labels.idx", np.arange(3))))


def short_gz(folder: Path) -> ImageSource:
    path = write_idx(folder / "images.idx.gz", draw(30)[0])
    path.write_bytes(path.read_bytes()[:-20])
    return source(path, labels=str(write_idx(folder / "labels.idx", np.arange(30))))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (damaged_folder, r"data\.train: bird/000\.png is no PNG or JPEG image that can be read: .*Mend or remove it"),
        (other_format, r"cat/a\.png is no PNG or JPEG image"),
        (deep_pixels, r"cat/a\.png has more than 8 bits a channel \(mode I;16\)"),
        (no_bytes, r"row 1 of a\.parquet, group 0: column 'image' holds no image but only a path, '1\.png'"),
        (short_idx, r"images\.idx ends in its row 2 of 3"),
        (short_gz, r"images\.idx\.gz cannot be read: EOFError"),
    ],
)
def test_an_image_that_cannot_be_read_is_named(
    write: Callable[[Path], ImageSource], message: str, tmp_path: Path
) -> None:
    opened = write(tmp_path)
    places = range(len(opened.entries()))

    with pytest.raises(DataError, match=message):
        list(opened.pixels(list(places)))


def objects_in_npz(folder: Path) -> ImageSource:
    np.savez(folder / "a.npz", image=draw(2)[0], label=np.array([{}, {}], object))
    return source(folder / "a.npz")


def fewer_labels(folder: Path) -> ImageSource:
    labels = write_idx(folder / "labels.idx", np.arange(2))
    return source(write_idx(folder / "images.idx", draw(3)[0]), labels=str(labels))


def no_idx(folder: Path) -> ImageSource:
    (folder / "images").write_text("no such thing")
    return source(folder / "images", format="idx", labels=str(folder / "images"))


def broken(name: str) -> Callable[[Path], ImageSource]:
    def write(folder: Path) -> ImageSource:
        (folder / name).write_bytes(b"PK\x03\x04 and nothing else")
        return source(folder / name)

    return write


def npz_with(**options: Any) -> Callable[[Path], ImageSource]:
    return lambda folder: source(write_npz(folder / "a.npz", *draw(2)), **options)


def folder_with(**options: Any) -> Callable[[Path], ImageSource]:
    return lambda folder: source(write_folder(folder / "pictures", *draw(2)), **options)


def two_kinds(folder: Path) -> ImageSource:
    write_npz(folder / "a.npz", *draw(2))
    return source(write_folder(folder, *draw(2)))


@pytest.mark.parametrize(
    ("write", "error", "message"),
    [
        (
            lambda folder: source(folder / "nowhere"),
            DataError,
            r"data\.train\.source: .*there is no such file or folder",
        ),
        (two_kinds, DataError, r"holds npz and images\. Set data\.train\.format to images, idx, npz, parquet"),
        (folder_with(format="jsonl"), SpecError, r"format: found 'jsonl'; images are read as .*hf://datasets"),
        (folder_with(format="parquet"), DataError, r"has no \.parquet files; it holds bird/000\.png"),
        (folder_with(label="topic"), SpecError, r"image files have no columns\. Found label = 'topic'"),
        (npz_with(image="x"), DataError, r"data\.train\.image: a\.npz has no array 'x'; it has: image, label, name"),
        (npz_with(label="x"), DataError, r"data\.train\.label: a\.npz has no array 'x'"),
        (objects_in_npz, DataError, r"array 'label' of a\.npz is object \[2\]; accepted: plain rows"),
        (broken("a.npz"), DataError, r"a\.npz cannot be read: BadZipFile"),
        (broken("a.parquet"), DataError, r"a\.parquet cannot be read as parquet"),
        (fewer_labels, DataError, r"labels\.idx has 2 labels, .*images\.idx 3 images"),
        (no_idx, DataError, r"is no IDX file: it begins with b'no s'"),
    ],
)
def test_a_source_that_is_not_what_run_toml_says_is_refused(
    write: Callable[[Path], ImageSource], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        write(tmp_path).entries()


@pytest.mark.parametrize("write", WRITERS)
def test_a_source_behind_a_url_is_read_as_one_on_a_disk(
    write: Callable[[Path], tuple[ImageSource, list[Entry]]], tmp_path: Path
) -> None:
    import fsspec

    opened, expected = write(tmp_path)
    memory, root = fsspec.filesystem("memory"), f"/{uuid.uuid4().hex}"
    memory.put(f"{tmp_path}/", root, recursive=True)
    split = opened.split  # type: ignore[attr-defined]
    moved = {
        key: f"memory:/{root}{path.removeprefix(str(tmp_path))}"
        for key in ("source", "labels")
        if (path := getattr(split, key))
    }

    found = open_images(split.model_copy(update=moved), "data.train")

    assert found.entries() == expected
    np.testing.assert_array_equal(list(found.pixels([0, 4])), list(opened.pixels([0, 4])))


def test_gray_palette_and_transparent_files_become_gray_or_colour(tmp_path: Path) -> None:
    from PIL import Image

    colour = Image.fromarray(draw(1)[0][0])
    forms = {"L": (8, 8), "1": (8, 8), "LA": (8, 8), "P": (8, 8, 3), "RGBA": (8, 8, 3), "RGB": (8, 8, 3)}
    (tmp_path / "any").mkdir()
    for mode in forms:
        file = io.BytesIO()
        colour.convert(mode).save(file, "PNG")
        (tmp_path / "any" / f"{mode}.png").write_bytes(file.getvalue())

    opened = source(tmp_path)

    found = {entry.image_id: pixels for entry, pixels in zip(opened.entries(), opened.pixels(range(6)), strict=True)}
    assert {name[4:-4]: pixels.shape for name, pixels in found.items()} == forms
    np.testing.assert_array_equal(found["any/RGBA.png"], found["any/RGB.png"])
