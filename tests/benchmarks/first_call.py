"""What the first recalibration of a model costs beyond its passes.

    python tests/benchmarks/first_call.py [--models ResNet50-128 ...]
                                          [--markdown docs/benchmarks.md]

Each model is measured in this one process, in CPU time.
"""

from networks import NETWORKS, trained
from page import Section, new_parser, table
from recalibration import Inference, timed

MODELS = ("plain16", "MobileNetV2", "ResNet50-128")
BATCH = 32
PAGE = """\
The first `recalibrate` of a model in a process traces it once, a second one does not:
the difference of the two, in CPU time, over the first call of an inference function,
which is its trace and one batch of {batch}. *ResNet50-128* has 4 batches. The limit
that we set ourselves is 1.25.

{table}
"""
HEAD = (
    *("network", "first call of an inference function, s"),
    *("first recalibration, s", "second, s", "difference, in such first calls"),
)


def measure(name: str, steps: int | None) -> tuple[str, ...]:
    """A line of the table."""
    model, x = trained(name, NETWORKS[name], steps)
    inference = Inference(model, x, BATCH)
    report, first = timed(model, x)
    report.undo()
    _, second = timed(model, x)
    share = (first.cpu - second.cpu) / inference.first.cpu
    times = (inference.first.cpu, first.cpu, second.cpu)
    return (name, *(f"{each:.1f}" for each in times), f"{share:.2f}")


def main() -> None:
    """Prints the table."""
    parser = new_parser(__doc__)
    parser.add_argument(
        "--models", nargs="+", default=list(MODELS), choices=list(NETWORKS)
    )
    parser.add_argument("--steps", type=int, help="steps of training, in place of ours")
    options = parser.parse_args()
    section = Section("first_call")
    rows = []
    for name in options.models:
        rows.append(measure(name, options.steps))
        print("  ".join(cell.ljust(12) for cell in rows[-1]), flush=True)
    section.write(PAGE.format(batch=BATCH, table=table(HEAD, rows)), options.markdown)


if __name__ == "__main__":
    main()
