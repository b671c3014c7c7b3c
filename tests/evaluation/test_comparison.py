"""One pass over a set, and the metrics of two sets: other numbers of processes, interruptions,
memory, and the names of metrics. (torch-fidelity is the oracle in `tests/scripts`.)"""

import resource
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from smalti.evaluation import streaming
from smalti.evaluation.comparison import (
    Side,
    cautions,
    compare,
    frechet_metric,
    ratio_metric,
)
from smalti.evaluation.distances import inception_score
from smalti.evaluation.features import INCEPTION_SHA256
from smalti.evaluation.image_sets import Gaussian, ImageSet
from smalti.evaluation.metrics import Metric, Undefined
from smalti.evaluation.streaming import Gathered, ScoreSums, gather, parts_of


class Noise(ImageSet):
    """Pictures of 8 x 8 pixels that depend on their position and a seed."""

    def __init__(self, count: int, seed: int = 0) -> None:
        super().__init__("noise", "test", f"{count}/{seed}")
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def levels(self, rows) -> Tensor:
        made = torch.Generator().manual_seed(self.seed * 1_000_003 + rows[0])
        return torch.randint(256, (len(rows), 3, 8, 8), generator=made, dtype=torch.uint8)


class Projection:
    """Features that are a projection of the pixels; logits that are another."""

    name, side, weights_sha256 = "projection", 8, "0" * 64
    published = False

    def __init__(self, dim: int = 12, fail_after: int = 10**9) -> None:
        made = torch.Generator().manual_seed(1)
        self.matrix = torch.randn(192, dim, generator=made) / 14
        self.calls, self.fail_after, self.pictures = 0, fail_after, 0

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        if images.shape[-1] != 8:  # the picture that measures the lengths
            images = images[..., :8, :8]
        else:
            self.calls += 1
            self.pictures += len(images)
        if self.calls > self.fail_after:
            raise KeyboardInterrupt
        features = images.flatten(1) @ self.matrix
        return {"features": features, "spatial": features[:, :5], "logits": 3 * features}

    def __call__(self, images: Tensor) -> Tensor:
        return self.outputs(images)["features"]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "MIN_PART", 128)


def passed(folder: Path, images: ImageSet, extractor=None, **share) -> Gathered:
    found = gather(images, [extractor or Projection()], folder, seed=0, **share)
    assert found is not None
    return found


def assert_equal(a: Gathered, b: Gathered) -> None:
    """To the bit."""
    assert a.hashes == b.hashes
    one, other = (x.kept["projection"].arrays() for x in (a, b))
    assert one.keys() == other.keys()
    assert [name for name in one if one[name].tobytes() != other[name].tobytes()] == []


def test_parts_are_whole_blocks_and_at_most_sixteen(monkeypatch) -> None:
    monkeypatch.setattr(streaming, "MIN_PART", 1024)
    for count in (1, 1000, 1025, 50_000, 1_281_167):
        parts = parts_of(count)
        assert [row for part in parts for row in (part.start, part.stop)][-1] == count
        assert all(a.stop == b.start for a, b in pairwise(parts))
        assert all(part.start % 64 == 0 for part in parts) and len(parts) <= 16


def test_what_is_kept_is_what_all_features_give(tmp_path: Path) -> None:
    images, extractor = Noise(700), Projection()
    kept = passed(tmp_path, images).kept["projection"]
    all_levels = torch.cat([images.levels(range(i, min(i + 64, 700))) for i in range(0, 700, 64)])
    outputs = extractor.outputs(all_levels / 127.5 - 1)
    features = outputs["features"].double()
    torch.testing.assert_close(kept.moments["features"].mean, features.mean(0))
    torch.testing.assert_close(kept.moments["features"].covariance, features.T.cov())
    assert kept.scores is not None
    expected = inception_score(outputs["logits"])
    assert kept.scores.score() == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(kept.subset, outputs["features"])  # all 700, in order


def test_two_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    alone = passed(tmp_path / "one", Noise(700))
    other = gather(Noise(700), [Projection()], tmp_path / "two", seed=0, rank=1, world_size=2)
    assert other is None
    assert_equal(passed(tmp_path / "two", Noise(700), rank=0, world_size=2), alone)


def test_a_killed_pass_goes_on_with_identical_numbers(tmp_path: Path) -> None:
    whole = passed(tmp_path / "whole", Noise(700))
    with pytest.raises(KeyboardInterrupt):
        passed(tmp_path / "cut", Noise(700), Projection(fail_after=7))
    rest = Projection()
    assert_equal(passed(tmp_path / "cut", Noise(700), rest), whole)
    assert rest.pictures == 700 - 3 * 128  # three parts were finished
    # What belongs to other pictures, or is damaged, is not taken.
    again = Projection()
    passed(tmp_path / "cut", Noise(700, seed=1), again)
    assert again.pictures == 700
    next((tmp_path / "cut").glob("*-02.npz")).write_bytes(b"damaged")
    for file in (tmp_path / "cut").glob("*-02.npz"):
        file.write_bytes(b"damaged")
    again = Projection()
    assert_equal(passed(tmp_path / "cut", Noise(700), again), whole)
    assert again.pictures == 128


def test_pictures_that_changed_during_an_interruption_are_measured_again(
    tmp_path: Path, caplog
) -> None:
    """Of a large set, whose identity does not cover them."""

    def images(seed: int, changed: range) -> Noise:
        made, other = Noise(300, seed=0), Noise(300, seed=seed)
        made.exact, own = False, made.levels
        made.levels = lambda rows: (other.levels if rows[0] in changed else own)(rows)
        return made

    with pytest.raises(KeyboardInterrupt):
        passed(tmp_path / "cut", images(0, range(0)), Projection(fail_after=4))
    now = images(1, range(64, 128))  # the second block, of the first of two finished parts
    again = Projection()
    found = passed(tmp_path / "cut", now, again)
    assert again.pictures == 128 + 44 and "pictures 0 to 127 of" in caplog.text
    assert_equal(found, passed(tmp_path / "whole", now))


def test_equal_pictures_are_counted(tmp_path: Path) -> None:
    one, longer, twice = Noise(128), Noise(200), Noise(128)
    own = twice.levels
    twice.levels = lambda rows: own(range(len(rows)))  # type: ignore[method-assign]
    first, second, third = (
        passed(tmp_path / str(n), images) for n, images in enumerate((one, longer, twice))
    )
    assert [found.copies for found in (first, second, third)] == [0, 0, 64]
    assert first.shared_with(second) == second.shared_with(first) == 128
    assert third.shared_with(first) == 128 and first.shared_with(third) == 64


def test_what_is_kept_does_not_grow_with_the_set(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(streaming, "SUBSET", 100)
    sizes = []
    for count in (1000, 3000):
        kept = passed(tmp_path / str(count), Noise(count)).kept["projection"]
        sizes.append(sum(array.nbytes for array in kept.arrays().values()))
        assert len(kept.subset) == 100
        assert len(parts_of(count)) <= 16
    assert sizes[0] == sizes[1]


@pytest.mark.slow
def test_50_000_pictures_need_under_1_gb(tmp_path: Path, monkeypatch) -> None:
    """Beside the extractor: samples, a reference of more pictures than features are kept of, and
    their Frechet distance, all with features of the length of Inception's."""
    monkeypatch.setattr(streaming, "MIN_PART", 1024)
    passed(tmp_path / "warm", Noise(64), Projection(2048))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sides = [
        Side.of("projection", passed(tmp_path / str(count), Noise(count), Projection(2048)), None)
        for count in (50_000, streaming.SUBSET + 1)
    ]
    assert [one.count for one in sides] == [50_000, streaming.SUBSET + 1]
    found = frechet_metric(*sides, "features", {})
    assert isinstance(found, Metric) and 0 < found.value < 10  # of variance 670
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert grown < 2**20


# -------------------------------------------------------------------------------------------------
# Names and reasons


def side(count: int | None, dim: int = 4, seed: int = 0) -> Side:
    subset = torch.randn(50, dim, generator=torch.Generator().manual_seed(seed))
    one = Gaussian(subset.double().mean(0), subset.double().T.cov(), count)
    scores = ScoreSums(3)
    scores.add(subset[:, :3], torch.arange(50) % 10)
    for sums in vars(scores).values():
        sums *= (count or 10_000) / 50
    return Side({"features": one, "spatial": one}, count, subset, scores)


def extractor(name: str, published: bool, **more) -> SimpleNamespace:
    return SimpleNamespace(
        name=name, side=8, weights_sha256=INCEPTION_SHA256, published=published, **more
    )


@pytest.mark.parametrize(
    ("published", "samples", "reference", "official"),
    [
        (True, 10_000, 10_000, True),
        (True, 50_000, None, True),  # statistics of ADM, whose file has no count
        (True, 9_999, 50_000, False),
        (True, 50_000, 9_999, False),
        (False, 50_000, 50_000, False),
    ],
)
def test_only_inception_on_10_000_pictures_is_called_fid(
    published: bool, samples: int, reference: int | None, official: bool
) -> None:
    name = "inception" if published else "inception-like"
    found = compare(side(samples), side(reference, seed=1), extractor(name, published), {}, 0)
    of_fid = {"fid", "sfid", "inception_score"}
    assert (of_fid <= found.keys()) is official
    assert not (of_fid & found.keys()) or official
    if not official:
        assert {f"fd_{name}", f"fd_{name}_spatial", f"score_{name}"} <= found.keys()


def test_statistics_of_many_pictures_make_no_inception_score_of_few() -> None:
    """As of an npz of ADM's with all statistics and some pictures, as samples."""
    few = Side(side(None).moments, None, None, side(500).scores)
    found = compare(few, side(50_000), extractor("inception", True), {}, 0)
    assert "fid" in found and "score_inception" in found and "inception_score" not in found


SET = {"pictures": 50_000, "size": "32 x 32", "channels": 3}


@pytest.mark.parametrize(
    ("samples", "reference", "shared", "caution"),
    [
        ({}, {}, 0, None),
        ({"size": "32 x 24"}, {}, 0, "32 x 24 pixels and the reference 32 x 32"),
        ({"channels": 1}, {}, 0, "have 1 channels and the reference 3: networks see grey as RGB"),
        ({"lossy": "JPEG"}, {}, 0, "compressed (JPEG), which changes distances: generate them as"),
        ({}, {"lossy": "JPEG"}, 0, None),  # as photographs are
        ({"lossy": "JPEG"}, {"lossy": "JPEG"}, 0, None),
        ({"copies": 1200}, {}, 0, "1,200 of 50,000 samples are equal to another"),
        ({}, {"copies": 3}, 0, "3 of 50,000 pictures of the reference are equal to another"),
        ({}, {}, 50_000, "50,000 of 50,000 samples are equal to a picture of the reference"),
    ],
)
def test_what_makes_numbers_hard_to_compare_is_named(samples, reference, shared, caution) -> None:
    one, real = {**SET, **samples}, {**SET, **reference}
    found = cautions(one, real, shared)
    assert (caution is None and found == []) or (caution in found[0] and len(found) == 1)
    # Of statistics that smalti saved, their pictures are known; of others nothing is.
    assert cautions(one, {"statistics": {"record": {"set": real}}}, shared) == found
    assert cautions(SET, {"statistics": {"pictures": "not recorded"}}, 0) == []


def test_cmmd_needs_features_of_clip() -> None:
    sides = side(100), side(100, seed=1)
    assert "cmmd_vit" in compare(*sides, extractor("vit", False, family="clip"), {}, 0)
    assert "cmmd_vit" not in compare(*sides, extractor("vit", False, family="dinov2"), {}, 0)


def test_what_is_not_defined_is_left_out_with_its_reason() -> None:
    statistics = Side({"features": side(100).moments["features"]}, None)
    found = compare(side(100), statistics, extractor("inception", True), {}, 0)
    assert isinstance(found["fd_inception"], Metric)
    reasons = {name: one.reason for name, one in found.items() if isinstance(one, Undefined)}
    assert "mu_s" in reasons["fd_inception_spatial"]
    assert "only statistics of the reference" in reasons["kid_inception"]
    few = Side(side(3).moments, 3, torch.randn(3, 4))
    found = compare(few, few, extractor("x", False), {}, 0)
    assert "needs at least 4" in getattr(found["precision_x"], "reason", "")
    assert "singular" in getattr(found["fd_x"], "protocol", {})["note"]
    found = ratio_metric({"x": (side(100), side(100, seed=1), None)}, {})
    assert "--reference_split train" in getattr(found["fdr_1"], "reason", "")
    found = ratio_metric({"x": (side(99), side(99, seed=1), side(99, seed=2))}, {})
    assert isinstance(found["fdr_1"], Metric)
