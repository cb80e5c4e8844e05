"""A model folder without RoE: the config, processor and tokenizer of the base inside a RoE checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile

from ..configuration_frontend import STOCK_PROJECTOR, FrontendLlavaConfig
from ..configuration_roe import BAKED_FIELDS, ROUTING_FIELDS
from ..loading_frontend import FRONTEND_AUTO_MAP
from .bases import ROUTED, routed_kind
from .code_files import copy_code, frontend_code
from .folder_files import COMPANIONS, OWN, WEIGHT_SUFFIXES
from .kinds import kind_of
from .output import write_json
from .source import read_json

# Files that name the processor's class and code.
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


def stock_config(config: dict) -> dict:
    """config.json of a RoE checkpoint as its base's: without routing fields, provenance and code of RoE."""
    own = {*ROUTING_FIELDS, *BAKED_FIELDS, "projector_type", "auto_map"}
    kept = {name: value for name, value in config.items() if name not in own and not name.startswith("roe_")}
    kind = routed_kind(config)
    base_type, base_class = kind.base_type(config), kind.base_class(config)
    kept |= {"model_type": base_type, "architectures": [base_class.__name__]}
    if (own_kind := kind_of(base_type)) is not None:
        return kept | {"auto_map": own_kind.auto_map}
    if base_type != FrontendLlavaConfig.model_type:
        return kept
    return kept | {
        "auto_map": FRONTEND_AUTO_MAP,
        "projector_type": config.get("projector_type", STOCK_PROJECTOR),
    }


def stock_processor(content):
    """A processor or tokenizer file as the base's: its class by the stock name, no code."""
    if isinstance(content, list):
        return [stock_processor(one) for one in content]
    if not isinstance(content, dict):
        return content
    kept = {name: stock_processor(value) for name, value in content.items() if name != "auto_map"}
    stock_names = {kind.processor.__name__: kind.stock_processor for kind in ROUTED.values()}
    if (named := kept.get("processor_class")) in stock_names:
        kept["processor_class"] = stock_names[named]
    return kept


def base_code(config: dict) -> dict[str, Path]:
    """Name to place of the code that a base's folder carries, by its config.json; a stock one has none."""
    if (own_kind := kind_of(config["model_type"])) is not None:
        return own_kind.code_files()
    return frontend_code() if config["model_type"] == FrontendLlavaConfig.model_type else {}


@dataclass
class StockFiles:
    """Files of a stock folder beside its weights.

    Attributes:
        folder: of the RoE checkpoint.
        copied: files to copy.
        written: file name to content of those that name RoE.
        dropped: what is left behind, name to reason.
    """

    folder: Path
    copied: list[Path]
    written: dict[str, dict]
    dropped: dict[str, str]

    def write(self, target: Path) -> None:
        """Put them into a folder."""
        for path in self.copied:
            copy = target / path.relative_to(self.folder)
            copy.parent.mkdir(exist_ok=True)
            copyfile(path, copy)
        for name, content in self.written.items():
            write_json(target / name, content)
        copy_code(base_code(self.written["config.json"]), target)


def find_stock_files(folder: Path, config: dict, used) -> StockFiles:
    """What a stock folder needs of a RoE checkpoint beside weights.

    Args:
        folder: of the RoE checkpoint.
        config: content of its config.json.
        used: names of its weight files, which are copied elsewhere.
    """
    written = {"config.json": stock_config(config)}
    for name in PROCESSOR_FILES:
        if (folder / name).is_file() and (content := read_json(folder / name)) != (stock := stock_processor(content)):
            written[name] = stock
    copied = {path for pattern in COMPANIONS for path in folder.glob(pattern) if path.is_file()}
    copied -= {path for pattern in OWN for path in folder.glob(pattern)} | {folder / name for name in written}
    if "processor_config.json" not in written and (folder / "processor_config.json").is_file():
        copied.add(folder / "processor_config.json")
    dropped, code = {}, base_code(written["config.json"])
    for path in sorted(folder.iterdir()):
        is_index = path.name.endswith(".index.json")
        if path.is_dir() or path.name.startswith(".") or path.name in used or path in copied or is_index:
            continue
        if path.name in code:  # written anew
            continue
        if path.suffix == ".py":
            dropped[path.name] = "code of RoE, which the base does without"
        elif path.name.endswith(WEIGHT_SUFFIXES):
            dropped[path.name] = "weights in a second format"
        elif path.name not in written:
            dropped[path.name] = "belongs to the RoE checkpoint alone"
    return StockFiles(folder, sorted(copied), written, dropped)
