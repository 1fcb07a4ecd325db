"""A PostgreSQL server on loopback with pgvector, for as long as this process lives."""

from __future__ import annotations

import atexit
import os
import pwd
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any


def programs() -> Path | None:
    """The folder with initdb, of the newest server on this machine that has pgvector."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name), reverse=True)
    for folder in folders:
        if (Path("/usr/share/postgresql") / folder.parent.name / "extension" / "vector.control").exists():
            return folder
    found = shutil.which("initdb")
    return Path(found).parent if found else None


def start(folder: Path) -> str:
    """Starts a server with its own defaults, and ends it when this process ends.

    Returns:
        The address of an empty database.
    """
    home = programs()
    if home is None:
        raise RuntimeError("no PostgreSQL with pgvector here (Debian: apt-get install postgresql-17-pgvector)")
    folder.mkdir(parents=True)
    user: dict[str, Any] = {}
    if os.getuid() == 0:  # a server refuses to run as root
        account = pwd.getpwnam("postgres")
        user = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        os.chown(folder, account.pw_uid, account.pw_gid)
        for parent in folder.parents:
            if parent.stat().st_mode & 0o077 == 0:
                parent.chmod(0o711)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    data = str(folder / "data")
    made = [str(home / "initdb"), "-D", data, "-U", "cloob", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync"]
    subprocess.run(made, check=True, capture_output=True, cwd="/", **user)
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories=''"
    control = [str(home / "pg_ctl"), "-D", data, "-w"]
    log = ["-l", str(folder / "log")]
    subprocess.run([*control, *log, "-o", options, "start"], check=True, capture_output=True, cwd="/", **user)
    stop = [*control, "-m", "immediate", "stop"]
    atexit.register(lambda: subprocess.run(stop, check=False, capture_output=True, cwd="/", **user))
    return f"postgresql://cloob@127.0.0.1:{port}/postgres"
