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

"""Fine-tune a vision-language model on questions about images with CROME. See README.md for how to call it."""

import argparse

import torch
from datasets import load_dataset
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from peft import CromeConfig, get_peft_model


def get_collate_fn(processor):
    def get_conversation(example, answer):
        content = [{"type": "image", "image": example["image"]}, {"type": "text", "text": example["question"]}]
        conversation = [{"role": "user", "content": content}]
        if answer is not None:
            conversation.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return conversation

    def tokenize(conversations, **kwargs):
        return processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "right"},
            **kwargs,
        )

    def collate_fn(examples):
        batch = tokenize([get_conversation(example, example["answer"]) for example in examples])
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        # Learn the answers only, not the questions and the placeholders of the images
        for row, example in zip(labels, examples):
            prompt = tokenize([get_conversation(example, None)], add_generation_prompt=True)
            row[: prompt["input_ids"].shape[1]] = -100
        batch["labels"] = labels
        return batch

    return collate_fn


def main():
    parser = argparse.ArgumentParser(description="Fine-tune a vision-language model with CROME")
    parser.add_argument("--base_model", default="HuggingFaceTB/SmolVLM-256M-Instruct", help="Base model path or name")
    parser.add_argument(
        "--data_path", required=True, help="Dataset path or name, with the columns image, question and answer"
    )
    parser.add_argument("--output_dir", default="crome-smolvlm", help="Output directory for the adapter")
    parser.add_argument(
        "--target_modules", default=None, help="Comma-separated list of target modules, by default the projector"
    )
    parser.add_argument("--bottleneck_dim", type=int, default=256, help="Hidden features of the bottleneck")
    parser.add_argument("--batch_size", type=int, default=8, help="Batch size")
    parser.add_argument("--max_steps", type=int, default=500, help="Number of training steps")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="Learning rate")
    args = parser.parse_args()

    use_accelerator = torch.accelerator.is_available()
    dtype = torch.bfloat16 if use_accelerator else torch.float32
    processor = AutoProcessor.from_pretrained(args.base_model)
    model = AutoModelForImageTextToText.from_pretrained(args.base_model, dtype=dtype)
    config = CromeConfig(
        target_modules=args.target_modules.split(",") if args.target_modules else None,
        bottleneck_dim=args.bottleneck_dim,
    )
    model = get_peft_model(model, config)
    model.print_trainable_parameters()

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.output_dir,
            per_device_train_batch_size=args.batch_size,
            max_steps=args.max_steps,
            learning_rate=args.learning_rate,
            warmup_steps=args.max_steps // 20,
            lr_scheduler_type="cosine",
            bf16=use_accelerator,
            logging_steps=10,
            save_strategy="no",
            remove_unused_columns=False,  # the collator needs all columns
            label_names=["labels"],
            report_to="none",
        ),
        train_dataset=load_dataset(args.data_path, split="train"),
        data_collator=get_collate_fn(processor),
    )
    trainer.train()
    model.save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
