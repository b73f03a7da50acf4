"""Which regular expressions of a route Envoy's RE2 will compile.

For one expression that RE2 cannot compile Envoy refuses the whole response, everybody's routes with it. `problem` lets
through the common ground of RE2 and Python's `re`, and refuses the rest, some that RE2 alone would take included
(`[[:alpha:]]`): https://github.com/google/re2/wiki/Syntax. The caller bounds the length (1,024 to 4,096 characters).

Envoy's RE2 reads bytes: a character beyond ASCII is several of them, of which `+` would repeat the last and `[...]`
choose one, so expressions are ASCII (`.` matches one byte).

Envoy has a limit of its own, the runtime key `re2.max_program_size.error_level`, by default 100 instructions: about 95
characters of a path. The bootstrap has to raise it to RE2's own.
"""

from __future__ import annotations

import re

SHOWN = 20  # characters of a repetition
MAX_NESTED = 100  # groups in one another: Python's parser recurses, and has less of its stack left under a deep caller
MAX_REPEAT = 1000  # RE2's limit, for one repetition and for the product of nested ones
# RE2's instructions at most, with every repetition written out. Its 8 MiB hold 350,000 of them, which take Envoy's main
# thread a third of a second to compile.
MAX_SIZE = 50_000

_TOKEN = re.compile(
    r"""\\(?P<escape>.)
      | (?P<class>\[\^?+\]?+(?:\\.|[^\]\\])*+\])
      | (?P<special>\(\?(?:<?[=!]|>|\(|P=|\#|[a-z-]*[aLux]))  # lookaround, atomic, conditional, named reference, ...
      | (?P<open>\((?:\?(?:P?<\w+>|[a-zA-Z-]*:))?)
      | (?P<close>\))
      | (?P<repeat>\{(?:(?P<low>[0-9]+)(?:,(?P<high>[0-9]*))?|,[0-9]*)\}|[*+?])(?P<mode>[?+]?)
      | (?P<atom>.)""",
    re.VERBOSE | re.DOTALL,
)
_ONLY_PYTHON = re.compile(r"\\[1-9ZuUN]")  # backreferences, \Z (RE2 has \z), \uXXXX (RE2 has \x{XXXX})
_SET_OPERATION = re.compile(
    r"(?<!^)(?<!\\)\[|--|&&|~~|\|\||\\b"
)  # in a class: [:alpha:], what `re` reserves, backspace
_ITEM = re.compile(r"(?:\\.|[^\\])(?:-(?:\\.|[^\\]))?", re.DOTALL)  # of a class: a character or a range


def problem(pattern: str) -> str:
    """Why RE2 would refuse the pattern, or "" when it compiles."""
    if not pattern.isascii():
        return "Envoy's RE2 reads bytes, of which a character beyond ASCII is several"
    groups = [(0, 1)]  # of each open group: its size, the largest nested repetition in it
    size, nested = 0, 1  # of the atom before the current position
    for token in _TOKEN.finditer(pattern):
        if _differs(token):
            return f"RE2 does not support {token[0]}, or reads it otherwise"
        if token["atom"] == "[":
            return "[ without its ]"
        if token["repeat"]:
            low, high = int(token["low"] or 0), int(token["high"] or 0)
            times = max(low, high, 1)
            extra, nested = size * (times - 1) + times, nested * times
            size += extra
            if nested > MAX_REPEAT:
                return f"RE2 repeats at most {MAX_REPEAT} times, {token[0][:SHOWN]} makes it more"
        elif token["open"]:
            groups.append((2, 1))
            if len(groups) > MAX_NESTED + 1:
                return f"groups are nested deeper than {MAX_NESTED}"
            size, nested, extra = 0, 1, 0
        elif token["close"] and len(groups) > 1:
            size, nested = groups.pop()
            extra = size
        else:
            size = extra = _instructions(token)
            nested = 1
        groups[-1] = groups[-1][0] + extra, max(groups[-1][1], nested)
        if groups[-1][0] > MAX_SIZE:
            return f"larger than {MAX_SIZE} instructions of RE2 once its repetitions are written out"
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return str(error)
    return ""


def _differs(token: re.Match[str]) -> bool:
    """Whether RE2 lacks what `re` reads here, or reads something else."""
    return bool(
        token["special"]
        or token["mode"] == "+"  # possessive
        or (token["repeat"] or "").startswith("{,")  # text in RE2
        or (token["escape"] and _ONLY_PYTHON.match(token[0]))
        or (token["class"] and (_ONLY_PYTHON.search(token[0]) or _SET_OPERATION.search(token[0])))
    )


def _instructions(token: re.Match[str]) -> int:
    """How many instructions of RE2 an atom is at most: a character in either case two, `\\W` five."""
    if token["class"]:
        return 5 * len(_ITEM.findall(token["class"][1:-1]))
    return 5 if token["escape"] else 2
