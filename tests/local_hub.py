#!/usr/bin/env python3
"""A tiny local stand-in for the Hugging Face Hub, for tests. The standard library, PyYAML and the package's list of licences.

    python local_hub.py --port 8899 --root hub_root [--lfs-threshold 1000000] [--log requests.jsonl]

Client side (set before huggingface_hub is imported):

    HF_ENDPOINT=http://127.0.0.1:8899  HF_TOKEN=hf_test  HF_HUB_DISABLE_XET=1  HF_HOME=<tmp dir>

Speaks what huggingface_hub 2.x / transformers 5.x / datasets 5.x call for models, datasets and spaces:
whoami, create/delete/move repo, preupload, LFS batch + PUT + verify, commit (add, delete, copy by oid), repo info,
tree, paths-info, refs, commits, branches, tags, HEAD/GET resolve with ETag and Range. No Xet: files above the LFS
threshold need HF_HUB_DISABLE_XET=1 on the client (a negative threshold sends every file inside the commit instead).
Tokens are those of `TOKENS`, by what they may do, all of one user (--user); another answers 401. Without a token, or with
one that can only read, writes are refused, and private repositories are not seen without one. `/api/validate-yaml`
checks the metadata of a card as `card_problems` says. `hub.fail(method, pattern, times, status)` makes the next matching
requests fail.

In a test:  hub = FakeHub(root).start();  os.environ["HF_ENDPOINT"] = hub.url;  ...;  hub.stop()
"""

import argparse
import base64
import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from hf_speechcl.cards import LICENSES

TOKENS = {"hf_test": "write", "hf_reader": "read", "hf_fine": "fineGrained"}  # the last may write to no repository
KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}


class HubError(Exception):
    def __init__(self, status, message, code=None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


def now():
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())


class Store:
    """Repositories as {branch: commit}, commits as {path: file record}; contents in a blob folder by sha256."""

    def __init__(self, root):
        self.root, self.lock = Path(root), threading.RLock()
        (self.root / "blobs").mkdir(parents=True, exist_ok=True)
        self.index = self.root / "index.json"
        self.repos = json.loads(self.index.read_text()) if self.index.exists() else {}

    def save(self):
        tmp = self.index.with_suffix(".tmp")
        tmp.write_text(json.dumps(self.repos))
        tmp.replace(self.index)

    def blob(self, sha256):
        return self.root / "blobs" / sha256

    def put_blob(self, data):
        sha256 = hashlib.sha256(data).hexdigest()
        if not self.blob(sha256).exists():
            self.blob(sha256).write_bytes(data)
        return sha256

    def create(self, kind, repo_id, private=False):
        key = f"{kind}/{repo_id}"
        if key in self.repos:
            raise HubError(409, "You already created this repo")
        self.repos[key] = {"private": private, "created": now(), "heads": {}, "tags": {}, "commits": {}}
        self.commit(
            kind, repo_id, "main", "initial commit", "", {".gitattributes": self.record(b"*.safetensors filter=lfs\n")}
        )
        return self.repos[key]

    def repo(self, kind, repo_id):
        try:
            return self.repos[f"{kind}/{repo_id}"]
        except KeyError:
            raise HubError(404, "Repository not found", "RepoNotFound") from None

    def resolve(self, kind, repo_id, revision):
        """Branch, tag, or (a prefix of) a commit id -> commit id, commit."""
        repo = self.repo(kind, repo_id)
        rev = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        sha = (
            repo["heads"].get(rev)
            or repo["tags"].get(rev)
            or next((c for c in repo["commits"] if len(rev) >= 7 and c.startswith(rev)), None)
        )
        if sha is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repo["commits"][sha]

    def file(self, kind, repo_id, revision, path):
        sha, commit = self.resolve(kind, repo_id, revision)
        if path not in commit["files"]:
            raise HubError(404, "Entry not found", "EntryNotFound")
        return sha, commit["files"][path]

    def record(self, data):
        return {
            "sha256": self.put_blob(data),
            "oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(),
            "size": len(data),
            "lfs": False,
        }

    def lfs_record(self, oid, size):
        if not self.blob(oid).exists():
            raise HubError(400, f"LFS object {oid} was not uploaded")
        size = self.blob(oid).stat().st_size if size is None else size
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n".encode()
        return {
            "sha256": oid,
            "oid": hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest(),
            "size": size,
            "lfs": True,
        }

    def commit(self, kind, repo_id, branch, title, body, adds, deletes=(), parent=None):
        repo = self.repo(kind, repo_id)
        head = repo["heads"].get(branch)
        if head is None and repo["heads"]:
            raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        if parent and head and not head.startswith(parent):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo["commits"][head]["files"]) if head else {}
        for path in deletes:
            files = {p: f for p, f in files.items() if p != path and not p.startswith(path.rstrip("/") + "/")}
        files.update(adds)
        sha = hashlib.sha1(json.dumps([repo_id, head, title, files, time.time_ns()]).encode()).hexdigest()
        repo["commits"][sha] = {"title": title, "message": body, "date": now(), "parent": head, "files": files}
        repo["heads"][branch] = sha
        self.save()
        return sha

    def history(self, kind, repo_id, revision):
        sha, commit = self.resolve(kind, repo_id, revision)
        while sha:
            yield sha, commit
            sha = commit["parent"]
            commit = self.repo(kind, repo_id)["commits"].get(sha)


def entry(path, rec):
    out = {"type": "file", "path": path, "oid": rec["oid"], "size": rec["size"]}
    if rec["lfs"]:
        out["lfs"] = {"oid": rec["sha256"], "size": rec["size"], "pointerSize": 130}
    return out


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: "FakeHub"

    def log_message(self, *args):
        pass

    # ---- plumbing ----
    def reply(self, payload=None, status=200, headers=None, raw=None):
        data = raw if raw is not None else json.dumps(payload).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self):
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            out = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                out += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return out
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def handle_any(self):
        url = urlsplit(self.path)
        self.query = {k: v[-1] for k, v in parse_qs(url.query).items()}
        self.data = self.body()
        self.hub.note(self.command, self.path, len(self.data))
        self.token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.role = TOKENS.get(self.token)
        try:
            if self.token and self.role is None:
                raise HubError(401, "Invalid username or password.")
            if (status := self.hub.failure(self.command, url.path)) is not None:
                if status == 0:  # the line is cut
                    self.close_connection = True
                    self.connection.shutdown(2)
                    return None
                raise HubError(status, "made to fail")
            if (
                self.command in ("POST", "PUT", "DELETE")
                and self.role != "write"
                and not re.search("^/lfs/|/paths-info/|/validate-yaml$", url.path)
            ):
                raise HubError(403 if self.role else 401, "this token may not write")
            for method, pattern, func in ROUTES:
                if self.command in method and (match := re.fullmatch(pattern, url.path)):
                    with self.hub.store.lock:
                        options = {k: unquote(v) for k, v in match.groupdict().items() if v is not None}
                        self.check_seen(KINDS[options.get("kinds", "models")], options.get("repo_id"))
                        return func(self, **options)
            raise HubError(404, f"no route for {self.command} {url.path}")
        except HubError as err:
            headers = {"X-Error-Message": err.message} | ({"X-Error-Code": err.code} if err.code else {})
            self.reply({"error": err.message}, err.status, headers)
        except (BrokenPipeError, ConnectionResetError):
            pass

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def check_seen(self, kind, repo_id):
        """A private repository is not there for those without a token."""
        repo = self.hub.store.repos.get(f"{kind}/{repo_id}")
        if repo and repo["private"] and self.role is None:
            raise HubError(401, "Repository not found", "RepoNotFound")

    # ---- account and repositories ----
    def whoami(self):
        if not self.headers.get("Authorization"):
            raise HubError(401, "Invalid username or password.")
        self.reply(
            {
                "type": "user",
                "id": "1",
                "name": self.hub.user,
                "fullname": self.hub.user,
                "email": "user@example.test",
                "emailVerified": True,
                "orgs": [],
                "isPro": False,
                "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": self.role}},
            }
        )

    def create_repo(self):
        req = json.loads(self.data)
        kind, repo_id = req.get("type") or "model", f"{req.get('organization') or self.hub.user}/{req['name']}"
        if not repo_id.startswith(f"{self.hub.user}/"):
            raise HubError(403, "You don't have the rights to create a model under this namespace")
        url = f"{self.hub.url}/{'' if kind == 'model' else kind + 's/'}{repo_id}"
        try:
            self.hub.store.create(kind, repo_id, private=req.get("visibility") == "private" or bool(req.get("private")))
        except HubError as err:  # the client reads `url` from the 409 body when exist_ok=True
            return self.reply({"error": err.message, "url": url}, err.status)
        self.reply({"url": url, "name": repo_id, "id": repo_id})

    def delete_repo(self):
        req = json.loads(self.data)
        kind, repo_id = req.get("type") or "model", f"{req.get('organization') or self.hub.user}/{req['name']}"
        self.hub.store.repo(kind, repo_id)
        del self.hub.store.repos[f"{kind}/{repo_id}"]
        self.hub.store.save()
        self.reply(raw=b"OK")

    def list_repos(self, kinds):
        kind, want = KINDS[kinds], self.query.get("author")
        ids = [k.split("/", 1)[1] for k in self.hub.store.repos if k.startswith(kind + "/")]
        self.reply(
            [{"id": i, "modelId": i, "tags": [], "private": False} for i in ids if not want or i.startswith(want + "/")]
        )

    def info(self, kinds, repo_id, revision="main"):
        store, kind = self.hub.store, KINDS[kinds]
        sha, commit = store.resolve(kind, repo_id, revision)
        repo = store.repo(kind, repo_id)
        siblings = [
            {"rfilename": p}
            | (
                {"size": f["size"], "blobId": f["oid"]}
                | ({"lfs": {"sha256": f["sha256"], "size": f["size"], "pointerSize": 130}} if f["lfs"] else {})
                if "blobs" in self.query
                else {}
            )
            for p, f in sorted(commit["files"].items())
        ]
        card = (
            card_data(store.blob(commit["files"]["README.md"]["sha256"]).read_text())
            if "README.md" in commit["files"]
            else {}
        )
        config = (
            json.loads(store.blob(commit["files"]["config.json"]["sha256"]).read_text())
            if "config.json" in commit["files"]
            else {}
        )
        self.reply(
            {
                "_id": "0",
                "id": repo_id,
                "modelId": repo_id,
                "author": repo_id.split("/")[0],
                "sha": sha,
                "private": repo["private"],
                "gated": False,
                "disabled": False,
                "lastModified": commit["date"],
                "createdAt": repo["created"],
                "downloads": 0,
                "likes": 0,
                "tags": card.get("tags", []),
                "pipeline_tag": card.get("pipeline_tag"),
                "library_name": card.get("library_name"),
                "cardData": card,
                "config": {k: config[k] for k in ("architectures", "model_type", "auto_map") if k in config},
                "siblings": siblings,
            }
        )

    def tree(self, kinds, repo_id, revision, path=""):
        sha, commit = self.hub.store.resolve(KINDS[kinds], repo_id, revision)
        prefix, out, seen = (path.strip("/") + "/" if path.strip("/") else ""), [], set()
        recursive = self.query.get("recursive", "").lower() in ("1", "true")
        for name, rec in sorted(commit["files"].items()):
            if not name.startswith(prefix):
                continue
            parts = name[len(prefix) :].split("/")
            for depth in range(1, len(parts) if recursive else min(2, len(parts))):
                folder = prefix + "/".join(parts[:depth])
                if folder not in seen:
                    seen.add(folder)
                    out.append(
                        {
                            "type": "directory",
                            "path": folder,
                            "oid": hashlib.sha1(folder.encode()).hexdigest(),
                            "size": 0,
                        }
                    )
            if recursive or len(parts) == 1:
                out.append(entry(name, rec))
        if prefix and not out:
            raise HubError(404, "Entry not found", "EntryNotFound")
        if "expand" in self.query:
            out = [e | {"lastCommit": {"id": sha, "title": commit["title"], "date": commit["date"]}} for e in out]
        self.reply(out, headers={"X-Repo-Commit": sha})

    def paths_info(self, kinds, repo_id, revision):
        sha, commit = self.hub.store.resolve(KINDS[kinds], repo_id, revision)
        req = (
            json.loads(self.data)
            if self.headers.get("Content-Type", "").startswith("application/json")
            else parse_qs(self.data.decode())
        )
        paths, out = req.get("paths", []), []
        for path in [paths] if isinstance(paths, str) else paths:
            if path in commit["files"]:
                out.append(entry(path, commit["files"][path]))
            elif any(p.startswith(path.rstrip("/") + "/") for p in commit["files"]):
                out.append(
                    {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0}
                )
        self.reply(out, headers={"X-Repo-Commit": sha})

    def refs(self, kinds, repo_id):
        repo = self.hub.store.repo(KINDS[kinds], repo_id)
        self.reply(
            {
                "branches": [
                    {"name": n, "ref": f"refs/heads/{n}", "targetCommit": s} for n, s in repo["heads"].items()
                ],
                "converts": [],
                "tags": [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": s} for n, s in repo["tags"].items()],
            }
        )

    def commits(self, kinds, repo_id, revision):
        self.reply(
            [
                {
                    "id": s,
                    "title": c["title"],
                    "message": c["message"],
                    "date": c["date"],
                    "authors": [{"user": self.hub.user}],
                }
                for s, c in self.hub.store.history(KINDS[kinds], repo_id, revision)
            ]
        )

    def branch(self, kinds, repo_id, branch):
        heads, kind = self.hub.store.repo(KINDS[kinds], repo_id)["heads"], KINDS[kinds]
        if self.command == "DELETE":
            heads.pop(branch, None)
        elif branch in heads:
            raise HubError(409, "Reference already exists")
        else:
            heads[branch] = self.hub.store.resolve(
                kind, repo_id, json.loads(self.data or b"{}").get("startingPoint") or "main"
            )[0]
        self.hub.store.save()
        self.reply({})

    def tag(self, kinds, repo_id, revision):
        tags = self.hub.store.repo(KINDS[kinds], repo_id)["tags"]
        if self.command == "DELETE":
            tags.pop(revision, None)
        else:
            name = json.loads(self.data)["tag"]
            if name in tags:
                raise HubError(409, "Tag already exists")
            tags[name] = self.hub.store.resolve(KINDS[kinds], repo_id, revision)[0]
        self.hub.store.save()
        self.reply({})

    def auth_check(self, kinds, repo_id, write=None):
        self.hub.store.repo(KINDS[kinds], repo_id)
        if write and self.role != "write":
            raise HubError(403, "this token may not write")
        self.reply({})

    def validate_yaml(self):
        problems = card_problems(json.loads(self.data)["content"])
        self.reply({"errors": [{"message": text} for text in problems], "warnings": []}, 400 if problems else 200)

    # ---- upload ----
    def preupload(self, kinds, repo_id, revision):
        _, commit = self.hub.store.resolve(KINDS[kinds], repo_id, revision)
        limit, out = self.hub.lfs_threshold, []
        for f in json.loads(self.data)["files"]:
            old = commit["files"].get(f["path"])
            lfs = limit >= 0 and (
                f["size"] > limit or f["path"].endswith((".safetensors", ".bin", ".pt", ".parquet")) and f["size"] > 0
            )
            out.append(
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if lfs else "regular",
                    "shouldIgnore": False,
                    "oid": (old["sha256"] if old["lfs"] else old["oid"]) if old else None,
                }
            )
        self.reply({"files": out})

    def lfs_batch(self, repo_id, kinds=None):
        out = []
        for obj in json.loads(self.data)["objects"]:
            item = {"oid": obj["oid"], "size": obj["size"]}
            if not self.hub.store.blob(obj["oid"]).exists():
                item["actions"] = {
                    "upload": {"href": f"{self.hub.url}/lfs/{obj['oid']}"},
                    "verify": {"href": f"{self.hub.url}/lfs/{obj['oid']}/verify"},
                }
            out.append(item)
        self.reply({"transfer": "basic", "objects": out})

    def lfs_put(self, oid):
        if hashlib.sha256(self.data).hexdigest() != oid:
            raise HubError(400, "sha256 mismatch")
        self.hub.store.blob(oid).write_bytes(self.data)
        self.reply({})

    def lfs_verify(self, oid):
        if not self.hub.store.blob(oid).exists():
            raise HubError(404, "no such object")
        self.reply({})

    def commit(self, kinds, repo_id, revision):
        store, adds, deletes, header = self.hub.store, {}, [], {}
        for line in self.data.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                header = value
            elif key == "file":
                adds[value["path"]] = store.record(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                adds[value["path"]] = store.lfs_record(value["oid"], value.get("size"))
            elif key in ("deletedFile", "deletedFolder"):
                deletes.append(value["path"])
        sha = store.commit(
            KINDS[kinds],
            repo_id,
            revision,
            header.get("summary", ""),
            header.get("description", ""),
            adds,
            deletes,
            header.get("parentCommit"),
        )
        self.reply(
            {
                "success": True,
                "commitOid": sha,
                "commitUrl": f"{self.hub.url}/{'' if kinds == 'models' else kinds + '/'}{repo_id}/commit/{sha}",
                "hookOutput": "",
            }
        )

    # ---- download ----
    def resolve(self, repo_id, revision, path, kinds="models"):
        sha, rec = self.hub.store.file(KINDS[kinds], repo_id, revision, path)
        headers = {
            "X-Repo-Commit": sha,
            "ETag": f'"{rec["sha256"] if rec["lfs"] else rec["oid"]}"',
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
            "Content-Disposition": f'inline; filename="{path.split("/")[-1]}";',
        }
        if rec["lfs"]:
            headers |= {"X-Linked-ETag": f'"{rec["sha256"]}"', "X-Linked-Size": str(rec["size"])}
        data, status = self.hub.store.blob(rec["sha256"]).read_bytes(), 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(match[1]), min(int(match[2] or len(data) - 1), len(data) - 1)
            if start >= len(data):
                return self.reply(status=416, raw=b"", headers=headers | {"Content-Range": f"bytes */{len(data)}"})
            headers["Content-Range"], status = f"bytes {start}-{end}/{len(data)}", 206
            data = data[start : end + 1]
        self.reply(status=status, raw=data, headers=headers)


def card_data(text):
    """The metadata of a card, but for its model-index."""
    match = re.match(r"---\r?\n(.*?)\r?\n---", text, re.S)
    return {key: value for key, value in (yaml.safe_load(match[1]) if match else {}).items() if key != "model-index"}


PIPELINES = {"automatic-speech-recognition", "audio-classification", "feature-extraction", "text-generation"}
NAME = r"[\w-][\w.-]*(/[\w-][\w.-]*)?"


def card_problems(text):
    """What the Hub's check of a card would find wrong with its metadata, as far as its documentation tells."""
    match = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", text, re.S)
    if not match:
        return []  # the Hub only warns of cards without metadata
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"YAML Metadata Error: {error}"]
    if not isinstance(data, dict):
        return ["metadata must be an object"]
    problems = []

    def check(holds, where, expected):
        if not holds:
            problems.append(f'"{where}" must be {expected}')

    def texts(key, pattern=".+"):
        values = data[key] if isinstance(data[key], list) else [data[key]]
        good = all(isinstance(value, str) and re.fullmatch(pattern, value) for value in values)
        check(good, key, f"one or more texts like {pattern}")

    patterns = {"language": "[a-z]{2,3}(-[A-Za-z]+)?|multilingual|code", "datasets": NAME, "base_model": NAME}
    for key in data:
        check(isinstance(key, str) and data[key] is not None, key, "not empty")
        if key in ("language", "datasets", "base_model", "tags", "metrics"):
            texts(key, patterns.get(key, "[^\n]+"))
        if key in ("library_name", "pipeline_tag", "model_name", "thumbnail", "license_name", "license_link"):
            check(isinstance(data[key], str), key, "a text")
    if "license" in data:
        licenses = data["license"] if isinstance(data["license"], list) else [data["license"]]
        check(all(license in LICENSES for license in licenses), "license", "one of the licences that the Hub knows")
    if "pipeline_tag" in data:
        check(data["pipeline_tag"] in PIPELINES, "pipeline_tag", "a task")
    for m, model in enumerate(data.get("model-index", [])) if isinstance(data.get("model-index", []), list) else ():
        at = f"model-index[{m}]"
        check(isinstance(model.get("name"), str) and model["name"], f"{at}.name", "a text")
        check(isinstance(model.get("results"), list), f"{at}.results", "an array")
        for r, result in enumerate(model.get("results") or []):
            where = f"{at}.results[{r}]"
            check(isinstance(result.get("task", {}).get("type"), str), f"{where}.task.type", "a text")
            for field in ("name", "type"):
                check(isinstance(result.get("dataset", {}).get(field), str), f"{where}.dataset.{field}", "a text")
            for field in ("config", "split", "revision"):
                value = result.get("dataset", {}).get(field, "")
                check(isinstance(value, str), f"{where}.dataset.{field}", "a text")
            check(isinstance(result.get("metrics"), list) and result["metrics"], f"{where}.metrics", "an array")
            for n, metric in enumerate(result.get("metrics") or []):
                check(isinstance(metric.get("type"), str), f"{where}.metrics[{n}].type", "a text")
                value = metric.get("value")
                good = (
                    isinstance(value, int | float | str | dict | list)
                    and value == value
                    and not isinstance(value, bool)
                )
                check(good, f"{where}.metrics[{n}].value", "a number")
                check(isinstance(metric.get("name", ""), str), f"{where}.metrics[{n}].name", "a text")
    if "model-index" in data:
        check(isinstance(data["model-index"], list), "model-index", "an array")
    return problems


K, R, V = r"/api/(?P<kinds>models|datasets|spaces)", r"/(?P<repo_id>[^/]+/[^/]+?)", r"(?P<revision>[^/]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/repos/create", Handler.create_repo),
    ("DELETE", r"/api/repos/delete", Handler.delete_repo),
    ("POST", r"/api/validate-yaml", Handler.validate_yaml),
    ("GET", K, Handler.list_repos),
    ("GET", K + R, Handler.info),
    ("GET", K + R + r"/revision/" + V, Handler.info),
    ("GET", K + R + r"/tree/" + V + r"(?:/(?P<path>.*))?", Handler.tree),
    ("POST", K + R + r"/paths-info/" + V, Handler.paths_info),
    ("GET", K + R + r"/refs", Handler.refs),
    ("GET", K + R + r"/commits/" + V, Handler.commits),
    ("POST DELETE", K + R + r"/branch/(?P<branch>[^/]+)", Handler.branch),
    ("POST DELETE", K + R + r"/tag/" + V, Handler.tag),
    ("GET", K + R + r"/auth-check(?:/(?P<write>write))?", Handler.auth_check),
    ("POST", K + R + r"/preupload/" + V, Handler.preupload),
    ("POST", K + R + r"/commit/" + V, Handler.commit),
    ("POST", r"(?:/(?P<kinds>datasets|spaces))?" + R + r"\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_put),
    ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/verify", Handler.lfs_verify),
    (
        "GET HEAD",
        r"(?:/(?P<kinds>datasets|spaces))?" + R + r"/(?:resolve|raw)/" + V + r"/(?P<path>.+)",
        Handler.resolve,
    ),
]


class FakeHub:
    def __init__(self, root, port=0, user="tester", lfs_threshold=1_000_000, log=None):
        self.store, self.user, self.lfs_threshold = Store(root), user, lfs_threshold
        self.requests, self.failures, self.log = [], [], open(log, "a", buffering=1) if log else None
        self.server = ThreadingHTTPServer(("127.0.0.1", port), type("BoundHandler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def fail(self, method, pattern, times=1, status=503):
        """Make the next `times` requests whose path holds `pattern` fail, with `status` 0 by cutting the line."""
        self.failures.append([method, pattern, times, status])

    def failure(self, method, path):
        for failure in self.failures:
            if failure[2] and method == failure[0] and re.search(failure[1], path):
                failure[2] -= 1
                return failure[3]
        return None

    def note(self, method, path, size):
        self.requests.append((method, path))
        if self.log:
            self.log.write(json.dumps([method, path, size]) + "\n")

    def start(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def stop(self):
        self.server.shutdown()
        self.server.server_close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=8899)
    parser.add_argument("--root", required=True)
    parser.add_argument("--user", default="tester")
    parser.add_argument("--lfs-threshold", type=int, default=1_000_000, help="bytes; negative: no LFS at all")
    parser.add_argument("--log", help="append one JSON line per request to this file")
    args = parser.parse_args()
    hub = FakeHub(args.root, args.port, args.user, args.lfs_threshold, args.log)
    print(f"fake hub at {hub.url}, files in {args.root}", flush=True)
    try:
        hub.server.serve_forever()
    except KeyboardInterrupt:
        pass
