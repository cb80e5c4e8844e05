# ruff: noqa: RUF009
"""Options of `roe-llava train`: ours beside Transformers' `TrainingArguments`, from a recipe file and the command line.

A recipe is YAML, one option per line. Its values are read as if they stood in front of the command line's, by the same
parser, so the command line wins and types are checked alike.
"""

import difflib
import json
from argparse import ArgumentDefaultsHelpFormatter
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar, Literal

import yaml
from transformers import HfArgumentParser, TrainingArguments

from ..adapter_roe import expanded

RECIPES = Path(__file__).parent / "recipes"


def option(default, text: str):
    """A field of the options below."""
    return field(default=default, metadata={"help": text})


@dataclass
class ModelOptions:
    """What is trained."""

    _argument_group_name: ClassVar[str] = "model"

    model: str = field(metadata={"help": "llava-hf base or RoE checkpoint: folder or Hub id"})
    revision: str | None = option(None, "of a Hub id")
    adapter_size: int | None = option(None, "hidden width of the adapters; default: the checkpoint's, or 1024")
    routed_layers: list[int] | None = option(None, "layers with a router; default: the checkpoint's, or all")
    train_base: Literal["frozen", "full", "lora"] = option(
        "frozen", "what happens to the base: nothing, all of it but the vision tower learns, or LoRA"
    )
    base_dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "of frozen weights in training; auto: bfloat16 with --bf16 unless train_base is full, else float32"
    )
    result_dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "of a full checkpoint's weights; auto: as the given model is stored. Routers are always float32"
    )
    lora_rank: int = option(16, "rank of LoRA's matrices")
    lora_alpha: float = option(32.0, "LoRA's scale is alpha / rank")
    lora_dropout: float = option(0.0, "on LoRA's input")
    attn_implementation: str | None = option(None, "sdpa (default), eager or flex_attention")


@dataclass
class DataOptions:
    """What it is trained on."""

    _argument_group_name: ClassVar[str] = "data"

    data: str = field(
        metadata={"help": "LLaVA's conversation .json or .jsonl, or chat messages (see training_data.md)"}
    )
    image_folder: str | None = option(None, "where relative image paths begin; default: the folder of the data file")
    eval_data: str | None = option(None, "data for evaluation, in the same form and image folder")
    eval_share: float | None = option(None, "share of the rows held out for evaluation, in (0, 1)")
    max_length: int | None = option(None, "most tokens of a conversation, images written out; longer ones are bad rows")
    on_bad: Literal["fatal", "skip"] = option("fatal", "stop at bad rows, or leave them out and report every one")
    check: Literal["full", "structure"] = option("full", "check every row as training will use it, or its form alone")
    check_workers: int = option(0, "processes of the full check")


@dataclass
class RoutingOptions:
    """Stages, loss and learning rates."""

    _argument_group_name: ClassVar[str] = "routing"

    target_skip_ratio: float = option(0.3, "wanted share of skipped (question, layer) pairs, in [0, 0.5]")
    schedule: Literal["taught", "stages", "published"] = option(
        "taught", "routers taught by measured losses, or by their own decisions' gradient, or as the published code"
    )
    warmup_end: float = option(0.3, "share of the run at which the random warm-up ends")
    taught_end: float = option(0.7, "share of the run at which routers stop learning and decide alone (taught)")
    num_routes: int = option(8, "routes that teaching chooses from (taught)")
    searched_routes: int = option(96, "routes measured to find them (taught)")
    searched_examples: int = option(128, "training examples they are measured on (taught)")
    measured_routes: int = option(1, "routes measured on every taught batch, a forward pass each (taught)")
    max_loss: float = option(3.0, "nats; measured losses above count as this (taught)")
    imitation_weight: float = option(1.0, "of the routers' cross entropy towards the taught decisions (taught)")
    soft_end: float = option(0.5, "share of the run at which the soft mixture with a keep bias ends (stages)")
    last_mode: Literal["soft", "hard"] = option("soft", "how the last stage routes (stages)")
    temperature_start: float = option(10.0, "temperature of the routers when the warm-up ends (stages)")
    temperature_decay: float = option(0.95, "its factor every 0.5 %% of the run (stages)")
    temperature_floor: float = option(0.0, "its least value (stages)")
    gumbel_end: float = option(0.0, "share of the run up to which hard decisions get Gumbel noise (stages)")
    budget: Literal["example", "batch", "published"] = option(
        "example", "how skipping is asked for: of every example, of the batch's mean (both ways), or as published"
    )
    budget_weight: float = option(1.0, "nats per unit of share missed, budget 'batch' only")
    information_weight: float = option(0.0, "weight of the push against one route for all, budget 'batch' only")
    settled_examples: int = option(
        512, "questions that settle the skip ratio at the end (of the evaluation rows, if there are any); 0: not done"
    )
    adapter_learning_rate: float | None = option(None, "default: learning_rate")
    router_learning_rate: float | None = option(None, "of routers and routing tokens; default: learning_rate")
    base_learning_rate: float | None = option(None, "of the base or its LoRA; default: learning_rate")


@dataclass
class RunOptions:
    """This run."""

    _argument_group_name: ClassVar[str] = "run"

    overwrite: bool = option(False, "replace an earlier run in output_dir")
    dry_run: bool = option(False, "check everything, say what would be done, and stop")


OURS = (ModelOptions, DataOptions, RoutingOptions, RunOptions)


@dataclass
class Options:
    """All options of a run.

    Attributes:
        recipe: name or file the values come from.
        training: Transformers' own; `output_dir` is the folder of the whole run.
    """

    recipe: str
    model: ModelOptions
    data: DataOptions
    routing: RoutingOptions
    run: RunOptions
    training: TrainingArguments


class OptionParser(HfArgumentParser):
    """`HfArgumentParser` whose errors are raised, so that they look like all others."""

    def error(self, message: str):
        raise ValueError(message.replace("argument --", "option --"))


class OptionHelp(ArgumentDefaultsHelpFormatter):
    """Help with each option's first name, and its default where that says something."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)

    def _format_action_invocation(self, action):
        return f"{action.option_strings[0]} {self._format_args(action, action.dest.upper())}"


def make_parser(*kinds) -> OptionParser:
    text = "Everything else is an option of Transformers' TrainingArguments: --help_all lists them too."
    return OptionParser(
        kinds,
        prog="roe-llava train",
        usage="roe-llava train RECIPE --model MODEL --data DATA --output_dir OUT [--OPTION VALUE ...]",
        description=f"Train the routing parts of a LLaVA. RECIPE is one of {', '.join(recipe_names())}, or a YAML file "
        "of options.",
        epilog=text,
        formatter_class=OptionHelp,
        allow_abbrev=False,
        add_help=False,
    )


def help_text(everything: bool = False) -> str:
    """What `--help` prints: our options, or all."""
    return make_parser(*OURS, *([TrainingArguments] if everything else [])).format_help()


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_recipe(recipe: str) -> dict:
    """Options of a recipe, by its name or file; `recipe: NAME` inside puts those of another one first.

    Raises: ValueError for an unknown recipe or option, and a file that is no mapping.
    """
    is_name = recipe in recipe_names()
    path = RECIPES / f"{recipe}.yaml" if is_name else expanded(recipe)
    if not path.is_file():
        raise ValueError(
            f"there is no recipe {recipe!r}: expected one of {', '.join(recipe_names())}, or a YAML file"
            f"{close_to(recipe, recipe_names())}"
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected lines such as 'learning_rate: 4e-4'")
    first = read_recipe(str(content.pop("recipe"))) if "recipe" in content else {}
    for name in content:
        check_known(str(name), str(path))
    return first | content


def check_known(name: str, where: str) -> None:
    """Raises: ValueError for an option that does not exist, with the names close to it."""
    known = [one.name for kind in (*OURS, TrainingArguments) for one in fields(kind) if one.init]
    if name not in known:
        raise ValueError(f"{where}: there is no option {name!r}{close_to(name, known)}")


def close_to(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def as_words(values: dict) -> list[str]:
    """Values of a recipe as they would stand on the command line; an empty one is left to its default."""
    words = []
    for name, value in values.items():
        if value is None:
            continue
        parts = value if isinstance(value, list) else [value]
        texts = [json.dumps(part) if isinstance(part, bool | dict) else str(part) for part in parts]
        # Joined with "=": a negative number would be taken for an option.
        words += [f"--{name}={texts[0]}"] if len(texts) == 1 else [f"--{name}", *texts]
    return words


def parse(words: list[str]) -> Options:
    """Options of `RECIPE [--option value ...]`.

    Raises: ValueError naming the option that is missing, unknown or has a wrong value.
    """
    if not words or words[0].startswith("-"):
        raise ValueError(
            f"the first word has to be a recipe, {', '.join(recipe_names())} or a YAML file; got "
            f"{words[0] if words else 'nothing'}. `roe-llava train --help` lists the options"
        )
    recipe, given = words[0], words[1:]
    all_words = as_words(read_recipe(recipe)) + given
    if not any(word.split("=")[0] in ("--output_dir", "--output-dir") for word in all_words):
        raise ValueError("--output_dir is missing: the folder that the run writes")
    # Ours beside the trainer's: remove_unused_columns would take away what the collator reads.
    all_words = ["--remove_unused_columns=false", *all_words]
    *parsed, rest = make_parser(*OURS, TrainingArguments).parse_args_into_dataclasses(
        all_words, return_remaining_strings=True, look_for_args_file=False
    )
    for word in rest:
        if word.startswith("--"):
            check_known(word[2:].split("=")[0].replace("-", "_"), "command line")
    if rest:
        raise ValueError(f"command line: {rest[0]!r} belongs to no option")
    options = Options(recipe, *parsed)
    check_options(options)
    return options


def check_options(options: Options) -> None:
    """Raises: ValueError for options that contradict each other, or would do nothing."""
    training, data, routing = options.training, options.data, options.routing
    if training.remove_unused_columns:
        raise ValueError("remove_unused_columns would take images and questions out of the rows: leave it false")
    if data.eval_data is not None and data.eval_share is not None:
        raise ValueError("eval_data and eval_share are two ways to get evaluation data: give one of them")
    if data.eval_share is not None and not 0 < data.eval_share < 1:
        raise ValueError(f"eval_share must lie in (0, 1), got {data.eval_share}")
    if training.eval_strategy != "no" and data.eval_data is None and data.eval_share is None:
        raise ValueError(f"eval_strategy {training.eval_strategy.value!r} needs data: give eval_data or eval_share")
    if training.do_train or training.do_predict:
        raise ValueError("do_train and do_predict are not read: the command trains, and eval_data is evaluated on")
    if training.push_to_hub:
        raise ValueError("push_to_hub would push checkpoints: push the finished folder instead")
    if not 0 <= routing.target_skip_ratio <= 0.5:
        raise ValueError(
            f"target_skip_ratio must lie in [0, 0.5], got {routing.target_skip_ratio}: the random warm-up cannot skip "
            "more than half of the layers"
        )
    others = [name for kind in SCHEDULE_OPTIONS.keys() - {routing.schedule} for name in SCHEDULE_OPTIONS[kind]]
    others = [name for name in others if name not in SCHEDULE_OPTIONS.get(routing.schedule, ())]
    moved = sorted({name for name in others if getattr(routing, name) != default_of(RoutingOptions, name)})
    if moved:
        raise ValueError(f"schedule {routing.schedule!r} does not read {', '.join(moved)}: leave them out")
    if routing.budget != "batch" and (routing.information_weight or routing.budget_weight != 1.0):
        raise ValueError(f"budget_weight and information_weight belong to budget 'batch', got {routing.budget!r}")
    unread = () if options.model.train_base == "lora" else ("lora_rank", "lora_alpha", "lora_dropout")
    unread += ("result_dtype",) if options.model.train_base == "frozen" else ()
    moved = [name for name in unread if getattr(options.model, name) != default_of(ModelOptions, name)]
    if moved:
        raise ValueError(f"train_base {options.model.train_base!r} does not read {', '.join(moved)}: leave them out")
    if options.routing.settled_examples < 0:
        raise ValueError(f"settled_examples must be 0 (not done) or more, got {options.routing.settled_examples}")
    if options.model.lora_rank < 1:
        raise ValueError(f"lora_rank must be at least 1, got {options.model.lora_rank}")


SCHEDULE_OPTIONS = {
    "taught": (
        "warmup_end",
        "taught_end",
        "num_routes",
        "searched_routes",
        "searched_examples",
        "measured_routes",
        "max_loss",
        "imitation_weight",
    ),
    "stages": (
        "warmup_end",
        "soft_end",
        "last_mode",
        "temperature_start",
        "temperature_decay",
        "temperature_floor",
        "gumbel_end",
        "budget",
        "budget_weight",
        "information_weight",
    ),
    "published": ("budget", "budget_weight", "information_weight"),
}


def default_of(kind, name: str):
    return next(one.default for one in fields(kind) if one.name == name)


__all__ = ["DataOptions", "ModelOptions", "Options", "RoutingOptions", "RunOptions", "parse", "read_recipe"]
