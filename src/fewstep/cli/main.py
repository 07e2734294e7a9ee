"""``fewstep VERB …``: parse, dispatch, and turn a user's mistake into one message and exit code 2.

Help is built from light dataclasses, so that it imports neither torch nor numpy; a verb's work is imported
when it runs.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

from fewstep.cli.verbs import VERBS
from fewstep.errors import UserError, suggestion, unknown

USAGE_ERROR = 2
INTERRUPTED = 130
RESUMABLE = ("demo", "run")


def usage() -> str:
    """What ``fewstep --help`` prints."""
    width = max(map(len, VERBS))
    lines = [f"  {name.ljust(width)}  {verb.summary}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "usage: fewstep VERB [options]",
            "",
            "Fast generation with flow matching: train a teacher, straighten it, distil it, compare them.",
            "",
            *lines,
            "",
            "Start with:  fewstep demo",
            "Options:     fewstep VERB --help        Version: fewstep --version",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without Unicode must not end a run
            stream.reconfigure(errors="replace")
    try:
        return dispatch(arguments)
    except UserError as error:
        print(f"fewstep: {error}", file=sys.stderr)
        return USAGE_ERROR
    except SystemExit as leaving:  # help was shown, or the arguments were refused
        return leaving.code if isinstance(leaving.code, int) else USAGE_ERROR
    except BrokenPipeError:  # the reader of a pipe went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        resumes = arguments and arguments[0] in RESUMABLE
        how = "; the same command goes on from the last checkpoint" if resumes else ""
        print(f"\nfewstep: interrupted{how}.", file=sys.stderr)
        return INTERRUPTED


def dispatch(arguments: list[str]) -> int:
    """Find the verb and run it."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else USAGE_ERROR
    if arguments[0] == "help":  # help, help VERB
        return dispatch([*arguments[1:2], "--help"])
    if arguments[0] == "--version":
        from fewstep import __version__

        print(__version__)
        return 0
    name, rest = arguments[0], arguments[1:]
    if name.startswith("-") and name not in VERBS:
        raise UserError(
            f"{name!r} before the verb: {suggestion(name, ['--help', '--version'])}A verb comes first, then "
            f"its options: fewstep VERB [options]. Verbs: {', '.join(VERBS)}."
        )
    if name not in VERBS:
        raise unknown("verb", name, VERBS)
    import tyro

    verb = VERBS[name]
    options = tyro.cli(verb.arguments, args=rest, prog=f"fewstep {name}", description=verb.description())
    return verb.run(options)


if __name__ == "__main__":
    sys.exit(main())
