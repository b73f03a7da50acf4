"""The fake API server against what a real one (1.36.2) answers, byte for byte where a client of ours looks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from tests.apiserver import APPLY, JSON_PATCH, MERGE, FakeApiServer
from tests.apiserver_store import MODEL_X, ApiError

POOLS = "/apis/inference.networking.k8s.io/v1/inferencepools"
POOLS_HERE = POOLS.replace("inferencepools", "namespaces/default/inferencepools")
PODS = "/api/v1/namespaces/default/pods"
GATEWAYS = "/apis/gateway.networking.k8s.io/v1/namespaces/default/gateways"
LEASES = "/apis/coordination.k8s.io/v1/namespaces/default/leases"
BOUND = 10.0  # seconds for anything awaited here


class Client:
    """Raw HTTP with the bearer token."""

    def __init__(self, api: FakeApiServer, session: aiohttp.ClientSession) -> None:
        self.api, self.session = api, session

    async def ask(self, method: str, path: str, body: Any = None, content: str = "application/json") -> Any:
        """(status, content type, decoded JSON or text)."""
        data = None if body is None else json.dumps(body)
        headers = {"Authorization": f"Bearer {self.api.token}", "Content-Type": content}
        async with self.session.request(method, self.api.url + path, data=data, headers=headers) as response:
            text = await response.text()
            kind = response.headers["Content-Type"]
            return response.status, kind, json.loads(text) if kind == "application/json" else text

    async def get(self, path: str) -> Any:
        status, _, body = await self.ask("GET", path)
        assert status == 200, body
        return body

    @asynccontextmanager
    async def watch(self, path: str) -> AsyncIterator[aiohttp.ClientResponse]:
        headers = {"Authorization": f"Bearer {self.api.token}"}
        async with self.session.get(f"{self.api.url}{path}", headers=headers) as response, asyncio.timeout(BOUND):
            yield response


async def event(response: aiohttp.ClientResponse) -> tuple[str, dict[str, Any]]:
    line = json.loads(await response.content.readline())
    return line["type"], line["object"]


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    async with FakeApiServer() as api, aiohttp.ClientSession() as session:
        yield Client(api, session)


def pool(name: str, port: int = 8000, **metadata: Any) -> dict[str, Any]:
    spec = {"selector": {"matchLabels": {"app": "qwen"}}, "targetPorts": [{"number": port}]}
    return {
        "apiVersion": "inference.networking.k8s.io/v1",
        "kind": "InferencePool",
        "metadata": {"name": name, **metadata},
        "spec": spec,
    }


def pod(name: str, **more: Any) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": {}, **more}


# --- lists ---


async def test_list_in_pages(client: Client) -> None:
    """limit and continue, remainingItemCount, one resourceVersion for all pages: changes in between are not seen."""
    for name in "cab":
        client.api.store.put(pool(name))
    first = await client.get(f"{POOLS}?limit=2")
    assert (first["apiVersion"], first["kind"]) == ("inference.networking.k8s.io/v1", "InferencePoolList")
    assert [item["metadata"]["name"] for item in first["items"]] == ["a", "b"]
    assert {item["kind"] for item in first["items"]} == {"InferencePool"}
    assert first["metadata"]["remainingItemCount"] == 1
    client.api.store.put(pool("d"))
    second = await client.get(f"{POOLS}?limit=2&continue={first['metadata']['continue']}")
    assert [item["metadata"]["name"] for item in second["items"]] == ["c"]
    assert second["metadata"] == {"resourceVersion": first["metadata"]["resourceVersion"]}


async def test_expired_continue_token(client: Client) -> None:
    """410 with a Status, after a restart as after five minutes."""
    for name in "ab":
        client.api.store.put(pool(name))
    token = (await client.get(f"{POOLS}?limit=1"))["metadata"]["continue"]
    await client.api.restart()
    status, _, body = await client.ask("GET", f"{POOLS}?limit=1&continue={token}")
    assert (status, body["reason"], body["code"]) == (410, "Expired", 410)


async def test_typed_lists_have_items_without_a_kind(client: Client) -> None:
    """Built-in kinds, unlike custom resources; one object alone and the object of an event do have it."""
    client.api.store.put(pod("a"))
    listed = await client.get("/api/v1/pods")
    assert (listed["apiVersion"], listed["kind"]) == ("v1", "PodList")
    (item,) = listed["items"]
    assert not {"apiVersion", "kind"} & item.keys()
    assert (await client.get(f"{PODS}/a"))["kind"] == "Pod"
    async with client.watch("/api/v1/pods?watch=1") as response:
        assert (await event(response))[1]["kind"] == "Pod"


async def test_list_from_the_future(client: Client) -> None:
    """504 with cause ResourceVersionTooLarge and Retry-After."""
    status, _, body = await client.ask("GET", f"{POOLS}?resourceVersion=99999999")
    current = client.api.store.revision
    assert (status, body) == (
        504,
        {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": f"Timeout: Too large resource version: 99999999, current: {current}",
            "reason": "Timeout",
            "details": {
                "causes": [{"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}],
                "retryAfterSeconds": 1,
            },
            "code": 504,
        },
    )


async def test_bad_resource_version(client: Client) -> None:
    """500, and a Status without a reason; also for a watch, whose status is no 200 then."""
    status, _, body = await client.ask("GET", f"{POOLS}?watch=1&resourceVersion=abc")
    assert (status, body) == (
        500,
        {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": 'resourceVersion: Invalid value: "abc": strconv.ParseUint: parsing "abc": invalid syntax',
            "code": 500,
        },
    )


async def test_unknown_resource_is_plain_text(client: Client) -> None:
    """No Status object: also for a watch, and for an unknown version or group."""
    for path in ("/apis/nope.example.com/v1/foos?watch=1", POOLS.replace("/v1/", "/v9/"), "/api/v1/foos", "/apis/nope"):
        assert await client.ask("GET", path) == (404, "text/plain; charset=utf-8", "404 page not found\n")


# --- watches ---


async def test_watch_from_a_list(client: Client) -> None:
    """Every later change once, in order; a delete carries the last state with the revision of the delete."""
    client.api.store.put(pool("a"))
    version = (await client.get(POOLS))["metadata"]["resourceVersion"]
    async with client.watch(f"{POOLS}?watch=1&resourceVersion={version}") as response:
        client.api.store.put(pool("b"))
        client.api.store.put(pool("a", 9000))
        await client.ask("DELETE", f"{POOLS_HERE}/b")
        seen = [await event(response) for _ in range(3)]
    assert [(kind, each["metadata"]["name"]) for kind, each in seen] == [
        ("ADDED", "b"),
        ("MODIFIED", "a"),
        ("DELETED", "b"),
    ]
    versions = [int(each["metadata"]["resourceVersion"]) for _, each in seen]
    assert versions == sorted(set(versions))
    assert seen[2][1]["spec"] == seen[0][1]["spec"]


async def test_watch_without_a_version_begins_with_everything(client: Client) -> None:
    """ADDED for each object, then the bookmark that ends them; with resourceVersion=0 there is no such bookmark."""
    client.api.store.put(pool("a"))
    async with client.watch(f"{POOLS}?watch=1&allowWatchBookmarks=true&timeoutSeconds=1") as response:
        assert (await event(response))[0] == "ADDED"
        kind, bookmark = await event(response)
    current = str(client.api.store.revision)
    metadata = {"annotations": {"k8s.io/initial-events-end": "true"}, "resourceVersion": current}
    expected = {"apiVersion": "inference.networking.k8s.io/v1", "kind": "InferencePool", "metadata": metadata}
    assert (kind, bookmark) == ("BOOKMARK", expected)
    async with client.watch(f"{POOLS}?watch=1&resourceVersion=0&timeoutSeconds=1") as response:
        assert (await event(response))[0] == "ADDED"
        assert await response.content.read() == b""


async def test_bookmarks_tell_of_progress_elsewhere(client: Client) -> None:
    """Only with the parameter; apiVersion, kind and the revision, nothing else. They end with the watch."""
    client.api.faults.bookmark_every = 0.05
    version = client.api.store.revision
    client.api.store.put(pod("elsewhere"))
    async with client.watch(f"{POOLS}?watch=1&resourceVersion={version}&allowWatchBookmarks=true") as response:
        kind, value = await event(response)
    assert kind == "BOOKMARK"
    assert value["metadata"] == {"resourceVersion": str(client.api.store.revision)}
    async with client.watch(f"{POOLS}?watch=1&resourceVersion={version}&timeoutSeconds=1") as response:
        assert await response.content.read() == b""


async def test_expired_watch(client: Client) -> None:
    """HTTP 200 and one line of type ERROR, then the end."""
    client.api.store.put(pool("a"))
    client.api.store.forget()
    async with client.watch(f"{POOLS}?watch=1&resourceVersion=1") as response:
        assert response.status == 200
        assert response.headers["Transfer-Encoding"] == "chunked"
        kind, value = await event(response)
        assert await response.content.read() == b""
    current = client.api.store.revision
    assert kind == "ERROR"
    assert value == {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": f"too old resource version: 1 ({current})",
        "reason": "Expired",
        "code": 410,
    }


async def test_watch_from_the_future_is_silence(client: Client) -> None:
    """200 and no line at all, not of what changes either, until the time is over."""
    async with client.watch(f"{POOLS}?watch=1&resourceVersion=99999999&timeoutSeconds=1") as response:
        assert response.status == 200
        client.api.store.put(pool("a"))
        assert await response.content.read() == b""


async def test_namespaces(client: Client) -> None:
    """A watch and a list of one namespace see nothing of another; a namespace that is not there has no objects."""
    client.api.store.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "other"}})
    version = client.api.store.revision
    async with client.watch(f"{POOLS_HERE}?watch=1&resourceVersion={version}") as response:
        client.api.store.put(pool("there", namespace="other"))
        client.api.store.put(pool("here"))
        assert (await event(response))[1]["metadata"]["name"] == "here"
    assert len((await client.get(POOLS))["items"]) == 2
    assert len((await client.get(POOLS_HERE))["items"]) == 1
    status, _, body = await client.ask("POST", PODS.replace("default", "nowhere"), pod("a"))
    assert (status, body["message"]) == (404, 'namespaces "nowhere" not found')
    await client.ask("DELETE", "/api/v1/namespaces/other")
    assert len((await client.get(POOLS))["items"]) == 1


# --- discovery ---


async def test_discovery(client: Client) -> None:
    """/api, /apis, a group, a group's version; a resource with its verbs, and its status beside it."""
    assert (await client.get("/api"))["versions"] == ["v1"]
    groups = {group["name"]: group for group in (await client.get("/apis"))["groups"]}
    gateway = groups["gateway.networking.k8s.io"]
    assert [version["version"] for version in gateway["versions"]] == ["v1", "v1beta1"]
    assert gateway["preferredVersion"]["groupVersion"] == "gateway.networking.k8s.io/v1"
    assert (await client.get("/apis/gateway.networking.k8s.io"))["kind"] == "APIGroup"
    rows = (await client.get("/apis/gateway.networking.k8s.io/v1beta1"))["resources"]
    named = {row["name"]: row for row in rows}
    assert named["gatewayclasses"]["namespaced"] is False
    assert {"list", "watch"} <= set(named["gateways"]["verbs"])
    assert named["gateways/status"]["kind"] == "Gateway"
    assert (await client.get("/api/v1"))["groupVersion"] == "v1"


async def test_a_definition_comes_and_goes(client: Client) -> None:
    """Its paths and its group version with it; a watch of it ends."""
    path = "/apis/inference.networking.x-k8s.io/v1alpha2/inferencemodels"
    client.api.store.uninstall("InferenceModel")
    assert (await client.ask("GET", path))[0] == 404
    client.api.store.install(MODEL_X)
    async with client.watch(f"{path}?watch=1") as response:
        client.api.store.uninstall("InferenceModel")
        assert await response.content.read() == b""


async def test_one_object_through_two_versions(client: Client) -> None:
    """The same object, revision and uid; only apiVersion differs."""
    value = {"apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway", "metadata": {"name": "gw"}, "spec": {}}
    client.api.store.put(value)
    new, old = [await client.get(f"{GATEWAYS.replace('/v1/', f'/{version}/')}/gw") for version in ("v1", "v1beta1")]
    assert old.pop("apiVersion") == "gateway.networking.k8s.io/v1beta1"
    assert new.pop("apiVersion") == "gateway.networking.k8s.io/v1"
    assert old == new


# --- writes ---


async def test_status_is_a_subresource(client: Client) -> None:
    """A create and an update drop the status, a write to /status changes nothing else, and no generation."""
    status, _, made = await client.ask("POST", POOLS_HERE, {**pool("a"), "status": {"parents": []}})
    assert (status, made["metadata"]["generation"], "status" in made) == (201, 1, False)
    patch = {"spec": {"targetPorts": []}, "status": {"parents": [{"controllerName": "x/y"}]}}
    _, _, body = await client.ask("PATCH", f"{POOLS_HERE}/a/status", patch, MERGE)
    assert (body["status"], body["spec"], body["metadata"]["generation"]) == (patch["status"], made["spec"], 1)
    _, _, body = await client.ask(
        "PATCH", f"{POOLS_HERE}/a", {"status": None, "metadata": {"labels": {"a": "b"}}}, MERGE
    )
    assert (body["status"], body["metadata"]["generation"]) == (patch["status"], 1)
    _, _, body = await client.ask("PATCH", f"{POOLS_HERE}/a", {"spec": {"targetPorts": [{"number": 9}]}}, MERGE)
    assert (body["status"], body["metadata"]["generation"]) == (patch["status"], 2)
    assert (await client.ask("GET", f"{LEASES}/a/status"))[0] == 404


async def test_a_write_of_what_is_there_changes_nothing(client: Client) -> None:
    """Neither the revision, nor an event."""
    _, _, made = await client.ask("POST", POOLS_HERE, pool("a"))
    before = client.api.store.revision
    for path, body in ((f"{POOLS_HERE}/a", {"spec": made["spec"]}), (f"{POOLS_HERE}/a/status", {"spec": {}})):
        _, _, same = await client.ask("PATCH", path, body, MERGE)
        assert same["metadata"]["resourceVersion"] == made["metadata"]["resourceVersion"]
    assert client.api.store.revision == before


async def test_conflicts(client: Client) -> None:
    """A second create, an update from an old revision, one without any: 409, 409 and 422."""
    _, _, made = await client.ask("POST", LEASES, {"metadata": {"name": "lock"}, "spec": {"holderIdentity": "a"}})
    status, _, body = await client.ask("POST", LEASES, {"metadata": {"name": "lock"}})
    assert (status, body["reason"]) == (409, "AlreadyExists")
    assert body["message"] == 'leases.coordination.k8s.io "lock" already exists'
    made["spec"]["holderIdentity"] = "b"
    assert (await client.ask("PUT", f"{LEASES}/lock", made))[0] == 200
    made["spec"]["holderIdentity"] = "c"
    status, _, body = await client.ask("PUT", f"{LEASES}/lock", made)
    assert (status, body["reason"], body["details"]["kind"]) == (409, "Conflict", "leases")
    assert "the object has been modified; please apply your changes to the latest version" in body["message"]
    del made["metadata"]["resourceVersion"]
    assert (await client.ask("PUT", f"{LEASES}/lock", made))[0] == 422
    assert (await client.get(f"{LEASES}/lock"))["spec"] == {"holderIdentity": "b"}


async def test_delete(client: Client) -> None:
    """At once and with a Status; a pod on a node first gets a deletionTimestamp, and waits for its kubelet."""
    await client.ask("POST", POOLS_HERE, pool("a"))
    status, _, body = await client.ask("DELETE", f"{POOLS_HERE}/a")
    assert (status, body["kind"], body["status"]) == (200, "Status", "Success")
    status, _, body = await client.ask("DELETE", f"{POOLS_HERE}/a")
    assert (status, body["message"]) == (404, 'inferencepools.inference.networking.k8s.io "a" not found')
    client.api.store.put(pod("p", spec={"nodeName": "n"}))
    assert "deletionTimestamp" in (await client.ask("DELETE", f"{PODS}/p"))[2]["metadata"]
    assert "deletionTimestamp" in (await client.get(f"{PODS}/p"))["metadata"]
    await client.ask("DELETE", f"{PODS}/p?gracePeriodSeconds=0")
    assert (await client.ask("GET", f"{PODS}/p"))[0] == 404


async def test_finalizer(client: Client) -> None:
    """The object stays until its last finalizer is taken, and is gone with that."""
    client.api.store.put(pool("a", finalizers=["x/y"]))
    await client.ask("DELETE", f"{POOLS_HERE}/a")
    assert "deletionTimestamp" in (await client.get(f"{POOLS_HERE}/a"))["metadata"]
    await client.ask("PATCH", f"{POOLS_HERE}/a", {"metadata": {"finalizers": None}}, MERGE)
    assert (await client.ask("GET", f"{POOLS_HERE}/a"))[0] == 404


async def test_patches_that_are_refused(client: Client) -> None:
    """A mapping as JSON patch, and a strategic merge of a custom resource, as a real server words it."""
    await client.ask("POST", POOLS_HERE, pool("a"))
    status, _, body = await client.ask("PATCH", f"{POOLS_HERE}/a", {"spec": {}}, JSON_PATCH)
    assert (status, body["reason"]) == (400, "BadRequest")
    assert "cannot unmarshal object into Go value of type jsonpatch.Patch" in body["message"]
    status, _, body = await client.ask("PATCH", f"{POOLS_HERE}/a", {}, "application/strategic-merge-patch+json")
    assert (status, body["reason"]) == (415, "UnsupportedMediaType")
    assert MERGE in body["message"]


async def test_server_side_apply_of_status(client: Client) -> None:
    """Conditions are a map by type: each manager keeps its own, and what it leaves out of the next apply is gone."""
    value = {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "Gateway",
        "metadata": {"name": "gw"},
        "spec": {"a": 1},
    }
    client.api.store.put(value)
    path = f"{GATEWAYS}/gw/status"

    async def apply(manager: str, conditions: dict[str, str], more: str = "") -> Any:
        status = {"conditions": [{"type": kind, "status": each} for kind, each in conditions.items()]}
        body = {"apiVersion": value["apiVersion"], "kind": "Gateway", "metadata": {"name": "gw"}, "status": status}
        return await client.ask("PATCH", f"{path}?fieldManager={manager}{more}", body, APPLY)

    await apply("a", {"Accepted": "True", "Programmed": "True"})
    _, _, body = await apply("b", {"Other": "True"})
    assert [each["type"] for each in body["status"]["conditions"]] == ["Accepted", "Programmed", "Other"]
    _, _, body = await apply("a", {"Accepted": "False"})
    assert {each["type"]: each["status"] for each in body["status"]["conditions"]} == {
        "Accepted": "False",
        "Other": "True",
    }
    assert (body["spec"], body["metadata"]["generation"]) == (value["spec"], 1)
    managers = {
        (each["manager"], each["operation"], each.get("subresource")) for each in body["metadata"]["managedFields"]
    }
    assert {("a", "Apply", "status"), ("b", "Apply", "status")} <= managers

    status, _, refused = await apply("b", {"Accepted": "True", "Other": "True"})
    assert (status, refused["reason"]) == (409, "Conflict")
    assert 'conflict with "a"' in refused["message"]
    status, _, body = await apply("b", {"Accepted": "True", "Other": "True"}, "&force=true")
    assert {each["type"]: each["status"] for each in body["status"]["conditions"]} == {
        "Accepted": "True",
        "Other": "True",
    }
    assert (await client.ask("PATCH", path, {}, APPLY))[0] == 400  # without a manager


async def test_apply_creates(client: Client) -> None:
    """An object that is not there is made by it; its status is not, nor a status alone."""
    query = "?fieldManager=m"
    status, _, body = await client.ask("PATCH", f"{POOLS_HERE}/a{query}", pool("a"), APPLY)
    assert (status, body["spec"]) == (201, pool("a")["spec"])
    assert (await client.ask("PATCH", f"{POOLS_HERE}/b/status{query}", {"status": {}}, APPLY))[0] == 404


async def test_endpoint_slices_hold_no_loopback_address(client: Client) -> None:
    """422, as a real server; a pod's IP may be one."""
    path = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices"
    value = {"metadata": {"name": "s"}, "addressType": "IPv4", "endpoints": [{"addresses": ["127.0.0.2"]}]}
    status, _, body = await client.ask("POST", path, value)
    assert (status, body["reason"]) == (422, "Invalid")
    await client.ask("POST", PODS, pod("p"))
    status, _, body = await client.ask("PATCH", f"{PODS}/p/status", {"status": {"podIP": "127.0.0.2"}}, MERGE)
    assert (status, body["status"]["podIP"]) == (200, "127.0.0.2")


# --- who may ---


async def test_token_and_permissions(client: Client) -> None:
    """401 for another token; 403 names user, verb, resource, group and scope."""
    client.api.token = "another"
    assert (await client.ask("GET", POOLS))[0] == 200
    async with client.session.get(client.api.url + POOLS, headers={"Authorization": "Bearer x"}) as response:
        assert response.status == 401
        assert (await response.json())["reason"] == "Unauthorized"
    client.api.forbidden.add(("list", "inferencepools"))
    status, _, body = await client.ask("GET", POOLS)
    assert (status, body["reason"]) == (403, "Forbidden")
    assert body["message"] == (
        'inferencepools.inference.networking.k8s.io is forbidden: User "system:serviceaccount:test:vllm-xds" cannot '
        'list resource "inferencepools" in API group "inference.networking.k8s.io" at the cluster scope'
    )
    assert (await client.ask("GET", POOLS_HERE))[2]["message"].endswith('in the namespace "default"')


# --- the fault levers ---


async def test_restart(client: Client) -> None:
    """Every connection is reset; then 429 until the storage is there, then 410 for every revision from before."""
    client.api.store.put(pool("a"))
    version = client.api.store.revision
    client.api.store.put(pool("b"))
    async with client.watch(f"{POOLS}?watch=1&resourceVersion={version}") as response:
        await event(response)
        await client.api.restart(initializing=True)
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.content.readline()
    status, _, body = await client.ask("GET", f"{POOLS}?watch=1&resourceVersion={version}")
    assert (status, body["reason"], body["message"]) == (429, "TooManyRequests", "storage is (re)initializing")
    client.api.initialized()
    async with client.watch(f"{POOLS}?watch=1&resourceVersion={version}") as response:
        assert (await event(response))[1]["code"] == 410


async def test_hang(client: Client) -> None:
    """Connections stay, new ones are taken, and no byte comes; then everything goes on."""
    version = client.api.store.revision
    async with client.watch(f"{POOLS}?watch=1&resourceVersion={version}") as response:
        client.api.hang()
        client.api.store.put(pool("a"))
        asking = asyncio.ensure_future(client.get(POOLS))
        waiting = asyncio.ensure_future(event(response))
        done, _ = await asyncio.wait({asking, waiting}, timeout=0.2)
        assert done == set()
        client.api.resume()
        assert (await waiting)[0] == "ADDED"
        assert len((await asking)["items"]) == 1


async def test_lines_in_pieces_and_cut(client: Client) -> None:
    """A line in several packets is whole for a reader of lines; one that is cut ends with its connection."""
    client.api.faults.pieces = 5
    version = client.api.store.revision
    async with client.watch(f"{POOLS}?watch=1&resourceVersion={version}") as response:
        client.api.store.put(pool("a"))
        assert (await event(response))[0] == "ADDED"
        client.api.faults.cut = True
        client.api.store.put(pool("b"))
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.content.readline()


async def test_errors_on_demand(client: Client) -> None:
    """So many of a kind, and then no more."""
    client.api.fail(ApiError(500, "InternalError", "boom"), verb="list", times=2)
    assert [(await client.ask("GET", POOLS))[0] for _ in range(3)] == [500, 500, 200]
    assert client.api.requests == ["list inferencepools"] * 3


async def test_rewind(client: Client) -> None:
    """The present revision is lower than before: what a client knows is from the future."""
    client.api.store.put(pool("a"))
    before = client.api.store.revision
    client.api.rewind(1)
    assert int((await client.get(POOLS))["metadata"]["resourceVersion"]) < before
    assert (await client.ask("GET", f"{POOLS}?resourceVersion={before}"))[0] == 504
