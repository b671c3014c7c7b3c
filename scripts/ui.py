"""Saved pipelines and runs in a window of the browser: sample, look at codes, edit, compare, watch.

    smalti ui --model runs/demo/pipeline --run runs/demo/prior

It ends, with status 0, on SIGTERM or SIGINT. What the tabs compute is in `window.py`.
"""

import contextlib
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

from smalti.checkpoints import Weights
from smalti.cli import end_at_once, parse_config, run_command
from smalti.errors import ConfigurationError, GenerationError, SmaltiError
from smalti.folders import contents
from smalti.pipelines.model_flag import place_of
from smalti.pipelines.pipeline import DEMO, Pipeline
from smalti.scripts import window
from smalti.scripts.options import DType, SampleOption, as_flag
from smalti.scripts.serve import check_port, listening, loaded, needing, secret
from smalti.scripts.window import Frame, Settings
from smalti.training.folder import METRICS
from smalti.training.run_info import is_run

AUTH = "SMALTI_UI_AUTH"  # environment variable
# Gradio would report its use to its makers, and offer to keep the calls in a repository of the Hub.
OFFLINE = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False"}
LARGEST_UPLOAD = "64mb"
REFRESH = 5  # seconds between two readings of a run
KEPT = 3600  # seconds that pictures of the window are kept in its temporary folder
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "pipelines"}
# Pixels are shown as squares; what has no picture yet is not shown; galleries have no empty rows.
CSS = """
.pixels img { image-rendering: pixelated; }
.result:has(.empty) { display: none; }
.result .grid-wrap { min-height: 0; max-height: none; overflow-y: auto; }
#settings { position: sticky; top: 1em; }
#curves figure { display: inline-block; margin: 0.5em; }
#curves table, #curves td { border: none; }
#curves td { padding: 0 1.5em 0 0; }
#curves svg text { font-size: 11px; fill: currentcolor; opacity: 0.7; }
"""
FONTS = ("ui-sans-serif", "system-ui", "sans-serif")
FIXED_FONTS = ("ui-monospace", "monospace")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class UIConfig:
    """Show saved pipelines and runs in a window of the browser."""

    model: Annotated[tuple[str, ...], place_of("Pipelines to choose from, each")] = (DEMO,)
    run: tuple[Path, ...] = ()  # folders of runs, to watch while they train
    weights: Weights = "ema"  # of checkpoints: averaged over their runs (ema), or raw
    dtype: DType = "fp32"  # precision of the models, as of smalti generate
    host: str = "127.0.0.1"  # address to listen on; one that other machines reach needs --auth
    port: int = 7860  # 0 = any free one, which is printed
    # What a user has to enter, as NAME:PASSWORD. Other users of the machine can see the options of
    # a command: SMALTI_UI_AUTH in the environment sets it, too.
    auth: str = ""

    def __post_init__(self) -> None:
        check_port(self.port)
        if len(set(self.model)) < len(self.model):
            raise ConfigurationError("--model names a pipeline twice: give each once")

    def checked_auth(self) -> tuple[str, str] | None:
        """Name and password, of the configuration or the environment; None if there are none.

        Raises:
            ConfigurationError: they are missing although other machines reach the host, or one of
                them is empty.
        """
        given = secret(self.auth, AUTH, "--auth NAME:PASSWORD", self.host)
        name, _, password = given.partition(":")
        if given and not (name and password):
            raise ConfigurationError("auth has no name or no password: give NAME:PASSWORD")
        return (name, password) if given else None


def ui(config: UIConfig) -> None:
    """Load the pipelines, and show the window until a signal.

    Raises:
        SmaltiError: a pipeline cannot be loaded, or the address cannot be used.
    """
    with showing(config) as url:
        print(f"{', '.join(config.model)}: {url}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)


@contextlib.contextmanager
def showing(config: UIConfig) -> Iterator[str]:
    """Context with the address of the window, which is open meanwhile.

    Raises:
        SmaltiError: as for `ui`.
    """
    auth = config.checked_auth()
    check_runs(config.run)
    with environment(**OFFLINE), needing("ui"):
        import gradio.themes
    remedy = "ui runs in one process: start it without accelerate launch"
    listening(config.host, config.port).close()  # raises at once; loading takes long
    models = loaded(config.model, config.weights, config.dtype, remedy)
    with listening(config.host, config.port) as place:  # raises our error if it is in use
        port = place.getsockname()[1]
    with (
        tempfile.TemporaryDirectory(prefix="smalti-ui-", ignore_cleanup_errors=True) as folder,
        environment(**OFFLINE, GRADIO_TEMP_DIR=folder),
    ):
        page = Window(dict(zip(config.model, models, strict=True)), config.run)
        blocks = page.blocks()
        _, url, _ = blocks.queue(max_size=32).launch(
            server_name=f"[{config.host}]" if ":" in config.host else config.host,  # of IPv6
            server_port=port,
            auth=auth,
            share=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            inbrowser=False,
            prevent_thread_lock=True,
            quiet=True,
            footer_links=[],
            max_file_size=LARGEST_UPLOAD,
            theme=gradio.themes.Default(font=FONTS, font_mono=FIXED_FONTS),
            css=CSS,
        )
        try:
            yield url
        finally:
            page.interrupt()  # a call that still runs would write into the folder
            blocks.close(verbose=False)


def check_runs(runs: Sequence[Path]) -> None:
    """Raise `ConfigurationError` for a folder that is no run; say which ones are waited for."""
    for run in runs:
        if not run.exists():
            logger.warning("%s does not exist yet: its curves are shown when it does", run)
        elif not run.is_dir() or (contents(run) and not (is_run(run) or (run / METRICS).exists())):
            raise ConfigurationError(
                f"{run} is no run: give the output_dir of train-tokenizer or train-prior"
            )


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Context with these environment variables, which then have their own values again."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def told() -> Iterator[None]:
    """An error as a message in the window, until the user closes it; the log has the traceback of
    one that is not ours."""
    import gradio as gr

    try:
        yield
    except SmaltiError as error:
        raise gr.Error(str(error), duration=None, print_exception=False) from None
    except Exception as error:
        logger.exception("a call of the window failed")
        words = f"the call failed ({type(error).__name__}): the terminal says why"
        raise gr.Error(words, duration=None, print_exception=False) from None


class Window:
    """The widgets, and what they call.

    The settings at the left belong to the tabs that sample; a change of the pipeline changes which
    of them are shown, and sets them to its sampling defaults.
    """

    def __init__(self, pipelines: Mapping[str, Pipeline], runs: Sequence[Path]) -> None:
        self.pipelines, self.runs = pipelines, runs
        self.options: dict[str, SampleOption] = {}  # of all pipelines, by name
        for pipeline in pipelines.values():
            for option in window.options_of(pipeline):
                self.options.setdefault(option.name, option)
        self.first = next(iter(pipelines))

    def blocks(self) -> Any:
        """The page."""
        import gradio as gr

        with (
            gr.Blocks(
                title="smalti", analytics_enabled=False, fill_width=True, delete_cache=(KEPT, KEPT)
            ) as blocks,
            gr.Row(),
        ):
            with gr.Column(scale=1, min_width=280, elem_id="settings"):
                self._settings()
            with gr.Column(scale=3), gr.Tabs():
                self._generate()
                self._reconstruct()
                self._interpolate()
                self._inpaint()
                self._compare()
                self._run()
        return blocks

    # -- settings -----------------------------------------------------------------------------

    def _settings(self) -> None:
        import gradio as gr

        values = self._values(self.first)
        names = [*self.pipelines]
        self.model = gr.Dropdown(names, value=self.first, label="Pipeline", elem_id="model")
        self.classes = gr.Dropdown(
            multiselect=True, label="Classes", elem_id="classes", **values["classes"]
        )
        self.prompt = gr.Textbox(label="Prompt", elem_id="prompt", **values["prompt"])
        self.negative = gr.Textbox(label="Negative prompt", **values["negative_prompt"])
        most = window.MAX_IMAGES
        self.number = gr.Slider(
            1, most, value=4, step=1, label="Pictures of each", elem_id="number"
        )
        self.seed = gr.Number(value=0, precision=0, minimum=0, label="Seed", elem_id="seed")
        guidance = values["guidance_scale"]
        self.guidance = gr.Number(label=_words("guidance_scale"), step=0.1, **guidance)
        with gr.Accordion("Sampling", open=False):
            self.widgets = [self._widget(o, values[o.name]) for o in self.options.values()]
        self.stop = gr.Button("Stop", elem_id="stop")
        self.stop.click(self.interrupt, queue=False, api_visibility="private")
        changed = [
            self.classes,
            self.prompt,
            self.negative,
            self.guidance,
            *self.widgets,
        ]
        self.model.change(self._updates, self.model, changed, api_visibility="private")
        self.inputs = [
            self.model,
            self.classes,
            self.prompt,
            self.negative,
            self.number,
            self.seed,
            self.guidance,
            *self.widgets,
        ]

    def _widget(self, option: SampleOption, values: Mapping[str, Any]) -> Any:
        """The widget of a sampling option: empty is the prior's default."""
        import gradio as gr

        about: dict[str, Any] = {"label": _words(option.name), "info": option.help, **values}
        about["elem_id"] = option.name
        if option.type is bool:
            return gr.Checkbox(**about)
        if option.type in (int, float):
            return gr.Number(precision=0 if option.type is int else None, **about)
        if option.name in window.CHOICES:
            names = [*window.CHOICES[option.name]]
            return gr.Dropdown(names, allow_custom_value=True, **about)
        return gr.Textbox(**about)

    def _values(self, model: str) -> dict[str, dict[str, Any]]:
        """Of each widget that depends on the pipeline: whether it is shown, and its value."""
        pipeline = self.pipelines[model]
        classes, takes_text = list(pipeline.classes), pipeline.prior.config.text is not None
        sampling = pipeline.sampling
        values: dict[str, dict[str, Any]] = {
            "classes": {"choices": classes, "value": classes[:1], "visible": bool(classes)},
            "prompt": {"value": "", "visible": takes_text},
            "negative_prompt": {"value": "", "visible": takes_text},
            "guidance_scale": {"value": sampling.get("guidance_scale")},
        }
        own = {option.name: option.default for option in window.options_of(pipeline)}
        for name in self.options:
            value = sampling.get(name, own.get(name))
            values[name] = {"value": _shown(value), "visible": name in own}
        return values

    def _updates(self, model: str) -> list[Any]:
        import gradio as gr

        return [gr.update(**values) for values in self._values(model).values()]

    def given(self, *values: Any) -> tuple[Pipeline, Settings]:
        """The pipeline and the settings that the widgets hold, in the order of `inputs`.

        Raises:
            GenerationError: one of them is out of range.
        """
        model, classes, prompt, negative, number, seed, guidance, *rest = values
        pipeline = self.pipelines[model]
        if seed is None:
            raise GenerationError("there is no seed: give a whole number, 0 or more")
        own = {option.name: option for option in window.options_of(pipeline)}
        options = {
            name: window.option_value(own[name], value)
            for name, value in zip(self.options, rest, strict=True)
            if name in own
        }
        text = (prompt or "", negative or "")
        settings = Settings(tuple(classes or ()), *text, int(number), int(seed), guidance, options)
        return pipeline, settings

    def interrupt(self) -> None:
        """End the sampling that is running after its step."""
        for pipeline in self.pipelines.values():
            pipeline.interrupt = True

    # -- tabs ---------------------------------------------------------------------------------

    def _generate(self) -> None:
        import gradio as gr

        with gr.Tab("Generate"):
            button = gr.Button("Generate", variant="primary", elem_id="generate")
            status = gr.Markdown(elem_id="generate-status")
            gallery = _gallery("Pictures", "generated")

        def generate(*values: Any) -> Iterator[Any]:
            with told():
                pipeline, settings = self.given(*values)
                for frame in window.live(pipeline, **settings.keywords(pipeline)):
                    yield _status(frame), _captioned(frame)

        _on(button, generate, self.inputs, [status, gallery])

    def _reconstruct(self) -> None:
        import gradio as gr

        with gr.Tab("Reconstruct"):
            with gr.Row():
                picture = _upload("Picture", "reconstruct-input")
                original = _shown_picture("Original", "reconstruct-original")
                result = _shown_picture("Reconstruction", "reconstruct-result")
            button = gr.Button("Reconstruct", variant="primary", elem_id="reconstruct")
            words = gr.Markdown(elem_id="reconstruct-words")
            codes = _shown_picture("Codes", "reconstruct-codes")

        def reconstruct(model: str, file: Path | None) -> tuple[Any, ...]:
            with told():
                found = window.reconstructed(self.pipelines[model], window.uploaded(file))
                return found.original, found.reconstruction, found.words, found.codes

        _on(button, reconstruct, [self.model, picture], [original, result, words, codes])

    def _interpolate(self) -> None:
        import gradio as gr

        with gr.Tab("Interpolate"):
            with gr.Row():
                pictures = [_upload(f"{name} picture", name.lower()) for name in ("First", "Last")]
            steps = gr.Slider(2, window.MAX_BLENDS, value=7, step=1, label="Blends")
            button = gr.Button("Interpolate", variant="primary", elem_id="interpolate")
            strip = _shown_picture("Blends, on a line and on an arc", "strip")

        def interpolate(model: str, first: Path | None, last: Path | None, steps: int) -> Any:
            with told():
                ends = window.uploaded(first), window.uploaded(last)
                return window.interpolated(self.pipelines[model], *ends, int(steps))

        _on(button, interpolate, [self.model, *pictures, steps], strip)

    def _inpaint(self) -> None:
        import gradio as gr

        with gr.Tab("Inpaint"):
            editor = gr.ImageEditor(
                label="Picture: paint over what is to be generated",
                type="pil",
                image_mode="RGBA",
                sources=["upload", "clipboard"],
                buttons=["fullscreen"],
                transforms=(),
                brush=_brush(25),  # Gradio's own
                elem_id="editor",
            )
            button = gr.Button("Inpaint", variant="primary", elem_id="inpaint")
            status = gr.Markdown(elem_id="inpaint-status")
            gallery = _gallery("Pictures", "inpainted")

        def inpaint(drawn: Any, *values: Any) -> Iterator[Any]:
            with told():
                pipeline, settings = self.given(*values)
                picture, layers = (drawn or {}).get("background"), (drawn or {}).get("layers", [])
                for frame in window.inpainted(pipeline, picture, layers, settings):
                    yield _status(frame), _captioned(frame)

        def fitting_brush(drawn: Any) -> Any:
            return gr.update(brush=_brush(brush_radius(drawn["background"].size)))

        editor.upload(
            fitting_brush, editor, editor, show_progress="hidden", api_visibility="private"
        )
        _on(button, inpaint, [editor, *self.inputs], [status, gallery])

    def _compare(self) -> None:
        import gradio as gr

        with gr.Tab("Compare"):
            names = [*self.pipelines]
            other = gr.Dropdown(names, value=names[-1], label="With", elem_id="other")
            button = gr.Button("Compare", variant="primary", elem_id="compare")
            status = gr.Markdown(elem_id="compare-status")
            with gr.Row():
                galleries = [_gallery("Pipeline", "left", 2), _gallery("With", "right", 2)]

        def compare(other: str, *values: Any) -> Iterator[Any]:
            with told():
                pipeline, settings = self.given(*values)
                second = self.pipelines[other]
                for left, right in window.side_by_side(pipeline, second, settings):
                    words = _status(right) if right else f"Pipeline: {_status(left)}"
                    yield words, _captioned(left), _captioned(right)

        _on(button, compare, [other, *self.inputs], [status, *galleries])

    def _run(self) -> None:
        import gradio as gr

        if not self.runs:
            return
        with gr.Tab("Run"):
            names = [str(run) for run in self.runs]
            run = gr.Dropdown(names, value=names[0], label="Run", elem_id="run")
            curves = gr.HTML(elem_id="curves")
            gallery = _gallery("Newest pictures", "previews")
        timer = gr.Timer(REFRESH)

        def refresh(name: str) -> tuple[Any, ...]:
            with told():
                view = window.run_view(self.runs[names.index(name)])
                return view.curves, view.previews

        gr.on(
            [timer.tick, run.change],
            refresh,
            run,
            [curves, gallery],
            show_progress="hidden",
            api_visibility="private",
        )


def _shown(value: Any) -> Any:
    """A sampling option as its widget shows it."""
    value = as_flag(value)
    return " ".join(map(str, value)) if isinstance(value, tuple) else value


def _words(name: str) -> str:
    """The label of an option: "num_inference_steps" -> "Num inference steps"."""
    return name.replace("_", " ").capitalize()


def _gallery(label: str, elem_id: str, columns: int = 4) -> Any:
    import gradio as gr

    return gr.Gallery(
        label=label,
        format="png",
        columns=columns,
        object_fit="contain",
        height="auto",
        interactive=False,
        buttons=["download", "download_all", "fullscreen"],  # none that uploads
        elem_id=elem_id,
        elem_classes=["pixels", "result"],
    )


def _upload(label: str, elem_id: str) -> Any:
    """A field for a picture, which gives the path of its file."""
    import gradio as gr

    field = gr.Image(
        label=label,
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        buttons=["fullscreen"],
        height=280,
        elem_id=elem_id,
        elem_classes="pixels",
    )
    # Gradio would open the file, and raise its own error if it is damaged; `uploaded` reads it.
    cast(Any, field).preprocess = lambda payload: payload and Path(payload.path)
    return field


def brush_radius(size: tuple[int, int]) -> int:
    """Pixels, for a picture of this size: a fixed radius would cover a small one."""
    return max(1, min(size) // 16)


def _brush(radius: int) -> Any:
    import gradio as gr

    return gr.Brush(default_size=radius, colors=["#ff3366"], color_mode="fixed")


def _shown_picture(label: str, elem_id: str) -> Any:
    import gradio as gr

    return gr.Image(
        label=label,
        format="png",
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_id=elem_id,
        elem_classes=["pixels", "result"],
    )


def _on(button: Any, function: Any, inputs: Any, outputs: Any) -> None:
    """Call a function when a button is pressed; one call at a time uses the pipelines."""
    button.click(
        function,
        inputs,
        outputs,
        show_progress="minimal",
        api_visibility="private",
        **ONE_AT_A_TIME,
    )


def _status(frame: Frame) -> str:
    if frame.done == 1:
        return "Done"
    return f"{'Stopped after ' if frame.is_last else ''}{frame.done:.0%} of the steps"


def _captioned(frame: Frame | None) -> list[tuple[Any, str]]:
    return [*zip(frame.pictures, frame.captions, strict=True)] if frame else []


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `smalti ui`. A call that still runs does not hold it up, nor does what else
    is to close after a second signal."""
    config = parse_config(UIConfig, argv, prog="smalti ui")
    try:
        ui(config)
    except KeyboardInterrupt:
        end_at_once()
    end_at_once(0)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
