"""The folder that a bundle's backbone was read from, on the machine that built the bundle.

A manifest holds the backbone's source as it was typed, which may be relative to a folder that nobody
remembers. The absolute path stands in a report: it is of one machine, is not hashed, and is not pushed.
"""

from pathlib import Path

from variator_export.bundle.reports import read_report, store_report

ORIGIN_REPORT = "reports/backbone.json"
_FOLDER = "folder"
# PATH_MAX of Linux. Asking for a longer path is an error of its own.
_LONGEST_PATH = 4096


def store_origin(bundle: Path, backbone: Path) -> None:
    """Record the backbone's folder, unless it is recorded already.

    Raises:
        UserError: The bundle cannot be written.
    """
    folder = backbone.resolve()
    if recorded_origin(bundle) != folder:
        state = "The bundle is published; the folder of its backbone is not recorded."
        store_report(bundle, ORIGIN_REPORT, {_FOLDER: str(folder)}, state)


def recorded_origin(bundle: Path) -> Path | None:
    """The recorded folder. None if nothing readable is recorded."""
    found = read_report(bundle, ORIGIN_REPORT, _FOLDER)
    folder = None if found is None else found[_FOLDER]
    if not isinstance(folder, str) or len(folder) > _LONGEST_PATH or not Path(folder).is_absolute():
        return None
    return Path(folder)
