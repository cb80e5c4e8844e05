"""The stock `Trainer` with RoE's loss, parameter groups by name, and stages that follow from the step alone."""

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, get_scheduler
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_optimizer import is_optimizer_factory
from transformers.trainer_utils import has_length
from transformers.utils import logging

from ..baked_roe import refuse_baked
from ..phases_roe import RoutingPhase
from .across_ranks import DrawsOfRank, look_at_every_batch
from .data import batches_of, spread_over
from .meter import RoutingMeter
from .objective import Objective
from .parameter_groups import NO_DECAY, choose_trained, group_of, parameter_groups
from .published import PublishedSchedule
from .schedule import StageSchedule
from .teacher import TAUGHT, RouteTeacher, TaughtObjective, TaughtSchedule
from .trained_weights import load_trained, save_trained

logger = logging.get_logger(__name__)

# What optimizers that do their own grouping, or keep their own rates, leave in their arguments.
OWN_GROUPS = {"params", "model", "optimizer_dict"}


class RoutingScheduleCallback(TrainerCallback):
    """Sets the model's routing phase before every step: a function of the step, so resuming needs no state.

    Attributes:
        draws_by_row: whether random decisions are `DrawsOfRank`; by default where there are several ranks.
        at_least_one: of the phases, as `RoutingPhase.at_least_one`.
    """

    def __init__(self, schedule: StageSchedule | PublishedSchedule):
        self.schedule = schedule
        self.done = 0  # micro-batches of this optimizer step
        self.draws_by_row: bool | None = None
        self.at_least_one = False

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
        if self.at_least_one:
            phase = replace(phase, at_least_one=True)
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

    `args` are honoured or refused: optimizer, scheduler, warm-up and weight decay are Trainer's own (norms, biases and
    routing tokens do not decay); the stage only switches a group's rate off and on.

    Args:
        schedule: stages of the run; `PublishedSchedule` for those of the published code.
        objective: loss of a step.
        rates: learning rate per parameter group, `None` for `args.learning_rate`; groups left out are frozen.
        teacher: gives the routes while a `TaughtSchedule` teaches.
        trained_only: checkpoints hold what learns and not the frozen rest, which the model has already.
        Others: as in `Trainer`.
    Raises: ValueError for arguments that would do nothing or something wrong here.
    """

    def __init__(
        self,
        model,
        *,
        schedule: StageSchedule | PublishedSchedule | TaughtSchedule,
        objective: Objective | TaughtObjective,
        rates: dict[str, float | None],
        trained_only: bool = False,
        teacher: RouteTeacher | None = None,
        **kwargs,
    ):
        self.schedule, self.objective, self.rates, self.trained_only = schedule, objective, rates, trained_only
        self.teacher = teacher
        if (teacher is not None) != isinstance(schedule, TaughtSchedule):
            raise ValueError("a TaughtSchedule needs a teacher, and no other schedule has use for one")
        refuse_baked(getattr(model.config, "skipped_layers", None), "there is no routing to train", "the model")
        self.meter, self.eval_meter = RoutingMeter(), RoutingMeter()
        if "router" in rates and model.config.route_bias is not None:
            logger.info("config.route_bias was found for the routers as they were: training begins without it")
            model.config.route_bias = None
        choose_trained(model, rates)
        if kwargs.get("args") is not None:
            let_ddp_find_unused(kwargs["args"])
        super().__init__(model=model, **kwargs)
        check_arguments(self.args)
        if teacher is not None:  # a search that cannot be is known before the first step
            teacher.check(model)
            if self.train_dataset is not None:
                self.search_indices()
        self.chosen_optimizer()
        if self.args.max_steps > 0:  # else it is checked when the number of steps is known
            self.rate_factor(self.args.max_steps)
        self.routing_callback = RoutingScheduleCallback(schedule)
        # Where a layer's own weights learn, Adam is to count a step of them, in one process as in several.
        self.routing_callback.at_least_one = self.is_sharded or bool({"base", "lora"} & rates.keys())
        self.add_callback(self.routing_callback)
        if self.is_sharded:
            look_at_every_batch(model)
        self.model_accepts_loss_kwargs = False  # a mean over examples: accumulation steps have to be divided by

    @property
    def is_sharded(self) -> bool:
        """Whether the ranks share the weights out among them (FSDP, DeepSpeed)."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    # ---------------------------------------- optimizer, rates

    def chosen_optimizer(self, model=None) -> tuple[type, dict]:
        """Class and options of the optimizer that `args.optim` names.

        Raises: ValueError for one that forms its own groups or rates.
        """
        name = str(getattr(self.args.optim, "value", self.args.optim))
        try:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model if model is None else model)
        except ImportError as error:
            raise ValueError(f"optim {name!r} needs a package: {error}") from error
        if is_optimizer_factory(kind) or OWN_GROUPS & options.keys() or name.startswith("schedule_free"):
            raise ValueError(
                f"optim {name!r} forms its own parameter groups or learning rates, which the stages of RoE switch: "
                "take another one, such as adamw_torch, adamw_bnb_8bit or adafactor"
            )
        return kind, options

    def create_optimizer(self, model=None):
        """The optimizer that `args.optim` names, over the named groups.

        Raises: ValueError for one that forms its own.
        """
        if self.optimizer is None:
            model = self.model if model is None else model
            rates = {group: self.args.learning_rate if rate is None else rate for group, rate in self.rates.items()}
            kind, options = self.chosen_optimizer(model)
            groups = parameter_groups(model, rates, self.args.weight_decay)
            self.optimizer_cls_and_kwargs = kind, {**options, "params": groups}
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """`args.lr_scheduler_type` with its warm-up, times 0 where a stage does not train a group.

        Raises: ValueError for a scheduler that is no function of the step, or not the published one.
        """
        if self.lr_scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            factor = self.rate_factor(num_training_steps)

            def factor_of(group):
                group = group.removesuffix(NO_DECAY)
                stage_group = "base" if group == "lora" else group  # LoRA is how the base learns
                return lambda step: (
                    factor(step) * self.schedule.trains(stage_group, min(step / num_training_steps, 1.0))
                )

            self.lr_scheduler = LambdaLR(optimizer, [factor_of(group["name"]) for group in optimizer.param_groups])
            self._created_lr_scheduler = True  # has the stock Trainer make a new one when `train` is called again
        return self.lr_scheduler

    def rate_factor(self, num_training_steps: int):
        """The scheduler's share of the peak rate as a function of the step."""
        name, warmup = self.args.lr_scheduler_type, self.args.get_warmup_steps(num_training_steps)
        published = isinstance(self.schedule, PublishedSchedule)
        if published and (name != "cosine" or warmup != math.ceil(0.05 * num_training_steps)):
            raise ValueError(
                "the published schedule has lr_scheduler_type='cosine' and warmup_steps=0.05 (5 %), got "
                f"{str(getattr(name, 'value', name))!r} with {warmup} of {num_training_steps} steps"
            )
        plain = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        stock = get_scheduler(
            name, plain, warmup, num_training_steps, scheduler_specific_kwargs=self.args.lr_scheduler_kwargs
        )
        if not isinstance(stock, LambdaLR):
            raise ValueError(
                f"lr_scheduler_type {str(getattr(name, 'value', name))!r} is not a function of the step, which stages "
                "can switch: take another one, such as linear, cosine or constant_with_warmup"
            )
        return stock.lr_lambdas[0]

    # ---------------------------------------- loss, logs

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The objective on the model's outputs; the model itself gets no labels and computes no loss."""
        is_training = model.training
        stage = self.schedule.stage(self.state.global_step / max(self.state.max_steps, 1))
        is_taught = is_training and self.teacher is not None and stage == TAUGHT
        if is_taught:
            self.give_routes(inputs)
        labels = inputs.pop("labels")
        outputs = model(**inputs) if is_training else model(**inputs, use_cache=False)
        if is_taught:
            self.teacher.see(outputs)
        loss = self.objective.loss(outputs, labels, stage)
        if is_training:
            loss = loss + self.accelerator.unwrap_model(model).loss_of_base(outputs)
        (self.meter if is_training else self.eval_meter).add(outputs, labels, loss)
        return (loss, outputs) if return_outputs else loss

    def give_routes(self, inputs: dict) -> None:
        """Set the teacher's routes for a batch; the first time, they are searched on a sample of the training data."""
        if not self.teacher.is_ready:
            quiet = self.args.disable_tqdm or not self.is_world_process_zero()
            self.teacher.search(self.model, self.search_batches(), self._prepare_inputs, quiet)
            logger.info(f"routes found: {self.teacher.describe()}")
        routes = self.teacher.teach(self.model, inputs).to(self.args.device)
        at_least_one = self.routing_callback.at_least_one
        self.model.model.routing_phase = RoutingPhase("given", routes=routes, at_least_one=at_least_one)

    def search_indices(self) -> list[int]:
        """Which examples routes are searched on: spread evenly over the training data.

        Raises: ValueError for a dataset without a length, or fewer examples than processes.
        """
        if not has_length(self.train_dataset):
            raise ValueError("routes are searched on examples spread over the data: the dataset needs a length")
        size, number = len(self.train_dataset), self.teacher.teaching.searched_examples
        indices = spread_over(size, number)
        if len(indices) < self.accelerator.num_processes:
            raise ValueError(
                f"{len(indices)} examples to search routes on are fewer than the {self.accelerator.num_processes} "
                "processes: take more searched_examples, or more data"
            )
        return indices

    def search_batches(self) -> list[dict]:
        """This process's part of `search_indices`, in batches."""
        indices = self.search_indices()
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        share = len(indices) // ranks  # the same number of batches for all: sharded weights are gathered together
        own = indices[rank * share : (rank + 1) * share]
        return batches_of(self.train_dataset, own, self.args.per_device_train_batch_size, self.data_collator)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """As in `Trainer`, under hard routing; its skip ratio is among the metrics."""
        self.eval_meter = RoutingMeter()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        found = self.eval_meter.take(self.accelerator)
        measured = {name: value for name, value in found.items() if name == "hard_skip_ratio" or "skip/" in name}
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in measured.items()})
        return output

    def log(self, logs: dict, *args, **kwargs):
        """Adds what `RoutingMeter` saw since the last log, the stage, and every group's learning rate."""
        if "loss" in logs:
            progress = max(self.state.global_step - 1, 0) / max(self.state.max_steps, 1)  # of the step just done
            phase = self.schedule.phase(progress)
            logs |= self.meter.take(self.accelerator)
            logs |= {"stage": int(self.schedule.stage(progress)), "keep_bias": phase.keep_bias}
            logs["temperature"] = phase.temperature
            if self.teacher is not None and self.teacher.is_ready:
                logs |= {"price": self.teacher.values.price, "aimed_skip_ratio": self.teacher.values.aimed}
            if self.optimizer is not None:
                rates = {group["name"]: group["lr"] for group in self.optimizer.param_groups}
                logs |= {f"learning_rate/{name}": rate for name, rate in rates.items() if not name.endswith(NO_DECAY)}
        super().log(logs, *args, **kwargs)

    # ---------------------------------------- checkpoints

    def _save(self, output_dir=None, state_dict=None):
        if self.teacher is not None and self.args.should_save:
            Path(output_dir or self.args.output_dir).mkdir(parents=True, exist_ok=True)
            self.teacher.save(output_dir or self.args.output_dir)
        if not self.trained_only:
            return super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = self.args.output_dir if output_dir is None else output_dir
            save_trained(self.accelerator.unwrap_model(self.model), folder, state_dict)
            torch.save(self.args, f"{folder}/{TRAINING_ARGS_NAME}")

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.teacher is not None:
            self.teacher.load(resume_from_checkpoint)
        # The stock method reads hub names with a plain load_state_dict and restores nothing of a LLaVA. Sharded weights
        # have a file of their own, in the model's names, which it reads right.
        if self.is_sharded:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        model = self.model if model is None else model
        if self.trained_only:
            load_trained(model, resume_from_checkpoint)
        else:
            saved = type(model).from_pretrained(resume_from_checkpoint, config=model.config)
            model.load_state_dict(saved.state_dict())

    def _load_best_model(self):
        if self.is_sharded:
            return super()._load_best_model()
        self._load_from_checkpoint(self.state.best_model_checkpoint)  # the stock method fails alike


def check_arguments(args) -> None:
    """Raises: ValueError for training arguments that would do nothing, or something wrong, under RoE's loss."""
    if args.label_smoothing_factor:
        raise ValueError(f"label_smoothing_factor {args.label_smoothing_factor} is not part of RoE's loss: leave it 0")
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process mean nn.DataParallel, which cannot carry routes: start with "
            "`accelerate launch`, or name one GPU (CUDA_VISIBLE_DEVICES=0)"
        )
    if args.torch_compile:
        raise ValueError(
            "torch_compile: a training pass keeps its routes in an object that is not compiled; leave it out"
        )
    if args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        raise ValueError("use_reentrant=True loses the gradients of routing tokens: leave it out, or set it False")
    if args.auto_find_batch_size:
        raise ValueError("auto_find_batch_size starts over with other batches, which the stages cannot: choose a size")
    if args.use_liger_kernel:
        raise ValueError("use_liger_kernel replaces the forward pass whose logits RoE's loss needs: leave it out")


__all__ = ["RoeTrainer", "RoutingScheduleCallback", "group_of", "parameter_groups"]
