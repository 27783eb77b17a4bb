"""Bundles on Ray Serve, for more than one machine.

    serve run variator_export.serving.ray:app bundle=artifacts/minilm slo_ms=200

Ray Serve places replicas, restarts them and scales them by the requests in flight. Each replica has the
batcher and the policy of `variator-export serve`. An ingress sends each request to a replica of the bundle
that it names, and to another one if that replica dies: vectors and labels can be computed twice without harm.
"""

import asyncio
import logging
import os
from dataclasses import replace
from typing import Any

import httpx2
import orjson
from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from variator_export.serving.http.app import make_app
from variator_export.serving.http.body import receive
from variator_export.serving.http.errors import ApiError, error_response, json_response
from variator_export.serving.http.settings import ServerSettings
from variator_export.serving.http.state import ServerState
from variator_export.serving.model import ModelOptions, ServedModel
from variator_export.serving.policies import POLICIES

_LOG = logging.getLogger(__name__)
# Attempts at a request whose replica dies; each takes another replica. Not more: a text may be to blame.
_ATTEMPTS = 3
# Headers that belong to a connection, which a replica's answer does not have.
_OF_THE_CONNECTION = {"content-length", "connection", "date", "server", "transfer-encoding"}


class AppArguments(BaseModel):
    """Arguments of the application, in a Serve config file or as `name=value` on the command line.

    Attributes:
        bundle: A bundle's folder, or `ORGANISATION/NAME[@REVISION]` on the hub. Every node must have access.
        bundles: Several bundles, by the name that requests use.
        slo_ms: The latency goal of a request in milliseconds.
        max_loss: The largest loss of an answer, as a share.
        policy: The policy: `backlog`, `slack` or `static`.
        target: The runtime.
        allow_unknown_quality: Serve bundles without a stored evaluation.
        calibration_seconds: The time to measure batches when a replica starts.
        threads: Threads of an operator on a CPU, and CPUs that a replica reserves.
        num_gpus: GPUs that a replica reserves.
        min_replicas: The smallest number of replicas of a bundle.
        max_replicas: The largest number of replicas of a bundle.
        target_ongoing_requests: Requests in flight for each replica, above which Ray adds replicas.
    """

    model_config = ConfigDict(extra="forbid")

    bundle: str | None = None
    bundles: dict[str, str] = Field(default_factory=dict)
    slo_ms: float = Field(default=200.0, gt=0)
    max_loss: float | None = Field(default=None, ge=0, lt=1)
    policy: str = "backlog"
    target: str = "onnxruntime"
    allow_unknown_quality: bool = False
    calibration_seconds: float = Field(default=4.0, ge=0)
    threads: int = Field(default=1, ge=1)
    num_gpus: float = Field(default=0, ge=0)
    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=1, ge=1)
    target_ongoing_requests: float = Field(default=8.0, gt=0)

    @model_validator(mode="after")
    def _fits(self) -> "AppArguments":
        if (self.bundle is None) == (not self.bundles):
            raise ValueError("give bundle=FOLDER, or bundles with several names, and not both")
        if self.policy not in POLICIES:
            raise ValueError(f"policy {self.policy!r} is none of {', '.join(POLICIES)}")
        if self.max_replicas < self.min_replicas:
            raise ValueError("max_replicas is smaller than min_replicas")
        return self


class BundleReplica:
    """One bundle in one process: what `variator-export serve` is, without a port.

    Args:
        path: The bundle.
        name: The name that requests use. None for the bundle's own.
        options: How the bundle is opened.
        settings: The server's settings.
    """

    def __init__(self, path: str, name: str | None, options: ModelOptions, settings: ServerSettings) -> None:
        def opened() -> ServedModel:
            return ServedModel.open(path, options)

        self._state = ServerState(opened(), replace(settings, model_name=name), opened)
        transport = httpx2.ASGITransport(make_app(self._state), raise_app_exceptions=False)
        self._client = httpx2.AsyncClient(transport=transport, base_url="http://replica", timeout=None)

    async def respond(
        self, method: str, path: str, headers: list[tuple[str, str]], body: bytes
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        """Answer a request: status, headers and body."""
        response = await self._client.request(method, path, headers=headers, content=body)
        kept = [(name, value) for name, value in response.headers.items() if name not in _OF_THE_CONNECTION]
        return response.status_code, [*kept, ("x-variator-replica", str(os.getpid()))], response.content

    def name(self) -> str:
        """The name that requests use for the bundle."""
        return self._state.model_name

    def check_health(self) -> None:
        """Called by Ray, which restarts a replica that raises.

        Raises:
            RuntimeError: The runtime is broken.
        """
        if not self._state.now.service.healthy:
            raise RuntimeError("the last batches failed entirely")

    def __del__(self) -> None:
        """Called by Ray when it stops a replica, after its requests are answered."""
        if hasattr(self, "_state"):
            self._state.close()


class Ingress:
    """Sends each request to a replica of the bundle that it names.

    Args:
        replicas: The bundles' deployments, by the name that requests use.
        settings: The settings of the replicas, whose limits hold here too.
    """

    def __init__(self, replicas: dict[str, DeploymentHandle], settings: ServerSettings) -> None:
        self._replicas, self._settings = replicas, settings

    async def __call__(self, request: Request) -> Response:
        """Answer a request."""
        path = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        if request.url.path in ("/health", "/ready"):
            return PlainTextResponse("ok")  # Ray itself watches the replicas
        if request.url.path == "/v1/models" and len(self._replicas) > 1:
            return await self._models(request)
        try:
            body = await receive(request, self._settings.max_body_bytes, self._settings.receive_timeout_s)
            handle = self._find(request, body)
        except ApiError as error:
            return error_response(error, request.url.path)
        headers = list(request.headers.items())
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                status, found, content = await handle.respond.remote(request.method, path, headers, body)
                return Response(content, status, dict(found))
            except RayActorError:
                _LOG.warning("A replica died; attempt %d of %d.", attempt, _ATTEMPTS)
                await asyncio.sleep(0.05 * attempt)
        died = ApiError(503, "The replicas of this model died. Retry later.", headers={"retry-after": "5"})
        return error_response(died, request.url.path)

    def _find(self, request: Request, body: bytes) -> DeploymentHandle:
        """The deployment of a request, by the name in its body or its header `x-variator-model`.

        Raises:
            ApiError: The request names none, or one that does not exist.
        """
        if len(self._replicas) == 1:
            return next(iter(self._replicas.values()))
        asked = request.headers.get("x-variator-model") or _model_of(body)
        there = ", ".join(self._replicas)
        if asked is None:
            raise ApiError(400, f"Name a model: `model` in the body, or x-variator-model; one of {there}.")
        name = asked.partition("@")[0]
        if name not in self._replicas:
            raise ApiError(404, f"There is no model {name!r}; there is {there}.", "model_not_found")
        return self._replicas[name]

    async def _models(self, request: Request) -> Response:
        """The models of all bundles."""
        headers = list(request.headers.items())
        found = await asyncio.gather(
            *(h.respond.remote("GET", "/v1/models", headers, b"") for h in self._replicas.values())
        )
        refused = next((answer for answer in found if answer[0] != 200), None)
        if refused is not None:
            return Response(refused[2], refused[0], dict(refused[1]))
        data = [model for _, _, content in found for model in orjson.loads(content)["data"]]
        return json_response({"object": "list", "data": data})


def app(arguments: AppArguments) -> Any:
    """The application, for `serve run` and for Serve config files."""
    settings = ServerSettings(goal_ms=arguments.slo_ms, policy=arguments.policy)
    options = ModelOptions(
        target=arguments.target,
        threads=arguments.threads,
        max_loss=arguments.max_loss,
        allow_unknown_quality=arguments.allow_unknown_quality,
        calibration_seconds=arguments.calibration_seconds,
    )
    named = arguments.bundles if arguments.bundle is None else {"": arguments.bundle}
    replicas: dict[str, Any] = {}
    for name, path in named.items():
        deployment = serve.deployment(
            BundleReplica,
            name=f"bundle-{name}" if name else "bundle",
            ray_actor_options={"num_cpus": arguments.threads, "num_gpus": arguments.num_gpus},
            autoscaling_config={
                "min_replicas": arguments.min_replicas,
                "max_replicas": arguments.max_replicas,
                "target_ongoing_requests": arguments.target_ongoing_requests,
            },
            # The replica's own admission refuses, in time and with a reason.
            max_ongoing_requests=100_000,
            health_check_period_s=2,
            graceful_shutdown_timeout_s=30,
        )
        replicas[name] = deployment.bind(path, name or None, options, settings)
    ingress = serve.deployment(
        Ingress, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=100_000, health_check_period_s=2
    )
    return ingress.bind(replicas, settings)


def _model_of(body: bytes) -> str | None:
    """The model that a body names."""
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    found = content.get("model") if isinstance(content, dict) else None
    return found if isinstance(found, str) else None
