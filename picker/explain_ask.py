"""Whom to ask for a request's route and pick: running processes, or the same code over a directory.

Running      POST /debug/route at the management server, POST /debug/pick at the picker, which knows what it has sent
Directory    the server's translation and a picker of our own, which has sent nothing and knows the loads it is given
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import yaml
from google.protobuf.json_format import ParseDict, ParseError

from picker.cost import PoolLoad
from picker.explain import explain
from picker.loads import CONFIG, LOAD, decode
from picker.pick import Picker
from xds.directory import DirectorySource
from xds.explain import explain_route
from xds.loads import pool_load
from xds.model import Cluster, Topology
from xds.pools import pool_config
from xds.resolve import resolve
from xds.weights import Pool
from xds.wire import load_pb2 as pb
from xds.wire.discovery_pb2 import Any as Packed
from xds.wire.discovery_pb2 import Resource

TIMEOUT = 10.0  # seconds for one answer: milliseconds of work, and a body of 8 MiB
MAX_ANSWER = 16 << 20  # bytes: 10,000 pods are 4 MB


class ExplainError(Exception):
    """Nothing can be explained; the text is a sentence."""


class Source(Protocol):
    """Where answers come from; both raise ExplainError."""

    async def route(self, question: bytes) -> dict[str, Any]:
        """As `xds.explain.explain_route`."""
        ...

    async def pick(self, cluster_name: str, body: bytes, session: str, objective: str) -> dict[str, Any]:
        """As `picker.explain.explain`."""
        ...


class Running:
    """The status addresses (HOST:PORT) of a running management server and of a picker."""

    def __init__(self, server: str, picker: str) -> None:
        self._server = server
        self._picker = picker

    async def route(self, question: bytes) -> dict[str, Any]:
        return await _post(self._server, "/debug/route", {}, question, "serve", "--status")

    async def pick(self, cluster_name: str, body: bytes, session: str, objective: str) -> dict[str, Any]:
        query = {"cluster": cluster_name, "session": session, "objective": objective}
        return await _post(self._picker, "/debug/pick", query, body, "picker", "--metrics-address")


async def _post(
    address: str, path: str, query: Mapping[str, str], body: bytes, command: str, option: str
) -> dict[str, Any]:
    other = ExplainError(f"{address} answers, but not as `vllm-xds {command}` of this version")
    try:
        async with (
            asyncio.timeout(TIMEOUT),
            aiohttp.ClientSession(auto_decompress=False, read_bufsize=MAX_ANSWER) as session,
            session.post(
                f"http://{address}{path}", params=query, data=BytesIO(body), allow_redirects=False
            ) as response,
        ):
            answer = bytearray()
            async for chunk in response.content.iter_any():
                answer += chunk
                if len(answer) > MAX_ANSWER:
                    raise ExplainError(f"{address} answers with more than {MAX_ANSWER >> 20} MiB")
            if response.status == 200:
                return dict(json.loads(answer))
            if response.status == 400 and path == "/debug/route":
                raise ExplainError(answer.decode(errors="replace").strip())
            if response.status == 403:
                raise ExplainError(f"{address} answers this to its own machine alone")
            if response.status == 404 and command == "picker":
                raise ExplainError(f"no worker of the picker at {address} serves at the moment")
            raise other
    except TimeoutError:
        raise ExplainError(f"{address} does not answer within {TIMEOUT:g} s") from None
    except (aiohttp.ClientConnectorError, aiohttp.InvalidURL):
        text = f"cannot connect to {address}: is `vllm-xds {command}` running with this {option}?"
        raise ExplainError(text) from None
    except (aiohttp.ClientError, OSError, RecursionError, TypeError, ValueError):
        raise other from None


class Directory:
    """A directory of YAML, as for `serve --config`, and what its pods report, as `read_loads` has it; None: all idle.

    Raises DirectoryError, and ExplainError for loads of pools and pods that are not there.
    """

    def __init__(
        self, directory: Path, controller_names: tuple[str, ...], loads: Mapping[str, pb.PoolLoad] | None
    ) -> None:
        self._topology = resolve(DirectorySource(directory).load(), controller_names)
        self._picker = picker_of(self._topology, loads)

    async def route(self, question: bytes) -> dict[str, Any]:
        try:
            return explain_route(self._topology, question)
        except ValueError as error:
            raise ExplainError(str(error)) from None

    async def pick(self, cluster_name: str, body: bytes, session: str, objective: str) -> dict[str, Any]:
        return explain(self._picker, cluster_name, body, 0.0, session, objective)


def read_loads(text: str) -> dict[str, pb.PoolLoad]:
    """Pool cluster name -> what it reports, of YAML documents; ExplainError.

    A document is a PoolLoad (xds/wire/load.proto) as protobuf writes JSON, alone or as /debug/snapshot has it.
    """
    loads = {}
    try:
        for document in yaml.safe_load_all(text):
            found = document.get("resource", document) if isinstance(document, dict) else document
            if not isinstance(found, dict):
                raise ExplainError(f"expected a PoolLoad, found {document!r:.100}")
            load = ParseDict({name: each for name, each in found.items() if name != "@type"}, pb.PoolLoad())
            loads[load.name] = load
    except (yaml.YAMLError, ParseError) as error:
        raise ExplainError(" ".join(str(error).split())) from None
    return loads


def picker_of(topology: Topology, loads: Mapping[str, pb.PoolLoad] | None) -> Picker:
    """A picker that was told of these pools and loads just now, at 0 seconds; of equal pods it takes the first."""
    picker = Picker(lambda: 0.0)
    pools = {each.name: each for each in topology.clusters if each.strategy is not None}
    for name in sorted((loads or {}).keys() - pools.keys()):
        raise ExplainError(f"there is no pool {name!r}: there are {', '.join(sorted(pools)) or 'none'}")
    for name, cluster in pools.items():
        for type_url, value in ((CONFIG, pool_config(cluster)), (LOAD, _load(cluster, loads).SerializeToString())):
            try:
                told = decode(Resource(name=name, resource=Packed(type_url=type_url, value=value)), type_url)
            except ValueError as error:
                raise ExplainError(str(error)) from None
            if isinstance(told, PoolLoad):
                picker.update(told, 0.0)
            else:
                picker.configure(told)
    return picker


def _load(cluster: Cluster, loads: Mapping[str, pb.PoolLoad] | None) -> pb.PoolLoad:
    """The pool's load as the server would report it: a pod that `loads` do not have has never been read."""
    load = pb.PoolLoad.FromString(pool_load(cluster, Pool(cluster.name), 0.0, 0))
    given = None if loads is None else loads.get(cluster.name)
    if given is not None and given.HasField("in_flight"):
        load.in_flight.CopyFrom(given.in_flight)
    reports = {each.hash_key: each for each in given.endpoints} if given is not None else {}
    for endpoint in load.endpoints:
        report = reports.pop(endpoint.hash_key, None)
        if report is not None:
            report.address = endpoint.address
            endpoint.CopyFrom(report)
        elif loads is None:
            endpoint.age = 0.0
    for name in sorted(reports):
        raise ExplainError(f"{cluster.name} has no pod {name!r}")
    return load
