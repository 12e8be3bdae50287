"""Run vLLM's OpenAI-compatible server in its own process, and send it requests."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

# A small cache of keys and values, in GB; no threads that are bound to cores; prompts longer than tiny hosts name.
ON_ONE_CORE = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
}


@dataclass(frozen=True)
class Server:
    """A running server, and the name of the model that it serves."""

    port: int
    model: str

    def post(
        self, content: Any, adapter: str | None = None, system: str | None = None, **body: Any
    ) -> tuple[int, Any]:
        """Ask about a message, and return the status and the answer. A streamed answer is a list of lines."""
        messages = [{"role": "user", "content": content}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        body |= {"model": self.model, "messages": messages, "temperature": 0}
        if adapter is not None:
            body["mm_processor_kwargs"] = {"adapter_name": adapter}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/chat/completions", json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                lines = answer.read().decode()
                return answer.status, lines.splitlines() if body.get("stream") else json.loads(lines)
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def tokens(self, content: Any, adapter: str | None, count: int) -> list[int]:
        """Return the tokens of an answer of `count` tokens."""
        arguments = {"max_tokens": count, "min_tokens": count, "return_token_ids": True}
        status, answer = self.post(content, adapter, **arguments)
        assert status == 200, answer
        return answer["choices"][0]["token_ids"]


@contextmanager
def serve(model: Path, log: Path, *arguments: str) -> Iterator[Server]:
    """Start the server, wait until it answers, and stop it at the end of the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | ON_ONE_CORE | {"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    # `vllm serve` itself asks for the package `vllm`, and vllm-cpu has another name.
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command = [*server, "--host", "127.0.0.1", "--port", str(port), *arguments]
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 900
        while True:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.5)
        yield Server(port, str(model))
    finally:
        process.terminate()
        process.wait(timeout=60)


def png(image: Image.Image) -> bytes:
    """Return a PNG file with exactly these pixels, as bytes."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def message(url: str, text: str) -> list[dict[str, Any]]:
    """Return a message's content with an image and a question."""
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]


def data_url(data: bytes) -> str:
    """Return a URL that contains the image itself."""
    return "data:image/png;base64," + base64.b64encode(data).decode()
