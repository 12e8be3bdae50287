"""The composite model: a frozen vision tower and a frozen language model, joined by linear projections."""

import copy
import inspect
from collections import OrderedDict
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from ..backbone.four_bit import fix_repacking
from ..backbone.positions import check_positions
from ..backbone.trainers import watch_trainers
from .backbones import language_class
from .configuration_crome_vlm import CromeVLMConfig
from .fingerprint import Samples
from .generation_crome_vlm import CromeVLMGenerationMixin, cached_tokens
from .image_token import check_image_tokens, move_padding, neutral_token_id
from .language_head import check_head, decoder_of
from .language_inputs import arguments_by_token, check_takes_embeddings
from .outputs import CromeVLMModelOutput, CromeVLMOutput, as_output
from .qformer import QFormer
from .vision import build_tower, infer_layout, run_tower, size_arguments


class FusionSite(nn.Identity):
    """An identity where embeddings of one kind enter the language model, so that an adapter can wrap it.

    Args:
        hidden_size: width of the language model's embeddings; read by adapters as in_features and out_features.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.in_features = self.out_features = hidden_size


class CromeVLMForConditionalGeneration(PreTrainedModel, CromeVLMGenerationMixin):
    """Join any vision tower and any causal or encoder-decoder language model as one image-text-to-text model.

    `vision_tower` -> `image_projection` -> `vision_fusion` -> `language_model`, and with a Q-Former also
    `vision_tower` -> `qformer` -> `text_projection` -> `text_fusion` -> `language_model`. `model` is the same model
    without the language model's head, as in transformers' vision-language models. A tower or Q-Former without
    trained parameters stays in evaluation mode under `train()`, so the tower's features are a function of the image
    and can be cached; the language model follows `train()`, since gradient checkpointing depends on it.

    Args:
        config: configuration of the parts; `image_seq_length` is filled in.
        vision_tower: used as it is; None: built from the configuration with random weights.
        language_model: used as it is; None: built from the configuration with random weights.
        qformer: used as it is; None: built with random weights if the configuration has one.
    Raises:
        ValueError: the tower's features and the configuration disagree.
    Source: CROME, arXiv 2408.06610 (frozen tower and language model, two linear projections, Q-Former).
    """

    config_class = CromeVLMConfig
    config: CromeVLMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    accepts_loss_kwargs = True  # `Trainer` asks whether the loss takes `num_items_in_batch`
    _is_headless: ClassVar[bool] = False

    def __init__(
        self,
        config: CromeVLMConfig,
        vision_tower: PreTrainedModel | None = None,
        language_model: PreTrainedModel | None = None,
        qformer: QFormer | None = None,
    ) -> None:
        super().__init__(config)
        watch_trainers()
        text_config = config.text_config
        # A compiled module has no truth value.
        self.vision_tower = vision_tower if vision_tower is not None else build_tower(config.vision_config)
        self.language_model = (
            language_model if language_model is not None else language_class(text_config).from_config(text_config)
        )
        check_takes_embeddings(self.language_model)
        fix_repacking(self)
        self.vision_layout = infer_layout(config)
        self.num_patch_tokens = self.vision_layout.num_selected(
            config.vision_feature_select_strategy, config.vision_pool_size
        )
        counts = {"query": config.num_query_tokens, "patch": self.num_patch_tokens}
        self.image_token_order: list[str] = list(config.image_token_order or ())
        counted = sum(counts[kind] for kind in self.image_token_order)
        if config.image_seq_length not in (None, counted):
            raise ValueError(
                f"image_seq_length={config.image_seq_length}, but {type(self.vision_tower).__name__} gives {counted} "
                f"tokens per image of {config.image_height_width} pixels; write image_seq_length=None to have it "
                "computed."
            )
        config.image_seq_length = self.image_seq_length = counted
        config.has_adapter = False  # true only in the configuration of a saved directory

        embeddings = self.get_input_embeddings()
        width = getattr(embeddings, "embedding_dim", None) or embeddings.weight.shape[-1]
        weight = embeddings.weight
        dtype = weight.dtype if weight.is_floating_point() else None
        place = {"device": weight.device, "dtype": dtype}
        if "patch" in self.image_token_order:
            bias = config.image_projection_bias
            self.image_projection = nn.Linear(self.vision_layout.hidden_size, width, bias=bias, **place)
            self.vision_fusion = FusionSite(width)
        self.qformer = qformer
        if config.qformer_config is not None:
            self._check_qformer_config(config)
            if qformer is None:
                self.qformer = QFormer(config.qformer_config, config.num_query_tokens).to(**place)
            self.text_projection = nn.Linear(config.qformer_config.hidden_size, width, **place)
            self.text_fusion = FusionSite(width)
        self._language_arguments = frozenset(inspect.signature(self.language_model.forward).parameters)
        self._tower_arguments = size_arguments(self.vision_tower, *config.image_height_width)
        self._stored_keys: set[str] = set()  # backbone weights that differ from the named backbones'
        self._samples: Samples = {}  # samples of the weights as they were put together
        self.feature_cache: Any = None  # see `peft_crome.cache_features`
        self.blank_image = False  # see `embed_inputs`
        for part in (part for part in (vision_tower, language_model, qformer) if part is not None):
            for module in part.modules():
                module._is_hf_initialized = True  # post_init must not initialize the given weights again
        self.post_init()
        # accelerate's FSDP looks for every name, and towers also name layers of their text half.
        self._no_split_modules &= {type(module).__name__ for module in self.modules()}

    def _check_qformer_config(self, config: CromeVLMConfig) -> None:
        reads, width = config.qformer_config.encoder_hidden_size, self.vision_layout.hidden_size
        if reads != width:
            raise ValueError(
                f"The Q-Former reads features of width {reads}, and {type(self.vision_tower).__name__} gives {width}. "
                f"Write qformer_config=InstructBlipQFormerConfig(encoder_hidden_size={width}), or take the tower that "
                "the Q-Former was trained with."
            )

    # ---- parts and their access ----

    @property
    def model(self) -> "CromeVLMModel":
        """The same parts and weights up to the last hidden states. `base_model` returns it as well."""
        view = copy.copy(self)  # it shares the dictionary of modules
        view.__class__ = CromeVLMModel
        view.__dict__.pop("forward", None)  # TRL or accelerate may have wrapped the whole model's
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            view.__dict__[hooks] = OrderedDict()
        return view

    def get_input_embeddings(self) -> nn.Module:
        """Return the language model's embedding table: (batch, tokens) ids -> (batch, tokens, hidden)."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's embedding table."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the language model's output head."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's output head."""
        self.language_model.set_output_embeddings(value)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Resize table and head by the language model's method; arguments as in transformers."""
        table = self.language_model.resize_token_embeddings(*args, **kwargs)
        self.config.get_text_config().vocab_size = self.language_model.config.get_text_config().vocab_size
        return table

    def _averages_by_itself(self) -> bool:
        """Whether the language model's loss is a batch's mean for any `num_items_in_batch`.

        Encoder-decoder models accept it among their keyword arguments and still average over the batch.
        """
        if self.config.is_encoder_decoder:
            return True
        accepts = getattr(self.language_model, "accepts_loss_kwargs", None)
        if accepts is None:
            parameters = inspect.signature(self.language_model.forward).parameters.values()
            accepts = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
        return not accepts

    def train(self, mode: bool = True) -> "CromeVLMForConditionalGeneration":
        """Set training mode; a frozen tower stays in evaluation mode (no dropout, fixed statistics)."""
        super().train(mode)
        if mode:
            self._stored_keys |= self.trained_backbone_keys()
            for part in filter(None, (self.vision_tower, self.qformer)):
                if not any(parameter.requires_grad for parameter in part.parameters()):
                    part.eval()
        return self

    def trained_backbone_keys(self) -> set[str]:
        """Name the backbone parameters that train now, with the buffers of a backbone that trains in part."""
        backbones = ("vision_tower.", "language_model.", "qformer.")
        named = self.named_parameters()
        trained = {key for key, parameter in named if parameter.requires_grad and key.startswith(backbones)}
        parts = tuple(part for part in backbones if any(key.startswith(part) for key in trained))
        return trained | {key for key, _ in self.named_buffers() if key.startswith(parts)}

    # ---- images ----

    def get_vision_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Run the tower and return the features of the chosen layer, in the form that `vision_features=` takes.

        Args:
            pixel_values: (images, channels, height, width).
        Returns:
            (images, tokens, vision_width): the selected and pooled patches. With a Q-Former, every token of the tower,
            all of which it reads. A frozen tower gives no graph.
        Raises:
            ValueError: the images are not of the size that the projection was built for.
        """
        expected = self.config.image_height_width
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[-2:]) != expected:
            raise ValueError(
                f"pixel_values have shape {tuple(pixel_values.shape)}, expected (images, channels, {expected[0]}, "
                f"{expected[1]}). Use the processor saved with the model, or build the model with image_size=..."
            )
        tower = self.vision_tower
        trains = pixel_values.requires_grad or any(parameter.requires_grad for parameter in tower.parameters())
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            pixel_values = pixel_values.to(device=tower.device, dtype=tower.dtype)
            if self.feature_cache is not None and not pixel_values.requires_grad:
                return self.feature_cache.of_composite(pixel_values, self._compute_features)
            return self._compute_features(pixel_values)

    def _compute_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        layer = self.config.vision_feature_layer
        features = run_tower(self.vision_tower, pixel_values, layer, **self._tower_arguments)
        features = self.vision_layout.to_tokens(features)
        return features if self.qformer is not None else self._select(features)

    def _select(self, features: torch.Tensor) -> torch.Tensor:
        strategy, pool_size = self.config.vision_feature_select_strategy, self.config.vision_pool_size
        return self.vision_layout.select(features, strategy, pool_size)

    def _check_features(self, features: torch.Tensor) -> torch.Tensor:
        """Accept the result of `get_vision_features` or the tower's unpooled patches, and refuse other shapes."""
        layout = self.vision_layout
        tokens = self.num_patch_tokens if self.qformer is None else layout.num_tokens
        if features.ndim == 3 and features.shape[2] == layout.hidden_size:
            if features.shape[1] == tokens:
                return features
            if features.shape[1] == layout.num_tokens:
                return self._select(features)
            if features.shape[1] == layout.height * layout.width and self.qformer is None:
                return layout.pool(features, self.config.vision_pool_size)
        raise ValueError(
            f"vision_features have shape {tuple(features.shape)}, expected (images, {tokens}, {layout.hidden_size}). "
            "Make them with model.get_vision_features(pixel_values)."
        )

    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        qformer_input_ids: torch.LongTensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Return image embeddings as the language model reads them, after projections and fusion sites.

        Args:
            pixel_values: (images, channels, height, width).
            vision_features: (images, tokens, vision_width) from `get_vision_features`, instead of pixel_values.
            qformer_input_ids: (images, instruction tokens), for a Q-Former that reads the instruction.
            qformer_attention_mask: the same shape, 1 where a token counts.
            kwargs: accepted for callers of other models' `get_image_features`; none is used.
        Returns:
            `pooler_output`: (images, image_seq_length, hidden); `last_hidden_state`: the features behind it.
        Raises:
            ValueError: a shape does not fit, or not exactly one of the two inputs is given.
        """
        if (pixel_values is None) == (vision_features is None):
            raise ValueError("Pass exactly one of pixel_values and vision_features; got both or neither.")
        if vision_features is None:
            features = self.get_vision_features(pixel_values)
        else:
            features = self._check_features(vision_features)
        tokens: dict[str, torch.Tensor] = {}
        if self.qformer is not None:
            reader = self.qformer.model  # InstructBLIP keeps query tokens in float32 in a half-precision model
            read = features.to(device=reader.device, dtype=reader.dtype)
            queries = self.qformer(read, qformer_input_ids, qformer_attention_mask)
            tokens["query"] = self.text_fusion(_project(self.text_projection, queries))
        if "patch" in self.image_token_order:
            patches = features if self.qformer is None else self._select(features)
            tokens["patch"] = self.vision_fusion(_project(self.image_projection, patches))
        ordered = [tokens[kind] for kind in self.image_token_order]
        first = ordered[0]
        embeddings = torch.cat([part.to(first) for part in ordered], dim=1) if len(ordered) > 1 else first
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=embeddings)

    def get_placeholder_mask(
        self, input_ids: torch.LongTensor, inputs_embeds: torch.Tensor, image_features: torch.Tensor
    ) -> torch.BoolTensor:
        """Find the placeholders that image embeddings replace.

        Args:
            input_ids: (batch, tokens).
            inputs_embeds: (batch, tokens, hidden).
            image_features: (images, image_seq_length, hidden).
        Returns:
            (batch, tokens, 1), true at image placeholders.
        Raises:
            ValueError: counts of image tokens and image features differ, or a row cuts an image.
        """
        is_image = input_ids == self.config.image_token_id
        check_image_tokens(is_image, image_features.shape[0], self.image_seq_length)()
        return is_image.unsqueeze(-1).to(inputs_embeds.device)

    def embed_inputs(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        qformer_input_ids: torch.LongTensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.LongTensor, torch.Tensor, torch.Tensor | None]:
        """Embed text and images into one sequence; each token's embedding is looked up once.

        With `blank_image`, a batch without images runs one black image and does not use its embeddings. Every
        process of a run with FSDP or ZeRO-3 then calls the same modules.

        Args:
            input_ids: (batch, tokens), each image as image_seq_length placeholders.
            pixel_values: (images, channels, height, width), in reading order over the batch.
            vision_features: (images, tokens, vision_width) from `get_vision_features`, instead of pixel_values.
            qformer_input_ids: (images, instruction tokens), for a Q-Former that reads the instruction.
            qformer_attention_mask: the same shape, 1 where a token counts.
        Returns:
            The ids with placeholders made valid, (batch, tokens); embeddings, (batch, tokens, hidden); image
            embeddings, (images, image_seq_length, hidden), or None without images.
        Raises:
            ValueError: both forms of images are given, or images and placeholders do not match. On a CPU it is raised
                before anything is computed.
        """
        if pixel_values is not None and vision_features is not None:
            raise ValueError("Got both pixel_values and vision_features; pass one of them.")
        images = pixel_values if pixel_values is not None else vision_features
        is_image = input_ids == self.config.image_token_id
        num_images = 0 if images is None else images.shape[0]
        check = check_image_tokens(is_image, num_images, self.image_seq_length)
        if self.qformer is not None and num_images and not torch.compiler.is_compiling():
            self.qformer.check_instructions(qformer_input_ids, num_images)
        neutral = neutral_token_id(self.language_model.config, self.generation_config)
        valid_ids = input_ids.masked_fill(is_image, neutral)
        inputs_embeds = self.get_input_embeddings()(valid_ids)
        if not num_images:
            check()
            if self.blank_image and torch.is_grad_enabled():
                blank = self._blank_features(inputs_embeds)
                inputs_embeds = inputs_embeds.masked_scatter(torch.zeros_like(is_image).unsqueeze(-1), blank)
            return valid_ids, inputs_embeds, None
        instructions = {"qformer_input_ids": qformer_input_ids, "qformer_attention_mask": qformer_attention_mask}
        image_features = self.get_image_features(pixel_values, vision_features, **instructions).pooler_output
        image_features = image_features.to(device=inputs_embeds.device, dtype=inputs_embeds.dtype)
        check()  # while the device is busy with the tower
        mask = is_image.unsqueeze(-1).to(inputs_embeds.device)
        return valid_ids, inputs_embeds.masked_scatter(mask, image_features), image_features

    def _blank_features(self, like: torch.Tensor) -> torch.Tensor:
        """Embed a black image and an instruction of one token, (1, image_seq_length, hidden)."""
        pixel_values = like.new_zeros(1, 3, *self.config.image_height_width)
        word = torch.zeros(1, 1, dtype=torch.long, device=like.device)
        instruction = {"qformer_input_ids": word, "qformer_attention_mask": torch.ones_like(word)}
        return self.get_image_features(pixel_values, **instruction).pooler_output.to(like)

    # ---- forward ----

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        vision_features: torch.Tensor | None = None,
        qformer_input_ids: torch.LongTensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: ModelOutput | tuple[torch.Tensor, ...] | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CromeVLMOutput | CromeVLMModelOutput | tuple[Any, ...]:
        """Run the language model over text and images.

        Args:
            input_ids: (batch, tokens); each image is image_seq_length placeholders. A row may have no, one or several
                images.
            pixel_values: (images, channels, height, width), in reading order over the batch.
            attention_mask: (batch, tokens), 1 where a token counts; padding may be on either side.
            position_ids: (batch, tokens); None: counted from each row's first token if the language model takes them.
            past_key_values: the language model's cache.
            inputs_embeds: (batch, tokens, hidden), instead of input_ids, with any images already in place.
            labels: (batch, tokens) for decoder-only, (batch, target tokens) for encoder-decoder; -100 and image
                placeholders are ignored.
            use_cache: whether the language model returns its cache.
            logits_to_keep: as in the language model, a number of tokens or which tokens; 0 keeps all.
            vision_features: (images, tokens, vision_width) from `get_vision_features`, instead of pixel_values.
            qformer_input_ids: (images, instruction tokens), for a Q-Former that reads the instruction.
            qformer_attention_mask: the same shape, 1 where a token counts.
            decoder_input_ids: (batch, target tokens); encoder-decoder only.
            decoder_attention_mask: (batch, target tokens); encoder-decoder only.
            encoder_outputs: the encoder's output, instead of input_ids; encoder-decoder only.
            return_dict: False returns a tuple.
            kwargs: passed to the language model. They include arguments of its loss: `num_items_in_batch`, and
                `shift_labels`, the label that each kept token predicts.
        Raises:
            ValueError: the inputs do not fit together.
        """
        has_images = pixel_values is not None or vision_features is not None
        sources = [value is not None for value in (input_ids, inputs_embeds, encoder_outputs)]
        if sum(sources) != 1 or (has_images and input_ids is None):
            raise ValueError(
                "Pass exactly one of input_ids, inputs_embeds and encoder_outputs, and images only with input_ids; "
                "model.embed_inputs(input_ids, pixel_values) makes inputs_embeds that hold the images."
            )
        image_features = valid_ids = None
        if input_ids is not None and cached_tokens(past_key_values) and not has_images:
            # In a later step of generation a sampled token is text, even if its id is the placeholder's.
            valid_ids, inputs_embeds = input_ids, self.get_input_embeddings()(input_ids)
        elif input_ids is not None:
            images = (pixel_values, vision_features, qformer_input_ids, qformer_attention_mask)
            valid_ids, inputs_embeds, image_features = self.embed_inputs(input_ids, *images)
        if inputs_embeds is not None:
            kwargs |= arguments_by_token(self.language_model, valid_ids, kwargs)
        if position_ids is None and attention_mask is not None and inputs_embeds is not None:
            position_ids = self._count_positions(attention_mask, inputs_embeds.shape[1])
        if self.config.is_encoder_decoder and input_ids is not None and attention_mask is not None:
            # Encoders with learned positions count from the first token, and so does generation.
            attention_mask, inputs_embeds = move_padding("right", attention_mask, inputs_embeds)
        if self.config.is_encoder_decoder and past_key_values is None:
            check_positions(self.language_model, inputs_embeds, labels if labels is not None else decoder_input_ids)
        if labels is not None:
            labels = labels.masked_fill(labels == self.config.image_token_id, -100)
        if (shifted := kwargs.get("shift_labels")) is not None:
            kwargs["shift_labels"] = shifted = shifted.masked_fill(shifted == self.config.image_token_id, -100)
        arguments = {
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "labels": labels,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep if isinstance(logits_to_keep, torch.Tensor) or logits_to_keep else None,
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
            "encoder_outputs": encoder_outputs,
        }
        arguments = {name: value for name, value in arguments.items() if value is not None}
        num_items = kwargs.pop("num_items_in_batch", None) if self._averages_by_itself() else None
        outputs = self._run_language_model(**arguments, **kwargs)
        if num_items is not None and labels is not None:
            logits, shifted = outputs.logits, labels if self.config.is_encoder_decoder else shifted
            outputs["loss"] = ForCausalLMLoss(logits, labels, logits.shape[-1], num_items, shift_labels=shifted)
        result = as_output(outputs, image_features, self._is_headless)
        return_dict = return_dict if return_dict is not None else self.config.return_dict
        return result if return_dict else result.to_tuple()

    def _run_language_model(self, **arguments: Any) -> ModelOutput:
        return self.language_model(**arguments, return_dict=True)

    def _count_positions(self, attention_mask: torch.Tensor, num_tokens: int) -> torch.LongTensor | None:
        """Count positions from each row's first token, so that training and generation agree under left padding."""
        if self.config.is_encoder_decoder or "position_ids" not in self._language_arguments:
            return None
        if attention_mask.ndim != 2 or attention_mask.shape[1] < num_tokens:
            return None
        first = attention_mask.ne(0).long().argmax(dim=1, keepdim=True)
        positions = torch.arange(attention_mask.shape[1], device=attention_mask.device) - first
        return positions.clamp(min=0)[:, -num_tokens:]

    # ---- from parts, to and from disk ----

    @classmethod
    def from_backbones(cls, vision: Any, language: Any, **kwargs: Any) -> "CromeVLMForConditionalGeneration":
        """Join a vision tower and a language model; see `assembly.from_backbones` for the arguments."""
        from .assembly import from_backbones

        return from_backbones(cls, vision, language, **kwargs)

    @classmethod
    def from_instructblip(cls, checkpoint: Any, *, language: Any, **kwargs: Any) -> "CromeVLMForConditionalGeneration":
        """Join a trained tower and Q-Former with any language model; see `instructblip.from_instructblip`."""
        from .instructblip import from_instructblip

        return from_instructblip(cls, checkpoint, language=language, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """Load a composite: backbones by name, then the stored weights; see `loading.load` for the arguments."""
        from .loading import load

        return load(cls, pretrained_model_name_or_path, *model_args, **kwargs)

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> Any:
        """Save the configuration and everything that was trained; see `saving.select_weights`."""
        from .saving import save

        return save(self, super().save_pretrained, save_directory, **kwargs)


class CromeVLMModel(CromeVLMForConditionalGeneration):
    """A composite up to its language model's last hidden states, as `LlavaModel` is for LLaVA.

    `composite.model` makes it from the composite's modules, so no saved key names it. It holds the whole language
    model, which scales, caps and ties its logits itself, but only the decoder runs.

    Raises:
        ValueError: labels are given, or the language model has no such decoder; see `check_head`.
    """

    _is_headless = True

    @property
    def model(self) -> "CromeVLMModel":
        """The model itself, which has no head."""
        raise AttributeError("model")

    def _run_language_model(self, **arguments: Any) -> ModelOutput:
        if "labels" in arguments:
            raise ValueError(
                "Got labels, and the model without its head has no loss. Write composite(..., labels=...)."
            )
        arguments.pop("logits_to_keep", None)
        check_head(self.language_model)
        return decoder_of(self.language_model)(**arguments, return_dict=True)


def _project(projection: nn.Module, features: torch.Tensor) -> torch.Tensor:
    """Run a projection in its weight's dtype and on its device."""
    weight = projection.weight  # a PEFT wrapper returns the active copy's weight
    if weight.is_floating_point():
        features = features.to(device=weight.device, dtype=weight.dtype)
    return projection(features)


__all__ = ["CromeVLMConfig", "CromeVLMForConditionalGeneration", "CromeVLMModel", "CromeVLMOutput"]
