"""Fixtures: tiny routed models whose routes depend on the input (`tiny.py` builds them), and checkpoints on disk."""

import own_caches  # isort: skip  # noqa: F401

import logging
import re
import shutil

import pytest
import tiny
import torch
from convert_helpers import make_base, train
from PIL import Image
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from transformers import CLIPImageProcessor

from roe_llava import RoeLlavaProcessor
from roe_llava.convert.adapter_file import save_adapter
from roe_llava.convert.graft import graft
from roe_llava.examples.tiny_world.demo import SHIPPED


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Deprecations(logging.Handler):
    """Holds what Transformers logs, instead of warning, about what it will take away."""

    PATTERN = re.compile(r"\bdeprecated\b|\bwill be removed\b", flags=re.IGNORECASE)
    ITS_OWN = "Passing `generation_config` together with"  # what Transformers 5.23 does itself for an assistant model

    def __init__(self):
        super().__init__(logging.WARNING)
        self.found = []

    def emit(self, record):
        if self.PATTERN.search(record.getMessage()) and self.ITS_OWN not in record.getMessage():
            self.found.append(f"{record.name}: {record.getMessage()}")


@pytest.fixture(autouse=True)
def nothing_deprecated_logged():
    """Fails a test in which Transformers logs that something is deprecated; pyproject.toml sees to its warnings."""
    handler, logger = Deprecations(), logging.getLogger("transformers")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    assert not handler.found, handler.found


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def needs_cpp_compiler():
    """Skips where Inductor would find no C++ compiler."""
    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError) as error:
        pytest.skip(f"no C++ compiler for Inductor: {error}")


EVERY_MODEL = [(family, attention) for family in tiny.FAMILIES for attention in ("sdpa", "eager")]


@pytest.fixture(params=EVERY_MODEL, ids="-".join)
def any_model(request):
    """Routed model of every family and attention implementation."""
    return tiny.routed_model(*request.param)


@pytest.fixture(params=tiny.FAMILIES)
def family_model(request):
    """Routed model of every family."""
    return tiny.routed_model(request.param)


@pytest.fixture
def model():
    """Routed Llama model."""
    return tiny.routed_model()


@pytest.fixture
def mistral():
    """Routed Mistral model whose sliding window is shorter than the prompts with an image."""
    return tiny.routed_model("mistral")


def make_processor(kind="words", **kwargs):
    sizes = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    settings = {"chat_template": tiny.CHAT_TEMPLATE} | kwargs
    return RoeLlavaProcessor(
        CLIPImageProcessor(**sizes),
        tiny.tokenizer(kind),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        **settings,
    )


@pytest.fixture(scope="session", params=["words", "pieces"])
def processor(request):
    """A processor of every kind of tokenizer."""
    return make_processor(request.param)


@pytest.fixture(scope="session")
def word_processor():
    """A processor whose token ids the tiny models know."""
    return make_processor("words")


# ---------------------------------------- images on disk


@pytest.fixture
def folder(tmp_path):
    """A folder of images: three good ones, one cut short, one that is none."""
    for seed in range(3):
        Image.fromarray(tiny.picture(seed)).save(tmp_path / f"{seed}.png")
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "short.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no picture")
    return tmp_path


# ---------------------------------------- checkpoints on disk


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A stock LLaVA folder."""
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def trained(base):
    """A RoE model on that base."""
    return train(base)


@pytest.fixture(scope="session")
def shared_adapter(tmp_path_factory, base, trained):
    """Its adapter file."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    return save_adapter(trained, trained.config, folder, base=base, training={"steps": 3})


@pytest.fixture
def adapter(tmp_path, shared_adapter):
    """A copy to damage."""
    return shutil.copytree(shared_adapter, tmp_path / "adapter")


@pytest.fixture
def base_copy(tmp_path, base):
    """A copy to damage."""
    return shutil.copytree(base, tmp_path / "base")


@pytest.fixture(scope="session")
def shipped_roe(tmp_path_factory):
    """The shipped parts on the shipped base."""
    folder = tmp_path_factory.mktemp("shipped") / "roe"
    graft(SHIPPED / "base", SHIPPED / "roe", folder)
    return folder
