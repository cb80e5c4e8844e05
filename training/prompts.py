"""From chats to prompts: what a model is asked, without the answer that its data has for it."""

from collections.abc import Iterable, Sequence
from pathlib import Path

# What a processor opens an image from, in a message's image part.
IMAGE_SOURCES = ("image", "path", "url", "base64")


def prompts_from(
    rows: Iterable[dict],
    processor,
    batch_size: int = 8,
    image_folder: str | Path | None = None,
    names: Sequence[str] | None = None,
) -> list:
    """Batches of prompts from rows of Hugging Face chat messages: the last answer is taken off, earlier ones stay.

    Args:
        rows: `{"messages": [...], "images": [...]}` each; `images` (paths, URLs or PIL images) fill the image parts of
            the messages in order, and may be left out where those hold their images themselves.
        processor: a `RoeLlavaProcessor` with a chat template.
        batch_size: prompts per batch, padded on the left.
        image_folder: where relative paths begin.
        names: of the rows, for messages; by default their numbers.
    Returns: a list of what the processor makes.
    Raises: ValueError naming the row if it is no chat, asks nothing, or has another number of images than places for
        them; naming the batch if an image cannot be read; or if the processor has no chat template.
    """
    if processor.chat_template is None:
        raise ValueError("the processor has no chat template, so it cannot write a chat: give it one (chat_template)")
    rows = list(rows)
    names = [f"row {index}" for index in range(len(rows))] if names is None else names
    chats = []
    for name, row in zip(names, rows, strict=True):
        try:
            chats.append(prompt_of(row, image_folder))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            reason = error if isinstance(error, ValueError) else f"it is no chat ({type(error).__name__}: {error})"
            raise ValueError(f"{name}: {reason}") from error
    batches = []
    for start in range(0, len(chats), batch_size):
        try:
            batches.append(encoded(chats[start : start + batch_size], processor))
        except (ValueError, OSError) as error:
            among = ", ".join(names[start : start + batch_size])
            raise ValueError(f"a prompt among {among} cannot be made: {error}") from error
    return batches


def encoded(chats: list[list[dict]], processor):
    """Chats as a batch that ends where the answers begin."""
    return processor.apply_chat_template(
        chats,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )


def prompt_of(row: dict, image_folder: str | Path | None = None) -> list[dict]:
    """A row's messages up to its last question, every image part with its image.

    Raises: ValueError as `prompts_from`.
    """
    are_texts = all(isinstance(message["content"], str) for message in row["messages"])
    messages = [{**message, "content": parts_of(message["content"])} for message in row["messages"]]
    if are_texts and row.get("images"):  # as in training: images come before the first question
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is not None:
            first["content"] = [{"type": "image"} for _ in row["images"]] + first["content"]
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1]["role"] != "user":
        raise ValueError("it has no question, expected messages that end with one by the user, or with its answer")
    places = [part for message in messages for part in message["content"] if part["type"] == "image"]
    empty = [part for part in places if not any(part.get(name) is not None for name in IMAGE_SOURCES)]
    images = list(row.get("images") or [])
    if len(images) != len(empty):
        raise ValueError(
            f"it has {len(images)} images for {len(empty)} image parts without one, expected as many: a part is "
            '{"type": "image"} in a message\'s content'
        )
    for part, image in zip(empty, images, strict=True):
        part["image"] = image
    for part in places:
        for name in IMAGE_SOURCES[:2]:
            if isinstance(part.get(name), str | Path):
                part[name] = found_image(part[name], image_folder)
    return messages


def parts_of(content) -> list[dict]:
    """A message's content as parts of its own: text alone may stand as a string."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    # Tables of parts fill what a part does not have with null.
    return [{name: value for name, value in part.items() if value is not None} for part in content]


def found_image(image: str | Path, folder: str | Path | None) -> str:
    """Where an image is: a URL as it is, a path from the folder on.

    Raises: ValueError if there is no such file.
    """
    if str(image).startswith(("http://", "https://", "data:")):
        return str(image)
    path = Path(folder or ".") / image
    if not path.is_file():
        raise ValueError(f"its image {path} is not there: do paths begin in another folder (--images)?")
    return str(path)


__all__ = ["prompt_of", "prompts_from"]
