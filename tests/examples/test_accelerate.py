"""Test that accelerate's own reader loads the configuration files, and that their settings match the guide and the
tests."""

from pathlib import Path

import pytest
from accelerate import DistributedType
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from tests.training.test_deepspeed import ZERO3
from tests.training.test_sharded import FSDP2

FOLDER = Path(__file__).parents[2] / "examples" / "accelerate"
KINDS = {
    "ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "multi_node": DistributedType.MULTI_GPU,
    "zero3": DistributedType.DEEPSPEED,
}


def test_all_files_are_tested() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_file_loads(name: str) -> None:
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert isinstance(config, ClusterConfig)
    assert config.distributed_type == KINDS[name]
    page = (FOLDER.parents[1] / "docs" / "distributed.md").read_text(encoding="utf-8")
    assert f"examples/accelerate/{name}.yaml" in page


def test_fsdp_file_says_what_the_tests_of_it_run() -> None:
    said = load_config_from_file(str(FOLDER / "fsdp2.yaml")).fsdp_config
    for key, value in said.items():
        if key.upper() in FSDP2:
            assert str(value).upper() == FSDP2[key.upper()].upper(), key
    assert {key.lower() for key in FSDP2} - {"accelerate_use_fsdp"} <= set(said)


def test_zero3_file_says_what_the_tests_of_it_run() -> None:
    said = load_config_from_file(str(FOLDER / "zero3.yaml")).deepspeed_config
    names = {key: f"ACCELERATE_DEEPSPEED_{key.removesuffix('_flag').upper()}" for key in said}
    assert {names[key]: str(value).lower() for key, value in said.items()} | {
        "ACCELERATE_USE_DEEPSPEED": "true"
    } == ZERO3


@pytest.mark.parametrize("name", sorted(set(KINDS) - {"zero3"}))  # for which accelerate asks for DeepSpeed
def test_launcher_takes_the_file(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--config_file", str(FOLDER / f"{name}.yaml"), "-m", "peft_crome", "train", "recipe.yaml"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert arguments.module
    assert arguments.training_script == "peft_crome"
    assert arguments.use_fsdp == (name == "fsdp2")
    assert arguments.num_processes == {"multi_node": 16}.get(name, 8)
