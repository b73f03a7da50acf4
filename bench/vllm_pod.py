"""`python -m bench.vllm_pod`: a fleet of simulated vLLM pods in one process, on consecutive loopback addresses."""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import signal
import sys
from dataclasses import fields, replace

import uvloop

from bench.vllm_engine import EngineConfig
from bench.vllm_server import MODEL, Faults, SimulatedPod

__all__ = ["Faults", "SimulatedPod", "main"]

DESCRIPTION = """\
Simulated vLLM pods: vLLM's HTTP API and /metrics page in front of a model of its scheduler, KV cache and timing.
No GPU and no weights; replies are filler words that come when a real pod's tokens would. Each pod listens on an
address of its own, from --bind upward (Linux answers on all of 127.0.0.0/8), and names itself in the reply header
x-sim-pod. Ctrl-C ends at once; SIGTERM does what vLLM does, see --shutdown-timeout."""

EPILOG = """\
examples:
  python -m bench.vllm_pod
      one pod on 127.1.0.1:8000, near an H100 with a 7-8B model
  python -m bench.vllm_pod --count 8 --speed 10
      eight pods, ten times as fast, for a demo on two cores
  python -m bench.vllm_pod --count 4 --speed 10,10,10,5
      the fourth at half the speed of the others
  curl -N 127.1.0.1:8000/v1/completions -H 'content-type: application/json' \\
      -d '{"model": "/model/qwen", "prompt": "Los Angeles", "max_tokens": 20, "stream": true}'"""


def parser() -> argparse.ArgumentParser:
    default = EngineConfig()
    root = argparse.ArgumentParser(
        "python -m bench.vllm_pod",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    fleet = root.add_argument_group("fleet")
    fleet.add_argument("--count", type=_count, default=1, metavar="N", help="pods to run (default 1; 100 is fine)")
    fleet.add_argument("--bind", default="127.1.0.1", metavar="IP", help="address of the first (default %(default)s)")
    fleet.add_argument("--port", type=int, default=8000, help="port of every pod (default 8000; 0 = any free one)")
    fleet.add_argument("--name", default="sim", help="pods are called NAME-0, NAME-1, ... (default %(default)s)")
    fleet.add_argument(
        "--speed",
        type=_speeds,
        default=(1.0,),
        metavar="X[,X...]",
        help="divide all step times by X (default 1); several are given to the pods in turn",
    )
    vllm = root.add_argument_group("vLLM's own options")
    vllm.add_argument("--model", default=MODEL, help="served model name (default %(default)s)")
    vllm.add_argument("--lora", action="append", default=[], metavar="NAME", help="a LoRA adapter to serve; repeatable")
    for name, text in (
        ("block_size", "tokens in a KV block"),
        ("num_gpu_blocks", "KV blocks"),
        ("max_num_seqs", "sequences running at once"),
        ("max_num_batched_tokens", "tokens computed in a step"),
        ("max_model_len", "tokens of the longest prompt plus output"),
        ("max_num_queued_reqs", "requests in flight before new ones are refused with 503; 0 = no bound"),
    ):
        value = getattr(default, name)
        option = f"--{name.replace('_', '-')}"
        vllm.add_argument(option, type=int, default=value, metavar="N", help=f"{text} (default {value})")
    vllm.add_argument(
        "--shutdown-timeout",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="on SIGTERM let requests in flight finish for so long; 0 (default) ends them with an error",
    )
    timing = root.add_argument_group("time model: a step takes base + prefill tokens * P + decoding sequences * D")
    for name, text in (
        ("step_base", "seconds of any step"),
        ("step_per_prefill_token", "P, seconds"),
        ("step_per_sequence", "D, seconds"),
    ):
        value = getattr(default, name)
        option = f"--{name.replace('_', '-')}"
        timing.add_argument(option, type=float, default=value, metavar="S", help=f"{text} (default {value:.6f})")
    root.add_argument("--legacy-metrics", action="store_true", help="older vLLM's name vllm:gpu_cache_usage_perc")
    return root


def fleet(args: argparse.Namespace) -> list[SimulatedPod]:
    """The pods that the arguments ask for, not started. Raises ValueError with a sentence for impossible ones."""
    config = EngineConfig(**{f.name: getattr(args, f.name) for f in fields(EngineConfig) if f.name != "speed"})
    first = ipaddress.ip_address(args.bind)
    return [
        SimulatedPod(
            f"{args.name}-{index}",
            address=str(first + index),
            port=args.port,
            config=replace(config, speed=args.speed[index % len(args.speed)]),
            model=args.model,
            adapters=tuple(args.lora),
            legacy_metrics=args.legacy_metrics,
        )
        for index in range(args.count)
    ]


async def serve(pods: list[SimulatedPod], shutdown_timeout: float) -> None:
    """Run the pods until SIGINT or SIGTERM. Raises OSError when one of them cannot listen."""
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[float] = loop.create_future()

    def on_signal(timeout: float) -> None:
        if not stop.done():
            stop.set_result(timeout)

    loop.add_signal_handler(signal.SIGINT, on_signal, 0.0)
    loop.add_signal_handler(signal.SIGTERM, on_signal, shutdown_timeout)
    started = []
    timeout = 0.0
    try:
        for pod in pods:
            await pod.start()
            started.append(pod)
        addresses = [f"http://{pod.address}:{pod.port}" for pod in (pods[0], pods[-1])]
        where = addresses[0] if len(pods) == 1 else f"{addresses[0]} to {addresses[1]}"
        print(f"ready: {len(pods)} simulated vLLM pod(s), {where}, model {pods[0].model}", flush=True)
        timeout = await stop
    finally:
        await asyncio.gather(*(pod.stop(timeout) for pod in started))


def main(argv: list[str] | None = None) -> int:
    root = parser()
    args = root.parse_args(argv)
    try:
        pods = fleet(args)
    except ValueError as error:
        root.error(str(error))
    try:
        uvloop.run(serve(pods, args.shutdown_timeout))
    except OSError as error:
        print(f"error: {error.strerror or error}", file=sys.stderr)
        return 1
    return 0


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError("there must be at least 1 pod")
    return count


def _speeds(text: str) -> tuple[float, ...]:
    speeds = tuple(float(part) for part in text.split(","))
    if min(speeds) <= 0:
        raise argparse.ArgumentTypeError("every speed must be above 0")
    return speeds


if __name__ == "__main__":
    sys.exit(main())
