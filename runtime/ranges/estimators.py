"""List every range estimator, and read one from its text.

An estimator is pure. The `state`, float32 [width, *unit], is an input of the step, and the state after the step an
output; NaN marks a state that has seen nothing yet. *Static* estimators take the range from the state alone, so that
one pass over the tensor both quantizes the tensor and observes it for the next step; *dynamic* ones read the tensor
first.
"""

import dataclasses
import re
from typing import Final

from qcompiler.runtime.ranges.estimator import Range
from qcompiler.runtime.ranges.learned import LEARNED
from qcompiler.runtime.ranges.past import PAST
from qcompiler.runtime.ranges.present import PRESENT
from qcompiler.runtime.ranges.searched import SEARCHED
from qcompiler.runtime.ranges.statistical import STATISTICAL

#: every estimator; `parse_range` finds them by name
ESTIMATORS: Final[tuple[type[Range], ...]] = (*PRESENT, *PAST, *SEARCHED, *STATISTICAL, *LEARNED)


def parse_range(text: str) -> Range:
    """Return the estimator that `str` wrote: `current`, `hindsight(0.9,0.01)`; numbers left out have their defaults.

    Raises:
        ValueError: an unknown name, too many numbers, or one that is none.
    """
    match = re.fullmatch(r"([a-z-]+)(?:\(([-+.\de,]*)\))?", text)
    kinds = {kind.name: kind for kind in ESTIMATORS}
    if match is None or match[1] not in kinds:
        raise ValueError(f"range: got {text!r}; valid: {', '.join(kinds)}, with numbers as in hindsight(0.9,0.01)")
    kind = kinds[match[1]]
    fields = dataclasses.fields(kind)
    given = match[2].split(",") if match[2] else []
    if len(given) > len(fields):
        raise ValueError(f"range: {kind.name} takes {len(fields)} numbers, got {text!r}")
    try:
        return kind(**{field.name: float(number) for field, number in zip(fields, given, strict=False)})
    except ValueError as error:
        raise ValueError(f"range: got {text!r}: {error}") from None
