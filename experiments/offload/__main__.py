"""Studies of experts on disk: ``python -m experiments.offload simulate|predict|widths --OPTION=VALUE ...``

  simulate --trace=TRACE                             hit rates of a cache of experts by budget and policy
  predict  --trace=TRACE                             a table that foretells the next layer's experts, and how often it is right
  widths   --source=RUN --text=TEXT --target=DIR     how many bits each expert may have within a budget of loss

simulate --help, predict --help and widths --help say more.

Exit codes: 0 done; 2 bad input; 4 a file that can't be written or read.
"""

from collections.abc import Sequence

from experiments import exits
from experiments.offload import predict, simulate, widths

COMMANDS = {"simulate": simulate, "predict": predict, "widths": widths}


def main(argv: Sequence[str]) -> int:
    if argv[1:2] and argv[1] in COMMANDS:
        command = COMMANDS[argv[1]]
        if {"--help", "-h"} & set(argv[2:]):
            print(command.__doc__.strip())
            return 0
        return exits.guarded(f"experiments.offload {argv[1]}", lambda: command.run(command.parse(argv[2:])))
    if {"--help", "-h"} & set(argv[1:]):
        print(__doc__.strip())
        return 0
    given = argv[1] if argv[1:] else "nothing"
    return exits.fail(
        "experiments.offload", f"{given}: accepted is one of {', '.join(COMMANDS)}", exits.EXIT_BAD_INPUT
    )


if __name__ == "__main__":
    exits.leave("experiments.offload", main)
