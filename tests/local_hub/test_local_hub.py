"""The local Hub, through the real client."""

import re
import subprocess
import sys

import pytest
from conftest import MINE, OTHER, READER, ROOT
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
    assert checked.checked_count == 4
    assert not checked.mismatches
    entries = {e.path: e for e in api.list_repo_tree("lab/thing", repo_type=repo_type)}
    assert set(entries) == {".gitattributes", "a b", "big.safetensors", "no"}
    assert entries["big.safetensors"].lfs.size == 256 * 9000


def test_the_repository_is_real_git_and_holds_a_pointer(api, hub_server):
    commit(api, {"model.safetensors": b"weights"})
    git = ["git", "--git-dir", str(hub_server.root / "models/me/model.git")]
    assert subprocess.run([*git, "fsck", "--strict"], capture_output=True).returncode == 0
    pointer = subprocess.check_output([*git, "show", "main:model.safetensors"], text=True)
    assert pointer.startswith("version https://git-lfs.github.com/spec/v1\noid sha256:")


def test_a_large_file_must_be_there_before_its_commit(api, hub_server):
    before = api.model_info("me/model").sha
    weights = CommitOperationAdd("model.safetensors", b"weights")
    api.preupload_lfs_files("me/model", [weights])
    next(hub_server.root.glob("lfs/*/*")).unlink()
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
    commit(api, {f"f/{i:04}": b"x" for i in range(1005)} | {"w.bin": bytes(range(256)) * 8000})
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
    command = [sys.executable, ROOT / "scripts/local_hub.py", "--root", tmp_path / "hub"]
    wish = f"--add=datasets/org/set={folder}"
    refused = subprocess.run(
        [*command, wish, "--host", "0.0.0.0"], capture_output=True, text=True, timeout=60
    )
    assert refused.returncode == 1
    assert refused.stderr == "Error: The local Hub answers on loopback only, not on 0.0.0.0.\n"
    assert (tmp_path / "hub/token").stat().st_mode & 0o077 == 0
    got = snapshot_download(
        "org/set", repo_type="dataset", endpoint=hub_server.url, local_dir=tmp_path / "got"
    )
    with open(f"{got}/plain/train.parquet", "rb") as file:
        assert file.read() == b"rows"


def test_a_command_runs_against_it_with_its_token_and_nobody_elses(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_real_hub")
    code = "import huggingface_hub as h; print(h.create_repo('me/x'), h.get_token()[:3])"
    command = [sys.executable, ROOT / "scripts/local_hub.py", "--root", tmp_path / "hub", "--run"]
    done = subprocess.run(
        [*command, sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/me/x hf_\n", done.stdout)
