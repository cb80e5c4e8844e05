"""Answers questions with any LLaVA-like model and counts the exact matches."""

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from transformers import PreTrainedModel, ProcessorMixin

from .world import FAMILIES, TinyWorld, messages

MAX_ANSWER_TOKENS = 24  # the longest answer, a row of four forms, has 15 words and marks and the end token


@torch.inference_mode()
def answer(
    model: PreTrainedModel, processor: ProcessorMixin, examples: Sequence[dict], batch_size: int = 64, **generate_kwargs
) -> list[str]:
    """Answers the last question of each example; earlier turns stand in the prompt with their true answers.

    Args:
        model: anything with `generate` that takes what `processor` makes.
        examples: as made by `TinyWorld`.
        batch_size: prompts per batch, padded on the left.
        generate_kwargs: handed to `generate`, over greedy search with at most `MAX_ANSWER_TOKENS` new tokens.
    Returns: one answer per example, without special tokens.
    """
    settings = {"do_sample": False, "max_new_tokens": MAX_ANSWER_TOKENS, **generate_kwargs}
    answers: list[str] = []
    model.eval()
    for start in range(0, len(examples), batch_size):
        prompts = [messages(example)[:-1] for example in examples[start : start + batch_size]]
        inputs = processor.apply_chat_template(
            prompts,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        ).to(model.device, model.dtype)
        generated = model.generate(**inputs, **settings)
        sequences = generated if isinstance(generated, torch.Tensor) else generated.sequences
        answers += processor.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in answers]


def family_examples(family: str, number: int = 250, split: str = "test", seed: int = 0) -> list[dict]:
    """Held-out examples with one question each, all of one family."""
    return list(TinyWorld(split, number, seed=seed, num_turns=1, families=(family,)))


def with_shuffled_images(examples: Sequence[dict]) -> list[dict]:
    """The same questions and answers, each with the next example's picture: what can be told without looking?"""
    pictures = [example["image"] for example in examples]
    moved = [*pictures[1:], *pictures[:1]]
    return [{**example, "image": picture} for example, picture in zip(examples, moved, strict=True)]


def share_right(answers: Sequence[str], examples: Sequence[dict]) -> float:
    """Share of answers equal to the true answer of the example's last turn."""
    return sum(text == example["turns"][-1][1] for text, example in zip(answers, examples, strict=True)) / len(examples)


def most_common_share(examples: Sequence[dict]) -> float:
    """Share of the most common answer: what always giving that answer would score."""
    answers = Counter(example["turns"][-1][1] for example in examples)
    return answers.most_common(1)[0][1] / len(examples)


def accuracy_by_family(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    per_family: int = 250,
    families: Iterable[str] = tuple(FAMILIES),
    split: str = "test",
    seed: int = 0,
    shuffle_images: bool = False,
    batch_size: int = 64,
    **generate_kwargs,
) -> dict[str, float]:
    """Exact-match accuracy in [0, 1] of each family, on `per_family` single-turn questions of the split."""
    accuracy = {}
    for family in families:
        examples = family_examples(family, per_family, split, seed)
        shown = with_shuffled_images(examples) if shuffle_images else examples
        accuracy[family] = share_right(answer(model, processor, shown, batch_size, **generate_kwargs), examples)
    return accuracy
