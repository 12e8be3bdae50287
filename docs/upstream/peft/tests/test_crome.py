# Copyright 2026-present the HuggingFace Inc. team.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

# These tests check what is specific to CROME: the equation, the shared up-projection, what is adapted and what is not,
# and that adapters which cannot be merged exactly are refused. The models are made from small configs.

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

from peft import CromeConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.crome import CromeLayer, Embedding
from peft.utils import infer_device


HIDDEN_SIZE = 32
IMAGE_TOKEN = 90
PROJECTOR = "multi_modal_projector.linear_2"


class TestCrome:
    torch_device = infer_device()

    @pytest.fixture(autouse=True)
    def set_seed(self):
        torch.manual_seed(0)

    def get_text_config(self, config_cls=LlamaConfig, **kwargs):
        return config_cls(
            vocab_size=100,
            hidden_size=HIDDEN_SIZE,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            **kwargs,
        )

    def get_model(self):
        vision_config = CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
        )
        config = LlavaConfig(
            vision_config=vision_config, text_config=self.get_text_config(), image_token_index=IMAGE_TOKEN
        )
        return LlavaForConditionalGeneration(config).to(self.torch_device).eval()

    def get_text_model(self, tie_word_embeddings=False):
        config = self.get_text_config(tie_word_embeddings=tie_word_embeddings)
        return LlamaForCausalLM(config).to(self.torch_device).eval()

    def get_image_inputs(self):
        input_ids = torch.tensor([[1, *[IMAGE_TOKEN] * 4, 5, 6], [1, *[IMAGE_TOKEN] * 4, 7, 8]])
        inputs = {"input_ids": input_ids, "pixel_values": torch.rand(2, 3, 8, 8)}
        return {key: value.to(self.torch_device) for key, value in inputs.items()}

    def get_text_inputs(self):
        return {"input_ids": torch.tensor([[1, 5, 6, 7]]).to(self.torch_device)}

    def get_config(self, *target_modules, **kwargs):
        return CromeConfig(
            target_modules=list(target_modules) or None, **{"bottleneck_dim": 4, "init_weights": False, **kwargs}
        )

    def get_logits(self, model, inputs):
        with torch.no_grad():
            return model(**inputs).logits

    def test_default_target_module_is_projector(self):
        model = get_peft_model(self.get_model(), self.get_config())
        assert model.targeted_module_names == [f"model.{PROJECTOR}"]
        assert model.get_nb_trainable_parameters()[0] == 3 * HIDDEN_SIZE * 4

    def test_fresh_adapter_is_identity(self):
        model = self.get_model()
        inputs = self.get_image_inputs()
        expected = self.get_logits(model, inputs)
        model = get_peft_model(model, self.get_config(PROJECTOR, "embed_tokens", init_weights=True)).eval()
        assert torch.equal(self.get_logits(model, inputs), expected)

    def test_prompt_without_image_is_not_changed(self):
        model = self.get_model()
        image_inputs, text_inputs = self.get_image_inputs(), self.get_text_inputs()
        image_expected, text_expected = self.get_logits(model, image_inputs), self.get_logits(model, text_inputs)
        model = get_peft_model(model, self.get_config()).eval()
        assert torch.equal(self.get_logits(model, text_inputs), text_expected)
        assert not torch.allclose(self.get_logits(model, image_inputs), image_expected, atol=1e-3)

    @pytest.mark.parametrize("gate_activation", ["silu", "sigmoid"])
    def test_equation(self, gate_activation):
        config = self.get_config(gate_activation=gate_activation)
        layer = get_peft_model(self.get_model(), config).base_model.model.model.multi_modal_projector.linear_2
        activation = {"silu": nn.functional.silu, "sigmoid": torch.sigmoid}[gate_activation]
        gate, down, up = (getattr(layer, name)["default"].weight for name in layer.adapter_layer_names)
        features = torch.randn(3, HIDDEN_SIZE, device=self.torch_device)
        x = layer.base_layer(features)
        assert torch.allclose(layer(features), x + (activation(x @ gate.T) * (x @ down.T)) @ up.T, atol=1e-5)

    def test_dropout_is_applied_in_training_only(self):
        layer = get_peft_model(self.get_model(), self.get_config(crome_dropout=0.5)).get_submodule(
            f"base_model.model.model.{PROJECTOR}"
        )
        features = torch.randn(3, HIDDEN_SIZE, device=self.torch_device)
        assert not torch.equal(layer.train()(features), layer(features))
        assert torch.equal(layer.eval()(features), layer(features))

    def test_initial_weights_follow_scale_of_embeddings(self):
        stds = []
        for scale in (1.0, 100.0):
            model = self.get_model()
            model.get_input_embeddings().weight.data *= scale
            model = get_peft_model(model, self.get_config(bottleneck_dim=256))
            stds.append(
                next(m for m in model.modules() if isinstance(m, CromeLayer)).crome_gate["default"].weight.std()
            )
        assert torch.isclose(stds[0], 100 * stds[1], rtol=0.1)

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_up_projection_is_shared_and_saved_once(self, low_cpu_mem_usage, tmp_path):
        inputs = self.get_image_inputs()
        base_model = self.get_model()
        config = self.get_config(PROJECTOR, "embed_tokens")
        model = get_peft_model(copy.deepcopy(base_model), config).eval()
        assert model.get_nb_trainable_parameters()[0] == 5 * HIDDEN_SIZE * 4
        expected = self.get_logits(model, inputs)
        model.save_pretrained(tmp_path, save_embedding_layers=False)

        keys = set(load_file(tmp_path / "adapter_model.safetensors"))
        projector, table = f"base_model.model.model.{PROJECTOR}", "base_model.model.model.language_model.embed_tokens"
        # the up-projection is stored beside the weights of the first layer of the model
        assert len([key for key in keys if key.endswith("crome_up.weight")]) == 1
        assert {key for key in keys if not key.endswith("crome_up.weight")} == {
            f"{layer}.{name}.weight" for layer in (projector, table) for name in ("crome_gate", "crome_down")
        }

        model = PeftModel.from_pretrained(base_model, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(self.get_logits(model, inputs), expected)
        first, second = (module for module in model.modules() if isinstance(module, CromeLayer))
        assert first.crome_up["default"].weight is second.crome_up["default"].weight
        result = model.load_adapter(tmp_path, "other", low_cpu_mem_usage=low_cpu_mem_usage)
        assert not result.missing_keys

    def test_adapters_of_different_modules(self, tmp_path):
        # The layers hold one dict of up-projections, which also has those of adapters that do not target the layer.
        inputs = self.get_image_inputs()
        base_model = self.get_model()
        model = get_peft_model(copy.deepcopy(base_model), self.get_config(PROJECTOR), adapter_name="image").eval()
        model.add_adapter("text", self.get_config("embed_tokens"))
        model.set_adapter("text")
        expected = self.get_logits(model, inputs)
        model.save_pretrained(tmp_path, save_embedding_layers=False)
        for name in ("image", "text"):
            assert len(load_file(tmp_path / name / "adapter_model.safetensors")) == 3

        loaded = PeftModel.from_pretrained(base_model, tmp_path / "text")
        assert loaded.targeted_module_names == ["model.language_model.embed_tokens"]
        assert torch.equal(self.get_logits(loaded, inputs), expected)

        model.delete_adapter("image")
        assert torch.equal(self.get_logits(model, inputs), expected)
        assert not [name for name, _ in model.named_parameters() if ".image." in name]

    @pytest.mark.parametrize("is_trainable", [True, False])
    def test_loading_second_adapter_keeps_first_one_trainable(self, is_trainable, tmp_path):
        model = get_peft_model(self.get_model(), self.get_config(PROJECTOR, "embed_tokens"))
        model.save_pretrained(tmp_path, save_embedding_layers=False)

        def get_trainable():
            return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

        expected = get_trainable()
        assert len(expected) == 5
        model.load_adapter(tmp_path, "other", is_trainable=is_trainable)
        assert {name for name in get_trainable() if ".other." not in name} == expected

    def test_projector_without_linear_layer(self):
        # The projector of Gemma 3 multiplies with a parameter, and has neither a weight nor a number of features
        vision_config = SiglipVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
        )
        config = Gemma3Config(
            vision_config=vision_config,
            text_config=self.get_text_config(Gemma3TextConfig, head_dim=16),
            mm_tokens_per_image=4,
            image_token_id=IMAGE_TOKEN,
        )
        base_model = Gemma3ForConditionalGeneration(config).to(self.torch_device, torch.bfloat16).eval()
        nn.init.normal_(base_model.model.multi_modal_projector.mm_input_projection_weight)  # otherwise zero
        inputs = {
            "input_ids": torch.tensor([[1, *[IMAGE_TOKEN] * 4, 5, 6]]).to(self.torch_device),
            "token_type_ids": torch.tensor([[0, 1, 1, 1, 1, 0, 0]]).to(self.torch_device),
            "pixel_values": torch.rand(1, 3, 16, 16).to(self.torch_device, torch.bfloat16),
        }
        expected = self.get_logits(base_model, inputs)
        model = get_peft_model(base_model, self.get_config(), autocast_adapter_dtype=False)
        assert model.targeted_module_names == ["model.multi_modal_projector"]
        model(**inputs).logits.float().square().mean().backward()
        for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
            assert parameter.dtype == torch.bfloat16
            assert parameter.grad.any()
        assert not torch.equal(self.get_logits(model, inputs), expected)
        assert torch.equal(self.get_logits(model.unload(), inputs), expected)

    def test_inject_adapter_in_model(self):
        model = inject_adapter_in_model(self.get_config(PROJECTOR, "embed_tokens"), self.get_model())
        first, second = (module for module in model.modules() if isinstance(module, CromeLayer))
        assert first.crome_up is second.crome_up

    def test_merge_embedding_table(self, tmp_path):
        inputs = self.get_text_inputs()
        base_model = self.get_text_model()
        table = base_model.get_input_embeddings().weight.clone()
        model = get_peft_model(base_model, self.get_config("embed_tokens", crome_dropout=0.5))
        model.add_adapter("other", self.get_config("embed_tokens"))
        model.base_model.set_adapter(["default", "other"])
        model.train()
        with model.disable_adapter():
            expected_base = self.get_logits(model, inputs)
        model.eval()
        expected = self.get_logits(model, inputs)
        assert not torch.allclose(expected, expected_base, atol=1e-3)

        model.train()
        for adapter_names in (["default"], ["other"]):  # one after the other gives the same result as both at once
            model.merge_adapter(adapter_names, safe_merge=True)
        assert torch.allclose(self.get_logits(model, inputs), expected, atol=1e-5)
        model.unmerge_adapter()
        assert torch.equal(base_model.get_input_embeddings().weight, table)

        merged = model.merge_and_unload()
        assert type(merged.get_input_embeddings()) is nn.Embedding
        assert torch.allclose(self.get_logits(merged, inputs), expected, atol=1e-5)
        merged.save_pretrained(tmp_path)
        loaded = LlamaForCausalLM.from_pretrained(tmp_path).to(self.torch_device)
        assert torch.equal(self.get_logits(loaded, inputs), self.get_logits(merged, inputs))

    @pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
    @pytest.mark.parametrize(
        "target_modules, error",
        [
            (["embed_tokens", PROJECTOR], "not linear"),
            ([PROJECTOR], "not linear"),
            (["embed_tokens"], r"tied with \['lm_head.weight'\]"),
        ],
    )
    def test_inexact_merge_is_refused_before_anything_changes(self, merge, target_modules, error):
        model = self.get_model()
        if "tied" in error:
            model.lm_head.weight = model.get_input_embeddings().weight
        inputs = self.get_image_inputs()
        model = get_peft_model(model, self.get_config(*target_modules)).eval()
        expected = self.get_logits(model, inputs)
        with pytest.raises(ValueError, match=error):
            getattr(model, merge)()
        assert not any(module.merged for module in model.modules() if isinstance(module, CromeLayer))
        assert torch.equal(self.get_logits(model, inputs), expected)

    def test_adapter_of_embedding_table_can_be_merged_next_to_another(self):
        inputs = self.get_image_inputs()
        model = get_peft_model(self.get_model(), self.get_config("embed_tokens"), adapter_name="text").eval()
        expected = self.get_logits(model, inputs)
        model.add_adapter("image", self.get_config(PROJECTOR))
        assert torch.allclose(
            self.get_logits(model.merge_and_unload(adapter_names=["text"]), inputs), expected, atol=1e-5
        )

    def test_merging_scaled_embedding_table_is_refused(self):
        class ScaledEmbedding(nn.Embedding):
            def forward(self, input_ids):
                return super().forward(input_ids) * 3

        model = self.get_text_model()
        model.set_input_embeddings(ScaledEmbedding(100, HIDDEN_SIZE))
        model = get_peft_model(model, self.get_config("embed_tokens"))
        assert isinstance(model.get_input_embeddings(), Embedding)
        with pytest.raises(ValueError, match="more than look up rows"):
            model.merge_adapter()

    def test_mixed_adapter_batches_are_refused(self):
        model = get_peft_model(self.get_model(), self.get_config())
        with pytest.raises(ValueError, match="adapter_names"):
            model(**self.get_image_inputs(), adapter_names=["default", "__base__"])

    def test_different_sizes_are_refused(self):
        model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
        with pytest.raises(ValueError, match="the sizes 3 and 4"):
            get_peft_model(model, self.get_config("0", "1"))

    def test_unknown_size_is_refused(self):
        model = nn.Sequential(nn.Sequential(nn.Linear(2, 3)), nn.ReLU())
        with pytest.raises(ValueError, match="Could not infer the size"):
            get_peft_model(model, self.get_config("0"))

    def test_convolution_is_refused(self):
        with pytest.raises(TypeError, match="return embeddings"):
            get_peft_model(nn.Sequential(nn.Conv2d(3, 3, 2)), self.get_config("0"))

    def test_module_that_returns_no_tensor_is_refused(self):
        model = get_peft_model(self.get_model(), self.get_config("vision_tower"))
        with pytest.raises(TypeError, match="target a module inside of it"):
            model(**self.get_image_inputs())

    @pytest.mark.parametrize(
        "kwargs", [{"bottleneck_dim": 0}, {"gate_activation": "relu"}, {"crome_dropout": 1.0}, {"crome_dropout": -0.1}]
    )
    def test_invalid_config(self, kwargs):
        with pytest.raises(ValueError, match=next(iter(kwargs))):
            CromeConfig(**kwargs)
