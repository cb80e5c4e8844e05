"""The stock `Trainer` for a stage of MoE-LLaVA or EvoMoE, with checkpoints of a LLaVA that can be gone on from."""

import json
from pathlib import Path

import torch
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME

from .expert_evolution import ExpertEvolutionCallback, check_evolution
from .expert_stages import ExpertStage
from .trained_weights import load_trained, save_trained

RECORD = "expert_stage.json"


class ExpertTrainer(Trainer):
    """`Trainer` for one stage: `ExpertTrainer(model, stage=STAGES["moe-stage3"], args=..., train_dataset=..., ...)`.

    Loss, optimizer, schedule and loop are Trainer's own; the model adds the balancing loss itself, by its share of the
    labelled tokens under accumulation.

    Args:
        stage: what learns; `requires_grad` and the config of the model are set.
        trained_only: checkpoints hold what learns and not the frozen rest, which the model has already.
        Others: as in `Trainer`.
    Raises: ValueError for a model or arguments that would do nothing or something wrong in this stage.
    """

    def __init__(self, model, *, stage: ExpertStage, trained_only: bool = False, **kwargs):
        self.stage, self.trained_only = stage, trained_only
        self.balance: list[torch.Tensor] = []
        stage.prepare(model)
        super().__init__(model=model, **kwargs)
        self.check_arguments()
        if stage.evolution is not None:
            check_evolution(stage.evolution, self.args, model)
            self.add_callback(ExpertEvolutionCallback(stage.evolution))

    @property
    def is_sharded(self) -> bool:
        """Whether the ranks share the weights out among them (FSDP, DeepSpeed)."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def check_arguments(self) -> None:
        """Raises: ValueError for training arguments that would do something wrong here."""
        args = self.args
        if args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor {args.label_smoothing_factor} replaces the model's loss, and the balancing "
                "loss with it: leave it 0"
            )
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs in one process mean nn.DataParallel, which is not supported: start with "
                "`accelerate launch`, or name one GPU (CUDA_VISIBLE_DEVICES=0)"
            )
        if self.is_sharded and (self.stage.evolution is not None or self.trained_only):
            what = "trained_only" if self.stage.evolution is None else "expert evolution"
            raise ValueError(f"{what} needs whole weights on every process: use DDP instead of FSDP or DeepSpeed")
        low = {one.dtype for one in self.model.parameters() if one.requires_grad and torch.finfo(one.dtype).bits < 32}
        if low:
            raise ValueError(
                f"weights that learn are {', '.join(map(str, low))}, expected float32: small updates vanish when "
                "weights are rounded. Load the model with dtype=torch.float32, and compute with bf16=True"
            )

    def _prepare_inputs(self, inputs: dict) -> dict:
        inputs = super()._prepare_inputs(inputs)
        return inputs if self.stage.single_expert is None else {**inputs, "single_expert": self.stage.single_expert}

    # ---------------------------------------- loss, logs

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        """As in `Trainer`; remembers the balancing loss for the log."""
        is_training = model.training
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        balance = getattr(outputs, "aux_loss", None)
        if is_training and balance is not None and self.stage.single_expert is None:
            self.balance.append(balance.detach())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict, *args, **kwargs):
        """Adds the mean `aux_loss` of this process's batches since the last log: M where M layers are balanced."""
        if "loss" in logs and self.balance:
            logs["aux_loss"] = torch.stack(self.balance).mean().item()
            self.balance = []
        super().log(logs, *args, **kwargs)

    # ---------------------------------------- checkpoints

    def _save(self, output_dir=None, state_dict=None):
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        if not self.trained_only:
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            save_trained(self.accelerator.unwrap_model(self.model), folder, state_dict)
            torch.save(self.args, folder / TRAINING_ARGS_NAME)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / RECORD).write_text(json.dumps(self.stage.to_dict(), indent=2) + "\n", encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        check_same_stage(Path(resume_from_checkpoint), self.stage)
        # The stock method reads hub names with a plain load_state_dict and restores nothing of a LLaVA. Sharded weights
        # have a file of their own, in the model's names, which it reads right.
        if self.is_sharded:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        model = self.model if model is None else model
        if self.trained_only:
            return load_trained(model, resume_from_checkpoint)
        # float32 holds every stored weight exactly, also where frozen ones have 16 bits and others do not.
        saved = type(model).from_pretrained(resume_from_checkpoint, config=model.config, dtype=torch.float32)
        model.load_state_dict(saved.state_dict())

    def _load_best_model(self):
        if self.is_sharded:
            return super()._load_best_model()
        self._load_from_checkpoint(self.state.best_model_checkpoint)  # the stock method fails alike


def check_same_stage(checkpoint: Path, stage: ExpertStage) -> None:
    """Raises: ValueError if a checkpoint is of another stage, or none of these."""
    path, ours = checkpoint / RECORD, json.loads(json.dumps(stage.to_dict()))
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): is it a checkpoint of ExpertTrainer, and whole?") from error
    if before != ours:
        changed = sorted(name for name in {*before, *ours} if before.get(name) != ours.get(name))
        shown = "; ".join(f"{name} {before.get(name)!r} there, {ours.get(name)!r} here" for name in changed)
        raise ValueError(
            f"{checkpoint} belongs to another stage: {shown}. A new stage starts from a model, not from a checkpoint "
            "to resume"
        )


__all__ = ["ExpertTrainer"]
