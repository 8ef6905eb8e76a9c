"""Serves the SavedModel of `bn-keras export` with TensorFlow alone, without bn_keras.

python examples/serve.py served/1        # at http://localhost:8000; a second argument is the port
curl --data-binary @dog.jpg http://localhost:8000
"""

import contextlib
import http.server
import json
import sys

import tensorflow as tf


def make_server(folder: str, port: int) -> http.server.HTTPServer:
    """Returns a server that answers the POST of an image file with its class and probability."""
    classify = tf.saved_model.load(folder).signatures["serving_default"]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = self.headers["Content-Length"] or ""
            image = self.rfile.read(int(length)) if length.isdecimal() else b""
            try:
                found = classify(encoded=tf.constant([image]))
            except tf.errors.InvalidArgumentError:
                self.send_error(400, "not an image that TensorFlow decodes")
                return
            answer = {
                "class": found["class_name"][0].numpy().decode(),
                "probability": float(tf.reduce_max(found["probabilities"])),
            }
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode() + b"\n")

    return http.server.ThreadingHTTPServer(("localhost", port), Handler)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python examples/serve.py FOLDER [PORT]")
    with make_server(sys.argv[1], int((sys.argv[2:] or [8000])[0])) as server:
        print(f"serving at http://localhost:{server.server_port}; Ctrl-C ends", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
