"""What callgrind counts, which takes valgrind and minutes: equal code is equal, and more Python in the executor shows.

Not collected by a plain run of the tests, where it would be skipped for want of valgrind; `nox -s instructions` has it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from skipcost.bench.callgrind import SUBJECTS
from skipcost.bench.instructions import count_both, judge
from skipcost.bench.revisions import FOLDERS, Revision

ROOT = Path(__file__).parent.parent.parent
LINE = "            return self._run(image)\n"
COMMENT = "            # The graph decides.\n"
WALK = "            Counter(edge.name for edge in self.graph.edges * 100)\n"


def test_more_python_in_the_executor_shows_and_a_comment_does_not(tmp_path: Path) -> None:
    """Forward passes that walk over the graph for nothing take more instructions; what runs none is unchanged."""
    sides = []
    for name, line in (("base", COMMENT), ("now", WALK)):
        links = tmp_path / name / "skipcost"
        for folder in FOLDERS:
            shutil.copytree(ROOT / folder, links / folder, ignore=shutil.ignore_patterns("__pycache__"))
        executor = links / "unet_models" / "network.py"
        assert executor.read_text().count(LINE) == 1
        executor.write_text(executor.read_text().replace(LINE, line + LINE))
        sides.append(Revision(name, str(links.parent), links))

    verdicts = judge(*count_both(*sides))

    print(*((each.case, each.base, each.now, each.change) for each in verdicts), sep="\n")  # noqa: T201 - to be read
    assert [each.case for each in verdicts] == list(SUBJECTS)
    for each in verdicts:
        assert each.verdict == ("regressed" if each.case.startswith("forward") else "unchanged"), each
