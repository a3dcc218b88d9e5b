"""The experiment's numbers from its rows: means, intervals and paired differences over images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .plan import ConflictPlan
from .statistics import Interval, bootstrap, paired_bootstrap

Rows = Sequence[Mapping[str, Any]]
Results = Mapping[str, Rows]


class Summary:
    """Figures of the results of a plan, as far as its runs are done (HY-WU, Shared and Single must be). All differences are on the same crops of the same images.

    images: only these, such as the photographs; all held-out images without.
    """

    def __init__(
        self, results: Results, plan: ConflictPlan, opposites: Mapping[str, str],
        images: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.plan, self.opposites = plan, dict(opposites)
        chosen = set(images)
        self.results = {
            name: [row for row in rows if not chosen or row["image"] in chosen]
            for name, rows in results.items()
        }
        rank = plan.main_rank
        self.main = {"HY-WU": f"hywu_r{rank}", "Shared": f"shared_r{rank}", "Single": "single"}
        self.main |= {"Shared large": "shared_large", "SFT": "sft"}
        self._join_singles()
        self.main = {label: name for label, name in self.main.items() if self.results.get(name)}

    def _join_singles(self) -> None:
        """ "single": each task by its own LoRA; "single_opposite": each by the opposite task's."""
        rank = self.plan.main_rank
        for name, of in (("single", lambda t: t), ("single_opposite", self.opposites.get)):
            self.results[name] = [
                row
                for task in self.plan.tasks
                for row in self.results.get(f"single_{of(task)}_r{rank}", ())
                if row["task"] == task
            ]

    # -- values ------------------------------------------------------------------------------------

    def values(
        self, name: str, task: str = "", phrasing: str = "seen", metric: str = "psnr"
    ) -> dict[str, list[float]]:
        """Image -> values in the order crop, task; of one task or of all."""
        found: dict[str, list[float]] = {}
        rows = [r for r in self.results[name] if r["phrasing"] == phrasing]
        for row in sorted(rows, key=lambda r: (r["image"], r["crop"], r["task"])):
            if task in ("", row["task"]):
                found.setdefault(row["image"], []).append(row[metric])
        return found

    def mean(self, name: str, task: str = "", **options: str) -> Interval:
        return bootstrap(self.values(name, task, **options))

    def difference(self, one: str, two: str, task: str = "", **options: str) -> Interval:
        """one - two, paired."""
        return paired_bootstrap(
            self.values(one, task, **options), self.values(two, task, **options)
        )

    def phrasing_loss(self, name: str) -> Interval:
        """Held-out phrasings minus seen ones, on the same sources."""
        return paired_bootstrap(
            self.values(name, phrasing="held_out"), self.values(name, phrasing="seen")
        )

    # -- what is said ------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Everything that the report shows; JSON-safe."""
        tasks, main = self.plan.tasks, self.main
        hywu, shared = main["HY-WU"], main["Shared"]
        controls = ("unchanged", "hywu_shuffled", "hywu_mean", "hywu_task_mean", "base")
        return {
            "images": len(self.values(hywu)),
            "psnr": self._table("psnr"),
            "ssim": self._table("ssim"),
            "opposite": {
                task: {
                    "Single of the task": self.mean("single", task).mean,
                    "Single of the opposite task": self.mean("single_opposite", task).mean,
                    "HY-WU": self.mean(hywu, task).mean,
                }
                for task in tasks
            },
            "differences": {
                label: self.difference(hywu, name)._asdict()
                for label, name in main.items()
                if label != "HY-WU"
            },
            "per_task": {
                task: {
                    "HY-WU - Single": self.difference(hywu, "single", task)._asdict(),
                    "HY-WU - Shared": self.difference(hywu, shared, task)._asdict(),
                }
                for task in tasks
            },
            "controls": {
                name: {
                    "psnr": self.mean(name)._asdict(),
                    "minus Shared": self.difference(name, shared)._asdict(),
                    "minus HY-WU": self.difference(name, hywu)._asdict(),
                }
                for name in controls
                if self.results.get(name)
            },
            "held_out_phrasings": {
                label: self.phrasing_loss(name)._asdict() for label, name in main.items()
            },
            "ranks": self.ranks(),
        }

    def ranks(self) -> dict[str, dict[str, Any]]:
        """Rank -> HY-WU, Shared and their difference in the sweep, where both are done; JSON-safe."""
        return {
            str(rank): self._at_rank(rank)
            for rank in sorted(self.plan.ranks)
            if {f"hywu_r{rank}_sweep", f"shared_r{rank}_sweep"} <= self.results.keys()
        }

    def _at_rank(self, rank: int) -> dict[str, Any]:
        hywu, shared = f"hywu_r{rank}_sweep", f"shared_r{rank}_sweep"
        return {
            "HY-WU": self.mean(hywu)._asdict(),
            "Shared": self.mean(shared)._asdict(),
            "HY-WU - Shared": self.difference(hywu, shared)._asdict(),
        }

    def _table(self, metric: str) -> dict[str, dict[str, Any]]:
        """Strategy -> task (and "all") -> mean and interval."""
        return {
            label: {
                task or "all": self.mean(name, task, metric=metric)._asdict()
                for task in (*self.plan.tasks, "")
            }
            for label, name in {
                "Unchanged": "unchanged",
                "Editor alone": "base",
                **self.main,
            }.items()
        }
