"""The recipe's section ``score``, and the sets of each country's law that fill it."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from fastcpt.recipe_sections import Section
from fastcpt.yaml_files import read_yaml


@cache
def law_sets() -> dict[str, dict[str, Any]]:
    """The sets of ``law_sets.yaml``: kinds of act, subjects, languages and citations of each country's law."""
    content: dict[str, dict[str, Any]] = read_yaml(Path(__file__).with_name("law_sets.yaml"))
    return content


class LegalWeights(Section):
    """Weights of the ``legal`` score; each component is in 0..1 before it is weighted."""

    recency: float = 20.0
    kind_of_act: float = 20.0
    subject_matter: float = 20.0
    length: float = 10.0
    running_text: float = 15.0
    boilerplate: float = 5.0
    in_force: float = 5.0
    citations: float = 15.0
    language: float = 10.0


def _pattern(text: str) -> str:
    try:
        groups = re.compile(text, re.IGNORECASE).groupindex
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from error
    if not groups:
        raise ValueError(r"has no named group to identify an act, such as (?P<number>\d+-\d+)")
    return text


Pattern = Annotated[str, AfterValidator(_pattern)]


class Score(Section):
    method: Literal["legal", "published"] = Field(
        "legal", description="The project's own score, or the published one (docs/corpus.md)."
    )
    weights: LegalWeights = LegalWeights()
    law: str = Field(
        "eu",
        description="The law: a set in law_sets.yaml, of kinds, subjects, languages, citations.",
    )
    kinds: dict[str, Annotated[float, Field(ge=0.0, le=1.0)]] = Field(
        default={}, description="Kinds of act, each with a weight in 0..1; else the set's."
    )
    subjects: dict[str, float] = Field(
        default={},
        description="Subject matters that count, by whole words, each with a weight in 0..1; else "
        "the set's.",
    )
    languages: list[str] = Field(default=[], description="Languages of full value; else the set's.")
    cited_by: list[Pattern] = Field(
        default=[],
        description="How a text cites an act: regular expressions, whose named groups identify the act; "
        "else the set's. EU acts cited by number are found without.",
    )
    named_by: list[Pattern] = Field(
        default=[],
        description="How a title names its own act, with the same groups; else the set's, else cited_by at "
        "the title's beginning.",
    )
    amending: list[str] = Field(
        default=[],
        description="Words of a title after which it names the acts that it amends; else the set's.",
    )

    @model_validator(mode="before")
    @classmethod
    def of_its_law(cls, given: Any) -> Any:
        law = given.get("law", "eu")
        if law not in law_sets():
            raise ValueError(f"law: no set '{law}'; there are {', '.join(law_sets())}")
        return law_sets()[law] | given
