"""One pass over a set of pictures of any size: what is kept of it for the metrics of two sets.

A set is divided into at most 16 parts, and a part into blocks of 64 pictures. Of a part are kept
the moments of its features in float64, sums for the Inception Score, the features of a random
subset of the set, and hashes of its blocks and of its pictures; they are written to a file when the
part is finished. So memory does not grow with the set, but for 8 bytes a picture; processes divide
the parts among them; after an interruption the finished parts are read instead of measured; and as
the parts are joined in their order, the numbers are the same to the bit in each of these cases.
Pictures of a set too large to be hashed when it is opened are read again for that, and compared
with the hashes of their part.
"""

import hashlib
import json
import logging
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from smalti.data.latents import to_float
from smalti.errors import DataError
from smalti.evaluation.features import FeatureExtractor, outputs_of, resize_of
from smalti.evaluation.image_sets import ImageSet
from smalti.evaluation.moments import Moments, UndefinedMetricError
from smalti.evaluation.pictures import BLOCK
from smalti.files import replacing
from smalti.randomness import generator

logger = logging.getLogger(__name__)

BLOCK_PICTURES = 64  # read, hashed and extracted at once
MAX_PARTS, MIN_PART = 16, 1024  # parts of a set, and pictures of one
SUBSET = 10_000  # pictures of a set whose features are kept, for metrics of neighbours and kernels
FORMAT = 2  # of the files of parts: another is measured again
SPLITS, SPLIT_SEED = 10, 2020  # of the Inception Score, as in torch-fidelity

# -------------------------------------------------------------------------------------------------
# What is kept of a set


class ScoreSums:
    """Sums of class probabilities, of which the Inception Score is computed (1606.03498).

    Args:
        classes: number of logits.
    """

    def __init__(self, classes: int) -> None:
        self.marginals = torch.zeros(SPLITS, classes, dtype=torch.float64)
        self.entropies = torch.zeros(SPLITS, dtype=torch.float64)
        self.counts = torch.zeros(SPLITS, dtype=torch.float64)

    def add(self, logits: Tensor, splits: Tensor) -> None:
        """Add logits (B, k) of pictures in the splits (B,)."""
        chances = logits.double().cpu().softmax(1)
        self.marginals.index_add_(0, splits, chances)
        self.entropies.index_add_(0, splits, torch.special.entr(chances).sum(1))
        self.counts.index_add_(0, splits, torch.ones(len(splits), dtype=torch.float64))

    def merge(self, other: "ScoreSums") -> None:
        """Add the sums of other pictures."""
        self.marginals += other.marginals
        self.entropies += other.entropies
        self.counts += other.counts

    def score(self) -> tuple[float, float]:
        """Mean and standard deviation over the splits.

        Raises:
            UndefinedMetricError: a split has no pictures.
        """
        if not self.counts.all():
            raise UndefinedMetricError(
                f"the number of pictures is {int(self.counts.sum())}; an Inception Score over "
                f"{SPLITS} parts needs at least {SPLITS}: give more pictures"
            )
        of_mean = torch.special.entr(self.marginals / self.counts[:, None]).sum(1)
        scores = (of_mean - self.entropies / self.counts).exp()
        return scores.mean().item(), scores.std(correction=0).item()


class Kept:
    """What is kept of some pictures of a set, for one extractor.

    Args:
        dims: length of each output of the extractor.
    """

    def __init__(self, dims: dict[str, int]) -> None:
        kinds = [name for name in dims if name != "logits"]
        self.moments = {name: Moments(dims[name]) for name in kinds}
        self.scores = ScoreSums(dims["logits"]) if "logits" in dims else None
        self._subset = [torch.zeros(0, dims["features"])]

    @property
    def subset(self) -> Tensor:
        """The features (n, d) of the pictures of the random subset, in order."""
        return torch.cat(self._subset)

    def add(self, outputs: dict[str, Tensor], chosen: Tensor, splits: Tensor) -> None:
        """Add pictures.

        Args:
            chosen: (B,) bool, which of them belong to the random subset.
            splits: (B,) the part of the Inception Score of each.
        """
        for name, moments in self.moments.items():
            moments.add(outputs[name])
        if self.scores is not None:
            self.scores.add(outputs["logits"], splits)
        self._subset.append(outputs["features"].float().cpu()[chosen])

    def merge(self, other: "Kept") -> None:
        """Add the pictures that follow."""
        for name, moments in self.moments.items():
            moments.merge(other.moments[name])
        if self.scores is not None and other.scores is not None:
            self.scores.merge(other.scores)
        self._subset += other._subset

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything, by name."""
        found = {"subset": self.subset.numpy()}
        for name, moments in self.moments.items():
            found |= {f"{name}.{key}": array for key, array in moments.state().items()}
        if self.scores is not None:
            found |= {f"scores.{key}": value.numpy() for key, value in vars(self.scores).items()}
        return found

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Take the content of `arrays`."""
        self._subset = [torch.from_numpy(arrays["subset"])]
        for name in self.moments:
            mine = {k.removeprefix(f"{name}."): v for k, v in arrays.items() if k.startswith(name)}
            self.moments[name] = Moments.from_state(mine)
        if self.scores is not None:
            for key in vars(self.scores):
                setattr(self.scores, key, torch.from_numpy(arrays[f"scores.{key}"]))


@dataclass
class Gathered:
    """What is kept of a set, or of a part of it."""

    kept: dict[str, Kept]  # by the name of the extractor
    hashes: list[str]  # sha256 of each block
    digests: Tensor  # (n,) int64, a hash of each picture, by which equal ones are found

    @property
    def fingerprint(self) -> str:
        """A hash of the pixels of all pictures, whatever contains them."""
        return hashlib.sha256("".join(self.hashes).encode()).hexdigest()

    @property
    def copies(self) -> int:
        """How many pictures are equal to one before them."""
        return len(self.digests) - len(self.digests.unique())

    def shared_with(self, other: "Gathered") -> int:
        """How many pictures are equal to one of another set."""
        return int(torch.isin(self.digests, other.digests).sum())

    def write(self, path: Path, key: str) -> None:
        """Write all at once or nothing."""
        arrays = {
            f"{name}/{key}": array
            for name, kept in self.kept.items()
            for key, array in kept.arrays().items()
        }
        about = np.array(json.dumps({"key": key, "hashes": self.hashes}))
        with replacing(path) as temporary, temporary.open("wb") as stream:
            digests = self.digests.numpy()
            np.savez(stream, about=about, digests=digests, **arrays)  # type: ignore[arg-type]

    def read(self, path: Path, key: str) -> bool:
        """Take what was written; False if there is nothing, or it belongs to another evaluation."""
        try:
            with np.load(path, allow_pickle=False) as stored_arrays:
                about = json.loads(str(stored_arrays["about"]))
                if about["key"] != key:
                    return False
                for name, kept in self.kept.items():
                    names = [n for n in stored_arrays.files if n.startswith(f"{name}/")]
                    kept.restore({n.removeprefix(f"{name}/"): stored_arrays[n] for n in names})
                self.digests = torch.from_numpy(stored_arrays["digests"])
            self.hashes = list(about["hashes"])
        except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile):
            return False
        return True


def dims_of(extractor: FeatureExtractor) -> dict[str, int]:
    """The length of each output of an extractor."""
    return {n: values.shape[1] for n, values in outputs_of(extractor, _BLANK).items()}


_BLANK = torch.zeros(1, 3, 64, 64)


def gather(
    images: ImageSet,
    extractors: Sequence[FeatureExtractor],
    folder: Path,
    *,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
    progress: Callable[[int], object] = lambda pictures: None,
) -> Gathered | None:
    """One pass over a set.

    Args:
        folder: for the files of finished parts, one for all processes.
        seed: of the random subset whose features are kept.
        rank, world_size, barrier: the index of this process, the number of processes, and a
            function that waits for all of them; each measures every `world_size`-th part.
        progress: called with the number of pictures done since the last call.

    Returns:
        What is kept of the set; None on all processes but the first.
    """
    dims = {extractor.name: dims_of(extractor) for extractor in extractors}
    networks = [(e.name, e.weights_sha256, resize_of(e)) for e in extractors]
    sizes = [len(images), SUBSET, BLOCK_PICTURES, MIN_PART]
    settings = [FORMAT, images.identity, networks, seed, sizes]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    parts, work = parts_of(len(images)), Work(images, extractors, dims, seed)
    paths = [folder / f"{key[:16]}-{number:02d}.npz" for number in range(len(parts))]
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(rank, len(parts), world_size):
        if work.is_measured(parts[number], paths[number], key):
            progress(len(parts[number]))
        else:
            work.measure(parts[number], progress).write(paths[number], key)
    barrier()  # all parts are written
    if rank:
        return None
    whole = work.empty()
    for path in paths:
        part = work.empty()
        if not part.read(path, key):
            raise DataError(f"{path} is damaged: run the same command again")
        for name, kept in whole.kept.items():
            kept.merge(part.kept[name])
        whole.hashes += part.hashes
        whole.digests = torch.cat([whole.digests, part.digests])
    return whole


def parts_of(count: int) -> list[range]:
    """At most `MAX_PARTS` parts of whole blocks, of `MIN_PART` pictures or more."""
    blocks = -(-count // BLOCK_PICTURES)
    length = max(MIN_PART // BLOCK_PICTURES, -(-blocks // MAX_PARTS)) * BLOCK_PICTURES
    return [range(first, min(first + length, count)) for first in range(0, count, length)]


class Work:
    """The pass over the pictures of a set; for the arguments see `gather`."""

    def __init__(
        self,
        images: ImageSet,
        extractors: Sequence[FeatureExtractor],
        dims: dict[str, dict[str, int]],
        seed: int,
    ) -> None:
        self.images, self.extractors, self.dims = images, extractors, dims
        count = len(images)
        self.chosen = torch.zeros(count, dtype=torch.bool)
        order = torch.randperm(count, generator=generator(seed, "evaluate", "subset"))
        self.chosen[order[:SUBSET]] = True
        # torch-fidelity shuffles before it divides.
        shuffled = np.random.RandomState(SPLIT_SEED).permutation(count)
        self.splits = torch.zeros(count, dtype=torch.int64)
        for split in range(SPLITS):
            inside = shuffled[split * count // SPLITS : (split + 1) * count // SPLITS]
            self.splits[torch.from_numpy(inside)] = split

    def empty(self) -> Gathered:
        """Of no pictures."""
        kept = {e.name: Kept(self.dims[e.name]) for e in self.extractors}
        return Gathered(kept, [], torch.zeros(0, dtype=torch.int64))

    def is_measured(self, part: range, path: Path, key: str) -> bool:
        """Whether a file has what is kept of a part, of the pictures that the set has now."""
        found = self.empty()
        if not found.read(path, key):
            return False
        if self.images.exact or found.hashes == [_hash_of(v) for _, v in self._blocks(part)]:
            return True
        logger.warning(
            "pictures %d to %d of %s changed since they were measured: they are measured again",
            *(part.start, part.stop - 1, self.images.name),
        )
        return False

    def measure(self, part: range, progress: Callable[[int], object]) -> Gathered:
        """Of the pictures of a part."""
        found, digests = self.empty(), list[Tensor]()
        for rows, levels in self._blocks(part):
            found.hashes.append(_hash_of(levels))
            digests.append(_digests_of(levels))
            at_once = max(1, BLOCK // (4 * levels[0].numel()))
            for inside in torch.arange(len(rows)).split(at_once):
                images = to_float(levels[inside])
                chosen, splits = (v[rows.start + inside] for v in (self.chosen, self.splits))
                for extractor in self.extractors:
                    outputs = outputs_of(extractor, images)
                    found.kept[extractor.name].add(outputs, chosen, splits)
            progress(len(rows))
        found.digests = torch.cat(digests)
        return found

    def _blocks(self, part: range) -> Iterator[tuple[range, Tensor]]:
        """The positions and the pictures of each block."""
        for first in range(part.start, part.stop, BLOCK_PICTURES):
            rows = range(first, min(first + BLOCK_PICTURES, part.stop))
            yield rows, self.images.levels(rows).contiguous()


def _hash_of(levels: Tensor) -> str:
    """sha256 of the shape and the pixels of a block."""
    content = repr(tuple(levels.shape)).encode() + levels.numpy().tobytes()
    return hashlib.sha256(content).hexdigest()


def _digests_of(levels: Tensor) -> Tensor:
    """8 bytes of BLAKE2 of the pixels of each picture, (B,) int64."""
    pictures = (picture.tobytes() for picture in levels.numpy())
    digests = b"".join(hashlib.blake2b(pixels, digest_size=8).digest() for pixels in pictures)
    return torch.from_numpy(np.frombuffer(digests, np.int64).copy())
