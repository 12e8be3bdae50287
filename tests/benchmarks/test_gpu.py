"""Test the benchmark for a GPU at a tiny size, mostly on a CPU. Every section is measured, and the page matches the
committed record."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import devices
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import hosts, page, sections
from benchmarks.interleaved import OUT_OF_MEMORY, in_turn, middle, ratios
from benchmarks.methods import CROME, FLOOR, attach, base_of, batch_of, training_step

pytestmark = [
    pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin `_thread.get_ident"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_every_section_is_measured(device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bitsandbytes", reason="4-bit needs bitsandbytes")
    before = page.PAGE.read_text(encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        command.main(device=device, size=["tiny"], minutes=20, results=tmp_path, report=False)
    assert ended.value.code == 0
    record = json.loads((tmp_path / f"{device}.json").read_text())
    assert [(s["kind"], s["frozen"], s["compiled"]) for s in record["sections"]] == [
        (s.kind, s.frozen, s.compiled) for s in sections.plan(["tiny"])
    ]
    assert not [section["left_out"] for section in record["sections"] if "left_out" in section]
    by_kind = {(s["kind"], s["frozen"], s["compiled"]): s for s in record["sections"]}
    step = by_kind["step", "bf16", False]
    assert list(step["seconds"]) == list(sections.STEPS)
    assert step["trained"][FLOOR] == 0
    assert step["trained"][CROME] == 5 * 64 * 256
    assert all(step["peaks"].values())
    assert all(by_kind["decoding", frozen, False]["folded_says_the_same"] for frozen in ("bf16", "nf4"))
    compiled = by_kind["decoding", "bf16", True]["compiled_by_generate"]
    assert compiled == (list(sections.COMPILED_DECODING) if device == "cuda" else [])
    many = by_kind["many_adapters", "bf16", False]["seconds"]["decoding"]
    assert [name for name in many if "adapter_names" in name and name.startswith(CROME)] == [
        f"{CROME}, {count} of adapter_names" for count in hosts.SHAPES["tiny"].adapters
    ]
    printed = capsys.readouterr().out
    assert page.tables(record) in printed
    assert "Not measured" not in printed
    rows = [line for line in printed.splitlines() if line.startswith("| a tiny LLaVA")]
    assert len(rows) == (6 + 6 + 3) + (5 + 5 + 2) + 7
    assert page.PAGE.read_text(encoding="utf-8") == before


def test_page_is_the_committed_record_s() -> None:
    file = command.RESULTS / "cuda.json"
    expected = page.tables(json.loads(file.read_text())) if file.is_file() else page.NOT_RUN + "\n"
    shown = page.PAGE.read_text(encoding="utf-8").partition(page.BEGIN)[2].partition(page.END)[0]
    assert shown.strip("\n") + "\n" == expected


def test_page_is_written_between_its_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "PAGE", tmp_path / "speed.md")
    page.PAGE.write_text(f"before\n\n{page.BEGIN}\n\nold\n\n{page.END}\n\nafter\n")
    page.write_page(None)
    expected = f"before\n\n{page.BEGIN}\n\n{page.NOT_RUN}\n\n{page.END}\n\nafter\n"
    assert page.PAGE.read_text() == expected
    page.write_page(None)
    assert page.PAGE.read_text() == expected


@pytest.mark.parametrize(
    ("error", "because", "status"),
    [
        (torch.OutOfMemoryError("2 GiB"), OUT_OF_MEMORY, 0),
        (RuntimeError("no kernel image"), "RuntimeError: no kernel image", 1),
    ],
)
def test_section_that_fails_is_recorded_and_the_next_begins(
    error: Exception, because: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(section: sections.Section, *_: Any) -> dict[str, Any]:
        if section.kind == "decoding":
            raise error
        return {"left_out": "not measured in this test"}

    monkeypatch.setattr(command, "measure", measure)
    with pytest.raises(SystemExit) as ended:
        command.main(device="cpu", size=["tiny"], minutes=20, results=tmp_path, report=False)
    assert ended.value.code == status
    found = json.loads((tmp_path / "cpu.json").read_text())["sections"]
    assert [s["left_out"] == because for s in found] == [s.kind == "decoding" for s in sections.plan(["tiny"])]


def test_sections_without_time_are_left_out(tmp_path: Path) -> None:
    record = command.run(sections.plan(["tiny"]), "cpu", 0, tmp_path / "cpu.json")
    assert {section["left_out"] for section in record["sections"]} == {"no time was left"}


def test_way_that_does_not_fit_is_left_out() -> None:
    called: list[str] = []

    def large() -> None:
        called.append("large")
        raise torch.OutOfMemoryError

    results = in_turn({"small": lambda: 1.0, "large": large}, 3)
    assert results == {"small": [1.0, 1.0, 1.0], "large": []}
    assert called == ["large"]
    assert middle(results["large"]) == OUT_OF_MEMORY
    assert ratios(results["large"], results["small"]) == ratios(results["small"], results["large"]) == []


def test_repeats_end_with_the_time_and_are_two_at_least() -> None:
    assert len(in_turn({"a": lambda: None}, 50, until=0.0)["a"]) == 2


def test_step_that_does_not_fit_is_told_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    make = sections._ready_step

    def ready(section: sections.Section, host: Any, way: str) -> tuple[Any, int]:
        if way == CROME:
            raise torch.OutOfMemoryError
        return make(section, host, way)

    monkeypatch.setattr(sections, "_ready_step", ready)
    monkeypatch.setattr(sections, "COMPILED_STEPS", [FLOOR, CROME])
    section = sections.Section("step", "tiny", compiled=True)
    found = json.loads(json.dumps(sections.measure(section, hosts.Hosts("cpu"), 0.0)))
    assert found["peaks"][CROME] is None
    facts = {"gpu": "a card", "gpu_memory": 2**33, "torch": "2", "cuda": "13"}
    lines = page.tables({"machine": facts, "sections": [asdict(section) | found]}).splitlines()
    assert lines[0] == "Measured on one a card (8 GiB), PyTorch 2, CUDA 13."
    (line,) = [line for line in lines if f"| {CROME} |" in line]
    assert line.count(OUT_OF_MEMORY) == 2


def test_clock_waits_for_a_gpu_and_memory_is_the_gpu_s(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, value in {"synchronize": None, "reset_peak_memory_stats": None, "memory_allocated": 5}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name, value=value: calls.append(name) or value)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    clock = devices.clock_on("cuda")
    assert clock() <= clock()
    assert calls == ["synchronize", "synchronize"]
    devices.settle("cuda:0")
    assert calls[2:] == ["synchronize", "reset_peak_memory_stats"]
    assert (devices.held("cuda"), devices.peak("cuda")) == (5, 7)
    assert devices.results_on("cuda", tmp_path / "speed") == tmp_path / "speed_cuda"
    assert devices.results_on("cpu", tmp_path / "speed") == tmp_path / "speed"


@pytest.mark.parametrize(("device", "message"), [("cuda", "sees no GPU"), ("meta", "cpu or cuda, not on 'meta'")])
def test_device_that_is_not_there(device: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        devices.is_gpu(device)


@pytest.mark.parametrize("frozen", ["bf16", "nf4"])
def test_models_share_their_frozen_weights(frozen: str) -> None:
    if frozen == "nf4":
        pytest.importorskip("bitsandbytes", reason="4-bit needs bitsandbytes")
    host = hosts.build(hosts.SHAPES["tiny"], "cpu", frozen)
    before = {name: tensor.clone() for name, tensor in host.state_dict().items() if isinstance(tensor, torch.Tensor)}
    tensors = {tensor.data_ptr() for tensor in host.parameters()}
    model = attach(hosts.share(host), CROME)
    own = {tensor.data_ptr() for name, tensor in model.named_parameters() if "crome_" in name}
    assert {tensor.data_ptr() for tensor in model.parameters()} == tensors | own
    step = training_step(model, batch_of(base_of(model), 2, 32))
    step()
    step()
    model.eval().merge_adapter()
    assert not any("crome" in name for name, _ in host.named_parameters())
    for name, tensor in host.state_dict().items():
        if name in before:
            assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(("size", "weights"), [("7b", 7.06e9), ("0.5b", 0.8e9)])
def test_shapes_are_those_of_their_names(size: str, weights: float) -> None:
    model = hosts.build(hosts.SHAPES[size], "meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(weights, rel=0.01)
    assert model.config.image_seq_length == 576
    assert model.dtype == torch.bfloat16


def test_command_needs_no_data_set_libraries() -> None:
    """The command's module imports without the data set libraries, which a machine with a GPU may lack."""
    import subprocess

    blocked = "import sys; sys.modules |= dict.fromkeys(['datasets', 'pydantic', 'gguf', 'ijson', 'trl'])"
    code = f"{blocked}; import benchmarks.gpu.__main__"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
