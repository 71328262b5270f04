"""The command-line options that the studies on Fashion-MNIST share."""

import argparse
from pathlib import Path

import image_data
from two_routes import Parser, positive


def parse(parser: Parser, folder: Path, workers: int) -> argparse.Namespace:
    """Add the options to those of a study, and parse the command line.

    Args:
        folder: the default of --out. With --quick, it is a folder of this name in the current one.
        workers: the default of --workers.
    """
    parser.add_argument("--report", action="store_true", help="train nothing: tables and figures of the finished runs")
    parser.add_argument(
        "--workers", type=positive, default=workers, help="number of single-threaded processes; default %(default)s"
    )
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of the images; default ./%(default)s")
    parser.add_argument(
        "--out", type=Path, help=f"output folder; default docs/{folder.name}, or ./{folder.name} if --quick"
    )
    options = parser.parse_args()
    if options.out is None:
        options.out = Path(folder.name) if options.quick else folder
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        if not options.quick and not options.report:
            image_data.load("fashion-mnist", 10, 10, root=options.root)
    except OSError as error:
        parser.error(f"argument --out: {error}")
    except ValueError as error:
        parser.error(f"argument --root: {error}")
    return options
