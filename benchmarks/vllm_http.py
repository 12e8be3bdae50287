"""Compare the quick start's adapter in vLLM, over HTTP with images, with `generate`.

    python -m benchmarks.vllm_http outputs/easy_vqa/crome/finetune

Run it in the environment of `make test-vllm`. It exports the stage's composite and adapter, starts `vllm serve` on
this machine, and asks it test questions of easy-VQA with eight clients at once.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import typer
import vllm
from PIL import Image

from benchmarks.interleaved import machine
from examples.easy_vqa import data
from examples.easy_vqa.model import load_stage, processor
from examples.easy_vqa.parts import easy_vqa_dir
from examples.easy_vqa.training import write_json
from peft_crome.serving import export
from tests.engine.server import Server, data_url, message, serve

RESULTS = Path(__file__).parent / "results" / "vllm_http.json"
TOKENS, CLIENTS = 6, 8


def expected(model: Any, reader: Any, questions: list[dict[str, Any]]) -> list[list[int]]:
    """Return the greedy tokens of `generate`, one question after another."""
    answers = []
    for row in questions:
        chat = data.messages([[row["question"]]])
        text = reader.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        inputs = reader(images=[picture(row)], text=[text], return_tensors="pt", add_special_tokens=False)
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        answers.append(output[0, inputs["input_ids"].shape[1] :].tolist())
    return answers


def picture(row: dict[str, Any]) -> Image.Image:
    """Open the image of a question."""
    return Image.open(path_of(row)).convert("RGB")


def path_of(row: dict[str, Any]) -> Path:
    """Return the path of the image of a question."""
    return easy_vqa_dir() / "test" / "images" / f"{row['image_id']}.png"


def ask(server: Server, row: dict[str, Any]) -> list[int]:
    """Return the tokens of the server's answer."""
    content = message(data_url(path_of(row).read_bytes()), row["question"])
    status, answer = server.post(content, system=data.SYSTEM, max_tokens=TOKENS, return_token_ids=True)
    if status != 200:
        raise RuntimeError(f"HTTP {status}: {answer}")
    return answer["choices"][0]["token_ids"]


def main(
    stage: Annotated[
        Path, typer.Argument(help="A stage's directory of examples.easy_vqa, with composite/ and adapter/.")
    ],
    questions: Annotated[int, typer.Option(help="Number of questions from the test split.")] = 64,
    dtype: Annotated[str, typer.Option(help="Dtype of both models.")] = "float32",
    output: Annotated[Path, typer.Option(help="File for the result.")] = RESULTS,
) -> None:
    """Export, serve, ask and compare."""
    model, reader = load_stage(stage).to(getattr(torch, dtype)), processor()
    half = questions // 2
    rows = data.sample(data.load_questions("test"), {"what": questions - half, "yes/no": half})
    start = perf_counter()
    answers = expected(model, reader, rows)
    alone = perf_counter() - start
    with TemporaryDirectory() as folder:
        export(model, Path(folder) / "served", processor=reader)
        del model
        log = Path(folder) / "log"
        arguments = ("--enforce-eager", "--dtype", dtype, "--max-model-len", "256")
        with serve(Path(folder) / "served", log, *arguments) as server, ThreadPoolExecutor(CLIENTS) as clients:
            start = perf_counter()
            served = list(clients.map(lambda row: ask(server, row), rows))
            seconds = perf_counter() - start
    words = [reader.tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in served]
    end = reader.tokenizer.eos_token_id
    served, answers = ([[t for t in tokens if t != end] for tokens in rows_of] for rows_of in (served, answers))
    result = {
        "machine": machine(),
        "vllm": vllm.__version__,
        "dtype": dtype,
        "questions": questions,
        "answers_equal": sum(one == other for one, other in zip(served, answers, strict=True)),
        "answers_right": sum(word == row["answer"] for word, row in zip(words, rows, strict=True)),
        "seconds_generate_one_by_one": round(alone, 1),
        "seconds_vllm_eight_clients": round(seconds, 1),
    }
    print(result)
    write_json(output, result)


if __name__ == "__main__":
    typer.run(main)
