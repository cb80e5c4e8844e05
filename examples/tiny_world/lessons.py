"""What the base is trained on: questions, and two kinds of grounding turns that name what is where.

Questions alone teach the base the common answers and nothing about the picture. A "tour" names all cells in random
order ("b3 large red circle c1 none ..."), and "look-ups" are short questions about one thing; with them it starts to
look.
"""

import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaProcessor

from .processor import ASSISTANT
from .world import CELLS, IMAGE_PIXELS, PRACTICE, Scene, Turn, messages, questions, random_scene, render

LOOKUPS = ("object", "object", "where", "color", "exist", "count")
NUM_TURNS = 4
LESSONS = ("tour", "lookups", "questions", "questions", "questions")  # one entry per batch, in turn
LESSONS_AFTER = ("questions", "lookups", "questions")  # once cells are found
TOURS_FIRST = 400  # batches of tours alone at the start: nothing else is learned before cells are found
IGNORED = -100


def tour(scene: Scene, rng: random.Random) -> Turn:
    """All cells in random order, each followed by what it holds."""
    order = rng.sample(range(len(CELLS)), len(CELLS))
    return "Name all cells.", " ".join(f"{CELLS[cell]} {scene.name(cell)}" for cell in order), "tour"


class Lessons(torch.utils.data.Dataset):
    """Training conversations in the order in which they are to be read; all of a batch have the same kind.

    Args:
        size: number of conversations.
        batch_size: conversations per step, so that the kind changes with the batch and little is padded.
        seed: another seed gives other scenes.
        families: families to ask about.
        tours_first: batches at the start that are tours alone.
        lessons: kinds of the batches behind them, in turn.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int = 0,
        families: Sequence[str] = tuple(PRACTICE),
        tours_first: int = TOURS_FIRST,
        lessons: Sequence[str] = LESSONS,
    ):
        self.size, self.batch_size, self.seed, self.families = size, batch_size, seed, tuple(families)
        self.tours_first, self.lessons = tours_first, tuple(lessons)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        """An example as `TinyWorld` makes them, made anew for each index."""
        rng = random.Random(f"lessons/{self.seed}/{index}")
        scene = random_scene(rng, "train")
        batch = index // self.batch_size
        lesson = "tour" if batch < self.tours_first else self.lessons[batch % len(self.lessons)]
        if lesson == "tour":
            turns = [tour(scene, rng)]
        elif lesson == "lookups":
            turns = questions(scene, rng, [family for family in LOOKUPS if family in self.families])
        else:
            turns = questions(scene, rng, self.families)[:NUM_TURNS]
        return {"image": render(scene), "turns": turns}


def answer_labels(input_ids: Tensor, start_id: int, end_id: int) -> Tensor:
    """The tokens to be predicted: what follows "ASSISTANT:", up to and with the end token.

    Args:
        input_ids: (B, S); padding stands on the right.
        start_id: token that opens an answer.
        end_id: token that ends it.
    Returns: (B, S) token ids, `IGNORED` outside of answers.
    """
    opened = (input_ids == start_id).cumsum(dim=1)
    closed = (input_ids == end_id).cumsum(dim=1)
    is_answer = (opened > closed - (input_ids == end_id).long()) & (input_ids != start_id)
    return input_ids.masked_fill(~is_answer, IGNORED)


class LessonCollator:
    """Examples to a training batch, ten times as fast as the processor and equal to it for 56x56 pictures.

    No attention mask is made: padding stands on the right, where causal attention never lets an answer see it.
    """

    def __init__(self, processor: LlavaProcessor):
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.image_text = (
            processor.image_token * (processor.image_processor.size["height"] // processor.patch_size) ** 2
        )
        self.start_id = self.tokenizer.convert_tokens_to_ids(ASSISTANT)
        self.cell_ids = torch.tensor(self.tokenizer.convert_tokens_to_ids(list(CELLS)))

    def __call__(self, examples: Sequence[dict]) -> dict[str, Tensor]:
        """`input_ids` and `labels` (B, S), `pixel_values` (B, 3, side, side)."""
        texts = self.processor.apply_chat_template([messages(example) for example in examples], tokenize=False)
        texts = [text.replace(self.processor.image_token, self.image_text) for text in texts]
        input_ids = self.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
        labels = answer_labels(input_ids, self.start_id, self.tokenizer.eos_token_id)
        # The order of a tour is random: its cell names are read, not predicted.
        on_tour = torch.tensor([example["turns"][0][2] == "tour" for example in examples])[:, None]
        labels = labels.masked_fill(on_tour & torch.isin(input_ids, self.cell_ids), IGNORED)
        return {"input_ids": input_ids, "labels": labels, "pixel_values": pixels(examples, self.processor)}


def pixels(examples: Sequence[dict], processor: LlavaProcessor) -> Tensor:
    """Pictures as the image processor would give them: (B, 3, side, side) in [-1, 1]."""
    if processor.image_processor.size["height"] != IMAGE_PIXELS:
        pictures = [example["image"] for example in examples]
        return processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    stacked = np.stack([np.asarray(example["image"]) for example in examples])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1
