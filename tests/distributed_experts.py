"""What test_expert_training.py launches on two processes: `python distributed_experts.py OUT STAGE ...`."""

import sys
from pathlib import Path

import tiny_moe
import torch
from expert_helpers import trainer_for

from roe_llava.training.expert_stages import STAGES


def model():
    """What every stage begins with."""
    return tiny_moe.moe_model(router_type="token_aware")


def train(out: Path, stage: str) -> dict[str, torch.Tensor]:
    """Weights after four steps of eight rows, however many processes share them."""
    learner = model()
    # SGD: Adam would blow up the last bits of gradients that are nearly 0.
    settings = {"optim": "sgd", "learning_rate": 1e-2, "max_grad_norm": 0.0}
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    trainer_for(learner, out, STAGES[stage], per_device_train_batch_size=8 // world, **settings).train()
    return {name: tensor.clone() for name, tensor in learner.state_dict().items()}


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    folder = Path(sys.argv[1])
    for stage in sys.argv[2:]:
        torch.save(train(folder, stage), folder / f"{stage}-{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()
