"""`roe-llava push` and `push_to_hub`: for real against a Hub on this machine, opened where the package is not there."""

import json
import os
import re
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from convert_helpers import make_base, tiny_inputs, train
from hub_server import running_hub
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import save_file
from test_remote_code import NO_PACKAGE

from roe_llava import RoeLlavaProcessor
from roe_llava.convert.adapter_file import save_adapter

# A process with the package that takes work line by line: importing takes longer than any of it.
AUTHOR = """
import contextlib, io, json, os, shlex, sys, traceback
from roe_llava.cli import main

for line in sys.stdin:
    asked = json.loads(line)
    os.environ["HF_TOKEN"] = asked["token"]
    said, wrong = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(wrong):
        try:
            code = main(shlex.split(asked["words"])) if "words" in asked else exec(asked["script"], {}) or 0
        except BaseException:
            code = 1
            traceback.print_exc()
    print(json.dumps([code, said.getvalue(), wrong.getvalue()]), flush=True)
"""


@dataclass
class Author:
    """Somebody who pushes."""

    process: subprocess.Popen

    def ask(self, **asked) -> "Done":
        self.process.stdin.write(json.dumps({"token": "hf_test"} | asked) + "\n")
        self.process.stdin.flush()
        return Done(*json.loads(self.process.stdout.readline()))

    def push(self, words: str, **asked) -> str:
        """The commit of a push."""
        done = self.ask(words=f"push {words}", **asked)
        assert done.code == 0, done.wrong
        return re.search(r"commit (\w{40})$", done.said, flags=re.MULTILINE)[1]

    def refused(self, words: str, **asked) -> str:
        """The error of a push that was refused."""
        done = self.ask(words=f"push {words}", **asked)
        assert done.code == 2 and "Traceback" not in done.wrong, done.wrong
        return done.wrong.splitlines()[-1]


@dataclass
class Done:
    code: int
    said: str
    wrong: str


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folders of two whole models and an adapter, the base, the inputs of a batch and what each model answers."""
    folder = tmp_path_factory.mktemp("push")
    base = make_base(folder / "base")
    processor = RoeLlavaProcessor.from_pretrained(base)
    inputs = tiny_inputs(processor)
    tensors = {name: tensor.contiguous() for name, tensor in inputs.items()}
    for seed, name in ((1, "one"), (2, "two")):
        model = train(base, seed=seed)
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
        with torch.no_grad():
            tensors[f"logits.{name}"] = model(**inputs).logits
    save_adapter(model, model.config, folder / "adapter", base=base, training={"steps": 3})
    save_file(tensors, folder / "expected.safetensors")
    Image.new("RGB", (28, 28), "red").save(folder / "picture.png")
    return folder


@pytest.fixture(scope="module")
def hub(place):
    with running_hub() as hub:
        yield hub
    assert not hub.unknown


@pytest.fixture(scope="module")
def author(hub, place, tmp_path_factory):
    environment = os.environ | hub.environment(tmp_path_factory.mktemp("cache")) | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", AUTHOR], env=environment, cwd=place, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        yield Author(process)
        process.stdin.close()


@pytest.fixture
def reader(hub, place, tmp_path):
    """Runs Python in a process of its own, with an empty cache and without the package."""

    def read(script: str, *arguments) -> None:
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_TOKEN")}
        environment = kept | hub.environment(tmp_path / "cache") | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", NO_PACKAGE + textwrap.dedent(script), *map(str, arguments)]
        done = subprocess.run(
            command, env=environment, cwd=place, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
        )
        assert done.stdout.endswith("answered\n"), done.stderr

    return read


ANSWERS = """
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

    expected = load_file("expected.safetensors")
    logits = {name: expected.pop(f"logits.{name}") for name in ("one", "two")}

    def answers_as(model, name):
        assert type(model).__name__ == "RoeLlavaForConditionalGeneration"
        with torch.no_grad():
            assert torch.equal(model.eval()(**expected).logits, logits[name])

    for line in sys.argv[1:]:
        repo_id, name, *revision = line.split()
        options = {"trust_remote_code": True} | ({"revision": revision[0]} if revision else {})
        for auto in (AutoModel, AutoModelForImageTextToText):
            answers_as(auto.from_pretrained(repo_id, **options), name)
        processor = AutoProcessor.from_pretrained(repo_id, **options)
        assert type(processor).__name__ == "RoeLlavaProcessor"
    assert not [name for name in sys.modules if name.partition(".")[0] == "roe_llava"]
    print("answered")
"""


def test_pushed_models_open_by_id_branch_and_pinned_commit_without_the_package(author, reader, hub):
    first = author.push("one me/model")
    assert author.push("two me/model --message 'Second'") != first
    on_branch = author.push("one me/model --revision b/1")
    assert [(branch, text) for repo_id, branch, text in hub.history if repo_id == "me/model"] == [
        ("main", "Upload RoE-LLaVA with roe-llava push"),
        ("main", "Second"),
        ("b/1", "Upload RoE-LLaVA with roe-llava push"),
    ]
    card = (hub.repos["me/model"][on_branch] / "README.md").read_text()
    assert 'model_info(repo_id, revision="b/1")' in card
    (snippet,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    script = textwrap.dedent(ANSWERS).replace('print("answered")', f'{snippet}\nprint("answered")')
    reader(script, "me/model two", f"me/model one {first}", "me/model one b/1")


@contextmanager
def dropping(hub, kind: str):
    """Connections that send such are dropped in the middle."""
    hub.drop = kind
    try:
        yield
    finally:
        hub.drop = None


def test_a_push_that_breaks_leaves_the_old_commit_and_can_be_repeated(author, hub):
    first = author.push("one me/broken")
    with dropping(hub, "commit"):
        error = author.refused("two me/broken")
    assert "the connection to the Hub broke while me/broken was written" in error
    assert hub.names["me/broken"]["main"] == first
    blobs = {*hub.blobs}
    second = author.push("two me/broken")
    assert hub.names["me/broken"]["main"] == second != first
    assert {*hub.blobs} == blobs  # no weights were sent twice


@pytest.mark.slow  # huggingface_hub tries five times, and waits longer each time
def test_an_upload_that_breaks_leaves_the_old_commit_and_can_be_repeated(author, reader, hub):
    first = author.push("two me/cut")
    hub.blobs.clear()
    with dropping(hub, "upload"):
        assert "connection to the Hub broke" in author.refused("one me/cut")
    assert hub.names["me/cut"]["main"] == first and not hub.blobs
    author.push("one me/cut")
    reader(ANSWERS, "me/cut one", f"me/cut two {first}")


SHARDS = """
from roe_llava import RoeLlavaForConditionalGeneration as Roe, RoeLlavaProcessor

Roe.from_pretrained("two").save_pretrained("shards", max_shard_size="20KB")
RoeLlavaProcessor.from_pretrained("two").save_pretrained("shards")
"""


def test_weights_of_an_earlier_push_are_replaced_as_a_whole(author, reader, hub):
    author.push("one me/shards")
    assert author.ask(script=SHARDS).code == 0
    done = author.ask(words="push shards me/shards")
    assert done.code == 0 and "deleted there: model.safetensors" in done.said, done.wrong
    commit = hub.names["me/shards"]["main"]
    names = {path.name for path in hub.repos["me/shards"][commit].iterdir()}
    assert "model.safetensors" not in names and "model.safetensors.index.json" in names  # it would be read first
    reader(ANSWERS, "me/shards two")


PUSH_TO_HUB = """
    import sys
    from pathlib import Path
    from roe_llava import RoeLlavaForConditionalGeneration as Roe, RoeLlavaProcessor

    model, processor = Roe.from_pretrained("one"), RoeLlavaProcessor.from_pretrained("one")
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
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.router" not in name}
    save = lambda: model.save_pretrained("part", state_dict=state, push_to_hub=True, repo_id="me/part")
    refused("1 of the model's tensors would not be in me/part", save)
    model.config.roe_provenance = {"base": {"id": str(Path.home() / "llava"), "revision": None, "fingerprint": None}}
    refused("config.json holds local paths", lambda: model.push_to_hub("me/path"))
"""


def test_push_to_hub_of_model_and_processor_gives_a_repository_that_opens(author, reader, hub):
    done = author.ask(script=textwrap.dedent(PUSH_TO_HUB))
    assert done.code == 0, done.wrong
    assert "me/path" not in hub.repos
    assert len(hub.repos["me/part"]) == 1  # made, and empty
    reader(ANSWERS, "me/direct one")


FOUR_BITS = """
    import sys
    import torch
    from transformers import BitsAndBytesConfig
    from roe_llava import RoeLlavaForConditionalGeneration as Roe, RoeLlavaProcessor

    whole = ["lm_head", r"model\\.vision_tower", r"model\\.multi_modal_projector"]  # narrower than 4-bit kernels take
    bits = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=whole)
    model = Roe.from_pretrained(SHIPPED, quantization_config=bits)
    processor = RoeLlavaProcessor.from_pretrained(SHIPPED)
    model.save_pretrained("four")
    processor.save_pretrained("four")
    model.push_to_hub("me/four")
    processor.push_to_hub("me/four")
    again = Roe.from_pretrained("me/four")
    assert type(again.model.language_model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    tensors, others = model.state_dict(), again.state_dict()
    assert tensors.keys() == others.keys()
    assert all(torch.equal(one, others[name]) for name, one in tensors.items() if isinstance(one, torch.Tensor))
    RoeLlavaProcessor.from_pretrained("me/four")
"""


def test_a_quantised_model_goes_to_the_hub_by_push_to_hub_alone(author, hub, shipped_roe):
    pytest.importorskip("bitsandbytes")
    done = author.ask(script=textwrap.dedent(FOUR_BITS).replace("SHIPPED", repr(str(shipped_roe))))
    assert done.code == 0, done.wrong
    assert "four holds quantised weights (quantization_config in config.json: bitsandbytes)" in author.refused(
        "four me/4"
    )
    assert "me/4" not in hub.repos


BAKED = """
    import torch
    from roe_llava import RoeLlavaForConditionalGeneration as Roe, RoeLlavaProcessor
    from roe_llava.convert.bake import bake

    bake("one", "frozen", route="101", drop_adapters="never")
    model = Roe.from_pretrained("frozen")
    model.push_to_hub("me/frozen")
    RoeLlavaProcessor.from_pretrained("frozen").push_to_hub("me/frozen")
    tensors, others = model.state_dict(), Roe.from_pretrained("me/frozen").state_dict()
    assert tensors.keys() == others.keys() and all(torch.equal(one, others[name]) for name, one in tensors.items())
"""


def test_a_baked_model_goes_to_the_hub_by_push_to_hub_alone(author, hub):
    done = author.ask(script=textwrap.dedent(BAKED))
    assert done.code == 0, done.wrong
    assert "frozen is baked (skipped_layers [1])" in author.refused("frozen me/4")
    assert "me/4" not in hub.repos


# ------------------------------------------------------------------------------------------------------ adapter alone

ADAPTER = """
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModel

    expected = load_file("expected.safetensors")
    logits = {name: expected.pop(f"logits.{name}") for name in ("one", "two")}["two"]
    model = AutoModel.from_pretrained("me/adapter", trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(model(**expected).logits, logits)
    again = type(model).from_adapter("me/adapter", revision=sys.argv[1], dtype=torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters()))
    moved = AutoModel.from_pretrained("me/adapter", trust_remote_code=True, routing_positions="first")
    assert moved.config.routing_positions == "first" and not hasattr(moved.config, "roe_adapter_only")
    try:
        AutoModel.from_pretrained("me/adapter", trust_remote_code=True, adapter_size=7)
    except ValueError as error:
        assert "adapter_size=7" in str(error), error
    else:
        raise AssertionError("an adapter of another width was taken")
    model.save_pretrained("whole")
    with torch.no_grad():
        assert torch.equal(AutoModel.from_pretrained("whole", trust_remote_code=True).eval()(**expected).logits, logits)
    assert not [name for name in sys.modules if name.partition(".")[0] == "roe_llava"]
    print("answered")
"""


def test_a_repository_with_the_adapter_alone_brings_its_base_in_one_call(author, reader, hub, place):
    (place / "base" / "README.md").write_text("---\nlicense: mit\n---\n# The base\n")
    of_base = hub.add("me/base", place / "base")
    commit = author.push("adapter me/adapter --base me/base")
    card = ModelCard((hub.repos["me/adapter"][commit] / "README.md").read_text())
    assert (card.data.license, card.data.base_model) == ("mit", "me/base") and of_base in card.text
    names = {path.name for path in hub.repos["me/adapter"][commit].iterdir()}
    assert {"roe_adapter.safetensors", "roe_adapter.json", "config.json", "hub_roe.py"} <= names
    assert not [name for name in names if name.startswith("model.")]
    reader(ADAPTER, commit)


def test_an_adapter_whose_base_is_a_folder_or_another_one_is_refused(author, hub, place):
    hub.add("me/stranger", make_base(place / "stranger", seed=7))
    assert "names the base 'base', expected the id of a repository" in author.refused("adapter me/refused")
    assert "me/stranger is not the base" in author.refused("adapter me/refused --base me/stranger")
    assert "me/refused" not in hub.repos


# ------------------------------------------------------------------------------------------------- what the Hub refuses


def test_no_token_and_a_public_repository_are_refused(author, hub):
    first = author.push("one me/public")
    author.push("one me/secret --private")
    assert hub.private == {"me/secret"}
    assert "me/public is there and public" in author.refused("two me/public --private")
    assert "no token for the Hub" in author.refused("two me/public", token="")
    assert hub.names["me/public"]["main"] == first
