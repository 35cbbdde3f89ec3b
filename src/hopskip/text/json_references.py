"""Where a JSON schema's references point: pointers, anchors, and schemas inside with an address of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urljoin

from hopskip.errors import ConfigError


@dataclass(frozen=True)
class Place:
    """Where the walk is: in which resource (a schema with an `$id`, or the whole), and at which pointer in it."""

    resource: dict[str, Any]
    pointer: str
    is_open: bool
    """An object here is one part of several: whoever puts them together closes it."""

    def at(self, *keys: object, is_open: bool = False) -> Place:
        steps = (str(key).replace("~", "~0").replace("/", "~1") for key in keys)
        return Place(self.resource, "/".join((self.pointer, *steps)), is_open)

    def entering(self, node: dict[str, Any]) -> Place:
        """The place as seen from this node, which may be a resource of its own."""
        name = node.get("$id")
        if node is self.resource or not isinstance(name, str) or name.startswith("#"):
            return self
        return Place(node, f"{name.rstrip('#')}#", self.is_open)


class References:
    """The references of one document."""

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._resources: dict[str, dict[str, Any]] = {}
        self._bases: dict[int, str] = {id(root): ""}
        """Absolute address of each resource."""
        self._anchors: dict[tuple[int, str], Any] = {}
        self._index()

    def _index(self) -> None:
        """Find the resources and anchors of the document."""
        stack: list[tuple[Any, dict[str, Any]]] = [(self._root, self._root)]
        while stack:
            node, resource = stack.pop()
            if isinstance(node, list):
                stack += [(child, resource) for child in node]
            if not isinstance(node, dict):
                continue
            name = node.get("$id")
            if isinstance(name, str) and name.startswith("#"):  # as drafts up to 7 have it
                self._anchors[id(resource), name[1:]] = node
            elif isinstance(name, str):
                base = urljoin(self._bases[id(resource)], name).rstrip("#")
                resource = node
                self._bases[id(node)] = base
                self._resources[base] = self._resources[name.rstrip("#")] = node
            for key in ("$anchor", "$dynamicAnchor"):
                if isinstance(node.get(key), str):
                    self._anchors[id(resource), node[key]] = node
            skipped = ("const", "enum", "default", "examples", "example")
            stack += [(child, resource) for key, child in node.items() if key not in skipped]

    def resolve(self, reference: Any, place: Place) -> tuple[Any, Place]:
        """The schema that a reference stands for, and where it is."""
        if not isinstance(reference, str):
            raise ConfigError(f"the JSON schema's $ref at {place.pointer} is no text")
        address, _, fragment = reference.partition("#")
        resource = place.resource
        if address:
            found = self._resources.get(urljoin(self._bases[id(resource)], address)) or self._resources.get(address)
            if found is None:
                raise ConfigError(
                    f"the JSON schema refers to another document ($ref {reference[:100]!r}); only '#/...' is followed"
                )
            resource = found
        name = self._bases[id(resource)]
        target: Any = resource
        at = Place(resource, f"{name}#" if resource is not self._root else "#", place.is_open)
        fragment = unquote(fragment)
        if fragment and not fragment.startswith("/"):
            target = self._anchors.get((id(resource), fragment))
            at = Place(resource, f"{at.pointer}{fragment}", place.is_open)
        for step in fragment.split("/")[1:] if fragment.startswith("/") else ():
            key = step.replace("~1", "/").replace("~0", "~")
            if isinstance(target, dict):
                at = at.entering(target)
                target = target.get(key)
            elif isinstance(target, list) and key.isascii() and key.isdigit() and int(key) < len(target):
                target = target[int(key)]
            else:
                target = None
            at = at.at(key, is_open=place.is_open)
        if not isinstance(target, dict | bool):
            raise ConfigError(f"the JSON schema's $ref {reference[:100]!r} points nowhere")
        return target, at
