# /// script
# requires-python = ">=3.10"
# dependencies = ["peft-crome", "peft", "torch", "transformers", "pillow", "safetensors", "typer"]
# ///
"""Save an adapter, print its files, load it in all possible ways, hold two adapters, and swap one for the other.

    python examples/share_and_load.py --model HuggingFaceTB/SmolVLM-256M-Instruct --output crome-shared

The two adapters are random stand-ins for trained ones (`init_weights=False`), so they give different logits. After
each way of loading, the logits are compared with those of the saved adapter. `--push user/name` uploads the
first one (log in with `hf auth login`); `PeftModel.from_pretrained(model, "user/name")` then loads it anywhere.
"""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import AutoPeftModel, PeftModel, get_peft_model
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

import peft_crome


def show(folder: Path) -> None:
    """Print an adapter's files, its tensors, and the loading instructions of its model card."""
    for file in sorted(folder.iterdir()):
        print(f"{file.name}: {file.stat().st_size:,} bytes")
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as weights:
        for key in weights.keys():  # noqa: SIM118 (no dict)
            print(f"  {key} {weights.get_slice(key).get_shape()} {weights.get_slice(key).get_dtype()}")
    _, heading, usage = (folder / "README.md").read_text().partition("## How to load this adapter")
    print(heading + usage)


def main(
    model: Annotated[str, typer.Option(help="Hub name or folder.")] = "HuggingFaceTB/SmolVLM-256M-Instruct",
    output: Path = Path("crome-shared"),
    push: Annotated[str | None, typer.Option(help="Hub repository to upload the first adapter to.")] = None,
) -> None:
    """Make, save, print, load and swap adapters."""
    processor = AutoProcessor.from_pretrained(model)
    content = [{"type": "image", "image": Image.new("RGB", (64, 64), "teal")}, {"type": "text", "text": "What color?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )

    def base() -> Any:
        return AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)

    @torch.inference_mode()
    def logits(peft_model: PeftModel) -> torch.Tensor:
        return peft_model.eval()(**inputs).logits

    saved = {}
    for name in ("first", "second"):
        vlm = get_peft_model(base(), peft_crome.CromeConfig(init_weights=False))
        saved[name] = logits(vlm)
        vlm.save_pretrained(output / name)
        if push and name == "first":
            vlm.push_to_hub(push)
    show(output / "first")

    def check(how: str, peft_model: PeftModel, name: str) -> None:
        if not torch.equal(logits(peft_model), saved[name]):
            raise RuntimeError(f"{how}: the logits are not those of the {name} adapter.")
        print(f"{how}: logits equal to the {name} adapter's")

    if torch.equal(saved["first"], saved["second"]):
        raise RuntimeError("Both adapters give the same logits: nothing below could be told apart.")
    check("AutoPeftModel.from_pretrained", AutoPeftModel.from_pretrained(output / "first"), "first")
    vlm = PeftModel.from_pretrained(base(), output / "first", adapter_name="first")
    check("PeftModel.from_pretrained", vlm, "first")
    vlm.load_adapter(output / "second", adapter_name="second")
    check("load_adapter, not yet active", vlm, "first")
    vlm.set_adapter("second")
    check("set_adapter", vlm, "second")
    vlm.set_adapter("first")
    check("set_adapter, back", vlm, "first")
    peft_crome.hotswap_adapter(vlm, str(output / "second"), adapter_name="first")
    check("hotswap_adapter, in place of the first", vlm, "second")


if __name__ == "__main__":
    typer.run(main)
