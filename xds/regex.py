"""Which regular expressions of a route Envoy's RE2 will compile.

For one expression that RE2 cannot compile Envoy refuses the whole response, everybody's routes with it. `problem` lets
through the common ground of RE2 and Python's `re`, and refuses the rest, some that RE2 alone would take included
(`[[:alpha:]]`): https://github.com/google/re2/wiki/Syntax. The caller bounds the length (1,024 to 4,096 characters).

Envoy has a limit of its own, the runtime key `re2.max_program_size.error_level`, by default 100 instructions: about 95
characters of a path. The bootstrap has to raise it to RE2's own.
"""

from __future__ import annotations

import re

MAX_NESTED = 100  # groups in one another: Python's parser recurses, and has less of its stack left under a deep caller
MAX_REPEAT = 1000  # RE2's limit, for one repetition and for the product of nested ones
MAX_SIZE = (
    10_000  # atoms with every repetition written out; RE2's 8 MiB hold ten times as many of the costliest classes
)

_TOKEN = re.compile(
    r"""\\(?P<escape>.)
      | (?P<class>\[\^?+\]?+(?:\\.|[^\]\\])*+\])
      | (?P<special>\(\?(?:<?[=!]|>|\(|P=|\#|[a-z-]*[aLux]))  # lookaround, atomic, conditional, named reference, ...
      | (?P<open>\((?:\?(?:P?<\w+>|[a-zA-Z-]*:))?)
      | (?P<close>\))
      | (?P<repeat>\{(?P<low>[0-9]+)(?:,(?P<high>[0-9]*))?\}|[*+?])(?P<mode>[?+]?)
      | (?P<atom>.)""",
    re.VERBOSE | re.DOTALL,
)
# Backreferences, \Z (RE2 has \z), \uXXXX (RE2 has \x{XXXX}), and escapes of what needs none.
_ONLY_PYTHON = re.compile(r"\\[1-9ZuUN\u0080-\U0010ffff]")
_SET_OPERATION = re.compile(
    r"(?<!^)(?<!\\)\[|--|&&|~~|\|\||\\b"
)  # in a class: [:alpha:], what `re` reserves, backspace


def problem(pattern: str) -> str:
    """Why RE2 would refuse the pattern, or "" when it compiles."""
    groups = [(0, 1)]  # of each open group: its size, the largest nested repetition in it
    size, nested = 0, 1  # of the atom before the current position
    # To compile a range up to U+10FFFF takes a millisecond, so the characters of classes are moved together, in order.
    far = {ord(char): 256 + i for i, char in enumerate(sorted({char for char in pattern if char > "\xff"}))}
    near = []
    for token in _TOKEN.finditer(pattern):
        near.append(token[0].translate(far) if token["class"] else token[0])
        if (
            token["special"]
            or token["mode"] == "+"  # possessive
            or (token["escape"] and _ONLY_PYTHON.match(token[0]))
            or (token["class"] and (_ONLY_PYTHON.search(token[0]) or _SET_OPERATION.search(token[0])))
        ):
            return f"RE2 does not support {token[0]}, or reads it otherwise"
        if token["atom"] == "[":
            return "[ without its ]"
        if token["repeat"]:
            low, high = int(token["low"] or 0), int(token["high"] or 0)
            times = max(low, high, 1)
            extra, nested = size * (times - 1), nested * times
            size += extra
            if nested > MAX_REPEAT:
                return f"RE2 repeats at most {MAX_REPEAT} times, {token[0]} makes it {nested}"
        elif token["open"]:
            groups.append((0, 1))
            if len(groups) > MAX_NESTED + 1:
                return f"groups are nested deeper than {MAX_NESTED}"
            size, nested, extra = 0, 1, 0
        elif token["close"] and len(groups) > 1:
            size, nested = groups.pop()
            extra = size
        else:
            size, nested, extra = 1, 1, 1
        groups[-1] = groups[-1][0] + extra, max(groups[-1][1], nested)
        if groups[-1][0] > MAX_SIZE:
            return f"larger than {MAX_SIZE} characters once its repetitions are written out"
    try:
        re.compile("".join(near))
    except (re.error, RecursionError, OverflowError) as error:
        return str(error)
    return ""
