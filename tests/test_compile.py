"""`compile_layers`: no graph break, no graph per layer, route, length or token, and the same tokens.

Graphs are counted with a backend that runs them as they were traced; the last test compiles for good.
"""

import copy
import functools

import pytest
import tiny
import torch
from tiny import NAMES, PATTERN
from transformers import DynamicCache, QuantizedCache, StaticCache

from roe_llava import RoeCache, RoeLlavaForConditionalGeneration
from roe_llava.compile_roe import MOST_GRAPHS, PARTS, is_compiled

pytestmark = pytest.mark.usefixtures("no_gradients")

GREEDY = {"max_new_tokens": 5, "do_sample": False}


class Backend:
    """Runs graphs as they were traced, and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return graph.forward


SHARED = Backend()  # tests that do not count find each other's graphs


@pytest.fixture
def counted():
    """A backend for a test that begins with nothing compiled."""
    torch._dynamo.reset()
    yield Backend()
    torch._dynamo.reset()


@functools.cache
def uncompiled(family):
    return tiny.routed_model(family)


def compiled(family="llama", backend=SHARED, fullgraph=True):
    """A compiled model; a graph break is an error."""
    model = tiny.routed_model(family)
    model.compile_layers(backend=backend, fullgraph=fullgraph)
    return model


def assert_same_tokens(model, inputs, family="llama", **how):
    ours = model.generate(**inputs, **GREEDY | how)
    assert torch.equal(ours, uncompiled(family).generate(**inputs, **GREEDY | how))


# ---------------------------------------- the same answer, whole graphs


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_compiled_layers_generate_the_same_tokens(family):
    model, before = compiled(family), SHARED.graphs
    assert_same_tokens(model, tiny.batch(), family)
    assert_same_tokens(model, tiny.alone("question"), family, cache_implementation="static")
    assert SHARED.graphs > before


@pytest.mark.parametrize("how", [{"num_beams": 2}, {"use_cache": False}, {"prompt_lookup_num_tokens": 2}], ids=str)
def test_compiled_layers_go_with_every_way_of_decoding(how):
    model = compiled()
    assert_same_tokens(model, tiny.alone("other_question"), **how)


def test_compiled_layers_route_alike():
    model = compiled()
    ours, other = model(**tiny.batch()), uncompiled("llama")(**tiny.batch())
    assert torch.equal(ours.routes, PATTERN)
    torch.testing.assert_close(ours.router_logits, other.router_logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.logits, other.logits, rtol=1e-4, atol=1e-5)


def test_compiled_layers_continue_a_cache_that_began_uncompiled():
    model = tiny.routed_model()
    first, more = model(**tiny.batch()), torch.arange(60, 66)[:, None]
    mask = torch.nn.functional.pad(tiny.batch()["attention_mask"], (0, 1), value=1)
    again = copy.deepcopy(first.past_key_values)
    expected = model(input_ids=more, attention_mask=mask, past_key_values=again).logits
    model.compile_layers(backend=SHARED, fullgraph=True)
    ours = model(input_ids=more, attention_mask=mask, past_key_values=first.past_key_values).logits
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["routed", "ordinary", "static"])
def test_compiled_layers_fill_a_cache_as_uncompiled_ones_do(name):
    make = {
        "routed": lambda model: RoeCache(model.config),
        "ordinary": lambda model: DynamicCache(),
        "static": lambda model: StaticCache(model.config, max_cache_len=32),
    }[name]
    model = compiled()
    ours, others = make(model), make(model)
    tokens = model.generate(**tiny.batch(), **GREEDY, past_key_values=ours)
    assert torch.equal(tokens, uncompiled("llama").generate(**tiny.batch(), **GREEDY, past_key_values=others))
    assert ours.get_seq_length() == others.get_seq_length() > 0
    for own, other in zip(ours.layers, others.layers, strict=True):
        torch.testing.assert_close(own.keys, other.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(own.values, other.values, rtol=1e-4, atol=1e-5)


def test_a_quantised_cache_is_updated_between_two_graphs(counted):
    inputs = tiny.alone("question")

    def tokens(model):
        return model.generate(**inputs, **GREEDY, past_key_values=QuantizedCache("fp8", model.config))

    with pytest.raises(torch._dynamo.exc.Unsupported, match="update"):
        tokens(compiled(backend=counted))
    torch._dynamo.reset()
    assert torch.equal(tokens(compiled(backend=counted, fullgraph=False)), tokens(uncompiled("llama")))
    assert counted.graphs > 0


def test_compiled_layers_show_hidden_states_and_attentions():
    model, inputs = tiny.routed_model(implementation="eager"), tiny.alone("question")
    expected = model(**inputs, output_hidden_states=True, output_attentions=True)
    model.compile_layers(backend=SHARED)  # the hooks that Transformers listens with end a graph
    ours = model(**inputs, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(ours.hidden_states, expected.hidden_states, rtol=1e-4, atol=1e-5)
    assert ours.attentions[1] is not None and ours.attentions[2] is None  # the route of this prompt
    torch.testing.assert_close(ours.attentions, expected.attentions, rtol=1e-4, atol=1e-5)


def test_compiled_layers_train_alike():
    inputs = tiny.batch() | {"labels": tiny.batch()["input_ids"]}
    model, other = compiled().train(), tiny.routed_model().train()
    with torch.enable_grad():
        for one in (model, other):
            one(**inputs).loss.backward()
    for (name, own), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(own.grad, expected.grad, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: n + text)


# ---------------------------------------- how many graphs


def graphs_of(model, backend, inputs, **how) -> int:
    """How many graphs more a generation makes."""
    before = backend.graphs
    model.generate(**inputs, **GREEDY | how)
    return backend.graphs - before


def test_layers_share_their_graphs(counted):
    model = compiled(backend=counted)
    # Attention, MLP, adapter and the norms, which are alike: once for prefill, once for decoding.
    assert graphs_of(model, counted, tiny.alone("question"), routes=torch.tensor([True, True, True, False])) == 2 * 4


def test_no_graph_more_for_another_route_length_or_token(counted):
    model = compiled(backend=counted)
    graphs_of(model, counted, tiny.alone("question"))
    for name in ("two_images", "text_only", "empty_question", "other_question"):
        assert graphs_of(model, counted, tiny.alone(name)) == 0
    assert graphs_of(model, counted, tiny.alone("question"), max_new_tokens=40) == 0
    graphs_of(model, counted, tiny.alone("question"), routes=PATTERN[0])  # no routing tokens
    for route in [*PATTERN[1:], [0, 0, 0, 1], [1, 1, 1, 1]]:
        assert graphs_of(model, counted, tiny.alone("question"), routes=torch.as_tensor(route).bool()) == 0


@pytest.mark.parametrize("family", ["llama", pytest.param("qwen2", marks=pytest.mark.slow)])  # one kind of layers, two
def test_no_graph_more_for_other_rows(family, counted):
    model = compiled(family, counted)
    for names in (NAMES, NAMES[:3], NAMES[3:5]):  # one row and several keep or skip layers
        graphs_of(model, counted, tiny.batch(names))
    assert counted.graphs < MOST_GRAPHS / 2
    for names in (NAMES[1:], NAMES[:4], NAMES[::2], NAMES[:2], NAMES * 2):
        assert graphs_of(model, counted, tiny.batch(names)) == 0
    assert graphs_of(model, counted, tiny.batch(), max_new_tokens=20) == 0


# ---------------------------------------- the model around it


def test_compiling_changes_no_parameter_name_and_no_saved_file(tmp_path):
    model = compiled()
    model.generate(**tiny.batch(), **GREEDY)
    assert list(model.state_dict()) == list(uncompiled("llama").state_dict())
    model.save_pretrained(tmp_path)
    again = RoeLlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert_same_tokens(again, tiny.batch(), suppress_tokens=[tiny.IMAGE], eos_token_id=None)


def test_compiling_twice_is_harmless():
    model = compiled()
    model.compile_layers(backend=SHARED, fullgraph=True)
    assert_same_tokens(model, tiny.batch())
    assert all(is_compiled(layer.mlp) for layer in tiny.layers_of(model))


def test_a_copy_is_not_compiled():
    model = compiled()
    model.generate(**tiny.batch(), **GREEDY)
    other = copy.deepcopy(model)
    assert not any(is_compiled(part) for part in other.modules())
    assert_same_tokens(other, tiny.batch())


def test_layers_without_an_adapter_are_compiled_too():
    model = tiny.tiny_model(tiny.tiny_config(routed_layers=[1, 2]))
    expected = model.generate(**tiny.batch(), **GREEDY)
    model.compile_layers(backend=SHARED, fullgraph=True)
    for layer in tiny.layers_of(model):
        assert all(is_compiled(getattr(layer, name)) for name in PARTS if getattr(layer, name) is not None)
        assert not is_compiled(layer)
    assert torch.equal(model.generate(**tiny.batch(), **GREEDY), expected)


def test_a_part_compiled_by_the_user_alone_works_too():
    model = tiny.routed_model()
    for layer in tiny.layers_of(model):
        layer.self_attn.compile(backend=SHARED, fullgraph=True, dynamic=True)
    assert_same_tokens(model, tiny.batch())


@pytest.mark.slow
def test_inductor_generates_the_same_tokens(needs_cpp_compiler):
    model = tiny.routed_model()
    model.compile_layers(fullgraph=True)
    for inputs in (tiny.alone("question"), tiny.batch(["question", "text_only"])):
        assert_same_tokens(model, inputs, max_new_tokens=3)
