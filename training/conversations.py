"""Training data in the formats people have: LLaVA's conversation JSON, and `datasets` in chat-message form.

    conversations, bad = load_conversations("train.json", "images", processor=processor, max_length=2048)
    trainer = RoeTrainer(model, ..., train_dataset=conversations, data_collator=ConversationCollator(processor, 2048))

Rows hold paths or bytes; an image is opened when its batch is made. `TrainingArguments` need
`remove_unused_columns=False`, as with any collator that reads columns the model does not know.
"""

import contextlib
import io
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import PIL.Image
import PIL.ImageFile
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers.image_utils import load_image
from transformers.utils import logging

from .bad_rows import BadRow, BadRows, RowError, place_text
from .chat_prompt import chat_prompt
from .conversation_source import Conversations, datasets_library, read_source
from .data import ChatCollator

logger = logging.get_logger(__name__)

CHECKS = ("full", "structure")
ON_BAD = ("fatal", "skip")


class ConversationCollator(ChatCollator):
    """Turns examples of `Conversations` into a training batch; images are opened here, so in a DataLoader's workers.

    Args:
        processor: a `RoeLlavaProcessor` with a chat template.
        max_length: most tokens of an example, images written out; `None` for any number. Nothing is ever cut.
    """

    def __init__(self, processor, max_length: int | None = None):
        super().__init__(processor, opened_chat)
        self.max_length = max_length

    def __call__(self, examples: Sequence[dict]) -> dict:
        """As `ChatCollator`.

        Raises: ValueError naming the row whose image cannot be opened, or that is too long.
        """
        try:
            return self.batch_of(examples)
        except RowError as error:  # plain, so that it survives the way out of a worker process
            raise ValueError(
                f"{error}. Repair it; load_conversations(..., check='full') finds such rows before training"
            ) from error

    def batch_of(self, examples: Sequence[dict]) -> dict:
        """The batch. Raises: RowError."""
        batch = super().__call__(examples)
        for example, length in zip(examples, batch["attention_mask"].sum(dim=1).tolist(), strict=True):
            if self.max_length is not None and length > self.max_length:
                detail = f"{length} tokens with its images written out, max_length is {self.max_length}"
                raise RowError("too long", detail, place_of(example))
        return batch


def load_conversations(
    source,
    image_folder: str | Path | None = None,
    *,
    processor,
    max_length: int | None = None,
    on_bad: str = "fatal",
    check: str = "full",
    workers: int = 0,
) -> tuple[Conversations, BadRows]:
    """Reads training data and checks every row before training begins.

    In a distributed run every process calls it: each makes its share of the full check, and all agree on the result.

    Args:
        source: LLaVA's conversation .json or .jsonl; a `datasets.Dataset` with `messages` (and `images`), or a
            .parquet, .json or .jsonl file of that form; a folder of `save_to_disk`, or of such files.
        image_folder: where relative image paths begin; by default the folder of the file that names them, and the
            working directory for a dataset in memory.
        processor: a `RoeLlavaProcessor` whose chat template closes answers; see `close_answers`.
        max_length: most tokens of a conversation, images written out; `None` for any number. Nothing is ever cut.
        on_bad: `"fatal"` raises for bad rows, `"skip"` leaves them out and warns.
        check: `"full"` makes every row ready as training will, so images are decoded and tokens counted;
            `"structure"` leaves that out. Then a broken image or a row that is too long stops training where it is
            met, whatever `on_bad` says: a batch that shrinks in one process of several would shift the loss.
        workers: worker processes of the full check; 0 for none.
    Returns: the good rows, and the report on the others.
    Raises: ValueError for bad rows if they are fatal, for a source that cannot be read or has no good row, for a
        template that cannot be used, and if the package `datasets` is missing.
    """
    check_choice("on_bad", on_bad, ON_BAD)
    check_choice("check", check, CHECKS)
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length must be at least 1, or None for no limit; got {max_length}")
    conversations, bad = read_source(source, image_folder, chat_prompt(processor))
    total, bad = len(conversations) + len(bad), agreed(bad)
    conversations = without(conversations, bad)
    if check == "full":
        found = agreed(full_check(conversations, ConversationCollator(processor, max_length), workers))
        conversations, bad = without(conversations, found), bad + found
    report = BadRows(total, sorted(bad, key=lambda row: (row.file, row.index)))
    if on_bad == "fatal":
        report.check()
    if not len(conversations):
        raise ValueError(f"{source} has no row to train with. {report.summary()}")
    if len(report):
        logger.warning(f"{report.summary()}\nThey are left out")
    return conversations, report


def split_conversations(
    conversations: Conversations, share: float, seed: int = 0
) -> tuple[Conversations, Conversations]:
    """Training and validation part, drawn by row.

    Args:
        share: of the rows, for validation, in (0, 1).
    Raises: ValueError, by `datasets`, if a part would be empty.
    """
    positions = datasets_library().Dataset.from_dict({"position": range(len(conversations))})
    parts = positions.train_test_split(test_size=share, seed=seed)
    return tuple(conversations.select(parts[name]["position"]) for name in ("train", "test"))


# ---------------------------------------- opening, the full check


def opened_chat(example: dict) -> list[dict]:
    """Chat messages with their images inside, opened.

    Raises: RowError for a missing or broken image.
    """
    images = iter(example["images"])
    return [
        {
            "role": said["role"],
            "content": [
                {**part, "image": opened_image(next(images), place_of(example))} if part["type"] == "image" else part
                for part in said["content"]
            ],
        }
        for said in example["messages"]
    ]


def opened_image(image: str | dict, place: str) -> PIL.Image.Image:
    """An image, decoded whole, upright, in RGB."""
    path, content = (image, None) if isinstance(image, str) else (image["path"], image["bytes"])
    try:
        with whole_images(), PIL.Image.open(path if content is None else io.BytesIO(content)) as opened:
            return load_image(opened)
    except FileNotFoundError as error:
        raise RowError("missing image", f"no file {path}", place) from error
    except Exception as error:  # Pillow's decoders raise nearly anything for damaged bytes; all of it is reported
        shown = f"{len(content)} stored bytes" if content is not None else path
        raise RowError("broken image", f"{shown}: {type(error).__name__}: {error}", place) from error


@contextlib.contextmanager
def whole_images() -> Iterator[None]:
    """Truncated images are errors, although some libraries (lmms-eval) have Pillow fill them with grey for all."""
    setting = PIL.ImageFile.LOAD_TRUNCATED_IMAGES
    PIL.ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        PIL.ImageFile.LOAD_TRUNCATED_IMAGES = setting


def full_check(conversations: Conversations, collate: ConversationCollator, workers: int) -> list[BadRow]:
    """Rows of this process's share that cannot be made into a batch."""
    rank, world = distributed()
    positions = range(rank, len(conversations), world)
    loader = DataLoader(
        positions,
        batch_size=8,
        num_workers=workers,
        collate_fn=RowCheck(conversations, collate),
        generator=torch.Generator(),  # else it would draw from the global one and change the run that follows
    )
    found = tqdm(loader, desc="decoding and counting tokens", disable=rank > 0)
    return list(itertools.chain.from_iterable(found))


class RowCheck:
    """Positions -> the bad rows among them; a class so that it can be sent to a worker process."""

    def __init__(self, conversations: Conversations, collate: ConversationCollator):
        self.conversations, self.collate = conversations, collate

    def __call__(self, positions: Sequence[int]) -> list[BadRow]:
        examples = [self.conversations[position] for position in positions]
        try:
            self.collate.batch_of(examples)  # twice as fast as one by one, and nearly always right
        except Exception:  # sorted out below, row by row
            return [bad for example in examples if (bad := self.bad_row(example)) is not None]
        return []

    def bad_row(self, example: dict) -> BadRow | None:
        place = {name: example[name] for name in ("file", "index", "id")}
        try:
            self.collate.batch_of([example])
        except RowError as error:
            return BadRow(**place, reason=error.reason, detail=error.detail)
        except MemoryError:
            raise
        except Exception as error:  # whatever image processor, tokenizer and template raise; all of it is reported
            return BadRow(**place, reason="refused by the processor", detail=f"{type(error).__name__}: {error}")
        return None


# ---------------------------------------- small things


def place_of(example: dict) -> str:
    return place_text(example["file"], example["index"], example["id"])


def without(conversations: Conversations, bad: list[BadRow]) -> Conversations:
    """The rows that are not among the bad ones."""
    if not bad:
        return conversations
    out = {(row.file, row.index) for row in bad}
    places = zip(conversations.places["file"], conversations.places["index"], strict=True)
    return conversations.select([position for position, place in enumerate(places) if place not in out])


def distributed() -> tuple[int, int]:
    """This process's rank and the number of processes."""
    group = torch.distributed
    return (group.get_rank(), group.get_world_size()) if group.is_available() and group.is_initialized() else (0, 1)


def agreed(bad: list[BadRow]) -> list[BadRow]:
    """The bad rows that any process found: all of them train on the same rows."""
    _, world = distributed()
    if world == 1:
        return bad
    found = [None] * world
    torch.distributed.all_gather_object(found, bad)
    return list({(row.file, row.index): row for part in found for row in part}.values())


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


__all__ = ["ConversationCollator", "Conversations", "load_conversations", "split_conversations"]
