"""From chats to batches: the processor writes prompts, labels and routing segments of every turn."""

from collections.abc import Callable, Sequence


class ChatCollator:
    """Turns examples into a training batch.

    Args:
        processor: a `RoeLlavaProcessor` with a chat template.
        messages: example -> Hugging Face chat messages, images inside.
    """

    def __init__(self, processor, messages: Callable[[dict], list[dict]]):
        self.processor, self.messages = processor, messages

    def __call__(self, examples: Sequence[dict]) -> dict:
        """input_ids, attention_mask, labels, routing_segments (B, S) and pixel_values of the examples."""
        return self.processor.apply_chat_template(
            [self.messages(example) for example in examples],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "return_labels": True},
        ).data


def spread_over(size: int, number: int) -> list[int]:
    """Numbers of so many rows (all if there are fewer), spread evenly over a dataset of a size."""
    return sorted({index * size // number for index in range(number)})


def batches_of(dataset, indices: Sequence[int], batch_size: int, collate: Callable) -> list[dict]:
    """Rows with these numbers as batches."""
    starts = range(0, len(indices), batch_size)
    return [collate([dataset[index] for index in indices[start : start + batch_size]]) for start in starts]


__all__ = ["ChatCollator", "batches_of", "spread_over"]
