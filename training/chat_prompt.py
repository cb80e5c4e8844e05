"""What a chat template must do for training, asked of the template itself, and a template for those that do not."""

from dataclasses import dataclass

LLAVA_IMAGE = "<image>"  # the placeholder in LLaVA's data

# llava-hf's prompt for LLaVA-1.5, with the end token after every answer that LLaVA was trained with and llava-hf's own
# template leaves out: "SYSTEM USER: <image>\nquestion ASSISTANT: answer</s>USER: ..."
CLOSED_TEMPLATE = (
    "{% for message in messages %}{% set content = message['content'] %}"
    "{% if content is string %}{% set content = [{'type': 'text', 'text': content}] %}{% endif %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in content if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in content if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ eos_token if message['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@dataclass(frozen=True)
class ChatPrompt:
    """What rows have to know of a processor's chat template.

    Attributes:
        question_tag, answer_tag: what it writes where a question and where an answer begin ("USER:", "ASSISTANT:").
        image_token: what stands for an image in the prompt.
        images_in_place: images stay between the texts around them; else they come first in their message, as with
            LLaVA-1.5.
    """

    question_tag: str
    answer_tag: str
    image_token: str
    images_in_place: bool


def message(role: str, *parts: str | None) -> dict:
    """A chat message of texts and, for `None`, images."""
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": content}


def chat_prompt(processor) -> ChatPrompt:
    """Asks a processor's chat template what it writes.

    Raises: ValueError if the processor is not RoE's, or its template cannot be used for training: none at all, no role
        tags, or no end token after an answer.
    """
    if not hasattr(processor, "turn_tags"):
        raise ValueError(
            f"{type(processor).__name__} makes no labels and routing segments: load the processor with "
            "RoeLlavaProcessor.from_pretrained"
        )
    tags = processor.turn_tags()
    if tags is None:
        raise ValueError(
            "the processor has no chat template, or one that writes no role tags: without them questions and answers "
            "cannot be told apart. Set processor.chat_template"
        )
    if not closes_answers(processor):
        raise ValueError(
            f"the chat template writes no end token ({processor.tokenizer.eos_token!r}) after an answer, so that a "
            "model trained with it never stops. Call close_answers(processor) first (llava-hf's LLaVA-1.5), or set "
            "a template that does"
        )
    written = processor.apply_chat_template([message("user", "before", None, "behind")])
    in_place = written.find("before") < written.find(processor.image_token) < written.find("behind")
    return ChatPrompt(*tags, image_token=processor.image_token, images_in_place=in_place)


def closes_answers(processor) -> bool:
    """Whether an end token follows the last answer: the tokenizer's own, or another special one, as Llama-3's is."""
    written = processor.apply_chat_template([message("user", "question"), message("assistant", "the answer")])
    special = (str(token) for token in processor.tokenizer.added_tokens_decoder.values() if token.special)
    return written.partition("the answer")[2].lstrip().startswith((processor.tokenizer.eos_token, *special))


def close_answers(processor) -> bool:
    """Give llava-hf's LLaVA-1.5 template the end token after every answer. Prompts of one question stay as they were;
    behind earlier answers the end token stands where a blank stood, as in LLaVA's own training.

    Args:
        processor: its `chat_template` is set, and saved with it.
    Returns: whether anything had to be changed.
    Raises: ValueError if the template writes other prompts than llava-hf's, so that it cannot be replaced.
    """
    if closes_answers(processor):
        return False
    asked = [message("user", None, None, "question")]
    for chat in (asked, [message("system", "system text"), *asked]):
        before, after = (
            processor.apply_chat_template(chat, add_generation_prompt=True, chat_template=template)
            for template in (processor.chat_template, CLOSED_TEMPLATE)
        )
        if before != after:
            raise ValueError(
                f"the chat template writes no end token after an answer, and it is not llava-hf's: it writes {before!r}"
                f", not {after!r}. Set a processor.chat_template that writes the end token"
            )
    processor.chat_template = CLOSED_TEMPLATE
    return True


__all__ = ["CLOSED_TEMPLATE", "ChatPrompt", "chat_prompt", "close_answers"]
