"""Asks a model held-out questions in batches and sums up what it answered and which layers it ran.

N questions, L decoder layers. Measuring only: `report` prints, `pictures` draws.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from .evaluate import MAX_ANSWER_TOKENS, family_examples, most_common_share
from .world import FAMILIES, messages

COMMON_SHARE = 0.05  # a route that this share of the questions takes counts as common


def prompts(processor: ProcessorMixin, examples: Sequence[dict]) -> BatchFeature:
    """The examples' last questions as one batch, padded on the left, earlier turns with their true answers."""
    return processor.apply_chat_template(
        [messages(example)[:-1] for example in examples],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )


@torch.inference_mode()
def ask(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    examples: Sequence[dict],
    batch_size: int = 50,
    routes: Tensor | None = None,
) -> tuple[list[str], Tensor | None]:
    """Greedy answers, and the routes that led to them.

    Args:
        model: stock LLaVA or RoE-LLaVA.
        examples: as made by `TinyWorld`.
        batch_size: prompts per batch.
        routes: (N, L) bool, pins a route per question.
    Returns: N answers without special tokens; routes (N, L) bool, `None` for a model that has none.
    """
    answers, taken = [], []
    for start in range(0, len(examples), batch_size):
        inputs = prompts(processor, examples[start : start + batch_size]).to(model.device, model.dtype)
        pinned = {} if routes is None else {"routes": routes[start : start + batch_size]}
        settings = {"do_sample": False, "max_new_tokens": MAX_ANSWER_TOKENS, "return_dict_in_generate": True}
        output = model.generate(**inputs, **settings, **pinned)
        new_tokens = output.sequences[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(new_tokens, skip_special_tokens=True)]
        taken.append(getattr(output.past_key_values, "routes", None))
    return answers, None if taken[0] is None else torch.cat(taken).cpu()


@dataclass
class Answered:
    """What both models made of one question.

    Attributes:
        example: as made by `TinyWorld`.
        base, roe: answer of the base and of the model with routing.
        route: (L,) bool, True where the layer ran.
    """

    example: dict
    base: str
    roe: str
    route: Tensor

    @property
    def question(self) -> str:
        return self.example["turns"][-1][0]

    @property
    def truth(self) -> str:
        return self.example["turns"][-1][1]

    @property
    def family(self) -> str:
        return self.example["turns"][-1][2]

    def record(self) -> dict:
        """For a results file; a route is written with 1 for a layer that ran."""
        return {
            "family": self.family,
            "question": self.question,
            "truth": self.truth,
            "base": self.base,
            "roe": self.roe,
            "route": route_text(self.route),
        }


def route_text(route: Tensor) -> str:
    """(L,) bool as "1101": 1 for a layer that ran, layer 0 first."""
    return "".join("1" if keep else "0" for keep in route.tolist())


def ask_both(base, roe, per_family: int, seed: int, families=tuple(FAMILIES), batch_size: int = 50, progress=iter):
    """Every family's held-out questions, answered by both models.

    Args:
        base, roe: (model, processor) each.
        per_family: questions per family, one turn each.
        progress: wraps the list of families, to show how far it is.
    Returns: list of `Answered`, grouped by family.
    """
    answered = []
    for family in progress(families):
        examples = family_examples(family, per_family, split="test", seed=seed)
        of_base, _ = ask(*base, examples, batch_size)
        of_roe, routes = ask(*roe, examples, batch_size)
        answered += [Answered(*row) for row in zip(examples, of_base, of_roe, routes, strict=True)]
    return answered


def accuracy_summary(answered: Sequence[Answered]) -> dict:
    """Accuracy and skip ratio per family and over all questions, every number a share in [0, 1].

    Returns: {"families": {family: scores}, "overall": scores}. `lost` is the base's accuracy minus RoE's, and
        `lost_standard_error` that of the difference, question by question.
    """
    names = dict.fromkeys(item.family for item in answered)
    families = {name: scores([item for item in answered if item.family == name]) for name in names}
    overall = scores(answered)
    # Always giving the most common answer of the question's own family, not of all questions.
    guessed = sum(of["most_common_answer"] * of["questions"] for of in families.values())
    overall["most_common_answer"] = guessed / overall["questions"]
    return {"families": families, "overall": overall}


def scores(answered: Sequence[Answered]) -> dict:
    """Scores of some questions; see `accuracy_summary`."""
    base = torch.tensor([item.base == item.truth for item in answered], dtype=torch.float64)
    roe = torch.tensor([item.roe == item.truth for item in answered], dtype=torch.float64)
    kept = torch.stack([item.route for item in answered]).double()
    lost = base - roe
    return {
        "questions": len(answered),
        "most_common_answer": most_common_share([item.example for item in answered]),
        "base": base.mean().item(),
        "roe": roe.mean().item(),
        "lost": lost.mean().item(),
        "lost_standard_error": (lost.std(correction=0) / len(answered) ** 0.5).item(),
        "same_answer": sum(item.base == item.roe for item in answered) / len(answered),
        "skip_ratio": 1 - kept.mean().item(),
    }


def route_summary(answered: Sequence[Answered], shown: int = 8) -> dict:
    """How many different routes there are, and which are common.

    Layer 0 decides before its routing tokens have read anything, so routes that differ there alone count as one.
    """
    routes = torch.stack([item.route for item in answered])
    counts = Counter(route_text(route[1:]) for route in routes)
    whole = {route_text(route[1:]): route_text(route) for route in routes}
    shares = [(whole[rest], number / len(answered)) for rest, number in counts.most_common()]
    return {
        "layers": routes.shape[1],
        "distinct": len(shares),
        "common": sum(share >= COMMON_SHARE for _, share in shares),
        "common_means_share": COMMON_SHARE,
        "most_common": [
            {"route": route, "share": share, "families": families_of(route, answered)}
            for route, share in shares[:shown]
        ],
        "skipped_by_layer": (1 - routes.double().mean(dim=0)).tolist(),
    }


def families_of(route: str, answered: Sequence[Answered]) -> dict[str, float]:
    """Of the questions that take a route (layer 0 aside), the share that belongs to each family, largest first."""
    takers = Counter(item.family for item in answered if route_text(item.route)[1:] == route[1:])
    return {family: number / takers.total() for family, number in takers.most_common()}


__all__ = ["Answered", "accuracy_summary", "ask", "ask_both", "prompts", "route_summary", "route_text"]
