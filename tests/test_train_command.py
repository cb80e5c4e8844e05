"""`roe-llava train`: every recipe from the command line to a result that opens, resuming, best model, refusals."""

import json

import pytest
import torch
from convert_helpers import change_json
from convert_helpers import train as random_parts
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from train_helpers import interrupted, result_tensors, run_of, words, write_conversations

from roe_llava import RoeLlavaForConditionalGeneration, RoeLlavaProcessor
from roe_llava.cli import main
from roe_llava.convert.adapter_file import save_adapter
from roe_llava.convert.graft import graft
from roe_llava.examples.tiny_world.demo import SHIPPED
from roe_llava.examples.tiny_world.export import export
from roe_llava.examples.tiny_world.train_roe import BASE
from roe_llava.examples.tiny_world.world import TinyWorld
from roe_llava.training.train import write_result

# Options keep the names that Transformers will take away while it has both, and PEFT asks by one of them.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing(_kwargs)?. is deprecated"),
]

RECIPES = ("frozen", "full", "lora")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_conversations(tmp_path_factory.mktemp("conversations") / "rows")


def save_parts(base, folder):
    """An adapter file with parts of its own on a base."""
    model = random_parts(base)
    return save_adapter(model, model.config, folder, base=base)


def command(*args, **options) -> int:
    return main(["train", *words(*args, **options)])


def opened(folder, base, recipe):
    """The result of a run as a user opens it."""
    if recipe == "frozen":
        return RoeLlavaForConditionalGeneration.from_base(base, folder / "adapter").eval()
    return RoeLlavaForConditionalGeneration.from_pretrained(folder / "model").eval()


@torch.no_grad()
def logits_of(model, run):
    batch = run.data.collate([run.data.train[index] for index in range(4)])
    batch.pop("labels")
    return model.eval()(**batch, use_cache=False).logits


# ---------------------------------------- recipes


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_and_its_result_opens_with_the_same_logits(tmp_path, base, data, recipe):
    run = run_of(recipe, base, data, tmp_path / "out", base_learning_rate=None if recipe == "frozen" else "1e-2")
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    run.folder.begin(run.record, resumes=False)
    run.trainer.train()
    trained = logits_of(run.model, run)
    moved = {name for name, tensor in run.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any("router" in name for name in moved) and any("adapter" in name for name in moved)
    has_moved_base = {"frozen": False, "full": True, "lora": False}[recipe]
    assert any("lm_head" in name for name in moved) == has_moved_base
    assert any("lora_B" in name for name in moved) == (recipe == "lora")
    assert not any("vision_tower" in name for name in moved)
    write_result(run)
    again = opened(tmp_path / "out", base, recipe)
    assert type(again) is RoeLlavaForConditionalGeneration
    # Merged LoRA matrices are added before the product instead of behind it.
    torch.testing.assert_close(logits_of(again, run), trained, rtol=0, atol=1e-5 if recipe == "lora" else 0)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_command_writes_result_processor_report_and_record(tmp_path, base, data, recipe, capsys):
    out = tmp_path / "out"
    assert command(recipe, base, data, out, eval_share=0.25) == 0
    result = out / ("adapter" if recipe == "frozen" else "model")
    assert RoeLlavaProcessor.from_pretrained(result).chat_template
    assert (out / "report" / "report.md").is_file() and (out / "report" / "soft_hard.png").is_file()
    record = json.loads((out / "run.json").read_text())
    assert record["steps"] == 6 and record["examples"] == 9 and record["recipe"] == recipe
    assert not list(out.glob(".*"))
    printed = capsys.readouterr().out
    assert f"wrote {result}" in printed and "9 conversations to train on, 3 for evaluation" in printed
    opened(out, base, recipe)


def test_the_frozen_result_holds_routing_parts_alone(tmp_path, base, data):
    assert command("frozen", base, data, tmp_path / "out", save_strategy="steps", save_steps=3) == 0
    tensors = result_tensors(tmp_path / "out")
    assert tensors and all(
        any(f".{part}." in name for part in ("router", "adapter", "routing_tokens")) for name in tensors
    )
    checkpoint = load_file(tmp_path / "out" / "checkpoints" / "checkpoint-3" / "trained.safetensors")
    assert len(checkpoint) == len(tensors)


def test_the_published_recipe_runs_in_compatibility_mode(tmp_path, base, data):
    out = tmp_path / "out"
    # 200 micro-batches, the fewest it can run, in few steps.
    options = {"max_steps": 10, "gradient_accumulation_steps": 20, "per_device_train_batch_size": 1}
    assert command("published", base, data, out, **options, learning_rate=None) == 0
    config = json.loads((out / "model" / "config.json").read_text())
    assert (config["routing_positions"], config["routing_question"]) == ("spread", "all_text")
    opened(out, base, "published")


def test_the_shipped_base_trains_on_exported_tiny_world_data(tmp_path):
    rows = export(TinyWorld("train", 4), tmp_path / "world")
    assert command("frozen", BASE, rows, tmp_path / "out", max_steps=2, searched_routes=24) == 0
    RoeLlavaForConditionalGeneration.from_base(BASE, tmp_path / "out" / "adapter")


def test_the_skip_ratio_is_settled_on_the_evaluation_rows_at_the_end(tmp_path, capsys):
    graft(BASE, SHIPPED / "roe", tmp_path / "roe")
    rows = export(TinyWorld("train", 120), tmp_path / "world")
    options = {"max_steps": 2, "adapter_size": None, "target_skip_ratio": 0.2, "eval_share": 0.5}
    few = {"searched_routes": 24, "searched_examples": 12}
    assert command("frozen", tmp_path / "roe", rows, tmp_path / "out", **options, **few) == 0
    about = json.loads((tmp_path / "out" / "adapter" / "roe_adapter.json").read_text())
    assert about["training"]["data"] == rows.name  # without the folder it lies in
    settled, measured = about["training"]["settled"], about["training"]["measured"]
    assert settled["questions"] == 60 and abs(settled["skip_ratio"] - 0.2) < 0.02
    assert about["route_bias"][-1] == settled["route_bias"] != 0
    assert abs(measured["eval_hard_skip_ratio"] - 0.2) < 0.05  # of the last turns, and of those that had no say
    assert "settled on 60 of the evaluation questions" in capsys.readouterr().out
    assert command("frozen", tmp_path / "roe", rows, tmp_path / "no", **options, **few, settled_examples=0) == 0
    about = json.loads((tmp_path / "no" / "adapter" / "roe_adapter.json").read_text())
    assert about["training"]["settled"] is None and about["route_bias"] is None


def test_training_goes_on_from_a_roe_checkpoint(tmp_path, base, data):
    """Its bias and table are dropped, its sizes are kept, and the result still belongs to its base."""
    graft(base, save_parts(base, tmp_path / "parts"), tmp_path / "roe")
    change_json(tmp_path / "roe" / "config.json", target_skip_ratio=0.1, route_bias=[0.5] * 3)
    out, options = tmp_path / "out", {"adapter_size": None, "max_steps": 2, "settled_examples": 0}
    assert command("frozen", tmp_path / "roe", data, out, **options, target_skip_ratio=0.2) == 0
    about = json.loads((out / "adapter" / "roe_adapter.json").read_text())
    assert about["base"]["id"] == base.name and about["target_skip_ratio"] == 0.2 and about["skip_calibration"] is None
    assert about["route_bias"] is None
    model = RoeLlavaForConditionalGeneration.from_base(base, out / "adapter")
    assert model.config.adapter_size == 4
    assert command("full", tmp_path / "roe", data, tmp_path / "full", adapter_size=None, max_steps=4) == 0
    config = RoeLlavaForConditionalGeneration.from_pretrained(tmp_path / "full" / "model").config
    assert config.adapter_size == 4 and config.roe_provenance["base"]["fingerprint"] is None


def test_a_whole_checkpoint_says_the_dtype_it_is_stored_in(tmp_path, base, data):
    assert command("full", base, data, tmp_path / "out", result_dtype="bfloat16") == 0
    model = RoeLlavaForConditionalGeneration.from_pretrained(tmp_path / "out" / "model")
    assert model.dtype == torch.bfloat16 and model.model.language_model.layers[1].router.weight.dtype == torch.float32


def test_what_the_teacher_found_is_in_the_record(tmp_path, base, data):
    assert command("frozen", base, data, tmp_path / "out") == 0
    teaching = json.loads((tmp_path / "out" / "adapter" / "roe_adapter.json").read_text())["training"]["teaching"]
    assert teaching["routes"][0] == "xxx" and {"explained", "price", "aimed_skip_ratio"} < teaching.keys()


# ---------------------------------------- resume, best model


STAGES = {"schedule": "stages", "last_mode": "hard", "warmup_end": 0.1, "soft_end": 0.2, "gumbel_end": 1.0}


@pytest.mark.parametrize(
    ("recipe", "stages"), [*((recipe, {"warmup_end": 0.3}) for recipe in RECIPES), ("frozen", STAGES)]
)
def test_a_resumed_run_ends_with_the_weights_of_an_unbroken_one(tmp_path, base, data, recipe, stages):
    """With taught routes or Gumbel noise, accumulation, evaluation in between and several epochs."""
    options = {
        "max_steps": 8,
        "gradient_accumulation_steps": 2,
        **stages,
        "eval_share": 0.25,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 5,
    }
    options |= {"lora_dropout": 0.1} if recipe == "lora" else {}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert command(recipe, base, data, whole, **options) == 0
    interrupted(6, recipe, base, data, broken, **options)
    assert not (broken / "adapter").exists() and not (broken / "model").exists()
    assert command(recipe, base, data, broken, **options, resume_from_checkpoint="last") == 0
    expected, found = result_tensors(whole), result_tensors(broken)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def test_a_run_is_not_resumed_with_other_options(tmp_path, base, data, capsys):
    out, options = tmp_path / "out", {"save_strategy": "steps", "save_steps": 2}
    interrupted(3, "frozen", base, data, out, **options)
    changed = options | {"target_skip_ratio": 0.2, "max_steps": 7, "seed": 5}
    assert command("frozen", base, data, out, **changed, resume_from_checkpoint="last") == 2
    error = capsys.readouterr().err
    assert all(
        text in error for text in ("target_skip_ratio was 0.3, is 0.2", "steps was 6, is 7", "seed was 42, is 5")
    )
    assert command("full", base, data, out, **options, resume_from_checkpoint=out / "checkpoints/checkpoint-2") == 2
    assert "train_base was frozen, is full" in capsys.readouterr().err


def test_a_checkpoint_cut_short_is_passed_over(tmp_path, base, data, capsys):
    out, options = tmp_path / "out", {"save_strategy": "steps", "save_steps": 2}
    interrupted(5, "frozen", base, data, out, **options)
    (out / "checkpoints" / "checkpoint-4" / "run.json").unlink()  # written last
    run = run_of("frozen", base, data, out, **options, resume_from_checkpoint="last")
    assert run.checkpoint.name == "checkpoint-2"
    named = out / "checkpoints" / "checkpoint-4"
    assert command("frozen", base, data, out, **options, resume_from_checkpoint=named) == 2
    assert "interrupted while it was written" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_best_checkpoint_becomes_the_result(tmp_path, base, data, recipe):
    options = {
        "eval_share": 0.25,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 5,
        "load_best_model_at_end": "true",
        # The worst, so that it is not the last.
        "metric_for_best_model": "eval_loss",
        "greater_is_better": "true",
    }
    out = tmp_path / "out"
    run = run_of(recipe, base, data, out, **options)
    run.folder.begin(run.record, resumes=False)
    run.trainer.train()
    best = run.trainer.state.best_model_checkpoint
    assert not best.endswith("checkpoint-6")
    now = run.model.state_dict()
    stored = load_file(f"{best}/trained.safetensors") if recipe != "full" else None
    if stored is None:
        stored = type(run.model).from_pretrained(best, dtype=torch.float32).state_dict()
    assert stored and all(torch.equal(now[name], tensor) for name, tensor in stored.items())
    last = load_file(
        str(out / "checkpoints" / "checkpoint-6" / f"{'model' if recipe == 'full' else 'trained'}.safetensors")
    )
    best = load_file(f"{best}/{'model' if recipe == 'full' else 'trained'}.safetensors")
    assert any(not torch.equal(last[name], tensor) for name, tensor in best.items())


# ---------------------------------------- training arguments


def test_gradient_checkpointing_gives_the_same_weights(tmp_path, base, data):
    for name, options in (("plain", {}), ("checkpointed", {"gradient_checkpointing": "true"})):
        assert command("frozen", base, data, tmp_path / name, **options) == 0
    expected, found = result_tensors(tmp_path / "plain"), result_tensors(tmp_path / "checkpointed")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=name)


def test_bfloat16_trains_routing_parts_in_float32(tmp_path, base, data):
    run = run_of("frozen", base, data, tmp_path / "out", bf16="true")
    layer = run.model.model.language_model.layers[1]
    assert layer.mlp.up_proj.weight.dtype == torch.bfloat16
    assert layer.router.weight.dtype == layer.adapter.up_proj.weight.dtype == torch.float32
    seen = []
    layer.router.register_forward_hook(lambda module, inputs, logits: seen.append(logits))
    run.trainer.train()
    # bfloat16 has 8 bits: logits that were rounded to it anywhere would be unchanged by it.
    assert any(not torch.equal(logits, logits.bfloat16().float()) for logits in seen)
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())


def test_tensorboard_holds_skipping_by_layer_and_stage(tmp_path, base, data):
    assert command("frozen", base, data, tmp_path / "out", report_to="tensorboard", eval_share=0.25) == 0
    tags = set()
    for file in (tmp_path / "out" / "logs").iterdir():
        events = EventAccumulator(str(file))
        events.Reload()
        tags |= set(events.Tags()["scalars"])
    names = "token_loss routing_loss hard_skip_ratio skip_weight soft_hard_gap skip/layer_00 skip/layer_02 stage"
    names += " keep_bias temperature learning_rate/router"
    assert {f"train/{name}" for name in names.split()} <= tags
    assert {"eval/loss", "eval/hard_skip_ratio"} <= tags


REFUSED = {
    "label_smoothing_factor": ("0.1", "label_smoothing_factor 0.1 is not part"),
    "optim": ("galore_adamw", "galore_adamw"),
    "lr_scheduler_type": ("greedy", "requires an eval strategy"),
    "remove_unused_columns": ("true", "remove_unused_columns would take"),
    "gradient_checkpointing_kwargs": ('{"use_reentrant": true}', "use_reentrant=True loses"),
    "target_skip_ratio": ("0.7", r"must lie in [0, 0.5], got 0.7"),
    "base_learning_rate": ("1e-5", "nothing takes it"),
    "eval_strategy": ("steps", "give eval_data or eval_share"),
    "torch_compile": ("true", "torch_compile: "),
    "push_to_hub": ("true", "push the finished folder"),
    "budget": ("batch", "schedule 'taught' does not read budget: leave"),
    "gumbel_end": ("0.5", "schedule 'taught' does not read gumbel_end"),
    "taught_end": ("0.2", "stages must be ordered: warmup_end 0.3, taught_end 0.2"),
    "imitation_weight": ("-1", "imitation_weight must be positive, got -1"),
    "lora_rank": ("64", "train_base 'frozen' does not read lora_rank"),
    "result_dtype": ("bfloat16", "train_base 'frozen' does not read result_dtype"),
    "auto_find_batch_size": ("true", "auto_find_batch_size starts over"),
    "measured_routes": ("9", "measured_routes 9 is more than num_routes 8"),
    "last_mode": ("fuzzy", "fuzzy"),
    "lr_schedular_type": ("cosine", "did you mean lr_scheduler_type"),
    "max_steps": ("many", "max_steps"),
    "routed_layers": ("9", "9"),
    "data": ("nowhere.json", "nowhere.json does not exist"),
    "image_folder": ("nowhere", "nowhere does not exist"),
    "model": ("nowhere", "nowhere is not a checkpoint folder"),
    "resume_from_checkpoint": ("last", "no complete checkpoint"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_ignored_or_wrong_is_refused_by_name(tmp_path, base, data, name, capsys):
    value, expected = REFUSED[name]
    given = words("frozen", base, data, tmp_path / "out", gradient_checkpointing="checkpointing_kwargs" in name)
    assert main(["train", *given, f"--{name}={value}"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and expected in error
    assert not (tmp_path / "out" / "adapter").exists()


def test_published_needs_its_own_scheduler_and_enough_steps(tmp_path, base, data, capsys):
    assert command("published", base, data, tmp_path / "out") == 2
    assert "200 micro-batches or more, got 6" in capsys.readouterr().err
    options = {"max_steps": 200, "lr_scheduler_type": "linear"}
    assert command("published", base, data, tmp_path / "other", **options) == 2
    assert "lr_scheduler_type='cosine'" in capsys.readouterr().err
    assert command("published", base, data, tmp_path / "third", gumbel_end=0.5) == 2
    assert "schedule 'published' does not read gumbel_end" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "options", "expected"),
    [
        ("full", {"taught_end": 1.0}, "base would never learn"),
        ("frozen", {"routed_layers": 2, "target_skip_ratio": 0.4}, "33% of the layers have a router"),
        (
            "frozen",
            {"gradient_checkpointing": "true", "gradient_checkpointing_kwargs": '{"use_reentrant": true}'},
            "use_reentrant=True loses",
        ),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(tmp_path, base, data, recipe, options, expected, capsys):
    assert command(recipe, base, data, tmp_path / "out", dry_run="true", max_steps=20, **options) == 2
    assert expected in capsys.readouterr().err


# ---------------------------------------- recipes in files, folders, bad rows


def test_a_recipe_file_builds_on_another_and_the_command_line_wins(tmp_path, base, data):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("recipe: frozen\ntarget_skip_ratio: 0.2\nadapter_learning_rate: 3e-3\ntaught_end: 0.4\n")
    run = run_of(recipe, base, data, tmp_path / "out", taught_end=0.45)
    routing = run.options.routing
    assert (routing.target_skip_ratio, routing.taught_end, routing.schedule) == (0.2, 0.45, "taught")
    assert run.trainer.rates["adapter"] == 3e-3 and run.trainer.rates["router"] == 1e-2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("target_skip_ration: 0.2", "no option 'target_skip_ration'; did you mean target_skip_ratio"),
        ("- a list", "holds a list"),
        ("a: [", "not readable as YAML"),
        ("recipe: frosen", "there is no recipe 'frosen'"),
    ],
)
def test_a_wrong_recipe_file_is_named(tmp_path, base, data, text, expected, capsys):
    (tmp_path / "mine.yaml").write_text(text)
    assert command(tmp_path / "mine.yaml", base, data, tmp_path / "out") == 2
    assert expected in capsys.readouterr().err


def test_an_earlier_run_is_replaced_only_when_asked(tmp_path, base, data, capsys):
    out = tmp_path / "out"
    assert command("frozen", base, data, out) == 0
    first = result_tensors(out)
    assert command("frozen", base, data, out) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert command("frozen", base, data, out, seed=3, overwrite="true") == 0
    assert any(not torch.equal(first[name], tensor) for name, tensor in result_tensors(out).items())


def test_a_folder_of_something_else_is_left_alone(tmp_path, base, data, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("dear")
    assert command("frozen", base, data, tmp_path / "out", overwrite="true") == 2
    assert "holds no run of roe-llava train" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["letter.txt"]


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(tmp_path, base, data, capsys):
    assert command("lora", base, data, tmp_path / "out", dry_run="true", max_steps=20) == 0
    printed = capsys.readouterr().out
    assert "random 1-6, given 7-14, decided 15-20" in printed and "lora " in printed and "frozen " in printed
    assert not (tmp_path / "out").exists()


def test_bad_rows_are_left_out_when_asked_and_reported(tmp_path, base, capsys):
    rows = write_conversations(tmp_path / "rows")
    (rows.parent / "images" / "5.png").write_text("no picture")
    assert command("frozen", base, rows, tmp_path / "out") == 2
    assert "row 5" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert command("frozen", base, rows, tmp_path / "out", on_bad="skip") == 0
    report = json.loads((tmp_path / "out" / "bad_rows.json").read_text())
    assert (report["bad"], report["bad_rows"][0]["index"]) == (1, 5)
    assert "1 bad rows left out" in capsys.readouterr().out


def test_a_model_without_a_processor_is_named(tmp_path, base_copy, data, capsys):
    for path in base_copy.glob("*token*"):
        path.unlink()
    assert command("frozen", base_copy, data, tmp_path / "out") == 2
    assert f"{base_copy} has no complete processor" in capsys.readouterr().err


def test_a_processor_of_another_model_is_named(tmp_path, base_copy, data, capsys):
    change_json(base_copy / "config.json", image_token_index=7)
    assert command("frozen", base_copy, data, tmp_path / "out") == 2
    assert "image token '<image>' is 4, the model's 7" in capsys.readouterr().err


def test_weights_alone_are_no_checkpoint_to_go_on_from(tmp_path, base, data, capsys):
    options = {"save_strategy": "steps", "save_steps": 2, "save_only_model": "true"}
    interrupted(3, "frozen", base, data, tmp_path / "out", **options)
    assert command("frozen", base, data, tmp_path / "out", **options, resume_from_checkpoint="last") == 2
    assert "no complete checkpoint" in capsys.readouterr().err


def test_help_lists_our_options_and_points_to_trainers(capsys):
    for word, lists_all in (("--help", False), ("--help_all", True)):
        with pytest.raises(SystemExit) as stop:
            main(["train", word])
        printed = capsys.readouterr().out
        assert stop.value.code == 0 and "--target_skip_ratio" in printed and "--help_all" in printed
        assert ("--adam_beta1" in printed) == lists_all
