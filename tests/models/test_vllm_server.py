"""What is said when a server of vLLM is not there, or cannot do what is asked; with one, see test_vllm.py."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from kilter.errors import ModelError
from kilter.models.sampling import Sampling
from kilter.models.vllm_sampler import Request
from kilter.models.vllm_server import Served


class Refusing(BaseHTTPRequestHandler):
    """Is there, lacks what is offered only when asked for, and finds fault with the rest."""

    def do_GET(self) -> None:
        if self.path.startswith("/moved"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/moved"))
            self.end_headers()
            return
        self._say(200, b"{}" if self.path.startswith("/other") else b'{"data": [{"id": "model"}]}')

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/inference/v1/generate":
            self._say(200, b"<p>")
        else:
            self._say(404 if self.path == "/collective_rpc" else 400, b"rank 8\x1b is too\nlarge")

    def _say(self, code: int, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def refusing() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_no_server() -> None:
    with pytest.raises(ModelError, match=r"no vLLM answers at http://127\.0\.0\.1:9 .*; start it there by .* serve"):
        Served("http://127.0.0.1:9/")


@pytest.mark.parametrize("url", ["http://[::1", "http://host:port", "http://a b"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(ModelError, match="no vLLM answers at"):
        Served(url)


def test_what_speaks_no_http() -> None:
    def say(listening: socket.socket) -> None:
        with listening.accept()[0] as there:
            there.recv(1000)
            there.sendall(b"SSH-2.0\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=say, args=(listening,), daemon=True).start()
        with pytest.raises(ModelError, match="no vLLM answers at"):
            Served(f"http://127.0.0.1:{listening.getsockname()[1]}")


def test_another_server(refusing: str) -> None:
    with pytest.raises(ModelError, match=r"/other lists no model, so it is no vLLM; start one by"):
        Served(f"{refusing}/other")


def test_an_answer_that_cannot_be_read(refusing: str) -> None:
    asked = [Request((1, 2), seed) for seed in range(3)]
    with pytest.raises(ModelError, match=f"{refusing} draws no answer that can be read"):
        Served(refusing).draw(asked, Sampling(), [2])


def test_adapters_of_two_runs_never_have_one_name(refusing: str) -> None:
    """Processes in containers often have one number; what a killed one loaded is still there."""
    assert Served(refusing)._own != Served(refusing)._own


def test_a_server_that_was_not_told_to_take_weights(refusing: str) -> None:
    with pytest.raises(ModelError, match=r"/collective_rpc says 404: .*; start it by VLLM_SERVER_DEV_MODE=1"):
        Served(refusing).load(Path("weights"))


def test_what_a_server_finds_fault_with_is_shown_on_one_line(refusing: str) -> None:
    with pytest.raises(ModelError, match=r"/v1/load_lora_adapter says 400: rank 8⟨U\+001B⟩ is too large$"):
        Served(refusing).adapt(Path("adapter"), 1)


def test_another_address_is_named_and_not_followed_with_the_key(refusing: str) -> None:
    with pytest.raises(ModelError, match=r"/moved/v1/models says 302: it sends on to /v1/models; give that address as"):
        Served(f"{refusing}/moved")


def test_a_proxy_of_the_environment_is_not_asked(refusing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    Served(refusing)
