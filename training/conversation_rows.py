"""One row of training data, LLaVA's or a chat, as chat messages beside a list of images; and what is wrong with it.

Nothing here opens an image.
"""

import os
from pathlib import Path

from .bad_rows import RowError
from .chat_prompt import LLAVA_IMAGE, ChatPrompt

LLAVA_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
CHAT_ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
ROW_FIELDS = ("conversations", "messages", "images", "image", "id")

Image = str | dict  # a path, or {"bytes": ..., "path": ...} as `datasets` stores images


def chat_of_row(row: dict, prompt: ChatPrompt, image_folder: Path) -> dict:
    """A row of either format as {"messages": chat messages, "images": [path or bytes, ...]}.

    Image parts are {"type": "image"}, in the order of the images; text parts {"type": "text", "text": ...}. Relative
    image paths are taken from `image_folder`. What this returns is itself a row, and gives itself.

    Raises: RowError for a row that cannot be used, as far as that can be seen without opening images.
    """
    if not isinstance(row, dict):
        raise RowError("wrong type", f"a row must be an object, got {kind(row)}")
    if row.get("conversations") is not None:
        messages, images = chat_of_llava(row, prompt)
    elif row.get("messages") is not None:
        messages, images = chat_of_messages(row, prompt)
    else:
        raise RowError("wrong type", f"neither conversations nor messages among {sorted(map(str, row))}")
    check_order(messages)
    check_texts(messages, prompt)
    check_image_count(messages, images)
    return {"messages": messages, "images": [located(image, image_folder) for image in images]}


def chat_of_llava(row: dict, prompt: ChatPrompt) -> tuple[list[dict], list[Image]]:
    """Messages and images of {"image": path or paths, "conversations": [{"from": ..., "value": ...}, ...]}."""
    messages = []
    for turn, said in enumerate(typed(row["conversations"], list, "conversations")):
        said = typed(said, dict, f"conversations[{turn}]")
        text = typed(said.get("value"), str, f"value of conversations[{turn}]")
        role = role_of(said.get("from"), LLAVA_ROLES, f"from of conversations[{turn}]")
        messages.append({"role": role, "content": parts_of_text(text, prompt)})
    return messages, images_of(row.get("image"), "image")


def chat_of_messages(row: dict, prompt: ChatPrompt) -> tuple[list[dict], list[Image]]:
    """Messages and images of {"messages": [{"role": ..., "content": text or parts}, ...], "images": [...]}.

    Images stand in the row, in the parts, or in both: a part without one takes the row's next. If every content is a
    text without placeholders, the row's images come before the first question, as in TRL.
    """
    waiting = images_of(row.get("images"), "images") + images_of(row.get("image"), "image")
    messages, images, listed = [], [], False
    for turn, said in enumerate(typed(row["messages"], list, "messages")):
        said = typed(said, dict, f"messages[{turn}]")
        role = role_of(said.get("role"), CHAT_ROLES, f"role of messages[{turn}]")
        content = said.get("content")
        if isinstance(content, str):
            found = [(part, None) for part in parts_of_text(content, prompt)]
        else:
            listed = True
            content = typed(content, list, f"content of messages[{turn}]")
            found = [part_of(part, f"content of messages[{turn}]") for part in content]
        for part, image in found:
            if part["type"] == "image":
                images.append(image if image is not None else waiting.pop(0) if waiting else None)
        messages.append({"role": role, "content": [part for part, _ in found]})
    if waiting and not images and not listed:
        first = next((said for said in messages if said["role"] == "user"), {"content": []})
        first["content"][:0] = [{"type": "image"} for _ in waiting]
    given = [image for image in images if image is not None] + waiting
    return messages, given


def part_of(part, where: str) -> tuple[dict, Image | None]:
    """A part of a content list, and the image inside it if there is one."""
    part = typed(part, dict, f"a part in {where}")
    if part.get("type") == "text":
        return {"type": "text", "text": typed(part.get("text"), str, f"text in {where}")}, None
    if part.get("type") != "image":
        raise RowError("wrong type", f"a part in {where} is of type {part.get('type')!r}, expected text or image")
    held = [part[name] for name in ("image", "path", "url") if part.get(name) is not None]
    return {"type": "image"}, image_of(held[0], f"image in {where}") if held else None


def parts_of_text(text: str, prompt: ChatPrompt) -> list[dict]:
    """A text with LLaVA's placeholders as parts.

    Where the template puts images first, the text is what LLaVA makes of it: placeholders taken out, ends stripped.
    Else images stand where the placeholders did. The newline behind a placeholder is the template's to write.
    """
    if LLAVA_IMAGE not in text:
        return [{"type": "text", "text": text}]
    if not prompt.images_in_place:
        rest = text.replace(LLAVA_IMAGE, "").strip()
        return [{"type": "image"}] * text.count(LLAVA_IMAGE) + [{"type": "text", "text": rest}]
    parts = []
    for number, piece in enumerate(text.strip().split(LLAVA_IMAGE)):
        if number:
            parts.append({"type": "image"})
            piece = piece.removeprefix("\n")
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


# ---------------------------------------- checks


def check_order(messages: list[dict]) -> None:
    """Raises: RowError unless a system message comes first if at all, then questions and answers in turn."""
    spoken = messages[1:] if messages and messages[0]["role"] == "system" else messages
    for turn, said in enumerate(spoken, start=len(messages) - len(spoken)):
        expected = ("user", "assistant")[(turn - len(messages) + len(spoken)) % 2]
        if said["role"] != expected:
            raise RowError("roles out of order", f"message {turn} is the {said['role']}'s, expected the {expected}'s")
    if not spoken or spoken[-1]["role"] != "assistant":
        raise RowError("no answer", "nothing is answered" if len(spoken) < 2 else "the last question has no answer")


def check_texts(messages: list[dict], prompt: ChatPrompt) -> None:
    """Raises: RowError for an empty answer, or a text that the template's own marks would be confused with."""
    foreign = {
        "system": (prompt.question_tag, prompt.answer_tag),
        "user": (prompt.answer_tag,),
        "assistant": (prompt.question_tag,),
    }
    for turn, said in enumerate(messages):
        text = "".join(part["text"] for part in said["content"] if part["type"] == "text")
        if said["role"] == "assistant" and not text.strip():
            raise RowError("empty answer", f"message {turn} says {text!r}")
        if said["role"] != "user" and any(part["type"] == "image" for part in said["content"]):
            raise RowError("image count", f"message {turn} is the {said['role']}'s and holds an image")
        if prompt.image_token in text:
            raise RowError("image count", f"message {turn} holds {prompt.image_token!r} within a text part")
        for tag in foreign[said["role"]]:
            if tag in text:
                raise RowError("role tag in text", f"message {turn}, the {said['role']}'s, holds {tag!r}")


def check_image_count(messages: list[dict], images: list[Image]) -> None:
    """Raises: RowError unless there is one image per placeholder."""
    placeholders = sum(part["type"] == "image" for said in messages for part in said["content"])
    if placeholders != len(images):
        raise RowError("image count", f"{placeholders} image placeholders, {len(images)} images")


def check_files(images: list[Image]) -> None:
    """Raises: RowError for an image that is not there."""
    for image in images:
        path = image if isinstance(image, str) else None if image.get("bytes") is not None else image["path"]
        if path is not None and "://" in path:
            raise RowError("missing image", f"{path} is an address and nothing is fetched: give a file")
        if path is not None and not os.path.isfile(path):
            raise RowError("missing image", f"no file {path}")


# ---------------------------------------- fields


def typed(value, wanted: type, name: str):
    """A value of the wanted type.

    Raises: RowError if it is another.
    """
    if not isinstance(value, wanted):
        raise RowError("wrong type", f"{name} must be {WANTED[wanted]}, got {kind(value)}")
    return value


WANTED = {list: "a list", dict: "an object", str: "a text"}


def kind(value) -> str:
    """A value for messages, cut short."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def role_of(name, roles: dict[str, str], where: str) -> str:
    """Raises: RowError for a role that is not known."""
    if not isinstance(name, str) or name not in roles:
        raise RowError("unknown role", f"{where} is {name!r}, expected one of {', '.join(roles)}")
    return roles[name]


def images_of(value, name: str) -> list[Image]:
    """Images of a field that holds one, several, or none (absent, null or an empty text)."""
    if value is None or value == "":
        return []
    return [image_of(image, name) for image in (value if isinstance(value, list) else [value])]


def image_of(value, name: str) -> Image:
    """Raises: RowError for what is neither a path nor a stored image."""
    if isinstance(value, str) and value:
        return value
    if isinstance(value, dict) and (isinstance(value.get("bytes"), bytes) or value.get("path")):
        path = value.get("path") or None
        return {"bytes": value.get("bytes"), "path": None if path is None else typed(path, str, f"path of {name}")}
    raise RowError("wrong type", f"{name} must be a path or an image, got {kind(value)}")


def located(image: Image, folder: Path) -> Image:
    """An image whose relative path is taken from the folder."""
    if isinstance(image, str):
        return image if "://" in image else str(folder / image)
    if image["bytes"] is None:
        return {**image, "path": located(image["path"], folder)}
    return image


__all__ = ["ROW_FIELDS", "chat_of_row", "check_files"]
