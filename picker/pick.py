"""One decision for one request: read the prompt, hash it, pick the cheapest pod or fall back to a stateless key. Pure.

    body -> Prompt -> chunk hashes -> stateless key -> its primary pod -> cheapest pod -> "<hash key>_0"

Envoy's ring_hash places every host at the points xxHash64("<hash key>_<i>"), and hashes the header it is given in the
same way: "<hash key>_0" lands on that host exactly. Any other text, the stateless key's, lands on some host, always the
same one while the hosts are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from picker.cost import Pool, PoolLoad
from picker.prefix import chunk_hashes
from picker.prompt import read_prompt
from picker.stateless import HotPrefixes, Ring

MAX_CHUNKS = 1 << 20  # chunk hashes held for all pods together, some 150 MB
UNKNOWN_PODS = 8  # assumed of a pool whose pods are unknown


class Reason(StrEnum):
    """How a key came about."""

    COST = "cost"
    STATELESS = "stateless"  # no fresh load of this pool
    UNKEYED = "unkeyed"  # no fresh load, and too short to be keyed on its own
    UNREADABLE = "unreadable"  # no prompt in the body


@dataclass(frozen=True, slots=True)
class Pick:
    """`key` is the header value for Envoy, None for none; `pod` the hash key of the pod picked, "" for none.

    `pool` is the cluster's name when its pods are known, else "".
    """

    key: str | None
    reason: Reason
    pool: str = ""
    pod: str = ""


class _State:
    """What is known of one pool. Mutable."""

    __slots__ = ("hash_keys", "hot", "pool", "ring")

    def __init__(self, random: Callable[[], float], pickers: int) -> None:
        self.pool = Pool(random, pickers)
        self.hot = HotPrefixes()
        self.hash_keys: tuple[str, ...] = ()
        self.ring = Ring(())


class Picker:
    """Every pool's state. Mutable; a pool's trouble never reaches another's.

    Clusters nobody reported loads of share one set of counts, so a caller cannot make it grow by inventing names.
    `pickers` is the number of independent pickers (this one included), `random` gives floats in [0, 1).
    """

    def __init__(self, random: Callable[[], float], pickers: int = 1) -> None:
        self._random = random
        self._pickers = pickers
        self._pools: dict[str, _State] = {}
        self._pods = 0  # in all pools
        self._unknown = HotPrefixes()

    @property
    def chunks(self) -> int:
        """Chunk hashes held for all pods."""
        return sum(state.pool.chunks for state in self._pools.values())

    def read_at(self) -> dict[str, float]:
        """For each pool, when its freshest load was read from a pod, in seconds; -inf when never."""
        return {name: state.pool.read_at for name, state in self._pools.items()}

    def update(self, load: PoolLoad, now: float) -> None:
        """Take a pool's load report, which arrived at `now`."""
        state = self._pools.get(load.name)
        if state is None:
            state = self._pools[load.name] = _State(self._random, self._pickers)
        self._pods += len(load.pods) - len(state.pool)
        state.pool.update(load, MAX_CHUNKS // max(1, self._pods), now)
        hash_keys = tuple(pod.hash_key for pod in load.pods)
        if hash_keys != state.hash_keys:
            state.hash_keys, state.ring = hash_keys, Ring(hash_keys)

    def forget(self, name: str) -> None:
        """The pool is gone."""
        state = self._pools.pop(name, None)
        if state is not None:
            self._pods -= len(state.pool)

    def pick(self, cluster_name: str, body: bytes, now: float) -> Pick:
        """Decide for one request routed to `cluster_name`; `now` in seconds."""
        state = self._pools.get(cluster_name)
        pool = cluster_name if state is not None else ""
        prompt = read_prompt(body)
        if prompt is None:
            return Pick(None, Reason.UNREADABLE, pool)
        hashes = chunk_hashes(prompt)
        if state is None:
            stateless = self._unknown.key(hashes, UNKNOWN_PODS, now)
        else:
            stateless = state.hot.key(hashes, len(state.pool) or UNKNOWN_PODS, now)
            primary = state.ring.primary(stateless) if stateless is not None else None
            pod = state.pool.pick(hashes, prompt.tokens, prompt.max_tokens, primary, now)
            if pod is not None:
                return Pick(f"{pod}_0", Reason.COST, pool, pod)
        if stateless is None:
            return Pick(None, Reason.UNKEYED, pool)
        return Pick(stateless.hex(), Reason.STATELESS, pool)
