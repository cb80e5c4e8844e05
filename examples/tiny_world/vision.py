"""The two short stages before the decoder: teach the vision tower what a cell holds, then speak the decoder's words.

A frozen, already seeing tower is what lets the decoder learn within minutes; trained together from scratch, both stay
at the level of guessing (the first noisy steps of the decoder probably destroy what the tower has).
"""

import math
import random

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from .lessons import IGNORED, pixels
from .world import CELLS, COLORS, FORMS, GRID, SIZES, Form, Scene, random_digit, random_form, random_scene, render

HEADS = {"kind": 3, "size": len(SIZES), "color": len(COLORS), "form": len(FORMS), "digit": 10, "cell": len(CELLS)}


def crowded_scene(rng: random.Random, split: str) -> Scene:
    """A scene with a form, a digit or nothing in each cell, so that each picture shows many digits."""
    makers = (random_form, lambda rng: random_digit(rng, split), lambda rng: random_digit(rng, split), lambda rng: None)
    return Scene(tuple(rng.choice(makers)(rng) for _ in CELLS), rng.randint(10, 40))


def scene_batch(
    rng: random.Random, processor: LlavaProcessor, size: int, split: str = "train"
) -> tuple[list[Scene], Tensor]:
    """Half ordinary and half crowded scenes, and their pictures (size, 3, side, side)."""
    scenes = [(crowded_scene if i % 2 else random_scene)(rng, split) for i in range(size)]
    return scenes, pixels([{"image": render(scene)} for scene in scenes], processor)


def cell_targets(scenes: list[Scene]) -> Tensor:
    """Class of each cell for each head: (heads, B, 16); `IGNORED` where a head has nothing to say."""
    rows = []
    for scene in scenes:
        for cell, thing in enumerate(scene.cells):
            if isinstance(thing, Form):
                words = [list(SIZES).index(thing.size), list(COLORS).index(thing.color), FORMS.index(thing.form)]
                rows.append([1, *words, IGNORED, cell])
            else:
                digit = IGNORED if thing is None else thing.value
                rows.append([0 if thing is None else 2, IGNORED, IGNORED, IGNORED, digit, cell])
    return torch.tensor(rows).T.reshape(len(HEADS), len(scenes), len(CELLS))


def patch_features(model: LlavaForConditionalGeneration, images: Tensor) -> Tensor:
    """What the projector is given: (B, patches, width) features, without the class token where there is one."""
    outputs = model.model.vision_tower(images, output_hidden_states=True)
    features = outputs.hidden_states[model.config.vision_feature_layer]
    return features[:, 1:] if model.config.vision_feature_select_strategy == "default" else features


def by_cell(features: Tensor) -> Tensor:
    """(B, patches, width) to (B, 16, width of all patches of a cell), cells row by row."""
    batch_size, num_patches, width = features.shape
    per_cell = math.isqrt(num_patches) // GRID
    grid = features.view(batch_size, GRID, per_cell, GRID, per_cell, width).transpose(2, 3)
    return grid.reshape(batch_size, GRID * GRID, -1)


def projected_cells(model: LlavaForConditionalGeneration, features: Tensor) -> Tensor:
    """(B, 16, D): the image tokens, cells row by row."""
    tokens = model.model.multi_modal_projector(features)
    is_by_column = getattr(model.config, "projector_type", None) == "mlp_downsample"
    return tokens.unflatten(1, (GRID, GRID)).transpose(1, 2).flatten(1, 2) if is_by_column else tokens


def _optimizer(
    parameters, rate: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.05, fused=True)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=max(0.1, 2 / steps)
    )


def train_vision(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    steps: int,
    seed: int = 0,
    batch_size: int = 64,
) -> dict[str, float]:
    """Trains the vision tower on the properties of each cell, then freezes it. The heads are thrown away.

    Returns: share of held-out cells ("validation") named right, by head.
    """
    rng = random.Random(f"vision/{seed}")
    with torch.no_grad():
        width = by_cell(patch_features(model, scene_batch(random.Random(0), processor, 1)[1])).shape[-1]
    heads = nn.ModuleDict({name: nn.Linear(width, n) for name, n in HEADS.items()})
    tower = model.model.vision_tower.train()
    optimizer, schedule = _optimizer([*tower.parameters(), *heads.parameters()], 2e-3, steps)
    for _ in (bar := tqdm(range(steps), desc="vision tower")):
        scenes, images = scene_batch(rng, processor, batch_size)
        features = by_cell(patch_features(model, images))
        logits = [head(features) for head in heads.values()]
        pairs = zip(logits, cell_targets(scenes), strict=True)
        loss = sum(F.cross_entropy(x.flatten(0, 1), y.flatten(), ignore_index=IGNORED) for x, y in pairs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    tower.requires_grad_(False).eval()
    return vision_accuracy(model, processor, heads, random.Random(f"vision/{seed}/validation"))


@torch.no_grad()
def vision_accuracy(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    heads: nn.ModuleDict,
    rng: random.Random,
    size: int = 400,
) -> dict[str, float]:
    """Share of held-out cells each head names right."""
    scenes, images = scene_batch(rng, processor, size, "validation")
    features = by_cell(patch_features(model, images))
    accuracy = {}
    for (name, head), target in zip(heads.items(), cell_targets(scenes), strict=True):
        right = (head(features).argmax(-1) == target)[target != IGNORED]
        accuracy[name] = right.float().mean().item()
    return accuracy


def word_sums(processor: LlavaProcessor, embeddings: Tensor, scenes: list[Scene]) -> Tensor:
    """For each cell the sum of the vectors of the words that name it and its contents: (B, 16, D)."""
    texts = [f"{CELLS[cell]} {scene.name(cell)}" for scene in scenes for cell in range(len(CELLS))]
    encoded = processor.tokenizer(texts, padding=True, return_tensors="pt")
    vectors = embeddings[encoded["input_ids"]] * encoded["attention_mask"][..., None]
    return vectors.sum(1).reshape(len(scenes), len(CELLS), -1)


def align_projector(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, steps: int, seed: int = 0, batch_size: int = 64
) -> float:
    """Regresses the projected patches on `word_sums`, so that the decoder meets pictures in the words it knows.

    Returns: the unexplained share of the variance at the last step.
    """
    rng = random.Random(f"projector/{seed}")
    embeddings = model.get_input_embeddings().weight.detach()
    projector = model.model.multi_modal_projector
    optimizer, schedule = _optimizer(projector.parameters(), 1e-2, steps)
    share = float("nan")
    for _ in (bar := tqdm(range(steps), desc="projector")):
        scenes, images = scene_batch(rng, processor, batch_size)
        with torch.no_grad():
            features, target = patch_features(model, images), word_sums(processor, embeddings, scenes)
        loss = F.mse_loss(projected_cells(model, features), target) / target.var()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        share = loss.item()
        bar.set_postfix(unexplained=f"{share:.3f}", refresh=False)
    return share
