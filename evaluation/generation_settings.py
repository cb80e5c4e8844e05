"""A task's `generation_kwargs` as keywords of `generate`."""

import inspect

from transformers import GenerationConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

DEFAULT_NEW_TOKENS = 1024  # what lmms-eval's own LLaVA uses where a task says nothing
# What tasks say to other models: stop words are cut from the text here, the others are about pictures.
READ_ELSEWHERE = ("until", "image_aspect_ratio", "image_sizes", "max_frames_num", "modalities")
KNOWN = frozenset(vars(GenerationConfig())) | {
    name for name in inspect.signature(GenerationConfig.__init__).parameters if name not in ("self", "kwargs")
}


def generate_keywords(task_settings: dict) -> dict:
    """Keywords of `generate` for a task.

    Greedy unless the task samples: `do_sample` decides, and where it is not given a temperature above 0, as in
    lmms-eval's own models.
    """
    settings = {name: value for name, value in task_settings.items() if name not in READ_ELSEWHERE}
    if unknown := sorted(set(settings) - KNOWN):
        logger.warning_once(f"generation_kwargs that nothing reads are left out: {', '.join(unknown)}")
    settings = {name: value for name, value in settings.items() if name in KNOWN and value is not None}
    settings.setdefault("max_new_tokens", DEFAULT_NEW_TOKENS)
    settings["do_sample"] = bool(settings.get("do_sample", settings.get("temperature", 0) > 0))
    if not settings["do_sample"]:
        # `None` and not absent: values of the checkpoint's own generation config would draw a warning.
        settings |= dict.fromkeys(("temperature", "top_p", "top_k"))
    return settings


def stop_words(task_settings: dict) -> list[str]:
    """The task's `until`, empty words left out.

    Raises: ValueError if it is neither a word nor a list of words.
    """
    until = task_settings.get("until") or []
    words = [until] if isinstance(until, str) else until
    if not isinstance(words, (list, tuple)) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"generation_kwargs.until is {until!r}, expected a word or a list of words")
    return [word for word in words if word]


def cut_at(text: str, words: list[str]) -> str:
    """The text up to the first of these words."""
    for word in words:
        text = text.split(word, 1)[0]
    return text.strip()


__all__ = ["cut_at", "generate_keywords", "stop_words"]
