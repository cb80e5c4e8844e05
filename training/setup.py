"""From options to what the trainer needs: model and processor, data, schedule, objective, rates, number of steps."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainingArguments

from ..baked_roe import refuse_baked
from ..convert.bases import A_BASE, A_ROUTED_MODEL, is_base, is_routed, refuse_other_bases, routed_kind
from ..convert.completeness import check_files
from ..convert.fingerprint import describe_base
from ..convert.source import Source, blamed_on, read_json, resolve_source
from ..grafting_roe import no_warning_of_missing_parts
from ..processing_roe import RoutedProcessor
from .bad_rows import BadRows
from .chat_prompt import close_answers
from .conversations import ConversationCollator, load_conversations, split_conversations
from .lora import add_lora
from .objective import Objective
from .options import DataOptions, ModelOptions, Options, RoutingOptions
from .parameter_groups import group_of
from .published import published_recipe
from .schedule import StageSchedule
from .teacher import RouteTeacher, TaughtObjective, TaughtSchedule, Teaching

ROUTING_GROUPS = ("adapter", "router", "routing_tokens")


@dataclass
class Data:
    """Rows to train and to evaluate on (`None` for none), and what was wrong with others."""

    train: Any
    evaluation: Any
    bad: list[BadRows]
    collate: ConversationCollator

    @property
    def num_bad(self) -> int:
        return sum(len(report) for report in self.bad)


# ------------------------------------------------------------------------------------------------ model and processor


def find_model(options: ModelOptions) -> Source:
    """The checkpoint to start from.

    Raises: ValueError if it is none, or of another kind.
    """
    source = resolve_source(options.model, options.revision)
    config = read_json(source.folder / "config.json")
    model_type = config.get("model_type")
    if not is_base(model_type) and not is_routed(model_type):
        raise ValueError(
            f"{source.folder} has model_type {model_type!r}, expected {A_BASE}, or {A_ROUTED_MODEL}: an "
            "original LLaVA goes through roe-llava import-llava first"
        )
    refuse_baked(config.get("skipped_layers"), "there is no routing to train", source.folder)
    check_files(source.folder)
    return source


def describe_source(source: Source) -> dict:
    """Record of the base's weights in a checkpoint; one of RoE whose base was not tuned is known by its base's name.

    Raises: ValueError as `describe_base`.
    """
    record = describe_base(source.folder, base_id=source.id) | {"revision": source.revision}
    known = (read_json(source.folder / "config.json").get("roe_provenance") or {}).get("base") or {}
    if known.get("fingerprint") == record["fingerprint"]:
        record |= {"id": known["id"], "revision": known["revision"]}
    return record


def load_processor(source: Source) -> RoutedProcessor:
    """The checkpoint's processor, its chat template closing answers.

    Raises: ValueError if the folder has none.
    """
    try:
        cls = routed_kind(read_json(source.folder / "config.json")).processor
        processor = cls.from_pretrained(source.folder, trust_remote_code=False)
    except Exception as error:  # a missing file gives whatever the library stumbles over
        raise ValueError(
            f"{source.folder} has no complete processor (tokenizer, image processor, processor_config.json), which "
            f"training needs: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from error
    close_answers(processor)
    return processor


def load_model(options: ModelOptions, source: Source, target: float, in_bfloat16: bool):
    """(model, PEFT's wrapper or `None`); what learns is float32.

    Raises: ValueError if routing fields do not fit the checkpoint.
    """
    given = {"adapter_size": options.adapter_size, "routed_layers": options.routed_layers}
    given |= {"attn_implementation": options.attn_implementation}
    fields = {name: value for name, value in given.items() if value is not None}
    # Not from_pretrained, whose warning of untrained parts says what is about to be mended.
    with blamed_on(source.folder), no_warning_of_missing_parts():
        model, _ = routed_kind(read_json(source.folder / "config.json")).model._load(
            source.folder,
            dtype=loaded_dtype(options, in_bfloat16),
            target_skip_ratio=target,
            skip_calibration=None,  # a table holds for the routers it was measured with
            **fields,
        )
    for name, parameter in model.named_parameters():
        if group_of(name) in ROUTING_GROUPS:
            parameter.data = parameter.data.float()
    if options.train_base != "lora":
        return model, None
    wrapped = add_lora(model, options.lora_rank, options.lora_alpha, options.lora_dropout)
    return model, wrapped


def loaded_dtype(options: ModelOptions, in_bfloat16: bool) -> torch.dtype:
    """Dtype of the base in training.

    Raises: ValueError if all of it learns in anything but float32.
    """
    if options.base_dtype == "auto":
        return torch.bfloat16 if in_bfloat16 and options.train_base != "full" else torch.float32
    if options.train_base == "full" and options.base_dtype != "float32":
        raise ValueError(
            f"base_dtype {options.base_dtype!r} with train_base 'full': updates of 1e-6 vanish when weights are "
            "rounded to 16 bits; leave it out, and compute in bfloat16 with --bf16"
        )
    return getattr(torch, options.base_dtype)


def check_vocabulary(model, processor, where) -> None:
    """Raises: ValueError if tokenizer and model do not belong together."""
    rows, tokens = model.get_input_embeddings().weight.shape[0], len(processor.tokenizer)
    if tokens > rows:
        raise ValueError(f"{where}: the tokenizer has {tokens} tokens, the model {rows}: do they belong together?")
    ours, theirs = processor.image_token_id, model.config.image_token_id
    if ours != theirs:
        raise ValueError(
            f"{where}: the processor's image token {processor.image_token!r} is {ours}, the model's {theirs}: do they "
            "belong together?"
        )


def parameter_counts(model) -> dict[str, int]:
    """Number of parameters that learn by group, and of frozen ones under "frozen"."""
    counts = Counter()
    for name, parameter in model.named_parameters():
        counts[group_of(name) if parameter.requires_grad else "frozen"] += parameter.numel()
    return dict(counts)


# ---------------------------------------------------------------------------------------------------------------- data


def load_data(options: DataOptions, processor, training: TrainingArguments) -> Data:
    """Rows for training and evaluation.

    Raises: ValueError as `load_conversations`.
    """

    def load(source):
        return load_conversations(
            source,
            options.image_folder,
            processor=processor,
            max_length=options.max_length,
            on_bad=options.on_bad,
            check=options.check,
            workers=options.check_workers,
        )

    train, bad = load(options.data)
    reports, evaluation = [bad], None
    if options.eval_data is not None:
        evaluation, bad = load(options.eval_data)
        reports.append(bad)
    elif options.eval_share is not None:
        train, evaluation = split_conversations(train, options.eval_share, training.seed)
    return Data(train, evaluation, reports, ConversationCollator(processor, options.max_length))


def number_of_steps(training: TrainingArguments, examples: int) -> int:
    """Optimizer steps of the run, as `Trainer` counts them."""
    if training.max_steps > 0:
        return training.max_steps
    batch = training.per_device_train_batch_size * training.world_size
    batches = examples // batch if training.dataloader_drop_last else math.ceil(examples / batch)
    if batches == 0:
        raise ValueError(f"{examples} rows make no batch of {batch}, and dataloader_drop_last leaves out smaller ones")
    steps = math.ceil(training.num_train_epochs * max(1, math.ceil(batches / training.gradient_accumulation_steps)))
    if steps < 1:
        raise ValueError(f"num_train_epochs {training.num_train_epochs} and max_steps {training.max_steps}: no step")
    return steps


# ------------------------------------------------------------------------------------------------- schedule, objective


def schedule_and_objective(options: Options, steps: int, model, collate):
    """(schedule, objective, collator); the published ones set the model's configuration too.

    Raises: ValueError for what a schedule cannot run.
    """
    routing, accumulation = options.routing, options.training.gradient_accumulation_steps
    if routing.schedule == "published":
        refuse_other_bases(model.config.model_type, "the model to train", "schedule 'published'")
        recipe = published_recipe(steps * accumulation, accumulation, routing.target_skip_ratio)
        recipe.prepare(model)
        objective = recipe.objective if routing.budget == "published" else make_objective(routing)
        return recipe.schedule, objective, recipe.collator(collate, model.config)
    if routing.schedule == "taught":
        schedule = TaughtSchedule(routing.target_skip_ratio, routing.warmup_end, routing.taught_end)
        return schedule, TaughtObjective(routing.imitation_weight), collate
    schedule = StageSchedule(
        target_skip_ratio=routing.target_skip_ratio,
        warmup_end=routing.warmup_end,
        soft_end=routing.soft_end,
        last_mode=routing.last_mode,
        temperature_start=routing.temperature_start,
        temperature_decay=routing.temperature_decay,
        temperature_floor=routing.temperature_floor,
        gumbel_end=routing.gumbel_end,
    )
    return schedule, make_objective(routing), collate


def make_teacher(options: Options) -> RouteTeacher | None:
    """Who gives the routes under schedule "taught".

    Raises: ValueError as `Teaching`.
    """
    routing = options.routing
    if routing.schedule != "taught":
        return None
    names = ("num_routes", "searched_routes", "searched_examples", "measured_routes", "max_loss")
    teaching = Teaching(**{name: getattr(routing, name) for name in names})
    return RouteTeacher(routing.target_skip_ratio, teaching, options.training.seed)


def make_objective(routing: RoutingOptions) -> Objective:
    return Objective(
        routing.target_skip_ratio, routing.budget, routing.budget_weight, information_weight=routing.information_weight
    )


def learning_rates(options: Options) -> dict[str, float]:
    """Peak learning rate per group that learns.

    Raises: ValueError for a rate of a group that does not learn.
    """
    routing, plain = options.routing, options.training.learning_rate
    base = {"frozen": None, "full": "base", "lora": "lora"}[options.model.train_base]
    if base is None and routing.base_learning_rate is not None:
        raise ValueError(f"base_learning_rate {routing.base_learning_rate} with train_base 'frozen': nothing takes it")
    rates = {
        "adapter": routing.adapter_learning_rate,
        "router": routing.router_learning_rate,
        "routing_tokens": routing.router_learning_rate,
    } | ({} if base is None else {base: routing.base_learning_rate})
    return {group: plain if rate is None else rate for group, rate in rates.items()}


def check_learning(schedule, rates: dict[str, float], steps: int, model) -> None:
    """Raises: ValueError if a group has no stage to learn in, or layers with a router are fewer than the target."""
    progress = [step / steps for step in range(steps)]
    idle = [
        group
        for group in rates
        if not any(schedule.trains("base" if group == "lora" else group, share) for share in progress)
    ]
    if idle:
        raise ValueError(
            f"{', '.join(idle)} would never learn: no stage for them in {steps} steps; move the ends of the stages "
            "(taught_end, soft_end), or take more steps"
        )
    layers = model.model.language_model.layers
    routed = sum(layer.router is not None for layer in layers) / len(layers)
    if routed < schedule.target_skip_ratio:
        raise ValueError(
            f"{routed:.0%} of the layers have a router, so the target of {schedule.target_skip_ratio:.0%} cannot be "
            "skipped: name more routed_layers, or ask for less"
        )


def stages_in_steps(schedule, steps: int) -> list[tuple[int, str, int, int]]:
    """(stage, mode, first step, last step) of a run, steps counted from 1."""
    found: list[tuple[int, str, int, int]] = []
    for step in range(steps):
        stage, mode = int(schedule.stage(step / steps)), schedule.phase(step / steps).mode
        if found and found[-1][:2] == (stage, mode):
            found[-1] = (stage, mode, found[-1][2], step + 1)
        else:
            found.append((stage, mode, step + 1, step + 1))
    return found


__all__ = ["Data", "load_data", "load_model", "load_processor", "number_of_steps", "schedule_and_objective"]
