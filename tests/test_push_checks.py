"""What `roe-llava push` refuses before anything is sent; all of it without a Hub."""

import hashlib
import json
import shutil

import pytest
from convert_helpers import change_json, change_tensors, train

from roe_llava import RoeLlavaProcessor
from roe_llava.cli import main
from roe_llava.convert.graft import graft
from roe_llava.convert.kinds import ROE
from roe_llava.hub_card.card import listed_hashes, write_card
from roe_llava.hub_card.push import plan_push
from roe_llava.hub_roe import check_text, local_paths

ROUTER = "language_model.model.layers.1.router.weight"
# Put together here, so that nobody who searches the sources for tokens finds one.
TOKEN = "hf_" + "aB3" * 11 + "x"


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory, base, shared_adapter):
    folder = tmp_path_factory.mktemp("push") / "model"
    graft(base, shared_adapter, folder)
    return folder


@pytest.fixture
def folder(tmp_path, shared_folder):
    """A copy to damage."""
    return shutil.copytree(shared_folder, tmp_path / "model")


def remove_tensor(folder):
    change_tensors(folder / "model-roe.safetensors", lambda tensors: tensors.pop(ROUTER))


def reshape_tensor(folder):
    change_tensors(
        folder / "model-roe.safetensors", lambda tensors: tensors.update({ROUTER: tensors[ROUTER][:, :-1].clone()})
    )


def reshape_base_tensor(folder):
    name = "language_model.model.norm.weight"
    change_tensors(
        folder / "model-base.safetensors", lambda tensors: tensors.update({name: tensors[name][:-1].clone()})
    )


def put(name, content="x"):
    def damage(folder):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)

    return damage


def training_on(path):
    provenance = {"base": {"id": "someone/base", "revision": None, "fingerprint": None}, "training": {"data": path}}
    return lambda folder: change_json(folder / "config.json", roe_provenance=provenance)


DAMAGES = {
    "routing tensor missing": (
        remove_tensor,
        r"layers\.1\.router\.weight is in model-roe\.safetensors, found in no shard",
    ),
    "routing tensor cut": (reshape_tensor, r"layers\.1\.router\.weight .* has shape \[2, 31\], expected \[2, 32\]"),
    "base tensor cut": (reshape_base_tensor, r"norm\.weight .* has shape \[15\], expected \[16\]"),
    "shard lost": (lambda folder: (folder / "model-base.safetensors").unlink(), "model-base.safetensors"),
    "code missing": (lambda folder: (folder / "cache_roe.py").unlink(), r"lacks cache_roe\.py.*--update-code"),
    "code changed": (put("routing_roe.py", "import os"), r"routing_roe\.py in .* other than in the installed"),
    "foreign code": (put("helper.py"), r"holds helper\.py, which nobody needs"),
    "code elsewhere": (
        lambda folder: change_json(folder / "config.json", auto_map={"AutoModel": "a/b--modeling_roe_llava.X"}),
        "auto_map .*a/b--modeling_roe_llava.X",
    ),
    "no processor": (lambda folder: (folder / "processor_config.json").unlink(), r"no processor_config\.json"),
    "processor damaged": (put("processor_config.json", "{"), r"processor_config\.json is not readable JSON"),
    "tokenizer cut": (put("tokenizer.json", '{"version": '), r"/tokenizer\.json is not readable JSON"),
    "settings cut": (put("generation_config.json", '{"bos'), r"generation_config\.json is not readable JSON"),
    "quantised": (
        lambda folder: change_json(folder / "config.json", quantization_config={"quant_method": "bitsandbytes"}),
        r"holds quantised weights \(.*bitsandbytes\).*model\.push_to_hub",
    ),
    "tokenizer damaged": (put("tokenizer.json", "{}"), r"processor_config\.json does not hold what Transformers needs"),
    "path of the data": (
        training_on("/home/me/data/llava.json"),
        r"config\.json .*roe_provenance\.training\.data '/home/",
    ),
    "path of the base": (
        lambda folder: change_json(folder / "config.json", roe_provenance={"base": {"id": "/disk1/llava/base"}}),
        r"roe_provenance\.base\.id '/disk1/llava/base'",
    ),
    "path in the card": (put("README.md", "# A model\n\nTrained in /home/me/run."), r"README\.md holds local paths"),
    "token": (put("notes.json", json.dumps({"token": TOKEN})), r"notes\.json holds what looks like an access token"),
    "token in code": (put("routing_roe.py", f"TOKEN = '{TOKEN}'"), r"routing_roe\.py"),
    "optimizer": (put("optimizer.pt"), r"holds optimizer\.pt"),
    "checkpoint": (put("checkpoint-10/config.json", "{}"), r"holds checkpoint-10/config\.json"),
    "state of a run": (put("trainer_state.json", "{}"), r"holds trainer_state\.json"),
    "git": (put(".git/config"), r"holds \.git/config"),
    "cache": (put(".cache/huggingface/x.lock"), r"holds \.cache/huggingface/x\.lock"),
    "second format": (put("pytorch_model.bin"), r"holds pytorch_model\.bin"),
    "card that the Hub refuses": (
        put("README.md", "---\nbase_model: ../base\n---\n# A model"),
        r"README\.md has base_model '\.\./base', expected the id",
    ),
    "results that are not whole": (
        put("README.md", "---\nmodel-index:\n- name: x\n  results: 3\n---\n# A model"),
        r"README\.md has metadata that the Hub will refuse",
    ),
    "stock model": (lambda folder: change_json(folder / "config.json", model_type="llava"), "model_type 'llava'"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_folder_that_is_not_as_it_should_be_is_refused_by_name(folder, name):
    damage, message = DAMAGES[name]
    damage(folder)
    with pytest.raises(ValueError, match=message) as error:
        plan_push(folder, "me/model")
    assert TOKEN not in str(error.value)


def test_a_dry_run_lists_what_would_be_sent_and_changes_nothing(folder, capsys):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert main(["push", str(folder), "me/model", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name}\n" in said for name in before) and "README.md (made now)" in said
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_what_is_left_out_is_not_sent(folder):
    put("checkpoint-10/optimizer.pt")(folder)
    put("notes.pt")(folder)
    plan = plan_push(folder, "me/model", leave_out=["checkpoint-*", "*.pt"])
    assert not [name for name in plan.files if "checkpoint-" in name or name.endswith(".pt")]


def test_old_code_is_replaced_when_asked(folder):
    put("routing_roe.py", "import os")(folder)
    (folder / "cache_roe.py").unlink()
    plan = plan_push(folder, "me/model", update_code=True)
    assert {name: plan.files[name].read_bytes() for name in ROE.code_files()} == {
        name: path.read_bytes() for name, path in ROE.code_files().items()
    }


def test_a_card_lists_the_code_that_is_sent(folder):
    put("routing_roe.py", '"""Old."""')(folder)
    hashes = {name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for name, path in ROE.code_files().items()}
    made = plan_push(folder, "me/model", update_code=True).files["README.md"]
    assert listed_hashes(made.decode()) == hashes
    write_card(folder)  # with the folder's own, old code
    with pytest.raises(ValueError, match=r"README\.md lists other hashes than those of routing_roe\.py"):
        plan_push(folder, "me/model", update_code=True)


def test_a_card_that_was_made_before_its_place_was_known_names_it(folder):
    write_card(folder)
    plan = plan_push(folder, "me/model")
    card = (folder / "README.md").read_text()
    assert 'repo_id = "OWNER/NAME"' in card and "README.md names me/model" in str(plan)
    assert plan.files["README.md"].decode() == card.replace("OWNER/NAME", "me/model")


def test_a_processor_without_a_chat_template_is_mentioned(folder):
    assert "chat template" not in str(plan_push(folder, "me/model"))
    (folder / "chat_template.jinja").unlink()
    assert "there is no chat template" in str(plan_push(folder, "me/model"))


def test_a_card_that_somebody_wrote_is_sent_as_it_is_and_an_empty_one_replaced(folder):
    (folder / "README.md").write_text("# My model\n")
    assert plan_push(folder, "me/model").files["README.md"] == folder / "README.md"
    (folder / "README.md").write_text("---\ntags: []\n---\n# Model Card\n" + "[More Information Needed]\n" * 9)
    plan = plan_push(folder, "me/model")
    assert b"trust_remote_code" in plan.files["README.md"] and "README.md made" in str(plan)


@pytest.mark.parametrize("repo_id", ["model", "a/b/c", "me/mo del", "me/.."])
def test_a_repository_is_named_by_owner_and_name(folder, repo_id):
    with pytest.raises(ValueError):
        plan_push(folder, repo_id)


def test_the_folder_of_a_run_points_to_its_result(tmp_path, folder):
    put("run.json", "{}")(tmp_path)
    with pytest.raises(ValueError, match=r"folder of a training run: give its result, .*model"):
        plan_push(tmp_path, "me/model")


def test_a_commit_is_no_branch(folder):
    with pytest.raises(ValueError, match="expected a branch"):
        plan_push(folder, "me/model", revision="0" * 40)


def test_a_base_for_a_whole_model_is_refused(folder):
    with pytest.raises(ValueError, match="only an adapter file needs one"):
        plan_push(folder, "me/model", base="someone/base")


def test_a_saved_model_can_be_pushed_from_where_it_was_saved(tmp_path, base):
    train(base).save_pretrained(tmp_path / "saved")
    RoeLlavaProcessor.from_pretrained(base).save_pretrained(tmp_path / "saved")
    assert "model.safetensors" in plan_push(tmp_path / "saved", "me/model").files


# ------------------------------------------------------------------------------------------------------ what is a path


@pytest.mark.parametrize("text", ["see /home/me/x.json", "(~/llava)", "C:\\data\\x", "file:///srv/x", "`/tmp/a b`"])
def test_paths_of_a_machine_are_found_in_text(text):
    assert local_paths("README.md", text)


@pytest.mark.parametrize(
    "text", ["https://huggingface.co/home/x", "and/or, 3/4, a/b", "docs/data/x.md", "//comment", "org/name", "/", "/x"]
)
def test_links_and_prose_are_no_paths(text):
    assert not local_paths("README.md", text) and not local_paths("a.json", json.dumps({"a": text}))


def test_vocabularies_may_hold_what_looks_like_a_path():
    check_text("tokenizer.json", json.dumps({"model": {"vocab": {"/usr/bin/env": 1}}, "added": "/usr/bin"}))
