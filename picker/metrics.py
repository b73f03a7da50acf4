"""The picker's own metrics (Prometheus). Labels are bounded: pools the server reported, reasons, kinds of failure."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class PickerMetrics:
    """Every series of `vllm-xds picker`; one object for each picker, so tests never share a registry."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = r = registry if registry is not None else CollectorRegistry()
        self.picks = Counter(
            "vllm_xds_picker_picks",
            "Requests decided, by pool (empty: its pods are unknown) and reason (see picker/pick.py).",
            ["pool", "reason"],
            registry=r,
        )
        self.pick_seconds = Histogram(
            "vllm_xds_picker_pick_seconds",
            "From a request's bytes to its answer's.",
            registry=r,
            buckets=(0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),
        )
        self.failures = Counter(
            "vllm_xds_picker_failures",
            "Requests answered without a pick because of an exception.",
            ["kind"],
            registry=r,
        )
        self.renamed = Counter(
            "vllm_xds_picker_renamed", "Requests whose model's name was replaced, by pool.", ["pool"], registry=r
        )
        self.client_errors = Counter(
            "vllm_xds_picker_client_errors",
            "Connections ended because of what the client sent, by HTTP/2 error code.",
            ["code"],
            registry=r,
        )
        self.chunks = Gauge("vllm_xds_picker_chunks", "Chunk hashes held for all pods.", registry=r)
        self.connected = Gauge("vllm_xds_picker_server_connected", "1 while the load stream is open.", registry=r)
        self.refused = Counter(
            "vllm_xds_picker_load_reports_refused", "Load reports and pool settings refused (NACK).", registry=r
        )
        self.load_age = Gauge(
            "vllm_xds_picker_load_age_seconds", "Age of a pool's freshest load; +Inf: never read.", ["pool"], registry=r
        )
        self.exchange_peers = Gauge(
            "vllm_xds_picker_exchange_peers", "Other pickers whose picks are noted here as well.", registry=r
        )
        self.exchange_requests = Counter(
            "vllm_xds_picker_exchange_requests", "Requests of other pickers that were noted.", registry=r
        )
        self.exchange_bytes = Counter(
            "vllm_xds_picker_exchange_bytes", "Of batches told, and of messages heard.", ["direction"], registry=r
        )
        self.exchange_lost = Counter(
            "vllm_xds_picker_exchange_lost",
            "What could not be told, or was told and not noted here: docs/logs.md has the reasons.",
            ["reason"],
            registry=r,
        )
