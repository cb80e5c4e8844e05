"""A RoE checkpoint loaded in 4 and 8 bits by bitsandbytes on a CPU: what routes stays exact.

What the shipped model sees with is 96 wide, less than the 128 that 4-bit kernels for CPUs take: left out there.
"""

import contract_helpers as contract
import pytest
import torch
from contract_helpers import answers, chats, details, open_model, open_processor, prepared

pytest.importorskip("bitsandbytes")

from transformers import BitsAndBytesConfig

from roe_llava.adapter_roe import read_adapter
from roe_llava.examples.tiny_world.demo import SHIPPED
from roe_llava.loading_roe import is_roe_parameter

pytestmark = [
    pytest.mark.usefixtures("no_gradients"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
]

WHOLE = ["lm_head", r"model\.vision_tower", r"model\.multi_modal_projector"]
CONFIGS = {
    "4 bits": BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=WHOLE),
    "8 bits": BitsAndBytesConfig(load_in_8bit=True),
}
KINDS = {"4 bits": ("Linear4bit", torch.uint8), "8 bits": ("Linear8bitLt", torch.int8)}


@pytest.fixture(scope="module", params=CONFIGS)
def quantised(request, shipped_roe):
    """(name, model) per number of bits; computed in bfloat16, as the checkpoint is stored."""
    return request.param, open_model(
        shipped_roe, dtype=torch.bfloat16, quantization_config=CONFIGS[request.param], device_map="cpu"
    )


@pytest.fixture(scope="module")
def inputs(shipped_roe):
    return prepared(open_processor(shipped_roe), chats()).to(torch.bfloat16)


def test_routing_parts_are_not_quantised(quantised):
    name, model = quantised
    kind, dtype = KINDS[name]
    layer = model.model.language_model.layers[3]
    assert type(layer.mlp.up_proj).__name__ == type(layer.self_attn.q_proj).__name__ == kind
    assert layer.mlp.up_proj.weight.dtype == dtype
    # Decisions in float32; an adapter in what the model computes in. All with the values of the adapter file.
    assert layer.router.weight.dtype == model.model.language_model.routing_tokens.weight.dtype == torch.float32
    assert layer.adapter.up_proj.weight.dtype == layer.adapter.down_proj.weight.dtype == torch.bfloat16
    shipped = read_adapter(SHIPPED / "roe").tensors
    ours = {name: tensor for name, tensor in model.state_dict().items() if is_roe_parameter(name)}
    assert ours.keys() == shipped.keys()
    assert all(torch.equal(tensor, shipped[name].to(tensor.dtype)) for name, tensor in ours.items())


def test_a_quantised_model_routes_and_answers(quantised, shipped_roe, inputs):
    outputs = quantised[1](**inputs)
    assert outputs.router_logits.dtype == torch.float32
    exact = open_model(shipped_roe, dtype=torch.bfloat16)
    # Rounded hidden states shift what routers read, by less than what decides most layers.
    assert (outputs.routes == exact(**inputs).routes).float().mean() > 0.8 and not outputs.routes.all()
    generated = details(quantised[1], inputs)
    assert torch.equal(generated.past_key_values.routes, outputs.routes)
    said = answers(open_processor(shipped_roe), quantised[1], inputs)
    right = [one["turns"][0][1] for one in contract.examples()]
    assert sum(text == wanted for text, wanted in zip(said, right, strict=True)) >= 2, said


def test_a_quantised_model_saves_and_reloads(quantised, inputs, tmp_path):
    name, model = quantised
    model.save_pretrained(tmp_path / "again")
    again = open_model(tmp_path / "again", dtype="auto")
    assert type(again.model.language_model.layers[3].mlp.up_proj).__name__ == KINDS[name][0]
    assert again.model.language_model.layers[3].router.weight.dtype == torch.float32
    ours, expected = again(**inputs), model(**inputs)
    assert torch.equal(ours.logits, expected.logits) and torch.equal(ours.router_logits, expected.router_logits)
    assert torch.equal(details(again, inputs).sequences, details(model, inputs).sequences)
