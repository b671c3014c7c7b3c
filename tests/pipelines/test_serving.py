"""Dynamic batching: answers do not mix, do not depend on each other, and the queue is bounded."""

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chance import randomised
from conftest import TINY_CONV, TINY_PRIOR
from PIL import Image

from smalti.errors import ConfigurationError, GenerationError
from smalti.pipelines.continuous import ContinuousBatch
from smalti.pipelines.generation import generate_folder, group_size
from smalti.pipelines.pipeline import Pipeline
from smalti.pipelines.serving import Batcher, PictureRequest, QueueFullError, StoppingError
from smalti.prior.flow.dit import DiTConfig
from smalti.prior.flow.prior import FlowConfig, FlowPrior
from smalti.prior.next_token.model import NextTokenPrior
from smalti.tokenizer.kl import KLConfig, KLTokenizer

CLASSES = ("cat", "dog", "owl")


@pytest.fixture
def pipe(tokenizer, prior) -> Pipeline:
    return Pipeline(tokenizer, prior, CLASSES)


def images_of(batcher: Batcher, request: PictureRequest) -> list[bytes]:
    return [picture.result.result(60).tobytes() for picture in batcher.submit(request)]


def wanted(label: int, seed: int | None, **changes) -> PictureRequest:
    return PictureRequest(class_labels=[label], seed=seed, **changes)


class Held:
    """A pipeline that begins to sample when it is told to, and notes the sizes of batches. Of a
    batcher that is not continuous."""

    def __init__(self, batcher: Batcher) -> None:
        self.go, self.began, self.sizes = threading.Event(), threading.Event(), []
        original = batcher._sample

        def sample(batch):
            self.sizes.append(len(batch))
            self.began.set()
            assert self.go.wait(60)
            return original(batch)

        batcher._sample = sample


@pytest.mark.parametrize("continuous", [True, False])
def test_a_picture_is_the_same_alone_and_in_a_crowd(pipe, continuous: bool) -> None:
    """To the byte, in fp32; whether it joins a running batch or not."""
    alone = Batcher(pipe, max_wait=0, continuous=False)
    expected = {(s % 3, s): images_of(alone, wanted(s % 3, s)) for s in range(20)}
    alone.join()
    sizes: list[int] = []
    crowd = Batcher(
        pipe,
        max_wait=0.5,
        observe=lambda pictures, seconds: sizes.append(pictures),
        continuous=continuous,
    )
    found: dict[tuple[int, int], list[bytes]] = {}
    threads = [
        threading.Thread(target=lambda k=key: found.update({k: images_of(crowd, wanted(*k))}))
        for key in expected
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    crowd.join()
    assert found == expected
    assert sum(sizes) == 20 and (continuous or max(sizes) > 4)
    assert len({images[0] for images in found.values()}) == 20


def test_the_first_picture_of_a_job_has_the_seed_of_the_job(pipe, tmp_path: Path) -> None:
    paths = generate_folder(pipe, tmp_path / "job", [1], seed=16, guidance_scale=2.0, batch_size=1)
    batcher = Batcher(pipe)
    assert images_of(batcher, wanted(1, 16, guidance_scale=2.0)) == [Image.open(paths[0]).tobytes()]
    batcher.join()


def test_every_picture_of_a_request_can_be_made_again_by_its_seed(pipe) -> None:
    batcher = Batcher(pipe, max_batch_size=4)
    request = PictureRequest(class_labels=["owl", 0], num_images=3, seed=9)
    pictures = batcher.submit(request)
    assert [(p.label, p.seed) for p in pictures] == [
        (2, 9), (2, 10), (2, 11), (0, 12), (0, 13), (0, 14),
    ]  # fmt: skip
    for picture in pictures:
        again = images_of(batcher, wanted(picture.label, picture.seed))
        assert again == [picture.result.result(60).tobytes()]
    batcher.join()


def test_pictures_without_a_seed_fill_a_batch(pipe) -> None:
    batcher = Batcher(pipe, max_batch_size=8, continuous=False)
    held = Held(batcher)
    first = batcher.submit(wanted(0, None))
    assert held.began.wait(60)
    rest = [picture for _ in range(8) for picture in batcher.submit(wanted(1, None))]
    held.go.set()
    assert all(picture.result.result(60) for picture in [*first, *rest])
    batcher.join()
    assert held.sizes == [1, 8]
    assert len({picture.seed for picture in rest}) == 8


def test_only_equal_settings_share_a_batch(pipe) -> None:
    batcher = Batcher(pipe, max_wait=0.2, continuous=False)
    held = Held(batcher)
    held.go.set()
    made = [
        batcher.submit(wanted(0, seed, options=options))
        for seed, options in enumerate(({}, {"top_k": 3}, {}, {"top_k": 3}, {"top_k": 2}))
    ]
    assert all(pictures[0].result.result(60) for pictures in made)
    batcher.join()
    assert held.sizes == [2, 2, 1]


def test_a_picture_waits_only_so_long(pipe) -> None:
    batcher = Batcher(pipe, max_wait=0.3, continuous=False)
    start = time.monotonic()
    images_of(batcher, wanted(0, 1))
    assert time.monotonic() - start >= 0.3
    held = Held(batcher)
    held.go.set()
    for seed in range(group_size(pipe)):
        batcher.submit(wanted(0, seed))
    assert held.began.wait(0.25), "a full batch does not wait"
    batcher.join()


def test_a_full_queue_refuses_and_a_cancelled_request_makes_place(pipe) -> None:
    batcher = Batcher(pipe, max_queue=3, max_batch_size=2, continuous=False)
    held = Held(batcher)
    running = batcher.submit(wanted(0, 0))
    assert held.began.wait(60)
    waiting = [batcher.submit(wanted(0, seed)) for seed in (1, 2)]
    with pytest.raises(QueueFullError, match=r"2 pictures are waiting.* no place for 2") as full:
        batcher.submit(PictureRequest(class_labels=[0, 1]))
    assert 1 <= full.value.retry_after <= 60
    batcher.cancel([*waiting[0], *running])
    assert batcher.waiting == 1
    both = batcher.submit(PictureRequest(class_labels=[0, 1]))
    held.go.set()
    assert all(picture.result.result(60) for picture in [*waiting[1], *both, *running])
    assert waiting[0][0].result.cancelled()
    batcher.join()
    assert sum(held.sizes) == 4


def test_a_stopped_batcher_finishes_what_it_accepted(pipe) -> None:
    batcher = Batcher(pipe, max_wait=60, continuous=False)
    held = Held(batcher)
    pictures = batcher.submit(PictureRequest(class_labels=[0, 1, 2]))
    assert batcher.is_ready and not batcher.is_idle
    batcher.stop()
    with pytest.raises(StoppingError, match="stopping"):
        batcher.submit(wanted(0, 1))
    assert not batcher.is_ready
    held.go.set()
    batcher.join()
    assert batcher.is_idle and all(picture.result.done() for picture in pictures)


@pytest.mark.parametrize("continuous", [True, False])
def test_a_failed_batch_fails_its_pictures_only(pipe, monkeypatch, continuous: bool) -> None:
    batcher = Batcher(pipe, continuous=continuous)
    with monkeypatch.context() as patch:
        patch.setattr(batcher, "_sample", lambda batch: 1 / 0)
        patch.setattr(ContinuousBatch, "step", lambda batch: 1 / 0)
        failed = batcher.submit(wanted(0, 1))
        with pytest.raises(ZeroDivisionError):
            failed[0].result.result(60)
    assert images_of(batcher, wanted(0, 1)) and batcher.is_ready
    batcher.join()


class Paced:
    """Lets a continuous batch sample a number of codes, and counts its steps."""

    def __init__(self, monkeypatch) -> None:
        self.may, self.done, original = threading.Semaphore(0), 0, ContinuousBatch.step

        def step(batch):
            assert self.may.acquire(timeout=60)
            found = original(batch)
            self.done += 1
            return found

        monkeypatch.setattr(ContinuousBatch, "step", step)

    def go(self, steps: int) -> None:
        until = self.done + steps
        self.may.release(steps)
        end = time.monotonic() + 60
        while self.done < until and time.monotonic() < end:
            time.sleep(0.001)
        assert self.done == until


LENGTH = TINY_PRIOR.spec.length  # steps of a picture


def test_a_picture_joins_a_running_batch_and_leaves_it(pipe, monkeypatch) -> None:
    """With options of its own; its result is there before the others are finished."""
    options = {"options": {"top_k": 3}, "guidance_scale": 1.0}
    plain = Batcher(pipe, continuous=False, max_wait=0)
    expected = [images_of(plain, wanted(0, 0)), images_of(plain, wanted(1, 1, **options))]
    plain.join()
    paced = Paced(monkeypatch)
    batcher = Batcher(pipe)
    (first,) = batcher.submit(wanted(0, 0))
    paced.go(10)
    (second,) = batcher.submit(wanted(1, 1, **options))
    paced.go(LENGTH - 10)
    assert [first.result.result(60).tobytes()] == expected[0]
    assert not second.result.done() and not batcher.is_idle
    paced.may.release(12)
    assert [second.result.result(60).tobytes()] == expected[1]
    assert LENGTH + 9 <= paced.done <= LENGTH + 12
    batcher.join()


def test_a_client_that_goes_away_frees_its_slot(pipe, monkeypatch) -> None:
    paced = Paced(monkeypatch)
    batcher = Batcher(pipe, max_batch_size=1)
    (first,) = batcher.submit(wanted(0, 0))
    paced.go(5)
    (second,) = batcher.submit(wanted(1, 1))
    batcher.cancel([first])
    paced.may.release(LENGTH + 1)  # one of them may have begun with the first
    assert second.result.result(60) and first.result.cancelled()
    assert paced.done <= 5 + 1 + LENGTH
    batcher.join()
    assert batcher.is_idle


def test_a_stopped_batcher_finishes_what_is_in_its_batch_and_its_queue(pipe, monkeypatch) -> None:
    paced = Paced(monkeypatch)
    batcher = Batcher(pipe, max_batch_size=2)
    pictures = batcher.submit(PictureRequest(class_labels=[0, 1, 2]))
    paced.go(1)
    assert batcher.waiting == 1
    batcher.stop()
    paced.may.release(1000)
    batcher.join()
    assert batcher.is_idle and all(picture.result.done() for picture in pictures)


def test_sizes_take_turns_in_a_continuous_batch(pipe) -> None:
    requests = [wanted(0, seed, image_size=16 if seed % 2 else (8, 16)) for seed in range(4)]
    found = []
    for continuous in (True, False):
        batcher = Batcher(pipe, image_sizes=[(8, 16)], max_wait=0, continuous=continuous)
        made = [batcher.submit(request)[0] for request in requests]
        found.append([picture.result.result(60).tobytes() for picture in made])
        batcher.join()
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("changes", "argument", "message"),
    [
        ({"class_labels": ["cow"]}, "class_labels", "no class is named"),
        ({"class_labels": [3]}, "class_labels", "out of range"),
        ({"class_labels": []}, "class_labels", "at least one class"),
        ({"class_labels": None}, "class_labels", "pass class_labels"),
        ({"prompt": "a cat"}, "prompt", "no prompt"),
        ({"negative_prompt": "a cat"}, "negative_prompt", "negative_prompt is for"),
        ({"num_images": 0}, "num_images", "num_images is 0"),
        ({"seed": -1}, "seed", "seed is -1"),
        ({"seed": 2**53}, "seed", "seed is"),
        ({"guidance_scale": float("inf")}, "guidance_scale", "guidance_scale is inf"),
        ({"options": {"temprature": 1}}, "temprature", 'did you mean "temperature"'),
        ({"options": {"top_k": 1, "top_p": 2}}, "top_p", "top_p is 2"),
        ({"options": {"temperature": -1, "top_p": 2}}, "temperature", "temperature is -1"),
        ({"image_size": 24}, "image_size", "image_size is 24; choose one of"),
    ],
)
def test_a_wrong_request_is_refused_before_it_waits(pipe, changes, argument, message: str) -> None:
    batcher = Batcher(pipe)
    with pytest.raises(GenerationError, match=message) as caught:
        batcher.submit(replace(PictureRequest(class_labels=[0]), **changes))
    assert caught.value.argument == argument
    assert batcher.waiting == 0
    batcher.join()


def test_an_unconditional_pipeline_takes_a_number(tokenizer) -> None:
    prior = NextTokenPrior(replace(TINY_PRIOR, condition="none", num_classes=0))
    batcher = Batcher(Pipeline(tokenizer, prior, ()))
    assert len(images_of(batcher, PictureRequest(num_images=2))) == 2
    with pytest.raises(GenerationError, match="give no class and no prompt") as caught:
        batcher.submit(PictureRequest(prompt="x"))
    assert caught.value.argument == "prompt"
    batcher.join()


def test_captions_are_checked_and_batched(tokenizer) -> None:
    config = replace(
        TINY_PRIOR,
        condition="text",
        num_classes=0,
        text_encoder="bytes",
        text_length=12,
        text_dim=8,
    )
    pipe = Pipeline(tokenizer, randomised(NextTokenPrior(config)), ())
    batcher = Batcher(pipe, max_wait=0.2, max_batch_size=4)
    requests = [PictureRequest(prompt=text, seed=seed) for seed, text in enumerate(("a cat", "x"))]
    together = [batcher.submit(request)[0] for request in requests]
    for request, picture in zip(requests, together, strict=True):
        assert images_of(batcher, request) == [picture.result.result(60).tobytes()]
    for name in ("prompt", "negative_prompt"):
        wanted = replace(PictureRequest(prompt="a cat"), **{name: "a very long caption"})
        with pytest.raises(GenerationError, match="longer than the text length of 12") as caught:
            batcher.submit(wanted)
        assert caught.value.argument == name
    negative = PictureRequest(prompt="a cat", negative_prompt="x", guidance_scale=3.0, seed=0)
    assert images_of(batcher, negative) != images_of(batcher, requests[0])
    batcher.join()


def test_features_of_an_unknown_encoder_cannot_be_requested(tokenizer) -> None:
    config = replace(TINY_PRIOR, condition="text", num_classes=0, text_length=5, text_dim=6)
    with pytest.raises(ConfigurationError, match="prompt_embeds"):
        Batcher(Pipeline(tokenizer, NextTokenPrior(config), ()))


def flow_pipeline(**changes) -> Pipeline:
    network = DiTConfig(2, 2, (8, 8), 1, 32, 2, 2, num_classes=3, positions="rotary")
    prior = randomised(FlowPrior(FlowConfig(network=network, **changes)), std=0.1)
    vae = KLTokenizer(KLConfig(image_size=16, conv=replace(TINY_CONV, z_channels=2)))
    return Pipeline(vae, prior, CLASSES)


def test_the_sizes_that_a_prior_was_trained_on_are_served() -> None:
    batcher = Batcher(flow_pipeline(buckets=((8, 8), (8, 4))))
    assert [*batcher.pipelines] == [16, (16, 8)]
    batcher.join()


def test_a_flow_prior_serves_several_sizes_exactly() -> None:
    batcher = Batcher(flow_pipeline(), image_sizes=[(8, 16)], max_wait=0.2)
    assert batcher.batch_sizes == {16: 8, (8, 16): 16}
    options = {"num_inference_steps": 2, "solver": "euler"}
    requests = [
        wanted(0, seed, image_size=size, options=options)
        for seed in range(3)
        for size in (16, (8, 16))
    ]
    together = [batcher.submit(request)[0] for request in requests]
    for request, picture in zip(requests, together, strict=True):
        image = picture.result.result(60)
        assert image.size == ((16, 8) if request.image_size == (8, 16) else (16, 16))
        assert images_of(batcher, request) == [image.tobytes()]
    batcher.join()


def test_in_half_precision_a_batch_is_as_large_as_it_is_needed(pipe) -> None:
    batcher = Batcher(pipe.to(torch.bfloat16), max_wait=0.2, max_batch_size=4)
    held = Held(batcher)
    held.go.set()
    made = [batcher.submit(wanted(0, 4 * seed))[0] for seed in range(3)]  # the same row in fp32
    assert all(picture.result.result(60) for picture in made)
    batcher.join()
    assert held.sizes == [3]
