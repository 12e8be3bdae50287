"""Test uploads and loads by `user/name` over HTTP with huggingface_hub, in a process that gets the address from
HF_ENDPOINT."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import get_peft_model

from peft_crome import CromeConfig
from peft_crome.training import save_stage
from tests.examples.tiny_llava import save_tokenizer_and_model
from tests.share.hub import TOKEN, Hub, serve
from tests.vlm.test_qformer import qformer_processor, with_qformer

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve() as hub:
        yield hub
        assert not hub.unknown, "the server was asked for what it does not speak"


def run(code: str, hub: Hub, home: Path, *arguments: Path | str, token: str = TOKEN) -> str:
    """Run a script in its own process, because the Hub's address and token are read when libraries are imported."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HTTP", "http"))}
    environment |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DISABLE_SAFETENSORS_CONVERSION": "1",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "NO_PROXY": "127.0.0.1,localhost",
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env=environment, capture_output=True, text=True, cwd=home, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


PUSH = """
import sys, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from peft import get_peft_model
import peft_crome

if sys.argv[1] != "again":
    AutoModelForImageTextToText.from_pretrained(sys.argv[1]).push_to_hub("user/base")
    AutoProcessor.from_pretrained(sys.argv[1]).push_to_hub("user/base")
base = AutoModelForImageTextToText.from_pretrained("user/base")
model = get_peft_model(base, peft_crome.CromeConfig(bottleneck_dim=4, init_weights=False)).eval()
peft_crome.describe_adapter(model, task="Tells colors.", datasets=["user/colors"], image=sys.argv[2])
ids = torch.tensor([[1, 5, 6]])
torch.save(model(input_ids=ids).logits, sys.argv[3])
model.push_to_hub("user/adapter")
"""
LOAD = """
import sys, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from peft import AutoPeftModel, PeftModel
import peft_crome

ids, expected = torch.tensor([[1, 5, 6]]), torch.load(sys.argv[1])
def check(model):
    torch.testing.assert_close(model.eval()(input_ids=ids).logits, expected, rtol=0, atol=0)

base = AutoModelForImageTextToText.from_pretrained("user/base")
model = PeftModel.from_pretrained(base, "user/adapter")
check(model)
model.load_adapter("user/adapter", "second")
model.set_adapter("second")
check(model)
peft_crome.hotswap_adapter(model, "user/adapter", "second")
check(model)
check(AutoPeftModel.from_pretrained("user/adapter"))
check(PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained("user/base"), "user/adapter",
                                revision=sys.argv[2]))
"""


def test_an_adapter_is_pushed_and_loaded_by_its_name(hub: Hub, tmp_path: Path) -> None:
    save_tokenizer_and_model(tmp_path / "base")
    (tmp_path / "shown.png").write_bytes(b"not really an image")
    run(PUSH, hub, tmp_path, tmp_path / "base", tmp_path / "shown.png", tmp_path / "logits.pt")
    assert {"POST create", "POST preupload", "POST batch", "PUT put", "POST commit"} <= set(hub.asked)
    files = hub.files("user/adapter")
    assert set(files) == {
        ".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors", "example_image.png"
    }  # fmt: skip
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == "user/base"
    assert card.data.datasets == ["user/colors"]
    assert card.data.pipeline_tag == "image-text-to-text"
    for text in ("import peft_crome", 'PeftModel.from_pretrained(model, "user/adapter")', "Tells colors."):
        assert text in card.text
    assert f'revision="{hub.repositories["user/base"].head}"' in card.text
    assert str(tmp_path) not in card.content, "no folder of this machine"

    fresh = tmp_path / "fresh"  # nothing is cached there
    fresh.mkdir()
    run(LOAD, hub, fresh, tmp_path / "logits.pt", hub.repositories["user/adapter"].head, token="")
    assert {"HEAD resolve", "GET resolve", "GET large"} <= set(hub.asked)

    # A user edits the card on the Hub, and pushes again: the words stay.
    hub.repositories["user/adapter"].commit({**files, "README.md": files["README.md"] + b"\n## Thanks\n\nTo Ann.\n"})
    run(PUSH, hub, tmp_path, "again", tmp_path / "shown.png", tmp_path / "logits.pt")
    again = ModelCard(hub.files("user/adapter")["README.md"].decode())
    assert "To Ann." in again.text
    assert again.text.count("import peft_crome  # tells") == 1


def test_writing_without_a_token_is_an_error(hub: Hub, tmp_path: Path) -> None:
    save_tokenizer_and_model(tmp_path / "base")
    with pytest.raises(AssertionError, match="401"):
        run(PUSH, hub, tmp_path, tmp_path / "base", "", tmp_path / "logits.pt", token="hf_wrong")
    assert hub.repositories == {}


WHOLE = """
import sys, torch
from huggingface_hub import HfApi
from peft import PeftModel
from PIL import Image
from peft_crome import CromeVLMForConditionalGeneration, CromeVLMProcessor
api = HfApi()
api.create_repo("user/stage")
api.upload_folder(repo_id="user/stage", folder_path=sys.argv[1])
model = CromeVLMForConditionalGeneration.from_pretrained(sys.argv[1])
processor = CromeVLMProcessor.from_pretrained("user/stage")
inputs = processor(Image.new("RGB", (40, 30), "red"), "<image> w1 w2", return_tensors="pt")
expected = model(**inputs).logits
loaded = CromeVLMForConditionalGeneration.from_pretrained("user/stage")
torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=0, atol=0)
alone = CromeVLMForConditionalGeneration.from_pretrained("user/stage", adapter="ignore")
assert not torch.equal(alone(**inputs).logits, expected)
loaded = PeftModel.from_pretrained(alone, "user/stage").eval()
torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=0, atol=0)
print(*inputs)
"""


@pytest.mark.parametrize("reader", ["no Q-Former", "Q-Former"])
def test_a_last_stage_is_a_whole_repository(reader: str, hub: Hub, tmp_path: Path, composite, processor) -> None:
    torch.manual_seed(0)
    if reader == "Q-Former":
        composite = with_qformer()
        composite.config.image_token_id = 95  # the first id that the tokenizer's words leave
        processor = qformer_processor(composite)
    model = get_peft_model(composite, CromeConfig(bottleneck_dim=4, init_weights=False))
    save_stage(model, processor, tmp_path / "stage", {"stages": []}, "---\nlibrary_name: peft\n---\n\n# A stage\n")
    inputs = run(WHOLE, hub, tmp_path, tmp_path / "stage")
    assert "pixel_values" in inputs
    assert ("qformer_input_ids" in inputs) == (reader == "Q-Former")
    assert {"README.md", "adapter_config.json", "config.json", "crome_stage.json"} <= set(hub.files("user/stage"))
