"""A fake API server that speaks the real wire over HTTP on loopback, for what can not run in a test: a cluster.

    async with FakeApiServer() as api:
        api.store.put({...})          # as a controller in the cluster would, status included
        ...                           # http://127.0.0.1:{api.port}, bearer token `api.token`
        await api.restart()           # one of the fault levers

Lists with limit and continue, watches with bookmarks and a server-side timeout, discovery, create, update, delete,
merge patch, server-side apply, the status subresource; refusals with the words of a real 1.36 server, from its raw
HTTP. What it does not do (JSON patch, most selectors) is a 501 and never a wrong answer.
"""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Self

import yaml
from aiohttp import web

from tests.apiserver_store import EVERYTHING, ApiError, Key, Object, Resource, Store, Stored, Table, expired, too_large

USER = "system:serviceaccount:test:vllm-xds"
MERGE, APPLY = "application/merge-patch+json", "application/apply-patch+yaml"
STRATEGIC, JSON_PATCH = "application/strategic-merge-patch+json", "application/json-patch+json"
INITIAL_EVENTS_END = {"annotations": {"k8s.io/initial-events-end": "true"}}
LAST_BOOKMARK = 2.0  # seconds before the end of a watch: there a real server sends its last bookmark
SHUTDOWN = 0.1  # seconds for handlers to end when the server stops
MAX_SNAPSHOTS = 200  # lists under way whose continue tokens still count; a real server's do for five minutes
VERBS = ["create", "delete", "get", "list", "patch", "update", "watch"]


@dataclass(slots=True)
class Faults:
    """What a test makes of the server, at any time.

    `delay`: seconds before each answer, and before each line of a watch. `pieces`: a line of a watch goes out in so
    many packets. `cut`: the next line of each watch ends in its middle, with the connection. `bookmark_every`: seconds.
    """

    delay: float = 0.0
    pieces: int = 1
    cut: bool = False
    bookmark_every: float = 60.0


@dataclass(slots=True)
class Rule:
    """Answer the next `times` requests of these verbs (list, watch, get, ...) and of this plural with an error."""

    error: ApiError
    verb: str
    plural: str
    times: int


class Watch:
    """One open watch: where it is, and what wakes it."""

    def __init__(self, table: Table, namespace: str, revision: int) -> None:
        self.table, self.namespace, self.revision = table, namespace, revision
        self.wake = asyncio.Event()


class FakeApiServer:
    """One API server; start and stop it, or use it as an async context manager. A second start keeps port and objects.

    Without a `token` it takes every request (kubectl sends none over plain HTTP).
    """

    def __init__(self, resources: tuple[Resource, ...] = EVERYTHING, token: str = "test-token") -> None:  # noqa: S107
        self.token = token
        self.port = 0  # 0 until the first start: then the free port that was found, and kept
        self.faults = Faults()
        self.store = Store(resources, lambda: f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}")
        self.store.changed = self._changed
        self.requests: list[str] = []  # "list pods", "watch pods", ...: every one that was answered, or would have been
        self.at_once: Counter[str] = Counter()  # by method how many were under way at the same time, at most
        self._under_way: Counter[str] = Counter()
        self.forbidden: set[tuple[str, str]] = set()  # (verb, plural)
        self.watches: set[Watch] = set()
        self._rules: list[Rule] = []
        self._snapshots: dict[str, tuple[int, list[tuple[Key, Stored]]]] = {}
        self._initializing = False
        self._running = asyncio.Event()
        self._running.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def kubeconfig(self) -> str:
        """A kubeconfig for this server, as YAML."""
        names = {"cluster": "fake", "user": "fake"}
        return yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "fake",
                "clusters": [{"name": "fake", "cluster": {"server": self.url}}],
                "users": [{"name": "fake", "user": {"token": self.token}}],
                "contexts": [{"name": "fake", "context": names}],
            }
        )

    # --- start, stop and the fault levers ---

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        app = web.Application(client_max_size=8 << 20)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=SHUTDOWN)
        await self._runner.setup()
        self._listener = socket.create_server(("127.0.0.1", self.port))
        await web.SockSite(self._runner, self._listener).start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Gone: connections are reset, new ones refused. Stopped twice, it is gone all the same."""
        if self._listener.fileno() < 0:
            return
        # What asyncio has accepted becomes a connection of ours some turns of the loop later, and is left open when its
        # server is closed in between (https://github.com/python/cpython/issues/109564): accept no more, then wait.
        asyncio.get_running_loop().remove_reader(self._listener)
        for _ in range(3):
            await asyncio.sleep(0)
        for site in list(self._runner.sites):
            await site.stop()
        self.drop()
        await self._runner.cleanup()

    async def restart(self, initializing: bool = False) -> None:
        """Another process on the same data: it remembers no event, so every watch begins with a 410.

        While `initializing`, until `initialized()`, it answers 429 to every list and watch.
        """
        await self.stop()
        self.store.forget()
        self._snapshots.clear()
        self._initializing = initializing
        await self.start()

    def initialized(self) -> None:
        self._initializing = False

    def drop(self) -> None:
        """Reset every connection."""
        server = self._runner.server
        for connection in server.connections if server else ():
            if connection.transport is not None:
                connection.transport.abort()

    def hang(self) -> None:
        """Half-open: connections stay and are accepted, and not a byte comes any more."""
        self._running.clear()

    def resume(self) -> None:
        self._running.set()

    def rewind(self, revisions: int) -> None:
        """etcd restored from a backup: the present revision is lower than what clients know."""
        self.store.revision -= revisions
        self.store.forget()

    def fail(self, error: ApiError, verb: str = "", plural: str = "", times: int = 1) -> None:
        """Answer the next requests of a kind with an error; "" is any."""
        self._rules.append(Rule(error, verb, plural, times))

    def _changed(self, table: Table) -> None:
        for watch in self.watches:
            if watch.table is table:
                watch.wake.set()

    # --- requests ---

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self._under_way[request.method] += 1
        self.at_once[request.method] = max(self.at_once[request.method], self._under_way[request.method])
        try:
            await self._running.wait()
            if self.faults.delay:
                await asyncio.sleep(self.faults.delay)
            self._authenticate(request)
            return await self._route(request)
        except ApiError as error:
            headers = {"Retry-After": str(error.retry_after)} if error.retry_after else {}
            return _json(error.status(), error.code, headers)
        finally:
            self._under_way[request.method] -= 1

    def _authenticate(self, request: web.Request) -> None:
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            self.requests.append("unauthorized")
            raise ApiError(401, "Unauthorized", "Unauthorized")

    async def _route(self, request: web.Request) -> web.StreamResponse:
        parts = [part for part in request.path.split("/") if part]
        if parts == ["readyz"]:
            if self._initializing:
                return web.Response(text="[-]poststarthook/crd-informer-synced failed\n", status=500)
            return web.Response(text="ok")
        if (found := self._discovery(parts)) is not None:
            self.requests.append(f"discover {request.path}")
            self._refuse("discover", request.path)
            return _json(found)
        at = _resource_at(parts)
        table, version = self._find(parts[:at])
        rest = parts[at:]
        namespace = ""
        if table is None and rest[:1] == ["namespaces"] and len(rest) >= 3:
            namespace, rest = rest[1], rest[2:]
        if table is None and rest:
            table, version = self._find([*parts[:at], rest[0]])
            rest = rest[1:]
        if table is None or len(rest) > 2 or (namespace and not table.resource.namespaced):
            return _text_404()
        resource = table.resource
        subresource = rest[1] if len(rest) == 2 else ""
        if subresource and not (subresource == "status" and resource.status):
            return _text_404()
        name = rest[0] if rest else ""
        verb = _verb(request, name)
        self.requests.append(f"{verb} {resource.plural}")
        self._authorize(verb, resource, namespace)
        self._refuse(verb, resource.plural)
        if self._initializing and verb in ("list", "watch"):
            raise ApiError(429, "TooManyRequests", "storage is (re)initializing", retry_after=1)
        if verb == "watch":
            return await self._watch(request, table, version, namespace)
        if verb == "list":
            return self._list(request, table, version, namespace)
        key = (namespace if resource.namespaced else "", name)
        return await self._object(request, verb, table, version, key, subresource)

    def _find(self, parts: list[str]) -> tuple[Table | None, str]:
        """The resource that [api, v1, pods] or [apis, group, version, plural] names, and its version."""
        match parts:
            case ["api", "v1", plural]:
                return self.store.tables.get(("", plural)), "v1"
            case ["apis", group, version, plural]:
                table = self.store.tables.get((group, plural))
                return (table, version) if table and version in table.resource.versions else (None, "")
        return None, ""

    def _authorize(self, verb: str, resource: Resource, namespace: str) -> None:
        if (verb, resource.plural) in self.forbidden:
            where = f'in the namespace "{namespace}"' if namespace else "at the cluster scope"
            message = (
                f'{resource.name} is forbidden: User "{USER}" cannot {verb} resource "{resource.plural}" '
                f'in API group "{resource.group}" {where}'
            )
            details = {"kind": resource.plural} | ({"group": resource.group} if resource.group else {})
            raise ApiError(403, "Forbidden", message, details)

    def _refuse(self, verb: str, plural: str) -> None:
        for rule in self._rules:
            if rule.verb in ("", verb) and rule.plural in ("", plural):
                rule.times -= 1
                if rule.times == 0:
                    self._rules.remove(rule)
                raise rule.error

    # --- discovery ---

    def _discovery(self, parts: list[str]) -> Object | None:
        groups: dict[str, dict[str, list[Resource]]] = {}
        for table in self.store.tables.values():
            for version in table.resource.versions:
                groups.setdefault(table.resource.group, {}).setdefault(version, []).append(table.resource)
        match parts:
            case ["version"]:
                return {"major": "1", "minor": "36", "gitVersion": "v1.36.2"}
            case ["api"]:
                addresses = [{"clientCIDR": "0.0.0.0/0", "serverAddress": f"127.0.0.1:{self.port}"}]
                return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": addresses}
            case ["api", "v1"]:
                return {"kind": "APIResourceList", "groupVersion": "v1", "resources": list(_rows(groups[""]["v1"]))}
            case ["apis"]:
                found = [_group(name, list(versions)) for name, versions in groups.items() if name]
                return {"kind": "APIGroupList", "apiVersion": "v1", "groups": found}
            case ["apis", group] if group in groups:
                return {"kind": "APIGroup", "apiVersion": "v1", **_group(group, list(groups[group]))}
            case ["apis", group, version] if version in groups.get(group, {}):
                rows = list(_rows(groups[group][version]))
                head = {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": f"{group}/{version}"}
                return {**head, "resources": rows}
        return None

    # --- lists and watches ---

    def _list(self, request: web.Request, table: Table, version: str, namespace: str) -> web.Response:
        query = request.query
        limit = int(query.get("limit") or 0)
        asked = _revision(query.get("resourceVersion", ""))
        if asked > self.store.revision:
            raise too_large(asked, self.store.revision)
        if token := query.get("continue"):
            if token not in self._snapshots:
                message = "The provided continue parameter is too old to display a consistent list result."
                raise ApiError(410, "Expired", message)
            revision, items = self._snapshots[token]
        else:
            revision = self.store.revision
            items = _selected(query, table.select(namespace))
        page, left = (items[:limit], items[limit:]) if limit else (items, [])
        metadata: Object = {"resourceVersion": str(revision)}
        if left:
            start = "/".join(page[-1][0]) + "\0"
            text = json.dumps({"v": "meta.k8s.io/v1", "rv": revision, "start": start, "id": uuid.uuid4().hex})
            metadata["continue"] = base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")
            metadata["remainingItemCount"] = len(left)
            self._snapshots[metadata["continue"]] = (revision, left)
            while len(self._snapshots) > MAX_SNAPSHOTS:
                del self._snapshots[next(iter(self._snapshots))]
        resource = table.resource
        head = {"kind": f"{resource.kind}List", "apiVersion": resource.api_version(version), "metadata": metadata}
        bodies = (
            s.body(resource, version) if resource.crd else b"{" + s.rest for _, s in page
        )  # typed: without a kind
        body = json.dumps(head).encode()[:-1] + b', "items": [' + b",".join(bodies) + b"]}"
        return web.Response(body=body, headers=_headers())

    async def _watch(self, request: web.Request, table: Table, version: str, namespace: str) -> web.StreamResponse:
        query = request.query
        asked = _revision(query.get("resourceVersion", ""))
        loop = asyncio.get_running_loop()
        end = loop.time() + float(query.get("timeoutSeconds") or 1800)
        response = web.StreamResponse(headers=_headers())
        response.enable_chunked_encoding()
        await response.prepare(request)
        if asked > self.store.revision:  # nothing, not even an error, until the time is over
            await asyncio.sleep(end - loop.time())
            return response
        if asked and asked < table.floor:
            error = {"type": "ERROR", "object": expired(asked, table.floor).status()}
            await self._send(request, response, [json.dumps(error).encode()])
            return response
        watch = Watch(table, namespace, asked or self.store.revision)
        bookmarks = query.get("allowWatchBookmarks") in ("1", "true")
        if not asked:
            lines = [
                _line("ADDED", s.body(table.resource, version)) for _, s in _selected(query, table.select(namespace))
            ]
            if bookmarks and "resourceVersion" not in query:
                lines.append(self._bookmark(watch, version, INITIAL_EVENTS_END))
            await self._send(request, response, lines)
        self.watches.add(watch)
        try:
            with suppress(ConnectionError):  # the client is gone, or cut off
                await self._follow(request, response, watch, version, end, bookmarks)
        finally:
            self.watches.discard(watch)
        return response

    async def _follow(
        self,
        request: web.Request,
        response: web.StreamResponse,
        watch: Watch,
        version: str,
        end: float,
        bookmarks: bool,
    ) -> None:
        table, loop = watch.table, asyncio.get_running_loop()
        bookmark_at = _next_bookmark(loop.time(), end, self.faults.bookmark_every) if bookmarks else end
        while loop.time() < end and table in self.store.tables.values():
            changes = table.since(watch.revision)
            if changes:
                watch.revision = changes[-1].revision
            mine = [change for change in changes if watch.namespace in ("", change.key[0])]
            wanted = dict(_selected(request.query, [(change.key, change.stored) for change in mine]))
            lines = [_line(c.type, c.stored.body(table.resource, version)) for c in mine if c.key in wanted]
            if bookmarks and loop.time() >= bookmark_at:
                bookmark_at = _next_bookmark(loop.time(), end, self.faults.bookmark_every)
                lines.append(self._bookmark(watch, version))
            await self._send(request, response, lines)
            watch.wake.clear()
            if not table.since(watch.revision):
                try:
                    async with asyncio.timeout_at(min(end, bookmark_at)):
                        await watch.wake.wait()
                except TimeoutError:
                    pass
        await self._running.wait()

    def _bookmark(self, watch: Watch, version: str, more: Object | None = None) -> bytes:
        watch.revision = max(watch.revision, self.store.revision)
        resource = watch.table.resource
        metadata = {**(more or {}), "resourceVersion": str(watch.revision)}
        value = {"kind": resource.kind, "apiVersion": resource.api_version(version), "metadata": metadata}
        return _line("BOOKMARK", json.dumps(value).encode())

    async def _send(self, request: web.Request, response: web.StreamResponse, lines: list[bytes]) -> None:
        for line in lines if self._faulty() else [b"\n".join(lines)] if lines else []:
            await self._running.wait()
            await asyncio.sleep(self.faults.delay)
            if self.faults.cut:
                await response.write(line[: len(line) // 2])
                assert request.transport is not None
                request.transport.close()  # what was written goes out before it
                raise ConnectionResetError
            size = -(-(len(line) + 1) // self.faults.pieces)
            whole = line + b"\n"
            for at in range(0, len(whole), size):
                await response.write(whole[at : at + size])
                if self.faults.pieces > 1:
                    await asyncio.sleep(0)

    def _faulty(self) -> bool:
        return bool(self.faults.delay or self.faults.cut or self.faults.pieces > 1 or not self._running.is_set())

    # --- one object ---

    async def _object(
        self, request: web.Request, verb: str, table: Table, version: str, key: Key, subresource: str
    ) -> web.Response:
        store, resource = self.store, table.resource
        manager = request.query.get("fieldManager") or request.headers.get("User-Agent", "client").partition("/")[0]
        created = verb == "create" or (verb == "patch" and key not in table.objects)
        match verb:
            case "get":
                store.get(table, key)
                stored = table.objects[key]
            case "create":
                stored = store.create(table, key[0], await _body(request), manager)
            case "update":
                stored = store.update(table, key, await _body(request), subresource, manager)
            case "patch":
                stored = await self._patch(request, table, key, subresource, manager)
            case "delete":
                grace = (await _body(request)).get("gracePeriodSeconds", request.query.get("gracePeriodSeconds"))
                last, gone = store.delete(table, key, int(grace) if grace is not None else None)
                return _json(_deleted(resource, last) if gone and not resource.graceful else last)
            case _:
                raise ApiError(405, "MethodNotAllowed", f"the fake server does not do {verb}")
        return web.Response(body=stored.body(resource, version), status=201 if created else 200, headers=_headers())

    async def _patch(self, request: web.Request, table: Table, key: Key, subresource: str, manager: str) -> Stored:
        kind = request.content_type
        if kind == APPLY:
            if not request.query.get("fieldManager"):
                raise ApiError(400, "BadRequest", "PatchOptions.meta.k8s.io is invalid: fieldManager: Required value")
            force = request.query.get("force") == "true"
            value = yaml.safe_load(await request.text())
            return self.store.apply(table, key, value, subresource, manager, force)
        if kind == MERGE or (kind == STRATEGIC and not table.resource.crd):
            return self.store.merge(table, key, await _body(request), subresource, manager)
        if kind == JSON_PATCH:
            if isinstance(json.loads(await request.text()), list):
                raise ApiError(501, "NotImplemented", "the fake server does not do JSON patch")
            message = "error decoding patch: json: cannot unmarshal object into Go value of type jsonpatch.Patch"
            raise ApiError(400, "BadRequest", message)
        accepted = f"{JSON_PATCH}, {MERGE}, {APPLY}"
        message = f"the body of the request was in an unknown format - accepted media types include: {accepted}"
        raise ApiError(415, "UnsupportedMediaType", message)


def _resource_at(parts: list[str]) -> int:
    """Where a path's resource begins: after /api/v1 or /apis/group/version."""
    return 2 if parts[:1] == ["api"] else 3


def _verb(request: web.Request, name: str) -> str:
    if request.method == "GET" and not name:
        return "watch" if request.query.get("watch") in ("1", "true") else "list"
    return {"GET": "get", "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}[request.method]


def _revision(text: str) -> int:
    if text and not text.isdecimal():
        message = f'resourceVersion: Invalid value: "{text}": strconv.ParseUint: parsing "{text}": invalid syntax'
        raise ApiError(500, "", message)
    return int(text or 0)


def _selected(query: Any, items: list[tuple[Key, Stored]]) -> list[tuple[Key, Stored]]:
    """Those that a fieldSelector on metadata.name, or on a Secret's type, selects; others are not done here."""
    name, _, value = query.get("fieldSelector", "").partition("=")
    match name:
        case _ if query.get("labelSelector"):
            pass
        case "":
            return items
        case "metadata.name":
            return [each for each in items if each[0][1] == value]
        case "type":
            return [each for each in items if json.loads(b"{" + each[1].rest).get("type", "Opaque") == value]
    raise ApiError(501, "NotImplemented", "the fake server does not do this selector")


def _next_bookmark(now: float, end: float, every: float) -> float:
    last = end - LAST_BOOKMARK
    return min(now + every, last) if now < last else end + every


def _line(kind: str, body: bytes) -> bytes:
    return b'{"type":"' + kind.encode() + b'","object":' + body + b"}"


def _group(name: str, versions: list[str]) -> Object:
    rows = [{"groupVersion": f"{name}/{version}", "version": version} for version in versions]
    return {"name": name, "versions": rows, "preferredVersion": rows[0]}


def _rows(resources: list[Resource]) -> Iterator[Object]:
    for each in resources:
        base = {"singularName": "", "namespaced": each.namespaced, "kind": each.kind}
        yield {"name": each.plural, **base, "singularName": each.kind.lower(), "verbs": VERBS}
        if each.status:
            yield {"name": f"{each.plural}/status", **base, "verbs": ["get", "patch", "update"]}


def _deleted(resource: Resource, last: Object) -> Object:
    details = {"name": last["metadata"]["name"], "kind": resource.plural, "uid": last["metadata"]["uid"]}
    details |= {"group": resource.group} if resource.group else {}
    return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}


async def _body(request: web.Request) -> Object:
    text = await request.text()
    try:
        value = json.loads(text) if text else {}
    except ValueError as error:
        raise ApiError(400, "BadRequest", f"the object provided is unrecognized: {error}") from error
    return value if isinstance(value, dict) else {}


def _headers() -> dict[str, str]:
    return {"Audit-Id": str(uuid.uuid4()), "Cache-Control": "no-cache, private", "Content-Type": "application/json"}


def _json(value: Object, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(body=json.dumps(value, indent=2).encode(), status=status, headers=_headers() | (headers or {}))


def _text_404() -> web.Response:
    headers = _headers() | {"Content-Type": "text/plain; charset=utf-8", "X-Content-Type-Options": "nosniff"}
    return web.Response(text="404 page not found\n", status=404, headers=headers)
