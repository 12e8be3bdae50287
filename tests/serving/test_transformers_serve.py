"""Test `transformers serve` over HTTP with an adapter beside its host's checkpoint. The answers are the adapted
model's."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from peft_crome import CromeConfig
from tests.examples.tiny_llava import save_questions, save_tokenizer_and_model

ROOT = Path(__file__).parents[2]
QUESTION = "What color is the circle?"


def script() -> str:
    """Return the code of `serve.py` in docs/serving.md."""
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    return page.split("a test runs serve.py -->\n```python\n")[1].split("```")[0]


def post(port: int, body: dict) -> dict:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


@pytest.mark.slow
def test_server_answers_as_the_adapted_model(tmp_path: Path) -> None:
    save_tokenizer_and_model(tmp_path / "served")
    save_questions(tmp_path / "questions")
    image = tmp_path / "questions" / "images" / "0.png"
    torch.manual_seed(0)
    host = AutoModelForImageTextToText.from_pretrained(tmp_path / "served")
    host.lm_head.weight.data.mul_(30)  # words that differ
    host.save_pretrained(tmp_path / "served")
    processor = AutoProcessor.from_pretrained(tmp_path / "served")
    parts = [{"type": "image", "image": Image.open(image)}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    model = get_peft_model(host, CromeConfig(bottleneck_dim=8, init_weights=False)).eval()
    model.save_pretrained(tmp_path / "served")
    said = {}
    for name in ("adapted", "frozen"):
        with model.disable_adapter() if name == "frozen" else torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        said[name] = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert said["adapted"] != said["frozen"]

    (tmp_path / "serve.py").write_text(script())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, str(tmp_path / "serve.py"), str(tmp_path / "served"), str(port)]
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=tmp_path)
    try:
        deadline = time.monotonic() + 180
        while True:
            assert server.poll() is None, (tmp_path / "log").read_text()[-3000:]
            assert time.monotonic() < deadline
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        url = "data:image/png;base64," + base64.b64encode(image.read_bytes()).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
        body = {"model": str(tmp_path / "served"), "messages": [{"role": "user", "content": content}], "max_tokens": 3}
        answer = post(port, {**body, "temperature": 0})
    finally:
        server.terminate()
        server.wait(timeout=30)
    assert answer["choices"][0]["message"]["content"] == said["adapted"]
