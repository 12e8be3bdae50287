"""Test that logits at labels alone give the same loss and gradients. The output head runs only on the tokens that
predict a label."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Dinov2Config, Dinov2Model, MixtralConfig

from peft_crome import CromeConfig, CromeVLMForConditionalGeneration, logits_at_labels
from peft_crome.backbone import labeled
from peft_crome.backbone.compat import has_composite, keeps_logits_by_token
from tests.language_zoo.small import small_config
from tests.losses import loss_and_gradients
from tests.tuner.helpers import adapted, attach, randomize
from tests.zoo import ZOO, Batch
from tests.zoo.llava import llava
from tests.zoo.test_zoo import QUICK

ALL_LOGITS = {  # hosts that are trained as without this -> a part of the line in the log
    **dict.fromkeys(("blip-2_t5", "florence2", "pix2struct", "pp_formulanet", "t5gemma2", "udop"), "encoder-decoder"),
    "vision-encoder-decoder": "encoder-decoder",
    **dict.fromkeys(("blip-2", "instructblip", "instructblip_t5", "instructblipvideo"), "no argument logits_to_keep"),
    **dict.fromkeys(("minicpm_ocr", "minicpmv4_6", "nemotron_h_omni"), "no argument logits_to_keep"),
    **dict.fromkeys(("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"), "no argument logits_to_keep"),
    **dict.fromkeys(("qwen2_audio", "video_llama_3"), "no argument logits_to_keep"),
    **dict.fromkeys(("git", "granite_speech", "kosmos-2"), "does not take them at chosen tokens"),
}
NO_LABELS = ("diffusion_gemma", "pi0")  # their loss is another one
FAST = {*QUICK, "florence2", "mistral3", "qwen3_vl_moe"}
composite_only = pytest.mark.skipif(not has_composite(), reason="the composite needs transformers 5.12")
by_token_only = pytest.mark.skipif(not keeps_logits_by_token(), reason="transformers 5.21 takes masks of tokens")


@pytest.fixture(autouse=True)
def _propagates(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)


def uneven(batch: Batch) -> Batch:
    """Return a batch whose rows have labels of different number and place."""
    labels = batch["labels"].clone()
    labels[1, :-1] = -100
    return {**batch, "labels": labels}


def assert_same(model: nn.Module, batch: Batch, **arguments: Any) -> Mapping[str, Any]:
    """Assert the same loss and gradients both ways. Return the batch that asks for fewer logits."""
    asked = logits_at_labels(model, batch)
    assert asked is not batch
    loss, gradients = loss_and_gradients(model, {**batch, **arguments})
    again, others = loss_and_gradients(model, {**asked, **arguments})
    assert gradients.keys() == others.keys() != set()
    bounds = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(again, loss, equal_nan=True, **bounds)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, msg=lambda text, name=name: f"{name}: {text}", **bounds)
    return asked


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in ZOO if n not in NO_LABELS]
)
def test_hosts(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Every architecture gives the same loss and gradients, or keeps all logits and logs the reason."""
    case = ZOO[name]()
    model = adapted(case)
    if name in ALL_LOGITS:
        assert logits_at_labels(model, case.batch) is case.batch
        assert logits_at_labels(model, case.batch) is case.batch
        (record,) = [record for record in caplog.records if record.name == labeled.__name__]
        assert ALL_LOGITS[name] in record.getMessage()
        assert type(case.model).__name__ in record.getMessage()
        return
    if not keeps_logits_by_token() and logits_at_labels(model, case.batch) is case.batch:
        assert (
            "computes the logits of all tokens" in caplog.text
        )  # older releases of more hosts had losses of their own
        return
    assert_same(model, uneven(case.batch))
    assert "computes the logits" not in caplog.text


def seen_by_head(model: nn.Module, batch: Mapping[str, Any]) -> int:
    """Return the number of tokens that the output head runs on."""
    counts: list[int] = []
    head = model.get_output_embeddings()  # type: ignore[operator]
    handle = head.register_forward_pre_hook(lambda module, inputs: counts.append(inputs[0][..., 0].numel()))
    model(**batch)
    handle.remove()
    (count,) = counts
    return count


@by_token_only
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_the_head_runs_on_labels_alone(name: str) -> None:
    case = ZOO[name]()
    batch = uneven(case.batch)
    labels = int((batch["labels"][:, 1:] != -100).sum())
    assert labels == 3
    model = adapted(case)
    assert seen_by_head(model, logits_at_labels(model, batch)) == labels
    assert seen_by_head(model, batch) == batch["labels"].numel()


def test_places_of_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A place is kept if any row has a label there. Older releases of transformers take places instead of tokens."""
    monkeypatch.setattr(labeled, "keeps_logits_by_token", lambda: False)
    case = llava()
    model = adapted(case)
    asked = assert_same(model, uneven(case.batch))
    assert asked["shift_labels"].shape == (2, 2)
    assert seen_by_head(model, asked) == 4


def test_the_first_label_of_a_row_is_nobody_s() -> None:
    """The label of a row's first token is ignored. The loss shifts labels by one, so this label has no logits."""
    case = llava()
    batch = {**case.batch, "labels": case.batch["input_ids"].masked_fill(case.batch["input_ids"] > 11, -100)}
    assert (batch["labels"][:, 0] != -100).all()
    assert_same(adapted(case), batch)


@pytest.mark.parametrize("items", [None, 5])
def test_a_batch_without_labels(items: int | None) -> None:
    """A batch without labels has the model's own loss. With `num_items_in_batch` the loss and gradients are zero, and
    without it the loss is NaN."""
    case = llava()
    batch = {**case.batch, "labels": torch.full_like(case.batch["labels"], -100)}
    model = adapted(case)
    arguments = {} if items is None else {"num_items_in_batch": torch.tensor(items)}
    loss, gradients = loss_and_gradients(model, {**logits_at_labels(model, batch), **arguments})
    expected, others = loss_and_gradients(model, {**batch, **arguments})
    assert loss.isnan() if items is None else loss == 0
    torch.testing.assert_close(loss, expected, equal_nan=True, rtol=0, atol=0)
    if items is not None:
        assert gradients.keys() == others.keys() != set()
        assert not any(gradient.any() for gradient in gradients.values())


def test_num_items_in_batch() -> None:
    case = llava()
    assert_same(adapted(case), uneven(case.batch), num_items_in_batch=torch.tensor(11))


def test_bfloat16() -> None:
    case = llava()
    model = adapted(case).to(torch.bfloat16)
    batch = {key: value.bfloat16() if value.is_floating_point() else value for key, value in case.batch.items()}
    loss, _ = loss_and_gradients(model, batch)
    again, _ = loss_and_gradients(model, logits_at_labels(model, batch))
    torch.testing.assert_close(again, loss, rtol=1e-2, atol=1e-2)


def test_4_bit(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    case = llava()
    case.model.save_pretrained(tmp_path)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    host = type(case.model).from_pretrained(tmp_path, quantization_config=nf4)
    model = attach(host)
    randomize(model)
    assert_same(model.train(), uneven(case.batch))


def test_nothing_is_changed_by_the_trial() -> None:
    """The trial of a model changes no modes, gradients or random numbers. A model is tried only once."""
    case = llava()
    model = adapted(case).train()
    case.model.model.vision_tower.eval()
    modes = [module.training for module in model.modules()]
    calls: list[bool] = []
    model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    before = torch.get_rng_state()
    logits_at_labels(model, case.batch)
    logits_at_labels(model, case.batch)
    assert calls == [False, False]  # both ways, without a gradient
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_batches_that_stay_as_they_are() -> None:
    case = llava()
    model = adapted(case)
    text = {"input_ids": case.batch["input_ids"]}
    assert logits_at_labels(model, text) is text
    shifted = {**case.batch, "shift_labels": case.batch["labels"]}
    assert logits_at_labels(model, shifted) is shifted


class KeepsAll(nn.Module):
    """Wrap a host so that it takes `logits_to_keep` and still computes all logits."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.host = host
        self.config = host.config

    def forward(self, logits_to_keep: Any = 0, shift_labels: Any = None, **batch: Any) -> Any:
        return self.host(**batch)


class OtherLoss(KeepsAll):
    """Wrap a host so that it adds something to the loss if tokens are chosen."""

    def forward(self, logits_to_keep: Any = 0, shift_labels: Any = None, **batch: Any) -> Any:
        output = self.host(**batch)
        if shift_labels is not None:
            output["loss"] = output["loss"] + 1
            output["logits"] = output["logits"].flatten(0, 1)[: shift_labels.numel()].view(*shift_labels.shape, -1)
        return output


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(KeepsAll, "takes logits_to_keep and keeps all"), (OtherLoss, "its loss at chosen tokens is")],
)
def test_a_model_whose_trial_fails(
    kind: type[KeepsAll], reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    case = llava()
    model = kind(case.model)
    monkeypatch.setattr(labeled, "unwrapped", lambda model: model)
    monkeypatch.setattr(labeled, "text_config", lambda model: model.config.text_config)
    assert logits_at_labels(model, case.batch) is case.batch
    assert reason in caplog.text


# ---- compiled, and in two processes ----


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_as_one_graph() -> None:
    """A compiled model gives the same loss in one graph. It keeps places instead of tokens, and their number differs
    between batches."""
    case = llava()
    model = attach(case.model, branches=None)
    randomize(model)
    plain = [loss_and_gradients(model, batch)[0] for batch in (case.batch, uneven(case.batch))]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for batch, expected in zip((case.batch, uneven(case.batch)), plain, strict=True):
        asked = logits_at_labels(compiled, batch)
        assert asked["logits_to_keep"].ndim == 1
        torch.testing.assert_close(compiled(**asked).loss.detach(), expected, rtol=1e-5, atol=1e-6)


def _two_processes(rank: int, folder: str) -> None:
    where = {"init_method": f"file://{folder}/store", "timeout": timedelta(seconds=120)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, **where)
    batch = _share(rank)
    model = adapted(llava())
    parallel = nn.parallel.DistributedDataParallel(model.train())
    _, gradients = loss_and_gradients(parallel, {**logits_at_labels(parallel, batch), "num_items_in_batch": 2})
    torch.save(gradients, f"{folder}/{rank}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _share(rank: int) -> Batch:
    """Return the batch of a process. The first process has labels, and the second one has none."""
    batch = llava().batch
    return batch if rank == 0 else {**batch, "labels": torch.full_like(batch["labels"], -100)}


def test_distributed_data_parallel(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_two_processes, (str(tmp_path),), nprocs=2)
    model = adapted(llava()).train()
    _, expected = loss_and_gradients(model, {**_share(0), "num_items_in_batch": 2})
    for rank in range(2):
        found = torch.load(tmp_path / str(rank))
        assert found.keys() == {f"module.{name}" for name in expected}
        for name, gradient in expected.items():
            torch.testing.assert_close(found[f"module.{name}"], gradient / 2, rtol=1e-4, atol=1e-6)


# ---- the composite's language models ----


def _mixtral() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return MixtralConfig(
        **sizes, num_key_value_heads=2, num_local_experts=4, vocab_size=64, output_router_logits=True,
        router_aux_loss_coef=5.0,
    )  # fmt: skip


LANGUAGE: dict[str, Callable[[], Any]] = {
    "llama": lambda: small_config("llama", False),
    "gemma2, with a soft cap": lambda: small_config("gemma2", False),
    "granite, with a divisor": lambda: small_config("granite", False),
    "cohere, with a factor": lambda: small_config("cohere", False),
    "gpt-j, with a bias": lambda: small_config("gptj", False),
    "mixtral, with a loss of its router": _mixtral,
}


def composite(config: Any) -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    language = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in language.parameters():
            parameter.normal_(std=0.15) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    image = language.config.vocab_size
    host = CromeVLMForConditionalGeneration.from_backbones(
        Dinov2Model(Dinov2Config(hidden_size=16, **sizes)), language, image_token_id=image
    )
    model = get_peft_model(host, CromeConfig(bottleneck_dim=4, init_weights=False)).eval()
    ids = torch.tensor([[5, *[image] * 4, 7, 8, 9], [5, *[image] * 4, 9, 10, 11]])
    labels = ids.clone()  # also where an image is: the composite leaves these out
    labels[0, :-1] = -100
    pixel_values = torch.randn(2, 3, 28, 28)
    return model, {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixel_values,
    }  # fmt: skip


@composite_only
@pytest.mark.parametrize("name", LANGUAGE)
def test_composites(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """A composite keeps its language model's scales, caps, biases and router loss. Placeholders are never learned."""
    model, batch = composite(LANGUAGE[name]())
    assert_same(model, batch)
    assert_same(model, batch, num_items_in_batch=torch.tensor(9))
    assert "computes the logits" not in caplog.text


@composite_only
def test_the_routers_loss_is_in_both() -> None:
    model, batch = composite(_mixtral())
    output = model(**logits_at_labels(model, batch))
    assert output.aux_loss > 0
    plain = nn.functional.cross_entropy(output.logits, _predicted(model, batch))
    torch.testing.assert_close(output.loss.detach(), (plain + 5.0 * output.aux_loss).detach())


def _predicted(model: Any, batch: Batch) -> torch.Tensor:
    shifted = logits_at_labels(model, batch)["shift_labels"]
    return shifted.masked_fill(shifted == model.get_base_model().config.image_token_id, -100)


@composite_only
@pytest.mark.parametrize(("name", "seq2seq"), [("bart", False), ("t5", True)])
def test_composites_with_all_logits(name: str, seq2seq: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Composites with BART or an encoder-decoder keep all logits. BART's decoder shifts labels itself, and the labels
    are all that the decoder of an encoder-decoder reads."""
    from tests.language_zoo.test_language_zoo import composite as joined
    from tests.language_zoo.test_language_zoo import language_model, targets

    host, batch = joined(language_model(name, seq2seq))
    model = get_peft_model(host, CromeConfig(bottleneck_dim=4))
    batch = {**batch, **targets(host, batch["input_ids"])}
    assert logits_at_labels(model, batch) is batch
    assert "computes the logits of all tokens in training" in caplog.text
