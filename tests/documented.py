"""The command lines of the README, of CONTRIBUTING.md, of `docs/` and of the recipes' comments."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md")))
RECIPES = tuple(sorted(ROOT.glob("scripts/configs/**/*.yaml")))
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
STARTS = r"(?:smalti|make|accelerate launch|(?:[\w./]+/)?python [a-z]+/\w+\.py)(?= |$)"
# In a sentence or a table; a name alone, such as `smalti demo`, is no command line.
QUOTED = re.compile(rf"`({STARTS}[^`]* -[^`]*)`")
VARIABLE = re.compile(r'^(\w+)="(.*)"$')
SETTING = re.compile(r"^[A-Z_]+=\S*$")  # of the environment, before a command


@dataclass(frozen=True)
class CommandLine:
    """A command line of a page."""

    page: str
    words: tuple[str, ...]
    in_block: bool  # a reader may copy it; else a sentence speaks of it

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"

    @property
    def smalti(self) -> tuple[str, ...]:
        """The command of smalti and its options, also where a launcher starts it; () if none."""
        if self.words[0] == "smalti":
            return self.words[1:]
        module = next((word for word in self.words if word.startswith("smalti.scripts.")), "")
        if not module:
            return ()
        name = module.rpartition(".")[2].replace("_", "-")
        return (name, *self.words[self.words.index(module) + 1 :])

    @property
    def launcher(self) -> tuple[str, ...]:
        """The words of `accelerate launch` or torchrun, up to the module; () if none."""
        if self.words[0] not in ("accelerate", "torchrun"):
            return ()
        return self.words[: len(self.words) - len(self.smalti[1:])]


def command_lines(page: Path) -> list[CommandLine]:
    """The commands of a page, in order; of a recipe, those in its comments."""
    text = page.read_text(encoding="utf-8")
    name = page.relative_to(ROOT).as_posix()
    if page.suffix == ".yaml":
        text = re.sub(r"\\\n#", "", text)
        lines = re.findall(r"^# +((?:smalti|accelerate) .* -.*)$", text, re.MULTILINE)
        return [CommandLine(name, tuple(shlex.split(line)), False) for line in lines]
    found = []
    for block in BLOCK.findall(text):
        found += [CommandLine(name, words, True) for words in block_lines(block)]
    sentences = re.sub(r"\s+", " ", BLOCK.sub("", text))
    for quoted in QUOTED.findall(sentences):
        found.append(CommandLine(name, tuple(shlex.split(quoted)), False))
    return found


def block_lines(block: str) -> list[tuple[str, ...]]:
    """The words of each line, with variables of the shell filled in, without comments."""
    variables: dict[str, str] = {}
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        if assigned := VARIABLE.match(line):
            variables[assigned[1]] = assigned[2]
            continue
        filled = re.sub(r"\$(\w+)", lambda name: variables[name[1]], line)
        words = shlex.split(filled, comments=True)
        while words and SETTING.match(words[0]):
            words.pop(0)
        if words:
            found.append(tuple(words))
    return found
