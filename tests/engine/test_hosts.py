"""Test that vLLM serves each exported host with images, and gives the adapted model's greedy tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from peft_crome.serving import ImageEncoder, export, host_files
from peft_crome.serving.encoder import NOT_IN_VLLM
from peft_crome.serving.served import ARGUMENT, BASE_NAME, WEIGHTS

from .conftest import ask, engine, parameters
from .hosts import (
    HOSTS,
    ONE_TILE,
    OTHER_LOGITS,
    TOKENS,
    Exported,
    agree,
    all_equal,
    build_host,
    conversations,
    exported,
    generated,
    inputs_of,
    load_host,
    request_of,
    save_adapters,
)

TAKES_EMBEDDINGS = ("internvl", "llava", "qwen2_vl", "qwen2_5_vl")
ONE_AT_A_TIME = ("llava_next", "llava_onevision")  # a batch of images that differ in length fails inside the engine
# What refuses the encoder's embeddings: vLLM, or the encoder itself.
NO_IMAGES = "Expected type: .*ImageProcessorItems.*, but found type: .*ImageEmbeddingItems"
REFUSES_EMBEDDINGS = {
    **dict.fromkeys(set(NOT_IN_VLLM).difference(ONE_AT_A_TIME), NO_IMAGES),
    "glm4v": "At most 1 image",  # the embeddings and their grid count as two
    "paligemma": "Expected there to be 1 image items .* but only found 0",
    "qwen3_vl": r"also reads \['deepstack_features'\] inside",
}


@pytest.mark.parametrize("name", HOSTS)
def test_images(name: str, tmp_path: Path, record: Callable[..., None]) -> None:
    case = exported(name, tmp_path)
    inputs = [inputs_of(case.processor, conversation) for conversation in conversations()]
    requests = [request_of(case.processor, conversation) for conversation in conversations()]
    adapted = [generated(case.model, batch) for batch in inputs]
    with case.model.disable_adapter():
        frozen = [generated(case.model, batch) for batch in inputs]
    assert any(one[: len(other)] != other[: len(one)] for one, other in zip(adapted, frozen, strict=True))
    host_alone = {"mm_processor_kwargs": {ARGUMENT: BASE_NAME}}
    with engine(case.served) as llm:
        served = ask(llm, requests, TOKENS)
        record(name, images=agree(served, adapted))
        assert all_equal(served, adapted)
        assert all_equal(ask(llm, [request | host_alone for request in requests], TOKENS), frozen)
    model = PeftModel.from_pretrained(load_host(case.host, torch.bfloat16), str(tmp_path / "adapters")).eval()
    adapted = [generated(model, batch, close=0) for batch in inputs]
    with engine(case.served, "bfloat16") as llm:
        record(name, bfloat16=agree(ask(llm, requests, TOKENS), adapted))


@pytest.mark.parametrize("name", [*TAKES_EMBEDDINGS, *ONE_AT_A_TIME, *sorted(REFUSES_EMBEDDINGS)])
def test_image_embeddings(
    name: str, tmp_path: Path, record: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    """The host without the plug-in's class takes the encoder's embeddings in place of images of one tile. vLLM or the
    encoder refuses them for some hosts."""
    from vllm.exceptions import VLLMClientError

    case = exported(name, tmp_path)
    inputs = [inputs_of(case.processor, conversation, **ONE_TILE.get(name, {})) for conversation in conversations()]
    adapted = [generated(case.model, batch) for batch in inputs]
    with engine(case.host, enable_mm_embeds=True) as llm:
        if name in REFUSES_EMBEDDINGS:
            with pytest.raises((TypeError, ValueError, RuntimeError, VLLMClientError), match=REFUSES_EMBEDDINGS[name]):
                ask(llm, with_embeddings(case, inputs), TOKENS)
            record(name, embeddings="refused")
        elif name in ONE_AT_A_TIME:
            requests = with_embeddings(case, inputs)
            assert all_equal([ask(llm, [request], TOKENS)[0] for request in requests], adapted)
            llm.reset_prefix_cache()
            llm.llm_engine.reset_encoder_cache()
            with pytest.raises(ValueError, match="data contains inconsistent shapes"):
                ask(llm, requests, TOKENS)
            record(name, embeddings="equal, for images of one length")
        else:
            served = ask(llm, with_embeddings(case, inputs), TOKENS)
            record(name, embeddings=agree(served, adapted))
            assert all_equal(served, adapted)
    assert ("does not serve image embeddings of" in caplog.text) == (name in NOT_IN_VLLM)


def with_embeddings(case: Exported, inputs: list[Any]) -> list[dict[str, Any]]:
    """Return the requests of `conversations()`, with the encoder's embeddings as their images."""
    encoder = ImageEncoder(case.model)
    asked = [request_of(case.processor, conversation) for conversation in conversations()]
    images = [{"multi_modal_data": encoder.multi_modal_data(**batch)} for batch in inputs]
    return [request | image for request, image in zip(asked, images, strict=True)]


def test_embeddings_given_to_an_exported_model_stay_as_they_are(tmp_path: Path) -> None:
    """Embeddings in a request stay unchanged, whether the request names the adapter or not, because they already
    include the adapter."""
    case = exported("llava", tmp_path)
    inputs = [inputs_of(case.processor, conversation) for conversation in conversations()]
    adapted = [generated(case.model, batch) for batch in inputs]
    requests = with_embeddings(case, inputs)
    with engine(case.served, enable_mm_embeds=True) as llm:
        for named in ({}, {"mm_processor_kwargs": {ARGUMENT: "default"}}):
            assert all_equal(ask(llm, [request | named for request in requests], TOKENS), adapted)


@pytest.mark.parametrize("name", OTHER_LOGITS)
def test_embeddings_of_images(name: str, tmp_path: Path, record: Callable[..., None]) -> None:
    """vLLM's image embeddings equal the adapted model's. Tokens are not compared, because vLLM's language model gives
    other logits for these hosts."""
    case = exported(name, tmp_path)
    inputs = inputs_of(case.processor, conversations()[0])
    adapted = torch.cat(ImageEncoder(case.model)(**inputs))
    with torch.no_grad():
        expected = case.model(**inputs).logits[0, -1].log_softmax(-1)
    with engine(case.served) as llm:
        served = embeddings_in(llm, case)
        request = request_of(case.processor, conversations()[0])
        (output,) = llm.generate(request, parameters(1, logprobs=5), use_tqdm=False)
    first = output.outputs[0].logprobs[0]
    assert max(abs(found.logprob - float(expected[token])) for token, found in first.items()) > 1e-3
    difference = float((served - adapted).abs().max())
    assert difference < 1e-4 < float((embeddings_alone(case, inputs) - adapted).abs().max())
    record(name, images=f"embeddings equal to {difference:.0e}, the host's own logits differ")


def test_a_host_that_has_another_tower_in_vllm(tmp_path: Path, record: Callable[..., None]) -> None:
    """vLLM's image embeddings for SmolVLM without an adapter differ from the host's, so its tokens are not
    compared."""
    case = exported("smolvlm", tmp_path)
    alone = embeddings_alone(case, inputs_of(case.processor, conversations()[0]))
    with engine(case.host) as llm:
        difference = (embeddings_in(llm, case) - alone).abs().max()
    assert float(difference) > 0.1 * float(alone.abs().max())
    record("smolvlm", images="not compared, the host's own embeddings differ")


def embeddings_in(llm: Any, case: Exported) -> torch.Tensor:
    """Return the embeddings of the first image from the engine's encoder, (tokens, hidden)."""
    ask(llm, [request_of(case.processor, conversations()[0])], 1)
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    return torch.cat([*runner.encoder_cache.values()])


@torch.no_grad()
def embeddings_alone(case: Exported, inputs: Any) -> torch.Tensor:
    """Return the embeddings from the host without its adapter in transformers, (tokens, hidden)."""
    pixels = {key: value for key, value in inputs.items() if key.startswith("pixel_")}
    with case.model.disable_adapter():
        embeddings = case.model.get_base_model().get_image_features(**pixels).pooler_output
    return embeddings.reshape(-1, embeddings.shape[-1])


def test_a_host_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the host is given by name, the exported directory has only the adapter's weights. A directory stands in for
    the repository."""
    monkeypatch.setattr(host_files, "snapshot_download", lambda *args, **kwargs: tmp_path / "host")
    case = exported("qwen2_vl", tmp_path, host="somebody/qwen")
    assert [path.name for path in case.served.glob("*.safetensors")] == [WEIGHTS]
    config = case.served / "config.json"
    config.write_text(config.read_text().replace("somebody/qwen", str(case.host)))
    adapted = [generated(case.model, inputs_of(case.processor, conversation)) for conversation in conversations()]
    with engine(case.served) as llm:
        served = ask(llm, [request_of(case.processor, conversation) for conversation in conversations()], TOKENS)
    assert all_equal(served, adapted)


def test_a_host_that_vllm_does_not_have_is_refused(tmp_path: Path) -> None:
    build_host("aya_vision", tmp_path / "host")
    model = save_adapters(load_host(tmp_path / "host"), tmp_path / "adapter", ["default"])
    with pytest.raises(ValueError, match=r"vLLM .* has no class for AyaVisionForConditionalGeneration\. Serve it"):
        export(model, tmp_path / "served", host=tmp_path / "host")
    assert not (tmp_path / "served").exists()
