import getpass
import json
import os
import platform
import socket
import subprocess
from typing import Any

import jax
import numpy as np
import pytest

from qlora_jax import environment


def test_describe_is_plain_json_and_true():
  description = environment.describe()
  assert json.loads(json.dumps(description)) == description
  device = jax.devices()[0]
  assert description["device"] == {
    "platform": device.platform,
    "kind": device.device_kind,
    "count": jax.device_count(),
    "processes": 1,
  }
  versions = description["versions"]
  assert versions["python"] == platform.python_version()
  assert versions["jax"] == jax.__version__
  assert versions["numpy"] == np.__version__
  assert {"jaxlib", "flax", "optax", "orbax-checkpoint", "qlora_jax"} <= versions.keys()
  assert description["host"]["cpu_cores"] >= 1


def test_a_directory_that_can_only_be_read_is_left_alone(tmp_path, monkeypatch):
  (tmp_path / "program-cache").write_bytes(bytes(7))
  config: Any = jax.config
  before = environment.compiled_programs()
  # Root may write anywhere, whatever the mode says.
  monkeypatch.setattr(environment.os, "access", lambda *_: False)
  try:
    environment.keep_compiled_programs(str(tmp_path), tmp_path / "default")
    assert environment.compiled_programs() == str(tmp_path)
    assert config.jax_compilation_cache_max_size == -1
    assert [path.name for path in tmp_path.iterdir()] == ["program-cache"]
    # One that is still to be made will take files.
    environment.keep_compiled_programs(None, tmp_path / "default")
    environment.keep_compiled_programs("auto", tmp_path / "default")
    assert config.jax_compilation_cache_max_size == environment.MOST_COMPILED
  finally:
    environment.keep_compiled_programs(before, tmp_path / "default")


def test_describe_names_neither_host_nor_user(monkeypatch):
  monkeypatch.setattr(socket, "gethostname", lambda: "secret")
  monkeypatch.setattr(platform, "node", lambda: "secret")
  monkeypatch.setattr(getpass, "getuser", lambda: "secret")
  monkeypatch.setenv("HOME", "/home/secret")
  assert "secret" not in json.dumps(environment.describe())


@pytest.fixture
def repository(tmp_path, monkeypatch):
  """A git repository with one commit of `code.py`, untouched by the settings of this machine."""
  monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
  monkeypatch.setenv("GIT_CONFIG_SYSTEM", os.devnull)
  for name in [name for name in os.environ if name.startswith("GIT_") and "CONFIG" not in name]:
    monkeypatch.delenv(name)  # a hook of git sets GIT_DIR and others for what it runs
  git(tmp_path, "init", "--quiet")
  (tmp_path / "code.py").write_text("x = 1\n")
  git(tmp_path, "add", "code.py")
  git(tmp_path, "-c", "user.name=t", "-c", "user.email=t@t", "commit", "--quiet", "-m", "first")
  return tmp_path


def git(directory, *arguments):
  command = ["git", "-C", str(directory), *arguments]
  return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_git_state(repository):
  commit = git(repository, "rev-parse", "HEAD")
  assert len(commit) == 40
  assert environment.git_state(repository / "code.py") == {"commit": commit, "dirty": False}
  (repository / "results.txt").write_text("untracked\n")
  assert environment.git_state(repository / "code.py") == {"commit": commit, "dirty": False}
  (repository / "code.py").write_text("x = 2\n")
  assert environment.git_state(repository / "code.py") == {"commit": commit, "dirty": True}


def test_git_state_of_a_package_installed_below_somebody_elses_repository(repository):
  package = repository / ".venv" / "qlora_jax"
  package.mkdir(parents=True)
  (package / "environment.py").write_text("")
  assert environment.git_state(package / "environment.py") is None


def test_git_state_without_a_commit(repository):
  git(repository, "update-ref", "-d", "HEAD")
  assert environment.git_state(repository / "code.py") is None


def test_git_state_outside_a_repository(tmp_path, monkeypatch):
  monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
  assert environment.git_state(tmp_path / "code.py") is None


def test_git_state_where_there_is_no_git(repository, monkeypatch):
  monkeypatch.setenv("PATH", "")
  assert environment.git_state(repository / "code.py") is None
