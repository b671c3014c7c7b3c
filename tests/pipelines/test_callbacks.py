"""Callbacks after each step as in Diffusers, previews, interruption and progress bars."""

import contextlib
import io
from dataclasses import replace

import pytest
import torch
from chance import generators, randomised
from conftest import TINY_VQ

from smalti.errors import SmaltiError
from smalti.pipelines.pipeline import Pipeline
from smalti.prior.next_scale.config import NextScaleConfig
from smalti.prior.next_scale.model import NextScalePrior
from smalti.tokenizer.quantizers.codebook import CodebookConfig
from smalti.tokenizer.quantizers.multi_scale import MultiScaleConfig
from smalti.tokenizer.vq import VQTokenizer

CLASSES = ("cat", "dog", "emu")
SCALES = ((1, 1), (2, 2), (8, 8))
KINDS = {"next-token": 64, "next-scale": 3, "flow": 4}  # steps


def next_scale_pipe() -> Pipeline:
    codebook = CodebookConfig(16, 4, l2_normalise=False)
    quantizer = MultiScaleConfig(codebook=codebook, scales=SCALES, convolutions=1)
    tokenizer = VQTokenizer(replace(TINY_VQ, quantizer=quantizer))
    sizes = NextScaleConfig(depth=1, width=32, num_heads=2)
    fingerprint, config = tokenizer.fingerprint, tokenizer.quantizer.config
    prior = NextScalePrior(sizes.fitted(tokenizer.spec, len(CLASSES), fingerprint, config))
    prior.bind(tokenizer.quantizer)
    return Pipeline(tokenizer, randomised(prior), CLASSES)


@pytest.fixture(params=list(KINDS))
def kind(request) -> str:
    return request.param


@pytest.fixture
def pipe(kind, request, tokenizer, prior) -> Pipeline:
    if kind == "flow":
        pipe = request.getfixturevalue("flow_pipe")
        pipe.sampling = {"num_inference_steps": KINDS["flow"]}
        return pipe
    return next_scale_pipe() if kind == "next-scale" else Pipeline(tokenizer, prior, CLASSES)


def call(pipe: Pipeline, **options):
    return pipe(["cat", 2, 1], generator=generators(0, 1, 2), output_type="pt", **options)


def test_a_callback_gets_the_pipeline_the_step_and_the_latents(pipe, kind) -> None:
    calls, given = [], []

    def callback(pipeline, step, share, kwargs):
        assert pipeline is pipe and list(kwargs) == ["latents"]
        calls.append((step, share))
        given.append(kwargs["latents"])
        return kwargs

    out = call(pipe, callback_on_step_end=callback)
    plain, steps = call(pipe), KINDS[kind]
    assert torch.equal(out.latents, plain.latents) and torch.equal(out.images, plain.images)
    assert calls == [(step, (step + 1) / steps) for step in range(steps)]
    assert all(latents.shape == plain.latents.shape for latents in given)
    assert torch.equal(given[-1], plain.latents) and pipe.num_timesteps == steps
    calls.clear()
    call(pipe, batch_size=2, callback_on_step_end=callback)
    assert [step for step, _ in calls] == [*range(steps), *range(steps)]
    assert {len(latents) for latents in given[-2 * steps :]} == {2, 1}


def test_latents_that_a_callback_returns_replace_those_of_the_sampler(pipe) -> None:
    def callback(pipeline, step, share, kwargs):
        return {"latents": torch.zeros_like(kwargs["latents"])} if share == 1 else None

    out = call(pipe, callback_on_step_end=callback)
    assert not out.latents.any()
    zeros = pipe.tokenizer.decode(torch.zeros_like(out.latents)).clamp(-1, 1)
    torch.testing.assert_close(out.images, (zeros + 1) / 2)


def test_previews_are_pictures_and_the_last_one_is_the_image(pipe, kind) -> None:
    previews = []

    def callback(pipeline, step, share, kwargs):
        previews.append(pipeline.preview(kwargs["latents"]))

    out = call(pipe, callback_on_step_end=callback)
    assert all(p.shape == out.images.shape for p in previews)
    assert all(p.min() >= 0 and p.max() <= 1 for p in previews)
    torch.testing.assert_close(previews[-1], out.images, rtol=1e-4, atol=1e-5)
    assert not torch.equal(previews[0], previews[-1])
    if kind == "next-scale":
        coarse = pipe.tokenizer.preview(out.latents, 1)
        torch.testing.assert_close(previews[0], (coarse + 1) / 2)


@pytest.mark.parametrize("attribute", ["interrupt", "_interrupt"])
def test_an_interrupted_call_returns_what_there_is(pipe, kind, attribute) -> None:
    seen = []

    def callback(pipeline, step, share, kwargs):
        seen.append(kwargs["latents"])
        setattr(pipeline, attribute, step == 1)

    out = call(pipe, callback_on_step_end=callback, batch_size=2)
    assert len(seen) == 2 and torch.equal(out.latents, seen[1])
    assert len(out.images) == 2 and out.labels == [0, 2] and out.names == ["cat", "emu"]
    assert out.images.isfinite().all() and pipe.interrupt
    assert len(call(pipe).images) == 3 and not pipe.interrupt  # the next call is whole


def test_a_callback_that_cannot_be_called_is_refused(pipe) -> None:
    with pytest.raises(SmaltiError, match="has 'noise'; a callback gets latents"):
        call(pipe, callback_on_step_end=print, callback_on_step_end_tensor_inputs=["noise"])
    with pytest.raises(SmaltiError, match="callback_on_step_end returned a str"):
        call(pipe, callback_on_step_end=lambda *_: "latents")
    with pytest.raises(SmaltiError, match="give on_step or callback_on_step_end"):
        call(pipe, callback_on_step_end=print, on_step=print)
    empty = []
    names = {"callback_on_step_end_tensor_inputs": []}
    call(pipe, callback_on_step_end=lambda *given: empty.append(given[-1]), **names)
    assert empty and not any(empty)


def test_progress_bars_count_steps(pipe, kind) -> None:
    def printed(**options) -> str:
        text = io.StringIO()
        with contextlib.redirect_stderr(text):
            call(pipe, batch_size=2, **options)
        return text.getvalue()

    steps = KINDS[kind]
    assert printed() == ""
    assert f"{2 * steps}/{2 * steps}" in printed(progress=True)
    pipe.set_progress_bar_config(desc="sampling")
    assert "sampling: 100%" in printed() and printed(progress=False) == ""
    pipe.set_progress_bar_config(disable=True)
    assert printed() == ""


def test_the_result_may_be_a_tuple(pipe) -> None:
    images, latents, labels, names, prompts = call(pipe, return_dict=False)
    assert torch.equal(images, call(pipe).images) and len(latents) == 3
    assert (labels, names, prompts) == ([0, 2, 1], ["cat", "emu", "dog"], [])


def test_a_prior_of_one_step_has_a_progress_bar_and_no_callbacks(
    tokenizer, prior, monkeypatch, capsys
) -> None:
    pipe, whole = Pipeline(tokenizer, prior, CLASSES), prior.sample

    def sample(condition, *, guidance_scale=1.0, generator=None) -> torch.Tensor:
        return whole(condition, guidance_scale=guidance_scale, generator=generator)

    monkeypatch.setattr(prior, "sample", sample)
    call(pipe, batch_size=2, progress=True)
    assert "2/2" in capsys.readouterr().err
    with pytest.raises(SmaltiError, match="samples in one step: leave out callback_on_step_end"):
        call(pipe, callback_on_step_end=print)
