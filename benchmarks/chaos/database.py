"""A PostgreSQL server that the faults can kill and start again."""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError

from service.database import engine as db
from service.local_stack.child_process import die_with_parent
from service.operations import migrations


class Database:
    """A PostgreSQL server with the newest schema; the constructor starts it."""

    def __init__(self, folder: Path, port: int, *, fsync: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.url = make_url(f"postgresql+psycopg://postgres@127.0.0.1:{port}/postgres")
        with db.start_embedded(folder) as server:
            self._user = server.system_user
            self._data = server.pgdata
            binary = server.bin_path / "postgres"
        # The embedded server only creates the cluster. The faults need a server with this parent.
        self._command = [
            *(str(binary), "-D", str(self._data), "-k", str(self._data)),
            *("-h", "127.0.0.1", "-p", str(port), "-c", f"fsync={'on' if fsync else 'off'}"),
        ]
        self._log = folder / "postgres.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.start()
        migrations.upgrade_database(self.url)

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        self._spawn_server()
        self.wait_ready()

    def _spawn_server(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=log,
                user=self._user,
                start_new_session=True,
                preexec_fn=die_with_parent,  # noqa: PLW1509 - a single C call
            )

    def wait_ready(self, seconds: float = 60.0) -> None:
        """Wait until the server answers; start it again if it exits, as systemd and compose do.

        A new server exits as long as a process of the old server still runs.
        """
        engine = create_engine(self.url, connect_args={"connect_timeout": 2})
        deadline = time.monotonic() + seconds
        while True:
            if not self.is_running:
                self._spawn_server()
            try:
                with engine.connect() as connection:
                    connection.execute(text("SELECT 1"))
                break
            except OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        engine.dispose()

    def kill(self) -> None:
        """Kill every process at once, like a power cut that leaves the disk intact."""
        assert self._process is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            postmaster = psutil.Process(self._process.pid)
            postmaster.suspend()  # it must not start processes between the list and the kill
            family = postmaster.children(recursive=True)
            for process in [postmaster, *family]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    os.kill(process.pid, signal.SIGKILL)
            psutil.wait_procs(family, timeout=10)
        self._process.wait(10)

    def stop(self) -> None:
        if self._process is None or not self.is_running:
            return
        self._process.send_signal(signal.SIGINT)  # PostgreSQL's fast shutdown
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()
