"""Several processes train as one: DDP and FSDP2 on two processes of this machine, launched as a user launches them."""

import os
import subprocess
import sys
from configparser import ConfigParser
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import distributed_training
import pytest
import tiny
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from roe_llava import RoeLlavaForConditionalGeneration
from roe_llava.training.across_ranks import DrawsOfRank, mean_over_ranks
from roe_llava.training.trainer import let_ddp_find_unused

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "training" / "accelerate"
LAUNCHED = {
    "ddp": ["full", "batch-budget", "checkpointed", "resumed", "taught"],
    "fsdp2": ["full", "resumed", "taught"],
}
REST = ["frozen", "batch-budget", "checkpointed"]  # of FSDP2: slow
QUICK = [(kind, run) for kind, runs in LAUNCHED.items() for run in runs]


# As in test_train_command.py.
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated")


# ------------------------------------------------------------------------------------------------------------- running


def launch(kind: str, out: Path, runs: list[str]) -> None:
    """`accelerate launch` of the runs on two processes, in float32 on gloo."""
    paths = [ROOT.parent, ROOT / "tests", os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    options = ["--config_file", CONFIGS / f"{kind}.yaml", "--num_processes", "2", "--mixed_precision", "no"]
    options += ["--main_process_port", "0"]  # any free one
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, ROOT / "tests" / "distributed_training.py"]
    done = subprocess.run(
        [*map(str, command), str(out), *runs], env=environment, cwd=out, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folder of the results of "one" process, "ddp" and "fsdp2"."""
    return {kind: tmp_path_factory.mktemp(kind) for kind in ("one", *LAUNCHED)}


@pytest.fixture(scope="module")
def run_once(folders):
    """Gives the record of a run; what belongs together runs together, when first asked for."""

    def record(kind: str, run: str) -> dict:
        target = folders[kind] / f"{run}.pt"
        if not target.exists() and kind == "one":
            if distributed_training.RUNS[run].resume:
                record("one", distributed_training.RUNS[run].resume)
            distributed_training.train(run, folders["one"])
        elif not target.exists():
            launch(kind, folders[kind], LAUNCHED[kind] if run in LAUNCHED[kind] else REST)
        return torch.load(target)

    return record


def assert_same_run(one: dict, several: dict) -> None:
    """Losses by step and weights at the end; sums over rows in another order are all that differs."""
    assert one["modes"] == several["modes"] and {"soft", "given"} & set(one["modes"])
    assert several["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert several["weights"].keys() == one["weights"].keys()
    for name, tensor in one["weights"].items():
        torch.testing.assert_close(several["weights"][name], tensor, rtol=1e-4, atol=1e-5, msg=name)


# ----------------------------------------------------------------------------------------------------------- processes


@pytest.mark.parametrize(("kind", "run"), QUICK)
def test_two_processes_train_as_one(run_once, kind, run):
    """Through all stages: routers without a gradient in the first, noise in the third."""
    several = run_once(kind, run)
    assert_same_run(run_once("one", run), several)
    wrapped = {"ddp": "DistributedDataParallel", "fsdp2": "FSDPRoeLlavaForConditionalGeneration"}
    assert several["wrapped"] == wrapped[kind]


@pytest.mark.slow
@pytest.mark.parametrize("run", REST)
def test_two_sharded_processes_train_as_one(run_once, run):
    assert_same_run(run_once("one", run), run_once("fsdp2", run))


@pytest.mark.parametrize("kind", LAUNCHED)
def test_ranks_that_route_differently_run_both_paths(run_once, kind):
    """Decisions of the first turns, (steps, ranks, B, L), differ between ranks in every stage."""
    record = run_once(kind, "full")
    first, second = record["decisions"].unbind(dim=1)
    for mode in ("random", "hard"):
        steps = [index for index, own in enumerate(record["modes"]) if own == mode]
        assert steps and any(not torch.equal(first[step], second[step]) for step in steps), mode
    ours = record["decisions"].flatten(1, 2)  # rows in the order of the global batch
    assert torch.equal(ours, run_once("one", "full")["decisions"].flatten(1, 2))


@pytest.mark.parametrize("kind", LAUNCHED)
def test_a_rank_may_have_text_alone(run_once, kind):
    """The runs above had such batches, in which projector and vision tower have nothing to do on one rank."""
    pictures = run_once(kind, "full")["pictures"]
    assert (pictures.any(dim=1) & ~pictures.all(dim=1)).sum() >= 2


@pytest.mark.parametrize("kind", LAUNCHED)
def test_resuming_gives_the_weights_of_an_unbroken_run(run_once, kind):
    whole, resumed = run_once(kind, "full"), run_once(kind, "resumed")
    assert resumed["losses"] == whole["losses"] and resumed["modes"] == whole["modes"][4:]
    for name, tensor in whole["weights"].items():
        assert torch.equal(resumed["weights"][name], tensor), name


@pytest.mark.parametrize("kind", LAUNCHED)
def test_a_checkpoint_of_two_processes_loads_as_any_other(run_once, folders, kind):
    record = run_once(kind, "full")
    model = RoeLlavaForConditionalGeneration.from_pretrained(folders[kind] / "full" / "checkpoint-8").eval()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, record["weights"][name]), name
    run_once("one", "full")
    one = RoeLlavaForConditionalGeneration.from_pretrained(folders["one"] / "full" / "checkpoint-8").eval()
    inputs = tiny.batch()
    torch.testing.assert_close(model(**inputs).logits, one(**inputs).logits, rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------- one process


def test_ranks_draw_what_one_process_draws_for_all_rows():
    def drawn(rank, world_size, rows, turns=3, micro_batch=5, layer=2):
        return DrawsOfRank(7, micro_batch, rank, world_size)(layer, torch.empty(rows, turns, 2))

    whole = drawn(0, 1, 6)
    assert torch.equal(torch.cat([drawn(rank, 3, 2) for rank in range(3)]), whole)
    assert torch.equal(drawn(1, 3, 2, turns=2), whole[2:4, :2])  # a rank whose conversations are shorter
    others = [drawn(0, 1, 6, micro_batch=6), drawn(0, 1, 6, layer=3)]
    assert not any(torch.equal(other, whole) for other in others)
    assert whole.min() >= 0 and whole.max() < 1 and len(whole.unique()) == whole.numel()


def test_one_process_needs_no_other_for_a_mean():
    values = torch.tensor([[1.0, 2.0], [3.0, 6.0]], requires_grad=True)
    mean_over_ranks(values).sum().backward()
    assert torch.equal(mean_over_ranks(values), torch.tensor([2.0, 4.0]))
    assert torch.equal(values.grad, torch.full((2, 2), 0.5))


def test_ddp_cannot_be_told_to_ignore_unused_parameters():
    with pytest.raises(ValueError, match="random warm-up"):
        let_ddp_find_unused(SimpleNamespace(ddp_find_unused_parameters=False, world_size=2))
    arguments = SimpleNamespace(ddp_find_unused_parameters=None, world_size=2)
    let_ddp_find_unused(arguments)
    assert arguments.ddp_find_unused_parameters is True


# -------------------------------------------------------------------------------------------------------------- configs


def launched(name: str):
    """Arguments of `accelerate launch` as it completes them from a config file."""
    file = str(CONFIGS / f"{name}.yaml")
    given = ["--config_file", file, "-m", "roe_llava.training.train", "recipe.yaml"]
    return _validate_launch_command(launch_command_parser().parse_args(given))[0]


@pytest.mark.parametrize(
    ("name", "kind", "processes"),
    [("one_gpu", "NO", 1), ("ddp", "MULTI_GPU", 8), ("fsdp2", "FSDP", 8), ("zero3", "DEEPSPEED", 8)],
)
def test_accelerate_reads_the_configs(name, kind, processes):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))  # refuses keys it does not know
    assert (config.distributed_type.value, config.num_processes, config.mixed_precision) == (kind, processes, "bf16")
    arguments = launched(name)
    assert arguments.module and arguments.training_script == "roe_llava.training.train"
    assert (arguments.use_fsdp, arguments.use_deepspeed) == (kind == "FSDP", kind == "DEEPSPEED")
    sections = {**config.fsdp_config, **config.deepspeed_config}
    assert all(hasattr(arguments, key) for key in sections)


def test_fsdp2_wraps_the_routed_layers(monkeypatch):
    for name, value in prepare_multi_gpu_env(launched("fsdp2")).items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.state_dict_type.name) == (2, "FULL_STATE_DICT")
    assert plugin.reshard_after_forward is True and not plugin.activation_checkpointing
    plugin.set_auto_wrap_policy(model := tiny.tiny_model())
    classes = plugin.auto_wrap_policy.keywords["transformer_layer_cls"]
    assert {type(model.model.language_model.layers[0])} < classes
    assert {name.__name__ for name in classes} == {"RoeLlamaDecoderLayer", "CLIPEncoderLayer"}


def test_zero3_leaves_to_the_recipe_what_is_its_own(monkeypatch):
    arguments = launched("zero3")
    arguments.deepspeed_fields_from_accelerate_config = ""
    for name, value in prepare_deepspeed_cmd_env(arguments)[1].items():
        monkeypatch.setenv(name, value)
    plugin = DeepSpeedPlugin()
    config = plugin.hf_ds_config.config
    assert config["zero_optimization"]["stage"] == 3 and plugin.zero3_init_flag
    assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
    assert config["gradient_accumulation_steps"] == config["gradient_clipping"] == "auto"


def test_the_configs_are_installed():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    patterns = setup["options.package_data"]["roe_llava.training"].split(", ")
    files = sorted(CONFIGS.iterdir())
    assert {file.stem for file in files} == {"one_gpu", "ddp", "fsdp2", "zero3"}
    assert all(any(fnmatch(f"accelerate/{file.name}", pattern) for pattern in patterns) for file in files)
