"""Test the paper's three stages one after another, with real weights and data. Each stage improves its own task."""

import json
import shutil
import subprocess
import sys

import pytest

from examples.easy_vqa import stages
from examples.easy_vqa.parts import english_text

SIZES = {"pretrain": 100, "instruct": 20, "finetune": 12}
ROWS = {"pretrain": 8, "instruct": 4, "finetune": 4}
ANSWER = """
import sys
from PIL import Image
from peft_crome import CromeVLMForConditionalGeneration, CromeVLMProcessor
directory, image = sys.argv[1:]
model = CromeVLMForConditionalGeneration.from_pretrained(directory)
processor = CromeVLMProcessor.from_pretrained(directory)
question = {"type": "text", "text": "what shape is in the image?"}
messages = [
    {"role": "system", "content": "You answer questions about pictures."},
    {"role": "user", "content": [{"type": "image", "image": Image.open(image)}, question]},
]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
print(processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""


@pytest.mark.slow
def test_each_stage_improves_what_it_is_for(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the stages' own processes: other tests run beside them
    results = stages.run(tmp_path, SIZES, test_questions=48, rows=ROWS, image_size=112, text=english_text()[:3000])
    print(json.dumps(results, indent=1))
    for row in results:
        assert row["after"]["accuracy"] > row["before"]["accuracy"] + 2 * row["after"]["stderr"], row
        loss = row["language"]["text_loss"]
        assert loss["cost"] == 0
        assert loss["adapted"] == loss["base"] > 1
        assert "Paris" in row["language"]["answer"] == row["language"]["base_answer"]
    captions, questions, shapes = (row["by words alone"] for row in results)
    assert captions["accuracy"] < 0.15, "there are 24 captions"
    assert 0.2 < shapes["accuracy"] < 0.5, "there are three shapes"
    assert questions["kinds"]["what"]["accuracy"] < 0.5 < questions["kinds"]["yes/no"]["accuracy"]
    assert sum(kind["n"] for kind in results[1]["after"]["kinds"].values()) == results[1]["after"]["n"]
    trained = [list(row["trained"]) for row in results]
    assert trained[1] == ["image_projection", "qformer", "text_projection", "adapter"]
    assert results[2]["trained"] == {"adapter": 5 * 576 * 256}

    copied = tmp_path / "copied"
    shutil.move(tmp_path / "finetune", copied)
    shutil.rmtree(tmp_path / "pretrain")
    shutil.rmtree(tmp_path / "instruct")
    image = stages.easy_vqa_dir() / "test" / "images" / "0.png"
    said = subprocess.run(
        [sys.executable, "-c", ANSWER, str(copied), str(image)], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert said in stages.data.SHAPES
