"""Baking: a route frozen into a smaller checkpoint, and what a baked model answers, refuses and holds."""

import copy
import json
import re
import shutil

import pytest
import tiny
import torch
from convert_helpers import NUM_LAYERS, bytes_of, change_json, make_base, tiny_config, tiny_inputs, train, weights_of
from PIL import Image
from safetensors.torch import save_file
from test_remote_code import run_fresh
from train_helpers import write_conversations
from transformers import AutoProcessor, LlavaForConditionalGeneration

from roe_llava import RoeLlavaConfig, RoeLlavaForConditionalGeneration, RoeLlavaProcessor, RoutingPhase
from roe_llava.calibration_roe import calibrated_bias
from roe_llava.cli import main
from roe_llava.convert.adapter_file import save_adapter
from roe_llava.convert.bake import Questions, bake
from roe_llava.convert.bake_route import adapters_left_out, asked_route, open_questions
from roe_llava.convert.calibrate import check_place
from roe_llava.convert.export_reference import export_reference
from roe_llava.convert.extract import extract
from roe_llava.convert.graft import graft
from roe_llava.convert.source import resolve_source
from roe_llava.convert.verify import verify
from roe_llava.examples.tiny_world.demo import SHIPPED
from roe_llava.examples.tiny_world.export import export
from roe_llava.examples.tiny_world.world import TinyWorld
from roe_llava.training.calibration import calibrate

ROUTE, SKIPPED = (True, False, True), [1]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folders: a base in shards, a RoE checkpoint `roe` made of it, questions; and that model."""
    folder = tmp_path_factory.mktemp("world")
    base = make_base(folder / "base", max_shard_size="20KB")
    model = train(base)
    adapter = save_adapter(model, model.config, folder / "adapter", base=base)
    graft(base, adapter, folder / "roe")
    write_conversations(folder / "data")
    bake(folder / "roe", folder / "baked", route="101", drop_adapters="never")
    bake(folder / "roe", folder / "stock", route="101", drop_adapters="always")
    return folder


@pytest.fixture(scope="module")
def source(world):
    return RoeLlavaForConditionalGeneration.from_pretrained(world / "roe").eval()


@pytest.fixture(scope="module")
def baked(world):
    return RoeLlavaForConditionalGeneration.from_pretrained(world / "baked").eval()


@pytest.fixture(scope="module")
def inputs(world):
    return tiny_inputs(processor_of(world / "roe"))


@pytest.fixture(scope="module")
def varied(world, source):
    """A RoE folder whose routers send 7 of the 12 questions along one route, 3 and 2 along others."""
    model = copy.deepcopy(source)
    batch = dict(open_questions(resolve_source(world / "roe"), questions_of(world, batch_size=12)).batches[0])
    del batch["labels"]
    rows = [[1, 0, 1]] * 7 + [[1, 1, 0]] * 3 + [[1, 1, 1]] * 2
    tiny.solve_routers(model, batch, torch.tensor(rows, dtype=torch.bool))
    return saved(model, world, world / "varied")


@pytest.fixture(scope="module")
def taught(world, source):
    """A RoE folder whose adapter of layer 1 has learned to answer where that layer is skipped."""
    measured = open_questions(resolve_source(world / "roe"), questions_of(world))
    model = measured.model.requires_grad_(False)
    adapter = model.model.language_model.layers[1].adapter.requires_grad_(True)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-2)
    for _ in range(20):
        for batch in measured.batches:
            optimizer.zero_grad()
            model(**batch, routes=ROUTE).loss.backward()
            optimizer.step()
    return saved(model, world, world / "taught")


def processor_of(folder):
    return RoeLlavaProcessor.from_pretrained(folder, trust_remote_code=False)  # it is this class's own


def saved(model, world, folder):
    model.save_pretrained(folder)
    processor_of(world / "roe").save_pretrained(folder)
    return folder


def questions_of(world, **options):
    return Questions(world / "data" / "data.json", device="cpu", **options)


# ---------------------------------------- what a baked RoE checkpoint answers


def test_logits_equal_those_of_the_pinned_route(source, baked, inputs):
    with torch.no_grad():
        ours, theirs = baked(**inputs), source(**inputs, routes=ROUTE)
    assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.routes, theirs.routes)
    assert ours.router_logits is None and ours.routes.tolist() == [list(ROUTE)] * 2


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_generation_equals_that_of_the_pinned_route(source, baked, inputs, options):
    settings = {"max_new_tokens": 5, "do_sample": False, "min_new_tokens": 5, "suppress_tokens": [4]} | options
    assert torch.equal(baked.generate(**inputs, **settings), source.generate(**inputs, **settings, routes=ROUTE))


def test_a_row_in_a_batch_equals_the_row_alone(baked, inputs):
    """To rounding: matrices of one row are multiplied in another order than those of two."""
    with torch.no_grad():
        together = baked(**inputs).logits
        for row in range(2):
            kept = inputs["attention_mask"][row].bool()
            of_row = {name: tensor[row : row + 1] for name, tensor in inputs.items() if name == "pixel_values"}
            of_row |= {name: inputs[name][row : row + 1, kept] for name in ("input_ids", "attention_mask")}
            torch.testing.assert_close(baked(**of_row).logits[0], together[row, kept], atol=1e-5, rtol=1e-5)


def test_the_cache_holds_nothing_for_skipped_layers_and_is_continued(source, baked, inputs):
    settings = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": [2, 4]}
    results = [
        baked.generate(**inputs, **settings, return_dict_in_generate=True),
        source.generate(**inputs, **settings, return_dict_in_generate=True, routes=ROUTE),
    ]
    caches = [result.past_key_values for result in results]
    assert [layer.is_initialized for layer in caches[0].layers] == list(ROUTE)
    more = torch.cat([results[0].sequences, torch.tensor([[7, 8], [9, 10]])], dim=1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 5), value=1)
    again = [
        model.generate(more, attention_mask=mask, past_key_values=cache, **settings)
        for model, cache in zip((baked, source), caches, strict=True)
    ]
    assert torch.equal(*again) and again[0].shape[1] == more.shape[1] + 3


def test_hidden_states_and_attentions_have_the_shapes_of_the_source(source, baked, inputs):
    options = {"output_hidden_states": True, "output_attentions": True}
    models = [copy.deepcopy(model) for model in (source, baked)]
    for model in models:
        model.set_attn_implementation("eager")
    with torch.no_grad():
        theirs, ours = models[0](**inputs, **options, routes=ROUTE), models[1](**inputs, **options)
    assert all(torch.equal(a, b) for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True))
    assert len(ours.hidden_states) == NUM_LAYERS + 1 and ours.attentions[1] is None is theirs.attentions[1]
    assert all(torch.equal(ours.attentions[i], theirs.attentions[i]) for i in (0, 2))


def test_a_batch_of_prompts_is_grouped(baked, inputs):
    prompts = [{"input_ids": torch.tensor([[5, 7, 8]])}, {"input_ids": torch.tensor([[5, 9]])}]
    grouped = baked.group_by_route(prompts, batch_size=2, max_new_tokens=3, suppress_tokens=[4])
    for prompt, tokens in zip(prompts, grouped, strict=True):
        assert torch.equal(baked.generate(**prompt, max_new_tokens=3, suppress_tokens=[4])[0], tokens)


def test_training_runs_the_route_and_reaches_the_adapters(baked, inputs):
    model = copy.deepcopy(baked).train()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    outputs = model(**inputs, labels=labels)
    outputs.loss.backward()
    with torch.no_grad():
        assert torch.equal(outputs.loss, baked(**inputs, labels=labels).loss)
    assert outputs.turn_skip_weights is None
    assert model.model.language_model.layers[1].adapter.up_proj.weight.grad.abs().sum() > 0


def test_compiled_parts_leave_out_what_is_not_there(baked, inputs):
    model = copy.deepcopy(baked)
    model.compile_layers(backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, baked(**inputs).logits, atol=1e-5, rtol=1e-5)


# ---------------------------------------- what it holds


def test_skipped_layers_hold_norm_and_adapter_and_nothing_routes(world, source, baked):
    names = [name for name, _ in baked.named_parameters()]
    assert sorted(name.partition("layers.1.")[2] for name in names if "language_model.layers.1." in name) == [
        "adapter.down_proj.weight",
        "adapter.up_proj.weight",
        "input_layernorm.weight",
    ]
    assert not [name for name in names if ".router." in name or "routing_tokens" in name]
    assert {name for name in names if ".adapter." in name} == {name for name in names if "layers.1.adapter." in name}
    stored = weights_of(world / "baked")
    assert len(stored) == len(names) and sum(t.numel() for t in stored.values()) == baked.num_parameters()


def test_size_shrinks_by_what_is_computed(world, source):
    """Layer 1's attention, MLP and second norm, two adapters, three routers, two routing tokens."""
    text = source.config.text_config
    hidden, head = text.hidden_size, text.head_dim
    attention = hidden * head * (2 * text.num_attention_heads + 2 * text.num_key_value_heads)
    mlp = 3 * hidden * text.intermediate_size
    adapter, router = 2 * hidden * source.config.adapter_size, 4 * hidden
    lost = {
        "baked": attention + mlp + hidden + 2 * adapter + 3 * router + 2 * hidden,
        "stock": attention + mlp + 2 * hidden + 3 * adapter + 3 * router + 2 * hidden,
    }
    before = sum(tensor.numel() for tensor in weights_of(world / "roe").values())
    for name, number in lost.items():
        after = sum(tensor.numel() for tensor in weights_of(world / name).values())
        assert before - after == number, name
        index = json.loads((world / name / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 4 * after


def test_shards_stay_and_kept_tensors_keep_their_bytes(world):
    before, after = weights_of(world / "roe"), weights_of(world / "baked")
    assert len(list((world / "baked").glob("model-*.safetensors"))) > 2
    assert after.keys() < before.keys() and all(bytes_of(after[name]) == bytes_of(before[name]) for name in after)


@pytest.mark.parametrize("layout", ["one file", "names in memory", "saved"])
def test_other_layouts_are_baked_alike(tmp_path, world, source, baked, inputs, layout):
    if layout == "saved":
        source.save_pretrained(tmp_path / "roe")
    else:
        base = make_base(tmp_path / "base", save_original_format=layout == "one file")
        graft(base, world / "adapter", tmp_path / "roe")
    bake(tmp_path / "roe", tmp_path / "baked", route=SKIPPED, drop_adapters="never")
    bake(tmp_path / "roe", tmp_path / "stock", route=SKIPPED, drop_adapters="always")
    ours = RoeLlavaForConditionalGeneration.from_pretrained(tmp_path / "baked").eval()
    assert all(torch.equal(tensor, baked.state_dict()[name]) for name, tensor in ours.state_dict().items())
    LlavaForConditionalGeneration.from_pretrained(tmp_path / "stock")


def test_saved_and_loaded_again_it_is_the_same(tmp_path, baked, inputs):
    baked.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    again, info = RoeLlavaForConditionalGeneration.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(info.values()) and again.config.skipped_layers == SKIPPED and again.config.routed_layers == []
    with torch.no_grad():
        assert torch.equal(again.eval()(**inputs).logits, baked(**inputs).logits)


def test_layers_are_offloaded_to_the_disk(tmp_path, world, baked, inputs):
    parts = ("lm_head", "model.vision_tower", "model.multi_modal_projector")
    places = dict.fromkeys([*parts, *(f"model.language_model.{part}" for part in ("embed_tokens", "norm"))], "cpu")
    places |= {f"model.language_model.layers.{layer}": "disk" if layer else "cpu" for layer in range(NUM_LAYERS)}
    places["model.language_model.rotary_emb"] = "cpu"
    model = RoeLlavaForConditionalGeneration.from_pretrained(
        world / "baked", device_map=places, offload_folder=tmp_path / "offload"
    )
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs).logits, baked(**inputs).logits)


def test_missing_adapters_are_an_error(tmp_path, world):
    shutil.copytree(world / "baked", tmp_path / "baked")
    for path in (tmp_path / "baked").glob("*.safetensors"):
        tensors = weights_of_file(path)
        if any(".adapter." in name for name in tensors):
            tensors = {name: tensor for name, tensor in tensors.items() if ".adapter.up" not in name}
            save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.adapter\.up_proj"):
        RoeLlavaForConditionalGeneration.from_pretrained(tmp_path / "baked")


def weights_of_file(path):
    from safetensors.torch import load_file

    return load_file(path)


def test_it_opens_without_the_package(world, baked, inputs):
    with torch.no_grad():
        logits = baked(**inputs).logits
    save_file(
        {name: tensor.contiguous() for name, tensor in inputs.items()} | {"logits": logits},
        world / "expected.safetensors",
    )
    script = """
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoProcessor

    expected = load_file("expected.safetensors")
    logits = expected.pop("logits")
    model = AutoModel.from_pretrained("baked", trust_remote_code=True).eval()
    assert type(model).__name__ == "RoeLlavaForConditionalGeneration" and model.config.skipped_layers == [1]
    assert type(AutoProcessor.from_pretrained("baked", trust_remote_code=True)).__name__ == "RoeLlavaProcessor"
    with torch.no_grad():
        assert torch.equal(model(**expected).logits, logits)
    print(model.generate(**expected, max_new_tokens=2).shape, model.routing_report())
    """
    done = run_fresh(world, script)
    assert done.returncode == 0, done.stderr
    assert "the route is baked" in done.stdout


# ---------------------------------------- the stock form


def test_without_adapters_it_is_a_stock_llava(world, source, inputs):
    stock, info = LlavaForConditionalGeneration.from_pretrained(world / "stock", output_loading_info=True)
    assert not any(info.values()) and stock.config.text_config.num_hidden_layers == 2
    plain = {name: tensor for name, tensor in inputs.items() if name != "routing_segments"}
    with torch.no_grad(), adapters_left_out(source):
        theirs = source(**inputs, routes=ROUTE).logits
        tokens = source.generate(**inputs, routes=ROUTE, max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        assert torch.equal(stock.eval()(**plain).logits, theirs)
    assert torch.equal(stock.generate(**plain, max_new_tokens=4, do_sample=False), tokens)


def test_a_stock_folder_says_nothing_of_roe(world):
    names = {path.name for path in (world / "stock").iterdir()}
    assert not [name for name in names if name.endswith(".py") or "roe" in name]
    for path in (world / "stock").glob("*.json"):
        assert "roe" not in path.read_text().lower(), path
    config = json.loads((world / "stock" / "config.json").read_text())
    assert config["model_type"] == "llava" and "skipped_layers" not in config and "adapter_size" not in config
    processor = AutoProcessor.from_pretrained(world / "stock", trust_remote_code=False)
    assert type(processor).__name__ == "LlavaProcessor"
    prompt = processor(images=Image.new("RGB", (28, 28)), text="USER: <image> what ASSISTANT:", return_tensors="pt")
    LlavaForConditionalGeneration.from_pretrained(world / "stock").generate(**prompt, max_new_tokens=2)


@pytest.mark.parametrize("text_type", ["mistral", "qwen2"])
def test_other_decoders_keep_their_windows(tmp_path, text_type):
    """Qwen2: layers 2 and 3 have a sliding window; layer 0 is taken out, so that they become 1 and 2."""
    own = {"use_sliding_window": True, "max_window_layers": 2} if text_type == "qwen2" else {}
    text = {"num_hidden_layers": 4, "sliding_window": 4, "tie_word_embeddings": text_type == "qwen2"} | own
    config = tiny_config(text_type, **text)
    config.tie_word_embeddings = text["tie_word_embeddings"]
    base = make_base(tmp_path / "base", config=config)
    model = train(base)
    model.save_pretrained(tmp_path / "roe")
    processor_of(base).save_pretrained(tmp_path / "roe")
    inputs = tiny_inputs(processor_of(base))
    plain = {name: tensor for name, tensor in inputs.items() if name != "routing_segments"}
    bake(tmp_path / "roe", tmp_path / "stock", route="0111", drop_adapters="always")
    bake(tmp_path / "roe", tmp_path / "baked", route="0111", drop_adapters="never")
    stock, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "stock", output_loading_info=True)
    baked = RoeLlavaForConditionalGeneration.from_pretrained(tmp_path / "baked").eval()
    assert not any(info.values())
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "suppress_tokens": [4]}
    routes = [False, True, True, True]
    with torch.no_grad():
        assert torch.equal(baked(**inputs).logits, model(**inputs, routes=routes).logits)
        assert torch.equal(baked.generate(**inputs, **settings), model.generate(**inputs, **settings, routes=routes))
        with adapters_left_out(model):
            assert torch.equal(stock.eval()(**plain).logits, model(**inputs, routes=routes).logits)
            expected = model.generate(**inputs, **settings, routes=routes)
        assert torch.equal(stock.generate(**plain, **settings), expected)


# ---------------------------------------- which route


def test_a_route_is_read_from_what_people_write():
    assert asked_route("most-common", 4) == "most-common" and asked_route("2", 4) == asked_route(2, 4) == 2
    same = (True, False, True, False)
    assert same == asked_route("1010", 4) == asked_route("1,3", 4) == asked_route("3, 1", 4) == asked_route([1, 3], 4)
    assert asked_route("3,", 4) == (True, True, True, False) and asked_route("10", 12) == 10
    for wrong in ("most", "1,4", "1,1", "-1", "1.5", [True], [0.0], None, True, "12a"):
        with pytest.raises(ValueError, match="route must be 'most-common', how many"):
            asked_route(wrong, 4)


def test_answers_do_not_change_what_routers_decide(world, varied):
    """The most common route is taken from conversations with answers: as asked without."""
    measured = open_questions(resolve_source(varied), questions_of(world, batch_size=3))
    model = measured.model
    for number, (batch, outputs) in enumerate(measured.run()):
        for index in range(len(batch["labels"])):
            last = int((batch["labels"][index] != -100).nonzero()[-1])
            answers = batch["labels"][index] != -100
            start = max(place for place in range(last + 1) if answers[place] and not answers[place - 1])
            prompt = {name: batch[name][index : index + 1, :start] for name in ("input_ids", "attention_mask")}
            prompt |= {"routing_segments": batch["routing_segments"][index : index + 1, :start]}
            prompt |= {"pixel_values": batch["pixel_values"][index : index + 1]}
            with torch.no_grad():
                assert torch.equal(model(**prompt).routes[0], outputs.routes[index]), (number, index)


def test_the_most_common_route_is_baked(tmp_path, world, varied):
    measured = open_questions(resolve_source(varied), questions_of(world))
    counts = measured.own_routes()
    assert counts == {(True, True, False): 3, (True, False, True): 7, (True, True, True): 2}
    summary = bake(varied, tmp_path / "out", questions=questions_of(world), drop_adapters="never")
    assert RoeLlavaConfig.from_pretrained(tmp_path / "out").skipped_layers == [1]
    assert "the most common of 3 routes, taken by 7 of 12 questions" in summary.lines["chosen"]


def test_layers_are_chosen_by_the_loss_without_them(tmp_path, world):
    measured = open_questions(resolve_source(world / "roe"), questions_of(world))
    losses = {layer: measured.score(tuple(i != layer for i in range(3))).loss for layer in range(3)}
    first = min(losses, key=losses.get)
    pairs = {
        layer: measured.score(tuple(i not in (first, layer) for i in range(3))).loss for layer in {0, 1, 2} - {first}
    }
    for number, skipped in ((1, {first}), (2, {first, min(pairs, key=pairs.get)})):
        summary = bake(
            world / "roe", tmp_path / str(number), route=number, questions=questions_of(world), drop_adapters="never"
        )
        assert set(RoeLlavaConfig.from_pretrained(tmp_path / str(number)).skipped_layers) == skipped
        assert "one layer after the other" in summary.lines["chosen"]
    assert (
        f"loss {losses[first]:.4f}"
        in bake(
            world / "roe", tmp_path / "x", route=1, questions=questions_of(world), drop_adapters="never", dry_run=True
        ).lines["with"]
    )


@pytest.mark.parametrize("route", [ROUTE, None])
def test_the_loss_is_that_of_the_model_on_its_labels(world, varied, route):
    """Every question counts alike, so batches of one give the mean that the model's own loss has."""
    one, many = (
        open_questions(resolve_source(varied), questions_of(world, batch_size=size, number=5)) for size in (1, 5)
    )
    losses = []
    for batch in one.batches:
        with torch.no_grad():
            losses.append(one.model(**batch, **({"routes": route} if route else {})).loss.item())
    assert one.score(route).loss == pytest.approx(sum(losses) / 5, rel=1e-5)
    assert many.score(route).loss == pytest.approx(sum(losses) / 5, rel=1e-5)


def test_an_answer_is_right_if_every_token_of_it_is(world):
    """Labels are made what the model says; then one token of every other answer is changed."""
    measured = open_questions(resolve_source(world / "roe"), questions_of(world, batch_size=4))
    for batch, outputs in measured.run(routes=list(ROUTE)):
        said, labels = outputs.logits[:, :-1].argmax(dim=-1), batch["labels"]
        labels[:, 1:] = torch.where(labels[:, 1:] == -100, -100, said)
    assert measured.score(ROUTE).right == 1.0
    for batch in measured.batches:
        for labels in batch["labels"][::2]:
            place = (labels != -100).nonzero()[-1]
            labels[place] = (labels[place] + 1) % 32
    assert measured.score(ROUTE).right == 0.5


@pytest.mark.parametrize("is_idle", [True, False])
def test_auto_leaves_adapters_out_where_that_loses_nothing(tmp_path, world, taught, is_idle):
    """Adapters that give nothing can be left out, one that has learned cannot."""
    model = RoeLlavaForConditionalGeneration.from_pretrained(taught)
    if is_idle:
        model.model.language_model.layers[1].adapter.up_proj.weight.data.zero_()
    summary = bake(saved(model, world, tmp_path / "roe"), tmp_path / "out", route="101", questions=questions_of(world))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == ("llava" if is_idle else "roe_llava")
    with_adapters, without = (summary.lines[name].split(", along")[0] for name in ("with", "without"))
    assert (with_adapters == without) == is_idle
    assert ("left out, a stock LLaVA" if is_idle else "kept, a RoE checkpoint") in str(summary)


def test_the_tolerance_decides(tmp_path, world, taught):
    for tolerance, model_type in ((0.0, "roe_llava"), (100.0, "llava")):
        out = tmp_path / model_type
        bake(taught, out, route="101", questions=questions_of(world), tolerance=tolerance)
        assert json.loads((out / "config.json").read_text())["model_type"] == model_type


def test_the_command(tmp_path, world, capsys):
    words = ["bake", str(world / "roe"), str(tmp_path / "out"), "--data", str(world / "data" / "data.json")]
    options = ["--route", "1", "--device", "cpu", "--drop-adapters", "never", "--questions", "6"]
    assert main([*words, *options, "--dry-run"]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "6 questions with answers" in said and "MB -> " in said and not (tmp_path / "out").exists()
    assert main([*words, *options]) == 0, capsys.readouterr().err
    assert said.partition("\n")[2] == capsys.readouterr().out.partition("\n")[2]
    RoeLlavaForConditionalGeneration.from_pretrained(tmp_path / "out")


def test_one_route_of_the_shipped_model_is_worse_than_routing(tmp_path):
    """And its adapters matter, so that they are kept."""
    data = export(TinyWorld("validation", 40, num_turns=1), tmp_path / "data")
    graft(SHIPPED / "base", SHIPPED / "roe", tmp_path / "roe")
    summary = bake(tmp_path / "roe", tmp_path / "out", questions=Questions(data, device="cpu", batch_size=20))
    loss = {name: float(re.match(r"loss (\S+),", summary.lines[name])[1]) for name in ("with", "without", "routed")}
    assert loss["without"] > loss["with"] + 0.1 and loss["with"] > loss["routed"] + 0.1
    config = RoeLlavaConfig.from_pretrained(tmp_path / "out")
    assert config.skipped_layers and f"skips {len(config.skipped_layers)} of 7 layers" in summary.lines["route"]


# ---------------------------------------- what is refused


@pytest.mark.parametrize(
    "options, message",
    [
        ({"route": "111", "drop_adapters": "never"}, "route 111 skips no layer"),
        ({"route": "000", "drop_adapters": "never"}, "route 000 skips all 3 layers"),
        ({"route": "101"}, "is measured on questions with answers: give them with --data"),
        ({"route": 1, "drop_adapters": "never"}, "a route that skips 1 layers is found by running"),
        ({"drop_adapters": "never"}, "the most common route is found by running"),
        ({"route": "101", "drop_adapters": "sometimes"}, "drop_adapters must be one of auto, always, never"),
        ({"route": "101", "drop_adapters": "never", "tolerance": -1}, "tolerance must be 0 or more"),
        ({"route": "5,", "drop_adapters": "never"}, "route must be 'most-common'"),
    ],
)
def test_what_cannot_be_baked_is_named(tmp_path, world, options, message):
    with pytest.raises(ValueError, match=message):
        bake(world / "roe", tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_wrong_numbers_of_layers_and_rows_without_answers_are_named(tmp_path, world):
    for number in (0, 4):
        with pytest.raises(ValueError, match=r"the number of layers to skip must lie in \[1, 3\]"):
            bake(world / "roe", tmp_path / "out", route=number, questions=questions_of(world))
    rows = [{"messages": [{"role": "user", "content": "what is this"}]}]
    (tmp_path / "asked.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=r"row 0 of .*asked.json: .*answer"):
        bake(world / "roe", tmp_path / "out", route=1, questions=Questions(tmp_path / "asked.json", device="cpu"))


def test_layers_without_an_adapter_cannot_be_skipped(tmp_path, world):
    model = train(make_base(tmp_path / "base"), routed_layers=[1, 2])
    model.save_pretrained(tmp_path / "roe")
    with pytest.raises(ValueError, match=r"skips layers \[0\], which have no adapter"):
        bake(tmp_path / "roe", tmp_path / "out", route="011", drop_adapters="never")
    bake(tmp_path / "roe", tmp_path / "out", route="100", drop_adapters="never")
    assert RoeLlavaConfig.from_pretrained(tmp_path / "out").skipped_layers == [1, 2]


def test_what_is_no_routed_checkpoint_is_refused(tmp_path, world):
    for name, message in (
        ("base", "model_type 'llava', expected 'roe_llava'"),
        ("adapter", "is an adapter file, expected a RoE checkpoint: graft it"),
        ("baked", r"is baked: its route is frozen \(skipped_layers \[1\]\).*no other route to freeze"),
    ):
        with pytest.raises(ValueError, match=message):
            bake(world / name, tmp_path / "out", route="101", drop_adapters="never")


def test_another_route_than_the_baked_one_is_an_error(baked, inputs):
    other = [[True, False, True], [True, True, True]]
    for call in (baked, lambda **kwargs: baked.generate(**kwargs, max_new_tokens=1)):
        with pytest.raises(ValueError, match=r"routes differ from the baked route in layers \[1\]"):
            call(**inputs, routes=other)
        for bias in (1.0, float("inf"), float("-inf"), [0.0, 0.0, 0.5], torch.full((2, 3), -1.0)):
            with pytest.raises(ValueError, match="route_bias has nothing to shift: the route of this model is baked"):
                call(**inputs, route_bias=bias)
    for ratio in (0.0, 0.1, 0.6):
        with pytest.raises(ValueError, match=f"skip_ratio={ratio} of a baked model: its route always skips 1 of 3"):
            baked.generate(**inputs, skip_ratio=ratio, max_new_tokens=1)


def test_what_is_baked_may_be_asked_for(baked, inputs):
    expected = baked.generate(**inputs, max_new_tokens=3)
    for asked in (
        {"routes": ROUTE},
        {"routes": [list(ROUTE)] * 2},
        {"route_bias": 0.0},
        {"route_bias": [float("inf"), float("-inf"), 0.0]},
        {"skip_ratio": 1 / 3},
    ):
        assert torch.equal(baked.generate(**inputs, **asked, max_new_tokens=3), expected)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"skipped_layers": []}, "skipped_layers must name at least one of the 3 layers and not all of them"),
        ({"skipped_layers": [0, 1, 2]}, "and not all of them"),
        ({"skipped_layers": [3]}, r"skipped_layers must be distinct layer numbers in \[0, 3\)"),
        ({"skipped_layers": [1, 1]}, "skipped_layers must be distinct"),
        ({"skipped_layers": [True]}, "skipped_layers must be distinct"),
        ({"skipped_layers": 1}, "skipped_layers must be distinct"),
        ({"skipped_layers": [1], "routed_layers": [0, 2]}, r"beside routed_layers \[0, 2\]"),
        ({"skipped_layers": [1], "skip_calibration": {}}, "skip_calibration"),
    ],
)
def test_a_wrong_config_is_named(tmp_path, world, fields, message):
    with pytest.raises(ValueError, match=message):
        RoeLlavaConfig(text_config={"num_hidden_layers": 3}, **fields)
    shutil.copytree(world / "baked", tmp_path / "baked")
    if fields.get("skip_calibration") is None:
        change_json(tmp_path / "baked" / "config.json", **fields)
        with pytest.raises(ValueError, match=message):
            RoeLlavaForConditionalGeneration.from_pretrained(tmp_path / "baked")


def test_other_commands_refuse_a_baked_checkpoint_by_name(tmp_path, world, baked):
    folder, out = world / "baked", tmp_path / "out"
    where = resolve_source(folder)
    for refused in (
        lambda: graft(world / "base", folder, out),
        lambda: extract(folder, out),
        lambda: extract(folder, out, full=True),
        lambda: export_reference(folder, out),
        lambda: verify(world / "base", folder),
        lambda: check_place(where, out, False),
        lambda: save_adapter(baked, baked.config, out),
        lambda: calibrate(baked, [{"input_ids": torch.tensor([[5, 6]])}]),
        lambda: calibrated_bias(baked, 0.3),
        lambda: copy.deepcopy(baked).load_routing(world / "adapter", check_base=False),
    ):
        with pytest.raises(ValueError, match=r"baked: its route is frozen \(skipped_layers \[1\]\)"):
            refused()
    assert not out.exists()
    with pytest.raises(ValueError, match="skipped_layers given to from_base"):
        RoeLlavaForConditionalGeneration.from_base(world / "base", world / "adapter", skipped_layers=[1])
    with pytest.raises(ValueError, match="already has routing parts"):
        graft(folder, world / "adapter", out)


def test_training_refuses_a_baked_checkpoint(tmp_path, world, capsys):
    data = world / "data" / "data.json"
    words = ["train", "frozen", f"--model={world / 'baked'}", f"--data={data}", f"--output_dir={tmp_path / 'out'}"]
    assert main(words) == 2
    assert "baked: its route is frozen" in capsys.readouterr().err


def test_a_stock_result_is_an_ordinary_base(tmp_path, world):
    """It verifies, and takes routing parts of its own."""
    assert verify(world / "stock", device="cpu", num_tokens=2, repeats=0).passed
    model = train(world / "stock")
    save_adapter(model, model.config, tmp_path / "adapter", base=world / "stock")
    graft(world / "stock", tmp_path / "adapter", tmp_path / "roe")
    assert RoeLlavaForConditionalGeneration.from_pretrained(tmp_path / "roe").config.skipped_layers is None


def test_a_phase_of_training_changes_nothing_of_a_baked_model(baked, inputs):
    model = copy.deepcopy(baked).train()
    model.model.routing_phase = RoutingPhase(mode="random")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, baked(**inputs).logits)
