"""Compare the memory of a training step, as `peft_crome.training.predict_step` predicts it, with a real process.

    python -m benchmarks.memory

Each case is a fresh process: frozen DINOv2-small and SmolLM2-135M as `peft-crome train` builds them, two steps of
AdamW on a batch with a padded row. The result is the highest resident memory during the steps, minus the process's
memory before the model was built (after two steps of a tiny model, which load the libraries). Needs Linux.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import get_peft_model
from rich.console import Console
from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM

from benchmarks.devices import Device, clock_on, held, in_fresh_process, is_gpu, peak, results_on, settle
from benchmarks.interleaved import markdown
from examples.easy_vqa.parts import dinov2_small, smollm2
from examples.easy_vqa.records import write_json
from peft_crome import CromeConfig, CromeVLMForConditionalGeneration
from peft_crome.training import StepSize, build, load_recipe, predict_step, recipe_skeleton

RESULTS = Path(__file__).parent / "results" / "memory"
IMAGE_SIZE, POOL = 112, 2  # 16 tokens per image
QFORMER = {
    "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1536,
    "vocab_size": 49152,
}  # fmt: skip
TINY = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
WITHIN = 0.15

CASES: list[dict[str, Any]] = [
    {"dtype": "float32", "rows": 4, "tokens": 64},
    {"dtype": "float32", "rows": 4, "tokens": 256},
    {"dtype": "float32", "rows": 4, "tokens": 256, "checkpointing": True},
    {"dtype": "bfloat16", "rows": 4, "tokens": 64},
    {"dtype": "bfloat16", "rows": 16, "tokens": 64},
    {"dtype": "bfloat16", "rows": 4, "tokens": 256},
    {"dtype": "bfloat16", "rows": 16, "tokens": 256},
    {"dtype": "bfloat16", "rows": 4, "tokens": 512},
    {"dtype": "bfloat16", "rows": 4, "tokens": 512, "checkpointing": True},
    {"dtype": "bfloat16", "rows": 4, "tokens": 256, "quantization": "4bit"},
    {"dtype": "bfloat16", "rows": 4, "tokens": 256, "quantization": "4bit", "checkpointing": True},
    {"dtype": "bfloat16", "rows": 4, "tokens": 256, "quantization": "8bit"},
    {"dtype": "bfloat16", "rows": 4, "tokens": 256, "qformer": True},
    {"dtype": "float32", "rows": 4, "tokens": 256, "checkpointing": True, "malloc": "default"},
    {"dtype": "bfloat16", "rows": 4, "tokens": 256, "malloc": "default"},
    {"dtype": "bfloat16", "rows": 4, "tokens": 256, "quantization": "4bit", "malloc": "default"},
]
# glibc keeps freed blocks of up to 32 MB and cannot reuse all of them. Returned at once, only tensors count.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def recipe_of(case: dict[str, Any]) -> Any:
    """Build a recipe of the first stage, or with a Q-Former of the second, which trains the Q-Former as well."""
    reader = {"qformer": QFORMER, "qformer_tokenizer": str(smollm2())} if case.get("qformer") else {}
    return load_recipe(
        {
            "stage": "instruct" if reader else "pretrain",
            "output": "unused",
            "data": [{"path": "unused"}],
            "backbones": {
                "vision": str(dinov2_small()), "language": str(smollm2()), "dtype": case["dtype"],
                "quantization": case.get("quantization"), "image_size": IMAGE_SIZE, "vision_pool_size": POOL, **reader,
            },
            "training": {"max_steps": 2, "warmup_steps": 1},
        }
    )  # fmt: skip


def batch_of(composite: Any, rows: int, tokens: int) -> dict[str, torch.Tensor]:
    """Build rows of one image and random words; the last row is shorter."""
    ids = torch.randint(1000, 2000, (rows, tokens))
    ids[:, 4 : 4 + composite.image_seq_length] = composite.config.image_token_id
    attention_mask = torch.ones_like(ids)
    attention_mask[-1, -4:] = 0
    labels = ids.masked_fill(attention_mask == 0, -100)
    batch = {"input_ids": ids, "attention_mask": attention_mask, "labels": labels}
    batch["pixel_values"] = torch.randn(rows, 3, *composite.config.image_height_width)
    if composite.qformer is not None:
        read = torch.randint(1000, 2000, (rows, 32))
        batch |= {"qformer_input_ids": read, "qformer_attention_mask": torch.ones_like(read)}
    return {key: value.to(composite.device) for key, value in batch.items()}


def train_two_steps(model: Any, rows: int, tokens: int, checkpointing: bool) -> float:
    """Run two steps as the Trainer does, and return the seconds of the second."""
    if checkpointing:
        model.activation_checkpointing_enable()
    model.train()
    batch = batch_of(model.get_base_model(), rows, tokens)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    clock = clock_on(str(model.device))
    for _ in range(2):
        start = clock()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return clock() - start


def warm_up(device: str = "cpu") -> None:
    """Load the libraries of a step by running a tiny composite of the same kinds."""
    tower = Dinov2Model(Dinov2Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28))
    language = LlamaForCausalLM(LlamaConfig(vocab_size=3000, **TINY))
    composite = CromeVLMForConditionalGeneration.from_backbones(
        vision=tower, language=language, image_token_id=2999, image_size=28
    )
    train_two_steps(
        get_peft_model(composite.bfloat16().to(device), CromeConfig(branches=["text", "vision"], bottleneck_dim=8)),
        2,
        64,
        checkpointing=True,
    )


def load(make: Callable[[], Any], device: str) -> tuple[Any, int]:
    """Make a model in a fresh process, and return it with the bytes that the process held before.

    Args:
        make: function that makes the model on the device.
    """
    torch.manual_seed(0)
    warm_up(device)
    settle(device)
    before = held(device)
    model = make()
    for parameter in model.parameters():
        if type(parameter) is torch.nn.Parameter:  # copy out of the mapped checkpoint, as moving to a device does
            parameter.data = parameter.data.clone()
    settle(device)
    return model, before


def measure(case: dict[str, Any], device: str = "cpu") -> dict[str, Any]:
    """Build and train; call it in a fresh process."""
    if case.get("quantization"):
        import bitsandbytes  # noqa: F401
    model, before = load(lambda: build(recipe_of(case))[0].to(device), device)
    loaded = held(device) - before
    seconds = train_two_steps(model, case["rows"], case["tokens"], case.get("checkpointing", False))
    return {"loaded": loaded, "peak": peak(device) - before, "seconds": round(seconds, 2)}


def predict(case: dict[str, Any]) -> dict[str, Any]:
    """Predict the same from the configurations."""
    recipe = recipe_of(case)
    start = time.perf_counter()
    model = recipe_skeleton(recipe)
    size = StepSize(case["rows"], case["tokens"], images=case["rows"])
    cost = predict_step(model, size, gradient_checkpointing=case.get("checkpointing", False))
    weights = sum(cost.weights.values())
    return {
        "weights": weights, "kept": cost.kept, "peak": cost.peak, "flops": cost.flops,
        "seconds": round(time.perf_counter() - start, 2),
    }  # fmt: skip


def ratio(record: dict[str, Any]) -> float:
    """Compute the ratio of predicted to measured memory."""
    return record["predicted"]["peak"] / record["measured"]["peak"]


def is_near(record: dict[str, Any]) -> bool:
    """Whether a prediction is within 15%. Losses of the default malloc are shown, but not part of the prediction."""
    return "malloc" in record["case"] or abs(ratio(record) - 1) < WITHIN


def table(records: list[dict[str, Any]]) -> str:
    """Format a line per case."""
    rows = []
    for record in records:
        case, said, found = record["case"], record["predicted"], record["measured"]
        words = [case.get("quantization") or case["dtype"]]
        words += ["checkpointing"] * bool(case.get("checkpointing")) + ["Q-Former"] * bool(case.get("qformer"))
        words += ["malloc's defaults"] * ("malloc" in case)
        sizes = [f"{size / 1e6:,.0f}" for size in (said["weights"], said["kept"], said["peak"], found["peak"])]
        shape = [", ".join(words), case["rows"], case["tokens"]]
        rows.append([*shape, *sizes, f"{ratio(record):.2f}", found["seconds"]])
    sizes = ["weights, MB", "kept, MB", "predicted, MB", "measured, MB"]
    return markdown(["frozen in", "rows", "tokens", *sizes, "ratio", "a step, s"], rows)


def main(
    case: Annotated[str | None, typer.Option(help="Measure only this case (JSON).")] = None,
    device: Device = "cpu",
) -> None:
    """Predict and measure each case, write and print. Exits with status 1 if a case is off by 15% or more."""
    if case is not None:
        print(json.dumps(measure(json.loads(case), device)))
        return
    records = []
    cases = [case for case in CASES if not (is_gpu(device) and "malloc" in case)]
    for number, chosen in enumerate(cases, 1):
        arguments = ["--device", device, "--case", json.dumps(chosen)]
        environment = {} if "malloc" in chosen else GIVE_BACK
        measured = in_fresh_process("benchmarks.memory", *arguments, **environment)
        record = {"case": chosen, "predicted": predict(chosen), "measured": measured}
        records.append(record)
        Console(stderr=True).print(f"{number} of {len(cases)}: {chosen}, {ratio(record):.3f}", soft_wrap=True)
    results = results_on(device, RESULTS)
    write_json(results / "records.json", [{**r, "torch": torch.__version__} for r in records])
    (results / "table.md").write_text(table(records))
    print(table(records))
    sys.exit(not all(map(is_near, records)))


if __name__ == "__main__":
    typer.run(main)
