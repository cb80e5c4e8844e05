"""Folders with experts opened by `trust_remote_code=True` in a fresh process that cannot import the package."""

import json

import pytest
import torch
from convert_helpers import make_base, tiny_inputs, tiny_processor
from safetensors.torch import save_file
from test_remote_code import load_weights, run_fresh

from roe_llava import MoeLlavaForConditionalGeneration
from roe_llava.convert.upcycle import upcycle


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folders of an upcycled and of a saved model, a batch, and what the saved model answers."""
    folder = tmp_path_factory.mktemp("world")
    base = make_base(folder / "base")
    upcycle(base, folder / "upcycled", router="token_aware")
    model = MoeLlavaForConditionalGeneration.from_pretrained(folder / "upcycled").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name or ".router." in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder / "saved")
    tiny_processor().save_pretrained(folder / "saved")
    inputs = tiny_inputs(tiny_processor())
    with torch.no_grad():
        logits = model(**inputs).logits
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    tensors = {name: tensor.contiguous() for name, tensor in inputs.items()} | {"logits": logits, "tokens": tokens}
    save_file(tensors, folder / "expected.safetensors")
    return folder


OPEN_EVERYTHING = """
    import torch
    from PIL import Image
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM
    from transformers import AutoProcessor, pipeline

    trust = {"trust_remote_code": True}
    expected = load_file("expected.safetensors")
    logits, tokens = expected.pop("logits"), expected.pop("tokens")
    image = Image.new("RGB", (28, 28), "red")
    content = [{"type": "image", "image": image}, {"type": "text", "text": "what is this"}]

    for folder in sys.argv[1:]:
        config = AutoConfig.from_pretrained(folder, **trust)
        assert (type(config).__name__, config.model_type) == ("MoeLlavaConfig", "moe_llava")
        processor = AutoProcessor.from_pretrained(folder)
        assert type(processor).__name__ == "LlavaProcessor"
        for auto in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
            model = auto.from_pretrained(folder, **trust).eval()
            assert type(model).__name__ == "MoeLlavaForConditionalGeneration"
            with torch.no_grad():
                outputs = model(**expected, output_router_logits=True)
            assert len(outputs.router_logits) == 2 and outputs.aux_loss > 0
            if folder != "upcycled":
                assert torch.equal(outputs.logits, logits)
                assert torch.equal(model.generate(**expected, max_new_tokens=4, do_sample=False), tokens)
        ask = pipeline("image-text-to-text", model=folder, **trust)
        assert type(ask.model).__name__ == "MoeLlavaForConditionalGeneration"
        said = ask(text=[{"role": "user", "content": content}], max_new_tokens=4, do_sample=False)
        assert said[0]["generated_text"]
        model.save_pretrained(f"{folder}_again")
        processor.save_pretrained(f"{folder}_again")
    assert not [name for name in sys.modules if name.partition(".")[0] == "roe_llava"]
    print("opened")
"""


def test_folders_open_everywhere_without_the_package_and_can_be_saved_again(world):
    done = run_fresh(world, OPEN_EVERYTHING, "upcycled", "saved")
    assert done.stdout.endswith("opened\n"), done.stderr
    for kind in ("upcycled", "saved"):
        first, again = load_weights(world / kind), load_weights(world / f"{kind}_again")
        assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    configs = [json.loads((world / kind / "config.json").read_text()) for kind in ("upcycled", "upcycled_again")]
    assert configs[0]["moe_provenance"] == configs[1]["moe_provenance"]
    done = run_fresh(world, OPEN_EVERYTHING, "saved_again")
    assert done.stdout.endswith("opened\n"), done.stderr


def test_a_folder_carries_the_files_of_this_model_alone(world):
    for kind in ("upcycled", "saved"):
        assert {path.name for path in (world / kind).glob("*.py")} == {
            "checkpointing_roe.py",
            "choice_moe.py",
            "configuration_moe_llava.py",
            "experts_moe.py",
            "hub_roe.py",
            "listing_roe.py",
            "loading_moe.py",
            "modeling_moe_llava.py",
            "routers_moe.py",
        }


def test_a_lost_router_opens_nothing_without_the_package(world):
    lost = world / "lost"
    lost.mkdir()
    for path in (world / "upcycled").iterdir():
        if path.name not in ("model-routers.safetensors", "model.safetensors.index.json"):
            (lost / path.name).write_bytes(path.read_bytes())
    (lost / "model-00001-of-00001.safetensors").rename(lost / "model.safetensors")
    script = """
        from transformers import AutoModel
        try:
            AutoModel.from_pretrained("lost", trust_remote_code=True)
        except ValueError as error:
            assert "tensors of this model" in str(error) and "router" in str(error), error
            print("refused")
    """
    done = run_fresh(world, script)
    assert done.stdout.endswith("refused\n"), done.stderr
