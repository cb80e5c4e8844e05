"""`roe-llava card FOLDER`: the page of a model on the Hub, filled from its files and from results.

What nobody measured or recorded is said to be unknown. `template.md` holds the words, `about_layers` and
`about_experts` what differs between kinds of models, this module the rest.
"""

import ast
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import ModelCard

from ..adapter_roe import ABOUT_NAME
from ..convert.output import current_umask
from . import about_experts, about_layers
from .folder import CARD, ModelFolder, open_folder
from .metadata import base_on_page, check_card, find_licence, metadata
from .results import Results, collect
from .telling import NOT_MEASURED

TEMPLATE = Path(__file__).with_name("template.md")
PICTURE = "routes.png"
# What differs from kind to kind, by what its models decide.
ABOUT = {"layers": about_layers, "experts": about_experts}
NO_REPO = "OWNER/NAME"  # in the code of a card that was made before it was known where it goes
EMPTY = "[More Information Needed]"  # what Transformers' own card is full of

SNIPPET = """\
from huggingface_hub import model_info
from transformers import AutoModelForImageTextToText, AutoProcessor

repo_id = "{repo_id}"
revision = model_info(repo_id{branch}).sha  # write this commit down: it pins weights, processor and code
options = {{"revision": revision, "trust_remote_code": True}}
processor = AutoProcessor.from_pretrained({processor})
model = AutoModelForImageTextToText.from_pretrained(repo_id, **options)

question = [{{"type": "image", "path": "picture.png"}}, {{"type": "text", "text": "What is in the picture?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": question}}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
)
output = model.generate(**inputs.to(model.dtype), max_new_tokens=64, return_dict_in_generate=True)
print(processor.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""


@dataclass
class Card:
    """A card, and the pictures that it shows.

    Attributes:
        text: Markdown with metadata.
        pictures: name beside the card to a file, or to its content.
    """

    text: str
    pictures: dict[str, Path | bytes] = field(default_factory=dict)


def make_card(
    folder: ModelFolder,
    *,
    repo_id: str | None = None,
    revision: str | None = None,
    results: Sequence[str | Path] = (),
    licence: str | None = None,
    picture: str = PICTURE,
    code: Mapping[str, Path] | None = None,
) -> Card:
    """The card of a folder.

    Args:
        folder: the model or the adapter.
        repo_id: where it is, or shall be, on the Hub.
        revision: branch there.
        results: result files, those that `results.py` names; training.json in the folder is read anyway.
        licence: of the weights, where neither a file nor the base's card says it.
        picture: name of the route map as the card links it.
        code: name to place of the code files that go along; the folder's own if not given.
    Raises: ValueError if a result file is none, or the metadata would not be valid.
    """
    about = ABOUT[folder.kind.decides]
    source = ABOUT_NAME if folder.is_adapter else "config.json"
    found = collect(folder.training, source, [*folder.path.glob("training.json"), *map(Path, results)])
    image = map_of(found, folder)
    name = (repo_id or folder.path.resolve().name).rpartition("/")[2]
    known, where = (licence, "said by who made this card") if licence else find_licence(folder)
    card = ModelCard.from_template(
        metadata(folder, name, known, found.scores),
        template_path=str(TEMPLATE),
        name=name,
        intro=about.INTRO,
        summary=about.summary(folder),
        facts=about.facts(folder, found, known, where),
        loading=loading(folder),
        snippet=snippet(folder, repo_id, revision),
        usage=about.usage(folder),
        code=code_table(folder, code),
        data=about.data_text(folder, found.data),
        recipe=about.recipe_text(folder, source),
        accuracy="\n\n".join(found.accuracy) or f"Accuracy: {NOT_MEASURED}.",
        speed="\n\n".join(found.speed) or f"Speed: {NOT_MEASURED}.",
        decisions_title=about.DECISIONS,
        decisions=about.decisions_text(folder, found, image, picture),
        limits=about.limits(folder, found),
    )
    text = str(card).rstrip() + "\n"
    check_card(text, "the card")
    return Card(text, {} if image is None else {PICTURE: image})


# ------------------------------------------------------------------------------------------------------- code, picture


def loading(folder: ModelFolder) -> str:
    text = "Nothing needs to be installed but Transformers; the code comes with the weights, pinned by one commit."
    if folder.is_adapter:
        text += " The base is downloaded from its own repository, at the commit named above, and compared."
    return text


def snippet(folder: ModelFolder, repo_id: str | None, revision: str | None) -> str:
    """Python that asks the model about a picture, pinned to a commit."""
    has_processor = not folder.is_adapter or (folder.path / "processor_config.json").is_file()
    own = "repo_id, **options"
    base = f'"{base_on_page(folder) or "BASE"}", revision="{folder.base.get("revision")}"'
    branch = f', revision="{revision}"' if revision else ""
    return SNIPPET.format(repo_id=repo_id or NO_REPO, branch=branch, processor=own if has_processor else base)


def code_table(folder: ModelFolder, code: Mapping[str, Path] | None = None) -> list[tuple[str, str, str]]:
    """(name, hash, first sentence of its docstring) of every file of the code.

    Args:
        code: name to place of the files; the folder's own if not given, the installed ones where it has none.
    """
    rows = []
    for name, installed in folder.code_files().items():
        path = (code or {}).get(name, folder.path / name)
        content = (path if path.is_file() else installed).read_bytes()
        text = (ast.get_docstring(ast.parse(content)) or "").partition("\n\n")[0].replace("\n", " ")
        rows.append((name, code_hash(content), text.replace("|", "/")))
    return rows


def code_hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def listed_hashes(text: str) -> dict[str, str]:
    """Name to hash of the code files that a card lists."""
    return dict(re.findall(r"^\| `(\w+\.py)` \| `([0-9a-f]{16})` \|", text, flags=re.MULTILINE))


def map_of(found: Results, folder: ModelFolder) -> Path | bytes | None:
    """The picture of the routes: one drawn with the results, one in the folder, or one of the shares on record."""
    if found.picture is not None:
        return found.picture
    if (folder.path / PICTURE).is_file():
        return folder.path / PICTURE
    if found.shares:
        from .route_map import route_map  # matplotlib takes a while

        return route_map(found.shares)
    report = folder.path.parent / "report" / "layers_final.png"
    return report if report.is_file() else None


def is_unwritten(text: str) -> bool:
    """Whether a card is the empty one that Transformers pushes, or no more than metadata."""
    body = text.partition("---")[2].partition("---")[2] if text.startswith("---") else text
    return text.count(EMPTY) >= 5 or not body.strip()


# ------------------------------------------------------------------------------------------------------- command line


def write_card(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    **options,
) -> Path:
    """Write the card of a folder, with the picture it shows beside it.

    Args:
        out: file to write; README.md in the folder if not given.
        overwrite: replace a file that is there; an empty card of Transformers is always replaced.
        options: of `make_card`.
    Returns: the file.
    Raises: ValueError as `make_card`, or if the file is there.
    """
    opened = open_folder(folder)
    out = opened.path / CARD if out is None else Path(out)
    if not out.parent.is_dir():
        raise ValueError(f"{out.parent} is no folder: create it first")
    if out.is_dir():
        raise ValueError(f"{out} is a folder, expected the file to write: {out / CARD}?")
    if out.exists() and not overwrite and not is_unwritten(out.read_text(encoding="utf-8")):
        raise ValueError(f"{out} is there already: give another --out, or replace it (--overwrite)")
    card = make_card(opened, **options)
    for name, one in card.pictures.items():
        target = out.parent / name
        content = one if isinstance(one, bytes) else one.read_bytes()
        if target.exists() and target.read_bytes() != content and not overwrite:
            raise ValueError(f"{target} is there already, another picture: replace it (--overwrite)")
        put(target, content)
    put(out, card.text.encode())
    return out


def put(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_bytes(content)
        os.chmod(partial, 0o666 & ~current_umask())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def add_arguments(parser) -> None:
    """Arguments of the command."""
    parser.add_argument("folder", metavar="FOLDER", help="checkpoint of ours, or adapter file")
    parser.add_argument("--out", help="file to write (default: FOLDER/README.md)")
    parser.add_argument("--results", nargs="+", default=[], metavar="JSON", help="of demo, bench, or lmms-eval")
    parser.add_argument("--repo-id", help="owner/name on the Hub, for the code that loads it")
    parser.add_argument("--revision", help="branch there")
    parser.add_argument("--licence", help="of the weights, where neither a file nor the base's card says it")
    parser.add_argument("--overwrite", action="store_true", help="replace a card that is there")


def run(args) -> None:
    """Run the command."""
    names = ("repo_id", "revision", "results", "licence")
    options = {name: getattr(args, name) for name in names}
    print(f"wrote {write_card(args.folder, args.out, overwrite=args.overwrite, **options)}")
