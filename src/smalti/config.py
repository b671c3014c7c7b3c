"""Strict configurations: plain frozen dataclasses <-> plain JSON or YAML values.

Nothing is guessed: an unknown key, a missing key or a value of the wrong type is an error that
names the file, the key and the nearest known name.

In a YAML recipe an unquoted word means what it means on the command line: `no` is the word "no"
where a name is expected, and false where a switch is.
"""

import dataclasses
import difflib
import math
import os
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from smalti.errors import ConfigurationError, SmaltiError

T = TypeVar("T")


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """A hint for a misspelt name: the nearest known one, or all that are known."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f'did you mean "{close[0]}"?' if close else f"known are {', '.join(known) or 'none'}"


def plain(value: Any) -> Any:
    """Numbers of numpy and torch, and arrays of them, as Python's numbers and lists; every other
    value as it is."""
    if hasattr(value, "tolist") and hasattr(value, "ndim"):
        return value.tolist()
    if type(value) in (list, tuple):
        return type(value)(plain(part) for part in value)
    return value


def check_at_least(least: float, config: Any, *names: str) -> None:
    """Raise `ConfigurationError` unless each of the named fields is `least` or more."""
    for name in names:
        value = getattr(config, name)
        if not value >= least:  # NaN is not
            raise ConfigurationError(f"{name} is {value}; it must be at least {least}")


@dataclasses.dataclass(frozen=True)
class Difference:
    """A field in which two configurations differ."""

    name: str  # dotted
    value: Any
    other: Any


def differences(config: Any, other: Any, name: str = "", free: str = "") -> Iterator[Difference]:
    """The fields in which a configuration differs from another, and the parts nested in it.

    Args:
        name: the name of `config` in the results.
        free: name of a class attribute that lists fields which may differ.
    """
    if type(config) is not type(other):
        yield Difference(name, *(getattr(c, "kind", c) for c in (config, other)))
        return
    for part in dataclasses.fields(config):
        mine, others = getattr(config, part.name), getattr(other, part.name)
        if mine == others or part.name in getattr(config, free, ()):
            continue
        inner = f"{name}.{part.name}" if name else part.name
        if dataclasses.is_dataclass(mine):
            yield from differences(mine, others, inner, free)
        else:
            yield Difference(inner, mine, others)


def first_difference(config: Any, other: Any, name: str, free: str = "") -> Difference | None:
    """The first of the `differences`, None if there are none."""
    return next(differences(config, other, name, free), None)


def config_to_dict(config: Any) -> Any:
    """A dataclass and everything nested in it as values that JSON and YAML can represent."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {
            field.name: config_to_dict(getattr(config, field.name))
            for field in dataclasses.fields(config)
        }
    if isinstance(config, Mapping):
        return {str(key): config_to_dict(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [config_to_dict(value) for value in config]
    return str(config) if isinstance(config, Path) else config


ADDED = "added"  # key of the metadata of a field


def added(default: Any) -> Any:
    """A field that a version after 0.1.0 added to the config of a saved model.

    With its default it is not part of `saved_fields`: so the models of earlier versions keep their
    hashes, and earlier versions read new models that do not use it.
    """
    return dataclasses.field(default=default, metadata={ADDED: True})


def saved_fields(config: Any) -> Any:
    """Like `config_to_dict`, without the fields that are `added` and have their defaults."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {
            field.name: saved_fields(getattr(config, field.name))
            for field in dataclasses.fields(config)
            if not (field.metadata.get(ADDED) and getattr(config, field.name) == field.default)
        }
    if isinstance(config, Mapping):
        return {str(key): saved_fields(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [saved_fields(value) for value in config]
    return config_to_dict(config)


def recipe_text(config: Any) -> str:
    """A configuration as YAML that `--config` reads back."""
    import yaml

    return yaml.safe_dump(config_to_dict(config), sort_keys=False)


# -------------------------------------------------------------------------------------------------
# Sizes of images: 32 is a square of 32 pixels per side, 48x64 is 48 pixels high and 64 wide.

ImageSize = int | tuple[int, int]  # pixels: the side of a square, or (height, width)


def image_size_of(text: str, where: str) -> ImageSize:
    """The size that a text states, as in a recipe or on the command line.

    Raises:
        ConfigurationError: it is neither a number of pixels nor height x width.
    """
    sides = text.split("x")
    if len(sides) > 2 or not all(s.isascii() and s.isdecimal() and len(s) < 9 for s in sides):
        raise ConfigurationError(
            f"{where} is {_short(str(text))}; give the side of a square in pixels, as in 64, or "
            "height x width, as in 48x64"
        )
    numbers = tuple(map(int, sides))
    return numbers[0] if len({*numbers}) == 1 else (numbers[0], numbers[-1])


# -------------------------------------------------------------------------------------------------
# Recipes: YAML whose unquoted words keep their text until it is known what is expected.

# Budgets, checked before the content is built: a recipe of smalti has about 5 kB, 150 values and a
# depth of 5.
MAX_RECIPE_BYTES = 2**18
MAX_RECIPE_VALUES = 20_000  # with each alias counted as often as it is used
MAX_RECIPE_DEPTH = 32

# PyYAML raises these, not YAMLError, on values like !!int x, !!bool x and !!timestamp x.
UNTRANSLATED_BY_YAML = (ValueError, LookupError, AttributeError)


class Word(str):
    """An unquoted scalar of a YAML file: its text, and the value that YAML gives it."""

    value: Any

    def __new__(cls, text: str, value: Any) -> "Word":
        word = super().__new__(cls, text)
        word.value = value
        return word

    def __repr__(self) -> str:
        return repr(self.value) if isinstance(self.value, str) else str(self)


def read_recipe(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file, for `config_from_dict`.

    Raises:
        ConfigurationError: there is no such file; it is not YAML, exceeds a budget, repeats a key,
            or has no keys.
    """
    if not path.is_file():
        raise ConfigurationError(f"the recipe {path} does not exist: check --config")
    size = path.stat().st_size
    if size > MAX_RECIPE_BYTES:
        raise ConfigurationError(
            f"{path} has {size:,} bytes, and a recipe at most {MAX_RECIPE_BYTES:,}: check --config"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not valid YAML: {error}") from error
    content = _parsed(text, str(path))
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path} is not a recipe: it contains no keys and values")
    return content


def read_value(text: str) -> Any:
    """A value as YAML reads it, within the budgets of a recipe.

    Raises:
        ConfigurationError: it is not YAML, or exceeds a budget.
    """
    return without_words(_parsed(text, "the value"))


def _parsed(text: str, where: str) -> Any:
    """The content of YAML, with its unquoted scalars as `Word`s."""
    import yaml

    try:
        return _within_budgets(text, where)
    except SmaltiError:
        raise
    except (yaml.YAMLError, *UNTRANSLATED_BY_YAML) as error:
        what = " ".join(str(error).split())
        raise ConfigurationError(f"{where} is not valid YAML: {what}") from error


def _within_budgets(text: str, where: str) -> Any:
    import yaml

    depth, loader = 0, yaml.SafeLoader(text)
    for event in yaml.parse(text, yaml.SafeLoader):  # one by one: nothing is nested in memory
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_RECIPE_DEPTH:
            raise ConfigurationError(
                f"{where}, line {event.start_mark.line + 1}: more than {MAX_RECIPE_DEPTH} levels; "
                "no recipe is nested so deeply"
            )
    node = loader.get_single_node()
    if node is None:
        return None
    _check_node(node, {}, where)
    return _plain(node, loader, where)


def _check_keys(node: Any, where: str) -> None:
    """Raise `ConfigurationError` on a repeated key; YAML would silently take the last one."""
    seen: set[str] = set()
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key.value, str):
            raise ConfigurationError(f"{where}, line {line}: a key is a word, not a list")
        if key.value in seen:
            raise ConfigurationError(f'{where}, line {line}: the key "{key.value}" is repeated')
        seen.add(key.value)


def _check_node(node: Any, sizes: dict[int, tuple[int, int] | None], where: str) -> Any:
    """The number of values in a YAML node, and its depth, with its aliases written out.

    Args:
        sizes: those of the nodes that are known; None for those that contain this one.

    Raises:
        ConfigurationError: they exceed the budgets, a node contains itself, or repeats a key.
    """
    if isinstance(node.value, str):
        return 1, 0
    if id(node) not in sizes:
        sizes[id(node)] = None
        if node.id == "mapping":
            _check_keys(node, where)
        parts = [p for v in node.value for p in (v if isinstance(v, tuple) else (v,))]
        found = [_check_node(part, sizes, where) for part in parts]
        size = 1 + sum(count for count, _ in found), 1 + max((d for _, d in found), default=0)
        if size[0] > MAX_RECIPE_VALUES or size[1] > MAX_RECIPE_DEPTH:
            raise ConfigurationError(
                f"{where}, line {node.start_mark.line + 1}: with its aliases written out this has "
                f"more than {MAX_RECIPE_VALUES:,} values or {MAX_RECIPE_DEPTH} levels"
            )
        sizes[id(node)] = size
    if sizes[id(node)] is None:
        line = node.start_mark.line + 1
        raise ConfigurationError(f"{where} is not valid YAML: line {line} contains itself")
    return sizes[id(node)]


def _plain(node: Any, loader: Any, where: str) -> Any:
    """A YAML node as dicts, lists, strings and `Word`s."""
    import yaml

    if isinstance(node, yaml.SequenceNode):
        return [_plain(part, loader, where) for part in node.value]
    if isinstance(node, yaml.MappingNode):
        loader.flatten_mapping(node)  # <<: *alias
        return {str(key.value): _plain(part, loader, where) for key, part in node.value}
    implicit = loader.resolve(yaml.ScalarNode, node.value, (True, False))
    if node.style is not None or node.tag != implicit:  # quoted, or with a tag of its own
        return loader.construct_object(node, deep=True)
    if node.value in ("", "~"):
        return None
    if node.tag.endswith(":timestamp"):  # no setting is a date
        return Word(node.value, node.value)
    return Word(node.value, loader.construct_object(node))


def config_from_dict(cls: type[T], data: Any, where: str, base: T | None = None) -> T:
    """Rebuild a dataclass from plain values.

    Args:
        where: the file or option that the values come from, for messages.
        base: values for the keys that `data` lacks; without it only declared defaults are used.

    Raises:
        ConfigurationError: an unknown or missing key, a value of the wrong type, or a value that
            the class refuses.
    """
    if not isinstance(data, Mapping):
        raise ConfigurationError(
            f"{where}: expected keys and values for {cls.__name__}, got {_short(data)}"
        )
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise ConfigurationError(f'{where}: unknown key "{key}"; {nearest(str(key), fields)}')
    values: dict[str, Any] = {}
    for name, field in fields.items():
        default = getattr(base, name) if base is not None else None
        if name in data:
            values[name] = _convert(data[name], hints[name], f"{where}: {name}", default)
        elif base is not None:
            values[name] = default
        elif not _has_default(field):
            raise ConfigurationError(f'{where}: the key "{name}" is missing')
    try:
        return cls(**values)
    except (ArithmeticError, ValueError) as error:  # raised by the class itself
        raise ConfigurationError(f"{where}: {error}") from error


def _has_default(field: dataclasses.Field) -> bool:
    missing = dataclasses.MISSING
    return field.default is not missing or field.default_factory is not missing


def _convert(value: Any, hint: Any, where: str, base: Any = None) -> Any:
    """`value` as an instance of the annotation `hint`."""
    origin = get_origin(hint)
    if hint is Any:
        return without_words(value)
    if origin is Literal:
        for choice in get_args(hint):
            if choice == value or (isinstance(value, Word) and choice == value.value):
                return choice
        choices = ", ".join(map(str, get_args(hint)))
        raise ConfigurationError(f"{where} is {_short(value)}; choose one of {choices}")
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, hint, where, base)
    if dataclasses.is_dataclass(hint):
        chosen = _registered(hint, value, where, base)
        same = base if type(base) is chosen else None
        return config_from_dict(chosen, value, where, same)  # type: ignore[arg-type]
    if origin is tuple:
        return _convert_tuple(value, get_args(hint), where)
    if origin in (dict, Mapping) or hint is dict:
        return _convert_mapping(value, get_args(hint), where)
    return _convert_scalar(value, hint, where)


def registry_of(hint: Any) -> Any:
    """The registry of the configurations that a field of this annotated type accepts, or None.

    The annotated type is then a base class that sets `registry`; `kind` identifies its subclasses.
    """
    return vars(hint).get("registry") if isinstance(hint, type) else None


def _registered(hint: Any, value: Any, where: str, base: Any) -> Any:
    """`hint` itself, or its subclass of the kind that `value`, or else `base`, has."""
    registry = registry_of(hint)
    if registry is None or not isinstance(value, Mapping):
        return hint
    kind = value.get("kind", getattr(base, "kind", None))
    if not isinstance(kind, str) or kind not in registry:
        raise ConfigurationError(f"{where}: kind is {_short(kind)}; {nearest(str(kind), registry)}")
    return registry.config_class(kind)


def _convert_union(value: Any, hint: Any, where: str, base: Any) -> Any:
    options = get_args(hint)
    if type(None) in options and (value is None or _is_none(value)):
        return None
    options = tuple(option for option in options if option is not type(None))
    if options == get_args(ImageSize) and isinstance(value, str):
        return image_size_of(value, where)
    if isinstance(value, Mapping) and len(options) > 1:
        chosen = _by_kind({"kind": getattr(base, "kind", None), **value}, options, where)
        return _convert(value, chosen, where, base)
    for option in options:
        try:
            return _convert(value, option, where, base)
        except SmaltiError:
            if len(options) == 1:
                raise
    raise ConfigurationError(
        f"{where} is {_short(value)}; expected {' or '.join(map(_name, options))}"
    )


def _by_kind(value: Mapping, options: tuple[Any, ...], where: str) -> Any:
    """Among several dataclasses, the one whose `kind` the value names."""
    kinds = {
        get_args(typing.get_type_hints(option)["kind"])[0]: option
        for option in options
        if dataclasses.is_dataclass(option) and "kind" in typing.get_type_hints(option)
    }
    kind = value.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise ConfigurationError(f"{where}: kind is {_short(kind)}; {nearest(str(kind), kinds)}")
    return kinds[kind]


def _convert_tuple(value: Any, hints: tuple[Any, ...], where: str) -> tuple:
    if isinstance(value, Word) and hints[-1:] == (Ellipsis,):
        value = [value]  # one word, as on the command line
    if not isinstance(value, list | tuple):
        raise ConfigurationError(f"{where} is {_short(value)}; expected a list")
    if len(hints) == 2 and hints[1] is Ellipsis:
        hints = (hints[0],) * len(value)
    if len(hints) != len(value):
        raise ConfigurationError(f"{where} has {len(value)} values; expected {len(hints)}")
    pairs = zip(value, hints, strict=True)
    return tuple(_convert(v, h, f"{where}[{i}]") for i, (v, h) in enumerate(pairs))


def _convert_mapping(value: Any, hints: tuple[Any, ...], where: str) -> dict:
    if not isinstance(value, Mapping):
        raise ConfigurationError(f"{where} is {_short(value)}; expected keys and values")
    inner = hints[1] if len(hints) == 2 else Any
    return {str(k): _convert(v, inner, f"{where}.{k}") for k, v in value.items()}


def _is_none(value: Any) -> bool:
    """Whether a word is YAML's null, or the command line's None."""
    return isinstance(value, Word) and (value.value is None or value == "None")


def without_words(value: Any) -> Any:
    """Plain values in which each word has the value that YAML gives it."""
    if isinstance(value, Word):
        return value.value
    if isinstance(value, Mapping):
        return {key: without_words(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(without_words, value))
    return value


def _read_word(word: Word, hint: Any) -> Any:
    """What a word means where a `hint` is expected: as text, or as YAML reads it."""
    if hint in (str, Path):
        return str(word)
    if hint is int:
        try:  # not as YAML, for which 010 is 8 and 1:30 is 90
            return int(word)
        except ValueError:
            return str(word)
    return str(word) if hint is float else word.value


def _convert_scalar(value: Any, hint: Any, where: str) -> Any:
    value = plain(value)
    if isinstance(value, Word):
        read = _read_word(value, hint)
        if hint is int and not isinstance(read, int):
            raise ConfigurationError(f"{where} is {_short(value)}; expected int")
        value = read
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        number = _finite(value)
        if number is not None:
            return number
    elif hint is Path and isinstance(value, str | Path):
        return Path(os.path.expanduser(value))  # no shell expands ~ in a recipe
    elif type(value) is hint:  # exact: a bool is not an int
        return value
    raise ConfigurationError(f"{where} is {_short(value)}; expected {_name(hint)}")


def _finite(value: int | float | str) -> float | None:
    """The value as a float, or None if JSON cannot represent it; YAML reads 1e-4 as a string."""
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _name(hint: Any) -> str:
    return "a finite float" if hint is float else getattr(hint, "__name__", str(hint))


def _short(value: Any) -> str:
    """A value as text that fits into one line of a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
