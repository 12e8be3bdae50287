"""Test what TRL's trainers would give to vLLM, without vLLM. The tests in tests/engine sample with it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from peft_crome import CromeConfig
from peft_crome.serving.served import WEIGHTS, Served
from tests.examples.tiny_llava import save_tokenizer_and_model
from tests.tuner.helpers import attach, randomize
from tests.vlm.tiny import build
from tests.zoo import ZOO


@pytest.fixture
def host(tmp_path: Path) -> Path:
    save_tokenizer_and_model(tmp_path / "host")
    return tmp_path / "host"


def train(host: Path, name: str = "GRPO", model: Any = None, **arguments: Any) -> None:
    """Make a trainer that samples with vLLM."""
    import trl

    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What color is it?"}]}
    given = model is None
    trainer_arguments = getattr(trl, f"{name}Config")(
        output_dir=str(host / "run"), per_device_train_batch_size=2, num_generations=2, use_vllm=True, use_cpu=True,
        bf16=False, report_to="none", activation_checkpointing=False, **arguments,
    )  # fmt: skip
    getattr(trl, f"{name}Trainer")(
        model=AutoModelForImageTextToText.from_pretrained(host) if given else model,
        peft_config=CromeConfig(bottleneck_dim=4) if given else None,
        args=trainer_arguments,
        train_dataset=Dataset.from_dict({"images": [[Image.new("RGB", (28, 28))]], "prompt": [[turn]]}),
        processing_class=AutoProcessor.from_pretrained(host),
        reward_funcs=lambda completion_ids, **kwargs: [0.0] * len(completion_ids),
    )


def generation_of(model: Any, **settings: Any) -> Any:
    """Return the object that TRL would make for vLLM, before its engine starts."""
    from trl.generation.vllm_generation import VLLMGeneration

    from peft_crome.serving import rollouts  # noqa: F401  # a trainer's check imports it

    generation = VLLMGeneration.__new__(VLLMGeneration, model=model)
    distributed = SimpleNamespace(**{"is_fsdp": False, "is_zero3": False, **settings.pop("distributed", {})})
    values = {"mode": "colocate", "enable_sleep_mode": False, "model": model, "_dist": distributed, **settings}
    for name, value in values.items():
        setattr(generation, name, value)
    return generation


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_the_engine_loads_the_adapter_and_names_the_host(
    name: str, host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl.generation.vllm_generation import VLLMGeneration

    seen: list[Path] = []

    def engine(self: Any) -> None:
        seen.append(Path(self.model.name_or_path))
        assert [path.name for path in seen[0].glob("*.safetensors")] == [WEIGHTS]
        served = Served.of(json.loads((seen[0] / "config.json").read_text()))
        assert served.host == str(host)
        assert [*served.adapters] == ["default"]
        assert AutoProcessor.from_pretrained(seen[0]).chat_template
        weights = {name: value.clone() for name, value in self._iter_named_params()}
        assert weights.keys() == load_file(seen[0] / WEIGHTS).keys()
        raise InterruptedError

    monkeypatch.setattr(VLLMGeneration, "_init_vllm", engine)
    with pytest.raises(InterruptedError):
        train(host, name)
    assert not seen[0].exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"vllm_mode": "server"}, r"vllm_mode=\"server\""), ({"vllm_enable_sleep_mode": True}, "vllm_enable_sleep_mode")],
    ids=["server", "sleep"],
)
@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_settings_that_are_refused(name: str, arguments: dict[str, Any], named: str, host: Path) -> None:
    with pytest.raises(ValueError, match=rf"a CROME adapter excludes {named}.* Write use_vllm=False"):
        train(host, name, **arguments)


@pytest.mark.parametrize("sharding", ["is_fsdp", "is_zero3"])
def test_sharded_weights_are_refused(sharding: str) -> None:
    generation = generation_of(attach(ZOO["llava"]().model), distributed={sharding: True})
    with pytest.raises(ValueError, match=r"a CROME adapter excludes (FSDP|DeepSpeed ZeRO-3)\."):
        generation._init_vllm()


def test_models_that_are_refused(host: Path) -> None:
    integrated = AutoModelForImageTextToText.from_pretrained(host)
    integrated.add_adapter(CromeConfig(bottleneck_dim=4))
    with pytest.raises(ValueError, match="takes one active adapter of a PeftModel"):
        train(host, model=integrated)
    several = attach(ZOO["llava"]().model)
    several.add_adapter("other", several.peft_config["default"])
    several.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="takes one active adapter of a PeftModel"):
        generation_of(several)._init_vllm()
    words = attach(ZOO["llava"]().model, branches=["text"])
    with pytest.raises(ValueError, match=r"^use_vllm=True: .*no branch that reads images.* Or write use_vllm=False"):
        generation_of(words)._init_vllm()
    more = attach(ZOO["llava"]().model, modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"^use_vllm=True: .*has a copy for each adapter.* Or write use_vllm=False"):
        generation_of(more)._init_vllm()
    with pytest.raises(ValueError, match="serves this composite only with a CROME adapter"):
        train(host, model=get_peft_model(build(), LoraConfig(target_modules=["q_proj"])))


def test_trainers_that_send_weights_by_themselves_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.online_dpo import OnlineDPOTrainer

    from peft_crome.serving.rollouts import prepare

    trainer = object.__new__(OnlineDPOTrainer)
    trainer.model = attach(ZOO["llava"]().model)
    with pytest.raises(ValueError, match=r"OnlineDPOTrainer sends vLLM merged weights.*Write use_vllm=False"):
        prepare(trainer)


def test_models_without_an_adapter_are_left_to_trl() -> None:
    from trl.generation.vllm_generation import VLLMGeneration

    assert type(generation_of(ZOO["llava"]().model)) is VLLMGeneration
    adapted = type(generation_of(attach(ZOO["llava"]().model)))
    assert adapted is not VLLMGeneration
    assert issubclass(adapted, VLLMGeneration)


def test_what_is_sent_is_the_active_adapter_and_a_folded_table() -> None:
    """The active adapter and a folded table are sent. Dropout is not folded in, and the model does not change."""
    model = attach(ZOO["llava"]().model, branches=["vision", "text"], dropout=0.5)
    model.add_adapter("ref", model.peft_config["default"])
    for seed, name in enumerate(model.peft_config):
        randomize(model, name, seed)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sent = dict(generation_of(model)._iter_named_params())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.merge_adapter()
    path = "model.language_model.embed_tokens"
    table = model.get_base_model().get_submodule(path).weight
    assert torch.equal(sent.pop(f"{path}.weight"), table)
    assert {*sent} == {
        f"crome.{part}.default.weight" for part in ("crome_up", "crome_gate_vision", "crome_down_vision")
    }
    crome = model.base_model.crome
    assert all(torch.equal(value, crome.get_parameter(name.removeprefix("crome."))) for name, value in sent.items())
