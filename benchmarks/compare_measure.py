"""What `compare` measures of a trained system: accuracy, parameters, FLOPs, how alike experts are, where tokens go."""

import torch

from ..examples.tiny_world.evaluate import family_examples
from ..examples.tiny_world.world import FAMILIES, messages
from ..training.data import ChatCollator
from ..training.train_moe import WithoutSegments
from .compare_systems import Trained


@torch.inference_mode()
def validation_loss(trained: Trained, per_family: int) -> float:
    """Token loss in nats on validation questions, mean over families; of a model that computes one itself."""
    collate = WithoutSegments(ChatCollator(trained.processor, messages))
    trained.model.eval()
    losses = [trained.model(**collate(family_examples(one, per_family, "validation"))).loss for one in FAMILIES]
    return torch.stack(losses).mean().item()


def judged(method, trained, per_family, control_per_family):
    raise NotImplementedError
