"""Rows that cannot be trained on: named, counted, fatal or left out, and never lost without a word."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_processor
from conversation_helpers import (
    CIRCLE,
    GOOD,
    SYSTEM,
    TEXT,
    TURNS,
    TWO_IMAGES,
    assert_equal,
    batch_of,
    chat,
    chat_features,
    gpt,
    human,
    inline_dataset,
    load,
    row,
    saved,
    with_pictures,
    write,
)
from datasets import Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from PIL import ImageFile
from torch.utils.data import DataLoader

from roe_llava.training.bad_rows import REASONS
from roe_llava.training.conversations import ConversationCollator, load_conversations

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


def test_a_truncated_image_is_found_where_pillow_was_told_to_fill_it(folder, word_processor, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ValueError, match="broken image"):
        load(folder, [CIRCLE, BAD["truncated"][0]], word_processor, max_length=40)
    assert ImageFile.LOAD_TRUNCATED_IMAGES


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


def test_the_full_check_in_workers_finds_the_same(folder, word_processor):
    rows = [bad for bad, _, _ in BAD.values()] + GOOD
    _, one = load(folder, rows, word_processor, max_length=40, on_bad="skip")
    _, several = load(folder, rows, word_processor, max_length=40, on_bad="skip", workers=2)
    assert several == one


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
