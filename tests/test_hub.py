"""Meta-parameters from folders and from a hub that a folder stands in for; the network is never used."""

import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from lopt import HRNN, HRNNConfig, MetaParams, hub

META = MetaParams.init(HRNNConfig(attention=True), seed=3)


def equal(left: MetaParams, right: MetaParams) -> bool:
    return left.config == right.config and torch.equal(left.flat(), right.flat())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    META.save(tmp_path / hub.FILE, card={"author": "somebody"})
    return tmp_path


class FakeHub:
    """huggingface_hub, as far as lopt uses it, over a folder `root`/user/name. `offline` makes every call fail."""

    def __init__(self, root: Path, errors: Any) -> None:
        self.root, self.errors, self.offline = root, errors, False
        self.cache: dict[str, Path] = {}
        self.calls: list[str] = []

    def HfApi(self, token: Any = None) -> "FakeHub":
        return self

    def _connect(self, call: str) -> None:
        self.calls.append(call)
        if self.offline:
            raise RuntimeError("[Errno -2] Name or service not known")

    def model_info(self, name: str, revision: str | None, timeout: float) -> Any:
        if name.count("/") > 1:
            raise self.errors.HFValidationError("Repo id must be in the form 'namespace/repo_name'")
        self._connect("model_info")
        assert 0 < timeout <= 30
        if not (self.root / name).is_dir():
            raise self.errors.RepositoryNotFoundError("404")
        if revision not in (None, "main"):
            raise self.errors.RevisionNotFoundError("404")
        return types.SimpleNamespace(sha="c0ffee")

    def hf_hub_download(
        self, name: str, file: str, revision: str | None = None, local_files_only: bool = False, token: Any = None
    ) -> str:
        if local_files_only:
            if name in self.cache:
                return str(self.cache[name])
            raise self.errors.LocalEntryNotFoundError("not in the cache")
        self._connect("download")
        assert revision == "c0ffee"
        if not (self.root / name / file).is_file():
            raise self.errors.EntryNotFoundError("404")
        self.cache[name] = self.root / name / file
        return str(self.cache[name])

    def create_repo(self, name: str, private: bool, exist_ok: bool) -> None:
        self._connect("create_repo")
        (self.root / name).mkdir(parents=True, exist_ok=exist_ok)

    def upload_file(self, path_or_fileobj: Path, path_in_repo: str, repo_id: str, commit_message: str) -> Any:
        self._connect("upload_file")
        shutil.copy(path_or_fileobj, self.root / repo_id / path_in_repo)
        return types.SimpleNamespace(commit_url=f"hub/{repo_id}/commit/c0ffee")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    class NotFound(Exception):
        pass

    class LocalNotFound(NotFound):
        pass

    errors = types.ModuleType("huggingface_hub.errors")
    errors.HFValidationError = type("HFValidationError", (ValueError,), {})
    errors.RepositoryNotFoundError = type("RepositoryNotFoundError", (Exception,), {})
    errors.RevisionNotFoundError = type("RevisionNotFoundError", (Exception,), {})
    errors.EntryNotFoundError, errors.LocalEntryNotFoundError = NotFound, LocalNotFound
    stand_in = FakeHub(tmp_path / "hub", errors)
    monkeypatch.setitem(sys.modules, "huggingface_hub", stand_in)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    return stand_in


def test_a_folder_is_read_without_a_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert equal(MetaParams.from_pretrained(folder), META)
    assert equal(MetaParams.from_pretrained(str(folder)), META)
    META.to(dtype=torch.float64).save(folder / "double.safetensors")
    assert MetaParams.from_pretrained(folder, file="double.safetensors").dtype == torch.float64
    assert MetaParams.from_pretrained(folder / "double.safetensors").dtype == torch.float64


def test_without_huggingface_hub_a_repository_is_refused_with_a_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (lambda: MetaParams.from_pretrained("user/name"), lambda: META.push_to_hub("user/name")):
        with pytest.raises(ImportError, match=r"huggingface_hub is not installed.*pip install \"lopt\[huggingface\]\""):
            call()


def test_what_was_pushed_is_what_is_read_and_trains(fake: FakeHub) -> None:
    assert META.push_to_hub("user/name", card={"author": "somebody"}) == "hub/user/name/commit/c0ffee"
    loaded = MetaParams.from_pretrained("user/name", revision="main")
    assert equal(loaded, META)
    assert list((fake.root / "user/name").iterdir()) == [fake.root / "user/name" / hub.FILE]
    param = torch.nn.Parameter(torch.zeros(3))
    param.grad = torch.ones(3)
    HRNN([param], meta=loaded).step()
    assert param.ne(0).all()


def test_a_hub_out_of_reach_is_an_error_at_the_first_call_and_the_cache_is_used(fake: FakeHub) -> None:
    META.push_to_hub("user/name")
    fake.offline, fake.calls = True, []
    with pytest.raises(ConnectionError, match=r"did not serve repository user/name \(RuntimeError: .*Name or service"):
        MetaParams.from_pretrained("user/name")
    with pytest.raises(ConnectionError, match="did not serve repository user/name"):
        META.push_to_hub("user/name")
    assert fake.calls == ["model_info", "create_repo"]
    fake.offline = False
    MetaParams.from_pretrained("user/name")
    fake.offline = True
    assert equal(MetaParams.from_pretrained("user/name"), META)


def test_what_is_not_there_is_named(fake: FakeHub, tmp_path: Path) -> None:
    META.push_to_hub("user/name")
    for arguments, said in (
        ({"name": "user/other"}, "the hub has no repository user/other"),
        ({"name": "user/name", "revision": "v2"}, "no repository user/name at revision 'v2'"),
        ({"name": "user/name", "file": "other.safetensors"}, "repository user/name holds no other.safetensors"),
        ({"name": tmp_path}, f"folder '{tmp_path}' holds no {hub.FILE}"),
    ):
        with pytest.raises(FileNotFoundError, match=said):
            MetaParams.from_pretrained(**arguments)
    with pytest.raises(ValueError, match="'no/such/folder' is neither a folder nor the name of a repository"):
        MetaParams.from_pretrained("no/such/folder")


@pytest.mark.parametrize("damage", ["cut off", "text", "other tensors", "one value"])
def test_a_damaged_or_foreign_file_is_refused_by_name(fake: FakeHub, damage: str) -> None:
    META.push_to_hub("user/name")
    path = fake.root / "user/name" / hub.FILE
    if damage == "cut off":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "text":
        path.write_text("version https://git-lfs.github.com/spec/v1")
    elif damage == "other tensors":
        import safetensors.torch

        safetensors.torch.save_file({"weight": torch.zeros(2)}, path)
    else:
        path.write_bytes(path.read_bytes().replace(b'"level0.init"', b'"level9.init"'))
    with pytest.raises(ValueError, match=rf"user/name/{hub.FILE}"):
        MetaParams.from_pretrained("user/name")


def test_the_real_hub_client_has_what_is_called() -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub", reason='pip install "lopt[huggingface]" to run')
    import inspect

    from huggingface_hub import errors

    for name in ("HFValidationError", "RepositoryNotFoundError", "RevisionNotFoundError", "LocalEntryNotFoundError"):
        assert issubclass(getattr(errors, name), Exception)
    assert issubclass(errors.LocalEntryNotFoundError, errors.EntryNotFoundError)
    for function, stand_in in (
        (huggingface_hub.HfApi.model_info, FakeHub.model_info),
        (huggingface_hub.hf_hub_download, FakeHub.hf_hub_download),
        (huggingface_hub.HfApi.create_repo, FakeHub.create_repo),
        (huggingface_hub.HfApi.upload_file, FakeHub.upload_file),
    ):
        given = set(inspect.signature(stand_in).parameters) - {"self", "name", "file"}
        assert given <= set(inspect.signature(function).parameters)
