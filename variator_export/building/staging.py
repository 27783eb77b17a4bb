"""Staging a bundle: every step either reuses its result from the old bundle or is run again."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from variator_export.bundle.files import BundleFiles
from variator_export.bundle.manifest import MANIFEST_NAME, FileEntry, Manifest
from variator_export.bundle.publishing import publish
from variator_export.bundle.reports import PART_SUFFIX
from variator_export.core.errors import UserError
from variator_export.core.hashing import sha256_file
from variator_export.core.interrupts import raise_if_interrupted
from variator_export.core.progress import Progress, StepReport

# User-facing terms for keys with uninformative names.
_WORDS = {"code": "the code of variator-export", "platform": "the platform"}


class StagedBundle:
    """A new bundle in a staging folder next to the existing bundle.

    Args:
        folder: An empty folder.
        old: The existing bundle; None if there is none.
        progress: Receives a report for every step.
    """

    def __init__(self, folder: Path, old: BundleFiles | None, progress: Progress) -> None:
        self.folder = folder
        self.old = old
        self.progress = progress
        self.reports: list[StepReport] = []
        self.steps: dict[str, dict[str, Any]] = {}
        self._files: dict[str, FileEntry] = {}
        self._to_copy: list[str] = []
        self._made_something = False

    def step(
        self,
        name: str,
        depends_on: Mapping[str, Any],
        outputs: Sequence[str],
        make: Callable[[], None],
        because: str | None = None,
    ) -> bool:
        """Run one step, or reuse its result from the old bundle.

        Args:
            name: Name of the step, for example `bind/ratio-4`.
            depends_on: Everything that determines the result, as JSON values. The values are stored, so that
                the next build can compare them and report the changes.
            outputs: The files that the step creates.
            make: Creates the files in the staging folder.
            because: A reason to run the step although nothing that it depends on has changed.

        Returns:
            Whether the result was reused.
        """
        raise_if_interrupted()
        depends_on = dict(depends_on)
        if self.steps.get(name) == depends_on:  # this build has run it already
            return True
        self.steps[name] = depends_on
        why = self._why_not_reused(name, depends_on, outputs) or because
        if why is None:
            assert self.old is not None
            for output in outputs:
                self._files[output] = self.old.manifest.files[output]
            self._to_copy += outputs
            if self._made_something:
                self.materialise()
            self._report(StepReport(name, "reused", "nothing that it depends on has changed"))
            return True
        self.materialise()
        self._made_something = True
        self.progress.started(name, why)
        for output in outputs:
            (self.folder / output).parent.mkdir(parents=True, exist_ok=True)
        make()
        for output in outputs:
            path = self.folder / output
            self._files[output] = FileEntry(sha256=sha256_file(path), size_bytes=path.stat().st_size)
        self._report(StepReport(name, "made", why))
        return False

    def would_make(self, name: str, depends_on: Mapping[str, Any], outputs: Sequence[str]) -> bool:
        """Check whether `step` would run the step, not reuse its result."""
        return self._why_not_reused(name, depends_on, outputs) is not None

    def take_over(self) -> None:
        """Reuse the whole old bundle, except for its engines, without changes."""
        assert self.old is not None
        manifest = self.old.manifest
        engines = {path for entry in manifest.engines for path in entry.files}
        names = [name for name in manifest.files if name not in engines]
        self.steps |= {name: s for name, s in manifest.steps.items() if not name.startswith("engine/")}
        self._files |= {name: manifest.files[name] for name in names}
        self._to_copy += names

    def sha256(self, file: str) -> str:
        """Return the hash of a file that a step created or reused."""
        return self._files[file].sha256

    def current(self, file: str) -> Path:
        """Return the place of a file that a step created or reused; a reused file may not be copied yet."""
        if file in self._to_copy and self.old is not None:
            return self.old.file(file)
        return self.folder / file

    def materialise(self) -> None:
        """Copy the files that were reused so far, after checking their hashes.

        Copying is put off until it is needed, because a bundle that is up to date needs no copies.
        """
        for name in self._to_copy:
            assert self.old is not None
            target = self.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.old.file(name), target)
        self._to_copy.clear()

    @contextmanager
    def preview(self, manifest: Manifest) -> Iterator[Path]:
        """Yield the staging folder as a bundle that can be opened.

        Args:
            manifest: The manifest without steps and files, as for `finish`.
        """
        self.materialise()
        path = self.folder / MANIFEST_NAME
        path.write_text(self._complete(manifest).to_json(), encoding="utf-8")
        try:
            yield self.folder
        finally:
            path.unlink()

    def _complete(self, manifest: Manifest) -> Manifest:
        return manifest.model_copy(
            update={"steps": dict(sorted(self.steps.items())), "files": dict(sorted(self._files.items()))}
        )

    def finish(self, manifest: Manifest, bundle: Path) -> bool:
        """Publish the new bundle, unless the existing bundle is identical.

        Args:
            manifest: The manifest without steps and files, which are filled in here.
            bundle: The folder to publish to.

        Returns:
            Whether a bundle was published.
        """
        manifest = self._complete(manifest)
        if self.old is not None and not self._made_something and manifest == self.old.manifest:
            self.old.check_all()
            return False
        self.materialise()
        if self.old is not None:
            self._carry_over(self.old)
        (self.folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
        raise_if_interrupted()
        publish(self.folder, bundle)
        return True

    def _carry_over(self, old: BundleFiles) -> None:
        """Copy files in the old folder that are not part of the bundle: reports and the user's own files."""
        for folder, subfolders, files in os.walk(old.path, onerror=_raise):
            inside = Path(folder).relative_to(old.path)
            links = [name for name in subfolders if (Path(folder) / name).is_symlink()]
            for name in (inside / name for name in (*files, *links)):
                own = name.as_posix()
                if own in old.manifest.files or own == MANIFEST_NAME or own.endswith(PART_SUFFIX):
                    continue
                target = self.folder / name
                if target.is_symlink() or target.exists():
                    if own.startswith("reports/"):
                        continue  # this report was written again
                    raise UserError(
                        f"{old.path / name} is not part of the bundle, but the new bundle has a file of the "
                        "same name.",
                        "Move the file somewhere else.",
                    )
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(old.path / name, target, follow_symlinks=False)
            if not files and not subfolders:
                (self.folder / inside).mkdir(parents=True, exist_ok=True)

    def reuse_if_valid(self, name: str, outputs: Sequence[str], depends_on: Mapping[str, Any]) -> bool:
        """Reuse a result that was not requested if it is still valid; otherwise drop it."""
        why = self._why_not_reused(name, depends_on, outputs)
        if why is None:
            return self.step(name, depends_on, outputs, lambda: None)
        self._report(StepReport(name, "dropped", f"it was not asked for, and {why}"))
        return False

    def _why_not_reused(self, name: str, depends_on: Mapping[str, Any], outputs: Sequence[str]) -> str | None:
        if self.old is None:
            return "the bundle is new"
        before = self.old.manifest.steps.get(name)
        if before is None:
            return "the bundle does not have it yet"
        if missing := [output for output in outputs if output not in self.old.manifest.files]:
            return f"the bundle lacks {missing[0]}"
        changed = _changes(before, depends_on)
        return f"changed: {', '.join(changed)}" if changed else None

    def _report(self, report: StepReport) -> None:
        self.reports.append(report)
        self.progress.finished(report)


def _raise(error: OSError) -> None:
    raise error


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List the names of the entries that differ between two JSON mappings."""
    names = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            names += _changes(old, new, f"{prefix}{key}.")
        elif old != new:
            short = (
                f" ({old} to {new})" if all(isinstance(v, str) and len(v) < 24 for v in (old, new)) else ""
            )
            names.append(f"{_WORDS.get(key, prefix + key)}{short}")
    return names
