"""The house rules that a reader relies on, held by reading the source."""

import ast
import re
from pathlib import Path

import pytest

from smalti.prior.base import Prior
from smalti.prior.registry import PRIORS
from smalti.tokenizer.base import Tokenizer
from smalti.tokenizer.registry import TOKENIZERS

ROOT = Path(__file__).parent.parent
FRONT_DOOR = (
    "checkpoints",
    "config",
    "distributed",
    "errors",
    "files",
    "folders",
    "hub",
    "pretrained",
    "processor",
    "randomness",
    "repository",
    "shards",
    "signals",
    "weights",
)
BASE = {f"smalti.{file}" for file in FRONT_DOOR}
FOLDERS = ("data", "tokenizer", "prior", "pipelines", "training", "evaluation", "scripts")

# folder -> what of smalti it may import, as prefixes of module names; itself is always allowed
ALLOWED: dict[str, set[str]] = {
    "data": BASE,
    # Transforms turn pictures into images for `encode`, which imports them at its first picture.
    "tokenizer": BASE | {"smalti.data.latents", "smalti.data.transforms"},
    # Of stage one only the pure quantizers, none of which knows an encoder or a decoder: a
    # next-scale prior owns a frozen copy of the tokenizer's multi-scale quantizer.
    "prior": BASE | {"smalti.data.latents", "smalti.tokenizer.quantizers"},
    "pipelines": BASE | {"smalti.data", "smalti.tokenizer", "smalti.prior"},
    "training": BASE,
    "evaluation": BASE | {"smalti.data", "smalti.tokenizer.losses.perceptual"},
    "scripts": BASE
    | {"smalti.cli"}
    | {
        f"smalti.{f}" for f in ("data", "tokenizer", "prior", "pipelines", "training", "evaluation")
    },
}
PLACES = {"smalti": "src/smalti"}  # folders that do not lie at the root
FORBIDDEN_IN_MODELS = {"accelerate", "yaml", "PIL", "huggingface_hub", "argparse", "tyro"}
MAX_FUNCTION, MAX_FILE = 80, 600
MAX_FILES_OF_A_PRIOR = {"next_token": 3, "next_scale": 4, "flow": 11}


def sources(folder: str) -> list[Path]:
    """Every file of a folder and of its sub-folders."""
    return sorted((ROOT / PLACES.get(folder, folder)).rglob("*.py"))


def module_name(path: Path) -> str:
    """smalti.prior.flow.dit of prior/flow/dit.py; a package for its __init__.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[2:] if parts[0] == "src" else parts
    return ".".join(["smalti", *parts]).removesuffix(".__init__")


def imports(tree: ast.Module) -> list[tuple[str, int]]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(("." * node.level + (node.module or ""), node.lineno))
    return found


def violations(code: str, folder: str) -> list[str]:
    """Imports in a file of `folder` that the house does not allow."""
    wrong = []
    for module, line in imports(ast.parse(code)):
        top = module.split(".")[0]
        if module.startswith(".") or top in FOLDERS:
            wrong.append(f"line {line}: {module} (write smalti.*)")
        elif top == "smalti" and module != "smalti":
            allowed = {*ALLOWED[folder], f"smalti.{folder}"}
            if not any(module == a or module.startswith(f"{a}.") for a in allowed):
                wrong.append(f"line {line}: {module}")
    return wrong


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_import_only_what_lies_below_them(folder: str) -> None:
    found = {str(p): violations(p.read_text(), folder) for p in sources(folder)}
    assert not {name: wrong for name, wrong in found.items() if wrong}


@pytest.mark.parametrize(
    ("folder", "line"),
    [
        ("data", "from smalti.prior.base import Prior"),
        ("prior", "from smalti.tokenizer.vq import VQTokenizer"),
        ("training", "import smalti.tokenizer.base"),
        ("pipelines", "from smalti.scripts.demo import demo"),
        ("tokenizer", "import data"),
        ("tokenizer", "from .base import Tokenizer"),
    ],
)
def test_a_planted_violation_is_caught(folder: str, line: str) -> None:
    assert violations(line, folder)


def test_no_files_import_each_other() -> None:
    """The graph of imports between files has no cycle; an import for types alone counts too."""
    graph = {
        module_name(path): imported_files(path)
        for folder in (*FOLDERS, "smalti")
        for path in sources(folder)
    }
    assert cycle_in(graph) == []


def imported_files(path: Path) -> set[str]:
    """The modules of smalti that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in inside if is_module(name)}
            # `from package import module` needs the module; `from module import name` that module.
            found |= modules if modules == inside else modules | {node.module}
    return {name for name in found if is_module(name)} - {module_name(path)}


def is_module(name: str) -> bool:
    if name.split(".")[0] != "smalti":
        return False
    parts = name.split(".")[1:]
    base = ROOT / ("src/smalti" if not parts or parts[0] not in FOLDERS else ".")
    place = base.joinpath(*parts)
    return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()


def cycle_in(graph: dict[str, set[str]]) -> list[str]:
    """The names along one cycle of a graph, or an empty list."""
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for other in sorted(graph.get(node, ())):
            if found := walk(other, [*path, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := walk(node, []))), [])


def test_a_planted_cycle_is_caught() -> None:
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_two_classes_share_a_name() -> None:
    places: dict[str, list[str]] = {}
    for folder in (*FOLDERS, "smalti"):
        for path in sources(folder):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.ClassDef):
                    places.setdefault(node.name, []).append(str(path))
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


@pytest.mark.parametrize("prior", ["next_token", "next_scale", "flow"])
def test_a_prior_is_read_in_few_files(prior: str) -> None:
    """From its configuration to sampled codes: its own folder, without the solvers to choose from,
    and what all priors share."""
    own = [
        p for p in sources(f"prior/{prior}") if p.name != "__init__.py" and p.parent.name == prior
    ]
    assert len(own) <= MAX_FILES_OF_A_PRIOR[prior]


@pytest.mark.parametrize("folder", ["tokenizer", "prior"])
def test_model_files_import_no_frameworks(folder: str) -> None:
    for path in sources(folder):
        tops = {module.split(".")[0] for module, _ in imports(ast.parse(path.read_text()))}
        assert not tops & FORBIDDEN_IN_MODELS, path.name


@pytest.mark.parametrize("folder", [*FOLDERS, "smalti"])
def test_files_and_functions_can_be_read_in_one_sitting(folder: str) -> None:
    for path in sources(folder):
        text = path.read_text()
        assert len(text.splitlines()) <= MAX_FILE, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= MAX_FUNCTION, f"{path}:{node.name} has {length} lines"


def test_the_front_door_imports_nothing_behind_it() -> None:
    """Only names that stand in strings lead from smalti/ to the folders; all is lazy."""
    for path in sources("smalti"):
        body = [n for n in ast.parse(path.read_text()).body if not isinstance(n, ast.If)]
        for module, line in imports(ast.Module(body, [])):
            own = module.split(".")[1:2]
            assert not (module.startswith("smalti.") and own[0] in FOLDERS), f"{path}:{line}"


@pytest.mark.parametrize("folder", [*FOLDERS, "smalti"])
def test_nothing_is_left_to_do(folder: str) -> None:
    for path in sources(folder):
        assert not re.search(r"\b(TODO|FIXME|XXX)\b", path.read_text()), path


@pytest.mark.parametrize("folder", [*FOLDERS, "smalti"])
def test_public_things_have_docstrings(folder: str) -> None:
    for path in sources(folder):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), f"{path} has no module docstring"
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}: {node.name}"


@pytest.mark.parametrize(("registry", "base"), [(TOKENIZERS, Tokenizer), (PRIORS, Prior)])
def test_every_registered_name_resolves(registry, base) -> None:
    for name in registry:
        cls = registry.resolve(name)
        assert issubclass(cls, base)
        assert cls.__doc__
        assert registry.name_of(cls) == name
        assert cls.Config()
