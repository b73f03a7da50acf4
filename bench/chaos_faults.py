"""The faults of `make chaos`: how each is brought about and healed, and what is promised while it lasts."""

from __future__ import annotations

import math
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial

from bench import chaos_pages as pages
from bench.chaos_gateway import PODS, Gateway
from bench.chaos_traffic import Traffic
from bench.vllm_server import Page
from xds.envoy import Options
from xds.weights import BASE

CHECKED = 1.5  # seconds until Envoy's health check has found a picker dead: interval 1, timeout 0.2
POD_CHECKED = 6.5  # seconds until it has found a pod hung: twice interval 2 and timeout 1
WATCHED = 1.5  # seconds until a saved file is in Envoy
VICTIM = 1  # the pod that is broken

Act = Callable[[Gateway], Awaitable[object]]
Whole = Callable[[Gateway, Traffic, float], Awaitable[bool]]
Holds = Callable[[Gateway], Awaitable[str]]


async def as_ever(_: Gateway) -> str:
    """Nothing else is promised."""
    return ""


@dataclass(frozen=True, slots=True)
class Scenario:
    """A fault, and what is promised. `lasts` and the other times are in seconds.

    `whole` waits for full service after `heals`, given when that was. Until the gateway has `seen` the fault a request
    may be `late` by so much; after it by NOISE alone. `fails` is why requests sent before it is seen may fail and
    `cuts` why those may that were under way when it began; "" = none does. `avoids` is a pod that gets none once the
    fault is seen. `holds` looks, before `heals`, whether something else that is promised is so, and says what is not.
    """

    name: str
    lasts: float
    breaks: Act
    heals: Act
    whole: Whole
    seen: float = CHECKED
    late: float = 0.0
    fails: str = ""
    cuts: str = ""
    avoids: str = ""
    holds: Holds = as_ever


@dataclass(frozen=True, slots=True)
class Course:
    """Faults that follow one another on a gateway of their own: how that is made, and whether its `plain` port (to the
    Service) is given half of the traffic."""

    scenarios: tuple[Scenario, ...]
    pickers: int = 1
    picking: bool = True
    delta: bool = True
    linked: bool = False
    plain: bool = False


async def nothing(_: Gateway) -> None:
    """The fault was there from the beginning, or heals by itself."""


async def picked(gateway: Gateway, _: Traffic, __: float) -> bool:
    return await gateway.picks()


async def weighed(gateway: Gateway, _: Traffic, __: float) -> bool:
    return await gateway.weighs()


async def followed(gateway: Gateway, _: Traffic, __: float) -> bool:
    return await gateway.follows()


def answered_by(pod: int) -> Whole:
    async def seen(gateway: Gateway, traffic: Traffic, since: float) -> bool:
        return await traffic.answers_from(gateway.pods[pod].name, since)

    return seen


async def start_picker(gateway: Gateway) -> None:
    await gateway.pickers[0].start()


async def kill_picker(gateway: Gateway) -> None:
    await gateway.pickers[0].kill()


async def stop_picker(gateway: Gateway) -> None:
    await gateway.pickers[0].stop()


async def hang_picker(gateway: Gateway) -> None:
    gateway.pickers[0].send(signal.SIGSTOP)


async def continue_picker(gateway: Gateway) -> None:
    gateway.pickers[0].send(signal.SIGCONT)


async def replace_picker_by_refusing(gateway: Gateway) -> None:
    await gateway.pickers[0].kill()
    await gateway.start_refusing_picker()


async def start_picker_again(gateway: Gateway) -> None:
    await gateway.refusing_picker.stop()
    await gateway.pickers[0].start()


async def slow_link(gateway: Gateway) -> None:
    gateway.delay_picker(SLOW)


async def quick_link(gateway: Gateway) -> None:
    gateway.delay_picker(0.0)


async def start_server(gateway: Gateway) -> None:
    await gateway.server.start()


async def kill_server(gateway: Gateway) -> None:
    await gateway.server.kill()


async def hang_server(gateway: Gateway) -> None:
    gateway.server.send(signal.SIGSTOP)


async def continue_server(gateway: Gateway) -> None:
    gateway.server.send(signal.SIGCONT)


async def empty_directory(gateway: Gateway) -> None:
    await gateway.server.kill()
    await gateway.server_on_empty.start()


async def full_directory(gateway: Gateway) -> None:
    await gateway.server_on_empty.stop()
    await gateway.server.start()


async def change(gateway: Gateway) -> None:
    gateway.write_change()


async def kill_server_then_change(gateway: Gateway) -> None:
    await gateway.server.kill()
    gateway.write_change()


async def kill_server_in_change(gateway: Gateway) -> None:
    """When Envoy has been sent the clusters, and not yet the routes to them."""
    gateway.write_change()
    await gateway.sent("Cluster")
    await gateway.server.kill()


async def kill_pod(gateway: Gateway) -> None:
    await gateway.pods[VICTIM].kill()


async def start_pod(gateway: Gateway) -> None:
    await gateway.pods[VICTIM].start()


async def hang_pod(gateway: Gateway) -> None:
    gateway.pods[VICTIM].faults.hang = True


async def restart_hung_pod(gateway: Gateway) -> None:
    await gateway.pods[VICTIM].kill()
    gateway.pods[VICTIM].faults.hang = False
    await gateway.pods[VICTIM].start()


async def refuse_in_pod(gateway: Gateway) -> None:
    gateway.pods[VICTIM].faults.completions = 503


async def accept_in_pod(gateway: Gateway) -> None:
    gateway.pods[VICTIM].faults.completions = 200


async def delete_pod(gateway: Gateway) -> None:
    gateway.write_pod(VICTIM, deleted=True)


async def replace_pod(gateway: Gateway) -> None:
    await gateway.pods[VICTIM].stop()
    await gateway.pods[VICTIM].start()
    gateway.write_pod(VICTIM)


async def list_new_pod(gateway: Gateway) -> None:
    gateway.write_pod(PODS)


async def start_new_pod(gateway: Gateway) -> None:
    await gateway.pods[PODS].start()


async def slow_pod(gateway: Gateway) -> None:
    pod = gateway.pods[VICTIM]
    pod.engine.config = replace(pod.config, speed=0.25)


async def speed_up_pod(gateway: Gateway) -> None:
    gateway.pods[VICTIM].engine.config = gateway.pods[VICTIM].config


async def weight_fell(gateway: Gateway) -> str:
    weight = (await gateway.weights()).get(f"pod-{VICTIM}", math.nan)
    return "" if weight < BASE else f"pod-{VICTIM} weighs {weight:.0f}"


def other_pages(*kinds: Callable[[], Page]) -> Act:
    """The first pods answer these in place of their own page."""

    async def begin(gateway: Gateway) -> None:
        for pod, kind in zip(gateway.pods, kinds, strict=False):
            pod.faults.page = kind()

    return begin


async def own_pages(gateway: Gateway) -> None:
    for pod in gateway.pods:
        pod.faults.page = None


async def last_pod_alone_is_seen(gateway: Gateway) -> str:
    """Nothing is believed of a page that can not be read, and no weight is outside of the law's bounds."""
    blind, pods = await gateway.blind(), {pod.name for pod in gateway.pods[: PODS - 1]}
    wild = gateway.wild_weights()
    return "; ".join([*([] if blind == pods else [f"blind are {sorted(blind)}, not {sorted(pods)}"]), *wild])


async def break_pages(gateway: Gateway) -> None:
    for pod in gateway.pods:
        pod.faults.metrics = 500


async def mend_pages(gateway: Gateway) -> None:
    for pod in gateway.pods:
        pod.faults.metrics = 200


TIMEOUT = Options().picker_timeout
SLOW = TIMEOUT + 0.05  # seconds: an answer that comes too late each time, and not by much
QUARTER = 0.15  # seconds: three more steps of 10 ms, for the one under way and the request's own
GONE = "what a pod is computing is lost with it"
PICKER_KILLED = Scenario("picker killed, another started", 3, kill_picker, start_picker, picked)
PICKER_HUNG = Scenario("picker hung (SIGSTOP), continued", 3, hang_picker, continue_picker, picked, late=TIMEOUT)
SERVER_KILLED = Scenario("management server killed, another started", 3, kill_server, start_server, weighed)
POD_KILLED = Scenario("pod killed, restarted", 3, kill_pod, start_pod, answered_by(VICTIM), cuts=GONE)
SHORT = Course(tuple(replace(each, lasts=2) for each in (PICKER_KILLED, PICKER_HUNG, SERVER_KILLED, POD_KILLED)))
ONE_PICKER = (
    Scenario("picker never started, then started", 3, nothing, start_picker, picked),
    PICKER_KILLED,
    PICKER_HUNG,
    Scenario("picker stopped (SIGTERM), port closed, started", 3, stop_picker, start_picker, picked),
    Scenario(
        "picker killed, one in its place that is healthy and refuses every request, started again",
        *(4, replace_picker_by_refusing, start_picker_again, picked),
    ),
    SERVER_KILLED,
    Scenario("management server hung (SIGSTOP) for 8 s, continued", 8, hang_server, continue_server, weighed),
    Scenario(
        "management server restarted with an empty directory, then with the full one",
        *(5, empty_directory, full_directory, weighed),
    ),
    POD_KILLED,
    Scenario(
        "pod hung, restarted after 10 s",
        *(10, hang_pod, restart_hung_pod, answered_by(VICTIM)),
        seen=POD_CHECKED,
        late=10,  # until its end, which is when Envoy can try another pod
        fails="what was sent to it before the health check took it out comes back all at once when it is restarted",
        cuts=GONE,
    ),
    Scenario("pod answering 503", 5, refuse_in_pod, accept_in_pod, answered_by(VICTIM)),
    Scenario(
        "pod deleted (deletionTimestamp) with streams running, then another in its place",
        *(4, delete_pod, replace_pod, answered_by(VICTIM)),
        seen=WATCHED,
        avoids=f"pod-{VICTIM}",
    ),
    Scenario(
        "pod at a quarter of its speed for 20 s",
        *(20, slow_pod, speed_up_pod, answered_by(VICTIM)),
        seen=math.inf,
        late=QUARTER,
        holds=weight_fell,
    ),
    Scenario("all metrics pages broken for 10 s", 10, break_pages, mend_pages, weighed),
    Scenario("new cold pod, listed 3 s before it listens", 3, list_new_pod, start_new_pod, answered_by(PODS)),
)
PAGES = (
    Scenario(
        "metrics pages: 50 MB, never ending, HTML; wrong content type",
        *(9, other_pages(lambda: pages.huge, lambda: pages.endless, lambda: pages.html, lambda: pages.mislabelled)),
        *(own_pages, weighed),
        holds=last_pod_alone_is_seen,
    ),
    Scenario(
        "metrics pages: requests NaN, negative, infinite; counters that go back",
        *(9, other_pages(*(partial(pages.requests, value) for value in (b"NaN", b"-3", b"+Inf")), pages.backwards)),
        *(own_pages, weighed),
        holds=last_pod_alone_is_seen,
    ),
)
SLOW_PICKER = Scenario(
    f"picker slow: each answer {SLOW:.2f} s late, then in time", 4, slow_link, quick_link, picked, late=TIMEOUT
)
CHANGES = (
    Scenario("clusters and routes added, renamed and removed in one change", 3, change, nothing, followed),
    Scenario(
        "management server killed before such a change, started",
        *(2, kill_server_then_change, start_server, followed),
    ),
    Scenario(
        "management server killed amid such a change, started",
        *(2, kill_server_in_change, start_server, followed),
    ),
)
COURSES = (
    Course(ONE_PICKER, picking=False),
    Course(PAGES),
    Course((SLOW_PICKER,), linked=True),
    Course((Scenario("one of two pickers killed, another started", 3, kill_picker, start_picker, picked),), pickers=2),
    Course(tuple(replace(each, name=f"{each.name} (delta)") for each in CHANGES), plain=True),
    Course(tuple(replace(each, name=f"{each.name} (SotW)") for each in CHANGES), plain=True, delta=False),
)
