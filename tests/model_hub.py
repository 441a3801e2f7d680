"""A small model hub on this machine: what `huggingface_hub` asks of one, answered over HTTP out of directories."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve_hub(models):
    """Serve `models` (id -> directory); yields the address and the list of files that were fetched so far."""
    fetched = []

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body):
            path = unquote(urlsplit(self.path).path)
            for name, folder in models.items():
                files = sorted(p for p in Path(folder).iterdir() if p.is_file())
                if path.startswith(f"/api/models/{name}/tree/"):
                    listed = [
                        {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": checksum(p)} for p in files
                    ]
                    return self.send(json.dumps(listed).encode(), body, {"Content-Type": "application/json"})
                if path.startswith(f"/api/models/{name}"):
                    facts = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": p.name} for p in files]}
                    return self.send(json.dumps(facts).encode(), body, {"Content-Type": "application/json"})
                if path.startswith(f"/{name}/resolve/"):
                    file = Path(folder) / path.rpartition("/")[2]
                    if not file.is_file():
                        return self.send(b"", body, {"X-Error-Code": "EntryNotFound"}, 404)
                    if body:
                        fetched.append(f"{name}/{file.name}")
                    return self.send(file.read_bytes(), body, {"ETag": f'"{checksum(file)}"', "X-Repo-Commit": COMMIT})
            return self.send(b"", body, {"X-Error-Code": "RepoNotFound"}, 404)

        def send(self, content, body, headers, status=200):
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fetched
    finally:
        server.shutdown()
        server.server_close()


def checksum(file):
    return hashlib.sha1(file.read_bytes()).hexdigest()
