"""Real servers of a shared tier, started for the tests and the benchmarks: Redis, S3 (moto) and Azure (azurite).

Each runs in a process of its own on a free port of this machine, keeps nothing on disk that outlives it, and can be
stopped (SIGSTOP), continued, and started again empty on the same port.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import email.utils
import hashlib
import hmac
import importlib.util
import ipaddress
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

_START_SECONDS = 60.0
_HOST = "127.0.0.1"


class Server:
    """A server process on a free port, in a `with` block.

    Attributes:
        port: where it listens, from the first start on.
    """

    def __init__(self) -> None:
        self.port = 0
        self._folder = tempfile.TemporaryDirectory(prefix="kalm-rag-server-")
        self.folder = Path(self._folder.name)
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def missing(cls) -> str:
        """What has to be installed, or an empty text."""
        raise NotImplementedError

    def command(self) -> list[str]:
        """The command line, for the current port."""
        raise NotImplementedError

    def start(self) -> None:
        """Start and wait until it answers; on another port if somebody else took the first."""
        deadline = time.monotonic() + _START_SECONDS
        while True:
            self.port = self.port or free_port()
            with (self.folder / "log").open("ab") as log:
                self._process = subprocess.Popen(self.command(), stdout=log, stderr=log, cwd=self.folder)
            while self._process.poll() is None:
                with contextlib.suppress(OSError):
                    self._ask()
                    return
                if time.monotonic() > deadline:
                    self.stop()
                    break
                time.sleep(0.02)
            if time.monotonic() > deadline:
                msg = f"{type(self).__name__} does not start: {(self.folder / 'log').read_text()[-2000:]}"
                raise RuntimeError(msg)
            self.port = 0

    def _ask(self) -> None:
        """Raise an `OSError` while it does not answer."""
        socket.create_connection((_HOST, self.port), timeout=1).close()

    def stop(self) -> None:
        """End the process, whatever state it is in."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart(self) -> None:
        """End it and start it again on the same port, empty."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Stop it with SIGSTOP: the system still accepts connections for it, and nothing answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it continue."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def __enter__(self) -> Any:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._folder.cleanup()


class RedisServer(Server):
    """Debian's `redis-server`, without persistence.

    Args:
        password: of the default user; None asks for none.
        certificate: speak TLS with this certificate and key.
        maxmemory: bytes; a full server refuses writes instead of evicting.
    """

    def __init__(
        self, *, password: str | None = None, certificate: tuple[Path, Path] | None = None, maxmemory: int | None = None
    ) -> None:
        super().__init__()
        self._password, self._certificate, self._maxmemory = password, certificate, maxmemory

    @classmethod
    def missing(cls) -> str:
        if shutil.which("redis-server") is None:
            return "redis-server is not installed (Debian and Ubuntu: apt-get install redis-server)"
        return "" if importlib.util.find_spec("redis") else "the extra redis is not installed"

    def command(self) -> list[str]:
        options: dict[str, Any] = {"bind": _HOST, "save": "", "appendonly": "no", "dir": self.folder}
        if self._certificate is None:
            options["port"] = self.port
        else:
            certificate, key = self._certificate
            options |= {"port": 0, "tls-port": self.port, "tls-auth-clients": "no"}
            options |= {"tls-cert-file": certificate, "tls-key-file": key, "tls-ca-cert-file": certificate}
        if self._password is not None:
            options["requirepass"] = self._password
        if self._maxmemory is not None:
            options |= {"maxmemory": self._maxmemory, "maxmemory-policy": "noeviction"}
        return ["redis-server", *(part for name, value in options.items() for part in (f"--{name}", str(value)))]

    @property
    def url(self) -> str:
        """Its URL, without a password."""
        return f"redis{'s' if self._certificate else ''}://{_HOST}:{self.port}/0"

    def client(self) -> Any:
        """A client of its own, for what a test sees or damages on the server."""
        import redis

        options = {"ssl": True, "ssl_cert_reqs": "none"} if self._certificate else {}
        return redis.Redis(host=_HOST, port=self.port, password=self._password, **options)

    def empty(self) -> None:
        """Delete everything, and what was counted."""
        with self.client() as client:
            client.flushall()
            client.config_resetstat()


class S3Server(Server):
    """Moto's S3, which ends each connection after one answer. It checks no credentials unless told to."""

    @classmethod
    def missing(cls) -> str:
        for package, name in (("moto", "moto[server]"), ("flask", "moto[server]"), ("obstore", "the extra objects")):
            if importlib.util.find_spec(package) is None:
                return f"{name} is not installed"
        return ""

    def command(self) -> list[str]:
        code = f"from moto.server import main; main(['-H', '{_HOST}', '-p', '{self.port}'])"
        return [sys.executable, "-c", code]

    def _ask(self) -> None:
        self._post("moto-api/data.json", None)

    @property
    def endpoint(self) -> str:
        """What `AWS_ENDPOINT_URL` must say."""
        return f"http://{_HOST}:{self.port}"

    def environment(self, endpoint: str | None = None) -> dict[str, str]:
        """The environment variables that lead a client here, or to a proxy in front of it."""
        return {
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_ACCESS_KEY_ID": "nobody",
            "AWS_SECRET_ACCESS_KEY": "nothing",
            "AWS_REGION": "us-east-1",
            "NO_PROXY": _HOST,
        }

    def make_bucket(self, name: str) -> None:
        """Make an empty bucket."""
        self._post(name, b"", "PUT")

    def put(self, bucket: str, name: str, data: bytes) -> None:
        """Store an object that is not of kalm-rag."""
        self._post(f"{bucket}/{name}", data, "PUT")

    def empty(self) -> None:
        """Delete every bucket."""
        self._post("moto-api/reset", b"")

    def check_credentials(self, check: bool) -> None:
        """Refuse users that nobody has made, which all are, or stop refusing them."""
        self._post("moto-api/reset-auth", b"0" if check else b"inf")

    def _post(self, path: str, data: bytes | None, method: str | None = None) -> None:
        request = urllib.request.Request(f"{self.endpoint}/{path}", data, {"Content-Type": "text/plain"}, method=method)
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10).read()


class AzureServer(Server):
    """Azurite, Microsoft's emulator of Azure Blob Storage (`npm install --global azurite`)."""

    ACCOUNT = "devstoreaccount1"
    _KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
    """The same in every installation of azurite, which publishes it."""

    @classmethod
    def missing(cls) -> str:
        if shutil.which("azurite-blob") is None:
            return "azurite is not installed (npm install --global azurite)"
        return "" if importlib.util.find_spec("obstore") else "the extra objects is not installed"

    def command(self) -> list[str]:
        place = ["--blobHost", _HOST, "--blobPort", str(self.port), "--location", str(self.folder / "data")]
        return ["azurite-blob", *place, "--silent", "--skipApiVersionCheck", "--disableTelemetry"]

    def stop(self) -> None:
        super().stop()
        shutil.rmtree(self.folder / "data", ignore_errors=True)

    def environment(self) -> dict[str, str]:
        """The environment variables that lead a client here."""
        url = f"http://{_HOST}:{self.port}"
        return {"AZURE_STORAGE_USE_EMULATOR": "true", "AZURITE_BLOB_STORAGE_URL": url, "NO_PROXY": _HOST}

    def make_container(self, name: str) -> None:
        """Make an empty container."""
        version, date = "2021-08-06", email.utils.formatdate(usegmt=True)
        signed = f"PUT\n\n\n\n\n\n\n\n\n\n\n\nx-ms-date:{date}\nx-ms-version:{version}\n"
        signed += f"/{self.ACCOUNT}/{self.ACCOUNT}/{name}\nrestype:container"
        signature = base64.b64encode(hmac.digest(base64.b64decode(self._KEY), signed.encode(), hashlib.sha256)).decode()
        headers = {
            "x-ms-date": date,
            "x-ms-version": version,
            "Authorization": f"SharedKey {self.ACCOUNT}:{signature}",
            "Content-Length": "0",
        }
        url = f"http://{_HOST}:{self.port}/{self.ACCOUNT}/{name}?restype=container"
        request = urllib.request.Request(url, headers=headers, method="PUT")
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10).read()


def free_port() -> int:
    """A port that nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def full_backlog() -> Any:
    """A port whose connections are neither accepted nor refused, as behind a firewall that drops packets."""
    with socket.socket() as listener, contextlib.ExitStack() as held:
        listener.bind((_HOST, 0))
        listener.listen(0)
        for _ in range(4):
            waiting = held.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


def make_certificate(folder: Path, name: str = "server", host: str = _HOST) -> tuple[Path, Path]:
    """A certificate that vouches for itself, and its key, as files.

    Args:
        folder: where to write them.
        name: of the files.
        host: the address for which it is valid.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "kalm-rag test")])
    now = datetime.datetime.now(datetime.timezone.utc)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(host))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    paths = folder / f"{name}.pem", folder / f"{name}.key"
    paths[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    os.chmod(paths[1], 0o600)
    return paths
