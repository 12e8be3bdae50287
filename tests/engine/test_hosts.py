"""Each host, exported and served by vLLM with images, gives the adapted model's greedy tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel

from peft_crome.serving import ImageEncoder, export, host_files
from peft_crome.serving.encoder import NOT_IN_VLLM
from peft_crome.serving.served import ARGUMENT, BASE_NAME, WEIGHTS

from .conftest import ask, engine
from .hosts import (
    HOSTS,
    OTHER_LOGITS,
    TOKENS,
    agree,
    all_equal,
    build_host,
    conversations,
    generated,
    inputs_of,
    load_host,
    request_of,
    save_adapters,
)

# Without the plug-in: the encoder gives tiles and not images, or the host reads more than embeddings.
REFUSED = (*NOT_IN_VLLM, "internvl", "glm4v", "qwen3_vl")


@pytest.mark.parametrize("name", HOSTS)
def test_images(name: str, tmp_path: Path, record: Callable[..., None]) -> None:
    build_host(name, tmp_path / "host")
    model = save_adapters(load_host(tmp_path / "host"), tmp_path / "adapter", ["default"])
    export(model, tmp_path / "served", host=tmp_path / "host")
    processor = tf.AutoProcessor.from_pretrained(tmp_path / "host")
    inputs = [inputs_of(processor, conversation) for conversation in conversations()]
    requests = [request_of(processor, conversation) for conversation in conversations()]
    adapted = [generated(model, batch) for batch in inputs]
    with model.disable_adapter():
        frozen = [generated(model, batch) for batch in inputs]
    assert any(one[: len(other)] != other[: len(one)] for one, other in zip(adapted, frozen, strict=True))
    host_alone = {"mm_processor_kwargs": {ARGUMENT: BASE_NAME}}
    with engine(tmp_path / "served", enable_mm_embeds=True) as llm:
        served = ask(llm, requests, TOKENS)
        record(name, images=agree(served, adapted))
        assert all_equal(served, adapted)
        assert all_equal(ask(llm, [request | host_alone for request in requests], TOKENS), frozen)
        embeddings = embeddings_served(llm, model, requests, inputs)
    record(name, embeddings=None if embeddings is None else agree(embeddings, adapted))
    assert embeddings is None or all_equal(embeddings, adapted)
    assert (embeddings is None) == (name in REFUSED)
    model = PeftModel.from_pretrained(load_host(tmp_path / "host", torch.bfloat16), str(tmp_path / "adapter")).eval()
    adapted = [generated(model, batch, close=0) for batch in inputs]
    with engine(tmp_path / "served", "bfloat16") as llm:
        record(name, bfloat16=agree(ask(llm, requests, TOKENS), adapted))


@pytest.mark.parametrize("name", OTHER_LOGITS)
def test_embeddings_of_images(name: str, tmp_path: Path, record: Callable[..., None]) -> None:
    """What the language model reads is the adapted model's, where the engine's language model is not the host's."""
    build_host(name, tmp_path / "host")
    model = save_adapters(load_host(tmp_path / "host"), tmp_path / "adapter", ["default"])
    export(model, tmp_path / "served", host=tmp_path / "host")
    processor = tf.AutoProcessor.from_pretrained(tmp_path / "host")
    conversation = conversations()[0]
    inputs = inputs_of(processor, conversation)
    adapted = torch.cat(ImageEncoder(model)(**inputs))
    with engine(tmp_path / "served") as llm:
        ask(llm, [request_of(processor, conversation)], 1)
        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        served = torch.cat([*runner.encoder_cache.values()])
    with model.disable_adapter(), torch.no_grad():
        features = model.get_base_model().get_image_features(
            **{key: value for key, value in inputs.items() if key.startswith("pixel_")}
        )
        frozen = features.pooler_output.reshape(adapted.shape)
    difference = float((served - adapted).abs().max())
    assert difference < 1e-4 < float((frozen - adapted).abs().max())
    record(name, images=f"embeddings equal to {difference:.0e}, the host's own logits differ")


def test_a_host_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exported directory has the adapter's weights alone; a directory stands for the repository."""
    build_host("qwen2_vl", tmp_path / "host")
    model = save_adapters(load_host(tmp_path / "host"), tmp_path / "adapter", ["default"])
    monkeypatch.setattr(host_files, "snapshot_download", lambda *args, **kwargs: tmp_path / "host")
    export(model, tmp_path / "served", host="somebody/qwen")
    assert [path.name for path in (tmp_path / "served").glob("*.safetensors")] == [WEIGHTS]
    config = tmp_path / "served" / "config.json"
    config.write_text(config.read_text().replace("somebody/qwen", str(tmp_path / "host")))
    processor = tf.AutoProcessor.from_pretrained(tmp_path / "host")
    adapted = [generated(model, inputs_of(processor, conversation)) for conversation in conversations()]
    with engine(tmp_path / "served") as llm:
        served = ask(llm, [request_of(processor, conversation) for conversation in conversations()], TOKENS)
    assert all_equal(served, adapted)


def test_a_host_that_vllm_does_not_have_is_refused(tmp_path: Path) -> None:
    build_host("aya_vision", tmp_path / "host")
    model = save_adapters(load_host(tmp_path / "host"), tmp_path / "adapter", ["default"])
    with pytest.raises(ValueError, match=r"vLLM .* has no class for AyaVisionForConditionalGeneration\. Serve it"):
        export(model, tmp_path / "served", host=tmp_path / "host")
    assert not (tmp_path / "served").exists()


def embeddings_served(llm: Any, model: Any, requests: list[dict[str, Any]], inputs: list[Any]) -> Any:
    """Tokens with the encoder's embeddings in the images' place; None: vLLM refuses them."""
    from vllm.exceptions import VLLMClientError

    encoder = ImageEncoder(model)
    try:
        data = [encoder.multi_modal_data(**batch) for batch in inputs]
        given = [
            request | {"multi_modal_data": images, "mm_processor_kwargs": {ARGUMENT: BASE_NAME}}
            for request, images in zip(requests, data, strict=True)
        ]
        return ask(llm, given, TOKENS)
    except (VLLMClientError, ValueError, NotImplementedError, KeyError, AttributeError, TypeError) as error:
        print(f"embeddings: {type(error).__name__}: {error}")
        return None
