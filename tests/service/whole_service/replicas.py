"""Replicas of the API as processes, and a client that sends its requests to all in turn."""

import contextlib
import itertools
import os
import subprocess
import sys
import time

import httpx

from service.client import Client


class Serving:
    """`warmscale serve` in a process of its own."""

    def __init__(self, settings, url, log):
        self.url, self.log = f"http://127.0.0.1:{settings.port}", log
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "service.cli", "serve"],
                env=os.environ
                | {
                    "TZ": "UTC",
                    "WARMSCALE_LEASE_SECONDS": str(settings.lease_seconds),
                    "WARMSCALE_POOL_SIZE": str(settings.pool_size),
                    "WARMSCALE_DATA_ROOTS": "/",
                    "WARMSCALE_DATABASE_URL": url.render_as_string(hide_password=False),
                    "WARMSCALE_HOME": str(settings.home),
                    "WARMSCALE_PORT": str(settings.port),
                },
                stdout=out,
                stderr=out,
            )

    def wait_until_ready(self):
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/readyz").is_success:
                    return self
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def stop(self):
        self.process.kill()
        self.process.wait()


class Balanced(httpx.BaseTransport):
    """A load balancer without sticky sessions: each request goes to the next replica."""

    def __init__(self, urls):
        self._urls, self._inner = itertools.cycle(map(httpx.URL, urls)), httpx.HTTPTransport()
        self.answers = []

    def handle_request(self, request):
        to = next(self._urls)
        request.url = request.url.copy_with(host=to.host, port=to.port)
        response = self._inner.handle_request(request)
        self.answers.append((request.method, request.url.path, response.status_code))
        return response

    def close(self):
        self._inner.close()


@contextlib.contextmanager
def balanced(urls, key, patience_seconds=60.0):
    """A client of all replicas; `client.answers` has method, path and status of each answer."""
    transport = Balanced(urls)
    with Client(urls[0], key, patience_seconds=patience_seconds) as client:
        # The client has no option for a transport.
        client._http.close()
        client._http = httpx.Client(
            base_url=urls[0],
            transport=transport,
            headers={"Authorization": f"Bearer {key}"},
            timeout=30,
        )
        client.answers = transport.answers
        yield client
