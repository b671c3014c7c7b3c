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
BASE = {f"smalti.{file}" for file in ("errors", "config", "files", "hub", "randomness")}
FOLDERS = ("data", "tokenizer", "prior", "pipelines", "training", "evaluation", "scripts")

# folder -> what of smalti it may import, as prefixes of module names; itself is always allowed
ALLOWED: dict[str, set[str]] = {
    "data": BASE,
    "tokenizer": BASE | {"smalti.data.latents"},
    # Of stage one only the pure quantizer files, none of which knows an encoder or a decoder: a
    # next-scale prior owns a frozen copy of the tokenizer's multi-scale quantizer.
    "prior": BASE
    | {"smalti.data.latents"}
    | {"smalti.tokenizer.quantizers.base", "smalti.tokenizer.quantizers.multi_scale"},
    "pipelines": BASE | {"smalti.data", "smalti.tokenizer", "smalti.prior"},
    "training": BASE,
    "evaluation": BASE | {"smalti.data", "smalti.tokenizer.losses.perceptual"},
    "scripts": BASE
    | {"smalti.cli"}
    | {
        f"smalti.{f}" for f in ("data", "tokenizer", "prior", "pipelines", "training", "evaluation")
    },
}
FORBIDDEN_IN_MODELS = {"accelerate", "yaml", "PIL", "huggingface_hub", "argparse", "tyro"}
MAX_FUNCTION, MAX_FILE = 80, 600


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).glob("*.py"))


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
    found = {p.name: violations(p.read_text(), folder) for p in sources(folder)}
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
