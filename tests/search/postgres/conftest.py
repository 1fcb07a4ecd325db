"""A PostgreSQL server of the tests' own, on loopback, with pgvector."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("psycopg")
pytest.importorskip("pgvector")


def _programs() -> Path | None:
    """The folder with initdb and postgres, of the newest server that has pgvector."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda bin_: int(bin_.parent.name), reverse=True)
    if on_path := shutil.which("initdb"):
        folders.append(Path(on_path).parent)
    for folder in folders:
        control = Path("/usr/share/postgresql") / folder.parent.name / "extension" / "vector.control"
        if (folder / "postgres").exists() and (control.exists() or not folder.is_relative_to("/usr/lib/postgresql")):
            return folder
    return None


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a running server's empty database; password "pass word"."""
    programs = _programs()
    if programs is None:
        pytest.skip("no PostgreSQL with pgvector here (Debian: apt-get install postgresql-17-pgvector)")
    folder = tmp_path_factory.mktemp("postgres")
    user: dict[str, Any] = {}
    if os.getuid() == 0:  # a server refuses to run as root
        account = pwd.getpwnam("postgres")
        user = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        for parent in (folder, *list(folder.parents)[:3]):
            if parent.stat().st_uid == 0 and parent != Path("/tmp"):
                parent.chmod(0o711)
        os.chown(folder, account.pw_uid, account.pw_gid)
    (secret := folder / "secret").write_text("pass word")
    if user:
        os.chown(secret, user["user"], user["group"])
    data, port = folder / "data", free_port()
    made = [str(programs / "initdb"), "-D", str(data), "-U", "cloob", "-A", "scram-sha-256", f"--pwfile={secret}"]
    subprocess.run([*made, "-E", "UTF8", "--no-locale", "--no-sync"], check=True, capture_output=True, cwd="/", **user)
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off"
    control = [str(programs / "pg_ctl"), "-D", str(data), "-w"]
    log = ["-l", str(folder / "log")]
    subprocess.run([*control, *log, "-o", options, "start"], check=True, capture_output=True, cwd="/", **user)
    try:
        yield f"postgresql://cloob:pass%20word@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], check=False, capture_output=True, cwd="/", **user)


@pytest.fixture
def address(postgres: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a schema of the test's own."""
    import psycopg

    schema = f"test_{abs(hash(request.node.nodeid)) % 10**12}"
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {schema}".encode())
    yield f"{postgres}?options=-csearch_path%3D{schema},public"
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute(f"DROP SCHEMA {schema} CASCADE".encode())
