"""The rows of the benchmarks' files."""

import shutil
import subprocess
from pathlib import Path

import pytest

from lopt.bench import results


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_gits_or_the_one_that_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("LOPT_COMMIT", raising=False)
    assert results.commit() == "unknown"
    monkeypatch.setenv("LOPT_COMMIT", "0123abc")
    assert results.commit() == "0123abc"

    def git(*words: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        command = ["git", "-C", tmp_path, *identity, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    (tmp_path / "file").write_text("one")
    git("init")
    git("add", "file")
    git("commit", "-m", "one")
    name = git("rev-parse", "--short", "HEAD").strip()
    assert results.commit() == name
    (tmp_path / "file").write_text("two")
    assert results.commit() == name + "+"
