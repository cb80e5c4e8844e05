"""Which experts a benchmark's tokens went through: counted per task, image and text apart, summed over processes.

B batch, S sequence, M layers with experts, E experts, K experts per token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .route_log import TaskRecord

MODALITIES = ("image", "text")


@dataclass
class TaskExperts(TaskRecord):
    """The experts of one task's tokens: those of the prompts, and those that were written.

    Attributes:
        layers: numbers of the layers with experts.
        tokens: (2,) int64, image and text tokens.
        counts: (2, M, E) int64, how many of them went through each expert.
        answered: examples.
    """

    layers: tuple[int, ...] = ()
    tokens: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.int64))
    counts: Tensor | None = None
    answered: int = 0

    @property
    def examples(self) -> int:
        return self.answered

    def add(self, layers: list[int], choices: Tensor, is_image: Tensor) -> None:
        """Count the choices (M, n, K) of n tokens, of which `is_image` (n,) are parts of images."""
        chosen = torch.nn.functional.one_hot(choices, self.num_experts).sum(2)  # (M, n, E)
        of_each = torch.stack([is_image, ~is_image]).long()  # (2, n)
        self.tokens = self.tokens + of_each.sum(1)
        self.counts = self.counts + torch.einsum("an,mne->ame", of_each.double(), chosen.double()).long()
        self.layers = tuple(layers)

    @property
    def num_experts(self) -> int:
        return self.counts.shape[-1]

    def begin(self, num_layers: int, num_experts: int) -> None:
        """Make room for the counts of a model."""
        if self.counts is None:
            self.counts = torch.zeros(2, num_layers, num_experts, dtype=torch.int64)

    def merge(self, other: "TaskExperts") -> None:
        """Take in what another process did at the same time."""
        super().merge(other)
        self.answered += other.answered
        if other.counts is None:
            return
        self.begin(*other.counts.shape[1:])
        self.counts, self.tokens, self.layers = self.counts + other.counts, self.tokens + other.tokens, other.layers

    def shares(self) -> Tensor:
        """(2, M, E): share of the image and of the text tokens that go through an expert; NaN where there are none."""
        return self.counts / self.tokens[:, None, None]

    def summary(self) -> dict:
        """For a results file; shares in [0, 1], `None` where no token was of a kind.

        A busiest expert's share is the mean over layers; `image_text_difference` is the mean over layers of the total
        variation distance between the experts of image and of text tokens: 0 alike, 1 no expert in common.
        """
        common = {"examples": self.examples, **self.times()}
        if self.counts is None:
            return common
        shares = self.shares()
        busiest = [known(one) for one in shares.amax(-1).mean(-1).tolist()]
        parts = shares / shares.sum(-1, keepdim=True)
        common |= {f"{name}_busiest_expert": value for name, value in zip(MODALITIES, busiest, strict=True)}
        common |= {"image_text_difference": known((parts[0] - parts[1]).abs().sum(-1).div(2).mean().item())}
        common |= {f"{name}_tokens": number for name, number in zip(MODALITIES, self.tokens.tolist(), strict=True)}
        return common | {"experts": {str(layer): self.of_layer(place) for place, layer in enumerate(self.layers)}}

    def of_layer(self, place: int) -> dict:
        """{"image": E shares, "text": E shares} of the layer in a place; `None` where there are no such tokens."""
        shares = self.shares()[:, place].tolist()
        return {
            name: one if number else None
            for name, one, number in zip(MODALITIES, shares, self.tokens.tolist(), strict=True)
        }

    def told(self) -> str:
        """In a line."""
        found = self.summary()
        names = {f"{name}_busiest_expert": f"of {name} tokens through the busiest expert" for name in MODALITIES}
        shares = [f"{found[name]:.1%} {text}" for name, text in names.items() if found.get(name) is not None]
        return ", ".join(shares) or "no tokens"


def known(value: float) -> float | None:
    """A number; `None` for NaN."""
    return None if value != value else value


@contextmanager
def watched_experts(model) -> Iterator[list]:
    """What the routers of a model with experts decide while the block lasts: a (routing, input_ids) per forward pass.

    Nothing is computed meanwhile, so that times stay those of the model.
    """
    passes = []

    def keep(_, args, kwargs, output):
        found = kwargs["expert_routing"][0]
        layers = range(model.config.text_config.num_hidden_layers)
        chosen = [found.choices[layer].experts if layer in found.choices else None for layer in layers]
        passes.append((chosen, found.tokens.real, kwargs["input_ids"]))

    handle = model.model.register_forward_hook(keep, with_kwargs=True)
    try:
        yield passes
    finally:
        handle.remove()


def count_experts(record: TaskExperts, passes: list, asked: Tensor, model) -> None:
    """Put what one `generate` decided into a record.

    Padding is left out, and of rows that have ended what is written while others go on.

    Args:
        passes: of `watched_experts`, prefill first.
        asked: (B,) bool, examples that count.
        model: that generated.
    """
    ended = [model.generation_config.eos_token_id, model.generation_config.pad_token_id]
    ended = torch.tensor([token for one in ended if one is not None for token in torch.tensor(one).flatten().tolist()])
    record.answered += int(asked.sum())
    for number, (choices, real, input_ids) in enumerate(passes):
        input_ids = input_ids.cpu()
        counted = asked.repeat_interleave(input_ids.shape[0] // len(asked))[:, None].expand(input_ids.shape)
        counted = counted & (real.cpu() if real is not None else True)
        if number > 0:
            counted = counted & ~torch.isin(input_ids, ended)
        made = {layer: one.cpu() for layer, one in enumerate(choices) if one is not None}
        counted = counted.flatten()
        record.begin(len(made), model.config.num_experts)
        is_image = (input_ids == model.config.image_token_id).flatten()
        record.add([*made], torch.stack([*made.values()])[:, counted], is_image[counted])


__all__ = ["TaskExperts", "count_experts", "watched_experts"]
