"""Whether `keep_latency` keeps its word: a model is shrunk to a share of its latency, which is then measured again.

python recipes/benchmarks/latency.py

Model and text are those of `prose.py`. Dense and smaller model take turns over the batch for which the latency was
asked.

asked    the share of the dense model's latency
left     what the cut said that is left
again    what is measured afterwards, median over the turns
"""

import copy
import statistics

from prose import batches_of, parser_for, prepare
from transformers.utils.logging import disable_progress_bar

from hf_prune import PruningConfig, prune, shrink
from hf_prune.calibration.costs import measure_costs


def main() -> None:
    parser = parser_for(__doc__.splitlines()[0], calibration_samples=16)
    parser.add_argument("--keep", type=float, nargs="*", default=[0.9, 0.8, 0.7])
    parser.add_argument("--rows", nargs="*", default=["neuron:activation", "head+neuron:activation"])
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3, help="How often it is measured again.")
    args = parser.parse_args()
    disable_progress_bar()

    dense, calibration, *_ = prepare(args)
    batches = batches_of(calibration)
    print(f"{'':28}{'asked':>8}{'left':>8}{'again':>8}{'parameters':>13}")
    for row in args.rows:
        granularity, criterion = row.split(":")
        for keep in args.keep:
            model = copy.deepcopy(dense)
            config = PruningConfig(
                keep_latency=keep,
                granularity=granularity,
                criterion=criterion,
                calibration_samples=len(batches),
            )
            try:
                remaining = prune(model, config, batches).remaining
            except ValueError as error:  # Out of reach: small models take their time elsewhere.
                print(f"{row:28}{keep:>8.2f}  {error}", flush=True)
                continue
            assert remaining is not None
            shrink(model)
            shares = []
            for _ in range(args.repeats):
                costs = measure_costs({"dense": dense, "smaller": model}, batches[0], args.turns)
                taken = [costs[name].seconds or 0.0 for name in ("smaller", "dense")]
                shares.append(taken[0] / taken[1])
            again = statistics.median(shares)
            print(f"{row:28}{keep:>8.2f}{remaining.left:>8.3f}{again:>8.3f}{model.num_parameters():>13,}", flush=True)


if __name__ == "__main__":
    main()
