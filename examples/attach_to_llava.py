# /// script
# requires-python = ">=3.10"
# dependencies = ["peft-crome", "peft", "torch", "transformers", "pillow", "typer"]
# ///
"""Attach a new adapter to a vision-language model and check its effect: no logit changes, and 5M weights can train.

    python examples/attach_to_llava.py --model llava-hf/llava-1.5-7b-hf

prints the adapter's size, the sites that it wraps, and the answers before and after. A new adapter is an identity, so
every logit stays the same to the last bit. Any image-text-to-text model works: without a GPU, try
`--model HuggingFaceTB/SmolVLM-256M-Instruct`. The script draws an image; `--image` takes yours.
"""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import get_peft_model
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor

import peft_crome


def draw() -> Image.Image:
    """Draw a teal circle on white."""
    image = Image.new("RGB", (224, 224), "white")
    ImageDraw.Draw(image).ellipse((48, 48, 176, 176), fill="teal")
    return image


@torch.inference_mode()
def ask(model: Any, processor: Any, inputs: Any, new_tokens: int) -> tuple[torch.Tensor, str]:
    """Return the logits of the prompt, (1, tokens, vocabulary), and the answer."""
    logits = model(**inputs).logits
    answer = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return logits, processor.decode(answer, skip_special_tokens=True).strip()


def main(
    model: Annotated[str, typer.Option(help="Hub name or folder of an image-text-to-text model.")] = (
        "llava-hf/llava-1.5-7b-hf"
    ),
    image: Annotated[Path | None, typer.Option(help="An image; a teal circle is drawn if there is none.")] = None,
    question: str = "What color is the circle?",
    new_tokens: int = 20,
) -> None:
    """Answer a question, attach the adapter, answer again and compare."""
    processor = AutoProcessor.from_pretrained(model)
    vlm = AutoModelForImageTextToText.from_pretrained(model, dtype="auto", device_map="auto")
    shown = Image.open(image).convert("RGB") if image else draw()
    content = [{"type": "image", "image": shown}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(vlm.device, vlm.dtype)

    logits_before, answer_before = ask(vlm, processor, inputs, new_tokens)
    vlm = get_peft_model(vlm, peft_crome.CromeConfig()).eval()
    logits_after, answer_after = ask(vlm, processor, inputs, new_tokens)

    vlm.print_trainable_parameters()
    for status in vlm.get_layer_status():
        if status.module_type == "CromeLayer":  # the other entry has the weights that the sites share
            print(f"site: {status.name}, adapters {status.active_adapters}")
    print(f"question: {question}")
    print(f"answer before: {answer_before!r}")
    print(f"answer after:  {answer_after!r}")
    if not torch.equal(logits_before, logits_after):
        raise RuntimeError(f"A fresh adapter moved the logits by {(logits_before - logits_after).abs().max()}.")
    print(f"logits of the prompt, {tuple(logits_after.shape)}: equal, bit for bit")


if __name__ == "__main__":
    typer.run(main)
