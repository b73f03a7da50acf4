"""`vllm-xds explain`: which way a request takes, and which pod it is picked for, and why."""
