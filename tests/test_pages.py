"""The commands of every page work, one after the other, in a short form, on tiny data.

What a page takes for granted, such as the folder of `smalti demo`, is made by the command that
`GRANTED` names for it, once for all pages.
"""

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from backbones import write_text_encoder
from documented import PAGES, ROOT, command_lines
from PIL import Image
from runs import small_demo
from test_commands import MODELS, options_of, without_models

from smalti.cli import main
from smalti.data.sources import embedded

TINY_RUN = ["--max_train_steps", "2", "--train_batch_size", "4", "--checkpointing_steps", "1"]
FEW = ["--num_samples", "16", "--classifier_epochs", "1"]
# Options that make a command short; a command that waits for visitors prints its configuration.
SHORT = {
    "train-tokenizer": [*TINY_RUN, "--objective.perceptual_network", "alex"],
    "train-prior": TINY_RUN,
    "train-classifier": TINY_RUN,
    "demo": ["--tokenizer_steps", "2", "--prior_steps", "2"],
    "sweep": FEW,
    "compare": ["--rounds", "1", "--timed_images", "1", "--columns", "1"],
    "reflow": ["--num_pairs", "8", "--num_heldout", "4"],
    "invert": ["--steps", "2"],
    "convert llamagen-tokenizer": ["--image_size", "32"],
    "convert llamagen-prior": ["--scales", "2"],
    "ui": ["--print-config"],
    "serve": ["--print-config"],
}
COUNTS = ("--num_images", "--num_images_per_class", "--num_images_per_prompt")
# Folders that pages take for granted, with the commands that make them.
GRANTED = {
    "runs/demo": "smalti demo",
    "runs/mine": "smalti demo --data my_pictures --output_dir runs/mine",
    "runs/flow": "smalti demo --data my_pictures --prior flow-nano --output_dir runs/flow",
    "runs/samples": "smalti generate --model runs/demo/pipeline --output_dir runs/samples",
    "runs/tokenizer": "smalti train-tokenizer --data my_pictures --output_dir runs/tokenizer",
    "runs/latents": "smalti encode --data my_pictures --output_dir runs/latents",
    "runs/prior": "smalti train-prior --output_dir runs/prior",
    "runs/own/tokenizer": "smalti train-tokenizer --data my_pictures "
    "--config scripts/configs/own_64px_tokenizer.yaml",
    "runs/own/latents": "smalti encode --data my_pictures "
    "--tokenizer runs/own/tokenizer/tokenizer --output_dir runs/own/latents",
    "runs/own/prior": "smalti train-prior --config scripts/configs/own_64px_prior.yaml",
}
SIZES = [(64, 64)] * 2 + [(48, 80)] + [(80, 48)] * 5  # of the pictures of a class, (w, h)
OUTPUTS = {"--output_dir", "--output", "--port"}
INPUTS = {"model", "tokenizer", "latents", "prior", "initial", "classifier", "run", "path"}
INPUTS |= {"samples", "reference", "models", "config"}


def tiny_presets(patch: pytest.MonkeyPatch) -> None:
    """Let every preset be narrow and shallow, and as small as it can be cut: 32 px, or 64."""
    from smalti.prior.flow.config import PRESETS as FLOWS
    from smalti.prior.next_scale.config import PRESETS as SCALED
    from smalti.prior.next_token.config import PRESETS as TOKENS
    from smalti.scripts.demo import SCALES
    from smalti.scripts.train_tokenizer import config_at
    from smalti.tokenizer.presets import PRESETS as TOKENIZERS

    size = {"depth": 1, "width": 32, "num_heads": 2}
    for presets in (SCALED, TOKENS):
        for name, preset in presets.items():
            patch.setitem(presets, name, replace(preset, **size))
    for name, preset in FLOWS.items():
        patch.setitem(FLOWS, name, replace(preset, network=replace(preset.network, **size)))
    for name, preset in TOKENIZERS.own.items():
        small = replace(preset, conv=replace(preset.conv, channels=16, num_res_blocks=1))
        sized = config_at(small, 64 if preset.image_size > 128 else 32)
        patch.setitem(TOKENIZERS.own, name, sized)
    small_demo(patch)
    for name, scale in SCALES.items():  # the demo takes half of the samples with captions
        first = replace(scale.tokenizer, tokenizer=TOKENIZERS["vq-32-tiny"])
        patch.setitem(SCALES, name, replace(scale, tokenizer=first, num_samples=32))


def few_embedded(patch: pytest.MonkeyPatch) -> None:
    """Let the embedded sets have eight pictures of each class."""
    load = embedded._load

    def few(title: str) -> embedded.EmbeddedSource:
        whole = load(title)
        first = [torch.nonzero(whole.labels == label)[:8, 0] for label in range(len(whole.classes))]
        chosen = torch.cat(first).sort().values.tolist()
        index = json.loads((embedded.ASSETS / f"{title}.json").read_text())
        for name in ("labels", "names", "groups"):
            index[name] = index[name] and [index[name][i] for i in chosen]
        return embedded.EmbeddedSource(title, index | {"num_heldout": 0}, whole.tiles[chosen])

    patch.setattr(embedded, "_load", few)


def write_given(root: Path) -> None:
    """The files that pages speak of: pictures with classes and captions, masks, weights."""
    whole = embedded._load("emoji")
    for folder in ("my_pictures", "my_validation_pictures", "imagenet/train", "imagenet/val"):
        for label, name in enumerate(("cat", "dog", "fish")):
            (root / folder / name).mkdir(parents=True)
            for number in range(8):
                picture = root / folder / name / f"{number}.png"
                size = SIZES[number]
                whole.read(8 * label + number).resize(size).save(picture)
                picture.with_suffix(".txt").write_text(f"a {name}")
    for name, side in (("cat", 32), ("small", 8), ("emoji", 32)):
        whole.read(0).resize((side, side)).save(root / f"{name}.png")
    mask = Image.new("L", (32, 32))
    mask.paste(255, (8, 8, 24, 24))
    mask.save(root / "mask.png")
    (root / "pictures").mkdir()
    for number in range(10):
        whole.read(number).save(root / "pictures" / f"{number}.png")
    for name in ("samples.npz", "VIRTUAL_imagenet256_labeled.npz"):
        np.savez(root / name, whole.tiles[:10])
    for folder in ("models", "google"):
        (root / folder).mkdir()
        write_text_encoder(root / folder / "flan-t5-base", "t5")
    write_published(root)


def write_published(root: Path) -> None:
    """LlamaGen's files, of a narrow tokenizer and a shallow prior."""
    from smalti.data.latents import CodeSpec
    from smalti.pipelines.convert.convert import export
    from smalti.prior.next_token.model import NextTokenConfig, NextTokenPrior
    from smalti.tokenizer.conv import ConvConfig
    from smalti.tokenizer.quantizers.codebook import CodebookConfig
    from smalti.tokenizer.quantizers.nearest import NearestConfig
    from smalti.tokenizer.vq import VQConfig, VQTokenizer

    conv = ConvConfig(channels=32, num_res_blocks=1, z_channels=32)
    conv = replace(conv, norm_groups=32)
    quantizer = NearestConfig(codebook=CodebookConfig(16, 8))
    export(
        VQTokenizer(VQConfig(image_size=32, conv=conv, quantizer=quantizer)),
        root / "vq_ds16_c2i.pt",
    )
    prior = NextTokenConfig(spec=CodeSpec(16, ((2, 2),)), depth=1, width=128, num_heads=2)
    prior = replace(prior, prefix_rotary="zero")
    export(NextTokenPrior(prior), root / "c2i_B_256.pt")


class House:
    """What all pages share: given files, granted folders, and the commands that have been run."""

    def __init__(self, root: Path) -> None:
        self.granted = root / "granted"
        self.given = root / "given"
        self.given.mkdir()
        write_given(self.given)
        self.run: set[object] = set()  # shapes of commands

    def made(self) -> list[str]:
        """The granted folders that are there."""
        return [name for name in GRANTED if (self.granted / name).exists()]

    def grant(self, path: str) -> None:
        """Put a folder that pages take for granted here, if a path lies in one."""
        name = next((name for name in GRANTED if f"{path}/".startswith(f"{name}/")), None)
        if name is None or Path(name).exists():
            return
        if not (self.granted / name).exists():
            self.start(GRANTED[name].split()[1:])
        else:
            shutil.copytree(self.granted / name, name)

    def start(self, words: Sequence[str]) -> None:
        """Run a command of smalti in its short form, with the folders that it takes for granted.

        Raises:
            AssertionError: it failed.
        """
        for path in inputs_of(words):
            self.grant(path)
        try:
            status = main(short_form(words))
        except SystemExit as end:  # --print-config
            status = int(end.code or 0)
        assert status == 0, " ".join(words)
        for name, command in GRANTED.items():
            if command.split()[1:] == [*words] and not (self.granted / name).exists():
                shutil.copytree(name, self.granted / name)


def inputs_of(words: Sequence[str]) -> list[str]:
    """The paths that a command may read: in its options, and defaults."""
    options = options_of(without_models(words))
    named = [options[name] for name in options.keys() & INPUTS]
    given = [word for word, before in zip(words[1:], words, strict=False) if before in MODELS]
    texts = [text for value in named for text in (value if isinstance(value, list) else [value])]
    return [text for text in (*texts, *given) if isinstance(text, str)]


def outputs_of(words: Sequence[str]) -> list[str]:
    """The paths that a command writes."""
    options = options_of(without_models(words))
    return [options[name] for name in ("output_dir", "pipeline_dir", "out") if options.get(name)]


def short_form(words: Sequence[str]) -> list[str]:
    """A command that takes seconds: few steps, few pictures, the checkpoint of the last step."""
    given = shorter_indices(with_short_values(words))
    name, *options = given
    counted = {*COUNTS, "--prompt"} & {*options}
    more = [*SHORT.get(name, []), *SHORT.get(" ".join(given[:2]), [])]
    if name == "generate" and not counted:
        more += ["--num_images_per_class", "1"]
    if name == "train-prior" and any(word.startswith("flow-") for word in options):
        more += ["--preview.num_inference_steps", "4"]
    if name in ("evaluate", "compare"):
        pipelines = (Path(word) / part for word in options for part in ("prior", "pipeline/prior"))
        sampled = any(folder.is_dir() for folder in pipelines)
        more += FEW if sampled else FEW[2:] if "--samples" in options else []
    return [*given, *more]


def with_short_values(words: Sequence[str]) -> list[str]:
    """The words of a command with small numbers, and without networks that take 10 s or whose
    weights are downloaded; these are tested beside their code."""
    found = []
    for name, word in zip(("", *words), words, strict=False):
        if "--inception" in (name, word) or word == "efflite0":
            continue
        if name in COUNTS or name == "--num_samples":
            word = "16" if name == "--num_samples" else "2"
        word = "alexnet" if word == "inception" else word
        found.append(re.sub(r"checkpoint-\d{6}", "checkpoint-000002", word))
    return found


def shorter_indices(words: list[str]) -> list[str]:
    """The words with the pictures 0 and 20 in place of others."""
    if "--indices" not in words:
        return words
    start = words.index("--indices") + 1
    end = next(i for i in range(start, len(words) + 1) if i == len(words) or words[i][0] == "-")
    return [*words[:start], *("0", "20")[: end - start], *words[end:]]


def shape(words: Sequence[str]) -> object:
    """What makes a command another one: its name, its options, its recipe and its presets."""
    pairs = list(zip(words, [*words[1:], ""], strict=True))
    named = [pair for pair in pairs if pair[0] in ("--config", "--condition", "--image_task")]
    return words[0], frozenset(w for w in words if w.startswith("--")) - OUTPUTS, tuple(named)


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Iterator[House]:
    with pytest.MonkeyPatch.context() as patch:
        tiny_presets(patch)
        few_embedded(patch)
        yield House(tmp_path_factory.mktemp("house"))


RUN = {
    page: [line for line in command_lines(page) if line.in_block and line.smalti] for page in PAGES
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if RUN[page]], ids=lambda page: str(page.relative_to(ROOT))
)
def test_the_commands_of_a_page_work(page: Path, house: House, tmp_path: Path, monkeypatch) -> None:
    shutil.copytree(house.given, tmp_path, dirs_exist_ok=True)
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    monkeypatch.chdir(tmp_path)
    lines = [line.smalti for line in RUN[page]]
    for number, words in enumerate(lines):
        granted = {*outputs_of(words)} <= {*house.made()}
        if shape(words) in house.run and (granted or not used_later(words, lines[number + 1 :])):
            continue
        house.start(words)
        house.run.add(shape(words))


def used_later(words: Sequence[str], later: Sequence[Sequence[str]]) -> bool:
    """Whether a later command reads what this one writes."""
    written = outputs_of(words)
    read = [path for line in later for path in inputs_of(line)]
    return any(f"{path}/".startswith(f"{out}/") for path in read for out in written)
