"""smalti check-data: what it finds, what it writes, and its exit status."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from smalti.cli import main
from smalti.data.dataset import ImageDataset
from smalti.data.sources.base import open_source
from tests.data.test_decoding import UNREADABLE


@pytest.fixture
def check(tmp_path: Path):
    """Run the command; its exit status, the report and the list of bad files."""

    def run(data: str, *arguments: str) -> tuple[int, dict, list[str]]:
        listed, report = tmp_path / "out" / "bad.txt", tmp_path / "out" / "report.json"
        flags = ["--data", data, "--bad_files", str(listed), "--json", str(report), *arguments]
        status = main(["check-data", *flags])
        written = listed.read_bytes() if listed.is_file() else b""
        assert written or not listed.exists()  # no empty list
        lines = written.decode(errors="surrogateescape").splitlines()
        return status, json.loads(report.read_text()), lines

    return run


def test_a_good_set_passes(pictures: Path, check, capsys) -> None:
    status, report, bad = check(str(pictures))
    assert status == 0 and bad == [] and report["bad"] == []
    assert report["classes"] == {"blue": 8, "green": 8, "red": 8} and report["pictures"] == 24
    assert report["width"] == {"min": 40, "median": 40, "max": 40}
    assert report["height"] == {"min": 36, "median": 36, "max": 36}
    assert report["modes"] == {"RGB": 24}
    out = capsys.readouterr().out
    assert "24 pictures, 0 of them bad" in out and "width: 40 to 40 pixels, median 40" in out


def test_the_reported_split_is_that_of_training(pictures: Path, check) -> None:
    _, report, _ = check(str(pictures), "--heldout_fraction", "0.3", "--split_seed", "5")
    for split in ("train", "heldout"):
        images = ImageDataset(
            open_source(str(pictures)), 16, split=split, heldout_fraction=0.3, split_seed=5
        )
        assert report[split] == len(images)


def test_every_bad_file_is_listed_with_its_reason(pictures: Path, check, capsys) -> None:
    cut = (pictures / "red" / "0.png").read_bytes()[:-60]
    (pictures / "red" / "cut.png").write_bytes(cut)
    (pictures / "green" / "empty.jpg").write_bytes(b"")
    Image.new("I;16", (20, 30), 9).save(pictures / "blue" / "deep.png")
    Image.new("RGB", (4, 400)).save(pictures / "blue" / "thin.png")
    status, report, bad = check(str(pictures))
    assert status == 1 and report["pictures"] == 28 and len(bad) == 4
    reasons = dict(line.split("\t") for line in bad)
    assert "--value_range 0 255" in reasons[str(pictures / "blue" / "deep.png")]
    assert "less than 8 on a side" in reasons[str(pictures / "blue" / "thin.png")]
    assert "cannot be decoded" in reasons[str(pictures / "green" / "empty.jpg")]
    assert "cannot be decoded" in reasons[str(pictures / "red" / "cut.png")]
    assert [line.split("\t")[0] for line in bad] == [entry["place"] for entry in report["bad"]]
    assert report["classes"] == {"blue": 8, "green": 8, "red": 8}  # those that can be used
    assert report["train"] + report["heldout"] == 24
    out = capsys.readouterr().out
    assert "28 pictures, 4 of them bad" in out and "bad files: 4, listed in" in out
    for place, reason in reasons.items():
        assert f"bad: {place} {reason}\n" in out
    status, report, bad = check(str(pictures), "--folder.unusual_images", "convert")
    assert status == 1 and len(bad) == 3 and report["modes"] == {"RGB": 24, "I;16": 1}


def test_the_list_of_an_earlier_check_is_replaced(pictures: Path, check) -> None:
    (pictures / "red" / "empty.png").write_bytes(b"")
    assert check(str(pictures))[0] == 1
    (pictures / "red" / "empty.png").unlink()
    status, _, bad = check(str(pictures))
    assert status == 0 and bad == []


def test_many_bad_files_are_named_up_to_a_number(pictures: Path, check, capsys) -> None:
    for path in [*(pictures / "red").iterdir(), *(pictures / "green").iterdir()]:
        path.write_bytes(b"")
    for number in range(9):
        (pictures / "blue" / f"bad{number}.png").write_bytes(b"")
    _, _, bad = check(str(pictures))
    out = capsys.readouterr().out.splitlines()
    assert len(bad) == 25 and sum(line.startswith("bad: /") for line in out) == 20
    assert "bad: 5 more" in out


def test_what_is_passed_over_and_what_is_recognised_is_noted(pictures: Path, check) -> None:
    (pictures / "notes.txt").write_text("")
    for split in ("train", "val"):
        for name in ("red", "green"):
            (pictures / split / name).mkdir(parents=True)
    for name in ("red", "green"):
        for number in range(8):
            split = "val" if number < 3 else "train"
            file = f"{number}.png"
            (pictures / name / file).rename(pictures / split / name / file)
        (pictures / name).rmdir()
    for path in (pictures / "blue").iterdir():
        path.unlink()
    (pictures / "blue").rmdir()
    status, report, _ = check(str(pictures))
    assert status == 0 and (report["train"], report["heldout"]) == (10, 6)
    assert any("are splits: 10 pictures of train are read" in note for note in report["remarks"])
    assert any("1 .txt (notes.txt)" in note for note in report["remarks"])


def test_a_name_in_a_note_is_printable(pictures: Path, check, capsys) -> None:
    try:
        (pictures / "red" / "\udcff\x1b.png").write_bytes(UNREADABLE["text.png"])
    except OSError:
        pytest.skip("this file system has Unicode names only")
    status, report, _ = check(str(pictures))
    out = capsys.readouterr().out
    assert status == 0 and "metadata are ignored" in out and out.encode() and "\x1b" not in out
    assert any("metadata are ignored" in remark for remark in report["remarks"])


def test_copies_are_found_within_and_across_classes(pictures: Path, check) -> None:
    original = (pictures / "red" / "3.png").read_bytes()
    (pictures / "red" / "again.png").write_bytes(original)
    (pictures / "blue" / "wrong.png").write_bytes(original)
    status, report, _ = check(str(pictures))
    assert status == 0
    found = report["duplicates"]
    assert found["extra"] == 2 and found["across_classes"] == 2  # both reds beside a blue
    assert [sorted(Path(name).name for name in group) for group in found["groups"]] == [
        ["3.png", "again.png", "wrong.png"]
    ]
    assert any("two labels" in remark for remark in report["remarks"])


def test_sizes_are_those_of_upright_pictures(pictures: Path, check) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (100, 50)).save(pictures / "red" / "turned.jpg", exif=exif)
    _, report, _ = check(str(pictures))
    assert report["width"]["max"] == 50 and report["height"]["max"] == 100


def test_one_class_and_small_ones_are_remarked(pictures: Path, check) -> None:
    _, report, _ = check(str(pictures / "red"))
    assert report["classes"] == {} and report["captions"] is None
    assert any("have no classes" in remark for remark in report["remarks"])
    for name in ("red", "green"):
        shutil.rmtree(pictures / name)
    _, report, _ = check(str(pictures))
    assert any('one class ("blue")' in remark for remark in report["remarks"])
    _, report, _ = check(str(pictures), "--folder.single_class")
    assert any("fewer than 10" in remark for remark in report["remarks"])


def test_a_manifest_is_written_for_shards_alone(pictures: Path, tmp_path: Path, check) -> None:
    import webdataset

    folder = tmp_path / "shards"
    folder.mkdir()
    with webdataset.ShardWriter(f"{folder}/%03d.tar", maxcount=10, verbose=0) as writer:
        for number, path in enumerate(sorted(pictures.glob("*/*.png"))):
            label = path.parent.name
            sample = {"__key__": str(number), "png": path.read_bytes(), "cls": label.encode()}
            writer.write(sample)
    assert check(f"{folder}/{{000..002}}.tar", "--write_manifest")[0] == 0
    manifest = folder / "manifest.json"
    assert json.loads(manifest.read_text()) == {
        "shards": {"000.tar": 10, "001.tar": 10, "002.tar": 4}
    }
    assert main(["check-data", "--data", str(pictures), "--write_manifest"]) == 2
    content = (folder / "002.tar").read_bytes()
    (folder / "002.tar").write_bytes((folder / "001.tar").read_bytes())
    listed = str(tmp_path / "bad.txt")
    assert main(["check-data", "--data", str(folder), "--bad_files", listed]) == 2
    (folder / "002.tar").write_bytes(content)
    assert main(["check-data", "--data", str(folder), "--bad_files", listed]) == 0


def test_arrays_and_embedded_sets_are_checked_too(tmp_path: Path, check) -> None:
    images = np.random.default_rng(0).integers(0, 255, (6, 9, 8, 3), dtype=np.uint8)
    images[5] = images[1]
    np.savez(tmp_path / "set.npz", images=images, labels=[0, 0, 0, 1, 1, 1])
    status, report, _ = check(str(tmp_path / "set.npz"))
    assert status == 0 and report["classes"] == {"0": 3, "1": 3}
    assert report["duplicates"]["across_classes"] == 1
    assert report["width"]["max"] == 8 and report["height"]["max"] == 9


def test_a_set_without_a_usable_picture_has_no_remark_on_classes(pictures: Path, check) -> None:
    for path in pictures.rglob("*.png"):
        path.write_bytes(b"")
    status, report, _ = check(str(pictures))
    assert (
        status == 1
        and len(report["bad"]) == report["pictures"]
        and not sum(report["classes"].values())
    )
    assert not any("one class only" in remark for remark in report["remarks"])


def test_a_set_that_cannot_be_opened_is_an_error(tmp_path: Path, capsys) -> None:
    assert main(["check-data", "--data", str(tmp_path / "nowhere")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_captions_are_described(pictures: Path, check, capsys) -> None:
    for path in pictures.glob("*/*.png"):
        lines = [f"a {path.parent.name} picture"] + ["caf\u00e9 noir, two of them"] * (
            path.stem == "1"
        )
        path.with_suffix(".txt").write_text("\n".join(lines))
    _, report, _ = check(str(pictures))
    captions = report["captions"]
    assert captions["pictures"] == 24 and captions["several"] == 3
    assert captions["longest"] == 22 and captions["longest_bytes"] == 23
    assert captions["examples"][0] == "a blue picture" and len(captions["examples"]) == 5
    out = capsys.readouterr().out
    assert "captions: 24 pictures have one, 3 of them several; the longest has 22" in out
    assert "(the text files beside the pictures)" in out and "  a green picture" in out
    (pictures / "red" / "2.txt").unlink()
    _, report, _ = check(str(pictures))
    assert report["captions"]["pictures"] == 23
    assert any("1 of the 24 pictures of" in remark for remark in report["remarks"])
    _, report, _ = check("emoji")
    assert report["captions"]["pictures"] == 5664 and report["captions"]["longest"] > 22


def test_a_set_without_captions_says_so(pictures: Path, check, capsys) -> None:
    _, report, _ = check(str(pictures))
    assert report["captions"] is None and "captions: none" in capsys.readouterr().out
