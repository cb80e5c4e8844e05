"""Models with experts on the Hub: `roe-llava push` and `card`, `push_to_hub`, opened where the package is not there."""

import json
import shutil
import textwrap

import pytest
import torch
from convert_helpers import change_json, change_tensors, make_base, tiny_inputs, tiny_processor
from golden_moe_helpers import FOLDER
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import save_file
from test_push import author, hub, reader  # noqa: F401

from roe_llava import MoeLlavaForConditionalGeneration
from roe_llava.cli import main
from roe_llava.convert.import_moe_llava import import_moe_llava
from roe_llava.convert.kinds import MOE
from roe_llava.convert.upcycle import upcycle
from roe_llava.hub_card.card import make_card
from roe_llava.hub_card.folder import open_folder
from roe_llava.hub_card.push import plan_push

COMMIT = "0123456789" * 4
STAGES = [
    {"stage": "evomoe-evolution", "steps": 4, "examples": 1234, "data": "chats.json", "measured": {"eval_loss": 1.5}},
    {"stage": "evomoe-routers", "steps": 7, "examples": 20},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folders of an upcycled and of a saved model, inputs of a batch and what each of them answers."""
    folder = tmp_path_factory.mktemp("moe_push")
    upcycle(make_base(folder / "base"), folder / "upcycled", router="token_aware")
    inputs = tiny_inputs(tiny_processor())
    tensors = {name: tensor.contiguous() for name, tensor in inputs.items()}
    model = MoeLlavaForConditionalGeneration.from_pretrained(folder / "upcycled").eval()
    with torch.no_grad():
        tensors["logits.upcycled"] = model(**inputs).logits
        for name, parameter in model.named_parameters():
            if ".mlp." in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        tensors["logits.saved"] = model(**inputs).logits
    model.save_pretrained(folder / "saved")
    tiny_processor().save_pretrained(folder / "saved")
    save_file(tensors, folder / "expected.safetensors")
    Image.new("RGB", (28, 28), "red").save(folder / "picture.png")
    return folder


@pytest.fixture
def folder(tmp_path, place):
    """A copy to damage."""
    return shutil.copytree(place / "saved", tmp_path / "model")


ANSWERS = """
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor, pipeline

    expected = load_file("expected.safetensors")
    logits = {name: expected.pop(f"logits.{name}") for name in ("saved", "upcycled")}
    for line in sys.argv[1:]:
        repo_id, name, *revision = line.split()
        options = {"trust_remote_code": True} | ({"revision": revision[0]} if revision else {})
        for auto in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
            model = auto.from_pretrained(repo_id, **options).eval()
            assert type(model).__name__ == "MoeLlavaForConditionalGeneration"
            with torch.no_grad():
                assert torch.equal(model(**expected).logits, logits[name])
        assert type(AutoProcessor.from_pretrained(repo_id, **options)).__name__ == "LlavaProcessor"
        ask = pipeline("image-text-to-text", model=repo_id, **options)
        content = [{"type": "image", "path": "picture.png"}, {"type": "text", "text": "what is this"}]
        assert ask(text=[{"role": "user", "content": content}], max_new_tokens=2)[0]["generated_text"]
    assert not [name for name in sys.modules if name.partition(".")[0] == "roe_llava"]
    print("answered")
"""


def test_pushed_models_open_by_id_and_pinned_commit_without_the_package(author, reader, hub):  # noqa: F811
    first = author.push("upcycled me/experts")
    second = author.push("saved me/experts")
    assert hub.history[-1] == ("me/experts", "main", "Upload MoE-LLaVA with roe-llava push")
    files = {path.name for path in hub.repos["me/experts"][second].iterdir()}
    assert MOE.code_files().keys() <= files and not any(name.startswith("model-") for name in files)
    card = (hub.repos["me/experts"][second] / "README.md").read_text()
    snippet = card.partition("```python\n")[2].partition("```")[0]
    script = textwrap.dedent(ANSWERS).replace('print("answered")', f'{snippet}\nprint("answered")')
    reader(script, "me/experts saved", f"me/experts upcycled {first}")


PUSH_TO_HUB = """
    from pathlib import Path
    from transformers import LlavaProcessor
    from roe_llava import MoeLlavaForConditionalGeneration as Moe

    model, processor = Moe.from_pretrained("saved"), LlavaProcessor.from_pretrained("saved")
    model.push_to_hub("me/direct")
    processor.push_to_hub("me/direct")

    def refused(message, push):
        try:
            push()
        except ValueError as error:
            assert message in str(error), error
        else:
            raise AssertionError(f"pushed, expected: {message}")

    refused("me/direct holds model.safetensors", lambda: model.push_to_hub("me/direct", max_shard_size="20KB"))
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.0.mlp.router.score" not in name}
    save = lambda: model.save_pretrained("part", state_dict=state, push_to_hub=True, repo_id="me/part")
    refused("1 of the model's tensors would not be in me/part", save)
    others = state | {"spare": state["lm_head.weight"].clone()}  # as many as there should be
    save = lambda: model.save_pretrained("other", state_dict=others, push_to_hub=True, repo_id="me/part")
    refused("layers.0.mlp.router.score.weight would not be in me/part", save)
    model.config.moe_provenance = {"base": {"id": str(Path.home() / "llava"), "revision": None}}
    refused("config.json holds local paths", lambda: model.push_to_hub("me/path"))
    model.config.moe_provenance = {"note": "hf_" + "aB3" * 11}
    refused("looks like an access token", lambda: model.push_to_hub("me/path"))
"""


def test_push_to_hub_gives_a_repository_that_opens_and_refuses_what_would_not(author, reader, hub):  # noqa: F811
    done = author.ask(script=textwrap.dedent(PUSH_TO_HUB))
    assert done.code == 0, done.wrong
    assert "me/path" not in hub.repos
    assert len(hub.repos["me/part"]) == 1  # made, and empty
    reader(ANSWERS, "me/direct saved")


# ------------------------------------------------------------------------------------------------------------- refusals


def lose_router(folder):
    name = "language_model.model.layers.0.mlp.router.score.weight"
    change_tensors(folder / "model.safetensors", lambda tensors: tensors.pop(name))


def spoil_router(folder):
    name = "language_model.model.layers.0.mlp.router.score.weight"
    change_tensors(folder / "model.safetensors", lambda tensors: tensors[name].fill_(torch.nan))


REFUSED = {
    "a lost router": (lose_router, "lacks .*layers.0.mlp.router.score.weight"),
    "a router with NaN": (spoil_router, "router.score.weight in .* holds .* NaN or Inf"),
    "a lost code file": (lambda folder: (folder / "choice_moe.py").unlink(), r"lacks choice_moe\.py"),
    "changed code": (lambda folder: (folder / "routers_moe.py").write_text("pass"), r"routers_moe\.py in .* is other"),
    "code of RoE": (lambda folder: (folder / "cache_roe.py").write_text(""), r"cache_roe\.py, which nobody needs"),
    "another auto_map": (
        lambda folder: change_json(folder / "config.json", auto_map={"AutoModel": "x.Y"}),
        "auto_map .* expected .*modeling_moe_llava",
    ),
    "a processor with code": (
        lambda folder: change_json(folder / "processor_config.json", auto_map={"AutoProcessor": "p.P"}),
        "the processor runs code",
    ),
    "no processor": (lambda folder: (folder / "processor_config.json").unlink(), "has no processor_config.json"),
    "another image token": (
        lambda folder: change_json(folder / "config.json", image_token_index=3),
        "do processor and weights belong together",
    ),
    "a local path": (
        lambda folder: change_json(folder / "config.json", moe_provenance={"note": "/home/me/base"}),
        "holds local paths",
    ),
    "provenance that is none": (
        lambda folder: change_json(folder / "config.json", moe_provenance={"training": "yes"}),
        "moe_provenance.training 'yes', expected a list",
    ),
    "quantised weights": (
        lambda folder: change_json(folder / "config.json", quantization_config={"quant_method": "bitsandbytes"}),
        "holds quantised weights",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_not_open_or_give_something_away_is_refused(folder, what):
    damage, said = REFUSED[what]
    damage(folder)
    with pytest.raises(ValueError, match=said):
        plan_push(folder, "me/refused")


def test_installed_code_replaces_the_folders_when_asked(folder):
    (folder / "routers_moe.py").write_text("pass")
    plan = plan_push(folder, "me/model", update_code=True)
    assert {name: plan.files[name] for name in MOE.code_files()} == MOE.code_files()


def test_a_dense_model_is_still_refused(place, capsys):
    assert main(["card", str(place / "base")]) == 2
    assert "'llava', expected 'roe_llava' or" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------- card


def test_a_card_says_what_the_folder_knows_and_what_nobody_measured(place):
    text = make_card(open_folder(place / "upcycled")).text
    config = json.loads((place / "upcycled" / "config.json").read_text())
    model = MoeLlavaForConditionalGeneration.from_pretrained(place / "upcycled")
    experts = sum(one.numel() for name, one in model.named_parameters() if ".experts." in name)
    total = model.num_parameters()
    assert f"| parameters | {total:,}, of which a token goes through {total - experts // 2:,} |" in text
    assert f"| experts | {config['num_experts']} per layer, 2 per token; weights sum to 1 |" in text
    assert "with experts: 0, 2" in text and "token-aware" in text and "each expert began as its layer's MLP" in text
    assert "it answers as the dense model does" in text
    for said in ("Accuracy: not measured", "Speed: not measured", "go through: not measured", "| licence | not known"):
        assert said in text
    assert "skipped" not in text and "### Routes" not in text and "### Experts" in text
    assert "mixture-of-experts" in ModelCard(text).data.tags
    assert all(f"| `{name}` |" in text for name in MOE.code_files())


def test_a_card_names_base_stages_and_data(folder):
    base = {"id": "someone/base", "revision": COMMIT}
    change_json(folder / "config.json", moe_provenance={"base": base, "upcycled": True, "training": STAGES})
    text = make_card(open_folder(folder), licence="mit").text
    data = ModelCard(text).data
    assert (data.base_model, data.base_model_relation, data.license) == ("someone/base", "finetune", "mit")
    assert "It was trained with experts: evomoe-evolution, evomoe-routers." in text
    assert "- evomoe-evolution: 1,234 examples; `chats.json`" in text and "data not known" in text
    assert "| stage 1: eval_loss | 1.5 |" in text and "| stage 2: steps | 7 |" in text


def test_the_command_writes_the_card(folder, capsys):
    assert main(["card", str(folder), "--licence", "apache-2.0"]) == 0
    assert ModelCard((folder / "README.md").read_text()).data.license == "apache-2.0"
    assert main(["push", str(folder), "me/model", "--dry-run"]) == 0
    assert "a MoE-LLaVA checkpoint" in capsys.readouterr().out


@pytest.mark.parametrize("decoder", ["llama", "phi"])
def test_a_card_of_an_imported_checkpoint_says_so(tmp_path, decoder):
    import_moe_llava(FOLDER / decoder / "checkpoint", tmp_path / "moe")
    text = make_card(open_folder(tmp_path / "moe")).text
    model = MoeLlavaForConditionalGeneration.from_pretrained(tmp_path / "moe")
    assert "It was imported from the published layout" in text and "| base | not known; imported from `" in text
    assert f"| parameters | {model.num_parameters():,}, of which" in text and "linear, one matrix" in text
