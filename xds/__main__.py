"""The `vllm-xds` command: one sub-command a module, imported only when it is named, so that `--help` is quick."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

DESCRIPTION = (
    "An xDS management server and an ext_proc picker that make plain Envoy an inference gateway for vLLM pods."
)

COMMANDS = {  # name -> (module with add_arguments(parser) and run(args) -> exit code, what it does)
    "serve": ("xds.serve", "run the management server: objects and vLLM metrics in, xDS out"),
    "picker": ("picker.__main__", "run the ext_proc picker: a request body in, the cheapest pod's hash key out"),
    "bootstrap": ("bootstrap.__main__", "print the bootstrap of an Envoy that asks this management server"),
    "check": ("xds.check", "say what `serve` would reject and serve of a directory, without serving it"),
    "status": ("xds.show", "show what a running server serves, from which loads, to whom, and what is wrong"),
    "explain": (
        "picker.explain_main",
        "say which way a request takes, what each pod would cost it, and which is picked",
    ),
    "demo": ("bench.demo", "run everything on this machine, with simulated pods, and compare both ports"),
}

EPILOG = """\
commands:
{commands}

Each explains itself: vllm-xds COMMAND --help. To see it all work: vllm-xds demo
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0 done, 1 failed (a line says why), 2 wrong usage."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    listing = "\n".join(f"  {name:11}{text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="vllm-xds",
        usage="vllm-xds COMMAND [OPTION ...]",
        description=DESCRIPTION,
        epilog=EPILOG.format(commands=listing),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    name = parser.parse_args(arguments[:1]).command
    # gRPC's core writes lines of its own past our log; what matters it also raises. Read when gRPC is imported.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    module_name, text = COMMANDS[name]
    module = importlib.import_module(module_name)
    command = argparse.ArgumentParser(
        prog=f"vllm-xds {name}",
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=getattr(module, "EPILOG", None),
        formatter_class=_Formatter,
    )
    module.add_arguments(command)
    try:
        code: int = module.run(command.parse_args(arguments[1:]))
    except BrokenPipeError:  # `vllm-xds check DIR | head`
        sys.stderr.close()
        return 1
    return code


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the defaults there are, and leaves epilogs as they are written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


if __name__ == "__main__":
    sys.exit(main())
