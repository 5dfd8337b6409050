"""GPT-2s from the Hub: fetched from a small server on this machine that answers as it does."""

import json
import os
import subprocess
import sys
import threading
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

from hf_scratch_gpt import ScratchGPTForCausalLM
from hf_scratch_gpt.checkpoints.hub import DIGESTS, hub_id

from ..commands import convert

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The Hub's answers to a client that fetches; every repository is the same `folder`."""

    folder: Path

    def do_GET(self):  # the name is http.server's
        place = self.path.partition("?")[0]
        if place.startswith("/api/models/none/"):
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif place.startswith("/api/models/") and "/tree/" in place:
            self._send(200, json.dumps([self._entry(path) for path in self._files()]).encode())
        elif place.startswith("/api/models/"):
            self._send(200, json.dumps({"id": "a/b", "sha": COMMIT, "siblings": []}).encode())
        else:
            data = (self.folder / Path(place).name).read_bytes()
            digest = f'"{sha256(data).hexdigest()}"'
            self._send(200, data, {"ETag": digest, "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def log_message(self, *_):
        pass

    def _files(self):
        return sorted(self.folder.iterdir())

    def _entry(self, path):
        size, digest = path.stat().st_size, sha256(path.read_bytes()).hexdigest()
        large = {"oid": digest, "size": size, "pointerSize": 130}
        more = {"lfs": large} if path.suffix == ".safetensors" else {}
        return {"type": "file", "path": path.name, "size": size, "oid": "0" * 40, **more}

    def _send(self, code, data, headers=()):
        self.send_response(code)
        for name, value in {"Content-Length": str(len(data)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


@pytest.fixture
def fetch(small_gpt2, tmp_path):
    """Convert in a process of its own that takes this machine's server for the Hub."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Tiny", (Hub,), {"folder": small_gpt2}))
    threading.Thread(target=server.serve_forever).start()
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
    environment |= {"PYTHONPATH": str(ROOT)}

    def run(name: str, out: str = "out", offline: str = "0") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "hf_scratch_gpt", "convert", name, out]
        environment["HF_HUB_OFFLINE"] = offline
        return subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
        )

    yield run
    server.shutdown()
    server.server_close()


@pytest.mark.release
@torch.no_grad()
def test_a_model_of_the_hub_is_fetched_once_and_checked(fetch, small_gpt2, tmp_path):
    done = fetch("owner/tiny")
    assert done.returncode == 0, done.stderr
    assert "no checksum" not in done.stdout  # the Hub's was compared
    ids = torch.arange(10)[None]
    logits = ScratchGPTForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
    torch.testing.assert_close(logits, GPT2LMHeadModel.from_pretrained(small_gpt2)(ids).logits)
    assert fetch("owner/tiny", "again", offline="1").returncode == 0
    (weights,) = tmp_path.glob("home/hub/*/snapshots/*/model.safetensors")
    data = bytearray(weights.read_bytes())
    data[-9] ^= 1
    weights.resolve().write_bytes(data)
    done = fetch("owner/tiny", "damaged", offline="1")
    assert done.returncode == 2
    assert "it is damaged; remove it and fetch it again" in done.stderr


@pytest.mark.release
def test_weights_that_are_not_openais_are_refused(fetch, tmp_path):
    done = fetch("355M")
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert f"OpenAI's weights have {DIGESTS['openai-community/gpt2-medium']}" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.release
def test_a_name_that_the_hub_does_not_know(fetch):
    done = fetch("none/such")
    assert done.returncode == 2
    assert done.stderr.startswith("error: none/such is neither a file nor a folder, and the Hub")


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("124M", "gpt2"),
        ("355m", "gpt2-medium"),
        ("gpt2-large", "gpt2-large"),
        ("1558M", "gpt2-xl"),
        ("openai-community/gpt2-xl", "gpt2-xl"),
    ],
)
def test_names_of_openais_sizes(name, there):
    assert hub_id(name) == f"openai-community/{there}"


def test_other_names_stay():
    assert (hub_id("owner/name"), hub_id("gpt3"), hub_id("distilgpt2")) == (
        "owner/name",
        "gpt3",
        "distilgpt2",
    )


def test_without_a_network_one_line_says_what_to_do(tmp_path, capsys):
    assert convert(["774M", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == (
        "error: openai-community/gpt2-large cannot be fetched from the Hub: HF_HUB_OFFLINE is set, "
        "and it was not fetched before; give the folder of a GPT-2 on this machine\n"
    )


def test_openais_weights_are_known_by_their_digest(small_gpt2, tmp_path, monkeypatch, capsys):
    digest = sha256((small_gpt2 / "model.safetensors").read_bytes()).hexdigest()
    monkeypatch.setitem(DIGESTS, "openai-community/gpt2", digest)
    monkeypatch.setattr("hf_scratch_gpt.checkpoints.hf_gpt2.fetch", lambda name: small_gpt2)
    assert convert(["124M", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "matched  openai-community/gpt2, OpenAI's weights by their SHA-256" in printed
    assert "no checksum" not in printed
    assert "Converted from `openai-community/gpt2`" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("name", ["./nowhere/x", "two words"])
def test_what_cannot_be_a_name_is_refused(name, tmp_path, capsys):
    assert convert([name, str(tmp_path / "out")]) == 2
    assert f"{name} is neither a file nor a folder" in capsys.readouterr().err
