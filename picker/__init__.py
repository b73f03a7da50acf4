"""ext_proc picker: one hash-policy header for each request, addressed to the pod where it is cheapest."""
