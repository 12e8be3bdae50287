"""Test that training on packed rows learns what training on padded rows does."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_crome.backbone import packed_rows
from peft_crome.data import ConversationCollator, load_rows
from peft_crome.data.packing import PackingOrder
from peft_crome.training import Preflight, RecipeError, build, load_recipe
from peft_crome.training import train as train_recipe
from peft_crome.training.loop.trainer import training_arguments
from peft_crome.training.planning.padding import padding_of
from tests.training.processes import run
from tests.training.test_distributed import losses
from tests.training.test_resume import assert_same_end
from tests.training.test_sharded import FSDP2
from tests.training.tiny import weights

LIMIT = 48  # tokens: two or three conversations


@pytest.fixture
def quiet(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe without dropout, which draws as many numbers as a batch has tokens. The Q-Former has dropout, so
    it is left out as well."""
    recipe["adapter"]["dropout"] = 0.0
    for key in ("qformer", "qformer_tokenizer", "num_query_tokens"):
        del recipe["backbones"][key]
    recipe["training"] |= {"rows_per_device": None, "max_steps": 8, "max_length": LIMIT}
    return recipe


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Size, torch.Size]]:
    """Record the shape of the ids of each packed batch, before and after packing."""
    seen: list[tuple[torch.Size, torch.Size]] = []
    pack = packed_rows._packed

    def packed(host: Any, batch: Any, bins: Any) -> Any:
        made = pack(host, batch, bins)
        seen.append((batch["input_ids"].shape, made["input_ids"].shape))
        return made

    monkeypatch.setattr(packed_rows, "_packed", packed)
    return seen


@pytest.mark.parametrize("training", [{}, {"rows_per_device": 2}], ids=["one batch a step", "accumulated"])
def test_the_same_losses_and_weights(
    training: dict[str, Any], quiet: dict[str, Any], tmp_path: Path, shapes: list[tuple[torch.Size, torch.Size]]
) -> None:
    quiet["training"] |= training
    train_recipe(load_recipe(quiet))
    assert not shapes
    packed = {**quiet, "training": {**quiet["training"], "packing": True}, "output": str(tmp_path / "packed")}
    train_recipe(load_recipe(packed))
    assert len(shapes) > 4
    assert all(after.numel() <= before.numel() and after[1] <= LIMIT for before, after in shapes[2:])
    assert losses(packed["output"]) == pytest.approx(losses(quiet["output"]), rel=1e-4)
    found, expected = weights(Path(packed["output"])), weights(Path(quiet["output"]))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=2e-4)  # Adam divides small numbers by small ones


def test_killed_run_ends_like_one_that_was_not(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["training"] |= {"packing": True, "max_length": LIMIT, "rows_per_device": None}
    assert_same_end(recipe, tmp_path, kills=[5])


def test_two_processes_have_the_losses_of_one(quiet: dict[str, Any], tmp_path: Path) -> None:
    """Two processes have the losses of one, although each packs its own rows into another number of rows."""
    quiet["training"]["packing"] = True
    for processes in (1, 2):
        values = {**quiet, "output": str(tmp_path / f"by-{processes}")}
        log = tmp_path / f"{processes}.log"
        assert run(values, log, processes=processes) == [0] * processes, Path(f"{log}.0").read_text()[-3000:]
    assert losses(tmp_path / "by-2") == pytest.approx(losses(tmp_path / "by-1"), rel=1e-4)


def test_sharded_models_are_refused(quiet: dict[str, Any], tmp_path: Path) -> None:
    quiet["training"]["packing"] = True
    log = tmp_path / "log"
    assert run(quiet, log, processes=2, sharded=FSDP2) != [0, 0]
    assert "training.packing: FSDP and DeepSpeed train padded rows. Take it out." in Path(f"{log}.0").read_text()
    assert not Path(quiet["output"]).exists()


@pytest.mark.parametrize(("settings", "processes"), [({"rows_per_device": 1}, 1), ({"batch_size": 2}, 2)])
def test_one_row_at_a_time_is_refused(quiet: dict[str, Any], settings: dict[str, int], processes: int) -> None:
    quiet["training"] |= {"packing": True, "rows_per_device": None, **settings}
    with pytest.raises(RecipeError, match=r"packing: one row at a time leaves none to pack. Raise batch_size"):
        training_arguments(load_recipe(quiet), "run", processes)


def test_an_encoder_decoder_is_trained_on_padded_rows(
    quiet: dict[str, Any], seq2seq_backbone: str, shapes: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    quiet["backbones"]["language"] = seq2seq_backbone
    quiet["chat_template"] = "t5"
    del quiet["training"]["max_length"]
    quiet["training"] |= {"packing": True, "max_steps": 2}
    reports: list[Preflight] = []
    train_recipe(load_recipe(quiet), reports.append)
    assert not shapes
    assert reports[0].padding is None
    assert "is trained on padded rows, not on packed ones: an encoder-decoder reads each row apart" in caplog.text


def test_rows_are_ordered_by_their_lengths(quiet: dict[str, Any]) -> None:
    """A batch keeps its rows in an order in which packed neighbors fill no more tokens than the best bins."""
    _, processor, _ = build(load_recipe(quiet))
    collator = ConversationCollator(processor, max_length=LIMIT)
    rows = [*load_rows(quiet["data"][0]["path"])]
    lengths = [size.kept for size in collator.measure(rows)]
    batch = PackingOrder(collator)(rows)
    ordered = batch["attention_mask"].sum(dim=1).tolist()
    assert sorted(ordered) == sorted(lengths)
    best, found = (
        packed_rows.area(values, packed_rows.fullest(values, LIMIT, fit))
        for values, fit in ((lengths, packed_rows.best_fit), (ordered, packed_rows.next_fit))
    )
    assert found <= best < len(rows) * max(lengths)


def test_a_faulty_row_is_named(quiet: dict[str, Any]) -> None:
    _, processor, _ = build(load_recipe(quiet))
    rows = [*load_rows(quiet["data"][0]["path"])][:2]
    rows[1] = {**rows[1], "messages": rows[1]["messages"][:1]}
    with pytest.raises(ValueError, match="the last turn is not an answer"):
        PackingOrder(ConversationCollator(processor))(rows)


def test_padding_that_is_announced(quiet: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    from peft_crome.cli.announce import announce

    reports: list[Preflight] = []
    recipe = load_recipe(quiet)
    train_recipe(recipe, reports.append)
    (report,) = reports
    assert report.padding is not None
    assert 0 < report.padding.random < 0.5
    announce(recipe, report)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("padding:"))
    shares = [f"{share:.0%}" for share in (report.padding.random, report.padding.grouped, report.padding.packed)]
    assert line == (
        f"padding: {shares[0]} of the tokens in random batches of 4 rows, {shares[1]} with training.group_by_length, "
        f"{shares[2]} with training.packing"
    )


def test_padding_of_two_lengths() -> None:
    """For rows of 100 and 700 tokens, the padding of random batches is as computed by hand. Grouped batches have
    padding only where the two lengths meet."""
    lengths = [100, 700] * 64
    random.Random(0).shuffle(lengths)
    found = padding_of(lengths, 2, step=2, max_length=1400, total=100_000)
    assert found.random == pytest.approx(300 / 1100, abs=0.08)  # half of the batches have 600 of 1,400 tokens
    assert 0 <= found.grouped < 0.03
    assert found.packed == 0
