"""Folders of pictures with captions."""

import json

import numpy as np
import pytest
from PIL import Image

from lorica.data.images import pixels_of, read_image_splits, read_images
from lorica.errors import DataError


def picture(path, size=(6, 4), colour=(255, 0, 0)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def described(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")


def test_metadata_and_texts_give_the_same_records(tmp_path):
    for name in ("a", "b"):
        picture(tmp_path / "m" / f"{name}.png")
        picture(tmp_path / "k" / f"{name}.png")
        (tmp_path / "k" / f"{name}.txt").write_text(f"picture {name}\n", encoding="utf-8")
    rows = [{"file_name": f"{n}.png", "text": f"picture {n}", "more": 1} for n in ("a", "b")]
    described(tmp_path / "m", rows)
    one, two = read_images(tmp_path / "m"), read_images(tmp_path / "k")
    assert [row["caption"] for row in one] == ["picture a", "picture b"]
    assert one.format == "image" and one.digest == two.digest
    assert one.origins[1] == (str(tmp_path / "m" / "metadata.jsonl"), 2)
    assert "2 pictures" in one.statement


def test_the_digest_is_that_of_the_pictures(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("x", encoding="utf-8")
    before = read_images(tmp_path).digest
    picture(tmp_path / "a.png", colour=(0, 255, 0))
    assert read_images(tmp_path).digest != before


def test_all_problems_come_at_once(tmp_path):
    picture(tmp_path / "in" / "a.png")
    picture(tmp_path / "b.png")
    rows = [
        {"file_name": "a.png"},
        {"file_name": "../b.png", "text": "outside"},
        {"file_name": "c.png", "text": "absent"},
        ["no object"],
    ]
    described(tmp_path / "in", rows)
    with pytest.raises(DataError) as caught:
        read_images(tmp_path / "in")
    text = str(caught.value)
    for part in (":1: no caption", ":2: ../b.png lies outside", ":3: there is no", ":4: no JSON"):
        assert part in text


def test_pictures_without_captions_and_no_folder(tmp_path):
    picture(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png: there is no a\.txt"):
        read_images(tmp_path)
    with pytest.raises(DataError, match="is no folder of pictures"):
        read_images(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no pictures"):
        read_images(tmp_path / "empty")


def test_splits(tmp_path):
    for split in ("train", "validation"):
        picture(tmp_path / split / "a.png")
        (tmp_path / split / "a.txt").write_text(split, encoding="utf-8")
    parts = read_image_splits(tmp_path)
    assert {name: part[0]["caption"] for name, part in parts.items()} == {
        "train": "train",
        "valid": "validation",
    }


def test_pixels_are_the_square_in_the_middle(tmp_path):
    wide = np.zeros((4, 12, 3), dtype=np.uint8)
    wide[:, 4:8] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    found = pixels_of(tmp_path / "wide.png", 4, 3)
    assert found.shape == (3, 4, 4) and found.dtype == np.float32
    assert (found == 1).all()
    assert pixels_of(tmp_path / "wide.png", 4, 1).shape == (1, 4, 4)


def test_what_is_no_picture_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n but not more")
    with pytest.raises(DataError, match="cannot be read as a picture"):
        pixels_of(tmp_path / "a.png", 4, 3)
    Image.new("RGB", (4, 4)).save(tmp_path / "b.gif")
    with pytest.raises(DataError, match="cannot be read as a picture"):
        pixels_of(tmp_path / "b.gif", 4, 3)
