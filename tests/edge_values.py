"""Values at the edges of what a field may hold, and beyond, by the kind of field. For tests/edges.py."""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st


@dataclass(frozen=True, slots=True)
class Values:
    """What may stand in a field: the values that are known to be edges, and a strategy for more of their kind."""

    listed: tuple[object, ...]
    more: st.SearchStrategy[Any]

    def any(self) -> st.SearchStrategy[Any]:
        # By their index: Hypothesis writes a strategy down, and some values are long.
        return st.integers(0, len(self.listed) - 1).map(lambda i: self.listed[i]) | self.more

    def __or__(self, other: Values) -> Values:
        return Values(self.listed + other.listed, self.more | other.more)


def one_of(*words: object) -> Values:
    """These and no others."""
    return Values(words, st.sampled_from(words))


def _each(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# --- text -------------------------------------------------------------------------------------------------------------

_TOKEN = string.ascii_letters + string.digits + "!#$%&'*+-.^_`|~"
_VISIBLE = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=12)
_ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)

_LONG = tuple("x" * size for size in (63, 64, 253, 254, 256, 257, 1023, 1024, 1025, 4096, 4097))
_BLANK = ("", " ", "\t", " a", "a ", "\ta", "a\t", "a b", "a\tb", "\xa0", "a\xa0", "\u2028", "\ufeff", "\u202e")
_CONTROL = ("\x00", "\n", "\r", "a\r\nb: c", "a\nb", "\x01", "\x1f", "\x7f", "\x80", "\x85", "a\x00b")
_WIDE = ("é", "ß", "漢", "\U0001f600", "漢" * 1024, "\U0001f600" * 4096, "%" * 4096)
_ODD = _each(r"""
    % %% %4 %41 %00 %0d%0a %2f %5C %c3%a9 %REQ(x)% %START_TIME% " ' \ \1 \0 $1 {} [] <> | ^ ` # ? & = + ; , * : / //
    null 0 -1 true a/../b http://e.test/ //e.test {{x}} ${x} a,b a;b=c a:b
""")
TEXT = Values(_BLANK + _CONTROL + _WIDE + _ODD + _LONG, _VISIBLE | _ANY)
NAME = TEXT | Values(_each("a a.b A a_b a/b -a a."), st.text("a0-._/", max_size=8))

HEADER_NAME = TEXT | Values(
    _each("""
        :path :authority :method :status Host HOST Content-Length transfer-encoding connection Keep-Alive upgrade te
        proxy-connection trailer expect http2-settings x-envoy-upstream-rq-timeout-ms x-envoy-retry-on x-forwarded-for
        x-forwarded-proto x-request-id x-vllm-pick X-Gateway-Model-Name cookie set-cookie server date content-type X-UP
    """)
    + tuple(_TOKEN),
    st.text(_TOKEN, min_size=1, max_size=12),
)

# --- paths and hosts --------------------------------------------------------------------------------------------------

_SEGMENTS = ("", *_each("a . .. ... .;a ..;a %41 %2e %2F %20 %C3%A9 %5c * a;b ~ a@b:c !$&'()+,="))
PATH = TEXT | Values(
    tuple("/" + text for text in (*_LONG, "a b"))
    + _each(r"""
        /a/ /a//b /a/./b /a/.. /... /.a /.;a /..;/a /a;b /%41 /%2E /%2f /%5C /%00 /%0d%0a /%c3%a9 /%zz /% /é /a?b /a#b
        /a?b=c /a?b?c /\1 /a\b /* /~ /!$&'()+,=:@ /"a" /<a> /{a} /a|b /a^b /`
    """),
    st.lists(st.sampled_from(_SEGMENTS), max_size=4).map(lambda parts: "/" + "/".join(parts))
    | st.text("/-A0._~!$&'()*+,;=:@%25", max_size=12).map("/".__add__),
)
HOSTNAME = TEXT | Values(
    tuple(start + "a." * 120 + "a" * end for start, end in (("", 13), ("*.", 11), ("", 14)))
    + _each("""
        a 0 *.a *.*.a a.* *a.b A.test a..b .a a. a:80 1.2.3.4 ::1 [::1] xn--e1afmkfd.test a_b.test -a a- *.named.test
        x.named.test named.test *.test edge.test steady.test
    """),
    st.text("*.-a0", max_size=8),
)
ADDRESS = TEXT | Values(
    _each("""
        0.0.0.0 255.255.255.255 224.0.0.1 127.0.0.2 1.2.3 1.2.3.04 1.2.3.256 0x7f.1 1.2.3.4:80 localhost :: ::1 [::1]
        fe80::1 fe80::1%eth0 ::1%lo fe80::1%1 fe80::1% ::ffff:127.0.0.1 ::127.0.0.1 64:ff9b::1.2.3.4 ff02::1 FD00::1
        fd00:0::1 fd00:0:0:0:0:0:0:1
    """),
    st.ip_addresses().map(str) | st.ip_addresses(v=6).map(lambda address: address.exploded.upper()),
)

# --- numbers and times ------------------------------------------------------------------------------------------------

NUMBER = Values(
    (-1, 0, 1, 2, 80, 65535, 65536, 1_000_000, 1_000_001, 2**31, 2**32 - 1, 2**32, 2**64, 1.5, "1", True, None),
    st.integers(0, 1_000_000),
)
DURATION = Values(
    (
        *_each("0s 0ms 0h0m0s 1ms 1s 0.5s 1us -1s 1 1d s 1h1h1h1h 1h1h1h1h1h 00001s 99999h 100000h 1e3s 10S"),
        *("", " 1s", "1s ", "99999h" * 4, "99999h99999m99999s99999ms"),
    ),
    st.lists(st.tuples(st.integers(0, 99999), st.sampled_from(["h", "m", "s", "ms"])), min_size=1, max_size=4).map(
        lambda parts: "".join(f"{number}{unit}" for number, unit in parts)
    ),
)

# --- regular expressions ----------------------------------------------------------------------------------------------

# Of what one is made: RE2's syntax, Python's, both and neither.
_PIECES = _each(r"""
    a b k 0 / - . ^ $ | , é 漢 \ { } ] ) \d \D \W \s \b \B \A \z \Z \0 \07 \123 \1 \x41 \xe9 \x{41} \u0041 \pL \p{Greek}
    \C \Q \E \é \_ \- \/ \a \v ( (?: (?P<n> (?<n> (?P<é> (?P=n) (?i) (?i: (?s: (?-s: (?U) (?x) (?# (?= (?! (?<= (?>
    * + ? *? ++ ?+ {2} {2,} {,2} {2,3} {3,2} {0} {1000} {500} {1001} {10}{10} [ [^ [] [a-z] [^a-z] [z-a] [a-] [\d-z]
    [\W\s] [é] [[] [a&&b] [a--b] [\b] [[:alpha:]] [[=a=]] [\x00-\xff] (a{100}){10} (?:.?){1000}
""")
# Large by different ways: each is little alone, and too much for RE2's memory as often as a field has room for it.
_LARGE = _each(r"""
    [acegikmoqsuwyACEGIKMOQSUWY02468!#%]{1000} ((((((((a)))))))){1000} \W{1000} (?:.?){1000} (?:ab|cd|ef){1000} k{1000}
    (){1000} .{0,1000} (a{30}){33}
""")
REGEX = Values(
    _each(r"""
        /.* (?P<é>a) \é [é] é+ (?=a) (a)\1 a{1001} (a{100}){11} a** ( [ \ a{,2} [[:alpha:]] [^a] (?i)K \C \Qa\E \pL a|
    """)
    + tuple(part * (size // len(part)) for part in _LARGE for size in (300, 1000, 4000))
    + ("(" * 400 + ")" * 400, "[\x00-\x1f]"),
    st.lists(st.sampled_from((*_PIECES, " ", "\n", "\x00")), max_size=8).map("".join),
)
