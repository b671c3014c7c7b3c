"""The command line: `smalti COMMAND [options]`, and how every command reads its configuration.

PRESETS  <-  strict YAML recipe (--config FILE)  <-  command-line flags
"""

import errno
import importlib
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from smalti.config import config_from_dict, config_to_dict, nearest
from smalti.errors import SmaltiError

T = TypeVar("T")

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("smalti.scripts.demo", "from a set of pictures to new pictures, in one command"),
    "train-tokenizer": ("smalti.scripts.train_tokenizer", "stage one: images <-> codes"),
    "encode": ("smalti.scripts.encode", "images -> latent cache"),
    "train-prior": ("smalti.scripts.train_prior", "stage two: a distribution over latents"),
    "generate": ("smalti.scripts.generate", "sample pictures with a saved pipeline"),
    "evaluate": ("smalti.scripts.evaluate", "measure a saved pipeline"),
}

EXIT_MISTAKE = 2  # something in the input is wrong, and the message says what to do
EXIT_FAILURE = 1  # the machine failed: disk full, no permission
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console command; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else EXIT_MISTAKE
    if arguments[0] in ("-V", "--version"):
        print(f"smalti {version('smalti')}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        return _complain(f'no command is called "{name}"; {nearest(name, COMMANDS)}')
    return run_command(
        lambda arguments: importlib.import_module(COMMANDS[name][0]).main(arguments), rest
    )


def run_command(
    command: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None
) -> int:
    """Run a command so that a mistake ends in one clear line, not in a traceback."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        return command(argv)
    except SmaltiError as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.ENAMETOOLONG):
            raise
        print(f"error: {error.strerror}: {error.filename or 'while writing'}", file=sys.stderr)
        return EXIT_FAILURE


def parse_config(config_class: type[T], argv: Sequence[str] | None, *, prog: str) -> T:
    """The configuration of a command: defaults, then `--config FILE`, then flags.

    A class may have `PRESETS`, a mapping from a field to its named presets; `--field.preset NAME`
    or `preset: NAME` in the recipe then chooses what the other values of that field start from.
    `--print-config` prints the result as a recipe and exits.

    Raises:
        SmaltiError: a mistake in the recipe.
        SystemExit: a mistake in the flags (status 2), or --help, or --print-config.
    """
    import tyro

    arguments = list(sys.argv[1:] if argv is None else argv)
    show = "--print-config" in arguments or "--print_config" in arguments
    arguments = [a for a in arguments if a not in ("--print-config", "--print_config")]
    file = _take(arguments, "--config")
    recipe = _read_recipe(Path(file)) if file else {}
    where = file or "defaults"
    base = _with_presets(config_class, recipe, arguments, where)
    default = config_from_dict(config_class, recipe, where, base)
    # tyro shows the comment beside each field as its help text.
    config = tyro.cli(
        config_class,
        default=default,
        args=arguments,
        prog=prog,
        description=_description(config_class),
        use_underscores=True,
    )
    if show:
        print(recipe_text(config), end="")
        raise SystemExit(0)
    return config


def recipe_text(config: Any) -> str:
    """A configuration as YAML that `--config` reads back."""
    import yaml

    return yaml.safe_dump(config_to_dict(config), sort_keys=False)


def _with_presets(
    config_class: type[T], recipe: dict[str, Any], arguments: list[str], where: str
) -> T:
    """The defaults of a class with the presets that the flags or the recipe name."""
    chosen: dict[str, Any] = {}
    tables: Mapping[str, Mapping[str, Any]] = getattr(config_class, "PRESETS", {})
    for field, presets in tables.items():
        part = recipe.get(field)
        named = part.pop("preset", None) if isinstance(part, dict) else None
        name = _take(arguments, f"--{field}.preset") or named
        if name is None:
            continue
        if name not in presets:
            raise SmaltiError(
                f'{where}: no preset is called "{name}"; {nearest(str(name), presets)}'
            )
        chosen[field] = presets[name]
    return config_class(**chosen)


def _take(arguments: list[str], flag: str) -> str | None:
    """Remove `flag VALUE` or `flag=VALUE` from the arguments; the last one counts."""
    value = None
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        if argument == flag:
            if position + 1 >= len(arguments):
                raise SmaltiError(f"{flag} needs a value")
            value = arguments[position + 1]
            del arguments[position : position + 2]
        elif argument.startswith(f"{flag}="):
            value = argument.removeprefix(f"{flag}=")
            del arguments[position]
        else:
            position += 1
    return value


def _read_recipe(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        raise SmaltiError(f"the recipe {path} does not exist: check --config")
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SmaltiError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise SmaltiError(f"{path} holds no keys and values: it is not a recipe")
    return content


def _description(config_class: type) -> str:
    tables: Mapping[str, Mapping[str, Any]] = getattr(config_class, "PRESETS", {})
    lines = [(config_class.__doc__ or "").strip()]
    lines += ["", "--config FILE reads a YAML recipe; --print-config prints the resolved one."]
    lines += [f"--{field}.preset is one of: {', '.join(names)}." for field, names in tables.items()]
    return "\n".join(lines)


def _complain(message: str) -> int:
    """One line on stderr, from one process only."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return EXIT_MISTAKE


def _usage() -> str:
    width = max(map(len, COMMANDS))
    table = "\n".join(f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items())
    return (
        "usage: smalti COMMAND [options]\n\n"
        "Train your own image generator in two stages, on your own pictures.\n\n"
        f"{table}\n\n"
        "smalti COMMAND --help lists the options of a command."
    )
