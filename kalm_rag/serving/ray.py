"""The server as an application of Ray Serve: as many replicas, on as many machines, as requests need.

serve run kalm_rag.serving.ray:build model=nano cpus=4
"""

# Annotations are evaluated here: Ray Serve reads the one of `build` to learn that its arguments have types.

import asyncio
import logging
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI

from kalm_rag.errors import MissingExtraError

try:
    from ray import serve
    from ray.serve.config import RequestRouterConfig
except ImportError as error:
    raise MissingExtraError("ray", "ray-serve") from error

from kalm_rag.cache.forgetting import ForgetReport, together
from kalm_rag.serving.app import create_app
from kalm_rag.serving.arguments import ReplicaArguments
from kalm_rag.serving.keys import Keys
from kalm_rag.serving.limits import ServingError
from kalm_rag.serving.logs import json_handler
from kalm_rag.serving.memory import keep_little

logger = logging.getLogger(__name__)

NAME = "Reranker"
"""The deployment's name, for `deployments:` in Ray Serve's YAML."""
_BY_SESSION = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
_BESIDE = 16
"""Requests that a replica answers beside those that it ranks or lets wait: health, metrics, refusals."""
_FORGET_SECONDS = 60.0
_CLOSING_SECONDS = 20
"""What the end of a replica may take beside running requests and the background."""


class Replica:
    """One server: a model, its cache, and the application in front of them.

    Args:
        arguments: what it serves.
    """

    def __init__(self, arguments: ReplicaArguments) -> None:
        keep_little()
        own = logging.getLogger("kalm_rag")
        own.handlers[:] = [json_handler()]
        own.setLevel(logging.INFO)
        own.propagate = False  # Ray's own handlers would write each line once more
        self._reranker = arguments.reranker()
        self._app = create_app(
            self._reranker,
            limits=arguments.checked_limits(),
            keys=Keys.from_environment(arguments.api_key_file),
            threshold=arguments.threshold,
            strict_model=arguments.strict_model,
            cors_origins=arguments.cors_origins,
            forget=self._forget_everywhere,
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the application; Ray Serve runs its start, which loads the model, and its end."""
        return self._app

    async def forget(self, texts: list[str]) -> ForgetReport:
        """Forget texts in this replica's memory, in its machine's folder, and in the shared tier."""
        report: ForgetReport = await self._app.state.work.run(self._reranker.forget, texts, refused=False)
        return report

    async def _forget_everywhere(self, texts: list[str]) -> dict[str, Any]:
        """Forget texts in every replica: each has a memory of its own, and each machine a folder.

        Raises:
            ServingError: a replica was not reached, or failed, and may still hold them.
            Exception: as of `KaLMReranker.forget`.
        """
        # This one goes first: it empties the tier, from which several at once would delete the same entries.
        first = await self.forget(texts)
        own = serve.get_replica_context()
        handle = serve.get_deployment_handle(own.deployment, own.app_name)
        answers = handle.broadcast("forget", texts)
        try:
            found = await answers.results_async(timeout_s=_FORGET_SECONDS, return_exceptions=True)
        except TimeoutError as error:
            found = [error]
        reports = [one for one in found if isinstance(one, ForgetReport)]
        expected = max(serve.get_replica_context().world_size, len(found))
        if len(reports) < expected:
            # The message of an exception may hold text.
            faults = [type(one).__name__ for one in found if not isinstance(one, ForgetReport)]
            logger.warning("%d of %d replicas have forgotten passages; the others: %s", len(reports), expected, faults)
            msg = f"{len(reports)} of {expected} replicas have forgotten the passages: send the same request again"
            raise ServingError(503, msg, 1.0)
        return asdict(together([first, *reports], texts=len(texts))) | {"replicas": len(reports)}

    async def __del__(self) -> None:
        """End, after Ray Serve has waited for running requests and has run the end of the application."""
        await asyncio.to_thread(self._reranker.close)


def build(arguments: ReplicaArguments) -> serve.Application:
    """Return the application for `serve run` and for Ray Serve's YAML.

    Autoscaling counts requests that are worked on or wait. Ray Serve sends a replica what its queue holds and some
    more, so that a full queue is told by the server, in the dialect of the client.

    Args:
        arguments: what each replica serves, and how many there are.
    """
    limits = arguments.checked_limits()
    deployment: Any = serve.deployment(serve.ingress()(Replica))  # its own types are of the decorator's other form
    deployment = deployment.options(
        name=NAME,
        ray_actor_options={"num_cpus": arguments.cpus, "num_gpus": arguments.gpus},
        autoscaling_config={
            "min_replicas": arguments.min_replicas,
            "max_replicas": arguments.max_replicas,
            "target_ongoing_requests": arguments.target_ongoing_requests,
        },
        max_ongoing_requests=limits.running + limits.waiting + _BESIDE,
        max_queued_requests=limits.waiting,
        graceful_shutdown_timeout_s=2 * limits.drain_seconds + _CLOSING_SECONDS,
    )
    if arguments.sessions:
        by_session = RequestRouterConfig.model_validate({"request_router_class": _BY_SESSION})
        deployment = deployment.options(request_router_config=by_session)
    application: serve.Application = deployment.bind(arguments)
    return application
