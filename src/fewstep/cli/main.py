"""``fewstep VERB …``: parses the arguments, runs the verb, and turns a UserError into a message and exit code 2.

Help is built from dataclasses and imports neither torch nor numpy; the function of a verb is imported when it runs.
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
    """The text of ``fewstep --help``."""
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
    """Run the command line.

    Args:
        argv: the arguments; those of the process when not given.

    Returns:
        0, or 2 after a user's mistake, 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # characters that the terminal cannot show are replaced
            stream.reconfigure(errors="replace")
    try:
        return dispatch(arguments)
    except UserError as error:
        print(f"fewstep: {error}", file=sys.stderr)
        return USAGE_ERROR
    except SystemExit as exit_:  # tyro showed help or refused the arguments
        return exit_.code if isinstance(exit_.code, int) else USAGE_ERROR
    except BrokenPipeError:  # the process that reads the output has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        resumes = arguments and arguments[0] in RESUMABLE
        advice = "; the same command continues from the last checkpoint" if resumes else ""
        print(f"\nfewstep: interrupted{advice}.", file=sys.stderr)
        return INTERRUPTED


def dispatch(arguments: list[str]) -> int:
    """Find the verb, parse its options and run it; return the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else USAGE_ERROR
    if arguments[0] == "help":  # also help VERB
        return dispatch([*arguments[1:2], "--help"])
    if arguments[0] == "--version":
        from fewstep import __version__

        print(__version__)
        return 0
    name, rest = arguments[0], arguments[1:]
    if name.startswith("-") and name not in VERBS:
        raise UserError(
            f"{name!r} stands before the verb: {suggestion(name, ['--help', '--version'])}A verb comes first, then "
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
