"""Compare an adapter in vLLM, over HTTP with images, with `generate`.

    export PYTHONPATH=.:tests/startup
    build/vllm/env/bin/peft-crome export outputs/quickstart/finetune/adapter build/vllm/served \\
        --model outputs/quickstart/finetune/composite
    build/vllm/env/bin/python -m benchmarks.vllm_http outputs/quickstart/finetune build/vllm/served

Run them in the environment of `make test-vllm`. The last starts vLLM's server on this machine, asks it test
questions of easy-VQA with eight clients at once, and writes docs/vllm.md.
"""

from __future__ import annotations

import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
import vllm
from PIL import Image

from benchmarks.interleaved import machine
from benchmarks.pages import rewrite
from examples.easy_vqa import data
from examples.easy_vqa.model import load_stage, processor
from examples.easy_vqa.parts import easy_vqa_dir
from examples.easy_vqa.records import write_json
from tests.engine.server import Server, data_url, message, serve

RESULTS = Path(__file__).parent / "results" / "vllm_http.json"
PAGE = Path(__file__).parent.parent / "docs" / "vllm.md"
BEGIN, END = "<!-- begin: written by python -m benchmarks.vllm_http -->", "<!-- end of the comparison -->"
TOKENS, CLIENTS = 6, 8


def expected(model: Any, reader: Any, questions: list[dict[str, Any]]) -> list[list[int]]:
    """Return the greedy tokens of `generate`, one question after another."""
    answers = []
    for row in questions:
        chat = data.messages([[row["question"]]])
        text = reader.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        inputs = reader(images=[image(row)], text=[text], return_tensors="pt", add_special_tokens=False)
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        answers.append(output[0, inputs["input_ids"].shape[1] :].tolist())
    return answers


def image(row: dict[str, Any]) -> Image.Image:
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


def described(record: dict[str, Any]) -> str:
    """Describe a record in words, for the page."""
    cpu = record["machine"]
    words = (
        f"The server gave the tokens of `generate` for {record['answers_equal']} of {record['questions']} test "
        f"questions with images, and {record['answers_right']} of the answers were right. Eight clients took "
        f"{record['seconds_vllm_eight_clients']:.0f} s for them, and `generate`, one question after another, "
        f"{record['seconds_generate_one_by_one']:.0f} s. This was one run in {record['dtype']} with vLLM "
        f"{record['vllm']}, on one thread of a CPU ({cpu['processor']}, {cpu['instructions']})."
    )
    return textwrap.fill(words, 100)


def main(
    stage: Annotated[
        Path, typer.Argument(help="A stage's directory of examples.easy_vqa, with composite/ and adapter/.")
    ],
    served: Annotated[Path, typer.Argument(help="What `peft-crome export` wrote of the stage's adapter.")],
    questions: Annotated[int, typer.Option(help="Number of questions from the test split.")] = 64,
    dtype: Annotated[str, typer.Option(help="Dtype of both models.")] = "float32",
    output: Annotated[Path, typer.Option(help="File for the result.")] = RESULTS,
) -> None:
    """Serve, ask and compare."""
    model, reader = load_stage(stage).to(getattr(torch, dtype)), processor()
    half = questions // 2
    rows = data.sample(data.load_questions("test"), {"what": questions - half, "yes/no": half})
    start = perf_counter()
    answers = expected(model, reader, rows)
    alone = perf_counter() - start
    del model
    arguments = ("--enforce-eager", "--dtype", dtype, "--max-model-len", "256")
    with (
        TemporaryDirectory() as folder,
        serve(served, Path(folder) / "log", *arguments) as server,
        ThreadPoolExecutor(CLIENTS) as clients,
    ):
        start = perf_counter()
        found = list(clients.map(lambda row: ask(server, row), rows))
        seconds = perf_counter() - start
    words = [reader.tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in found]
    end = reader.tokenizer.eos_token_id
    found, answers = ([[t for t in tokens if t != end] for tokens in rows_of] for rows_of in (found, answers))
    record = {
        "machine": machine(),
        "vllm": vllm.__version__,
        "stage": str(stage),
        "dtype": dtype,
        "questions": questions,
        "answers_equal": sum(one == other for one, other in zip(found, answers, strict=True)),
        "answers_right": sum(word == row["answer"] for word, row in zip(words, rows, strict=True)),
        "seconds_generate_one_by_one": round(alone, 1),
        "seconds_vllm_eight_clients": round(seconds, 1),
    }
    print(record)
    write_json(output, record)
    if output == RESULTS:
        rewrite(PAGE, BEGIN, END, described(record))


if __name__ == "__main__":
    typer.run(main)
