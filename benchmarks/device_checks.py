"""Checks that need a device: what smalti promises of a CPU holds on an accelerator.

Each check is a function of a device that raises AssertionError, and whose first line says what it
holds. Models are small, with random weights; nothing is downloaded.
"""

import contextlib
import copy
import gc
import tempfile
import threading
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from smalti.data.latents import CodeSpec
from smalti.pipelines.pipeline import Pipeline
from smalti.prior.next_token.model import PRESETS as NEXT_TOKEN
from smalti.prior.next_token.model import NextTokenPrior
from smalti.prior.presets import PRESETS as PRIORS
from smalti.prior.registry import PRIORS as PRIOR_KINDS
from smalti.tokenizer.presets import PRESETS as TOKENIZERS
from smalti.tokenizer.registry import TOKENIZERS as TOKENIZER_KINDS

PAIRS = (("vq-32-tiny", "gpt-nano"), ("var-32-tiny", "var-nano"), ("kl-32-tiny", "flow-nano"))
GUIDED = {"guidance_scale": 2.0}


def pipeline_of(tokenizer_name: str, prior_name: str) -> Pipeline:
    """A pipeline of presets for three classes. What begins at zero, such as gates and output
    layers, is made to matter."""
    torch.manual_seed(0)
    tokenizer = TOKENIZER_KINDS.build(TOKENIZERS[tokenizer_name])
    quantizer = getattr(tokenizer.config, "quantizer", None)
    latents = tokenizer.spec, 3, tokenizer.fingerprint, quantizer
    prior = PRIOR_KINDS.build(PRIORS[prior_name].fitted(*latents))
    for parameter in prior.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    prior.bind(getattr(tokenizer, "quantizer", None))
    return Pipeline(tokenizer, prior, ["a", "b", "c"])


@cache
def pairs(device: torch.device) -> list[tuple[Pipeline, Pipeline]]:
    """Equal pipelines of every kind of prior, on the CPU and on the device. Checks leave them as
    they are."""
    on_cpu = [pipeline_of(*names) for names in PAIRS]
    return [(pipe, copy.deepcopy(pipe).to(device)) for pipe in on_cpu]


def greedy(pipe: Pipeline, **options: object) -> dict[str, object]:
    """Options with which a pipeline gives the same latents at every call, and on any device."""
    is_flow = hasattr(pipe.prior.config, "network")
    own = {"num_inference_steps": 4} if is_flow else {"temperature": 0}
    return {**own, "output_type": "pt", "generator": torch.Generator().manual_seed(1), **options}


def same_codes(device: torch.device) -> None:
    """Latents and images in fp32 are those of the CPU: equal codes, images within a grey level."""
    for on_cpu, pipe in pairs(device):
        assert pipe.tokenizer.fingerprint == on_cpu.tokenizer.fingerprint
        for options in ({}, GUIDED):
            expected = on_cpu([0, 1, 2], **greedy(on_cpu, **options))
            found = pipe([0, 1, 2], **greedy(pipe, **options))
            latents = found.latents.cpu()
            if latents.is_floating_point():
                torch.testing.assert_close(latents, expected.latents, rtol=1e-3, atol=1e-3)
            else:
                assert torch.equal(latents, expected.latents), type(pipe.prior).__name__
            torch.testing.assert_close(found.images.cpu(), expected.images, rtol=0, atol=1 / 255)
        images = torch.rand(2, 3, 32, 32) * 2 - 1
        stored = pipe.tokenizer.store(images.to(device)).cpu()
        torch.testing.assert_close(stored, on_cpu.tokenizer.store(images), rtol=1e-3, atol=1e-3)


def bf16_is_near(device: torch.device) -> None:
    """In bf16, decoded images differ from those in fp32 by 0.02 of their range on average, and
    logits by 5 % of their spread."""
    for on_cpu, pipe in pairs(device):
        expected = pipe([0, 1, 2], **greedy(pipe))
        half = copy.deepcopy(pipe).to(torch.bfloat16)
        with torch.no_grad():
            latents = expected.latents
            latents = latents.bfloat16() if latents.is_floating_point() else latents
            decoded = half.tokenizer.decode(latents).float() / 2 + 0.5
        error = (decoded.clamp(0, 1) - expected.images).abs().mean().item()
        assert error < 0.02, f"{type(on_cpu.tokenizer).__name__}: {error:.3f}"
        if not expected.latents.is_floating_point():
            labels = torch.arange(3, device=device)
            with torch.no_grad():
                exact = pipe.prior.logits(expected.latents, labels)
                near = half.prior.logits(expected.latents, labels).float()
            share = ((near - exact).std() / exact.std()).item()
            assert share < 0.05, f"{type(on_cpu.prior).__name__}: {share:.3f}"


def independent_of_the_batch(device: torch.device) -> None:
    """With a generator for each image, fp32 latents are those of single calls."""
    for on_cpu, pipe in pairs(device):
        options = {**greedy(on_cpu), "temperature": 1.0}
        if hasattr(pipe.prior.config, "network"):
            del options["temperature"]

        def generators() -> list[torch.Generator]:
            return [torch.Generator().manual_seed(seed) for seed in range(3)]

        together = pipe([0, 1, 2], **{**options, "generator": generators()}).latents
        for label, own in enumerate(generators()):
            alone = pipe([label], **{**options, "generator": [own]}).latents[0]
            torch.testing.assert_close(alone, together[label], rtol=1e-3, atol=1e-3)


def resume_is_exact(device: torch.device) -> None:
    """A run that was interrupted and resumed ends with the weights of one that was not."""
    with tempfile.TemporaryDirectory() as temporary:
        whole = trained(Path(temporary, "whole"), device, steps=6)
        trained(Path(temporary, "parts"), device, steps=3)
        resumed = trained(Path(temporary, "parts"), device, steps=6, resume=True)
        for name, value in whole.items():
            assert torch.equal(value, resumed[name]), name


class Killed(Exception):
    """Ends a run before its last step."""


def trained(
    folder: Path, device: torch.device, steps: int, resume: bool = False
) -> dict[str, Tensor]:
    """The weights of a small next-token prior after a run, which writes a checkpoint."""
    from smalti.training import processes
    from smalti.training.checkpoint import OptimizerState
    from smalti.training.config import RunConfig
    from smalti.training.optim import EMA, adamw
    from smalti.training.run import Run, seed_everything

    config = RunConfig(
        folder,
        mixed_precision="no",
        max_train_steps=6,
        checkpointing_steps=3,
        resume_from_checkpoint="latest" if resume else None,
    )
    run = Run(config, kind="check", result=folder / "model")
    torch.manual_seed(0)
    spec = CodeSpec(64, ((4, 4),))
    prior = NextTokenPrior(replace(NEXT_TOKEN["gpt-nano"], spec=spec, num_classes=3, depth=2))
    optimizer, ema = adamw(prior, config), EMA(prior, config.ema_decay)
    run.track(model=prior, ema=ema, optimizer=OptimizerState(optimizer))
    model = processes.shard(run.accelerator, prior, optimizer)
    assert next(prior.parameters()).device.type == device.type
    run.resume("data")
    model.train()
    with contextlib.suppress(Killed), run.interruptible():
        for step in run.remaining_steps():
            if step >= steps:
                raise Killed
            seed_everything(config.seed, step, run.rank)
            codes = torch.randint(64, (8, 16), device=device)
            with run.micro_batch(0, model):
                run.backward(model(codes, codes[:, 0] % 3).total)
            optimizer.step()
            ema.update(prior)
            optimizer.zero_grad(set_to_none=True)
            run.checkpoint(step)
        run.export(prior.save_pretrained)
    return {name: value.detach().cpu().clone() for name, value in prior.state_dict().items()}


def two_streams(device: torch.device) -> None:
    """Two calls at once, in threads with streams of their own, give what each gives alone."""
    for _, pipe in pairs(device):
        other = copy.deepcopy(pipe)
        expected = [pipe([label] * 2, **greedy(pipe)).latents.cpu() for label in (0, 1)]
        found: dict[int, Tensor] = {}

        def sample(own: Pipeline, label: int, found: dict[int, Tensor] = found) -> None:
            if device.type == "cuda":
                torch.cuda.set_stream(torch.cuda.Stream(device))
            found[label] = own([label] * 2, **greedy(own)).latents.cpu()

        threads = [
            threading.Thread(target=sample, args=(own, label))
            for label, own in enumerate((pipe, other))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for label, latents in enumerate(expected):
            assert torch.equal(found[label], latents), type(pipe.prior).__name__


def memory_stays(device: torch.device) -> None:
    """Calls after the first leave no more memory in use, and take no more at their peak."""
    for _, pipe in pairs(device):

        def used(pipe: Pipeline = pipe) -> tuple[int, int]:
            if device.type != "cuda":
                pipe([0, 1, 2], **greedy(pipe))
                return 0, 0
            torch.cuda.reset_peak_memory_stats(device)
            pipe([0, 1, 2], **greedy(pipe))
            gc.collect()
            return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)

        used()
        first, again = used(), used()
        assert again[0] <= first[0] and again[1] <= first[1], f"{first} bytes, then {again}"


def loading_is_exact(device: torch.device) -> None:
    """A pipeline that is saved from the device and loaded to it is the same, in fp32 and bf16."""
    for _, pipe in pairs(device):
        with tempfile.TemporaryDirectory() as temporary:
            folder = pipe.save_pretrained(Path(temporary, "p"))
            for dtype in ("float32", "bfloat16"):
                loaded = Pipeline.from_pretrained(folder, device=device, dtype=dtype)
                assert loaded.prior.fingerprint == pipe.prior.fingerprint
                assert loaded.device.type == device.type


CHECKS = (
    same_codes,
    bf16_is_near,
    independent_of_the_batch,
    resume_is_exact,
    two_streams,
    memory_stays,
    loading_is_exact,
)
