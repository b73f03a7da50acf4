"""HTTP to an API server: kubernetes-asyncio's configuration, credentials and connections; answers as values.

Ours is what the library leaves out: a bound on every wait and size, and a status that is looked at also for a watch.
Timeouts are asyncio's; aiohttp's own can swallow the cancellation of a task (see xds/scrape.py).
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncGenerator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp
import jiter
import yaml
from aiohttp.http_exceptions import HttpProcessingError
from kubernetes_asyncio.client import ApiClient, Configuration
from kubernetes_asyncio.config import ConfigException, load_incluster_config, load_kube_config

from xds.api_wire import Failure, refusal
from xds.model import authority

ANSWER = 10.0  # seconds until the head of an answer: an API server in trouble says so sooner
MAX_BODY = 64 << 20  # bytes: a page of 250 pods has 2 MB
MAX_REFUSAL = 64 << 10  # bytes
FIELD_MANAGER = "vllm-xds"  # whose fields metadata.managedFields says they are
MERGE = "application/merge-patch+json"
SERVICE_ACCOUNT_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
DEFAULT_KUBECONFIG = Path("~/.kube/config")

# What the library raises for a kubeconfig that is none: it asserts and subscripts without a look at what it read.
_BAD_CONFIG = (
    *(ConfigException, yaml.YAMLError, OSError),
    *(ValueError, TypeError, KeyError, AttributeError, AssertionError),
)


# What a request can end in. A ValueError: the library follows redirects, and a name or a character of one was none.
_FAULTS = (TimeoutError, aiohttp.ClientError, OSError, ConfigException, ValueError)


class KubeError(Exception):
    """No API server can be asked: no kubeconfig, one that is broken or lacks the context. A sentence, with the path."""


async def connect(kubeconfig: str = "", context: str = "") -> Client:
    """A client by the first of: the given kubeconfig, $KUBECONFIG, the pod's service account, ~/.kube/config.

    Nothing is asked of the server yet. Raises KubeError.
    """
    files = _files(kubeconfig)
    configuration = Configuration()
    # The cluster's own CA is the only one trusted; Python 3.13 refuses many of them for extensions they lack.
    configuration.disable_strict_ssl_verification = True
    configuration.connection_pool_maxsize = 0  # no limit: every watch holds a connection
    loader = None
    try:
        if files:
            loader = await load_kube_config(files, context or None, configuration, persist_config=False)
        else:
            load_incluster_config(configuration)
    except _BAD_CONFIG as error:
        where = f"kubeconfig {files}" if files else "service account of this pod"
        said = isinstance(error, ConfigException | yaml.YAMLError | OSError)
        why = " ".join(str(error).split()) if said else "it is not a kubeconfig"
        raise KubeError(f"cannot use the {where}: {why}") from error
    return Client(configuration, loader)


def own_namespace() -> str:
    """The namespace of the pod that this process is in; "" outside a cluster."""
    try:
        return SERVICE_ACCOUNT_NAMESPACE.read_text().strip() if os.environ.get("KUBERNETES_SERVICE_HOST") else ""
    except OSError:
        return ""


def _files(kubeconfig: str) -> str:
    """The kubeconfig to use, or several as $KUBECONFIG may name; "" for the service account of a pod."""
    files = kubeconfig or os.environ.get("KUBECONFIG", "")
    if not files and os.environ.get("KUBERNETES_SERVICE_HOST"):
        return ""
    files = files or str(DEFAULT_KUBECONFIG.expanduser())
    if not any(Path(each).expanduser().is_file() for each in files.split(os.pathsep)):
        hint = "" if kubeconfig else "; give one with --kubeconfig"
        raise KubeError(f"no kubeconfig at {files}{hint}")
    return files


class Client:
    """One API server (mutable: connections and credentials). Leave it with `contextlib.aclosing`."""

    def __init__(self, configuration: Any, loader: Any = None) -> None:
        self.server: str = configuration.host
        self._configuration = configuration
        self._loader = loader
        self._api = ApiClient(configuration)
        self._api.user_agent = f"vllm-xds/{version('vllm-xds')}"

    async def aclose(self) -> None:
        await self._api.close()

    async def get(
        self, path: str, query: Mapping[str, object], within: float, *, text: bool = False
    ) -> object | Failure:
        """The decoded JSON (or the bytes) of a 200 answer, whole `within` so many seconds."""
        try:
            async with asyncio.timeout(within):
                response = await self._open(path, query)
                if isinstance(response, Failure):
                    return response
                async with response:
                    body = await _read(response, MAX_BODY)
        except _FAULTS as error:
            return _fault(error)
        return body if isinstance(body, Failure) or text else _decode(body)

    async def send(
        self, method: str, path: str, body: object, within: float, content: str = "application/json"
    ) -> object | Failure:
        """Write `body`, as JSON of the type `content`; returns the decoded answer, whole `within` so many seconds.

        After a Failure without a status it is not known whether it was written.
        """
        try:
            async with asyncio.timeout(within):
                response = await self._open(path, {"fieldManager": FIELD_MANAGER}, method, body, content)
                if isinstance(response, Failure):
                    return response
                async with response:
                    answer = await _read(response, MAX_BODY)
        except _FAULTS as error:
            return _fault(error)
        return answer if isinstance(answer, Failure) else _decode(answer)

    async def lines(
        self, path: str, query: Mapping[str, object], within: float
    ) -> AsyncGenerator[object | Failure, None]:
        """The decoded lines of a watch as they come, and a Failure in the end if it does not end in order.

        `within` so many seconds the server has to end it: the query has a shorter timeoutSeconds.
        """
        deadline = asyncio.get_running_loop().time() + within
        try:
            async with asyncio.timeout_at(deadline):
                response = await self._open(path, query)
        except _FAULTS as error:
            yield _fault(error)
            return
        if isinstance(response, Failure):
            yield response
            return
        async with response:
            while True:
                try:
                    async with asyncio.timeout_at(deadline):
                        line = await response.content.readline()
                except HttpProcessingError:
                    yield Failure("TooLarge", "a line of a watch is longer than an object may be")
                    return
                except (TimeoutError, aiohttp.ClientError, OSError) as error:
                    yield _fault(error)
                    return
                if not line:
                    return
                if line.strip():
                    yield _decode(line)

    async def _open(
        self, path: str, query: Mapping[str, object], method: str = "GET", body: object = None, content: str = ""
    ) -> aiohttp.ClientResponse | Failure:
        """The 200 answer, its body unread, or why there is none; the caller bounds the time and catches the faults."""
        headers = {"Accept": "application/json"} | ({"Content-Type": content} if content else {})
        async with asyncio.timeout(ANSWER):
            response: aiohttp.ClientResponse = await self._api.call_api(
                path,
                method,
                query_params=list(query.items()),
                header_params=headers,
                body=body,
                auth_settings=["BearerToken"],
                _preload_content=False,
            )
        if response.status in (200, 201):
            return response
        async with response:
            body = await _read(response, MAX_REFUSAL)
        if response.status == 401 and self._loader is not None:
            await self._log_in()
        return refusal(
            response.status, b"" if isinstance(body, Failure) else body, response.headers.get("Retry-After", "")
        )

    async def _log_in(self) -> None:
        """Read the kubeconfig's credentials again: a token file, an exec plugin. The library does it once."""
        try:
            await self._loader.load_and_set(self._configuration)
        except _BAD_CONFIG as error:
            raise ConfigException(str(error)) from error


async def _read(response: aiohttp.ClientResponse, limit: int) -> bytes | Failure:
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > limit:
            return Failure("TooLarge", f"more than {limit} bytes")
    return bytes(body)


def _decode(body: bytes) -> object | Failure:
    try:
        value: object = jiter.from_json(body, cache_mode="keys")
    except ValueError as error:
        return Failure("Protocol", f"not JSON: {error}")
    return value


def _fault(error: Exception) -> Failure:
    match error:
        case TimeoutError():
            return Failure("Timeout", "the API server did not answer in time, or did not end a watch")
        case ConfigException():
            return Failure("Unauthorized", f"no credentials: {error}", 401)
        case aiohttp.ClientConnectorError(os_error=cause, host=host, port=port):
            system = cause.errno is not None and cause.errno > 0 and not isinstance(cause, ssl.SSLError)
            why = os.strerror(cause.errno or 0) if system else str(cause)
            return Failure("Unreachable", f"cannot connect to {authority(host, port or 0)}: {why}")
        case aiohttp.ClientPayloadError() | aiohttp.ServerDisconnectedError():
            return Failure("Unreachable", "the API server closed the connection")
    return Failure("Unreachable", str(error) or type(error).__name__)
