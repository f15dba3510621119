"""Check that a loaded artifact is the same model: how far its logits are off, and its tokens.

    ./check_equivalence.sh --model-id random:tiny

Errors are absolute, in standard deviations of the logits of the model in float32, uncompiled.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # left out by PYTHONSAFEPATH

from common.cli import Console, EquivalenceFlags, config_of, parse_flags
from common.compiler.caches import private_compiler_caches
from common.errors import ScriptError, run_script
from common.measure.report import logits_table, write_json
from portable_cache.flags import UNTOLD, RunSettings


def main(argv: Sequence[str]) -> None:
    settings, flags = parse_flags(__doc__, (RunSettings, EquivalenceFlags), argv, **UNTOLD)
    console = Console(settings.shared.quiet, settings.shared.verbose)
    with private_compiler_caches():
        # imported late: --help answers without torch, and bad flags without its seconds
        from portable_cache.build.verify import compare_logits
        from portable_cache.start.opening import choose_built_target, open_model

        pair = settings.files.pair()
        target = choose_built_target(settings.shared, pair, console)
        wanted = settings.wanted()._replace(mode="load", must_load=True)
        opened = open_model(target, pair, wanted, console)
        lengths, steps = flags.logit_prompt_lengths, flags.logit_steps
        seed = settings.shared.seed
        document, wrong = compare_logits(target, opened, lengths, steps, seed, console)
    write_json(document | {"config": config_of(settings, flags)}, settings.shared.json)
    console.result(logits_table(document))
    if wrong:
        raise ScriptError("; ".join(wrong))


if __name__ == "__main__":
    run_script(main)
