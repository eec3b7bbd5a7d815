"""An HTTP server that receives webhooks."""

import base64
import contextlib
import hashlib
import hmac
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Receiver:
    """A server that keeps its requests in `seen` and answers with `answers` in turn, then 204."""

    def __init__(self):
        self.seen, self.answers, self.pause_seconds = [], [], 0.0
        self.may_answer = threading.Event()
        self.may_answer.set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._make_handler())
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/hook"

    def _make_handler(self):
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.seen.append((dict(self.headers), body))
                status = receiver.answers.pop(0) if receiver.answers else 204
                time.sleep(receiver.pause_seconds)
                receiver.may_answer.wait(20)
                with contextlib.suppress(OSError):
                    self.send_response(status)
                    self.send_header("Location", receiver.url)
                    self.send_header("Content-Length", "0")
                    self.end_headers()

            def log_message(self, *_):
                """Print nothing."""

        return Handler

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.may_answer.set()
        self._server.shutdown()
        self._server.server_close()

    def ids(self):
        return [headers["webhook-id"] for headers, _ in self.seen]

    def messages(self):
        return [json.loads(body) for _, body in self.seen]

    def wait_for(self, n, seconds=30):
        deadline = time.monotonic() + seconds
        while len(self.seen) < n:
            assert time.monotonic() < deadline, f"{len(self.seen)} of {n} arrived"
            time.sleep(0.01)


def is_signed(secret, headers, body):
    """Check a signature and the age of its timestamp, as a receiver would."""
    # Written from the specification, not with our own code.
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    key = base64.b64decode(secret.removeprefix("whsec_"))
    mac = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    age = abs(time.time() - int(headers["webhook-timestamp"]))
    return hmac.compare_digest(headers["webhook-signature"], f"v1,{mac}") and age < 300
