"""What stands in one row of a report: the members of all folders that are the same variant, by
training seed; and which row is the reference.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sla2_eval.report.sources import Member, Source
from sla2_eval.runs.store import file_digest
from sla2_eval.scoring.comparisons import Values


@dataclass
class Group:
    """A variant with all its trainings."""

    label: str
    members: list[tuple[Source, Member]] = field(default_factory=list)
    reference: bool = False

    @property
    def family(self) -> str:
        """Of its members, which share it."""
        return self.members[0][1].family

    @property
    def sparsity(self) -> float | None:
        """The mean over its seeds; None where that of one is not known."""
        return self._mean([[m.sparsity for m in self.of_seed(seed)] for seed in self.seeds()])

    @property
    def flops(self) -> float | None:
        """As sparsity: those of attention, as a share of full attention's."""
        return self._mean([[m.flops for m in self.of_seed(seed)] for seed in self.seeds()])

    @staticmethod
    def _mean(by_seed: list[list[float | None]]) -> float | None:
        known = [[value for value in values if value is not None] for values in by_seed]
        if not all(known):
            return None
        return sum(sum(values) / len(values) for values in known) / len(known)

    def seeds(self) -> list[int | None]:
        """The seeds of its members, each once; None where a folder names none."""
        return list(dict.fromkeys(member.seed for _, member in self.members))

    def of_seed(self, seed: int | None) -> list[Member]:
        """The members of one seed."""
        return [member for _, member in self.members if member.seed == seed]

    def rows(self, seed: int | None) -> dict[str, dict]:
        """What was scored of one seed, by file name; the scores of several folders together."""
        found: dict[str, dict] = {}
        for member in self.of_seed(seed):
            for row in member.results["videos"] if member.results else ():
                before = found.get(row["file_name"], {})
                scores = {**before.get("scores", {}), **row["scores"]}
                found[row["file_name"]] = {**before, **row, "scores": scores}
        return found

    def values(self, metric: str) -> dict[int | None, Values]:
        """The values of a metric by seed."""
        found = {
            seed: {
                (row["prompt"], name): row["scores"][metric]
                for name, row in self.rows(seed).items()
                if metric in row["scores"]
            }
            for seed in self.seeds()
        }
        return {seed: values for seed, values in found.items() if values}

    def entries(self, metric: str) -> dict[int | None, dict]:
        """What scoring says of a set metric by seed, of the first folder that has a number."""
        found: dict[int | None, dict] = {}
        for _, member in self.members:
            entry = (member.results or {}).get("metrics", {}).get(metric, {})
            if entry.get("mean") is not None:
                found.setdefault(member.seed, entry)
        return found


def grouped(sources: Sequence[Source], reference: str | Path | None = None) -> list[Group]:
    """The rows of the report, in the order of the folders.

    Members of one label are one variant if they are other seeds of it under the same settings, or
    other videos, or other metrics of the same videos; else the later one's row also names its
    folder. `reference`: one of the folders, or a label. Raises ValueError if it is neither.
    """
    groups: list[Group] = []
    for source in sources:
        own: list[Group] = []
        for member in source.members:
            alike = [g for g in groups if g.members[0][1].label == member.label]
            fits = next((g for g in alike if _fits(g, source, member)), None)
            if fits is None:
                label = f"{member.label} ({source.name})" if alike else member.label
                fits = Group(_unused(label, groups))
                groups.append(fits)
            fits.members.append((source, member))
            own.append(fits)
    _choose(groups, sources, reference)
    return groups


def _unused(label: str, groups: Iterable[Group]) -> str:
    taken = {group.label for group in groups}
    number = 2
    found = label
    while found in taken:
        found, number = f"{label} {number}", number + 1
    return found


def _fits(group: Group, source: Source, member: Member) -> bool:
    """Whether a member is a part of the variant of a group."""
    for theirs, other in group.members:
        if source is theirs:
            continue
        if source.kind == theirs.kind and other.settings != member.settings:
            return False
        if other.seed == member.seed and not _same_videos(other, member):
            return False
    return True


def _same_videos(one: Member, other: Member) -> bool:
    """Whether two members agree on every file that both have, as far as that is known."""
    if one.videos and other.videos and one.videos.resolve() == other.videos.resolve():
        return True
    ours, theirs = _digests(one), _digests(other)
    if ours and theirs:
        return all(ours[name] == theirs[name] for name in ours.keys() & theirs.keys())
    for known, folder in ((ours, other), (theirs, one)):
        entries = folder.entries()
        # One video of the folder tells, as scoring has digests of all of them.
        if name := next((name for name in sorted(known) if name in entries), None):
            try:
                return file_digest(entries[name].path) == known[name]
            except OSError:
                continue
    return not _disagree(one, other)


def _digests(member: Member) -> dict[str, str]:
    rows = member.results["videos"] if member.results else ()
    return {row["file_name"]: row["sha256"] for row in rows if row.get("sha256")}


def _disagree(one: Member, other: Member) -> bool:
    """Whether a video has two values of one metric."""
    values = [
        {
            (row["file_name"], metric): value
            for row in (member.results["videos"] if member.results else ())
            for metric, value in row["scores"].items()
        }
        for member in (one, other)
    ]
    return any(values[0][key] != values[1][key] for key in values[0].keys() & values[1].keys())


def _choose(groups: list[Group], sources: Sequence[Source], reference: str | Path | None) -> None:
    """Mark the reference: the one asked for, else that of the first folder that has one."""
    if reference is None:
        found = next((g for g in groups if any(m.reference for _, m in g.members)), None)
        if found:
            found.reference = True
        return
    wanted = Path(reference).resolve()
    for source in sources:
        chosen = [m for m in source.members if m.videos and m.videos.resolve() == wanted]
        if source.path.resolve() == wanted:
            chosen = [source.main]
        if chosen:
            next(g for g in groups if any(m is chosen[0] for _, m in g.members)).reference = True
            return
    if found := next((g for g in groups if g.label == str(reference)), None):
        found.reference = True
        return
    known = [*(str(source.path) for source in sources), *(g.label for g in groups)]
    raise ValueError(f"--reference: expected one of {', '.join(known)}, got {str(reference)!r}")
