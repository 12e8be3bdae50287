"""Test that draws give every row once an epoch, whatever is skipped and whichever worker or process reads them."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import IterableDataset
from PIL import Image
from torch.utils.data import DataLoader

from peft_crome.data import Augmentation, load_rows, mix
from peft_crome.data.draws import DrawOrder, Draws, DrawStream
from peft_crome.data.lengths import row_lengths


def order(**changes: int) -> DrawOrder:
    return DrawOrder(**{"rows": 10, "seed": 3, "multiple": 4, "batch_size": 4, **changes})


def test_epoch_has_every_row_once_and_is_made_up_by_rows_that_do_not_count() -> None:
    draws = order()
    rows = Draws([{"id": number} for number in range(10)])
    for epoch in (0, 1):
        draws.set_epoch(epoch)
        drawn = [rows[number] for number in draws]
        assert len(drawn) == len(draws) == 12
        assert sorted(row["id"] for row in drawn if row["counts"]) == list(range(10))
        assert [row["counts"] for row in drawn] == [True] * 10 + [False] * 2
        assert sorted(row["draw"] for row in drawn[:10]) == list(range(10 * epoch, 10 * epoch + 10))


def test_order_follows_from_seed_and_epoch() -> None:
    first, again, other = order(), order(), order(seed=4)
    assert list(first) == list(again) == list(first)
    assert list(first)[:10] != list(other)[:10]
    again.set_epoch(1)
    assert [number % 10 for number in again if number >= 0] != list(first)[:10]


def test_fewer_rows_than_processes_take_at_a_time() -> None:
    numbers = list(order(rows=1, multiple=4))
    assert numbers == [0, ~0, ~0, ~0]


def test_rows_of_one_length_come_together() -> None:
    lengths = [random.Random(number).randrange(1000) for number in range(400)]
    draws = DrawOrder(400, seed=0, multiple=1, batch_size=8, lengths=lengths)
    numbers = list(draws)
    assert sorted(numbers) == list(range(400))
    assert lengths[numbers[0]] == max(lengths), "what needs most memory comes first"

    def padding(order: list[int]) -> int:
        steps = [[lengths[number] for number in order[start : start + 8]] for start in range(0, 400, 8)]
        return sum(max(step) * len(step) - sum(step) for step in steps)

    assert padding(numbers) < 0.3 * padding(list(DrawOrder(400, seed=0, multiple=1, batch_size=8)))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more than there are cores
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_stream_is_the_same_by_any_number_of_workers_and_has_no_end(workers: int) -> None:
    rows = IterableDataset.from_generator(numbered)
    stream = DrawStream(rows, block=2)
    stream.done = 2
    loader = iter(DataLoader(stream, batch_size=2, num_workers=workers, collate_fn=list))
    batches = [next(loader) for _ in range(5)]
    assert batches[0] == [{"drawn": True}] * 2
    seen = [(row["id"], row["draw"]) for batch in batches[1:] for row in batch]
    assert seen == [(2, 2), (3, 3), (4, 4), (0, 5), (1, 6), (2, 7), (3, 8), (4, 9)]


@pytest.mark.parametrize("workers", [0, 2])
def test_order_of_a_stream_is_not_changed_by_another_reader(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another reader does not change the order of a stream. `datasets` shares an epoch between workers, so a late
    worker could set another one back."""
    sets = [IterableDataset.from_generator(numbered), IterableDataset.from_generator(numbered)]
    stream = DrawStream(mix(sets, [0.5, 0.5], seed=0), block=1)

    def read() -> list[int]:
        loader = iter(DataLoader(stream, batch_size=None, num_workers=workers))
        return [next(loader)["id"] for _ in range(60)]

    expected = read()
    assert stream.rows.epoch == 0
    original = IterableDataset.iter

    def late(self: IterableDataset, batch_size: int) -> Iterator[dict[str, Any]]:
        stream.rows.set_epoch(0)  # what another worker does right now
        return original(self, batch_size)

    monkeypatch.setattr(IterableDataset, "iter", late)
    assert read() == expected
    stream.rows.set_epoch(0)
    first = [row["id"] for row in stream.rows]
    assert expected[: len(first)] == first != expected[len(first) : 2 * len(first)], "each pass has another order"


def numbered() -> Iterator[dict[str, int]]:
    for number in range(5):
        yield {"id": number}


def nothing() -> Iterator[dict[str, int]]:
    yield from ()


def test_stream_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="The streamed data hold no rows"):
        next(iter(DrawStream(IterableDataset.from_generator(nothing), block=1)))


def test_crops_depend_on_what_draws_them_alone() -> None:
    image = Image.new("RGB", (64, 64))
    crop = Augmentation(random_crop=True, horizontal_flip=True)
    sizes = [crop(image, random.Random(f"0 {draw}")).size for draw in range(20)]
    random.random()
    assert sizes == [crop(image, random.Random(f"0 {draw}")).size for draw in range(20)]
    assert len(set(sizes)) > 10


def test_lengths_need_no_image(tmp_path: Path) -> None:
    """Lengths of rows are estimated without their images, whose files do not exist. Twelve characters count as three
    tokens, and an image has nine."""

    def turns(*texts: str) -> list[dict[str, str]]:
        return [
            {"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)
        ]  # fmt: skip

    rows = [
        {"id": 0, "conversations": turns("abcdefgh", "ijkl")},
        {"id": 1, "image": ["a.png", "b.png"], "conversations": turns("<image><image>abcd", "e")},
        {"id": 2, "image": "a.png", "conversations": turns("<image>\nabcd", "efgh", "ijkl", "mnop")},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    found = load_rows(tmp_path / "rows.json")
    assert row_lengths(found, 9) == row_lengths(list(found), 9) == [3, 19, 13]
    assert row_lengths(found.select([2, 0]), 9) == [13, 3]
