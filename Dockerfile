# The management server (`serve`) and the picker (`picker`). Envoy runs from its own image.
#
#   docker build -t vllm-xds .
#   docker run -v "$PWD/config:/config:ro" -v "$PWD/tls:/tls:ro" vllm-xds serve --config /config --listen 0.0.0.0:18000 \
#     --tls-cert /tls/tls.crt --tls-key /tls/tls.key --tls-ca /tls/ca.crt
#   docker run -v "$PWD/tls:/tls:ro" vllm-xds picker --server SERVER:18000 --listen 0.0.0.0:18001 \
#     --tls-cert /tls/tls.crt --tls-key /tls/tls.key --tls-ca /tls/ca.crt
#
# In a cluster: docs/kubernetes.md.

FROM python:3.13-slim-bookworm AS builder
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY . .
# requirements.lock as a constraint: the locked versions of what `serve` and `picker` need, none of the demo's or the
# tests'. (DL3013 does not see that a constraint pins hatchling too.)
# hadolint ignore=DL3013
RUN pip install --constraint requirements.lock hatchling \
 && pip wheel --no-build-isolation --constraint requirements.lock --wheel-dir /wheels . \
 && pip install --no-index --find-links /wheels --prefix /install vllm-xds

FROM python:3.13-slim-bookworm
LABEL org.opencontainers.image.title="vllm-xds" \
      org.opencontainers.image.description="xDS management server and ext_proc picker that make plain Envoy an inference gateway for vLLM pods" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=builder /install /usr/local
# kubernetes-asyncio asks where home is when it is imported, and this user has none that is written down.
ENV HOME=/
# 65532, "nonroot" by custom: a number, so that Kubernetes can check runAsNonRoot.
USER 65532:65532
ENTRYPOINT ["vllm-xds"]
CMD ["serve", "--help"]
