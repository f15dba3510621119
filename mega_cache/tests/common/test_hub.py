"""What the Hub refuses is said in its own words, with what to do, and never with the token."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from helpers import FOLDER

from common.cli import Console
from common.model.checkpoint import resolve_checkpoint

TOKEN = "hf_aVerySecretTokenOfATest"
MODEL = "meta-llama/Llama-3.2-3B-Instruct"
PROGRAM = f"""
import sys
sys.path.insert(0, {str(FOLDER)!r})
from common.model.checkpoint import resolve_checkpoint
from common.cli import Console
from common.errors import run_script
run_script(lambda argv: resolve_checkpoint(argv[0], Console(True)))
"""
# how the real Hub answers
REFUSALS = {
    "gated": (403, "GatedRepo", "Access to model is restricted: you are not in the list."),
    "absent": (404, "RepoNotFound", "Repository not found"),
    "bad token": (401, None, "Invalid credentials in Authorization header"),
    "down": (500, None, "Internal Error"),
}


@pytest.fixture
def hub():
    """Return a function that starts a Hub that refuses everything, and gives its address."""
    servers = []

    def start(status, code, message):
        class Refuse(BaseHTTPRequestHandler):
            def do_GET(self):
                headers = {"X-Error-Code": code, "X-Error-Message": message, "X-Request-Id": "7"}
                body = json.dumps({"error": message}).encode()
                self.send_response(status)
                for name, value in (headers | {"Content-Length": str(len(body))}).items():
                    if value is not None:
                        self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            do_HEAD = do_GET

            def log_message(self, *arguments):
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Refuse))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def resolve(endpoint, home, model=MODEL, token=TOKEN, **environment):
    """Return (status, stderr) of a process that asks the Hub for a model."""
    places = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_TOKEN": token}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, model],
        env=os.environ | places | {"no_proxy": "*", "NO_PROXY": "*"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Traceback" not in done.stderr
    assert token.split("\x01")[0] not in done.stderr + done.stdout
    return done.returncode, (done.stderr.splitlines() or [""])[-1]


@pytest.mark.parametrize(
    ("refusal", "status", "words"),
    [
        ("gated", 5, ("you are not in the list", "set HF_TOKEN", "--model-id random:3b")),
        ("absent", 2, ("neither a folder here, nor a preset", "Repository Not Found")),
        ("bad token", 5, ("Invalid credentials", "--model-id random:tiny")),
        ("down", 5, ("could not be downloaded", "--model-id random:tiny")),
    ],
)
def test_a_refusal_of_the_hub_is_one_line_in_its_own_words(refusal, status, words, hub, tmp_path):
    ended, line = resolve(hub(*REFUSALS[refusal]), tmp_path)
    assert ended == status, line
    assert line.startswith("error: ")
    assert all(word in line for word in words), line


@pytest.mark.parametrize("token", [f"{TOKEN}\x01tail", f"{TOKEN}\u2019"])
def test_a_token_that_no_header_can_carry_is_not_shown(token, hub, tmp_path):
    status, line = resolve(hub(*REFUSALS["gated"]), tmp_path, token=token)
    assert status == 5, line
    assert TOKEN not in line


@pytest.mark.parametrize(
    "environment", [{}, {"HF_HUB_OFFLINE": "1"}, {"https_proxy": "http://127.0.0.1:9"}]
)
def test_without_a_network_the_way_out_is_named(environment, tmp_path):
    # nothing listens on the discard port
    status, line = resolve("http://127.0.0.1:9", tmp_path, **environment)
    assert status == 5, line
    assert f"{MODEL} is not in the Hub cache" in line
    assert "--model-id random:tiny, which needs no network" in line


def test_weights_of_other_formats_are_not_downloaded(tmp_path, tiny_files):
    """One set of weights and what describes them: the Hub keeps others beside it."""
    wanted = {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
    besides = {
        "consolidated.safetensors", "model.fp16.safetensors", "adapter_model.safetensors",
        "pytorch_model.bin", "original/model.safetensors", "README.md", "model.gguf",
    }  # fmt: skip
    asked = []

    class Serve(BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.partition("/resolve/")[2].partition("/")[2]
            siblings = [{"rfilename": one} for one in sorted(wanted | besides)]
            listed = [
                {"type": "file", "path": one, "size": 1, "oid": one} for one in besides | wanted
            ]
            repository = {"id": MODEL, "sha": "a" * 40, "siblings": siblings}
            # which of the two is asked for depends on the version
            body = json.dumps(listed if "/tree/" in self.path else repository).encode()
            if name:
                asked.append(name)
                body = tiny_files.get(name, b"-")
            headers = {"ETag": f'"{name or 1}"', "X-Repo-Commit": "a" * 40}
            self.send_response(200)
            for one, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(one, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Serve)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    status, line = resolve(
        f"http://127.0.0.1:{server.server_port}", tmp_path, HF_HUB_DISABLE_XET="1"
    )
    server.shutdown()
    server.server_close()
    assert status == 0, line
    assert set(asked) == wanted


@pytest.fixture
def tiny_files(shared_folders):
    folder = resolve_checkpoint("random:tiny", Console(True)).folder
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_name_that_is_none_is_a_usage_error(tmp_path):
    status, line = resolve("http://127.0.0.1:9", tmp_path, model="no/such/model")
    assert status == 2
    assert "neither a folder here, nor a preset, nor a Hub id" in line
