"""One decision for one request: read the prompt, hash it, pick the cheapest pod or fall back to a stateless key. Pure.

    body -> Prompt -> chunk hashes, hint -> stateless key -> its primary pod -> cheapest pod -> "<hash key>_0"

Envoy's ring_hash places every host at the points xxHash64("<hash key>_<i>"), and hashes the header it is given in the
same way: "<hash key>_0" lands on that host exactly. Any other text, the stateless key's, lands on some host, always the
same one while the hosts are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum

from picker.cost import DEFAULT_COSTS, Costs, Offer, Placed, Pool, PoolLoad, Tell
from picker.memory import CHUNKS, Memory
from picker.models import NO_MODELS, SHED, Models, judge
from picker.prefix import chunk_hashes, hint_hash
from picker.prompt import MAX_BODY, Prompt, read_prompt
from picker.stateless import HotPrefixes, Ring

UNKNOWN_PODS = 8  # assumed of a pool whose pods are unknown
SERVICE = "service/"  # what the name of a cluster begins with that is no pool, and so has no models


class Reason(StrEnum):
    """How a key came about."""

    COST = "cost"
    STATELESS = "stateless"  # no fresh load of this pool
    UNKEYED = "unkeyed"  # no fresh load, no hint, and too short to be keyed on its own
    UNREADABLE = "unreadable"  # no prompt in the body
    UNPICKED = "unpicked"  # Envoy balances this pool itself; the picker is asked for its models alone
    UNKNOWN_MODEL = "unknown-model"  # refused
    SHED = "shed"  # refused: the pool is saturated, and the request may wait


@dataclass(frozen=True, slots=True)
class Pick:
    """`key` is the header value for Envoy, None for none; `pod` the hash key of the pod picked, "" for none.

    `pool` is the cluster's name when the management server named it, else "". The rest is a Verdict's, `named` also for
    a cluster that has no models.
    """

    key: str | None
    reason: Reason
    pool: str = ""
    pod: str = ""
    model: str = ""
    body: bytes | None = None
    refused: int = 0
    named: bool = False


@dataclass(frozen=True, slots=True)
class PoolConfig:
    """What the management server says of a pool beside its loads; `picked`: a pod is to be picked for its requests."""

    name: str
    costs: Costs = DEFAULT_COSTS
    picked: bool = True
    models: Models = NO_MODELS


@dataclass(slots=True)
class Notes:
    """What a pick is made of, for whoever asks why. Mutable: filled as far as the decision gets.

    `prompt` is what was read, with the model the pod is to be asked for; `hashes` and `hint` are those of
    picker/prefix.py. `stateless` is the key that needs no loads, `primary` its pod.
    """

    prompt: Prompt | None = None
    hashes: list[bytes] = field(default_factory=list)
    hint: bytes | None = None
    stateless: bytes | None = None
    primary: str | None = None
    offers: list[Offer] = field(default_factory=list)


class _State:
    """What is known of one pool: `config` and `reported` say by whom. Mutable."""

    __slots__ = ("config", "hash_keys", "hot", "pool", "reported", "ring")

    def __init__(self, pool: Pool) -> None:
        self.config: PoolConfig | None = None
        self.reported = False  # loads
        self.pool = pool
        self.hot = HotPrefixes()
        self.hash_keys: tuple[str, ...] = ()
        self.ring = Ring(())


class Picker:
    """Every pool's state. Mutable; a pool's trouble never reaches another's.

    Clusters the management server did not name share one set of counts, so nobody can make it grow by inventing names.
    `pickers` is the number of pickers there are at least (this one included), `random` gives floats in [0, 1). Workers
    that share a `memory`, and so what they know of the pods, are one picker. `tell` is told of each pick by cost, where
    other pickers are heard; `hear` is for what they tell.
    """

    def __init__(
        self,
        random: Callable[[], float],
        pickers: int = 1,
        memory: Memory | None = None,
        tell: Tell | None = None,
    ) -> None:
        self._random = random
        self._pickers = pickers
        self._memory = memory or Memory()
        self._tell = tell
        self._pools: dict[str, _State] = {}
        self._pods = 0  # in all pools
        self._unknown = HotPrefixes()

    @property
    def chunks(self) -> int:
        """Chunks held for all pods, about."""
        return sum(state.pool.chunks for state in self._pools.values())

    def read_at(self) -> dict[str, float]:
        """For each pool, when its freshest load was read from a pod, in seconds; -inf when never."""
        return {name: state.pool.read_at for name, state in self._pools.items()}

    def update(self, load: PoolLoad, now: float) -> None:
        """Take a pool's load report, which arrived at `now`."""
        state = self._state(load.name)
        state.reported = True
        self._pods += len(load.pods) - len(state.pool)
        state.pool.update(load, CHUNKS // max(1, self._pods), now)
        hash_keys = tuple(pod.hash_key for pod in load.pods)
        if hash_keys != state.hash_keys:
            state.hash_keys, state.ring = hash_keys, Ring(hash_keys)

    def forget(self, name: str) -> None:
        """The pool's loads are gone, and its pods with them."""
        state = self._pools.pop(name, None)
        if state is not None:
            self._pods -= len(state.pool)
            if state.config is not None:
                self.configure(state.config)

    def configure(self, config: PoolConfig) -> None:
        """Take a pool's settings."""
        state = self._state(config.name)
        state.config, state.pool.costs = config, config.costs

    def config(self, name: str) -> PoolConfig | None:
        """A pool's settings; None when the management server has said nothing of them."""
        state = self._pools.get(name)
        return state.config if state is not None else None

    def unconfigure(self, name: str) -> None:
        """The pool's settings are gone: the defaults are back."""
        state = self._pools.get(name)
        if state is not None and state.reported:
            state.config, state.pool.costs = None, DEFAULT_COSTS
        else:
            self._pools.pop(name, None)

    def _state(self, name: str) -> _State:
        if name not in self._pools:
            self._pools[name] = _State(Pool(self._random, self._pickers, self._memory, name, self._tell))
        return self._pools[name]

    def hear(self, placed: Placed, now: float) -> bool:
        """Note what another picker has sent to a pod; False when there is no such pod here."""
        state = self._pools.get(placed.pool)
        return state is not None and state.pool.hear(placed, now)

    def pick(
        self,
        cluster_name: str,
        body: bytes,
        now: float,
        session: str = "",
        objective: str = "",
        notes: Notes | None = None,
    ) -> Pick:
        """Decide for one request routed to `cluster_name`; `now` in seconds.

        `session` and `objective` are the headers' values, "" for none. With `notes` it is what would be decided: they
        say why, and nothing is remembered of the request.
        """
        state = self._pools.get(cluster_name)
        config = state.config if state is not None else None
        if state is None or config is None or (config.picked and not config.models):
            named = config is not None or cluster_name.startswith(SERVICE)
            return self._picked(state, cluster_name, read_prompt(body), now, session, notes, named=named)
        models = config.models
        prompt = read_prompt(body) if config.picked else None
        verdict = judge(
            models,
            body,
            session,
            objective,
            lambda: state.pool.saturated(models.waiting, models.kv_usage, now),
            prompt.model if prompt is not None and len(body) <= MAX_BODY else None,
        )
        if verdict.refused:
            reason = Reason.SHED if verdict.refused == SHED else Reason.UNKNOWN_MODEL
            return Pick(None, reason, cluster_name, model=verdict.model, refused=verdict.refused)
        if config.picked:
            if prompt is not None and verdict.body is not None:
                prompt = replace(prompt, model=verdict.model)
            pick = self._picked(state, cluster_name, prompt, now, session, notes, named=verdict.named)
        else:
            pick = Pick(None, Reason.UNPICKED, cluster_name, named=verdict.named)
        return replace(pick, model=verdict.model, body=verdict.body)

    def _picked(
        self,
        state: _State | None,
        cluster_name: str,
        prompt: Prompt | None,
        now: float,
        session: str,
        notes: Notes | None,
        *,
        named: bool,
    ) -> Pick:
        """The pod, or the key, for a prompt; `state` None: nothing is known of the cluster."""
        pool = cluster_name if state is not None else ""
        if prompt is None:
            return Pick(None, Reason.UNREADABLE, pool, named=named)
        hashes, hint = chunk_hashes(prompt), hint_hash(prompt, session)
        path = [hint, *hashes] if hint is not None else hashes
        counted, offers = notes is None, notes.offers if notes is not None else None
        if notes is not None:
            notes.prompt, notes.hashes, notes.hint = prompt, hashes, hint
        if state is None:
            stateless = self._unknown.key(path, UNKNOWN_PODS, now, counted=counted)
            if notes is not None:
                notes.stateless = stateless
        else:
            stateless = state.hot.key(path, len(state.pool) or UNKNOWN_PODS, now, counted=counted)
            primary = state.ring.primary(stateless) if stateless is not None else None
            if notes is not None:
                notes.stateless, notes.primary = stateless, primary
            pod = state.pool.pick(hashes, prompt.tokens, prompt.max_tokens, primary, now, hint, prompt.model, offers)
            if pod is not None:
                return Pick(f"{pod}_0", Reason.COST, pool, pod, named=named)
        if stateless is None:
            return Pick(None, Reason.UNKEYED, pool, named=named)
        return Pick(stateless.hex(), Reason.STATELESS, pool, named=named)
