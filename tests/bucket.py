"""A bucket on this machine, for TensorFlow's own gs:// client.

The client has no setting for another server, but it honours https_proxy and CURL_CA_BUNDLE. The
server is that proxy: it answers CONNECT, ends TLS with a certificate of its own, and speaks the
part of the JSON API of Google Cloud Storage that TensorFlow uses. Faults can be injected.
"""

import contextlib
import datetime
import http.server
import json
import os
import pathlib
import re
import shutil
import socket
import socketserver
import ssl
import subprocess
import threading
import time
import urllib.parse
from collections import Counter
from dataclasses import dataclass

import pytest

TESTS = pathlib.Path(__file__).resolve().parent
HOSTS = ("storage.googleapis.com", "www.googleapis.com", "oauth2.googleapis.com")
# Buckets that do not exist, or that the user may not use, with the status of each answer.
REFUSED = {"missing": 404, "forbidden": 403}
# The service's largest number of names in an answer.
PAGE_SIZE = 1000
# The service accepts about one write per second to an object.
SECONDS_BETWEEN_WRITES = 1.0


@dataclass(frozen=True)
class Object:
    """A version of an object; objects are replaced as a whole."""

    content: bytes
    generation: int
    updated: float

    def describe(self):
        """Returns the metadata that TensorFlow asks for."""
        moment = datetime.datetime.fromtimestamp(self.updated, datetime.UTC)
        return {
            "size": str(len(self.content)),
            "generation": str(self.generation),
            "updated": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        }


@dataclass(frozen=True)
class Request:
    """A request as the bucket saw it.

    Attributes:
      kind: "write", "delete", "read", "stat", "list", "begin" (of an upload), "poll" (the state of
        an upload), "copy", "compose", "failed" (answered by 503), or "refused".
      name: BUCKET/OBJECT, or BUCKET/PREFIX for "list".
      status: HTTP status of the answer.
      num_bytes: size of a write.
    """

    kind: str
    name: str
    status: int
    num_bytes: int = 0

    @property
    def is_change(self):
        """Returns whether the request changed an object."""
        return self.kind in ("write", "delete", "copy", "compose") and self.status < 300


class Bucket:
    """Buckets of all names, on a free port of 127.0.0.1, with injected faults.

    Args:
      folder: folder for the certificate.

    Attributes:
      objects: objects by BUCKET/OBJECT.
      requests: all requests so far, in order.
      latency: seconds before each answer.
      page_size: largest number of names in the answer to a listing.
      limits_writes: whether a second write to an object within a second is answered by 429.
      num_errors: number of following requests that are answered by 503.
      changes_left: number of changes after which all requests fail, as if the process that makes
        them had died; None for no limit.
      before_read: called with the name and the offset before a read.
      before_list: called with BUCKET/PREFIX before a listing.
      after_change: called with the name after each change of an object.
    """

    def __init__(self, folder):
        self.objects = {}
        self.requests = []
        self.reset_faults()
        self._generation = 0
        self._last_writes = {}
        self._uploads = {}
        self._lock = threading.RLock()
        self._certificate = create_certificate(folder)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._certificate)
        handler = type("Handler", (_Handler,), {"bucket": self, "tls": context})
        self._server = _Server(("127.0.0.1", 0), handler)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def reset_faults(self):
        """Ends all faults."""
        self.latency = 0.0
        self.page_size = PAGE_SIZE
        self.limits_writes = False
        self.num_errors = 0
        self.changes_left = None
        self.before_read = lambda name, offset: None
        self.before_list = lambda prefix: None
        self.after_change = lambda name: None
        self._outage_ends = 0.0

    def close(self):
        """Stops the server."""
        self._server.shutdown()
        self._server.server_close()

    @property
    def environment(self):
        """Variables with which TensorFlow's client uses this bucket; set them before its import.

        The retries of the client take tenths of a second instead of minutes, and a read does not
        begin by clearing a buffer of 64 MB.
        """
        return {
            "https_proxy": f"http://127.0.0.1:{self._server.server_address[1]}",
            "no_proxy": "",
            "CURL_CA_BUNDLE": str(self._certificate),
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            "NO_GCE_CHECK": "true",
            "GCS_READAHEAD_BUFFER_SIZE_BYTES": str(2**20),
            "GCS_RETRY_CONFIG_INIT_DELAY_TIME_US": "20000",
            "GCS_RETRY_CONFIG_MAX_DELAY_TIME_US": "200000",
            "GCS_RETRY_CONFIG_MAX_RETRIES": "8",
        }

    def begin_outage(self, seconds):
        """Drops every connection for some seconds."""
        self._outage_ends = time.monotonic() + seconds

    def end_outage(self):
        """Answers again."""
        self._outage_ends = 0.0

    @property
    def is_out(self):
        """Returns whether connections are dropped at present."""
        is_dead = self.changes_left is not None and self.changes_left <= 0
        return is_dead or time.monotonic() < self._outage_ends

    def read(self, name):
        """Returns the content of BUCKET/OBJECT."""
        return self.objects[name].content

    def names(self, prefix=""):
        """Returns the sorted names that begin with BUCKET/PREFIX."""
        with self._lock:
            return sorted(name for name in self.objects if name.startswith(prefix))

    def files(self, prefix):
        """Returns the contents by name, without the prefix; markers of folders are left out."""
        return {
            name.removeprefix(prefix): self.read(name)
            for name in self.names(prefix)
            if not name.endswith("/")
        }

    def count(self, first=0):
        """Returns the number of requests of each kind, from the given one on."""
        return Counter(request.kind for request in self.requests[first:])

    def changes(self, first=0):
        """Returns the kind and the object's name, without folders, of each change."""
        changed = [request for request in self.requests[first:] if request.is_change]
        return [(request.kind, request.name.rpartition("/")[2]) for request in changed]

    def put(self, name, content):
        """Creates or replaces an object."""
        with self._lock:
            self._generation += 1
            self.objects[name] = Object(content, self._generation, time.time())
            self._changed(name)

    def delete(self, name):
        """Deletes an object."""
        with self._lock:
            del self.objects[name]
            self._changed(name)

    def _changed(self, name):
        if self.changes_left is not None:
            self.changes_left -= 1
        self.after_change(name)

    def copy_folder(self, source, target):
        """Copies all objects from BUCKET/PREFIX to another."""
        for name, content in self.files(source).items():
            self.put(target + name, content)

    # --- The answers to requests, each with its kind, name, status and content.

    def answer(self, method, host, target, headers, body):
        """Returns (status, headers, content) of the answer to a request."""
        with self._lock:
            if self.num_errors:
                self.num_errors -= 1
                self.requests.append(Request("failed", target, 503))
                return 503, {}, b""
            kind, name, status, more, content = self._route(method, host, target, headers, body)
            size = len(body) if kind in ("write", "compose") else 0
            self.requests.append(Request(kind, name, status, size))
        return status, more, content

    def _route(self, method, host, target, headers, body):
        url = urllib.parse.urlsplit(target)
        query = {key: values[0] for key, values in urllib.parse.parse_qs(url.query).items()}
        if host.startswith("storage."):
            name = urllib.parse.unquote(url.path[1:])
            refused = REFUSED.get(name.partition("/")[0])
            return ("refused", name, refused, {}, b"") if refused else self._read(name, headers)
        found = re.fullmatch(
            r"(/upload)?/storage/v1/b/([^/]+)(?:/(o|storageLayout)(/.*)?)?", url.path
        )
        if not found:
            return "unknown", target, 404, {}, b""
        upload, bucket, collection, place = found.groups()
        if bucket in REFUSED:
            return "refused", bucket, REFUSED[bucket], {}, b""
        if upload:
            return self._upload(method, bucket, query, headers, body)
        if collection != "o":
            return "stat", bucket, 200, {}, b"{}"
        if not place:
            return self._list(bucket, query)
        parts = [urllib.parse.unquote(part) for part in place[1:].split("/")]
        name = f"{bucket}/{parts[0]}"
        if len(parts) > 1 and parts[1] == "rewriteTo":
            return self._copy(name, f"{parts[3]}/{parts[5]}")
        if len(parts) > 1 and parts[1] == "compose":
            return self._compose(bucket, name, body)
        if name not in self.objects:
            return ("delete" if method == "DELETE" else "stat"), name, 404, {}, b""
        if method == "DELETE":
            self.delete(name)
            return "delete", name, 204, {}, b""
        return "stat", name, 200, {}, json.dumps(self.objects[name].describe()).encode()

    def _read(self, name, headers):
        if name not in self.objects:
            return "read", name, 404, {}, b""
        first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", headers["Range"]).groups())
        self.before_read(name, first)
        content = self.objects[name].content
        if first >= len(content):
            return "read", name, 416, {}, b""
        return "read", name, 206, {}, content[first : last + 1]

    def _list(self, bucket, query):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        full = f"{bucket}/{prefix}"
        self.before_list(full)
        # Names, and whether they are those of folders.
        entries = set()
        for name in self.names(full):
            head, found, _ = name[len(full) :].partition(delimiter) if delimiter else ("", "", "")
            entries.add((prefix + head + found if found else name[len(bucket) + 1 :], bool(found)))
        first = int(query.get("pageToken", 0))
        last = first + min(int(query.get("maxResults", PAGE_SIZE)), self.page_size)
        page = sorted(entries)[first:last]
        found = {
            "items": [{"name": name} for name, is_folder in page if not is_folder],
            "prefixes": [name for name, is_folder in page if is_folder],
            "nextPageToken": str(last) if last < len(entries) else "",
        }
        found = {key: value for key, value in found.items() if value}
        return "list", full, 200, {}, json.dumps(found).encode()

    def _upload(self, method, bucket, query, headers, body):
        if method == "POST":
            name = f"{bucket}/{query['name']}"
            if query["uploadType"] == "media":
                if query.get("ifGenerationMatch") == "0" and name in self.objects:
                    return "write", name, 412, {}, b""
                self.put(name, body)
                return "write", name, 200, {}, b"{}"
            upload = str(len(self._uploads))
            self._uploads[upload] = (name, b"")
            place = f"https://www.googleapis.com/upload/storage/v1/b/{bucket}/o?upload={upload}"
            return "begin", name, 200, {"Location": place}, b""
        name, received = self._uploads[query["upload"]]
        span = headers.get("Content-Range", "bytes 0-0/0")
        if span.startswith("bytes */"):
            if received is None:
                return "poll", name, 200, {}, b"{}"
            so_far = {"Range": f"bytes=0-{len(received) - 1}"} if received else {}
            return "poll", name, 308, so_far, b""
        now = time.monotonic()
        if self.limits_writes and now - self._last_writes.get(name, -9) < SECONDS_BETWEEN_WRITES:
            return "write", name, 429, {}, b'{"error": "rateLimitExceeded"}'
        self._last_writes[name] = now
        self._uploads[query["upload"]] = (name, None)
        self.put(name, received + body)
        return "write", name, 200, {}, b"{}"

    def _copy(self, source, target):
        if source not in self.objects:
            return "copy", target, 404, {}, b""
        self.put(target, self.objects[source].content)
        return "copy", target, 200, {}, b'{"done": true}'

    def _compose(self, bucket, name, body):
        sources = json.loads(body.decode().replace("'", '"'))["sourceObjects"]
        for source in sources:
            found = self.objects.get(f"{bucket}/{source['name']}")
            expected = source.get("objectPrecondition", {}).get("ifGenerationMatch")
            if found is None or (expected and int(expected) != found.generation):
                return "compose", name, 412, {}, b""
        content = b"".join(self.read(f"{bucket}/{source['name']}") for source in sources)
        self.put(name, content)
        return "compose", name, 200, {}, b"{}"


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def handle_error(self, request, client_address):
        """A client that is killed, or that an outage cuts off, is no error of the server."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Otherwise each answer waits 40 ms for the client's acknowledgement.
    disable_nagle_algorithm = True
    bucket: Bucket
    tls: ssl.SSLContext
    host = ""

    def log_message(self, *_):
        """Prints nothing."""

    def do_CONNECT(self):
        if self.bucket.is_out:
            self._drop()
            return
        self.host = self.path.partition(":")[0]
        self.send_response(200)
        self.end_headers()
        self.request = self.tls.wrap_socket(self.connection, server_side=True)
        self.setup()
        self.close_connection = False

    def finish(self):
        with contextlib.suppress(OSError):
            super().finish()
        self.request.close()

    def _answer(self):
        body = self._read_body()
        time.sleep(self.bucket.latency)
        if self.bucket.is_out:
            self._drop()
            return
        status, more, content = self.bucket.answer(
            self.command, self.host, self.path, self.headers, body
        )
        self.send_response(status)
        for name, value in more.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _read_body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    do_GET = do_PUT = do_POST = do_DELETE = _answer

    def _drop(self):
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


def create_certificate(folder):
    """Creates a certificate for the hosts of the service, with its key in the same file."""
    if not shutil.which("openssl"):
        pytest.skip("the bucket needs openssl")
    path = os.path.join(folder, "certificate.pem")
    names = ",".join(f"DNS:{host}" for host in HOSTS)
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
        + ["-subj", "/CN=bucket on loopback", "-addext", f"subjectAltName={names}"]
        + ["-keyout", path + ".key", "-out", path],
        check=True,
        capture_output=True,
    )
    with open(path + ".key") as key, open(path, "a") as certificate:
        certificate.write(key.read())
    return path
