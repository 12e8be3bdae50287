"""Test the parts of the quick start, and a small run with real weights that is interrupted and continued."""

import json
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import Trainer

from examples.easy_vqa import data, quickstart, training
from examples.easy_vqa.evaluation import score, score_yes_no
from examples.easy_vqa.model import attach, backbone, processor, vision_features
from tests.tuner.helpers import randomize

SMALL = {"what": 40, "yes/no": 20}


def test_captions_follow_from_answers_alone():
    questions = [
        {"image_id": 0, "question": "what color is the shape?", "answer": "red", "kind": "what"},
        {"image_id": 0, "question": "what shape is present?", "answer": "circle", "kind": "what"},
        {"image_id": 1, "question": "what color is the circle?", "answer": "red", "kind": "what"},
        {"image_id": 2, "question": "is there a red shape?", "answer": "yes", "kind": "yes/no"},
    ]
    assert data.captions(questions) == {0: "red circle"}


def test_score_reports_kinds_apart_with_standard_errors():
    rows = [{"answer": "red", "kind": "what"}] * 4 + [{"answer": "yes", "kind": "yes/no"}]
    result = score(rows, ["red", "red", "blue", "red", "no"])
    assert result["what"] == {"accuracy": 0.75, "stderr": pytest.approx((0.75 * 0.25 / 4) ** 0.5), "n": 4}
    assert result["yes/no"]["accuracy"] == 0


@pytest.mark.slow
def test_blind_baselines_are_the_published_figures():
    train, test = data.load_questions("train"), data.load_questions("test")
    assert len(data.captions(train)) == 2435
    blind = score(test, data.blind_baselines(train, test)["best answer to each question text"])
    assert round(blind["what"]["accuracy"], 3) == 0.233
    assert round(blind["yes/no"]["accuracy"], 3) == 0.825


@pytest.mark.slow
def test_yes_no_questions_are_grouped_by_wording_and_truth():
    questions = [
        {"question": "is there a red shape?", "answer": "yes", "kind": "yes/no"},
        {"question": "is there a red shape in the image?", "answer": "no", "kind": "yes/no"},
        {"question": "is no circle present?", "answer": "no", "kind": "yes/no"},
        {"question": "does the image not contain a circle?", "answer": "yes", "kind": "yes/no"},
        {"question": "what shape is present?", "answer": "circle", "kind": "what"},
    ]
    assert [data.yes_no_group(row) for row in questions] == [*data.YES_NO_GROUPS, None]
    by_text = ["no", "no", "yes", "yes", "circle"]  # as if nothing were shown
    assert [group["accuracy"] for group in score_yes_no(questions, by_text).values()] == [0, 1, 0, 1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("draw", "wordings"), [("affirmative", {"is there"}), ("paired", {"is there", "is there not"})]
)
def test_paired_questions_are_not_told_by_their_wording(draw, wordings):
    train = data.load_questions("train")
    known = {(row["image_id"], row["question"]): data.yes_no_group(row) for row in train}
    rows = data.question_rows(train, 500, 0, 4, draw)
    groups = [known[row["image_id"], question] for row in rows for question, _ in row["turns"]]
    counts = Counter(group for group in groups if group)
    assert {group.split(",")[0] for group in counts} == wordings
    for wording in wordings:
        assert counts[f"{wording}, shown"] == counts[f"{wording}, not shown"] > 100
    assert 0.8 < groups.count(None) / len(rows) <= 1  # one "what" question, where there is one
    any_draw = data.question_rows(train, 500, 0, 4)
    assert sum(len(row["turns"]) for row in any_draw) > 1900  # a few images have fewer than four


@pytest.mark.slow
def test_isolated_questions_are_answered_as_if_each_were_alone():
    shared = processor()
    features = vision_features("train", shared.image_processor)
    collate = data.Collator(features, shared.tokenizer.pad_token_id)
    turns = [["is there a red shape?", "no"], ["what shape is present?", "circle"], ["is no circle present?", "no"]]
    together = collate([data.tokenized([{"image_id": 3, "turns": turns}], shared, isolated=True)[0]])
    model = backbone("projection").float()
    with torch.no_grad():
        labels = together.pop("labels")
        logits = model(**together | {"attention_mask": together["attention_mask"].float()}).logits
        logits = logits[labels != -100]
        alone = []
        for turn in turns:
            batch = collate([data.tokenized([{"image_id": 3, "turns": [turn]}], shared)[0]])
            labels = batch.pop("labels")
            alone.append(model(**batch).logits[labels != -100])
    torch.testing.assert_close(logits, torch.cat(alone), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("isolated", [False, True])
def test_rows_that_continue_a_cache_have_the_same_loss_and_gradients(isolated):
    shared = processor()
    features = vision_features("train", shared.image_processor)
    rows = data.tokenized(data.question_rows(data.load_questions("train"), 3, 0, 2), shared, isolated)
    before = data.tokens_before_the_image(rows, shared.image_token_id)
    assert shared.tokenizer.decode(before).endswith("<|im_start|>user\n")
    model = attach("crome", "align").float()
    randomize(model)
    results = []
    for cache in (None, training.cache_of(before, model)):
        collate = data.Collator(features, shared.tokenizer.pad_token_id)
        collate.cached = 0 if cache is None else len(before)
        batch = collate([*rows])
        if isolated:
            batch["attention_mask"] = batch["attention_mask"].float()
        arguments = training.TrainingArguments(use_cpu=True, label_names=["labels"])
        trainer = training.CacheTrainer(
            model=model, args=arguments, compute_loss_func=training.answer_loss, processing_class=shared
        )
        trainer.cache = cache
        losses = [trainer.compute_loss(model, dict(batch)) for _ in range(2)]
        assert losses[0] == losses[1]  # the cache is used again as it was
        losses[0].backward()
        results.append([losses[0], *(p.grad for p in model.parameters() if p.grad is not None)])
        model.zero_grad()
    assert len(results[0]) > 3
    for value, expected in zip(*results, strict=True):
        assert (value - expected).norm() <= 1e-4 * expected.norm() > 0


@pytest.mark.slow
@pytest.mark.parametrize(("method", "cached"), [("projection", True), ("crome-both", False), ("lora", False)])
def test_what_training_would_change_is_not_cached(method, cached):
    assert (training.cache_of(torch.tensor([1, 9, 2]), attach(method, "align")) is not None) == cached


def test_rows_that_begin_differently_share_no_tokens():
    rows = Dataset.from_list([{"input_ids": [5, 6, 9, 1]}, {"input_ids": [5, 7, 9, 1]}])
    assert data.tokens_before_the_image(rows, 9).tolist() == []
    assert data.tokens_before_the_image(rows.select([1]), 9).tolist() == [5, 7]


@pytest.mark.slow
def test_word_loss_is_the_distance_to_the_captions_words():
    shared = processor()
    model = backbone("projection")
    loss = training.WordLoss(model, shared, weight=2.0)
    ids = shared.tokenizer.encode(" red circle", add_special_tokens=False)
    words = training.word_embeddings(model, torch.tensor(ids)).float().mean(0)
    labels = torch.tensor([[*shared.tokenizer.encode("red circle", add_special_tokens=False), 2, -100]])
    logits = torch.zeros(1, labels.shape[1], 49152)
    plain = training.answer_loss(SimpleNamespace(logits=logits), labels)
    for tokens, distance in ((words.expand(1, 16, -1), 0.0), (torch.zeros(1, 16, 576), 1.0)):
        outputs = SimpleNamespace(logits=logits, image_hidden_states=tokens)
        torch.testing.assert_close(loss(outputs, labels), plain + 2.0 * distance)


@pytest.mark.slow
def test_projection_starts_at_the_size_of_words():
    shared = processor()
    features = vision_features("train", shared.image_processor)
    model = attach("crome", "align")
    training.start_at_words(model, features)
    with torch.no_grad():
        tokens = model.get_base_model().get_image_features(vision_features=features[:50]).pooler_output.float()
    size = training.word_embeddings(model).float().square().mean(-1).sqrt().median()
    assert tokens.square().mean().sqrt().item() == pytest.approx(size.item(), rel=0.1)


def test_labels_cover_answers_and_their_ends_only():
    shared = processor()
    row = data.tokenized([{"image_id": 0, "turns": [["is it red?", "yes"], ["what shape?", "circle"]]}], shared)[0]
    trained = [token for token in row["labels"] if token != -100]
    assert shared.tokenizer.decode(trained) == "yes<|im_end|>circle<|im_end|>"
    assert row["input_ids"].count(shared.image_token_id) == 16


@pytest.mark.slow
def test_quickstart_runs_draws_and_continues_after_an_interruption(tmp_path, monkeypatch, capsys):
    align = replace(quickstart.ALIGN, steps=6, images_per_step=4)
    finetune = replace(quickstart.FINETUNE, steps=6, images_per_step=2)
    monkeypatch.setattr(training, "SAVE_STEPS", 3)

    settings = {"large": SMALL, "small": SMALL, "text": "It is a truth universally acknowledged. " * 40}

    class Interrupted(Exception):
        pass

    def interrupt(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise Interrupted
        return step(self, *args, **kwargs)

    step = Trainer.training_step
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", interrupt)
        with pytest.raises(Interrupted):
            quickstart.run(tmp_path, align, finetune, **settings)
    assert (tmp_path / "align" / "checkpoints" / "checkpoint-3").is_dir()
    assert not (tmp_path / "align" / "record.json").exists()

    rows = quickstart.run(tmp_path, align, finetune, **settings)
    assert json.loads((tmp_path / "align" / "record.json").read_text())["resumed"] is True
    assert [row["name"] for row in rows][-1] == "after (b) fine-tune"
    assert rows[-1]["trained_parameters"] == 732_672
    assert rows[-1]["score"]["what"]["n"] == 40
    kept = rows[-1]["language"]
    assert kept["text_loss"]["adapted"] == kept["text_loss"]["base"]
    assert kept["answer"] == kept["base_answer"] == "The capital of France is Paris."
    printed = capsys.readouterr().out
    assert "of 60 answers equal" in printed
    assert printed.count(f"{kept['text_loss']['base']:.6f}") == 2
    for image in ("contact_sheet.png", "learning_curves.png"):
        assert (tmp_path / image).stat().st_size > 10_000

    monkeypatch.setattr(Trainer, "train", lambda *args, **kwargs: pytest.fail("a finished stage was trained again"))
    again = quickstart.run(tmp_path, align, finetune, **settings)
    assert [row["score"] for row in again] == [row["score"] for row in rows]


@pytest.mark.slow
def test_answer_loss_equals_the_models_own_loss():
    shared = processor()
    features = vision_features("test", shared.image_processor)
    rows = data.tokenized(data.question_rows(data.load_questions("train"), 3, 0, 2), shared)
    rows = [{**row, "image_id": 0} for row in rows]
    batch = data.Collator(features, 2)(rows)
    full = data.Collator.pad(rows, 2)
    model = backbone("projection")
    with torch.no_grad():
        expected = model(**full, vision_features=batch["vision_features"]).loss
        outputs = model(**{name: value for name, value in batch.items() if name != "labels"})
    torch.testing.assert_close(training.answer_loss(outputs, batch["labels"]), expected, rtol=2e-3, atol=2e-3)
