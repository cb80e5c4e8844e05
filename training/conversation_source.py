"""Sources of training data, read into well-formed rows and the bad ones: files, folders and `datasets.Dataset`s.

Rows are kept as Arrow tables, not as Python objects: worker processes share them, and they are compact.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from torch.utils.data import Dataset
from tqdm import tqdm

from .bad_rows import BadRow, RowError
from .chat_prompt import ChatPrompt
from .conversation_rows import ROW_FIELDS, chat_of_row, check_files

FILES = (".json", ".jsonl", ".parquet")
PARTS = ("rows", "places")


class Conversations(Dataset):
    """Rows that are known to be well formed, as a map-style dataset; see `load_conversations`.

    An example is {"file", "index", "id": where it comes from, "messages": chat messages, "images": paths or bytes}.
    It pickles, so worker processes of any kind can read it.

    Args:
        rows: a `datasets.Dataset` in LLaVA's or chat form.
        places: one with columns file, index and id, row by row.
        prompt: what the chat template does.
        image_folder: where relative image paths begin.
    """

    def __init__(self, rows, places, prompt: ChatPrompt, image_folder: Path):
        self.features = without_decoding(rows.features)
        self.rows, self.places = rows.with_format("arrow"), places
        self.prompt, self.image_folder = prompt, image_folder

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        row = self.features.decode_example(self.rows[index].to_pylist()[0])
        return {**self.places[index], **chat_of_row(row, self.prompt, self.image_folder)}

    def select(self, positions: Sequence[int]) -> "Conversations":
        """Some of the rows, in this order."""
        rows, places = self.rows.select(positions), self.places.select(positions)
        return Conversations(rows, places, self.prompt, self.image_folder)


def read_source(source, image_folder, prompt: ChatPrompt) -> tuple[Conversations, list[BadRow]]:
    """Well-formed rows of a source, and the others."""
    library = datasets_library()
    if isinstance(source, (library.DatasetDict, library.IterableDataset, library.IterableDatasetDict)):
        raise ValueError(
            f"expected one datasets.Dataset, got a {type(source).__name__}: choose a split, e.g. dataset['train'], and "
            "load it whole"
        )
    if isinstance(source, library.Dataset):
        return rows_of_dataset(source, "dataset", Path(image_folder or Path.cwd()), prompt)
    source = Path(source)
    folder = Path(image_folder or (source if source.is_dir() else source.parent)).absolute()
    if not folder.is_dir():
        raise ValueError(f"the image folder {folder} does not exist")
    if (source / "dataset_dict.json").is_file():
        splits = json.loads((source / "dataset_dict.json").read_text())["splits"]
        raise ValueError(
            f"{source} holds several splits: name one, {' or '.join(str(source / name) for name in splits)}"
        )
    if (source / "state.json").is_file():
        return rows_of_dataset(library.load_from_disk(str(source)), str(source), folder, prompt)
    parts = [rows_of_file(file, folder, prompt) for file in files_of(source)]
    rows, places = (library.concatenate_datasets([getattr(part, name) for part, _ in parts]) for name in PARTS)
    return Conversations(rows, places, prompt, folder), [row for _, bad in parts for row in bad]


def files_of(source: Path) -> list[Path]:
    """The data files a path stands for.

    Raises: ValueError if there are none, or they have different formats.
    """
    if not source.exists():
        raise ValueError(f"{source} does not exist")
    files = sorted(file for file in source.iterdir() if file.suffix in FILES) if source.is_dir() else [source]
    if not files or any(file.suffix not in FILES for file in files):
        raise ValueError(f"{source}: expected a file or a folder of files that end in {', '.join(FILES)}")
    if len({file.suffix == ".parquet" for file in files}) > 1:
        raise ValueError(f"{source} holds both .parquet and JSON files: keep them in folders of their own")
    return files


def rows_of_file(file: Path, folder: Path, prompt: ChatPrompt) -> tuple[Conversations, list[BadRow]]:
    if file.suffix != ".parquet":
        return rows_of_json(file, folder, prompt)
    try:
        rows = datasets_library().Dataset.from_parquet(str(file))
    except Exception as error:  # whatever the libraries below make of a damaged file
        raise ValueError(f"{file} cannot be read: {type(error).__name__}: {error}") from error
    return rows_of_dataset(rows, str(file), folder, prompt)


def rows_of_json(file: Path, folder: Path, prompt: ChatPrompt) -> tuple[Conversations, list[BadRow]]:
    """Rows of a JSON file. They are kept as Arrow, not as Python objects: workers share it, and it is compact."""
    library = datasets_library()
    good, bad = [], []
    for place, chat in checked_rows(str(file), json_rows(file), folder, prompt):
        (bad if isinstance(chat, BadRow) else good).append(chat if isinstance(chat, BadRow) else (place, chat))
    text = library.Value("string")
    part = {"type": text, "text": text}
    rows = library.Dataset.from_dict(
        {
            "messages": [
                [{**said, "content": [with_text(part) for part in said["content"]]} for said in chat["messages"]]
                for _, chat in good
            ],
            "images": [
                [image if isinstance(image, str) else image["path"] for image in chat["images"]] for _, chat in good
            ],
        },
        features=library.Features({"messages": [{"role": text, "content": [part]}], "images": [text]}),
    )
    return Conversations(rows, places_of(place for place, _ in good), prompt, folder), bad


def with_text(part: dict) -> dict:
    """A content part with every column of the table."""
    return {"text": None, **part}


def rows_of_dataset(dataset, name: str, folder: Path, prompt: ChatPrompt) -> tuple[Conversations, list[BadRow]]:
    """Rows of a `datasets.Dataset`, left as they are stored.

    Raises: ValueError if it has neither conversations nor messages.
    """
    fields = [column for column in ROW_FIELDS if column in dataset.column_names]
    if not {"conversations", "messages"} & set(fields):
        raise ValueError(f"{name} has columns {dataset.column_names}, expected messages (and images) or conversations")
    dataset = dataset.select_columns(fields)
    features = without_decoding(dataset.features)
    stored = dataset.with_format("arrow")
    rows = (features.decode_example(stored[index].to_pylist()[0]) for index in range(len(stored)))
    good, bad = [], []
    for place, chat in checked_rows(name, enumerate(rows), folder, prompt, len(stored)):
        (bad if isinstance(chat, BadRow) else good).append(chat if isinstance(chat, BadRow) else place)
    if bad:
        dataset = dataset.select([place["index"] for place in good])
    return Conversations(dataset, places_of(good), prompt, folder), bad


def checked_rows(
    file: str, rows: Iterable[tuple[int, dict]], folder: Path, prompt: ChatPrompt, total: int | None = None
) -> Iterator[tuple[dict, dict | BadRow]]:
    """Every row's place, and its chat or what is wrong with it as far as its structure and file names tell."""
    for index, row in tqdm(rows, desc=f"reading {Path(file).name}", total=total):
        known = row.get("id") if isinstance(row, dict) else None
        place = {"file": file, "index": index, "id": None if known is None else str(known)}
        try:
            if isinstance(row, RowError):
                raise row
            chat = chat_of_row(row, prompt, folder)
            check_files(chat["images"])
            yield place, chat
        except RowError as error:
            yield place, BadRow(**place, reason=error.reason, detail=error.detail)


def json_rows(file: Path) -> Iterator[tuple[int, object]]:
    """Rows of a JSON list, or of a file with one per line, with their indices; a `RowError` for a line that is no JSON.

    Raises: ValueError if a .json file is not a list of rows, or it is not text.
    """
    try:
        if file.suffix == ".jsonl":
            with file.open(encoding="utf-8") as lines:
                yield from ((index, line_row(line)) for index, line in enumerate(lines) if line.strip())
            return
        rows = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON: {error}. A file with one row per line must be named .jsonl") from error
    if not isinstance(rows, list):
        raise ValueError(f"{file} must hold a list of rows, got {type(rows).__name__}")
    yield from enumerate(rows)


def line_row(line: str):
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return RowError("not JSON", str(error))


# ---------------------------------------- tables


def places_of(places: Iterable[dict]):
    """The table beside the rows that says where each comes from."""
    library, places = datasets_library(), list(places)
    kinds = {"file": library.Value("string"), "index": library.Value("int64"), "id": library.Value("string")}
    columns = {name: [place[name] for place in places] for name in kinds}
    return library.Dataset.from_dict(columns, features=library.Features(kinds))


def without_decoding(features):
    """The features of a `datasets.Dataset` with images left as they are stored."""
    library = datasets_library()

    def plain(feature):
        if isinstance(feature, dict):
            return {name: plain(inner) for name, inner in feature.items()}
        if isinstance(feature, list):
            return [plain(inner) for inner in feature]
        if isinstance(feature, (library.List, library.LargeList)):
            return type(feature)(plain(feature.feature))
        return library.Image(decode=False) if isinstance(feature, library.Image) else feature

    return library.Features(plain(dict(features)))


def datasets_library():
    """The package `datasets`.

    Raises: ValueError if it is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError("training data needs the package datasets: pip install 'roe-llava[train]'") from error
    return datasets


__all__ = ["Conversations", "datasets_library", "read_source"]
