"""`roe-llava push FOLDER REPO_ID`: a checkpoint or an adapter file to the Hub, in one commit.

Everything is checked before the first byte is sent. huggingface_hub uploads large files one by one and makes the commit
last, so whatever breaks on the way, the repository is as it was; a file that arrived is not sent again by the next try.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id

from ..adapter_roe import ABOUT_NAME, AdapterInfo
from ..convert.bases import A_BASE, is_base, routed_kind
from ..convert.fingerprint import base_signatures
from ..convert.folder_files import grafted_config
from ..convert.source import resolve_source
from ..convert.weights import open_checkpoint
from ..grafting_roe import base_on_hub
from ..identity_roe import base_record, difference
from ..loading_roe import source_config
from .card import NO_REPO, code_hash, is_unwritten, listed_hashes, make_card
from .checks import check_auto_map, check_code, check_private, check_processor, check_readable, chosen_files
from .folder import CARD, ModelFolder, open_folder
from .metadata import TransportError, check_card

# Files of an earlier push that would be read together with those of this one, or in their place.
REPLACED = re.compile(r"[\w.-]+\.(?:safetensors|bin|py)|[\w.-]+\.(?:safetensors|bin)\.index\.json|roe_adapter\.json")


@dataclass
class Push:
    """What is to be sent.

    Attributes:
        folder: where it comes from.
        repo_id: where it goes.
        branch: which branch of it.
        files: name in the repository to a file, or to its content.
        notes: what was done beyond sending the folder's files.
    """

    folder: ModelFolder
    repo_id: str
    branch: str
    files: dict[str, Path | bytes]
    notes: list[str] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return sum(len(one) if isinstance(one, bytes) else one.stat().st_size for one in self.files.values())

    def __str__(self) -> str:
        what = "an adapter" if self.folder.is_adapter else f"a {self.folder.kind.name} checkpoint"
        lines = [f"{self.folder.path}: {what}, {len(self.files)} files, {self.num_bytes / 1e6:,.1f} MB"]
        lines += [f"  {name}{'' if isinstance(one, Path) else ' (made now)'}" for name, one in self.files.items()]
        return "\n".join([*lines, *self.notes])


def plan_push(
    folder: str | Path,
    repo_id: str,
    *,
    revision: str | None = None,
    base: str | None = None,
    base_revision: str | None = None,
    update_code: bool = False,
    leave_out: Sequence[str] = (),
) -> Push:
    """Check all that is to be sent.

    Args:
        folder: checkpoint of one of our kinds, or adapter file.
        repo_id: owner/name.
        revision: branch to commit to.
        base, base_revision: Hub id of the base that an adapter was trained on, if it names a folder.
        update_code: send the installed code in place of the folder's.
        leave_out: patterns of files and folders that stay here.
    Raises: ValueError naming file, value and what to do.
    """
    check_repo_id(repo_id)
    if revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision):
        raise ValueError(f"revision is the commit {revision}, expected a branch: a commit never changes")
    opened = open_folder(folder)
    files: dict[str, Path | bytes] = {**chosen_files(opened, leave_out)}
    plan = Push(opened, repo_id, revision or "main", files)
    check_auto_map(opened)
    if opened.is_adapter:
        add_what_opens(plan, base, base_revision)
    elif base is not None or base_revision is not None:
        raise ValueError(
            f"base {base or base_revision} given for {opened.path}, which holds its base's weights: only an adapter "
            "file needs one"
        )
    installed = routed_kind(json.loads(files["config.json"])).code_files() if opened.is_adapter else opened.code_files()
    if opened.is_adapter or update_code:
        files |= installed
    check_code(files, opened.path, installed)
    check_readable(files)
    if (processor := check_processor(opened)) is not None and processor.chat_template is None:
        plan.notes.append("there is no chat template: prompts have to be written by hand, unlike in the card's code")
    add_card(plan)
    check_private(files)
    plan.files = dict(sorted(files.items()))
    return plan


def check_repo_id(repo_id: str) -> None:
    """Raises: ValueError if an id is not owner/name."""
    if "/" not in repo_id or Path(repo_id).is_dir():
        raise ValueError(f"the repository is {repo_id!r}, expected owner/name, as on the Hub; FOLDER comes before it")
    validate_repo_id(repo_id)


# ------------------------------------------------------------------------------------------------------ adapter alone


def add_what_opens(plan: Push, base: str | None, base_revision: str | None) -> None:
    """Put beside an adapter what lets its repository open as a model: a config.json that leads to its base, and code.

    Raises: ValueError if it names no base on the Hub, or `base` is another one.
    """
    info = plan.folder.info
    if base is not None:
        info = with_base(plan, info, base, base_revision)
    elif base_revision is not None:
        raise ValueError(f"base revision {base_revision!r} given without a base: give its Hub id with --base")
    base_id, commit = base_on_hub(info, plan.folder.path / ABOUT_NAME)
    try:
        config = source_config(base_id, {"revision": commit})
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"the base {base_id} at {commit}, which {plan.folder.path / ABOUT_NAME} names, cannot be had: {reason}"
        ) from error
    if not is_base(config.get("model_type")):
        raise ValueError(f"the base {base_id} has model_type {config.get('model_type')!r}, expected {A_BASE}")
    origin = {name: info.base.get(name) for name in ("id", "revision", "fingerprint")}
    whole = grafted_config(config, info.routing_fields, {"base": origin, "training": info.training})
    plan.files["config.json"] = as_json(whole | {"roe_adapter_only": True})
    plan.notes.append(f"config.json and code make it open as a model, on {base_id} at {commit}")


def with_base(plan: Push, info: AdapterInfo, base: str, revision: str | None) -> AdapterInfo:
    """The adapter's description naming a base on the Hub, whose weights are read and compared.

    Raises: ValueError if they are not those that it was trained on.
    """
    if not (info.base or {}).get("tensors"):
        raise ValueError(
            f"{plan.folder.path / ABOUT_NAME} does not say which weights it was trained on: {base} cannot be compared"
        )
    where = resolve_source(base, revision)
    signatures = base_signatures(open_checkpoint(where.folder))
    if reason := difference(signatures, info.base["tensors"]):
        raise ValueError(f"{base} is not the base that {plan.folder.path} was trained on: {reason}")
    plan.notes.append(f"{ABOUT_NAME} names {where.id} at {where.revision}, compared weight by weight")
    info = replace(info, base=base_record(signatures, where.id, where.revision))
    plan.files[ABOUT_NAME] = as_json(asdict(info))
    plan.folder.info = info
    return info


def as_json(content: dict) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


# --------------------------------------------------------------------------------------------------------------- card


def add_card(plan: Push) -> None:
    """Make a card where a folder has none, or the empty one that Transformers makes; else check the one that is there.

    Raises: ValueError if its metadata is not valid, or it lists other code than is sent.
    """
    path = plan.folder.path / CARD
    if CARD in plan.files and not is_unwritten(text := path.read_text(encoding="utf-8")):
        check_card(text, path)
        check_hashes(plan, text)
        if f'"{NO_REPO}"' in text:
            plan.files[CARD] = text.replace(f'"{NO_REPO}"', f'"{plan.repo_id}"').encode()
            plan.notes.append(f"{CARD} names {plan.repo_id} where it had {NO_REPO}")
        return
    branch = None if plan.branch == "main" else plan.branch
    code = {name: one for name, one in plan.files.items() if name.endswith(".py")}
    card = make_card(plan.folder, repo_id=plan.repo_id, revision=branch, code=code)
    plan.files[CARD] = card.text.encode()
    plan.files |= card.pictures
    plan.notes.append(
        f"{CARD} made from what the folder knows; roe-llava card adds results that were measured elsewhere"
    )


def check_hashes(plan: Push, card: str) -> None:
    """Raises: ValueError naming code files of which a card lists another hash than is sent."""
    sent = {name: code_hash(one.read_bytes()) for name, one in plan.files.items() if name.endswith(".py")}
    if old := [name for name, listed in listed_hashes(card).items() if sent.get(name) != listed]:
        raise ValueError(
            f"{plan.folder.path / CARD} lists other hashes than those of {', '.join(old)}, which are sent: was the "
            "code changed after the card was made? Delete it, or make it anew (roe-llava card FOLDER --overwrite)"
        )


# --------------------------------------------------------------------------------------------------------------- send


def push(plan: Push, *, private: bool = False, message: str | None = None) -> str:
    """Send what was checked to the Hub, as one commit.

    The repository and the branch are made if they are not there. Weights, index and code that an earlier commit left
    there and this one does not have are deleted by it; anything else in the repository stays.

    Args:
        plan: of `plan_push`.
        private: make a private repository.
        message: of the commit.
    Returns: the commit.
    Raises: ValueError if there is no token, or for a public repository with `private`; OSError if the Hub cannot be
        reached or refuses.
    """
    if not get_token():
        raise ValueError("there is no token for the Hub: `hf auth login`, or set HF_TOKEN to one that may write")
    try:
        return send(plan, private, message or default_message(plan))
    except (
        TransportError,
        RuntimeError,
    ) as error:  # of an upload that it gave up, huggingface_hub makes a RuntimeError
        reason = error if error.__cause__ is None or isinstance(error, TransportError) else f"{error} {error.__cause__}"
        raise OSError(
            f"the connection to the Hub broke while {plan.repo_id} was written ({reason}): it holds all of the commit "
            "or nothing of it. Run the same command again; large files that have arrived are not sent twice"
        ) from error


def send(plan: Push, private: bool, message: str) -> str:
    """Make the commit; its hash."""
    api = HfApi(library_name="roe_llava")
    repo_id, branch = plan.repo_id, plan.branch
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    if private and not api.model_info(repo_id).private:
        raise ValueError(f"{repo_id} is there and public: make it private on its page, or give another id")
    if branch != "main":
        api.create_branch(repo_id, branch=branch, exist_ok=True)
    parent = api.model_info(repo_id, revision=branch).sha
    there = api.list_repo_files(repo_id, revision=parent)
    old = [name for name in there if REPLACED.fullmatch(name) and name not in plan.files]
    plan.notes += [f"deleted there: {', '.join(old)}"] if old else []
    operations = [CommitOperationDelete(path_in_repo=name) for name in old]
    operations += [CommitOperationAdd(path_in_repo=name, path_or_fileobj=one) for name, one in plan.files.items()]
    try:
        # Not upload_folder, which makes several commits of a large folder where Xet storage is used.
        done = api.create_commit(repo_id, operations, commit_message=message, revision=branch, parent_commit=parent)
    except HfHubHTTPError as error:
        if error.response.status_code == 412:
            raise OSError(f"somebody else committed to {repo_id} meanwhile: look at it, and run again") from error
        raise
    return done.oid


def default_message(plan: Push) -> str:
    what = "routing parts" if plan.folder.is_adapter else plan.folder.kind.title
    return f"Upload {what} with roe-llava push"


# ------------------------------------------------------------------------------------------------------- command line


def add_arguments(parser) -> None:
    """Arguments of the command."""
    parser.add_argument("folder", metavar="FOLDER", help="checkpoint of ours, or adapter file")
    parser.add_argument("repo_id", metavar="REPO_ID", help="owner/name; made if it is not there")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to commit to; made if it is not there")
    parser.add_argument("--private", action="store_true", help="make a private repository")
    parser.add_argument("--message", help="of the commit")
    parser.add_argument("--base", help="Hub id of the base of an adapter that names a folder; compared")
    parser.add_argument("--base-revision", help="revision of that base")
    parser.add_argument("--update-code", action="store_true", help="send the installed code, not the folder's")
    parser.add_argument("--leave-out", metavar="PATTERN", action="append", default=[], help="files that stay here")
    parser.add_argument("--dry-run", action="store_true", help="check everything, send nothing")


def run(args) -> None:
    """Run the command."""
    names = ("revision", "base", "base_revision", "update_code", "leave_out")
    plan = plan_push(args.folder, args.repo_id, **{name: getattr(args, name) for name in names})
    if args.dry_run:
        print(plan, f"dry run: nothing was sent to {plan.repo_id}", sep="\n")
        return
    commit = push(plan, private=args.private, message=args.message)
    print(plan, f"pushed to {plan.repo_id}, branch {plan.branch}, commit {commit}", sep="\n")
    print(f'  AutoModel.from_pretrained("{plan.repo_id}", trust_remote_code=True, revision="{commit}")')


__all__ = ["Push", "plan_push", "push"]
