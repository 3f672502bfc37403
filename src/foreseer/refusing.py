"""Errors on the command line: one paragraph each, and no traceback unless it is asked for."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from foreseer.errors import ForeseerError

PACKAGE = str(Path(__file__).parent)
INTERRUPTED = 130  # 128 + SIGINT, as shells count
RESUMING = ("record", "search", "bench", "merge", "demo", "distill")


def is_told(error: BaseException) -> bool:
    """Whether an error is one of this package's sentences, to be read without its traceback."""
    if isinstance(error, ForeseerError):
        return True
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    raised_here = place is not None and place.tb_frame.f_code.co_filename.startswith(PACKAGE)
    return raised_here and isinstance(error, ValueError | OSError)


def told_in(error: BaseException) -> BaseException | None:
    """Of an error and what caused it, the first one that is told; parsers wrap ours into theirs."""
    found: BaseException | None = error
    while found is not None and not is_told(found):
        found = found.__cause__
    return found


@contextmanager
def refusing(command: str, resumes: bool, debug: bool) -> Iterator[None]:
    """Turn what is refused, and an interruption, into the end of the program.

    Args:
        command: its name, as typed.
        resumes: whether the same command goes on after an interruption.
        debug: let errors through as they are.

    Raises:
        SystemExit: with the paragraph, which Python prints on stderr and exits with code 1; with
            code 130 after Ctrl-C.
    """
    try:
        yield
    except KeyboardInterrupt:
        stop_interrupted(command, resumes)
    except SystemExit as stop:
        if not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning has it ignored
        stop_interrupted(command, resumes)
    except Exception as error:
        told = told_in(error)
        if debug or told is None:
            raise
        text = " ".join(str(told).split())
        raise SystemExit(f"foreseer {command}: {text}") from None


def stop_interrupted(command: str, resumes: bool) -> None:
    """Say in one line how to go on, and end.

    Raises:
        SystemExit: with code 130.
    """
    kept = "what is finished is kept, and the same command goes on from there"
    told = kept if resumes else "nothing was finished; the same command starts anew"
    print(f"\nforeseer {command}: interrupted; {told}.", file=sys.stderr, flush=True)
    raise SystemExit(INTERRUPTED) from None
