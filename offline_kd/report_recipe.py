"""What others reported, for the report: the field `published` of recipes."""

from typing import Annotated

from pydantic import Field

from offline_kd.support.strict import Strict

Name = Annotated[str, Field(pattern=r"^[0-9A-Za-z_\-]+$", max_length=100)]  # of files and folders, too
Percent = Annotated[float, Field(ge=0, le=100)]


class Published(Strict):
    """What others reported for these objectives; a report shows it beside what was reached here."""

    source: str = Field(description="where it stands: a paper, a table")
    top1: dict[Name, Percent | tuple[Percent, Percent]] = Field(
        min_length=1, description="percent by objective, or percent and standard deviation; `teacher` is the teacher"
    )

    def of(self, objective: str) -> tuple[float, float | None] | None:
        """Top-1 and, where it is known, its standard deviation."""
        found = self.top1.get(objective)
        return found if found is None or isinstance(found, tuple) else (found, None)
