"""The packages, found: the folders at the root are the sub-packages of `smalti` (DESIGN section 1).

Everything else about the distribution stands in pyproject.toml.
"""

from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
FOLDERS = (
    "data",
    "tokenizer",
    "prior",
    "pipelines",
    "training",
    "evaluation",
    "scripts",
)


def packages_in(folder: str) -> list[str]:
    """`folder` and every package below it, as dotted names."""
    inside = (ROOT / folder).rglob("__init__.py")
    return [".".join(path.parent.relative_to(ROOT).parts) for path in inside]


PACKAGES = [name for folder in FOLDERS for name in packages_in(folder)]

setup(
    packages=["smalti", *(f"smalti.{name}" for name in PACKAGES)],
    package_dir={
        "smalti": "src/smalti",
        **{f"smalti.{name}": name.replace(".", "/") for name in PACKAGES},
    },
)
