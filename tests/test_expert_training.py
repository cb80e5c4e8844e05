"""Training LLaVA with experts: evolution against its equations, stages move what they should, exact resume."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import distributed_experts
import pytest
import tiny
import tiny_moe
import torch
from accelerate.optimizer import AcceleratedOptimizer
from expert_helpers import arguments, rows, stack, trainer_for
from transformers import (
    AutoModelForImageTextToText,
    LlavaForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainerState,
)

from roe_llava import MoeLlavaForConditionalGeneration
from roe_llava.convert.kinds import MOE
from roe_llava.convert.upcycle import upcycle
from roe_llava.training.expert_evolution import Evolution, ExpertEvolutionCallback, evolved, packed_parameters
from roe_llava.training.expert_stages import STAGES, ExpertStage, expert_stage

ROOT = Path(__file__).parent.parent
MODES = ("ema", "update", "literal")
KINDS = ("moe-stage3", "evomoe-evolution", "evomoe-routers")


def upcycled(decoder="llama", **kwargs):
    """A model of equal experts, as it is before they evolve."""
    return tiny_moe.equal_experts(tiny_moe.moe_model(decoder, **kwargs))


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def moved(model, before):
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


# ----------------------------------------------------------------------------------------------------------- evolution


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_is_its_equation(mode):
    experts, betas = torch.tensor([[8.0, 4.0], [1.0, 2.0], [3.0, -1.0]]), torch.tensor([0.75, 0.5])
    before, gradient = torch.tensor([16.0, 0.0]), torch.tensor([-4.0, 2.0])
    expected = {
        "ema": [[0.75 * 1 + 0.25 * 8, 0.75 * 2 + 0.25 * 4], [0.5 * 3 + 0.5 * 8, 0.5 * -1 + 0.5 * 4]],
        "update": [[0.75 * 16 + 0.25 * 8, 0.25 * 4], [0.5 * 16 + 0.5 * 8, 0.5 * 4]],
        "literal": [[0.75 * 16 + 0.25 * -4, 0.25 * 2], [0.5 * 16 + 0.5 * -4, 0.5 * 2]],
    }
    assert torch.equal(evolved(experts, betas, mode, before, gradient), torch.tensor(expected[mode]))


def test_betas_lie_in_the_ranges_and_follow_from_the_step_alone():
    evolution = Evolution()
    drawn = torch.stack([evolution.betas(step, 2) for step in range(500)])
    for number, (low, high) in enumerate(((0.90, 0.99), (0.80, 0.89), (0.70, 0.79))):
        ours = drawn[..., number]
        assert ours.min() >= low and ours.max() <= high
        assert ours.max() - ours.min() > 0.08 and ours.mean() == pytest.approx((low + high) / 2, abs=0.005)
    assert torch.equal(drawn[:, 0], drawn[:, 1])
    assert torch.equal(drawn[7], evolution.betas(7, 2))
    assert not torch.equal(drawn[7], Evolution(seed=1).betas(7, 2))


def test_layers_may_have_draws_of_their_own():
    drawn = Evolution(beta_per_layer=True).betas(3, 5)
    assert len(set(drawn[:, 0].tolist())) == 5


class Watch(TrainerCallback):
    """Packed parameters before and after every optimizer step, and expert 1's gradient."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        flat = [one for layer in packed_parameters(model) for one in layer]
        self.seen.append({"before": [one.detach().clone() for one in flat], "grad": [one.grad.clone() for one in flat]})

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen[-1]["after"] = [one.detach().clone() for layer in packed_parameters(model) for one in layer]


@pytest.mark.parametrize(("decoder", "tokens"), [("llama", "first"), ("llama", "routed"), ("phi", "first")])
@pytest.mark.parametrize("mode", MODES)
def test_every_step_of_a_run_is_the_equation(tmp_path, mode, decoder, tokens):
    evolution, watch = Evolution(mode, seed=3, tokens=tokens), Watch()
    trainer = trainer_for(
        upcycled(decoder), tmp_path, ExpertStage("evolution", evolution=evolution), gradient_accumulation_steps=2
    )
    trainer.add_callback(watch)
    trainer.train()
    assert len(watch.seen) == 4
    for step, seen in enumerate(watch.seen):
        betas = evolution.betas(step, 2)[0]
        for before, gradient, after in zip(seen["before"], seen["grad"], seen["after"], strict=True):
            assert gradient[0].abs().sum() > 0 and gradient[1:].abs().sum() == 0
            assert not torch.equal(before[0], after[0])
            for number, beta in enumerate(betas.tolist(), start=1):
                old = before[number] if mode == "ema" else before[0]
                new = gradient[0] if mode == "literal" else after[0]
                torch.testing.assert_close(after[number], beta * old + (1 - beta) * new, rtol=1e-6, atol=1e-7)


def test_experts_grow_apart_in_the_order_of_their_betas(tmp_path):
    model = upcycled()
    trainer_for(model, tmp_path, STAGES["evomoe-evolution"], steps=6).train()
    packed = tiny_moe.blocks_of(model)[0].experts.down_proj
    distances = [(packed[number] - packed[0]).norm().item() for number in (1, 2, 3)]
    assert distances[0] > distances[1] > distances[2] > 0


@pytest.mark.parametrize("tokens", ["first", "routed"])
def test_tokens_go_through_expert_one_or_where_routers_send_them(tmp_path, tokens):
    model = tiny_moe.moe_model(num_experts_per_tok=1)
    trainer = trainer_for(model, tmp_path, expert_stage("evomoe-evolution", evolution=Evolution(tokens=tokens)))
    batch = stack(rows()[:2])
    model.train()
    with torch.no_grad():
        loss = trainer.compute_loss(model, trainer._prepare_inputs(dict(batch)))
        routed = model(**batch).loss
        dense = tiny_moe.dense_of(model)(**batch).loss
    torch.testing.assert_close(loss, dense if tokens == "first" else routed)
    assert not torch.allclose(dense, routed)


@pytest.mark.parametrize("tokens", ["first", "routed"])
def test_evolution_moves_experts_alone(tmp_path, tokens):
    model = upcycled(router_type="token_aware")
    before = snapshot(model)
    trainer_for(model, tmp_path, expert_stage("evomoe-evolution", evolution=Evolution(tokens=tokens))).train()
    assert moved(model, before) == {name for name in before if ".mlp.experts." in name}


def test_evaluation_in_the_evolution_stage_is_of_expert_one(tmp_path):
    model = tiny_moe.moe_model()
    found = trainer_for(model, tmp_path, STAGES["evomoe-evolution"], per_device_eval_batch_size=8).evaluate()
    with torch.no_grad():
        dense = tiny_moe.dense_of(model)(**stack(rows())).loss
    assert found["eval_loss"] == pytest.approx(dense.item(), rel=1e-5)


def test_the_callback_serves_the_stock_trainer_and_leaves_no_hook(tmp_path):
    model, evolution = upcycled(), Evolution()
    callback = ExpertEvolutionCallback(evolution)
    Trainer(model, arguments(tmp_path), train_dataset=rows(), data_collator=stack, callbacks=[callback]).train()
    packed = tiny_moe.blocks_of(model)[2].experts.down_proj
    assert not torch.equal(packed[1], packed[0])
    model.train()(**stack(rows()[:4])).loss.backward()
    assert packed.grad[1:].abs().sum() > 0


def test_experts_stay_float32_where_bfloat16_computes(tmp_path):
    model, watch = upcycled(), Watch()
    trainer = trainer_for(model, tmp_path, STAGES["evomoe-evolution"], bf16=True)
    trainer.add_callback(watch)
    trainer.train()
    betas = STAGES["evomoe-evolution"].evolution.betas(0, 2)[0].tolist()
    before, after = watch.seen[0]["before"][0], watch.seen[0]["after"][0]
    assert after.dtype == torch.float32 and not torch.equal(after[0], before[0])
    torch.testing.assert_close(after[3], betas[2] * before[3] + (1 - betas[2]) * after[0], rtol=1e-6, atol=1e-7)


# --------------------------------------------------------------------------------------------------- one expert alone


@pytest.mark.parametrize("decoder", tiny_moe.DECODERS)
def test_a_single_expert_is_the_dense_model_with_its_weights(decoder):
    model, inputs = tiny_moe.moe_model(decoder), tiny.batch()
    with torch.no_grad():
        ours, dense = model(**inputs, single_expert=0), tiny_moe.dense_of(model)(**inputs)
        other = model(**inputs, single_expert=3)
    torch.testing.assert_close(ours.logits, dense.logits)
    assert not torch.allclose(other.logits, dense.logits, atol=1e-2)


def test_a_single_expert_generates_as_the_dense_model():
    model, inputs = tiny_moe.moe_model(router_type="token_aware"), tiny.batch()
    settings = {"max_new_tokens": 6, "do_sample": False}
    found = model.generate(**inputs, single_expert=0, **settings)
    assert torch.equal(found, tiny_moe.dense_of(model).generate(**inputs, **settings))


def test_a_single_expert_trains_under_gradient_checkpointing():
    gradients = []
    for checkpointed in (False, True):
        model = tiny_moe.moe_model().train()
        if checkpointed:
            model.activation_checkpointing_enable()
        model(**stack(rows()[:2]), single_expert=0).loss.backward()
        gradients.append(tiny_moe.blocks_of(model)[0].experts.down_proj.grad)
    torch.testing.assert_close(gradients[1], gradients[0])
    assert gradients[0][0].abs().sum() > 0 and gradients[0][1:].abs().sum() == 0


@pytest.mark.parametrize("number", [4, -1, True, 1.0])
def test_an_expert_that_is_not_there_is_named(number):
    with pytest.raises(ValueError, match=r"single_expert.*\[0, 4\).*" + str(number)):
        tiny_moe.moe_model()(**tiny.batch(), single_expert=number)


# -------------------------------------------------------------------------------------------------------------- stages


@pytest.mark.parametrize("router", tiny_moe.ROUTERS)
@pytest.mark.parametrize(
    ("stage", "parts"),
    [
        (STAGES["moe-stage3"], (".mlp.experts.", ".mlp.router.")),
        (expert_stage("moe-stage3", dense_mlps=True, projector=True), (".mlp.", "multi_modal_projector")),
        (STAGES["evomoe-routers"], (".mlp.router.",)),
    ],
)
def test_a_stage_moves_what_it_says_and_nothing_else(tmp_path, stage, parts, router):
    model = tiny_moe.moe_model(router_type=router)
    before = snapshot(model)
    trainer_for(model, tmp_path, stage).train()
    wanted = {name for name in before if any(part in name for part in parts) and "vision_tower" not in name}
    assert moved(model, before) == wanted


def test_the_warm_up_moves_all_of_a_dense_llava_but_its_tower(tmp_path):
    model = tiny_moe.dense_of(tiny_moe.moe_model())
    before = snapshot(model)
    trainer_for(model, tmp_path, STAGES["evomoe-warmup"]).train()
    assert moved(model, before) == {name for name in before if "vision_tower" not in name}


def test_stages_set_the_papers_config(tmp_path):
    found = {}
    for name in KINDS:
        model = tiny_moe.moe_model()
        trainer_for(model, tmp_path, STAGES[name])
        found[name] = (model.config.num_experts_per_tok, model.config.router_aux_loss_coef)
    assert found == {"moe-stage3": (2, 0.01), "evomoe-evolution": (1, 0.01), "evomoe-routers": (1, 0.001)}


def test_the_log_holds_the_balancing_loss(tmp_path):
    model = tiny_moe.moe_model()
    settings = {"steps": 8, "per_device_train_batch_size": 1, "learning_rate": 0.0, "logging_steps": 8}
    trainer = trainer_for(model, tmp_path, STAGES["moe-stage3"], **settings)
    trainer.train()
    logged = [entry["aux_loss"] for entry in trainer.state.log_history if "aux_loss" in entry]
    with torch.no_grad():
        own = [model(**stack([row])).aux_loss.item() for row in rows()]
    assert logged == [pytest.approx(sum(own) / 8, rel=1e-5)] and max(own) - min(own) > 0.01
    evolving = trainer_for(upcycled(), tmp_path, STAGES["evomoe-evolution"], logging_steps=2)
    evolving.train()
    assert not any("aux_loss" in entry for entry in evolving.state.log_history)


# -------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("trained_only", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_resuming_gives_the_weights_of_an_unbroken_run(tmp_path, name, trained_only):
    stage = expert_stage(name, evolution=Evolution("literal", seed=5)) if "evolution" in name else STAGES[name]
    whole, resumed = (tiny_moe.moe_model(router_type="token_aware") for _ in range(2))
    settings = {"trained_only": trained_only, "save_strategy": "steps", "save_steps": 2}
    trainer_for(whole, tmp_path / "whole", stage, **settings).train()
    before = snapshot(resumed)
    again = trainer_for(resumed, tmp_path / "again", stage, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert moved(resumed, before) and not moved(resumed, snapshot(whole))
    if trained_only:
        assert not (tmp_path / "whole" / "checkpoint-2" / "model.safetensors").exists()


def test_resuming_the_warm_up_restores_a_stock_llava(tmp_path):
    dense = tiny_moe.dense_of(tiny_moe.moe_model())
    resumed = copy.deepcopy(dense)
    stage = STAGES["evomoe-warmup"]
    trainer_for(dense, tmp_path / "whole", stage, save_strategy="steps", save_steps=2).train()
    again = trainer_for(resumed, tmp_path / "again", stage)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert not moved(resumed, snapshot(dense))


def test_resuming_is_exact_where_frozen_weights_have_16_bits(tmp_path):
    def mixed():
        model = tiny_moe.moe_model(router_type="token_aware").bfloat16()
        for block in tiny_moe.blocks_of(model).values():
            block.router.float()
        return model

    whole, resumed = mixed(), mixed()
    stage = STAGES["evomoe-routers"]
    trainer_for(whole, tmp_path / "whole", stage, save_strategy="steps", save_steps=2).train()
    again = trainer_for(resumed, tmp_path / "again", stage)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert not moved(resumed, snapshot(whole))
    assert whole.lm_head.weight.dtype == torch.bfloat16


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    model, kept = tiny_moe.moe_model(), {}
    settings = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    trainer = trainer_for(
        model, tmp_path, STAGES["moe-stage3"], load_best_model_at_end=True, learning_rate=0.3, **settings
    )

    class Keep(TrainerCallback):
        def on_save(self, args, state, control, model=None, **kwargs):
            kept[f"checkpoint-{state.global_step}"] = snapshot(model)

    trainer.add_callback(Keep())
    trainer.train()
    best = trainer.state.best_model_checkpoint.rsplit("/", 1)[-1]
    assert not moved(model, kept[best])


def test_a_checkpoint_of_another_stage_is_refused(tmp_path):
    trainer_for(tiny_moe.moe_model(), tmp_path, STAGES["moe-stage3"], save_strategy="steps", save_steps=2).train()
    other = trainer_for(tiny_moe.moe_model(), tmp_path / "b", STAGES["evomoe-routers"])
    with pytest.raises(ValueError, match="kind 'experts' there, 'routers' here"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


# -------------------------------------------------------------------------------------------------------- accumulation


def gradients(model, folder, size, data, coefficient):
    """What the optimizer gets in the first step over all of the data, in micro-batches of a size."""
    found = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            found.update({name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None})

    trainer = trainer_for(
        model,
        folder,
        expert_stage("moe-stage3", router_aux_loss_coef=coefficient),
        steps=1,
        data=data,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=len(data) // size,
        max_grad_norm=0.0,
    )
    trainer.add_callback(Keep())
    trainer.train()
    return found


def test_accumulated_steps_equal_one_large_batch(tmp_path):
    data = rows(8)  # of two and three labels, shuffled: micro-batches have unlike shares of them
    large, small = (gradients(tiny_moe.moe_model(), tmp_path, size, data, 0.0) for size in (8, 2))
    for name, gradient in large.items():
        torch.testing.assert_close(small[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_the_balancing_loss_of_accumulated_steps_equals_that_of_a_large_batch_of_the_same_composition(tmp_path):
    """Shares and mean probabilities are those of a micro-batch: their product is the same where these are alike."""
    data = rows(1) * 8
    large, small = (gradients(tiny_moe.moe_model(), tmp_path, size, data, 10.0) for size in (8, 2))
    without = gradients(tiny_moe.moe_model(), tmp_path, 8, data, 0.0)
    for name, gradient in large.items():
        torch.testing.assert_close(small[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    assert any((large[name] - without[name]).abs().max() > 1e-2 for name in large if ".router." in name)


def test_accumulated_micro_batches_count_by_their_labels(tmp_path):
    data = rows(8)
    ours = gradients(tiny_moe.moe_model(), tmp_path, 1, data, 10.0)
    model = tiny_moe.moe_model().train()
    model.config.router_aux_loss_coef = 10.0
    total = sum((one["labels"] != -100).sum().item() for one in data)
    for one in data:
        share = (one["labels"] != -100).sum().item() / total
        (share * model(**stack([one])).loss).backward()
    parameters = dict(model.named_parameters())
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, parameters[name].grad, rtol=1e-4, atol=1e-5, msg=name)


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"mode": "exact"}, "exact"),
        ({"beta_ranges": ((0.9, 0.8),)}, r"\(0.9, 0.8\)"),
        ({"beta_ranges": ((0.9, 1.1),)}, "1.1"),
        ({"beta_ranges": ()}, "beta_ranges"),
        ({"tokens": "all"}, "all"),
    ],
)
def test_a_wrong_evolution_is_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        Evolution(**fields)


def test_ranges_read_from_json_equal_those_given():
    assert Evolution(beta_ranges=[[0.9, 0.99], [0.8, 0.89], [0.7, 0.79]]) == Evolution()


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("routers", {"projector": True}),
        ("experts", {"evolution": Evolution()}),
        ("dense", {"num_experts_per_tok": 1}),
        ("evolution", {"dense_mlps": True}),
    ],
)
def test_a_field_that_a_stage_does_not_read_is_named(kind, fields):
    with pytest.raises(ValueError, match=f"{kind}.*{next(iter(fields))}"):
        ExpertStage(kind, **fields)


def test_unknown_stages_are_named():
    with pytest.raises(ValueError, match=r"moe-stage3, .*evomoe-routers"):
        expert_stage("stage3")
    with pytest.raises(ValueError, match="router"):
        ExpertStage("router")


def test_a_model_of_the_wrong_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"LlavaForConditionalGeneration.*upcycle"):
        trainer_for(tiny_moe.dense_of(tiny_moe.moe_model()), tmp_path, STAGES["evomoe-routers"])
    with pytest.raises(ValueError, match="experts come after it"):
        trainer_for(tiny_moe.moe_model(), tmp_path, STAGES["evomoe-warmup"])


def test_fields_that_contradict_the_config_leave_it_as_it_was(tmp_path):
    model = tiny_moe.moe_model(second_choice_noise="training")
    with pytest.raises(ValueError, match="second_choice_noise"):
        trainer_for(model, tmp_path, STAGES["evomoe-routers"])
    assert model.config.num_experts_per_tok == 2


@pytest.mark.parametrize(
    ("name", "kwargs", "settings", "said"),
    [
        ("evomoe-evolution", {}, {"weight_decay": 0.1}, "weight_decay 0.1"),
        ("evomoe-evolution", {"num_experts": 3}, {}, "4 experts, got a model with 3"),
        ("moe-stage3", {}, {"label_smoothing_factor": 0.1}, "label_smoothing_factor 0.1"),
    ],
)
def test_what_a_stage_cannot_do_is_an_error(tmp_path, name, kwargs, settings, said):
    with pytest.raises(ValueError, match=said):
        trainer_for(tiny_moe.moe_model(**kwargs), tmp_path, STAGES[name], **settings)


@pytest.mark.parametrize("name", ["moe-stage3", "evomoe-evolution"])
def test_weights_of_16_bits_do_not_learn(tmp_path, name):
    with pytest.raises(ValueError, match=r"bfloat16.*float32"):
        trainer_for(tiny_moe.moe_model().bfloat16(), tmp_path, STAGES[name])


def test_the_three_stages_lead_from_a_dense_llava_to_evomoe(tmp_path):
    """Warm-up, copies of the MLPs, evolution, routers; the result reopens and answers."""
    model = tiny_moe.moe_model(router_type="token_aware", num_experts_per_tok=1)
    dense = tiny_moe.dense_of(model)
    assert type(dense) is LlavaForConditionalGeneration
    trainer_for(dense, tmp_path, STAGES["evomoe-warmup"]).train()
    dense.save_pretrained(tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "moe", top_k=1, router="token_aware")
    model = type(model).from_pretrained(tmp_path / "moe", dtype=torch.float32)
    for name in ("evomoe-evolution", "evomoe-routers"):
        trainer_for(model, tmp_path, STAGES[name], steps=3).train()
    model.save_pretrained(tmp_path / "evomoe")
    reopened = type(model).from_pretrained(tmp_path / "evomoe")
    inputs = tiny.batch()
    with torch.no_grad():
        assert torch.equal(reopened(**inputs).logits, model.eval()(**inputs).logits)
    assert reopened.config.num_experts_per_tok == 1 and reopened.config.router_aux_loss_coef == 0.001


# ----------------------------------------------------------------------------------- several processes, the Hub's code


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Folder of what each of two processes ends with, by stage."""
    out = tmp_path_factory.mktemp("ddp")
    paths = [ROOT.parent, ROOT / "tests", os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "tests" / "distributed_experts.py"), str(out), *KINDS]
    done = subprocess.run(command, env=environment, cwd=out, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.mark.parametrize("stage", KINDS)
def test_two_processes_end_alike_and_as_one(tmp_path, two_processes, stage):
    first, second = (torch.load(two_processes / f"{stage}-{rank}.pt") for rank in (0, 1))
    start, one = distributed_experts.model().state_dict(), distributed_experts.train(tmp_path, stage)
    assert any(not torch.equal(one[name], start[name]) for name in one)
    # The balancing loss is a mean over a process's rows, so that with it two processes are not quite one.
    tolerance = 1e-6 if stage == "evomoe-evolution" else 1e-3
    for name, tensor in one.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], tensor, rtol=0, atol=tolerance, msg=name)


def test_a_model_of_the_hubs_code_evolves(tmp_path):
    upcycled().save_pretrained(tmp_path / "model")
    MOE.write_code(tmp_path / "model")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", trust_remote_code=True)
    assert type(model) is not MoeLlavaForConditionalGeneration
    before = snapshot(model)
    trainer_for(model, tmp_path, STAGES["evomoe-evolution"], save_strategy="steps", save_steps=2).train()
    assert moved(model, before) == {name for name in before if ".mlp.experts." in name}
    packed = tiny_moe.blocks_of(model)[0].experts.down_proj
    assert not torch.equal(packed[1], packed[0])
    resumed = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", trust_remote_code=True)
    again = trainer_for(resumed, tmp_path / "again", STAGES["evomoe-evolution"])
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not moved(resumed, snapshot(model))


def test_a_step_that_the_scaler_left_out_evolves_nothing():
    model, callback = tiny_moe.moe_model(), ExpertEvolutionCallback(Evolution())
    optimizer = AcceleratedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    before, state = snapshot(model), TrainerState(global_step=0)
    optimizer._is_overflow = True  # what float16's scaler finds in gradients that overflowed
    callback.on_optimizer_step(None, state, None, model=model, optimizer=optimizer)
    assert not moved(model, before)
    optimizer._is_overflow = False
    callback.on_optimizer_step(None, state, None, model=model, optimizer=optimizer)
    assert moved(model, before)
