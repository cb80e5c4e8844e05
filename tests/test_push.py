"""`roe-llava push` and `push_to_hub`: for real against a Hub on this machine, opened where the package is not there."""

import os
import re
import subprocess
import sys
import textwrap

import pytest
import torch
from convert_helpers import make_base, tiny_inputs, train
from hub_server import running_hub
from PIL import Image
from safetensors.torch import save_file
from test_remote_code import NO_PACKAGE

from roe_llava import RoeLlavaProcessor
from roe_llava.convert.adapter_file import save_adapter

COMMANDS = """
import shlex, sys
from roe_llava.cli import main
sys.exit(max(main(shlex.split(line)) for line in sys.argv[1:]))
"""


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


@pytest.fixture
def start(hub, place, tmp_path):
    """Runs Python in a process of its own with an empty cache: with the package, or without."""

    def start(script: str, *arguments, package: bool = True, token: str = "hf_test") -> subprocess.CompletedProcess:
        kept = {name: value for name, value in os.environ.items() if package or name != "PYTHONPATH"}
        cache = tmp_path / f"cache{len(list(tmp_path.iterdir()))}"
        environment = kept | hub.environment(cache) | {"HF_TOKEN": token, "OMP_NUM_THREADS": "1"}
        head = "" if package else NO_PACKAGE
        command = [sys.executable, "-c", head + textwrap.dedent(script), *map(str, arguments)]
        return subprocess.run(
            command, env=environment, cwd=place, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
        )

    return start


def commits(done) -> list[str]:
    assert done.returncode == 0, done.stderr
    return re.findall(r"commit (\w{40})$", done.stdout, flags=re.MULTILINE)


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


def test_pushed_models_open_by_id_branch_and_pinned_commit_without_the_package(start, hub, place):
    done = start(COMMANDS, "push one me/model", "push two me/model --message 'Second'", "push one me/model --revision b/1")
    first, second, on_branch = commits(done)
    assert [(branch, text) for _, branch, text in hub.history] == [
        ("main", "Upload RoE-LLaVA with roe-llava push"),
        ("main", "Second"),
        ("b/1", "Upload RoE-LLaVA with roe-llava push"),
    ]
    assert "README.md (made now)" in done.stdout and f'revision="{first}"' in done.stdout
    opened = start(ANSWERS, "me/model two", f"me/model one {first}", "me/model one b/1", package=False)
    assert opened.stdout.endswith("answered\n"), opened.stderr

    card = (hub.repos["me/model"][on_branch] / "README.md").read_text()
    assert 'model_info(repo_id, revision="b/1")' in card
    (snippet,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    shown = start(snippet, package=False)
    assert shown.returncode == 0, shown.stderr
    assert second != on_branch


def test_a_push_that_breaks_leaves_the_old_commit_and_can_be_repeated(start, hub):
    (first,) = commits(start(COMMANDS, "push one me/broken"))
    hub.drop = "commit"
    broken = start(COMMANDS, "push two me/broken")
    assert broken.returncode == 2 and "connection to the Hub broke while me/broken" in broken.stderr, broken.stderr
    assert "Traceback" not in broken.stderr and hub.names["me/broken"]["main"] == first
    hub.drop, blobs = None, len(hub.blobs)
    (second,) = commits(start(COMMANDS, "push two me/broken"))
    assert hub.names["me/broken"]["main"] == second != first and len(hub.blobs) == blobs  # nothing was sent twice


@pytest.mark.slow  # huggingface_hub tries five times, and waits longer each time
def test_an_upload_that_breaks_leaves_the_old_commit_and_can_be_repeated(start, hub):
    (first,) = commits(start(COMMANDS, "push two me/cut"))
    hub.blobs.clear()
    hub.drop = "upload"
    broken = start(COMMANDS, "push one me/cut")
    assert broken.returncode == 2 and "connection to the Hub broke" in broken.stderr, broken.stderr
    assert hub.names["me/cut"]["main"] == first
    hub.drop = None
    (second,) = commits(start(COMMANDS, "push one me/cut"))
    opened = start(ANSWERS, "me/cut one", f"me/cut two {first}", package=False)
    assert opened.stdout.endswith("answered\n"), opened.stderr
    assert second != first


def test_weights_of_an_earlier_push_are_replaced_as_a_whole(start, hub, place):
    script = """
        import sys
        from roe_llava import RoeLlavaForConditionalGeneration as Roe, RoeLlavaProcessor
        from roe_llava.cli import main
        Roe.from_pretrained("two").save_pretrained("shards", max_shard_size="20KB")
        RoeLlavaProcessor.from_pretrained("two").save_pretrained("shards")
        sys.exit(max(main(["push", folder, "me/shards"]) for folder in ("one", "shards")))
    """
    done = start(script)
    *_, last = commits(done)
    names = {path.name for path in hub.repos["me/shards"][last].iterdir()}
    assert "model.safetensors" not in names and "model.safetensors.index.json" in names  # it would be read first
    assert "deleted there: model.safetensors" in done.stdout and ".gitattributes" in names
    opened = start(ANSWERS, "me/shards two", package=False)
    assert opened.stdout.endswith("answered\n"), opened.stderr


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


def test_push_to_hub_of_model_and_processor_gives_a_repository_that_opens(start, hub):
    done = start(PUSH_TO_HUB)
    assert done.returncode == 0, done.stderr
    assert "me/path" not in hub.repos
    assert len(hub.repos["me/part"]) == 1  # made, and empty
    opened = start(ANSWERS, "me/direct one", package=False)
    assert opened.stdout.endswith("answered\n"), opened.stderr


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


def test_a_repository_with_the_adapter_alone_brings_its_base_in_one_call(start, hub, place):
    hub.add("me/base", place / "base")
    hub.add("me/other", place / "one")  # no base
    done = start(COMMANDS, "push adapter me/adapter --base me/base")
    (commit,) = commits(done)
    names = {path.name for path in hub.repos["me/adapter"][commit].iterdir()}
    assert {"roe_adapter.safetensors", "roe_adapter.json", "config.json", "hub_roe.py"} <= names
    assert not [name for name in names if name.startswith("model.")]
    opened = start(ADAPTER, commit, package=False)
    assert opened.stdout.endswith("answered\n"), opened.stderr


def test_an_adapter_whose_base_is_a_folder_or_another_one_is_refused(start, hub, place):
    hub.add("me/base", place / "base")
    hub.add("me/stranger", make_base(place / "stranger", seed=7))
    named = start(COMMANDS, "push adapter me/refused")
    assert named.returncode == 2 and "names the base 'base', expected the id of a repository" in named.stderr
    other = start(COMMANDS, "push adapter me/refused --base me/stranger")
    assert other.returncode == 2 and "me/stranger is not the base" in other.stderr
    assert "me/refused" not in hub.repos


# ------------------------------------------------------------------------------------------------- what the Hub refuses


def test_no_token_and_a_public_repository_are_refused(start, hub):
    commits(start(COMMANDS, "push one me/public", "push one me/secret --private"))
    assert hub.private == {"me/secret"}
    refused = start(COMMANDS, "push two me/public --private")
    assert refused.returncode == 2 and "me/public is there and public" in refused.stderr
    refused = start(COMMANDS, "push two me/public", token="")
    assert refused.returncode == 2 and "no token for the Hub" in refused.stderr
