"""A local stand-in for the Hugging Face hub. It serves a folder as a dataset repository, with faults on request.

usage: hub.py FOLDER [--repo wikimedia/wikipedia] [--port 0] [--faults error drop stall truncate corrupt ...]

Prints its port. FOLDER holds parquet files and a README.md whose `configs:` YAML names them. A client sets, before it
imports datasets, HF_ENDPOINT=http://127.0.0.1:PORT and HF_HOME=an-empty-folder.

Each download takes the next fault. After the last fault, all downloads succeed:

    ok          no fault
    error       status 500
    limit       status 429: too many requests
    drop        the connection closes half-way
    stall       the connection stays open, but no data comes after half of the file
    truncate    half of the file, passed off as the whole
    corrupt     the right number of bytes, some of them wrong
"""

import argparse
import collections
import hashlib
import http.server
import json
import os
import re
import urllib.parse

SHA = "b04c8d1ceb2f5cd4588862100d08de323dccfbaa"  # any 40 hex digits


class Hub(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder = repo = ""
    commit = SHA  # of every branch
    faults: collections.deque = collections.deque()  # noqa: RUF012
    unanswered = 0  # this many requests about the repository get no answer
    file_status = 200  # of requests for a parquet file
    tree_failures = 0  # this many requests for a folder's files get status 500
    downloads: list = []  # noqa: RUF012  (file, revision) of each request
    begins: list = []  # noqa: RUF012  the first byte that each of them asked for

    def files(self):
        for top, _, names in os.walk(self.folder):
            for name in sorted(names):
                path = os.path.join(top, name)
                yield os.path.relpath(path, self.folder).replace(os.sep, "/"), path

    @staticmethod
    def info(name, path):
        with open(path, "rb") as file:
            data = file.read()
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry = {"type": "file", "path": name, "size": len(data), "oid": oid}
        if name.endswith(".parquet"):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return entry

    def log_message(self, *args):
        pass

    def answer(self, code, body=b"", kind="application/json", headers=(), length=None):
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for key, value in headers:
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value):
        self.answer(200, json.dumps(value).encode())

    def missing(self, what="EntryNotFound"):
        self.answer(404, b'{"error": "not found"}', headers=[("X-Error-Code", what)])

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        if not re.fullmatch(rf"/api/datasets/{self.repo}/paths-info/[^/]+", path):
            return self.missing()
        if "json" in self.headers.get("Content-Type", ""):
            wanted = json.loads(body)["paths"]
        else:
            wanted = urllib.parse.parse_qs(body.decode()).get("paths", [])
        have = dict(self.files())
        found = [self.info(name, have[name]) for name in wanted if name in have]
        found += [
            {"type": "directory", "oid": "0" * 40, "size": 0, "path": name}
            for name in wanted
            if name not in have and any(f.startswith(name.rstrip("/") + "/") for f in have)
        ]
        self.json(found)

    def do_GET(self):
        url = urllib.parse.urlparse(self.path)
        path, query = urllib.parse.unquote(url.path), urllib.parse.parse_qs(url.query)
        have = dict(self.files())
        about = re.fullmatch(rf"/api/datasets/{self.repo}(?:/revision/([^/]+))?", path)
        if about:
            if self.unanswered:
                type(self).unanswered -= 1
                return self.wait_for_the_end()
            if about[1] not in (None, "main", self.commit, SHA):
                return self.missing("RevisionNotFound")
            return self.json(
                {
                    "_id": "x", "id": self.repo, "author": self.repo.split("/")[0],
                    "sha": about[1] if about[1] == SHA else self.commit,
                    "private": False, "gated": False, "disabled": False, "tags": [], "downloads": 1, "likes": 1,
                    "lastModified": "2024-01-09T09:40:51.000Z", "createdAt": "2022-03-02T23:29:22.000Z",
                    "cardData": {}, "siblings": [{"rfilename": name} for name in have],
                }
            )  # fmt: skip
        tree = re.fullmatch(rf"/api/datasets/{self.repo}/tree/[^/]+(?:/(.*))?", path)
        if tree and self.tree_failures:
            type(self).tree_failures -= 1
            return self.answer(500, b'{"error": "Internal Server Error"}')
        if tree:
            return self.tree(have, tree[1] + "/" if tree[1] else "", query)
        blob = re.fullmatch(rf"/datasets/{self.repo}/resolve/([^/]+)/(.*)", path)
        if blob and blob[2] in have:
            return self.blob(blob[1], blob[2], have[blob[2]])
        self.missing()

    def tree(self, have, prefix, query):
        recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
        out, folders = [], set()
        for name, where in have.items():
            if not name.startswith(prefix):
                continue
            parts = name[len(prefix) :].split("/")
            for depth in range(1, len(parts) if recursive else min(2, len(parts))):
                folder = prefix + "/".join(parts[:depth])
                if folder not in folders:
                    folders.add(folder)
                    out.append({"type": "directory", "oid": "0" * 40, "size": 0, "path": folder})
            if len(parts) == 1 or recursive:
                out.append(self.info(name, where))
        return self.json(out) if out else self.missing()

    def blob(self, revision, name, path):
        with open(path, "rb") as file:
            data = file.read()
        entry = self.info(name, path)
        etag = '"%s"' % (entry["lfs"]["oid"] if "lfs" in entry else entry["oid"])
        headers = [
            ("X-Repo-Commit", self.commit if revision == "main" else revision), ("ETag", etag), ("Accept-Ranges", "bytes"),
        ]  # fmt: skip
        if "lfs" in entry:
            headers += [("X-Linked-Size", str(len(data))), ("X-Linked-Etag", etag)]
            # Like the real hub, offer Xet, its newer protocol. A client that uses it fails.
            headers += [("X-Xet-Hash", entry["lfs"]["oid"]), ("X-Xet-Refresh-Route", "/no-xet-here")]
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        first = int(part[1]) if part else 0
        fault = "ok"
        if "lfs" in entry and self.file_status != 200:
            return self.answer(self.file_status, b'{"error": "no"}')
        if self.command == "GET" and "lfs" in entry:
            self.downloads.append((name, revision))
            self.begins.append(first)
            fault = self.faults.popleft() if self.faults else "ok"
        if fault == "limit":
            return self.answer(429, b'{"error": "Too Many Requests"}')
        if fault == "error":
            return self.answer(500, b'{"error": "Internal Server Error"}')
        if fault == "corrupt":
            data = data[: len(data) // 2] + b"\0" * 64 + data[len(data) // 2 + 64 :]
        if fault == "truncate":
            data = data[: len(data) // 2]
        last, code = len(data) - 1, 200
        if part:
            code, last = 206, min(int(part[2]) if part[2] else last, last)
            headers.append(("Content-Range", f"bytes {first}-{last}/{len(data)}"))
        body = data[first : last + 1]
        if fault == "drop":
            self.close_connection = True
            return self.answer(code, body[: len(body) // 2], "application/octet-stream", headers, length=len(body))
        if fault == "stall":
            self.answer(code, body[: len(body) // 2], "application/octet-stream", headers, length=len(body))
            return self.wait_for_the_end()
        self.answer(code, body, "application/octet-stream", headers)

    def wait_for_the_end(self):
        """Send nothing until the client gives up."""
        self.close_connection = True
        self.connection.recv(1)


def serve(folder, repo="wikimedia/wikipedia", port=0, faults=()) -> http.server.ThreadingHTTPServer:
    """A server. Its `RequestHandlerClass` has its faults, downloads and commit."""
    attributes = {"folder": str(folder), "repo": repo, "faults": collections.deque(faults)}
    attributes |= {"downloads": [], "begins": []}
    return http.server.ThreadingHTTPServer(("127.0.0.1", port), type("FolderHub", (Hub,), attributes))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--repo", default="wikimedia/wikipedia")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--faults", nargs="*", default=[])
    args = parser.parse_args()
    server = serve(args.folder, args.repo, args.port, args.faults)
    print(server.server_port, flush=True)
    server.serve_forever()
