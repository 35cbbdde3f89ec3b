"""Names of models on the Hub, in every form that llama.cpp, Ollama and a browser's address bar give them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from urllib.parse import parse_qs, unquote, urlsplit

from hopskip.checkpoint.gguf_names import is_gguf_name
from hopskip.errors import CheckpointError

_REPO = re.compile(r"(?P<id>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_NOT_OWNERS = ("datasets", "spaces", "docs", "models", "collections", "papers", "blog")
_PAGES = ("blob", "resolve", "raw", "tree")


@dataclass(frozen=True, kw_only=True)
class HubName:
    """A model on the Hub: a repository, and which of its files where there is a choice."""

    repo_id: str
    tag: str | None = None
    """A quantization, as in `OWNER/REPO:Q4_K_M`."""
    file: str | None = None
    """The path of a GGUF file within the repository."""
    revision: str = "main"

    def __str__(self) -> str:
        return self.repo_id + (f"/{self.file}" if self.file else f":{self.tag}" if self.tag else "")


def parse_hub_name(name: str) -> HubName | None:
    """What a name says, or None if it is no name of a model on the Hub.

    Read are `OWNER/REPO`, `OWNER/REPO:TAG`, `OWNER/REPO/PATH/FILE.gguf`, each after `hf.co/`, `huggingface.co/`, `hf://`
    or nothing, with `@REVISION` behind the repository; and the addresses of a repository's pages and files.

    Raises:
        CheckpointError: an address that leads elsewhere.

    >>> parse_hub_name("hf.co/org/model-GGUF:Q4_K_M")
    HubName(repo_id='org/model-GGUF', tag='Q4_K_M', file=None, revision='main')
    """
    scheme, separator, rest = name.strip().partition("://")
    host, _, path = (rest if separator else name.strip()).partition("/")
    if not separator:
        return _parse_address(name, path) if host.lower() in _hosts() else _parse_path(name.strip())
    if scheme.lower() == "hf":
        return _parse_path(rest.strip("/"))
    if scheme.lower() not in ("http", "https") or host.lower() not in _hosts():
        raise CheckpointError(f"{name!r} does not lead to the Hub; download the file, then give its path")
    return _parse_address(name, path)


def _hosts() -> tuple[str, ...]:
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT", "")).netloc
    return (*_HOSTS, endpoint.lower()) if endpoint else _HOSTS


def _parse_address(name: str, text: str) -> HubName:
    """What follows the host in an address: perhaps a page of the repository, perhaps a query."""
    address = urlsplit(f"//host/{text}")
    pieces = [unquote(piece) for piece in address.path.strip("/").split("/")]
    shown = parse_qs(address.query).get("show_file_info", [""])[0]  # what a click on a file's card adds
    if len(pieces) > 3 and pieces[2] in _PAGES:
        owner, repo, page, revision, *inner = pieces
        file = "/".join(inner) or shown
        found = HubName(repo_id=f"{owner}/{repo}", file=file or None, revision=revision)
        is_usable = is_gguf_name(file) if file else page == "tree"
    elif len(pieces) == 2 and shown:
        found = HubName(repo_id="/".join(pieces), file=shown)
        is_usable = is_gguf_name(shown)
    else:
        parsed = _parse_path("/".join(pieces))
        found, is_usable = parsed or HubName(repo_id=""), parsed is not None
    if not is_usable or not _REPO.fullmatch(found.repo_id) or pieces[0] in _NOT_OWNERS:
        raise CheckpointError(
            f"{name!r} is neither a model's page nor a GGUF file; give OWNER/REPO, OWNER/REPO:TAG or the address of a "
            "GGUF file"
        )
    return found


def _parse_path(text: str) -> HubName | None:
    """`OWNER/REPO[@REVISION][:TAG]`, or a GGUF file in it."""
    text, _, tag = text.partition(":")
    owner, _, rest = text.partition("/")
    repo, _, inner = rest.partition("/")
    match = _REPO.fullmatch(f"{owner}/{repo}")
    if match is None or is_gguf_name(repo):
        return None
    file = inner or (tag if "/" in tag else "")
    if (inner and (tag or not is_gguf_name(inner))) or (file and (not is_gguf_name(file) or ".." in file.split("/"))):
        return None
    return HubName(
        repo_id=match["id"],
        tag=None if file else tag or None,
        file=file or None,
        revision=match["revision"] or "main",
    )
