"""`smalti serve`: OpenAI's form, errors in our words, many clients, and a graceful stop."""

import base64
import contextlib
import io
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from conftest import CLASSES, TINY_CONV
from fastapi.testclient import TestClient
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from smalti.cli import main
from smalti.errors import ConfigurationError
from smalti.pipelines.continuous import ContinuousBatch
from smalti.pipelines.generation import picture_generator
from smalti.pipelines.image_api import LARGEST_BODY, PATHS, ServerMetrics, image_app, server_of
from smalti.pipelines.pipeline import Pipeline
from smalti.pipelines.serving import Batcher, PictureRequest
from smalti.prior.flow.config import FlowConfig
from smalti.prior.flow.dit import DiTConfig
from smalti.prior.flow.prior import FlowPrior
from smalti.scripts.serve import ServeConfig, request_options, serve
from smalti.tokenizer.kl import KLConfig, KLTokenizer

GENERATIONS, MODELS, HEALTH, METRICS = PATHS


@pytest.fixture
def pipe(tokenizer, prior) -> Pipeline:
    return Pipeline(tokenizer, prior, CLASSES)


class Served:
    """A pipeline, its batcher and its application."""

    def __init__(self, pipeline: Pipeline, token: str = "", **options: Any) -> None:
        metrics = ServerMetrics()
        self.batcher = Batcher(pipeline, observe=metrics.observe_batch, **options)
        self.app = image_app(
            self.batcher,
            metrics,
            model_id="tiny",
            options=request_options(pipeline),
            max_images=10,
            token=token,
        )

    @contextlib.contextmanager
    def on_loopback(self) -> Iterator[str]:
        """The address of a server in a thread."""
        server = server_of(self.app, self.batcher)
        place = socket.create_server(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, args=([place],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{place.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def served(pipe) -> Iterator[Served]:
    made = Served(pipe)
    yield made
    made.batcher.join()


@pytest.fixture
def client(served) -> TestClient:
    return TestClient(served.app, raise_server_exceptions=False)


def pixels(item: dict[str, Any]) -> bytes:
    return Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))).tobytes()


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert [*response.json()] == ["error"]
    assert [*response.json()["error"]] == ["message", "type", "param", "code"]
    return response.json()["error"]


def test_pictures_come_in_the_form_of_openai(client, served) -> None:
    body = {
        "model": "tiny",
        "class_label": "dog",
        "n": 2,
        "size": "16x16",
        "seed": 5,
        "response_format": "b64_json",
        "guidance_scale": 2,
        "temperature": 0.9,
        "guidance_interval": [0, 1],
    }
    response = client.post(GENERATIONS, json=body)
    assert response.status_code == 200, response.text
    assert [*response.json()] == ["created", "data"]
    assert abs(response.json()["created"] - time.time()) < 60
    assert [item["seed"] for item in response.json()["data"]] == [5, 6]
    made = served.batcher.submit(
        PictureRequest(
            class_labels=["dog"],
            num_images=2,
            seed=5,
            guidance_scale=2.0,
            options={"temperature": 0.9, "guidance_interval": (0.0, 1.0)},
        )
    )
    assert [pixels(item) for item in response.json()["data"]] == [
        picture.result.result(60).tobytes() for picture in made
    ]
    several = client.post(GENERATIONS, json={"class_labels": ["cat", 2], "size": "auto"})
    seeds = [item["seed"] for item in several.json()["data"]]
    assert len(set(seeds)) == 2
    again = client.post(GENERATIONS, json={"class_labels": [2], "seed": seeds[1]})
    assert again.json()["data"] == several.json()["data"][1:]


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"class_label": "cow"}, "class_label", "no class is named"),
        ({"class_labels": ["cat", "cow"]}, "class_labels", "no class is named"),
        ({"class_label": 9}, "class_label", "out of range"),
        ({"class_labels": []}, "class_labels", "is empty"),
        ({"class_labels": [0] * 11}, "class_labels", "at most 10 in a request"),
        ({}, "class_labels", "pass class_labels"),
        ({"class_label": 0, "negative_prompt": "x"}, "negative_prompt", "is for a pipeline of"),
        ({"class_label": 0, "prompt": "x"}, "prompt", "and no prompt"),
        ({"class_label": 0, "guidance_interval": [1, 0]}, "guidance_interval", "guidance_interval"),
        ({"class_label": 0, "top_k": 3, "temperature": -1}, "temperature", "temperature is -1"),
        ({"prompt": "a cat"}, "prompt", "pass class_labels, and no prompt"),
        ({"class_label": 0, "temprature": 1}, "temprature", 'did you mean "temperature"'),
        ({"class_label": 0, "quality": "hd"}, "quality", 'no field "quality"'),
        ({"class_label": 0, "known": [1]}, "known", 'no field "known"'),
        ({"class_label": 0, "n": "2"}, "n", 'n is "2": Input should be a valid integer'),
        ({"class_label": 0, "n": 0}, "n", "n is 0: "),
        ({"class_label": 0, "n": 11}, "n", "at most 10 in a request"),
        ({"class_labels": [0, 1, 2], "n": 4}, "n", "12 pictures are asked for"),
        ({"class_label": 0, "class_labels": [1]}, "class_labels", "one of them"),
        ({"class_label": 0, "size": "1024x1024"}, "size", "this server makes 16x16"),
        ({"class_label": 0, "response_format": "url"}, "response_format", "keeps no files"),
        ({"class_label": 0, "seed": -3}, "seed", "seed is -3"),
        ({"class_label": 0, "top_p": 3}, "top_p", "top_p is 3"),
        ({"class_label": 0, "model": "dall-e-3"}, "model", 'this server has "tiny"'),
        ({"class_label": 0, "prompt": "x" * 5000}, "prompt", "at most 4000 characters"),
        ({"class_label": True}, "class_label", "class_label is true"),
        ([], None, "JSON object"),
    ],
)
def test_a_wrong_request_is_refused_in_the_words_of_the_library(
    client, body, param, message: str
) -> None:
    error = error_of(client.post(GENERATIONS, json=body), 400)
    assert message in error["message"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")


def test_a_body_that_is_too_large_or_no_json_is_refused(client) -> None:
    send = {"Content-Type": "application/json"}
    large = b'{"prompt": "' + b"x" * LARGEST_BODY + b'"}'
    assert (
        "larger than"
        in error_of(client.post(GENERATIONS, content=large, headers=send), 400)["message"]
    )
    for content in (b"{", b"\xff", b'{"guidance_scale": NaN}'):
        error_of(client.post(GENERATIONS, content=content, headers=send), 400)
    form = client.post(GENERATIONS, data={"prompt": "x"})
    assert "send application/json" in error_of(form, 400)["message"]
    assert "/health" in error_of(client.get("/v1/nothing"), 404)["message"]
    error_of(client.get(GENERATIONS), 405)


def test_the_model_says_what_it_takes(client) -> None:
    (model,) = client.get(MODELS).json()["data"]
    assert (model["id"], model["object"], model["owned_by"]) == ("tiny", "model", "smalti")
    assert (model["classes"], model["sizes"]) == ([*CLASSES], ["16x16"])
    schema = client.get("/openapi.json").json()["paths"][GENERATIONS]["post"]["requestBody"]
    fields = schema["content"]["application/json"]["schema"]["properties"]
    assert {"class_label", "prompt", "top_k", "guidance_schedule"} <= {*fields}
    assert "known" not in fields and "generator" not in fields


def test_a_token_is_asked_for_everywhere_but_at_health(pipe) -> None:
    served = Served(pipe, token="s3cret")
    client = TestClient(served.app)
    for headers in ({}, {"Authorization": "Bearer s3cre"}, {"Authorization": "s3cret"}):
        for path in (MODELS, METRICS, "/openapi.json", "/nothing"):
            response = client.get(path, headers=headers)
            assert error_of(response, 401)["code"] == "invalid_api_key"
            assert response.headers["WWW-Authenticate"] == "Bearer"
        error_of(client.post(GENERATIONS, json={"class_label": 0}, headers=headers), 401)
    assert client.get(HEALTH).status_code == 200
    right = {"Authorization": "Bearer s3cret"}
    response = client.post(GENERATIONS, json={"class_label": 0}, headers=right)
    assert response.status_code == 200
    served.batcher.join()


def measured(text: str) -> dict[tuple[str, ...], float]:
    """Name and labels of every sample -> its value, read by prometheus_client's own parser."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_32_clients_get_their_own_pictures(pipe) -> None:
    """Each answer is the picture that the pipeline makes alone with that seed and class."""
    keys = [(seed % 3, seed * 7) for seed in range(40)]
    expected = [
        pipe(label, generator=[picture_generator(seed, 0)]).images[0].tobytes()
        for label, seed in keys
    ]
    served = Served(pipe)
    with served.on_loopback() as url, httpx.Client(base_url=url, timeout=60) as client:

        def ask(key: tuple[int, int]) -> bytes:
            body = {"class_label": CLASSES[key[0]], "seed": key[1]}
            response = client.post(GENERATIONS, json=body)
            assert response.status_code == 200, response.text
            (item,) = response.json()["data"]
            assert item["seed"] == key[1]
            return pixels(item)

        with ThreadPoolExecutor(32) as clients:
            assert [*clients.map(ask, keys)] == expected
        values = measured(client.get(METRICS).text)
    assert values["smalti_requests_total", GENERATIONS, "200"] == 40
    assert values["smalti_pictures_total",] == 40
    assert values["smalti_queue_pictures",] == 0
    assert values["smalti_batch_pictures_sum",] == 40
    assert values["smalti_batch_pictures_count",] <= 40
    assert values["smalti_request_seconds_count", GENERATIONS] == 40
    served.batcher.join()


def test_a_full_queue_answers_429_and_a_client_that_leaves_frees_its_place(pipe) -> None:
    served = Served(pipe, max_wait=60, max_batch_size=16, max_queue=2, continuous=False)
    with served.on_loopback() as url, httpx.Client(base_url=url, timeout=60) as client:
        body = {"class_labels": [0, 1]}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url + GENERATIONS, json=body, timeout=0.5)
        wait_until(lambda: served.batcher.waiting == 0)
        with ThreadPoolExecutor(1) as clients:
            accepted = clients.submit(client.post, GENERATIONS, json=body)
            wait_until(lambda: served.batcher.waiting == 2)
            refused = client.post(GENERATIONS, json=body)
            error = error_of(refused, 429)
            assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
            assert int(refused.headers["Retry-After"]) >= 1
            served.batcher.stop()
            assert error_of(client.post(GENERATIONS, json=body), 503)["code"] == "stopping"
            assert client.get(HEALTH).status_code == 503
            assert accepted.result(60).status_code == 200
        values = measured(client.get(METRICS).text)
    counted = [
        values["smalti_requests_total", GENERATIONS, s] for s in ("200", "429", "499", "503")
    ]
    assert counted == [1, 1, 1, 1]
    served.batcher.join()


def test_a_body_that_does_not_arrive_is_refused(served, monkeypatch) -> None:
    monkeypatch.setattr("smalti.pipelines.image_api.BODY_SECONDS", 0.1)
    head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    with served.on_loopback() as url:
        place = ("127.0.0.1", int(url.rpartition(":")[2]))
        with socket.create_connection(place, timeout=30) as line:
            line.sendall(
                f"{head}Content-Type: application/json\r\nContent-Length: 10\r\n\r\n{{".encode()
            )
            answer = b""
            while part := line.recv(4096):
                answer += part
    assert b"400 Bad Request" in answer and b"did not arrive within" in answer


def wait_until(condition) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_failure_is_an_answer_and_the_server_goes_on(client, served, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(ContinuousBatch, "step", lambda batch: 1 / 0)
        error = error_of(client.post(GENERATIONS, json={"class_label": 0}), 500)
    assert error["type"] == "server_error" and "division" not in error["message"]
    assert client.post(GENERATIONS, json={"class_label": 0}).status_code == 200


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"host": "0.0.0.0"}, "give --token, or set SMALTI_SERVE_TOKEN"),
        ({"host": "example.org"}, "give --token"),
        ({"token": "with space"}, "ASCII without spaces"),
        ({"token": "ü"}, "ASCII without spaces"),
    ],
)
def test_a_host_that_others_reach_needs_a_token(changes, message, monkeypatch) -> None:
    monkeypatch.delenv("SMALTI_SERVE_TOKEN", raising=False)
    with pytest.raises(ConfigurationError, match=message):
        ServeConfig(**changes).checked_token()


def test_the_token_of_the_environment_is_used(monkeypatch) -> None:
    assert ServeConfig(host="::1").checked_token() == ""
    monkeypatch.setenv("SMALTI_SERVE_TOKEN", "abc")
    assert ServeConfig(host="0.0.0.0").checked_token() == "abc"
    assert ServeConfig(host="0.0.0.0", token="d").checked_token() == "d"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_queue", "4"], "raise --max_queue, or lower --max_images"),
        (["--port", "70000"], "between 0 and 65535"),
        (["--max_wait_ms", "-1"], "max_wait_ms is -1"),
        (["--host", "0.0.0.0"], "give --token"),
        (["--model", "nowhere/at/all"], "nowhere/at/all"),
        (["--dtype", "int9"], "int9"),
    ],
)
def test_wrong_options_are_one_line(flags, message, capsys, monkeypatch) -> None:
    monkeypatch.delenv("SMALTI_SERVE_TOKEN", raising=False)
    assert main(["serve", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_missing_packages_are_one_line(capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "smalti.pipelines.image_api", None)
    assert main(["serve"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'smalti[serve]'" in line


@pytest.mark.parametrize("command", ["serve", "ui"])
def test_a_port_in_use_is_one_line_before_a_model_is_loaded(command, capsys, monkeypatch) -> None:
    for name in ("gradio", "gradio.themes"):  # whose import takes seconds
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main([command, "--model", "nowhere", "--port", port]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"cannot listen on 127.0.0.1, port {port}" in line


@pytest.fixture
def batchers(monkeypatch) -> list[Batcher]:
    """Of the servers that `serve` would run: they end at once."""
    made = list[Batcher]()

    def server_of(app: Any, batcher: Batcher) -> Any:
        made.append(batcher)
        return SimpleNamespace(run=lambda places: None)

    monkeypatch.setattr("smalti.pipelines.image_api.server_of", server_of)
    return made


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_dtype_is_the_precision_of_every_size(pipe, tmp_path: Path, batchers, dtype) -> None:
    folder = str(pipe.save_pretrained(tmp_path / "p"))
    serve(ServeConfig(model=folder, port=0, dtype=dtype, image_sizes=((8, 16),)))
    expected = {"bf16": torch.bfloat16, "int8": torch.int8}[dtype]
    assert {p.dtype for p in batchers[-1].pipelines.values()} == {expected}


def test_a_precision_that_a_prior_cannot_have_is_one_line(tmp_path: Path, capsys) -> None:
    network = DiTConfig(2, 2, (8, 8), 1, 32, 2, 2, num_classes=3)
    vae = KLTokenizer(KLConfig(image_size=16, conv=replace(TINY_CONV, z_channels=2)))
    pipe = Pipeline(vae, FlowPrior(FlowConfig(network=network)), CLASSES)
    folder = str(pipe.save_pretrained(tmp_path / "p"))
    assert main(["serve", "--model", folder, "--port", "0", "--dtype", "int4"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "dtype is int4, and a flow prior has no weights of this type: use float32" in line


def test_no_continuous_and_compile_wait_for_a_batch(tmp_path: Path, batchers, pipe) -> None:
    folder = str(pipe.save_pretrained(tmp_path / "pipe"))
    for options, joins in (({}, True), ({"continuous": False}, False), ({"compile": True}, False)):
        serve(ServeConfig(model=folder, port=0, **options))
        assert batchers[-1].continuous == joins, options


def test_compile_compiles_the_models_of_every_size(tmp_path: Path, batchers) -> None:
    network = DiTConfig(2, 2, (8, 8), 1, 32, 2, 2, num_classes=3, positions="rotary")
    vae = KLTokenizer(KLConfig(image_size=16, conv=replace(TINY_CONV, z_channels=2)))
    pipe = Pipeline(vae, FlowPrior(FlowConfig(network=network)), CLASSES)
    folder = str(pipe.save_pretrained(tmp_path / "p"))
    for flag in (False, True):
        serve(ServeConfig(model=folder, port=0, compile=flag, image_sizes=((8, 16),)))
        sized = batchers[-1].pipelines
        assert [*sized] == [16, (8, 16)]
        networks: list[Any] = [p.prior.network for p in sized.values()]
        assert all((network._compiled_call_impl is not None) == flag for network in networks)


def started(folder: Path, *flags: str, stderr: Any = None) -> tuple[subprocess.Popen, str]:
    """A server in a process of its own, and its address."""
    command = [sys.executable, "-m", "smalti", "serve", "--model", str(folder), "--port", "0"]
    process = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, stderr=stderr, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"http://127\.0\.0\.1:\d+", line)
    assert found, line
    return process, found[0]


# A picture of a flow prior waits, and takes long when the server stops: its batch has very many
# rows.
SLOW = ("--max_wait_ms", "60000", "--max_batch_size", "100000")


def test_a_second_signal_ends_at_once(flow_pipe, tmp_path: Path) -> None:
    folder = flow_pipe.save_pretrained(tmp_path / "p")
    with open(tmp_path / "errors", "w") as errors:
        process, url = started(folder, *SLOW, stderr=errors)
    with process, ThreadPoolExecutor(1) as clients:
        answer = clients.submit(httpx.post, url + GENERATIONS, json={"class_label": 0}, timeout=60)
        wait_until(lambda: "smalti_queue_pictures 1.0" in httpx.get(url + METRICS).text)
        process.send_signal(signal.SIGINT)
        wait_until(lambda: httpx.get(url + HEALTH).status_code == 503)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert answer.result(60).status_code == 503
    lines = (tmp_path / "errors").read_text().splitlines()
    assert lines == ["SIGINT: finishing 1 waiting pictures", "error: interrupted"]


@pytest.mark.parametrize("flag", ["--continuous", "--no_continuous"])
def test_a_second_signal_ends_a_process_that_samples(pipe, tmp_path: Path, flag: str) -> None:
    """Before, it aborted: the interpreter ended while a thread was inside torch."""
    folder = pipe.save_pretrained(tmp_path / "p")
    with open(tmp_path / "errors", "w") as errors:
        slow = ("--max_batch_size", "20000", flag)
        process, url = started(folder, *slow, stderr=errors)
    body = {"class_label": 0, "seed": 7}  # of a seed one is sampled, and the other waits
    with process, ThreadPoolExecutor(2) as clients:
        answers = [
            clients.submit(httpx.post, url + GENERATIONS, json=body, timeout=60) for _ in range(2)
        ]
        wait_until(lambda: "smalti_queue_pictures 1.0" in httpx.get(url + METRICS).text)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(url + HEALTH).status_code == 503)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 130
        assert [answer.result(60).status_code for answer in answers] == [503] * 2
    assert (tmp_path / "errors").read_text().splitlines()[-1] == "error: interrupted"


def test_sigterm_finishes_what_was_accepted_and_ends_with_0(flow_pipe, tmp_path: Path) -> None:
    process, url = started(flow_pipe.save_pretrained(tmp_path / "p"), "--max_wait_ms", "60000")
    with process, ThreadPoolExecutor(3) as clients:
        bodies = [{"class_label": 0, "seed": seed} for seed in (1, 2, 17)]
        answers = [
            clients.submit(httpx.post, url + GENERATIONS, json=body, timeout=60) for body in bodies
        ]
        wait_until(lambda: "smalti_queue_pictures 3.0" in httpx.get(url + METRICS).text)
        process.send_signal(signal.SIGTERM)
        assert [answer.result(60).status_code for answer in answers] == [200] * 3
        assert process.wait(60) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(url + HEALTH)
