"""What a llava-hf user does with a checkpoint, done with a RoE one: chat templates, pipelines, streams, offloading.

The checkpoint is the shipped one, grafted into a folder and opened through the Auto classes. `docs/contract.md` says
which test shows what, here and elsewhere.
"""

import asyncio
import threading

import contract_helpers as contract
import pytest
import torch
from accelerate.utils import OffloadedWeightsLoader
from contract_helpers import GREEDY, answers, chats, details, open_model, open_processor, prepared, turn
from transformers import AsyncTextIteratorStreamer, TextIteratorStreamer, TextStreamer, pipeline

pytestmark = pytest.mark.usefixtures("no_gradients")

ROUTE = [True, False, True, True, False, True, True]


@pytest.fixture(scope="module")
def model(shipped_roe):
    return open_model(shipped_roe)


@pytest.fixture(scope="module")
def processor(shipped_roe):
    return open_processor(shipped_roe)


@pytest.fixture
def question(processor):
    """The inputs of one question."""
    return prepared(processor, chats()[0])


# ---------------------------------------- chat templates


def test_a_chat_equals_the_text_its_template_writes(model, processor):
    pictures = [one["image"] for one in contract.examples()]
    conversations = {
        "several turns": [
            *chats()[0],
            turn("assistant", contract.examples()[0]["turns"][0][1]),
            turn("user", "what color is the circle?"),
        ],
        "several images": [turn("user", "what is the sum of the digits?", *pictures[:2])],
        "an image in a later turn": [turn("user", "count"), turn("assistant", "2"), turn("user", "sum?", pictures[2])],
        "text only": [turn("user", "what is the sum of the digits?")],
    }
    for name, chat in conversations.items():
        inputs = prepared(processor, chat)
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
        images = [part["image"] for message in chat for part in message["content"] if part["type"] == "image"]
        written = processor(images=images or None, text=text, return_tensors="pt", add_special_tokens=False)
        assert inputs.keys() == written.keys(), name
        assert all(torch.equal(inputs[key], written[key]) for key in inputs), name
        assert ("pixel_values" in inputs) == bool(images)
        # The routing token of the question reads the last turn, and images are context.
        last_turn = sum(message["role"] == "user" for message in chat)
        assert inputs["routing_segments"].max() == last_turn
        assert not inputs["routing_segments"][inputs["input_ids"] == processor.image_token_id].any()
        assert details(model, inputs).past_key_values.routes.shape == (1, 7)


def test_chats_in_a_batch_are_answered_as_alone(model, processor):
    together = details(model, prepared(processor, chats()))
    assert len(set(map(tuple, together.past_key_values.routes.tolist()))) > 1
    for row, chat in enumerate(chats()):
        alone = details(model, prepared(processor, chat))
        assert torch.equal(alone.past_key_values.routes[0], together.past_key_values.routes[row])
        width = alone.sequences.shape[1] - prepared(processor, chat)["input_ids"].shape[1]
        first = together.sequences.shape[1] - prepared(processor, chats())["input_ids"].shape[1]
        new, batched = alone.sequences[0, -width:], together.sequences[row, -first:]
        assert torch.equal(new, batched[:width])


# ---------------------------------------- pipelines


@pytest.fixture(scope="module")
def ask(shipped_roe):
    """`pipeline("image-text-to-text")` of the folder, answering with the new text alone."""
    made = pipeline("image-text-to-text", model=str(shipped_roe), trust_remote_code=True, dtype=torch.float32)

    def answer(chat, **kwargs):
        said = made(text=chat, return_full_text=False, **kwargs)
        found = [one[0] if isinstance(one, list) else one for one in said]
        return [one["generated_text"].strip() for one in found]

    return answer


@pytest.mark.parametrize("given", [{}, {"routes": ROUTE}, {"skip_ratio": 0.0}, {"route_bias": -3.0}], ids=str)
def test_a_pipeline_takes_what_generate_takes(ask, model, processor, given):
    for chat in chats():
        expected = answers(processor, model, prepared(processor, chat), **given)
        assert ask(chat, generate_kwargs=GREEDY | given) == expected


def test_a_pipeline_answers_batches(ask):
    # A copy each time: older pipelines write into what they are given.
    expected = [ask(chat, generate_kwargs=dict(GREEDY))[0] for chat in chats()]
    assert ask(chats(), batch_size=3, generate_kwargs=dict(GREEDY)) == expected


def test_a_pipeline_says_where_routing_arguments_go(ask):
    with pytest.raises(ValueError, match=r"routes given to the processor.*generate_kwargs=\{'routes': \.\.\.\}"):
        ask(chats()[0], routes=ROUTE)


# ---------------------------------------- streams


def test_streamers_hand_out_the_answer(model, processor, question, capsys):
    expected = answers(processor, model, question)[0]
    shown = {"skip_prompt": True, "skip_special_tokens": True}
    model.generate(**question, **GREEDY, streamer=TextStreamer(processor.tokenizer, **shown))
    assert capsys.readouterr().out.strip() == expected
    streamer = TextIteratorStreamer(processor.tokenizer, timeout=60, **shown)
    with generating(model, question, streamer):
        assert "".join(streamer).strip() == expected


def test_an_async_streamer_hands_out_the_answer(model, processor, question):
    async def read() -> tuple[str, int]:
        streamer = AsyncTextIteratorStreamer(
            processor.tokenizer, skip_prompt=True, timeout=60, skip_special_tokens=True
        )
        with generating(model, question, streamer, routes=ROUTE):
            pieces = [piece async for piece in streamer]
        return "".join(pieces), len(pieces)

    text, count = asyncio.run(read())
    assert text.strip() == answers(processor, model, question, routes=ROUTE)[0] and count > 1


class generating:
    """A generation in a thread of its own, ended when the block ends."""

    def __init__(self, model, inputs, streamer, **kwargs):
        self.thread = threading.Thread(
            target=model.generate, kwargs={**inputs, **GREEDY, "streamer": streamer, **kwargs}
        )

    def __enter__(self):
        self.thread.start()

    def __exit__(self, *_):
        self.thread.join()


# ---------------------------------------- offloading

PLACES = dict.fromkeys(
    ["lm_head", "model.vision_tower", "model.multi_modal_projector"]
    + [f"model.language_model.{part}" for part in ("embed_tokens", "norm", "rotary_emb", "routing_tokens")],
    "cpu",
)
HEAVY = ("self_attn", "mlp", "post_attention_layernorm")


def on_disk(*layers: int) -> dict[str, str]:
    """A device map with these decoder layers on the disk."""
    return PLACES | {f"model.language_model.layers.{i}": "disk" if i in layers else "cpu" for i in range(7)}


@pytest.fixture
def reads(monkeypatch):
    """Names of the tensors that are read from the disk, in order."""
    names, read = [], OffloadedWeightsLoader.__getitem__

    def counted(self, name):
        names.append(name)
        return read(self, name)

    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", counted)
    return names


def test_a_skipped_layer_is_not_read_from_the_disk(shipped_roe, model, question, reads, tmp_path):
    away = open_model(shipped_roe, device_map=on_disk(*range(7)), offload_folder=tmp_path / "off")
    reads.clear()
    ours, expected = details(away, question), details(model, question)
    assert torch.equal(ours.sequences, expected.sequences)
    routes = expected.past_key_values.routes[0].tolist()
    assert torch.equal(ours.past_key_values.routes, expected.past_key_values.routes) and not all(routes)
    for index, keeps in enumerate(routes):
        parts = {name.split(f"layers.{index}.")[1].rpartition(".")[0] for name in reads if f"layers.{index}." in name}
        assert any(part.startswith(HEAVY) for part in parts) == keeps, (index, parts)
        assert ("adapter.down_proj" in parts) != keeps
    # Routers are read in prefill alone.
    assert [name for name in reads if "router" in name].count("model.language_model.layers.0.router.weight") == 1
    assert torch.equal(away(**question).logits, model(**question).logits)


def test_a_layer_that_a_pinned_route_skips_is_not_read_at_all(shipped_roe, question, reads, tmp_path):
    away = open_model(shipped_roe, device_map=on_disk(1, 4), offload_folder=tmp_path / "off")
    reads.clear()
    away.generate(**question, **GREEDY, routes=ROUTE)  # skips 1 and 4
    assert reads and {name.rsplit(".", 2)[1] for name in reads} == {"down_proj", "up_proj", "input_layernorm"}
    assert not [name for name in reads if "mlp" in name or "self_attn" in name]


def test_everything_may_be_on_the_disk(shipped_roe, model, question, tmp_path):
    for device_map in ("auto", dict.fromkeys(PLACES | on_disk(), "disk") | {"lm_head": "cpu"}):
        memory = {"max_memory": {"cpu": "6MB"}} if device_map == "auto" else {}
        away = open_model(shipped_roe, device_map=device_map, offload_folder=tmp_path / "off", **memory)
        assert away.hf_device_map["model.language_model.routing_tokens"] == "disk"
        assert torch.equal(details(away, question).sequences, details(model, question).sequences)


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_an_offloaded_model_saves_and_reloads(shipped_roe, model, tmp_path):
    away = open_model(shipped_roe, device_map=on_disk(2, 3, 6), offload_folder=tmp_path / "off")
    away.save_pretrained(tmp_path / "again")
    assert contract.same_tensors(open_model(tmp_path / "again"), model)
