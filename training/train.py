"""`roe-llava train RECIPE --model MODEL --data DATA --output_dir OUT`: RoE on one's own data.

The stock Trainer does the work, so the command runs under `accelerate launch` as any script of Transformers:
`accelerate launch -m roe_llava.training.train RECIPE ...`.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback

from ..convert.bases import is_base, routed_kind
from ..convert.source import Source, read_json
from . import lora, setup
from .data import batches_of, spread_over
from .options import Options, help_text, parse
from .results import result_dtype, write_adapter, write_checkpoint
from .run_folder import RECORD, RecordCallback, RunFolder, check_same_run, checkpoint_to_resume, make_record
from .run_report import write_report
from .settle import Settled, settle
from .trainer import RoeTrainer


@dataclass
class Run:
    """Everything of a run, made and checked before the first step.

    Attributes:
        wrapped: PEFT's wrapper of the model, or `None`.
        checkpoint: to go on from, or `None`.
        base: record of `describe_base`.
        settled: what was found at the end, or `None`.
    """

    options: Options
    folder: RunFolder
    source: Source
    base: dict
    model: Any
    wrapped: Any
    processor: Any
    data: setup.Data
    schedule: Any
    trainer: RoeTrainer
    record: dict
    checkpoint: Path | None
    settled: Settled | None = None


def prepare(options: Options) -> Run:
    """Read and check everything; nothing is written.

    Raises: ValueError for anything that would stop the run later, as far as that can be known.
    """
    args = options.training
    args.dataloader_pin_memory &= args.device.type != "cpu"  # torch would warn at every epoch
    folder = RunFolder(Path(args.output_dir), "adapter" if options.model.train_base == "frozen" else "model")
    checkpoint = checkpoint_to_resume(args.resume_from_checkpoint, folder)
    source = setup.find_model(options.model)
    folder.check(options.run.overwrite, checkpoint is not None, source.folder)
    rates = setup.learning_rates(options)
    processor = setup.load_processor(source)
    data = setup.load_data(options.data, processor, args)
    steps = args.max_steps = setup.number_of_steps(args, len(data.train))
    set_seed(args.seed)  # the first values of routers, adapters and LoRA
    model, wrapped = setup.load_model(options.model, source, options.routing.target_skip_ratio, args.bf16)
    setup.check_vocabulary(model, processor, source.folder)
    schedule, objective, collate = setup.schedule_and_objective(options, steps, model, data.collate)
    setup.check_learning(schedule, rates, steps, model)
    base = setup.describe_source(source)
    record = make_record(options, steps, len(data.train), base)
    if checkpoint is not None:
        check_same_run(checkpoint, record)
    with tempfile.TemporaryDirectory() as args.output_dir:  # Trainer makes the folder, and nothing may be there yet
        trainer = RoeTrainer(
            model,
            schedule=schedule,
            objective=objective,
            rates=rates,
            teacher=setup.make_teacher(options),
            trained_only=options.model.train_base != "full",
            args=args,
            train_dataset=data.train,
            eval_dataset=data.evaluation,
            data_collator=collate,
            callbacks=[RecordCallback(record)],
        )
    args.output_dir = str(folder.checkpoints)
    if wrapped is not None and trainer.is_sharded:
        raise ValueError(
            "train_base 'lora' cannot be merged from shards (FSDP, DeepSpeed): use DDP, 'frozen' or 'full'"
        )
    print_less(trainer)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(folder.logs)
    return Run(options, folder, source, base, model, wrapped, processor, data, schedule, trainer, record, checkpoint)


def train(run: Run) -> None:
    """Train, evaluate, write the result and the report."""
    trainer, folder = run.trainer, run.folder
    is_main = trainer.is_world_process_zero()
    trainer.accelerator.wait_for_everyone()  # all have looked at the folder before it changes
    if is_main:
        folder.begin(run.record, resumes=run.checkpoint is not None)
        write_bad_rows(run)
    trainer.accelerator.wait_for_everyone()
    try:
        trainer.train(resume_from_checkpoint=None if run.checkpoint is None else str(run.checkpoint))
    except KeyboardInterrupt:
        if any(folder.checkpoints.glob(f"checkpoint-*/{RECORD}")):
            say(is_main, "", "go on later with the same options and --resume_from_checkpoint last")
        raise
    settle_skip_ratio(run)
    if run.data.evaluation is not None:
        trainer.evaluate()
    write_result(run)
    if is_main:
        trainer.save_state()
        state = folder.checkpoints / "trainer_state.json"
        if any("token_loss" in entry for entry in trainer.state.log_history):
            write_report(state, folder.report, target=run.options.routing.target_skip_ratio, overwrite=True)
    say(is_main, "", *written(run))


def settle_skip_ratio(run: Run) -> None:
    """Shift the routers onto the target, on every process alike: they have the same model and take the same rows."""
    number, trainer = run.options.routing.settled_examples, run.trainer
    is_main = trainer.is_world_process_zero()
    if number == 0:
        return
    if trainer.is_sharded:
        say(is_main, "the skip ratio was not settled, since the weights are sharded: roe-llava calibrate OUT does it")
        return
    rows = run.data.train if run.data.evaluation is None else run.data.evaluation
    chosen, size = spread_over(len(rows), number), run.options.training.per_device_eval_batch_size
    batches, was_training = batches_of(rows, chosen, size, run.data.collate), run.model.training
    run.model.eval()
    quiet = run.options.training.disable_tqdm or not is_main
    run.settled = settle(run.model, batches, run.options.routing.target_skip_ratio, quiet)
    run.model.train(was_training)


def write_bad_rows(run) -> None:
    """Write what was wrong with rows into a run's folder; `run` has `data` and `folder`."""
    for number, report in enumerate(run.data.bad):
        if len(report):
            report.save(run.folder.path / ("bad_rows.json", "bad_eval_rows.json")[number], overwrite=True)


def write_result(run: Run) -> None:
    """The adapter file or the checkpoint; every process takes part where tensors have to be gathered."""
    trainer, model = run.trainer, run.model
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if trainer.is_sharded else None
    if not trainer.is_world_process_zero():
        return
    about = summary(run)
    overwrite = run.options.run.overwrite
    if run.options.model.train_base == "frozen":
        write_adapter(run.folder.result, model, run.processor, run.base, about, overwrite, state)
        return
    if run.wrapped is not None:
        model = lora.merge(run.wrapped)
    dtype = result_dtype(run.options.model, run.source)
    write_checkpoint(run.folder.result, model, run.processor, run.base, about, dtype, overwrite, state)


def summary(run: Run) -> dict:
    """What a reader of the result has to know about the training."""
    history = run.trainer.state.log_history
    last = next((entry for entry in reversed(history) if "hard_skip_ratio" in entry), {})
    found = next((entry for entry in reversed(history) if "eval_loss" in entry), {})
    measured = {name: last[name] for name in ("loss", "token_loss", "hard_skip_ratio") if name in last}
    measured |= {name: found[name] for name in ("eval_loss", "eval_hard_skip_ratio") if name in found}
    kept = ("recipe", "steps", "examples", "routing", "training", "versions")
    return {name: run.record[name] for name in kept} | {
        "data": Path(run.options.data.data).name,  # where it lies is nobody's business but ours
        "train_base": run.options.model.train_base,
        "target_skip_ratio": run.options.routing.target_skip_ratio,
        "bad_rows": run.data.num_bad,
        "teaching": None if run.trainer.teacher is None else run.trainer.teacher.describe(),
        "settled": None if run.settled is None else run.settled.to_dict(),
        "measured": measured,
    }


# ---------------------------------------------------------------------------------------------------- what is printed


def cost_of_search(run: Run) -> str:
    teaching, args = run.trainer.teacher.teaching, run.options.training
    examples = min(teaching.searched_examples, len(run.data.train))
    passes = teaching.searched_routes * examples
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    worth = max(1, round(passes / rows / 3))  # forward and backward pass of a step cost three forward passes
    text = f"{teaching.searched_routes} routes on {examples} conversations, once: as long as about {worth} steps"
    return f"{text}; then {teaching.measured_routes} forward pass(es) more per taught batch"


class BriefProgress(ProgressCallback):
    """Trainer's progress bar; what is there for every layer goes to the logs alone."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs=brief(logs), **kwargs)


class BriefPrinter(PrinterCallback):
    """Likewise without a bar."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs=brief(logs), **kwargs)


def brief(logs: dict | None) -> dict:
    return {name: value for name, value in (logs or {}).items() if "/" not in name}


def print_less(trainer) -> None:
    for stock, ours in ((ProgressCallback, BriefProgress), (PrinterCallback, BriefPrinter)):
        if trainer.pop_callback(stock) is not None:
            trainer.add_callback(ours)


def say(is_main: bool, *lines: str) -> None:
    if is_main:
        print(*lines, sep="\n", flush=True)


def plan(run: Run) -> list[str]:
    """What will be done, in lines."""
    args, data = run.options.training, run.data
    steps = run.record["steps"]
    evaluated = 0 if data.evaluation is None else len(data.evaluation)
    left_out = f"; {data.num_bad} bad rows left out (bad_rows.json)" if data.num_bad else ""
    counts = setup.parameter_counts(run.model)
    rates = run.trainer.rates
    learns = [f"{group} {counts.get(group, 0):,} (rate {rate:g})" for group, rate in rates.items()]
    stages = [f"{mode} {first}-{last}" for _, mode, first, last in setup.stages_in_steps(run.schedule, steps)]
    batch = (
        f"{args.per_device_train_batch_size} rows x {args.gradient_accumulation_steps} x {args.world_size} process(es)"
    )
    going_on = [] if run.checkpoint is None else [f"goes on    from {run.checkpoint}"]
    going_on += [] if run.trainer.teacher is None else [f"search     {cost_of_search(run)}"]
    return [
        f"data       {len(data.train)} conversations to train on, {evaluated} for evaluation{left_out}",
        f"model      {run.source.folder}, base {run.options.model.train_base}",
        f"learns     {', '.join(learns)}; frozen {counts.get('frozen', 0):,}",
        f"steps      {steps} of {batch}: {', '.join(stages)}",
        f"target     {run.options.routing.target_skip_ratio:.0%} of (question, layer) pairs skipped",
        f"writes     {run.folder.result}, {run.folder.checkpoints}, {run.folder.report}",
        *going_on,
    ]


def settled_line(run: Run) -> str:
    rows = "training" if run.data.evaluation is None else "evaluation"
    found = run.settled
    return (
        f"settled on {found.questions} of the {rows} questions: {found.skip_ratio:.1%} skipped with a bias of "
        f"{found.route_bias:.4g}" + ("" if found.held_out is None else f", {found.held_out:.1%} of those without a say")
    )


def written(run: Run) -> list[str]:
    """Where everything is, in lines."""
    folder, start, result = run.folder, repr(str(run.source.folder)), repr(str(run.folder.result))
    start_config, use = read_json(run.source.folder / "config.json"), f"from_pretrained({result})"
    if run.options.model.train_base == "frozen":
        is_stock = is_base(start_config["model_type"])
        use = f"from_base({start}, {result})" if is_stock else f"from_pretrained({start}).load_routing({result})"
    shown = [f"{name.replace('_', ' ')} {value:.4g}" for name, value in summary(run)["measured"].items()]
    found = None if run.trainer.teacher is None else run.trainer.teacher.describe()
    lines = [] if run.settled is None else [settled_line(run)]
    lines += [] if found is None else [f"routes {' '.join(found['routes'])}, layer 0 first"]
    lines += [", ".join(shown), f"wrote {folder.result} ({routed_kind(start_config).model.__name__}.{use})"]
    if folder.report.is_dir():
        lines.append(f"wrote {folder.report / 'report.md'}")
    else:
        lines.append("no report: nothing was logged; logging_steps has to be smaller than the run")
    if any(folder.checkpoints.glob("checkpoint-*")):
        lines.append(f"      {folder.checkpoints}: to go on from; not needed to use the result")
    if folder.logs.is_dir():
        lines.append(f"      {folder.logs}: tensorboard --logdir {folder.logs}")
    return lines


# ------------------------------------------------------------------------------------------------------- command line


def run(args) -> None:
    """Run the command on `args.rest`, the words behind `train`."""
    words = args.rest
    if {"-h", "--help"} & {*words} or "--help_all" in words:
        print(help_text(everything="--help_all" in words))
        sys.exit(0)
    prepared = prepare(parse(words))
    is_main = prepared.trainer.is_world_process_zero()
    say(is_main, *plan(prepared))
    if prepared.options.run.dry_run:
        say(is_main, "dry run: nothing was written")
        return
    train(prepared)


def main(words: list[str] | None = None) -> int:
    """`python -m roe_llava.training.train`."""
    from ..cli import main as command_line

    return command_line(["train", *(sys.argv[1:] if words is None else words)])


if __name__ == "__main__":
    sys.exit(main())
