"""The server's own metrics (Prometheus). Labels are bounded by what is configured, never a request or a client."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class Metrics:
    """Every series of `vllm-xds serve`; one object for each server, so tests never share a registry."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = r = registry if registry is not None else CollectorRegistry()
        # configuration
        self.objects = Gauge("vllm_xds_objects", "Accepted objects.", ["kind"], registry=r)
        self.rejections = Gauge("vllm_xds_rejections", "Current rejections.", ["level", "reason"], registry=r)
        self.loads = Counter("vllm_xds_config_loads", "Times the configuration was read.", ["result"], registry=r)
        self.translate_seconds = Histogram(
            "vllm_xds_translate_seconds",
            "From a change of objects to a new snapshot.",
            registry=r,
            buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3),
        )
        self.resources = Gauge("vllm_xds_resources", "Resources in the snapshot.", ["type"], registry=r)
        # protocol
        self.streams = Gauge("vllm_xds_streams", "Open xDS streams.", ["variant"], registry=r)
        self.requests = Counter(
            "vllm_xds_requests",
            "Requests received, by what they were (see xds/stream.py).",
            ["type", "kind"],
            registry=r,
        )
        self.responses = Counter("vllm_xds_responses", "Responses sent.", ["type"], registry=r)
        self.response_bytes = Counter("vllm_xds_response_bytes", "Bytes of resources sent.", ["type"], registry=r)
        self.nacks = Counter("vllm_xds_nacks", "Responses a client refused.", ["type"], registry=r)
        # scraping
        self.scrapes = Counter("vllm_xds_scrapes", "Metrics pages asked for.", ["pool", "result"], registry=r)
        self.scrape_seconds = Histogram(
            "vllm_xds_scrape_seconds",
            "From the request for a page to its parsed load.",
            ["pool"],
            registry=r,
            buckets=(0.003, 0.01, 0.03, 0.1, 0.3, 1, 3),
        )
        self.blind = Gauge("vllm_xds_blind_endpoints", "Endpoints without a fresh load.", ["pool"], registry=r)
        per = ["pool", "endpoint"]
        self.weight = Gauge("vllm_xds_endpoint_weight", "load_balancing_weight given to Envoy.", per, registry=r)
        self.running = Gauge("vllm_xds_endpoint_running", "vllm:num_requests_running, last read.", per, registry=r)
        self.waiting = Gauge("vllm_xds_endpoint_waiting", "vllm:num_requests_waiting, last read.", per, registry=r)
        self.kv_usage = Gauge("vllm_xds_endpoint_kv_usage", "vllm:kv_cache_usage_perc, last read.", per, registry=r)
        self.age = Gauge("vllm_xds_endpoint_load_age_seconds", "Age of the last load.", per, registry=r)
