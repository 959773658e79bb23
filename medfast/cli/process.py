"""How a command ends: its exit code, and the sentence on what was wrong."""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable

from medfast.errors import SharedError, StoppedError, UsageError


def run(command: Callable[[], None], prog: str) -> None:
    """Run a command; end with exit code 2 and one sentence on a mistake of the user's."""
    code = _run(command, prog)
    joined = sys.modules.get("medfast.distributed.processes")
    if joined is not None and joined.has_joined:
        # Threads of torch.distributed may still be about to ask for the interpreter, and a process
        # whose interpreter ends meanwhile is aborted by them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def _run(command: Callable[[], None], prog: str) -> int:
    """Return the exit code of a command, having told what was wrong."""
    try:
        command()
        sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        return 128 + signal.SIGPIPE
    except (SharedError, StoppedError) as error:
        code = 2 if isinstance(error, SharedError) else 128 + signal.SIGTERM
        return _fail(prog, str(error), code) if rank() == 0 else code
    except UsageError as error:
        return _fail(prog, str(error))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "medfast":
            raise
        return _fail(
            prog,
            f"the package {error.name!r} is missing: install what the commands need with "
            "pip install '.[train]' in medfast's checkout.",
        )
    except KeyboardInterrupt:
        return _fail(prog, "stopped by the keyboard.", code=130)
    return 0


def _reader_is_gone() -> bool:
    """Return whether nobody reads the output any more, as after `| head`; then drop the rest."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return False
    # The interpreter flushes once more when it ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def rank() -> int:
    """Return the number of this process among those that torchrun started."""
    return int(os.environ.get("RANK", "0"))


def _fail(prog: str, message: str, code: int = 2) -> int:
    where = f"rank {rank()}: " if rank() else ""
    print(f"{prog}: error: {where}{message}", file=sys.stderr)
    return code
