"""Test that each way to upload an adapter with huggingface_hub uploads a card that loads it and keeps a user's own
words."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import CommitOperationAdd, HfApi

from peft_crome.sharing.upload import correct_upload
from tests.tuner.helpers import attach
from tests.zoo.llava import llava

IMPORT = b"import peft_crome  # tells PEFT the method"
WORDS = "---\nlibrary_name: peft\n---\n\n# My gauges\n\nWords of my own.\n"
CONFIG = "adapter_config.json"


BOUND_BEFORE = """
from huggingface_hub import HfApi, create_commit, upload_folder
import huggingface_hub
import peft_crome
for name, bound in {"create_commit": create_commit, "upload_folder": upload_folder}.items():
    assert bound.__func__ is getattr(HfApi, name) is getattr(huggingface_hub, name).__func__
    assert "peft_crome" in bound.__func__.__code__.co_filename
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    attach(llava().model).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Return the files that `upload_folder` passes to Xet's upload, which a stand-in replaces."""
    pipeline = pytest.importorskip("huggingface_hub._upload_pipeline")
    files: dict[str, bytes] = {}

    def record(api: Any, *, add_operations: list[CommitOperationAdd], **_: Any) -> None:
        files.update(contents(add_operations))

    monkeypatch.setattr(pipeline, "pipelined_upload", record)
    monkeypatch.setattr("huggingface_hub.hf_api.is_xet_available", lambda: True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "_validate_yaml", lambda *_, **__: None)
    monkeypatch.setattr(HfApi, "_prepare_folder_deletions", lambda *_, **__: [])
    monkeypatch.setattr(HfApi, "create_commit", lambda *_, **__: pytest.fail("not Xet's way"))
    return files


def contents(operations: list[CommitOperationAdd]) -> list[tuple[str, bytes]]:
    found = []
    for operation in operations:
        with operation.as_file() as file:
            found.append((operation.path_in_repo, file.read()))
    return found


def test_xet_uploads_a_card_that_loads_the_adapter(folder: Path, sent: dict[str, bytes]) -> None:
    (folder / "README.md").write_text(WORDS)
    HfApi().upload_folder(repo_id="user/a", folder_path=folder)
    assert sent["README.md"].count(IMPORT) == 1
    assert b"Words of my own." in sent["README.md"]
    assert b'from_pretrained(model, "user/a")' in sent["README.md"]


def test_xet_uploads_a_card_where_there_was_none(folder: Path, sent: dict[str, bytes]) -> None:
    (folder / "README.md").unlink()
    huggingface_hub.upload_folder(repo_id="user/a", folder_path=str(folder.parent), path_in_repo="runs/")
    assert sent["runs/saved/README.md"].count(IMPORT) == 1
    assert b'(model, "user/a", subfolder="runs/saved")' in sent["runs/saved/README.md"]


def test_what_is_not_uploaded_stays_as_it_is(folder: Path, sent: dict[str, bytes]) -> None:
    (folder / "README.md").write_text(WORDS)
    HfApi().upload_folder(repo_id="user/a", folder_path=folder.parent, ignore_patterns="saved/*")
    HfApi().upload_folder(repo_id="user/a", folder_path=folder.parent, repo_type="dataset", path_in_repo="d")
    assert (folder / "README.md").read_text() == WORDS
    assert sent["d/saved/README.md"] == WORDS.encode()
    assert not [name for name in sent if not name.startswith("d/")]


@pytest.mark.parametrize("form", ["bytes", "file object", "another file", "another README.md"])
@pytest.mark.parametrize("config", ["on disk", "as bytes"])
@pytest.mark.parametrize("order", [1, -1])
def test_a_card_from_elsewhere_keeps_its_words(
    form: str, config: str, order: int, folder: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    source = elsewhere / ("README.md" if form == "another README.md" else "card.md")
    source.write_text(WORDS)
    before = (folder / "README.md").read_bytes()
    given: dict[str, Any] = {"bytes": WORDS.encode(), "file object": io.BytesIO(WORDS.encode())}
    adapter = folder / CONFIG if config == "on disk" else (folder / CONFIG).read_bytes()
    operations = [
        CommitOperationAdd("README.md", given.get(form, source)),
        CommitOperationAdd(CONFIG, adapter),
        CommitOperationAdd("sub/notes.md", b"notes"),
    ]
    made = contents(correct_upload("user/a", operations[::order]))
    assert sorted(name for name, _ in made) == ["README.md", CONFIG, "sub/notes.md"]
    card = dict(made)["README.md"]
    assert card.count(IMPORT) == 1
    assert b"Words of my own." in card
    assert b'from_pretrained(model, "user/a")' in card
    assert source.read_text() == WORDS
    assert (folder / "README.md").read_bytes() == before


def test_a_card_with_the_import_in_its_own_words_is_uploaded_as_given(folder: Path) -> None:
    own = WORDS.encode() + b"First `import peft_crome`.\n"
    operations = [CommitOperationAdd("README.md", own), CommitOperationAdd(CONFIG, folder / CONFIG)]
    assert contents(correct_upload("user/a", operations))[0] == ("README.md", own)


def test_names_that_a_module_bound_before_are_replaced() -> None:
    done = subprocess.run([sys.executable, "-c", BOUND_BEFORE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
