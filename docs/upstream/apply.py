"""Apply the offer to a checkout of PEFT: copy the new files, and insert lines into PEFT's own tables.

    python docs/upstream/apply.py PATH_TO_PEFT

Lines are inserted by their neighbors and not by line numbers, so that the script works on several releases. Files that
a source distribution lacks, such as the table of contents of the docs, are left out and named.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

NEW_FILES = Path(__file__).parent / "peft"
MAPPING = "TRANSFORMERS_MODELS_TO_CROME_TARGET_MODULES_MAPPING"

# The last linear layer of the projector. Its output, unlike that of the projector's own class, is always a tensor.
CONSTANTS = f"""\
# The modules whose output enters the language model, most often the last layer of the projector
{MAPPING} = {{
    "aya_vision": ["multi_modal_projector.linear_2"],
    "blip-2": ["language_projection"],
    "gemma3": ["multi_modal_projector"],
    "idefics3": ["modality_projection.proj"],
    "instructblip": ["language_projection"],
    "internvl": ["multi_modal_projector.linear_2"],
    "llama4": ["multi_modal_projector.linear_1"],
    "llava": ["multi_modal_projector.linear_2"],
    "llava_next": ["multi_modal_projector.linear_2"],
    "llava_onevision": ["multi_modal_projector.linear_2"],
    "mistral3": ["multi_modal_projector.linear_2"],
    "paligemma": ["multi_modal_projector.linear"],
    "qwen2_5_vl": ["visual.merger.mlp.2"],
    "qwen2_vl": ["visual.merger.mlp.2"],
    "qwen3_vl": ["visual.merger.linear_fc2"],
    "smolvlm": ["modality_projection.proj"],
    "vipllava": ["multi_modal_projector.linear_2"],
}}

"""

CUSTOM_MODELS = """\
    #########
    # CROME #
    #########
    ("Vanilla MLP 1 CROME", "MLP", CromeConfig, {"target_modules": "lin0", "bottleneck_dim": 4}),
    ("Vanilla MLP 2 CROME", "MLP", CromeConfig, {"target_modules": ["lin0"], "bottleneck_dim": 4}),
    ("Vanilla MLP 3 CROME", "MLP", CromeConfig, {"target_modules": ["lin1"], "bottleneck_dim": 4}),
    (
        "Vanilla MLP 4 CROME",
        "MLP",
        CromeConfig,
        {"target_modules": ["lin0"], "bottleneck_dim": 4, "modules_to_save": ["lin1"]},
    ),
    (
        "Vanilla MLP 5 CROME",
        "MLP",
        CromeConfig,
        {"target_modules": ["lin0"], "bottleneck_dim": 4, "gate_activation": "sigmoid"},
    ),
    ("Embedding + transformers Conv1D 1 CROME", "EmbConv1D", CromeConfig, {"target_modules": ["emb"]}),
"""

ACTIVE_ADAPTERS = """\
    (
        "CROME Same",
        "crome",
        CromeConfig,
        {"target_modules": ["lin0"], "bottleneck_dim": 4, "init_weights": False},
        {"target_modules": ["lin0"], "bottleneck_dim": 4, "init_weights": False},
    ),
    (
        "CROME Different",
        "crome",
        CromeConfig,
        {"target_modules": ["lin0"], "bottleneck_dim": 4, "init_weights": False},
        {"target_modules": ["lin1"], "bottleneck_dim": 4, "init_weights": False},
    ),
"""

SKIP_MERGING = """\
    if issubclass(config_cls, CromeConfig) and (config_kwargs["target_modules"] != ["emb"]):
        # see test_crome.py for the embedding tables of transformers models
        pytest.skip("CROME can only be merged into embedding tables whose weight is not tied.")
"""

SKIP_PREPARE = """\
        if issubclass(config_cls, CromeConfig):
            # incompatible because CROME adapts the embeddings, which then require gradients
            pytest.skip("CROME is incompatible with this test.")
"""


def row(task_type: str, target_modules: str) -> str:
    """The method's line in the test matrix of one kind of model."""
    return f"""\
    (
        CromeConfig,
        {{
            "task_type": "{task_type}",
            "target_modules": r"{target_modules}",
            "bottleneck_dim": 8,
        }},
    ),
"""


CONFIG_IMPORT = ("before", "\n    DeftConfig,\n", "\n    CromeConfig,")
TABLE_OF_CONTENTS = "{0}- local: package_reference/crome\n{0}  title: CROME\n"
NEXT_ROW = "    (\n        DeloraConfig,\n"

# file -> where, the lines beside it, the lines to insert
EDITS: dict[str, list[tuple[str, str, str]]] = {
    "src/peft/utils/peft_types.py": [("after", '    DEFT = "DEFT"\n', '    CROME = "CROME"\n')],
    "src/peft/utils/constants.py": [
        ("before", "TRANSFORMERS_MODELS_TO_BEFT_TARGET_MODULES_MAPPING = {\n", CONSTANTS),
    ],
    **{
        f"src/peft/utils/{name}.py": [
            ("after", "    TRANSFORMERS_MODELS_TO_C3A_TARGET_MODULES_MAPPING,\n", f"    {MAPPING},\n"),
            ("after", '    "TRANSFORMERS_MODELS_TO_C3A_TARGET_MODULES_MAPPING",\n', f'    "{MAPPING}",\n'),
        ]
        for name in ("other", "__init__")
    },
    "src/peft/tuners/__init__.py": [
        ("before", "from .deft import ", "from .crome import CromeConfig, CromeModel\n"),
        ("before", '    "DeftConfig",\n', '    "CromeConfig",\n    "CromeModel",\n'),
    ],
    "src/peft/__init__.py": [
        ("before", "    DeftConfig,\n", "    CromeConfig,\n    CromeModel,\n"),
        ("before", '    "DeftConfig",\n', '    "CromeConfig",\n    "CromeModel",\n'),
    ],
    "docs/source/_toctree.yml": [
        ("before", "      - local: package_reference/layernorm_tuning\n", TABLE_OF_CONTENTS.format("      ")),
        (
            "before",
            "    - local: package_reference/deft\n      title: DEFT\n    - local: package_reference/delora\n",
            TABLE_OF_CONTENTS.format("    "),
        ),
    ],
    "tests/testing_common.py": [
        ("after", "    CPTConfig,\n", "    CromeConfig,\n"),
        ("before", "\n\ndef _skip_if_adding_weighted_adapters_not_supported(", SKIP_MERGING),
        ("before", "\n        # some tests require specific tokenizers, make sure", SKIP_PREPARE),
    ],
    "tests/test_config.py": [CONFIG_IMPORT, ("before", "    (DeloraConfig, {}),\n", "    (CromeConfig, {}),\n")],
    "tests/test_custom_models.py": [
        CONFIG_IMPORT,
        ("before", "]\nALL_PEFT_CONFIG_CLASSES = ", CUSTOM_MODELS),
        ("before", "]\n\n\ndef _skip_tests_with_multiple_adapters_with_target_parameters(", ACTIVE_ADAPTERS),
    ],
    "tests/test_decoder_models.py": [
        CONFIG_IMPORT,
        ("before", NEXT_ROW, row("CAUSAL_LM", r".*\.(embed_tokens|wte)")),
    ],
    "tests/test_encoder_decoder_models.py": [
        CONFIG_IMPORT,
        ("before", NEXT_ROW, row("SEQ_2_SEQ_LM", r".*\.embed_tokens")),
    ],
    "tests/test_feature_extraction_models.py": [
        CONFIG_IMPORT,
        ("before", NEXT_ROW, row("FEATURE_EXTRACTION", r".*\.?word_embeddings")),
    ],
    "tests/test_seq_classifier.py": [
        CONFIG_IMPORT,
        ("before", NEXT_ROW, row("SEQ_CLS", r".*\.(word_embeddings|embed_tokens)")),
    ],
}


def apply(checkout: Path) -> list[str]:
    """Copy and edit; returns the edited files that the checkout does not have.

    Raises:
        ValueError: a line of PEFT beside which to insert is not there once. Nothing is written then.
    """
    edited, absent = {}, []
    for name, edits in EDITS.items():
        path = checkout / name
        if not path.is_file():
            absent.append(name)
            continue
        text = path.read_text(encoding="utf-8")
        for where, anchor, lines in edits:
            if (count := text.count(anchor)) != 1:
                raise ValueError(f"{name} has {anchor!r} {count} times, expected once. Adapt the edits in apply.py.")
            text = text.replace(anchor, lines + anchor if where == "before" else anchor + lines)
        edited[path] = text
    for path, text in edited.items():
        path.write_text(text, encoding="utf-8")
    shutil.copytree(NEW_FILES, checkout, dirs_exist_ok=True)
    return absent


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("Write python docs/upstream/apply.py PATH_TO_PEFT.")
    for missing in apply(Path(sys.argv[1])):
        print(f"left out, since the checkout does not have it: {missing}")
