"""Why a request would be sent where it would be: the picker's own decision, with its reasons, as JSON (pure).

Nothing is decided in here: `Picker.pick` takes its notes, and remembers nothing of the request.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from picker.pick import Notes, Picker
from picker.prefix import CHUNK_TOKENS


def explain(
    picker: Picker, cluster_name: str, body: bytes, now: float, session: str = "", objective: str = ""
) -> dict[str, Any]:
    """A JSON object with what `Picker.pick` would answer for these arguments, and what it is made of.

    `prompt` is null when none was read, `hint` when the request has none, `key` and `pod` when there is none. `offers`
    are the pods' costs in tokens, in the order in which they would be chosen, and `equal` says how many of them are
    equally cheap: any of those is picked. `chunks_held` counts from the first chunk on.
    """
    notes = Notes()
    pick = picker.pick(cluster_name, body, now, session, objective, notes)
    offers = sorted(notes.offers, key=lambda offer: (offer.cost, offer.running, offer.pod))
    first = [offer for offer in offers if (offer.cost, offer.running) == (offers[0].cost, offers[0].running)]
    return {
        "cluster": cluster_name,
        "known": pick.pool != "",
        "reason": str(pick.reason),
        "refused": pick.refused,
        "model": pick.model or (notes.prompt.model if notes.prompt is not None else ""),
        "renamed": pick.body is not None,
        "named": pick.named,
        "prompt": _prompt(notes),
        "stateless_key": notes.stateless.hex() if notes.stateless is not None else None,
        "primary": notes.primary,
        "key": pick.key,
        "pod": pick.pod or None,
        "equal": len(first),
        "offers": [{**asdict(offer), "chunks_held": offer.cached // CHUNK_TOKENS} for offer in offers],
    }


def _prompt(notes: Notes) -> Mapping[str, Any] | None:
    if notes.prompt is None:
        return None
    return {
        "cache_salt": notes.prompt.cache_salt,
        "bytes": len(notes.prompt.text),
        "tokens": notes.prompt.tokens,
        "max_tokens": notes.prompt.max_tokens,
        "chunks": [each.hex() for each in notes.hashes],
        "hint": notes.hint.hex() if notes.hint is not None else None,
    }
