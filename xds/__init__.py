"""xDS management server for plain Envoy in front of vLLM pods (this file stays a docstring: see CONTRIBUTING.md)."""
