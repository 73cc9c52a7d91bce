# Copyright 2026 The trl_bpo authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""
An in-memory Hugging Face Hub on the loopback interface, for tests that push and load with the real clients.

It speaks the part of the Hub's HTTP API that `huggingface_hub`, `datasets` and `transformers` use to create, list and
read repositories and to commit to them, with large files over LFS. It knows no Xet storage, tags or access scopes and
accepts every front matter, so passing here does not prove that the Hub itself accepts a push.

The clients read their settings when they are imported. Start them in a process with `HF_ENDPOINT` set to the URL,
`HF_TOKEN=hf_test`, `HF_HUB_DISABLE_XET=1` and an empty `HF_HOME`.
"""

import base64
import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


LFS_SUFFIXES = (".parquet", ".safetensors", ".bin", ".arrow", ".gguf", ".pt", ".zip", ".tar", ".gz", ".npy", ".png")
LFS_SIZE = 10 * 1024 * 1024  # the real Hub also sends every binary file and every file > 10 MB to LFS


class Blob:
    def __init__(self, data, lfs=False):
        self.data, self.size, self.lfs = data, len(data), lfs
        self.sha256 = hashlib.sha256(data).hexdigest()
        git = (
            data
            if not lfs
            else (f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n").encode()
        )
        self.oid = hashlib.sha1(b"blob %d\0" % len(git) + git).hexdigest()
        self.etag = self.sha256 if lfs else self.oid

    def info(self, path):
        d = {"type": "file", "path": path, "oid": self.oid, "size": self.size}
        if self.lfs:
            d["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": 134}
        return d


class Repo:
    def __init__(self, kind, rid, private=False):
        self.kind, self.id, self.private, self.prs = kind, rid, private, 0
        self.trees, self.log, self.refs = {}, [], {}
        self.commit(
            "main", {".gitattributes": Blob(b"*.parquet filter=lfs diff=lfs merge=lfs -text\n")}, "initial commit"
        )

    def commit(self, ref, files, message, description=""):
        parent = self.refs.get(ref)
        oid = hashlib.sha1(f"{self.id}{len(self.log)}{time.time_ns()}".encode()).hexdigest()
        self.trees[oid], self.refs[ref] = files, oid
        self.log.append(
            {
                "id": oid,
                "title": message,
                "message": description,
                "ref": ref,
                "parent": parent,
                "authors": [{"user": "tester"}],
                "date": time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime()),
            }
        )
        return oid

    def resolve(self, rev):
        return self.refs.get(rev) or (
            rev if rev in self.trees else next((c for c in self.trees if len(rev) >= 7 and c.startswith(rev)), None)
        )


class Fail(Exception):
    def __init__(self, status, message, code=None):
        self.status, self.message, self.code = status, message, code


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    @property
    def hub(self):
        return self.server.hub

    def send(self, status, body=b"", headers=None, ctype="application/json"):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for k, v in {"Content-Type": ctype, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(k, v)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        self.hub.requests.append((self.command, unquote(self.path), status))

    def body(self):
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            out = b""
            while n := int(self.rfile.readline().split(b";")[0], 16):
                out += self.rfile.read(n)
                self.rfile.readline()
            self.rfile.readline()
            return out
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def handle_any(self):
        data = self.body()
        fault = self.hub.fault and self.hub.fault(self.command, self.path, data)
        try:
            if fault:
                raise Fail(*fault)
            with self.hub.lock:
                self.route(self.command, urlsplit(self.path), data)
        except Fail as e:
            h = {"X-Error-Message": e.message, **({"X-Error-Code": e.code} if e.code else {})}
            self.send(e.status, {"error": e.message}, h)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def user(self, write=False):
        tok = (self.headers.get("Authorization") or "").removeprefix("Bearer ").strip()
        if tok and tok not in self.hub.tokens:
            raise Fail(401, "Invalid credentials in Authorization header")
        if write and not tok:
            raise Fail(401, "Invalid username or password.")
        return self.hub.tokens.get(tok)

    def repo(self, kind, rid, rev=None, write=False):
        who, r = self.user(write), self.hub.repos.get((kind, rid))
        if r is None or (r.private and not who):
            raise Fail(
                404 if who else 401, "Repository Not Found" if who else "Invalid username or password.", "RepoNotFound"
            )
        if write and who != rid.split("/")[0]:
            raise Fail(403, f"You don't have the rights to create a commit in {rid}")
        if rev is None:
            return r, None
        oid = r.resolve(unquote(rev))
        if oid is None:
            raise Fail(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        return r, oid

    def route(self, method, u, data):
        hub, path, q = self.hub, u.path, parse_qs(u.query)

        def js():
            return json.loads(data or b"{}")

        if path == "/api/whoami-v2":
            if not (who := self.user(True)):
                raise Fail(401, "Invalid credentials")
            return self.send(
                200,
                {
                    "type": "user",
                    "name": who,
                    "fullname": who,
                    "orgs": [],
                    "auth": {"type": "access_token", "accessToken": {"role": "write"}},
                },
            )
        if path == "/api/validate-yaml":
            return self.send(200, {"errors": [], "warnings": []})
        if path in ("/api/repos/create", "/api/repos/delete"):
            b = js()
            kind, rid = b.get("type") or "model", f"{b.get('organization') or self.user(True)}/{b['name']}"
            if self.user(True) != rid.split("/")[0]:
                raise Fail(
                    403, f'You don\'t have the rights to create a {kind} under the namespace "{rid.split("/")[0]}".'
                )
            url = f"{hub.url}/{'' if kind == 'model' else kind + 's/'}{rid}"
            if path.endswith("delete"):
                self.repo(kind, rid, write=True)
                del hub.repos[kind, rid]
                return self.send(200, {})
            if (kind, rid) in hub.repos:
                return self.send(409, {"error": f"You already created this {kind} repo: {rid}", "url": url})
            hub.repos[kind, rid] = Repo(kind, rid, b.get("private") or b.get("visibility") == "private")
            return self.send(200, {"url": url, "name": rid, "id": rid})
        if m := re.fullmatch(r"/_lfs/([0-9a-f]{64})", path):
            if method == "PUT":
                if hashlib.sha256(data).hexdigest() != m[1]:
                    raise Fail(400, "sha256 mismatch")
                hub.lfs[m[1]] = data
            return self.send(200, {})
        if m := re.fullmatch(r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            kind = (m[1] or "models")[:-1]
            self.repo(kind, m[2], write=True)
            objs = [
                {
                    "oid": o["oid"],
                    "size": o["size"],
                    **(
                        {}
                        if o["oid"] in hub.lfs
                        else {
                            "actions": {
                                "upload": {"href": f"{hub.url}/_lfs/{o['oid']}"},
                                "verify": {"href": f"{hub.url}/_lfs/{o['oid']}"},
                            }
                        }
                    ),
                }
                for o in js()["objects"]
            ]
            return self.send(200, {"transfer": "basic", "objects": objs}, ctype="application/vnd.git-lfs+json")
        if m := re.fullmatch(r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)/(?:resolve|raw)/([^/]+)/(.+)", path):
            r, oid = self.repo((m[1] or "models")[:-1], m[2], m[3])
            blob = r.trees[oid].get(unquote(m[4]))
            if blob is None:
                return self.send(
                    404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": oid}
                )
            h = {"X-Repo-Commit": oid, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
            if blob.lfs:
                h |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
            if (rng := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))) and method == "GET":
                a, z = int(rng[1]), min(int(rng[2] or blob.size - 1), blob.size - 1)
                return self.send(
                    206,
                    blob.data[a : z + 1],
                    {**h, "Content-Range": f"bytes {a}-{z}/{blob.size}"},
                    "application/octet-stream",
                )
            return self.send(200, blob.data, h, "application/octet-stream")
        m = re.fullmatch(r"/api/(model|dataset|space)s/([^/]+/[^/]+)(?:/([a-z-]+)(?:/([^/]+)(?:/(.*))?)?)?", path)
        if not m:
            raise Fail(404, f"minihub: no route {method} {path}")
        kind, rid, verb, rev, sub = m.groups()
        if verb in (None, "revision"):
            r, oid = self.repo(kind, rid, rev or "main")
            readme = r.trees[oid].get("README.md")
            front = readme and re.match(rb"---\n(.*?)\n---", readme.data, re.DOTALL)
            sib = [{"rfilename": p, "size": b.size, "blobId": b.oid} for p, b in sorted(r.trees[oid].items())]
            return self.send(
                200,
                {
                    "_id": "0" * 24,
                    "id": rid,
                    "author": rid.split("/")[0],
                    "sha": oid,
                    "private": r.private,
                    "gated": False,
                    "disabled": False,
                    "lastModified": r.log[-1]["date"],
                    "createdAt": r.log[0]["date"],
                    "tags": [],
                    "downloads": 0,
                    "likes": 0,
                    "siblings": sib,
                    **({"cardData": yaml.safe_load(front[1])} if front else {}),
                },
            )
        if verb == "refs":
            r, _ = self.repo(kind, rid)
            return self.send(
                200,
                {
                    "branches": [
                        {"name": n, "ref": f"refs/heads/{n}", "targetCommit": c}
                        for n, c in r.refs.items()
                        if not n.startswith("refs/")
                    ],
                    "tags": [],
                    "converts": [],
                },
            )
        if verb == "branch" and method == "POST":
            r, _ = self.repo(kind, rid, write=True)
            if unquote(rev) in r.refs:
                raise Fail(409, "Reference already exists")
            r.refs[unquote(rev)] = r.resolve(js().get("startingPoint") or "main")
            return self.send(200, {})
        if verb == "commits":
            r, oid = self.repo(kind, rid, rev)
            return self.send(200, r.log[::-1])
        if verb == "preupload":
            r, oid = self.repo(kind, rid, rev, write=True)
            old = r.trees[oid]
            return self.send(
                200,
                {
                    "files": [
                        {
                            "path": f["path"],
                            "shouldIgnore": False,
                            **({"oid": old[f["path"]].oid} if f["path"] in old else {}),
                            "uploadMode": "lfs"
                            if f["path"].endswith(LFS_SUFFIXES) or f["size"] > LFS_SIZE
                            else "regular",
                        }
                        for f in js()["files"]
                    ]
                },
            )
        if verb == "commit":
            return self.commit(kind, rid, rev, q, data)
        if verb == "paths-info":
            r, oid = self.repo(kind, rid, rev)
            form = js() if "json" in self.headers.get("Content-Type", "") else parse_qs(data.decode())
            want = form.get("paths") or []
            want, tree, out = [want] if isinstance(want, str) else want, r.trees[oid], []
            for p in want:
                if p in tree:
                    out.append(tree[p].info(p))
                elif any(f.startswith(p.rstrip("/") + "/") for f in tree):
                    out.append({"type": "directory", "path": p, "oid": "0" * 40, "size": 0})
            return self.send(200, out)
        if verb == "tree":
            r, oid = self.repo(kind, rid, rev)
            pre, deep = (
                (unquote(sub).rstrip("/") + "/" if sub else ""),
                q.get("recursive", ["false"])[0].lower() in ("true", "1"),
            )
            out, dirs = [], set()
            for p, b in sorted(r.trees[oid].items()):
                if not p.startswith(pre):
                    continue
                parts = p[len(pre) :].split("/")
                for i in range(1, len(parts) if deep else min(2, len(parts))):
                    dirs.add(pre + "/".join(parts[:i]))
                if deep or len(parts) == 1:
                    out.append(b.info(p))
            if pre and not out and not dirs:
                raise Fail(404, f'{sub} does not exist on "{rev}"', "EntryNotFound")
            return self.send(
                200, [{"type": "directory", "path": d, "oid": "0" * 40, "size": 0} for d in sorted(dirs)] + out
            )
        raise Fail(404, f"minihub: no route {method} {path}")

    def commit(self, kind, rid, rev, q, data):
        r, oid = self.repo(kind, rid, rev, write=True)
        files, head = dict(r.trees[oid]), {}
        for line in data.splitlines():
            if not line.strip():
                continue
            op = json.loads(line)
            k, v = op["key"], op["value"]
            if k == "header":
                head = v
                if v.get("parentCommit") and not q.get("create_pr") and not oid.startswith(v["parentCommit"]):
                    raise Fail(412, "A commit has happened since. Please refresh and try again.")
            elif k == "file":
                files[v["path"]] = Blob(base64.b64decode(v["content"]))
            elif k == "lfsFile":
                if v["oid"] not in self.hub.lfs:
                    raise Fail(400, f"LFS pointer pointed to a file that does not exist: {v['oid']}")
                files[v["path"]] = Blob(self.hub.lfs[v["oid"]], lfs=True)
            elif k == "deletedFile":
                if files.pop(v["path"], None) is None:
                    raise Fail(404, "A file with this name doesn't exist", "EntryNotFound")
            elif k == "deletedFolder":
                files = {p: b for p, b in files.items() if not p.startswith(v["path"].rstrip("/") + "/")}
        ref, pr = unquote(rev), q.get("create_pr")
        if pr:
            r.prs += 1
            ref = f"refs/pr/{r.prs}"
        new, base = (
            r.commit(ref, files, head.get("summary", ""), head.get("description", "")),
            f"{self.hub.url}/{'' if kind == 'model' else kind + 's/'}{rid}",
        )
        self.send(
            200,
            {
                "success": True,
                "commitOid": new,
                "commitUrl": f"{base}/commit/{new}",
                "hookOutput": "",
                **({"pullRequestUrl": f"{base}/discussions/{r.prs}"} if pr else {}),
            },
        )


class MiniHub:
    """
    Context manager that serves an empty Hub.

    `url` is its endpoint, `requests` lists method, path and status of every request, `files` returns the files of a
    repository, and `fault` may be set to a callable that maps method, path and body to a status, message and error code, to
    fail requests on purpose. The owner of the namespace `tester` has the token `hf_test`.
    """

    def __init__(self, port=0, tokens=None):
        self.tokens = tokens or {"hf_test": "tester"}
        self.repos, self.lfs, self.requests, self.fault = {}, {}, [], None
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads, self.server.hub = True, self
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def files(self, kind, rid, rev="main"):
        r = self.repos[kind, rid]
        return {p: b.data for p, b in r.trees[r.resolve(rev)].items()}

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc):
        self.server.shutdown()
        self.server.server_close()
