"""BibTeX entries of the papers behind the library, from ``references.bib``; :func:`bibtex` prints those a run used."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from typing import final

from fewstep.errors import unknown

__all__ = ["CITATIONS", "Citation", "bibtex", "short_reference"]


TEX_LETTERS = {
    "{\\'e}": "é",
    "{\\'a}": "á",
    '{\\"a}': "ä",
    '{\\"e}': "ë",
    '{\\"o}': "ö",
    '{\\"u}': "ü",
    "{\\o}": "ø",
    "{\\L}": "Ł",
}


@final
@dataclass(frozen=True)
class Citation:
    """One entry of the bibliography.

    Attributes:
        kind: ``inproceedings``, ``article``, ``book`` or ``misc``.
        key: the key by which a method cites it (``liu2023flow``).
        fields: the entry's fields by name (``title``, ``author``, ``year``, ``eprint``).
        text: the entry as BibTeX.
    """

    kind: str
    key: str
    fields: dict[str, str]
    text: str

    @classmethod
    def parse(cls, text: str) -> Citation:
        """Read one entry, which has one field per line."""
        head = re.match(r"@(\w+)\{(\w+),", text)
        assert head is not None, text
        fields = re.findall(r"^  (\w+) = \{(.*)\},?$", text, re.MULTILINE)
        return cls(head[1], head[2], dict(fields), text)


def _read() -> dict[str, Citation]:
    paragraphs = resources.files("fewstep").joinpath("references.bib").read_text(encoding="utf-8").strip().split("\n\n")
    entries = [Citation.parse(text) for text in paragraphs if not text.startswith("%")]
    return {entry.key: entry for entry in entries}


CITATIONS = _read()


def bibtex(keys: Iterable[str]) -> str:
    """BibTeX of the given keys, each once and in the order given.

    >>> print(bibtex(["liu2023flow"]).splitlines()[0])
    @inproceedings{liu2023flow,

    Raises:
        UserError: a key is unknown.
    """
    return "\n\n".join(_find(key).text for key in dict.fromkeys(keys))


def short_reference(key: str) -> str:
    """One line: first author and others, title, year, arXiv number.

    >>> short_reference("ho2022classifier")
    'Ho and Salimans, Classifier-Free Diffusion Guidance, 2022, arXiv:2207.12598'
    """
    fields = _find(key).fields
    names = [author.split(",")[0] for author in fields["author"].split(" and ")]
    who = " and ".join(names) if len(names) <= 2 else f"{names[0]} et al."
    line = f"{who}, {fields['title']}, {fields['year']}" + (f", arXiv:{fields['eprint']}" if "eprint" in fields else "")
    for tex, letter in TEX_LETTERS.items():
        line = line.replace(tex, letter)
    return line.replace("{", "").replace("}", "").replace("--", "–")


def _find(key: str) -> Citation:
    if key not in CITATIONS:
        raise unknown("citation", key, CITATIONS)
    return CITATIONS[key]
