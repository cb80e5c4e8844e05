"""`roe-llava train-moe STAGE --model MODEL --data DATA --output_dir OUT`: a stage of MoE-LLaVA or EvoMoE on own data.

The stock Trainer does the work, so the command runs under `accelerate launch` as any script of Transformers:
`accelerate launch -m roe_llava.training.train_moe STAGE ...`.
"""

import sys
import tempfile
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import transformers
from transformers import LlavaForConditionalGeneration, LlavaProcessor, TrainingArguments

from ..convert.completeness import check_files
from ..convert.fingerprint import describe_base
from ..convert.kinds import MOE, ROE_MOE
from ..convert.output import new_folder, write_json
from ..convert.source import Source, blamed_on, read_json, resolve_source
from ..modeling_moe_llava import MoeLlavaForConditionalGeneration
from . import setup
from .chat_prompt import close_answers
from .expert_evolution import Evolution
from .expert_report import write_report
from .expert_stages import STAGES, ExpertStage, expert_stage
from .expert_trainer import ExpertTrainer
from .options import DataOptions, OptionHelp, OptionParser, RunOptions, as_words, close_to, default_of, option
from .results import result_dtype
from .run_folder import DECISIVE, RECORD, RecordCallback, RunFolder, check_same_run, checkpoint_to_resume, plain
from .train import write_bad_rows

# Rates and schedule of both papers (MoE-LLaVA, tables 2 and 9; EvoMoE, table 7); batches are a matter of the machine.
PAPER = {
    "learning_rate": 2e-5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "weight_decay": 0.0,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 8,
    "logging_steps": 10,
    "save_steps": 0.1,
    "save_total_limit": 2,
}


@dataclass
class ExpertOptions:
    """What is trained, and how."""

    _argument_group_name: ClassVar[str] = "stage"

    model: str | None = option(None, "dense LLaVA (evomoe-warmup) or model with experts: folder or Hub id")
    revision: str | None = option(None, "of a Hub id")
    attn_implementation: str | None = option(None, "sdpa (default) or eager")
    result_dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "of the result's weights; auto: as the given model is stored. Routers are always float32"
    )
    aux_loss_coef: float | None = option(None, "weight of the balancing loss; default: the stage's")
    dense_mlps: bool = option(False, "MLPs of layers without experts learn too, as in published code (moe-stage3)")
    projector: bool = option(False, "the projector learns too, as in published code (moe-stage3)")
    mode: Literal["ema", "update", "literal"] = option("ema", "how experts follow expert 1 (evomoe-evolution)")
    beta_ranges: list[float] | None = field(
        default=None,
        metadata={
            "help": "lowest and highest beta of experts 2, 3, ... (evomoe-evolution); default: the paper's, for 4"
        },
    )
    beta_per_layer: bool = option(False, "every layer has draws of its own (evomoe-evolution)")
    tokens: Literal["first", "routed"] = option(
        "first", "what tokens go through: expert 1, or where routers send them (evomoe-evolution)"
    )


KINDS = (ExpertOptions, DataOptions, RunOptions)


@dataclass
class Run:
    """Everything of a run, made and checked before the first step."""

    name: str
    options: ExpertOptions
    data_options: DataOptions
    run_options: RunOptions
    stage: ExpertStage
    folder: RunFolder
    source: Source
    processor: Any
    data: setup.Data
    trainer: ExpertTrainer
    record: dict
    checkpoint: Path | None


class WithoutSegments:
    """A collator whose batches lose what only RoE's models read."""

    def __init__(self, collate):
        self.collate = collate

    def __call__(self, examples) -> dict:
        return {name: value for name, value in self.collate(examples).items() if name != "routing_segments"}


# ------------------------------------------------------------------------------------------------------------- options


def make_parser(*kinds) -> OptionParser:
    return OptionParser(
        kinds,
        prog="roe-llava train-moe",
        usage="roe-llava train-moe STAGE --model MODEL --data DATA --output_dir OUT [--OPTION VALUE ...]",
        description=f"Train a LLaVA with experts. STAGE is one of {', '.join(STAGES)}; see docs/moe.md.",
        epilog="Everything else is an option of Transformers' TrainingArguments: --help_all lists them too.",
        formatter_class=OptionHelp,
        allow_abbrev=False,
        add_help=False,
    )


def parse(words: list[str]) -> tuple[str, ExpertOptions, DataOptions, RunOptions, TrainingArguments]:
    """Stage and options of `STAGE [--option value ...]`.

    Raises: ValueError naming the option that is missing, unknown or has a wrong value.
    """
    if not words or words[0] not in STAGES:
        raise ValueError(
            f"the first word has to be a stage, one of {', '.join(STAGES)}; got {words[0] if words else 'nothing'!r}"
        )
    *parsed, rest = make_parser(*KINDS, TrainingArguments).parse_args_into_dataclasses(
        ["--remove_unused_columns=false", *as_words(PAPER), *words[1:]],
        return_remaining_strings=True,
        look_for_args_file=False,
    )
    if rest:
        known = [one.name for kind in (*KINDS, TrainingArguments) for one in fields(kind) if one.init]
        name = rest[0].removeprefix("--").split("=")[0].replace("-", "_")
        raise ValueError(f"there is no option {rest[0]!r}{close_to(name, known)}")
    experts, data, _, training = parsed
    if experts.model is None:
        raise ValueError("--model is missing: what the stage begins with")
    if not any(word.split("=")[0] in ("--output_dir", "--output-dir") for word in words):
        raise ValueError("--output_dir is missing: the folder that the run writes")
    if data.eval_data is not None and data.eval_share is not None:
        raise ValueError("eval_data and eval_share are two ways to get evaluation data: give one of them")
    if training.eval_strategy != "no" and data.eval_data is None and data.eval_share is None:
        raise ValueError(f"eval_strategy {training.eval_strategy.value!r} needs data: give eval_data or eval_share")
    if training.remove_unused_columns:
        raise ValueError("remove_unused_columns would take images and questions out of the rows: leave it false")
    if training.push_to_hub:
        raise ValueError("push_to_hub would push checkpoints: push the finished folder instead")
    return words[0], *parsed


def stage_of(name: str, options: ExpertOptions, seed: int) -> ExpertStage:
    """The stage of a name, changed by options.

    Raises: ValueError for options that it does not read.
    """
    changes = {"dense_mlps": options.dense_mlps, "projector": options.projector}
    if options.aux_loss_coef is not None:
        changes["router_aux_loss_coef"] = options.aux_loss_coef
    evolution_names = ("mode", "beta_ranges", "beta_per_layer", "tokens")
    changed = {one: getattr(options, one) for one in evolution_names}
    changed = {one: value for one, value in changed.items() if value != default_of(ExpertOptions, one)}
    if "beta_ranges" in changed:
        flat = changed["beta_ranges"]
        if len(flat) % 2:
            raise ValueError(f"beta_ranges must be pairs of lowest and highest beta, got {len(flat)} numbers: {flat}")
        changed["beta_ranges"] = tuple(zip(flat[::2], flat[1::2], strict=True))
    if changed or STAGES[name].kind == "evolution":
        changes["evolution"] = Evolution(**changed, seed=seed)
    return expert_stage(name, **changes)


# ----------------------------------------------------------------------------------------------------------------- run


def prepare(name: str, options: ExpertOptions, data_options: DataOptions, run_options: RunOptions, args) -> Run:
    """Read and check everything; nothing is written.

    Raises: ValueError for anything that would stop the run later, as far as that can be known.
    """
    args.dataloader_pin_memory &= args.device.type != "cpu"  # torch would warn at every epoch
    stage, folder = stage_of(name, options, args.seed), RunFolder(Path(args.output_dir), "model")
    checkpoint = checkpoint_to_resume(args.resume_from_checkpoint, folder)
    source = resolve_source(options.model, options.revision)
    folder.check(run_options.overwrite, checkpoint is not None, source.folder)
    check_kind(source, stage)
    data = setup.load_data(data_options, setup.load_processor(source), args)
    steps = args.max_steps = setup.number_of_steps(args, len(data.train))
    model = load_model(source, stage, options)
    processor = LlavaProcessor.from_pretrained(source.folder, trust_remote_code=False)
    close_answers(processor)  # as those that made the data
    setup.check_vocabulary(model, processor, source.folder)
    record = make_record(name, stage, source, steps, len(data.train), args)
    if checkpoint is not None:
        check_same_run(checkpoint, record)
    with tempfile.TemporaryDirectory() as args.output_dir:  # Trainer makes the folder, and nothing may be there yet
        trainer = ExpertTrainer(
            model,
            stage=stage,
            trained_only=stage.kind != "dense" and not (args.fsdp or args.deepspeed),
            args=args,
            train_dataset=data.train,
            eval_dataset=data.evaluation,
            data_collator=WithoutSegments(data.collate),
            callbacks=[RecordCallback(record)],
        )
    args.output_dir = str(folder.checkpoints)
    return Run(
        name, options, data_options, run_options, stage, folder, source, processor, data, trainer, record, checkpoint
    )


def check_kind(source: Source, stage: ExpertStage) -> None:
    """Raises: ValueError if a checkpoint is not what the stage begins with."""
    found = read_json(source.folder / "config.json").get("model_type")
    wanted = "llava" if stage.kind == "dense" else MOE.model_type
    if found != wanted:
        cause = "experts come after it" if wanted == "llava" else "roe-llava upcycle gives a LLaVA experts"
        if found == ROE_MOE.model_type:
            cause = "RoE is put onto it afterwards; roe-llava extract --full gives the model it was put onto"
        raise ValueError(f"{source.folder} has model_type {found!r}, this stage begins with {wanted!r}: {cause}")
    check_files(source.folder)


def load_model(source: Source, stage: ExpertStage, options: ExpertOptions):
    """The model in float32."""
    kind = LlavaForConditionalGeneration if stage.kind == "dense" else MoeLlavaForConditionalGeneration
    given = {} if options.attn_implementation is None else {"attn_implementation": options.attn_implementation}
    with blamed_on(source.folder):
        return kind.from_pretrained(source.folder, dtype=torch.float32, **given)


def make_record(name: str, stage: ExpertStage, source: Source, steps: int, examples: int, args) -> dict:
    """What was run, in the form that `check_same_run` compares."""
    base = describe_base(source.folder, base_id=source.id)
    fields_of_stage = {one: plain_stage(value) for one, value in stage.to_dict().items()}
    return {
        "recipe": name,
        "steps": steps,
        "examples": examples,
        "base": {"id": source.id, "revision": source.revision, "fingerprint": base["fingerprint"]},
        "model": {},
        "data": {},
        "routing": fields_of_stage,
        "training": {one: plain(getattr(args, one)) for one in DECISIVE},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def plain_stage(value):
    """A stage's field as JSON."""
    if isinstance(value, dict):
        return {name: plain_stage(one) for name, one in value.items()}
    return [plain_stage(one) for one in value] if isinstance(value, tuple) else value


def train(run: Run) -> None:
    """Train, evaluate, write the result and the report."""
    trainer, folder = run.trainer, run.folder
    is_main = trainer.is_world_process_zero()
    trainer.accelerator.wait_for_everyone()  # all have looked at the folder before it changes
    if is_main:
        folder.begin(run.record, resumes=run.checkpoint is not None)
        write_bad_rows(run)
    trainer.accelerator.wait_for_everyone()
    trainer.train(resume_from_checkpoint=None if run.checkpoint is None else str(run.checkpoint))
    if run.data.evaluation is not None:
        trainer.evaluate()
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if trainer.is_sharded else None
    if is_main:
        write_model(run, state)
        trainer.save_state()
        if any("loss" in entry for entry in trainer.state.log_history):
            config = trainer.accelerator.unwrap_model(trainer.model).config
            layers = 0 if run.stage.kind == "dense" else len(config.expert_layers())
            path = folder.checkpoints / "trainer_state.json"
            write_report(path, folder.report, run.name, layers, overwrite=True)


def write_model(run: Run, state: dict | None = None) -> None:
    """The result: a checkpoint that the next stage begins with.

    Args:
        state: the model's tensors, where they had to be gathered.
    Raises: ValueError if a weight is NaN or Inf.
    """
    model, dtype = run.trainer.accelerator.unwrap_model(run.trainer.model), result_dtype(run.options, run.source)
    stored = {}
    for name, tensor in (model.state_dict() if state is None else state).items():
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"{name} of the trained model has NaN or Inf: lower learning_rate, or bf16 instead of fp16"
            )
        keeps = ".mlp.router." in name or not tensor.is_floating_point()
        stored[name] = tensor if keeps else tensor.to(dtype)
    with new_folder(run.folder.result, run.run_options.overwrite) as partial:
        if run.stage.kind != "dense":
            about = getattr(model.config, "moe_provenance", None) or {}
            model.config.moe_provenance = about | {"training": [*about.get("training", []), summary_of(run)]}
        model.save_pretrained(partial, state_dict=stored)
        config = read_json(partial / "config.json")  # save_pretrained has put the dtype of training there
        write_json(partial / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})
        run.processor.save_pretrained(partial)
        if run.stage.kind != "dense":
            MOE.write_code(partial)


def summary_of(run: Run) -> dict:
    """What the result's config says of the stage: nothing that only this machine knows."""
    log = run.trainer.state.log_history
    found = {name: entry[name] for entry in log for name in ("train_loss", "eval_loss") if name in entry}
    made = {"stage": run.name, "steps": run.record["steps"], "examples": run.record["examples"]}
    return made | {"data": Path(run.data_options.data).name, "measured": found}


def plan(run: Run) -> list[str]:
    """What will be done, in lines."""
    args, model = run.trainer.args, run.trainer.model
    learned = sum(one.numel() for one in model.parameters() if one.requires_grad)
    frozen = sum(one.numel() for one in model.parameters()) - learned
    evaluated = 0 if run.data.evaluation is None else len(run.data.evaluation)
    rows = (
        f"{args.per_device_train_batch_size} rows x {args.gradient_accumulation_steps} x {args.world_size} process(es)"
    )
    return [
        f"stage      {run.name}: {run.stage.kind} of {run.source.folder}",
        f"data       {len(run.data.train)} conversations to train on, {evaluated} for evaluation"
        + (f"; {run.data.num_bad} bad rows left out (bad_rows.json)" if run.data.num_bad else ""),
        f"learns     {learned:,} parameters (rate {args.learning_rate:g}); frozen {frozen:,}",
        f"steps      {run.record['steps']} of {rows}",
        f"writes     {run.folder.result}, {run.folder.checkpoints}, {run.folder.report}",
        *([] if run.checkpoint is None else [f"goes on    from {run.checkpoint}"]),
    ]


def run(args) -> None:
    """Run the command on `args.rest`, the words behind `train-moe`."""
    words = args.rest
    if {"-h", "--help"} & {*words} or "--help_all" in words:
        print(make_parser(*KINDS, *([TrainingArguments] if "--help_all" in words else [])).format_help())
        sys.exit(0)
    prepared = prepare(*parse(words))
    if prepared.trainer.is_world_process_zero():
        print(*plan(prepared), sep="\n", flush=True)
        if prepared.run_options.dry_run:
            print("dry run: nothing was written")
    if prepared.run_options.dry_run:
        return
    try:
        train(prepared)
    except KeyboardInterrupt:
        if any(prepared.folder.checkpoints.glob(f"checkpoint-*/{RECORD}")):
            print("\ngo on later with the same options and --resume_from_checkpoint last")
        raise
    if prepared.trainer.is_world_process_zero():
        print(f"wrote {prepared.folder.result}")
        if prepared.folder.report.is_dir():
            print(f"wrote {prepared.folder.report / 'report.md'}")
        else:
            print("no report: nothing was logged; logging_steps has to be smaller than the run")


def main(words: list[str] | None = None) -> int:
    """`python -m roe_llava.training.train_moe`."""
    from ..cli import main as command_line

    return command_line(["train-moe", *(sys.argv[1:] if words is None else words)])


if __name__ == "__main__":
    sys.exit(main())
