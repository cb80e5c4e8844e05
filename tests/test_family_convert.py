"""Commands on the other bases: graft, extract, from_base, train, calibrate, verify, card and push; and refusals."""

import json
import shutil

import family
import pytest
import torch
from convert_helpers import weights_of
from family import KINDS, NAMES
from test_remote_code import run_fresh
from tiny import NUM_LAYERS, PATTERN
from train_helpers import words, write_conversations

from roe_llava.cli import main
from roe_llava.convert.adapter_file import save_adapter
from roe_llava.convert.bases import BASES, ROUTED
from roe_llava.convert.extract import extract
from roe_llava.convert.graft import graft
from roe_llava.evaluation.loading import open_checkpoint
from roe_llava.hub_card.push import plan_push
from roe_llava.training.across_ranks import look_at_every_batch

WITH_PROCESSOR = family.processor_names()


@pytest.fixture(scope="module", params=KINDS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name):
    """The routed model that the adapter file is of."""
    return family.routed_model(name)


@pytest.fixture(scope="module")
def base(tmp_path_factory, name, model):
    """A stock folder, with its processor where that can be made."""
    folder = tmp_path_factory.mktemp(name) / "base"
    family.stock_of(model).save_pretrained(folder)
    if name in WITH_PROCESSOR:
        family.processor_of(name, routed=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base, model):
    return save_adapter(model, model.config, base.parent / "adapter", base=base, training={"steps": 3})


@pytest.fixture(scope="module")
def grafted(base, adapter):
    graft(base, adapter, base.parent / "grafted")
    return base.parent / "grafted"


@pytest.fixture
def needs_processor(name):
    if name not in WITH_PROCESSOR:
        pytest.skip(f"the processor of {name} needs torchvision")


@torch.no_grad()
def logits_of(model, name):
    return model.eval()(**family.batch(name)).logits


# ---------------------------------------- graft, extract, from_base


def test_a_grafted_folder_answers_as_the_model_it_came_from(name, model, grafted):
    loaded = KINDS[name].head.from_pretrained(grafted)
    assert torch.equal(logits_of(loaded, name), logits_of(model, name))
    assert torch.equal(loaded(**family.batch(name)).routes, PATTERN)


def test_the_model_type_of_the_base_decides_the_class(name, grafted):
    content = json.loads((grafted / "config.json").read_text())
    assert content["model_type"] == f"roe_{name}"
    assert content["architectures"] == [KINDS[name].head.__name__]
    assert content["auto_map"] == KINDS[name].head.code_map
    if name in WITH_PROCESSOR:
        processor = json.loads((grafted / "processor_config.json").read_text())
        assert processor["processor_class"] == type(family.processor_of(name)).__name__


def test_extract_gives_the_adapter_back(base, adapter, grafted, tmp_path):
    extract(grafted, tmp_path / "taken")
    for file in ("roe_adapter.safetensors", "roe_adapter.json"):
        assert (tmp_path / "taken" / file).read_bytes() == (adapter / file).read_bytes()


def test_extract_full_gives_the_stock_base_back(name, model, base, grafted, tmp_path):
    extract(grafted, tmp_path / "taken", full=True)
    ours, theirs = weights_of(tmp_path / "taken" / "base"), weights_of(base)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    stock = KINDS[name].stock.from_pretrained(tmp_path / "taken" / "base").eval()
    assert stock.config.model_type == name and not hasattr(stock.config, "adapter_size")
    with torch.no_grad():
        expected = family.stock_of(model)(**family.batch(name)).logits
        assert torch.equal(stock(**family.batch(name)).logits, expected)
    if name in WITH_PROCESSOR:
        from transformers import AutoProcessor

        found = AutoProcessor.from_pretrained(tmp_path / "taken" / "base")
        assert type(found).__name__ == type(family.processor_of(name, routed=False)).__name__


@pytest.mark.parametrize("is_loaded", [False, True], ids=["folder", "loaded"])
def test_from_base_equals_the_grafted_folder(name, model, base, adapter, is_loaded):
    given = KINDS[name].stock.from_pretrained(base) if is_loaded else base
    made = KINDS[name].head.from_base(given, adapter)
    assert torch.equal(logits_of(made, name), logits_of(model, name))


def test_load_routing_replaces_the_parts(name, model, base, adapter):
    fresh = KINDS[name].head.from_pretrained(base, adapter_size=4)
    assert torch.equal(logits_of(fresh.load_routing(adapter), name), logits_of(model, name))


def test_graft_refuses_a_base_of_other_weights(name, base, adapter, tmp_path):
    other = shutil.copytree(base, tmp_path / "other")
    KINDS[name].stock(family.stock_of(family.tiny_model(name, seed=5)).config).save_pretrained(other)
    with pytest.raises(ValueError, match=r"is not the base .* was trained on"):
        graft(other, adapter, tmp_path / "out")


def test_graft_refuses_a_text_model_it_cannot_route(base, adapter, tmp_path):
    other = shutil.copytree(base, tmp_path / "other")
    content = json.loads((other / "config.json").read_text())
    content["text_config"]["model_type"] = "gpt_neox"
    (other / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"text_config.model_type 'gpt_neox'.*'llama', 'mistral', 'qwen2'"):
        graft(other, adapter, tmp_path / "out")


def test_another_class_of_base_is_refused(name, base, adapter):
    other = next(kind for key, kind in KINDS.items() if key != name)
    with pytest.raises(ValueError, match=f"has model_type '{name}', expected"):
        other.head.from_base(base, adapter)
    stock = KINDS[name].stock.from_pretrained(base)
    with pytest.raises(ValueError, match=f"base is a {KINDS[name].stock.__name__}, expected a"):
        other.head.from_base(stock, adapter)


def test_every_base_has_one_class():
    assert sorted(ROUTED) == ["roe_llava", "roe_llava_next", "roe_llava_onevision", "roe_moe_llava", "roe_vipllava"]
    assert sorted(BASES) == sorted(one for kind in ROUTED.values() for one in kind.base_types)


# ---------------------------------------- a process without the package

OPEN_AS_REMOTE_CODE = """
import sys
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

expected, has_processor, folders = load_file(sys.argv[1]), sys.argv[2] == "True", sys.argv[3:]
inputs = {name.removeprefix("inputs."): tensor for name, tensor in expected.items() if name.startswith("inputs.")}
for folder in folders:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    for auto in (AutoModel, AutoModelForImageTextToText):
        model = auto.from_pretrained(folder, trust_remote_code=True).eval()
        with torch.no_grad():
            outputs = model(**inputs)
        assert torch.equal(outputs.logits, expected["logits"])
        assert torch.equal(outputs.routes, expected["routes"])
        model.generation_config.eos_token_id = None
        assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), expected["tokens"])
    if has_processor:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        assert "routing_segments" in processor.model_input_names
        assert "routing_segments" in processor(text="USER: what colour ? ASSISTANT:", return_tensors="pt")
    print(type(model).__name__, config.model_type)
"""


def test_grafted_and_saved_folders_open_by_remote_code(name, model, grafted, tmp_path):
    from safetensors.torch import save_file

    model.save_pretrained(tmp_path / "saved")
    if name in WITH_PROCESSOR:
        family.processor_of(name).save_pretrained(tmp_path / "saved")
    inputs = family.batch(name)
    with torch.no_grad():
        outputs = model(**inputs)
    tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    tensors = {f"inputs.{key}": value.contiguous() for key, value in inputs.items()}
    tensors |= {"logits": outputs.logits, "routes": outputs.routes, "tokens": tokens}
    save_file(tensors, tmp_path / "expected.safetensors")
    arguments = (tmp_path / "expected.safetensors", name in WITH_PROCESSOR, grafted, tmp_path / "saved")
    done = run_fresh(tmp_path, OPEN_AS_REMOTE_CODE, *map(str, arguments))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [KINDS[name].head.__name__, f"roe_{name}"] * 2


# ---------------------------------------- train, calibrate, verify, card, push


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_conversations(tmp_path_factory.mktemp("conversations") / "rows")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing(_kwargs)?. is deprecated")
@pytest.mark.parametrize("recipe", ["frozen", "full", "lora"])
def test_train_makes_a_model_of_the_base(needs_processor, name, base, data, recipe, tmp_path):
    assert main(["train", *words(recipe, base, data, tmp_path / "run")]) == 0
    if recipe != "frozen":
        trained = KINDS[name].head.from_pretrained(tmp_path / "run" / "model")
        assert trained.eval()(**family.batch(name)).routes.shape == (len(NAMES), NUM_LAYERS)
        stock = KINDS[name].stock.from_pretrained(base).state_dict()
        moved = {
            key for key, value in trained.state_dict().items() if key in stock and not torch.equal(value, stock[key])
        }
        assert any("self_attn" in key for key in moved)
        assert recipe == "full" or not any(".mlp.experts." in key for key in moved)  # packed: no matrices beside them
        return
    trained = KINDS[name].head.from_base(base, tmp_path / "run" / "adapter")
    assert trained(**family.batch(name)).routes.shape == (len(NAMES), NUM_LAYERS)
    fresh = KINDS[name].head.from_pretrained(base, adapter_size=8)
    changed = [key for key, value in trained.state_dict().items() if not torch.equal(value, fresh.state_dict()[key])]
    assert changed and all(any(part in key for part in ("router", "adapter", "routing_tokens")) for key in changed)


def test_calibrate_stores_a_table(needs_processor, name, grafted, data, tmp_path):
    copy = tmp_path / "calibrated"
    assert main(["calibrate", str(grafted), str(data), "--images", str(data.parent), "--out", str(copy)]) == 0
    loaded = KINDS[name].head.from_pretrained(copy).eval()
    assert loaded.config.skip_calibration is not None


def test_verify_passes(needs_processor, base, grafted, capsys):
    assert main(["verify", str(base), str(grafted), "--tokens", "4"]) == 0, capsys.readouterr()
    said = capsys.readouterr()
    assert "7 of 7 checks passed" in said.out and "You are using a model of type" not in said.err


def test_card_and_push_take_the_folder(needs_processor, name, grafted, tmp_path):
    folder = shutil.copytree(grafted, tmp_path / "folder")
    assert main(["card", str(folder)]) == 0
    part, text = "moe" if name == "moe_llava" else "family", (folder / "README.md").read_text()
    assert f"`modeling_roe_{part}.py`" in text
    assert ("3 per layer, 2 per token, in layers 0, 1, 3; token_aware routers" in text) == (name == "moe_llava")
    plan = plan_push(folder, "owner/name")
    assert {f"modeling_roe_{part}.py", f"configuration_roe_{part}.py", "config.json"} <= plan.files.keys()


def test_a_card_of_an_adapter_names_the_code_of_its_base(needs_processor, name, adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "folder")
    assert main(["card", str(folder)]) == 0
    assert f"`modeling_roe_{'moe' if name == 'moe_llava' else 'family'}.py`" in (folder / "README.md").read_text()


# ---------------------------------------- refusals


@pytest.mark.parametrize(
    "words",
    [
        ["bake", "FOLDER", "OUT", "--route", "1101"],
        ["export-reference", "FOLDER", "OUT"],
        ["serve", "FOLDER"],
    ],
    ids=lambda words: words[0],
)
def test_a_command_that_knows_llava_alone_says_so(words, name, grafted, tmp_path, capsys):
    places = {"FOLDER": str(grafted), "OUT": str(tmp_path / "out")}
    assert main([places.get(word, word) for word in words]) == 2
    assert f"has model_type 'roe_{name}', and {words[0]} does not support that base yet" in capsys.readouterr().err


def test_upcycle_refuses_the_base(name, base, tmp_path, capsys):
    assert main(["upcycle", str(base), str(tmp_path / "out")]) == 2
    reason = "and upcycle does not support that base yet"
    reason = "expected 'llava': this model has experts already" if name == "moe_llava" else reason
    assert f"has model_type '{name}', {reason}" in capsys.readouterr().err


def test_evaluate_refuses_the_model(name, grafted):
    with pytest.raises(ValueError, match=f"model_type 'roe_{name}', and evaluate does not support that base yet"):
        open_checkpoint(str(grafted))


def test_the_published_recipe_is_refused(needs_processor, base, data, tmp_path, capsys):
    command = ["train", *words("published", base, data, tmp_path / "run", max_steps=200)]
    assert main(command) == 2
    assert "schedule 'published' does not support that base yet" in capsys.readouterr().err


@pytest.mark.parametrize("tiled", ["llava_next", "llava_onevision"])
def test_training_sharded_over_ranks_is_refused(tiled):
    with pytest.raises(ValueError, match="cannot be trained with its weights sharded over ranks"):
        look_at_every_batch(family.routed_model(tiled))
