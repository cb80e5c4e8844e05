"""The head of a card, as the Hub reads it: licence, base, library, results."""

import re
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

from ..convert.kinds import ROE_MOE
from .folder import ModelFolder

try:
    from huggingface_hub.utils import httpx  # whichever of its names the installed version uses
except ImportError:
    import httpx

REPO_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
TransportError = httpx.TransportError  # what a connection that breaks ends in; no OSError
TAGS = {
    "layers": ["llava", "routing-experts", "roe", "layer-skipping", "custom_code"],
    "experts": ["llava", "mixture-of-experts", "moe", "moe-llava", "custom_code"],
}
# How licence files begin, and the Hub's names of those licences.
LICENCES = {
    r"\s*Apache License\s+Version 2\.0": "apache-2.0",
    r"\s*(?:The )?MIT License": "mit",
    r"\s*LLAMA 2 COMMUNITY LICENSE": "llama2",
    r"\s*META LLAMA 3 COMMUNITY LICENSE": "llama3",
}


def metadata(folder: ModelFolder, name: str, licence: str | None, scores: list[EvalResult]) -> ModelCardData:
    """Metadata of a model; what is not known is left out.

    Args:
        name: of the model.
        licence: Hub's name of it, `None` if it is not known.
        scores: for the model-index.
    """
    base_id = base_on_page(folder)
    known = {"license": licence} if licence else {}
    if base_id:
        known |= {"base_model": base_id, "base_model_relation": "adapter" if folder.is_adapter else "finetune"}
    if scores:
        known |= {"model_name": name, "eval_results": scores}
    return ModelCardData(library_name="transformers", pipeline_tag="image-text-to-text", tags=tags_of(folder), **known)


def tags_of(folder: ModelFolder) -> list[str]:
    """Those of the kind; RoE on a model with experts is one of these too."""
    tags = list(TAGS[folder.kind.decides])
    return [*tags[:-1], "mixture-of-experts", tags[-1]] if folder.kind is ROE_MOE else tags


def base_on_page(folder: ModelFolder) -> str | None:
    """Hub id of the base; `None` where a folder was given to the training, of which nobody else knows."""
    base = folder.base
    is_id = REPO_ID.fullmatch(base.get("id") or "") and re.fullmatch(r"[0-9a-f]{40}", base.get("revision") or "")
    return base["id"] if is_id else None


def find_licence(folder: ModelFolder) -> tuple[str | None, str]:
    """(the Hub's name of the weights' licence or `None`, where that is known from)."""
    for path in sorted([*folder.path.glob("LICENSE*"), *folder.path.glob("USE_POLICY*")]):
        text = path.read_text(encoding="utf-8", errors="replace")
        if found := next((name for start, name in LICENCES.items() if re.match(start, text, re.IGNORECASE)), None):
            return found, path.name
    if base_id := base_on_page(folder):
        try:
            card = ModelCard(Path(hf_hub_download(base_id, "README.md", revision=folder.base["revision"])).read_text())
        except (OSError, ValueError, HfHubHTTPError, TransportError):
            return None, f"the card of {base_id} could not be read"
        return (card.data.license, f"the card of {base_id}") if card.data.license else (None, f"{base_id} names none")
    return None, "the base is not on the Hub, and no licence file came with it"


def check_card(text: str, name) -> None:
    """Check a card as the Hub will, as far as that is known.

    Raises: ValueError if its metadata cannot be read, the base is no Hub id, or the results are not whole.
    """
    try:
        data = ModelCard(text, ignore_metadata_errors=False).data
    except (ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"{name} has metadata that the Hub will refuse: {error}") from error
    bases = data.get("base_model") or []
    for base in [bases] if isinstance(bases, str) else bases:
        if not REPO_ID.fullmatch(str(base)):
            raise ValueError(f"{name} has base_model {base!r}, expected the id of a repository on the Hub")
    for score in data.get("eval_results") or []:
        if not (score.task_type and score.dataset_type and score.dataset_name and score.metric_type):
            raise ValueError(f"{name} has a result without task, dataset or metric: {score}")
        if score.metric_value is None:
            raise ValueError(f"{name} has a result without a value: {score.dataset_name}, {score.metric_type}")


__all__ = ["TransportError", "base_on_page", "check_card", "find_licence", "metadata"]
