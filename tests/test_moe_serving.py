"""`roe-llava serve` with experts: the server answers as `generate` does, with the installed code."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from test_serving import PACKAGE_PARENT, client, examples, free_port, message, openai, wait_until_ready  # noqa: F401
from transformers import LlavaProcessor

from roe_llava import MoeLlavaForConditionalGeneration
from roe_llava.cli import main
from roe_llava.convert.upcycle import upcycle
from roe_llava.examples.tiny_world import asking
from roe_llava.examples.tiny_world.demo import SHIPPED


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    """The shipped base with experts that differ."""
    folder = tmp_path_factory.mktemp("moe")
    upcycle(SHIPPED / "base", folder / "upcycled", router="token_aware")
    model = MoeLlavaForConditionalGeneration.from_pretrained(folder / "upcycled", dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder / "moe")
    LlavaProcessor.from_pretrained(folder / "upcycled").save_pretrained(folder / "moe")
    return folder / "moe"


@pytest.fixture
def address(moe, tmp_path):
    port, log = free_port(), tmp_path / "log"
    environment = os.environ | {"PYTHONPATH": str(PACKAGE_PARENT), "OMP_NUM_THREADS": "1"}
    words = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    command = [sys.executable, "-m", "roe_llava", "serve", str(moe), *words]
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        wait_until_ready(process, f"http://127.0.0.1:{port}", log)
        yield f"http://127.0.0.1:{port}"
        assert "custom code" not in log.read_text()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def test_picture_questions_are_answered_as_generate_answers(address, moe, examples):  # noqa: F811
    model = MoeLlavaForConditionalGeneration.from_pretrained(moe, dtype=torch.float32).eval()
    texts, _ = asking.ask(model, LlavaProcessor.from_pretrained(moe), examples)
    asked = client(address).chat.completions
    for example, text in zip(examples, texts, strict=True):
        answer = asked.create(model=str(moe), messages=message(example), temperature=0, max_tokens=24)
        assert answer.choices[0].message.content == text


def test_a_skip_ratio_is_refused(moe, capsys):
    assert main(["serve", str(moe), "--skip-ratio", "0.3"]) == 2
    assert "is a 'moe_llava' checkpoint, not 'roe_llava' or" in capsys.readouterr().err
