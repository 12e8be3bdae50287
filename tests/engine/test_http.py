"""Test the OpenAI-compatible server with images and adapters. Every answer comes over HTTP."""

from __future__ import annotations

import functools
import http.server
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from peft_crome.serving.served import BASE_NAME
from tests.families.conversations import picture, turn

from .hosts import all_equal, exported, generated, inputs_of
from .server import Server, data_url, message, png, serve

HOST, TOKENS, LENGTH, TEXT = "qwen2_vl", 16, 256, "What is this?"
NAMES = ["red", "green", "blue"]
CLIENTS = 8


class Running(NamedTuple):
    """The server, its images, and the expected tokens by adapter and number of the image."""

    server: Server
    images: list[Any]
    expected: dict[tuple[str, int], list[int]]
    folder: Path


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("http")
    case = exported(HOST, folder, NAMES)
    images = [picture(60 + 7 * number, 100 - 5 * number)["image"] for number in range(CLIENTS)]
    expected = {}
    for number, image in enumerate(images):
        inputs = inputs_of(case.processor, [turn("user", {"type": "image", "image": image}, TEXT)])
        for name in [*NAMES, BASE_NAME]:
            expected[name, number] = generated(case.model, inputs, adapter_names=[name])
    assert len({tuple(tokens) for tokens in expected.values()}) > len(images) * 2
    arguments = ("--enforce-eager", "--dtype", "float32", "--max-model-len", str(LENGTH), "--max-num-seqs", "8")
    with serve(case.served, folder / "log", *arguments, "--trust-request-mm-kwargs") as server:
        yield Running(server, images, expected, folder)


@pytest.mark.parametrize("name", [*NAMES, BASE_NAME])
def test_an_image_in_the_request(running: Running, name: str) -> None:
    url = data_url(png(running.images[0]))
    assert all_equal([running.server.tokens(message(url, TEXT), name, TOKENS)], [running.expected[name, 0]])


def test_an_image_by_its_address(running: Running) -> None:
    (running.folder / "images").mkdir()
    (running.folder / "images" / "1.png").write_bytes(png(running.images[1]))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=running.folder / "images")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as files:
        threading.Thread(target=files.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{files.server_address[1]}/1.png"
        assert all_equal([running.server.tokens(message(url, TEXT), "green", TOKENS)], [running.expected["green", 1]])
        files.shutdown()


def test_streaming(running: Running) -> None:
    arguments = {"stream": True, "max_tokens": TOKENS, "min_tokens": TOKENS, "return_token_ids": True}
    content = message(data_url(png(running.images[2])), TEXT)
    status, lines = running.server.post(content, "blue", **arguments)
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    parts = [choice.get("token_ids") or [] for event in events for choice in event["choices"]]
    assert status == 200
    assert lines[-1] == "data: [DONE]" or lines[-2] == "data: [DONE]"
    assert len([part for part in parts if part]) > 1  # it came in pieces
    assert all_equal([[token for part in parts for token in part]], [running.expected["blue", 2]])


def test_eight_clients_at_once(running: Running) -> None:
    def ask(number: int) -> list[int]:
        url = data_url(png(running.images[number]))
        return running.server.tokens(message(url, TEXT), NAMES[number % 3], TOKENS)

    with ThreadPoolExecutor(CLIENTS) as clients:
        answers = list(clients.map(ask, range(CLIENTS)))
    assert all_equal(answers, [running.expected[NAMES[number % 3], number] for number in range(CLIENTS)])


def test_an_adapter_that_is_not_there(running: Running) -> None:
    content = message(data_url(png(running.images[0])), TEXT)
    status, answer = running.server.post(content, "purple", max_tokens=1)
    assert status == 404
    assert answer["error"]["message"].startswith(
        "There is no adapter 'purple'; expected one of ['red', 'green', 'blue', '__base__']. Write"
    )
    status, answer = running.server.post(content, max_tokens=1)
    assert status == 404
    assert answer["error"]["message"].startswith("The request names no adapter; expected one of ['red', 'green',")


def test_an_image_that_is_none(running: Running) -> None:
    status, answer = running.server.post(message(data_url(b"not an image"), TEXT), "red", max_tokens=1)
    assert status == 400
    assert "image" in answer["error"]["message"]


def test_a_prompt_that_is_too_long(running: Running) -> None:
    content = message(data_url(png(running.images[0])), "word " * LENGTH)
    status, answer = running.server.post(content, "red", max_tokens=1)
    assert status == 400
    assert str(LENGTH) in answer["error"]["message"]


def test_the_server_answers_after_errors(running: Running) -> None:
    url = data_url(png(running.images[0]))
    assert running.server.post(message(url, TEXT), "none", max_tokens=1)[0] == 404
    assert running.server.post(message(data_url(b"no"), TEXT), "red", max_tokens=1)[0] == 400
    assert all_equal([running.server.tokens(message(url, TEXT), "red", TOKENS)], [running.expected["red", 0]])
