"""Pushing bundles, plugins and modules to the hub: completely and in one commit, or not at all."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from variator_export.bundle.files import BundleFiles
from variator_export.bundle.manifest import MANIFEST_NAME, BackboneEntry, Manifest, is_bundle
from variator_export.bundle.origin import ORIGIN_REPORT
from variator_export.bundle.variant_files import MODULE_CONFIG_NAME, MODULE_TENSORS_NAME
from variator_export.core.environment import require_export
from variator_export.core.errors import UserError
from variator_export.core.hub import HUB_PREFIX, HubSource, commit, download, files_of, parse_hub_source
from variator_export.core.json_file import read_json_object
from variator_export.model.card import CARD_NAME, PLOT_NAME
from variator_export.model.plugin_file import load_plugin
from variator_export.model.plugin_layout import CONFIG_NAME, TENSORS_NAME
from variator_export.model.source import is_plain_folder

_REPORTS = "reports"
# The files that a repository may have before anything is pushed to it.
_OF_THE_HUB = {".gitattributes", CARD_NAME}


@dataclass(frozen=True)
class Pushed:
    """Result of a push.

    Attributes:
        repo: The repository, as ORGANISATION/NAME.
        commit_url: The URL of the commit.
        files: Number of files that the commit adds.
        removed: Number of files of the previous bundle that the commit removes.
    """

    repo: str
    commit_url: str
    files: int
    removed: int


def push(folder: Path, repository: str, *, private: bool | None = None) -> Pushed:
    """Push a bundle, or folders of plugins or modules, to a repository on the hub.

    The repository is created if it does not exist. A repository with other content is rejected. Files of a
    previous bundle in the repository are removed if the new bundle does not have them. A model card is
    written if the repository has none, or if its card was written by an earlier push.

    Args:
        folder: A bundle, a folder of a plugin or of modules, or a folder of those, as `train` writes it.
        repository: ORGANISATION/NAME[@BRANCH].
        private: Whether a newly created repository is private; None for the organisation's default.

    Raises:
        UserError: The folder is none of these or is damaged, the repository has other content, no token with
            write access is available, or the hub cannot be reached.
    """
    target = check_repository(repository)
    files, card = _bundle(folder) if is_bundle(folder) else (_trained(folder), None)
    there = files_of(target.repo, target.revision)
    removed = _removable(target, there, files) if there else []
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(name, str(path)) for name, path in sorted(files.items())
    ]
    if card is not None and CARD_NAME not in files and not _has_own_card(target, there or set()):
        operations.append(CommitOperationAdd(CARD_NAME, card.encode()))
    operations += [CommitOperationDelete(name) for name in removed]
    message = f"{folder.resolve().name}, with variator-export"
    url = commit(target.repo, operations, message, revision=target.revision, private=private)
    return Pushed(target.repo, url, len(operations) - len(removed), len(removed))


def check_repository(repository: str) -> HubSource:
    """Parse the repository to push to.

    Raises:
        UserError: The repository is not written as ORGANISATION/NAME[@BRANCH].
    """
    target = parse_hub_source(repository)
    if target.subfolder or "/" not in target.repo:
        what = "names a folder inside a repository" if target.subfolder else "names no organisation"
        raise UserError(f"{repository} {what}.", "Give ORGANISATION/NAME[@BRANCH].")
    return target


def _bundle(folder: Path) -> tuple[dict[str, Path], str]:
    bundle = BundleFiles(folder)
    bundle.check_all()
    files = {name: folder / name for name in (MANIFEST_NAME, *bundle.manifest.files)}
    for path in (folder / _REPORTS).rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not path.is_symlink() and name != ORIGIN_REPORT:  # a path of this machine
            files[name] = path
    return files, _bundle_card(bundle.manifest, folder.resolve().name)


def _trained(folder: Path) -> dict[str, Path]:
    """Return the files of a plugin or of modules at the root, or of several in subfolders."""
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}.", "Give a bundle, or a folder that `train` wrote.")
    places = (folder, *sorted(path for path in folder.iterdir() if path.is_dir()))
    files = {}
    for place, config, tensors, check in (
        (place, *kind) for place in places for kind in _TRAINED if (place / kind[0]).is_file()
    ):
        check(place)  # rejects damaged files
        for name in (config, tensors, CARD_NAME, PLOT_NAME):
            if (place / name).is_file():
                files[(place / name).relative_to(folder).as_posix()] = place / name
    if not files:
        raise UserError(
            f"{folder} holds neither a bundle nor a plugin nor modules.",
            f"Give a folder with {MANIFEST_NAME}, {CONFIG_NAME} or {MODULE_CONFIG_NAME}, or a folder of such "
            "folders.",
        )
    return files


def _check_modules(folder: Path) -> None:
    require_export()
    from variator_export.model.modular.weights import load_modules

    load_modules(folder)


# What `train` writes: the configuration, the tensors, and a check of both.
_TRAINED: tuple[tuple[str, str, Callable[[Path], object]], ...] = (
    (CONFIG_NAME, TENSORS_NAME, load_plugin),
    (MODULE_CONFIG_NAME, MODULE_TENSORS_NAME, _check_modules),
)


def _removable(target: HubSource, there: set[str], files: dict[str, Path]) -> list[str]:
    """List the files of the previous bundle that the new bundle does not have.

    Raises:
        UserError: The repository has other content than a previous version of what is pushed.
    """
    if there <= _OF_THE_HUB | files.keys():
        return []
    if MANIFEST_NAME in files and MANIFEST_NAME in there:
        old = _remote_manifest(target)
        if old is not None:
            named = {*old.get("files", {}), *(name for name in there if name.startswith(f"{_REPORTS}/"))}
            return sorted((there & named) - files.keys())
    configs = CONFIG_NAME, MODULE_CONFIG_NAME
    if not {MANIFEST_NAME} & (files.keys() | there) and any(name.endswith(configs) for name in there):
        return []  # the repository holds other plugins or modules, which are kept
    strange = sorted(there - _OF_THE_HUB - files.keys())
    raise UserError(
        f"{target} holds something else: {', '.join(strange[:5])}.",
        "Choose another repository, or a new branch of it: ORGANISATION/NAME@BRANCH",
    )


def _has_own_card(target: HubSource, there: set[str]) -> bool:
    """Check whether a repository's model card was written by a person, not by an earlier push of a bundle."""
    if not {MANIFEST_NAME, CARD_NAME} <= there:
        return CARD_NAME in there
    root = download(target, [MANIFEST_NAME, CARD_NAME], [(MANIFEST_NAME,), (CARD_NAME,)])
    card = (root / CARD_NAME).read_text(encoding="utf-8", errors="replace")
    title = re.search(r"^# (.+)$", card, re.MULTILINE)
    try:
        manifest = Manifest.model_validate_json((root / MANIFEST_NAME).read_bytes())
    except ValidationError:  # a manifest of another version, whose card cannot be reconstructed
        return True
    return title is None or card != _bundle_card(manifest, title[1])


def _remote_manifest(target: HubSource) -> dict[str, Any] | None:
    root = download(target, [MANIFEST_NAME], [(MANIFEST_NAME,)])
    return read_json_object(root / MANIFEST_NAME, "Choose another repository.") if is_bundle(root) else None


def _bundle_card(manifest: Manifest, name: str) -> str:
    """Build a model card from the manifest. The hub reads the card's front matter."""
    backbone = manifest.backbone
    head = ["---", "library_name: variator-export"]
    if backbone.source.startswith(HUB_PREFIX):
        head.append(f"base_model: {parse_hub_source(backbone.source).repo}")
    if backbone.task is not None:
        head.append(f"pipeline_tag: {backbone.task}")
    head += ["tags:", "- onnx", "- variator", "---", ""]
    rows = [
        f"| {v.name} | {v.assembly_spec or 'original'} | {v.ratio} | {v.plugin_state} | "
        f"{', '.join(v.graphs.values())} |"
        for v in manifest.variants
    ]
    modules = " and modules" if manifest.modules else ""
    made = manifest.made_by
    return "\n".join(
        [
            *head,
            f"# {name}",
            "",
            f"`{backbone.architecture}` from `{_public(backbone.source)}` with compression plugins{modules}, "
            f"as ONNX graphs in {manifest.precision}. Each graph was compared with eager PyTorch "
            f"{made.get('torch')} before it was published.",
            "",
            *_label_words(backbone),
            "| variant | layers | ratio | plugin | graph |",
            "|---|---|---:|---|---|",
            *rows,
            "",
            *_use(max(v.ratio for v in manifest.variants if v.assembly is None)),
        ]
    )


def _label_words(backbone: BackboneEntry) -> list[str]:
    """Return what the scores of a classifier with label words are of."""
    if backbone.label_words is None:
        return []
    words = ", ".join(f"{label} is the word `{word}`" for label, word in backbone.label_words.items())
    after = f", read after `{backbone.decoder_prompt}`" if backbone.decoder_prompt else ""
    return [f"The classes are scores of words: {words}{after}.", ""]


def _public(source: str) -> str:
    """Return a source without its path on this machine."""
    return Path(source).name if is_plain_folder(source) else source


def _use(ratio: int) -> Sequence[str]:
    return [
        "```",
        "pip install 'variator-export[onnxruntime]'",
        "hf download REPOSITORY --local-dir bundle",
        f'variator-export run bundle --ratio {ratio} --text "…"',
        "```",
        "",
    ]
