"""Script that made the directories beside this file, at commit e5dc88d.

At that commit the composite did not have `model`, its part without the head. The directories are not made again,
because the tests check that they still load.
"""

import sys
from pathlib import Path

import torch
import transformers as tf
from peft import get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from peft_crome import CromeConfig, CromeVLMConfig, CromeVLMForConditionalGeneration, CromeVLMProcessor

HERE = Path(__file__).parent
SIZES = {"num_hidden_layers": 1, "num_attention_heads": 2}


def composite(qformer: bool = False) -> CromeVLMForConditionalGeneration:
    """Build a composite with random weights, whose tower and language model have width 8."""
    torch.manual_seed(0)
    vision = tf.CLIPVisionConfig(hidden_size=8, intermediate_size=8, image_size=4, patch_size=2, **SIZES)
    language = tf.LlamaConfig(hidden_size=8, intermediate_size=8, vocab_size=16, pad_token_id=0, **SIZES)
    reader = tf.InstructBlipQFormerConfig(
        hidden_size=8, intermediate_size=8, encoder_hidden_size=8, vocab_size=16, max_position_embeddings=4, **SIZES
    )
    config = CromeVLMConfig(
        vision_config=vision,
        text_config=language,
        image_token_id=13,
        qformer_config=reader if qformer else None,
        num_query_tokens=2,
    )
    model = CromeVLMForConditionalGeneration(config).eval()
    for part in filter(None, (model.vision_tower, model.language_model, model.qformer)):
        part.requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def batch(model: CromeVLMForConditionalGeneration) -> dict[str, torch.Tensor]:
    """Build a batch of one row with one image."""
    torch.manual_seed(1)
    ids = torch.tensor([[1, 5, *[13] * model.image_seq_length, 6, 7]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 4, 4)}
    return inputs | ({"qformer_input_ids": torch.tensor([[3, 4]])} if model.qformer is not None else {})


def processor(model: CromeVLMForConditionalGeneration) -> CromeVLMProcessor:
    """Build a processor whose tokenizer has ten words, three special tokens and an image token."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i + 3 for i in range(10)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    size = {"size": {"shortest_edge": 4}, "crop_size": {"height": 4, "width": 4}}
    pictures = tf.CLIPImageProcessorPil(**size)
    return CromeVLMProcessor.from_backbones(vision=pictures, language=fast, config=model.config)


def adapted(model: CromeVLMForConditionalGeneration, **kwargs: object):
    """Attach a random adapter, and add noise to every weight that trains."""
    torch.manual_seed(2)
    peft_model = get_peft_model(model, CromeConfig(bottleneck_dim=2, init_weights=False, **kwargs)).eval()
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return peft_model


def main() -> None:
    """Write all directories and their expected logits."""
    from peft_crome.training.directory.stage import save_stage  # which the extra `train` is for

    expected = {}
    for name, qformer in (("composite", False), ("composite_qformer", True)):
        model = composite(qformer)
        model.save_pretrained(HERE / name)
        trained = ["image_projection", "text_projection"] if qformer else ["image_projection"]
        with torch.no_grad():
            expected[name] = model(**batch(model)).logits
            model = adapted(model, modules_to_save=trained)
            expected[f"adapter_of_{name}"] = model(**batch(model.get_base_model())).logits
        model.save_pretrained(HERE / f"adapter_of_{name}")
    model = adapted(composite(), modules_to_save=["image_projection"])
    with torch.no_grad():
        expected["stage"] = model(**batch(model.get_base_model())).logits
    save_stage(model, processor(model.get_base_model()), HERE / "stage", {"stages": [{}]}, "# A stage\n")
    save_file(expected, HERE / "expected.safetensors")


if __name__ == "__main__":
    sys.exit(main())
