"""``inspect --graph``: the picture of a site before and after."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch.export import ExportedProgram

from bda_fx.api import Rewrite
from bda_fx.cli.draw_site import dot_of, svg_of
from bda_fx.cli.errors import CliError, ExitCode
from bda_fx.cli.site_graph import site_graph
from bda_fx.exporters.place_output import check_destination, place_output
from bda_fx.report import Report, SiteReport

DRAWERS = {".svg": svg_of, ".dot": dot_of}


@dataclass(frozen=True)
class Picture:
    """Where to draw, and which site: the weight's name, or its end; None is the first."""

    path: Path
    site: str | None = None
    force: bool = False

    def check(self) -> None:
        """Look before the work begins whether the picture can be drawn.

        Raises:
            CliError: the suffix says no format, or the file cannot be written.
        """
        if self.path.suffix not in DRAWERS:
            raise CliError(
                f"--graph {self.path}: the format is told by the suffix",
                f"name it {self.path.with_suffix('.svg')}, or .dot for Graphviz",
                ExitCode.USAGE,
            )
        check_destination(self.path, overwrite=self.force)

    def write(self, original: ExportedProgram, done: Rewrite) -> None:
        """Draw the site.

        Raises:
            CliError: it is none that was rewritten.
        """
        site = self._chosen(done.report)
        saved = (site.params_before or 0) - (site.params_after or 0)
        programs = {
            f"{site.name}: {site.params_before or 0:,} parameters": original,
            f"rewritten: {saved:,} fewer, basis of {site.basis_size}": done.program,
        }
        pictures = {
            title: site_graph(program, site.name, site.contractions)
            for title, program in programs.items()
        }
        with place_output(self.path, overwrite=self.force) as staging:
            staging.path.write_text(DRAWERS[self.path.suffix](pictures))

    def _chosen(self, report: Report) -> SiteReport:
        for site in report.rewritten:
            if self.site is None or site.name.endswith(self.site):
                return site
        names = ", ".join(site.name for site in report.rewritten[:4])
        what = "no site is rewritten" if self.site is None else f"no site of {self.site} is"
        raise CliError(
            f"there is nothing to draw: {what}" + (" rewritten" if self.site else ""),
            f"some that are: {names}" if names else "bda-fx inspect MODEL says why",
            ExitCode.USAGE if names else ExitCode.CANNOT_CONVERT,
        )
