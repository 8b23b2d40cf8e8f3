"""The servers that clients/test-servers.ts starts: two real ones that a test may kill, and one with TLS and tokens."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]


class Servers:
    def __init__(self) -> None:
        node = ROOT / "node_modules/.bin/node"
        self._process = subprocess.Popen(
            [str(node) if node.exists() else shutil.which("node") or "node", "clients/test-servers.ts"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        ready = self._answer()
        self.targets: list[str] = ready["targets"]
        self.secure: dict[str, str] = ready["secure"]
        atexit.register(self.close)

    def do(self, command: str) -> None:
        assert self._process.stdin is not None
        print(command, file=self._process.stdin, flush=True)
        self._answer()

    def close(self) -> None:
        self._process.communicate()

    def _answer(self) -> Any:  # noqa: ANN401
        """The next line of JSON; what else is printed on the way is for people."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError("the servers for the tests do not start: has `npm ci` been run?")


@functools.cache
def servers() -> Servers:
    """Start them once for all tests."""
    return Servers()
