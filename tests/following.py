"""A KubernetesSource at work in the background: a test waits for what it says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

from xds.kube import KubernetesSource
from xds.kube_client import Client, connect
from xds.metrics import Metrics
from xds.model import Config

BOUND = 20.0  # seconds for anything awaited here, far above what it takes


class Following:
    """`config` is the last one, None before the first; `configs` counts them."""

    def __init__(self, client: Client, namespaces: Sequence[str]) -> None:
        self.metrics = Metrics()
        self.client = client
        self.source = KubernetesSource(client, self.metrics, namespaces, jitter=lambda: 0.0)
        self.config: Config | None = None
        self.configs = 0
        self._news = asyncio.Condition()

    async def run(self) -> None:
        async with aclosing(self.source.configs()) as configs:
            async for config in configs:
                async with self._news:
                    self.config, self.configs = config, self.configs + 1
                    self._news.notify_all()

    async def until(self, true: Callable[[Config], bool]) -> Config:
        """The first Config of which this is true."""
        async with asyncio.timeout(BOUND), self._news:
            await self._news.wait_for(lambda: self.config is not None and true(self.config))
        assert self.config is not None
        return self.config

    def value(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"vllm_xds_api_{name}", labels) or 0.0

    def failures(self, reason: str, resource: str = "pods") -> float:
        return self.value("failures_total", resource=resource, reason=reason)

    def lists(self, reason: str, resource: str = "pods") -> float:
        return self.value("lists_total", resource=resource, reason=reason)


@asynccontextmanager
async def following(kubeconfig: Path, namespaces: Sequence[str] = ()) -> AsyncIterator[Following]:
    """Ends with every connection closed; a mistake of the source's tasks is raised here."""
    async with aclosing(await connect(str(kubeconfig))) as client:
        follower = Following(client, namespaces)
        task = asyncio.create_task(follower.run())
        try:
            yield follower
        finally:
            task.cancel()
            [ended] = await asyncio.gather(task, return_exceptions=True)
            assert isinstance(ended, asyncio.CancelledError), ended


def pods(config: Config) -> list[str]:
    """Their names, sorted."""
    return sorted(pod.meta.ref.name for pod in config.pods)


async def eventually(true: Callable[[], object]) -> None:
    """Return when it is: for counters and lists, which set no event."""
    async with asyncio.timeout(BOUND):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
