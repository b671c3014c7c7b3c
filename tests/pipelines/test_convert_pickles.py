"""Pickled checkpoints: what training runs save beside the weights, in either format of torch.save,
older and newer pickles, and damage that only a checksum shows."""

import argparse
import datetime
import pickle
import sys
import types
import warnings
import zipfile
from collections import Counter, OrderedDict, UserDict, UserList, defaultdict, deque
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from smalti.errors import SmaltiError
from smalti.pipelines.convert.reader import read_checkpoint

WEIGHTS = {"w": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}


class AttributeDict(dict):
    """A dict whose items are attributes, too, as Lightning's, EasyDict, addict and yacs have it."""

    def __init__(self, **items: object) -> None:
        super().__init__(items)
        self.__dict__.update(items)


class ListConfig(list):
    """A list of another library."""


class DictConfig:
    """Like omegaconf's: not a dict; its content is kept in attributes."""

    def __init__(self, **items: object) -> None:
        self.__dict__.update(_content=items, _parent=self, _metadata=(int, AttributeDict()))


@pytest.fixture(autouse=True)
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classes above, in modules of libraries, which tests remove before they read a file."""
    homes = {AttributeDict: "easydict", ListConfig: "lightning", DictConfig: "omegaconf"}
    for kind, name in homes.items():
        module = types.ModuleType(name)
        setattr(module, kind.__name__, kind)
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(kind, "__module__", name)


BESIDE = {
    "an empty defaultdict": lambda: defaultdict(int),
    "a filled defaultdict": lambda: defaultdict(list, {1: [2], "a": [defaultdict(dict, {3: {}})]}),
    "a dict with attributes": lambda: AttributeDict(lr=1.0, inner=AttributeDict(a=[1])),
    "a list of another library": lambda: ListConfig([1, ListConfig([2])]),
    "a container with attributes": lambda: DictConfig(a=1, b=ListConfig([DictConfig()])),
    "an OrderedDict": lambda: OrderedDict(a=AttributeDict(b=1)),
    "a Counter": lambda: Counter("aab"),
    "deques": lambda: (deque([1, 2]), deque([Fraction(1, 2)], maxlen=3), deque()),
    "namespaces": lambda: types.SimpleNamespace(a=argparse.Namespace(b=deque([1]))),
    "sets": lambda: (frozenset({1, 2}), {3}, frozenset()),
    "user containers": lambda: (UserDict(a=1), UserList([1, 2])),
    "states of random numbers": lambda: (np.random.get_state(), torch.get_rng_state()),
    "values": lambda: (
        np.float64(1),
        1j,
        slice(2),
        range(3),
        b"x",
        bytearray(b"y"),
        int,
        Path("z"),
    ),
    "parts of optimizers": lambda: (torch.optim.AdamW, partial(int, "1", base=2)),
    "dates": lambda: (datetime.datetime(2024, 1, 1), datetime.timedelta(1)),
}


def save(content: object, folder: Path, *, legacy: bool = False, protocol: int = 2) -> Path:
    file = folder / "published.pt"
    torch.save(content, file, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    return file


def forget_libraries() -> None:
    for name in ("easydict", "lightning", "omegaconf"):
        sys.modules.pop(name, None)


def refuse(file: Path) -> str:
    with pytest.raises(SmaltiError) as error:
        read_checkpoint(file)
    said = str(error.value)
    assert "\n" not in said and "smalti.pipelines" not in said and "Placeholder" not in said
    return said


def is_whole(tensors: dict[str, Tensor]) -> bool:
    return tensors.keys() == WEIGHTS.keys() and all(
        torch.equal(tensors[name], tensor) for name, tensor in WEIGHTS.items()
    )


# -- what lies beside the weights -----------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("beside", BESIDE)
def test_objects_beside_the_weights_become_placeholders(
    beside: str, legacy: bool, tmp_path: Path
) -> None:
    other = BESIDE[beside]()
    content = {"args": argparse.Namespace(v=other), "x": other, "model": WEIGHTS, "again": other}
    file = save(content, tmp_path, legacy=legacy)
    forget_libraries()
    assert is_whole(read_checkpoint(file).tensors)
    assert not {"easydict", "lightning", "omegaconf"} & sys.modules.keys()


@pytest.mark.parametrize("legacy", [False, True])
def test_weights_inside_another_librarys_dict_are_found(legacy: bool, tmp_path: Path) -> None:
    file = save(AttributeDict(model=defaultdict(list, WEIGHTS)), tmp_path, legacy=legacy)
    forget_libraries()
    assert is_whole(read_checkpoint(file).tensors)


def test_one_class_may_be_shared_by_weights_and_others(tmp_path: Path) -> None:
    tied = {"w": WEIGHTS["w"], "b": nn.Parameter(WEIGHTS["b"])}
    content = {"ema": tied, "model": defaultdict(None, tied), "log": [defaultdict(int)] * 3}
    assert is_whole(read_checkpoint(save(content, tmp_path)).tensors)


@pytest.mark.parametrize("legacy", [False, True])
def test_objects_that_only_their_own_code_can_fill_are_named(legacy: bool, tmp_path: Path) -> None:
    both = ListConfig([1])
    both.title = "a list with an attribute"  # type: ignore[attr-defined]
    said = refuse(save({"model": WEIGHTS, "x": both}, tmp_path, legacy=legacy))
    assert "holds objects (lightning.ListConfig) that cannot be read without running code" in said


def test_names_that_only_begin_like_known_ones_are_refused(tmp_path: Path) -> None:
    for legacy in (False, True):
        said = refuse(save({"model": WEIGHTS, "x": Call()}, tmp_path, legacy=legacy))
        assert "calls builtins.setattr, which is code and is never run here" in said


class Call:
    """A pickle of it calls a function whose name starts like that of a harmless class, `set`."""

    def __reduce__(self) -> tuple:
        return setattr, (argparse.Namespace(), "a", 1)


# -- formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [4, 5])
def test_newer_pickles_are_told_apart_from_damaged_ones(protocol, legacy, tmp_path: Path) -> None:
    said = refuse(save({"model": WEIGHTS}, tmp_path, legacy=legacy, protocol=protocol))
    assert f"has pickle protocol {protocol}; only protocol 2 is read: save it again with" in said


def test_a_pickle_of_something_else_is_no_checkpoint(tmp_path: Path) -> None:
    for content in (b"\x80", b"\x80\x04N.", pickle.dumps({"a": 1}, 2), b"\x8a\x01\x05."):
        (tmp_path / "published.pt").write_bytes(content)
        assert "no checkpoint of PyTorch" in refuse(tmp_path / "published.pt")


def test_a_program_of_torchscript_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "published.pt")
    assert "is a program of TorchScript, which is never run" in refuse(tmp_path / "published.pt")


# -- damage ---------------------------------------------------------------------------------------


def test_a_flipped_bit_in_a_zip_file_is_noticed(tmp_path: Path) -> None:
    file = save({"model": WEIGHTS}, tmp_path)
    content = bytearray(file.read_bytes())
    place = content.find(WEIGHTS["w"].numpy().tobytes())
    content[place + 9] ^= 1  # another number, as finite as before
    file.write_bytes(content)
    said = refuse(file)
    assert "is damaged: the checksum of published/data/" in said and "does not match" in said


def test_a_file_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        file = save({"model": WEIGHTS}, tmp_path)
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is not None  # which a reader of zips takes for damage
    assert is_whole(read_checkpoint(file).tensors)


# -- several state dicts --------------------------------------------------------------------------


def test_the_first_wrapper_is_used_and_the_others_are_reported(tmp_path: Path) -> None:
    other = {name: tensor + 1 for name, tensor in WEIGHTS.items()}
    file = save({"model": WEIGHTS, "ema": other, "state_dict": {}, "module": {"a": 1}}, tmp_path)
    for wrappers, others in ((("model", "ema"), ("ema",)), (("module", "model"), ())):
        found = read_checkpoint(file, wrappers)
        assert is_whole(found.tensors) and found.wrapper == "model" and found.others == others
    nested = save({"trainer": {"net": WEIGHTS, "ema": {"module": other}}}, tmp_path)
    found = read_checkpoint(nested, ("trainer", "net", "ema", "module"))
    assert found.wrapper == "trainer.net" and found.others == ("ema",)
