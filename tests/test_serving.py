"""`roe-llava serve`: `transformers serve` answers about pictures along the routes that `generate` takes."""

import base64
import functools
import io
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import roe_llava
from roe_llava import RoeLlavaForConditionalGeneration, RoeLlavaProcessor
from roe_llava.cli import main
from roe_llava.examples.tiny_world import asking
from roe_llava.examples.tiny_world.base_model import build_base
from roe_llava.examples.tiny_world.demo import SHIPPED
from roe_llava.examples.tiny_world.evaluate import family_examples
from roe_llava.examples.tiny_world.processor import build_processor
from roe_llava.examples.tiny_world.train_base import save_base
from roe_llava.serving.serve import model_class

openai = pytest.importorskip("openai", reason="pip install roe-llava[serve] (make test does)")

PACKAGE_PARENT = Path(roe_llava.__file__).resolve().parent.parent
STARTING = 180  # seconds; importing torch and Transformers on a busy machine is most of it
FAMILIES = ("add", "where", "object", "compare")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_ready(server, address, log):
    deadline = time.monotonic() + STARTING
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
                return answer.status
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(log.read_text())


@contextmanager
def running(checkpoint, folder):
    """A running server: its process, address and log."""
    port = free_port()
    log, environment = folder / "log", os.environ | {"PYTHONPATH": str(PACKAGE_PARENT), "OMP_NUM_THREADS": "1"}
    words = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    with log.open("w") as file:
        command = [sys.executable, "-m", "roe_llava", "serve", str(checkpoint), *words]
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            # A shell has its background jobs ignore Ctrl-C, and they hand that on.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    try:
        wait_until_ready(process, f"http://127.0.0.1:{port}", log)
        yield process, f"http://127.0.0.1:{port}", log
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def server(shipped_roe, tmp_path_factory):
    with running(shipped_roe, tmp_path_factory.mktemp("serve")) as server:
        yield server


@pytest.fixture(scope="module")
def examples():
    return [family_examples(family, 1)[0] for family in FAMILIES]


@pytest.fixture(scope="module")
def expected(shipped_roe, examples):
    """What `generate` answers: text, and routes (N, L)."""
    model = RoeLlavaForConditionalGeneration.from_pretrained(shipped_roe, dtype=torch.float32).eval()
    return asking.ask(model, RoeLlavaProcessor.from_pretrained(shipped_roe, trust_remote_code=False), examples)


def message(example):
    content = io.BytesIO()
    example["image"].save(content, format="PNG")
    url = f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
    picture = {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [picture, {"type": "text", "text": example["turns"][-1][0]}]}]


@pytest.fixture(scope="module", params=["llava_hr", "vila"])
def other_base(request, tmp_path_factory):
    """A RoE model of random weights on a base with a front-end of ours."""
    folder, processor = tmp_path_factory.mktemp(request.param), build_processor(request.param)
    base = build_base(processor, num_layers=3, hidden_size=128, front_end=request.param)
    save_base(base, processor, folder / "base")
    model = RoeLlavaForConditionalGeneration.from_pretrained(folder / "base", adapter_size=4, dtype=torch.float32)
    model.config.route_bias = [0.0, -50.0, 0.0]  # layer 1 is skipped
    model.save_pretrained(folder / "roe")
    RoeLlavaProcessor.from_pretrained(folder / "base").save_pretrained(folder / "roe")
    return folder / "roe"


def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60)


def test_a_base_with_a_front_end_of_ours_is_served(other_base, examples, tmp_path):
    model = RoeLlavaForConditionalGeneration.from_pretrained(other_base, dtype=torch.float32).eval()
    processor = RoeLlavaProcessor.from_pretrained(other_base, trust_remote_code=False)
    texts, routes = asking.ask(model, processor, examples[:1])
    assert not routes[:, 1].any()
    with running(other_base, tmp_path) as (_, address, _):
        asked = client(address).chat.completions
        answer = asked.create(model=str(other_base), messages=message(examples[0]), temperature=0, max_tokens=24)
    assert answer.choices[0].message.content.strip() == texts[0]


def test_picture_questions_are_answered_as_generate_answers(server, shipped_roe, examples, expected):
    texts, routes = expected
    assert not routes.all()  # the answers compared with were had with layers skipped
    asked = client(server[1]).chat.completions
    for example, text in zip(examples, texts, strict=True):
        answer = asked.create(model=str(shipped_roe), messages=message(example), temperature=0, max_tokens=24)
        assert answer.choices[0].message.content == text
        assert answer.choices[0].finish_reason == "stop"


def test_streamed_answers_are_the_same_in_pieces(server, shipped_roe, examples, expected):
    asked, settings = client(server[1]).chat.completions, {"temperature": 0, "max_tokens": 24, "stream": True}
    for example, text in zip(examples, expected[0], strict=True):
        chunks = list(asked.create(model=str(shipped_roe), messages=message(example), **settings))
        pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
        assert "".join(pieces).strip() == text
        assert len(pieces) >= len(text.split())
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_text_alone_is_answered(server, shipped_roe):
    chat = [{"role": "user", "content": "What is the sum of the digits?"}]
    answer = client(server[1]).chat.completions.create(model=str(shipped_roe), messages=chat, temperature=0)
    assert answer.choices[0].message.content


def test_stops_cleanly_without_having_asked_for_trust(server):  # the last one to need the server
    process, _, log = server
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    written = log.read_text()
    assert "Application shutdown complete" in written and written.rstrip().endswith("interrupted")
    assert "Traceback" not in written
    assert "custom code" not in written


@pytest.mark.parametrize("word", ["--continuous-batching", "--continuous_batching", "--compile"])
def test_what_routes_do_not_survive_is_refused(word, capsys):
    assert main(["serve", "anything", word]) == 2
    assert "is not supported" in capsys.readouterr().err


def test_a_skip_ratio_holds_for_every_answer(shipped_roe, examples):
    served = model_class(0.5).from_pretrained(shipped_roe, dtype=torch.float32).eval()
    model = RoeLlavaForConditionalGeneration.from_pretrained(shipped_roe, dtype=torch.float32).eval()
    processor = RoeLlavaProcessor.from_pretrained(shipped_roe)
    texts, routes = asking.ask(served, processor, examples)
    assert not torch.equal(routes, asking.ask(model, processor, examples)[1])
    model.generate = functools.partial(model.generate, skip_ratio=0.5)
    expected, own = asking.ask(model, processor, examples)
    assert texts == expected and torch.equal(routes, own)
    assert model_class(0.5).__name__ == "RoeLlavaForConditionalGeneration"  # the server looks it up
    with pytest.raises(ValueError, match=r"skip_ratio=0\.9 is outside of what this model is calibrated for"):
        model_class(0.9).from_pretrained(shipped_roe)


def test_a_skip_ratio_is_taken_from_the_words(shipped_roe, monkeypatch):
    asked = []
    monkeypatch.setattr("roe_llava.serving.serve.register", asked.append)  # it would hold for every later test
    assert main(["serve", str(shipped_roe), "--skip-ratio", "0.25", "--nothing"]) == 2
    assert asked == [0.25]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([str(SHIPPED / "base")], "is a 'llava' checkpoint, not 'roe_llava'"),
        (["--port", "1"], "name it before the options"),
        (["nowhere"], "nowhere is no folder"),
    ],
)
def test_a_skip_ratio_of_what_does_not_route_is_refused(words, message, capsys):
    assert main(["serve", *words, "--skip-ratio", "0.3"]) == 2
    assert message in capsys.readouterr().err


def test_missing_requirements_say_how_to_install_them(monkeypatch, capsys):
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    assert main(["serve", "anything"]) == 2
    assert 'pip install "roe-llava[serve]"' in capsys.readouterr().err


def test_a_wrong_word_ends_with_status_2(capsys, monkeypatch):
    monkeypatch.setattr("roe_llava.serving.serve.register", lambda *_: None)  # it would hold for every later test
    assert main(["serve", "anything", "--nothing"]) == 2
    assert "--nothing" in capsys.readouterr().err
