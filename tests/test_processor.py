"""The processor: which token belongs to the context and which to the question of which turn."""

import pytest
import tiny
import torch
from conftest import make_processor
from tiny import picture, said

from roe_llava import RoeLlavaProcessor
from roe_llava.routing_roe import default_segments

ONE = "USER: <image>\nwhat colour is the circle? ASSISTANT:"
TWO = "USER: <image>\nwhat colour is the circle? ASSISTANT: red</s>USER: how many squares? ASSISTANT: two</s>"
OPEN = TWO + "USER: where is it? ASSISTANT:"
SYSTEM = "A helpful A. "


def parts(processor, text, data, row=0):
    """Segment -> its text, pieced together from the tokens (blanks aside)."""
    found = {}
    for token, segment in zip(data["input_ids"][row], data["routing_segments"][row], strict=True):
        found.setdefault(int(segment), []).append(int(token))
    return {segment: said_by(processor, tokens) for segment, tokens in found.items()}


def said_by(processor, tokens):
    return "".join(processor.tokenizer.decode(tokens).split())


def squeezed(text):
    return "".join(text.split())


# ---------------------------------------- one turn


def test_one_turn_with_the_image_first_equals_the_models_default(processor):
    data = processor(images=picture(), text=ONE, return_tensors="pt")
    image_mask = data["input_ids"] == processor.image_token_id
    assert image_mask.sum() == 4
    expected = default_segments(image_mask, data["attention_mask"].bool())
    assert torch.equal(data["routing_segments"], expected)


def test_a_prompt_routes_the_same_with_the_stock_processors_output(word_processor, model):
    data = word_processor(images=picture(), text=ONE, return_tensors="pt")
    stock = {name: data[name] for name in data if name != "routing_segments"}
    with torch.no_grad():
        assert torch.equal(model(**data).router_logits, model(**stock).router_logits)


def test_the_other_outputs_are_the_stock_processors(processor):
    ours = processor(images=picture(), text=ONE, return_tensors="pt")
    stock = super(RoeLlavaProcessor, processor).__call__(images=picture(), text=ONE, return_tensors="pt")
    assert set(ours) == {*stock, "routing_segments"}
    for name in stock:
        assert torch.equal(ours[name], stock[name])


def test_the_question_begins_behind_the_image_and_ends_with_the_answer_tag(processor):
    data = processor(images=picture(), text=ONE)
    found = parts(processor, ONE, data)
    assert found[1] == squeezed("what colour is the circle? ASSISTANT:").replace("what", said_what(processor))
    assert set(found) == {0, 1}


def said_what(processor):
    """`what` as the tokenizer knows it (pieces may hold an unknown letter)."""
    return said_by(processor, processor.tokenizer("\nwhat", add_special_tokens=False)["input_ids"])


def test_an_image_after_the_question_moves_the_question_behind_it(word_processor):
    text = "USER: what is it? <image> where? ASSISTANT:"
    data = word_processor(images=picture(), text=text)
    assert parts(word_processor, text, data)[1] == "where?ASSISTANT:"


def test_nothing_behind_the_image_leaves_the_answer_tag_as_question(word_processor):
    text = "USER: what is it? <image> ASSISTANT:"
    assert parts(word_processor, text, word_processor(images=picture(), text=text))[1] == "ASSISTANT:"


def test_several_images_are_context(word_processor):
    text = "USER: <image>\n<image>\nwhere is it? ASSISTANT:"
    data = word_processor(images=[picture(0), picture(1)], text=text, return_tensors="pt")
    assert data["input_ids"].eq(tiny.IMAGE).sum() == 8 and data["pixel_values"].shape[0] == 2
    assert data["routing_segments"][data["input_ids"] == tiny.IMAGE].eq(0).all()
    assert parts(word_processor, text, data)[1] == "whereisit?ASSISTANT:"


# ---------------------------------------- text only, system text


def test_a_text_only_prompt_is_all_question_from_its_role_tag(word_processor):
    text = "USER: how many squares? ASSISTANT:"
    data = word_processor(text=text)
    assert parts(word_processor, text, data) == {0: "<s>", 1: "USER:howmanysquares?ASSISTANT:"}


def test_system_text_is_context(word_processor):
    text = SYSTEM + "USER: how many squares? ASSISTANT:"
    found = parts(word_processor, text, word_processor(text=text))
    assert found[0] == "<s>AhelpfulA." and found[1].startswith("USER:how")
    text = SYSTEM + ONE
    found = parts(word_processor, text, word_processor(images=picture(), text=text))
    assert found[0] == "<s>AhelpfulA.USER:" + "<image>" * 4 and found[1].startswith("whatcolour")


def test_a_token_that_begins_with_the_blank_before_its_word_belongs_to_the_word(processor):
    text = SYSTEM + "USER: how many squares? ASSISTANT:"
    found = parts(processor, text, processor(text=text))
    assert found[0].endswith("A.") and found[1].startswith("USER:how")


def test_text_without_role_tags_is_all_question(word_processor):
    found = parts(word_processor, "how many?", word_processor(text="how many?"))
    assert found == {0: "<s>", 1: "howmany?"}


# ---------------------------------------- several turns


def test_every_turn_has_its_question_and_answers_are_read_by_none(word_processor):
    found = parts(word_processor, OPEN, word_processor(images=picture(), text=OPEN))
    assert found[0] == "<s>USER:" + "<image>" * 4
    assert found[1] == "whatcolouristhecircle?ASSISTANT:"
    assert found[2] == "USER:howmanysquares?ASSISTANT:"
    assert found[3] == "USER:whereisit?ASSISTANT:"
    assert found[-1] == "red</s>two</s>"


def test_pieces_of_a_tokenizer_that_glues_blanks_fall_into_the_same_turns(processor):
    data = processor(images=picture(), text=OPEN)
    found = parts(processor, OPEN, data)
    assert set(found) == {-1, 0, 1, 2, 3}
    assert found[-1] == "red</s>two</s>"
    assert found[2].startswith("USER:how") and found[2].endswith("ASSISTANT:")
    assert found[3].startswith("USER:where") and found[3].endswith("ASSISTANT:")


def test_an_image_in_a_later_turn_is_context_and_its_words_are_the_question(word_processor):
    text = "USER: how many? ASSISTANT: two</s>USER: <image>\nwhat colour? ASSISTANT:"
    found = parts(word_processor, text, word_processor(images=picture(), text=text))
    assert found[0] == "<s>" + "<image>" * 4
    assert found[1] == "USER:howmany?ASSISTANT:" and found[2] == "USER:whatcolour?ASSISTANT:"


# ---------------------------------------- labels


def test_labels_are_the_answers_with_their_end_token(processor):
    data = processor(images=picture(), text=TWO, return_labels=True)
    kept = [token for token in data["labels"][0] if token != -100]
    assert said_by(processor, kept) == "red</s>two</s>"
    for token, label in zip(data["input_ids"][0], data["labels"][0], strict=True):
        assert label in (-100, token)


def test_labels_stand_where_no_segment_reads(processor):
    data = processor(images=picture(), text=OPEN, return_labels=True, return_tensors="pt")
    assert torch.equal(data["labels"] != -100, (data["routing_segments"] == -1) & data["attention_mask"].bool())


def test_the_models_default_segments_from_labels_equal_the_processors_for_one_image(word_processor, model):
    data = word_processor(images=picture(), text=TWO, return_labels=True, return_tensors="pt")
    expected = model.model.segments_of(data["input_ids"], None, data["attention_mask"], data["labels"])
    assert torch.equal(data["routing_segments"], expected)


def test_labels_are_returned_on_request_only(processor):
    assert "labels" not in processor(images=picture(), text=TWO)


def test_processed_conversations_train_the_model(word_processor, model):
    data = word_processor(
        images=[picture(0), picture(1)],
        text=[TWO, ONE + " blue</s>"],
        return_labels=True,
        padding=True,
        return_tensors="pt",
    )
    loss = model.train()(**data).loss
    loss.backward()
    assert loss.isfinite()


# ---------------------------------------- batches


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_in_no_segment_and_has_no_label(processor, side):
    texts = [OPEN, "USER: how many? ASSISTANT: two</s>"]
    images = [picture()]
    together = processor(
        images=images, text=texts, padding=True, padding_side=side, return_labels=True, return_tensors="pt"
    )
    real = together["attention_mask"].bool()
    assert not real[1].all() and bool(real[1, 0]) == (side == "right")
    assert (together["routing_segments"][~real] == -1).all() and (together["labels"][~real] == -100).all()
    for row, text in enumerate(texts):
        alone = processor(images=images if row == 0 else None, text=text, return_labels=True, return_tensors="pt")
        for name in ("input_ids", "routing_segments", "labels"):
            assert torch.equal(together[name][row][real[row]], alone[name][0])


def test_a_processed_batch_routes_as_its_rows_alone(word_processor, model):
    texts = [ONE, "USER: how many? ASSISTANT:", SYSTEM + "USER: <image>\n<image>\nwhere is it? ASSISTANT:"]
    images = [[picture(0)], [], [picture(1), picture(2)]]
    flat = [image for row in images for image in row]
    data = word_processor(images=flat, text=texts, padding=True, padding_side="left", return_tensors="pt")
    with torch.no_grad():
        together = model.generate(**data, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        for row, text in enumerate(texts):
            one = word_processor(images=images[row] or None, text=text, return_tensors="pt")
            alone = model.generate(**one, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
            assert torch.equal(alone.sequences[0, -4:], together.sequences[row, -4:])
            assert torch.equal(alone.past_key_values.routes[0], together.past_key_values.routes[row])


# ---------------------------------------- chat templates

CONVERSATION = [
    said("system", "A helpful A."),
    said("user", "what colour is the circle?", images=1),
    said("assistant", "red"),
    said("user", "how many squares?"),
]


def with_picture(messages):
    messages = [{"role": m["role"], "content": [dict(part) for part in m["content"]]} for m in messages]
    for message in messages:
        for part in message["content"]:
            if part["type"] == "image":
                part["image"] = torch.from_numpy(picture()).permute(2, 0, 1)
    return messages


def test_a_chat_template_equals_the_same_text_written_by_hand(processor):
    text = processor.apply_chat_template(CONVERSATION, add_generation_prompt=True)
    assert text == SYSTEM + TWO[: TWO.index(" ASSISTANT: two")] + " ASSISTANT:"
    written = processor(images=torch.from_numpy(picture()).permute(2, 0, 1), text=text, return_tensors="pt")
    applied = processor.apply_chat_template(
        with_picture(CONVERSATION), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert set(applied) == set(written)
    for name in written:
        assert torch.equal(applied[name], written[name]), name


def test_a_batch_of_chats_equals_the_same_texts_written_by_hand(word_processor):
    chats = [with_picture(CONVERSATION), with_picture(CONVERSATION[:2])]
    applied = word_processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True, padding=True, return_tensors="pt"
    )
    texts = word_processor.apply_chat_template([CONVERSATION, CONVERSATION[:2]], add_generation_prompt=True)
    images = [torch.from_numpy(picture()).permute(2, 0, 1)] * 2
    written = word_processor(images=images, text=texts, padding=True, return_tensors="pt")
    assert torch.equal(applied["routing_segments"], written["routing_segments"])


def test_turn_tags_are_read_off_the_chat_template(processor):
    assert processor.turn_tags() == ("USER:", "ASSISTANT:")


def test_without_a_chat_template_there_is_one_turn():
    processor = make_processor(chat_template=None)
    assert processor.turn_tags() is None
    found = parts(processor, TWO, processor(images=picture(), text=TWO))
    assert set(found) == {0, 1} and found[1].endswith("ASSISTANT:two</s>")


# ---------------------------------------- the call itself


@pytest.mark.parametrize("kind", [None, "pt", "np"])
def test_tensors_are_returned_as_asked(word_processor, kind):
    data = word_processor(images=picture(), text=ONE, return_tensors=kind)
    assert type(data["routing_segments"]) is type(data["input_ids"])
    nested = word_processor(images=picture(), text=ONE, text_kwargs={"return_tensors": kind} if kind else {})
    assert type(nested["routing_segments"]) is type(data["routing_segments"])


def test_offsets_are_returned_on_request_only(word_processor):
    assert set(word_processor(text=ONE.replace("<image>\n", ""))) == {"input_ids", "attention_mask", "routing_segments"}
    asked = word_processor(text="how many?", return_offsets_mapping=True)
    assert asked["offset_mapping"][0][1:] == [(0, 3), (4, 8), (8, 9)]


def test_segments_come_without_an_attention_mask_too(word_processor):
    data = word_processor(text="how many?", return_attention_mask=False)
    assert data["routing_segments"] == [[0, 1, 1, 1]] and "attention_mask" not in data


def test_images_alone_are_processed_as_stock(word_processor):
    assert set(word_processor(images=picture())) == {"pixel_values"}


def test_routing_segments_are_a_model_input(processor):
    assert "routing_segments" in processor.model_input_names


def test_a_saved_processor_reloads(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = RoeLlavaProcessor.from_pretrained(tmp_path)
    ours, base = (p(images=picture(), text=OPEN, return_labels=True, return_tensors="pt") for p in (again, processor))
    assert set(ours) == set(base)
    for name in base:
        assert torch.equal(ours[name], base[name]), name


def test_a_slow_tokenizer_is_named(word_processor, monkeypatch):
    class SlowTokenizer(type(word_processor.tokenizer)):
        is_fast = False

    monkeypatch.setattr(word_processor.tokenizer, "__class__", SlowTokenizer)
    with pytest.raises(ValueError, match=r"SlowTokenizer is a slow tokenizer.*fast one"):
        word_processor(text="how many?")
