"""Runs a piece of work again and again, and stops it at another call of the system each time.

    LD_PRELOAD=stops.so python driver.py VICTIM ACT FOLDER [EVERY]

A victim is a class of `victims.py`. For n = 1, 1 + EVERY, ... a child process does the work in a
fresh folder and is stopped at its n-th call that changes something there (see `stops.c`). Then
another child, which nothing stops, checks what is there, does the work again and checks that, too.
It ends when a child has done its work without being stopped. Printed, as JSON: the number of points
that were visited, and what went wrong.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from chaos import victims

from phicore.errors import PhicoreError

ACTS = {"kill": 1, "half": 2, "full": 3, "readonly": 4}
DONE, TOLD, FAULT = 0, 3, 4
MOST = 5000


def child(work: Callable[[], None], told: Path) -> int:
    """Do work in another process; return its exit status, or minus the signal that ended it.

    Args:
        told: Gets the message of an error.
    """
    process = os.fork()
    if process == 0:
        try:
            work()
            os._exit(DONE)
        except PhicoreError as error:
            told.write_text(str(error))
            os._exit(TOLD)
        except BaseException:  # noqa: BLE001 - whatever it is, the parent must hear of it
            told.write_text(traceback.format_exc())
            os._exit(FAULT)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def visit(victim: victims.Victim, act: str, home: Path, every: int) -> dict[str, object]:
    """Visit all points of a victim's work."""
    library = ctypes.CDLL(None)
    folder, told, mark = home / "work", home / "told", home / "reached"
    wrong: list[str] = []
    for n in range(1, MOST, every):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        told.write_text("")
        mark.write_text("yes")  # a child that is killed does not change it
        victim.begin(folder)

        def stopped(n: int = n) -> None:
            library.chaos_arm(str(folder).encode(), ACTS[act], ctypes.c_long(n))
            try:
                victim.work(folder)
            finally:
                reached = library.chaos_count() >= n
                library.chaos_arm(b"", 0, ctypes.c_long(0))
                mark.write_text("yes" if reached else "")

        status = child(stopped, told)
        about = told.read_text()
        if status == FAULT or (status == TOLD and (act in ("kill", "half") or "\n" in about)):
            wrong.append(f"{n}: {about}")
        told.write_text("")

        def after(is_done: bool = status == DONE) -> None:
            victim.check(folder, is_done=is_done and act in ("kill", "half"))
            victim.work(folder)
            victim.check(folder, is_done=True)

        if child(after, told) != DONE:
            wrong.append(f"after {n} ({act}, {status}): {told.read_text()}")
        if not mark.read_text():
            return {"points": n - 1, "wrong": wrong}
        if len(wrong) > 3:
            break
    return {"points": n, "wrong": wrong or ["there are more points"]}


if __name__ == "__main__":
    name, act, folder, *every = sys.argv[1:]
    home = Path(folder)
    found = visit(getattr(victims, name)(home), act, home, int(every[0]) if every else 1)
    print(json.dumps(found))
