"""Processor of a RoE model: the stock one, plus `routing_segments` (what routing tokens read) and labels on request.

`RoutedProcessor` is put in front of a stock processor; `RoeLlavaProcessor` is LLaVA's with it.

B batch, S sequence.
"""

from transformers import BatchFeature, LlavaConfig, LlavaProcessor, PreTrainedConfig

CONTEXT, UNREAD = 0, -1
ANSWER = -2  # while segments are worked out; unread, like padding, once labels are made


class RoutedProcessor:
    """Put in front of a stock processor: also says which token is context and which the question of which turn.

    Turns are told apart by the role tags of the chat template, whether the text came through `apply_chat_template` or
    was written by hand. Without a chat template there is one turn.

    Attributes:
        base_config_class: configuration of the stock model, by which the tokenizer's class is chosen.
    """

    base_config_class: type[PreTrainedConfig]

    def __call__(self, images=None, text=None, videos=None, audio=None, *, return_labels=False, **kwargs):
        """As in the stock processor, with one or two keys more.

        Args:
            return_labels: also return `labels` (B, S): the token id where a turn's answer is, its end token included,
                else -100.
            Others: as in the stock processor.
        Returns: its `BatchFeature` with `routing_segments` (B, S) int: 0 context (what precedes the first question,
            images and videos), t >= 1 question of turn t with its role tags, -1 answers and padding.
        Raises: ValueError if the tokenizer cannot tell which characters a token covers, and for routing arguments of
            `generate`.
        """
        check_no_routing(kwargs)
        if text is None:
            return super().__call__(images=images, text=text, videos=videos, audio=audio, **kwargs)
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"{type(self.tokenizer).__name__} is a slow tokenizer: routing segments need to know which characters "
                "a token covers. Load the fast one"
            )
        tensor_type = pop_tensor_type(kwargs)
        extras = {
            "offset_mapping": kwargs.pop("return_offsets_mapping", False),
            "text_replacement_offsets": kwargs.pop("return_text_replacement_offsets", False),
        }
        kwargs |= {"return_offsets_mapping": True, "return_text_replacement_offsets": True}
        data = super().__call__(images=images, text=text, videos=videos, audio=audio, **kwargs).data
        texts = [text] if isinstance(text, str) else list(text)
        segments = [self._row_segments(data, row, written) for row, written in enumerate(texts)]
        data["routing_segments"] = [[max(segment, UNREAD) for segment in row] for row in segments]
        if return_labels:
            data["labels"] = [
                [token if segment == ANSWER else -100 for token, segment in zip(ids, row, strict=True)]
                for ids, row in zip(data["input_ids"], segments, strict=True)
            ]
        data = {name: value for name, value in data.items() if extras.get(name, True)}
        return BatchFeature(data, tensor_type=tensor_type, skip_tensor_conversion=self.skip_tensor_conversion)

    @classmethod
    def _load_tokenizer_from_pretrained(cls, sub_processor_type, source, subfolder="", **kwargs):
        """The tokenizer that the stock processor would load from there."""
        # AutoTokenizer (5.23) reads a LLaVA's tokenizer.json as it is, whatever tokenizer_config.json says. For a
        # type it does not know it takes that class, and LlamaTokenizer sets its own blanks: not the base's tokens.
        # Without a config it would also ask whether the folder's code is trusted, though this class needs none of it.
        return super()._load_tokenizer_from_pretrained(
            sub_processor_type, source, subfolder=subfolder, **(kwargs | {"config": cls.base_config_class()})
        )

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "routing_segments"]

    def turn_tags(self) -> tuple[str, str] | None:
        """What the chat template writes where a later question and where an answer begin: ("USER:", "ASSISTANT:").

        Returns: `None` without a chat template, or if it writes nothing there.
        """
        if self.chat_template is None:
            return None
        said = ["first question", "first answer", "second question"]
        roles = ["user", "assistant", "user"]
        turns = [
            {"role": role, "content": [{"type": "text", "text": text}]} for role, text in zip(roles, said, strict=True)
        ]
        written = self.apply_chat_template(turns)
        _, _, rest = written.partition(said[0])
        before_answer, _, rest = rest.partition(said[1])
        before_question, _, _ = rest.partition(said[2])
        # The end token closes the answer; it is not where the next question begins.
        before_question = before_question.strip().removeprefix(self.tokenizer.eos_token or "")
        tags = before_question.strip(), before_answer.strip()
        return tags if all(tags) else None

    def _row_segments(self, data: dict, row: int, written: str) -> list[int]:
        """One segment per token, answers marked `ANSWER`: a token belongs where its last character does."""
        replaced = data["text_replacement_offsets"][row] if data["text_replacement_offsets"] else []
        text, done = "", 0
        for item in replaced:
            start, end = item["span"]
            text, done = text + written[done:start] + item["replacement"], end
        text += written[done:]
        of_characters = self._segments_of_characters(text, [item["new_span"] for item in replaced])
        mask = data["attention_mask"][row] if "attention_mask" in data else [1] * len(data["input_ids"][row])
        return [
            UNREAD if not real else CONTEXT if start == end else of_characters[end - 1]
            for (start, end), real in zip(data["offset_mapping"][row], mask, strict=True)
        ]

    def _segments_of_characters(self, text: str, image_spans: list[tuple[int, int]]) -> list[int]:
        """Segment of every character of a text whose image tokens are written out."""
        question_tag, answer_tag = self.turn_tags() or (None, None)
        segments, start, turn = [CONTEXT] * len(text), 0, 1
        if question_tag is not None:
            start = max(text.find(question_tag), 0)
        while start < len(text):
            answer = find(text, answer_tag, start)
            answer = min(answer + len(answer_tag or ""), len(text))  # the tag still belongs to the question
            following = find(text, question_tag, answer)
            images = [end for begin, end in image_spans if start <= begin < answer]
            begin = max(images, default=start) if turn == 1 else start
            segments[begin:answer] = [turn] * (answer - begin)
            segments[answer:following] = [ANSWER] * (following - answer)
            start, turn = following, turn + 1
        for begin, end in image_spans:
            segments[begin:end] = [CONTEXT] * (end - begin)
        return segments


def find(text: str, tag: str | None, start: int) -> int:
    """Where a tag comes next; the text's end if it does not."""
    place = -1 if tag is None else text.find(tag, start)
    return len(text) if place < 0 else place


def check_no_routing(kwargs: dict) -> None:
    """Raises: ValueError for arguments of `generate`, which a pipeline hands to the processor; it would drop them."""
    for name in ("routes", "route_bias", "skip_ratio"):
        if name in kwargs:
            raise ValueError(
                f"{name} given to the processor, but generate takes it: in a pipeline pass "
                f"generate_kwargs={{{name!r}: ...}}"
            )


def pop_tensor_type(kwargs: dict):
    """Take `return_tensors` out of a processor's keywords, nested ones included: tensors are made at the end."""
    tensor_type = kwargs.pop("return_tensors", None)
    for name in ("text_kwargs", "common_kwargs"):
        if "return_tensors" in kwargs.get(name, {}):
            nested = dict(kwargs[name])
            tensor_type = nested.pop("return_tensors") or tensor_type
            kwargs[name] = nested
    return tensor_type


class RoeLlavaProcessor(RoutedProcessor, LlavaProcessor):
    """`LlavaProcessor` that also says which token is context and which the question of which turn."""

    base_config_class = LlavaConfig


RoeLlavaProcessor.register_for_auto_class()

__all__ = ["RoeLlavaProcessor", "RoutedProcessor"]
