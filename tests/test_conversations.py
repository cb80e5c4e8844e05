"""Training data: LLaVA's JSON and chat datasets become the same batches, with labels and segments of every turn."""

import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from conftest import make_processor
from conversation_helpers import (
    CIRCLE,
    GOOD,
    SYSTEM,
    TEXT,
    TWO_IMAGES,
    answers_in,
    assert_equal,
    batch_of,
    chat,
    chat_features,
    gpt,
    human,
    inline_dataset,
    load,
    question_in,
    row,
    saved,
    with_pictures,
    write,
)
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from tiny import picture
from torch.utils.data import DataLoader
from transformers import LlavaProcessor, TrainingArguments

from roe_llava import RoeLlavaProcessor
from roe_llava.examples.tiny_world import export, world
from roe_llava.examples.tiny_world.processor import build_processor
from roe_llava.training.chat_prompt import close_answers
from roe_llava.training.conversations import ConversationCollator, load_conversations, split_conversations
from roe_llava.training.data import ChatCollator
from roe_llava.training.objective import Objective
from roe_llava.training.schedule import StageSchedule
from roe_llava.training.trainer import RoeTrainer

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


def test_loading_leaves_the_random_streams_alone(folder, word_processor):
    before = torch.get_rng_state()
    load(folder, GOOD, word_processor)
    assert torch.equal(torch.get_rng_state(), before)


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
