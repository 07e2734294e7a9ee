"""``fewstep VERB …``: parse, dispatch, and turn a user's mistake into one message and exit code 2.

Help is built from light dataclasses, so that it imports neither torch nor numpy; a verb's work is imported when it runs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from fewstep.cli.verbs import VERBS
from fewstep.errors import UserError, unknown

USAGE_ERROR = 2


def usage() -> str:
    """What ``fewstep --help`` prints."""
    width = max(map(len, VERBS))
    lines = [f"  {name.ljust(width)}  {verb.summary}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "usage: fewstep VERB [options]        fewstep VERB --help",
            "",
            "Fast generation with flow matching: train a teacher, straighten it, distil it, measure what it cost.",
            "",
            *lines,
            "",
            "Start with:  fewstep demo",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return dispatch(arguments)
    except UserError as error:
        print(f"fewstep: {error}", file=sys.stderr)
        return USAGE_ERROR
    except BrokenPipeError:  # the reader of a pipe went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("fewstep: interrupted; the same command goes on from the last checkpoint.", file=sys.stderr)
        return 130


def dispatch(arguments: list[str]) -> int:
    """Find the verb and run it."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else USAGE_ERROR
    if arguments[0] == "--version":
        from fewstep import __version__

        print(__version__)
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in VERBS:
        raise unknown("verb", name, VERBS)
    import tyro

    verb = VERBS[name]
    # ``--steps`` and ``--grid`` may begin with a digit or hold commas; tyro takes them as plain words
    options = tyro.cli(verb.arguments, args=rest, prog=f"fewstep {name}", description=verb.description())
    return verb.run(options)


if __name__ == "__main__":
    sys.exit(main())
