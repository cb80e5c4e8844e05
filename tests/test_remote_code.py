"""Folders opened by `trust_remote_code=True` in a fresh process that cannot import the package."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from convert_helpers import make_base, tiny_inputs, train
from safetensors.torch import load_file, save_file

from roe_llava import RoeLlavaProcessor
from roe_llava.convert.adapter_file import save_adapter
from roe_llava.convert.graft import graft

# Put in front of every script: the package cannot be found even where it is installed.
NO_PACKAGE = """
import sys

class NoPackage:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "roe_llava":
            raise ImportError("this process does not have the package")

sys.meta_path.insert(0, NoPackage())
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a grafted and a saved model, the inputs of a batch, and what the trained model answers."""
    folder = tmp_path_factory.mktemp("world")
    base = make_base(folder / "base")
    model = train(base)
    processor = RoeLlavaProcessor.from_pretrained(base)
    model.save_pretrained(folder / "saved")
    processor.save_pretrained(folder / "saved")
    save_adapter(model, model.config, folder / "adapter", base=base)
    graft(base, folder / "adapter", folder / "grafted")
    inputs = tiny_inputs(processor)
    with torch.no_grad():
        logits = model(**inputs).logits
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    tensors = {name: tensor.contiguous() for name, tensor in inputs.items()} | {"logits": logits, "tokens": tokens}
    save_file(tensors, folder / "expected.safetensors")
    return folder


def run_fresh(world: Path, script: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run a script in a process without the package, with its own caches and no network."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    caches = {"HF_MODULES_CACHE": str(world / "modules"), "HF_HUB_CACHE": str(world / "hub")}
    environment = kept | caches | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", NO_PACKAGE + textwrap.dedent(script), *arguments]
    return subprocess.run(
        command, cwd=world, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )


OPEN_EVERYTHING = """
    import torch
    from PIL import Image
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM
    from transformers import AutoProcessor, pipeline

    trust = {"trust_remote_code": True}
    expected = load_file("expected.safetensors")
    logits, tokens = expected.pop("logits"), expected.pop("tokens")
    images = [Image.new("RGB", (28, 28), color) for color in ("red", "blue")]
    texts = ["USER: <image> what is this ASSISTANT:", "USER: <image> is this a big red ASSISTANT:"]
    content = [{"type": "image", "image": images[0]}, {"type": "text", "text": "what is this"}]
    chat = [{"role": "user", "content": content}]

    for folder in sys.argv[1:]:
        config = AutoConfig.from_pretrained(folder, **trust)
        assert (type(config).__name__, config.model_type) == ("RoeLlavaConfig", "roe_llava")
        processor = AutoProcessor.from_pretrained(folder, **trust)
        assert type(processor).__name__ == "RoeLlavaProcessor"
        made = processor(images=images, text=texts, return_tensors="pt", padding=True)
        assert made.keys() == expected.keys() and all(torch.equal(made[name], expected[name]) for name in made)
        for auto in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
            model = auto.from_pretrained(folder, **trust).eval()
            assert type(model).__name__ == "RoeLlavaForConditionalGeneration"
            with torch.no_grad():
                outputs = model(**expected)
            assert torch.equal(outputs.logits, logits) and not outputs.routes.all()
            assert torch.equal(model.generate(**expected, max_new_tokens=4, do_sample=False), tokens)
        ask = pipeline("image-text-to-text", model=folder, **trust)
        assert type(ask.model).__name__ == "RoeLlavaForConditionalGeneration"
        said = ask(text=chat, max_new_tokens=4, do_sample=False, return_full_text=False)[0]["generated_text"]
        assert said.split() == processor.batch_decode(tokens[:1, -4:], skip_special_tokens=True)[0].split()
        model.save_pretrained(f"{folder}_again")
        processor.save_pretrained(f"{folder}_again")
    assert not [name for name in sys.modules if name.partition(".")[0] == "roe_llava"]
    print("opened")
"""

OPEN_WITHOUT_TRUST = """
    import transformers

    for name in ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor"):
        try:
            getattr(transformers, name).from_pretrained("grafted")
        except ValueError as error:
            assert "trust_remote_code=True" in str(error), error
        else:
            raise AssertionError(f"{name} opened a folder it was not told to trust")
    try:
        transformers.AutoModel.from_pretrained("lost", trust_remote_code=True)
    except ValueError as error:
        assert "lacks 10 tensors" in str(error), error
        print("refused")
"""


def test_folders_open_everywhere_without_the_package_and_can_be_saved_again(world):
    done = run_fresh(world, OPEN_EVERYTHING, "grafted", "saved")
    assert done.stdout.endswith("opened\n"), done.stderr
    for kind in ("grafted", "saved"):
        first, again = load_weights(world / kind), load_weights(world / f"{kind}_again")
        assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    configs = [json.loads((world / kind / "config.json").read_text()) for kind in ("grafted", "grafted_again")]
    assert configs[0]["roe_provenance"] == configs[1]["roe_provenance"]
    done = run_fresh(world, OPEN_EVERYTHING, "grafted_again", "saved_again")
    assert done.stdout.endswith("opened\n"), done.stderr


def test_no_trust_or_a_lost_shard_opens_nothing(world):
    lost = world / "lost"
    lost.mkdir()
    for path in (world / "grafted").iterdir():
        if path.name not in ("model-roe.safetensors", "model.safetensors.index.json", "model-base.safetensors"):
            (lost / path.name).write_bytes(path.read_bytes())
    (lost / "model.safetensors").write_bytes((world / "grafted" / "model-base.safetensors").read_bytes())
    done = run_fresh(world, OPEN_WITHOUT_TRUST)
    assert done.stdout.endswith("refused\n"), done.stderr


ADAPTERS_ONTO_A_BASE = """
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModel, LlavaForConditionalGeneration
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    expected = load_file("expected.safetensors")
    logits, tokens = expected.pop("logits"), expected.pop("tokens")
    code, trust = "modeling_roe_llava.RoeLlavaForConditionalGeneration", {"trust_remote_code": True}

    def answers(model):
        with torch.no_grad():
            assert torch.equal(model(**expected).logits, logits)
        assert torch.equal(model.generate(**expected, max_new_tokens=4, do_sample=False), tokens)

    # The code of any saved folder, a loaded base, its folder, a base and an adapter in the Hub's cache.
    roe = get_class_from_dynamic_module(code, "grafted")
    answers(roe.from_base(LlavaForConditionalGeneration.from_pretrained("base"), "adapter"))
    answers(roe.from_base("base", "adapter"))
    answers(roe.from_base("tiny/base", "tiny/adapter"))
    model = roe.from_base("tiny/base", "tiny/adapter", revision="main", base_revision="main")
    answers(model)
    model.save_pretrained("made")
    model = AutoModel.from_pretrained("made", **trust)
    answers(model)
    answers(model.load_routing("tiny/adapter"))
    for wrong in ({"revision": "other"}, {"base_revision": "other"}, {"cache_dir": "empty"}):
        try:
            roe.from_base("tiny/base", "tiny/adapter", **wrong)
        except (ValueError, OSError) as error:
            assert "base_revision" in wrong or "tiny/adapter" in str(error), error
        else:
            raise AssertionError("a revision that is not there was taken")
    assert not [name for name in sys.modules if name.partition(".")[0] == "roe_llava"]
    print("answered")
"""


def test_adapters_go_onto_bases_without_the_package_offline(world):
    for name in ("base", "adapter"):
        commit = "0123456789" * 4
        repo = world / "hub" / f"models--tiny--{name}"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text(commit)
        shutil.copytree(world / name, repo / "snapshots" / commit)
    done = run_fresh(world, ADAPTERS_ONTO_A_BASE)
    assert done.stdout.endswith("answered\n"), done.stderr
    assert "untrained" not in done.stderr and "MISSING" not in done.stderr
    provenance = json.loads((world / "made" / "config.json").read_text())["roe_provenance"]
    assert provenance == json.loads((world / "grafted" / "config.json").read_text())["roe_provenance"]


def load_weights(folder: Path) -> dict:
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors
