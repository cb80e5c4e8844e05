"""Every base with a front-end of ours goes through every command, as a stock LLaVA does: the table in docs/bases.md."""

import json
from pathlib import Path

import pytest
import torch
from convert_helpers import bytes_of, weights_of
from safetensors.torch import load_file
from test_remote_code import run_fresh
from train_helpers import words
from transformers import AutoConfig

from roe_llava import RoeLlavaForConditionalGeneration, RoeLlavaProcessor
from roe_llava.cli import main
from roe_llava.convert.adapter_file import save_adapter
from roe_llava.convert.folder_files import processor_defaults
from roe_llava.convert.source import read_json
from roe_llava.examples.tiny_world.base_model import build_base
from roe_llava.examples.tiny_world.evaluate import family_examples
from roe_llava.examples.tiny_world.front_ends import FRONT_ENDS
from roe_llava.examples.tiny_world.processor import build_processor
from roe_llava.examples.tiny_world.train_base import load_base, save_base
from roe_llava.examples.tiny_world.world import TinyWorld
from roe_llava.loading_roe import is_roe_parameter

NUM_LAYERS = 3


def write_questions(folder: Path, number: int = 6) -> Path:
    """Conversations of the tiny world as LLaVA's JSON."""
    rows = []
    for index, example in enumerate(TinyWorld("train", number, num_turns=1)):
        example["image"].save(folder / f"{index}.png")
        question, answer, _ = example["turns"][0]
        said = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        rows.append({"id": str(index), "image": f"{index}.png", "conversations": said})
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"


@pytest.fixture(scope="module", params=sorted(FRONT_ENDS))
def world(request, tmp_path_factory):
    """A folder with `base` (random weights), `adapter` (large enough to matter), `roe` (both) and `data.json`."""
    folder = tmp_path_factory.mktemp(request.param)
    processor = build_processor(request.param)
    sizes = {"num_layers": NUM_LAYERS, "hidden_size": 128, "front_end": request.param}
    save_base(build_base(processor, **sizes), processor, folder / "base")
    model = RoeLlavaForConditionalGeneration.from_pretrained(folder / "base", adapter_size=4)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if is_roe_parameter(name):
            parameter.data = torch.randn_like(parameter) * 0.3
    with torch.no_grad():  # a bias under which layer 1 is skipped and layer 2 is not the same for all questions
        logits = model.eval().float()(**asked(RoeLlavaProcessor.from_pretrained(folder / "base"))).router_logits
    model.config.route_bias = [50.0, -50.0, (logits[:, 2, 1] - logits[:, 2, 0]).mean().item()]
    save_adapter(model, model.config, folder / "adapter", base=folder / "base")
    assert main(["graft", str(folder / "base"), str(folder / "adapter"), str(folder / "roe")]) == 0
    write_questions(folder)
    return folder


def asked(processor):
    """A padded batch of questions."""
    texts = ("how many circles are there?", "what is in a1?")
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": one["image"]}, {"type": "text", "text": text}]}]
        for one, text in zip(family_examples("count", len(texts)), texts, strict=True)
    ]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template(chats, processor_kwargs={"padding": True}, **options)


def test_a_grafted_model_keeps_its_base_and_skips_for_real(world):
    base, roe = load_base(world / "base"), RoeLlavaForConditionalGeneration.from_pretrained(world / "roe").float()
    processor = RoeLlavaProcessor.from_pretrained(world / "roe", trust_remote_code=False)
    inputs = asked(processor)
    with torch.no_grad():
        kept = roe.eval()(**inputs, routes=torch.ones(NUM_LAYERS, dtype=torch.bool))
        inputs.pop("routing_segments")
        torch.testing.assert_close(kept.logits, base.eval()(**inputs).logits, atol=1e-5, rtol=0)
    routes = torch.tensor([[True, False, True], [False, True, True]])
    ran = {layer: [] for layer in range(NUM_LAYERS)}
    for layer, module in enumerate(roe.model.language_model.layers):
        module.mlp.register_forward_pre_hook(lambda _, args, layer=layer: ran[layer].append(args[0].shape[0]))
    roe.generate(**inputs, routes=routes, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert ran == {0: [1, 1], 1: [1, 1], 2: [2, 2]}


def test_extract_gives_back_what_was_grafted(world, tmp_path):
    assert main(["extract", str(world / "roe"), str(tmp_path / "adapter")]) == 0
    first, again = (load_file(one / "roe_adapter.safetensors") for one in (world / "adapter", tmp_path / "adapter"))
    assert {name: bytes_of(tensor) for name, tensor in first.items()} == {
        name: bytes_of(tensor) for name, tensor in again.items()
    }
    assert main(["extract", str(world / "roe"), str(tmp_path / "parts"), "--full"]) == 0
    assert {name: bytes_of(tensor) for name, tensor in weights_of(world / "base").items()} == {
        name: bytes_of(tensor) for name, tensor in weights_of(tmp_path / "parts" / "base").items()
    }
    before, after = (read_json(one / "config.json") for one in (world / "base", tmp_path / "parts" / "base"))
    assert after == before
    load_base(tmp_path / "parts" / "base")
    code = [{path.name for path in one.glob("*.py")} for one in (world / "base", tmp_path / "parts" / "base")]
    assert code[0] == code[1]


def test_from_base_equals_the_grafted_folder(world):
    grafted = RoeLlavaForConditionalGeneration.from_pretrained(world / "roe").state_dict()
    for base in (world / "base", load_base(world / "base").to(torch.bfloat16)):
        model = RoeLlavaForConditionalGeneration.from_base(base, world / "adapter").state_dict()
        assert model.keys() == grafted.keys()
        assert all(bytes_of(model[name]) == bytes_of(grafted[name]) for name in model)


def test_verify_finds_nothing_wrong(world, capsys):
    assert main(["verify", str(world / "base"), str(world / "roe"), "--tokens", "3", "--repeats", "0"]) == 0
    said = capsys.readouterr().out
    assert "FAIL" not in said.upper().replace("0 FAILED", "")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("recipe", ["frozen", "full", "lora", "published"])
def test_train_makes_a_model_of_the_base(world, tmp_path, recipe):
    options = {"adapter_size": 4, "max_steps": 200 if recipe == "published" else 6, "logging_steps": 1}
    assert main(["train", *words(recipe, world / "base", world / "data.json", tmp_path / "run", **options)]) == 0
    trained = tmp_path / "run" / "model"
    if recipe == "frozen":
        trained = tmp_path / "trained"
        assert main(["graft", str(world / "base"), str(tmp_path / "run" / "adapter"), str(trained)]) == 0
    model = RoeLlavaForConditionalGeneration.from_pretrained(trained).eval().float()
    inputs = asked(RoeLlavaProcessor.from_pretrained(trained, trust_remote_code=False))
    assert model(**inputs).routes.shape == (2, NUM_LAYERS)
    assert AutoConfig.from_pretrained(trained, trust_remote_code=True).projector_type == model.config.projector_type


def test_a_row_alone_equals_the_row_in_a_batch_cached_or_not(world, no_gradients):
    model = RoeLlavaForConditionalGeneration.from_pretrained(world / "roe").float().eval()
    inputs = asked(RoeLlavaProcessor.from_pretrained(world / "roe", trust_remote_code=False))
    routes = torch.tensor([[True, False, True], [False, True, True]])
    written = model.generate(**inputs, routes=routes, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    uncached = model.generate(
        **inputs, routes=routes, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=False
    )
    assert torch.equal(written, uncached)
    whole = model(**inputs, routes=routes).logits[:, -1]
    for row in range(2):
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        torch.testing.assert_close(model(**alone, routes=routes[row]).logits[0, -1], whole[row], atol=1e-5, rtol=0)


def test_beams_and_groups_equal_each_prompt_alone(world, no_gradients):
    model = RoeLlavaForConditionalGeneration.from_pretrained(world / "roe").float().eval()
    inputs = asked(RoeLlavaProcessor.from_pretrained(world / "roe", trust_remote_code=False))
    prompts = [{name: value[row : row + 1] for name, value in inputs.items()} for row in range(2)]
    for beams in (1, 3):
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": beams}
        together = model.generate(**inputs, **options)[:, -4:]
        alone = torch.cat([model.generate(**prompt, **options)[:, -4:] for prompt in prompts])
        assert torch.equal(together, alone)
        if beams == 1:
            padded = [int((prompt["attention_mask"] == 0).sum()) for prompt in prompts]
            prompts = [
                {name: value[:, skipped:] if value.dim() == 2 else value for name, value in prompt.items()}
                for skipped, prompt in zip(padded, prompts, strict=True)
            ]
            grouped = model.group_by_route(prompts, batch_size=2, max_new_tokens=4, min_new_tokens=4, do_sample=False)
            assert [one[-4:].tolist() for one in grouped] == alone.tolist()


def test_the_processor_s_segments_are_the_default_ones(world, no_gradients):
    model = RoeLlavaForConditionalGeneration.from_pretrained(world / "roe").float().eval()
    inputs = asked(RoeLlavaProcessor.from_pretrained(world / "roe", trust_remote_code=False))
    given = inputs.pop("routing_segments")
    assert torch.equal(model.model.segments_of(inputs["input_ids"], None, inputs["attention_mask"]), given)


def test_opens_by_remote_code(world):
    done = run_fresh(
        world,
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        model = AutoModelForImageTextToText.from_pretrained("roe", trust_remote_code=True)
        processor = AutoProcessor.from_pretrained("roe", trust_remote_code=True)
        print(type(model).__name__, type(processor).__name__)
        """,
    )
    assert done.stdout.endswith("RoeLlavaForConditionalGeneration RoeLlavaProcessor\n"), done.stderr


def test_calibrate_stores_a_table_that_generate_reads(world, tmp_path):
    calibrate = [str(world / "roe"), str(world / "data.json"), "--out", str(tmp_path / "calibrated")]
    assert main(["calibrate", *calibrate, "--questions", "6", "--ratios", "0.1"]) == 0
    model = RoeLlavaForConditionalGeneration.from_pretrained(tmp_path / "calibrated").eval().float()
    inputs = asked(RoeLlavaProcessor.from_pretrained(tmp_path / "calibrated", trust_remote_code=False))
    assert model.generate(**inputs, skip_ratio=0.0, max_new_tokens=2).shape[0] == 2


@pytest.mark.parametrize("adapters", ["always", "never"])
def test_bake_writes_a_smaller_base_or_model(world, tmp_path, adapters):
    command = ["bake", str(world / "roe"), str(tmp_path / "baked"), "--route", "101", "--drop-adapters", adapters]
    assert main(command) == 0
    config = read_json(tmp_path / "baked" / "config.json")
    if adapters == "always":
        assert config["model_type"] == read_json(world / "base" / "config.json")["model_type"]
        assert load_base(tmp_path / "baked").config.text_config.num_hidden_layers == 2
    else:
        model = RoeLlavaForConditionalGeneration.from_pretrained(tmp_path / "baked")
        assert model.config.skipped_layers == [1]


def test_push_and_card(world, tmp_path, capsys):
    assert main(["card", str(world / "roe"), "--out", str(tmp_path / "README.md")]) == 0
    assert "RoE" in (tmp_path / "README.md").read_text()
    assert main(["push", str(world / "roe"), "someone/model", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "modeling_frontend.py" in said


@pytest.mark.parametrize("trained", [False, True])
def test_bench_measures_a_base(world, tmp_path, capsys, trained):
    adapter = ["--adapter", str(world / "adapter")] if trained else []
    command = ["bench", "--base", str(world / "base"), *adapter, "--quick", "--out", str(tmp_path / "base.json")]
    assert main(command) == 0
    result = read_json(tmp_path / "base.json")
    assert result["shape"] == "base" and result["sizes"]["image_tokens"] == 16
    assert (tmp_path / "base.png").is_file()


def test_evaluate_scores_a_grafted_model(world, tmp_path):
    pytest.importorskip("lmms_eval.evaluator", reason="pip install --no-deps lmms-eval==0.7.3 (make test does)")
    command = ["evaluate", str(world / "roe"), "--tasks", "tiny_world", "--limit", "1", "--device", "cpu", "--dense"]
    assert main([*command, "--output-dir", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "comparison.md").is_file()


def test_what_stock_llava_alone_can_be_made_of_is_refused(world, tmp_path, capsys):
    is_stock = read_json(world / "base" / "config.json")["model_type"] == "llava"
    assert main(["upcycle", str(world / "base"), str(tmp_path / "moe")]) == (0 if is_stock else 2)
    if not is_stock:
        said = capsys.readouterr().err
        assert "model_type 'llava_frontend', expected 'llava': experts stand behind stock LLaVA's tower" in said
        assert main(["export-reference", str(world / "roe"), str(tmp_path / "published")]) == 2
        assert "config.json" in capsys.readouterr().err


def test_a_processor_file_that_leaves_numbers_out_is_completed_from_the_config(world):
    config = read_json(world / "base" / "config.json")
    kept = read_json(world / "base" / "processor_config.json")
    found = processor_defaults(config)
    assert (56 if config["vision_config"].get("image_size") == 56 else 128) // found["patch_size"] == 4
    assert found == {name: kept[name] for name in found}


@pytest.mark.parametrize("model_type", ["llava_next", "llava_onevision", "vipllava", "moe_llava"])
def test_bench_refuses_other_bases(tmp_path, capsys, model_type):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert main(["bench", "--base", str(tmp_path), "--out", str(tmp_path / "out.json")]) == 2
    said = capsys.readouterr().err
    assert f"model_type '{model_type}', and bench --base does not support that base yet" in said
