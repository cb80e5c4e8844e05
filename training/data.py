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


__all__ = ["ChatCollator"]
