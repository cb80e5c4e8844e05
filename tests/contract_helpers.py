"""A finished checkpoint opened as a llava-hf user opens one, and questions about drawn scenes for it."""

import functools

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from roe_llava.examples.tiny_world.evaluate import family_examples

GREEDY = {"max_new_tokens": 5, "do_sample": False}
FAMILIES = ("add", "color", "count")  # of questions, which take different routes


def open_model(folder, **options):
    """A model of a saved folder, through the Auto class, in eval mode; float32 unless said."""
    options = {"dtype": torch.float32} | options
    return AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, **options)


def open_processor(folder):
    return AutoProcessor.from_pretrained(folder, trust_remote_code=True)


@functools.cache
def examples() -> list[dict]:
    """A held-out question of each family, its picture and its answer."""
    return [family_examples(family, 1, split="test", seed=0)[0] for family in FAMILIES]


def turn(role: str, text: str, *images) -> dict:
    """A message of a chat: images, then text."""
    content = [{"type": "image", "image": image} for image in images]
    return {"role": role, "content": [*content, {"type": "text", "text": text}]}


def chats() -> list[list[dict]]:
    """Each of the questions as a chat."""
    return [[turn("user", one["turns"][0][0], one["image"])] for one in examples()]


def prepared(processor, chats, **kwargs):
    """The model's inputs for a chat, or for several, padded on the left."""
    wanted = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template(
        chats, **wanted, processor_kwargs={"padding": True, "padding_side": "left"}, **kwargs
    )


def details(model, inputs, **kwargs):
    """What `generate` returns, routes (`past_key_values.routes`) included."""
    return model.generate(**inputs, **GREEDY, return_dict_in_generate=True, **kwargs)


def answers(processor, model, inputs, **kwargs) -> list[str]:
    """The new text of each row."""
    tokens = model.generate(**inputs, **GREEDY | kwargs)[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]


def same_tensors(one, two) -> bool:
    """Whether two models hold the same tensors under the same names, to the bit."""
    ours, theirs = one.state_dict(), two.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name].cpu(), theirs[name].cpu()) for name in ours)
