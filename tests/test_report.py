"""What a model says of its routing: the line when it is loaded, the report, and a warning where nothing is skipped."""

import copy
import html
import logging
import math
import pickle
import threading

import pytest
import tiny
import torch
from convert_helpers import make_base, train
from tiny import NAMES, NUM_LAYERS, PATTERN, VOCAB
from transformers import DynamicCache, StaticCache

from roe_llava import RoeCache, RoeLlavaForConditionalGeneration, report_roe
from roe_llava.convert.adapter_file import save_adapter
from roe_llava.loading_roe import is_roe_parameter

pytestmark = pytest.mark.usefixtures("no_gradients")

SKIPPED = (~PATTERN).sum(dim=0).tolist()  # prompts that skip each layer
ROUTES = {"".join("01"[keep] for keep in row) for row in PATTERN.tolist()}


@pytest.fixture
def model():
    """A routed model that was asked for nothing yet."""
    model = tiny.routed_model()
    assert model.routing_report().prompts == 0
    return model


def says_pattern(report, prompts=6, rows=6):
    """Whether a report is that of all of `NAMES`, each as often as the others."""
    times = prompts // len(NAMES)
    return (
        (report.prompts, report.rows) == (prompts, rows)
        and report.skipped == [times * count for count in SKIPPED]
        and report.routes.keys() == ROUTES
        and report.skip_ratio == pytest.approx(1 - PATTERN.float().mean().item())
        and report.skip_per_layer == pytest.approx([count / len(NAMES) for count in SKIPPED])
    )


# ---------------------------------------- what is counted


def test_a_forward_pass_is_counted_and_then_forgotten(model):
    model(**tiny.batch())
    report = model.routing_report()
    assert says_pattern(report) and sum(report.routes.values()) == 6 and report.routes["1101"] == 2
    assert next(iter(report.routes)) == "1101"  # the most common first
    again = model.routing_report()
    assert (again.prompts, again.rows, again.routes, again.saved_kv_bytes, again.skip_ratio) == (0, 0, {}, 0, 0.0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_generation_counts_every_prompt_once(model, side):
    model.generate(**tiny.batch(side=side), max_new_tokens=5)
    for name in NAMES:
        model.generate(**tiny.alone(name), max_new_tokens=3)
    assert says_pattern(model.routing_report(), prompts=12, rows=12)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}])
def test_beams_and_returned_sequences_count_as_one_prompt(model, options, use_cache):
    model.generate(**tiny.batch(), max_new_tokens=4, use_cache=use_cache, **options)
    report = model.routing_report()
    assert says_pattern(report, rows=18)
    assert "6 (18 rows, beams counted apart)" in str(report)


def test_without_a_cache_later_steps_are_not_counted(model):
    model.generate(**tiny.batch(), max_new_tokens=4, use_cache=False)
    report = model.routing_report()
    assert says_pattern(report) and report.saved_kv_bytes == 0


def test_grouped_prompts_are_counted_once(model):
    prompts = [tiny.alone(name) for name in NAMES]
    model.group_by_route(prompts, batch_size=3, max_new_tokens=4)
    report = model.routing_report()
    assert says_pattern(report)
    model.generate(**tiny.alone(NAMES[0]), max_new_tokens=4)
    alone = model.routing_report().saved_kv_bytes
    model.group_by_route(prompts[:1], batch_size=1, max_new_tokens=4)
    assert model.routing_report().saved_kv_bytes == alone


def test_pinned_and_forced_routes_are_counted(model):
    model(**tiny.batch(), routes=[True, False, True, True])
    model(**tiny.batch(), route_bias=math.inf)
    model(**tiny.batch(), route_bias=-math.inf)
    report = model.routing_report()
    assert report.routes == {"1011": 6, "1111": 6, "0000": 6}
    assert report.skip_per_layer == pytest.approx([1 / 3, 2 / 3, 1 / 3, 1 / 3])


def test_a_training_pass_is_not_counted(model):
    model.train()
    inputs = tiny.batch()
    model(**inputs, labels=inputs["input_ids"])
    assert model.routing_report().prompts == 0
    model.eval()
    model(**inputs, labels=inputs["input_ids"])
    assert model.routing_report().prompts == 6


def test_a_cache_that_is_continued_is_no_new_prompt(model):
    inputs = tiny.alone("question")
    first = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True)
    assert model.routing_report().prompts == 1
    more = torch.cat([first.sequences, torch.tensor([[7, 8, 9]])], dim=1)
    model.generate(more, past_key_values=first.past_key_values, max_new_tokens=3)
    report = model.routing_report()
    assert report.prompts == 0 and report.saved_kv_bytes > 0
    assert "no prompt since the last one" in str(report)


# ---------------------------------------- saved keys and values


def held_bytes(cache):
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.is_initialized)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_saved_bytes_are_those_that_the_dense_cache_holds_more(family, options):
    """Sliding windows included: Mistral's layers all have one, Qwen2's last two."""
    model = tiny.routed_model(family)
    options = options | {"max_new_tokens": 6, "return_dict_in_generate": True}
    held = held_bytes(model.generate(**tiny.batch(), **options).past_key_values)
    saved = model.routing_report().saved_kv_bytes
    dense = held_bytes(model.generate(**tiny.batch(), **options, skip_ratio=0.0).past_key_values)
    assert saved == dense - held > 0
    assert model.routing_report().saved_kv_bytes == 0


def test_a_cache_of_all_rows_saves_layers_that_no_row_keeps(model):
    for routes, layers in (([[1, 0, 1, 1]] * 6, 1), (PATTERN, 0)):
        cache = StaticCache(model.config, max_cache_len=32)
        model(**tiny.batch(), past_key_values=cache, routes=torch.as_tensor(routes))
        assert model.routing_report().saved_kv_bytes == layers * 6 * cache.tokens_seen * 2 * 2 * 8 * 4


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("kind", ["static", "lazy"])
def test_windows_and_lazy_caches_of_all_rows(family, kind):
    """The last layer, which a lazy cache never makes; a static window holds one token more than a growing one."""
    model, name, steps = tiny.routed_model(family), "question", 4
    cache = StaticCache(model.config, max_cache_len=32) if kind == "static" else DynamicCache()
    inputs = tiny.alone(name)
    model.generate(**inputs, routes=[True, True, True, False], past_key_values=cache, max_new_tokens=steps)
    tokens = len(tiny.PROMPTS[name]) + steps - 1
    held = min(tokens, tiny.WINDOW) if (family, kind) == ("mistral", "static") else tokens
    assert model.routing_report().saved_kv_bytes == held * 2 * 2 * 8 * 4


def test_bytes_are_those_of_the_dtype_that_is_computed_in(model):
    model = model.to(torch.bfloat16)
    out = model(**tiny.batch(("text_only",)), routes=[True, False, True, True])
    assert model.routing_report().saved_kv_bytes == out.past_key_values.tokens_seen * 2 * 2 * 8 * 2


def test_drafts_that_were_refused_are_not_counted_again(model):
    """Every step feeds up to 5 drafted tokens and takes most of them back."""
    routes, steps = [True, False, True, True], 12
    output = model.generate(
        **tiny.alone("question"),
        routes=routes,
        prompt_lookup_num_tokens=5,
        max_new_tokens=steps,
        return_dict_in_generate=True,
    )
    per_token, seen = 2 * 2 * 8 * 4, output.past_key_values.tokens_seen
    saved = model.routing_report().saved_kv_bytes
    assert seen * per_token <= saved <= (seen + 5) * per_token


# ---------------------------------------- a checkpoint that keeps everything


@pytest.fixture
def warnings_of(monkeypatch):
    said = []
    monkeypatch.setattr(report_roe.logger, "warning", said.append)
    return said


@pytest.fixture
def keeping(model):
    """A model whose routers keep every layer, for every prompt, of their own accord."""
    tiny.solve_routers(model, tiny.batch(), torch.ones_like(PATTERN))
    assert model(**tiny.batch()).routes.all()
    fresh = copy.deepcopy(model)
    fresh.config._name_or_path = "someone/keeps-all"
    return fresh


def test_routers_that_keep_everything_are_warned_of_once(keeping, warnings_of):
    for _ in range(5):
        keeping.generate(**tiny.batch(), max_new_tokens=1)
    assert not warnings_of and not keeping.routing_report().keeps_everything
    keeping(**tiny.batch())
    assert len(warnings_of) == 1
    assert "someone/keeps-all: 36 rows were routed and none skipped a layer" in warnings_of[0]
    report = keeping.routing_report()
    assert report.keeps_everything and "the routers keep every layer, so nothing is saved" in str(report)
    for _ in range(8):
        keeping(**tiny.batch())
    assert len(warnings_of) == 1 and keeping.routing_report().keeps_everything


@pytest.mark.parametrize(
    "asked", [{"routes": [True] * NUM_LAYERS}, {"route_bias": math.inf}, {"route_bias": [0.0, 5.0, 0.0, 0.0]}]
)
def test_keeping_what_was_asked_for_is_no_reason_to_warn(keeping, warnings_of, asked):
    for _ in range(8):
        keeping(**tiny.batch(), **asked)
        keeping.generate(**tiny.batch(), skip_ratio=0.0, max_new_tokens=1)
    assert not warnings_of and not keeping.routing_report().keeps_everything


def test_one_skipped_layer_is_enough(model, warnings_of):
    model(**tiny.batch())
    for _ in range(40):
        model(**tiny.alone("question"), route_bias=0.0)
    tiny.solve_routers(model, tiny.batch(), torch.ones_like(PATTERN))
    for _ in range(8):
        model(**tiny.batch())
    assert not warnings_of and not model.routing_report().keeps_everything


def test_trained_routers_are_judged_anew(keeping, warnings_of):
    for _ in range(5):
        keeping(**tiny.batch())
    keeping.train()
    keeping(**tiny.batch(), labels=tiny.batch()["input_ids"])
    keeping.eval()
    for _ in range(5):
        keeping(**tiny.batch())
    assert not warnings_of
    keeping(**tiny.batch())
    assert len(warnings_of) == 1


# ---------------------------------------- how it reads, copies, threads


def test_a_report_reads_as_text_and_as_a_table(model):
    model.generate(**tiny.batch(), max_new_tokens=2)
    report = model.routing_report()
    text, table = str(report), report._repr_html_()
    assert "skip ratio       37.5% of 4 layers" in text and "1: 50%  2: 50%  3: 50%" in text
    assert "1101  2" in text and "distinct routes  5" in text
    for line in text.splitlines()[1:]:
        label, _, rest = line.strip().partition("  ")
        assert html.escape(label) in table and html.escape(rest.strip()) in table
    model(**tiny.batch(), routes=[True] * NUM_LAYERS)
    assert "per layer        none" in str(model.routing_report())


def test_many_routes_are_shortened_and_bounded(model, monkeypatch):
    monkeypatch.setattr(report_roe, "MOST_ROUTES", 9)
    routes = [[bool(number >> layer & 1) for layer in range(NUM_LAYERS)] for number in range(16)]
    model(torch.randint(3, VOCAB - 2, (16, 5)), routes=routes)
    model(torch.randint(3, VOCAB - 2, (1, 5)), routes=routes[3])
    report = model.routing_report()
    assert len(report.routes) == 9 and report.other_prompts == 7 and report.prompts == 17
    assert report.skip_ratio == pytest.approx((8 * 4 + 2) / (17 * 4))
    assert "9 or more" in str(report) and "others  8" in str(report)


def test_a_copy_of_a_model_begins_anew(model):
    model(**tiny.batch())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model.routing_tally))):
        tally = getattr(other, "routing_tally", other)
        assert tally.prompts == 0
        tally.add_prefill([(True, False)], 1)
    assert says_pattern(model.routing_report())


def test_threads_lose_no_prompt(model):
    def ask():
        for _ in range(10):
            model.generate(**tiny.alone("text_only"), max_new_tokens=2)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    report = model.routing_report()
    assert report.prompts == 40 and sum(report.routes.values()) == 40


def test_a_joined_cache_counts_what_is_new(model):
    caches = []
    for name in ("question", "text_only"):
        caches.append(model(**tiny.alone(name)).past_key_values)
    model.routing_report()
    cache = RoeCache.join(caches, model.config)
    model(torch.tensor([[7], [8]]), past_key_values=cache, attention_mask=torch.ones(2, cache.tokens_seen + 1).long())
    report = model.routing_report()
    skipped = int((~PATTERN[:2]).sum())
    assert report.prompts == 0 and report.saved_kv_bytes == skipped * 2 * 2 * 8 * 4


# ---------------------------------------- the line at loading


@pytest.fixture
def notices(monkeypatch):
    """What is said at log level info; Transformers' verbosity decides."""
    said = []

    class Listener(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())

    logger, listener = logging.getLogger("transformers.roe_llava"), Listener()
    logger.addHandler(listener)
    monkeypatch.setattr(logging.getLogger("transformers"), "level", logging.INFO)
    logger.manager._clear_cache()
    yield said
    logger.removeHandler(listener)
    monkeypatch.undo()
    logger.manager._clear_cache()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    with torch.enable_grad():
        folder = tmp_path_factory.mktemp("folders")
        base = make_base(folder / "base")
        model = train(base, routed_layers=[0, 2])
        model.save_pretrained(folder / "roe")
        save_adapter(model, model.config, folder / "adapter", base=base)
    return folder


def test_loading_says_what_is_routed_once(folders, notices):
    model = RoeLlavaForConditionalGeneration.from_pretrained(folders / "roe")
    added = sum(p.numel() for name, p in model.named_parameters() if is_roe_parameter(name))
    share = added / sum(p.numel() for p in model.parameters())
    assert len(notices) == 1
    assert "2 of 3 layers routed" in notices[0] and f"{added:,} parameters added ({share:.1%} of " in notices[0]
    assert str(folders / "roe") in notices[0]


def test_a_base_with_an_adapter_says_so_once(folders, notices):
    RoeLlavaForConditionalGeneration.from_base(folders / "base", folders / "adapter")
    assert len(notices) == 1 and "2 of 3 layers routed" in notices[0]


def test_at_the_usual_verbosity_nothing_is_said(folders, notices):
    logging.getLogger("transformers").setLevel(logging.WARNING)
    RoeLlavaForConditionalGeneration.from_pretrained(folders / "roe")
    assert not notices
