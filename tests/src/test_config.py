"""Configurations are strict, and survive the trip to plain values and back."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from smalti.config import (
    added,
    check_at_least,
    config_from_dict,
    config_to_dict,
    nearest,
    saved_fields,
)
from smalti.data.latents import CodeSpec, ContinuousSpec, LatentSpec
from smalti.errors import SmaltiError


@dataclass(frozen=True)
class Inner:
    size: int = 3
    pair: tuple[int, int] = (1, 2)


@dataclass(frozen=True)
class Outer:
    required: int
    rate: float = 0.5
    flag: bool = False
    name: str | None = None
    mode: Literal["a", "b"] = "a"
    where: Path = Path("x")
    many: tuple[tuple[int, int], ...] = ((1, 1),)
    inner: Inner = field(default_factory=Inner)
    spec: LatentSpec = field(default_factory=lambda: CodeSpec(4, ((2, 2),)))
    table: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.required < 0:
            raise SmaltiError(f"required is {self.required}; it must not be negative")


def test_round_trip_rebuilds_nested_dataclasses_tuples_paths_and_unions() -> None:
    config = Outer(
        1,
        0.25,
        True,
        "n",
        "b",
        Path("a/b"),
        ((1, 2), (3, 4)),
        Inner(5),
        ContinuousSpec(4, 8, 8),
        {"k": 2},
    )
    plain = config_to_dict(config)
    assert plain["many"] == [[1, 2], [3, 4]] and plain["where"] == "a/b"
    assert config_from_dict(Outer, plain, "file") == config


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"required": 1, "raet": 1.0}, 'file: unknown key "raet"; did you mean "rate"'),
        ({}, 'file: the key "required" is missing'),
        ({"required": "one"}, "required is 'one'; expected int"),
        ({"required": True}, "required is True; expected int"),
        ({"required": 1.5}, "required is 1.5; expected int"),
        ({"required": 1, "flag": 1}, "flag is 1; expected bool"),
        ({"required": 1, "mode": "c"}, "mode is 'c'; choose one of a, b"),
        ({"required": 1, "inner": {"siez": 1}}, 'file: inner: unknown key "siez"'),
        ({"required": 1, "inner": {"pair": [1]}}, "pair has 1 values; expected 2"),
        ({"required": 1, "spec": {"kind": "code"}}, "kind is 'code'; did you mean \"codes\""),
        ({"required": 1, "spec": {"kind": ["codes"]}}, "kind is ['codes']; did you mean"),
        ({"required": 1, "rate": float("nan")}, "rate is nan; expected a finite float"),
        ({"required": 1, "rate": 10**400}, "expected a finite float"),
        ({"required": 1, "table": {"k": "v"}}, "table.k is 'v'; expected int"),
        ({"required": 1, "many": [[1, 2], [3]]}, "many[1] has 1 values; expected 2"),
        ({"required": "x" * 10_000}, "...; expected int"),
        ({"required": -1}, "file: required is -1"),
        ([1], "expected keys and values"),
    ],
)
def test_errors_are_named(data, message: str) -> None:
    with pytest.raises(SmaltiError) as error:
        config_from_dict(Outer, data, "file")
    assert message in str(error.value)


def test_numbers_that_yaml_reads_as_text_are_floats() -> None:
    assert config_from_dict(Outer, {"required": 1, "rate": "1e-4"}, "file").rate == 1e-4


def test_a_base_supplies_what_the_data_lack() -> None:
    base = Outer(7, inner=Inner(9, (8, 8)))
    merged = config_from_dict(Outer, {"inner": {"size": 1}}, "file", base)
    assert merged == Outer(7, inner=Inner(1, (8, 8)))
    merged = config_from_dict(Outer, {"spec": {"vocab_size": 9}}, "file", base)
    assert merged.spec == CodeSpec(9, ((2, 2),))


def test_the_home_folder_is_found_without_a_shell() -> None:
    where = config_from_dict(Outer, {"required": 1, "where": "~/x"}, "file").where
    assert where == Path.home() / "x"


def test_nearest_lists_all_when_nothing_is_near() -> None:
    assert nearest("zzz", ["b", "a"]) == "known are a, b"


def test_a_field_below_its_least_value_is_named() -> None:
    check_at_least(3, Inner(), "size")
    check_at_least(1, Outer(required=1, rate=1.0), "required", "rate")
    with pytest.raises(SmaltiError, match="size is 3; it must be at least 4"):
        check_at_least(4, Inner(), "size")
    with pytest.raises(SmaltiError, match="rate is nan; it must be at least 0"):
        check_at_least(0, Outer(required=1, rate=float("nan")), "required", "rate")


def test_a_field_added_later_is_saved_only_where_it_is_used():
    @dataclass(frozen=True)
    class Inner:
        size: int = 1
        channels: int = added(3)

    @dataclass(frozen=True)
    class Outer:
        inner: Inner = Inner()
        parts: tuple[Inner, ...] = ()

    usual, other = Outer(parts=(Inner(),)), Outer(Inner(channels=1), (Inner(2, 4),))
    assert saved_fields(usual) == {"inner": {"size": 1}, "parts": [{"size": 1}]}
    assert config_from_dict(Outer, saved_fields(usual), "here") == usual
    assert saved_fields(other)["inner"] == {"size": 1, "channels": 1}
    assert config_from_dict(Outer, saved_fields(other), "here") == other
