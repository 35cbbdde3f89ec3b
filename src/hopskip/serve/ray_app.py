"""Many replicas of one server on Ray Serve: restarted when they die, more of them when there is more to do.

    serve run hopskip.serve.ray_app:app                                        # here, two replicas
    serve run hopskip.serve.ray_app:app model=/srv/models/x max_replicas=8     # two to eight, by load

Every replica is the whole application of `create_app` with an engine of its own, so routes, limits and errors are those
of `hopskip serve`. Ray's proxies pass on streams as they come and disconnects as they happen. Needs `hopskip[ray]`.
"""

from __future__ import annotations

import importlib.util
import threading
import time
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from fastapi import FastAPI
from pydantic import ConfigDict, Field, ValidationError, create_model

from hopskip.errors import ConfigError
from hopskip.loading import LoadConfig
from hopskip.machine import num_usable_cores
from hopskip.serve.memory import free_memory, parse_size
from hopskip.serve.settings import LOOPBACK, ServeSettings, UnknownParams, model_name, read_api_keys
from hopskip.speculative import SpeculativeConfig
from hopskip.text.reasoning import ReasoningFormat
from hopskip.text.tools.formats import ToolFormatName

if TYPE_CHECKING:
    from ray.serve import Application

    from hopskip.serve.metrics import Metrics

_METRICS_SECONDS = 5.0

_Count = Annotated[int, Field(ge=1)]


def _declared_in(config: Any) -> dict[str, Any]:
    """The fields of a dataclass for pydantic: name to type and default."""
    hints = get_type_hints(config)
    return {item.name: (hints[item.name], item.default) for item in fields(config) if item.name != "device"}


_Declared: Any = create_model(
    "_Declared", __module__=__name__, **_declared_in(LoadConfig), **_declared_in(SpeculativeConfig)
)


class RayOptions(_Declared):  # type: ignore[misc]  # mypy cannot see through a class that is made by a call
    """What the application is built from: `name=value` behind `serve run`, `args` in a configuration file of Ray Serve.

    Every field of `LoadConfig` and of `SpeculativeConfig` is one here, but the device, which follows from `num_gpus`. A
    model's folder or file is one on every machine that has a replica. Where nothing else is said, names, values and
    defaults are those of `hopskip serve`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_replicas: _Count = 2
    """At the start, and never less."""
    max_replicas: _Count | None = None
    """Beyond `num_replicas` as many more as the load asks for: one for every `max_num_seqs` requests on their way."""
    threads: _Count | None = None
    """Of each replica; Ray reserves so many processors for it. None: this machine's, shared by `max_replicas`."""
    num_gpus: Annotated[float, Field(ge=0)] = 0
    """That Ray reserves for each replica. Without any it runs on processors."""

    served_model_name: str | None = None
    api_key_file: Path | None = None
    """On every machine that has a replica. Keys may also be in the replicas' environment: HOPSKIP_API_KEY."""
    allowed_hosts: str = ",".join(LOOPBACK)
    """Values of the Host header that are answered, with commas between; `*` is any."""
    cors_origins: str = ""
    """With commas between."""
    unknown_params: UnknownParams = "reject"
    chat_template: str | None = None
    """A file on every machine that has a replica, or the text of a template, in place of the model's own."""
    tool_format: ToolFormatName = "auto"
    reasoning_format: ReasoningFormat = "auto"
    shutdown_timeout: Annotated[float, Field(ge=0)] = 30.0
    """A replica that is no longer needed has so many seconds for its requests."""

    max_model_len: _Count | None = None
    max_num_seqs: _Count = 16
    max_queue: Annotated[int, Field(ge=0)] = 256
    """Of each replica. Beyond what all of them hold, requests get 429."""
    kv_memory: str | None = None
    """Of each replica. None: 70 % of what is free on its machine, shared by `max_replicas`."""

    @property
    def most_replicas(self) -> int:
        return self.num_replicas if self.max_replicas is None else self.max_replicas

    @property
    def num_threads(self) -> int:
        return self.threads or max(1, num_usable_cores() // self.most_replicas)

    def load(self) -> LoadConfig:
        """Raises ConfigError: two values contradict each other."""
        device = "cuda" if self.num_gpus else "cpu"
        return LoadConfig(**self._values_of(LoadConfig) | {"device": device, "threads": self.num_threads})

    def speculative(self) -> SpeculativeConfig:
        """Raises ConfigError: a value is out of range, or would have no effect."""
        return SpeculativeConfig(**self._values_of(SpeculativeConfig))

    def settings(self, api_keys: tuple[str, ...] = ()) -> ServeSettings:
        return ServeSettings(
            model_name=self.served_model_name or model_name(None if self.model is None else str(self.model)),
            api_keys=api_keys,
            max_queue=self.max_queue,
            allowed_hosts=None if self.allowed_hosts == "*" else _names(self.allowed_hosts),
            cors_origins=_names(self.cors_origins),
            unknown_params=self.unknown_params,
            tool_format=self.tool_format,
            reasoning_format=self.reasoning_format,
        )

    def _values_of(self, config: Any) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _declared_in(config)}


class Replica:
    """What Ray asks of a replica beside its requests."""

    app: FastAPI
    """Set by Ray, which mixes the ASGI side in."""

    async def check_health(self) -> None:
        """Called by Ray now and then; a replica that raises is replaced."""
        death = self.app.state.server.engine.death
        if death is not None:
            raise RuntimeError(f"the engine has died: {death}")


def app(arguments: dict[str, Any]) -> Application:
    """The application, for `serve run`, `serve deploy` and `ray.serve.run`.

    Args:
        arguments: the fields of `RayOptions`.

    Raises:
        ConfigError: an argument cannot be used, or Ray Serve is not installed.
    """
    options = _checked(arguments)
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("replicas need Ray Serve, which is not installed: pip install 'hopskip[ray]'")
    from ray import serve

    def build() -> FastAPI:
        return make_replica(options)

    if options.most_replicas == options.num_replicas:
        scale: dict[str, Any] = {"num_replicas": options.num_replicas}
    else:
        scale = {
            "autoscaling_config": {
                "min_replicas": options.num_replicas,
                "max_replicas": options.most_replicas,
                "target_ongoing_requests": options.max_num_seqs,
            }
        }
    deployment = serve.deployment(
        name="hopskip",
        ray_actor_options={"num_cpus": options.num_threads, "num_gpus": options.num_gpus},
        # a replica refuses what is too much for it, in OpenAI's shape, before Ray would let it wait or refuse it
        max_ongoing_requests=options.max_num_seqs + options.max_queue + 64,
        max_queued_requests=64,
        graceful_shutdown_timeout_s=options.shutdown_timeout,
        health_check_period_s=2,
        health_check_timeout_s=30,
        **scale,
    )(serve.ingress(build)(Replica))
    bound: Application = deployment.bind()
    return bound


def make_replica(options: RayOptions) -> FastAPI:
    """One replica's application: loads the model. Called in the replica's process."""
    from prometheus_client import disable_created_metrics

    from hopskip.llm import LLM
    from hopskip.serve.app import create_app
    from hopskip.serve.guard import log_to_stderr

    log_to_stderr()
    disable_created_metrics()  # type: ignore[no-untyped-call]
    settings = options.settings(read_api_keys(options.api_key_file))
    llm = LLM(
        **vars(options.load()),
        speculative=options.speculative(),
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs,
        chat_template=options.chat_template,
    )
    budget = (
        parse_size(options.kv_memory)
        if options.kv_memory
        else free_memory(llm.backend.traits.device) * 7 // 10 // options.most_replicas
    )
    llm.engine.reserve(budget, shrink=options.max_model_len is None)
    replica = create_app(llm, settings)
    threading.Thread(
        target=_report_to_ray, args=(replica.state.server.metrics,), name="hopskip-metrics", daemon=True
    ).start()
    return replica


def _report_to_ray(metrics: Metrics) -> None:
    """Copy this replica's metrics into Ray's, which tell replicas apart: `/metrics`, behind a proxy, is that of any one
    of them. There they are called `ray_hopskip_*`, and all are gauges, also those that only grow."""
    from ray.serve.metrics import Gauge

    gauges: dict[str, Any] = {}
    while True:
        for family in metrics.registry.collect():
            # not vLLM's names for the same figures, and Ray counts HTTP requests itself
            if not family.name.startswith("hopskip_") or family.name == "hopskip_http_requests":
                continue
            for sample in family.samples:
                if sample.name not in gauges:
                    gauges[sample.name] = Gauge(sample.name, family.documentation, tuple(sample.labels))
                gauges[sample.name].set(sample.value, dict(sample.labels))
        time.sleep(_METRICS_SECONDS)


def _checked(arguments: dict[str, Any]) -> RayOptions:
    """Options whose mistakes show here, and not on some machine after three attempts to start there."""
    try:
        options: RayOptions = RayOptions.model_validate(arguments)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        value = f" is {first['input']!r}" if first["type"] != "extra_forbidden" else ""
        raise ConfigError(f"{name}{value}: {first['msg']}; see hopskip.serve.ray_app.RayOptions") from None
    if options.most_replicas < options.num_replicas:
        raise ConfigError(
            f"max_replicas is {options.max_replicas}, below num_replicas, {options.num_replicas}; "
            "raise it or leave it out"
        )
    options.load()
    options.speculative()
    options.settings()
    if options.kv_memory is not None:
        parse_size(options.kv_memory)
    return options


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
