"""The option parser's errors, each in one line that says what to do."""

import re
from collections.abc import Iterable
from difflib import get_close_matches

NOISE = re.compile(
    r"Does not validate|Subtypes:|Errors:|Given value type|Expected a (path|typing|<class '(NoneType|str|coll))|^$"
)
"""The parser lists every type that it tried."""

WORDING = (
    (r'^Parser key "([^"]+)":', r"--\1:"),
    (r'Parser key "([^"]+)":', r"\1:"),
    (r"argument (--\S+):", r"\1:"),
    (r"<class '(\w+)'>", r"\1"),
    (r"Expected an? (\w+)(?:\. Got value:|(?=.* Given value:)) ?(.*)", r"expected \1, got \2"),
    (r"Given value: ", ""),
    (r"Problem with given class_path '([^']+)':", r"\1:"),
    (r"(No module named .*)", r"\1. Name a class as module.Class; modules are looked for here and on PYTHONPATH"),
    (r"Expected a dot import path string: (\w+)", r"expected a class for its options, got \1. Use module.Class"),
    (r"Import path does not correspond to a subclass of (\w+) (.*)", r"\2 is not a subclass of \1"),
    (r"--(\S+): (\S+): Option '(\w+)' is not accepted", r"--\1: \2 has no option '\3'. --\1.help=\2 lists them"),
    (r"ignored explicit argument (.*)", r"takes no value, but was given \1"),
)
"""From the parser's words to plain ones, in this order."""

UNKNOWN = re.compile(r"unrecognized arguments: (-*)([^\s=]+)|Group '(\w+)' does not accept option '(\w+)'")


def plain(message: str, options: Iterable[str]) -> str:
    """Return `message` in one line; if an option is unknown, with the nearest of `options`."""
    if found := UNKNOWN.search(message):
        if found[1] == "":
            return f"{found[2]!r} is not an option. Write --name=value; --help lists them."
        given = found[2] or f"{found[3]}.{found[4]}"
        near = get_close_matches(f"--{given}", list(options), n=1)
        return f"there is no option {given}. {f'Did you mean {near[0]}? ' if near else ''}--help lists them all."
    lines = (line.strip(" -") for line in message.splitlines())
    kept = [line for line in lines if not NOISE.search(line)]
    asks = any(re.search("Expected a(?!.*Got value)|Import path", line) for line in kept)
    if not asks or re.search("Given value: (NestedArg|Namespace)", message):
        kept = [line for line in kept if not line.startswith("Given value: ")]
    text = " ".join(dict.fromkeys(kept))
    for pattern, replacement in WORDING:
        text = re.sub(pattern, replacement, text)
    return text
