"""Rows of training data in LLaVA's format and as chats, and batches made of them."""

import json

import torch
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from roe_llava.training.conversations import ConversationCollator, load_conversations


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def row(*said, image=None, **fields):
    """A row in LLaVA's format."""
    return fields | ({} if image is None else {"image": image}) | {"conversations": list(said)}


CIRCLE = row(human("<image>\nwhat colour is the circle?"), gpt("red"), image="0.png", id="circle")
TURNS = row(
    human("<image>\nwhat colour is the circle?"),
    gpt("red"),
    human("how many squares?"),
    gpt("two squares"),
    human("where is it?"),
    gpt("left of it"),
    image="1.png",
    id="turns",
)
TWO_IMAGES = row(human("<image>\n<image>\nwhere is it?"), gpt("left"), image=["0.png", "2.png"], id="two")
TEXT = row(human("how many squares?"), gpt("two"), id="text")
SYSTEM = row({"from": "system", "value": "A helpful A."}, human("how many?"), gpt("two"), id="system")
GOOD = [CIRCLE, TURNS, TWO_IMAGES, TEXT, SYSTEM]


def write(folder, rows, name="train.json"):
    """The rows as a file."""
    lines = "\n".join(json.dumps(one) for one in rows) if name.endswith(".jsonl") else json.dumps(rows)
    (folder / name).write_text(lines)
    return folder / name


def load(folder, rows, processor, **options):
    return load_conversations(write(folder, rows), processor=processor, **options)


def batch_of(conversations, processor, **options):
    return ConversationCollator(processor, **options)([conversations[i] for i in range(len(conversations))])


def assert_equal(ours, others):
    assert set(ours) == set(others)
    for name in others:
        assert torch.equal(ours[name], others[name]), name


def answers_in(processor, batch, index):
    """The labelled stretches of a row as text, blanks aside."""
    found, last = [], -100
    for label in batch["labels"][index].tolist():
        if label != -100:
            found += [[]] if last == -100 else []
            found[-1].append(label)
        last = label
    return ["".join(processor.tokenizer.decode(ids).split()) for ids in found]


def question_in(processor, batch, index, turn):
    ids = batch["input_ids"][index][batch["routing_segments"][index] == turn]
    return "".join(processor.tokenizer.decode(ids).split())


def chat(one, **content):
    """A row in chat form with content lists: images in the row, or in the content with `inline`."""
    roles = {"system": "system", "human": "user", "gpt": "assistant"}
    images = one.get("image", [])
    images = iter(images if isinstance(images, list) else [images])
    messages = []
    for said in one["conversations"]:
        parts = []
        for _ in range(said["value"].count("<image>")):
            parts.append({"type": "image"} | ({"image": next(images)} if content.get("inline") else {}))
        parts.append({"type": "text", "text": said["value"].replace("<image>", "").strip()})
        messages.append({"role": roles[said["from"]], "content": parts})
    rest = list(images)
    return {"id": one["id"], "messages": messages} | ({} if content.get("inline") else {"images": rest})


def with_pictures(rows, folder):
    """Chat rows whose paths are opened."""
    return [{**one, "images": [Image.open(folder / name) for name in one["images"]]} for one in rows]


def inline_dataset(folder):
    part = {"type": Value("string"), "text": Value("string"), "image": ImageFeature()}
    features = Features(
        {"id": Value("string"), "messages": List({"role": Value("string"), "content": List(part)})},
    )
    empty = {"text": None, "image": None}
    rows = [chat(one, inline=True) for one in GOOD]
    for one in rows:
        for message in one["messages"]:
            message["content"] = [empty | part for part in message["content"]]
            for part in message["content"]:
                part["image"] = part["image"] and Image.open(folder / part["image"])
    return Dataset.from_list(rows, features=features)


def saved(dataset, folder):
    dataset.save_to_disk(folder / "saved")
    return folder / "saved"


def chat_features(image):
    part = {"type": Value("string"), "text": Value("string")}
    said = List({"role": Value("string"), "content": List(part)})
    return {"id": Value("string"), "messages": said, "images": List(image)}
