"""How the pictures of a source are read: options of all sources, and of single kinds."""

from dataclasses import dataclass, field
from pathlib import Path

from smalti.data.image_io import FolderOptions
from smalti.data.value_range import RangeOption, check_range
from smalti.errors import ConfigurationError


@dataclass(frozen=True)
class HuggingFaceOptions:
    """Which part of a Hugging Face data set to read; empty = the only one there is."""

    config: str = ""  # of a set that has several configurations
    revision: str = ""  # a branch, tag or commit on the Hub
    split: str = ""  # empty = train, or the only one
    heldout_split: str = ""  # hold out this split instead of a part of the training pictures
    image_column: str = ""  # the column of the pictures
    label_column: str = ""  # an older name of --label_column
    # Do not download the whole set: read parquet files in place, or with --stream_cache copy the
    # samples of any set.
    streaming: bool = False
    max_samples: int = 0  # number of samples to read from a stream; 0 = all

    def __post_init__(self) -> None:
        if self.max_samples < 0:
            raise ConfigurationError(f"max_samples is {self.max_samples}; it must be at least 0")
        if self.max_samples and not self.streaming:
            raise ConfigurationError("--hf.max_samples is for streams: also pass --hf.streaming")


@dataclass(frozen=True)
class ShardOptions:
    """How WebDataset shards are read."""

    label: str = ""  # an older name of --label_column


@dataclass(frozen=True)
class SourceOptions:
    """How a set is read."""

    folder: FolderOptions = field(default_factory=FolderOptions)
    hf: HuggingFaceOptions = field(default_factory=HuggingFaceOptions)
    # Where streams, and files behind a URL, are copied once. Without it, shards and parquet files
    # are read in place.
    stream_cache: Path | None = None
    shards: ShardOptions = field(default_factory=ShardOptions)  # how WebDataset shards are read
    # The stored values that are black and white in pictures with more than 8 bits per channel; or
    # percentiles such as 0.5% 99.5%, whose values are measured over the set, and stored. None:
    # such pictures are refused, or with --folder.unusual_images convert, the range of their type is
    # used.
    value_range: RangeOption | None = None
    # Where the captions are: a column of a Hugging Face data set, metadata.jsonl or .csv, an array
    # in an .npz file, or in shards, a key of .json members or a suffix such as .txt. Empty:
    # text, caption, captions, prompt or description, else text files beside the pictures.
    caption_column: str = ""
    # Likewise, where the labels are. Empty: the sub-folders of a folder, or label, labels, class or
    # cls.
    label_column: str = ""

    def __post_init__(self) -> None:
        check_range(self.value_range)
        if self.hf.streaming and self.hf.heldout_split and self.stream_cache is not None:
            raise ConfigurationError(
                "--hf.heldout_split cannot be copied from a stream: leave it out, or leave out "
                "--stream_cache"
            )
        for name, older in self._older_names:
            if self.label_column and older not in ("", self.label_column):
                raise ConfigurationError(
                    f'--label_column is "{self.label_column}" and --{name} is "{older}": '
                    "leave out one of them"
                )

    @property
    def _older_names(self) -> tuple[tuple[str, str], ...]:
        """The other options that name the column of the labels, and their values."""
        return ("hf.label_column", self.hf.label_column), ("shards.label", self.shards.label)

    @property
    def labels_in(self) -> str:
        """The column or key of the labels, by whichever option it was named; "" = the usual one."""
        return self.label_column or self.hf.label_column or self.shards.label
