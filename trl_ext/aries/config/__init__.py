"""
What an ARIES recipe says: one dataclass per section, in the order of the data. Each key is documented below its field; `docs/reference.py`
makes `docs/recipe_keys.md` from that.
"""

from .checks import HealthConfig, ParityConfig
from .data import DatasetConfig, EvaluationConfig, PromptsConfig
from .generation import DraftsConfig, GenerationConfig, RefinementsConfig
from .pairs import PairsConfig
from .refine import RefineConfig, SettledConfig
from .run import LOOP_KEYS, AriesConfig, LoopConfig
from .scores import JudgeConfig, ScorerConfig, ScoresConfig
from .settings import sampling_by_turn
