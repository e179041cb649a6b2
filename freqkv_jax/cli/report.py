"""`freqkv report RESULTS... --output DIR`: result files as one page."""

import argparse

DESCRIPTION = """\
Puts results of `freqkv eval` side by side: tables with differences at equal bytes and their 95 %
intervals, plots, and who wins where. Writes report.md with its figures, and report.html, which is
one file that needs no other."""
EXAMPLE = """\
example:
  freqkv report results/small --output report --title "SmolLM2, 2,048 slots\""""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLE
    parser.add_argument(
        "results", nargs="+", metavar="RESULTS", help="result files, or folders of them"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="where to write the report")
    parser.add_argument("--title", default="Results", help="of the page (Results)")
    parser.add_argument(
        "--baseline",
        metavar="POLICY",
        help="compare with this policy (its name or its label; default: one of equal bytes,"
        " sink_window first)",
    )
    parser.add_argument(
        "--policies",
        nargs="+",
        default=[],
        metavar="POLICY",
        help="only these (labels or names), for pictures with few curves (default: all)",
    )


def run(args: argparse.Namespace) -> int:
    """Writes the report and says where it is."""
    from freqkv_jax.evals.report import write_report

    written = write_report(args.results, args.output, args.title, args.baseline, args.policies)
    for path in written[-2:]:
        print(f"written           {path}")
    return 0
