"""`roe-llava bench`: what is said to be skipped is, memory is exact, numbers follow from runs. No time is asserted."""

import copy
import json
from itertools import pairwise
from math import inf

import pytest
import tiny
import torch
from torch._dynamo.utils import counters

from roe_llava import RoeLlavaForConditionalGeneration
from roe_llava.benchmarks import bench, measure, report, shapes, systems, timing
from roe_llava.cli import main
from roe_llava.convert.verify_prompts import stock_twin
from roe_llava.loading_roe import is_roe_parameter

NUM_LAYERS, LENGTH, TOKENS, CPU = 8, 14, 2, torch.device("cpu")
GRID = {1: (0.0, 0.25, 0.5), 3: (0.25,)}


def make_subject(config=None) -> shapes.Subject:
    """A tiny model with weights large enough for a layer to matter."""
    roe = tiny.tiny_model(config or tiny.tiny_config(num_layers=NUM_LAYERS))

    def prompts(batch_size):
        lengths = (LENGTH, LENGTH + 2)
        return [shapes.random_prompt(roe.config, length, batch_size, CPU, torch.float32) for length in lengths]

    return shapes.Subject(roe, stock_twin(roe), prompts, trained=False)


@pytest.fixture(scope="module")
def subject():
    return make_subject()


@pytest.fixture(scope="module")
def result(subject):
    """What a quick run gives, with what the command adds."""
    found = measure.measure(subject, GRID, rounds=dict.fromkeys(GRID, 2), num_tokens=TOKENS)
    setup = {"gpu": None, "processor": "a processor", "dtype": "float32", "attention": "sdpa", "threads": 1}
    about = {"benchmark": "bench", "shape": "cpu-medium", "quick": True, "command": "roe-llava bench"}
    return about | {"setup": setup | {"torch": "2", "transformers": "5"}} | found


def systems_at(result, batch_size, *kinds):
    return [own for own in result["batches"][str(batch_size)]["systems"] if own["kind"] in kinds]


# ---------------------------------------- routes


@pytest.mark.parametrize("num_layers", [4, 10, 12, 32, 40])
@pytest.mark.parametrize("share", shapes.ALL_SHARES)
def test_shares_become_whole_layers_evenly_spread(num_layers, share):
    number = systems.layers_to_skip(share, num_layers)
    assert abs(number - share * num_layers) <= 0.5
    skipped = systems.spread_layers(number, num_layers)
    assert len(set(skipped)) == number and 0 not in skipped and max(skipped, default=0) < num_layers
    gaps = [after - before for before, after in pairwise(skipped)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_a_share_that_would_skip_layer_0_is_refused():
    with pytest.raises(ValueError, match=r"cannot skip a share of 0\.99 of 12 layers: layer 0 is kept"):
        systems.layers_to_skip(0.99, 12)


def test_shares_that_come_to_the_same_layers_are_one():
    assert systems.counts_of((0.25, 0.2, 0.5), 10) == {2: (0.2, 0.25), 5: (0.5,)}


@pytest.mark.parametrize(
    ("number", "num_layers", "batch_size"), [(3, 12, 8), (6, 12, 8), (2, 10, 4), (8, 32, 8), (1, 4, 8)]
)
def test_mixed_routes_skip_as_much_in_every_row_and_of_every_layer(number, num_layers, batch_size):
    routes = systems.mixed_routes(number, num_layers, batch_size)
    assert routes.shape == (batch_size, num_layers)
    assert (routes.sum(dim=1) == num_layers - number).all()
    assert routes[:, 0].all()
    by_layer = (~routes).sum(dim=0)[1:]
    assert by_layer.max() - by_layer.min() <= 1
    if num_layers > 4:
        assert len({tuple(row) for row in routes.tolist()}) == batch_size


# ---------------------------------------- what is removed is what is skipped


@torch.inference_mode()
def logits_of(model, inputs):
    """Of a prefill and of two steps behind it: (B, 3, V)."""
    outputs = model(**inputs, use_cache=True, logits_to_keep=1)
    found = [outputs.logits]
    for _ in range(2):
        token = inputs["input_ids"][:, -1:]
        step = model(input_ids=token, past_key_values=outputs.past_key_values, use_cache=True)
        found.append(step.logits)
    return torch.cat(found, dim=1)


@pytest.fixture(scope="module")
def without_adapters():
    """A subject whose skip path is the identity."""
    made = make_subject()
    with torch.no_grad():
        for layer in tiny.layers_of(made.roe):
            layer.adapter.up_proj.weight.zero_()
    return made


def named(subject, shares, batch_size):
    removed = systems.removed_models(subject, shares)
    return {system.name: system for system in systems.systems_of(subject, removed, shares, batch_size)}


@pytest.mark.parametrize("number", [2, 4])
def test_the_model_with_layers_removed_equals_the_one_that_skips_them(without_adapters, number):
    found = named(without_adapters, (0.25, 0.5), batch_size=2)
    prompt = without_adapters.prompts(2)[0]
    removed, forced, pinned, base = (
        logits_of(system.model, system.inputs(prompt))
        for system in (
            found[name] for name in (*(f"{kind} {number}/8" for kind in ("removed", "forced", "pinned")), "base")
        )
    )
    torch.testing.assert_close(forced, removed)
    torch.testing.assert_close(pinned, removed)
    assert (removed - base).abs().max() > 0.1  # the layers had a say


def test_every_row_of_a_mixed_batch_skips_the_layers_of_its_route(without_adapters):
    mixed = named(without_adapters, (0.25,), batch_size=3)["forced 2/8 mixed"]
    prompt = without_adapters.prompts(3)[0]
    together = logits_of(mixed.model, mixed.inputs(prompt))
    for row in range(3):
        skipped = (~mixed.routes[row]).nonzero()[:, 0].tolist()
        alone = {name: value[row : row + 1] for name, value in prompt.items()}
        wanted = logits_of(systems.without_layers(without_adapters.base, skipped), alone)
        torch.testing.assert_close(together[row : row + 1], wanted)


def test_models_share_their_tensors_and_removing_leaves_the_base_alone(subject):
    removed = systems.without_layers(subject.base, [1, 4])
    own, base = removed.model.language_model.layers, subject.base.model.language_model.layers
    assert [layer.self_attn.layer_idx for layer in own] == list(range(NUM_LAYERS - 2))
    assert [layer.self_attn.layer_idx for layer in base] == list(range(NUM_LAYERS))
    assert subject.base.config.text_config.num_hidden_layers == NUM_LAYERS
    kept = [0, 2, 3, 5, 6, 7]
    for layer, index in zip(own, kept, strict=True):
        pointers = {id_of(one[index if one is not own else kept.index(index)]) for one in (own, base)}
        assert pointers == {id_of(tiny.layers_of(subject.roe)[index])}
        assert layer is not base[index]


def id_of(layer) -> int:
    return layer.mlp.up_proj.weight.data_ptr()


# ---------------------------------------- measuring


def test_every_system_is_measured(result):
    names = [own["name"] for own in result["batches"]["1"]["systems"]]
    routed = [f"{kind} {number}/8" for number in (2, 4) for kind in ("forced", "pinned", "removed")]
    assert names == ["base", "base again", "all kept", "learned", "pinned 0/8", *routed]
    in_batch = [own["name"] for own in result["batches"]["3"]["systems"]]
    assert in_batch[4:] == ["forced 2/8", "pinned 2/8", "removed 2/8", "forced 2/8 mixed", "pinned 2/8 mixed"]
    for batch in result["batches"].values():
        assert all(len(own[part]["runs"]) == 2 for own in batch["systems"] for part in timing.PARTS)
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("batch_size", GRID)
def test_routers_are_asked_in_prefill_and_never_in_decoding(result, batch_size):
    for own in systems_at(result, batch_size, "forced", "all kept", "learned"):
        assert own["router_calls"] == {"prefill": NUM_LAYERS, "decode": 0}
    for own in systems_at(result, batch_size, "base", "base again", "pinned", "removed"):
        assert own["router_calls"] == {"prefill": 0, "decode": 0}


@pytest.mark.parametrize("batch_size", GRID)
def test_realised_shares_are_those_asked_for(result, batch_size):
    for own in systems_at(result, batch_size, "forced", "pinned", "removed"):
        assert [own["skip_ratio"]] == own["asked"]  # 8 layers: a quarter and a half are whole ones
        assert all(len(layers) == own["asked"][0] * NUM_LAYERS for layers in own["skipped_layers"])
        assert own["distinct_routes"] == (batch_size if own["rows"] == "mixed" else 1)


@pytest.mark.parametrize("batch_size", GRID)
def test_bytes_of_keys_and_values_are_exactly_the_layers_kept(result, batch_size):
    base = systems_at(result, batch_size, "base")[0]
    head_size, heads, length = tiny.HIDDEN // 4, 2, LENGTH + 2
    assert base["kv_bytes"] == 2 * batch_size * NUM_LAYERS * heads * length * head_size * 4
    for own in systems_at(result, batch_size, "forced", "pinned", "removed", "all kept", "learned"):
        assert own["kv_is_exact"]
        if own["kind"] != "learned":
            assert own["kv_share"] == 1 - own["skip_ratio"]


def test_own_routes_are_the_routers(subject, result):
    routes = []
    with torch.inference_mode():
        routes += [subject.roe(**prompt).routes for prompt in subject.prompts(3)]
    skipped = 1 - torch.cat(routes).double().mean().item()
    assert 0 < skipped < 1
    assert systems_at(result, 3, "learned")[0]["skip_ratio"] == pytest.approx(skipped)


def test_every_round_runs_all_systems_once_on_one_prompt(subject, monkeypatch):
    seen = []

    def time_once(model, inputs, num_tokens):
        seen.append((id(model), inputs["input_ids"].shape[1], str(sorted(inputs))))
        return {"prefill": 1.0, "decode": 1.0, "routes": torch.ones(1, NUM_LAYERS, dtype=torch.bool)}

    monkeypatch.setattr(measure, "time_once", time_once)
    measure.measure(subject, {1: (0.25,)}, rounds={1: 4}, num_tokens=TOKENS)
    rounds = [seen[start : start + 7] for start in range(0, len(seen), 7)]
    assert len(rounds) == 4
    assert [{length for _, length, _ in one} for one in rounds] == [{LENGTH}, {LENGTH + 2}] * 2
    orders = [[(model, names) for model, _, names in one] for one in rounds]
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert any(order != orders[0] for order in orders)


def test_times_are_compared_round_by_round():
    base = [{"decode": seconds} for seconds in (4.0, 10.0, 8.0, 30.0)]
    own = [{"decode": seconds} for seconds in (2.0, 10.0, 4.0, 10.0)]
    found = measure.summary(own, base, "decode", num_prompts=2)
    assert found["ratio"] == 2.0  # of 2, 1, 2, 3
    assert found["quartiles"] == [1.75, 2.25]
    assert found["seconds"] == (3.0 + 10.0) / 2  # medians of the two prompts
    assert found["minimum"] == (2.0 + 10.0) / 2
    assert found["ratio_of_minima"] == (4.0 + 10.0) / (2.0 + 10.0)
    assert found["runs"] == [2.0, 10.0, 4.0, 10.0]


def test_ceiling_charges_the_adapter_and_what_is_no_decoder():
    found = measure.against_ceiling(1.2, skip_ratio=0.5, cost=0.2, decoder_share=0.75)
    assert found["ceiling"] == pytest.approx(1 / (1 - 0.75 * 0.5 * 0.8))
    assert found["ratio_over_ceiling"] == pytest.approx(1.2 * 0.7)
    assert found["share_of_gain"] == pytest.approx(0.2 / (1 / 0.7 - 1))


def test_removed_layers_pay_no_adapter(result):
    removed, forced = (systems_at(result, 1, kind)[0]["prefill"]["ceiling"] for kind in ("removed", "forced"))
    share, cost = result["batches"]["1"]["decoder_share"]["prefill"], result["adapter_cost"]
    assert removed == pytest.approx(timing.ceiling(0.25, 0.0, share))
    assert forced == pytest.approx(timing.ceiling(0.25, cost, share)) and forced < removed


def test_compiling_needs_a_model_that_can(subject):
    with pytest.raises(ValueError, match=r"--compile needs a model with compile_layers\(\), this LlavaFor"):
        measure.compile_layers(subject.base, [])


def test_compiled_stock_layers_share_graphs_and_change_nothing(monkeypatch):
    compile_module = torch.nn.Module.compile
    # Graphs as for any backend, without waiting for a compiler.
    monkeypatch.setattr(torch.nn.Module, "compile", lambda part, **more: compile_module(part, **more, backend="eager"))
    made = make_subject()
    models = [made.base, systems.without_layers(made.base, [2, 5])]
    before = [logits_of(model, made.prompts(2)[0]) for model in models]
    torch._dynamo.reset()
    counters.clear()
    measure.compile_layers(made.roe, models)
    for model, wanted in zip(models, before, strict=True):
        assert torch.equal(logits_of(model, made.prompts(2)[0]), wanted)
    assert 0 < counters["stats"]["unique_graphs"] < 2 * NUM_LAYERS and not counters["graph_break"]


# ---------------------------------------- shapes


def test_names_of_the_command_are_the_shapes():
    assert tuple(shapes.SHAPES) == bench.NAMES


@pytest.mark.parametrize(
    ("config", "layers", "image_tokens", "parameters"),
    [
        (shapes.cpu_medium_config(), 12, 256, None),
        (shapes.llava_15_config(4096, 11008, 32, 32), 32, 576, 7_063_427_072),
        (shapes.llava_15_config(5120, 13824, 40, 40), 40, 576, 13_351_494_656),
    ],
)
def test_shapes_have_the_published_sizes(config, layers, image_tokens, parameters):
    with torch.device("meta"):
        model = RoeLlavaForConditionalGeneration(config)
    assert len(tiny.layers_of(model)) == layers and config.image_seq_length == image_tokens
    assert timing.adapter_cost(model) == pytest.approx(0.041, abs=0.01)
    if parameters:
        base = sum(p.numel() for name, p in model.named_parameters() if not is_roe_parameter(name))
        assert base == parameters


def test_random_models_decide_in_float32():
    config = tiny.tiny_config()
    made = shapes.random_subject(config, (LENGTH,), CPU, torch.bfloat16)
    layer = tiny.layers_of(made.roe)[0]
    assert layer.router.weight.dtype == made.roe.model.language_model.routing_tokens.weight.dtype == torch.float32
    assert layer.adapter.up_proj.weight.dtype == layer.mlp.up_proj.weight.dtype == torch.bfloat16
    assert made.roe(**made.prompts(2)[0], route_bias=inf).logits.dtype == torch.bfloat16


def test_prompts_of_the_shipped_model_are_not_padded():
    made = shapes.build_subject("tiny")
    for prompt in made.prompts(4):
        assert prompt["attention_mask"].all() and prompt["input_ids"].shape[0] == 4
    assert made.trained


def test_prompt_without_room_for_the_image_is_refused():
    with pytest.raises(ValueError, match="a prompt of 9 tokens has no room"):
        shapes.random_prompt(tiny.tiny_config(), 9, 1, CPU, torch.float32)


def test_gpu_shapes_are_refused_on_a_processor(tmp_path, capsys):
    asked = ["bench", "--shape", "llava-1.5-7b", "--device", "cpu", "--out", str(tmp_path / "x.json")]
    assert main(asked) == 2
    assert "llava-1.5-7b is made for a GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# ---------------------------------------- the report


def test_targets_are_computed_from_the_result(result):
    result = copy.deepcopy(result)
    result["batches"]["8"] = copy.deepcopy(result["batches"]["3"])
    numbers = {("all kept", ""): (0.99, 0.99), ("forced", "shared"): (0.985, 0.985), ("forced", "mixed"): (0.94, 1.0)}
    for batch in result["batches"].values():
        for own in batch["systems"]:
            prefill, decode = numbers.get((own["kind"], own["rows"]), (1.0, 1.0))
            own["prefill"] |= {"ratio": prefill, "ratio_over_ceiling": prefill}
            own["decode"] |= {"ratio": decode, "ratio_over_ceiling": decode}
    found = report.targets(result)
    assert [one["met"] for one in found] == [True, False, True, False, False, True]
    assert [one["measured"] for one in found[:5]] == ["1.01 %", "1.01 %", "98.50 %", "98.50 %", "94.00 %"]
    result["batches"]["8"]["systems"][-1]["kv_is_exact"] = False
    assert report.targets(result)[-1]["met"] is False


def test_what_was_not_measured_is_no_target(result):
    figures = [one["figure"] for one in report.targets(result)]
    assert len(figures) == 5 and not any("batch 8" in figure for figure in figures)


def test_report_fills_the_readme_from_the_results(result, tmp_path, capsys):
    report.save(result, tmp_path / "results" / "cpu-medium.json")
    (tmp_path / "results" / "other.json").write_text('{"seconds": 1}')
    readme = tmp_path / "README.md"
    readme.write_text(f"before {report.BEGIN} old {report.END} after")
    report.report_all(tmp_path / "results", readme)
    text = readme.read_text()
    assert text.startswith("before ") and text.endswith(" after") and " old " not in text
    assert "### cpu-medium" in text and "(results/cpu-medium.png)" in text and "| all kept, batch 1" in text
    forced = systems_at(result, 3, "forced")[1]
    assert f"| 3 | forced | mixed | 25.0 % | {report.milliseconds(forced['prefill']['seconds'])} |" in text
    assert (tmp_path / "results" / "cpu-medium.png").stat().st_size > 10_000
    report.report_all(tmp_path / "results", readme)
    assert readme.read_text() == text


def test_readme_without_markers_is_left_alone():
    with pytest.raises(ValueError, match="the README must hold"):
        report.readme_with("text", f"{report.END} {report.BEGIN}")


def test_readme_equals_what_the_results_say():
    readme = bench.ROOT / "benchmarks" / "README.md"
    results = report.results_in(bench.RESULTS)
    assert all(path.with_suffix(".png").is_file() for path in results)
    text = report.text_of_all(bench.RESULTS, readme.parent)
    assert report.readme_with(text, readme.read_text()) == readme.read_text(), "run: roe-llava bench --report"


def test_the_readme_quotes_what_was_measured():
    result = json.loads((bench.RESULTS / "cpu-medium.json").read_text())
    quarter = report.find(result, 1, systems.FORCED, systems.SHARED, 0.25)
    quoted = f"prefill {quarter['prefill']['ratio']:.2f}x and decoding {quarter['decode']['ratio']:.2f}x as fast"
    assert quoted in (bench.ROOT / "README.md").read_text()


def test_a_result_is_written_whole_or_not_at_all(result, tmp_path):
    out = tmp_path / "new" / "x.json"
    report.save(result, out)
    before = out.read_text()
    with pytest.raises(ValueError, match="exists: give another --out"):
        report.save(result, out)
    with pytest.raises(ValueError, match="Out of range float"):
        report.save(result | {"seconds": float("nan")}, out, overwrite=True)
    assert [path.name for path in out.parent.iterdir()] == ["x.json"] and out.read_text() == before


# ---------------------------------------- the command


def test_command_measures_prints_and_draws(tmp_path, capsys):
    out = tmp_path / "tiny.json"
    asked = ["bench", "--quick", "--rounds", "1", "--tokens", "1", "--out", str(out)]
    assert main(asked) == 0
    printed = capsys.readouterr().out
    assert "learned" in printed and f"wrote {out}" in printed
    found = json.loads(out.read_text())
    assert found["shape"] == "tiny" and found["trained"] and set(found["batches"]) == {"1", "2"}
    assert found["setup"]["dtype"] == "float32" and found["setup"]["threads"] == 1 and found["setup"]["torch"]
    assert (tmp_path / "tiny.png").is_file()
    before = out.read_text()
    assert main(asked) == 2 and "--overwrite" in capsys.readouterr().err
    assert out.read_text() == before


def test_interruption_leaves_nothing(tmp_path, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "measure_batch", interrupt)
    assert main(["bench", "--quick", "--out", str(tmp_path / "x.json")]) == 130
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--batch", "1", "0"], "--batch must be at least 1"),
        (["--skip", "25"], "a quarter of the layers is 0.25"),
        (["--skip", "0.99"], "cannot skip a share of 0.99"),
        (["--device", "cuda"], "torch finds no accelerator"),
    ],
)
def test_wrong_numbers_are_refused(given, message, tmp_path, capsys):
    if "cuda" in given and torch.accelerator.is_available():
        pytest.skip("there is an accelerator")
    assert main(["bench", *given, "--out", str(tmp_path / "x.json")]) == 2
    assert message in capsys.readouterr().err


def test_options_change_the_grid():
    shape = shapes.SHAPES["cpu-medium"]
    args = shared_options("--batch", "1", "8")
    assert bench.settings_of(args, shape)[0] == {1: shapes.ALL_SHARES, 8: (0.25,)}
    args = shared_options("--skip", "0.1", "0.5")
    assert bench.settings_of(args, shape)[0] == dict.fromkeys(shapes.BATCH_SIZES, (0.1, 0.5))
    args = shared_options("--quick", "--rounds", "5")
    assert bench.settings_of(args, shape) == (bench.QUICK_GRID, {1: 5, 2: 5}, bench.QUICK_TOKENS)
    args = shared_options("--batch", "1", "3")
    assert bench.settings_of(args, shape)[1] == {1: shape.rounds[1], 3: shape.rounds[8]}


def shared_options(*given):
    """The command's options as the command line reads them."""
    from argparse import ArgumentParser

    parser = ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(given)
