"""Choices of experts by hand, the load balancing loss against its equation, token-aware routers against theirs."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch
from tiny import IMAGE, alone, batch
from tiny_moe import blocks_of, choices, moe_model
from torch import tensor

from roe_llava import choice_moe
from roe_llava.choice_moe import (
    expert_capacity,
    expert_weights,
    kept_by_draw,
    kept_in_order,
    load_balancing_loss,
    top_experts,
)
from roe_llava.routers_moe import Hypernetwork

GREEDY = {"max_new_tokens": 4, "do_sample": False}
LOGITS = tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0], [1.0, 0.0, -1.0], [2.0, 1.0, 0.0]])
TOP_2 = tensor([[0, 2], [1, 2], [0, 1], [0, 1]])
ALL = torch.ones(4, dtype=torch.bool)

# ---------------------------------------- choice and weights


def test_top_k_by_hand():
    assert torch.equal(top_experts(LOGITS, 2), TOP_2)
    assert torch.equal(top_experts(LOGITS, 1), TOP_2[:, :1])
    assert torch.equal(top_experts(LOGITS, 3), tensor([[0, 2, 1], [1, 2, 0], [0, 1, 2], [0, 1, 2]]))


def test_noise_moves_the_second_choice_and_never_the_first():
    noise = tensor([[-9.0, 3.0, 0.0], [9.0, -9.0, 0.0], [-9.0, 0.0, 1.5], [0.0, 0.0, 0.0]])
    assert torch.equal(top_experts(LOGITS, 2, noise), tensor([[0, 1], [1, 0], [0, 2], [0, 1]]))


def test_weights_by_hand():
    e = torch.e
    kept = torch.ones_like(TOP_2, dtype=torch.bool)
    shares = expert_weights(LOGITS, TOP_2, kept, normalize=True)
    torch.testing.assert_close(shares[0], tensor([e / (e + 1), 1 / (e + 1)]))  # logits 3 and 2
    probabilities = expert_weights(LOGITS, TOP_2, kept, normalize=False)
    torch.testing.assert_close(probabilities[0], tensor([e**2, e]) / (e**2 + e + 1))
    kept = tensor([[True, False], [False, True], [False, False], [True, True]])
    dropped = expert_weights(LOGITS, TOP_2, kept, normalize=True)
    torch.testing.assert_close(dropped[:3], tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))


@pytest.mark.parametrize(
    ("tokens", "experts", "chosen", "factor", "least", "expected"),
    [
        (64, 4, 2, 1.5, 0, 48),
        (64, 4, 2, 0.4, 0, 13),
        (64, 4, 2, 0.5, 40, 40),
        (64, 4, 1, 1.0, 0, 16),
        (5, 4, 1, 1.0, 0, 2),
    ],
)
def test_capacity_by_hand(tokens, experts, chosen, factor, least, expected):
    assert expert_capacity(tensor(tokens), experts, chosen, factor, least) == expected


def test_places_go_to_first_choices_in_order_then_to_second_ones():
    # Expert 0 is wanted first by tokens 0, 2, 3; expert 1 first by token 1, second by 2 and 3; expert 2 second by 0, 1.
    kept = kept_in_order(TOP_2, ALL, 3, tensor(2.0))
    assert torch.equal(kept, tensor([[True, True], [True, True], [True, True], [False, False]]))
    kept = kept_in_order(TOP_2, ALL, 3, tensor(1.0))
    assert torch.equal(kept, tensor([[True, True], [True, False], [False, False], [False, False]]))


def test_padding_takes_no_place():
    kept = kept_in_order(TOP_2, tensor([False, True, True, True]), 3, tensor(2.0))
    assert torch.equal(kept, tensor([[False, False], [True, True], [True, True], [True, False]]))
    draws = tensor([[0.9, 0.1, 0.1], [0.5, 0.5, 0.5], [0.2, 0.9, 0.9], [0.3, 0.1, 0.1]])
    assert kept_by_draw(TOP_2[:, :1], tensor([False, True, True, True]), draws, tensor(1.0))[:, 0].tolist() == [
        False,
        True,
        False,
        True,
    ]


def test_with_one_expert_the_largest_draws_keep_their_places():
    draws = tensor([[0.1, 0.9, 0.9], [0.5, 0.0, 0.5], [0.3, 0.9, 0.9], [0.2, 0.1, 0.1]])
    assert kept_by_draw(TOP_2[:, :1], ALL, draws, tensor(2.0))[:, 0].tolist() == [False, True, True, True]


def test_capacity_drops_in_training_alone():
    model = moe_model(expert_capacity_factor=0.3)
    inputs = batch()
    evaluated = torch.stack(model(**inputs, output_router_logits=True).expert_weights)
    trained = torch.stack(model.train()(**inputs, output_router_logits=True).expert_weights)
    real = inputs["attention_mask"].bool()
    assert (evaluated > 0).all() and (trained[:, real] == 0).any() and (trained[:, ~real] == 0).all()
    limit = -(-int(real.sum()) * 2 * 0.3 // 4)
    for layer, index in enumerate(choices(model, inputs)):
        taken = torch.bincount(index[trained[layer] > 0], minlength=4)
        assert taken.max() == limit


@pytest.mark.parametrize(("mode", "noisy"), [("never", ()), ("training", (True,)), ("always", (True, False))])
def test_noise_is_drawn_when_asked_for(mode, noisy, monkeypatch):
    calls = []
    drawn = choice_moe.gumbel_noise
    monkeypatch.setattr(choice_moe, "gumbel_noise", lambda logits: calls.append(1) or drawn(logits))
    model, found = moe_model(second_choice_noise=mode), {}
    for is_training in (True, False):
        calls.clear()
        model.train(is_training)(**alone("question"))
        found[is_training] = len(calls)
    assert found == {is_training: 2 if is_training in noisy else 0 for is_training in (True, False)}


def test_gumbel_noise_has_its_mean_and_spread():
    noise = choice_moe.gumbel_noise(torch.empty(200_000))
    assert abs(noise.mean() - 0.5772) < 0.02 and abs(noise.var() - torch.pi**2 / 6) < 0.05


# ---------------------------------------- load balancing loss


def test_balancing_loss_against_its_equation():
    probabilities, total = LOGITS.softmax(-1), 0.0
    for expert in range(3):
        chosen = sum(int(row.argmax() == expert) for row in LOGITS) / 4
        mean = sum(row[expert] for row in probabilities) / 4
        total += chosen * mean
    torch.testing.assert_close(load_balancing_loss(LOGITS, LOGITS.argmax(-1), ALL), 3 * total)


def test_balancing_loss_is_1_when_even_and_e_when_one_expert_takes_all():
    even = 20 * torch.eye(3).repeat(2, 1)
    torch.testing.assert_close(load_balancing_loss(even, even.argmax(-1), torch.ones(6).bool()), tensor(1.0))
    uneven = 20 * torch.eye(3)[:1].repeat(6, 1)
    torch.testing.assert_close(load_balancing_loss(uneven, uneven.argmax(-1), torch.ones(6).bool()), tensor(3.0))


def test_balancing_loss_leaves_padding_out():
    some = tensor([True, False, True, False])
    expected = load_balancing_loss(LOGITS[some], TOP_2[some, 0], ALL[:2])
    torch.testing.assert_close(load_balancing_loss(LOGITS, TOP_2[:, 0], some), expected)
    assert load_balancing_loss(LOGITS, TOP_2[:, 0], ~ALL) == 0


@pytest.mark.parametrize("router", ["linear", "token_aware"])
def test_autocast_rounds_neither_decisions_nor_the_balancing_loss(router):
    block = blocks_of(moe_model(router_type=router))[0]
    tokens, is_image = torch.randn(6, tiny.HIDDEN), torch.arange(6) < 3
    rows = is_image, is_image.nonzero()[:, 0], (~is_image).nonzero()[:, 0]
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = block.router(tokens, *rows)
            chosen = top_experts(logits, 2)
            weights = expert_weights(logits, chosen, torch.ones_like(chosen).bool(), normalize=True)
            found.append((logits, weights, load_balancing_loss(logits, chosen[:, 0], torch.ones(6).bool())))
    assert all(one.dtype == torch.float32 and torch.equal(one, other) for one, other in zip(*found, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("router", ["linear", "token_aware"])
def test_padding_changes_the_loss_where_it_counts_alone(router):
    model = moe_model(router_type=router)
    narrow, wide = batch(("question", "text_only")), batch(("question", "text_only", "other_question"))
    padding = wide["input_ids"].shape[1] - narrow["input_ids"].shape[1]
    wide = {name: wide[name][:2] for name in ("input_ids", "attention_mask")}
    wide["pixel_values"] = narrow["pixel_values"]
    assert padding > 0
    losses = [model(**one, output_router_logits=True).aux_loss for one in (narrow, wide)]
    torch.testing.assert_close(losses[0], losses[1])
    model.config.count_padding = True
    counted = [model(**one, output_router_logits=True).aux_loss for one in (narrow, wide)]
    assert (counted[0] - counted[1]).abs() > 1e-3


def test_a_mask_that_hides_what_is_padding_counts_all_tokens():
    model, inputs = moe_model(), alone("text_only")
    length = inputs["input_ids"].shape[1]
    mask = torch.ones(1, 1, length, length).tril().bool()
    outputs = model(**inputs, attention_mask=mask, output_router_logits=True)
    torch.testing.assert_close(outputs.aux_loss, model(**inputs, output_router_logits=True).aux_loss)


# ---------------------------------------- token-aware routers


def test_a_hypernetwork_is_its_equation_with_the_matrices_written_out():
    hidden, inner, rank, width = 6, 3, 2, 5
    net = Hypernetwork(hidden, inner, rank, width)
    token = torch.randn(hidden)
    code = torch.cat([net.encode.weight @ token + net.encode.bias, torch.ones(1)])
    # (size, H + 1, inputs): the last slice along H + 1 is b2, the others are w2.
    down = (net.down.weight.view(2 * rank, inner + 1, hidden) * code[:, None]).sum(1)
    up = (net.up.weight.view(width, inner + 1, rank) * code[:, None]).sum(1)
    gate, value = (down @ token).chunk(2)
    expected = up @ (torch.nn.functional.silu(gate) * value)
    torch.testing.assert_close(net(token[None])[0], expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["image", "text"])
def test_image_and_text_tokens_go_through_their_own_hypernetwork(kind):
    model, inputs = moe_model(router_type="token_aware"), batch()
    before = model(**inputs, output_router_logits=True).router_logits[0]
    for parameter in getattr(blocks_of(model)[0].router, kind).parameters():
        parameter.add_(torch.randn_like(parameter))
    after = model(**inputs, output_router_logits=True).router_logits[0]
    moved = (before != after).any(-1)
    is_image = inputs["input_ids"] == IMAGE
    assert torch.equal(moved, is_image if kind == "image" else ~is_image)


@torch.no_grad()
def test_generated_tokens_are_text():
    model, seen = moe_model(router_type="token_aware"), {"image": [], "text": []}
    for kind, counts in seen.items():
        net = getattr(blocks_of(model)[2].router, kind)
        net.register_forward_pre_hook(lambda module, args, counts=counts: counts.append(args[0].shape[0]))
    # The prompt of the second row ends with an image: what was last seen does not say what is next.
    model.generate(**batch(("question", "empty_question")), **GREEDY)
    assert seen == {"image": [8, 0, 0, 0], "text": [2 * len(tiny.PROMPTS["question"]) - 8, 2, 2, 2]}


@torch.no_grad()
def test_threads_that_share_a_model_do_not_share_a_routing():
    model, names = moe_model(router_type="token_aware"), ("question", "two_images")
    expected = {name: model(**alone(name)).logits for name in names}
    meet = threading.Barrier(2, timeout=30)

    def wait(module, args):
        meet.wait()

    # Both threads are inside the same layer, behind its attention, before either goes on to the experts.
    blocks_of(model)[2].register_forward_pre_hook(wait)
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda name: torch.no_grad()(model)(**alone(name)).logits, names)
    assert all(torch.equal(logits, expected[name]) for name, logits in zip(names, found, strict=True))


@torch.no_grad()
def test_embeddings_need_token_types_and_give_the_same_with_them():
    model, inputs = moe_model(router_type="token_aware"), alone("question")
    ids = inputs["input_ids"]
    features = torch.cat(model.get_image_features(inputs["pixel_values"]).pooler_output)
    embeds = model.get_input_embeddings()(ids)
    merged = embeds.masked_scatter((ids == IMAGE)[..., None], features)
    types = (ids == IMAGE).long()
    expected, written = model(**inputs).logits, model.generate(**inputs, **GREEDY)[:, ids.shape[1] :]
    assert torch.equal(model(inputs_embeds=merged, mm_token_type_ids=types).logits, expected)
    assert torch.equal(model(inputs_embeds=embeds, pixel_values=inputs["pixel_values"]).logits, expected)
    ours = model.generate(inputs_embeds=merged, mm_token_type_ids=types, **GREEDY)
    assert torch.equal(ours, written)
    assert (model(inputs_embeds=merged, mm_token_type_ids=torch.zeros_like(types)).logits - expected).abs().max() > 0.01
    with pytest.raises(ValueError, match="inputs_embeds without mm_token_type_ids: a token-aware router has to know"):
        model(inputs_embeds=merged)
    with pytest.raises(ValueError, match=r"shape \(B, S\) = \(1, 11\) of inputs_embeds, got \(1, 3\)"):
        model(inputs_embeds=merged, mm_token_type_ids=types[:, :3])


@torch.no_grad()
def test_a_linear_router_asks_for_no_token_types():
    model, inputs = moe_model(), alone("text_only")
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    assert torch.equal(model(inputs_embeds=embeds).logits, model(**inputs).logits)
