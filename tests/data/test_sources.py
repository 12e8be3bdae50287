"""Test data sets by file, folder and name. They are converted once, and again when they change, and all forms give the
same rows."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset
from PIL import Image

from peft_crome.data import check_files, load_rows, open_image, read_rows, sources


def llava(number: int) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\nq{number}"}, {"from": "gpt", "value": f"a{number}"}]
    return {"id": number, "image": f"{number}.png", "conversations": turns}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "rows.json").write_text(json.dumps([llava(number) for number in range(5)]))
    return tmp_path / "rows.json"


def answers(rows: Any) -> list[str]:
    return [row["messages"][-1]["content"][0]["text"] for row in rows]


def test_file_becomes_rows_and_is_converted_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = load_rows(path)
    assert (len(rows), answers(rows)) == (5, [f"a{number}" for number in range(5)])
    assert rows[3]["images"] == [{"path": str(path.parent / "3.png"), "bytes": None}]
    assert rows[3]["id"] == "3"
    assert rows._fingerprint == load_rows(path)._fingerprint

    read = []

    def parse(row: Any, number: int, *args: Any) -> Any:
        read.append(number)
        return original(row, number, *args)

    original = sources.parse
    with monkeypatch.context() as patched:
        patched.setattr(sources, "parse", parse)
        assert answers(load_rows(path)) == answers(rows)
    assert read == [0], "the first row is looked at, to say that there is one"
    path.touch()
    assert rows._fingerprint == load_rows(path)._fingerprint, "the content tells, not the date"


def test_changed_file_is_converted_again(path: Path) -> None:
    before = load_rows(path)
    path.write_text(path.read_text().replace('"a4"', '"b4"'))
    after = load_rows(path)
    assert (answers(before)[4], answers(after)[4]) == ("a4", "b4")
    assert before._fingerprint != after._fingerprint


@pytest.mark.parametrize(
    "rows_of",
    [
        lambda root: load_rows(root / "one"),
        lambda root: list(load_rows(root / "one", streaming=True)),
        lambda root: load_rows(root / "two"),
        lambda root: list(read_rows(root / "two")),
        lambda root: load_rows(root / "one" / "train.parquet"),
    ],
    ids=["parquet folder", "parquet folder, streamed", "saved", "saved, read", "parquet file"],
)
@pytest.mark.parametrize("many", [datasets.List, datasets.LargeList])
def test_images_inside_of_turns_are_kept_as_they_are_stored(many: Any, rows_of: Any, tmp_path: Path) -> None:
    """Images in turns keep their stored bytes. A decoded JPEG would be encoded again, and would lose its orientation
    and some of its pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.effect_noise((40, 30), 90).convert("RGB").save(tmp_path / "a.jpg", exif=exif)
    part = {"type": datasets.Value("string"), "text": datasets.Value("string"), "image": datasets.Image()}
    turn = {"role": datasets.Value("string"), "content": many(part)}
    stored = (tmp_path / "a.jpg").read_bytes()
    shown = {"type": "image", "text": None, "image": {"bytes": stored, "path": None}}
    parts = [shown, {"type": "text", "text": "q", "image": None}]
    said = [{"type": "text", "text": "a", "image": None}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": said}]
    table = Dataset.from_list([{"messages": messages}], features=datasets.Features({"messages": many(turn)}))
    (tmp_path / "one").mkdir()
    table.to_parquet(tmp_path / "one" / "train.parquet")
    table.save_to_disk(tmp_path / "two")
    [image] = rows_of(tmp_path)[0]["images"]
    assert image["bytes"] == stored
    assert open_image(image, "x") == open_image(str(tmp_path / "a.jpg"), "x")


def test_streaming_gives_the_same_rows(path: Path) -> None:
    assert list(load_rows(path, streaming=True)) == list(load_rows(path))


def test_error_is_the_rows_own(path: Path) -> None:
    path.write_text(json.dumps([llava(0), {"id": "bad"}]))
    with pytest.raises(ValueError, match=r"rows.json, row 'bad': no conversation in the fields \['id'\]"):
        load_rows(path)
    assert len(load_rows(path, faulty="drop")) == 1
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"rows.json holds no rows that can be read"):
        load_rows(path)
    with pytest.raises(ValueError, match=r"expected a file ending in .json, .jsonl or .parquet, a folder, or a name"):
        load_rows(Image.new("L", (1, 1)).save(path.with_suffix(".png")) or path.with_suffix(".png"))


@pytest.fixture
def table(tmp_path: Path) -> Dataset:
    """Return a table with images in the table itself and with labels as numbers."""
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["zero", "one"]),
         "question": datasets.Value("string")}
    )  # fmt: skip
    images = [Image.new("L", (4, 4), 100 * number) for number in range(3)]
    values = {"image": images, "label": [0, 1, 1], "question": ["Which digit?"] * 3}
    return Dataset.from_dict(values, features=features)


@pytest.mark.parametrize("streaming", [False, True])
def test_folder_of_datasets_with_images_in_it(streaming: bool, table: Dataset, tmp_path: Path) -> None:
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(tmp_path / "saved")
    columns = {"image": "image", "answer": "label", "question": "question"}
    rows = list(load_rows(tmp_path / "saved", columns=columns, streaming=streaming))
    assert answers(rows) == ["zero", "one", "one"]
    assert open_image(rows[1]["images"][0], "x").getpixel((0, 0)) == (100, 100, 100)
    assert len(list(load_rows(tmp_path / "saved", columns=columns, split="test", streaming=streaming))) == 1
    with pytest.raises(ValueError, match=r"has the splits \['train', 'test'\], and no 'dev'"):
        load_rows(tmp_path / "saved", columns=columns, split="dev")


def test_parquet_by_file_and_by_folder(table: Dataset, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    table.to_parquet(tmp_path / "folder" / "train.parquet")
    settings: dict[str, Any] = {"columns": {"image": "image", "answer": "label"}, "prompt": "What?"}
    by_file = load_rows(tmp_path / "folder" / "train.parquet", **settings)
    assert answers(by_file) == ["0", "1", "1"], "a file alone has no names for its labels"
    by_folder = load_rows(str(tmp_path / "folder"), **settings)
    assert answers(by_folder) == ["zero", "one", "one"]
    for rows in (by_file, by_folder):
        assert open_image(rows[2]["images"][0], "x").getpixel((0, 0)) == (200, 200, 200)
    check_files(by_folder)


def test_table_with_faulty_rows(tmp_path: Path) -> None:
    Dataset.from_dict({"q": ["What?", ""], "a": ["red", "blue"]}).save_to_disk(tmp_path / "saved")
    columns = {"question": "q", "answer": "a"}
    with pytest.raises(ValueError, match=r"saved, row '1': a turn from 'user' is empty"):
        load_rows(tmp_path / "saved", columns=columns)
    assert answers(load_rows(tmp_path / "saved", columns=columns, faulty="drop")) == ["red"]


def test_name_that_leads_nowhere(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"'nobody/nothing' is not a file, and cannot be loaded as a data set with name=None"
    ):
        load_rows("nobody/nothing")


def test_images_in_a_table_are_not_looked_for(table: Dataset, tmp_path: Path) -> None:
    table.save_to_disk(tmp_path / "saved")
    columns = {"image": "image", "answer": "label", "question": "question"}
    stored = load_rows(tmp_path / "saved", columns=columns)
    Image.new("L", (2, 2)).save(tmp_path / "x.png")
    turns = [{"from": "human", "value": "<image> <image> a"}, {"from": "gpt", "value": "b"}]
    rows = [{"id": "two", "image": ["x.png", "y.png"], "conversations": turns}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    mixed = datasets.concatenate_datasets([stored, load_rows(tmp_path / "rows.json")])
    with pytest.raises(ValueError, match=r"Row 'two': the image .*y.png is missing \(1 such"):
        check_files(mixed)


@pytest.mark.parametrize("rows_of", [lambda path: list(read_rows(path)), load_rows], ids=["read", "loaded"])
def test_missing_images_are_counted(rows_of: Any, path: Path) -> None:
    Image.new("L", (2, 2)).save(path.parent / "0.png")
    rows = rows_of(path)
    with pytest.raises(ValueError, match=r"Row '1': the image .*1.png is missing \(4 such files in all\)"):
        check_files(rows)


def test_table_whose_rows_are_all_dropped_is_named(tmp_path: Path) -> None:
    Dataset.from_dict({"q": ["", ""], "a": ["red", "blue"]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"saved holds no rows that can be read"):
        load_rows(tmp_path / "saved", columns={"question": "q", "answer": "a"}, faulty="drop")


@pytest.mark.parametrize("images", ["pics", {"": "pics"}, None])
def test_image_folder_of_a_table_is_the_one_of_where_it_is_read(
    images: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative paths of a table's images start at the current working directory. Rows that were converted in another
    directory are not used."""
    Dataset.from_dict({"q": ["What?"], "a": ["red"], "image": ["a.png"]}).save_to_disk(tmp_path / "saved")
    columns = {"question": "q", "answer": "a", "image": "image"}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        found = load_rows(tmp_path / "saved", images, columns=columns)[0]["images"][0]["path"]
        assert found == str(tmp_path / name / ("pics" if images else "") / "a.png")


@pytest.mark.parametrize("folder", ["flags", "link"])
@pytest.mark.parametrize("streaming", [False, True])
def test_folder_of_images(streaming: bool, folder: str, tmp_path: Path) -> None:
    """A folder of images is read, also through a link. `datasets` makes the paths absolute and follows links."""
    (tmp_path / "flags" / "train").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "flags")
    table = [{"file_name": f"{number}.png", "text": f"a{number}"} for number in range(2)]
    (tmp_path / "flags" / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, table)))
    for number in range(2):
        Image.new("L", (2, 2), number).save(tmp_path / "flags" / "train" / f"{number}.png")
    said: dict[str, Any] = {"columns": {"image": "image", "answer": "text"}, "prompt": "What?"}
    paths = [str(tmp_path / "flags" / "train" / f"{number}.png") for number in range(2)]
    rows = list(load_rows(tmp_path / folder, streaming=streaming, **said))
    assert answers(rows) == ["a0", "a1"]
    assert [row["images"][0]["path"] for row in rows] == paths
    assert [row["images"] for row in read_rows(tmp_path / folder, {"coco": "/data"}, **said)] == [[p] for p in paths]


@pytest.mark.parametrize("outside", ["/etc/passwd", "{}/saved/../secret.png"], ids=["elsewhere", "one folder up"])
@pytest.mark.parametrize("streaming", [False, True])
def test_absolute_paths_of_others_are_refused(streaming: bool, outside: str, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]
    rows = [{"image": outside.format(tmp_path), "conversations": turns}]
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"leaves .* Name the folder that holds all images"):
        list(load_rows(tmp_path / "saved", streaming=streaming))


@pytest.mark.parametrize("streaming", [False, True])
def test_folder_that_is_named_as_a_file(streaming: bool, tmp_path: Path) -> None:
    """A folder with the name of a parquet file is read, as Spark and Dask write it."""
    (tmp_path / "x.parquet").mkdir()
    for number in range(2):
        part = Dataset.from_dict({"q": ["What?"], "a": [f"a{number}"]})
        part.to_parquet(tmp_path / "x.parquet" / f"part-0000{number}.snappy.parquet")
    (tmp_path / "x.parquet" / "_SUCCESS").touch()
    columns = {"question": "q", "answer": "a"}
    assert answers(load_rows(tmp_path / "x.parquet", columns=columns, streaming=streaming)) == ["a0", "a1"]
    assert answers(read_rows(tmp_path / "x.parquet", columns=columns)) == ["a0", "a1"]
    with pytest.raises(FileNotFoundError, match=r"y\.parquet is missing"):
        load_rows(tmp_path / "y.parquet", columns=columns, streaming=streaming)
