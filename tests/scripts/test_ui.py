"""`smalti ui`: what its tabs compute, and the window itself in headless Chromium."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from browser import PROGRAMS, Page, chromium
from chance import randomised
from conftest import CLASSES, TINY_PRIOR, TINY_VQ
from PIL import Image, ImageDraw

from smalti.cli import main
from smalti.errors import ConfigurationError, DataError, GenerationError
from smalti.evaluation.reconstruction import psnr
from smalti.pipelines.generation import picture_generator
from smalti.pipelines.pipeline import Pipeline
from smalti.prior.conditions.image import ImageConfig
from smalti.prior.flow.prior import FlowPrior
from smalti.prior.next_token.model import NextTokenPrior
from smalti.scripts import window
from smalti.scripts.ui import UIConfig, Window, brush_radius, check_runs, showing
from smalti.scripts.window import Frame, Settings
from smalti.tokenizer.vq import VQTokenizer

REQUIRED = "SMALTI_BROWSER_REQUIRED"  # set by .ci/run: without a browser the tests then fail


@pytest.fixture
def pipe(tokenizer, prior) -> Pipeline:
    return Pipeline(tokenizer, prior, CLASSES)


@pytest.fixture
def flow_pipe(flow_pipe) -> Pipeline:
    flow_pipe.sampling = {"num_inference_steps": 6, "solver": "euler"}
    return flow_pipe


@pytest.fixture
def image_pipe(flow_pipe) -> Pipeline:
    """A prior that is given a picture with a mask."""
    tokenizer, config = flow_pipe.tokenizer, flow_pipe.prior.config
    image = ImageConfig(tokenizer.spec.channels + 1, "inpainting")
    config = config.conditioned("image", image=image)
    prior = FlowPrior(config.fitted(tokenizer.spec, 0, tokenizer.fingerprint))
    pipe = Pipeline(tokenizer, randomised(prior), ())
    pipe.sampling = {"num_inference_steps": 2}
    return pipe


@pytest.fixture
def text_pipe(tokenizer) -> Pipeline:
    """Of prompts and classes of its own."""
    text = {"text_encoder": "bytes", "text_length": 12, "text_dim": 8}
    config = replace(TINY_PRIOR, condition="class+text", num_classes=2, **text)
    return Pipeline(tokenizer, randomised(NextTokenPrior(config)), ("ant", "bee"))


def photo(seed: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def arrays(pictures: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(picture) for picture in pictures])


# -- Without a browser --


def test_previews_grow_into_the_pictures_that_generate_would_make(pipe) -> None:
    settings = Settings(classes=("dog", "cat"), number=2, seed=7, options={"temperature": 0.5})
    frames = list(window.live(pipe, **settings.keywords(pipe)))
    assert 2 < len(frames) <= window.PREVIEWS + 1
    assert [frame.done for frame in frames] == sorted(frame.done for frame in frames)
    assert frames[-1].done == 1 and all(frame.done < 1 for frame in frames[:-1])
    assert all(len(frame.pictures) == 4 for frame in frames)
    assert frames[-1].captions == ["dog", "dog", "cat", "cat"]
    made = pipe(
        ["dog", "cat"],
        num_images_per_prompt=2,
        generator=[picture_generator(7, index) for index in range(4)],
        temperature=0.5,
    )
    assert (arrays(frames[-1].pictures) == arrays(made.images)).all()


def test_a_flow_shows_estimates(flow_pipe) -> None:
    frames = list(window.live(flow_pipe, **Settings().keywords(flow_pipe)))
    assert [round(frame.done * 6) for frame in frames] == [1, 2, 3, 4, 5, 6]
    assert frames[0].pictures[0].size == (8, 8)


def test_closing_the_frames_ends_the_sampling(pipe) -> None:
    frames = window.live(pipe, **Settings().keywords(pipe))
    next(frames)
    frames.close()
    assert pipe.interrupt
    assert not any(thread.name == "sampling" for thread in threading.enumerate())


def test_stop_leaves_what_there_is(pipe) -> None:
    frames = window.live(pipe, **Settings().keywords(pipe))
    next(frames)
    tiny = Window({"tiny": pipe}, ())
    tiny.interrupt()
    tiny.interrupt()
    last = list(frames)[-1]
    assert len(last.pictures) == 4 and last.is_last and last.done < 1
    again = list(window.live(pipe, **Settings().keywords(pipe)))[-1]  # a call begins afresh
    assert again.done == 1 and again.is_last


def test_stop_ends_a_comparison(pipe, flow_pipe) -> None:
    both = window.side_by_side(pipe, flow_pipe, Settings())
    next(both)
    pipe.interrupt = True
    assert all(right is None for _, right in both)


def test_errors_of_a_call_come_out_of_its_frames(pipe) -> None:
    with pytest.raises(GenerationError, match="no class is named"):
        list(window.live(pipe, **Settings(classes=("cow",)).keywords(pipe)))
    assert not any(thread.name == "sampling" for thread in threading.enumerate())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"number": 65}, "65 pictures are asked for: choose 1 to 64"),
        ({"number": 33, "classes": ("cat", "dog")}, "66 pictures"),
        ({"number": 0}, "0 pictures"),
        ({"seed": -1}, "seed is -1"),
        ({"options": {"num_inference_steps": 10**6}}, "num_inference_steps is 1000000"),
    ],
)
def test_what_is_asked_for_is_bounded(given: dict[str, Any], message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        Settings(**given)


def test_the_settings_are_those_of_the_pipeline(pipe, flow_pipe) -> None:
    both = Window({"codes": pipe, "flow": flow_pipe}, ())
    codes, flow = both._values("codes"), both._values("flow")
    assert codes["temperature"]["visible"] and not codes["solver"]["visible"]
    assert flow["solver"] == {"value": "euler", "visible": True}
    assert flow["num_inference_steps"]["value"] == 6 and not flow["temperature"]["visible"]
    assert codes["classes"] == {"choices": [*CLASSES], "value": ["cat"], "visible": True}
    assert not codes["prompt"]["visible"]
    values = {name: each["value"] for name, each in flow.items()}
    options = [values[name] for name in both.options]
    pipeline, settings = both.given("flow", ["emu"], "", "", 2, 3, 1.5, *options)
    assert pipeline is flow_pipe and (settings.number, settings.seed) == (2, 3)
    assert settings.options["guidance_interval"] == (0.0, 1.0)
    assert set(settings.options) == {o.name for o in window.options_of(flow_pipe)}
    list(window.live(pipeline, **settings.keywords(pipeline)))


def test_an_interval_is_two_numbers(pipe) -> None:
    option = next(o for o in window.options_of(pipe) if o.name == "guidance_interval")
    assert window.option_value(option, "0.25, 1") == (0.25, 1.0)
    assert window.option_value(option, "") is None
    with pytest.raises(GenerationError, match="guidance_interval is half: give two numbers"):
        window.option_value(option, "half")


def test_two_pipelines_get_the_same_seeds(pipe, flow_pipe) -> None:
    settings = Settings(classes=("emu",), number=2, seed=5, options={"temperature": 0.5})
    *_, (left, right) = window.side_by_side(pipe, flow_pipe, settings)
    assert left.captions == right.captions == ["emu", "emu"]
    *_, (_, same) = window.side_by_side(flow_pipe, pipe, replace(settings, options={}))
    plain = list(window.live(pipe, **replace(settings, options={}).keywords(pipe)))[-1]
    assert (arrays(same.pictures) == arrays(plain.pictures)).all()


def test_a_reconstruction_its_codes_and_its_psnr(pipe) -> None:
    found = window.reconstructed(pipe, photo())
    images = window.image_of(pipe.tokenizer, photo())
    expected = psnr(pipe.tokenizer.reconstruct(images), images).item()
    assert found.words == f"PSNR {expected:.2f} dB from 64 codes of 16 (8 x 8)"
    assert found.original.size == found.reconstruction.size == found.codes.size == (128, 128)
    codes = pipe.tokenizer.encode(images).view(8, 8).numpy()
    shown = np.asarray(found.codes)[8::16, 8::16]  # the middle of each code's square
    assert len({tuple(colour) for colour in shown.reshape(-1, 3)}) == len(np.unique(codes))
    assert (shown[codes == codes[0, 0]] == shown[0, 0]).all()


def test_channels_of_continuous_latents_are_grey_tiles(flow_pipe) -> None:
    spec = flow_pipe.tokenizer.spec
    shown = window.shown_latents(flow_pipe.tokenizer, torch.zeros(1, 2, spec.height, spec.width))
    assert {127, 128} & {*np.asarray(shown).ravel().tolist()}


def test_every_code_of_a_small_codebook_has_its_colour() -> None:
    colours = window.code_colours(np.arange(256).reshape(16, 16))
    assert len({tuple(c) for c in colours.reshape(-1, 3).tolist()}) == 256


def test_an_interpolation_begins_and_ends_with_the_pictures(pipe) -> None:
    strip = window.interpolated(pipe, photo(0), photo(1), steps=3)
    assert strip.width > 5 * 96 and strip.height > 2 * 96
    with pytest.raises(ConfigurationError, match="steps is 33; use 2 to 32"):
        window.interpolated(pipe, photo(0), photo(1), steps=33)


def test_what_is_painted_is_generated_and_the_rest_is_kept(pipe) -> None:
    picture = photo(size=(32, 32))
    layer = Image.new("RGBA", picture.size)
    ImageDraw.Draw(layer).rectangle((0, 0, 15, 31), fill=(255, 0, 80, 128))
    settings = Settings(number=2)
    first, *_, last = window.inpainted(pipe, picture, [layer], settings)
    kept = np.asarray(window.cropped(pipe.tokenizer, picture))
    assert (np.asarray(first.pictures[0])[:, :8] == 128).all()
    assert len(last.pictures) == 2 and last.done == 1
    for made in arrays(last.pictures):
        assert (made[:, 8:] == kept[:, 8:]).all() and (made[:, :8] != kept[:, :8]).any()
    for layers in ([], [Image.new("RGBA", picture.size)]):
        with pytest.raises(DataError, match="nothing is painted"):
            list(window.inpainted(pipe, picture, layers, settings))


def test_a_prior_that_was_trained_to_inpaint_gets_the_picture(image_pipe) -> None:
    layer = Image.new("RGBA", (32, 32))
    ImageDraw.Draw(layer).rectangle((0, 0, 15, 31), fill="red")
    *_, last = window.inpainted(image_pipe, photo(size=(32, 32)), [layer], Settings(number=2))
    assert len(last.pictures) == 2 and last.done == 1


def test_uploads_are_read_as_pictures_of_a_data_set_are(tmp_path) -> None:
    with pytest.raises(DataError, match="there is no picture"):
        window.uploaded(None)
    film = [photo(seed) for seed in (1, 2)]
    film[0].save(tmp_path / "film.webp", save_all=True, append_images=film[1:], lossless=True)
    first = window.uploaded(tmp_path / "film.webp")
    assert (np.asarray(first.convert("RGB")) == np.asarray(film[0])).all()
    Image.new("I;16", (20, 10), 65535).save(tmp_path / "deep.png")
    assert window.uploaded(tmp_path / "deep.png").getpixel((0, 0)) == (255,) * 4
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"^broken\.png cannot be decoded"):
        window.uploaded(tmp_path / "broken.png")
    Image.new("1", (8000, 8000)).save(tmp_path / "large.png")
    with pytest.raises(DataError, match=r"^large\.png .*pixels"):
        window.uploaded(tmp_path / "large.png")


def test_alpha_is_kept_for_images_that_have_it() -> None:
    glass = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    on_white = VQTokenizer(TINY_VQ)
    with_alpha = VQTokenizer(replace(TINY_VQ, image_channels=4))
    assert window.cropped(on_white, glass).getpixel((0, 0)) == (255, 255, 255)
    assert window.cropped(with_alpha, glass).getpixel((0, 0))[3] == 0


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "prior"
    (folder / "samples").mkdir(parents=True)
    lines = [{"step": step, "loss": 1 / step, "val_loss": 2 / step} for step in (1, 2, 3)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 4, "lo')
    for step in (10, 20):
        photo(step).save(folder / "samples" / f"{step:06}.png")
    return folder


def test_a_run_shows_its_curves_and_its_newest_pictures(run, tmp_path) -> None:
    view = window.run_view(run)
    assert 'aria-label="loss"' in view.curves and "validation: 0.6667" in view.curves
    assert [caption for _, caption in view.previews] == ["samples, 000020"]
    assert not list(run.glob("*.html"))  # nothing is written
    missing = window.run_view(tmp_path / "missing")
    assert "no metrics in missing yet" in missing.curves and missing.previews == []
    (run / "metrics.jsonl").unlink()
    (run / "samples" / "000030.png").write_bytes(b"\x89PNG")  # it is being written
    assert window.run_view(run).previews == []
    assert "no metrics in prior yet" in window.run_view(run).curves


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "give --auth NAME:PASSWORD, or set SMALTI_UI_AUTH"),
        (["--auth", "me"], "auth has no name or no password"),
        (["--port", "99999"], "port is 99999"),
        (["--model", "a", "a"], "--model names a pipeline twice"),
        (["--model", "nowhere"], "nowhere"),
        (["--dtype", "int9"], "int9"),
    ],
)
def test_bad_options_are_one_line(arguments, message, capsys, monkeypatch) -> None:
    monkeypatch.delenv("SMALTI_UI_AUTH", raising=False)
    assert main(["ui", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_a_missing_extra_is_one_line(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["ui"]) == 2
    assert "pip install 'smalti[ui]'" in capsys.readouterr().err


def test_dtype_is_the_precision_of_every_pipeline(pipe, tmp_path, monkeypatch) -> None:
    shown = {}

    def stop(pipelines: dict[str, Pipeline], runs: tuple[Path, ...]) -> None:
        shown.update(pipelines)
        raise ConfigurationError("shown")

    for name in ("gradio", "gradio.themes"):  # whose import takes seconds
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr("smalti.scripts.ui.Window", stop)
    folders = tuple(str(pipe.save_pretrained(tmp_path / name)) for name in ("a", "b"))
    with (
        pytest.raises(ConfigurationError, match="shown"),
        showing(UIConfig(model=folders, port=0, dtype="int8")),
    ):
        pass
    assert {name: p.dtype for name, p in shown.items()} == dict.fromkeys(folders, torch.int8)


def test_a_folder_that_is_no_run_is_refused_and_one_that_is_missing_named(tmp_path, caplog) -> None:
    check_runs((tmp_path / "later", tmp_path))
    assert "later does not exist yet" in caplog.text
    (tmp_path / "picture.png").touch()
    with pytest.raises(ConfigurationError, match="is no run: give the output_dir of"):
        check_runs((tmp_path,))


@pytest.mark.parametrize("host", ["", "http://127.0.0.1"])
def test_a_host_that_is_no_address_is_named(host: str) -> None:
    with pytest.raises(ConfigurationError, match=f'host is "{host}", not an address'):
        UIConfig(model=("none",), host=host).checked_auth()


# -- In headless Chromium --


@pytest.fixture
def page(tmp_path) -> Iterator[Page]:
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing and os.environ.get(REQUIRED):
        pytest.fail(f"{REQUIRED} is set, but {missing[0]} is not installed")
    if missing:
        pytest.skip(f"{missing[0]} is not installed (Debian: chromium, chromium-driver)")
    with chromium(tmp_path / "profile") as page:
        yield page


@pytest.fixture
def masks(monkeypatch) -> list[Image.Image]:
    """What is painted."""
    seen, painted = list[Image.Image](), window.painted
    monkeypatch.setattr(window, "painted", lambda layers: seen.append(painted(layers)) or seen[-1])
    return seen


@pytest.fixture
def frames(monkeypatch) -> list[Frame]:
    """Those that the window gets."""
    seen, live = list[Frame](), window.live

    def recorded(pipeline: Pipeline, **keywords: Any) -> Iterator[Frame]:
        calls = live(pipeline, **keywords)
        with contextlib.closing(calls):
            for frame in calls:
                seen.append(frame)
                yield frame

    monkeypatch.setattr(window, "live", recorded)
    return seen


def log_in(page: Page, url: str) -> None:
    for path in ("config", "gradio_api/info", "gradio_api/file=/etc/hostname"):
        assert httpx.get(url + path).status_code == 401
    assert httpx.post(url + "gradio_api/upload", files={"files": b"x"}).status_code == 401
    page.driver.get(url)
    for password in ("wrong", "s3cret"):
        page.write("input:not([type=password])", "me")
        page.write("input[type=password]", password)
        page.press("button.primary")
        if password == "wrong":
            page.until(lambda: page.all(".creds"))


def stop_and_leave(page: Page, frames: list[Frame]) -> None:
    """Stop a long call after some steps; reload the page during another one, which then ends."""
    page.choose("#model", "flow")
    page.press("#settings .label-wrap")
    page.until(lambda: page.one("#num_inference_steps input").get_attribute("value") == "6")
    page.write("#num_inference_steps input", str(window.MAX_STEPS))
    frames.clear()
    page.press("#generate")
    page.until(lambda: frames)
    page.press("#stop")
    page.until(lambda: "Stopped after" in page.one("#generate-status").text)
    assert frames[-1].done < 1 and len(page.loaded("#generated")) == 4
    frames.clear()
    page.press("#generate")
    page.until(lambda: frames)
    page.driver.refresh()
    page.until(lambda: not any(thread.name == "sampling" for thread in threading.enumerate()))
    assert not frames[-1].is_last


def give_a_prompt(page: Page) -> None:
    """To a pipeline that has other classes, too."""
    assert not any(e.is_displayed() for e in page.all("#prompt"))
    page.choose("#model", "text")
    page.write("#prompt textarea", "a red bee")
    page.until(lambda: "ant" in page.one("#classes").text)
    page.press("#generate")
    page.until(lambda: page.one("#generate-status").text == "Done")
    page.until(lambda: page.one("#generated .caption-label").text == "ant")


def paint(page: Page, picture: Path, masks: list[Image.Image]) -> None:
    page.open_tab("Inpaint")  # without a picture: our sentence, and no traceback
    page.press("#inpaint")
    page.until(lambda: any("there is no picture" in e.text for e in page.all(".toast-body")))
    page.paint("#editor", picture, brush_radius(photo().size), (-20, -20), (20, 20))
    page.press("#inpaint")
    page.until(lambda: page.one("#inpaint-status").text == "Done")
    assert len(page.loaded("#inpainted")) == 4
    assert 0 < np.asarray(masks[-1]).mean() < 128


def upload(page: Page, folder: Path) -> None:
    photo().save(folder / "photo.png")
    (folder / "broken.png").write_bytes(b"no picture")
    page.open_tab("Reconstruct")
    page.upload("#reconstruct-input", folder / "broken.png")
    page.until(lambda: page.all("#reconstruct-input img"))
    page.press("#reconstruct")
    page.until(lambda: any("broken.png cannot" in e.text for e in page.all(".toast-body")))
    page.press("#reconstruct-input button[aria-label='Remove Image']")
    page.until(lambda: not page.all("#reconstruct-input img"))
    page.upload("#reconstruct-input", folder / "photo.png")
    page.loaded("#reconstruct-input")
    page.press("#reconstruct")
    page.until(lambda: "dB from 64 codes" in page.one("#reconstruct-words").text)
    assert page.loaded("#reconstruct-codes")


@pytest.mark.slow
def test_the_window_in_a_browser(
    page, pipe, flow_pipe, text_pipe, frames, masks, run, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", "mine")
    monkeypatch.chdir(tmp_path)
    pipes = {"codes": pipe, "flow": flow_pipe, "text": text_pipe}
    for name, made in pipes.items():
        made.save_pretrained(tmp_path / name)
    with showing(UIConfig(model=(*pipes,), run=(run,), port=0, auth="me:s3cret")) as url:
        log_in(page, url)
        page.press("#generate")
        page.until(lambda: page.one("#generate-status").text == "Done")
        assert len(page.loaded("#generated")) == 4

        upload(page, tmp_path)
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        assert list(folder.rglob("photo.png"))
        paint(page, tmp_path / "photo.png", masks)

        page.open_tab("Compare")
        page.choose("#other", "flow")
        page.press("#compare")
        page.until(lambda: len(page.loaded("#right")) == 4)
        assert len(page.loaded("#left")) == 4

        page.open_tab("Run")
        page.until(lambda: page.all('#curves svg[aria-label="loss"] polyline'))
        assert page.loaded("#previews")

        page.open_tab("Generate")
        with monkeypatch.context() as patch:
            patch.setattr(window, "MAX_STEPS", 10**5)  # it cannot end before it is stopped
            patch.setattr(window, "PREVIEWS", 10**3)
            stop_and_leave(page, frames)
        give_a_prompt(page)
        assert page.requested() == {url.split("/")[2]}
    assert os.environ["GRADIO_TEMP_DIR"] == "mine" and not folder.exists()


# -- How the process ends --


@contextlib.contextmanager
def generating(model: str, errors: Any) -> Iterator[subprocess.Popen]:
    """The process of a window in which Generate was pressed, for as many pictures as it makes."""
    command = [sys.executable, "-m", "smalti", "ui", "--model", model, "--port", "0"]
    out: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": errors, "text": True}
    # A shell starts what runs in its background without SIGINT, and its children inherit that.
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with (
        subprocess.Popen(command, preexec_fn=heeding, **out) as process,
        contextlib.ExitStack() as ends,
        httpx.Client(timeout=60) as client,
    ):
        ends.callback(process.kill)
        assert process.stdout is not None
        url = process.stdout.readline().rpartition(" ")[2].strip()
        page = client.get(f"{url}config").json()
        props = {part["id"]: part["props"] for part in page["components"]}
        (press,) = (
            call
            for call in page["dependencies"]
            if [props[target].get("elem_id") for target, _ in call["targets"]] == ["generate"]
        )
        inputs = [props[each] for each in press["inputs"]]
        changes = {"number": window.MAX_IMAGES}
        values = [changes.get(each.get("elem_id"), each.get("value")) for each in inputs]
        body = {"data": values, "fn_index": press["id"], "session_hash": "s"}
        client.post(f"{url}gradio_api/queue/join", json=body)
        news = f"{url}gradio_api/queue/data?session_hash=s"
        with client.stream("GET", news) as stream:  # until the first preview
            assert any("process_generating" in line for line in stream.iter_lines())
            yield process


@pytest.mark.slow
@pytest.mark.parametrize(("signals", "status"), [(1, 0), (2, 130)])
def test_signals_end_a_window_that_samples(tmp_path, signals: int, status: int) -> None:
    """Before, it aborted: the interpreter ended while a thread was inside torch."""
    with (
        open(tmp_path / "errors", "w") as errors,
        generating("smalti/fashion-next-scale", errors) as process,
    ):
        for _ in range(signals):
            process.send_signal(signal.SIGINT)
            time.sleep(0.02)
        assert process.wait(60) == status
    expected = "" if status == 0 else "error: interrupted\n"
    assert (tmp_path / "errors").read_text() == expected
