"""Models by hub id: `org/name`, or `org/name@revision`."""

import os
import re
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, errors

_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(@(?P<revision>[\w./-]+))?")

# Weights in safetensors, and what is read beside them: never the pickled copies of the same.
_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "additional_chat_templates/*")


def resolve(path: str | os.PathLike[str]) -> Path:
  """The directory of a model: the path, or a hub id's in huggingface_hub's cache.

  A path that exists wins. The cache, its place (HF_HOME), the token and the offline mode
  (HF_HUB_OFFLINE) are huggingface_hub's.

  Raises:
    FileNotFoundError: no such directory, and no such model on the hub, or none in the cache when
      the hub is out of reach.
  """
  directory = Path(path).absolute()
  if directory.is_dir():
    return directory
  text = os.fspath(path)
  match = _ID.fullmatch(text)
  if match is None:
    raise FileNotFoundError(
      f"{directory}: no such directory; a model is a directory with config.json and "
      "model.safetensors (or its index), or a hub id, org/name[@revision]"
    )
  try:
    return Path(
      huggingface_hub.snapshot_download(
        match["repo"], revision=match["revision"], allow_patterns=list(_FILES)
      )
    )
  # ValueError: what some versions raise for an id or a revision of bad form.
  except (errors.HfHubHTTPError, errors.HFValidationError, OSError, ValueError) as error:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    offline = " (offline mode is on)" if constants.HF_HUB_OFFLINE else ""
    raise FileNotFoundError(
      f"{text}: no such directory, and not to be had from the hub{offline}: {reason}"
    ) from None
