"""Check that a loaded package is the same model: how far its logits are off, and its choices.

    ./check_equivalence.sh --model-id random:tiny

Errors are absolute, in standard deviations of the logits of the model in float32, uncompiled. The
package may be as far off as eager in the same dtype is; much more is a failure.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # left out by PYTHONSAFEPATH

from aotinductor.flags import RunSettings
from common import errors
from common.cli import Console, EquivalenceFlags, config_of, parse_flags
from common.compiler.caches import private_compiler_caches
from common.measure import report

# kernels that add up in another order: a few times eager's own error, or float32's rounding
ALLOWED = 4.0
ROUNDING = 1e-3


def main(argv: Sequence[str]) -> None:
    settings, flags = parse_flags(__doc__, (RunSettings, EquivalenceFlags), argv)
    console = Console(settings.shared.quiet, settings.shared.verbose)
    with private_compiler_caches():
        # imported here: --help answers without torch, and bad flags without its seconds
        from aotinductor.build.verify import compare_logits

        document = compare_logits(settings, flags, console)
    report.write_json(document | {"config": config_of(settings, flags)}, settings.shared.json)
    console.result(report.logits_table(document))
    for row in document["rows"]:
        found = row["load"]["max_abs_error"]
        allowed = ALLOWED * row["eager"]["max_abs_error"] + ROUNDING
        if not found <= allowed:  # written so that NaN fails
            raise errors.ScriptError(
                f"at a prompt of {row['prompt_length']} tokens the package's logits are off by "
                f"{found:.2g} standard deviations, at most {allowed:.2g} was expected: rebuild it "
                "with ./build.sh"
            )


if __name__ == "__main__":
    errors.run_script(main)
