"""What shows and measures the product: the demo, the benchmarks, and the simulated vLLM pod both stand on.

The pod (`python -m bench.vllm_pod --help`) is what cannot run here, a GPU, made to speak the real wire:

    kv_cache                    paged KV blocks with a prefix cache                pure
    vllm_stats                  what the engine counts and measures                pure
    vllm_engine                 the scheduler, in discrete steps                   pure; time is an argument
    vllm_api                    OpenAI requests in, JSON and SSE out               pure
    vllm_families, vllm_page    vLLM's /metrics                                    pure
    vllm_server                 SimulatedPod: the engine in real time, over HTTP
    vllm_pod                    the command line: a fleet of them

The engine knows nothing of the server: a discrete-event simulation drives the same one in virtual time.

The demo (`vllm-xds demo`):

    child                       processes that never outlive this one
    envoy                       the real Envoy as one of them
    stack                       server, picker, Envoy and pods, as child processes on free addresses
    load                        streamed chats, in an open loop or a closed one, and their measures
    table                       what is shown while it runs
    demo                        the command

The faults (`make chaos`, docs/reliability.md): chaos injects them one by one, chaos_gateway is what they hit.

The benchmarks (`make bench`, docs/benchmarks.md): figures runs and prints them all. live compares both ports.
"""
