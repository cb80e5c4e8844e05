"""The stock `Trainer` with RoE's loss, parameter groups by name, and stages that follow from the step alone."""

from dataclasses import replace

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback

from .across_ranks import DrawsOfRank, look_at_every_batch, mean_over_ranks
from .objective import Objective, hard_skip_ratio
from .published import PublishedSchedule
from .schedule import StageSchedule

GROUPS = ("adapter", "router", "routing_tokens", "base")


def group_of(name: str) -> str:
    """Parameter group a parameter belongs to, by its name."""
    return next((group for group in GROUPS[:-1] if f".{group}." in name), "base")


def parameter_groups(model, rates: dict[str, float]) -> list[dict]:
    """One optimizer group per name in `rates`; groups left out, and the vision tower, are frozen.

    Args:
        model: a RoE-LLaVA; `requires_grad` of its parameters is set.
        rates: learning rate per group, e.g. {"adapter": 4e-4, "router": 4e-4, "routing_tokens": 4e-4}.
    Raises: ValueError for an unknown group name.
    """
    unknown = set(rates) - set(GROUPS)
    if unknown:
        raise ValueError(f"unknown parameter groups {sorted(unknown)}, expected some of {GROUPS}")
    members = {group: [] for group in rates}
    for name, parameter in model.named_parameters():
        group = group_of(name)
        parameter.requires_grad_(group in rates and "vision_tower" not in name)
        if parameter.requires_grad:
            members[group].append(parameter)
    return [{"name": group, "params": members[group], "lr": rates[group], "weight_decay": 0.0} for group in rates]


class RoutingScheduleCallback(TrainerCallback):
    """Sets the model's routing phase before every step: a function of the step, so resuming needs no state.

    Attributes:
        draws_by_row: whether random decisions are `DrawsOfRank`; by default where there are several ranks.
    """

    def __init__(self, schedule: StageSchedule | PublishedSchedule):
        self.schedule = schedule
        self.done = 0  # micro-batches of this optimizer step
        self.draws_by_row: bool | None = None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.done = 0
        model.model.routing_phase = self.phase(args, state)

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        self.done += 1
        model.model.routing_phase = self.phase(args, state)

    def phase(self, args, state):
        """Phase of the next micro-batch."""
        counted = self.done / args.gradient_accumulation_steps if self.schedule.counts_micro_batches else 0
        phase = self.schedule.phase((state.global_step + counted) / state.max_steps)
        by_row = args.world_size > 1 if self.draws_by_row is None else self.draws_by_row
        if not by_row or phase.draws is not None:
            return phase
        number = state.global_step * args.gradient_accumulation_steps + self.done
        return replace(phase, draws=DrawsOfRank(args.seed, number, args.process_index, args.world_size))


def let_ddp_find_unused(args) -> None:
    """Have DDP look for parameters without a gradient: routers in the warm-up, the projector in a text-only batch.

    `Trainer` does so unless gradients are checkpointed, where only the reentrant kind, refused here, forbids it. A term
    of 0 times those parameters would serve DDP too, but their Adam states would count the steps, unlike in one process.

    Raises: ValueError if the caller has turned it off.
    """
    if args.ddp_find_unused_parameters is False and args.world_size > 1:
        raise ValueError(
            "ddp_find_unused_parameters=False cannot be: routers get no gradient in the random warm-up, and DDP would "
            "stop in its second step; leave it out"
        )
    args.ddp_find_unused_parameters = True


class RoeTrainer(Trainer):
    """`Trainer` for RoE: `RoeTrainer(model, schedule=..., objective=..., rates=..., args=..., train_dataset=..., ...)`.

    Args:
        schedule: stages of the run; `PublishedSchedule` for those of the published code.
        objective: loss of a step.
        rates: learning rate per parameter group; see `parameter_groups`.
        Others: as in `Trainer`. The scheduler is cosine with 5 % warm-up, switched per group by the stage.
    """

    def __init__(
        self,
        model,
        *,
        schedule: StageSchedule | PublishedSchedule,
        objective: Objective,
        rates: dict[str, float],
        **kwargs,
    ):
        self.schedule, self.objective = schedule, objective
        self.groups = parameter_groups(model, rates)
        self._decisions: list[tuple[float, float]] = []  # (hard skip ratio, skip weight) since the last log
        if kwargs.get("args") is not None:
            let_ddp_find_unused(kwargs["args"])
        super().__init__(model=model, **kwargs)
        self.routing_callback = RoutingScheduleCallback(schedule)
        self.add_callback(self.routing_callback)
        if self.is_sharded:
            look_at_every_batch(model)
        self.model_accepts_loss_kwargs = False  # a mean over examples: accumulation steps have to be divided by

    @property
    def is_sharded(self) -> bool:
        """Whether the ranks share the weights out among them (FSDP, DeepSpeed)."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def create_optimizer(self, model=None):
        """AdamW over the named groups."""
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(
                self.groups, betas=(self.args.adam_beta1, self.args.adam_beta2), eps=self.args.adam_epsilon
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """The schedule's share of every group's rate."""
        if self.lr_scheduler is None:

            def factor_of(group):
                return lambda step: self.schedule.rate_factor(group, step, num_training_steps)

            optimizer = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = LambdaLR(optimizer, [factor_of(group["name"]) for group in self.groups])
        return self.lr_scheduler

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The objective on the model's outputs; the model itself gets no labels and computes no loss."""
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        progress = self.state.global_step / max(self.state.max_steps, 1)
        loss = self.objective.loss(outputs, labels, self.schedule.stage(progress))
        if outputs.turn_skip_weights is not None and outputs.turn_router_logits is not None:
            weight = outputs.turn_skip_weights[outputs.turn_mask].mean().item()
            self._decisions.append((hard_skip_ratio(outputs), weight))
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict, *args, **kwargs):
        """Adds the routers' skip ratio (what inference would do) and the mean skip weight since the last log."""
        if self._decisions and "loss" in logs:
            # Of all ranks, which log at the same steps.
            hard, soft = mean_over_ranks(torch.tensor(self._decisions, device=self.args.device)).tolist()
            logs |= {"hard_skip_ratio": round(hard, 4), "skip_weight": round(soft, 4)}
            self._decisions.clear()
        super().log(logs, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        # The stock method reads hub names with a plain load_state_dict and restores nothing of a LLaVA. Sharded weights
        # have a file of their own, in the model's names, which it reads right.
        if self.is_sharded:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        model = self.model if model is None else model
        saved = type(model).from_pretrained(resume_from_checkpoint, config=model.config)
        model.load_state_dict(saved.state_dict())

    def _load_best_model(self):
        if self.is_sharded:
            return super()._load_best_model()
        self._load_from_checkpoint(self.state.best_model_checkpoint)  # the stock method fails alike


__all__ = ["RoeTrainer", "RoutingScheduleCallback", "parameter_groups"]
