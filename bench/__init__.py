"""What cannot run here, made to speak the real wire: a simulated vLLM pod (`python -m bench.vllm_pod --help`).

kv_cache                    paged KV blocks with a prefix cache                pure
vllm_stats                  what the engine counts and measures                pure
vllm_engine                 the scheduler, in discrete steps                   pure; time is an argument
vllm_api                    OpenAI requests in, JSON and SSE out               pure
vllm_families, vllm_page    vLLM's /metrics                                    pure
vllm_server                 SimulatedPod: the engine in real time, over HTTP
vllm_pod                    the command line: a fleet of them

The engine knows nothing of the server: a discrete-event simulation drives the same one in virtual time.
"""
