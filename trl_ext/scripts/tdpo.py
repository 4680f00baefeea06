"""
Train with TDPO. `trl-ext tdpo` runs this; so does a plain `accelerate launch`:

```bash
accelerate launch --config_file recipes/accelerate_configs/ddp.yaml -m trl_ext.scripts.tdpo \
    --config recipes/qwen2.5-7b/tdpo/config_qlora.yaml --learning_rate 1.0e-6
```
"""

import sys
from collections.abc import Sequence

from . import preference


def parse_args(argv: Sequence[str], prog: str | None = None) -> tuple:
    from .. import TDPOConfig

    return preference.parse_args(TDPOConfig, argv, prog)


def run(argv: Sequence[str]) -> None:
    from .. import TDPOTrainer

    preference.train(TDPOTrainer, argv)


if __name__ == "__main__":
    sys.exit(preference.exit_code(run, sys.argv[1:]))
