"""vLLM 0.32's /metrics page: every family, name, type and label set of the real one, with live values.

The page is one template, built once; a scrape fills in the numbers. Sorted labels, `_created` gauges and Go's float
format are what prometheus_client writes for vLLM. The process's own memory, files and collections are constants.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from itertools import accumulate

from bench.vllm_engine import EngineConfig
from bench.vllm_families import CACHE_CONFIG, FAMILIES, Family, Read, ReadHistogram
from bench.vllm_stats import EngineStats, Histogram, HttpStats

CONTENT_TYPE = "text/plain; version=1.0.0; charset=utf-8"

_GC = (
    ("python_gc_objects_collected_total", "Objects collected during gc", (15000, 2600, 630)),
    ("python_gc_objects_uncollectable_total", "Uncollectable objects found during GC", (0, 0, 0)),
    ("python_gc_collections_total", "Number of times this generation was collected", (1600, 146, 10)),
)
_PYTHON = {"implementation": "CPython", "major": "3", "minor": "12", "patchlevel": "11", "version": "3.12.11"}

Samples = list[tuple[str, str]]  # (name with labels, value)
Source = Callable[[EngineStats], list[str]]


def number(value: float) -> str:
    """Go's float format as prometheus_client writes it: `12.0`, and an exponent from a million on."""
    text = repr(float(value))
    dot = text.find(".")
    if dot > 6 and value > 0:
        mantissa = f"{text[0]}.{text[1:dot]}{text[dot + 1 :]}".rstrip("0.")
        return f"{mantissa}e+{dot - 1:02d}"
    return text


def labels(pairs: Mapping[str, str]) -> str:
    """`{a="b",c="d"}`, sorted and escaped; "" for none."""
    if not pairs:
        return ""
    escaped = {key: pairs[key].replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n") for key in sorted(pairs)}
    return "{" + ",".join(f'{key}="{value}"' for key, value in escaped.items()) + "}"


def family_text(name: str, kind: str, text: str, samples: Samples) -> str:
    lines = "".join(f"{sample} {value}\n" for sample, value in samples)
    return f"# HELP {name} {text}\n# TYPE {name} {kind}\n{lines}"


def histogram_samples(name: str, pairs: Mapping[str, str], bounds: tuple[float, ...]) -> list[str]:
    """A histogram's samples without their values, in the page's order."""
    buckets = [f"{name}_bucket{labels({**pairs, 'le': bound})}" for bound in (*map(number, bounds), "+Inf")]
    return [*buckets, f"{name}_count{labels(pairs)}", f"{name}_sum{labels(pairs)}"]


def histogram_values(histogram: Histogram) -> list[str]:
    """The values that belong to `histogram_samples`."""
    cumulated = accumulate(histogram.counts)
    if histogram.count < 1_000_000:
        buckets = [f"{count}.0" for count in cumulated]  # what `number` gives below a million, faster
    else:
        buckets = [number(count) for count in cumulated]
    return [*buckets, buckets[-1], number(histogram.sum)]


class MetricsPage:
    """Writes one engine's page. `start_time` is the process's, in unix seconds; `max_lora` 0 = LoRA is off.

    `legacy` gives the KV-cache gauge the name older vLLM knew it by, vllm:gpu_cache_usage_perc.
    """

    def __init__(
        self, config: EngineConfig, model_name: str, start_time: float, *, max_lora: int = 0, legacy: bool = False
    ) -> None:
        self._created = number(start_time)
        self._max_lora = str(max_lora)
        self._template = _process_text(self._created)
        self._sources: list[Source] = []
        for family in FAMILIES:
            renamed = legacy and family.name == "vllm:kv_cache_usage_perc"
            self._add(family, "vllm:gpu_cache_usage_perc" if renamed else family.name, model_name)
        if max_lora:
            self._template += "%s"
            self._sources.append(self._lora_text)
        self._template += _cache_config_text(config).replace("%", "%%")

    def render(self, stats: EngineStats, http: HttpStats) -> bytes:
        values: list[str] = []
        for source in self._sources:
            values += source(stats)
        return (self._template % tuple(values) + _http_text(http, self._created)).encode()

    def _add(self, family: Family, name: str, model_name: str) -> None:
        """Append a family to the template, `%s` for each value, and its values to the sources."""
        pairs = {"model_name": model_name} | ({"engine": "0"} if family.engine else {})
        if family.histogram is not None:
            each = [pairs]
            samples = histogram_samples(name, pairs, family.histogram(EngineStats()).bounds)
            self._sources.append(_histogram_source(family.histogram))
        else:
            each = [pairs | ({family.by: value} if family.by else {}) for value in family.series]
            samples = [name + labels(one) for one in each]
            self._sources.extend(_source(read) for read in family.series.values())
        self._template += family_text(name, family.kind, family.help, [(s.replace("%", "%%"), "%s") for s in samples])
        if family.kind != "gauge":
            self._template += self._created_text(name, family, each).replace("%", "%%")

    def _created_text(self, name: str, family: Family, each: list[dict[str, str]]) -> str:
        name = f"{name.removesuffix('_total') if family.kind == 'counter' else name}_created"
        return family_text(name, "gauge", family.help, [(name + labels(one), self._created) for one in each])

    def _lora_text(self, stats: EngineStats) -> list[str]:
        name = "vllm:lora_requests_info"
        samples = []
        for (running, waiting), time in stats.lora.items():
            pairs = {"max_lora": self._max_lora, "running_lora_adapters": running, "waiting_lora_adapters": waiting}
            samples.append((name + labels(pairs), number(time)))
        return [family_text(name, "gauge", "Running stats on lora requests.", samples)]


def _source(read: Read) -> Source:
    return lambda stats: [number(read(stats))]


def _histogram_source(read: ReadHistogram) -> Source:
    return lambda stats: histogram_values(read(stats))


def _process_text(start_time: str) -> str:
    """The families of the Python process."""
    page = ""
    for name, text, values in _GC:
        samples = [(name + labels({"generation": str(i)}), number(value)) for i, value in enumerate(values)]
        page += family_text(name, "counter", text, samples)
    page += family_text(
        "python_info", "gauge", "Python platform information", [(f"python_info{labels(_PYTHON)}", "1.0")]
    )
    for name, kind, text, value in (
        ("process_virtual_memory_bytes", "gauge", "Virtual memory size in bytes.", number(2e10)),
        ("process_resident_memory_bytes", "gauge", "Resident memory size in bytes.", number(5e9)),
        ("process_start_time_seconds", "gauge", "Start time of the process since unix epoch in seconds.", start_time),
        ("process_cpu_seconds_total", "counter", "Total user and system CPU time spent in seconds.", "60.0"),
        ("process_open_fds", "gauge", "Number of open file descriptors.", "45.0"),
        ("process_max_fds", "gauge", "Maximum number of open file descriptors.", number(1_048_576)),
    ):
        page += family_text(name, kind, text, [(name, value)])
    return page


def _cache_config_text(config: EngineConfig) -> str:
    tokens = config.block_size * config.num_gpu_blocks
    pairs = CACHE_CONFIG | {
        "block_size": str(config.block_size),
        "effective_attention_block_size": str(config.block_size),
        "kv_cache_max_concurrency": str(tokens / config.max_model_len),
        "kv_cache_size_tokens": str(tokens),
        "num_gpu_blocks": str(config.num_gpu_blocks),
    }
    name = "vllm:cache_config_info"
    return family_text(name, "gauge", "Information of the LLMEngine CacheConfig", [(name + labels(pairs), "1.0")])


def _http_text(http: HttpStats, created: str) -> str:
    """The HTTP front's families; a handler's series, and their `_created`, appear with its first request."""

    def family(name: str, kind: str, text: str, keys: list[str], samples: Samples) -> str:
        page = family_text(name, kind, text, samples)
        base = f"{name.removesuffix('_total')}_created"
        return page + (family_text(base, "gauge", text, [(base + key, created) for key in keys]) if keys else "")

    name = "http_requests_total"
    keys = [labels({"handler": h, "method": m, "status": status}) for h, m, status in http.requests]
    counts = zip((name + key for key in keys), map(number, http.requests.values()), strict=True)
    page = family(name, "counter", "Total number of requests by method, status and handler.", keys, list(counts))

    requests: Counter[str] = Counter()
    for (handler, _, _), count in http.requests.items():
        requests[handler] += count
    keys = [labels({"handler": handler}) for handler in requests]
    for direction, sizes in (("request", http.sizes), ("response", Counter[str]())):
        name = f"http_{direction}_size_bytes"
        samples = []
        for key, (handler, count) in zip(keys, requests.items(), strict=True):
            samples += [(f"{name}_count{key}", number(count)), (f"{name}_sum{key}", number(sizes[handler]))]
        text = f"Content length of {direction}s by handler, as their headers say; 0 for streamed ones."
        page += family(name, "summary", text, keys, samples)

    name = "http_request_duration_highr_seconds"
    samples = list(zip(histogram_samples(name, {}, http.fine.bounds), histogram_values(http.fine), strict=True))
    page += family(name, "histogram", "Latency with many buckets and no labels, for percentiles.", [""], samples)

    name, samples, keys = "http_request_duration_seconds", [], []
    for (handler, method), histogram in http.durations.items():
        pairs = {"handler": handler, "method": method}
        keys.append(labels(pairs))
        samples += zip(histogram_samples(name, pairs, histogram.bounds), histogram_values(histogram), strict=True)
    return page + family(name, "histogram", "Latency with few buckets by handler.", keys, samples)
