"""The inference extension's objects, in every generation a cluster may still have.

Schemas: the CRDs of kubernetes-sigs/gateway-api-inference-extension, v1.6.0 for `inference.networking.k8s.io`, v0.5.1
(pools, models) and v1.5.0 (rewrites, objectives) for `inference.networking.x-k8s.io`, and those of llm-d/llm-d-router
v0.10.0 for `llm-d.ai`, which has taken the last two over unchanged.
"""

from __future__ import annotations

from xds.fields import GROUP, KIND, LABEL_VALUE, OBJECT_NAME, Reader, Text, describe
from xds.model import (
    INFERENCE,
    INFERENCE_X,
    Criticality,
    InferenceModel,
    InferenceModelRewrite,
    InferenceObjective,
    InferencePool,
    Meta,
    ObjectRef,
    RewriteRule,
    Strategy,
)
from xds.parse_settings import read_settings

STRATEGY_ANNOTATION = "inference.networking.x-k8s.io/routing-strategy"

_MODEL_NAME = Text("a model's name", 256)
_ANY_MODEL_NAME = Text("a model's name", 4096)  # of a rewrite, whose CRD has no limit; Envoy reads 8,192 bytes
MAX_RULES = 1024  # of a rewrite, matches of a rule, and targets: its CRD has no limit, an object is 1.5 MB at most


def read_pool(document: Reader, meta: Meta) -> InferencePool:
    """inference.networking.k8s.io/v1: one to eight ports, each a rank with an endpoint of its own."""
    spec = document.child("spec")
    selector = _read_selector(spec.child("selector"), "matchLabels")
    ports = tuple(port.port("number") for port in spec.children("targetPorts", most=8, least=1))
    if len(set(ports)) < len(ports):
        raise spec.error("targetPorts", "expected ports that differ")
    http2 = spec.choice("appProtocol", ("http", "kubernetes.io/h2c"), "http") == "kubernetes.io/h2c"
    extension = _read_extension(spec, "endpointPickerRef")
    return InferencePool(
        meta, selector, ports, _read_strategy(document, meta), http2, extension, read_settings(document, meta)
    )


def read_pool_x(document: Reader, meta: Meta) -> InferencePool:
    """inference.networking.x-k8s.io/v1alpha2 and v1alpha1.

    Their CRDs require extensionRef; here it may be left out, as since v1.6 of the extension: the picker is our own.
    """
    spec = document.child("spec")
    selector = _read_selector(spec, "selector")
    ports = (spec.port("targetPortNumber"),)
    extension = _read_extension(spec, "extensionRef")
    strategy = _read_strategy(document, meta)
    return InferencePool(meta, selector, ports, strategy, extension=extension, settings=read_settings(document, meta))


def _read_selector(reader: Reader, key: str) -> dict[str, str]:
    labels = reader.texts_by_key(key, 64, LABEL_VALUE)
    if not labels:  # it would take in every pod of the namespace, model servers or not
        raise reader.error(key, "expected at least one label")
    return labels


def _read_strategy(document: Reader, meta: Meta) -> Strategy:
    value = meta.annotations.get(STRATEGY_ANNOTATION, Strategy.DEFAULT)
    try:
        return Strategy(value)
    except ValueError:
        message = f"expected {' or '.join(Strategy)}, found {describe(value)}; DEFAULT is served"
        document.warn(f"metadata.annotations[{STRATEGY_ANNOTATION}]", message, "UnknownStrategy")
        return Strategy.DEFAULT


def _read_extension(spec: Reader, key: str) -> str:
    """The picker's name, "" when the pool names none; its port and failure mode have no meaning for our own picker."""
    if spec.get(key) is None:
        return ""
    extension = spec.child(key)
    extension.skip("group", "kind", "port", "portNumber", "failureMode")
    return extension.text("name", OBJECT_NAME)


def read_model(document: Reader, meta: Meta) -> InferenceModel:
    """inference.networking.x-k8s.io/v1alpha2 and v1alpha1; targets without weights share equally."""
    spec = document.child("spec")
    return InferenceModel(
        meta,
        spec.text("modelName", _MODEL_NAME),
        Criticality(spec.choice("criticality", [each.value for each in Criticality], Criticality.STANDARD.value)),
        _read_targets(spec, "targetModels", "name", _MODEL_NAME, 10),
        read_pool_ref(spec, meta, INFERENCE_X),
    )


def read_rewrite(document: Reader, meta: Meta) -> InferenceModelRewrite:
    """inference.networking.x-k8s.io/v1alpha2 and llm-d.ai/v1alpha2."""
    spec = document.child("spec")
    rules = []
    for rule in spec.children("rules", most=MAX_RULES):
        models = []
        for match in rule.children("matches", most=MAX_RULES):
            model = match.child("model")
            model.choice("type", ("Exact",), "Exact")
            models.append(model.text("value", _ANY_MODEL_NAME))
        targets = _read_targets(rule, "targets", "modelRewrite", _ANY_MODEL_NAME, MAX_RULES)
        rules.append(RewriteRule(tuple(models), targets))
    return InferenceModelRewrite(meta, tuple(rules), read_pool_ref(spec, meta, INFERENCE))


def read_objective(document: Reader, meta: Meta) -> InferenceObjective:
    """inference.networking.x-k8s.io/v1alpha2 and llm-d.ai/v1alpha2."""
    spec = document.child("spec")
    return InferenceObjective(
        meta, spec.integer("priority", -(2**31), 2**31 - 1, 0), read_pool_ref(spec, meta, INFERENCE)
    )


def _read_targets(reader: Reader, key: str, name: str, rule: Text, most: int) -> tuple[tuple[str, int], ...]:
    targets = reader.children(key, most)
    weighted = sum(target.get("weight") is not None for target in targets)
    if weighted not in (0, len(targets)):
        raise reader.error(key, "expected a weight for every target, or for none")
    return tuple((target.text(name, rule), target.integer("weight", 1, 1_000_000, 1)) for target in targets)


def read_pool_ref(spec: Reader, meta: Meta, group: str = INFERENCE) -> ObjectRef:
    """The pool, which is in the object's own namespace; `group` is its default."""
    pool = spec.child("poolRef")
    return ObjectRef(
        pool.text("group", GROUP, group),
        pool.text("kind", KIND, "InferencePool"),
        meta.ref.namespace,
        pool.text("name", OBJECT_NAME),
    )
