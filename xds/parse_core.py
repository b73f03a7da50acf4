"""Service, EndpointSlice, Pod, Namespace and Secret: of their many fields the few that say where requests can go.

The limits are those of the Kubernetes API reference; Kubernetes sets none for ports of a Service or a container.
"""

from __future__ import annotations

import re
from base64 import b64decode
from ipaddress import ip_address

from xds import certificates
from xds.fields import ANNOTATION, LABEL_VALUE, OBJECT_NAME, FieldError, Reader, Text, describe
from xds.model import EndpointSlice, Meta, Namespace, Pod, Secret, Service, ServicePort, SliceEndpoint

MAX_PORTS = 1000  # of a Service, of a container
MAX_CONTAINERS = 100
MAX_CONDITIONS = 100
SERVICE_LABEL = "kubernetes.io/service-name"

TLS_TYPE = "kubernetes.io/tls"

_SECRET_VALUE = Text("text", 2**20 * 4 // 3 + 4)  # the API server lets a Secret have 1 MiB
_PORT_NAME = Text("a port's name", 63, re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"))
_WORD = Text("a word", 316)
_ADDRESS = Text("an IP address", 45)  # the longest IPv6 form


def read_service(document: Reader, meta: Meta) -> Service:
    """spec.selector and the TCP ports; a Service without a selector has its EndpointSlices written by hand."""
    spec = document.child("spec")
    ports = spec.children("ports", MAX_PORTS)
    selector = spec.texts_by_key("selector", 64, LABEL_VALUE)
    return Service(meta, tuple(_service_port(port) for port in ports if _is_tcp(port)), selector)


def _service_port(port: Reader) -> ServicePort:
    number = port.port("port")
    target: int | str = number
    if isinstance(port.get("targetPort"), str):
        target = port.text("targetPort", _PORT_NAME)
    elif port.get("targetPort") is not None:
        target = port.port("targetPort")
    name = port.text("name", _PORT_NAME, "")
    return ServicePort(name, number, target, port.text("appProtocol", _WORD, ""))


def read_endpoint_slice(document: Reader, meta: Meta) -> EndpointSlice:
    """The slice of the Service its label names; without the label it belongs to none (service "")."""
    if document.choice("addressType", ("IPv4", "IPv6", "FQDN")) == "FQDN":
        raise FieldError("addressType", "expected IPv4 or IPv6, found FQDN", "UnsupportedValue")
    ports = {
        port.text("name", _PORT_NAME, "") if port.get("name") else "": port.port("port")
        for port in document.children("ports", 100)
        if _is_tcp(port) and port.get("port") is not None  # without a number: every port, which no endpoint can be
    }
    endpoints = tuple(_endpoint(endpoint) for endpoint in document.children("endpoints", 1000))
    return EndpointSlice(meta, meta.labels.get(SERVICE_LABEL, ""), ports, endpoints)


def _endpoint(endpoint: Reader) -> SliceEndpoint:
    addresses = endpoint.texts("addresses", 100, _ADDRESS)
    for i, address in enumerate(addresses):
        _check_address(address, endpoint.at(f"addresses[{i}]"))
    conditions = endpoint.child("conditions")
    target = endpoint.child("targetRef")
    return SliceEndpoint(
        addresses,
        ready=conditions.flag("ready", default=True),  # "a nil value should be interpreted as true"
        terminating=conditions.flag("terminating", default=False),
        pod=target.text("name", OBJECT_NAME, "") if target.get("kind") == "Pod" else "",
    )


def read_pod(document: Reader, meta: Meta) -> Pod:
    """Where the pod is and whether it may be sent requests; what it runs is read only for its named ports."""
    status = document.child("status")
    ip = status.text("podIP", _ADDRESS, "") if status.get("podIP") else ""
    if ip:
        _check_address(ip, status.at("podIP"))
    conditions = status.children("conditions", MAX_CONDITIONS)
    if conditions:
        ready = any(each.get("type") == "Ready" and each.get("status") == "True" for each in conditions)
    else:
        ready = status.get("phase") == "Running"
    ports = {
        port.text("name", _PORT_NAME): port.port("containerPort")
        for container in document.child("spec").children("containers", MAX_CONTAINERS)
        for port in container.children("ports", MAX_PORTS)
        if port.get("name") and _is_tcp(port)
    }
    deleting = document.child("metadata").text("deletionTimestamp", ANNOTATION, "")
    return Pod(meta, ip, ready, bool(deleting), ports)


def read_namespace(_: Reader, meta: Meta) -> Namespace:
    """Its metadata is all that counts."""
    return Namespace(meta)


def read_secret(document: Reader, meta: Meta) -> Secret:
    """One of type kubernetes.io/tls; `stringData` counts over `data`, as for the API server."""
    kind = document.text("type", _WORD, "Opaque")
    if kind != TLS_TYPE:
        raise document.error("type", f"expected {TLS_TYPE}, found {describe(kind)}", "UnsupportedValue")
    certificate, key = (_secret_value(document, name) for name in ("tls.crt", "tls.key"))
    if problem := certificates.problem(certificate, key):
        raise document.error("data", problem, "InvalidCertificate")
    return Secret(meta, certificate, key)


def _secret_value(document: Reader, name: str) -> bytes:
    plain = document.child("stringData")
    if plain.get(name) is not None:
        return plain.text(name, _SECRET_VALUE).encode()
    data = document.child("data")
    try:
        return b64decode(data.text(name, _SECRET_VALUE), validate=True)
    except ValueError:
        raise data.error(name, "expected base64") from None


def _is_tcp(port: Reader) -> bool:
    return port.text("protocol", _WORD, "TCP") == "TCP"


def _check_address(address: str, field: str) -> None:
    """Envoy refuses the whole response for one endpoint whose address is not an IP, or has a zone it does not know."""
    try:
        ip_address(address)
    except ValueError:
        raise FieldError(field, f"expected an IP address, found {describe(address)}") from None
    if "%" in address:
        raise FieldError(field, f"expected an IP address without a zone, found {describe(address)}")
