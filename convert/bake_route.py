"""Which route to bake: asked for, the routers' most common one, or so many layers, chosen by the loss without them.

All is measured on questions with answers. The loss of a question is the mean cross entropy of its answers' tokens, in
nats, as in training; it is right if every one of those tokens is the likeliest one.

L decoder layers, S sequence, B batch.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..adapter_roe import expanded
from ..phases_roe import token_loss_per_example
from ..training.bad_rows import RowError
from ..training.calibration import on_model
from ..training.chat_prompt import chat_prompt, close_answers
from ..training.conversation_rows import chat_of_row
from ..training.conversations import ConversationCollator
from .calibrate import chosen, load_model, read_rows
from .source import Source
from .verify import checked_device, default_device

MOST_COMMON = "most-common"
Route = tuple[bool, ...]


@dataclass(frozen=True)
class Questions:
    """What to measure on, and how.

    Attributes:
        data: JSON or JSON lines of chats with answers, or of LLaVA's conversations.
        images: where image paths begin; `None` for the folder of `data`.
        number: rows to take, at random.
        seed: which rows.
        batch_size: conversations per batch.
        device: of torch; "auto" takes an accelerator if there is one.
        dtype: to compute in; "auto" takes the one that is stored.
    """

    data: str | Path
    images: str | Path | None = None
    number: int = 200
    seed: int = 0
    batch_size: int = 8
    device: str = "auto"
    dtype: str = "auto"


@dataclass(frozen=True)
class Score:
    """What a model does on the questions.

    Attributes:
        loss: mean over questions, in nats.
        right: share of the questions whose answer is right to the token.
    """

    loss: float
    right: float

    def __str__(self) -> str:
        return f"loss {self.loss:.4f}, {self.right:.1%} right"


class Measured:
    """A model and the questions to run it on.

    Args:
        model: in eval mode.
        batches: of conversations with labels, as `ConversationCollator` makes them; run again and again.
    """

    def __init__(self, model, batches: Sequence[dict]):
        self.model, self.batches = model, batches
        self.number = sum(len(batch["labels"]) for batch in batches)

    @torch.inference_mode()
    def run(self, **routing) -> Iterator[tuple[dict, object]]:
        """Every batch, and what the model makes of it; answers are read by no router."""
        for batch in self.batches:
            inputs = {name: on_model(value, self.model) for name, value in batch.items() if name != "labels"}
            yield batch, self.model(**inputs, **routing, use_cache=False)

    def own_routes(self) -> Counter[Route]:
        """How many questions take which route by the routers' own decision."""
        return Counter(tuple(route) for _, outputs in self.run() for route in outputs.routes.tolist())

    def score(self, route: Route | None) -> Score:
        """The questions along one route, or each along the one that its routers decide (`None`).

        Raises: ValueError if the loss is not finite.
        """
        losses, right = [], []
        for batch, outputs in self.run(**({} if route is None else {"routes": list(route)})):
            labels = batch["labels"].to(outputs.logits.device)
            losses.append(token_loss_per_example(outputs.logits, labels))
            targets, said = labels[:, 1:], outputs.logits[:, :-1].argmax(dim=-1)
            right.append(((targets == -100) | (targets == said)).all(dim=1).float())
        score = Score(torch.cat(losses).double().mean().item(), torch.cat(right).mean().item())
        if not torch.isfinite(torch.tensor(score.loss)):
            where = "its own routes" if route is None else f"route {as_text(route)}"
            raise ValueError(
                f"the loss along {where} is {score.loss}, expected a finite one: do values overflow in "
                f"{self.model.dtype} (give another --dtype)?"
            )
        return score


@contextmanager
def adapters_left_out(model, is_out: bool = True):
    """Skipped layers hand on what they get, as if their adapters were not there."""

    def nothing(module, args, output: Tensor) -> Tensor:
        return torch.zeros_like(output)

    layers = model.model.language_model.layers if is_out else []
    hooks = [layer.adapter.register_forward_hook(nothing) for layer in layers if layer.adapter is not None]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def open_questions(where: Source, questions: Questions) -> Measured:
    """Load a RoE checkpoint and the questions it is to be measured on.

    Raises: ValueError naming the row that has no answer, or an image that cannot be opened.
    """
    if questions.batch_size < 1:
        raise ValueError(f"the batch size must be at least 1, got {questions.batch_size}")
    device = default_device() if questions.device == "auto" else checked_device(questions.device)
    rows = read_rows(questions.data)
    numbers = chosen(len(rows), questions.number, questions.seed)
    model, processor = load_model(where, None, None, questions.dtype, device)
    close_answers(processor)
    prompt, folder = chat_prompt(processor), Path(questions.images or expanded(questions.data).parent).absolute()
    examples = []
    for number in numbers:
        try:
            chat = chat_of_row(rows[number], prompt, folder)
        except RowError as error:
            raise ValueError(f"row {number} of {questions.data}: {error}") from error
        examples.append({"file": str(questions.data), "index": number, "id": None, **chat})
    collate = ConversationCollator(processor)
    starts = range(0, len(examples), questions.batch_size)
    return Measured(model, [collate(examples[start : start + questions.batch_size]) for start in starts])


# ------------------------------------------------------------------------------------------------------ what is asked


def asked_route(route, num_layers: int) -> str | int | Route:
    """What a caller means: `MOST_COMMON`, how many layers to skip, or the route itself.

    Args:
        route: "most-common"; a number; a list of skipped layers, or as text "3,7,12" ("3," for one layer); or L times
            0 or 1 as text (1: the layer runs).
        num_layers: L.
    Raises: ValueError for anything else, and for layers that there are not.
    """
    if route == MOST_COMMON or (isinstance(route, int) and not isinstance(route, bool)):
        return route
    if isinstance(route, str):
        text = route.strip()
        if len(text) == num_layers and set(text) <= {"0", "1"}:
            return tuple(mark == "1" for mark in text)
        if text.isdecimal():
            return int(text)
        if re.fullmatch(r"\d+(\s*,\s*\d+)*\s*,?", text):
            route = [int(number) for number in re.findall(r"\d+", text)]
    is_list = isinstance(route, list | tuple) and all(type(layer) is int for layer in route)
    if not is_list or len(set(route)) != len(route) or not all(0 <= layer < num_layers for layer in route):
        raise ValueError(
            f"route must be {MOST_COMMON!r}, how many layers to skip, the distinct numbers of skipped layers (0 to "
            f'{num_layers - 1}; "3," for layer 3 alone), or {num_layers} times 0 or 1 (1: it runs), got {route!r}'
        )
    return tuple(layer not in route for layer in range(num_layers))


def check_route(route: Route, routed: Sequence[int], what: str) -> Route:
    """The route.

    Raises: ValueError if it skips nothing, everything, or a layer that has no adapter.
    """
    skipped = [layer for layer, keep in enumerate(route) if not keep]
    if not skipped:
        raise ValueError(
            f"{what} skips no layer, so there is nothing to bake: ask for a number of layers, or lower the routers' "
            "skip ratio in training; roe-llava extract --full gives the base as it is"
        )
    if len(skipped) == len(route):
        raise ValueError(f"{what} skips all {len(route)} layers: no token would see another one")
    if lost := sorted(set(skipped) - set(routed)):
        raise ValueError(f"{what} skips layers {lost}, which have no adapter (routed_layers: {list(routed)})")
    return route


def choose_route(asked: str | int | Route, measured: Measured | None, routed: Sequence[int], no_adapters: bool = False):
    """The route to bake, and in words how it was chosen.

    Args:
        asked: as `asked_route` gives it.
        measured: `None` where nothing is to be measured.
        routed: layers that can be skipped.
        no_adapters: choose layers by the loss without their adapters.
    Raises: ValueError as `check_route`, or if there are no questions to choose by, or too many layers to skip.
    """
    if isinstance(asked, tuple):
        return check_route(asked, routed, f"route {as_text(asked)}"), "as asked for"
    if measured is None:
        wish = "the most common route" if asked == MOST_COMMON else f"a route that skips {asked} layers"
        raise ValueError(f"{wish} is found by running the model on questions with answers: give them with --data")
    if asked == MOST_COMMON:
        counts = measured.own_routes()
        route = max(counts, key=lambda one: (counts[one], one.count(False)))
        how = f"the most common of {len(counts)} routes, taken by {counts[route]} of {measured.number} questions"
        return check_route(route, routed, f"the most common route ({counts[route]} of {measured.number})"), how
    if not 0 < asked <= len(routed):
        raise ValueError(f"route {asked}: the number of layers to skip must lie in [1, {len(routed)}]")
    with adapters_left_out(measured.model, no_adapters):
        route = greedy_route(measured, asked, routed)
    return check_route(route, routed, f"a route of {asked} skipped layers"), (
        f"one layer after the other, each time the one without which the loss of {measured.number} questions is lowest"
    )


def greedy_route(measured: Measured, number: int, routed: Sequence[int]) -> Route:
    """From every layer kept, `number` times: skip the layer without which the loss is lowest.

    Greedy: a layer once skipped stays so, and a better set may be missed. It takes about `number` times as many passes
    over the questions as there are layers.
    """
    route = [True] * measured.model.config.text_config.num_hidden_layers
    passes = sum(len(routed) - done for done in range(number))
    with tqdm(total=passes, desc="routes", unit="route", disable=None) as bar:
        for _ in range(number):
            losses = {}
            for layer in routed:
                if route[layer]:
                    losses[layer] = measured.score((*route[:layer], False, *route[layer + 1 :])).loss
                    bar.update()
            route[min(losses, key=losses.get)] = False
    return tuple(route)


def as_text(route: Route) -> str:
    """A route as "1101..."."""
    return "".join("01"[keep] for keep in route)


__all__ = ["MOST_COMMON", "Measured", "Questions", "Score", "asked_route", "choose_route", "open_questions"]
