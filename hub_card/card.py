"""`roe-llava card FOLDER`: the page of a model on the Hub, filled from its files and from results.

What nobody measured or recorded is said to be unknown. `template.md` holds the words, this module the facts.
"""

import ast
import hashlib
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import ModelCard

from ..adapter_roe import ABOUT_NAME
from ..convert.bases import code_of_adapter
from ..convert.folder_files import code_files
from ..convert.output import current_umask
from ..convert.source import read_json
from ..identity_roe import record_name
from .folder import CARD, ModelFolder, open_folder
from .metadata import base_on_page, check_card, find_licence, metadata
from .results import Results, collect

TEMPLATE = Path(__file__).with_name("template.md")
PICTURE = "routes.png"
UNKNOWN = "not known"
NOT_MEASURED = "not measured"
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
    training = folder.info.training or {}
    source = ABOUT_NAME if folder.is_adapter else "config.json"
    found = collect(training, source, [*folder.path.glob("training.json"), *map(Path, results)])
    image = map_of(found, folder)
    name = (repo_id or folder.path.resolve().name).rpartition("/")[2]
    known, where = (licence, "said by who made this card") if licence else find_licence(folder)
    card = ModelCard.from_template(
        metadata(folder, name, known, found.scores),
        template_path=str(TEMPLATE),
        name=name,
        summary=summary(folder),
        facts=facts(folder, found, known, where),
        loading=loading(folder),
        snippet=snippet(folder, repo_id, revision),
        budget=budget(folder),
        code=code_table(folder, code),
        data=data_text(folder, training, found.data),
        recipe=recipe_text(training, source),
        accuracy="\n\n".join(found.accuracy) or f"Accuracy: {NOT_MEASURED}.",
        speed="\n\n".join(found.speed) or f"Speed: {NOT_MEASURED}.",
        routes=routes_text(found, image, picture),
        limits=limits(folder, found),
    )
    text = str(card).rstrip() + "\n"
    check_card(text, "the card")
    return Card(text, {} if image is None else {PICTURE: image})


# -------------------------------------------------------------------------------------------------------------- facts


def summary(folder: ModelFolder) -> str:
    """What the repository holds, in a sentence or two."""
    if folder.is_adapter:
        return "This repository holds routers, adapters and routing tokens alone; the base is had from its own place."
    if is_base_tuned(folder):
        return "The base's weights were trained too, so with every layer kept it is not the LLaVA it was made from."
    if is_base_untouched(folder):
        return "With every layer kept it is the LLaVA it was made from."
    return "Whether its base weights are those of a published LLaVA is not recorded."


def is_base_untouched(folder: ModelFolder) -> bool:
    """Whether the base weights are recorded to be those of the base; a tuned base has no fingerprint."""
    return bool(folder.base.get("fingerprint"))


def is_base_tuned(folder: ModelFolder) -> bool:
    return (folder.info.training or {}).get("train_base") in ("full", "lora")


def facts(folder: ModelFolder, found: Results, licence: str | None, where: str) -> list[tuple[str, str]]:
    """Rows of the table at the top."""
    info = folder.info
    routed = "all" if info.routed_layers is None else ", ".join(map(str, info.routed_layers)) or "none"
    added = sum(math.prod(tensor.shape) for tensor in folder.parts.values())
    total = base_parameters(folder)
    share = f", {added / total:.1%} of the base's {total:,}" if total else ""
    skips = [f"{share:.1%} ({on})" for share, on in found.skips]
    return [
        ("base", base_text(folder)),
        ("licence", f"{licence} ({where})" if licence else f"{UNKNOWN}: {where}; ask who made the base"),
        ("decoder layers", f"{info.num_hidden_layers}, routed: {routed}"),
        ("adapter width", str(info.adapter_size)),
        ("parameters added", f"{added:,}{share}"),
        ("skip target", f"{info.target_skip_ratio:.1%} of (example, layer) pairs"),
        ("realised skip", "; ".join(skips) or NOT_MEASURED),
    ]


def base_text(folder: ModelFolder) -> str:
    """The base, where it is, and whether its weights are untouched."""
    base = folder.base
    state = "its weights as they are" if is_base_untouched(folder) else f"state of its weights {UNKNOWN}"
    if is_base_tuned(folder):
        state = f"its weights trained too ({folder.info.training['train_base']})"
    if base_id := base_on_page(folder):
        return f"[{base_id}](https://huggingface.co/{base_id}) at commit `{base['revision']}`, {state}"
    if not base.get("id"):
        return f"{UNKNOWN}, {state}"
    mark = f", fingerprint `{base['fingerprint'][:16]}`" if base.get("fingerprint") else ""
    return f"`{record_name(base)}`, no repository on the Hub{mark}; {state}"


def base_parameters(folder: ModelFolder) -> int:
    """Parameters of the base; 0 if they are not known."""
    if folder.is_adapter:
        kinds = ((folder.info.base or {}).get("tensors") or {}).values()
        shapes = [[int(one) for one in kind.partition("[")[2].partition("]")[0].split(",") if one] for kind in kinds]
        return sum(map(math.prod, shapes))
    return sum(math.prod(tensor.shape) for tensor in folder.checkpoint.tensors.values()) - sum(
        math.prod(tensor.shape) for tensor in folder.parts.values()
    )


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


def budget(folder: ModelFolder) -> str:
    """Whether `skip_ratio` can be asked for."""
    table = folder.info.skip_calibration
    if not table:
        return "`generate(skip_ratio=...)` needs a calibration, which this model has not."
    ratios = table["skip_ratio"]
    return (
        f"`generate(skip_ratio=...)` takes a share from {min(ratios):.0%} to {max(ratios):.0%}, calibrated on "
        f"{table.get('questions', 'an unknown number of')} prompts; 0.0 keeps every layer."
    )


def code_table(folder: ModelFolder, code: Mapping[str, Path] | None = None) -> list[tuple[str, str, str]]:
    """(name, hash, first sentence of its docstring) of every file of the code.

    Args:
        code: name to place of the files; the folder's own if not given, the installed ones where it has none.
    """
    rows = []
    known = code_of_adapter(folder.info.base) if folder.is_adapter else code_files(folder.config)
    for name, installed in known.items():
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


# ----------------------------------------------------------------------------------------------------------- training


def data_text(folder: ModelFolder, training: dict, known: str | None) -> str:
    """What it was trained on, from the summary, or, of one that does not name it, the record beside the folder."""
    record = folder.path.parent / "run.json"
    data = (read_json(record).get("data") or {}) if record.is_file() else {}
    data = {"data": training["data"]} if isinstance(training.get("data"), str) else data
    number = training.get("examples")
    if number is None and {"steps", "batch_size"} <= training.keys():
        number = training["steps"] * training["batch_size"]
    count = f"{number:,} examples" if number else f"number of examples {UNKNOWN}"
    if known is not None:
        return f"{known}; {count}."
    if file := data.get("data"):
        return f"`{Path(file).name}`: {count}. Its licence is {UNKNOWN} to this card."
    return f"{count[0].upper()}{count[1:]}; the record that came with the weights does not name the data."


def is_plain(value) -> bool:
    """Whether a recorded value fits into a cell."""
    return isinstance(value, str | int | float) and value != ""


def recipe_text(training: dict, source: str) -> str:
    """The summary of the training as a table of its plain entries, sections opened one level."""
    entries = []
    for name, value in training.items():
        if name == "data":  # above the table
            continue
        if name in ("routing", "training", "versions", "learning_rates") and isinstance(value, dict):
            entries += [(f"{name}.{part}", one) for part, one in value.items()]
        else:
            entries.append((name, value))
    rows = [(name, f"{one:.6g}" if isinstance(one, float) else one) for name, one in entries if is_plain(one)]
    if not rows:
        return f"How it was trained is {UNKNOWN}: no summary came with the weights."
    lines = [f"As recorded in `{source}`:", "", "| | |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {str(value).replace('|', '/')} |" for name, value in rows)])


# ------------------------------------------------------------------------------------------------------ routes, limits


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


def routes_text(found: Results, image, picture: str) -> str:
    lines = [*found.routes]
    if image is not None:
        lines.append(f"![Which decoder layers run]({picture})")
    if found.shares:
        rows = [
            f"| `{route}` | {share:.1%} |" for route, share in sorted(found.shares.items(), key=lambda one: -one[1])
        ]
        lines.append("\n".join(["| route, layer 0 first | share of the questions |", "|---|---:|", *rows[:8]]))
    return "\n\n".join(lines) or f"Routes: {NOT_MEASURED}."


def limits(folder: ModelFolder, found: Results) -> list[str]:
    """What the model does not do, and what nobody has looked at."""
    unknown = [
        *(["Accuracy was not measured: compare it with the base on your own task first."] * (not found.accuracy)),
        *(["Speed was not measured; `roe-llava bench` does that."] * (not found.speed)),
        *(["How much is skipped was not measured."] * (not found.skips)),
    ]
    return [
        *unknown,
        *(["Times hold for the machine named beside them."] * bool(found.speed)),
        "Layer 0 decides before its routing tokens have read anything, so its decision is the same for every input.",
        "Attention: eager, sdpa and flex attention; FlashAttention is refused.",
        "No chunked prefill, continuous batching, packed prompts or `guidance_scale`: a route is decided from the "
        "whole prompt, one per row.",
        "In a batch every row runs its own layers, but a layer's weights are read as soon as one row needs them.",
        "It answers as wrongly, and with the same biases, as its base does; skipping can add errors on inputs unlike "
        "those it was trained on.",
    ]


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
    parser.add_argument("folder", metavar="FOLDER", help="RoE checkpoint or adapter file")
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
