"""Reading a bundle: no file is opened until its path, size and hash match the manifest."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from variator_export.bundle.engine_records import BUILT_ONLY, EngineRecord, read_records
from variator_export.bundle.manifest import (
    BACKBONE_WEIGHTS,
    EngineEntry,
    Manifest,
    Sidecar,
    Variant,
    read_manifest,
    rebuild_hint,
)
from variator_export.bundle.parts import plugin_part
from variator_export.bundle.publishing import recover
from variator_export.bundle.variant_files import VariantFiles
from variator_export.core.errors import UserError
from variator_export.core.hashing import sha256_file, sha256_json
from variator_export.core.json_file import read_json_object
from variator_export.core.validation import describe_validation_error

_COMPILE_AGAIN = "Compile the engine again: variator-export compile"


class BundleFiles:
    """A bundle on disk.

    Attributes:
        path: The bundle's folder.
        manifest: The content of `manifest.json`.
    """

    def __init__(self, path: str | Path) -> None:
        """Open a bundle: read its manifest, and check that every file exists, is no link and has its size.

        Raises:
            UserError: A check fails; the message names the file.
        """
        self.path = Path(path)
        recover(self.path)
        self.manifest: Manifest = read_manifest(self.path)
        self._checked: set[str] = set()
        for name in self.manifest.files:
            self._check_entry(name)

    def file(self, name: str) -> Path:
        """The path of a file of the bundle. The file's hash is checked the first time.

        Raises:
            UserError: The file changed since the bundle was built.
        """
        if name not in self._checked:
            self._check_entry(name)
            found, expected = sha256_file(self.path / name), self.manifest.files[name].sha256
            if found != expected:
                raise UserError(
                    f"{self.path / name} has the sha256 {found}; the manifest says {expected}.",
                    rebuild_hint(self.path),
                )
            self._checked.add(name)
        return self.path / name

    def check_unchanged(self) -> None:
        """Check that no build has published another bundle here since this one was opened.

        Raises:
            UserError: A build has.
        """
        if read_manifest(self.path) != self.manifest:
            raise UserError(
                f"{self.path} was published again while it was being opened.", "Open the bundle again."
            )

    def check_all(self) -> None:
        """Check the hash of every file.

        Raises:
            UserError: A hash differs.
        """
        for name in self.manifest.files:
            self.file(name)

    def graph(self, name: str) -> Path:
        """The path of an ONNX file. The hashes of all weight files that it may refer to are checked first."""
        for other in self.manifest.files:
            if other.endswith(".safetensors") and not other.startswith("reference/"):
                self.file(other)
        return self.file(name)

    def variant(self, choice: int | str) -> Variant:
        """A variant by its ratio or its name.

        Raises:
            UserError: No variant matches, or several variants have this ratio.
        """
        variants = self.manifest.variants
        found = [v for v in variants if v.answers_to(choice)]
        there = ", ".join(f"{v.name} (ratio {v.ratio})" for v in variants)
        if not found:
            raise UserError(
                f"{self.path} has no variant {choice!r}; it has {there}.",
                "Add one: build into this folder again with a recipe or a --plugin of that ratio.",
            )
        if len(found) > 1:
            raise UserError(
                f"{self.path} has several variants of ratio {choice}: {', '.join(v.name for v in found)}.",
                f"Name one of them: --variant {found[0].name} (in Python: ratio={found[0].name!r}).",
            )
        return found[0]

    def refuse_decoder(self, what: str) -> None:
        """Refuse a bundle of a model that generates text.

        Args:
            what: What does not know such models, as the subject of a sentence.

        Raises:
            UserError: The bundle has a decoder.
        """
        if self.manifest.backbone.generates:
            raise UserError(
                f"{self.path} generates text, which {what} does not support yet.",
                "build, compile, verify, evaluate, bench, inspect and run do. For its encoder alone, build "
                "it with --task feature-extraction.",
            )

    def variant_files(self, variant: Variant) -> VariantFiles:
        """The files of a variant's plugin and modules, after their hashes are checked."""
        plugin = None if variant.plugin is None else variant.plugin.folder
        modules = tuple(self.manifest.modules[name].folder for name in variant.modules)
        for folder in (*modules, *((plugin,) if plugin is not None else ())):
            for name in self.manifest.files:
                if name.startswith(f"{folder}/"):
                    self.file(name)
        return VariantFiles(self.path, plugin, variant.assembly, modules, self.manifest.switches(variant))

    def graph_hashes(self) -> dict[str, str]:
        """A hash of each variant's graphs, by its name: what decides its speed, but not its numbers."""
        return {variant.name: self._hash_of(variant.graphs.values()) for variant in self.manifest.variants}

    def variant_hashes(self) -> dict[str, str]:
        """A hash of what each variant makes of a text, by its name.

        It covers the graphs, the tensors that they refer to, the tokenizer and the settings of generation.
        """
        copied = self.manifest.steps.get("backbone", {}).get("files") or {}
        common = BACKBONE_WEIGHTS, *(name for name in copied if name in self.manifest.files)
        return {
            variant.name: self._hash_of(
                (*common, *variant.graphs.values(), *variant.plugin_files, *self._module_files(variant))
            )
            for variant in self.manifest.variants
        }

    def _module_files(self, variant: Variant) -> list[str]:
        folders = tuple(f"{self.manifest.modules[name].folder}/" for name in variant.modules)
        return sorted(name for name in self.manifest.files if folders and name.startswith(folders))

    def _hash_of(self, names: Iterable[str]) -> str:
        found = {name: self.manifest.files[name].sha256 for name in names}
        return next(iter(found.values())) if len(found) == 1 else sha256_json(found)

    def engines(self, target: str, variant: str, part: str | None = None) -> list[EngineEntry]:
        """The engines of a variant for a target, for all GPUs and versions.

        Args:
            target: The target.
            variant: The variant's name, or `any-ratio`.
            part: The part of the model. None for the part that plugins are in.
        """
        asked = target, variant, part or plugin_part(self.manifest.backbone.parts)
        return [e for e in self.manifest.engines if (e.target, e.variant, e.part) == asked]

    def graph_of_engine(self, entry: EngineEntry) -> str:
        """The graph that an engine is built from."""
        if entry.takes_plugins:
            return self.manifest.any_ratio[entry.part]
        variant = entry.variant_in(self.manifest.variants) or self.variant(entry.variant)
        return variant.graphs[entry.part]

    def sidecar(self, entry: EngineEntry) -> dict[str, Any]:
        """The content of an engine's sidecar file. The file's hash is checked first.

        Raises:
            UserError: The file is not a sidecar.
        """
        path = self.file(entry.sidecar)
        content = read_json_object(path, _COMPILE_AGAIN)
        try:
            Sidecar.model_validate(content)
        except ValidationError as error:
            words = describe_validation_error(error, Sidecar)
            raise UserError(f"{path} is not an engine's sidecar: {words}", _COMPILE_AGAIN) from error
        return content

    def engine_records(self, entry: EngineEntry) -> list[EngineRecord]:
        """The verification records of an engine, one per GPU."""
        sha256 = self.manifest.files[entry.engine].sha256
        return [record for record in read_records(self.path) if record.sha256 == sha256]

    def engine_status(self, entry: EngineEntry) -> str:
        """The verification state of an engine, as text for people."""
        return "; ".join(map(str, self.engine_records(entry))) or BUILT_ONLY

    def engine_states(self, variant: str, part: str | None = None) -> list[str]:
        """The engines of a variant, as text for people: the target and the verification state.

        Args:
            variant: The variant's name, or `any-ratio`.
            part: The part of the model. None for the part that plugins are in.
        """
        asked = variant, part or plugin_part(self.manifest.backbone.parts)
        return [
            f"{entry.target} {entry.version} {entry.platform}: {self.engine_status(entry)}"
            for entry in self.manifest.engines
            if (entry.variant, entry.part) == asked
        ]

    def _check_entry(self, name: str) -> None:
        path = self.path / name
        links = [part for part in (path, *path.parents) if part != self.path and self.path in part.parents]
        if any(part.is_symlink() for part in links):
            raise UserError(
                f"{path} is reached through a symbolic link, which is not allowed.", rebuild_hint(self.path)
            )
        if not path.is_file():
            raise UserError(f"{path} is missing from the bundle.", rebuild_hint(self.path))
        status = path.stat()
        if status.st_nlink != 1:
            raise UserError(
                f"{path} is a hard link; onnxruntime and onnx refuse hard links for weights.",
                "Copy the bundle without links: cp -r --no-preserve=links",
            )
        expected = self.manifest.files[name].size_bytes
        if status.st_size != expected:
            raise UserError(
                f"{path} has {status.st_size} bytes; the manifest says {expected}.", rebuild_hint(self.path)
            )
