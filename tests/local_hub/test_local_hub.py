"""The local Hub, through the real client, and its refusals, through httpx."""

import hashlib
import json
import re
import socket
import subprocess
import sys
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    ModelCard,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from starlette.responses import Response

from hub_fixtures import MINE, OTHER, READER


@pytest.fixture
def api(hub_server) -> HfApi:
    api = HfApi(hub_server.url, token=MINE)
    api.create_repo("me/model")
    return api


def commit(api, files: dict[str, bytes], repo_type="model", name="me/model", **options):
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    return api.create_commit(
        name, operations, repo_type=repo_type, commit_message="Add files", **options
    )


def status(error) -> int:
    return error.value.response.status_code


@pytest.fixture
def http(hub_server):
    """A plain HTTP client with the token of `me`."""
    with httpx.Client(base_url=hub_server.url, headers={"Authorization": f"Bearer {MINE}"}) as http:
        yield http


def as_user(token: str) -> dict[str, dict[str, str]]:
    return {"headers": {"Authorization": f"Bearer {token}"}}


def ndjson(*lines: tuple[str, dict]) -> bytes:
    """The body of a commit request."""
    lines = (("header", {"summary": "Change"}), *lines)
    return "".join(json.dumps({"key": key, "value": value}) + "\n" for key, value in lines).encode()


def lfs_line(path: str, content: bytes) -> tuple[str, dict]:
    oid = hashlib.sha256(content).hexdigest()
    return "lfsFile", {"path": path, "algo": "sha256", "oid": oid, "size": len(content)}


def batch(content: bytes, oid: str | None = None) -> dict:
    """The body of an LFS batch request."""
    oid = hashlib.sha256(content).hexdigest() if oid is None else oid
    return {"operation": "upload", "objects": [{"oid": oid, "size": len(content)}]}


@pytest.mark.parametrize("repo_type", ["model", "dataset", "space"])
def test_what_is_committed_comes_back_small_and_large(api, tmp_path, repo_type):
    files = {"a b/ü%.txt": b"small\n\xff", "big.safetensors": bytes(range(256)) * 9000, "no": b""}
    api.create_repo(
        "lab/thing", repo_type=repo_type, space_sdk="gradio" if repo_type == "space" else None
    )
    done = commit(api, files, repo_type, "lab/thing")
    folder = api.snapshot_download(
        "lab/thing", repo_type=repo_type, revision=done.oid, cache_dir=tmp_path / "cache"
    )
    for path, content in files.items():
        with open(f"{folder}/{path}", "rb") as file:
            assert file.read() == content
    checked = api.verify_repo_checksums(
        "lab/thing", repo_type=repo_type, revision=done.oid, cache_dir=tmp_path / "cache"
    )
    first = {".gitattributes"} | ({"README.md"} if repo_type == "space" else set())
    assert checked.checked_count == 3 + len(first)
    assert not checked.mismatches
    entries = {e.path: e for e in api.list_repo_tree("lab/thing", repo_type=repo_type)}
    assert set(entries) == first | {"a b", "big.safetensors", "no"}
    assert entries["big.safetensors"].lfs.size == 256 * 9000


def test_the_hashes_of_files_are_those_of_git(api):
    weights, text = b"weights", b"small\n"
    commit(api, {"model.safetensors": weights, "a/b.txt": text})
    entries = {e.path: e for e in api.list_repo_tree("me/model", recursive=True)}
    oid = hashlib.sha256(weights).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize 7\n"
    for path, content in (("a/b.txt", text), ("model.safetensors", pointer.encode())):
        git = subprocess.run(["git", "hash-object", "--stdin"], input=content, capture_output=True)
        assert entries[path].blob_id == git.stdout.decode().strip()
    assert (entries["model.safetensors"].lfs.sha256, entries["model.safetensors"].size) == (oid, 7)


def test_a_large_file_must_be_there_before_its_commit(api, hub_server):
    before = api.model_info("me/model").sha
    weights = CommitOperationAdd("model.safetensors", b"weights")
    api.preupload_lfs_files("me/model", [weights])
    (hub_server.root / "models/me/model/objects" / weights.upload_info.sha256.hex()).unlink()
    with pytest.raises(BadRequestError):
        api.create_commit("me/model", [weights], commit_message="Add weights")
    assert api.model_info("me/model").sha == before


def test_files_are_removed_and_unchanged_ones_make_no_commit(api):
    first = commit(api, {"a": b"1", "folder/b": b"2", "c.bin": b"3"})
    assert commit(api, {"a": b"1", "c.bin": b"3"}).oid == first.oid
    api.create_commit(
        "me/model",
        [CommitOperationDelete("a"), CommitOperationDelete("folder/")],
        commit_message="Remove",
        commit_description="They are\n\nold.",
    )
    assert api.list_repo_files("me/model") == [".gitattributes", "c.bin"]
    history = api.list_repo_commits("me/model")
    assert [c.title for c in history] == ["Remove", "Add files", "initial commit"]
    assert history[0].message == "They are\n\nold."
    assert history[0].authors == ["me"]


def test_a_stale_parent_is_refused(api):
    before = api.model_info("me/model").sha
    commit(api, {"a": b"1"}, parent_commit=before)
    with pytest.raises(HfHubHTTPError) as error:
        commit(api, {"a": b"2"}, parent_commit=before)
    assert status(error) == 412


def test_tags_branches_and_pull_requests(api, tmp_path):
    first = commit(api, {"a": b"1"})
    api.create_tag("me/model", tag="v1/x")
    api.create_branch("me/model", branch="dev")
    proposed = commit(HfApi(api.endpoint, token=OTHER), {"a": b"2"}, create_pr=True)
    assert proposed.pr_revision == "refs/pr/1"
    refs = api.list_repo_refs("me/model", include_pull_requests=True)
    assert [(t.name, t.target_commit) for t in refs.tags] == [("v1/x", first.oid)]
    assert {b.name for b in refs.branches} == {"main", "dev"}
    assert refs.pull_requests[0].target_commit == proposed.oid
    path = hf_hub_download(
        "me/model", "a", revision="refs/pr/1", cache_dir=tmp_path, endpoint=api.endpoint
    )
    with open(path) as file:
        assert file.read() == "2"
    assert api.model_info("me/model").sha == first.oid
    with pytest.raises(HfHubHTTPError) as error:
        api.create_tag("me/model", tag="v1/x")
    assert status(error) == 409
    api.delete_tag("me/model", tag="v1/x")
    api.delete_branch("me/model", branch="dev")
    assert not api.list_repo_refs("me/model").tags


def test_who_may_do_what(api):
    reader, other = HfApi(api.endpoint, token=READER), HfApi(api.endpoint, token=OTHER)
    api.create_repo("lab/secret", private=True)
    assert api.whoami()["auth"]["accessToken"]["role"] == "write"
    for refused in (reader, other):
        with pytest.raises(HfHubHTTPError) as error:
            commit(refused, {"a": b"1"})
        assert status(error) == 403
        with pytest.raises(HfHubHTTPError) as error:
            refused.create_repo("lab/new")
        assert status(error) == 403
        with pytest.raises(RepositoryNotFoundError):
            refused.model_info("lab/secret")
    with pytest.raises(HfHubHTTPError) as error:
        HfApi(api.endpoint, token="hf_wrong").whoami()
    assert status(error) == 401
    api.auth_check("lab/secret", write=True)
    with pytest.raises(HfHubHTTPError) as error:
        other.auth_check("me/model", write=True)
    assert status(error) == 403


def test_what_is_not_there_is_said_in_the_clients_terms(api):
    with pytest.raises(RevisionNotFoundError):
        api.model_info("me/model", revision="nope")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("me/model", "nope", endpoint=api.endpoint)
    assert not api.repo_exists("me/nope")
    assert not api.file_exists("me/model", "nope")
    api.delete_repo("me/model")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("me/model")
    with pytest.raises(HfHubHTTPError) as error:
        api.create_repo("me/x") and api.create_repo("me/x")
    assert status(error) == 409
    assert api.create_repo("me/x", exist_ok=True).repo_id == "me/x"


def test_a_malformed_card_is_refused_before_the_commit(api):
    for header in ("- a list", "model-index:\n- name: x\n  results:\n  - task: {}"):
        with pytest.raises(ValueError, match="Invalid metadata"):
            commit(api, {"README.md": f"---\n{header}\n---\n".encode()})
    commit(api, {"README.md": b"---\nlicense: mit\npipeline_tag: image-classification\n---\n"})
    info = api.model_info("me/model")
    assert info.card_data.license == "mit"
    assert info.pipeline_tag == "image-classification"
    assert ModelCard.load(hf_hub_download("me/model", "README.md", endpoint=api.endpoint))


def test_long_listings_come_in_pages_and_downloads_go_on_where_they_broke_off(
    api, hub_server, tmp_path
):
    commit(api, {f"f/{i:04}": b"%d" % i for i in range(1005)} | {"w.bin": bytes(range(256)) * 8000})
    assert len(api.list_repo_files("me/model")) == 1007
    hub_server.faults.append(("GET", "resolve/main/w.bin", "cut"))
    path = api.hf_hub_download("me/model", "w.bin", cache_dir=tmp_path)
    with open(path, "rb") as file:
        assert file.read() == bytes(range(256)) * 8000
    assert not hub_server.faults
    files = HfFileSystem(hub_server.url, token=MINE)
    assert files.read_bytes("me/model/w.bin", start=300, end=310) == bytes(range(44, 54))


def test_a_space_keeps_its_variables(api):
    api.create_repo(
        "me/space",
        repo_type="space",
        space_sdk="gradio",
        space_variables=[{"key": "MODEL", "value": "me/model"}],
    )
    api.add_space_variable("me/space", "REVISION", "v1")
    api.delete_space_variable("me/space", "MODEL")
    api.add_space_secret("me/space", "KEY", "hush")
    assert {k: v.value for k, v in api.get_space_variables("me/space").items()} == {
        "REVISION": "v1"
    }
    assert api.get_space_runtime("me/space").stage == "NO_APP_FILE"
    assert api.space_info("me/space").sdk == "gradio"


def test_a_folder_can_be_seeded_and_survives_a_restart(hub_server, tmp_path):
    folder = tmp_path / "data"
    (folder / "plain").mkdir(parents=True)
    (folder / "plain/train.parquet").write_bytes(b"rows")
    (folder / "README.md").write_text("# Data")
    command = [sys.executable, "-m", "local_hub", "--root", tmp_path / "hub"]
    seed = f"--add=datasets/org/set={folder}"
    port = hub_server.url.rpartition(":")[2]  # taken
    refused = subprocess.run(
        [*command, seed, "--port", port], capture_output=True, text=True, timeout=60
    )
    assert refused.returncode == 1
    assert refused.stderr == f"Error: Port {port}: Address already in use. Choose another.\n"
    assert (tmp_path / "hub/token").stat().st_mode & 0o077 == 0
    got = snapshot_download(
        "org/set", repo_type="dataset", endpoint=hub_server.url, local_dir=tmp_path / "got"
    )
    with open(f"{got}/plain/train.parquet", "rb") as file:
        assert file.read() == b"rows"


def test_a_command_runs_against_it_with_its_token_and_nobody_elses(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_real_hub")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # nothing listens there
    code = "import huggingface_hub as h; print(h.create_repo('me/x'), h.get_token()[:3])"
    command = [sys.executable, "-m", "local_hub", "--root", tmp_path / "hub", "--run"]
    done = subprocess.run(
        [*command, sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/me/x hf_\n", done.stdout)


def test_only_a_commit_can_be_proposed_by_somebody_else(api, http):
    commit(api, {"a": b"1"})
    tag = {"tag": "v1"}
    requests = [
        ("DELETE", "/api/repos/delete", {"name": "model", "organization": "me"}),
        ("POST", "/api/models/me/model/tag/main", tag),
        ("POST", "/api/models/me/model/branch/dev", {}),
        ("DELETE", "/api/models/me/model/branch/main", {}),
        ("POST", "/api/models/me/model/variables", {"key": "a", "value": "b"}),
        ("GET", "/api/models/me/model/auth-check/write", {}),
    ]
    for method, path, body in requests:
        reply = http.request(method, f"{path}?create_pr=1", json=body, **as_user(OTHER))
        assert reply.status_code == 403, path
        assert reply.headers["X-Error-Message"]
    line = ("file", {"path": "a", "content": "Mg==", "encoding": "base64"})
    path, body = "/api/models/me/model/commit/main", ndjson(line)
    assert http.post(path, content=body, **as_user(OTHER)).status_code == 403
    assert http.post(f"{path}?create_pr=1", content=body, **as_user(READER)).status_code == 403
    reply = http.post(f"{path}?create_pr=1", content=body, **as_user(OTHER)).json()
    assert reply["pullRequestUrl"].endswith("/me/model/discussions/1")
    assert len(api.list_repo_commits("me/model")) == 2


@pytest.mark.parametrize("header", ["Host", "Origin"])
def test_requests_of_foreign_pages_are_refused(api, http, hub_server, header):
    port = hub_server.url.rsplit(":", 1)[1]
    scheme = "http://" if header == "Origin" else ""
    foreign = ["evil.example", f"evil.example:{port}", "127.0.0.1:1", "127.0.0.1", "localhost.x"]
    for value in [scheme + name for name in foreign] + (["null"] if header == "Origin" else []):
        reply = http.get("/api/models/me/model", headers={header: value})
        assert reply.status_code == 403, value
        assert reply.json()["error"] == reply.headers["X-Error-Message"]
    for name in (f"127.0.0.1:{port}", f"localhost:{port}"):
        reply = http.get("/api/models/me/model", headers={header: scheme + name})
        assert reply.status_code == 200


def test_a_large_file_belongs_to_the_repository_it_was_uploaded_to(api, http):
    secret = b"secret weights"
    api.create_repo("lab/secret", private=True)
    commit(api, {"model.safetensors": secret}, name="lab/secret")
    other = HfApi(api.endpoint, token=OTHER)
    other.create_repo("other/copy")
    reply = http.post(
        "/lab/secret.git/info/lfs/objects/batch", json=batch(secret), **as_user(OTHER)
    )
    assert (reply.status_code, reply.headers["X-Error-Code"]) == (404, "RepoNotFound")
    reply = http.post(
        "/other/copy.git/info/lfs/objects/batch", json=batch(secret), **as_user(OTHER)
    )
    assert reply.json()["objects"][0]["actions"]["upload"]  # as if nobody had it
    oid = hashlib.sha256(secret).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(secret)}\n"
    for operation in (
        lfs_line("stolen.bin", secret),
        ("file", {"path": "stolen.bin", "content": b64encode(pointer.encode()).decode()}),
    ):
        body = ndjson(operation)
        reply = http.post("/api/models/other/copy/commit/main", content=body, **as_user(OTHER))
        assert reply.status_code == 400
        assert "was not uploaded to this repository" in reply.headers["X-Error-Message"]
    reply = http.get("/lab/secret/resolve/main/model.safetensors", **as_user(OTHER))
    assert reply.status_code == 404
    assert http.get("/lab/secret/resolve/main/model.safetensors").content == secret


def test_object_ids_and_upload_addresses_are_checked(api, http):
    for oid in ("../../tokens.json", "a" * 63, "A" * 64, "", "g" * 64):
        reply = http.post("/me/model.git/info/lfs/objects/batch", json=batch(b"x", oid))
        assert reply.status_code == 400, oid
        line = ("lfsFile", {"path": "x.bin", "algo": "sha256", "oid": oid, "size": 1})
        reply = http.post("/api/models/me/model/commit/main", content=ndjson(line))
        assert reply.status_code == 400, oid
    reply = http.post("/me/model.git/info/lfs/objects/batch", json=batch(b"right"))
    href = reply.json()["objects"][0]["actions"]["upload"]["href"]
    assert httpx.put(href, content=b"wrong").status_code == 400
    assert httpx.put(href[:-1] + "x", content=b"right").status_code == 403
    assert httpx.put(href, content=b"right").status_code == 200
    reply = http.post("/me/model.git/info/lfs/objects/batch", json=batch(b"right"))
    assert "actions" not in reply.json()["objects"][0]


@pytest.mark.parametrize(
    "path", ["../a", "a/../b", "/etc/passwd", "", ".git/config", "a/.GIT/x", "a//b", ".", "a\0b"]
)
def test_unsafe_paths_are_refused(api, http, path):
    before = api.model_info("me/model").sha
    for key in ("file", "deletedFile"):
        body = ndjson((key, {"path": path, "content": "eA==", "encoding": "base64"}))
        reply = http.post("/api/models/me/model/commit/main", content=body)
        assert reply.status_code == 400
        assert "can't have a file" in reply.json()["error"]
    assert api.model_info("me/model").sha == before


def test_main_cannot_be_deleted(api):
    with pytest.raises(HfHubHTTPError, match="Cannot delete refs/heads/main") as error:
        api.delete_branch("me/model", branch="main")
    assert status(error) == 403
    assert [branch.name for branch in api.list_repo_refs("me/model").branches] == ["main"]


def test_unknown_licenses_and_pipeline_tags_are_refused(api):
    for metadata in ("license: mine", "pipeline_tag: cats", "license: [mit, mine]"):
        with pytest.raises(ValueError, match=f'"{metadata.split(":")[0]}" must be one of'):
            commit(api, {"README.md": f"---\n{metadata}\n---\n".encode()})
    for metadata in ("license: other", "license: [mit, cc0-1.0]", "date: 2024-01-01\nx: .nan"):
        commit(api, {"README.md": f"---\n{metadata}\n---\n".encode()})
    assert api.model_info("me/model").card_data.date == "2024-01-01"


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/api/repos/create", b"no JSON"),
        ("POST", "/api/repos/create", b"[]"),
        ("POST", "/api/repos/create", b"{}"),
        ("POST", "/api/repos/create", b'{"name": "a/../b"}'),
        ("POST", "/api/repos/create", b'{"name": "x", "type": "bucket"}'),
        ("POST", "/api/repos/create", b"\xff"),
        ("POST", "/api/validate-yaml", b"{}"),
        ("POST", "/api/models/me/model/preupload/main", b'{"files": [{"path": 1}]}'),
        ("POST", "/api/models/me/model/preupload/main", b'{"files": 3}'),
        ("POST", "/me/model.git/info/lfs/objects/batch", b'{"objects": [{}]}'),
        ("POST", "/api/models/me/model/commit/main", b""),
        ("POST", "/api/models/me/model/commit/main", b"{}"),
        ("POST", "/api/models/me/model/commit/main", ndjson(("file", {"path": "a"}))),
        ("POST", "/api/models/me/model/commit/main", ndjson(("file", {"path": "\ud800"}))),
        ("POST", "/api/models/me/model/tag/main", b'{"tag": "a b"}'),
        ("POST", "/api/models/me/model/tag/main", b'{"tag": "\\ud800"}'),
        ("POST", "/api/models/me/model/tag/main", b'{"tag": "a\\u0000"}'),
        ("GET", "/api/models/me/model/tree/main?cursor=x", b""),
    ],
)
def test_malformed_requests_get_an_error_reply(api, http, method, path, body):
    headers = {"Content-Type": "application/json"}
    reply = http.request(method, path, content=body, headers=headers)
    assert reply.status_code == 400
    assert reply.json()["error"] == reply.headers["X-Error-Message"]
    assert api.whoami()["name"] == "me"


def test_what_is_no_http_gets_an_error_reply(hub_server):
    with socket.create_connection(("127.0.0.1", int(hub_server.url.rsplit(":", 1)[1]))) as raw:
        raw.sendall(b"Hello\r\n\r\n")
        assert raw.recv(12) == b"HTTP/1.1 400"


def test_names_without_an_owner_and_unknown_ones_are_not_found(api, http):
    for path in (
        "/api/models/gpt2",
        "/api/models/gpt2/revision/main",
        "/api/models/gpt2/tree/main",
        "/api/datasets/squad/refs",
        "/gpt2/resolve/main/config.json",
        "/datasets/squad/resolve/main/a/b",
        "/api/models/me/..%2F..%2Ftokens",
        "/api/models/..%2F..",
    ):
        reply = http.get(path)
        assert (reply.status_code, reply.headers["X-Error-Code"]) == (404, "RepoNotFound"), path
        assert reply.headers["X-Error-Message"]
    reply = http.head("/gpt2/resolve/main/config.json")
    assert (reply.status_code, reply.headers["X-Error-Code"]) == (404, "RepoNotFound")
    assert not api.repo_exists("gpt2")
    reply = http.get("/api/models/me/model/tree/main/%00")
    assert (reply.status_code, reply.headers["X-Error-Code"]) == (404, "EntryNotFound")
    reply = http.get("/api/nothing")
    assert (reply.status_code, "X-Error-Code" in reply.headers) == (404, False)
    assert reply.headers["X-Error-Message"]


@pytest.mark.parametrize(
    "revision", ["main~1", "main^", "main@{0}", "@", "a:b", "%00", "x..y", "-a"]
)
def test_gits_own_notations_are_no_revisions(api, http, revision):
    commit(api, {"a": b"1"})
    reply = http.get(f"/me/model/resolve/{revision}/a")
    assert (reply.status_code, reply.headers["X-Error-Code"]) == (404, "RevisionNotFound")


def test_a_damaged_object_is_replaced_by_the_next_push(api, hub_server, tmp_path):
    weights = bytes(range(256)) * 100
    commit(api, {"model.safetensors": weights})
    stored = hub_server.root / "models/me/model/objects" / hashlib.sha256(weights).hexdigest()
    stored.write_bytes(weights[:-1] + b"x")
    commit(api, {"model.safetensors": weights})
    assert stored.read_bytes() == weights
    assert {len(file.name) for file in stored.parent.iterdir()} == {40, 64}  # nothing half sent
    path = api.hf_hub_download("me/model", "model.safetensors", cache_dir=tmp_path)
    with open(path, "rb") as file:
        assert file.read() == weights


def test_ranges_of_small_and_large_files(api, http):
    files = {"small": bytes(range(200)), "large.bin": bytes(range(256)) * 5000}
    commit(api, files)
    for name, content in files.items():
        url = f"/me/model/resolve/main/{name}"
        reply = http.get(url, headers={"Range": "bytes=10-19"})
        assert (reply.status_code, reply.content) == (206, content[10:20])
        assert reply.headers["Content-Range"] == f"bytes 10-19/{len(content)}"
        assert http.get(url, headers={"Range": "bytes=150-"}).content == content[150:]
        assert http.get(url, headers={"Range": f"bytes={len(content)}-"}).status_code == 416
        head = http.head(url)
        assert head.headers["Content-Length"] == str(len(content))
        assert head.headers["X-Repo-Commit"] == api.model_info("me/model").sha
        assert re.fullmatch('"[0-9a-f]{40}"|"[0-9a-f]{64}"', head.headers["ETag"])


def test_commits_at_the_same_time_all_land(api):
    with ThreadPoolExecutor(16) as pool:
        names = [f"file{i}" for i in range(48)]
        done = list(pool.map(lambda name: commit(api, {name: name.encode()}), names))
    assert len({result.oid for result in done}) == 48
    assert set(api.list_repo_files("me/model")) == {".gitattributes", *names}
    assert len(api.list_repo_commits("me/model")) == 49


@pytest.mark.parametrize("action", ["drop", "lose", "cut", "corrupt", 503, Response(b"{}")])
def test_faults_happen_once(hub_server, http, action):
    calls = []
    hub_server.faults.append(("GET", "whoami", lambda: calls.append(1)))
    whoami = http.get("/api/whoami-v2").content
    assert calls == [1]
    hub_server.faults += [("POST", "whoami", "drop"), ("GET", "who", action)]
    if action in ("drop", "lose", "cut"):
        with pytest.raises(httpx.TransportError):
            http.get("/api/whoami-v2")
    else:
        reply = http.get("/api/whoami-v2")
        expected = {503: b"", "corrupt": whoami[:-1] + bytes([whoami[-1] ^ 1])}
        assert reply.content == expected.get(action, b"{}")
    assert http.get("/api/whoami-v2").content == whoami
    assert hub_server.faults == [("POST", "whoami", "drop")]
