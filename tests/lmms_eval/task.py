"""Write a task for lmms-eval as a user would write one. Its questions about shapes have easy-VQA's layout."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, Features, Image, Value

TASK = """
task: shapes
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: generate_until
doc_to_visual: !function functions.images
doc_to_text: !function functions.question
doc_to_messages: !function functions.messages
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 3, temperature: 0, until: ["\\n\\n"]}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
FUNCTIONS = """
def images(doc):
    return [doc["image"].convert("RGB")]


def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def messages(doc, lmms_eval_specific_kwargs=None):
    parts = [{"type": "image", "url": doc["image"].convert("RGB")}, {"type": "text", "text": doc["question"]}]
    return [{"role": "user", "content": parts}]
"""


def write_task(folder: Path, rows: list[dict[str, str]]) -> None:
    """Write the task and its data. Each of `rows` has the path of an image, a question and an answer."""
    features = Features({"image": Image(), "question": Value("string"), "answer": Value("string")})
    folder.mkdir()
    Dataset.from_list(rows, features=features).to_parquet(folder / "test.parquet")
    (folder / "functions.py").write_text(FUNCTIONS)
    (folder / "shapes.yaml").write_text(TASK.format(data=folder / "test.parquet", cache=folder / "cache"))
