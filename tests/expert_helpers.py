"""Rows, a collator and trainers for tiny models with experts."""

import tiny
import torch
from transformers import TrainingArguments

from roe_llava.training.expert_trainer import ExpertTrainer


def rows(number=8, labelled=2):
    """Examples of one length with a picture; `labelled` of a row's tokens, or as many more as its number is odd."""
    generator, data = torch.Generator().manual_seed(0), []
    for place in range(number):
        ids = torch.cat([torch.tensor([1, *[tiny.IMAGE] * 4]), torch.randint(3, 100, (7,), generator=generator)])
        labels = torch.full_like(ids, -100)
        count = labelled + place % 2
        labels[-count:] = ids[-count:]
        pixels = torch.randn(3, 28, 28, generator=generator)
        data.append(
            {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixels}
        )
    return data


def stack(examples):
    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}


def arguments(folder, steps=4, **settings):
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        report_to=[],
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
        **{"save_strategy": "no", "per_device_train_batch_size": 2, "learning_rate": 1e-2, **settings},
    )


def trainer_for(model, folder, stage, steps=4, data=None, trained_only=False, **settings):
    return ExpertTrainer(
        model,
        stage=stage,
        trained_only=trained_only,
        args=arguments(folder, steps, **settings),
        train_dataset=rows() if data is None else data,
        eval_dataset=rows(),
        data_collator=stack,
    )
