"""Training data: LLaVA's JSON and chat datasets become the same batches, and no row is lost without a word."""

import json
import pickle
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_processor
from datasets import Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from tiny import picture
from torch.utils.data import DataLoader
from transformers import LlavaProcessor, TrainingArguments

from roe_llava import RoeLlavaProcessor
from roe_llava.examples.tiny_world import export, world
from roe_llava.examples.tiny_world.processor import build_processor
from roe_llava.training.bad_rows import REASONS
from roe_llava.training.chat_prompt import close_answers
from roe_llava.training.conversations import ConversationCollator, load_conversations, split_conversations
from roe_llava.training.data import ChatCollator
from roe_llava.training.objective import Objective
from roe_llava.training.schedule import StageSchedule
from roe_llava.training.trainer import RoeTrainer


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def row(*said, image=None, **fields):
    """A row in LLaVA's format."""
    return fields | ({} if image is None else {"image": image}) | {"conversations": list(said)}


CIRCLE = row(human("<image>\nwhat colour is the circle?"), gpt("red"), image="0.png", id="circle")
TURNS = row(
    human("<image>\nwhat colour is the circle?"),
    gpt("red"),
    human("how many squares?"),
    gpt("two squares"),
    human("where is it?"),
    gpt("left of it"),
    image="1.png",
    id="turns",
)
TWO_IMAGES = row(human("<image>\n<image>\nwhere is it?"), gpt("left"), image=["0.png", "2.png"], id="two")
TEXT = row(human("how many squares?"), gpt("two"), id="text")
SYSTEM = row({"from": "system", "value": "A helpful A."}, human("how many?"), gpt("two"), id="system")
GOOD = [CIRCLE, TURNS, TWO_IMAGES, TEXT, SYSTEM]


@pytest.fixture
def folder(tmp_path):
    """A folder of images: three good ones, one cut short, one that is none, one on its side."""
    for seed in range(3):
        Image.fromarray(picture(seed)).save(tmp_path / f"{seed}.png")
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "short.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no picture")
    return tmp_path


def write(folder, rows, name="train.json"):
    """The rows as a file."""
    lines = "\n".join(json.dumps(one) for one in rows) if name.endswith(".jsonl") else json.dumps(rows)
    (folder / name).write_text(lines)
    return folder / name


def load(folder, rows, processor, **options):
    return load_conversations(write(folder, rows), processor=processor, **options)


def batch_of(conversations, processor, **options):
    return ConversationCollator(processor, **options)([conversations[i] for i in range(len(conversations))])


def assert_equal(ours, others):
    assert set(ours) == set(others)
    for name in others:
        assert torch.equal(ours[name], others[name]), name


def answers_in(processor, batch, index):
    """The labelled stretches of a row as text, blanks aside."""
    found, last = [], -100
    for label in batch["labels"][index].tolist():
        if label != -100:
            found += [[]] if last == -100 else []
            found[-1].append(label)
        last = label
    return ["".join(processor.tokenizer.decode(ids).split()) for ids in found]


def question_in(processor, batch, index, turn):
    ids = batch["input_ids"][index][batch["routing_segments"][index] == turn]
    return "".join(processor.tokenizer.decode(ids).split())


# ---------------------------------------- prompts


def prompt_of(one):
    """The prompt LLaVA-1.5 makes of a row: images first in their message, one per line, the rest stripped."""
    text = ""
    for said in one["conversations"]:
        value, number = said["value"], said["value"].count("<image>")
        if number:
            value = "<image>\n" * number + value.replace("<image>", "").strip()
        text += {"system": f"{value} ", "human": f"USER: {value} ", "gpt": f"ASSISTANT: {value}</s>"}[said["from"]]
    return text


PLACEMENTS = {
    "in front": "<image>\nwhat is it?",
    "in front without a newline": "<image>what is it?",
    "behind": "what is it?\n<image>",
    "in the middle": "what <image> is it?",
    "twice": "<image>\nwhat is <image>\nit?",
    "alone": "<image>",
    "blanks kept": "how  many squares? ",
}


@pytest.mark.parametrize("question", PLACEMENTS.values(), ids=PLACEMENTS)
def test_a_row_gives_the_tokens_of_llavas_own_prompt(folder, processor, question):
    images = [f"{number}.png" for number in range(question.count("<image>"))]
    one = row(human(question), gpt("red "), human("how many?"), gpt("two"), image=images)
    batch = batch_of(load(folder, [one], processor)[0], processor)
    opened = [Image.open(folder / name) for name in images]
    written = processor(images=opened or None, text=prompt_of(one), return_labels=True, return_tensors="pt")
    assert_equal(batch, written.data)


@pytest.mark.parametrize("one", GOOD, ids=lambda one: one["id"])
def test_every_kind_of_row_gives_the_tokens_of_llavas_own_prompt(folder, word_processor, one):
    batch = batch_of(load(folder, [one], word_processor)[0], word_processor)
    written = word_processor.tokenizer(prompt_of(one).replace("<image>", "<image>" * 4))
    assert batch["input_ids"].tolist() == [written["input_ids"]]


IN_PLACE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for part in message['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{{ eos_token if message['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@pytest.mark.parametrize("question", PLACEMENTS.values(), ids=PLACEMENTS)
def test_images_stay_in_place_where_the_template_leaves_them_there(folder, question):
    processor = make_processor(chat_template=IN_PLACE)
    images = [f"{number}.png" for number in range(question.count("<image>"))]
    conversations, _ = load(folder, [row(human(question), gpt("red"), image=images)], processor)
    shown = processor.apply_chat_template(conversations[0]["messages"][:1]).removeprefix("USER: ").removesuffix(" ")
    assert shown == question.replace("<image>\n", "<image>").replace("<image>", "<image>\n")
    assert batch_of(conversations, processor).get("pixel_values", torch.empty(0)).shape[0] == len(images)


def test_images_come_in_the_order_of_their_placeholders(folder, word_processor):
    batch = batch_of(load(folder, GOOD, word_processor)[0], word_processor)
    names = ["0.png", "1.png", "0.png", "2.png"]
    alone = word_processor(images=[Image.open(folder / name) for name in names], return_tensors="pt")
    assert torch.equal(batch["pixel_values"], alone["pixel_values"])


def test_a_turned_photograph_is_upright(folder, word_processor):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    shown = Image.fromarray(picture(0)).rotate(180)
    shown.save(folder / "turned.png", exif=exif)
    one = row(*CIRCLE["conversations"], image="turned.png")
    ours, upright = (batch_of(load(folder, [which], word_processor)[0], word_processor) for which in (one, CIRCLE))
    assert torch.equal(ours["pixel_values"], upright["pixel_values"])


# ---------------------------------------- labels, segments


def test_labels_are_every_answer_with_its_end_token_and_nothing_else(folder, processor):
    batch = batch_of(load(folder, GOOD, processor)[0], processor)
    for index, one in enumerate(GOOD):
        said = ["".join(f"{m['value']}</s>".split()) for m in one["conversations"] if m["from"] == "gpt"]
        assert answers_in(processor, batch, index) == said
    labelled = batch["labels"] != -100
    assert torch.equal(batch["labels"][labelled], batch["input_ids"][labelled])


def test_every_turn_has_its_own_segment(folder, word_processor):
    batch = batch_of(load(folder, GOOD, word_processor)[0], word_processor)
    assert batch["routing_segments"].amax(dim=1).tolist() == [1, 3, 1, 1, 1]
    assert question_in(word_processor, batch, 1, 1) == "whatcolouristhecircle?ASSISTANT:"
    assert question_in(word_processor, batch, 1, 2) == "USER:howmanysquares?ASSISTANT:"
    assert question_in(word_processor, batch, 1, 3) == "USER:whereisit?ASSISTANT:"
    assert question_in(word_processor, batch, 4, 0) == "<s>AhelpfulA."
    unread = (batch["routing_segments"] == -1) & batch["attention_mask"].bool()
    assert torch.equal(unread, batch["labels"] != -100)


# ---------------------------------------- the other formats


def chat(one, **content):
    """A row in chat form with content lists: images in the row, or in the content with `inline`."""
    roles = {"system": "system", "human": "user", "gpt": "assistant"}
    images = one.get("image", [])
    images = iter(images if isinstance(images, list) else [images])
    messages = []
    for said in one["conversations"]:
        parts = []
        for _ in range(said["value"].count("<image>")):
            parts.append({"type": "image"} | ({"image": next(images)} if content.get("inline") else {}))
        parts.append({"type": "text", "text": said["value"].replace("<image>", "").strip()})
        messages.append({"role": roles[said["from"]], "content": parts})
    rest = list(images)
    return {"id": one["id"], "messages": messages} | ({} if content.get("inline") else {"images": rest})


def with_pictures(rows, folder):
    """Chat rows whose paths are opened."""
    return [{**one, "images": [Image.open(folder / name) for name in one["images"]]} for one in rows]


def inline_dataset(folder):
    part = {"type": Value("string"), "text": Value("string"), "image": ImageFeature()}
    features = Features(
        {"id": Value("string"), "messages": List({"role": Value("string"), "content": List(part)})},
    )
    empty = {"text": None, "image": None}
    rows = [chat(one, inline=True) for one in GOOD]
    for one in rows:
        for message in one["messages"]:
            message["content"] = [empty | part for part in message["content"]]
            for part in message["content"]:
                part["image"] = part["image"] and Image.open(folder / part["image"])
    return Dataset.from_list(rows, features=features)


def saved(dataset, folder):
    dataset.save_to_disk(folder / "saved")
    return folder / "saved"


def parquet(dataset, folder):
    dataset.to_parquet(folder / "train.parquet")
    return folder / "train.parquet"


def shards(folder):
    """A folder of two parquet files."""
    (folder / "shards").mkdir()
    for number, rows in enumerate((GOOD[:2], GOOD[2:])):
        pictures = with_pictures([chat(one) for one in rows], folder)
        features = Features(chat_features(ImageFeature()))
        Dataset.from_list(pictures, features=features).to_parquet(folder / "shards" / f"{number}.parquet")
    return folder / "shards"


def chat_features(image):
    part = {"type": Value("string"), "text": Value("string")}
    said = List({"role": Value("string"), "content": List(part)})
    return {"id": Value("string"), "messages": said, "images": List(image)}


SOURCES = {
    "jsonl": lambda folder: write(folder, GOOD, "train.jsonl"),
    "chats in JSON": lambda folder: write(folder, [chat(one) for one in GOOD]),
    "chats in JSON, images inside": lambda folder: write(folder, [chat(one, inline=True) for one in GOOD]),
    "dataset of paths": lambda folder: Dataset.from_list([chat(one) for one in GOOD]),
    "dataset of pictures": lambda folder: Dataset.from_list(with_pictures([chat(one) for one in GOOD], folder)),
    "dataset of pictures inside": inline_dataset,
    "saved dataset": lambda folder: saved(inline_dataset(folder), folder),
    "parquet": lambda folder: parquet(SOURCES["dataset of pictures"](folder), folder),
    "folder of parquet": shards,
    "LLaVA's rows in a dataset": lambda folder: Dataset.from_list([{**one, "image": images(one)} for one in GOOD]),
}


def images(one):
    found = one.get("image", [])
    return found if isinstance(found, list) else [found]


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_every_format_gives_the_batch_of_llavas_json(folder, word_processor, source):
    expected, _ = load(folder, GOOD, word_processor)
    conversations, bad = load_conversations(source(folder), folder, processor=word_processor)
    assert not len(bad) and [one["id"] for one in conversations] == [one["id"] for one in expected]
    assert_equal(batch_of(conversations, word_processor), batch_of(expected, word_processor))


def test_texts_without_placeholders_take_the_rows_images_first_as_in_trl(folder, word_processor):
    said = [{"role": "user", "content": "where is it?"}, {"role": "assistant", "content": "left"}]
    data = Dataset.from_list([{"messages": said, "images": [Image.open(folder / name) for name in ("0.png", "2.png")]}])
    expected, _ = load(folder, [TWO_IMAGES], word_processor)
    conversations, _ = load_conversations(data, processor=word_processor)
    assert_equal(batch_of(conversations, word_processor), batch_of(expected, word_processor))


def test_mixed_contents_stored_as_json_are_read(folder, word_processor):
    said = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what colour is the circle?"}]},
        {"role": "assistant", "content": "red"},
    ]
    data = Dataset.from_list([{"messages": said, "images": ["0.png"]}], on_mixed_types="use_json")
    conversations, _ = load_conversations(data, folder, processor=word_processor)
    expected, _ = load(folder, [CIRCLE], word_processor)
    assert_equal(batch_of(conversations, word_processor), batch_of(expected, word_processor))


def test_a_row_of_a_folder_is_named_by_its_own_file(folder, word_processor):
    (folder / "data").mkdir()
    write(folder / "data", [TEXT, row(human("how many?"), gpt(" "))], "a.json")
    write(folder / "data", [row(human("how many?")), TEXT], "b.jsonl")
    conversations, bad = load_conversations(folder / "data", processor=word_processor, on_bad="skip")
    places = [(row.file, row.index, row.reason) for row in bad.rows]
    a, b = (str(folder / "data" / name) for name in ("a.json", "b.jsonl"))
    assert places == [(a, 1, "empty answer"), (b, 0, "no answer")]
    assert [(one["file"], one["index"]) for one in conversations] == [(a, 0), (b, 1)]


# ---------------------------------------- bad rows

ASKED, SAID = human("how many?"), gpt("two")
CHAT = {"role": "user", "content": "how many?"}, {"role": "assistant", "content": "two"}
BAD = {
    "missing file": (row(*CIRCLE["conversations"], image="gone.png"), "missing image", "gone.png"),
    "one of two missing": (row(*TWO_IMAGES["conversations"], image=["0.png", "gone.png"]), "missing image", "gone"),
    "address": (row(*CIRCLE["conversations"], image="https://a.b/c.png"), "missing image", "nothing is fetched"),
    "truncated": (row(*CIRCLE["conversations"], image="short.png"), "broken image", "short.png"),
    "no image at all": (row(*CIRCLE["conversations"], image="text.png"), "broken image", "text.png"),
    "empty answer": (row(ASKED, gpt("")), "empty answer", "message 1 says ''"),
    "blank answer": (row(ASKED, SAID, ASKED, gpt(" \n")), "empty answer", "message 3"),
    "question only": (row(ASKED), "no answer", "nothing is answered"),
    "last unanswered": (row(ASKED, SAID, ASKED), "no answer", "last question"),
    "nobody speaks": (row(), "no answer", "nothing is answered"),
    "answer first": (row(SAID, ASKED, SAID), "roles out of order", "message 0 is the assistant's"),
    "two questions": (row(ASKED, ASKED, SAID), "roles out of order", "message 1 is the user's"),
    "late system": (row(ASKED, SAID, {"from": "system", "value": "A"}), "roles out of order", "message 2"),
    "too few images": (row(*TWO_IMAGES["conversations"], image="0.png"), "image count", "2 image placeholders, 1 im"),
    "too many images": (row(*CIRCLE["conversations"], image=["0.png"] * 2), "image count", "1 image placeholders, 2"),
    "image without place": (row(ASKED, SAID, image="0.png"), "image count", "0 image placeholders, 1 images"),
    "place without image": (row(*CIRCLE["conversations"]), "image count", "1 image placeholders, 0 images"),
    "image in an answer": (row(ASKED, gpt("<image>\ntwo"), image="0.png"), "image count", "message 1"),
    "unknown speaker": (row(ASKED, {"from": "bing", "value": "two"}), "unknown role", "'bing'"),
    "nobody": (row(ASKED, {"value": "two"}), "unknown role", "None"),
    "unknown role": ({"messages": [CHAT[0], {"role": "tool", "content": "two"}]}, "unknown role", "'tool'"),
    "value is a number": (row(ASKED, gpt(2)), "wrong type", "value of conversations[1] must be a text, got int 2"),
    "conversations is a text": ({"conversations": "how many?"}, "wrong type", "conversations must be a list"),
    "message is a text": (row("how many?", SAID), "wrong type", "conversations[0] must be an object"),
    "image is a number": (row(*CIRCLE["conversations"], image=7), "wrong type", "image must be a path"),
    "row is a list": ([1, 2], "wrong type", "a row must be an object"),
    "neither format": ({"text": "how many?"}, "wrong type", "neither conversations nor messages"),
    "video": ({"messages": [{"role": "user", "content": [{"type": "video"}]}, CHAT[1]]}, "wrong type", "'video'"),
    "answer holds a tag": (row(ASKED, gpt("two USER: how")), "role tag in text", "'USER:'"),
    "question holds a tag": (row(human("ASSISTANT: two?"), SAID), "role tag in text", "'ASSISTANT:'"),
    "too long": (row(human("how " * 60), SAID), "too long", "max_length is 40"),
    "long by its images": (row(human("<image>" * 9), SAID, image=["0.png"] * 9), "too long", "max_length is 40"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_fatal_and_named(folder, word_processor, name):
    bad, reason, phrase = BAD[name]
    bad = {**bad, "id": "the bad"} if isinstance(bad, dict) else bad
    with pytest.raises(ValueError) as caught:
        load(folder, [CIRCLE, TEXT, bad, TURNS], word_processor, max_length=40)
    message = str(caught.value)
    place = f"{folder / 'train.json'}, row 2" + (" (id 'the bad')" if isinstance(bad, dict) else "")
    assert message.startswith(f"{place}: {reason}: ") and phrase in message
    assert f"1 of 4 rows cannot be used (1 x {reason})" in message and "on_bad='skip'" in message


def test_bad_rows_are_left_out_counted_and_reported(folder, word_processor, caplog):
    rows = [CIRCLE, *(bad for bad, _, _ in BAD.values()), TURNS]
    conversations, report = load(folder, rows, word_processor, max_length=40, on_bad="skip")
    assert [one["id"] for one in conversations] == ["circle", "turns"]
    assert (report.total, len(report)) == (len(rows), len(BAD))
    assert [(row.index, row.reason) for row in report.rows] == [
        (index, reason) for index, (_, reason, _) in enumerate(BAD.values(), start=1)
    ]
    reasons = [reason for _, reason, _ in BAD.values()]
    assert report.counts == {reason: reasons.count(reason) for reason in reasons}
    path = report.save(folder / "bad_rows.json")
    written = json.loads(path.read_text())
    assert (written["rows"], written["bad"], written["counts"]) == (len(rows), len(BAD), report.counts)
    assert written["bad_rows"][0] == {
        "file": str(folder / "train.json"),
        "index": 1,
        "id": None,
        "reason": "missing image",
        "detail": f"no file {folder / 'gone.png'}",
    }
    with pytest.raises(ValueError, match="exists"):
        report.save(path)
    assert json.loads(path.read_text()) == written
    expected, _ = load(folder, [CIRCLE, TURNS], word_processor)
    assert_equal(batch_of(conversations, word_processor), batch_of(expected, word_processor))


def test_the_summary_has_counts_and_the_first_rows_of_each_reason(folder, word_processor):
    rows = [TEXT, *[row(ASKED)] * 5, row(ASKED, gpt(""))]
    _, report = load(folder, rows, word_processor, on_bad="skip")
    lines = report.summary(examples=2).splitlines()
    assert lines[0] == "6 of 7 rows cannot be used"
    assert lines[1] == "  5 x no answer" and "row 1: no answer" in lines[2] and "row 2:" in lines[3]
    assert lines[4].strip() == "..." and lines[5] == "  1 x empty answer" and len(lines) == 7


def test_every_reason_has_a_bad_row_here_and_a_line_in_the_docs():
    shown_elsewhere = {"not JSON", "refused by the processor"}
    assert {reason for _, reason, _ in BAD.values()} | shown_elsewhere == set(REASONS)
    page = (Path(__file__).parent.parent / "docs" / "training_data.md").read_text()
    assert re.findall(r"^\| `([^`]+)` \|", page, flags=re.MULTILINE) == list(REASONS)


def test_bad_rows_of_a_dataset_are_left_out_and_named(folder, word_processor):
    rows = [chat(one) for one in GOOD]
    stored = [{"bytes": (folder / "short.png").read_bytes(), "path": None}]
    rows[0] = {**rows[0], "images": stored}
    rows[3] = {**rows[3], "messages": rows[3]["messages"][:1]}
    pictures = [rows[0], *with_pictures(rows[1:], folder)]
    data = Dataset.from_list(pictures, features=Features(chat_features(ImageFeature())))
    shuffled = data.select([3, 1, 0, 4])  # an index counts in the dataset that was given
    conversations, bad = load_conversations(shuffled, processor=word_processor, on_bad="skip")
    assert [(row.index, row.id, row.reason) for row in bad.rows] == [
        (0, "text", "no answer"),
        (2, "circle", "broken image"),
    ]
    expected, _ = load(folder, [TURNS, SYSTEM], word_processor)
    assert_equal(batch_of(conversations, word_processor), batch_of(expected, word_processor))


def test_a_line_that_is_no_json_is_a_bad_row(folder, word_processor):
    lines = [json.dumps(TEXT), "", "{'from'", json.dumps(SYSTEM)]
    (folder / "train.jsonl").write_text("\n".join(lines))
    conversations, bad = load_conversations(folder / "train.jsonl", processor=word_processor, on_bad="skip")
    assert [(row.index, row.reason) for row in bad.rows] == [(2, "not JSON")]
    assert [one["index"] for one in conversations] == [0, 3] and bad.total == 3


def test_what_the_processor_refuses_is_a_bad_row(folder):
    processor = make_processor()
    processor.image_processor.resample = 99  # no such filter
    conversations, bad = load(folder, [CIRCLE, TEXT], processor, on_bad="skip")
    assert [one["id"] for one in conversations] == ["text"]
    assert [(row.index, row.reason) for row in bad.rows] == [(0, "refused by the processor")]
    assert bad.rows[0].detail.startswith("ValueError: ") and "99" in bad.rows[0].detail


# ---------------------------------------- checking the structure only


@pytest.mark.parametrize("name", ["truncated", "no image at all", "too long", "long by its images"])
@pytest.mark.parametrize("workers", [0, 1])
def test_without_the_full_check_a_bad_row_stops_training_and_is_named(folder, word_processor, name, workers):
    bad, reason, phrase = BAD[name]
    conversations, report = load(folder, [CIRCLE, bad], word_processor, max_length=40, check="structure", on_bad="skip")
    assert len(conversations) == 2 and not len(report)
    loader = DataLoader(
        conversations, batch_size=2, num_workers=workers, collate_fn=ConversationCollator(word_processor, 40)
    )
    with pytest.raises(ValueError, match=f"train.json, row 1: {reason}: .*check='full'") as caught:
        list(loader)
    assert phrase in str(caught.value)


def test_structure_and_files_are_checked_without_the_full_check_too(folder, word_processor):
    rows = [CIRCLE, BAD["missing file"][0], BAD["empty answer"][0]]
    conversations, bad = load(folder, rows, word_processor, check="structure", on_bad="skip")
    assert len(conversations) == 1 and bad.counts == {"missing image": 1, "empty answer": 1}


def test_images_are_opened_when_their_batch_is_made(folder, word_processor):
    conversations, _ = load(folder, [CIRCLE], word_processor)
    (folder / "0.png").unlink()
    example = conversations[0]
    assert example["images"] == [str(folder / "0.png")]
    with pytest.raises(ValueError, match=r"row 0 \(id 'circle'\): missing image: no file .*0.png"):
        ConversationCollator(word_processor)([example])


def test_the_length_limit_counts_the_tokens_of_images(folder, word_processor):
    length = batch_of(load(folder, [TURNS], word_processor)[0], word_processor)["input_ids"].shape[1]
    assert len(load(folder, [TURNS], word_processor, max_length=length)[0]) == 1
    with pytest.raises(ValueError, match=f"too long: {length} tokens with its images written out"):
        load(folder, [TURNS], word_processor, max_length=length - 1)


# ---------------------------------------- processes


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_worker_processes_give_the_same_batches(folder, word_processor, method):
    conversations, _ = load(folder, GOOD, word_processor)
    collate = ConversationCollator(word_processor)
    alone = DataLoader(conversations, batch_size=2, collate_fn=collate)
    workers = DataLoader(conversations, batch_size=2, collate_fn=collate, num_workers=1, multiprocessing_context=method)
    batches = list(workers)
    assert len(batches) == 3
    for ours, other in zip(batches, alone, strict=True):
        assert_equal(ours, other)


def test_a_pickled_copy_gives_the_same_batch(folder, word_processor):
    conversations, _ = load(folder, GOOD, word_processor)
    collate = ConversationCollator(word_processor)
    copy, collate_copy = pickle.loads(pickle.dumps((conversations, collate)))
    assert_equal(collate_copy([copy[i] for i in range(len(copy))]), batch_of(conversations, word_processor))


def test_the_full_check_in_workers_finds_the_same(folder, word_processor):
    rows = [bad for bad, _, _ in BAD.values()] + GOOD
    _, one = load(folder, rows, word_processor, max_length=40, on_bad="skip")
    _, several = load(folder, rows, word_processor, max_length=40, on_bad="skip", workers=2)
    assert several == one


def test_loading_leaves_the_random_streams_alone(folder, word_processor):
    before = torch.get_rng_state()
    load(folder, GOOD, word_processor)
    assert torch.equal(torch.get_rng_state(), before)


def load_in_group(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    seen = folder / f"images-{rank}" if rank else folder  # a disk of its own, on which a file is missing
    conversations, report = load_conversations(
        folder / "train.json", seen, processor=make_processor(), max_length=40, on_bad="skip"
    )
    bad = [(row.index, row.reason) for row in report.rows]
    found = {"kept": [one["id"] for one in conversations], "bad": bad, "total": report.total}
    (folder / f"found-{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def test_all_processes_of_a_run_keep_the_same_rows(folder):
    other = folder / "images-1"
    other.mkdir()
    for name in ("0.png", "1.png", "short.png"):
        (other / name).write_bytes((folder / name).read_bytes())
    long, truncated = BAD["too long"][0], BAD["truncated"][0]
    write(folder, [CIRCLE, TURNS, TWO_IMAGES, long, truncated, truncated, TEXT])
    torch.multiprocessing.start_processes(load_in_group, (folder,), nprocs=2, start_method="fork")
    first, second = (json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first["kept"] == ["circle", "turns", "text"] and first["total"] == 7
    assert first["bad"] == [[2, "missing image"], [3, "too long"], [4, "broken image"], [5, "broken image"]]


# ---------------------------------------- sources that cannot be used


def test_a_list_of_one_row_per_line_must_be_named_jsonl(folder, word_processor):
    write(folder, [TEXT, SYSTEM], "train.jsonl").rename(folder / "train.json")
    with pytest.raises(ValueError, match=r"train.json is not JSON.*must be named .jsonl"):
        load_conversations(folder / "train.json", processor=word_processor)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda folder: folder / "gone.json", "gone.json does not exist"),
        (lambda folder: folder / "0.png", "expected a file or a folder of files that end in .json"),
        (lambda folder: (folder / "empty").mkdir() or folder / "empty", "expected a file or a folder"),
        (lambda folder: write(folder, {"rows": []}), "must hold a list of rows, got dict"),
        (lambda folder: write(folder, []), "no row to train with"),
        (lambda folder: Dataset.from_dict({"text": ["how many?"]}), "has columns .*expected messages"),
        (lambda folder: DatasetDict(train=inline_dataset(folder)), "got a DatasetDict: choose a split"),
        (lambda folder: inline_dataset(folder).to_iterable_dataset(), "got a IterableDataset"),
        (lambda folder: saved(DatasetDict(train=inline_dataset(folder)), folder), "several splits: name one, .*train"),
    ],
)
def test_a_source_that_cannot_be_used_is_named(folder, word_processor, make, match):
    with pytest.raises(ValueError, match=match):
        load_conversations(make(folder), processor=word_processor, on_bad="skip")


def test_a_damaged_parquet_file_is_named(folder, word_processor):
    (folder / "train.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match=r"train.parquet cannot be read"):
        load_conversations(folder / "train.parquet", processor=word_processor)


def test_a_source_of_bad_rows_alone_is_an_error_when_skipping_too(folder, word_processor):
    with pytest.raises(ValueError, match=r"(?s)no row to train with.*1 x no answer"):
        load(folder, [row(ASKED)], word_processor, on_bad="skip")


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"on_bad": "replace"}, "on_bad must be one of fatal, skip; got 'replace'"),
        ({"check": "none"}, "check must be one of full, structure; got 'none'"),
        ({"max_length": 0}, "max_length must be at least 1"),
        ({"image_folder": "/no/such/folder"}, "/no/such/folder does not exist"),
    ],
)
def test_a_wrong_option_is_named(folder, word_processor, option, match):
    with pytest.raises(ValueError, match=match):
        load(folder, GOOD, word_processor, **option)


def test_a_missing_package_names_its_extra(folder, word_processor, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'roe-llava\[train\]'"):
        load(folder, GOOD, word_processor)


# ---------------------------------------- templates

# llava-hf's: a blank behind every text, no end token.
OPEN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' if message['role'] != 'system' else '' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def test_a_template_without_end_tokens_is_refused_and_can_be_closed(folder):
    processor = make_processor(chat_template=OPEN_TEMPLATE)
    with pytest.raises(ValueError, match=r"no end token \('</s>'\) after an answer.*close_answers"):
        load(folder, GOOD, processor)
    assert close_answers(processor) and not close_answers(processor)
    for index, one in enumerate(GOOD):
        conversations, _ = load(folder, [one], processor)
        asked = conversations[0]["messages"][:-1][:2]  # up to the first question
        asked = asked if one is SYSTEM else asked[:1]
        before, after = (
            processor.apply_chat_template(asked, add_generation_prompt=True, chat_template=template)
            for template in (OPEN_TEMPLATE, None)
        )
        assert before == after, index
        written = processor.apply_chat_template(conversations[0]["messages"])
        assert written == prompt_of(one)


def test_a_template_of_another_kind_is_not_replaced():
    processor = make_processor(chat_template=OPEN_TEMPLATE.replace("ASSISTANT:", "ASSISTANT: "))
    with pytest.raises(ValueError, match="not llava-hf's"):
        close_answers(processor)
    assert processor.chat_template != OPEN_TEMPLATE and "eos_token" not in processor.chat_template


def test_a_template_without_role_tags_is_refused(folder):
    with pytest.raises(ValueError, match=r"Set processor\.chat_template"):
        load(folder, GOOD, make_processor(chat_template=None))


def test_the_stock_processor_is_refused(folder, word_processor):
    stock = LlavaProcessor(word_processor.image_processor, word_processor.tokenizer, patch_size=14)
    with pytest.raises(ValueError, match=r"LlavaProcessor makes no labels.*RoeLlavaProcessor"):
        load(folder, GOOD, stock)


# ---------------------------------------- training


def test_the_examples_of_the_docs_load(folder, word_processor):
    page = (Path(__file__).parent.parent / "docs" / "training_data.md").read_text()
    llava, chats = re.findall(r"```json\n(.*?)```", page, flags=re.DOTALL)
    for name in set(re.findall(r'"([\w/]+\.jpg)"', page)):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(picture()).save(folder / name)
    conversations, _ = load(folder, json.loads(llava), word_processor)
    others, _ = load(folder, json.loads(chats), word_processor)
    assert len(conversations) == 3 and conversations.places["id"][:] == ["bus-1", "cups", "joke"]
    assert_equal(batch_of(others, word_processor), batch_of(conversations, word_processor))


def test_a_split_is_seeded_and_covers_every_row_once(folder, word_processor):
    rows = [{**TEXT, "id": str(number)} for number in range(20)]
    conversations, _ = load(folder, rows, word_processor, check="structure")
    train, held_out = split_conversations(conversations, 0.2, seed=3)
    again, _ = split_conversations(conversations, 0.2, seed=3)
    other, _ = split_conversations(conversations, 0.2, seed=4)
    ids = [[one["id"] for one in part] for part in (train, held_out, again, other)]
    assert len(ids[1]) == 4 and sorted(ids[0] + ids[1], key=int) == [str(number) for number in range(20)]
    assert ids[2] == ids[0] != ids[3]


def test_the_trainer_trains_on_them(folder, word_processor, model):
    conversations, _ = load(folder, GOOD, word_processor)
    before = {name: value.clone() for name, value in model.named_parameters()}
    settings = TrainingArguments(
        str(folder / "run"),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    RoeTrainer(
        model,
        schedule=StageSchedule(0.3, warmup_end=0.0, soft_end=0.0),
        objective=Objective(0.3),
        rates={"adapter": 1e-2, "router": 1e-2, "routing_tokens": 1e-2},
        args=settings,
        train_dataset=conversations,
        data_collator=ConversationCollator(word_processor),
    ).train()
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert any(".router." in name for name in moved) and all(value.isfinite().all() for value in model.parameters())


# ---------------------------------------- the tiny world as files


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    tiny_world = world.TinyWorld("train", 12, seed=5)
    return tiny_world, export.export(tiny_world, tmp_path_factory.mktemp("world") / "out")


@pytest.fixture(scope="module")
def world_processor():
    stock = build_processor()
    return RoeLlavaProcessor(
        stock.image_processor,
        stock.tokenizer,
        patch_size=stock.patch_size,
        vision_feature_select_strategy=stock.vision_feature_select_strategy,
        num_additional_image_tokens=stock.num_additional_image_tokens,
        chat_template=stock.chat_template,
    )


def test_batches_from_the_exported_world_equal_those_made_from_it(exported, world_processor):
    tiny_world, file = exported
    conversations, bad = load_conversations(file, processor=world_processor)
    assert len(conversations) == 12 and not len(bad)
    ours = batch_of(conversations, world_processor)
    direct = ChatCollator(world_processor, world.messages)([tiny_world[index] for index in range(12)])
    assert set(ours) == {"input_ids", "attention_mask", "labels", "routing_segments", "pixel_values"}
    assert ours["routing_segments"].max() == 3
    assert_equal(ours, direct)


def test_the_export_command_writes_what_was_asked_and_replaces_nothing_unasked(tmp_path, capsys):
    out = tmp_path / "world"
    export.main([str(out), "--number", "3", "--split", "test", "--seed", "2", "--turns", "1"])
    rows = json.loads((out / "test.json").read_text())
    assert [one["image"] for one in rows] == [f"images/test-2-{index:06d}.png" for index in range(3)]
    assert all(len(one["conversations"]) == 2 for one in rows) and str(out / "test.json") in capsys.readouterr().out
    tiny_world = world.TinyWorld("test", 3, seed=2, num_turns=1)
    shown = Image.open(out / rows[1]["image"])
    assert shown.tobytes() == tiny_world[1]["image"].tobytes()
    with pytest.raises(ValueError, match="exists and is not empty"):
        export.main([str(out)])
    assert json.loads((out / "test.json").read_text()) == rows
