"""Calibration: measuring the table, asking for a skip ratio, what is refused, how the table travels."""

import copy
import json
import math
import os
import shutil

import pytest
import tiny
import torch
from convert_helpers import change_json, make_base, train
from PIL import Image
from test_remote_code import run_fresh

from roe_llava import RoeLlavaConfig, RoeLlavaForConditionalGeneration, RoeLlavaProcessor, SkipCalibration
from roe_llava.adapter_roe import read_adapter
from roe_llava.benchmarks import calibration_tiny
from roe_llava.calibration_roe import router_fingerprint
from roe_llava.cli import main
from roe_llava.convert import calibrate as command
from roe_llava.convert.adapter_file import save_adapter
from roe_llava.convert.export_reference import published_config
from roe_llava.convert.extract import extract
from roe_llava.convert.graft import graft
from roe_llava.convert.source import resolve_source
from roe_llava.examples.tiny_world.demo import SHIPPED
from roe_llava.training.calibration import calibrate, decisions, input_independent
from roe_llava.training.prompts import prompts_from

RATIOS = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5)


def random_batches(seed, number=8, rows=128):
    """Batches of random text prompts of several lengths, which the tiny models route in many ways."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [5 + step % 4 for step in range(number)]
    return [{"input_ids": torch.randint(3, tiny.IMAGE, (rows, size), generator=generator)} for size in sizes]


@pytest.fixture(scope="module")
def calibrated():
    """A tiny model with random routers that keep layer 0, and its table; not to be changed."""
    model = tiny.tiny_model()
    with torch.no_grad():  # layer 0 keeps: towards what its router reads
        reads = tiny.router_inputs(model, 0, tiny.alone("text_only"))[0].float()
        tiny.layers_of(model)[0].router.weight.copy_(torch.stack([reads, -reads]) / reads.norm())
    model.config.skip_calibration = calibrate(model, random_batches(0), RATIOS).to_dict()
    return model


@pytest.fixture
def routed(calibrated):
    """A copy to change."""
    return copy.deepcopy(calibrated)


def table_of(model):
    return SkipCalibration.of_dict(model.config.skip_calibration, model.config.text_config.num_hidden_layers)


def skipped_by(model, batches, **kwargs):
    """(N,) share of layers that `generate` skips per row."""
    outputs = [model.generate(**b, max_new_tokens=1, return_dict_in_generate=True, **kwargs) for b in batches]
    return 1 - torch.cat([output.past_key_values.routes for output in outputs]).float().mean(dim=1)


# ---------------------------------------- measuring


def test_a_calibrated_ratio_is_realised_on_other_prompts(calibrated):
    """Both sets of a thousand prompts have a standard error of about 0.6 points."""
    for ratio in (*RATIOS, 0.17, 0.35, 0.44):
        assert abs(skipped_by(calibrated, random_batches(1), skip_ratio=ratio).mean() - ratio) < 0.02, ratio


def test_the_table_says_what_generate_skips_on_its_own_prompts(calibrated):
    table = table_of(calibrated)
    for ratio, realised, held_out in zip(table.skip_ratio, table.realised, table.held_out, strict=True):
        skipped = skipped_by(calibrated, random_batches(0), skip_ratio=ratio)
        is_held_out = torch.arange(len(skipped)) % 5 == 4
        assert skipped[~is_held_out].mean().item() == pytest.approx(realised, abs=1e-6)
        assert skipped[is_held_out].mean().item() == pytest.approx(held_out, abs=1e-6)


def test_the_table_reaches_its_ratios_with_falling_biases(calibrated):
    table = table_of(calibrated)
    assert table.skip_ratio == list(RATIOS) and not table.gaps
    assert all(abs(share - ratio) <= 0.005 for share, ratio in zip(table.realised, RATIOS, strict=True))
    assert table.route_bias == sorted(table.route_bias, reverse=True) and len(set(table.route_bias)) == len(RATIOS)
    assert (table.questions, table.held_out_questions) == (820, 204)


def test_layers_that_have_read_nothing_are_not_shifted(calibrated):
    assert table_of(calibrated).layer_scale == [0.0, 1.0, 1.0, 1.0]
    keep = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 0]], dtype=torch.bool)
    assert input_independent(keep) == [0, 1, 2] and input_independent(~keep) == [0]


def test_layers_without_a_router_are_not_shifted():
    model = tiny.tiny_model(tiny.tiny_config(routed_layers=[1, 3]))
    table = calibrate(model, random_batches(0), (0.2, 0.3))
    assert table.layer_scale == [0.0, 1.0, 0.0, 1.0]
    assert all(abs(share - ratio) <= 0.005 for share, ratio in zip(table.realised, (0.2, 0.3), strict=True))
    with pytest.raises(ValueError, match=r"\[0.6\] cannot be had: the routers can skip from 0 to 0.5"):
        calibrate(model, random_batches(0), [0.6])


def test_shares_that_no_bias_gives_are_gaps():
    """Solved routers: every decision has the same margin, so a bias flips all of them at once."""
    model = tiny.routed_model()
    table = calibrate(model, [tiny.batch()], (0.1, 0.5, 0.6))
    assert table.held_out is not None and table.questions == 5
    assert table.gaps and table.skip_ratio and not set(table.skip_ratio) & {0.1, 0.6}
    model.config.skip_calibration = table.to_dict()
    low, high = table.gaps[-1]
    assert {low, high} <= set(table.skip_ratio) and high - low > 0.1
    with pytest.raises(ValueError, match=rf"no bias of these routers skips a share between {low} and {high}"):
        model.generate(**tiny.alone("question"), skip_ratio=(low + high) / 2)
    for ratio, realised in zip(table.skip_ratio, table.realised, strict=True):
        assert abs(ratio - realised) <= 0.02
        skipped = skipped_by(model, [tiny.batch()], skip_ratio=ratio)
        assert skipped[[0, 1, 2, 3, 5]].mean().item() == pytest.approx(realised, abs=1e-6)


def test_an_iterator_gives_the_same_table(model):
    assert calibrate(model, [tiny.batch()], [0.5]) == calibrate(model, iter([tiny.batch()]), [0.5])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"ratios": [0.2, 0.0]}, r"shares in \(0, 1\], got \[0.0\]; 0 needs no calibration"),
        ({"ratios": []}, r"shares in \(0, 1\], got \[\]"),
        ({"ratios": [float("nan")]}, r"shares in \(0, 1\], got \[nan\]"),
        ({"batches": []}, "there are no prompts to calibrate with"),
        ({"batches": [tiny.alone("text_only")]}, "no router decides otherwise for one question than for another"),
        ({"batches": [{**tiny.batch(), "labels": tiny.batch()["input_ids"]}]}, "a batch has labels"),
        ({"layer_scale": [1.0]}, "layer_scale must be 4 factors"),
        ({"layer_scale": [0, 0, 0, 0]}, "layer_scale must be 4 factors"),
    ],
)
def test_what_cannot_be_measured_is_named(model, change, message):
    with pytest.raises(ValueError, match=message):
        calibrate(model, **{"batches": [tiny.batch()], "ratios": [0.2]} | change)


def test_training_mode_is_refused(model):
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        calibrate(model.train(), [tiny.batch()])


# ---------------------------------------- asking


def test_between_entries_the_bias_is_on_a_line(calibrated):
    table = table_of(calibrated)
    low, high = table.route_bias[2], table.route_bias[3]
    assert table.bias_for(0.2) == low and table.bias_for(0.3) == high
    assert table.bias_for(0.25) == pytest.approx((low + high) / 2)
    assert table.biases_for(0.2) == [0.0, low, low, low]


@pytest.mark.parametrize("way", [{}, {"num_beams": 3}, {"use_cache": False}, {"num_beams": 2, "use_cache": False}])
def test_a_ratio_is_its_bias_in_every_way_of_decoding(calibrated, way):
    batch = random_batches(2, 1, 6)[0]
    ask = {**batch, **way, "max_new_tokens": 4, "do_sample": False}
    bias = table_of(calibrated).biases_for(0.35)
    assert torch.equal(calibrated.generate(**ask, skip_ratio=0.35), calibrated.generate(**ask, route_bias=bias))
    assert not torch.equal(calibrated.generate(**ask, skip_ratio=0.5), calibrated.generate(**ask, skip_ratio=0.0))


def test_ratio_zero_is_the_base_with_a_table_or_without(calibrated, routed):
    batch = random_batches(3, 1)[0]
    expected = tiny.stock_of(calibrated).generate(**batch, max_new_tokens=6, do_sample=False)
    routed.config.skip_calibration = None
    for model in (calibrated, routed):
        assert torch.equal(model.generate(**batch, max_new_tokens=6, do_sample=False, skip_ratio=0.0), expected)


@pytest.mark.parametrize("ratio", [0.05, 0.51, 1.0, -0.1, math.nan])
def test_a_ratio_outside_of_the_table_names_its_range(calibrated, ratio):
    with pytest.raises(ValueError, match=rf"skip_ratio={ratio} is outside of what .*\[0.1, 0.5\] and 0.0"):
        calibrated.generate(**tiny.alone("text_only"), skip_ratio=ratio)


def test_without_a_table_the_error_says_how_to_make_one(model):
    with pytest.raises(ValueError, match="holds no calibration: make one with roe-llava calibrate CHECKPOINT DATA"):
        model.generate(**tiny.alone("text_only"), skip_ratio=0.2)


def test_changed_routers_make_a_table_stale(routed):
    ask = {**tiny.alone("text_only"), "max_new_tokens": 1, "skip_ratio": 0.2}
    routed.generate(**ask)
    router = tiny.layers_of(routed)[2].router
    optimizer = torch.optim.SGD(router.parameters(), lr=0.1)
    router.weight.grad = torch.ones_like(router.weight)
    optimizer.step()
    with pytest.raises(ValueError, match=r"made with routers of fingerprint .*Calibrate again"):
        routed.generate(**ask)
    routed.generate(**ask | {"skip_ratio": 0.0})  # needs no table


@pytest.mark.parametrize("change", [{"routing_positions": "first"}, {"routing_question": "all_text"}])
def test_changed_routing_options_make_a_table_stale(tmp_path, calibrated, change):
    calibrated.save_pretrained(tmp_path / "model")
    other = RoeLlavaForConditionalGeneration.from_pretrained(tmp_path / "model", **change)
    with pytest.raises(ValueError, match="routing_positions, routing_question or route_bias was changed"):
        other.generate(**tiny.alone("text_only"), skip_ratio=0.2)


def test_the_fingerprint_does_not_depend_on_the_dtype_of_the_base(tmp_path, calibrated):
    calibrated.save_pretrained(tmp_path / "model")
    half = RoeLlavaForConditionalGeneration.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert router_fingerprint(half) == table_of(calibrated).routers


def test_routers_that_were_rounded_are_told_from_trained_ones(calibrated):
    cast = copy.deepcopy(calibrated).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"They are in torch.bfloat16: .*from_pretrained\(dtype=\.\.\.\), not with"):
        cast.generate(**tiny.alone("text_only"), max_new_tokens=1, skip_ratio=0.3)


def test_routers_that_are_not_in_memory_have_no_fingerprint(routed):
    tiny.layers_of(routed)[1].router.to("meta")
    assert router_fingerprint(routed) is None
    with pytest.raises(ValueError, match="offloaded or sharded"):
        calibrate(routed, random_batches(0, 1))


DAMAGES = [
    ({"skip_ratio": [0.1, 0.1, 0.2, 0.3, 0.4, 0.5]}, "skip_ratio is .*expected rising shares"),
    ({"skip_ratio": [0.1, 0.2]}, "columns of .*expected as many in each"),
    ({"skip_ratio": [0.0, 0.15, 0.2, 0.3, 0.4, 0.5]}, r"skip_ratio is .*expected a list of shares in \(0, 1\]"),
    ({"route_bias": [1.0, 2.0, 0.5, 0.0, -1.0, -2.0]}, "route_bias is .*never rise"),
    ({"route_bias": [1.0, math.nan, 0.5, 0.0, -1.0, -2.0]}, "route_bias is .*finite"),
    ({"route_bias": [math.inf, 1.0, 0.5, 0.0, -1.0, -2.0]}, "route_bias is .*finite"),
    ({"route_bias": "1"}, "route_bias is '1', expected a list"),
    ({"realised": [0.1]}, "columns of"),
    ({"held_out": [2.0] * 6}, "held_out is .*expected null or"),
    ({"layer_scale": [1.0] * 3}, "layer_scale has 3 factors, the model 4 layers"),
    ({"layer_scale": [0.0] * 4}, "layer_scale is .*not all 0"),
    ({"gaps": [[0.3, 0.1]]}, "gaps is .*pairs of rising shares"),
    ({"questions": True}, "questions is True, expected a count"),
    ({"routers": "abc"}, "routers is 'abc', expected a SHA-256"),
]


@pytest.mark.parametrize("change, message", DAMAGES)
def test_a_damaged_table_is_named_when_it_is_read_and_used(tmp_path, calibrated, routed, change, message):
    calibrated.config.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["skip_calibration"] |= change
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"skip_calibration.*{message}.*roe-llava calibrate"):
        RoeLlavaConfig.from_pretrained(tmp_path)
    routed.config.skip_calibration |= change
    with pytest.raises(ValueError, match=message):
        routed.generate(**tiny.alone("text_only"), skip_ratio=0.2)


def test_a_table_that_lacks_an_entry_names_it(routed):
    del routed.config.skip_calibration["routers"]
    with pytest.raises(ValueError, match="skip_calibration lacks routers"):
        routed.generate(**tiny.alone("text_only"), skip_ratio=0.2)


# ---------------------------------------- travelling


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """(base, adapter with a table, table) on the disk."""
    folder = tmp_path_factory.mktemp("parts")
    base = make_base(folder / "base")
    model = train(base)
    table = some_table(model)
    model.config.skip_calibration = table
    adapter = save_adapter(model, model.config, folder / "adapter", base=base)
    return base, adapter, table


def some_table(model):
    """A table for a model's routers with a bias that can be told from others."""
    return {
        "skip_ratio": [0.1, 0.4],
        "route_bias": [1.5, -2.5],
        "realised": [0.1, 0.4],
        "held_out": None,
        "layer_scale": [0.0, 1.0, 1.0],
        "gaps": [],
        "questions": 4,
        "held_out_questions": 0,
        "routers": router_fingerprint(model),
    }


def answers(model):
    return model.generate(torch.tensor([[5, 7, 8]]), skip_ratio=0.4, max_new_tokens=1)


def test_graft_extract_and_saving_carry_the_table(tmp_path, parts):
    base, adapter, table = parts
    graft(base, adapter, tmp_path / "grafted")
    model = RoeLlavaForConditionalGeneration.from_pretrained(tmp_path / "grafted")
    assert model.config.skip_calibration == table
    answers(model)
    model.save_pretrained(tmp_path / "saved")
    again = RoeLlavaForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert again.config.skip_calibration == table
    answers(again)
    extract(tmp_path / "saved", tmp_path / "out")
    assert read_adapter(tmp_path / "out").info.skip_calibration == table
    extract(tmp_path / "saved", tmp_path / "full", full=True)
    assert "skip_calibration" not in json.loads((tmp_path / "full" / "base" / "config.json").read_text())
    assert read_adapter(tmp_path / "full" / "adapter").info.skip_calibration == table


def test_grafted_code_alone_uses_the_table(tmp_path, parts):
    base, adapter, _ = parts
    graft(base, adapter, tmp_path / "grafted")
    script = """
        import torch
        from transformers import AutoModel

        model = AutoModel.from_pretrained("grafted", trust_remote_code=True)
        prompt = torch.tensor([[5, 7, 8]])
        ask = {"max_new_tokens": 1, "return_dict_in_generate": True}
        ours = model.generate(prompt, skip_ratio=0.4, **ask).past_key_values.routes
        assert torch.equal(ours, model.generate(prompt, route_bias=[0.0, -2.5, -2.5], **ask).past_key_values.routes)
        model.save_pretrained("again")
        again = AutoModel.from_pretrained("again", trust_remote_code=True)
        assert again.config.skip_calibration == model.config.skip_calibration
        again.generate(prompt, skip_ratio=0.2, **ask)
        print("used")
    """
    done = run_fresh(tmp_path, script)
    assert done.stdout.endswith("used\n"), done.stderr


def test_from_base_takes_the_table_and_load_routing_replaces_or_clears_it(tmp_path, parts):
    base, adapter, table = parts
    model = RoeLlavaForConditionalGeneration.from_base(base, adapter)
    assert model.config.skip_calibration == table
    answers(model)
    other = train(base, seed=5)
    plain = save_adapter(other, other.config, tmp_path / "plain", base=base)
    model.load_routing(plain)
    assert model.config.skip_calibration is None
    with pytest.raises(ValueError, match="holds no calibration"):
        answers(model)
    other.config.skip_calibration = some_table(other) | {"route_bias": [0.5, 0.25]}
    model.load_routing(save_adapter(other, other.config, tmp_path / "other", base=base))
    assert model.config.skip_calibration["route_bias"] == [0.5, 0.25]
    answers(model)


def test_another_base_loses_the_table_and_says_so(tmp_path, parts):
    base, adapter, table = parts
    other = make_base(tmp_path / "other", seed=5)
    summary = graft(other, adapter, tmp_path / "grafted", check_base=False)
    assert "measured on another base" in summary.dropped["skip_calibration"]
    assert json.loads((tmp_path / "grafted" / "config.json").read_text())["skip_calibration"] is None
    summary = graft(base, adapter, tmp_path / "same", check_base=False)  # unchecked, and still known to be the same
    assert "skip_calibration" not in summary.dropped
    assert json.loads((tmp_path / "same" / "config.json").read_text())["skip_calibration"] == table


def test_an_export_says_that_it_leaves_the_table_out(calibrated):
    config = calibrated.config.to_dict()
    assert "left out" in published_config(config, None, False, "beside", 0)[1]["table"]
    assert "table" not in published_config(config | {"skip_calibration": None}, None, False, "beside", 0)[1]


def test_a_damaged_table_in_an_adapter_is_named_with_the_file(tmp_path, parts):
    adapter = shutil.copytree(parts[1], tmp_path / "adapter")
    change_json(adapter / "roe_adapter.json", skip_calibration=parts[2] | {"layer_scale": [1.0]})
    with pytest.raises(ValueError, match=r"roe_adapter.json has an entry that cannot be: skip_calibration.layer_scale"):
        read_adapter(adapter)
    change_json(adapter / "roe_adapter.json", skip_calibration=[1])
    with pytest.raises(ValueError, match=r"roe_adapter.json has skip_calibration \[1\], expected null or an object"):
        read_adapter(adapter)


# ---------------------------------------- the command


@pytest.fixture
def chats(tmp_path):
    """A JSON lines file of 24 questions about pictures, with their answers."""
    (tmp_path / "images").mkdir()
    rows, words = [], ["what", "is", "this", "a", "red", "big"]
    for number in range(24):
        color = (number * 10, 255 - number * 10, (number * 37) % 256)
        Image.new("RGB", (28, 28), color).save(tmp_path / "images" / f"{number}.png")
        text = " ".join(words[(number + place) % 6] for place in range(1 + number % 5))
        asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
        answer = {"role": "assistant", "content": "red"}
        rows.append({"messages": [asked, answer], "images": [f"{number}.png"]})
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return tmp_path / "chats.jsonl"


@pytest.fixture
def grafted(tmp_path, parts):
    """A checkpoint without a table whose routers decide by the question."""
    base, _, _ = parts
    model = train(base)
    graft(base, save_adapter(model, model.config, tmp_path / "bare", base=base), tmp_path / "grafted")
    return tmp_path / "grafted"


def run_calibrate(checkpoint, chats, *options):
    folder = ["--images", str(chats.parent / "images")]
    return main(
        ["calibrate", str(checkpoint), str(chats), *folder, "--ratios", "0.3", "0.4", "--device", "cpu", *options]
    )


def test_in_place_changes_one_entry_of_one_file(grafted, chats, capsys):
    before = {path.name: path.read_bytes() for path in grafted.iterdir()}
    assert run_calibrate(grafted, chats, "--in-place") == 0, capsys.readouterr().err
    after = {path.name: path.read_bytes() for path in grafted.iterdir()}
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == ["config.json"]
    old, new = (json.loads(content["config.json"]) for content in (before, after))
    table = new.pop("skip_calibration")
    assert old.pop("skip_calibration") is None and list(old) == list(new) and old == new
    printed = capsys.readouterr().out
    assert f"{table['questions']} questions" in printed and "wrote" in printed
    model = RoeLlavaForConditionalGeneration.from_pretrained(grafted)
    model.generate(torch.tensor([[5, 7, 8]]), skip_ratio=table["skip_ratio"][0], max_new_tokens=1)


def as_llava(row):
    asked, answer = row["messages"]
    question = f"<image>\n{asked['content'][1]['text']}"
    said = [{"from": "human", "value": question}, {"from": "gpt", "value": answer["content"]}]
    return {"image": row["images"][0], "conversations": said}


def test_llavas_conversations_give_the_table_of_the_same_chats(tmp_path, grafted, chats, capsys):
    rows = [json.loads(line) for line in chats.read_text().splitlines()]
    llava = tmp_path / "llava.json"
    llava.write_text(json.dumps([as_llava(row) for row in rows]))
    assert run_calibrate(grafted, chats, "--out", str(tmp_path / "one")) == 0, capsys.readouterr().err
    assert run_calibrate(grafted, llava, "--out", str(tmp_path / "two")) == 0, capsys.readouterr().err
    one, two = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "two"))
    assert one["skip_calibration"] == two["skip_calibration"]
    rows[3]["images"] = ["gone.png"]
    llava.write_text(json.dumps([as_llava(row) for row in rows]))
    assert run_calibrate(grafted, llava, "--out", str(tmp_path / "three")) == 2
    assert "row 3 of" in (error := capsys.readouterr().err) and "gone.png" in error


def test_a_table_is_replaced_only_when_asked(grafted, chats, capsys):
    change_json(grafted / "config.json", skip_calibration={"broken": True})  # that it is damaged is no hindrance
    assert run_calibrate(grafted, chats, "--in-place") == 2
    assert "has a table already (skip_calibration): replace it with --overwrite" in capsys.readouterr().err
    assert run_calibrate(grafted, chats, "--in-place", "--overwrite") == 0, capsys.readouterr().err
    RoeLlavaConfig.from_pretrained(grafted)


def test_out_is_a_copy_with_the_table(tmp_path, grafted, chats, capsys):
    (grafted / "calibration_roe.py").unlink()  # as if written by an older version, whose code knows no table
    before = {path.name: path.read_bytes() for path in grafted.iterdir()}
    out = tmp_path / "out"
    assert run_calibrate(grafted, chats, "--out", str(out)) == 0, capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in grafted.iterdir()} == before
    found = {path.name: path.read_bytes() for path in out.iterdir()}
    assert found.keys() == before.keys() | {"calibration_roe.py"}
    assert [name for name in before if before[name] != found[name]] == ["config.json"]
    RoeLlavaForConditionalGeneration.from_pretrained(out)
    assert run_calibrate(grafted, chats, "--out", str(out)) == 2 and "not empty" in capsys.readouterr().err
    assert run_calibrate(grafted, chats, "--in-place") == 0
    assert "carries code of an older version" in capsys.readouterr().out


def test_an_adapter_is_calibrated_on_its_base(tmp_path, parts, grafted, chats, capsys):
    bare = tmp_path / "bare"
    assert run_calibrate(bare, chats, "--in-place") == 2 and "give it with --base" in capsys.readouterr().err
    assert run_calibrate(bare, chats, "--in-place", "--base", str(parts[0])) == 0, capsys.readouterr().err
    assert run_calibrate(grafted, chats, "--in-place") == 0
    assert run_calibrate(grafted, chats, "--in-place", "--overwrite", "--base", str(parts[0])) == 2
    ours = json.loads((bare / "roe_adapter.json").read_text())["skip_calibration"]
    assert ours == json.loads((grafted / "config.json").read_text())["skip_calibration"]


def test_what_is_no_roe_checkpoint_is_refused(parts, chats, capsys):
    assert run_calibrate(parts[0], chats, "--in-place") == 2
    assert "model_type 'llava', expected 'roe_llava'" in capsys.readouterr().err


def test_a_failing_write_leaves_the_old_file(grafted, parts, monkeypatch):
    before = {path.name: path.read_bytes() for path in grafted.iterdir()}
    model = RoeLlavaForConditionalGeneration.from_pretrained(grafted)
    table = SkipCalibration.of_dict(some_table(model), 3)

    def fail(*args):
        raise OSError("no room")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no room"):
        command.store_table(resolve_source(grafted), table)
    assert {path.name: path.read_bytes() for path in grafted.iterdir()} == before


def test_a_file_of_the_hubs_cache_is_not_written(grafted, tmp_path, chats, capsys):
    (grafted / "config.json").rename(tmp_path / "blob")
    (grafted / "config.json").symlink_to(tmp_path / "blob")
    assert run_calibrate(grafted, chats, "--in-place") == 2
    assert "belongs to the Hub's cache" in capsys.readouterr().err


# ---------------------------------------- prompts


def test_prompts_leave_the_last_answer_out(word_processor):
    asked, answer = tiny.said("user", "what colour is the circle ?", images=1), tiny.said("assistant", "red")
    more = tiny.said("user", "how many squares ?")
    rows = [
        {"messages": [asked, answer], "images": [Image.fromarray(tiny.picture(0))]},
        {"messages": [asked, answer, more], "images": [Image.fromarray(tiny.picture(1))]},
    ]
    batches = prompts_from(rows, word_processor, batch_size=1)
    texts = [word_processor.batch_decode(batch["input_ids"])[0] for batch in batches]
    assert "red" not in texts[0] and "red" in texts[1] and all(text.endswith("ASSISTANT :") for text in texts)
    assert "routing_segments" in batches[0] and batches[1]["routing_segments"].max() == 2
    assert prompts_from(rows, word_processor, batch_size=2)[0]["attention_mask"][:, -1].all()


@pytest.mark.parametrize(
    "row, message",
    [
        ({"messages": []}, "row 0: it has no question"),
        ({"messages": [tiny.said("assistant", "red")]}, "row 0: it has no question"),
        ({"messages": [tiny.said("user", "what", images=1)]}, "row 0: it has 0 images for 1 image parts"),
        ({"messages": [tiny.said("user", "what")], "images": ["a.png"]}, "row 0: it has 1 images for 0 image parts"),
        ({"messages": [tiny.said("user", "what", images=1)], "images": ["a.png"]}, "row 0: its image .*a.png is not"),
        ({"messages": [{"role": "user"}]}, "row 0: it is no chat"),
        ({"messages": 3}, "row 0: it is no chat"),
    ],
)
def test_a_row_that_asks_nothing_is_named(word_processor, row, message):
    with pytest.raises(ValueError, match=message):
        prompts_from([row], word_processor)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"messages": []}', '[{"text": "a"}]'])
def test_a_file_without_chats_is_named(tmp_path, content):
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(ValueError, match=r"data.json (is not readable|holds|has text and no list of messages)"):
        command.read_rows(tmp_path / "data.json")


# ---------------------------------------- the shipped model


def test_the_shipped_table_holds_on_held_out_questions():
    model = RoeLlavaForConditionalGeneration.from_base(SHIPPED / "base", SHIPPED / "roe", dtype="auto").float().eval()
    processor = RoeLlavaProcessor.from_pretrained(SHIPPED / "base")
    batches = calibration_tiny.batches_of(processor, calibration_tiny.questions("test", 25))
    table = table_of(model)
    for ratio in (0.1, 0.2, 0.3, 0.4):
        kept = decisions(model, batches, table.biases_for(ratio))[0]
        assert abs(1 - kept.double().mean() - ratio) < 0.02
    few = {name: tensor[:4] for name, tensor in batches[0].items()}
    output = model.generate(**few, skip_ratio=0.2, max_new_tokens=1, return_dict_in_generate=True)
    assert not output.past_key_values.routes.all()


def test_the_results_say_that_the_shipped_table_is_within_two_points():
    result = json.loads(calibration_tiny.RESULT.read_text())["ways"]["one bias"]
    assert result["table"] == read_adapter(SHIPPED / "roe").info.skip_calibration
    for row in [*result["judged"], *result["between"]]:
        assert abs(row["realised"] - row["skip_ratio"]) <= 0.02
