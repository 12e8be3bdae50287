"""Test that packed rows have the loss and gradients of padded rows. A host that cannot pack logs the reason."""

from __future__ import annotations

import logging
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from peft_crome import logits_at_labels, pack_rows
from peft_crome.backbone import packed_rows
from peft_crome.backbone.packed_rows import area, best_fit, can_pack, fullest, next_fit
from tests.losses import loss_and_gradients
from tests.test_labeled import NO_LABELS
from tests.tuner.helpers import adapted, logits
from tests.zoo import ZOO, Batch
from tests.zoo.llava import llava
from tests.zoo.test_zoo import QUICK

PADDED = {  # hosts that are trained on padded rows -> a part of the line in the log
    **dict.fromkeys(("blip-2_t5", "florence2", "t5gemma2", "udop"), "encoder-decoder"),
    # Layers that carry a state from token to token.
    **dict.fromkeys(("lfm2_vl", "lfm3_vl", "nemotron_h_omni", "qwen3_5", "qwen3_5_moe", "qwen4_exp"), "logits change"),
    **dict.fromkeys(("glm5_next", "minicpmv4_6", "minicpmv4_7"), "logits change"),
    # Images or a question are read in both directions, or a mask is the model's own.
    **dict.fromkeys(
        ("gemma3", "paligemma", "shieldgemma2", "minimax_m3_vl", "inkling_mm_model", "inkling2", "molmo2"),
        "logits change",
    ),
    **dict.fromkeys(("blip-2", "instructblip", "kosmos-2", "kosmos-2.5", "minicpm_ocr"), "logits change"),
    # Images belong to rows, or positions have another form.
    **dict.fromkeys(("evolla", "git", "instructblip_t5", "instructblipvideo", "mllama"), "does not take them"),
    **dict.fromkeys(("hunyuan_vl", "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"), "does not take them"),
}
OTHER_BATCHES = ("pix2struct", "pp_formulanet", "vision-encoder-decoder")  # no mask or ids of tokens
FAST = {*QUICK, "gemma3", "idefics3", "paligemma", "qwen2_5_vl", "qwen3_5", "smolvlm"}


@pytest.fixture(autouse=True)
def _propagates(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)


def padded(batch: Batch) -> Batch:
    """Return the batch with the last word of the first row turned into padding."""
    batch = {**batch, **{key: batch[key].clone() for key in ("input_ids", "attention_mask", "labels")}}
    for key, value in {"input_ids": 0, "attention_mask": 0, "labels": -100}.items():
        batch[key][0, -1] = value
    return batch


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in FAST else pytest.mark.slow)
        for name in ZOO
        if name not in (*NO_LABELS, *OTHER_BATCHES)
    ],
)
def test_hosts(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Every architecture gives the same loss and gradients packed, or keeps padded rows and logs the reason."""
    case = ZOO[name]()
    model, batch = adapted(case), padded(case.batch)
    packed = pack_rows(model, batch, batch["input_ids"].numel())
    lines = [record.getMessage() for record in caplog.records if record.name == packed_rows.__name__]
    if name in PADDED:
        assert packed is batch
        (line,) = lines
        assert PADDED[name] in line
        assert type(case.model).__name__ in line
        return
    assert not lines
    assert packed["input_ids"].shape == (1, batch["attention_mask"].sum())
    for arguments in ({}, {"num_items_in_batch": torch.tensor(7)}):
        loss, gradients = loss_and_gradients(model, {**batch, **arguments})
        for form in (packed, logits_at_labels(model, packed)):
            again, others = loss_and_gradients(model, {**form, **arguments})
            torch.testing.assert_close(again, loss, rtol=1e-4, atol=1e-5)
            assert gradients.keys() == others.keys() != set()
            for key, gradient in gradients.items():
                torch.testing.assert_close(others[key], gradient, rtol=1e-3, atol=1e-5)


def two_rows() -> Batch:
    return padded(llava().batch)


def test_no_conversation_reads_another() -> None:
    """Other words in the first conversation do not change the second by a bit. The second has positions of its own."""
    model, batch = adapted(llava()), two_rows()
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][0, -2] = 9
    one, other = (pack_rows(model, form, 100) for form in (batch, changed))
    second = slice(int(batch["attention_mask"][0].sum()), None)
    assert not torch.equal(logits(model, one)[:, : second.start], logits(model, other)[:, : second.start])
    torch.testing.assert_close(logits(model, one)[:, second], logits(model, other)[:, second], rtol=0, atol=0)
    assert one["position_ids"].tolist() == [[*range(6), *range(7)]]
    assert not one["use_cache"]


def test_the_first_token_of_a_conversation_is_nobody_s() -> None:
    model, batch = adapted(llava()), two_rows()
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    batch["labels"][batch["labels"] > 11] = -100
    packed = pack_rows(model, batch, 100)
    assert packed["labels"][0, [0, 6]].tolist() == [-100, -100]
    torch.testing.assert_close(model(**packed).loss, model(**batch).loss)


def test_batches_that_stay_as_they_are() -> None:
    model, batch = adapted(llava()), two_rows()
    for form in (
        {key: value for key, value in batch.items() if key != "labels"},
        {key: value for key, value in batch.items() if key != "attention_mask"},
        {**batch, "position_ids": torch.arange(6).expand(2, 6)},
        llava().batch,  # has no padding
        batch,  # the longest conversation is the limit
    ):
        assert pack_rows(model, form) is form


def test_left_padding() -> None:
    model, batch = adapted(llava()), two_rows()
    rolled = {
        key: torch.stack([value[0].roll(1), value[1]]) if value.shape == batch["input_ids"].shape else value
        for key, value in batch.items()
    }
    packed, expected = pack_rows(model, rolled, 100), pack_rows(model, batch, 100)
    for key in ("input_ids", "labels", "position_ids"):
        assert torch.equal(packed[key], expected[key])


def test_padding_on_the_left_has_a_position_that_each_table_has() -> None:
    """Padding has a position that each table has, even if the batch was padded on the left. Text rows of 4, 2, 3 and 2
    tokens fill two rows of six, with one token of padding in the last."""
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1]])
    ids = torch.tensor([[1, 5, 6, 7], [3, 3, 1, 8], [3, 1, 9, 5], [3, 3, 1, 6]])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill((mask == 0) | (ids == 1), -100)}
    packed = pack_rows(adapted(llava()), batch, 6)
    assert packed["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 1, 0]]


def _two_processes(rank: int, folder: str) -> None:
    where = {"init_method": f"file://{folder}/store", "timeout": timedelta(seconds=60)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, **where)
    model = nn.parallel.DistributedDataParallel(adapted(llava()).train())
    batch = two_rows() if rank == 0 else llava().batch
    packed = pack_rows(model, batch, 100)
    assert (packed is batch) == (rank == 1)
    _, gradients = loss_and_gradients(model, packed)
    torch.save(gradients, f"{folder}/{rank}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_one_process_packs_and_the_other_has_nothing_to_pack(tmp_path: Path) -> None:
    """One process packs its batch while the other has nothing to pack. A model is tried without its wrapper, which
    would wait for the other process."""
    torch.multiprocessing.spawn(_two_processes, (str(tmp_path),), nprocs=2)
    one, other = (torch.load(tmp_path / str(rank)) for rank in range(2))
    model = adapted(llava()).train()
    batches = (two_rows(), llava().batch)
    expected = [loss_and_gradients(model, batch)[1] for batch in batches]
    for name, gradient in expected[0].items():
        mean = (gradient + expected[1][name]) / 2
        for found in (one, other):
            torch.testing.assert_close(found[f"module.{name}"], mean, rtol=1e-4, atol=1e-6)


def test_rows_between_packed_ones_are_padded_as_the_batch_was() -> None:
    """Packed rows are padded with the batch's own tokens. Text rows of 4, 2, 3 and 2 tokens fill two rows of six, with
    one token of padding in the last."""
    model = adapted(llava())
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0]])
    ids = torch.tensor([[1, 5, 6, 7], [1, 8, 3, 3], [1, 9, 5, 3], [1, 6, 3, 3]])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    packed = pack_rows(model, batch, 6)
    assert packed["input_ids"].tolist() == [[1, 5, 6, 7, 1, 8], [1, 9, 5, 1, 6, 3]]
    assert packed["labels"].tolist() == [[-100, 5, 6, 7, -100, 8], [-100, 9, 5, -100, 6, -100]]
    loss, gradients = loss_and_gradients(model, batch)
    again, others = loss_and_gradients(model, packed)
    torch.testing.assert_close(again, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient)


def test_a_model_is_tried_once_for_the_keys_of_a_batch(caplog: pytest.LogCaptureFixture) -> None:
    case = llava()
    model, calls = adapted(case), []
    case.model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    batch = two_rows()
    text = {key: value for key, value in batch.items() if key != "pixel_values"}
    before = torch.get_rng_state()
    assert can_pack(model, batch)
    first = len(calls)
    assert first
    assert not any(calls)
    assert can_pack(model, batch)
    assert can_pack(model, text)  # has no key that the first lacked
    assert len(calls) == first
    assert torch.equal(torch.get_rng_state(), before)
    assert not caplog.records


def test_labels_nowhere_prove_nothing() -> None:
    model, batch = adapted(llava()), two_rows()
    blank = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    assert pack_rows(model, blank, 100) is blank
    assert pack_rows(model, batch, 100) is not batch
    assert pack_rows(model, blank, 100) is not blank


def test_a_model_that_reads_other_conversations(caplog: pytest.LogCaptureFixture) -> None:
    """A model that takes any positions and ignores boundaries keeps padded rows, and the log gives the reason."""
    case, batch = llava(), two_rows()
    model, forward = adapted(case), case.model.forward
    case.model.forward = lambda position_ids=None, **others: forward(**others)
    assert pack_rows(model, batch, 100) is batch
    assert pack_rows(model, batch, 100) is batch
    (line,) = [record.getMessage() for record in caplog.records if record.name == packed_rows.__name__]
    assert line.startswith(
        "LlavaForConditionalGeneration is trained on padded rows, not on packed ones: its logits change by"
    )


def test_bfloat16() -> None:
    model = adapted(llava()).to(torch.bfloat16)
    batch = {key: value.bfloat16() if value.is_floating_point() else value for key, value in two_rows().items()}
    packed = pack_rows(model, batch, 100)
    assert packed is not batch
    torch.testing.assert_close(model(**packed).loss, model(**batch).loss, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_kinds_of_attention(attention: str) -> None:
    case = llava()
    case.model.set_attn_implementation(attention)
    model, batch = adapted(case), two_rows()
    packed = pack_rows(model, batch, 100)
    assert packed is not batch
    torch.testing.assert_close(model(**packed).loss, model(**batch).loss)


def one_by_one(module: nn.Module, query: Any, key: Any, value: Any, mask: Any, **arguments: Any) -> Any:
    """Compute what flash attention's kernel for rows of several lengths computes. Each conversation of a single row
    attends only to itself."""
    positions = arguments["position_ids"]
    starts = (positions[0] == 0).nonzero().flatten().tolist() if len(query) == 1 else []
    starts = starts or [0]
    edges = zip(starts, [*starts[1:], query.shape[2]], strict=True)
    parts = [
        nn.functional.scaled_dot_product_attention(
            *(states[:, :, first:last] for states in (query, key, value)), is_causal=True
        )
        for first, last in edges
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


def test_flash_attention_gets_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention gets one row, even if it is longer than `max_length`. A longer row costs its kernel nothing."""
    AttentionInterface.register("one_by_one", one_by_one)
    AttentionMaskInterface.register("one_by_one", lambda **_: None)
    monkeypatch.setattr(packed_rows, "takes_one_row", lambda model: True)
    case = llava()
    case.model.model.language_model.set_attn_implementation("one_by_one")
    model, batch = adapted(case), two_rows()
    packed = pack_rows(model, batch, 3)
    assert packed["input_ids"].shape == (1, 13)
    torch.testing.assert_close(model(**packed).loss, model(**batch).loss)


lengths_of_rows = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@given(lengths_of_rows, st.none() | st.integers(1, 80))
def test_bins(lengths: list[int], limit: int | None) -> None:
    """Every row is placed once, within the limit if it fits, and never with more tokens than padded rows. `next_fit`
    keeps the order of rows."""
    for fit in (next_fit, best_fit):
        bins = fullest(lengths, limit, fit)
        assert sorted(row for rows in bins for row in rows) == list(range(len(lengths)))
        width = max(sum(lengths[row] for row in rows) for rows in bins)
        assert width <= max(limit or 0, *lengths)
        assert area(lengths, bins) == len(bins) * width <= len(lengths) * max(lengths)
    ordered = [row for rows in fullest(lengths, limit, next_fit) for row in rows]
    assert ordered == list(range(len(lengths)))


def test_the_fewest_tokens_and_of_these_the_shortest_rows() -> None:
    assert fullest([4, 4, 4], 12, next_fit) == [[0], [1], [2]]
    assert fullest([1, 6, 5, 2], 7, next_fit) == [[0, 1], [2, 3]]
    assert fullest([3, 7, 4], None, best_fit) == [[1], [2, 0]]
