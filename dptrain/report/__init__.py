"""From records to tables, figures and a page. Nothing here trains or measures.

It reads the JSON files that docs/records.md describes and imports no other part of dptrain. Its libraries
beyond matplotlib are those of the extra ``report``; they are imported when they are needed.
"""

from dptrain.report.build import FORMATS, build
from dptrain.report.compare import compare, compare_folders, compare_paths, differences
from dptrain.report.curves import draw_curves
from dptrain.report.errors import ReportError
from dptrain.report.page import page
from dptrain.report.reading import Folder, Record, Study, frame, read, read_record
from dptrain.report.shown import Chart, Finding, Shown
from dptrain.report.studies import STUDIES, show

__all__ = [
    "FORMATS",
    "STUDIES",
    "Chart",
    "Finding",
    "Folder",
    "Record",
    "ReportError",
    "Shown",
    "Study",
    "build",
    "compare",
    "compare_folders",
    "compare_paths",
    "differences",
    "draw_curves",
    "frame",
    "page",
    "read",
    "read_record",
    "show",
]
