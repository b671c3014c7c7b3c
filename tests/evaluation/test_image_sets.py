"""Sets of pictures: the same pictures in any container, statistics, and what is refused."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from smalti.data.dataset import DataOptions
from smalti.data.image_io import FolderOptions
from smalti.errors import DataError
from smalti.evaluation.image_sets import (
    Gaussian,
    ImageSet,
    open_set,
    read_statistics,
    save_statistics,
)
from smalti.files import write_hashed_json


def arrays(count: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 12, 16, 3), dtype=np.uint8)


def png(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


def opened(place: Path, **changes) -> ImageSet:
    found = open_set(str(place), DataOptions(), **changes).pictures
    assert found is not None
    return found


def write_generated(folder: Path, container: str) -> None:
    """A folder as `smalti generate` writes it, of six pictures of two classes with prompts."""
    folder.mkdir(parents=True)
    rows = []
    for index, array in enumerate(arrays()):
        content = array.tobytes() if container == "npz" else png(array)
        sha256 = hashlib.sha256(content).hexdigest()
        row = {"index": index, "seed": 0, "file": f"{index:06d}.png", "sha256": sha256}
        row |= {"class": ["dog", "cat"][index % 2], "label": 7 - 4 * (index % 2)}
        row |= {"prompt": f"picture {index}"}
        if container == "npz":
            row["file"] = "samples.npz"
        elif container == "tar":
            row |= {"file": "shard-000000.tar", "member": row["file"]}
        else:
            (folder / row["file"]).write_bytes(png(array))
        rows.append(row)
    if container == "npz":
        np.savez(folder / "samples.npz", arrays())
    if container == "tar":
        with tarfile.open(folder / "shard-000000.tar", "w") as shard:
            for row, array in zip(rows, arrays(), strict=True):
                content = png(array)
                info = tarfile.TarInfo(row["member"])
                info.size = len(content)
                shard.addfile(info, io.BytesIO(content))
    lines = (json.dumps(row) + "\n" for row in reversed(rows))  # in any order
    (folder / "manifest.jsonl").write_text("".join(lines))


@pytest.mark.parametrize("container", ["folder", "nested", "npz", "adm"])
def test_the_same_pictures_in_any_container(tmp_path: Path, container: str) -> None:
    place = tmp_path / "set"
    if container in ("folder", "nested"):
        for index, array in enumerate(arrays()):
            inside = place / ("abc"[index // 2] if container == "nested" else "")
            inside.mkdir(parents=True, exist_ok=True)
            (inside / f"{index}.png").write_bytes(png(array))
    elif container == "npz":
        place = tmp_path / "set.npz"
        np.savez(place, arr_0=arrays(), labels=np.array([0, 0, 1, 1, 2, 2]))
    else:
        place = tmp_path / "set.npz"
        np.savez(place, arrays(), np.array([0, 0, 1, 1, 2, 2]))  # arr_0 and arr_1
    images = opened(place)
    assert images.shape == (3, 12, 16)
    expected = torch.from_numpy(arrays()).permute(0, 3, 1, 2)
    assert torch.equal(images.levels([5, 0, 3]), expected[[5, 0, 3]])
    if container != "folder":
        assert images.labels is not None and images.labels.tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("container", ["png", "tar", "npz"])
def test_a_generated_folder_has_its_classes_and_prompts(tmp_path: Path, container: str) -> None:
    write_generated(tmp_path / "made", container)
    images = opened(tmp_path / "made")
    expected = torch.from_numpy(arrays()).permute(0, 3, 1, 2)
    assert torch.equal(images.levels(range(6)), expected)
    assert images.labels is not None
    assert [images.classes[label] for label in images.labels] == ["dog", "cat"] * 3
    assert list(images.captions) == [f"picture {index}" for index in range(6)]


def test_an_unfinished_folder_is_refused(tmp_path: Path) -> None:
    write_generated(tmp_path / "made", "png")
    write_hashed_json(tmp_path / "made/generation.json", {"labels": [0] * 6, "seed": 3})
    assert opened(tmp_path / "made").protocol["sampling"] == {"seed": 3}
    write_hashed_json(tmp_path / "made/generation.json", {"labels": [0] * 7, "seed": 3})
    with pytest.raises(DataError, match="has 6 of 7 pictures: finish it"):
        opened(tmp_path / "made")


def test_a_job_without_a_manifest_yet_is_no_plain_folder(tmp_path: Path) -> None:
    """It would be measured with the pictures that are there."""
    write_generated(tmp_path / "made", "png")
    (tmp_path / "made/manifest.jsonl").rename(tmp_path / "made/.manifest-00000.jsonl")
    with pytest.raises(DataError, match="is not finished: run the same smalti generate again"):
        opened(tmp_path / "made")


@pytest.mark.parametrize("container", ["png", "tar", "npz"])
def test_a_picture_that_changed_since_it_was_generated_is_refused(
    tmp_path: Path, container: str
) -> None:
    write_generated(tmp_path / "made", container)
    lines = (tmp_path / "made/manifest.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    rows[0]["sha256"], rows[1]["sha256"] = rows[1]["sha256"], rows[0]["sha256"]  # 5 and 4
    (tmp_path / "made/manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    images = opened(tmp_path / "made")
    assert len(images.levels(range(4))) == 4
    with pytest.raises(DataError, match="is not the picture that this job wrote"):
        images.levels([4])


def test_a_damaged_manifest_or_picture_has_a_remedy(tmp_path: Path) -> None:
    write_generated(tmp_path / "made", "png")
    (tmp_path / "made/000002.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="run the same smalti generate again"):
        opened(tmp_path / "made").levels([2])
    for text, problem in (("{\n", "is damaged"), ("{", "names no pictures")):
        (tmp_path / "made/manifest.jsonl").write_text(text)
        with pytest.raises(DataError, match=f"manifest of .* {problem}"):
            opened(tmp_path / "made")


def test_pictures_of_different_sizes_are_refused_with_a_remedy(tmp_path: Path) -> None:
    for index, side in enumerate((16, 24)):
        Image.new("RGB", (side, 16)).save(tmp_path / f"{index}.png")
    images = opened(tmp_path)
    assert images.shape == (3, 16, 16)
    with pytest.raises(DataError, match="--image_size N"):
        images.levels([0, 1])
    cropped = opened(tmp_path, size=16)  # the remedy
    assert cropped.levels([0, 1]).shape == (2, 3, 16, 16)
    assert cropped.protocol["crop"].startswith("centre, to 16 x 16")
    assert cropped.identity != images.identity


def test_compressed_pictures_and_the_limits_of_an_identity_are_known(tmp_path: Path) -> None:
    for index, array in enumerate(arrays()):
        (tmp_path / f"{index}.png").write_bytes(png(array))
    images = opened(tmp_path)
    assert (images.lossy, images.exact) == ("", True)
    Image.fromarray(arrays()[0]).save(tmp_path / "6.jpg")
    few = DataOptions(folder=FolderOptions(verify_up_to=6))
    images = open_set(str(tmp_path), few).pictures
    assert images is not None and (images.lossy, images.exact) == ("JPEG", False)


def test_a_split_of_a_set_is_another_set(tmp_path: Path) -> None:
    for index, array in enumerate(arrays(20)):
        (tmp_path / f"{index:02d}.png").write_bytes(png(array))
    sets = {split: opened(tmp_path, split=split) for split in ("all", "train", "heldout")}
    assert len(sets["train"]) + len(sets["heldout"]) == len(sets["all"]) == 20
    assert len({images.identity for images in sets.values()}) == 3


def test_statistics_survive_a_round_trip(tmp_path: Path) -> None:
    values = torch.randn(30, 5, dtype=torch.float64)
    one = Gaussian(values.mean(0), values.T.cov(), 30)
    record = {"features": "alexnet", "weights_sha256": "ab", "pictures": 30}
    record["resize"] = "bicubic to 8 px"
    save_statistics(tmp_path / "s.npz", one, one, record)
    found = open_set(str(tmp_path / "s.npz"), DataOptions())
    assert found.pictures is None and found.statistics is not None
    for part in (found.statistics.features, found.statistics.spatial):
        assert part is not None and part.count == 30
        assert torch.equal(part.mean, one.mean) and torch.equal(part.covariance, one.covariance)
    with pytest.raises(DataError, match="give the same --features"):
        found.statistics.check_extractor("other", "cd", 5)
    with pytest.raises(DataError, match="another resize"):
        found.statistics.check_extractor("alexnet", "ab", 5, "bilinear to 8 px")
    found.statistics.check_extractor("alexnet", "ab", 5, "bicubic to 8 px")
    with np.load(tmp_path / "s.npz") as file:  # as ADM's evaluator reads it
        assert {"mu", "sigma", "mu_s", "sigma_s"} <= {*file.files}


def test_statistics_beside_pictures_are_both_read(tmp_path: Path) -> None:
    """As in ADM's reference files, which have all statistics and some pictures."""
    np.savez(tmp_path / "ref.npz", arr_0=arrays(), mu=np.zeros(4), sigma=np.eye(4))
    found = open_set(str(tmp_path / "ref.npz"), DataOptions())
    assert found.pictures is not None and len(found.pictures) == 6
    assert found.statistics is not None and found.statistics.features.count is None
    with pytest.raises(DataError, match="2048 are mostly of Inception"):
        found.statistics.check_extractor("alexnet", "", 256)


def test_damaged_statistics_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "wrong.npz", mu=np.zeros(4), sigma=np.eye(3))
    with pytest.raises(DataError, match=r"\(d,\) and \(d, d\)"):
        read_statistics(tmp_path / "wrong.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "wrong.npz").read_bytes()[:200])
    with pytest.raises(DataError, match="damaged"):
        open_set(str(tmp_path / "cut.npz"), DataOptions())
