"""Test that an adapter on the Hub loads with the lines of its card, whatever writes the card or uploads the folder."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests.examples.tiny_llava import save_tokenizer_and_model
from tests.share.hub import Hub, serve
from tests.share.test_hub import run

pytestmark = pytest.mark.slow

SHARED = """
import sys, torch
from datasets import Dataset
from huggingface_hub import HfApi, ModelCard
from peft import PeftModel, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments
import huggingface_hub
import peft_crome
from peft_crome.sharing.card_details import CardDetails

ids = torch.tensor([[1, 5, 6]])
ROWS = Dataset.from_dict({"input_ids": [[1, 5, 6]] * 4, "labels": [[1, 5, 6]] * 4})
COMMON = {"use_cpu": True, "report_to": "none", "max_steps": 2, "per_device_train_batch_size": 2, "bf16": False}
CONFIG = {"bottleneck_dim": 4, "init_weights": False}

def host():
    return AutoModelForImageTextToText.from_pretrained(sys.argv[1])

def model():
    made = get_peft_model(host(), peft_crome.CromeConfig(**CONFIG))
    peft_crome.describe_adapter(made, task="Tells colors.", license="mit")
    return made

def turn(role, text, image=False):
    return [{"role": role, "content": ([{"type": "image"}] if image else []) + [{"type": "text", "text": text}]}]

PICTURES = [[Image.new("RGB", (28, 28), "red")] for _ in range(4)]
ASKED = [turn("user", "what color is the shape?", True) for _ in range(4)]
TRAINED = {"activation_checkpointing": False, **COMMON}
processor = AutoProcessor.from_pretrained(sys.argv[1])

def sft(made, **arguments):
    from trl import SFTConfig, SFTTrainer

    rows = {"images": PICTURES, "prompt": ASKED, "completion": [turn("assistant", "red") for _ in range(4)]}
    return SFTTrainer(model=made, args=SFTConfig(max_length=None, **TRAINED, **arguments),
                      train_dataset=Dataset.from_dict(rows), processing_class=processor)

def dpo(made, **arguments):
    from trl import DPOConfig, DPOTrainer

    answers = {name: [turn("assistant", word)] * 4 for name, word in (("chosen", "red"), ("rejected", "blue"))}
    return DPOTrainer(model=made, args=DPOConfig(max_length=None, **TRAINED, **arguments), processing_class=processor,
                      train_dataset=Dataset.from_dict({"images": PICTURES, "prompt": ASKED, **answers}))

def grpo(made, **arguments):
    from trl import GRPOConfig, GRPOTrainer

    def reward(completion_ids, **_):
        return [float(sum(ids)) for ids in completion_ids]

    config = GRPOConfig(num_generations=2, max_completion_length=2, **TRAINED, **arguments)
    return GRPOTrainer(model=made, args=config, train_dataset=Dataset.from_dict({"images": PICTURES, "prompt": ASKED}),
                       processing_class=processor, reward_funcs=reward)

def plain(made, **arguments):
    return Trainer(model=made, args=TrainingArguments("out", **COMMON, **arguments), train_dataset=ROWS)
"""

PATHS = {
    "trainer": """
        trainer = plain(model(), hub_model_id="user/adapter")
        trainer.train()
        trainer.push_to_hub()
    """,
    "trainer that saved before": """
        trainer = plain(model(), hub_model_id="user/adapter")
        trainer.save_model()
        trainer.create_model_card(tasks="image-text-to-text", dataset="colors")
        trainer.push_to_hub(blocking=False).result()
    """,
    "sft": """
        trainer = sft(model(), output_dir="out", hub_model_id="user/adapter")
        trainer.train()
        trainer.push_to_hub(dataset_name="user/colors")
    """,
    "sft, card by hand": """
        trainer = sft(model(), output_dir="out", save_strategy="no")
        trainer.train()
        trainer.save_model()
        trainer.create_model_card(model_name="adapter")
        HfApi().create_repo("user/adapter")
        HfApi().upload_folder(repo_id="user/adapter", folder_path="out")
    """,
    "sft, checkpoints alone": """
        sft(model(), output_dir="out", save_steps=1).train()
        HfApi().create_repo("user/adapter")
        huggingface_hub.upload_folder(repo_id="user/adapter", folder_path="out", ignore_patterns="*.pt")
    """,
    "dpo": """
        trainer = dpo(model(), output_dir="out", hub_model_id="user/adapter")
        trainer.train()
        trainer.push_to_hub()
    """,
    "grpo": """
        trainer = grpo(model(), output_dir="out", hub_model_id="user/adapter")
        trainer.train()
        trainer.push_to_hub()
    """,
    "peft model": """
        model().push_to_hub("user/adapter")
    """,
    "named adapter": """
        made = get_peft_model(host(), peft_crome.CromeConfig(**CONFIG), adapter_name="gauges")
        peft_crome.describe_adapter(made, "gauges", task="Tells colors.", license="mit")
        made.push_to_hub("user/adapter")
    """,
    "integrated": """
        made = host()
        made.add_adapter(peft_crome.CromeConfig(**CONFIG))
        made.peft_config["default"]._card = CardDetails(task="Tells colors.", license="mit")
        made.push_to_hub("user/adapter")
    """,
    "integrated, loaded, pushed while it is saved": """
        model().save_pretrained("saved")
        made = host()
        made.load_adapter("saved")
        made.peft_config["default"]._card = CardDetails(task="Tells colors.", license="mit")
        made.save_pretrained("again", push_to_hub=True, repo_id="user/adapter")
    """,
    "integrated, trainer": """
        made = host()
        made.add_adapter(peft_crome.CromeConfig(**CONFIG))
        made.peft_config["default"]._card = CardDetails(task="Tells colors.", license="mit")
        trainer = plain(made, hub_model_id="user/adapter")
        trainer.train()
        trainer.push_to_hub()
    """,
    "a folder": """
        model().save_pretrained("saved")
        ModelCard("---\\nlibrary_name: peft\\n---\\n\\n# My gauges\\n\\nWords of my own.\\n").save("saved/README.md")
        HfApi().create_repo("user/adapter")
        HfApi().upload_folder(repo_id="user/adapter", folder_path="saved")
    """,
    "a card alone": """
        model().save_pretrained("saved")
        HfApi().create_repo("user/adapter")
        HfApi().upload_folder(repo_id="user/adapter", folder_path="saved")
        open("saved/README.md", "w").write("---\\nlibrary_name: peft\\n---\\n\\n# My gauges\\n\\nWords of my own.\\n")
        HfApi().upload_file(repo_id="user/adapter", path_or_fileobj="saved/README.md", path_in_repo="README.md")
    """,
}
STRATEGIES = ("end", "every_save", "checkpoint", "all_checkpoints")
for strategy in STRATEGIES:
    for make in ("plain", "sft"):
        output = 'output_dir="out", ' if make == "sft" else ""
        PATHS[f"{make} while training, {strategy}"] = f"""
        trainer = {make}(model(), {output}push_to_hub=True, hub_model_id="user/adapter", hub_strategy="{strategy}",
                         save_steps=1, hub_always_push=True)
        trainer.train()
        trainer._finish_current_push()
        {"trainer.save_model()" if strategy == "end" else ""}
        """
RUN = """
import json, os, traceback
paths, failed = json.loads(open(sys.argv[2]).read()), {}
for number, (name, code) in enumerate(paths.items()):
    peft_crome.sharing.card._saved_details.clear()  # as in a process of its own
    os.makedirs(str(number))
    os.chdir(str(number))
    try:
        exec(code)
    except Exception:
        failed[name] = traceback.format_exc()
    os.chdir("..")
open(sys.argv[3], "w").write(json.dumps(failed))
"""


@pytest.fixture(scope="module")
def uploaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hub, dict[str, str]]]:
    """Yield a hub with one uploaded repository for each path, and the tracebacks of the paths that failed."""
    home = tmp_path_factory.mktemp("uploads")
    save_tokenizer_and_model(home / "base")
    codes = {path: textwrap.dedent(code).replace("user/adapter", repository(path)) for path, code in PATHS.items()}
    (home / "paths.json").write_text(json.dumps(codes))
    with serve() as hub:
        run(SHARED + RUN, hub, home, home / "base", home / "paths.json", home / "failed.json")
        yield hub, json.loads((home / "failed.json").read_text())


def repository(path: str) -> str:
    return f"user/{re.sub('[^a-z]+', '-', path)}"


@pytest.mark.parametrize("path", PATHS)
def test_the_card_on_the_hub_loads_what_lies_beside_it(path: str, uploaded: tuple[Hub, dict[str, str]]) -> None:
    hub, failed = uploaded
    assert path not in failed, failed[path]
    assert not hub.unknown, "the server was asked for what it does not speak"
    files = hub.files(repository(path))
    adapters = {name.removesuffix("adapter_config.json") for name in files if name.endswith("adapter_config.json")}
    assert adapters
    for folder in {*adapters, ""}:
        card = ModelCard(files[f"{folder}README.md"].decode())
        assert card.text.count("import peft_crome  # tells PEFT the method") == 1, card.text
        assert "pipeline(" not in card.text
        assert "Tells colors." in card.text
        assert card.data.license == "mit"
        assert card.data.library_name == "peft"
        assert {"crome", "peft"} <= set(card.data.tags)
        pattern = rf'PeftModel.from_pretrained\(model, "{repository(path)}"(?:, subfolder="([\w/-]+)")?\)'
        loaded = re.search(pattern, card.text)
        assert loaded is not None, card.text
        shown = f"{loaded[1]}/" if loaded[1] else ""
        assert shown == folder or (not folder and shown in adapters)
    own = files["README.md"].decode()
    assert ("trained using [TRL]" in own) == (path.split(",")[0].split()[0] in ("sft", "dpo", "grpo"))
    if path == "trainer that saved before":
        assert "generated automatically" in own
    if path in ("a folder", "a card alone"):
        assert "Words of my own." in own


OTHERS = """
from peft import LoraConfig

api = HfApi()
for name in ("lora", "mine", "project"):
    api.create_repo("user/" + name)
get_peft_model(host(), LoraConfig(target_modules=["q_proj"])).save_pretrained("lora")
card = open("lora/README.md").read()
api.upload_folder(repo_id="user/lora", folder_path="lora")
assert open("lora/README.md").read() == card
model().save_pretrained("mine")
open("mine/README.md", "w").write(sys.argv[2])
api.upload_folder(repo_id="user/mine", folder_path="mine")
model().save_pretrained("project/adapter")
open("project/README.md", "w").write("# A project")
api.upload_folder(repo_id="user/project", folder_path="project")
host().push_to_hub("user/base")
"""


def test_other_uploads_are_as_they_were(tmp_path: Path) -> None:
    """Other cards are uploaded unchanged. They belong to a base model, to LoRA, to a user who wrote the import, and to
    a project around an adapter."""
    save_tokenizer_and_model(tmp_path / "base")
    mine = "---\nlibrary_name: peft\n---\n\nFirst `import peft_crome`, then as ever.\n"
    with serve() as hub:
        run(SHARED + OTHERS, hub, tmp_path, tmp_path / "base", mine)
    cards = {name: hub.files(f"user/{name}")["README.md"].decode() for name in ("lora", "mine", "project", "base")}
    assert "peft_crome" not in cards["lora"] + cards["base"]
    assert (cards["mine"], cards["project"]) == (mine, "# A project")
    assert 'subfolder="adapter"' in hub.files("user/project")["adapter/README.md"].decode()
