"""Routers taught by measured losses: search routes, predict what each question would lose along them, show the best.

A router that only feels the gradient of its own decisions settles on one route for all before it has seen what the
others are worth. So for a part of the run routes are given (`RoutingPhase("given")`), the adapters learn along them,
and the routers learn to give them themselves; then they decide alone. After Dr.LLM, which searches routes of text
models per example; here a route is shown for what a question can be expected to lose on it, not for what one answer
happened to lose, and a price per skipped layer, the same for all questions, meets the budget in the mean.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from ..phases_roe import RoutingPhase, token_loss_per_example
from ..routing_roe import turns_of_tokens
from .meter import hard_skips, labelled_losses
from .objective import mean_over_labelled
from .route_search import RoutePool, check_size, choose_routes, search_routes
from .route_values import Reading, RouteValues, expected_losses, question_features
from .schedule import random_keep_bias

RANDOM, TAUGHT, OWN = range(3)
UNSURE_QUESTIONS = 500  # taught at first, on which routers do not yet decide as they will


@dataclass(frozen=True)
class Teaching:
    """How routes are found and shown.

    Attributes:
        num_routes: routes to choose from, the one that runs all layers among them.
        searched_routes: routes that the search measures.
        searched_examples: training examples that it measures them on.
        measured_routes: routes along which every batch is run once more, without gradients, to learn their losses:
            each costs a forward pass.
        max_loss: nats; losses above count as this.
        refit_every: questions between two fits of the predicted losses.
    """

    num_routes: int = 8
    searched_routes: int = 96
    searched_examples: int = 128
    measured_routes: int = 1
    max_loss: float = 3.0
    refit_every: int = 240

    def __post_init__(self):
        for name in ("num_routes", "searched_routes", "searched_examples", "measured_routes", "refit_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.measured_routes > self.num_routes:
            raise ValueError(f"measured_routes {self.measured_routes} is more than num_routes {self.num_routes}")
        if not self.max_loss > 0:
            raise ValueError(f"max_loss must be positive, got {self.max_loss}")


@dataclass(frozen=True)
class TaughtSchedule:
    """Stages of taught routers: random warm-up of the adapters, given routes, the routers' own.

    Attributes:
        target_skip_ratio: r, in (0, 0.5].
        warmup_end: progress at which routes are searched and teaching begins.
        taught_end: progress from which routers decide alone and no longer learn.
    """

    target_skip_ratio: float = 0.3
    warmup_end: float = 0.3
    taught_end: float = 0.7

    counts_micro_batches = False

    def __post_init__(self):
        if not 0.0 < self.target_skip_ratio <= 0.5:
            raise ValueError(f"target_skip_ratio must lie in (0, 0.5], got {self.target_skip_ratio}")
        if not 0.0 <= self.warmup_end < self.taught_end <= 1.0:
            raise ValueError(f"stages must be ordered: warmup_end {self.warmup_end}, taught_end {self.taught_end}")

    def stage(self, progress: float) -> int:
        """0 random, 1 taught, 2 the routers' own decisions."""
        return (progress >= self.warmup_end) + (progress >= self.taught_end)

    def phase(self, progress: float) -> RoutingPhase:
        """How layers are chosen at this progress; while taught, the trainer fills in the batch's routes."""
        stage = self.stage(progress)
        if stage == RANDOM:
            return RoutingPhase("random", keep_bias=random_keep_bias(self.target_skip_ratio))
        return RoutingPhase("given" if stage == TAUGHT else "decided")

    def trains(self, group: str, progress: float) -> bool:
        """Adapters always learn, routers and routing tokens while they are taught, the base at the end."""
        stages = {"adapter": {RANDOM, TAUGHT, OWN}, "router": {TAUGHT}, "routing_tokens": {TAUGHT}, "base": {OWN}}
        return self.stage(progress) in stages[group]


@dataclass(frozen=True)
class TaughtObjective:
    """Token loss along the routes that are taken, and while routes are given, the routers' imitation of them.

    Attributes:
        imitation_weight: of the cross entropy between the routers' decisions and those given, mean over layers, over
            an example's turns, and over examples.
    """

    imitation_weight: float = 1.0

    def __post_init__(self):
        if not self.imitation_weight > 0:
            raise ValueError(f"imitation_weight must be positive, got {self.imitation_weight}: routers would not learn")

    def loss(self, outputs, labels: Tensor, stage: int) -> Tensor:
        """Scalar loss of a batch; arguments as in `Objective.loss`."""
        loss = mean_over_labelled(token_loss_per_example(outputs.logits, labels), labels)
        if stage != TAUGHT or outputs.turn_router_logits is None:
            return loss
        logits, mask = outputs.turn_router_logits, outputs.turn_mask
        decides = logits[0, 0, :, 0].isfinite()  # layers that have a router
        margin = (logits[..., 0] - logits[..., 1])[..., decides]
        kept = 1 - outputs.turn_skip_weights[..., decides]
        wrong = nn.functional.binary_cross_entropy_with_logits(margin, kept, reduction="none").mean(dim=-1)
        # A mean over examples, so that micro-batches and processes add up to one large batch.
        return loss + self.imitation_weight * ((wrong * mask).sum(dim=1) / mask.sum(dim=1)).mean()


class RouteTeacher:
    """Gives every question of a batch the route it should take.

    Args:
        target_skip_ratio: share of the layers to skip in the mean over questions.
        teaching: how.
        seed: of the search and of which routes are measured.
    """

    def __init__(self, target_skip_ratio: float, teaching: Teaching | None = None, seed: int = 0):
        self.target_skip_ratio, self.teaching, self.seed = target_skip_ratio, teaching or Teaching(), seed
        self.routes: Tensor | None = None  # (M, L)
        self.explained, self.batches, self.questions, self.unfitted = 0.0, 0, 0, 0
        self.pool: RoutePool | None = None  # what the search measured, and the features of its questions, (N, 2 D);
        self.features: Tensor | None = None  # neither is kept in checkpoints

    @property
    def is_ready(self) -> bool:
        """Whether routes were searched."""
        return self.routes is not None

    def searched(self, model) -> tuple[list[int], int, int]:
        """Layers that routes may skip, how many routes are searched, and how many layers each skips at most."""
        layers = model.model.language_model.layers
        routed = [number for number, layer in enumerate(layers) if layer.router is not None]
        return routed, self.teaching.searched_routes, most_skipped(self.target_skip_ratio, len(layers))

    def check(self, model) -> None:
        """Raises: ValueError if a search would be one of too few routes, or skip too few layers for the target."""
        routed, size, most = self.searched(model)
        check_size(routed, size, most)
        num_layers = len(model.model.language_model.layers)
        if min(most, len(routed)) < self.target_skip_ratio * num_layers:
            raise ValueError(
                f"{len(routed)} of {num_layers} layers have a router, so that routes cannot skip the target of "
                f"{self.target_skip_ratio:.0%}: give more layers one (routed_layers), or ask for less"
            )

    def search(self, model, batches: Sequence[dict], prepare: Callable[[dict], dict] = dict, quiet=False) -> None:
        """Find routes.

        Args:
            batches: this process's inputs with labels; every process has as many.
            prepare: puts a batch onto the model's device, when it is used.
            quiet: show no progress.
        Raises: ValueError if no route skips the target.
        """

        def along(route: Tensor, part: int) -> Tensor:
            rows = [measured(model, prepare(batch), route, self.teaching.max_loss)[part] for batch in batches]
            return gathered(torch.cat(rows))

        num_layers = model.config.text_config.num_hidden_layers
        self.features = along(torch.ones(num_layers, dtype=torch.bool), 1)
        reading = Reading.of(self.features)
        read = reading(self.features)
        routed, size, most = self.searched(model)
        with tqdm(total=size, desc="searching routes", leave=False, disable=quiet) as bar:

            def measure(route: Tensor) -> Tensor:
                bar.update()
                return along(route, 0)

            pool = self.pool = search_routes(measure, num_layers, routed, size, most, self.seed)
        if pool.skip_ratio.max() < self.target_skip_ratio:
            raise ValueError(
                f"the routes that were searched skip {pool.skip_ratio.max():.0%} of the layers at most, the target is "
                f"{self.target_skip_ratio:.0%}: give more layers a router (routed_layers), or ask for less"
            )
        expected, ridge, self.explained = expected_losses(read, pool.losses)
        routes = choose_routes(pool, expected, self.target_skip_ratio, self.teaching.num_routes)
        self._begin(routes, reading, read, ridge)
        number = [pool.routes.tolist().index(route) for route in routes.tolist()]
        self.values.observe(read, pool.losses[:, number], torch.ones(len(number), dtype=torch.bool))
        self.values.fit()

    def _begin(self, routes: Tensor, reading: Reading, read: Tensor, ridge: float) -> None:
        self.routes, self.reading = routes, reading
        self.values = RouteValues(routes, self.target_skip_ratio, read.shape[1], ridge)

    def teach(self, model, inputs: dict) -> Tensor:
        """(B, T, L) bool: the route of every turn of a batch with labels; measures the batch along some of the routes.

        Raises: RuntimeError before `search`.
        """
        if not self.is_ready:
            raise RuntimeError("there are no routes yet: call search first")
        chosen = self._measured_now()
        losses = torch.zeros(0)
        for number in chosen.nonzero().flatten().tolist():
            loss, features, counted = measured(model, inputs, self.routes[number], self.teaching.max_loss)
            losses = torch.zeros(len(loss), len(self.routes)) if not len(losses) else losses
            losses[:, number] = loss
        read = self.reading(features)
        everyones = gathered(read)
        self.values.observe(everyones, gathered(losses), chosen)
        self.batches, self.questions = self.batches + 1, self.questions + len(everyones)
        self.unfitted += len(everyones)
        if self.unfitted >= self.teaching.refit_every:
            self.values.fit()
            self.unfitted = 0
        given = torch.ones(*counted.shape, self.routes.shape[1], dtype=torch.bool)  # where nothing is learned, all run
        given[counted.cpu()] = self.routes[self.values.choose(read)]
        return given

    def see(self, outputs) -> None:
        """Look at what the routers themselves decided on a batch that was taught."""
        skips = hard_skips(outputs.turn_router_logits)
        decided = gathered(skips[outputs.turn_mask].float().mean(dim=1).cpu())
        if self.questions > UNSURE_QUESTIONS:
            self.values.correct(decided)

    def describe(self) -> dict | None:
        """What was found, for a record; `None` before the search."""
        if not self.is_ready:
            return None
        marks = ["".join("x" if runs else "-" for runs in route) for route in self.routes.tolist()]
        numbers = {"explained": self.explained, "price": self.values.price, "aimed_skip_ratio": self.values.aimed}
        return {"routes": marks, **{name: round(number, 4) for name, number in numbers.items()}}

    def _measured_now(self) -> Tensor:
        """(M,) bool: which routes to measure, the same on every process."""
        number = len(self.routes)
        order = torch.randperm(number, generator=torch.Generator().manual_seed(self.seed * 65536 + self.batches))
        return torch.zeros(number, dtype=torch.bool).index_fill(0, order[: self.teaching.measured_routes], True)

    # ------------------------------------------------------------------------------------------------ checkpoints

    FILE = "route_teacher.safetensors"
    COUNTS = ("batches", "questions", "unfitted")
    OF_VALUES = ("squares", "products", "recent", "weights")

    def save(self, folder: str | Path) -> None:
        """Write what was found and learned into a checkpoint; nothing before `search`."""
        if self.is_ready:
            tensors = {name: getattr(self.values, name).contiguous() for name in self.OF_VALUES}
            numbers = {
                "price": self.values.price,
                "aimed": self.values.aimed,
                "ridge": self.values.ridge,
                "explained": self.explained,
            }
            tensors |= {name: torch.tensor(number, dtype=torch.float64) for name, number in numbers.items()}
            counts = {name: torch.tensor(getattr(self, name)) for name in self.COUNTS}
            tensors |= {"routes": self.routes, **counts}
            save_file(
                tensors | {"mean": self.reading.mean, "scale": self.reading.scale},
                Path(folder) / self.FILE,
            )

    def load(self, folder: str | Path) -> None:
        """Go on from a checkpoint; one made before the search leaves everything to be found."""
        if not (Path(folder) / self.FILE).is_file():
            self.routes = None
            return
        saved = load_file(Path(folder) / self.FILE)
        reading = Reading(saved["mean"], saved["scale"])
        self._begin(saved["routes"], reading, saved["recent"], saved["ridge"].item())
        for name in self.OF_VALUES:
            setattr(self.values, name, saved[name])
        self.values.price, self.values.aimed = saved["price"].item(), saved["aimed"].item()
        self.explained = saved["explained"].item()
        for name in self.COUNTS:
            setattr(self, name, int(saved[name]))


@torch.no_grad()
def measured(model, inputs: dict, route: Tensor, max_loss: float) -> tuple[Tensor, Tensor, Tensor]:
    """A batch along one route: what its questions lost and what they look like before the first layer.

    Args:
        inputs: with labels and routing_segments; untouched.
        route: (L,) bool.
        max_loss: losses above count as this.
    Returns: losses (N,) and features (N, 2 D) of the turns that have an answer to learn, and which those are, (B, T)
        bool.
    """
    inputs = dict(inputs)
    labels, segments = inputs.pop("labels"), inputs["routing_segments"]
    was_training = model.training
    model.eval()
    try:
        with first_layer_input(model) as states:
            logits = model(**inputs, routes=route, use_cache=False).logits
    finally:
        model.train(was_training)
    features, exists = question_features(states[0], segments.to(states[0].device))
    losses, is_answered = turn_losses(logits, labels, segments, exists.shape[1])
    counted = exists & is_answered.to(exists.device)
    return losses.clamp(max=max_loss)[counted.to(losses.device)].cpu(), features[counted].cpu(), counted


def turn_losses(logits: Tensor, labels: Tensor, segments: Tensor, num_turns: int) -> tuple[Tensor, Tensor]:
    """Mean cross entropy of every turn's answer in nats, (B, T), and which turns have a labelled token, (B, T) bool.

    Args:
        logits: (B, S, V).
        labels: (B, S), -100 where there is no target.
        segments: (B, S) routing segments.
        num_turns: T.
    """
    rows, places, losses = labelled_losses(logits, labels)
    turns = turns_of_tokens(segments.to(logits.device))[rows, places]
    zeros = losses.new_zeros(len(labels), num_turns + 1)
    total = zeros.index_put((rows, turns), losses, accumulate=True)
    count = zeros.index_put((rows, turns), torch.ones_like(losses), accumulate=True)
    return (total / count.clamp(min=1))[:, 1:], count[:, 1:] > 0


@contextlib.contextmanager
def first_layer_input(model) -> Iterator[list[Tensor]]:
    """Collects the hidden states (B, S, D) that enter the first decoder layer."""
    seen: list[Tensor] = []
    layer = model.model.language_model.layers[0]
    hook = layer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    try:
        yield seen
    finally:
        hook.remove()


def most_skipped(target_skip_ratio: float, num_layers: int) -> int:
    """Layers that a route skips at most: twice the target, since routes far behind it are of no use."""
    return max(2, min(int(0.65 * num_layers), math.ceil(2 * target_skip_ratio * num_layers)))


def gathered(rows: Tensor) -> Tensor:
    """Rows of all processes, in the order of their ranks."""
    return torch.cat(gather_object([rows]))


__all__ = ["RouteTeacher", "TaughtObjective", "TaughtSchedule", "Teaching"]
