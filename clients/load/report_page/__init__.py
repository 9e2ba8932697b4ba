"""The load report: one self-contained HTML page from the runs of `load.results`."""

from load.report_page.page import render, write_page
from load.report_page.verdict import Result, judge_repeats

__all__ = ["Result", "judge_repeats", "render", "write_page"]
