"""The command line: `smalti COMMAND [options]`, and how every command reads its configuration.

PRESETS  <-  strict YAML recipe (--config FILE)  <-  command-line flags
"""

import contextlib
import dataclasses
import importlib
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, get_args

from smalti.config import (
    ImageSize,
    config_from_dict,
    config_to_dict,
    image_size_of,
    nearest,
    plain,
    read_recipe,
    recipe_text,
    registry_of,
)
from smalti.errors import (
    EXIT_FAILURE,
    EXIT_INPUT_ERROR,
    EXIT_INTERRUPTED,
    ConfigurationError,
    SmaltiError,
)
from smalti.machine import failure_of, first_cause
from smalti.signals import ending_the_command

T = TypeVar("T")
R = TypeVar("R")

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("smalti.scripts.demo", "from a set of pictures to new pictures, in one command"),
    "check-data": ("smalti.scripts.check_data", "verify a set of pictures, and report on it"),
    "train-tokenizer": ("smalti.scripts.train_tokenizer", "stage one: images <-> latents"),
    "encode": ("smalti.scripts.encode", "images -> latent cache"),
    "import-latents": ("smalti.scripts.import_latents", "latents of other code -> latent cache"),
    "export-latents": ("smalti.scripts.export_latents", "latent cache -> parquet, WebDataset"),
    "train-prior": ("smalti.scripts.train_prior", "stage two: a distribution over latents"),
    "train-classifier": (
        "smalti.scripts.train_classifier",
        "a classifier of noisy latents, to guide a flow prior",
    ),
    "reflow": ("smalti.scripts.reflow", "generate pairs with a trained flow, to straighten it"),
    "generate": ("smalti.scripts.generate", "sample pictures with a saved pipeline"),
    "serve": ("smalti.scripts.serve", "a saved pipeline behind HTTP"),
    "ui": ("smalti.scripts.ui", "saved pipelines and runs in a window of the browser"),
    "edit": ("smalti.scripts.edit", "fill regions of pictures, or change them, with a pipeline"),
    "evaluate": ("smalti.scripts.evaluate", "measure a saved tokenizer or pipeline"),
    "compare": ("smalti.scripts.compare", "several models: one table, one grid of pictures"),
    "sweep": ("smalti.scripts.sweep", "find the best sampling options of a pipeline"),
    "convert": ("smalti.scripts.convert", "published weights -> a smalti model folder"),
    "export": ("smalti.scripts.export", "a model -> a file for other code"),
    "info": (
        "smalti.scripts.info",
        "what a folder contains, whether it is complete, what to do next",
    ),
    "interpolate": ("smalti.scripts.interpolate", "blend two pictures in latent space"),
    "attribute": ("smalti.scripts.attribute", "add the difference of two classes to pictures"),
    "traverse": ("smalti.scripts.traverse", "vary single latent channels of a picture"),
    "invert": ("smalti.scripts.invert", "find the latents of given pictures by optimisation"),
}

PRESET_MEMORY = (
    "GB: the memory that training needs, without activations. It is 20 bytes per parameter: for "
    "its weight, its gradient, two moments of AdamW, and its averaged weight."
)

BOX_FRAME = " ╭╮╰╯│─"  # characters of the frame around tyro's messages


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console command; returns the exit status."""
    return run_command(_dispatch, sys.argv[1:] if argv is None else argv)


def _dispatch(arguments: Sequence[str] | None) -> int | None:
    """Run the command that the first argument names, with the remaining arguments."""
    if arguments and arguments[0] in ("help", "version"):  # as other programs have them
        asked, *rest = arguments
        arguments = ["--version"] if asked == "version" else [*rest[:1], "--help"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else EXIT_INPUT_ERROR
    if arguments[0] in ("-V", "--version"):
        from importlib.metadata import version  # takes as long as all other imports here

        print(f"smalti {version('smalti')}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        raise ConfigurationError(f'no command is called "{name}"; {nearest(name, COMMANDS)}')
    # A program that has imported torch may have registered more kinds than the saved text lists.
    if rest in (["-h"], ["--help"]) and "torch" not in sys.modules:
        print(saved_help(name).read_text(encoding="utf-8"), end="")
        return 0
    return importlib.import_module(COMMANDS[name][0]).main(rest)


def saved_help(name: str) -> Path:
    """The file with the help text of a command; `tools/write_help.py` writes it.

    Without it, a help text would take the seconds in which torch and all models are imported.
    """
    return Path(__file__).parent / "help" / f"{name}.txt"


def help_text(name: str) -> str:
    """The help text of a command, in lines of 100 characters, from its configuration."""
    text = io.StringIO()
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100"
    try:
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            importlib.import_module(COMMANDS[name][0]).main(["--help"])
    finally:
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns
    return "".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines())


def run_command(
    command: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None = None
) -> int:
    """Run a command; an error in the input is printed as one line instead of a traceback.

    Returns:
        The exit status: what the command returned, EXIT_INPUT_ERROR, EXIT_FAILURE or
        EXIT_INTERRUPTED.
    """
    first = os.environ.get("RANK", "0") == "0"  # all processes of a job log the same
    logging.basicConfig(level=logging.INFO if first else logging.WARNING, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        with ending_the_command():
            status = command(argv) or 0
            leave_job()
            return status
    except SmaltiError as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        return _complain("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:  # the reader of our output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    except (OSError, MemoryError, RuntimeError) as error:
        failure = failure_of(error)
        if failure is None:
            raise
        return _complain(failure, EXIT_FAILURE)


def end_at_once(status: int = EXIT_INTERRUPTED) -> NoReturn:
    """End as a command with this status does, but not the interpreter: torch aborts a process whose
    interpreter ends while another thread samples."""
    if status == EXIT_INTERRUPTED:
        _complain("interrupted", status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def leave_job() -> None:
    """Close the connection to the other processes of a job, if there is one. If it is open when the
    interpreter ends, its threads sometimes abort the process."""
    distributed: Any = sys.modules.get("torch.distributed")  # not imported only for this check
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def parse_config(config_class: type[T], argv: Sequence[str] | None, *, prog: str) -> T:
    """The configuration of a command: defaults, then `--config FILE`, then flags.

    A class may have `PRESETS`, a mapping from a field to its named presets; `--field.preset NAME`
    or `preset: NAME` in the recipe then chooses the values that the field starts from. The flag is
    refused if the recipe gives values of the field, because those would override it. If a field
    accepts configurations of several kinds, `--field.kind NAME` starts from the defaults of that
    kind. `SAVED` maps a field to a function that reads its values from the saved model that
    `initial` names; `stored_defaults` reads those of any field from the model that a command uses.
    `--print-config` prints the result as a recipe and exits.

    Raises:
        SmaltiError: an error in the recipe or in the flags.
        SystemExit: --help or --print-config.
    """
    import tyro

    arguments = list(sys.argv[1:] if argv is None else argv)
    show = "--print-config" in arguments or "--print_config" in arguments
    arguments = [a for a in arguments if a not in ("--print-config", "--print_config")]
    file = _take(arguments, "--config")
    recipe = read_recipe(Path(file)) if file else {}
    where = file or "defaults"
    flags = list(arguments)
    base = _with_presets(config_class, recipe, arguments, where)
    default = config_from_dict(config_class, recipe, where, base)
    kinds = _take_kinds(arguments)
    _refuse_doubled(base, arguments)
    _refuse_two_kinds(base, flags, kinds)
    default = config_from_dict(config_class, kinds, "command line", default)
    shown = bool({"-h", "--help"} & {*arguments})
    # tyro shows the comment beside each field as its help text, and a field that is annotated
    # with a base class takes the class of its default.

    def parsed(*markers: Any) -> T:
        hidden = _some_options_hidden(default) if shown else contextlib.nullcontext()
        with _errors_as_one_line(prog), _all_kinds_shown(default), hidden:
            return tyro.cli(
                config_class,
                default=default,
                args=arguments,
                prog=prog,
                description=_description(config_class, shown),
                use_underscores=True,
                registry=_sizes_of_images(),
                # AvoidSubcommands: a union keeps the type that its default has.
                config=(tyro.conf.AvoidSubcommands, *markers),
            )

    try:  # without comments, for which tyro parses whole files; help and errors show them
        config = parsed() if shown else parsed(tyro.conf.HelptextFromCommentsOff)
    except ConfigurationError:
        config = parsed()
    config = config_from_dict(config_class, config_to_dict(config), "command line")
    _refuse_outputs_that_are_not_text(config)
    if show:
        print(recipe_text(config), end="")
        raise SystemExit(0)
    return config


def in_python(
    command: Callable[[T], R], config_class: type[T], config: T | None, settings: Mapping[str, Any]
) -> R:
    """Run a command that is called from Python, with a configuration or with some of its fields.

    Args:
        settings: values as in a recipe, or dataclasses; the name of a preset selects it.

    Raises:
        ConfigurationError: both or wrong settings were given.
        KeyboardInterrupt: the command was interrupted.
    """
    if config is None:
        recipe: dict[str, Any] = {}
        for name, value in settings.items():
            preset = isinstance(value, str) and name in getattr(config_class, "PRESETS", {})
            recipe[name] = {"preset": value} if preset else config_to_dict(plain(value))
        base = _with_presets(config_class, recipe, [], "settings")
        config = config_from_dict(config_class, recipe, "settings", base)
    elif settings:
        raise ConfigurationError(
            f"a {config_class.__name__} and {', '.join(settings)} were given: put all settings "
            "into one of them"
        )
    try:
        return command(config)
    except SystemExit as stop:  # a command ends its process; in a notebook that is an interruption
        if stop.code != EXIT_INTERRUPTED:
            raise
        raise KeyboardInterrupt("stopped; what was reached is saved") from None


def _sizes_of_images() -> Any:
    """How tyro reads an `ImageSize`: as one argument, 64 or 48x64."""
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec

    registry = ConstructorRegistry()

    @registry.primitive_rule
    def size(about: Any) -> Any:
        options = get_args(about.type)
        if {*options} - {type(None)} != {*get_args(ImageSize)}:
            return None
        optional = type(None) in options

        def read(arguments: list[str]) -> ImageSize | None:
            if optional and arguments[0] == "None":
                return None
            return image_size_of(arguments[0], "image_size")

        def written(value: ImageSize | None) -> list[str]:
            return ["x".join(map(str, value)) if isinstance(value, tuple) else str(value)]

        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="{None}|INT|HxW" if optional else "INT|HxW",
            instance_from_str=read,
            is_instance=lambda value: isinstance(value, int | tuple) or (optional and not value),
            str_from_instance=written,
        )

    return registry


# Fields of configurations that name what a command writes.
OUTPUTS = ("out", "output", "output_dir", "pipeline_dir", "stream_cache")


def _refuse_outputs_that_are_not_text(config: Any) -> None:
    """Raise `ConfigurationError` if a path to write to is not UTF-8: reports, logs and messages
    contain it."""
    for name in OUTPUTS:
        path = str(getattr(config, name, ""))
        try:
            path.encode()
        except UnicodeEncodeError:
            raise ConfigurationError(
                f"{name} is {path!a}, which is not UTF-8: choose another name"
            ) from None


def _all_kinds_shown(config: Any) -> contextlib.AbstractContextManager[None]:
    """Make the help text list every registered kind of each part of the configuration.

    A class declares only its own kind, `kind: Literal["linear"]`, and tyro takes the choices from
    this annotation. tyro never receives the flag itself, see `_take_kinds`.
    """
    shown: dict[tuple[type, str], Any] = {}
    for part, _ in _parts(config):
        cls = type(part)
        registry = next((r for r in map(registry_of, cls.__mro__) if r is not None), None)
        if registry is not None and "kind" in cls.__annotations__:
            shown[cls, "kind"] = Literal[tuple(registry)]  # type: ignore[valid-type]
    return _annotated_as(shown)


def _some_options_hidden(config: Any) -> contextlib.AbstractContextManager[None]:
    """Leave out of the help text what a class in `config` names in `FROM_LATENTS`, which `fitted`
    sets, and in `SET_BY_FLAGS`. Outside the help text tyro must know them, so that giving one of
    them is an error that says why it is refused."""
    import tyro

    hidden: dict[tuple[type, str], Any] = {}
    for cls in {type(part) for part, _ in _parts(config)}:
        for name in (*getattr(cls, "SET_BY_FLAGS", ()), *getattr(cls, "FROM_LATENTS", ())):
            for owner in cls.__mro__:
                if name in vars(owner).get("__annotations__", {}):
                    hidden[owner, name] = Annotated[owner.__annotations__[name], tyro.conf.Suppress]
    return _annotated_as(hidden)


@contextlib.contextmanager
def _annotated_as(annotations: Mapping[tuple[type, str], Any]) -> Iterator[None]:
    """While tyro reads classes, their fields have these annotations, by (class, field)."""
    original = {(cls, name): cls.__annotations__[name] for cls, name in annotations}
    try:
        for (cls, name), annotation in annotations.items():
            cls.__annotations__[name] = annotation
        yield
    finally:
        for (cls, name), annotation in original.items():
            cls.__annotations__[name] = annotation


def _parts(config: Any, prefix: str = "") -> Iterator[tuple[Any, str]]:
    """Each configuration in a configuration, with the prefix of its flags."""
    yield config, prefix
    for part in dataclasses.fields(config):
        value = getattr(config, part.name)
        if dataclasses.is_dataclass(value):
            yield from _parts(value, f"{prefix}{part.name}.")


def _refuse_doubled(base: Any, arguments: list[str]) -> None:
    """Raise `ConfigurationError` if the command line gives a field that a class names in
    `SET_BY_FLAGS`: another flag of the command sets it."""
    for config, prefix in _parts(base):
        for name, flag in getattr(config, "SET_BY_FLAGS", {}).items():
            given = _take(list(arguments), f"--{prefix}{name}")
            if given is not None:
                raise ConfigurationError(
                    f"command line: {prefix}{name} is {given}, but {flag} sets it: give that "
                    "instead"
                )


@contextlib.contextmanager
def _errors_as_one_line(prog: str) -> Iterator[None]:
    """tyro prints an error in a box of several lines and exits: raise it as a one-line error."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            yield
    except SystemExit as stop:
        if not stop.code:
            raise
        cause: BaseException | None = stop
        while cause is not None:  # an error that a config class itself raised
            if isinstance(cause, SmaltiError):
                raise cause from None
            cause = cause.__context__
        rows = [row.strip(BOX_FRAME) for row in box.getvalue().splitlines()[1:]]
        text = (
            " ".join(row for row in rows if row.strip("-"))
            .partition("For full helptext")[0]
            .strip()
        )
        raise ConfigurationError(
            f"{text.rstrip('.')}; {_command_of(text)}{prog} --help lists the options"
        ) from None


def _command_of(message: str) -> str:
    """For an error about an unknown option: which commands have it; "" if none has."""
    flag = re.search(r"Unrecognized options: (--\w[\w.]*)", message)
    if flag is None:
        return ""
    entry = re.compile(rf"^  {re.escape(flag[1])} ", re.MULTILINE)
    texts = {name: saved_help(name) for name in COMMANDS}
    names = [
        f"smalti {name}"
        for name, file in texts.items()
        if file.is_file() and entry.search(file.read_text(encoding="utf-8"))
    ]
    return f"{flag[1]} is an option of {', '.join(names[:3])}; " if names else ""


def _with_presets(
    config_class: type[T], recipe: dict[str, Any], arguments: list[str], where: str
) -> T:
    """The defaults of a class, with the presets that the flags or the recipe select, or with the
    settings of the saved model that `initial` names."""
    chosen: dict[str, Any] = {}
    tables: Mapping[str, Mapping[str, Any]] = getattr(config_class, "PRESETS", {})
    for field, presets in tables.items():
        part = recipe.get(field)
        name = part.pop("preset", None) if isinstance(part, dict) else None
        flag = _take(arguments, f"--{field}.preset")
        if flag is not None and part:
            raise ConfigurationError(
                f"{where} gives values of {field}, which would override --{field}.preset {flag}: "
                f"write preset: {flag} into a recipe without them, or leave the flag out"
            )
        name = name if flag is None else flag
        if name is None:
            continue
        if not isinstance(name, str) or name not in presets:
            raise ConfigurationError(
                f'{where}: no preset is called "{name}"; {nearest(str(name), presets)}'
            )
        chosen[field] = presets[name]
    initial = _take(list(arguments), "--initial") or recipe.get("initial")
    stored = getattr(config_class, "stored_defaults", None)  # of a command that reads pictures
    if stored is not None:
        chosen |= stored(lambda field: _take(list(arguments), f"--{field}") or recipe.get(field))
    readers: Mapping[str, Callable[[str], Any]] = getattr(config_class, "SAVED", {})
    for field in readers.keys() - chosen.keys():
        if isinstance(initial, str) and initial:
            chosen[field] = readers[field](initial)
    return config_class(**chosen)


def _take_kinds(arguments: list[str]) -> dict[str, Any]:
    """Remove all `--a.b.kind NAME`; return them as {"a": {"b": {"kind": NAME}}}."""
    kinds: dict[str, Any] = {}
    flags = {a.partition("=")[0] for a in arguments if a.startswith("--")}
    for flag in sorted(flag for flag in flags if flag.endswith(".kind")):
        *path, last = flag.removeprefix("--").split(".")
        part = kinds
        for name in path:
            part = part.setdefault(name, {})
        part[last] = _take(arguments, flag)
    return kinds


def _refuse_two_kinds(base: Any, flags: list[str], kinds: Mapping[str, Any]) -> None:
    """Raise `SmaltiError` if `--field.preset` and `--field.kind` select different kinds."""
    for field in getattr(base, "PRESETS", {}):
        preset, chosen = _take(list(flags), f"--{field}.preset"), getattr(base, field)
        wanted = kinds.get(field, {}).get("kind")
        if preset and wanted not in (None, getattr(chosen, "kind", None)):
            raise ConfigurationError(
                f"--{field}.preset {preset} is not of kind {wanted}: leave out one of the two flags"
            )


def _take(arguments: list[str], flag: str) -> str | None:
    """Remove every `flag VALUE` and `flag=VALUE` from the arguments; return the last value."""
    value = None
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        if argument == flag:
            if position + 1 >= len(arguments):
                raise ConfigurationError(f"{flag} needs a value")
            value = arguments[position + 1]
            del arguments[position : position + 2]
        elif argument.startswith(f"{flag}="):
            value = argument.removeprefix(f"{flag}=")
            del arguments[position]
        else:
            position += 1
    return value


def _description(config_class: type, shown: bool) -> str:
    """The beginning of the help text; sizes of presets, which take seconds, only if it is shown."""
    tables: Mapping[str, Mapping[str, Any]] = getattr(config_class, "PRESETS", {})
    lines = [(config_class.__doc__ or "").strip()]
    lines += ["", "--config FILE reads a YAML recipe; --print-config prints the resolved one."]
    for field, presets in tables.items():
        about = getattr(presets, "about", None)
        if about is None:
            lines.append(f"--{field}.preset is one of: {', '.join(presets)}.")
        elif shown:
            lines += ["", f"--{field}.preset is one of these:"]
            width = max(map(len, presets))
            lines += [f"  {name:{width}}  {about(preset)}" for name, preset in presets.items()]
            lines += ["", PRESET_MEMORY]
    return "\n".join(lines)


def _complain(message: str, status: int = EXIT_INPUT_ERROR) -> int:
    """Print one line on stderr; return the status. An input error is the same on every process of a
    job, so only the first process prints it; a machine error is printed by its own process."""
    line = " ".join(first_cause(message).split())
    shown = "".join(letter if letter.isprintable() else "?" for letter in line)
    if status == EXIT_FAILURE or os.environ.get("RANK", "0") == "0":
        print(f"error: {shown}", file=sys.stderr)
    return status


def _usage() -> str:
    width = max(map(len, COMMANDS))
    table = "\n".join(f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items())
    return (
        "usage: smalti COMMAND [options]\n\n"
        "Train your own image generator in two stages, on your own pictures.\n\n"
        f"{table}\n\n"
        "smalti COMMAND --help lists the options of a command; smalti --version is the version."
    )
