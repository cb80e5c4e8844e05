"""A RoE checkpoint trained as llava-hf ones are, with PEFT's LoRA and TRL's `SFTTrainer`; then saved and opened."""

import contract_helpers as contract
import pytest
import tiny
import torch
from contract_helpers import GREEDY, chats, details, open_model, open_processor, prepared, turn

pytest.importorskip("peft")
pytest.importorskip("trl")

from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from trl import SFTConfig, SFTTrainer

from roe_llava import modeling_roe_llava
from roe_llava.examples.tiny_world.demo import SHIPPED
from roe_llava.loading_roe import is_roe_parameter
from roe_llava.training.lora import TARGETS

# PEFT and TRL ask by names that Transformers will take away; nothing here does.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated"),
]

WHOLE_PARTS = ["router", "adapter", "routing_tokens"]


@pytest.fixture(scope="module")
def processor(shipped_roe):
    return open_processor(shipped_roe)


@pytest.fixture(scope="module")
def inputs(processor):
    return prepared(processor, chats())


@pytest.fixture(scope="module")
def untouched(shipped_roe):
    """The checkpoint as it is."""
    return open_model(shipped_roe)


# ---------------------------------------- LoRA


def with_two_loras(model):
    """A PEFT model of two LoRA adapters that change answers, "one" of them active."""
    model = get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS), adapter_name="one")
    model.add_adapter("two", LoraConfig(r=2, target_modules=TARGETS))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    return model.eval()


@pytest.fixture
def loras(shipped_roe):
    return with_two_loras(open_model(shipped_roe))


def logits_of(model, inputs, adapter=None):
    if adapter is not None:
        model.set_adapter(adapter)
    with torch.no_grad():
        return model(**inputs).logits


def test_lora_adapters_are_swapped_and_switched_off(loras, untouched, inputs):
    one, two = (logits_of(loras, inputs, name) for name in ("one", "two"))
    plain = logits_of(untouched, inputs)
    assert not any(torch.allclose(left, right) for left, right in ((one, two), (one, plain), (two, plain)))
    assert torch.equal(logits_of(loras, inputs, "one"), one)
    with loras.disable_adapter():
        assert torch.equal(logits_of(loras, inputs), plain)
    generated = details(loras, inputs)
    assert torch.equal(generated.past_key_values.routes, loras(**inputs).routes)


def test_lora_adapters_save_and_reload(loras, shipped_roe, inputs, tmp_path):
    loras.save_pretrained(tmp_path)
    names = [name for name in (tmp_path / "one").iterdir() if name.suffix == ".safetensors"]
    assert [path.name for path in names] == ["adapter_model.safetensors"]
    by_peft = PeftModel.from_pretrained(open_model(shipped_roe), tmp_path / "one", adapter_name="one")
    by_peft.load_adapter(tmp_path / "two", adapter_name="two")
    by_transformers = open_model(shipped_roe)
    for name in ("one", "two"):
        by_transformers.load_adapter(str(tmp_path / name), adapter_name=name)
    for name in ("one", "two"):
        expected = logits_of(loras, inputs, name)
        assert torch.equal(logits_of(by_peft.eval(), inputs, name), expected)
        assert torch.equal(logits_of(by_transformers, inputs, name), expected)


def test_a_merged_lora_saves_and_reloads(loras, inputs, tmp_path):
    expected = logits_of(loras, inputs, "two")
    merged = loras.merge_and_unload(safe_merge=True, adapter_names=["two"])
    # Merged matrices are added before the product instead of behind it.
    torch.testing.assert_close(logits_of(merged, inputs), expected, rtol=1e-4, atol=1e-3)
    merged.save_pretrained(tmp_path)
    again = open_model(tmp_path)
    assert contract.same_tensors(again, merged) and torch.equal(logits_of(again, inputs), logits_of(merged, inputs))


def test_routing_parts_are_swapped_beside_a_lora(loras, inputs):
    model, expected = loras.get_base_model(), logits_of(loras, inputs, "one")
    for layer in model.model.language_model.layers:
        torch.nn.init.zeros_(layer.adapter.up_proj.weight)
    changed = logits_of(loras, inputs)
    assert not torch.equal(changed, expected)
    with pytest.raises(ValueError, match=r"PEFT put matrices onto the base.*check_base=False"):
        model.load_routing(SHIPPED / "roe")
    assert torch.equal(logits_of(loras, inputs), changed)
    model.load_routing(SHIPPED / "roe", check_base=False)
    assert torch.equal(logits_of(loras, inputs), expected)


def test_routing_parts_that_peft_holds_are_not_swapped(shipped_roe):
    model = open_model(shipped_roe)
    get_peft_model(model, LoraConfig(target_modules=TARGETS, modules_to_save=WHOLE_PARTS))
    with pytest.raises(ValueError, match=r"are its routing parts wrapped \(PEFT\)\? Unwrap them first"):
        model.load_routing(SHIPPED / "roe", check_base=False)


def test_a_lora_on_routers_is_refused(shipped_roe, inputs, untouched):
    wrapped = get_peft_model(open_model(shipped_roe), LoraConfig(target_modules="all-linear"))
    message = r'router of layer 0 is a PEFT .*all-linear.*exclude_modules=\["router"\]'
    for mode in (True, False):
        with pytest.raises(ValueError, match=message):
            wrapped.train(mode)(**inputs)
    settings = LoraConfig(target_modules="all-linear", exclude_modules=["router"])
    wrapped = get_peft_model(open_model(shipped_roe), settings).eval()
    # Fresh matrices add nothing.
    torch.testing.assert_close(logits_of(wrapped, inputs), logits_of(untouched, inputs))
    assert torch.equal(wrapped.generate(**inputs, **GREEDY), untouched.generate(**inputs, **GREEDY))


# ---------------------------------------- TRL


def conversations() -> Dataset:
    """Questions with their answers and pictures, as TRL takes them."""
    rows = []
    for one in contract.examples()[:2] * 2:
        question, answer, _ = one["turns"][0]
        asked = turn("user", question)
        asked["content"].insert(0, {"type": "image"})
        rows.append({"messages": [asked, turn("assistant", answer)], "images": [one["image"]]})
    return Dataset.from_list(rows)


def trainer_of(model, processor, folder, data=None, peft_config=None, **settings):
    defaults = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "max_length": None,  # image tokens are never cut
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    arguments = SFTConfig(output_dir=str(folder), **defaults | settings)
    data = conversations() if data is None else data
    return SFTTrainer(
        model=model, args=arguments, train_dataset=data, processing_class=processor, peft_config=peft_config
    )


def trained(trainer) -> dict[str, float]:
    """Trains; the largest gradient of each routing parameter seen on the way."""
    seen = {}
    for name, parameter in trainer.model.named_parameters():
        if is_roe_parameter(name) and parameter.requires_grad:
            parameter.register_hook(lambda grad, name=name: seen.update({name: grad.abs().max().item()}))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(torch.tensor(losses).isfinite())
    return seen


def test_trl_trains_the_checkpoint_which_saves_and_reloads(shipped_roe, processor, untouched, tmp_path):
    trainer = trainer_of(open_model(shipped_roe), processor, tmp_path, assistant_only_loss=True)
    batch = next(iter(trainer.get_train_dataloader()))
    # Only the answers are learnt, and no routing token reads them.
    assert torch.equal(batch["labels"] != -100, (batch["routing_segments"] == -1) & (batch["attention_mask"] == 1))
    seen = trained(trainer)
    names = {name for name in untouched.state_dict() if is_roe_parameter(name)}
    assert seen.keys() == names
    assert all(value > 0 for name, value in seen.items() if "router" in name or "routing_tokens" in name)
    moved = [
        name for name, tensor in trainer.model.state_dict().items() if not tensor.equal(untouched.state_dict()[name])
    ]
    assert any("router" in name for name in moved) and any("mlp" in name for name in moved)
    trainer.save_model(tmp_path / "out")
    again = open_model(tmp_path / "out")
    assert contract.same_tensors(again, trainer.model)
    inputs = prepared(open_processor(tmp_path / "out"), chats())
    assert torch.equal(again.generate(**inputs, **GREEDY), trainer.model.eval().generate(**inputs, **GREEDY))


def test_activation_checkpointing_in_trl_changes_nothing(shipped_roe, processor, tmp_path):
    models = []
    for checkpointing in (False, True):
        trainer = trainer_of(open_model(shipped_roe), processor, tmp_path, gradient_checkpointing=checkpointing)
        seen = trained(trainer)
        assert trainer.model.model.language_model.layers[0].gradient_checkpointing == checkpointing
        assert all(value > 0 for name, value in seen.items() if "router" in name)
        models.append(trainer.model)
    for (name, ours), theirs in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)


def test_trl_trains_a_lora_and_the_routing_parts(shipped_roe, processor, inputs, tmp_path):
    config = LoraConfig(r=4, target_modules=TARGETS, modules_to_save=WHOLE_PARTS)
    trainer = trainer_of(open_model(shipped_roe), processor, tmp_path, peft_config=config, gradient_checkpointing=True)
    seen = trained(trainer)
    routers = [value for name, value in seen.items() if "router.modules_to_save" in name]
    assert len(routers) == 7 and all(value > 0 for value in routers)
    trainer.save_model(tmp_path / "out")
    again = PeftModel.from_pretrained(open_model(shipped_roe), tmp_path / "out").eval()
    expected = logits_of(trainer.model.eval(), inputs)
    assert torch.equal(logits_of(again, inputs), expected)
    again.merge_and_unload().save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(open_model(tmp_path / "merged"), inputs), expected, rtol=1e-4, atol=1e-3)


def test_rows_of_prompt_and_completion_are_refused(shipped_roe, processor, tmp_path):
    rows = [
        {"prompt": row["messages"][:1], "completion": row["messages"][1:], "images": row["images"]}
        for row in conversations()
    ]
    trainer = trainer_of(open_model(shipped_roe), processor, tmp_path, data=Dataset.from_list(rows))
    # TRL has moved the rows of shorter prompts, their segments not: a router would read an answer.
    batch = next(iter(trainer.get_train_dataloader()))
    length = batch["routing_segments"].shape[1]
    assert ((batch["labels"][:, :length] != -100) & (batch["routing_segments"] > 0)).any()
    with pytest.raises(ValueError, match=r"routing_segments cover \d+ of \d+ tokens to learn from.*`messages`"):
        trainer.train()


def test_training_that_reads_answers_is_warned_about(monkeypatch):
    said = []
    monkeypatch.setattr(modeling_roe_llava.logger, "warning_once", said.append)
    model, inputs = tiny.routed_model().train(), tiny.batch()
    model(**inputs, labels=inputs["input_ids"])
    assert not said
    model(**inputs)
    assert "routers read answers, too" in said[0]
